"""What a study is, and what it finds.

    conf/experiment/NAME.yaml --> a Study --> cells (run folders) --> Findings --> study.json --> report

A study says which cells it needs and what they show. Cells run like any single run
(`kvarena.experiments.studies.cells`), and the report is made from study.json alone (`kvarena.reports.pages.study`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean
from kvarena.reports.drawing.style import CLASS_LOOKS


@dataclass(frozen=True)
class Series:
    """One line, or one group of bars.

    Attributes:
        name: in the legend.
        x: numbers for lines, labels for bars.
        y: one value for each x; None leaves a gap.
        low, high: a band or error bars around y; empty for none.
    """

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def mean_series(
    name: str, x: Sequence[float] | Sequence[str], means: Sequence[Mean], *, on_log: bool = False
) -> Series:  # fmt: skip
    """Means with their intervals as a series; without error bars where one of them has no interval.

    Args:
        on_log: for a logarithmic axis: no interval reaches below a tenth of its mean.
    """
    low = [mean.low for mean in means if mean.low is not None]
    high = [mean.high for mean in means if mean.high is not None]
    if len(low) < len(means):
        low, high = [], []
    if on_log:
        low = [max(end, mean.value / 10) for end, mean in zip(low, means, strict=False)]
    return Series(name, x, [mean.value for mean in means], low, high)


@dataclass(frozen=True)
class Chart:
    """A figure as data; `kvarena.reports.drawing.study_charts` draws it.

    Attributes:
        name: of its file.
        kind: lines | bars (side by side) | stacked (bars of shares, one series a segment) |
            parity (points, and the line on which x and y are equal).
        x_label, y_label: with units.
        caption: what it shows.
        series: what is drawn.
        log_x, log_y: logarithmic axes.
        y_limit: top of the y axis; None fits the data.
        y_mark: a dotted line across, such as a limit or a bound.
        y_mark_name: what stands upon it; "" for its value alone.
    """

    name: str
    kind: str
    x_label: str
    y_label: str
    caption: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    y_limit: float | None = None
    y_mark: float | None = None
    y_mark_name: str = ""


def split_chart(names: Sequence[str], shares: Callable[[str], Sequence[float]], caption: str) -> Chart:
    """How the pool was split: a stacked bar for each of `names`; classes that none of them has are left out.

    Args:
        shares: of a class (`CLASS_LOOKS`), in percent, one for each name.
    """
    series = [Series(look.label, names, values) for key, look in CLASS_LOOKS.items() if any(values := shares(key))]
    return Chart("kv_split", "stacked", "mean share of the KV pool (%)", "", caption, series)


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        title: of the report.
        headline: the answer in one sentence.
        source: where the stated values come from.
        claims: stated values beside ours.
        charts: figures.
        differences: what differs from the source's setting, one sentence each.
        notes: how it was measured, definitions.
        beside: name of what `Claim.beside` was measured under; "" where nothing was.
    """

    title: str
    headline: str
    source: str
    claims: Sequence[Claim]
    charts: Sequence[Chart] = ()
    differences: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    beside: str = ""

    def to_json(self) -> dict[str, Any]:
        """As study.json holds it."""
        return asdict(self)


class Study(Protocol):
    """A question that several cells answer. Made by Hydra from the config's section `study`."""

    def run(self, cells: CellRunner) -> Findings:
        """Run the cells it needs and say what they show.

        Raises:
            KvarenaError: a cell is badly set or failed.
        """
        ...
