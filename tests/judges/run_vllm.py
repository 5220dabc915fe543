"""vLLM's own end-to-end tests against this server: each file's server is `kvarena serve` with the flags of the test.

    pip install setuptools_rust setuptools_scm pytest-asyncio pybase64
    export VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0        # nothing is built
    pip download --no-deps --no-build-isolation --no-binary vllm vllm==0.33.0 && tar xzf vllm-0.33.0.tar.gz
    python tests/judges/run_vllm.py vllm-0.33.0 --work /tmp/judged --out judged.jsonl

The tests run as they are, under the models' names that they ask for; behind each name is the demo checkpoint, with
Qwen3's kind of chat template where the name is Qwen3's: it opens the thought that the demo would not begin, always in
tests of thoughts, else when a request asks for it. The demo says little to a prompt that is no chat: completions are
of random weights of its shape, which hardly ever end by themselves, and so are calls that are asked for: their free
strings come to an end by chance. What is left out is in `left_out.txt`; a line of JSON tells of each test, and a table
closes the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO = ROOT / "experiments" / "models" / "demo"
# What each group asks, and its files below tests/entrypoints.
GROUPS = {
    "completions": (
        "openai/completion/test_completion.py", "openai/completion/test_prompt_validation.py",
        "openai/test_chunked_prompt.py", "openai/test_return_token_ids.py", "openai/test_return_tokens_as_ids.py",
    ),
    "chats": (
        "openai/chat_completion/test_chat.py", "openai/chat_completion/test_chat_completion.py",
        "openai/chat_completion/test_chat_echo.py", "openai/chat_completion/test_chat_logit_bias_validation.py",
        "openai/chat_completion/test_logprob_token_ids.py", "openai/chat_completion/test_root_path.py",
        "openai/chat_completion/test_enable_force_include_usage.py",
    ),
    "tools": ("openai/chat_completion/test_completion_with_function_calling.py",),
    "reasoning": (
        "openai/chat_completion/test_include_reasoning.py", "openai/chat_completion/test_thinking_token_budget.py",
    ),
    "responses": (
        "openai/responses/test_basic.py", "openai/responses/test_errors.py", "openai/responses/test_function_call.py",
        "openai/responses/test_simple.py", "openai/responses/test_stateful.py",
        "openai/responses/test_structured_output.py",
    ),
    "Anthropic": ("anthropic/test_messages.py",),
    "tokenize": ("serve/tokenize/test_tokenization.py",),
    "metrics": ("serve/instrumentator/test_metrics.py", "serve/instrumentator/test_orca_metrics.py"),
    "load": ("serve/instrumentator/test_basic.py",),
    "models and keys": ("openai/models/test_models.py", "serve/middleware/test_optional_middleware.py"),
}  # fmt: skip
MAX_LENGTH = 32768  # of a context: tests ask for more than the demo's
DRAWN = (
    "openai/completion/", "openai/test_chunked_prompt.py", "serve/instrumentator/",
    "openai/responses/test_function_call", "openai/responses/test_structured_output",
    "openai/chat_completion/test_completion_with_function_calling.py",
)  # fmt: skip
# Where nobody asks for thoughts: the names stand for models without them, as the demo is.
PLAIN = ("anthropic/",)
THINKING = (
    "openai/chat_completion/test_include_reasoning.py", "openai/chat_completion/test_thinking_token_budget.py",
)  # fmt: skip
# Tests that want other weights than their file: text that ends, text that does not, or a vocabulary like that of the
# models which they name, for they name tokens of it.
OTHERWISE = {
    "openai/chat_completion/test_completion_with_function_calling.py": ("demo", "test_no_args_tool_call"),
    "openai/test_return_token_ids.py": ("drawn", "test_comparison_with_prompt_logprobs_and_logprobs"),
    "openai/responses/test_simple.py": ("drawn", "test_max_tokens"),
    "openai/responses/test_stateful.py": ("drawn", "test_background_cancel"),
    "openai/completion/test_completion.py": ("wide", "test_logprob_token_ids"),
    "openai/chat_completion/test_logprob_token_ids.py": ("wide", "test_logprob_token_ids"),
}
WIDE = 32_768  # rows of a vocabulary of which the tokenizer knows the first 2,048
NAMES = (
    "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2-1.5B-Instruct",
    "HuggingFaceH4/zephyr-7b-beta", "HuggingFaceTB/SmolLM2-135M-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "intfloat/multilingual-e5-small", "hmellor/tiny-random-LlamaForCausalLM", "openai-community/gpt2",
)  # fmt: skip


def prepare(source: Path, work: Path) -> None:
    """A folder with the tests, our server behind theirs, and a model under each name."""
    (work / "tests").mkdir(parents=True, exist_ok=True)
    entrypoints = source / "tests" / "entrypoints"
    if not entrypoints.is_dir():
        raise SystemExit(f"{source} holds no tests/entrypoints: give the folder of vLLM's unpacked source package")
    shutil.copytree(entrypoints, work / "tests" / "entrypoints", dirs_exist_ok=True)
    shutil.copy(HERE / "remote_server.py", work / "tests" / "utils.py")
    (work / "tests" / "__init__.py").touch()
    (work / "tests" / "conftest.py").write_text("class LocalAssetServer:\n    pass\n", encoding="utf-8")
    for name in NAMES:
        shutil.copytree(DEMO, work / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        weights = work / name / "model.safetensors"
        weights.unlink(missing_ok=True)
        weights.symlink_to(work / "weights.safetensors")


def lay(work: Path, weights: str, file: str) -> None:
    """Put weights behind all names, and templates behind those of models that think, as the tests of a file ask.

    Args:
        work: the folder of `prepare`.
        weights: the `demo`'s, `drawn` at random in its shape, or `wide`: drawn with `WIDE` rows of vocabulary.
        file: below tests/entrypoints.
    """
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    text = template.replace("THINKS_BY_ITSELF", str(file in THINKING).lower())
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8")) | {"max_position_embeddings": MAX_LENGTH}
    if weights == "wide":
        config["vocab_size"] = WIDE
    for name in NAMES:
        (work / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        place = work / name / "chat_template.jinja"
        place.unlink(missing_ok=True)
        if "Qwen3" in name and not file.startswith(PLAIN):
            place.write_text(text, encoding="utf-8")
    place = work / "weights.safetensors"
    place.unlink(missing_ok=True)
    if weights == "demo":
        place.symlink_to(DEMO / "model.safetensors")
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work / NAMES[0]))
    drawn.save_pretrained(work / weights)
    place.symlink_to(work / weights / "model.safetensors")


def judge(work: Path, out: Path, files: list[str]) -> None:
    """Run the tests of some files; their lines are added to `out`."""
    from importlib.metadata import version

    paths = [str(ROOT), str(HERE), str(work), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JUDGE_OUT": str(out), "HF_HUB_OFFLINE": "1"}
    env["JUDGED_VERSION"] = version("kvarena")
    command = [sys.executable, "-m", "pytest", "-p", "stand_in", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += ["-o", "asyncio_mode=auto", "--timeout=180", "--rootdir", str(work), "-c", os.devnull]
    log = out.with_suffix(".log").open("a", encoding="utf-8")
    for file in files:
        usual = "drawn" if file.startswith(DRAWN) else "demo"
        other, named = OTHERWISE.get(file, (usual, ""))
        for weights, only in ((other, named), (usual, f"not {named}")) if named else ((usual, ""),):
            lay(work, weights, file)
            run = [*command, f"tests/entrypoints/{file}", *(["-k", only] if only else [])]
            subprocess.run(run, cwd=work, env=env, check=False, stdout=log, stderr=log)


def table(rows: list[dict[str, str]]) -> str:
    """How many of each group passed."""
    lines = [f"{'':16}{'passed':>8}{'failed':>8}{'left out':>10}"]
    for group, files in GROUPS.items():
        found = Counter(row["result"] for row in rows if row["test"].split("::")[0] in files)
        failed = found["failed"] + found["skipped"]
        lines.append(f"{group:16}{found['passed']:>8}{failed:>8}{found['left out']:>10}")
    return "\n".join(lines)


def main() -> int:
    """Returns 0 when no test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="vLLM's source package, unpacked")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what the run needs")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each test")
    parser.add_argument("--only", default="", help="of the files, those whose path holds one of these (a,b)")
    options = parser.parse_args()
    work, out = options.work.resolve(), options.out.resolve()
    prepare(options.source, work)
    out.write_text("", encoding="utf-8")
    judge(
        work,
        out,
        [file for files in GROUPS.values() for file in files if any(map(file.__contains__, options.only.split(",")))],
    )
    lines = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    rows = list({row["test"]: row for row in lines}.values())  # a file that ran in parts tells twice what is left out
    for row in rows:
        if row["result"] not in ("passed", "left out"):
            print(f"{row['result']}: {row['test']}: {row['why'].splitlines()[0][:200] if row['why'] else ''}")
    print(table(rows))
    return int(any(row["result"] not in ("passed", "left out") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
