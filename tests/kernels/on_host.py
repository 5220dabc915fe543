"""Compiles a CUDA kernel's text for a CPU (programs_on_host.cpp) and runs launches of it."""

import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What the kernels say in instructions of the GPU, and what stands for it.
CALLS = (
    (r'asm volatile\("wgmma[^"]*wait_group[^"]*(\d);".*?\);', r"wait_for_products(\1);"),
    (r'asm volatile\("[^"]*bar\.sync 1, \d+;".*?\);', "bar_sync();"),
    (r'asm volatile\("barrier\.cluster\.arrive[^"]*".*?\);', "cluster_arrive();"),
    (r'asm volatile\("barrier\.cluster\.wait[^"]*".*?\);', "cluster_wait();"),
    (r'asm volatile\((?:[^;"]|"[^"]*")*\);', ";"),
    (r"extern __shared__ char raw\[\];", "char* raw = shared_array<char>(4096);"),
    (r"__shared__ u64 barriers\[[^;]*;", "u64* barriers = shared_array<u64>(0);"),
)


def host_text(name):
    """What stands before a kernel's text, behind its constants."""
    return (HERE / "fibers_on_host.cpp").read_text() + (HERE / name).read_text()


class OnHost:
    """A kernel's programs for a CPU, by their constants.

    Args:
        folder: for the compiled programs, and what they read and write.
        name: of the kernel.
        main: name of the file that reads a launch, runs it and writes what it gave.
        shared: other arrays in shared memory: patterns, and what stands for them.
    """

    def __init__(self, folder, name, main, shared=()):
        self._compiler = shutil.which("g++")
        if self._compiler is None:
            pytest.skip("needs g++")
        text = resources.files("kvarena.engine.kernels").joinpath(f"{name}.cu").read_text()
        for pattern, call in (*CALLS, *shared):
            text = re.sub(pattern, call, text)
        assert "__shared__" not in text and "asm volatile" not in text
        parts = host_text("programs_on_host.cpp"), text, (HERE / main).read_text()
        self._folder, self._text, self._programs = folder, "".join(parts), {}

    def __call__(self, constants, given):
        """What a launch writes. `given`: bytes that it reads."""
        key = tuple(constants.items())
        if key not in self._programs:
            defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
            source = self._folder / f"{len(self._programs)}.cpp"
            source.write_text(defines + self._text)
            self._programs[key] = source.with_suffix("")
            command = [self._compiler, "-std=c++17", "-O1", "-w", source, "-o", self._programs[key]]
            subprocess.run(command, check=True, capture_output=True, text=True)
        files = self._folder / "in", self._folder / "out"
        files[0].write_bytes(given)
        ran = subprocess.run([self._programs[key], *files], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return bytearray(files[1].read_bytes())
