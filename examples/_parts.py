"""Two small parts of a training loop: the schedule, and being asked to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from torch.optim import Optimizer

__all__ = ["StopRequest", "WarmUp"]


class WarmUp:
    """The learning rate rises to `peak` during the first `steps` steps and stays there.

    Its state is the number of steps done: a run that goes on with another peak gets that one.
    """

    def __init__(self, optimizer: Optimizer, peak: float, steps: int) -> None:
        self.optimizer = optimizer
        self.peak = peak
        self.steps = steps
        self.done = 0
        self._apply()

    @property
    def rate(self) -> float:
        """Of the step to come."""
        return self.peak * min(1.0, (self.done + 1) / self.steps)

    def step(self) -> None:
        self.done += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = int(state["done"])
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


class StopRequest:
    """SIGINT and SIGTERM ask the loop to stop before its next step; a second one stops at once.

    `signal` is the one that came. Anywhere but in the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._asked)
        return self

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\n{self.signal.name}: stopping after this step\n".encode("ascii"))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
