"""The smallest study: one cell, one claim."""

from experiments.studies.base import Chart, Findings, Series, at_least
from experiments.studies.cells import CellRunner


class OneCell:
    def __init__(self, stated: float) -> None:
        self.stated = stated

    def run(self, cells: CellRunner) -> Findings:
        summary = cells.run("paged", ["allocator=paged"])
        contiguous = cells.run("orca", ["allocator=orca_max"])
        rates = [cell["num_finished"] for cell in (summary, contiguous)]
        return Findings(
            title="One cell",
            headline=f"{summary['num_finished']} requests finish.",
            source="this test",
            claims=[at_least("requests that finish", "", self.stated, summary["num_finished"])],
            charts=[Chart("rates", "bars", "allocator", "requests", "Finished.", [Series("run", ["a", "b"], rates)])],
            differences=["nothing"],
        )
