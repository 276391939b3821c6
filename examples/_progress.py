"""What is shown while training goes on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["Progress", "say"]

DELAY_S = 2.0
"""No bar for what takes less."""

_LINES = 20  # of a whole run, where there is no bar


def say(text: str) -> None:
    print(text, flush=True)


class Progress:
    """Shows the steps after `start`, up to `total`: on `stream` if that is a terminal."""

    def __init__(
        self,
        start: int,
        total: int,
        *,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._every = max(1, (total - start) // _LINES)
        self._clock = clock
        self._start = start
        self._told = (start, clock())  # step and time of the last line
        self._bar: Any = None
        if stream.isatty():
            try:
                from tqdm import tqdm  # type: ignore[import-untyped]
            except ImportError:
                say("fallback: tqdm is not installed, so there are lines instead of a bar")
                return
            size = shutil.get_terminal_size()
            self._bar = tqdm(
                total=total,
                initial=start,
                file=stream,
                delay=DELAY_S,
                unit="step",
                # Of a terminal that tells no size tqdm would take it to be 0 and show nothing.
                ncols=size.columns,
                nrows=size.lines,
            )

    def show(self, step: int, loss: float, rate: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()
        elif step % self._every == 0 or step in (self._start + 1, self.total):
            (last, then), self._told = self._told, (step, self._clock())
            seconds = (self._told[1] - then) / (step - last)
            self.line(
                f"step {step}/{self.total}  loss {loss:.4f}  learning rate {rate:.3g}  "
                f"{seconds:.3g} s/step"
            )

    def line(self, text: str) -> None:
        """Say something without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
