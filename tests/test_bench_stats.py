"""The benchmark's statistics: they find what was planted, and nothing where nothing was."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
ROUNDS = 31


def load(name: str) -> ModuleType:
    """A module of bench/, which is not a package: its programs are run, not imported."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


stats = load("_stats")


def durations(rng: random.Random, factor: float, count: int = ROUNDS) -> list[float]:
    """Times around 70 ms with the noise of a shared disk: skewed, and now and then far off."""
    return [
        0.07 * factor * rng.lognormvariate(0, 0.06) * (3.0 if rng.random() < 0.05 else 1.0)
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slow_down_of_ten_percent_is_found(seed: int) -> None:
    rng = random.Random(seed)
    disk, ours = durations(rng, 1.0), durations(rng, 1.1)
    ratio = stats.bootstrap(stats.paired_ratios(disk, ours))
    assert ratio.high < 1.0
    assert 1 / 1.1 in ratio
    assert not stats.Goal(0.98, at_least=True).reached_by(ratio)


def test_identical_work_paired_with_itself_gives_an_interval_that_contains_one() -> None:
    found = 0
    for seed in range(100):
        rng = random.Random(seed)
        ratios = stats.paired_ratios(durations(rng, 1.0), durations(rng, 1.0))
        found += 1.0 in stats.bootstrap(ratios, resamples=500)
    assert found >= 90  # 95 of 100 is what a 95 % interval promises; a run of bad luck is not a bug


def test_drift_that_meets_both_sides_of_a_pair_cancels() -> None:
    rng = random.Random(1)
    drift = [1 + i / 10 for i in range(ROUNDS)]  # the disk ends at a quarter of its first speed
    ones = [d * rng.lognormvariate(0, 0.02) for d in drift]
    others = [1.1 * d * rng.lognormvariate(0, 0.02) for d in drift]
    ratio = stats.bootstrap(stats.paired_ratios(others, ones))
    assert 1.1 in ratio
    assert ratio.high - ratio.low < 0.05


def test_the_same_samples_give_the_same_interval() -> None:
    samples = durations(random.Random(2), 1.0)
    assert stats.bootstrap(samples) == stats.bootstrap(list(samples))


def test_the_interval_holds_its_figure_and_narrows_with_more_samples() -> None:
    rng = random.Random(3)
    few = stats.bootstrap(durations(rng, 1.0, 20))
    many = stats.bootstrap(durations(rng, 1.0, 500), resamples=1000)
    assert few.low <= few.value <= few.high
    assert many.high - many.low < few.high - few.low


def test_a_goal_is_reached_by_the_worse_end_alone() -> None:
    figure = stats.Interval(value=0.95, low=0.89, high=1.02, samples=31)
    assert not stats.Goal(0.90, at_least=True).reached_by(figure)
    assert stats.Goal(0.89, at_least=True).reached_by(figure)
    assert not stats.Goal(1.00, at_least=False).reached_by(figure)
    assert stats.Goal(1.02, at_least=False).reached_by(figure)


def test_arms_run_in_turn_and_the_warm_up_is_left_out() -> None:
    calls: list[str] = []

    def arm(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    seen = stats.in_turn({"a": lambda: arm("a"), "b": lambda: arm("b")}, 2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert seen == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_measurement_that_takes_too_long_ends_after_a_whole_round() -> None:
    seen = stats.in_turn({"a": lambda: 1.0, "b": lambda: 2.0}, 31, enough=lambda done: done == 9)
    assert seen == {"a": [1.0] * 9, "b": [2.0] * 9}


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        stats.paired_ratios([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no samples"):
        stats.bootstrap([])
