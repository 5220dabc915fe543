"""Command lines: an argparse parser whose errors are one line, and whose help says what each option is by default."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and behind an option's line its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        unsaid = (None, False, argparse.SUPPRESS)
        if text is None or action.default in unsaid or action.default == [] or "default" in text:
            return text
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {' '.join(map(str, action.default)).replace('%', '%%')})"
        return f"{text} (default: %(default)s)"


class Options(argparse.ArgumentParser):
    """argparse's parser; what is wrong with a command line is one line on stderr, and exit code 2.

    Args:
        options: as of `argparse.ArgumentParser`; `prog` is the command's words.
    """

    def __init__(self, **options: Any) -> None:
        usual: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(**usual | options)

    def error(self, message: str) -> NoReturn:
        """An option is unknown, missing or cannot be read."""
        self.exit(2, f"error: {self.said(message)}\n")

    def said(self, message: str) -> str:
        """The line about what is wrong, with the option that was meant, and what lists them all."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        _, unknown, given = message.partition("unrecognized arguments: ")
        near = difflib.get_close_matches(given.split()[0].partition("=")[0], known, n=1) if unknown else []
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"{self.prog}: {message}{meant} ({self.prog} --help lists the options)"
