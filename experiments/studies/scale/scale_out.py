"""How models scale over cards that nobody here has: tensor parallel x pipeline parallel x replicas, simulated.

for each model, for each number of cards, for each layout (TP, PP) that divides it:
    cards / (TP x PP) replicas behind a router, so many users for each card  -->  tokens/s a card, TPOT, goodput
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvarena.engine.checks import check_int
from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.profiles import load_profile
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, measured


@dataclass(frozen=True)
class Layout:
    """How one replica lies on cards.

    Attributes:
        tensor: cards that share each layer.
        pipeline: stages.
    """

    tensor: int
    pipeline: int

    @property
    def cards(self) -> int:
        """Of one replica."""
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"TP {self.tensor}" + (f" x PP {self.pipeline}" if self.pipeline > 1 else "")


@dataclass
class ScaleOutStudy:
    """Layouts of each model from few cards to many.

    Args:
        models: by the model's name: `layouts`, pairs of (TP, PP), and `users` of each card, who wait for their answers.
        cards: numbers of cards.
        rounds: requests of each user.
        router: before the replicas of a cell that has several.

    Raises:
        ConfigError: no layout, or a number out of range.
    """

    models: Mapping[str, Mapping[str, Any]]
    cards: Sequence[int]
    rounds: int
    router: str

    def __post_init__(self) -> None:
        check_int("study.rounds", self.rounds, 1)
        for number in self.cards:
            check_int("study.cards", number, 1)
        for name, model in self.models.items():
            if set(model) != {"layouts", "users"} or not model["layouts"]:
                raise ConfigError(f"study.models.{name} must have layouts, [[TP, PP], ...], and users")
            check_int(f"study.models.{name}.users", model["users"], 1)
            for pair in model["layouts"]:
                if not isinstance(pair, list) or len(pair) != 2:
                    raise ConfigError(f"study.models.{name}.layouts has {pair}, which is no [TP, PP]")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        profile = load_profile(cells.config().values["runner"]["profile"])
        exchange = getattr(profile, "collectives", None)
        if exchange is None:
            raise ConfigError("runner.profile says nothing of what cards exchange; take h200 or h200-tables")
        found: dict[str, dict[Layout, dict[int, dict[str, Any]]]] = {}
        for model, options in self.models.items():
            found[model] = {
                layout: {number: self._cell(cells, model, options, layout, number)
                         for number in self.cards if number % layout.cards == 0}
                for layout in (Layout(*pair) for pair in options["layouts"])
            }  # fmt: skip
        return Findings(
            title=f"Scale-out; collectives: {exchange.source}",
            headline=self._headline(found),
            source=f"No device computed this: step times by {profile.source}",
            claims=self._claims(found),
            charts=[chart for model in self.models for chart in self._charts(model, found[model])],
            differences=[
                "Tensor parallel beyond one host is not simulated: no table has it. Replicas share nothing.",
                "Pipeline parallel in its steady state: as many batches in flight as stages, each at the slowest "
                "stage's pace; what an uneven load leaves idle is not in it.",
            ],
            notes=[
                "The load grows with the cards: the same number of users for each card, of whom each sends the next "
                "request when the last one is answered. So all layouts of a model are as full, and no queue grows.",
                "Tokens/s: of the whole run; its ramp and drain are a share of each run that is the same for all.",
                "TPOT: the median over requests. Goodput: requests per second and card that kept both limits.",
            ],
        )

    def _cell(
        self, cells: CellRunner, model: str, options: Mapping[str, Any], layout: Layout, number: int
    ) -> dict[str, Any]:
        replicas = number // layout.cards
        router = [f"router={self.router}", f"router.num_replicas={replicas}"] if replicas > 1 else ["router=none"]
        return cells.run(
            f"{model}-tp{layout.tensor}-pp{layout.pipeline}-{number}",
            [
                f"model={model}",
                f"parallel.tensor_parallel_size={layout.tensor}",
                f"parallel.pipeline_parallel_size={layout.pipeline}",
                f"arrival.num_users={options['users'] * number}",
                f"workload.num_requests={options['users'] * number * self.rounds}",
                *router,
            ],
        )

    def _headline(self, found: Mapping[str, Mapping[Layout, Mapping[int, dict[str, Any]]]]) -> str:
        texts = []
        for model, layouts in found.items():
            largest = max(number for of in layouts.values() for number in of)
            best = max((layout for layout in layouts if largest in layouts[layout]),
                       key=lambda layout: _goodput(layouts[layout][largest], largest))  # fmt: skip
            summary = layouts[best][largest]
            texts.append(
                f"{model}: {best} ({_goodput(summary, largest):.2f} good requests/s and "
                f"{_tokens(summary) / largest:,.0f} tokens/s a card, TPOT "
                f"{1e3 * summary['tpot_seconds']['p50']:.1f} ms)"
            )
        return f"The layouts with the highest goodput on {largest} cards: {'; '.join(texts)}."

    def _claims(self, found: Mapping[str, Mapping[Layout, Mapping[int, dict[str, Any]]]]) -> list[Claim]:
        claims = []
        for model, layouts in found.items():
            for layout, of in layouts.items():
                for number, summary in of.items():
                    replicas = f"{number // layout.cards} replica{'s' * (number > layout.cards)}"
                    where = f"{model}, {number} card{'s' * (number > 1)}, {layout}, {replicas}"
                    share = summary["slo"]["whole_run"]["attainment"]
                    claims += [
                        measured(f"{where}: output tokens/s a card", "tokens/s", _tokens(summary) / number),
                        measured(f"{where}: TPOT, median", "ms", 1e3 * summary["tpot_seconds"]["p50"]),
                        measured(f"{where}: goodput a card", "requests/s", _goodput(summary, number),
                                 note=f"{share:.0%} of the requests"),
                    ]  # fmt: skip
        return claims

    def _charts(self, model: str, layouts: Mapping[Layout, Mapping[int, dict[str, Any]]]) -> list[Chart]:
        def series(value: Any) -> list[Series]:
            return [
                Series(
                    str(layout),
                    [float(number) for number in of],
                    [value(summary, number) for number, summary in of.items()],
                )
                for layout, of in layouts.items()
                if of
            ]

        load = f"{self.models[model]['users']} users a card"
        return [
            Chart(f"{model}-tokens", "lines", "cards", "output tokens/s a card",
                  f"{model}, simulated: output tokens/s of each card, by layout; {load}.",
                  series(lambda summary, number: _tokens(summary) / number), log_x=True),
            Chart(f"{model}-tpot", "lines", "cards", "TPOT, median (ms)",
                  f"{model}, simulated: median time per output token, by layout; {load}.",
                  series(lambda summary, _: 1e3 * summary["tpot_seconds"]["p50"]), log_x=True),
            Chart(f"{model}-goodput", "lines", "cards", "good requests/s a card",
                  f"{model}, simulated: requests that kept both limits, per second and card, by layout; {load}.",
                  series(_goodput), log_x=True),
        ]  # fmt: skip


def _goodput(summary: dict[str, Any], cards: int) -> float:
    """Good requests per second and card."""
    return float(summary["slo"]["whole_run"]["good_requests_per_second"]) / cards


def _tokens(summary: dict[str, Any]) -> float:
    """Output tokens per second of all cards."""
    return float(summary["output_tokens_per_second"])
