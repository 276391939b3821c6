"""SIGTERM with a deadline: a last checkpoint if it fits, and word of what was lost.

A scheduler sends SIGTERM some time before SIGKILL. The handler only notes it: between two steps,
where the state is whole, training is ended, after one more step where the newest is not saved. A
thread watches the deadline, for a loop that does not come to its next step in time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Sigterm"]

EXIT_STATUS = 128 + signal.SIGTERM


# Those of this process, and, in a forked child, of its parents.
_handlers: weakref.WeakSet[Sigterm] = weakref.WeakSet()


def _disown() -> None:
    while any(one.restore() for one in list(_handlers)):
        pass  # one trainer's handler was there before another's
    _handlers.clear()


# A child that waits in a system call would hear of a handler in Python only when that returns.
os.register_at_fork(after_in_child=_disown)


class Sigterm:
    """`lost()` says, for a person to read, what would be lost if the process ended now."""

    @staticmethod
    def check_thread() -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "sigterm_deadline_s needs a trainer that is made on the main thread: Python "
                "handles signals there"
            )

    def __init__(self, deadline_s: float, lost: Callable[[], str]) -> None:
        self.check_thread()
        self.deadline_s = deadline_s
        self._lost = lost
        self._received_at: float | None = None
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._owner = os.getpid()
        self._previous: Any = signal.signal(signal.SIGTERM, self._handle)
        _handlers.add(self)

    @property
    def received(self) -> bool:
        return self._received_at is not None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        since = 0.0 if self._received_at is None else time.monotonic() - self._received_at
        return max(0.0, self.deadline_s - since)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # it came while the child was being made
            self.restore()
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._received_at is not None:
            return
        self._received_at = time.monotonic()
        threading.Thread(target=self._watch, name="pccheck-sigterm", daemon=True).start()

    def _watch(self) -> None:
        if not self._over.wait(self.left_s):
            self.deadline_has_passed()

    def deadline_has_passed(self) -> NoReturn:
        """End the process at once, from any thread."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        try:
            lost = self._lost()
        except Exception as error:  # the other threads go on: their trainer may be closed by now
            lost = f"what is lost cannot be told: {error}"
        try:
            print(
                f"pccheck_ext: SIGTERM's deadline of {self.deadline_s:g} s has passed: {lost}",
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(EXIT_STATUS)

    def end(self) -> NoReturn:
        """End the process, from the main thread, with what has been saved."""
        self._over.set()
        print(f"pccheck_ext: ended by SIGTERM: {self._lost()}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_STATUS)

    def close(self) -> None:
        """Put back the handler that was there before.

        Where a signal has come, its deadline stays: a program that goes on after training, as if
        there had been none, is ended by then.
        """
        if not self.received:
            self._over.set()
        _handlers.discard(self)
        if os.getpid() == self._owner:
            self.restore()

    def restore(self) -> bool:
        """False where another handler has taken its place since."""
        ours = signal.getsignal(signal.SIGTERM) == self._handle
        if ours:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
        return ours
