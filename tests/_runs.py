"""Runs of the training script that its tests share: short, on the tiny model and one thread."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import _losslog  # noqa: E402
import train_optimized  # noqa: E402

STEPS = 20
EVERY = 3  # steps from one checkpoint to the next


@contextmanager
def one_thread() -> Iterator[None]:
    """On leaving it, torch is as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def arguments(folder: Path, *more: object) -> list[str]:
    told: dict[str, object] = {
        "--config": "tiny",
        "--output-dir": folder,
        "--torch-threads": 1,
        "--dataloader-workers": 0,
        "--max-steps": STEPS,
        "--checkpoint-every": EVERY,
    }
    return [str(word) for pair in told.items() for word in pair] + [str(word) for word in more]


def train(folder: Path, *more: object) -> int:
    return train_optimized.main(arguments(folder, *more))


def losses(folder: Path) -> dict[int, float]:
    return {s: logged.entry.loss for s, logged in _losslog.read_log(log_of(folder)).steps.items()}


def log_of(folder: Path) -> Path:
    return folder / "losses.jsonl"


def result(folder: Path) -> tuple[dict[int, float], bytes, bytes]:
    """All losses, and the final weights and optimizer as they stand on the disk."""
    files = ("model.safetensors", "optimizer.safetensors")
    model, optimizer = ((folder / "final" / name).read_bytes() for name in files)
    return losses(folder), model, optimizer


def step_of(folder: Path, name: str) -> int:
    return json.loads((folder / name / "manifest.json").read_bytes())["training_step"]


def checkpoints(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir()}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something once a step has been logged, before its checkpoint is sealed."""
    write = _losslog.LossLog.write

    def then(self: _losslog.LossLog, entry: _losslog.Entry) -> None:
        write(self, entry)
        if entry.step == step:
            action()

    monkeypatch.setattr(_losslog.LossLog, "write", then)


def killed_at(step: int, words: list[str], said: Path) -> None:
    """Run the script in a process that ends by SIGKILL in the middle of a step."""
    child = os.fork()
    if child == 0:
        try:
            into = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(into, 1)
            os.dup2(into, 2)
            patch = pytest.MonkeyPatch()
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            train_optimized.main(words)
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), said.read_text()
    assert os.WTERMSIG(status) == signal.SIGKILL


def exhaust_memory() -> None:
    """The error of the CPU's allocator itself."""
    torch.empty(1 << 60)
