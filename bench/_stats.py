"""Figures with the range they can be trusted in: paired ratios and bootstrap 95 % intervals.

What is compared runs in turn (A B A B), so that whatever else the machine does meets both sides,
and each A is divided by the B beside it. A goal is reached only when the interval's worse end
reaches it. Nothing here reads a clock or a file; randomness is seeded, so the same samples always
give the same interval.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

__all__ = ["Goal", "Interval", "bootstrap", "in_turn", "paired_differences", "paired_ratios"]

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 20_240_229


@dataclass(frozen=True)
class Interval:
    """A figure and the ends between which it lies with 95 % confidence."""

    value: float
    low: float
    high: float
    samples: int

    def __contains__(self, figure: float) -> bool:
        return self.low <= figure <= self.high

    def scaled(self, factor: float) -> Interval:
        """The same figure in another unit; `factor` is positive."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.samples)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Goal:
    """What a figure has to be: at least, or at most, `bound`."""

    bound: float
    at_least: bool

    def worse_end(self, figure: Interval) -> float:
        return figure.low if self.at_least else figure.high

    def reached_by(self, figure: Interval) -> bool:
        end = self.worse_end(figure)
        return end >= self.bound if self.at_least else end <= self.bound


def bootstrap(
    samples: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """The statistic of `samples` and its percentile bootstrap interval.

    The median is the default: one write that met somebody else's write is not a property of what is
    measured. Raises ValueError when there are no samples.
    """
    if not samples:
        raise ValueError("bootstrap: there are no samples")
    rng = random.Random(seed)
    count = len(samples)
    spread = sorted(statistic(rng.choices(samples, k=count)) for _ in range(resamples))
    tail = (1 - CONFIDENCE) / 2
    low = spread[int(tail * (resamples - 1))]
    high = spread[resamples - 1 - int(tail * (resamples - 1))]
    return Interval(statistic(samples), low, high, count)


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Each numerator over the denominator measured beside it; as many of each, or ValueError."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def paired_differences(minuends: Sequence[float], subtrahends: Sequence[float]) -> list[float]:
    """Each minuend less the subtrahend measured beside it; as many of each, or ValueError."""
    return [a - b for a, b in zip(minuends, subtrahends, strict=True)]


def in_turn(
    arms: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    warm_up: int = 1,
    enough: Callable[[int], bool] = lambda done: False,
) -> dict[str, list[float]]:
    """Calls every arm once a round, in their order, and returns what each call returned.

    The first `warm_up` rounds are left out. After each of the others `enough` hears how many are
    done and may end the measurement early: by the time it took, never by what came out.
    """
    seen: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + rounds):
        for name, arm in arms.items():
            figure = arm()
            if turn >= warm_up:
                seen[name].append(figure)
        if turn >= warm_up and enough(turn + 1 - warm_up):
            break
    return seen
