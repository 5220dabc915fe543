"""Errors that a person reads: each message says what was wrong, where, and what to change."""

from __future__ import annotations


class KvarenaError(Exception):
    """Base of every error that kvarena raises on purpose. Shown as one line, never as a stack trace."""


class ConfigError(KvarenaError):
    """A setting is unknown, out of range, or cannot be combined with another one."""


class NotDefined(ConfigError):
    """Settings that are right one by one and mean nothing together. A sweep leaves such a cell out and says why."""


class ModelError(KvarenaError):
    """A model directory is missing, broken, or holds an architecture that the runner cannot drive."""


class TraceError(KvarenaError):
    """A workload file is malformed. The message names file, line and column."""


class RequestError(KvarenaError):
    """A request's own parameters are invalid.

    Attributes:
        param: name of the offending parameter, as the caller spelled it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestRejected(RequestError):
    """A valid request that this engine can never run.

    Attributes:
        reason: `max_model_len` (longer than the context) or `max_request_tokens` (larger than an empty pool).
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, param="prompt")
        self.reason = reason


class EngineError(KvarenaError):
    """The engine cannot go on: a broken invariant, or a device that failed."""


class RankFailed(EngineError):
    """One of the ranks that share a model cannot go on, so none can. The message names the rank and says why."""


class OutOfMemory(EngineError):
    """A device has no memory for what was asked. The message says how much that was, what was free, and what helps."""
