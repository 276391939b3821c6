"""LayerwiseCheckpointScheduler: batches in order, bounded, on a thread of its own, never a hang."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import memory_directory
from _waiting import DEADLINE_S, Child, Running, eventually

from pccheck_ext import CheckpointError, LayerwiseCheckpointScheduler, SaveTask, scheduler

KIB = 1 / 1024  # in MiB


def tensor(kib: float = 1.0) -> torch.Tensor:
    return torch.zeros(int(kib * 256))


class Handler:
    """Notes the batches that it is given; `hold` keeps it in each until it is let go."""

    def __init__(self, hold: bool = False) -> None:
        self.batches: list[list[tuple[str, int]]] = []
        self.threads: list[threading.Thread] = []
        self.fails: list[BaseException] = []  # one for each batch to come
        self._may_go_on = threading.Event()
        if not hold:
            self._may_go_on.set()

    def __call__(self, tasks: list[SaveTask]) -> None:
        assert type(tasks) is list
        assert all(type(task) is SaveTask for task in tasks)
        self.threads.append(threading.current_thread())
        self.batches.append([(task.layer_name, task.training_step) for task in tasks])
        assert self._may_go_on.wait(DEADLINE_S)
        if self.fails:
            raise self.fails.pop(0)

    def let_go(self) -> None:
        self._may_go_on.set()

    @property
    def layers(self) -> list[tuple[str, int]]:
        return [layer for batch in self.batches for layer in batch]


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[LayerwiseCheckpointScheduler, Handler]]]:
    """Schedulers with buffers of 4 KiB; whatever the test came to, their handlers are let go."""
    all_of_them = []

    def make(*, hold: bool = False, **options: Any) -> tuple[LayerwiseCheckpointScheduler, Handler]:
        handler = Handler(hold)
        one = LayerwiseCheckpointScheduler(handler, **{"buffer_size_mb": 4 * KIB, **options})
        all_of_them.append((one, handler))
        return one, handler

    yield make
    for one, handler in all_of_them:
        handler.fails.clear()
        handler.let_go()
        one.drop()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(CheckpointError):
                one.shutdown()


Made = Callable[..., tuple[LayerwiseCheckpointScheduler, Handler]]


def add(one: LayerwiseCheckpointScheduler, names: str, step: int = 1, kib: float = 1.0) -> None:
    for name in names:
        one.add_save_task(name, step, [tensor(kib)])


# --- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [True, False])
def test_layers_are_handed_over_in_order_whenever_they_fill_the_buffer(
    async_save: bool, made: Made
) -> None:
    one, handler = made(async_save=async_save)
    add(one, "abcdefghij")
    one.force_flush()
    assert ["".join(name for name, _ in batch) for batch in handler.batches] == [
        "abcd",
        "efgh",
        "ij",
    ]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_batch_holds_layers_of_one_step_only(async_save: bool, made: Made) -> None:
    one, handler = made(async_save=async_save)
    add(one, "ab", step=1)
    add(one, "ab", step=2)
    add(one, "a", step=7)
    one.force_flush()
    assert handler.batches == [
        [("a", 1), ("b", 1)],
        [("a", 2), ("b", 2)],
        [("a", 7)],
    ]


def test_a_layer_larger_than_the_buffer_goes_with_what_waits_before_it(made: Made) -> None:
    one, handler = made(async_save=False)
    add(one, "a")
    add(one, "b", kib=100)
    add(one, "c")
    assert handler.batches == [[("a", 1), ("b", 1)]]
    one.force_flush()
    assert handler.batches[1:] == [[("c", 1)]]


def test_tasks_can_be_told_apart_and_kept_in_sets() -> None:
    one, alike = SaveTask("a", 1, [torch.ones(2)]), SaveTask("a", 1, [torch.ones(2)])
    assert one == one
    assert one != alike
    assert len({one, alike, one}) == 2


def test_the_handler_gets_the_tensors_themselves(made: Made) -> None:
    got: list[SaveTask] = []
    one = LayerwiseCheckpointScheduler(got.extend, async_save=False)
    params = [torch.ones(3), torch.ones(2, dtype=torch.int16)]
    one.add_save_task("a", 5, tuple(params))
    one.shutdown()
    (task,) = got
    assert (task.layer_name, task.training_step, task.size_bytes) == ("a", 5, 3 * 4 + 2 * 2)
    assert type(task.layer_params) is list
    assert all(x is y for x, y in zip(task.layer_params, params, strict=True))


def test_in_step_the_handler_runs_inside_the_call_that_fills_the_buffer(made: Made) -> None:
    one, handler = made(async_save=False)
    add(one, "abc")
    assert not handler.batches
    add(one, "d")
    assert handler.threads == [threading.current_thread()]


def test_beside_it_the_handler_has_a_thread_of_its_own_and_nobody_waits_for_it(made: Made) -> None:
    one, handler = made(hold=True)
    add(one, "abcd")
    eventually(lambda: handler.batches, "the handler has the batch")
    (thread,) = handler.threads
    assert thread is not threading.current_thread()
    assert thread.name == "pccheck-handler"
    assert thread.daemon
    add(one, "efg")  # returns, though the handler is held
    assert len(handler.batches) == 1


def test_what_is_not_handed_over_yet_can_be_dropped(made: Made) -> None:
    one, handler = made()
    add(one, "abcdef")
    one.drop()
    one.force_flush()
    assert "".join(name for name, _ in handler.layers) == "abcd"


# --- Back-pressure -------------------------------------------------------------------------------


def test_a_handler_that_stands_still_holds_the_loop_back_and_memory_stays_bounded(
    made: Made,
) -> None:
    one, handler = made(hold=True)
    alive = weakref.WeakSet()

    def train() -> None:
        for step in range(1, 21):
            for name in "abcd":
                param = tensor()
                alive.add(param)
                one.add_save_task(name, step, [param])

    running = Running(train)
    bound = 4 * 4096
    eventually(lambda: one.get_statistics()["bytes_pending"] == bound, "the bound is reached")
    # One more layer than what waits may have been added: the call that is being held back.
    eventually(lambda: one.get_statistics()["tasks_added"] == 4 * 5, "the loop waits")
    assert running.is_alive()
    assert one.get_statistics()["bytes_pending"] == bound
    assert len(alive) <= 4 * 5
    handler.let_go()
    running.end()
    one.force_flush()
    assert handler.layers == [(name, step) for step in range(1, 21) for name in "abcd"]
    stats = one.get_statistics()
    assert stats["most_bytes_pending"] == bound
    assert stats["waited_s"] > 0
    eventually(lambda: not alive, "nothing keeps what has been handled")


def test_how_much_may_wait_can_be_told(made: Made) -> None:
    one, handler = made(hold=True, max_pending_mb=8 * KIB)
    running = Running(lambda: add(one, "abcdefghijkl"))
    eventually(lambda: one.get_statistics()["tasks_added"] == 12, "the third batch waits")
    assert one.get_statistics()["bytes_pending"] == 8192
    assert running.is_alive()
    handler.let_go()
    running.end()
    assert one.get_statistics()["most_bytes_pending"] == 8192


def test_a_batch_beyond_the_bound_goes_when_nothing_else_waits(made: Made) -> None:
    one, handler = made(max_pending_mb=4 * KIB)
    add(one, "a", kib=64)
    add(one, "b", kib=64)
    one.force_flush()
    assert handler.layers == [("a", 1), ("b", 1)]


def test_an_interrupt_while_it_waits_loses_no_layer(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, handler = made(hold=True, max_pending_mb=4 * KIB)
    add(one, "abcd")

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add(one, "efgh")
    handler.let_go()
    one.force_flush()
    assert "".join(name for name, _ in handler.layers) == "abcdefgh"
    assert_adds_up(one)


# --- Flushing ------------------------------------------------------------------------------------


def test_flushing_returns_when_the_handler_is_done(made: Made) -> None:
    one, handler = made(hold=True)
    add(one, "abcde")
    running = Running(lambda: one.force_flush(None))
    eventually(lambda: one.get_statistics()["tasks_handed_over"] == 5, "it hands over")
    assert running.is_alive()
    handler.let_go()
    running.end()
    assert len(handler.layers) == 5


def test_flushing_with_a_handler_that_hangs_times_out_and_loses_nothing(made: Made) -> None:
    one, handler = made(hold=True)
    add(one, "abcde")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.05 s; .*has a batch, 1 layers wait"):
        one.force_flush(0.05)
    assert 0.04 < time.monotonic() - start < DEADLINE_S
    handler.let_go()
    one.force_flush()
    assert "".join(name for name, _ in handler.layers) == "abcde"


def test_flushing_times_out_too_where_there_is_no_room_for_what_is_gathered(made: Made) -> None:
    one, handler = made(hold=True, max_pending_mb=4 * KIB)
    add(one, "abcd")
    add(one, "ef")
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"no room for another batch.*2 are being gathered"):
            one.force_flush(0.01)
    handler.let_go()
    one.force_flush()
    assert handler.batches[1] == [("e", 1), ("f", 1)]
    assert_adds_up(one)


def test_flushing_with_nothing_to_hand_over_returns(made: Made) -> None:
    one, handler = made()
    one.force_flush()
    one.force_flush(0.0)
    assert not handler.batches


def test_the_handler_may_add_layers_and_flush(made: Made) -> None:
    seen: list[str] = []
    one: LayerwiseCheckpointScheduler

    def handler(tasks: list[SaveTask]) -> None:
        seen.append("".join(task.layer_name for task in tasks))
        if len(seen) == 1:
            for name in "uvwxyz":  # more than may wait
                one.add_save_task(name, 1, [tensor()])
            one.force_flush()  # returns, or this would wait for itself
            seen.append("flushed")

    one = LayerwiseCheckpointScheduler(handler, buffer_size_mb=2 * KIB, max_pending_mb=2 * KIB)
    add(one, "ab")
    one.force_flush()
    assert seen == ["ab", "flushed", "uv", "wx", "yz"]
    one.shutdown()


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["add", "flush", "shutdown"])
def test_an_error_of_the_handler_is_told_once_by_the_next_call(where: str, made: Made) -> None:
    one, handler = made()
    failed = ValueError("disk on fire")
    handler.fails.append(failed)
    add(one, "abcd")
    eventually(lambda: one._pending.errors, "the handler has failed")
    calls = {"add": lambda: add(one, "e"), "flush": one.force_flush, "shutdown": one.shutdown}
    with pytest.raises(CheckpointError, match=r"save_handler failed: ValueError.*fire") as told:
        calls[where]()
    assert told.value.__cause__ is failed
    if where != "shutdown":
        add(one, "efgh")
        one.force_flush()
        assert handler.batches[-1][-1] == ("h", 1)


def test_batches_after_one_that_failed_are_handled(made: Made) -> None:
    one, handler = made(hold=True)
    handler.fails += [ValueError("first"), SystemExit(3)]
    add(one, "abcdefghijkl")
    handler.let_go()
    with pytest.raises(CheckpointError, match=r"ValueError.*first.*and 1 batches more"):
        one.force_flush()
    assert len(handler.batches) == 3
    one.force_flush()


def test_a_layer_is_added_whatever_older_error_its_call_raises(made: Made) -> None:
    one, handler = made()
    handler.fails.append(ValueError("an older one"))
    add(one, "abcd", step=1)
    eventually(lambda: one._pending.errors, "the handler has failed")
    with pytest.raises(CheckpointError, match="an older one"):
        add(one, "e", step=2)
    add(one, "fg", step=2)
    one.force_flush()
    assert handler.batches[1:] == [[("e", 2), ("f", 2), ("g", 2)]]


def test_in_step_a_layer_is_added_though_the_layers_before_it_fail(made: Made) -> None:
    one, handler = made(async_save=False)
    handler.fails.append(ValueError("an older one"))
    add(one, "ab", step=1)
    with pytest.raises(ValueError, match="an older one"):
        add(one, "a", step=2)
    add(one, "b", step=2)
    one.force_flush()
    assert handler.batches == [[("a", 1), ("b", 1)], [("a", 2), ("b", 2)]]


def test_an_interrupt_while_an_older_step_waits_loses_no_layer_and_mixes_no_steps(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, handler = made(hold=True, max_pending_mb=4 * KIB)
    add(one, "abcd", step=1)
    add(one, "ab", step=2)

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add(one, "a", step=3)
    handler.let_go()
    add(one, "b", step=3)
    one.force_flush()
    assert handler.batches[1:] == [[("a", 2), ("b", 2)], [("a", 3), ("b", 3)]]
    assert_adds_up(one)


def test_layers_gathered_when_the_handler_fails_are_handed_over_all_the_same(made: Made) -> None:
    one, handler = made()
    handler.fails.append(ValueError("fails"))
    add(one, "abcd")
    eventually(lambda: one._pending.errors, "the handler has failed")
    one._pending.errors, kept = [], one._pending.errors
    add(one, "ef")
    one._pending.errors = kept
    with pytest.raises(CheckpointError):
        one.shutdown()
    assert handler.batches[1:] == [[("e", 1), ("f", 1)]]


def test_in_step_an_error_is_the_callers_as_it_is_and_told_no_more(made: Made) -> None:
    one, handler = made(async_save=False)
    failed = ValueError("mine")
    handler.fails.append(failed)
    with pytest.raises(ValueError, match="mine") as told:
        add(one, "abcd")
    assert told.value is failed
    add(one, "efgh")
    one.shutdown()
    assert "".join(name for name, _ in handler.layers) == "abcdefgh"


# --- The end -------------------------------------------------------------------------------------


def test_shutting_down_hands_over_the_rest_and_ends_the_thread(made: Made) -> None:
    one, handler = made()
    add(one, "abcde")
    one.shutdown()
    assert len(handler.layers) == 5
    thread = handler.threads[0]
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    one.shutdown()
    one.force_flush()
    with pytest.raises(RuntimeError, match="was shut down"):
        add(one, "f")
    assert len(handler.layers) == 5


def test_shutting_down_with_a_handler_that_hangs_times_out_and_the_rest_is_handled_later(
    made: Made,
) -> None:
    one, handler = made(hold=True)
    add(one, "abcdef")
    with pytest.raises(TimeoutError):
        one.shutdown(0.01)
    one.shutdown()  # has no effect any more
    handler.let_go()
    eventually(lambda: len(handler.layers) == 6, "the thread goes on")
    handler.threads[0].join(DEADLINE_S)
    assert not handler.threads[0].is_alive()


def test_one_that_is_dropped_tells_which_layers_are_lost_and_hands_over_the_others() -> None:
    handler = Handler(hold=True)
    made = [LayerwiseCheckpointScheduler(handler, buffer_size_mb=4 * KIB)]
    add(made[0], "abcd", step=8)
    add(made[0], "ef", step=9)
    add(made[0], "g", step=10)
    with pytest.warns(ResourceWarning, match=r"layers of step 10 .* lost: g"):
        made.clear()
    handler.let_go()
    eventually(lambda: len(handler.batches) == 2, "what was handed over is handled")
    handler.threads[0].join(DEADLINE_S)
    assert not handler.threads[0].is_alive()


def test_one_that_is_dropped_with_nothing_gathered_says_nothing() -> None:
    handler = Handler()
    one = LayerwiseCheckpointScheduler(handler, buffer_size_mb=4 * KIB)
    add(one, "abcd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del one
        gc.collect()  # a warning in a finalizer is an error that pytest tells of
    eventually(lambda: handler.batches, "what was handed over is handled")


AT_EXIT = """
import atexit, os, sys, weakref, torch, pccheck_ext
from pccheck_ext import LayerwiseCheckpointScheduler
if sys.argv[1] == "finalizers first":  # as where nothing has made one before
    atexit.unregister(weakref.finalize._exitfunc)
    atexit.register(weakref.finalize._exitfunc)
