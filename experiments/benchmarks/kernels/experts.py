"""The experts of one layer: this engine's kernels and transformers' grouped product, at the sizes of real models.

    kvarena benchmark experts [--shape mixtral-8x7b ...] [--tokens 1 8 32 256 2048] [--tune] [--out FILE]

Weights are random, the routing is balanced: token t takes the next k experts in turn, and each launch begins at others,
so that no weights are in the cache. With `--routing random` each token takes any k, as a router
without training does. Prints lines of JSON: first the machine with its ceilings, measured in the same call (bytes per
second of a copy, operations per second of a dense bf16 product of 8192^3); then one per shape, number of tokens and
implementation: microseconds from router logits to the sum in the residual stream, and shares of the ceilings.
`products` names the kernel: `triton`, or `wgmma`, the grouped product of prompts on Hopper, whose two shapes are both
measured from 32 rows an expert on; the first line is what the engine takes. `bar_us` is the time to beat (docs/gpu.md,
Experts), scaled by the ceilings. With --tune other shapes of launches too, of the second product apart where an expert
has few rows.

`--shape tiny` runs on a CPU as well, in Triton's interpreter, to see that it works: its times say nothing of kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvarena.engine.checkpoints.directory import one_line
from kvarena.engine.kernels.experts.grouped import GroupedGemm, GroupedTile, grouped_tile
from kvarena.engine.kernels.experts.layer import run_experts
from kvarena.engine.kernels.experts.products import MANY_ROWS, TILES, ExpertTile, tile_for
from kvarena.engine.kernels.hopper import load_hopper_kernels
from kvarena.experiments.gpu.timing import copy_bandwidth, matmul_flops, require_cuda, time_launches
from kvarena.experiments.tools import say_all, tool_parser

Line = dict[str, Any]
TOKENS = (1, 8, 32, 256, 2048)
NUM_ROUTINGS = 8
ROUTINGS = ("balanced", "random")
COPY_OF_BARS = 4.25e12  # bytes per second of the card that the bars are stated for


class Shape(NamedTuple):
    """Experts of one layer.

    Attributes:
        hidden, inner: widths.
        num_experts, top_k: how many, and how many a token takes.
        bars: microseconds by number of tokens, on a card that copies at COPY_OF_BARS: the best of vLLM 0.24,
            SGLang 0.5.14 and TensorRT-LLM 1.3 on an H200 in AIConfigurator's tables, each column its own winner.
    """

    hidden: int
    inner: int
    num_experts: int
    top_k: int
    bars: dict[int, float]


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2, {1: 190, 8: 665, 32: 680, 256: 765}),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, {1: 37, 8: 165, 32: 300, 256: 325}),
    "tiny": Shape(64, 48, 8, 2, {}),
}
DENSE_SHARE = 0.95  # of a dense product's rate, that of 2,048 tokens
OTHER_TILES = (
    ExpertTile(16, 64, 128, 4, 4, True), ExpertTile(16, 64, 256, 4, 2, True), ExpertTile(16, 128, 64, 4, 4, True),
    ExpertTile(32, 64, 64, 4, 5, True), ExpertTile(64, 64, 64, 4, 4, True), ExpertTile(64, 128, 64, 8, 3, False),
    ExpertTile(128, 64, 64, 4, 4, False), ExpertTile(128, 128, 64, 8, 4, False), ExpertTile(128, 128, 128, 8, 2, False),
    ExpertTile(64, 128, 64, 4, 3, False),
)  # fmt: skip


# Of few rows: gate's and up's, and down's.
FEW_ROWS_PAIRS = (
    (ExpertTile(16, 32, 128, 4, 4, True), ExpertTile(16, 64, 128, 4, 3, True)),
    (ExpertTile(16, 32, 256, 4, 3, True), ExpertTile(16, 64, 128, 4, 4, True)),
    (ExpertTile(16, 32, 256, 4, 3, True), ExpertTile(16, 32, 256, 4, 3, True)),
    (ExpertTile(16, 32, 256, 4, 3, True), ExpertTile(16, 32, 128, 4, 4, True)),
    (ExpertTile(16, 32, 256, 2, 3, True), ExpertTile(16, 32, 256, 2, 3, True)),
    (ExpertTile(16, 32, 128, 2, 4, True), ExpertTile(16, 32, 128, 2, 4, True)),
    (ExpertTile(16, 16, 256, 4, 4, True), ExpertTile(16, 32, 256, 4, 3, True)),
    (ExpertTile(16, 16, 256, 2, 4, True), ExpertTile(16, 16, 256, 2, 3, True)),
    (ExpertTile(16, 16, 512, 4, 2, True), ExpertTile(16, 32, 256, 4, 3, True)),
    (ExpertTile(16, 64, 128, 4, 3, True), ExpertTile(16, 64, 256, 4, 3, True)),
    (ExpertTile(16, 64, 128, 4, 3, True), ExpertTile(16, 128, 128, 4, 3, True)),
)
FEWEST_GROUPED_ROWS = 32


class Ceilings(NamedTuple):
    """What the machine reaches at most, in bytes and operations per second."""

    copy: float
    matmul: float


class Layer:
    """A layer's experts with random weights, and a batch of tokens.

    Args:
        shape: sizes.
        num_tokens: of the batch.
        weights: gate and up, and down, of `make_weights`.
        grouped: the grouped product of Hopper, if there is one.
        routing: one of ROUTINGS.
    """

    def __init__(
        self,
        shape: Shape,
        num_tokens: int,
        weights: tuple[Tensor, Tensor],
        grouped: GroupedGemm | None = None,
        routing: str = ROUTINGS[0],
    ) -> None:
        self.shape, self.products, self.routing = shape, grouped, routing
        self.gate_up, self.down = weights
        device = self.gate_up.device
        self.x, self.residual = (
            torch.randn(num_tokens, shape.hidden, device=device, dtype=self.gate_up.dtype) for _ in range(2)
        )
        if routing == "random":
            scores = torch.rand(NUM_ROUTINGS, num_tokens, shape.num_experts, device=device)
            self.choices = list(scores.topk(shape.top_k).indices)
        else:
            pairs = torch.arange(num_tokens * shape.top_k, device=device).view(num_tokens, shape.top_k)
            turns = (pairs + turn * num_tokens * shape.top_k for turn in range(NUM_ROUTINGS))
            self.choices = [turn % shape.num_experts for turn in turns]
        self._num_read = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def num_read(self) -> float:
        """Experts that the batch takes, in the mean of its routings."""
        if self.routing == ROUTINGS[0]:
            return min(self.shape.num_experts, self.choices[0].numel())
        return sum(len(chosen.unique()) for chosen in self.choices) / len(self.choices)

    @property
    def num_bytes(self) -> float:
        """Of the weights of these experts, and of tokens in and out."""
        shape = self.shape
        weights = self.num_read * 3 * shape.hidden * shape.inner
        return self.gate_up.element_size() * (weights + 3 * len(self.x) * shape.hidden)

    @property
    def num_flops(self) -> int:
        """Of the products."""
        return 6 * self.choices[0].numel() * self.shape.hidden * self.shape.inner

    def kernels(
        self, tile: ExpertTile | GroupedTile, down: ExpertTile | None, *, upcast: bool
    ) -> list[Callable[[], object]]:
        """A launch of this engine's kernels for each routing."""

        def launch(logits: Tensor) -> Callable[[], object]:
            return lambda: run_experts(
                self.residual, self.x, logits, self.gate_up, self.down, None, 0, top_k=self.shape.top_k,
                renormalize=True, num_read=self._num_read, upcast=upcast, grouped=self.products, tile=tile,
                down_tile=down,
            )  # fmt: skip

        rows = torch.zeros(len(self.x), self.shape.num_experts, device=self.x.device)
        return [launch(rows.scatter(1, chosen, 10.0)) for chosen in self.choices]

    def grouped(self) -> list[Callable[[], object]]:
        """The same by transformers' module and torch's grouped product, without the routing."""
        # Imported late: it imports Triton, whose interpreter has to be chosen before.
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        shape = self.shape
        config = MixtralConfig(
            hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = MixtralExperts(config)
        for name, weight in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        even = torch.full((len(self.x), shape.top_k), 1 / shape.top_k, device=self.x.device)
        return [lambda chosen=chosen: module(self.x, chosen, even) for chosen in self.choices]  # type: ignore[misc]

    def difference(self, ours: Callable[[], object], theirs: Callable[[], object]) -> float:
        """||ours - theirs|| / ||theirs||, of what the layer adds."""
        self.residual.zero_()
        ours()
        want = theirs()
        assert isinstance(want, Tensor)
        return float((self.residual.float() - want.float()).norm() / want.float().norm())


def make_weights(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random weights of a layer's experts in bf16: [E, 2 * inner, hidden] and [E, hidden, inner]."""
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    gate_up = torch.empty(shape.num_experts, 2 * shape.inner, shape.hidden, **options).normal_(std=0.02)
    return gate_up, torch.empty(shape.num_experts, shape.hidden, shape.inner, **options).normal_(std=0.02)


def choices(
    num_pairs: int, num_experts: int, *, hopper: bool, tune: bool
) -> list[tuple[ExpertTile | GroupedTile, ExpertTile | None]]:
    """Shapes of launches to measure, the engine's own first: of both products, or of the first and of the second."""
    triton, mean = tile_for(num_pairs, num_experts), num_pairs / num_experts
    own = (grouped_tile(num_pairs, num_experts) if hopper else None) or triton
    grouped = [GroupedTile(False), GroupedTile(True)] if hopper and mean >= FEWEST_GROUPED_ROWS else []
    others = (*TILES.values(), MANY_ROWS, *OTHER_TILES) if tune else ()
    alike = dict.fromkeys([own, triton, *grouped, *others])
    return [(tile, None) for tile in alike] + [pair for pair in FEW_ROWS_PAIRS if tune and triton.rows == pair[0].rows]


def measure(name: str, num_tokens: int, layer: Layer, found: Ceilings, tune: bool) -> Iterator[Line]:
    """The lines of one batch."""
    shape, on_gpu = layer.shape, layer.x.is_cuda
    labels: Line = {"kernel": "experts", "shape": name, "tokens": num_tokens, "routing": layer.routing}
    labels["experts_read"] = layer.num_read
    has_bars = bool(shape.bars) and layer.routing == ROUTINGS[0]
    if has_bars and num_tokens in shape.bars:
        labels["bar_us"] = round(shape.bars[num_tokens] * COPY_OF_BARS / found.copy, 1)
    elif has_bars and num_tokens >= 2048:
        labels["bar_us"] = round(layer.num_flops / (DENSE_SHARE * found.matmul) * 1e6, 1)
    theirs = layer.grouped()
    hopper = layer.products is not None
    cases: list[tuple[Line, Callable[[], list[Callable[[], object]]]]] = [
        (_kvarena(tile, down), lambda tile=tile, down=down: layer.kernels(tile, down, upcast=not on_gpu))  # type: ignore[misc]
        for tile, down in choices(num_tokens * shape.top_k, shape.num_experts, hopper=hopper, tune=tune)
    ]
    for line, launches in [*cases, ({"by": "transformers grouped_mm"}, lambda: theirs)]:
        try:
            calls = launches()
            if "tile" in line:
                line["difference"] = float(f"{layer.difference(calls[0], theirs[0]):.2e}")
            us = time_launches(calls) if on_gpu else _time_on_host(calls)
        # Anything: a tile that a card has no room for, or a product that a graph cannot hold, is a line of its own.
        except Exception as error:
            yield labels | line | {"failed": one_line(error)[:200]}
            continue
        yield labels | line | rates(us, layer, found)


def _kvarena(tile: ExpertTile | GroupedTile, down: ExpertTile | None) -> Line:
    """What a line says of a launch of this engine's kernels."""
    products = "wgmma" if isinstance(tile, GroupedTile) else "triton"
    line: Line = {"by": "kvarena", "products": products, "tile": tile._asdict()}
    return line if down is None else line | {"down_tile": down._asdict()}


def rates(us: float, layer: Layer, found: Ceilings) -> Line:
    """A time and its shares of the ceilings."""
    copied, computed = layer.num_bytes / us * 1e6, layer.num_flops / us * 1e6
    return {
        "us": round(us, 2), "tbps": round(copied / 1e12, 3), "share_of_copy": round(copied / found.copy, 3),
        "tflops": round(computed / 1e12, 1), "share_of_matmul": round(computed / found.matmul, 3),
    }  # fmt: skip


def _time_on_host(launches: Sequence[Callable[[], object]]) -> float:
    """Microseconds of the second launch."""
    launches[0]()
    begin = time.perf_counter()
    launches[1]()
    return (time.perf_counter() - begin) * 1e6


def host_ceilings(size: int = 256) -> Ceilings:
    """Those of a CPU, of small tensors: to have the lines whole."""
    source = torch.zeros(size, size)
    target = torch.empty_like(source)
    copy, product = (
        _time_on_host([call, call])
        for call in (lambda: target.copy_(source), lambda: torch.mm(source, source, out=target))
    )
    return Ceilings(2 * source.nbytes / copy * 1e6, 2 * size**3 / product * 1e6)


def lines(names: Sequence[str], tokens: Sequence[int], tune: bool, routing: str = ROUTINGS[0]) -> Iterator[Line]:
    """All lines; of a GPU unless only the tiny shape is asked for and there is none."""
    only_tiny = set(names) == {"tiny"} and not torch.cuda.is_available()
    device = torch.device("cpu") if only_tiny else require_cuda()
    kernels = load_hopper_kernels(device)
    grouped = None if kernels is None else GroupedGemm(kernels)
    found = host_ceilings() if only_tiny else Ceilings(copy_bandwidth(), matmul_flops())
    yield {
        "device": "cpu, Triton interpreted" if only_tiny else torch.cuda.get_device_name(), "torch": torch.__version__,
        "copy_tbps": round(found.copy / 1e12, 3), "matmul_tflops": round(found.matmul / 1e12, 1),
    }  # fmt: skip
    for name in names:
        weights = make_weights(SHAPES[name], device)
        for num_tokens in tokens:
            layer = Layer(SHAPES[name], num_tokens, weights, grouped, routing)
            yield from measure(name, num_tokens, layer, found, tune)
        del weights


def main(argv: Sequence[str]) -> int:
    """Measure the chosen shapes; 1 when something failed."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: both of real models")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of a batch")
    parser.add_argument("--routing", choices=ROUTINGS, default=ROUTINGS[0], help="of the tokens to experts")
    parser.add_argument("--tune", action="store_true", help="measure other shapes of launches too")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error(f"--tokens {min(args.tokens)} must be at least 1")
    names = args.shape or [name for name in SHAPES if name != "tiny"]
    with torch.inference_mode():
        return say_all(lines(names, args.tokens, args.tune, args.routing), args.out, failed="failed")
