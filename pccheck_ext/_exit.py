"""The end of the interpreter: what was begun is finished, or it is said what was lost."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import Protocol

from pccheck_ext import _C

__all__ = ["drain_at_exit", "forget", "remember"]


class Drainable(Protocol):
    def shutdown(self) -> None: ...


_open: weakref.WeakSet[Drainable] = weakref.WeakSet()
_owner = os.getpid()


def remember(trainer: Drainable) -> None:
    """`trainer.shutdown()` is called at exit unless `forget` or the collector comes first."""
    _open.add(trainer)


def forget(trainer: Drainable) -> None:
    _open.discard(trainer)


def drain_at_exit() -> None:
    atexit.register(_drain)


def _drain() -> None:
    if os.getpid() != _owner:
        return  # a forked child: the parent's saves are not its business
    for trainer in list(_open):
        try:
            trainer.shutdown()
        except Exception as error:  # the interpreter is ending: tell, and go on with the next
            print(f"pccheck_ext: at exit: {error}", file=sys.stderr)
    for failure in _C.close_chunks():
        print(f"pccheck_ext: at exit: save_chunks failed: {failure}", file=sys.stderr)
