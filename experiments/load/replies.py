"""Requests whose output is known: a runner that computes all the same, and answers with the known tokens.

    engine --plan--> ReplyingRunner --plan--> the runner      sizes, times and memory are its own
    engine <-known-- ReplyingRunner <-sampled--               tokens are those that were recorded

What a prefix cache finds is then as it was recorded. Without overlap the next step computes the known token; under
overlap the device goes on with the one that it sampled, and only the host knows better.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvarena.engine.contract import KVAllocator, StepPlan
from kvarena.engine.core import Engine
from kvarena.engine.model_runner import ModelRunner, PendingTokens, StepResult
from kvarena.engine.request import Request


@dataclass(eq=False, slots=True, kw_only=True)
class RepliedRequest(Request):
    """A request with a known output.

    Attributes:
        reply: its first tokens; the engine samples what comes behind them.
    """

    reply: list[int]


class ReplyingRunner:
    """Answers for `RepliedRequest`s with their replies.

    Args:
        runner: computes the steps.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> PendingTokens:
        """Launch a step."""
        return _Replies(plan, self._runner.execute(plan, allocator))

    def release(self, request_ids: list[str]) -> None:
        """As of the runner."""
        self._runner.release(request_ids)


class _Replies:
    """A step in flight."""

    def __init__(self, plan: StepPlan, pending: PendingTokens) -> None:
        self._plan, self._pending = plan, pending

    def result(self) -> StepResult:
        """Wait for the tokens, and put the known ones in their place."""
        result = self._pending.result()
        tokens = list(result.token_ids)
        for i, ((req, _, _), token) in enumerate(zip(self._plan.scheduled, tokens, strict=True)):
            if token is not None and isinstance(req, RepliedRequest):
                at = len(req.output_token_ids)
                if at < len(req.reply):
                    tokens[i] = req.reply[at]
        return result._replace(token_ids=tokens)


def reply_as_recorded(engine: Engine) -> None:
    """Let an engine answer with known outputs."""
    engine.runner = ReplyingRunner(engine.runner)
