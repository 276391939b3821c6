"""Trainers in monitor mode for tests: forked, watched through shared memory, killed.

Children are forked from the test's process, which has imported torch but runs no engine, and train
in a way that depends on the step alone; so what every checkpoint must hold is known.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pccheck_ext

SOON = 20.0
"""Seconds within which what must happen at once has happened, however busy the machine is."""

_SUBREAPER = 36


def adopt_orphans(adopt: bool) -> None:
    """Monitors of killed trainers become this process's children: their end can be waited for."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, int(adopt), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


# --- Training -------------------------------------------------------------------------------------


def make(width: int = 32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.BatchNorm1d(2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
    )
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def trainer_in(
    directory: Path, *, width: int = 32, **options: Any
) -> pccheck_ext.LayerwiseCheckpointTrainer:
    model, optimizer = make(width)
    settings: dict[str, Any] = {
        "use_monitor": True,
        "batch_size_mb": 1,
        "ratio": 1,
        "block_size_mb": 1 / 32,
        "num_threads": 2,
    }
    layers = pccheck_ext.DependencyGraphBuilder(model).group_parameters_by_layer()
    # In a given order: to find it out would take most of the time before a kill.
    optimizer = pccheck_ext.LayerwiseOptimizer(optimizer, list(reversed(layers)), layers)
    return pccheck_ext.LayerwiseCheckpointTrainer(
        model, optimizer, checkpoint_dir=directory, **{**settings, **options}
    )


def loss_at(model: nn.Module, step: int) -> torch.Tensor:
    width = next(model.parameters()).shape[1]
    inputs = torch.randn(16, width, generator=torch.Generator().manual_seed(step))
    return model(inputs).square().mean()


def take_step(trainer: pccheck_ext.LayerwiseCheckpointTrainer) -> None:
    trainer.zero_grad()
    loss = loss_at(trainer.model, trainer.training_step)
    loss.backward()
    trainer.step(loss)
    trainer.end_step()


class Reference:
    """The same training without a trainer: what step s must hold."""

    def __init__(self, width: int = 32) -> None:
        self.model, self.optimizer = make(width)
        self.states = [self._state()]

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def at(self, step: int) -> dict[str, torch.Tensor]:
        while len(self.states) <= step:
            self.optimizer.zero_grad()
            loss_at(self.model, len(self.states) - 1).backward()
            self.optimizer.step()
            self.states.append(self._state())
        return self.states[step]


def assert_holds(directory: Path, name: str, expected: dict[str, torch.Tensor]) -> None:
    """The checkpoint verifies, and its model has exactly these bits."""
    recovery = pccheck_ext.ModelRecovery(directory)
    assert recovery.verify(name)
    width = expected["0.weight"].shape[1]
    model, _ = make(width)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    assert recovery.load_checkpoint(model, name, strict=True) == []
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), f"{name}: {key}"


def newest_step(directory: Path) -> int:
    latest = pccheck_ext.ModelRecovery(directory).get_latest_checkpoint()
    return 0 if latest is None else int(latest.removeprefix("step-"))


# --- Processes ------------------------------------------------------------------------------------


class Told:
    """What a child tells its parent through shared memory, readable after its death."""

    _FIELDS = ("ready", "monitor", "slots_inode", "resumed", "sealed", "committed")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self._FIELDS))

    def put(self, field: str, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * self._FIELDS.index(field), value)

    def get(self, field: str) -> int:
        return int(struct.unpack_from("<q", self._memory, 8 * self._FIELDS.index(field))[0])

    def await_(self, field: str, child: int) -> int:
        until = time.monotonic() + SOON
        while self.get(field) == 0:
            assert time.monotonic() < until, f"the child does not say '{field}'"
            assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, (
                "the child has ended by itself"
            )
            os.sched_yield()
        return self.get(field)


def fork(body: Callable[[], None]) -> int:
    """A child that runs `body` and never comes back."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return child


def train_until_killed(directory: Path, told: Told, **options: Any) -> None:
    trainer = trainer_in(directory, **options)
    told.put("monitor", trainer._session.monitor_process or 0)
    told.put("slots_inode", slots_inode(os.getpid()))
    told.put("resumed", trainer.resume("auto"))
    told.put("ready", 1)
    while True:
        take_step(trainer)
        stats = trainer.stats()
        told.put("sealed", stats["last_sealed_step"])
        told.put("committed", stats["last_committed_step"])


def children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def kill_and_reap(process: int, number: int = signal.SIGKILL) -> int:
    os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_end(process: int, seconds: float = SOON) -> int:
    """Reaps a child, or an orphan that was adopted; its exit code."""
    pidfd = os.pidfd_open(process)
    try:
        ended, _, _ = select.select([pidfd], [], [], seconds)
    finally:
        os.close(pidfd)
    assert ended, f"process {process} is still there after {seconds} s"
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < until, f"not within {SOON} s: {what}"
        os.sched_yield()


# --- What is left behind --------------------------------------------------------------------------


def _open_files(process: str) -> Iterator[tuple[str, os.stat_result]]:
    folder = f"/proc/{process}/fd"
    try:
        for fd in os.listdir(folder):
            yield os.readlink(f"{folder}/{fd}"), os.stat(f"{folder}/{fd}")
    except OSError:
        return  # ended meanwhile, or not ours to look at


def slots_inode(process: int) -> int:
    """Tells the staging memory of one trainer from all others."""
    for link, status in _open_files(str(process)):
        if "memfd:pccheck-slots" in link:
            return status.st_ino
    raise AssertionError(f"process {process} has no shared staging memory")


def holders_of(inode: int) -> list[int]:
    return [
        int(process)
        for process in filter(str.isdigit, os.listdir("/proc"))
        for link, status in _open_files(process)
        if "memfd:pccheck-slots" in link and status.st_ino == inode
    ]


@contextmanager
def lock_of(directory: Path) -> Iterator[bool]:
    """Whether the run's lock is free, holding it if so."""
    fd = os.open(directory / ".lock", os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def is_free(directory: Path) -> bool:
    with lock_of(directory) as free:
        return free


def activity(process: int, of_threads: str = "") -> dict[str, tuple[int, str]]:
    """Nanoseconds on a processor and wake-ups of each thread whose name begins so."""
    seen = {}
    for task in os.listdir(f"/proc/{process}/task"):
        base = Path(f"/proc/{process}/task/{task}")
        name = (base / "comm").read_text().strip()
        if not name.startswith(of_threads):
            continue
        switches = [line for line in (base / "status").read_text().splitlines() if "ctxt" in line]
        seen[f"{name} {task}"] = (
            int((base / "schedstat").read_text().split()[0]),
            " ".join(switches),
        )
    return seen
