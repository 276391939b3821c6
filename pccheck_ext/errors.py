"""What can go wrong, by name. Every message says what was wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointNotFound",
]


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or restored."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint's files are damaged, incomplete, or were not written by this library."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint that does not fit the model or optimizer it is to be loaded into."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint of that name; the message lists those there are."""
