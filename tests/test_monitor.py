"""Monitor mode with real processes: whichever of the two is killed, and whenever."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import LITTLE_MEMORY, Live, Program, assert_same, generators_kept
from _monitor import (
    SOON,
    Reference,
    Told,
    activity,
    adopt_orphans,
    assert_holds,
    children,
    fork,
    holders_of,
    is_free,
    kill_and_reap,
    loss_at,
    make,
    newest_step,
    slots_inode,
    take_step,
    train_until_killed,
    trainer_in,
    wait_end,
    wait_until,
)

import pccheck_ext
from pccheck_ext import _C
from pccheck_ext import adapter as adapter_module
from pccheck_ext.errors import CheckpointError

SEED = 20_240_301
TRAINER_KILLS = 150
MONITOR_KILLS = 25  # of each policy

Trainer = pccheck_ext.LayerwiseCheckpointTrainer


@pytest.fixture(autouse=True)
def ready_to_fork() -> Iterator[None]:
    # A forked child of a process whose thread pool has run would wait for threads it does not have.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, optimizer = make()
    loss_at(model, 0).backward()
    optimizer.step()
    adopt_orphans(True)
    before = children()
    yield
    left = children() - before
    for process in left:
        kill_and_reap(process)
    adopt_orphans(False)
    torch.set_num_threads(threads)
    assert not left, "processes were left behind"


def monitor_of(trainer: Trainer) -> int:
    process = trainer._session.monitor_process
    assert process is not None
    return process


def kill_monitor(trainer: Trainer) -> None:
    """Returns when the trainer could know."""
    os.kill(monitor_of(trainer), signal.SIGKILL)
    wait_until(lambda: trainer._session.monitor_death() is not None, "the death is known")


def stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)
    os.waitid(os.P_PID, process, os.WSTOPPED)


def only_checkpoints(directory: Path) -> bool:
    names = os.listdir(directory)
    return all(re.fullmatch(r"\.lock|step-\d{8}", name) for name in names)


# --- The trainer is killed ------------------------------------------------------------------------


def test_whenever_the_trainer_is_killed_what_was_sealed_is_committed_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    moments = random.Random(SEED)
    reference = Reference()
    directory = tmp_path / "run"
    newest, sealed_in_all, ahead = 0, 0, 0
    for kill in range(TRAINER_KILLS):
        told = Told()
        child = fork(lambda told=told: train_until_killed(directory, told))  # type: ignore[misc]
        told.await_("ready", child)
        resumed = told.get("resumed")
        assert resumed >= newest, f"kill {kill}: step {newest} was committed, {resumed} resumed"
        time.sleep(moments.random() * 0.03)  # the moment of the kill is what is random here
        kill_and_reap(child)
        assert wait_end(told.get("monitor")) == 0
        sealed, committed = told.get("sealed"), told.get("committed")
        newest = newest_step(directory)
        assert newest >= sealed, f"kill {kill}: step {sealed} was sealed, {newest} is there"
        assert only_checkpoints(directory), os.listdir(directory)
        assert is_free(directory)
        assert holders_of(told.get("slots_inode")) == []
        if newest:
            assert_holds(directory, f"step-{newest:08d}", reference.at(newest))
        sealed_in_all += max(0, sealed - resumed)
        ahead += sealed > committed
    assert sealed_in_all > TRAINER_KILLS / 4, "the children hardly ever got to seal anything"
    assert ahead > 3, "a direct trainer would have passed: nothing was ever left to the monitor"
    assert not [name for name in os.listdir("/dev/shm") if "pccheck-slots" in name]


def test_a_big_checkpoint_that_was_just_sealed_outlives_the_trainer(tmp_path: Path) -> None:
    reference = Reference(width=400)
    for time_ in range(4):
        directory, told = tmp_path / str(time_), Told()

        def seal_and_say(directory: Path = directory, told: Told = told) -> None:
            trainer = trainer_in(directory, width=400, batch_size_mb=8, ratio=2)
            told.put("monitor", monitor_of(trainer))
            take_step(trainer)
            trainer.wait()
            stop(monitor_of(trainer))  # from here on nothing is committed by chance
            take_step(trainer)
            while trainer.stats()["last_sealed_step"] < 2:
                os.sched_yield()
            told.put("sealed", 2)
            signal.pause()

        child = fork(seal_and_say)
        told.await_("sealed", child)
        assert newest_step(directory) == 1
        kill_and_reap(child)
        os.kill(told.get("monitor"), signal.SIGCONT)
        assert wait_end(told.get("monitor")) == 0
        assert newest_step(directory) == 2
        assert_holds(directory, "step-00000002", reference.at(2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_what_ends_the_whole_process_group_leaves_the_monitor_its_work(
    number: signal.Signals, tmp_path: Path
) -> None:
    directory, told = tmp_path / "run", Told()

    def in_a_group() -> None:
        os.setsid()
        signal.signal(number, signal.SIG_DFL)  # whatever pytest has made of it
        train_until_killed(directory, told)

    child = fork(in_a_group)
    told.await_("committed", child)
    os.killpg(child, number)
    assert wait_end(child) == -number
    assert wait_end(told.get("monitor")) == 0
    assert newest_step(directory) >= told.get("sealed") > 0
    assert only_checkpoints(directory)


WORKERS = """
import os, sys, torch, pccheck_ext
from torch.utils.data import DataLoader, Dataset

