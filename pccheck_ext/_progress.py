"""A progress bar for what takes longer than two seconds, on terminals."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PATIENCE_S", "shown"]

PATIENCE_S = 2.0
_EVERY_S = 0.1


@contextmanager
def shown(
    what: str,
    total_bytes: int,
    done_bytes: Callable[[], int],
    patience_s: float = PATIENCE_S,
) -> Iterator[None]:
    """While the body runs, shows how far it is, once it has taken `patience_s` seconds.

    `done_bytes` is called on another thread. Nothing is shown where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(what, total_bytes, done_bytes, patience_s, over), daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(
    what: str,
    total_bytes: int,
    done_bytes: Callable[[], int],
    patience_s: float,
    over: threading.Event,
) -> None:
    if over.wait(patience_s):
        return
    from tqdm import tqdm  # seldom needed, and not imported in no time

    with tqdm(
        desc=what, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, leave=False
    ) as bar:
        ended = False
        while not ended:
            ended = over.wait(_EVERY_S)
            bar.n = min(total_bytes, done_bytes())
            bar.refresh()
