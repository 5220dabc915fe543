"""Correctness on a GPU: same tokens in float32 whatever the levers, and bf16 logits no worse than the modules'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.errors import ConfigError
from kvarena.engine.models import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.graphs import Forward
from kvarena.engine.runner.torch_runner import ModuleForward, TorchRunner
from kvarena.experiments.gpu.engines import ABLATIONS, HOST_LEVERS, Engines, drive, runner_of

NUM_TOKENS = 48
PROMPT_LENS = (5, 130, 1, 64, 300, 17, 33, 8, 90)


def check_tokens(
    device: str = "cuda", num_tokens: int = NUM_TOKENS, prompt_lens: Sequence[int] = PROMPT_LENS
) -> dict[str, Any]:
    """Greedy tokens of a small random model in float32, with each lever off and with all on; on a CPU those it has."""
    engines = Engines(
        "tiny", f"engine.device={device}", "kv_cache.num_slots=4096", "scheduler.max_num_seqs=7",
        "scheduler.max_num_batched_tokens=128",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in engines.load().module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)  # so that the largest logit is not a near tie
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    expected: list[list[int]] | None = None
    same: dict[str, bool] = {}
    nothing = ("runner.fusions=false", "runner.graphs=false", "engine.overlap=false")
    levers = ABLATIONS
    if device == "cpu":
        levers = {name: ("runner.fusions=true", *ABLATIONS[name]) for name in HOST_LEVERS}
    for name, settings in {"none": nothing, **levers}.items():
        for scheduler in ("continuous", "chunked"):
            parts = engines.build(f"scheduler={scheduler}", *settings)
            runner_of(parts).pool.data.zero_()
            generator = torch.Generator().manual_seed(0)
            requests = [
                Request(f"r{i}", torch.randint(2, 500, (n,), generator=generator).tolist(), sampling)
                for i, n in enumerate(prompt_lens)
            ]
            drive(parts.engine, requests)
            tokens = [req.output_token_ids for req in requests]
            if expected is None:
                expected = tokens
            same[f"{name}, {scheduler}"] = tokens == expected
    assert expected is not None
    line: dict[str, Any] = {"same": same, "distinct": len({t for row in expected for t in row})}
    if not all(same.values()):
        line["error"] = "tokens differ"
    return line


# The fused forward rounds less often than the modules and elsewhere; its distance from the exact result may exceed
# theirs by so much and no more.
MOST_EXCESS = 1.2
# Tokens of the logits check's prompts: as many that the kernels for tens of decode rows take part.
LENGTHS = (200, 57, 130, 90, 33, 250, 16, 47, 111, 64, 180, 5)


def check_logits(engines: Engines) -> dict[str, Any]:
    """Fused forward and modules, teacher-forced (prefill, then one decode step), against float32.

    How far bf16 takes the logits of a deep random model from the exact ones is the modules' own error, so that is the
    measure: the fused error may be at most `MOST_EXCESS` times as large. The exact ones come from the same weights in
    float32, on transformers' modules and plain torch attention.
    """
    parts = engines.build(f"scheduler.max_num_seqs={len(LENGTHS)}")
    runner, model = runner_of(parts), parts.model
    if not isinstance(runner, TorchRunner) or not parts.pool_facts["runner"]["fusions"] or model is None:
        raise ConfigError("the logits check compares the fused forward; it needs runner.fusions=true")
    exact = _in_float32(engines, model)
    pool = _small_pool(exact, runner.pool.block_size)
    forwards: dict[str, tuple[Forward, AttentionBackend]] = {
        "fused": (runner.forward, runner.backend),
        "modules": (ModuleForward(model, runner.backend), runner.backend),
        "exact": (ModuleForward(exact, reference := ReferenceBackend(pool)), reference),
    }
    steps = (("prefill", list(LENGTHS), None), ("decode", [length + 1 for length in LENGTHS], 1))
    results: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _, _ in steps}
    for kind, (forward, backend) in forwards.items():
        for name, lens, num_new in steps:
            ids, positions, meta = _batch(runner.pool, model.spec.vocab_size, lens, num_new)
            with torch.inference_mode():
                backend.prepare(meta)
                results[name][kind] = forward(ids, positions, meta).float()
    line: dict[str, Any] = {name: compare_logits(**logits) for name, logits in results.items()}
    for name, figures in list(line.items()):
        if not figures["excess"] <= MOST_EXCESS:
            line["error"] = f"{name}: the fused logits are {figures['excess']:.2f} times as far from float32 as theirs"
    return line


def compare_logits(fused: torch.Tensor, modules: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Relative errors against `exact`, their ratio `excess`, and how the two differ from each other; all [T, V]."""
    fused_error, modules_error = (float((got - exact).norm() / exact.norm()) for got in (fused, modules))
    logprobs, wanted = fused.log_softmax(-1), modules.log_softmax(-1)
    return {
        "fused_error": fused_error,
        "modules_error": modules_error,
        "excess": fused_error / modules_error,
        "relative": float((fused - modules).norm() / modules.norm()),
        "max_logprob": float((logprobs - wanted).abs().max()),
        "kl": float((wanted.exp() * (wanted - logprobs)).sum(-1).mean()),
        "same_argmax": float((fused.argmax(-1) == modules.argmax(-1)).float().mean()),
    }


def _in_float32(engines: Engines, model: LoadedModel) -> LoadedModel:
    """The same weights in float32, unfused, beside `model`; packed ones are those of the same seed."""
    exact = engines.another("engine.dtype=float32")
    with torch.no_grad():
        weights = dict(model.module.named_parameters())
        for key, parameter in exact.module.named_parameters():
            parameter.copy_(weights[key])
    return exact


def _small_pool(model: LoadedModel, block_size: int) -> KVPool:
    spec = model.spec
    return KVPool.of_model(
        spec,
        num_blocks=len(LENGTHS) * -(-(max(LENGTHS) + 1) // block_size),
        block_size=block_size,
        dtype=spec.dtype,
        device=model.device,
    )


def _batch(
    pool: KVPool, vocab_size: int, lens: list[int], num_new: int | None
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Requests of the given contexts in consecutive blocks, of which the last `num_new` (None: all) tokens are new."""
    size, device = pool.block_size, pool.device
    width = -(-max(lens) // size)
    table = 1 + np.arange(len(lens) * width, dtype=np.int32).reshape(len(lens), width)
    new = np.array([n if num_new is None else num_new for n in lens])
    loc = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - k, n) for n, k in zip(lens, new, strict=True)])
    rows = np.repeat(np.arange(len(lens)), new)
    slots = table[rows, positions // size].astype(np.int64) * size + positions % size
    # The token at a position is the same in prefill and decode.
    ids = (rows * 7919 + positions * 104729) % vocab_size
    host_lens = np.array(lens, dtype=np.int32)
    send = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    meta = AttentionMetadata(
        query_start_loc=send(loc),
        seq_lens=send(host_lens),
        slot_mapping=send(slots),
        block_table=send(table),
        logits_indices=torch.arange(int(loc[-1]), device=device),
        max_query_len=int(new.max()),
        max_seq_len=max(lens),
        block_size=size,
        host_query_start_loc=loc,
        host_seq_lens=host_lens,
    )
    return send(ids), send(positions), meta
