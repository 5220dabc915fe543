"""The error of this package. It does not derive from the engine's: reports read files and import nothing else."""

from __future__ import annotations


class ReportError(Exception):
    """A run's or a sweep's files are missing or broken. One line: what, where, and what to do."""


class NothingRecorded(ReportError):
    """All runs are whole, but recorded nothing that could be compared; the text has their throughput."""


class NotWritten(ReportError):
    """A file cannot be written: no room, no right, a folder in its place. What was there is as it was."""