class Items(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index >= 4:  # for ever: this worker ends only if it is killed
            with open(sys.argv[2] + ".workers", "a") as file:
                file.write(f"{os.getpid()}\\n")
            os.read(os.open(sys.argv[2], os.O_RDWR), 1)
        return torch.ones(32)

if __name__ == "__main__":
    directory, fifo, context = sys.argv[1:]
    model = torch.nn.Linear(32, 32)
    trainer = pccheck_ext.LayerwiseCheckpointTrainer(
        model, torch.optim.Adam(model.parameters()), checkpoint_dir=directory, use_monitor=True,
        batch_size_mb=1, ratio=1, block_size_mb=1 / 32)
    loader = DataLoader(Items(), batch_size=2, num_workers=2, multiprocessing_context=context)
    print(trainer._session.monitor_process, flush=True)
    for batch in loader:
        trainer.zero_grad()
        model(batch).sum().backward()
        trainer.step()
        trainer.end_step()
        print(trainer.stats()["last_sealed_step"], flush=True)
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loaders_workers_that_outlive_the_trainer_hold_nothing_up(
    context: str, tmp_path: Path
) -> None:
    directory, fifo, script = tmp_path / "run", tmp_path / "fifo", tmp_path / "script.py"
    before = children()
    os.mkfifo(fifo)
    script.write_text(WORKERS)
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(directory), str(fifo), context],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert trainer.stdout is not None
    monitor = int(trainer.stdout.readline())
    inode = slots_inode(trainer.pid)
    assert trainer.stdout.readline()
    sealed = int(trainer.stdout.readline())
    told = Path(f"{fifo}.workers")
    wait_until(lambda: told.exists() and len(told.read_text().split()) == 2, "both workers wait")
    workers = [int(pid) for pid in told.read_text().split()]
    try:
        trainer.kill()
        trainer.wait()
        assert wait_end(monitor) == 0
        assert is_free(directory)
        assert holders_of(inode) == []
        assert newest_step(directory) >= sealed
        with trainer_in(directory, lock_timeout_s=0):
            pass
        for worker in workers:
            os.kill(worker, 0)  # they are still there
    finally:
        for worker in workers:
            kill_and_reap(worker)
        trainer.stdout.close()
        for helper in children() - before:  # of a spawning context; they end by themselves
            wait_end(helper)


