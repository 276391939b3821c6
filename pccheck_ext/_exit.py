"""The end of the interpreter: what was begun is finished, or it is said what was lost."""

from __future__ import annotations

import atexit
import ctypes
import sys
import weakref
from typing import Protocol

from pccheck_ext import _C

__all__ = ["drain_at_exit", "forget", "never_destroy", "remember"]


class Drainable(Protocol):
    exit_timeout_s: float | None
    """How long the exit waits for it; None: as long as it takes."""

    def shutdown(self, timeout_s: float | None = None) -> None:
        """In a forked child, which has it from its parent, this does nothing."""

    def do_not_wait_at_exit(self) -> None:
        """Sets `exit_timeout_s` to 0, and waits no longer where it is dropped either."""


_open: weakref.WeakKeyDictionary[Drainable, None] = weakref.WeakKeyDictionary()


def remember(one: Drainable) -> None:
    """`one.shutdown()` is called at exit unless `forget` or the collector comes first."""
    _open[one] = None


def forget(one: Drainable) -> None:
    _open.pop(one, None)


def never_destroy(session: object) -> None:
    """Its destructor would wait, without end, for what a disk that hangs does not finish.

    So it is left to the process's end, which waits for no thread of the engine's.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


def drain_at_exit() -> None:
    atexit.register(_drain)


def _drain() -> None:
    for one in reversed(list(_open)):  # a scheduler before the adapter that it hands layers to
        try:
            try:
                one.shutdown(one.exit_timeout_s)
            except KeyboardInterrupt:  # somebody will not wait; what is lost is said all the same
                one.do_not_wait_at_exit()
                one.shutdown(0.0)
        except Exception as error:  # the interpreter is ending: tell, and go on with the next
            print(f"pccheck_ext: at exit: {error}", file=sys.stderr)
    for failure in _C.close_chunks():
        print(f"pccheck_ext: at exit: save_chunks failed: {failure}", file=sys.stderr)
