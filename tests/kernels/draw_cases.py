"""Logits to draw from, and what is kept of them by the definition: sorted, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.params import NUM_PARAMS, draw_params, pack_params
from kvarena.engine.sampling.sampler import Sampler

SETTINGS = (
    {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95}, {}, {"temperature": 0.0}, {"min_p": 0.05}, {"top_k": 1},
    {"top_p": 0.3}, {"top_k": 700}, {"top_p": 0.99, "min_p": 0.001}, {"temperature": 1.3, "top_p": 0.8},
    {"top_k": 3000, "top_p": 0.5}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}, {"top_p": 1e-6}, {"top_k": 1500},
)  # fmt: skip


def settings(count: int) -> list[SamplingParams]:
    """Of `count` rows side by side; each with a seed of its own."""
    return [
        SamplingParams(**({"temperature": 0.7, "seed": 100 + i} | SETTINGS[i % len(SETTINGS)])) for i in range(count)
    ]


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensor:
    """Rows of several kinds in turn: as of a model, peaked, flat, of few values, and with infinities."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = 2.5 * torch.randn(num_rows, vocab_size, generator=generator, device=device)
    kind = torch.arange(num_rows, device=device) % 5
    logits[kind == 1] *= 4
    logits[kind == 2] *= 0.01
    logits[kind == 3] = logits[kind == 3].round()
    barred = (kind == 4)[:, None] & (torch.rand(num_rows, vocab_size, generator=generator, device=device) < 0.7)
    return logits.masked_fill(barred, -torch.inf).to(dtype)


def packed(params: list[SamplingParams], vocab_size: int, device: str = "cpu") -> Tensor:
    """`params` of `draw_tokens` for rows 0, 1, ... at position 0."""
    kinds = ("seed", np.uint64), ("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("log_min_p", "f4")
    columns = np.zeros(len(params), list(kinds))
    for row, one in enumerate(params):
        columns[row] = (one.seed, *draw_params(one, vocab_size))
    found = pack_params(columns, np.arange(len(params)), np.zeros(len(params), np.int64))
    assert len(found) == NUM_PARAMS
    return torch.from_numpy(found).to(device)


class Kept(NamedTuple):
    """What is kept of a row, by the definition.

    Attributes:
        order: int64 [V], tokens as they are kept one after the other.
        count: how many are.
        is_close: a token more or less would be within 1e-6 of top_p.
    """

    order: Tensor
    count: int
    is_close: bool


def kept_of(logits: Tensor, params: SamplingParams) -> Kept:
    """The sorted definition, of one row [V]."""
    values, order = logits.double().sort(descending=True, stable=True)
    scaled = (values - values[0]) / float(np.float32(params.temperature))
    count = min(params.top_k or len(order), len(order))
    is_close = False
    if params.top_p < 1:
        mass = scaled[:count].exp()
        reached = (mass.cumsum(0) / mass.sum()) - float(np.float32(params.top_p))
        before = torch.cat([reached.new_full((1,), -1.0), reached[:-1]])
        count = int((before < 0).sum())
        is_close = bool((reached[max(0, count - 2) : count + 1].abs() < 1e-6).any())
    if params.min_p > 0:
        count = min(count, int((scaled >= np.log(np.float32(params.min_p))).sum()))
    return Kept(order, count, is_close)


def sampled(logits: Tensor, params: list[SamplingParams]) -> list[int]:
    """The tokens of the sampler on the CPU, row by row at position 0; -1 where there is none."""
    requests = [Request(str(i), [0], one) for i, one in enumerate(params)]
    found = Sampler()(logits.cpu(), RequestRows(logits.shape[1], "cpu").batch(requests))
    return torch.where(found.is_valid, found.token_ids, -1).tolist()
