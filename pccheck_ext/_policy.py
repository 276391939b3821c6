"""When a checkpoint is due, which are kept, into how many chunks: pure functions of what is told.

No clock, file or device in here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Best", "Interval", "chunks_for"]


@dataclass(frozen=True)
class Interval:
    """From one checkpoint to the next: steps, seconds (either makes one due), or "continuous".

    Continuous: the next checkpoint starts at the first step at which none is in flight, so that it
    finds all staging memory and the whole disk its own.
    """

    steps: int | None = 1
    seconds: float | None = None
    continuous: bool = False

    @staticmethod
    def of(every: int | str | None, every_s: float | None) -> Interval:
        """From the trainer's arguments; ValueError for what they cannot be."""
        if every_s is not None and not (
            isinstance(every_s, (int, float)) and 0 < every_s < math.inf
        ):
            raise ValueError(f"checkpoint_every_s must be a positive number, not {every_s!r}")
        if every == "continuous":
            if every_s is not None:
                raise ValueError(
                    'checkpoint_every="continuous" and checkpoint_every_s exclude each other'
                )
            return Interval(None, None, True)
        if every is None:
            return Interval(1 if every_s is None else None, every_s)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                'checkpoint_every must be a whole number, 1 or more, or "continuous", '
                f"not {every!r}"
            )
        return Interval(every, every_s)

    def due(self, step: int, since_last_s: float, in_flight: int) -> bool:
        """Whether step `step` is to be saved, `since_last_s` after the last one was begun."""
        if self.continuous:
            return in_flight == 0
        if self.steps is not None and step % self.steps == 0:
            return True
        return self.seconds is not None and since_last_s >= self.seconds


@dataclass
class Best:
    """Keeps the checkpoint with the best value of a metric.

    The best of those committed is kept until a better one is committed, too; those in flight that
    may be the next best are kept meanwhile.
    """

    metric: str
    mode: str  # "min" or "max"
    was_told: bool = False  # of any value at all
    _committed: dict[int, float] = field(default_factory=dict)
    _in_flight: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def of(keep_best: object) -> Best | None:
        """From the trainer's argument; ValueError for what it cannot be."""
        if keep_best is None:
            return None
        if (
            not isinstance(keep_best, (tuple, list))
            or len(keep_best) != 2
            or not isinstance(keep_best[0], str)
            or keep_best[1] not in ("min", "max")
        ):
            raise ValueError(
                'keep_best must be (metric, "min" or "max"), as in ("loss", "min"), '
                f"not {keep_best!r}"
            )
        return Best(keep_best[0], keep_best[1])

    def found(self, step: int, metrics: Mapping[str, float]) -> None:
        """A checkpoint that is there already."""
        value = metrics.get(self.metric, math.nan)
        if not math.isnan(value):
            self.was_told = True
            self._committed[step] = value

    def begun(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.metric, math.nan)
        if not math.isnan(value):
            self.was_told = True
            self._in_flight[step] = value

    def ended(self, step: int, committed: bool) -> None:
        value = self._in_flight.pop(step, None)
        if value is not None and committed:
            self._committed[step] = value
            best = self._best(self._committed)
            self._committed = {step: self._committed[step] for step in best}

    def forget_after(self, step: int) -> None:
        """Training goes on from there: later checkpoints are no part of its history."""
        self._committed = {s: v for s, v in self._committed.items() if s <= step}
        self._in_flight.clear()

    def kept(self) -> set[int]:
        return self._best(self._committed) | self._best({**self._committed, **self._in_flight})

    def _best(self, values: dict[int, float]) -> set[int]:
        if not values:
            return set()
        worst_first = -1 if self.mode == "min" else 1
        # The newer of two equals, which has been trained for longer.
        return {max(values, key=lambda step: (worst_first * values[step], step))}


def chunks_for(state_bytes: int, bytes_per_s: float | None, writers: int) -> int:
    """How many chunks to write a state in, at a bandwidth measured before (None: not yet).

    As many as there are writers to work on them, but none so small that it is over in less than
    20 ms: then a further one brings nothing.
    """
    assumed = 2e9  # a common NVMe disk's
    least = 0.02 * (bytes_per_s or assumed)
    return max(1, min(writers, int(state_bytes / least)))
