"""Which steps a trainer saves, and which of them it keeps."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import LITTLE_MEMORY, Plain, Stream, generators_kept, memory_directory
from _waiting import go_on, one_thread, stall
from torch import nn

from pccheck_ext import (
    CheckpointMetadataManager,
    LayerwiseCheckpointTrainer,
    ModelRecovery,
)


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept(), one_thread():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


class Run:
    """A trainer, and a loop that reports what it is told to."""

    def __init__(self, directory: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.directory = directory
        self.model = Plain()
        self.data = Stream()
        self.trainer = LayerwiseCheckpointTrainer(
            self.model,
            torch.optim.Adam(self.model.parameters(), lr=0.01),
            checkpoint_dir=directory,
            **{**LITTLE_MEMORY, "keep_last": 0, **options},
        )
        # The clock stands still where it is not moved.
        self.now = self.trainer._saver._last_begun
        self.trainer._saver.clock = lambda: self.now

    def step(self, loss: float | None = None) -> None:
        self.trainer.zero_grad()
        tokens, targets = next(self.data)
        nn.functional.cross_entropy(self.model(tokens), targets).backward()
        self.trainer.step(loss)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def losses(self, *losses: float) -> None:
        """One step for each, each committed, or failed, before the next."""
        for loss in losses:
            self.step(loss)
            self.trainer.wait()

    def kept(self) -> list[int]:
        """Steps on disk, once the run has ended; every one of them is sound."""
        self.trainer.shutdown()
        return self.there()

    def there(self) -> list[int]:
        recovery = ModelRecovery(self.directory)
        names = recovery.list_checkpoints()
        assert all(recovery.verify(name) for name in names)
        return [int(name.removeprefix("step-")) for name in names]


@pytest.fixture
def run(directory: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(**options: Any) -> Run:
        made.append(Run(directory, **options))
        return made[-1]

    yield make
    for one in made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.trainer.shutdown()


MakeRun = Callable[..., Run]


# --- When ----------------------------------------------------------------------------------------


def test_every_step_is_saved_unless_told_otherwise(run: MakeRun) -> None:
    one = run()
    one.steps(4)
    assert one.kept() == [1, 2, 3, 4]


@pytest.mark.parametrize("every", [2, 3, 5])
def test_every_nth_step_is_saved(every: int, run: MakeRun) -> None:
    one = run(checkpoint_every=every)
    one.steps(11)
    assert one.kept() == list(range(every, 12, every))


def test_after_resuming_multiples_are_counted_from_the_first_step(
    run: MakeRun, directory: Path
) -> None:
    first = run(checkpoint_every=3)
    first.steps(7)
    first.trainer.shutdown()
    second = run(checkpoint_every=3)
    assert second.trainer.resume() == 6
    second.steps(4)
    assert second.kept() == [3, 6, 9]


def test_every_so_many_seconds_the_next_step_is_saved(run: MakeRun) -> None:
    one = run(checkpoint_every_s=10.0)
    for seconds in (4, 5, 1, 9, 1, 30, 0, 9.9, 0.1):
        one.now += seconds
        one.step()
    assert one.kept() == [3, 5, 6, 9]


def test_seconds_count_from_the_last_checkpoint_whatever_made_it_due(run: MakeRun) -> None:
    one = run(checkpoint_every=4, checkpoint_every_s=10.0)
    for seconds in (0, 0, 0, 9, 5, 4, 1, 0, 0):
        one.now += seconds
        one.step()
    assert one.kept() == [4, 7, 8]


def test_a_step_that_was_voided_is_made_up_for_by_the_next(run: MakeRun) -> None:
    one = run(checkpoint_every_s=10.0)
    one.now += 10
    one.step()
    one.now += 10
    one.trainer.optimizer.found_inf = torch.tensor(1.0)  # as a gradient scaler does
    one.step()
    del one.trainer.optimizer.found_inf
    one.step()
    one.step()
    assert one.trainer.training_step == 3
    assert one.kept() == [1, 2]


def test_a_voided_step_that_the_interval_makes_due_is_due_again(run: MakeRun) -> None:
    one = run(checkpoint_every=2)
    one.steps(1)
    one.trainer.optimizer.found_inf = torch.tensor(1.0)
    one.step()
    del one.trainer.optimizer.found_inf
    one.steps(3)
    assert one.kept() == [2, 4]


def test_continuously_the_next_is_saved_when_the_one_before_is_committed(run: MakeRun) -> None:
    one = run(checkpoint_every="continuous", use_monitor=True)
    one.step()
    one.trainer.wait()
    monitor = one.trainer.adapter.session.monitor_process
    assert monitor is not None
    stall(monitor)
    try:
        one.steps(4)
        assert one.trainer.stats()["last_committed_step"] == 1
    finally:
        go_on(monitor)
    one.trainer.wait()
    one.steps(1)
    assert one.kept() == [1, 2, 6]


def test_a_whole_checkpoint_between_leaves_the_interval_alone(run: MakeRun) -> None:
    one = run(checkpoint_every_s=10.0, checkpoint_chunk_count=2)
    one.step()
    one.now += 6
    one.trainer.save_full_checkpoint("mine")
    one.now += 5
    one.step()
    one.trainer.shutdown()
    assert ModelRecovery(one.directory).list_checkpoints() == ["step-00000002", "mine"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"checkpoint_every": 0},
        {"checkpoint_every_s": 0.0},
        {"checkpoint_every": "continuous", "checkpoint_every_s": 1.0},
        {"keep_best": "loss"},
        {"keep_best": ("loss", "best")},
        {"keep_every": -1},
        {"keep_last": 1.5},
        {"buffer_size_mb": 0},
        {"sigterm_deadline_s": 0},
        {"sigterm_deadline_s": "soon"},
    ],
)
def test_what_cannot_be_is_refused_by_name_before_anything_is_written(
    wrong: dict[str, Any], directory: Path
) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        Run(directory / "run", **wrong)
    assert not (directory / "run").exists()


# --- Which are kept ------------------------------------------------------------------------------


def test_the_newest_are_kept_and_their_places_used_again(run: MakeRun) -> None:
    one = run(keep_last=2)
    for _ in range(12):
        one.step()
        one.trainer.wait()
    assert one.kept() == [11, 12]
    assert sorted(path.name for path in one.directory.iterdir()) == [
        ".lock",
        "step-00000011",
        "step-00000012",
    ]


def test_multiples_are_kept_beside_the_newest(run: MakeRun) -> None:
    one = run(keep_last=2, keep_every=4)
    one.steps(11)
    assert one.kept() == [4, 8, 10, 11]


def test_multiples_survive_resuming(run: MakeRun) -> None:
    first = run(keep_last=1, keep_every=4)
    first.steps(6)
    assert first.kept() == [4, 6]
    second = run(keep_last=1, keep_every=4)
    assert second.trainer.resume() == 6
    second.steps(4)
    assert second.kept() == [4, 8, 10]


@pytest.mark.parametrize(("mode", "wanted"), [("min", [3, 6]), ("max", [4, 6])])
def test_the_best_by_loss_is_kept_beside_the_newest(
    mode: str, wanted: list[int], run: MakeRun
) -> None:
    one = run(keep_last=1, keep_best=("loss", mode))
    one.losses(5.0, 4.0, 1.0, 9.0, 3.0, 3.5)
    assert one.kept() == wanted


def test_the_best_is_kept_where_it_is_the_newest_and_followed_at_once(run: MakeRun) -> None:
    one = run(keep_last=1, keep_best=("loss", "min"), max_async=4)
    for loss in (5.0, 4.0, 1.0, 9.0, 3.0, 3.5):
        one.step(loss)  # nobody waits: several are in flight
    one.trainer.wait()
    one.losses(8.0)  # retires what was the best so far when others were retired
    assert one.kept() == [3, 7]


def test_the_best_by_a_reported_metric_is_that_of_the_step_it_was_reported_for(
    run: MakeRun,
) -> None:
    one = run(keep_last=1, keep_best=("accuracy", "max"))
    reported = {2: 0.5, 4: torch.tensor(0.75), 6: 0.5}
    for step in range(1, 9):
        if step in reported:
            one.trainer.report_metric("accuracy", reported[step])
        one.losses(float(step))
    assert one.kept() == [4, 8]
    metrics = {
        step: CheckpointMetadataManager(one.directory).get_checkpoint_info(f"step_{step}")[
            "metrics"
        ]
        for step in (4, 8)
    }
    assert metrics == {4: {"accuracy": 0.75, "loss": 4.0}, 8: {"loss": 8.0}}


def test_a_metric_that_is_no_number_is_refused(run: MakeRun) -> None:
    with pytest.raises(TypeError, match="metric 'accuracy' must be a number, not 'good'"):
        run().trainer.report_metric("accuracy", "good")  # type: ignore[arg-type]


def test_a_resumed_run_remembers_which_was_the_best(run: MakeRun) -> None:
    first = run(keep_last=1, keep_best=("loss", "min"))
    first.losses(5.0, 1.0, 3.0, 4.0)
    assert first.kept() == [2, 4]
    second = run(keep_last=1, keep_best=("loss", "min"))
    assert second.trainer.resume() == 4
    second.losses(3.0, 2.0, 2.5)
    assert second.kept() == [2, 7]
    third = run(keep_last=1, keep_best=("loss", "min"))
    third.trainer.resume()
    third.losses(0.5, 0.75)
    assert third.kept() == [8, 9]


def test_the_best_of_a_history_that_was_left_is_no_best_any_more(run: MakeRun) -> None:
    first = run(keep_last=1, keep_best=("loss", "min"))
    first.losses(3.0, 5.0, 1.0, 4.0)
    assert first.kept() == [3, 4]
    fresh = run(keep_last=1, keep_best=("loss", "min"))  # from the start, in the same directory
    with pytest.warns(RuntimeWarning, match="left aside"):
        fresh.losses(9.0)
    fresh.losses(8.0, 8.5, 8.25, 8.75)
    assert fresh.kept() == [2, 5]


def test_going_back_to_an_earlier_step_finds_the_best_up_to_there(run: MakeRun) -> None:
    one = run(keep_last=0, keep_best=("loss", "min"))
    one.losses(3.0, 2.0, 2.5, 1.0)
    one.trainer.shutdown()
    again = run(keep_last=1, keep_best=("loss", "min"))
    assert again.trainer.resume("step-00000003") == 3
    with pytest.warns(RuntimeWarning, match="left aside"):
        again.losses(2.25)
    again.losses(2.75)
    assert again.kept() == [2, 5]


def test_a_better_checkpoint_that_fails_does_not_cost_the_best_there_is(run: MakeRun) -> None:
    one = run(keep_last=1, keep_best=("loss", "min"), on_error="warn", _manual_copier=True)
    session, released = one.trainer._session, 0
    for loss in (5.0, 1.0, 3.0):
        one.step(loss)
        one.trainer.end_step()
        while one.trainer.stats()["in_flight"]:
            submitted = session.copies_submitted()
            session.release_copies(submitted - released)
            released = submitted
    one.step(0.5)
    one.trainer.end_step()  # sealed, but nothing of it is copied yet: it may become the best
    (one.directory / "step-00000004").mkdir()  # where it is to appear
    (one.directory / "step-00000004" / "foreign").touch()
    session.release_all_copies()
    with pytest.warns(RuntimeWarning, match="step-00000004 failed"):
        one.trainer.wait()
    one.losses(4.0, 4.5)
    one.trainer.shutdown()
    assert one.trainer.stats()["checkpoints_failed"] == 1
    assert one.there() == [2, 6]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_finite_number_is_saved_as_any_other(loss: float, run: MakeRun) -> None:
    one = run(keep_best=("loss", "min"))
    one.losses(2.0, loss)
    one.trainer.report_metric("other", -loss)
    one.losses(3.0)
    assert one.kept() == [1, 2, 3]
    manager = CheckpointMetadataManager(one.directory)
    found = [manager.get_checkpoint_info(f"step_{step}")["metrics"] for step in (2, 3)]
    assert repr(found) == repr([{"loss": loss}, {"other": -loss, "loss": 3.0}])
    manifest = (one.directory / "step-00000002" / "manifest.json").read_text()
    json.loads(manifest, parse_constant=lambda constant: pytest.fail(constant))
    resumed = run()
    assert resumed.trainer.resume() == 3
    assert repr(resumed.trainer.loss_history) == repr([2.0, loss, 3.0])


def test_a_metric_that_never_came_is_told_of_in_the_end(run: MakeRun) -> None:
    one = run(keep_last=1, keep_best=("accuracy", "max"))
    one.losses(2.0, 1.0)
    with pytest.warns(RuntimeWarning, match=r'keep_best=\("accuracy", "max"\) has kept nothing'):
        one.trainer.shutdown()
