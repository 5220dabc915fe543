"""CUDA graphs of forwards, one per shape of steps, in one shared memory pool.

Launched one by one, the forward's kernels cost the host about 10 ms whatever the step holds. A graph replays them all
for the price of one launch, on tensors of fixed size and address. A shape's first steps run as they are, which compiles
what they need, before one is captured; so a server answers at once and no start-up waits for captures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.errors import EngineError

if TYPE_CHECKING:  # of a model that reads text nothing of it is imported
    from kvarena.engine.vision.encoder import InputRows


class Forward(Protocol):
    """A model's forward over a flattened batch whose metadata is prepared."""

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,
        inputs: InputRows | None = None,
    ) -> Tensor:
        """Logits [N, V] of `meta.logits_indices`, or with `all_rows` of every token in order; into `out` if given.

        `positions` as in `LoadedModel.logits`; `inputs`: what stands in place of the tokens' embeddings.
        """
        ...


@runtime_checkable
class ReservingBackend(AttentionBackend, Protocol):
    """An attention backend whose plan can live at a fixed address."""

    def reserve(
        self, meta: AttentionMetadata, num_rows: int, num_prefill_tokens: int = 0, *, shares: bool = False
    ) -> None:
        """Give `meta` a plan of fixed size and address, which `prepare` then fills.

        Args:
            meta: of every step that the plan serves.
            num_rows: most requests of a step.
            num_prefill_tokens: most new tokens of requests with more than one.
            shares: steps come with `AttentionMetadata.reads`; only a `SharingBackend` is asked for that.
        """
        ...


class GraphCapture:
    """Captures CUDA graphs into one memory pool. They must run one at a time, in stream order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], None], what: str) -> torch.cuda.CUDAGraph:
        """Capture what `run` launches; it must have run before, so that nothing is left to compile.

        Raises:
            EngineError: `what`, as the message calls it, cannot be captured.
            torch.OutOfMemoryError: no memory for its buffers.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`, which waits for the device and collects garbage first: the step is still running.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise EngineError(
                    f"{what} cannot be captured in a CUDA graph ({str(error).splitlines()[0]}); set runner.graphs=false"
                ) from error
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


class GraphShape(NamedTuple):
    """What a graph is captured for.

    Attributes:
        num_tokens: new tokens of a step, padding among them.
        num_rows: its requests, padding among them.
        is_decode: every request has one new token and samples.
        shares: what decodes have in common is read once.
    """

    num_tokens: int
    num_rows: int
    is_decode: bool
    shares: bool = False

    def __str__(self) -> str:
        shared = " that share their reads" if self.shares else ""
        if self.is_decode:
            return f"the decode forward for {self.num_rows} requests{shared}"
        return f"the forward for {self.num_tokens} new tokens of {self.num_rows} requests{shared}"


class CapturedGraph:
    """What steps of one shape launch: kernel by kernel until it is captured, replayed from then on.

    Args:
        what: as an error's message calls it: as a rule a `GraphShape`.
        meta: the steps' attention's metadata; its tensors stay, the host's fields change from step to step. None where
            there is none.
        launch: launches the kernels; they read and write at fixed addresses alone.
        num_plain: runs until one is captured.
        capture: captures; None never does (the same kernels, launched one by one).
    """

    def __init__(
        self,
        what: GraphShape | str,
        meta: AttentionMetadata | None,
        launch: Callable[[], None],
        num_plain: int,
        capture: GraphCapture | None,
    ) -> None:
        self.meta = meta
        self._what = what
        self._launch = launch
        self._num_left = num_plain
        self._capture = capture
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to compile or capture."""
        return self._num_left <= 0

    def hurry(self) -> None:
        """Let the next run be captured."""
        self._num_left = min(self._num_left, 1)

    def run(self) -> None:
        """Compute a step whose inputs are at their addresses and whose `meta` is prepared.

        Raises:
            EngineError: it cannot be captured.
            torch.OutOfMemoryError: no memory for the graph's buffers.
        """
        if self._graph is not None:
            self._graph.replay()
            return
        self._launch()
        self._num_left -= 1
        if self._capture is not None and self._num_left <= 0:
            self._graph = self._capture(self._launch, str(self._what))
