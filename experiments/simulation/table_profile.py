"""A profile that is made of tables of single operations (`kvarena make profile`): any model of Llama-like layers, on a
card that somebody has measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.experiments.simulation.collectives import ONE_CARD, Collectives, Ranks, parallel_step_time
from kvarena.experiments.simulation.operation_tables import read_tables, step_time_of
from kvarena.experiments.simulation.step_time import HostTime, StepTime


@dataclass(frozen=True)
class TablesProfile:
    """Tables of operations, and what they do not hold.

    Args:
        source: where the tables come from.
        tables: the Parquet file.
        memory_bytes: of the card.
        bandwidth: bytes per second of element-wise work.
        fill_queries: queries of one head whose attention fills the card.
        copy_bandwidth: of swapped blocks, in bytes per second.
        copy_gap: seconds that a block's transfer takes beside its bytes.
        host: seconds of the host around a step.
        collectives: what cards take to exchange data; None: not known.
        error: what is known of its error, in words; reports print it.

    Raises:
        ConfigError: a figure out of range.
    """

    source: str
    tables: str
    memory_bytes: float
    bandwidth: float
    fill_queries: float
    copy_bandwidth: float
    copy_gap: float
    host: HostTime
    collectives: Collectives | None = None
    error: str = ""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bandwidth", "copy_bandwidth"):
            check_number(f"profile.{name}", getattr(self, name), above=True)
        for name in ("fill_queries", "copy_gap"):
            check_number(f"profile.{name}", getattr(self, name))

    def step_time(
        self, sizes: ModelSizes, block_size: int, expert_skew: float = 0.0, ranks: Ranks = ONE_CARD
    ) -> StepTime:
        """The sum of a model's operations.

        Raises:
            ConfigError: the tables know nothing of the model's layers, its experts are skewed, or its ranks do not fit.
        """
        if expert_skew:
            raise ConfigError(
                f"runner.expert_skew={expert_skew} is for a card: these tables are of a balanced routing; leave it out"
            )
        if sizes.spec.dtype.itemsize != 2 or sizes.saved_bytes:
            raise ConfigError(
                f"runner.profile has tables of 16 bit, and model {sizes.spec.name!r} is of other weights; set "
                "engine.dtype=bfloat16, or take a card's profile, such as runner.profile=h200"
            )
        path = Path(self.tables)
        copied = self.copy_gap + block_size * sizes.spec.kv_bytes_per_token / self.copy_bandwidth
        share = step_time_of(
            read_tables(path, path.stat().st_mtime_ns if path.exists() else 0), sizes, ranks,
            bandwidth=self.bandwidth, fill=self.fill_queries, per_copied_block=copied / ranks.number,
        )  # fmt: skip
        return parallel_step_time(share, ranks, sizes, self.collectives)

    def check_overlap(self, overlap: bool) -> None:
        """Its host time is apart from its device time: right with and without overlap."""

    def facts(
        self,
        sizes: ModelSizes,  # noqa: ARG002 - as of Card
        block_size: int,  # noqa: ARG002
        expert_skew: float = 0.0,  # noqa: ARG002
        ranks: Ranks = ONE_CARD,
    ) -> dict[str, Any]:
        """Figures and their source; the tables stay in their file."""
        figures = asdict(self) | {"collectives": None if self.collectives is None else self.collectives.source}
        return {"kind": "tables", "figures": figures, "ranks": asdict(ranks)}