def handler(tasks):
    os.write(1, ("".join(task.layer_name for task in tasks) + "\\n").encode())  # in one piece
    if tasks[0].layer_name == "x":
        raise ValueError("fails")
kept = LayerwiseCheckpointScheduler(handler, buffer_size_mb=4 / 1024)
for name in "abcdef":
    kept.add_save_task(name, 1, [torch.zeros(256)])
only_gathered = LayerwiseCheckpointScheduler(handler)
only_gathered.add_save_task("g", 1, [torch.zeros(256)])
failing = LayerwiseCheckpointScheduler(handler, async_save=False)
failing.add_save_task("x", 1, [torch.zeros(256)])
"""


@pytest.mark.parametrize("order", ["finalizers first", "finalizers last"])
def test_at_exit_everything_is_handed_over_or_it_is_told(order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, order], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["abcd", "ef", "g", "x"]
    assert [line for line in done.stderr.splitlines() if "pccheck_ext: at exit: fails" in line]


# --- Forks ---------------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def test_a_forked_child_is_refused_even_where_the_lock_was_held_at_the_fork(
    directory: Path, made: Made
) -> None:
    one, handler = made(hold=True)
    add(one, "abcdef")
    inside, leave = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with one._pending.changed:
            inside.set()
            leave.wait(DEADLINE_S)

    holder = Running(hold_the_lock)
    assert inside.wait(DEADLINE_S)

    def in_child() -> None:
        for call in (lambda: add(one, "g"), one.force_flush):
            try:
                call()
            except RuntimeError as error:
                print("refused:", error)
        one.shutdown()
        print("shut down")

    child = Child(in_child, directory)
    leave.set()
    holder.end()
    assert child.end() == 0, child.said()
    refusal = f"refused: layers are saved by process {os.getpid()}, which this one was forked from"
    assert child.said().count(refusal) == 2
    assert "shut down" in child.said()
    handler.let_go()
    one.shutdown()
    assert "".join(name for name, _ in handler.layers) == "abcdef"


def test_a_forked_childs_own_scheduler_works_and_is_drained_at_its_exit(directory: Path) -> None:
    def in_child() -> None:
        one = LayerwiseCheckpointScheduler(
            lambda tasks: print("handled", *[task.layer_name for task in tasks])
        )
        kept.append(one)
        add(one, "ab")

    kept: list[LayerwiseCheckpointScheduler] = []
    child = Child(in_child, directory)
    assert child.end() == 0, child.said()
    assert child.said() == "handled a b\n"


# --- Looking at it -------------------------------------------------------------------------------


def test_told_to_be_verbose_it_says_what_it_hands_over(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = made(verbose=True, async_save=False, buffer_size_mb=1.0)
    quiet, _ = made(async_save=False)
    add(one, "ab", step=12, kib=512)
    add(quiet, "abcd")
    assert capsys.readouterr().out == (
        "LayerwiseCheckpointScheduler: step 12: 2 layers, 1.00 MiB\n"
    )


def assert_adds_up(one: LayerwiseCheckpointScheduler) -> None:
    stats = one.get_statistics()
    assert stats["bytes_pending"] == 0
    assert stats["tasks_added"] >= stats["tasks_handed_over"] >= stats["batches"]
    assert stats["bytes_added"] == 1024 * stats["tasks_added"]
    left = stats["tasks_added"] - stats["tasks_handed_over"]
    assert stats["bytes_buffered"] == 1024 * left


@pytest.mark.parametrize("async_save", [True, False])
def test_statistics_add_up(async_save: bool, made: Made) -> None:
    one, handler = made(async_save=async_save)
    fresh = one.get_statistics()
    assert set(fresh.values()) == {0}
    for step in range(1, 8):
        add(one, "abcdefg"[: step % 4 + 3], step)
    one.force_flush()
    add(one, "a", step=9)
    assert_adds_up(one)
    stats = one.get_statistics()
    assert set(stats) == set(fresh)
    assert stats["batches"] == len(handler.batches)
    assert stats["tasks_handed_over"] == len(handler.layers)
    assert stats["tasks_added"] == len(handler.layers) + 1
    assert stats["largest_batch_bytes"] == 1024 * max(map(len, handler.batches)) == 4096
    assert stats["handler_s"] > 0
    most = stats["most_bytes_pending"]
    assert 4096 <= most <= 4 * 4096 if async_save else most == 0


def test_defaults_are_ten_mib_beside_training() -> None:
    one = LayerwiseCheckpointScheduler(print)
    assert (one.buffer_size_mb, one.async_save, one.verbose) == (10.0, True, False)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), "10", None])
def test_sizes_that_cannot_be_are_refused_by_name(size: Any) -> None:
    with pytest.raises(
        ValueError, match=r"buffer_size_mb must be a positive .*" + re.escape(repr(size))
    ):
        LayerwiseCheckpointScheduler(print, size)
    if size is not None:
        with pytest.raises(ValueError, match="max_pending_mb must be a positive"):
            LayerwiseCheckpointScheduler(print, max_pending_mb=size)


def test_what_is_no_handler_and_no_tensor_is_refused(made: Made) -> None:
    with pytest.raises(TypeError, match="save_handler must be callable, got str"):
        LayerwiseCheckpointScheduler("handler")  # type: ignore[arg-type]
    one, handler = made(async_save=False)
    with pytest.raises(TypeError, match="layer_params of 'b' must be tensors, got float"):
        one.add_save_task("b", 1, [tensor(), 1.0])  # type: ignore[list-item]
    one.shutdown()
    assert not handler.batches
