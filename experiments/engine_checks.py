"""Correctness on a GPU: same tokens in float32 whatever the levers, and bf16 logits against the unfused modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.attention.base import AttentionMetadata
from engine.request import Request, SamplingParams
from engine.runner.fused_runner import FusedForward, ModuleForward
from engine.runner.graphs import Forward
from experiments.engine_setup import ABLATIONS, Bed, Levers, drive, make_bed

NUM_TOKENS = 48


PROMPT_LENS = (5, 130, 1, 64, 300, 17, 33, 8, 90)


def check_tokens(
    device: str = "cuda", num_tokens: int = NUM_TOKENS, prompt_lens: Sequence[int] = PROMPT_LENS
) -> dict[str, Any]:
    """Greedy tokens of a small random model in float32, with each lever off and with all on."""
    bed = make_bed("tiny", 4096, None, dtype="float32", device=device)
    with torch.no_grad():
        for parameter in bed.model.module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)  # so that the largest logit is not a near tie
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    expected: list[list[int]] | None = None
    same: dict[str, bool] = {}
    settings = {"none": Levers(False, False, False, 0), **ABLATIONS}
    for name, levers in settings.items():
        for chunked in (False, True):
            bed.pool.data.zero_()
            generator = torch.Generator().manual_seed(0)
            requests = [
                Request(f"r{i}", torch.randint(2, 500, (n,), generator=generator).tolist(), sampling)
                for i, n in enumerate(prompt_lens)
            ]
            engine = bed.engine(
                bed.runner(levers, max_num_seqs=7), overlap=levers.overlap, max_num_seqs=7,
                max_num_batched_tokens=128, chunked=chunked,
            )  # fmt: skip
            drive(engine, requests)
            tokens = [req.output_token_ids for req in requests]
            if expected is None:
                expected = tokens
            same[f"{name}, {'chunked' if chunked else 'continuous'}"] = tokens == expected
    assert expected is not None
    line: dict[str, Any] = {"same": same, "distinct": len({t for row in expected for t in row})}
    if not all(same.values()):
        line["error"] = "tokens differ"
    return line


def check_logits(bed: Bed, levers: Levers) -> dict[str, Any]:
    """bf16: the fused forward and the modules over the same prompts, teacher-forced: prefill, then one decode step."""
    runner = bed.runner(levers, max_num_seqs=8)
    decoder = bed.decoder(levers)
    assert decoder is not None
    backend = runner.backend
    forwards: dict[str, Forward] = {
        "fused": FusedForward(decoder, backend, bed.pool),
        "modules": ModuleForward(bed.model, backend),
    }
    line: dict[str, Any] = {}
    for name, lens, num_new in (("prefill", [200, 57, 130, 90], None), ("decode", [201, 58, 131, 91], 1)):
        results = {}
        for kind, forward in forwards.items():
            ids, positions, meta = _batch(bed, lens, num_new)
            with torch.inference_mode():
                backend.prepare(meta)
                results[kind] = forward(ids, positions, meta).float()
        got, expected = results["fused"], results["modules"]
        logprobs, wanted = got.log_softmax(-1), expected.log_softmax(-1)
        line[name] = {
            "relative": float((got - expected).norm() / expected.norm()),
            "max_logprob": float((logprobs - wanted).abs().max()),
            "kl": float((wanted.exp() * (wanted - logprobs)).sum(-1).mean()),
            "same_argmax": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        }
        if not line[name]["relative"] < 0.05:
            line["error"] = f"{name}: the fused logits differ from the modules'"
    return line


def _batch(bed: Bed, lens: list[int], num_new: int | None) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Requests of the given contexts in consecutive blocks, of which the last `num_new` (None: all) tokens are new."""
    size = bed.pool.block_size
    device = bed.pool.device
    width = -(-max(lens) // size)
    table = 1 + np.arange(len(lens) * width, dtype=np.int32).reshape(len(lens), width)
    new = np.array([n if num_new is None else num_new for n in lens])
    loc = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - k, n) for n, k in zip(lens, new, strict=True)])
    rows = np.repeat(np.arange(len(lens)), new)
    slots = table[rows, positions // size].astype(np.int64) * size + positions % size
    # The token at a position is the same in prefill and decode.
    ids = (rows * 7919 + positions * 104729) % bed.model.spec.vocab_size
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
