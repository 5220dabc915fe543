"""Step times from published tables of single operations: matrix products, attention, experts.

    tables (a Parquet file, `kvarena make profile`)  x  sizes of the model, its share of a card  -->  OperationStepTime

    layer = products(tokens) + elementwise(tokens) + decode attention(requests, KV of each) + prompt attention(pairs)
    step  = layers x layer + output head(requests)

Nothing is fitted to runs. Products are interpolated over rows by the table, and over the two sides of the weights by
seconds a weight, linear in the sides' logarithms; beyond the table by its last entry's seconds a weight. Element-wise
work moves its bytes at the table's share of the bandwidth. Prompt attention takes seconds a (query, key) pair as full
batches of prompts of that length do, never less than one prompt alone, and few queries do not fill the card.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.simulation.collectives import Ranks

FloatArray = NDArray[np.float64]
# What a row of the tables means: `op`, and which of its numbers are used.
#   gemm        m x k times k x n
#   experts     m tokens, hidden n, width k, d experts, top `length`, split over `ranks`
#   context     m prompts of `length` each; n heads, k KV heads of d elements
#   generation  m requests of `length` each; the same
COLUMNS = ("op", "m", "n", "k", "d", "length", "ranks", "seconds")
ROWS = np.array(
    [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768],
    dtype=np.float64,
)
ELEMENTWISE_ROWS = (8, 3)  # moved a token and layer: of the hidden size (two norms with residuals), of the MLP's width


@dataclass(frozen=True)
class Curve:
    """A function by its values, linear in between and beyond the last two."""

    x: Sequence[float]
    y: Sequence[float]

    def __call__(self, value: float) -> float:
        """Its value; below the first entry that one's."""
        x, y = self.x, self.y
        if value <= x[0]:
            return y[0]
        right = min(max(bisect_left(x, value), 1), len(x) - 1)
        share = (value - x[right - 1]) / (x[right] - x[right - 1])
        return y[right - 1] + share * (y[right] - y[right - 1])


@dataclass(frozen=True)
class OperationStepTime:
    """Seconds of a step of one card's share.

    Args:
        num_layers: of this card.
        layer: by tokens: products and element-wise work of a layer.
        head: by requests: the output head.
        requests: ascending, for which `decode` is known.
        decode: for each of them, by KV tokens a request: attention of a layer.
        pair: by length: seconds a (query, key) pair of prompts' attention of a layer, in a batch that fills the card.
        alone: by length: seconds of one prompt's.
        fill_queries: queries of a prompt whose attention fills the card.
        per_copied_block: of each block copied.
    """

    num_layers: float
    layer: Curve
    head: Curve
    requests: Sequence[float]
    decode: Sequence[Curve]
    pair: Curve
    alone: Curve
    fill_queries: float
    per_copied_block: float

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features. A decode's context is the mean of those beside it."""
        longest = features.longest_prefill
        attention = 0.0
        if num_decodes := features.num_decode_requests:
            of_prompts = longest * features.num_prefill_requests
            read = max(features.num_distinct_kv_tokens - of_prompts, 0)
            attention += self._decode(num_decodes, read / num_decodes)
            # What is read for several requests is multiplied for each, as a prompt's is for its queries.
            attention += features.num_saved_kv_tokens * self.pair.y[-1]
        if features.num_prefill_requests:
            new, pairs = features.num_prefill_tokens, features.num_attention_pairs
            length = min(longest, 2 * pairs / new)  # of whole prompts their mean; of a late chunk its context
            filled = max(pairs * self.pair(length), self.fill_queries * longest * self.pair.y[-1])
            attention += max(filled, self.alone(min(new, longest)))
        return (
            self.num_layers * (self.layer(features.num_tokens) + attention)
            + self.head(features.num_requests)
            + self.per_copied_block * features.num_copied_blocks
        )

    def _decode(self, num_requests: float, length: float) -> float:
        known = self.requests
        if num_requests <= known[0]:
            return self.decode[0](length)
        right = min(max(bisect_left(known, num_requests), 1), len(known) - 1)
        share = (num_requests - known[right - 1]) / (known[right] - known[right - 1])
        return (1 - share) * self.decode[right - 1](length) + share * self.decode[right](length)


