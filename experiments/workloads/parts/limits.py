"""Length limits: what to do with a request that is longer than wanted, and how many there were."""

from __future__ import annotations

from kvarena.engine.checks import check_choice, check_int

# Longer than any context in use; above it a length is a typing error, and its prompt would not fit in memory.
MAX_LENGTH = 10_000_000
MAX_REQUESTS = 100_000_000


class LengthLimits:
    """Clips or drops requests above a length, and counts them.

    Clipping cuts the prompt to `max_prompt_len` and to `max_total_len - 1`, then the output to `max_output_len` and to
    what the prompt left of `max_total_len`, as an engine of that context length would. Dropping leaves the request out.

    Args:
        max_prompt_len: in tokens; None is no limit.
        max_output_len: in tokens; None is no limit.
        max_total_len: of prompt + output, in tokens; None is no limit.
        on_exceed: `clip` or `drop`.

    Raises:
        ConfigError: a limit out of range.
    """

    def __init__(
        self,
        max_prompt_len: int | None = None,
        max_output_len: int | None = None,
        max_total_len: int | None = None,
        on_exceed: str = "drop",
    ) -> None:
        limits = {"max_prompt_len": max_prompt_len, "max_output_len": max_output_len, "max_total_len": max_total_len}
        for key, value in limits.items():
            if value is not None:
                check_int(f"workload.{key}", value, 2 if key == "max_total_len" else 1)
        self.max_prompt = MAX_LENGTH if max_prompt_len is None else max_prompt_len
        self.max_output = MAX_LENGTH if max_output_len is None else max_output_len
        self.max_total = 2 * MAX_LENGTH if max_total_len is None else max_total_len
        self.on_exceed = check_choice("workload.on_exceed", on_exceed, ("clip", "drop"))
        self._stated = ", ".join(f"{key} {value}" for key, value in limits.items() if value is not None)
        self.num_seen = 0
        self.num_exceeding = 0

    def apply(self, prompt_len: int, output_len: int) -> tuple[int, int] | None:
        """The lengths to use, or None to leave the request out. Counts."""
        self.num_seen += 1
        prompt = min(prompt_len, self.max_prompt, self.max_total - 1)
        output = min(output_len, self.max_output, self.max_total - prompt)
        if prompt == prompt_len and output == output_len:
            return prompt_len, output_len
        self.num_exceeding += 1
        return (prompt, output) if self.on_exceed == "clip" else None

    def note(self) -> str:
        """What happened, for the description; empty without limits."""
        if not self._stated:
            return ""
        verb = "clipped" if self.on_exceed == "clip" else "dropped"
        return f"{verb} {self.num_exceeding} of {self.num_seen} ({self._stated})"
