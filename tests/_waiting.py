"""What tests need to watch things that go on at the same time: threads, forked processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pccheck_ext import _exit

DEADLINE_S = 60.0
"""How long anything may take before the test fails: far more than it ever does."""


def eventually(happened: Callable[[], object], what: str) -> None:
    """Returns when it has happened; fails where it does not."""
    until = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not happened():
        assert time.monotonic() < until, f"it never happened: {what}"
        pause.wait(0.0005)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and forked children can have no more.

    Sums over several threads differ from those of one in the last bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Running(threading.Thread):
    """A call that is under way in a thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.join(DEADLINE_S)
        assert not self.is_alive(), "the call never returned"
        if self.error is not None:
            raise self.error


def stall(process: int) -> None:
    """Stops a process, a monitor: nothing is written any more until `go_on`."""
    os.kill(process, signal.SIGSTOP)

    def stopped() -> bool:
        threads = [f"/proc/{process}/task/{name}/stat" for name in threads_of(process)]
        return all(Path(stat).read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)

    eventually(stopped, "the process stands still")


def go_on(process: int) -> None:
    os.kill(process, signal.SIGCONT)


def threads_of(process: int) -> list[str]:
    return os.listdir(f"/proc/{process}/task")


class Child:
    """A forked process that runs `body` as a program of its own, at its end too.

    A fork costs milliseconds where a new interpreter costs seconds for torch alone. The process
    must have started no engine of which the child makes use.
    """

    def __init__(self, body: Callable[[], object], directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._output = directory / f"output-{os.getpid()}-{time.monotonic_ns()}"
        self._output.touch()
        self.pid = os.fork()
        if self.pid == 0:
            _be_a_program(body, self._output)

    def said(self) -> str:
        """What it has printed so far, to stdout and stderr."""
        return self._output.read_text()

    def says(self, what: str) -> None:
        """Returns once it has printed this."""

        def heard() -> bool:
            return what in self.said() or self._has_ended()

        eventually(heard, f"the child says {what!r}")
        assert what in self.said(), self.said()

    def _has_ended(self) -> bool:
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Its exit status, once it has ended: -n if by signal n."""
        try:
            eventually(self._has_ended, f"the child ends; it said: {self.said()}")
        finally:
            if not self._has_ended():
                os.kill(self.pid, signal.SIGKILL)
            status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(status)


def _be_a_program(body: Callable[[], object], output: Path) -> None:
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # the others of the pool are the parent's
        try:
            body()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        _exit._drain()  # which is what the package does when the interpreter ends
    finally:
        os._exit(status)
