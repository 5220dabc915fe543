"""What an error says to a person: one line, with the cause that Hydra hides and the setting that was meant."""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object
from omegaconf.errors import OmegaConfBaseException

from kvarena.engine.errors import KvarenaError
from kvarena.experiments.settings.near import near
from kvarena.experiments.settings.suggest import explain_composition
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.packages import missing_package
from kvarena.reports.reading.writing import cannot_write

# What keeps a file from being written, and is never a bug of ours.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR,
        errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)  # fmt: skip


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str | None:
    """One line for a person, or None when `error` is not the user's doing but a bug.

    Args:
        error: what was raised.
        overrides: the command line, where that may be at fault.
    """
    if (package := missing_package(error)) is not None:
        return package
    own = own_error(error)
    if own is not None:
        return str(own)
    if isinstance(error, ReportError):
        return str(error)
    if isinstance(error, MemoryError):
        what = f" ({first_line(error)})" if str(error) else ""
        return f"this machine's memory is not enough{what}; lower kv_cache.num_slots or workload.num_requests"
    if isinstance(error, OSError) and error.errno in DISK:
        return cannot_write(error.filename or "a file", error)
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error, _causes(error))
    if _raised_in(error) == "submitit":
        return f"hydra/launcher: {error}"
    if isinstance(error, (TypeError, ValueError)) and _raised_in(error) == "hydra":
        return f"the command line cannot be read: {first_line(error)}"
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    return explain_composition(error, overrides) or " ".join(str(error).split())


def _raised_in(error: BaseException) -> str:
    """The package whose code raised `error`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def own_error(error: BaseException) -> KvarenaError | None:
    """The error that kvarena raised, if there is one behind `error`."""
    return next((cause for cause in _causes(error) if isinstance(cause, KvarenaError)), None)


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return chain


def _explain_instantiation(error: InstantiationException, chain: list[BaseException]) -> str | None:
    """A constructor refused its arguments: a wrong type in the config, else a bug."""
    section = re.search(r"full_key: (\S+)", str(error))
    where = f"config section {section[1]!r}: " if section else ""
    cause = chain[-1]
    if isinstance(cause, MemoryError):
        return f"{where}{explain(cause)}"
    loading = next((link.__cause__ for link in chain if str(link).startswith("Error loading '")), None)
    if target := re.search(r"Error locating target '([^']+)'", str(error)):
        return f"{where}_target_={target[1]} cannot be loaded: {_with_place(loading or cause)}"
    if unexpected := re.search(r"unexpected keyword argument '([^']+)'", str(cause)):
        known = [name for name in _arguments(str(error)) if name != unexpected[1]]
        found = near(unexpected[1], known)
        meant = f"; did you mean {' or '.join(found)}?" if found else ""
        return f"{where}there is no setting {unexpected[1]!r}{meant} ({cause})"
    return f"{where}{cause}" if isinstance(cause, (TypeError, ValueError, OverflowError)) else None


def _with_place(error: BaseException) -> str:
    """What was wrong with a module that is being imported, and in which line."""
    said = first_line(error)
    if isinstance(error, SyntaxError):  # says it itself
        return said
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_name != "<module>":  # nothing of the module's own
        return said
    return f"{said} ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"


def _arguments(text: str) -> list[str]:
    """What the class takes whose construction Hydra says has failed."""
    name = re.search(r"Error in call to target '([^']+)'", text)
    try:
        kind = get_object(name[1]) if name else object
        return [
            parameter.name
            for one in kind.__mro__
            for parameter in inspect.signature(one).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
    except (HydraException, ImportError, ValueError, TypeError, AttributeError):
        return []


def first_line(error: BaseException | None) -> str:
    """The first line of what `error` says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
