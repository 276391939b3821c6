"""Names of checkpoints and where a run's directory is, as the old arguments tell it."""

from __future__ import annotations

import os
import re

__all__ = [
    "PARTIAL",
    "STALE",
    "check_id",
    "directory_of",
    "old_step_of",
    "run_directory",
    "step_id",
    "step_of",
]

PARTIAL = ".partial"
STALE = ".stale"
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_OLD_STEP = re.compile(r"step_(\d{1,18})")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,9}")
_STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,17})")


def step_id(step: int) -> str:
    """100 -> ``"step-00000100"``."""
    return f"step-{step:08d}"


def step_of(checkpoint_id: str) -> int | None:
    found = _STEP.fullmatch(checkpoint_id)
    return int(found[1]) if found else None


def old_step_of(checkpoint_id: str) -> int | None:
    """``"step_100"``, as older code names a step, -> 100."""
    found = _OLD_STEP.fullmatch(checkpoint_id)
    return int(found[1]) if found else None


def directory_of(checkpoint_file: str | os.PathLike[str]) -> str:
    """The directory that an old checkpoint file's name stands for: its suffix is dropped.

    One that is a directory already keeps its name.
    """
    path = os.fspath(checkpoint_file).rstrip("/") or "/"
    root, suffix = os.path.splitext(path)
    return root if _SUFFIX.fullmatch(suffix) and not os.path.isdir(path) else path


def is_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None and not name.endswith(PARTIAL) and STALE not in name


def check_id(checkpoint_id: str) -> str:
    """The id itself; ValueError where it cannot name a checkpoint."""
    if not isinstance(checkpoint_id, str) or not is_id(checkpoint_id):
        raise ValueError(
            f"checkpoint_id {checkpoint_id!r} cannot name a checkpoint: use 1 to 128 of the "
            "characters A-Z a-z 0-9 _ . -, not beginning with a dot, without .partial or .stale"
        )
    return checkpoint_id


def run_directory(metadata_dir: str | os.PathLike[str]) -> str:
    """The run's directory; its ``metadata`` child, which older code names, stands for it."""
    path = os.fspath(metadata_dir)
    head, tail = os.path.split(path.rstrip("/"))
    if tail == "metadata" and not _is_run(path):
        return head or "."
    return path


def _is_run(path: str) -> bool:
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return ".lock" in names or any(os.path.lexists(f"{path}/{n}/checksums.bin") for n in names)