class OperationTables:
    """The tables of one card and one framework's kernels.

    Args:
        path: of the Parquet file.

    Raises:
        ConfigError: no such file, or it is none of `kvarena make profile`.
    """

    def __init__(self, path: Path) -> None:
        # Imported here: an engine that computes needs nothing of it.
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=list(COLUMNS))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ConfigError(
                f"{path} holds no tables of kvarena make profile: {str(error).splitlines()[0]}"
            ) from error
        self._path = path
        columns = {name: table.column(name).to_numpy() for name in COLUMNS}
        self._of = {op: {name: values[columns["op"] == op] for name, values in columns.items()}
                    for op in ("gemm", "experts", "context", "generation")}  # fmt: skip
        gemm = self._of["gemm"]
        self._sides = [np.unique(gemm[side]).astype(np.float64) for side in ("n", "k")]
        self._products: dict[tuple[float, float], Curve] = {}

    def product(self, outputs: float, inputs: float) -> FloatArray:
        """Seconds of a product with so many outputs and inputs, for each of ROWS."""
        total = np.zeros(len(ROWS))
        for n, at_n in _near(outputs, self._sides[0]):
            for k, at_k in _near(inputs, self._sides[1]):
                total += at_n * at_k * np.array([self._curve(n, k)(rows) for rows in ROWS]) * outputs * inputs / (n * k)
        return total

    def _curve(self, n: float, k: float) -> Curve:
        if (n, k) not in self._products:
            rows = self._where("gemm", n=n, k=k)
            self._products[n, k] = Curve(*_sorted(rows["m"], rows["seconds"]))
        return self._products[n, k]

    def experts(self, sizes: ModelSizes, ranks: int) -> FloatArray:
        """Seconds of the experts of a layer, for each of ROWS."""
        experts = sizes.spec.experts
        assert experts is not None
        rows = self._where("experts", n=sizes.hidden_size, k=sizes.intermediate_size, d=experts.num_experts,
                           length=experts.top_k, ranks=ranks)  # fmt: skip
        if not len(rows["m"]):
            raise ConfigError(
                f"{self._path.name} has no experts of model {sizes.spec.name!r} ({experts.num_experts} of "
                f"{sizes.hidden_size} x {sizes.intermediate_size}, top {experts.top_k}, over {ranks} ranks); take a "
                "card's profile, such as runner.profile=h200"
            )
        curve = Curve(*_sorted(rows["m"], rows["seconds"]))
        return np.array([curve(count) for count in ROWS])

    def attention(self, heads: int, kv_heads: int, head_dim: int) -> tuple[list[float], list[Curve], Curve, Curve]:
        """Of a layer: decode attention by requests and length; of prompts by length, a pair in a full batch, and one
        alone.
        """
        key = {"n": heads, "k": kv_heads, "d": head_dim}
        generation, context = self._where("generation", **key), self._where("context", **key)
        if not len(generation["m"]) or len(context["m"]) < 2:
            raise ConfigError(
                f"{self._path.name} has no attention of {heads} heads, {kv_heads} KV heads and {head_dim} elements; "
                "take other ranks, or a card's profile, such as runner.profile=h200"
            )
        requests = np.unique(generation["m"])
        decode = []
        for count in requests:
            mine = generation["m"] == count
            decode.append(Curve(*_sorted(generation["length"][mine], generation["seconds"][mine])))
        length = context["length"].astype(np.float64)
        each = context["seconds"] / (context["m"] * length * (length + 1) / 2)
        lengths = np.unique(context["length"]).tolist()
        pairs = [float(each[context["length"] == length].min()) for length in lengths]
        single = context["m"] == 1
        alone = Curve(*_sorted(context["length"][single], context["seconds"][single]))
        # A longer context is no dearer a pair than the longest that is known.
        return requests.tolist(), decode, Curve([*lengths, 2 * lengths[-1]], [*pairs, pairs[-1]]), alone

    def _where(self, op: str, **wanted: float) -> dict[str, Any]:
        table = self._of[op]
        mask = np.logical_and.reduce([table[name] == value for name, value in wanted.items()])
        return {name: values[mask] for name, values in table.items()}


