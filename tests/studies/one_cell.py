"""The smallest study: two cells, two published numbers (one is not comparable), one of ours, one check (that fails)."""

from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import at_least, at_most, check, measured, not_run


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
            claims=[
                at_least("requests that finish", "", self.stated, summary["num_finished"]),
                not_run("requests that beam search finishes", "", 2.0, "not offered"),
                measured("requests", "", summary["num_requests"]),
                check(at_most("requests that finish, of those that came", "", 1.0, 2.0)),
            ],
            charts=[Chart("rates", "bars", "allocator", "requests", "Finished.", [Series("run", ["a", "b"], rates)])],
            differences=["nothing"],
        )
