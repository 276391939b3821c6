"""Which checkpoints are there, and going on from one: the newest that is sound, or the one named.

Two kinds count: those of pccheck_ext (``step-*``, ``final`` and other ids) and files of the old
form (see `_legacy`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _legacy
import torch
from _settings import ARCHITECTURE, Settings, TrainError, changes

from pccheck_ext import (
    CheckpointCorrupt,
    CheckpointError,
    LayerwiseCheckpointTrainer,
    ModelRecovery,
)

__all__ = ["Candidate", "RunRecord", "check_architecture", "find", "named", "recorded", "resume"]


@dataclass
class RunRecord:
    """What a checkpoint tells of the run that made it: saved with it as one of `extra`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    micro_batch: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "micro_batch": self.micro_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: what the checkpoint tells has been read before it is loaded, see `recorded`."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to go on from, not verified yet; step -1 where nothing tells it."""

    step: int
    path: Path
    is_old: bool

    def __str__(self) -> str:
        return f"{self.path.name} ({f'step {self.step}' if self.step >= 0 else 'unreadable'})"


def find(directory: Path) -> list[Candidate]:
    """What there is to go on from in `directory`, the newest step first, damaged or not."""
    found = [
        Candidate(_step_of(directory / name), directory / name, is_old=False)
        for name in ModelRecovery(directory).list_checkpoints()
    ]
    if directory.is_dir():
        found += [_old(p) for p in directory.iterdir() if _legacy.is_old_name(p.name)]
    return sorted(found, key=lambda c: (c.step, not c.is_old, c.path.name), reverse=True)


def named(text: str, directory: Path) -> Candidate:
    """The one that `--resume-from-checkpoint` names, as a path or by its name in `directory`.

    TrainError, which lists what is there, where there is no such checkpoint.
    """
    for path in (Path(text), directory / text):
        if any((path / mark).exists() for mark in ("checksums.bin", "manifest.json")):
            return Candidate(_step_of(path), path, is_old=False)
        if path.is_file():
            return _old(path)
    if Path(text).is_dir():
        raise TrainError(f"{text} is no checkpoint; {_listed(Path(text))}")
    beside = Path(text).parent if "/" in text and Path(text).parent.is_dir() else directory
    raise TrainError(f"there is no checkpoint {text}; {_listed(beside)}")


def _listed(directory: Path) -> str:
    found = find(directory)
    if not found:
        return f"{directory} holds none at all"
    return f"{directory} holds: {', '.join(map(str, found))}"


def _old(path: Path) -> Candidate:
    try:
        return Candidate(_legacy.old_step(path), path, is_old=True)
    except (_legacy.OldFileError, OSError):
        return Candidate(-1, path, is_old=True)


def _manifest(path: Path) -> dict[str, Any]:
    """Its JSON as it stands, verified only when the checkpoint is loaded; {} if unreadable."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _step_of(path: Path) -> int:
    by_name = re.fullmatch(r"step-(\d{8,18})", path.name)
    if by_name is not None:
        return int(by_name[1])
    step = _manifest(path).get("training_step")
    return step if type(step) is int else -1


def recorded(candidate: Candidate) -> RunRecord | None:
    """What a checkpoint tells of its run; None if it is damaged, or not one of this script's."""
    if candidate.is_old:
        try:
            architecture = _legacy.read_old(candidate.path).architecture
        except (_legacy.OldFileError, OSError):
            return None
        told = {name: architecture[name] for name in ARCHITECTURE if name in architecture}
        return RunRecord(settings=told)
    extra = _manifest(candidate.path).get("extra")
    run = extra.get("run") if isinstance(extra, dict) else None
    settings = run.get("settings") if isinstance(run, dict) else None
    micro_batch = run.get("micro_batch") if isinstance(run, dict) else None
    if not isinstance(settings, dict) or type(micro_batch) is not int:
        return None
    return RunRecord(settings, micro_batch)


def check_architecture(candidate: Candidate, record: RunRecord, settings: Settings) -> None:
    """TrainError, naming the fields, where the checkpoint is of another architecture."""
    before = {name: record.settings[name] for name in ARCHITECTURE if name in record.settings}
    differing = changes(before, {name: settings[name] for name in before})
    if differing:
        fields = "; ".join(f"{name}: {b} there, {a} here" for name, (b, a) in differing.items())
        raise TrainError(
            f"{candidate.path} is of another architecture: {fields}. Use the --config it was made "
            "with, or another --output-dir to begin anew"
        )


# ---- Loading -------------------------------------------------------------------------------------


def resume(
    trainer: LayerwiseCheckpointTrainer,
    candidates: list[Candidate],
    settings: Settings,
    announce: Callable[[str], None],
) -> Candidate:
    """Load the first of `candidates` that is sound, telling of those that are not.

    TrainError where none is, or where one is of another architecture.
    """
    for candidate in candidates:
        record = recorded(candidate)
        if record is not None:
            check_architecture(candidate, record, settings)
        try:
            if candidate.is_old:
                _load_old(trainer, _legacy.read_old(candidate.path))
            else:
                trainer.resume(_brought_in(trainer, candidate.path))
        except (CheckpointCorrupt, _legacy.OldFileError, OSError) as error:
            announce(f"{candidate} cannot be used: {error}")
            continue
        except (CheckpointError, ValueError) as error:
            raise TrainError(f"{candidate.path} cannot be gone on from: {error}") from error
        return candidate
    tried = ", ".join(map(str, candidates))
    raise TrainError(f"no checkpoint can be gone on from; tried: {tried}")


def _brought_in(trainer: LayerwiseCheckpointTrainer, path: Path) -> str:
    """The id of a checkpoint in the trainer's directory: one from elsewhere is copied there."""
    directory = Path(trainer.checkpoint_dir)
    if path.resolve().parent != directory.resolve():
        # The trainer holds the directory's lock, and a name that begins with a dot is nobody's.
        arriving = directory / ".arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.copytree(path, arriving)
        os.rename(arriving, directory / path.name)
    return path.name


def _load_old(trainer: LayerwiseCheckpointTrainer, old: _legacy.OldCheckpoint) -> None:
    base = trainer.optimizer.base_optimizer
    _legacy.adopt(old, trainer.model, base)
    trainer.start_at(old.step, old.losses, old.loss_steps)
    trainer.extra["schedule"].load_state_dict({"done": old.step})
    trainer.extra["loader"].load_state_dict({"position": old.step})
    # The file has no random numbers: other ones than those that the run began with.
    torch.manual_seed(torch.initial_seed() + old.step)