@cache
def read_tables(path: Path, stamp: int) -> OperationTables:  # noqa: ARG001 - a part of the key alone
    """The tables of a file, read once for each time that it was changed."""
    return OperationTables(path)


def step_time_of(
    tables: OperationTables, sizes: ModelSizes, ranks: Ranks, *, bandwidth: float, fill: float, per_copied_block: float
) -> OperationStepTime:
    """The step time of one card's share of a model.

    Args:
        tables: of the card.
        sizes: of the model: layers of q, k, v and o, and of a gated MLP or experts.
        ranks: how it lies on cards.
        bandwidth: bytes per second of element-wise work.
        fill: queries of one head whose attention fills the card.
        per_copied_block: seconds of each block copied.

    Raises:
        ConfigError: the model has other layers, or the tables know nothing of them.
    """
    spec, hidden, width, tensor = sizes.spec, sizes.hidden_size, sizes.intermediate_size, ranks.tensor
    _check_layers(sizes)
    heads, kv_heads = sizes.num_heads // tensor, max(1, spec.num_kv_heads // tensor)
    rows = (heads + 2 * kv_heads) * spec.head_dim
    products = tables.product(rows, hidden) + tables.product(hidden, heads * spec.head_dim)
    if spec.experts is None:
        products += tables.product(2 * width / tensor, hidden) + tables.product(hidden, width / tensor)
        moved = ELEMENTWISE_ROWS[1] * width / tensor
    else:
        products += tables.product(spec.experts.num_experts, hidden) + tables.experts(sizes, tensor)
        moved = 0.0  # in the experts' table
    moved += ELEMENTWISE_ROWS[0] * hidden + 2 * rows
    layer = products + ROWS * moved * spec.dtype.itemsize / bandwidth
    requests, decode, pair, alone = tables.attention(heads, kv_heads, spec.head_dim)
    head = tables.product(spec.vocab_size / tensor, hidden)
    return OperationStepTime(
        num_layers=spec.num_layers / ranks.pipeline,
        layer=Curve(ROWS.tolist(), layer.tolist()),
        head=Curve(ROWS.tolist(), head.tolist()),
        requests=requests,
        decode=decode,
        pair=pair,
        alone=alone,
        fill_queries=fill / heads,
        per_copied_block=per_copied_block,
    )


def _check_layers(sizes: ModelSizes) -> None:
    """See that a model's layers are what is added up here, by their weights."""
    spec, hidden = sizes.spec, sizes.hidden_size
    number = 1 if spec.experts is None else spec.experts.num_experts
    weights = (2 * sizes.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * hidden
    weights += 3 * hidden * sizes.intermediate_size * number
    if abs(spec.num_layers * weights / sizes.num_layer_weights - 1) > 0.02:
        raise ConfigError(
            "runner.profile has tables of operations, for layers of q, k, v and o and a gated MLP or experts, and "
            f"model {spec.name!r} has others; take a card's profile, such as runner.profile=h200"
        )


def _near(value: float, grid: FloatArray) -> list[tuple[float, float]]:
    """The entries around `value`, and their shares by the logarithm; beyond the grid its end."""
    right = int(np.searchsorted(grid, value))
    if right in (0, len(grid)) or grid[right] == value:
        return [(float(grid[min(right, len(grid) - 1)]), 1.0)]
    one, other = np.log(grid[right - 1]), np.log(grid[right])
    share = float((np.log(value) - one) / (other - one))
    return [(float(grid[right - 1]), 1 - share), (float(grid[right]), share)]


def _sorted(x: NDArray[Any], y: NDArray[Any]) -> tuple[list[float], list[float]]:
    """A function's values by rising x."""
    order = np.argsort(x)
    return x[order].astype(float).tolist(), y[order].astype(float).tolist()
