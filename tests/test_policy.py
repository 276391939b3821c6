"""When a checkpoint is due, which is the best, how many chunks: policy as functions of numbers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from pccheck_ext._policy import Best, Interval, chunks_for

# --- Intervals -----------------------------------------------------------------------------------


def due(interval: Interval, steps: int = 12, **told: Any) -> list[int]:
    return [step for step in range(1, steps + 1) if interval.due(step, **{**NOTHING, **told})]


NOTHING = {"since_last_s": 0.0, "in_flight": 0}


def test_every_step_is_due_unless_told_otherwise() -> None:
    assert Interval.of(None, None) == Interval()
    assert due(Interval()) == list(range(1, 13))
    assert due(Interval(), in_flight=9, since_last_s=1e9) == list(range(1, 13))


def test_every_fifth_step_is_due() -> None:
    assert due(Interval.of(5, None)) == [5, 10]
    assert due(Interval.of(5, None), since_last_s=1e9, in_flight=3) == [5, 10]


def test_seconds_alone_make_no_step_due_by_its_number() -> None:
    interval = Interval.of(None, 2.5)
    assert due(interval, since_last_s=2.4999) == []
    assert due(interval, since_last_s=2.5) == list(range(1, 13))


def test_steps_or_seconds_make_one_due_whichever_comes_first() -> None:
    interval = Interval.of(5, 60)
    assert due(interval, since_last_s=59) == [5, 10]
    assert due(interval, since_last_s=61) == list(range(1, 13))


def test_continuously_one_is_due_when_none_is_in_flight() -> None:
    interval = Interval.of("continuous", None)
    assert due(interval, in_flight=1, since_last_s=1e9) == []
    assert due(interval, in_flight=0) == list(range(1, 13))


@pytest.mark.parametrize("every", [0, -1, 1.5, True, False, "often", "5", math.nan])
def test_steps_that_cannot_be_are_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f'checkpoint_every must be .*"continuous", not {every!r}'):
        Interval.of(every, None)


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, "1"])
def test_seconds_that_cannot_be_are_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_every_s must be a positive number"):
        Interval.of(None, seconds)


def test_continuously_and_every_so_many_seconds_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Interval.of("continuous", 5.0)


# --- The best ------------------------------------------------------------------------------------


def committed(best: Best, step: int, value: float) -> None:
    best.begun(step, {best.metric: value})
    best.ended(step, True)


@pytest.mark.parametrize(("mode", "wanted"), [("min", 3), ("max", 2)])
def test_the_best_is_kept(mode: str, wanted: int) -> None:
    best = Best("loss", mode)
    assert best.kept() == set()
    for step, value in enumerate([5.0, 9.0, -1.0, 4.0], 1):
        committed(best, step, value)
    assert best.kept() == {wanted}


def test_of_equals_the_newer_is_kept() -> None:
    for mode in ("min", "max"):
        best = Best("loss", mode)
        for step in (1, 2, 3):
            committed(best, step, 7.0)
        assert best.kept() == {3}


def test_one_in_flight_that_may_be_better_is_kept_beside_the_best_so_far() -> None:
    best = Best("loss", "min")
    committed(best, 1, 5.0)
    best.begun(2, {"loss": 4.0})
    best.begun(3, {"loss": 4.5})  # only if step 2 fails, too
    assert best.kept() == {1, 2}
    best.ended(2, False)
    assert best.kept() == {1, 3}
    best.ended(3, False)
    assert best.kept() == {1}


def test_a_worse_one_in_flight_is_not_kept() -> None:
    best = Best("loss", "min")
    committed(best, 1, 5.0)
    best.begun(2, {"loss": 6.0})
    assert best.kept() == {1}


@pytest.mark.parametrize("metrics", [{}, {"loss": math.nan}, {"accuracy": 0.1}])
def test_without_a_value_nothing_is_the_best(metrics: dict[str, float]) -> None:
    best = Best("loss", "min")
    best.begun(1, metrics)
    best.ended(1, True)
    best.found(2, metrics)
    assert best.kept() == set()
    committed(best, 3, 8.0)
    best.begun(4, metrics)
    best.ended(4, True)
    assert best.kept() == {3}


@pytest.mark.parametrize(("mode", "wanted"), [("min", 2), ("max", 1)])
def test_infinities_are_values_as_others(mode: str, wanted: int) -> None:
    best = Best("loss", mode)
    committed(best, 1, math.inf)
    committed(best, 2, -math.inf)
    committed(best, 3, 0.0)
    assert best.kept() == {wanted}


def test_what_was_found_counts_and_later_checkpoints_are_forgotten() -> None:
    best = Best("loss", "min")
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        best.found(step, {"loss": value})
    best.begun(4, {"loss": 0.0})
    assert best.kept() == {2, 4}
    best.forget_after(1)
    assert best.kept() == {1}
    committed(best, 2, 2.5)
    assert best.kept() == {2}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_whatever_fails_the_best_of_those_committed_is_kept_at_every_moment(mode: str) -> None:
    drawn = random.Random(3)
    pick = min if mode == "min" else max
    best = Best("loss", mode)
    there: dict[int, float] = {}  # what an oracle knows to be committed
    in_flight: dict[int, float] = {}
    for step in range(1, 400):
        in_flight[step] = drawn.choice([-2.0, 0.0, 1.0, 5.5])
        best.begun(step, {"loss": in_flight[step]})
        while len(in_flight) > drawn.randrange(4):
            ended = min(in_flight)  # they end in order
            value = in_flight.pop(ended)
            survives = drawn.random() < 0.7
            best.ended(ended, survives)
            if survives:
                there[ended] = value
        kept = best.kept()
        assert len(kept) <= 2
        if there:
            value = pick(there.values())
            assert max(s for s, v in there.items() if v == value) in kept
        assert kept <= {*there, *in_flight}
    assert len(best._committed) == 1
    assert not set(best._in_flight) - set(in_flight)


def test_how_to_keep_the_best_is_told_by_a_pair() -> None:
    assert Best.of(None) is None
    assert Best.of(("loss", "min")) == Best("loss", "min")
    assert Best.of(["accuracy", "max"]) == Best("accuracy", "max")


@pytest.mark.parametrize(
    "wrong", ["loss", ("loss",), ("loss", "least"), (1, "min"), ("a", "min", "b"), True, {}]
)
def test_what_is_no_such_pair_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="keep_best must be"):
        Best.of(wrong)


# --- Chunks --------------------------------------------------------------------------------------

MIB = 1 << 20


def test_a_large_state_gets_a_chunk_for_each_writer() -> None:
    assert [chunks_for(10 << 30, 2e9, writers) for writers in (1, 4, 16)] == [1, 4, 16]


def test_a_small_state_is_not_cut_into_pieces_that_are_over_at_once() -> None:
    assert chunks_for(0, 2e9, 8) == 1
    assert chunks_for(30 * MIB, 2e9, 8) == 1
    assert chunks_for(100 * MIB, 2e9, 8) == 2


def test_a_slower_disk_gets_more_chunks_of_the_same_state() -> None:
    counts = [chunks_for(256 * MIB, bandwidth, 8) for bandwidth in (8e9, 4e9, 2e9, 5e8)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 8


def test_before_anything_is_measured_a_common_disk_is_assumed() -> None:
    for size in (MIB, 100 * MIB, 1 << 30):
        assert chunks_for(size, None, 8) == chunks_for(size, 2e9, 8) == chunks_for(size, 0.0, 8)