# --- The monitor is killed ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["restart", "direct"])
def test_whenever_the_monitor_is_killed_training_goes_on_and_nothing_committed_is_lost(
    policy: str, tmp_path: Path
) -> None:
    moments = random.Random(SEED)
    reference = Reference()
    directory = tmp_path / "run"
    for kill in range(MONITOR_KILLS):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer = trainer_in(directory, on_monitor_death=policy, keep_last=4)
            trainer.resume("auto")
            take_step(trainer)
            trainer.wait()
            timer = threading.Timer(
                moments.random() * 0.02, os.kill, (monitor_of(trainer), signal.SIGKILL)
            )
            timer.start()
            while not any("was killed by signal 9" in str(w.message) for w in told):
                committed = trainer.stats()["last_committed_step"]
                take_step(trainer)
            timer.join()
            here = pccheck_ext.ModelRecovery(directory).list_checkpoints()
            assert f"step-{committed:08d}" in here, f"kill {kill}: committed, and lost"
            lives = trainer._session.monitor_process
            assert (lives is None) == (policy == "direct")
            for _ in range(3):
                take_step(trainer)
            step = trainer.training_step
            trainer.shutdown()
        messages = [str(w.message) for w in told if "monitor" in str(w.message)]
        assert len(messages) == 1, messages
        expected = "from its own process" if policy == "direct" else "with a new monitor"
        assert expected in messages[0]
        assert newest_step(directory) == step, f"kill {kill}: nothing was committed afterwards"
        assert_holds(directory, f"step-{step:08d}", reference.at(step))
        assert only_checkpoints(directory)
        assert is_free(directory)


