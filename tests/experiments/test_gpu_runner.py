"""Which runner a config gets, on a machine without a GPU."""

import pytest
import torch

from kvarena.engine.attention.cpu_backend import CpuBackend
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.clock import VirtualClock
from kvarena.engine.errors import ConfigError
from kvarena.engine.fusions.cpu_ops import CpuOps
from kvarena.engine.models import load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.runner.cpu_runner import CpuRunner
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.building.runners import attention_backend, make_runner
from kvarena.experiments.gpu.floors import model_of
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.config import RunnerConfig

TINY = load_run(model_of("tiny")).model.shape
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}


def section(**changes):
    options = {"attention": "auto", "layout": "paged", "fusions": "auto", "graphs": "auto"} | changes
    return RunnerConfig(**options)


def make(shape, **changes):
    model = load_model(shape=shape, dtype="float32", device="cpu", load_format="dummy", name="small")
    spec = model.spec
    pool = KVPool.of_model(
        spec,
        num_blocks=4,
        block_size=4,
        dtype=torch.float32,
        device="cpu",
    )
    clock = VirtualClock()
    options = {"seed": 0, "clock": clock, "max_num_seqs": 2, "max_model_len": 64}
    runner, facts = make_runner(section(**changes), model, pool, ReferenceBackend(pool), **options)
    assert runner._clock is clock
    return runner, facts


def test_on_a_cpu_modules_are_taken_when_asked_for():
    runner, facts = make(TINY, cpu="modules")
    assert type(runner) is TorchRunner
    assert facts == {"fusions": False, "graphs": False, "attention": "ReferenceBackend", "cpu": "modules"}
    runner, facts = make(TINY, cpu="modules", fusions=True)
    assert isinstance(runner, FusedRunner)
    assert facts["fusions"] is True


def test_a_cpu_fuses_what_it_can():
    runner, facts = make(TINY)
    assert isinstance(runner, CpuRunner)
    assert facts == {"fusions": True, "graphs": False, "attention": "ReferenceBackend", "cpu": "fused"}
    assert isinstance(runner.forward.func.ops, CpuOps)
    runner, facts = make(GPT2)
    assert isinstance(runner, CpuRunner)
    assert "no module model" in facts["no_fusions"]
    runner, facts = make(TINY, fusions=False)
    assert isinstance(runner, CpuRunner)
    assert facts["fusions"] is False
    assert "no_fusions" not in facts


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, CpuBackend), ({"cpu": "modules"}, ReferenceBackend), ({"attention": "reference"}, ReferenceBackend)],
)
def test_which_attention_a_cpu_gets(changes, kind):
    model = load_model(shape=TINY, dtype="float32", device="cpu", load_format="dummy", name="small")
    pool = KVPool.of_model(model.spec, num_blocks=4, block_size=4, dtype=torch.float32, device="cpu")
    backend = attention_backend(section(**changes, layout="contiguous"), model, pool)
    assert type(backend) is kind
    assert backend.contiguous


def test_what_cannot_be_had_is_an_error():
    with pytest.raises(ConfigError, match=r"runner\.graphs=true needs a GPU"):
        make(TINY, graphs=True)
    with pytest.raises(
        ConfigError, match=r"runner\.fusions=true, and the model runs on its modules: .*no module model"
    ):
        make(GPT2, fusions=True)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("fusions", "auto, true or false"),
        ("graphs", "auto, true, false or decode"),
        ("gemm", "one of auto, triton, library"),
    ],
)
def test_other_values_are_refused(key, values):
    with pytest.raises(ConfigError, match=rf"runner\.{key}=fast must be {values}"):
        section(**{key: "fast"})


@pytest.mark.parametrize("setting", [{"gemm_rows": 16}, {"gemm_table": "x"}])
def test_products_that_all_go_to_the_library_have_no_other_setting(setting):
    with pytest.raises(ConfigError, match=r"runner\.gemm=library leaves nothing to runner\.gemm_"):
        section(gemm="library", **setting)


@pytest.mark.parametrize("setting", [{"graphs": "decode"}, {"gemm": "library"}, {"gemm_rows": 16}, {"gemm_table": "x"}])
def test_what_only_a_gpu_has_is_refused_without_one(setting):
    [(name, value)] = setting.items()
    with pytest.raises(ConfigError, match=rf"runner\.{name}={value} needs a GPU"):
        make(TINY, **setting)
