"""What a workload is: a table of lengths, and prompts made from it one by one.

    options + seed -> LengthTable (arrays, made once) -> WorkloadItem (prompts made as they are read)

`items_iter(with_token_ids=False)` gives prompts of the right length and no content, which is enough for simulations
without prefix caching: a million items take some hundred MiB.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.checks import check_int
from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.limits import MAX_REQUESTS, LengthLimits
from kvarena.experiments.workloads.parts.seeds import Purpose
from kvarena.experiments.workloads.parts.tokens import TokenSource

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WorkloadItem:
    """One request as a workload states it.

    Attributes:
        prompt_token_ids: at least one token.
        output_len: tokens to generate, at least 1.
        arrival_time: seconds since the trace's first row; None when the workload states no times.
        client_id: whose request it is: a conversation, a user, a component of a mixture.
        priority: lower runs first.
        kind: which kind of request it is: a turn of a conversation, a type; requests of a kind are used again alike.
        request_id: unique in the workload.
        reply_token_ids: what the output is to be, whatever the engine samples; what it samples where that is shorter
            than the output, or None.
    """

    prompt_token_ids: list[int]
    output_len: int
    arrival_time: float | None
    client_id: str = ""
    priority: int = 0
    request_id: str = ""
    reply_token_ids: list[int] | None = None
    kind: str = ""


@dataclass(frozen=True)
class LengthTable:
    """A workload without its tokens, as columns of one length.

    Attributes:
        prompt_lens: tokens, each at least 1.
        output_lens: tokens, each at least 1.
        arrival_times: seconds since the first row, non-decreasing; None without times.
        client_ids: one per row; None leaves them empty.
        priorities: one per row; None is 0 for all.
        kinds: one per row; None leaves them empty.
        notes: facts for the description (rows clipped, dropped, sorted).
    """

    prompt_lens: IntArray
    output_lens: IntArray
    arrival_times: FloatArray | None = None
    client_ids: Sequence[str] | None = None
    priorities: Sequence[int] | None = None
    kinds: Sequence[str] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_lens)


class Workload(ABC):
    """A list of requests that is a function of its options and its seed.

    Subclasses set `name` and `source`, build a `LengthTable`, and override `prompt` where prompts share tokens.

    Args:
        num_requests: how many requests; None is all rows of a trace.
        seed: the one seed of prompts, lengths and (through the arrival) times.
        vocab_size: prompts are drawn from [0, vocab_size).
        reserved_token_ids: ids that prompts never contain.
        num_clients: requests are of so many clients in turn; 0: of none.
        num_priorities: they have so many priorities in turn, from 0; 0: all have the same.

    Raises:
        ConfigError: a value out of range.
    """

    name: str
    source: str

    def __init__(
        self,
        *,
        num_requests: int | None,
        seed: int,
        vocab_size: int,
        reserved_token_ids: Sequence[int] = (),
        num_clients: int = 0,
        num_priorities: int = 0,
    ) -> None:
        if num_requests is not None:
            check_int("workload.num_requests", num_requests, 1, MAX_REQUESTS)
        self.num_requests = num_requests
        self.seed = check_int("workload.seed", seed, 0)
        self.vocab_size = check_int("vocab_size", vocab_size, 1)
        self.reserved_token_ids = tuple(reserved_token_ids)
        self._num_clients = check_int("workload.num_clients", num_clients, 0)
        self._num_priorities = check_int("workload.num_priorities", num_priorities, 0)

    @abstractmethod
    def _build(self) -> LengthTable:
        """Draw or read the lengths. Called once."""

    @cached_property
    def table(self) -> LengthTable:
        """The workload's lengths and times. Made at first use; raises what the subclass's source raises."""
        table = self._build()
        for name, own in (("num_clients", table.client_ids), ("num_priorities", table.priorities)):
            if getattr(self, f"_{name}") and own is not None:
                raise ConfigError(f"workload.{name} is for workloads that say none themselves, as {self.name} does")
        if clients := self._num_clients:
            table = replace(table, client_ids=[f"c{row % clients}" for row in range(len(table))])
        if priorities := self._num_priorities:
            table = replace(table, priorities=[row % priorities for row in range(len(table))])
        return table

    @cached_property
    def _tokens(self) -> TokenSource:
        return TokenSource(self.seed, Purpose.PROMPT_TOKENS, self.vocab_size, self.reserved_token_ids)

    @cached_property
    def _prefix_tokens(self) -> TokenSource:
        return TokenSource(self.seed, Purpose.PREFIX_TOKENS, self.vocab_size, self.reserved_token_ids)

    def prompt(self, row: int) -> list[int]:
        """The token ids of one row's prompt: a stream of its own unless a subclass shares them."""
        return self._tokens.take(row, int(self.table.prompt_lens[row]))

    def items(self) -> list[WorkloadItem]:
        """All requests, in order of arrival."""
        return list(self.items_iter())

    def items_iter(self, with_token_ids: bool = True) -> Iterator[WorkloadItem]:
        """The requests one by one, in order of arrival.

        Args:
            with_token_ids: False gives prompts of token 0 only, in lists that requests of equal length share (do not
                modify them). Lengths, times and ids are the same.
        """
        table = self.table
        times = None if table.arrival_times is None else table.arrival_times.tolist()
        blanks: dict[int, list[int]] = {}
        for row, (prompt_len, output_len) in enumerate(
            zip(table.prompt_lens.tolist(), table.output_lens.tolist(), strict=True)
        ):
            if with_token_ids:
                prompt = self.prompt(row)
            else:
                prompt = blanks.get(prompt_len) or blanks.setdefault(prompt_len, [0] * prompt_len)
            yield WorkloadItem(
                prompt,
                output_len,
                None if times is None else times[row],
                "" if table.client_ids is None else table.client_ids[row],
                0 if table.priorities is None else table.priorities[row],
                f"{self.name}-{row}",
                kind="" if table.kinds is None else table.kinds[row],
            )

    @property
    def description(self) -> str:
        """One line: size, length statistics (CV = standard deviation / mean), what was left out, and the source."""
        table = self.table
        parts = [f"{self.name}: {len(table)} requests"]
        for label, lens in (("prompt", table.prompt_lens), ("output", table.output_lens)):
            mean = float(lens.mean())
            parts.append(f"{label} mean {mean:.1f} CV {float(lens.std()) / mean:.2f} max {int(lens.max())}")
        return "; ".join([", ".join(parts), *table.notes, f"seed {self.seed}", self.source])


class LimitedWorkload(Workload):
    """A workload some of whose requests may be longer than wanted.

    Args:
        max_prompt_len: in tokens; None is no limit.
        max_output_len: in tokens; None is no limit.
        max_total_len: of prompt + output; None is no limit.
        on_exceed: `clip` or `drop` what is longer; what is dropped does not count towards `num_requests`.
        common: see Workload.
    """

    def __init__(
        self,
        *,
        max_prompt_len: int | None = None,
        max_output_len: int | None = None,
        max_total_len: int | None = None,
        on_exceed: str = "drop",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._limits = LengthLimits(max_prompt_len, max_output_len, max_total_len, on_exceed)
