"""SIGTERM: training ends between two steps with its newest state, or says what is lost, in time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import (
    Live,
    Plain,
    Program,
    Zoo,
    assert_same,
    customary,
    generators_kept,
    memory_directory,
)
from _waiting import DEADLINE_S, Child, go_on, one_thread, stall
from torch.utils.data import DataLoader

from pccheck_ext import ModelRecovery

SIGTERM_STATUS = 143
LONG = {"sigterm_deadline_s": DEADLINE_S}


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept(), one_thread():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def terminate(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def there(run: Path) -> list[int]:
    recovery = ModelRecovery(run)
    names = recovery.list_checkpoints()
    assert all(recovery.verify(name) for name in names)
    return [int(name.removeprefix("step-")) for name in names]


def terminated_after(
    step: int,
    run: Path,
    program: Program,
    then: Callable[[Live], object] = lambda live: live.run(100),
) -> Child:
    """A program that gets SIGTERM after a step, and what it does then."""

    def body() -> None:
        live = Live(program, run).run(step)
        terminate()
        then(live)
        print("it went on to the end")

    return Child(body, run.parent)


def plain(**options: Any) -> Program:
    return Program(model=Plain, options={**LONG, **options})


# --- In time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_monitor", [False, True])
def test_where_the_newest_step_is_saved_training_ends_before_the_next(
    use_monitor: bool, directory: Path
) -> None:
    run = directory / "run"
    child = terminated_after(5, run, plain(use_monitor=use_monitor))
    assert child.end() == SIGTERM_STATUS
    assert child.said() == (
        f"pccheck_ext: ended by SIGTERM: step 5 is saved in {run}; "
        "nothing is lost but the step under way\n"
    )
    assert there(run) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("use_monitor", [False, True])
def test_where_it_is_not_saved_one_more_step_is_taken_and_saved(
    use_monitor: bool, directory: Path
) -> None:
    run = directory / "run"
    child = terminated_after(7, run, plain(checkpoint_every=5, use_monitor=use_monitor))
    assert child.end() == SIGTERM_STATUS
    assert f"ended by SIGTERM: step 8 is saved in {run}; nothing is lost" in child.said()
    assert there(run) == [5, 8]


def by_itself(live: Live) -> None:
    """A loop that steps the optimizer itself."""
    live.zero_grad()
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    live.base.step()


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("loop", [customary, by_itself])
def test_what_goes_on_afterwards_is_the_unbroken_run_bit_for_bit(
    loop: Callable[[Live], None], every: int, directory: Path
) -> None:
    run = directory / "run"
    program = Program(
        model=Zoo,
        loop=loop,
        iterations=9,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        options={**LONG, "checkpoint_every": every},
    )
    child = terminated_after(4, run, program)
    assert child.end() == SIGTERM_STATUS, child.said()
    unbroken = Live(program, None).run()
    resumed = Live(program, run, seed=3)
    saved = 4 if every == 1 else 5
    assert resumed.resume() == saved
    resumed.run()
    assert_same(resumed.state(), unbroken.state())
    assert resumed.losses == {i: unbroken.losses[i] for i in range(saved + 1, 10)}
    resumed.trainer.shutdown()


def test_a_step_that_was_not_to_be_saved_is_saved_all_the_same(directory: Path) -> None:
    run = directory / "run"

    def without(live: Live) -> None:
        for _ in range(9):
            tokens, targets = next(live.data)
            criterion = torch.nn.functional.cross_entropy
            live.trainer.train_step(tokens, targets, criterion, enable_checkpoint=False)

    child = terminated_after(2, run, plain(), then=without)
    assert child.end() == SIGTERM_STATUS, child.said()
    assert there(run) == [1, 2]
    shutil.rmtree(run)
    child = terminated_after(2, run, plain(checkpoint_every=10), then=without)
    assert child.end() == SIGTERM_STATUS, child.said()
    assert there(run) == [3]


def test_a_loop_that_comes_to_its_end_first_ends_as_it_always_does(directory: Path) -> None:
    run = directory / "run"
    child = terminated_after(3, run, plain(), then=lambda live: live.trainer.shutdown())
    assert child.end() == 0
    assert child.said() == "it went on to the end\n"
    assert there(run) == [1, 2, 3]


def test_a_program_that_goes_on_after_training_as_if_nothing_were_is_ended_by_the_deadline(
    directory: Path,
) -> None:
    run = directory / "run"

    def go_on(live: Live) -> None:
        live.trainer.shutdown()
        threading.Event().wait()

    child = terminated_after(3, run, plain(sigterm_deadline_s=0.2), then=go_on)
    assert child.end() == SIGTERM_STATUS
    assert "SIGTERM's deadline of 0.2 s has passed: step 3 is saved" in child.said()
    assert there(run) == [1, 2, 3]


def test_a_second_signal_changes_nothing(directory: Path) -> None:
    run = directory / "run"

    def again(live: Live) -> None:
        terminate(2)
        live.run(100)

    child = terminated_after(7, run, plain(checkpoint_every=5), then=again)
    assert child.end() == SIGTERM_STATUS
    assert child.said().count("SIGTERM") == 1
    assert there(run) == [5, 8]


def test_a_last_checkpoint_that_fails_is_told_of(directory: Path) -> None:
    run = directory / "run"

    def lose_it(live: Live) -> None:
        live.trainer.wait()
        shutil.rmtree(run)
        live.run(100)

    child = terminated_after(7, run, plain(checkpoint_every=5), then=lose_it)
    assert child.end() == SIGTERM_STATUS
    assert "pccheck_ext: checkpoint step-00000008 failed" in child.said()
    assert f"step 5 is saved in {run}; steps 6 to 8 are lost" in child.said()


def test_of_a_resumed_run_what_was_there_before_counts_as_saved(directory: Path) -> None:
    run = directory / "run"
    Live(Program(model=Plain), run).run(4).trainer.shutdown()

    def body() -> None:
        live = Live(plain(checkpoint_every=100, sigterm_deadline_s=0.01), run)
        live.resume()
        live.run(6)
        terminate()
        threading.Event().wait()

    child = Child(body, directory)
    assert child.end() == SIGTERM_STATUS
    assert f"has passed: step 4 is saved in {run}; steps 5 to 6 are lost" in child.said()


# --- Too late ------------------------------------------------------------------------------------

SHORT = {"sigterm_deadline_s": 0.05}


def hold_a_lock(live: Live) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def sleep(live: Live) -> None:
    signal.pause()  # a second signal is waited for, which will not come
    signal.pause()


@pytest.mark.parametrize("stuck", [hold_a_lock, sleep])
@pytest.mark.parametrize(
    ("every", "lost"),
    [
        (1, "step 3 is saved in RUN; nothing is lost but the step under way"),
        (2, "step 2 is saved in RUN; steps 3 to 3 are lost"),
        (100, "nothing is saved in RUN: steps 1 to 3 are lost"),
    ],
)
def test_a_loop_that_is_stuck_is_ended_at_the_deadline_and_it_is_said_what_is_lost(
    every: int, lost: str, stuck: Callable[[Live], None], directory: Path
) -> None:
    run = directory / "run"

    def then(live: Live) -> None:
        live.trainer.wait()
        stuck(live)

    child = terminated_after(3, run, plain(checkpoint_every=every, **SHORT), then=then)
    assert child.end() == SIGTERM_STATUS
    lost = lost.replace("RUN", str(run))
    assert child.said() == f"pccheck_ext: SIGTERM's deadline of 0.05 s has passed: {lost}\n"


@pytest.mark.parametrize("first", ["the loop", "whoever comes first"])
def test_a_disk_that_hangs_does_not_keep_the_process_beyond_the_deadline(
    first: str, directory: Path
) -> None:
    """The loop waits for the disk as long as it may, and a thread watches the deadline as well."""
    run = directory / "run"

    def body() -> None:
        live = Live(plain(_manual_copier=True, **SHORT), run).run(1)
        live.trainer.end_step()
        session, released = live.trainer._session, 0
        while live.trainer.stats()["checkpoints_committed"] == 0:
            submitted = session.copies_submitted()
            session.release_copies(submitted - released)
            released = submitted
        live.run(2)  # of which nothing is copied any more
        if first == "the loop":
            assert live.trainer._sigterm is not None
            live.trainer._sigterm._watch = lambda: None  # type: ignore[method-assign]
        terminate()
        live.run(100)

    child = Child(body, directory)
    assert child.end() == SIGTERM_STATUS
    said = f"has passed: step 1 is saved in {run}; steps 2 to 2 are lost"
    assert child.said().count("SIGTERM") == 1
    assert said in child.said()
    assert there(run) == [1]


def test_what_a_monitor_has_been_given_whole_is_not_lost_though_its_disk_hangs(
    directory: Path,
) -> None:
    run = directory / "run"

    def body() -> None:
        live = Live(plain(use_monitor=True, drain_timeout_s=10.0, **SHORT), run).run(1)
        live.trainer.wait()
        monitor = live.trainer.adapter.session.monitor_process
        assert monitor is not None
        print(monitor)
        stall(monitor)
        live.run(2)
        terminate()
        live.run(100)

    child = Child(body, directory)
    try:
        assert child.end() == SIGTERM_STATUS
        assert f"has passed: step 2 is saved in {run}; nothing is lost" in child.said()
    finally:
        go_on(int(child.said().split()[0]))
    with Live(plain(lock_timeout_s=90.0), run).trainer as trainer:  # once the monitor is done
        assert trainer.resume() == 2


def test_that_what_is_lost_cannot_be_told_does_not_keep_the_process(directory: Path) -> None:
    run = directory / "run"

    def body() -> None:
        live = Live(plain(**SHORT), run)

        def fails() -> dict[str, Any]:
            raise RuntimeError("closed meanwhile")

        live.trainer.stats = fails  # type: ignore[method-assign]
        terminate()
        threading.Event().wait()

    child = Child(body, directory)
    assert child.end() == SIGTERM_STATUS
    assert "has passed: what is lost cannot be told: closed meanwhile" in child.said()


# --- Other processes, handlers, threads ----------------------------------------------------------


def wait_for_a_signal(_: object = None) -> None:
    handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    print("waiting", "with a handler" if handled else "", flush=True)
    while True:
        signal.pause()


def test_forked_workers_die_of_sigterm_as_they_always_did_and_training_goes_on(
    directory: Path,
) -> None:
    run = directory / "run"

    def body() -> None:
        live = Live(plain(), run)
        another = Live(plain(), directory / "another")
        worker = multiprocessing.get_context("fork").Process(target=wait_for_a_signal)
        worker.start()
        print("worker", worker.pid)
        worker.join(DEADLINE_S)
        print("ended by", worker.exitcode)
        live.run(2)
        live.trainer.shutdown()
        another.trainer.shutdown()

    child = Child(body, directory)
    child.says("waiting")
    # It would be run only when a call that waits returns: in a worker that reads, perhaps never.
    assert "handler" not in child.said()
    worker = int(child.said().split("worker ")[1].split()[0])
    os.kill(worker, signal.SIGTERM)
    assert child.end() == 0, child.said()
    assert f"ended by {-signal.SIGTERM}" in child.said()
    assert there(run) == [1, 2]


def test_a_data_loaders_workers_end_with_their_trainer(directory: Path) -> None:
    run = directory / "run"

    def body() -> None:
        live = Live(plain(), run)
        loader = DataLoader(range(1000), num_workers=2, multiprocessing_context="fork")  # type: ignore[arg-type]
        batches = iter(loader)
        for i in range(3):
            next(batches)
            live.run(i + 1)
        print("workers", *[worker.pid for worker in batches._workers])
        terminate()
        while True:
            next(batches)
            live.run(live.done + 1)

    child = Child(body, directory)
    assert child.end() == SIGTERM_STATUS, child.said()
    assert there(run) == [1, 2, 3]
    workers = child.said().split("workers ")[1].splitlines()[0].split()
    assert len(workers) == 2
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def own_handler() -> Iterator[Callable[[int, object], None]]:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def test_the_handler_there_was_is_put_back(
    own_handler: Callable[[int, object], None], directory: Path
) -> None:
    trainer = Live(plain(), directory / "run").trainer
    assert signal.getsignal(signal.SIGTERM) is not own_handler
    trainer.shutdown()
    assert signal.getsignal(signal.SIGTERM) is own_handler


def test_a_handler_that_was_set_since_is_left_alone(
    own_handler: Callable[[int, object], None], directory: Path
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = Live(plain(), directory / "run").trainer
    signal.signal(signal.SIGTERM, own_handler)
    trainer.shutdown()
    assert signal.getsignal(signal.SIGTERM) is own_handler


@pytest.mark.usefixtures("own_handler")
def test_without_a_deadline_the_signal_is_left_to_others(directory: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Live(Program(model=Plain), directory / "run").trainer:
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_trainer_made_on_another_thread_is_refused_before_anything_is_written(
    directory: Path,
) -> None:
    errors: list[BaseException] = []

    def make() -> None:
        try:
            Live(plain(), directory / "run")
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(DEADLINE_S)
    (error,) = errors
    assert "sigterm_deadline_s needs a trainer that is made on the main thread" in str(error)
    assert list(directory.iterdir()) == []


SCRIPT = """
import sys, torch, pccheck_ext
from torch import nn
torch.set_num_threads(1)
model = nn.Linear(64, 64)
with pccheck_ext.LayerwiseCheckpointTrainer(
    model, torch.optim.Adam(model.parameters()), checkpoint_dir=sys.argv[1], batch_size_mb=2,
    block_size_mb=0.25, checkpoint_every=1_000_000_000, sigterm_deadline_s=60) as trainer:
    while True:
        trainer.zero_grad()
        model(torch.ones(1, 64)).sum().backward()
        trainer.step()
        if trainer.training_step == 3:
            print("ready", flush=True)
"""


def test_a_whole_program_that_is_told_to_end_from_outside(directory: Path) -> None:
    run = directory / "run"
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    said = program.communicate(timeout=DEADLINE_S)[1]
    assert program.returncode == SIGTERM_STATUS, said
    (step,) = there(run)
    assert step >= 4
    assert said == (
        f"pccheck_ext: ended by SIGTERM: step {step} is saved in {run}; "
        "nothing is lost but the step under way\n"
    )