@pytest.mark.parametrize("policy", ["restart", "direct"])
def test_the_next_step_says_that_the_monitor_has_died_and_of_what(
    policy: str, tmp_path: Path
) -> None:
    trainer = trainer_in(tmp_path, on_monitor_death=policy)
    take_step(trainer)
    trainer.wait()
    dead = monitor_of(trainer)
    kill_monitor(trainer)
    with pytest.warns(RuntimeWarning, match=rf"process {dead}\) was killed by signal 9.*none"):
        take_step(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        take_step(trainer)
        trainer.shutdown()
    assert newest_step(tmp_path) == 3
    assert trainer.stats()["last_committed_step"] == 3
    assert trainer.stats()["checkpoints_committed"] == 3


def test_what_was_lost_with_the_monitor_is_named(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_async=3)
    take_step(trainer)
    trainer.wait()
    stop(monitor_of(trainer))
    take_step(trainer)
    take_step(trainer)
    kill_monitor(trainer)
    with pytest.warns(RuntimeWarning, match="Lost: step-00000002, step-00000003"):
        take_step(trainer)
    trainer.shutdown()
    assert pccheck_ext.ModelRecovery(tmp_path).list_checkpoints() == [
        "step-00000001",
        "step-00000004",
    ]
    assert trainer.stats()["checkpoints_failed"] == 2


@pytest.mark.parametrize("busy", [False, True])
def test_where_it_is_to_be_an_error_the_next_step_raises_it(busy: bool, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, on_monitor_death="raise")
    take_step(trainer)
    trainer.wait()
    if busy:
        stop(monitor_of(trainer))
        take_step(trainer)
    kill_monitor(trainer)
    before = trainer.training_step
    for _ in range(2):  # as long as the loop asks for it
        with pytest.raises(CheckpointError, match="was killed by signal 9"):
            take_step(trainer)
        assert trainer.training_step == before, "the step was taken all the same"
    trainer.shutdown()
    assert is_free(tmp_path)
    assert newest_step(tmp_path) == 1
    with trainer_in(tmp_path, lock_timeout_s=0) as next_one:
        assert next_one.resume("auto") == 1


def test_whenever_the_monitor_is_killed_an_error_it_is_if_it_is_to_be_one(tmp_path: Path) -> None:
    moments = random.Random(SEED)
    for _ in range(MONITOR_KILLS):
        trainer = trainer_in(tmp_path, on_monitor_death="raise")
        trainer.resume("auto")
        monitor = monitor_of(trainer)
        timer = threading.Timer(moments.random() * 0.02, os.kill, (monitor, signal.SIGKILL))
        timer.start()
        committed = [0]

        def train(trainer: Trainer = trainer, committed: list[int] = committed) -> None:
            while True:
                committed.append(trainer.stats()["last_committed_step"])
                take_step(trainer)

        with pytest.raises(CheckpointError, match="was killed by signal 9"):
            train()
        timer.join()
        trainer.shutdown()
        assert newest_step(tmp_path) >= max(committed)


@pytest.mark.parametrize("policy", ["restart", "direct", "raise"])
@pytest.mark.parametrize("ending", ["wait", "shutdown"])
def test_ending_right_after_the_monitors_death_says_what_was_lost_and_does_not_hang(
    policy: str, ending: str, tmp_path: Path
) -> None:
    trainer = trainer_in(tmp_path, on_monitor_death=policy)
    take_step(trainer)
    trainer.wait()
    stop(monitor_of(trainer))
    take_step(trainer)
    os.kill(monitor_of(trainer), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"step-00000002 failed.*killed by signal 9"):
        getattr(trainer, ending)()
    trainer.shutdown()
    assert time.monotonic() - begun < SOON / 4
    assert is_free(tmp_path)
    assert newest_step(tmp_path) == 1
    assert only_checkpoints(tmp_path) or os.listdir(tmp_path)  # a .partial is the next one's
    trainer_in(tmp_path, lock_timeout_s=0).shutdown()
    assert only_checkpoints(tmp_path)


def test_with_nothing_in_flight_the_monitors_death_does_not_spoil_the_end(tmp_path: Path) -> None:
    for known in (True, False):
        trainer = trainer_in(tmp_path)
        trainer.resume("auto")
        take_step(trainer)
        trainer.wait()
        os.kill(monitor_of(trainer), signal.SIGKILL)
        if known:
            wait_until(lambda t=trainer: t._session.monitor_death() is not None, "known")  # type: ignore[misc]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that clearing up was left undone may be told
            trainer.shutdown()
        assert not trainer._session.is_open
        assert is_free(tmp_path)
    assert newest_step(tmp_path) == 2


def test_the_death_is_told_where_a_checkpoint_of_another_name_is_begun(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    take_step(trainer)
    trainer.wait()
    kill_monitor(trainer)
    with pytest.warns(RuntimeWarning, match="was killed by signal 9"):
        trainer.save_full_checkpoint("mine")
    trainer.shutdown()
    assert sorted(pccheck_ext.ModelRecovery(tmp_path).list_checkpoints()) == [
        "mine",
        "step-00000001",
    ]


def test_a_new_monitor_that_does_not_come_up_is_an_error_or_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = tmp_path / "pccheck-monitor"
    shutil.copy(adapter_module._MONITOR, monitor)
    monkeypatch.setattr(adapter_module, "_MONITOR", str(monitor))
    raising = trainer_in(tmp_path / "a")
    warning = trainer_in(tmp_path / "b", on_error="warn")
    monitor.unlink()
    for trainer in (raising, warning):
        take_step(trainer)
        trainer.wait()
        kill_monitor(trainer)
    with (
        pytest.warns(RuntimeWarning, match="was killed by signal 9"),
        pytest.raises(CheckpointError, match=rf"no going on.*{monitor}"),
    ):
        take_step(raising)
    with pytest.warns(RuntimeWarning) as told:
        take_step(warning)
    assert any(re.search(rf"no going on.*{monitor}", str(w.message)) for w in told)
    assert warning.training_step == 2
    for trainer in (raising, warning):
        trainer.shutdown()


def test_a_monitor_that_can_be_started_again_is_and_nothing_counted_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = tmp_path / "pccheck-monitor"
    shutil.copy(adapter_module._MONITOR, monitor)
    monkeypatch.setattr(adapter_module, "_MONITOR", str(monitor))
    directory = tmp_path / "run"
    trainer = trainer_in(directory, on_error="warn", keep_last=0)
    take_step(trainer)
    trainer.wait()
    monitor.rename(tmp_path / "away")
    kill_monitor(trainer)
    for _ in range(2):
        with pytest.warns(RuntimeWarning) as told:
            take_step(trainer)
        assert any(str(monitor) in str(warning.message) for warning in told)
    stats = trainer.stats()
    assert (stats["checkpoints_committed"], stats["last_committed_step"]) == (1, 1)
    assert stats["lag_steps"] == 2
    (tmp_path / "away").rename(monitor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(trainer)
        trainer.wait()
    assert monitor_of(trainer)
    stats = trainer.stats()
    assert (stats["checkpoints_committed"], stats["last_committed_step"]) == (2, 4)
    trainer.shutdown()
    assert pccheck_ext.ModelRecovery(directory).list_checkpoints() == [
        "step-00000001",
        "step-00000004",
    ]
    assert is_free(directory)


def test_a_trainer_whose_monitor_cannot_be_started_again_ends_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = tmp_path / "pccheck-monitor"
    shutil.copy(adapter_module._MONITOR, monitor)
    monkeypatch.setattr(adapter_module, "_MONITOR", str(monitor))
    trainer = trainer_in(tmp_path / "run", on_error="warn")
    take_step(trainer)
    trainer.wait()
    monitor.unlink()
    kill_monitor(trainer)
    with pytest.warns(RuntimeWarning) as told:
        take_step(trainer)
    assert any(str(monitor) in str(warning.message) for warning in told)
    trainer.shutdown()
    assert not trainer._session.is_open
    assert trainer.optimizer._observer is None, "the trainer has let go of the loop"
    assert trainer.stats()["checkpoints_committed"] == 1


class Interrupted(Exception):
    pass


@contextmanager
def interrupted(times: int) -> Iterator[None]:
    """Signals whose handler raises, as a keyboard's would, every now and then."""
    left = times

    def interrupt(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_stopped_monitor_is_waited_for_and_the_waiting_can_be_interrupted(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    take_step(trainer)
    trainer.wait()
    stop(monitor_of(trainer))
    take_step(trainer)
    with pytest.raises(TimeoutError):
        trainer.wait(timeout_s=0.05)
    with interrupted(times=1):
        trainer.wait()
    with interrupted(times=2):  # the first time it still waits for what is in flight
        trainer.shutdown()
    os.kill(monitor_of(trainer), signal.SIGCONT)
    trainer.wait()
    stop(monitor_of(trainer))
    with interrupted(times=1):  # nothing is in flight: this waits for a last word
        trainer.shutdown()
    os.kill(monitor_of(trainer), signal.SIGCONT)
    trainer.shutdown()
    assert is_free(tmp_path)
    assert newest_step(tmp_path) == 2


def test_shutdown_keeps_its_timeout_with_a_stopped_monitor_and_nothing_in_flight(
    tmp_path: Path,
) -> None:
    trainer = trainer_in(tmp_path)
    take_step(trainer)
    trainer.wait()
    monitor = monitor_of(trainer)
    stop(monitor)
    going_on = threading.Timer(SOON, lambda: os.kill(monitor, signal.SIGCONT))
    going_on.start()
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(TimeoutError, match="still being cleared up"):
            trainer.shutdown(timeout_s=0.1)
    assert time.monotonic() - begun < SOON / 2
    going_on.cancel()
    assert trainer._session.is_open
    os.kill(monitor, signal.SIGCONT)
    trainer.shutdown()
    assert not trainer._session.is_open
    assert is_free(tmp_path)


def test_no_other_thread_is_held_while_a_stopped_monitor_is_told_what_to_keep(
    tmp_path: Path,
) -> None:
    trainer = trainer_in(tmp_path)
    take_step(trainer)
    trainer.wait()
    monitor = monitor_of(trainer)
    stop(monitor)
    told = 0

    def let_it_go_on_late() -> None:
        time.sleep(SOON)
        os.kill(monitor, signal.SIGCONT)

    def tell() -> None:
        nonlocal told
        for _ in range(2000):  # more than its socket takes
            trainer._session.keep(set(range(1000)))
            told += 1

    # Were the GIL held, nothing here would run: so somebody else lets the monitor go on.
    late = fork(let_it_go_on_late)
    begun = time.monotonic()
    telling = threading.Thread(target=tell, name="telling")
    telling.start()
    seen = -1
    while seen != told:  # until it waits for the monitor
        seen = told
        telling.join(0.05)
    assert time.monotonic() - begun < SOON / 2
    assert told < 2000
    kill_and_reap(late)
    os.kill(monitor, signal.SIGCONT)
    telling.join()
    trainer.shutdown()


AT_EXIT = """
import os, signal, sys, torch, pccheck_ext
model = torch.nn.Linear(64, 64)
trainer = pccheck_ext.LayerwiseCheckpointTrainer(
    model, torch.optim.Adam(model.parameters()), checkpoint_dir=sys.argv[1], use_monitor=True,
    batch_size_mb=2, ratio=2, block_size_mb=0.25)
def step():
    trainer.zero_grad()
    model(torch.ones(1, 64)).sum().backward()
    trainer.step()
monitor = trainer._session.monitor_process
step(); trainer.wait()
"""


def test_at_exit_with_a_dead_monitor_it_is_said_what_was_lost(tmp_path: Path) -> None:
    lose = "os.kill(monitor, signal.SIGSTOP); step(); os.kill(monitor, signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT + lose, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.search("at exit: checkpoint step-00000002 failed.*killed by signal 9", done.stderr)
    assert newest_step(tmp_path) == 1
    assert is_free(tmp_path)


# --- Two at once, and forked ones -----------------------------------------------------------------


def test_a_second_trainer_is_refused_until_the_monitor_of_the_first_has_done_its_work(
    tmp_path: Path,
) -> None:
    directory, told = tmp_path / "run", Told()
    child = fork(lambda: train_until_killed(directory, told))
    told.await_("committed", child)
    for mode in ({"use_monitor": True}, {"use_monitor": False}):
        with pytest.raises(CheckpointError, match=f"another process is writing.*{directory}"):
            trainer_in(directory, lock_timeout_s=0.1, **mode)
    stop_at = told.get("monitor")
    os.kill(stop_at, signal.SIGSTOP)  # it has its work still before it when the trainer dies
    kill_and_reap(child)
    with pytest.raises(CheckpointError, match="another process is writing"):
        trainer_in(directory, lock_timeout_s=0.1)
    threading.Timer(0.2, os.kill, (stop_at, signal.SIGCONT)).start()
    with trainer_in(directory, lock_timeout_s=SOON) as second:
        assert second.resume("auto") >= told.get("sealed") > 0
    assert wait_end(stop_at) == 0


def test_interrupting_the_wait_for_the_directory_leaves_no_monitor(tmp_path: Path) -> None:
    with trainer_in(tmp_path), interrupted(times=1):
        trainer_in(tmp_path, lock_timeout_s=1000)
    # That no process is left is looked at after every test.


def test_forked_children_end_without_disturbing(tmp_path: Path) -> None:
    reference = Reference()
    trainer = trainer_in(tmp_path)
    for _ in range(5):
        take_step(trainer)
        child = os.fork()
        if child == 0:
            status = 0
            try:
                take_step(trainer)
                status = 1
            except RuntimeError as error:
                status = 0 if "forked from" in str(error) else 2
            finally:
                trainer.shutdown()  # nothing
                os._exit(status)
        assert wait_end(child) == 0
        quiet = fork(lambda: loss_at(trainer.model, 0).backward())
        take_step(trainer)
        assert wait_end(quiet) == 0
    trainer.shutdown()
    assert newest_step(tmp_path) == 10
    assert_holds(tmp_path, "step-00000010", reference.at(10))


def test_a_forked_child_that_lives_on_keeps_neither_lock_nor_memory_nor_monitor(
    tmp_path: Path,
) -> None:
    trainer = trainer_in(tmp_path)
    take_step(trainer)
    inode = slots_inode(os.getpid())
    child = fork(signal.pause)  # type: ignore[arg-type]
    monitor = monitor_of(trainer)
    wait_until(lambda: sorted(holders_of(inode)) == sorted([os.getpid(), monitor]), "two hold it")
    trainer.shutdown()
    assert is_free(tmp_path)
    assert holders_of(inode) == []
    with pytest.raises(ProcessLookupError):
        os.kill(monitor, 0)
    kill_and_reap(child)


# --- What it is and costs -------------------------------------------------------------------------


def test_a_monitor_is_ready_in_less_than_a_tenth_of_a_second(tmp_path: Path) -> None:
    """Construction in monitor mode less construction in direct mode, with the default staging
    memory; and with hardly any, which leaves little but the monitor itself. The shortest of nine in
    turn: whatever else the machine does only adds to it."""

    def seconds_to_make(name: str, **options: Any) -> float:
        begun = time.perf_counter()
        trainer = trainer_in(tmp_path / name, **options)
        took = time.perf_counter() - begun
        trainer.shutdown()
        return took

    defaults = {"batch_size_mb": 100.0, "ratio": 2.0, "block_size_mb": 2.0, "num_threads": 4}
    little: dict[str, Any] = {}
    for settings in (defaults, little):
        took: dict[bool, list[float]] = {True: [], False: []}
        for time_ in range(9):
            for mode in (True, False):
                name = f"{time_}-{mode}-{len(settings)}"
                took[mode].append(seconds_to_make(name, use_monitor=mode, **settings))
        beyond = min(took[True]) - min(took[False])
        assert beyond < 0.1, f"{beyond * 1e3:.1f} ms with {settings}"


def test_the_monitor_is_made_of_the_core_alone(tmp_path: Path) -> None:
    with trainer_in(tmp_path) as trainer:
        maps = Path(f"/proc/{monitor_of(trainer)}/maps").read_text()
        title = Path(f"/proc/{monitor_of(trainer)}/cmdline").read_bytes().split(b"\0")
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/" in line}
    libraries = {os.path.basename(file) for file in files if ".so" in os.path.basename(file)}
    strange = {
        name
        for name in libraries
        if not re.match(r"(libc|libm|libpthread|libdl|ld-linux[^.]*|ld)[.-]", name)
    }
    assert not strange, "neither torch nor CUDA nor Python, nor what they bring"
    assert adapter_module._MONITOR in files
    assert title == [b"pccheck-monitor", str(tmp_path).encode(), b""]


def test_idle_neither_process_takes_a_processor(tmp_path: Path) -> None:
    with trainer_in(tmp_path) as trainer:
        for _ in range(3):
            take_step(trainer)
        trainer.wait()
        monitor = monitor_of(trainer)

        def all_activity() -> dict[str, Any]:
            return activity(monitor) | activity(os.getpid(), of_threads="pccheck")

        # Spares are still being cleared up when the last commit has been heard of.
        before: dict[str, Any] = {}
        while before != (before := all_activity()):
            time.sleep(0.05)
        assert len(before) >= 4 + 3, before
        used = time.process_time()
        time.sleep(2)  # is what is measured
        assert all_activity() == before, "somebody woke up"
        assert time.process_time() - used < 0.02


# --- The same as direct mode, but for who writes --------------------------------------------------


def test_the_same_training_leaves_the_same_bytes_in_both_modes(tmp_path: Path) -> None:
    files: dict[bool, dict[str, bytes]] = {}
    with generators_kept():
        for mode in (False, True):
            directory = tmp_path / str(mode)
            live = Live(Program(iterations=4, options={"use_monitor": mode}), directory).run()
            live.trainer.shutdown()
            files[mode] = {
                f"{path.parent.name}/{path.name}": path.read_bytes()
                for path in directory.glob("*/*.safetensors")
            }
    assert len(files[True]) >= 3 * 4
    assert files[True] == files[False]


@pytest.mark.parametrize("first", [True, False])
def test_a_run_of_one_mode_goes_on_in_the_other_bit_for_bit(first: bool, tmp_path: Path) -> None:
    with generators_kept():
        wanted = Live(Program(iterations=6), None).run().state()
        begun = Live(Program(iterations=6, options={"use_monitor": first}), tmp_path).run(3)
        begun.trainer.shutdown()
        other = Program(iterations=6, options={"use_monitor": not first})
        resumed = Live(other, tmp_path, seed=100)
        assert resumed.resume() == 3
        resumed.run()
        assert_same(resumed.state(), wanted)
        resumed.trainer.shutdown()
    assert newest_step(tmp_path) == 6


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(tmp_path: Path) -> None:
    with trainer_in(tmp_path) as trainer:
        for _ in range(3):
            take_step(trainer)
    with trainer_in(tmp_path) as trainer:
        trainer.load_checkpoint("step-00000001")
        with pytest.warns(RuntimeWarning, match="step-00000002, step-00000003"):
            take_step(trainer)
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        "step-00000001",
        "step-00000002",
        "step-00000002.stale",
        "step-00000003.stale",
    ]


def test_checkpoints_of_ones_own_name_and_retired_ones_are_as_in_direct_mode(
    tmp_path: Path,
) -> None:
    reference = Reference()
    inodes = set()
    with trainer_in(tmp_path, keep_last=2, checkpoint_chunk_count=3) as trainer:
        for _ in range(12):
            take_step(trainer)
            trainer.wait()
            step = tmp_path / f"step-{trainer.training_step:08d}"
            inodes.add((step / "model.safetensors").stat().st_ino)
            if trainer.training_step == 5:
                trainer.save_full_checkpoint("the-fifth")
        stats = trainer.stats()
    assert stats["checkpoints_committed"] == 13
    assert stats["lag_steps"] == 0
    assert stats["free_slots"] == stats["slots"]
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000011", "step-00000012", "the-fifth"]
    assert len(inodes) < 10, "nothing was recycled"
    assert_holds(tmp_path, "the-fifth", reference.at(5))
    assert_holds(tmp_path, "step-00000012", reference.at(12))


def test_a_disk_that_fails_in_the_monitor_is_told_of_here_and_training_goes_on(
    tmp_path: Path,
) -> None:
    trainer = trainer_in(tmp_path, on_error="warn", width=100)
    take_step(trainer)
    trainer.wait()
    monitor = monitor_of(trainer)
    _, hard = resource.prlimit(monitor, resource.RLIMIT_FSIZE)
    resource.prlimit(monitor, resource.RLIMIT_FSIZE, (40_000, hard))
    take_step(trainer)
    with pytest.warns(RuntimeWarning, match=r"step-00000002 failed: .*File too large"):
        trainer.wait()
    resource.prlimit(monitor, resource.RLIMIT_FSIZE, (hard, hard))
    take_step(trainer)
    trainer.shutdown()
    stats = trainer.stats()
    assert (stats["checkpoints_committed"], stats["checkpoints_failed"]) == (2, 1)
    assert pccheck_ext.ModelRecovery(tmp_path).list_checkpoints() == [
        "step-00000001",
        "step-00000003",
    ]


def test_a_disk_that_fails_in_the_monitor_raises_the_errno_it_had(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, width=100)
    take_step(trainer)
    trainer.wait()
    _, hard = resource.prlimit(monitor_of(trainer), resource.RLIMIT_FSIZE)
    resource.prlimit(monitor_of(trainer), resource.RLIMIT_FSIZE, (40_000, hard))
    take_step(trainer)
    with pytest.raises(CheckpointError, match="File too large") as raised:
        trainer.wait()
    assert isinstance(raised.value.__cause__, OSError)
    trainer.shutdown()


def test_a_directory_that_cannot_be_made_is_the_error_it_is_in_direct_mode(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for mode in (True, False):
        with pytest.raises(NotADirectoryError):
            trainer_in(tmp_path / "file" / "run", use_monitor=mode)


def test_settings_that_cannot_be_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    session: dict[str, Any] = {
        "block_bytes": 32768,
        "staging_bytes": 1 << 20,
        "writer_threads": 0,
        "max_in_flight": 1,
        "keep_last": 1,
        "lock_timeout_s": 0.0,
        "monitor": adapter_module._MONITOR,
    }
    with pytest.raises(RuntimeError, match="writer threads"):
        _C.Session(str(tmp_path / "run"), **session)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="on_monitor_death"):
        trainer_in(tmp_path / "run", on_monitor_death="pray")
    assert not (tmp_path / "run").exists()


def test_verified_staging_and_little_memory_work_with_a_monitor(tmp_path: Path) -> None:
    options = {**LITTLE_MEMORY, "use_monitor": True, "verify_staged": True, "max_async": 1}
    with generators_kept():
        live = Live(Program(iterations=3, options=options), tmp_path).run()
        live.trainer.shutdown()
    recovery = pccheck_ext.ModelRecovery(tmp_path)
    assert all(recovery.verify(name) for name in recovery.list_checkpoints())
