"""Requests with images under every strategy, judged by the tokens that transformers' own class gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fused_helpers import LateReference
from PIL import Image

from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, StepOutput, run_to_completion
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import Ops, TorchOps
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import ImageSpan, Request, SamplingParams
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.step_graphs import StepGraphs
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.engine.vision.encoder import ImageEncoder
from kvarena.engine.vision.processing import image_span
from kvarena.experiments.settings.strategies import (
    build_allocator,
    build_scheduler,
    strategy_names,
    strategy_options,
)

CELLS = list(zip(strategy_names("allocator"), strategy_names("scheduler") * 2, strict=False))
ALL_CELLS = [(a, s) for a in strategy_names("allocator") for s in strategy_names("scheduler") if (a, s) not in CELLS]
# Every allocator and every scheduler; all pairs with the slow tests.
STRATEGIES = [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in ALL_CELLS)]
Prompt = tuple[list[int], tuple[ImageSpan, ...], list[Image.Image]]


class PromptMaker:
    """Makes prompts of tokens and of images by their number."""

    def __init__(self, loaded: LoadedModel, token: int, images: Sequence[Image.Image]) -> None:
        assert loaded.images is not None
        self._token, self._images = token, images
        self._spans = [image_span(loaded.images.tower.processing, image) for image in images]

    def prompt(self, *parts: list[int] | int) -> Prompt:
        ids: list[int] = []
        spans, images = [], []
        for part in parts:
            if isinstance(part, list):
                ids += part
                continue
            span = self._spans[part]
            spans.append(replace(span, start=len(ids), stop=len(ids) + span.stop))
            ids += [self._token] * span.stop
            images.append(self._images[part])
        return ids, tuple(spans), images


@dataclass
class ImageRuns:
    """A model, prompts, and the tokens that each must get.

    Attributes:
        short: slots of a pool in which requests are preempted, where blocks are taken as they are needed.
        steps: of the last run.
    """

    loaded: LoadedModel
    prompts: list[Prompt]
    wanted: list[list[int]]
    short: int
    max_model_len: int = 128
    steps: Sequence[StepOutput] = ()

    def with_cache(self, num_bytes: int) -> tuple[ImageRuns, ImageEncoder]:
        """The same with an encoder of its own."""
        assert self.loaded.images is not None
        embed = self.loaded.module.get_input_embeddings()  # type: ignore[operator]
        encoder = ImageEncoder(self.loaded.images.tower, embed, num_bytes)
        return replace(self, loaded=replace(self.loaded, images=encoder)), encoder

    def run(
        self,
        allocator: str,
        scheduler: str,
        overlap: bool,
        make_runner: Callable[[LoadedModel, KVPool], TorchRunner] = TorchRunner,
        **sizes: Any,
    ) -> list[Request]:
        """Run all prompts at once, and see that each got its tokens."""
        # Of the other allocators one region is that of the longest request.
        taken = allocator in ("paged", "paged_prefix", "radix", "virtual")
        short = self.short if taken else self.max_model_len + 16
        num_slots, budget = sizes.pop("num_slots", short), sizes.pop("budget", 11)
        block_size = min(strategy_options("allocator", allocator).get("block_size", 4), 4)
        length = self.max_model_len
        made = build_allocator(
            allocator, num_blocks=num_slots // block_size, max_model_len=length, block_size=block_size
        )
        options = {"max_num_seqs": 4, "max_num_batched_tokens": budget} | sizes
        plans = build_scheduler(scheduler, made, max_model_len=length, **options)
        pool = KVPool.of_model(
            self.loaded.spec, num_blocks=made.num_virtual_blocks, block_size=block_size, dtype=torch.float32,
            device="cpu",
        )  # fmt: skip
        requests = [
            Request(f"r{i}", ids, SamplingParams(max_tokens=len(wanted)), images=images, oracle_output_len=len(wanted))
            for i, ((ids, images, _), wanted) in enumerate(zip(self.prompts, self.wanted, strict=True))
        ]
        runner = make_runner(self.loaded, pool)
        engine = Engine(plans, made, runner, VirtualClock(), overlap=overlap, ledger=MemoryLedger())
        self.steps = run_to_completion(engine, requests)
        for req, tokens in zip(requests, self.wanted, strict=True):
            assert (req.output_token_ids, req.error) == (tokens, ""), req.request_id
        return requests

    def run_in_graphs(self, monkeypatch: pytest.MonkeyPatch, *, fusions: bool, ops: Ops | None = None) -> None:
        """Run with steps of fixed shape. On a CPU nothing is captured; which steps the graphs get is the same."""
        taken = {"decode": 0, "mixed": 0}
        for name in taken:
            real = getattr(StepGraphs, name)

            def counted(graphs: StepGraphs, step: Any, name: str = name, real: Any = real) -> Any:
                taken[name] += 1
                return real(graphs, step)

            monkeypatch.setattr(StepGraphs, name, counted)

        def make_runner(model: LoadedModel, pool: KVPool) -> FusedRunner:
            length = self.max_model_len
            decoder = fuse(model, TorchOps() if ops is None else ops, length) if fusions else None
            return FusedRunner(
                model, pool, LateReference(pool), decoder, max_num_seqs=4, max_model_len=length, mixed_tokens=16
            )

        self.run("paged_prefix", "chunked", True, make_runner, budget=5)
        assert self.loaded.images is not None
        with_images = sum(self.loaded.images.touched(step.plan) for step in self.steps)
        assert taken["decode"] + taken["mixed"] == len(self.steps) - with_images
        assert min(taken.values()) > 0 < with_images
