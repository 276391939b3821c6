"""LayerwiseCheckpointScheduler: gathers updated layers into save tasks and bounds what is pending.

Between the optimizer, which hands on layer by layer, and the adapter, for which a few layers at a
time are less work than each by itself. A trainer's runs on the training thread; one that stands
alone has a thread of its own for the handler, so that the optimizer need not wait for it.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pccheck_ext import _exit
from pccheck_ext.errors import CheckpointError

__all__ = ["LayerwiseCheckpointScheduler", "SaveHandler", "SaveTask"]

_MIB = 1 << 20


@dataclass(frozen=True, eq=False)  # tensors have no equality of one answer
class SaveTask:
    """One layer as one step left it; `layer_params` are the tensors to be saved, of any shape."""

    layer_name: str
    training_step: int
    layer_params: list[Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.layer_params)


SaveHandler = Callable[[list[SaveTask]], Any]


@dataclass
class _Pending:
    """What the handler's thread and the others share, under `changed`'s lock."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    batches: deque[tuple[list[SaveTask], int]] = field(default_factory=deque)
    size_bytes: int = 0  # of the batches above, and of the one the handler has now
    busy: bool = False
    stop: bool = False
    errors: list[BaseException] = field(default_factory=list)  # not told of yet
    handler_s: float = 0.0


class LayerwiseCheckpointScheduler:
    """Collects layers until they make `buffer_size_mb` MiB, then calls `save_handler` with them.

    `save_handler(tasks: list[SaveTask])` gets the layers in the order in which they were added,
    those of one training step at a time. With `async_save` it runs on a thread of the scheduler's:
    the tensors must then stay as they are until it has returned, as the copies that
    `LayerwiseOptimizer` gives a callback do. Otherwise it runs inside `add_save_task`.

    At most `max_pending_mb` MiB (default: four buffers) wait for the handler; `add_save_task` waits
    when there is more. A handler that raises is not called again with the same tasks, but goes on
    with those of later layers. On a thread of its own its error is raised, as the cause of a
    `CheckpointError`, by the next `add_save_task`, `force_flush` or `shutdown`; otherwise by the
    call inside which it was raised, as it is.

    `save_handler` may itself add layers and call `force_flush`, which does not wait then. One that
    is dropped without `shutdown` warns of the layers that it had not handed over.
    """

    exit_timeout_s: float | None = 60.0

    def __init__(
        self,
        save_handler: SaveHandler,
        buffer_size_mb: float = 10.0,
        async_save: bool = True,
        verbose: bool = False,
        *,
        max_pending_mb: float | None = None,
    ) -> None:
        if not callable(save_handler):
            raise TypeError(f"save_handler must be callable, got {type(save_handler).__qualname__}")
        for name, value in (("buffer_size_mb", buffer_size_mb), ("max_pending_mb", max_pending_mb)):
            if value is None and name == "max_pending_mb":
                continue
            if not (isinstance(value, (int, float)) and 0 < value < 1 << 40):
                raise ValueError(f"{name} must be a positive number of MiB, not {value!r}")
        self.save_handler = save_handler
        self.buffer_size_mb = float(buffer_size_mb)
        self.async_save = async_save
        self.verbose = verbose
        self._buffer_bytes = int(self.buffer_size_mb * _MIB)
        self._most_pending = int((max_pending_mb or 4 * self.buffer_size_mb) * _MIB)
        self._tasks: list[SaveTask] = []
        self._size_bytes = 0
        self._owner = os.getpid()
        self._closed = False
        self._pending = _Pending()
        self._thread: threading.Thread | None = None
        self._counts = dict.fromkeys(("tasks_added", "tasks_handed_over", "batches"), 0)
        self._bytes_added = 0
        self._largest_batch_bytes = 0
        self._most_pending_seen = 0
        self._waited_s = 0.0
        _exit.remember(self)

    def add_save_task(
        self, layer_name: str, training_step: int, layer_params: Sequence[Tensor]
    ) -> None:
        """Add one layer; hands the buffer over when it is full or belongs to an older step.

        Raises TypeError for what are no tensors and RuntimeError after `shutdown`: the layer is not
        added then. What the handler failed with is raised once the layer has been added.
        """
        self._refuse_in_child()
        if self._closed:
            raise RuntimeError("the scheduler was shut down and takes no more layers")
        params = list(layer_params)
        for tensor in params:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"layer_params of {layer_name!r} must be tensors, got "
                    f"{type(tensor).__qualname__}"
                )
        gathered = self._tasks
        try:
            if gathered and gathered[0].training_step != training_step:
                self._hand_over()
        finally:  # or its step would lack it for what has failed of an older one
            is_full = self._gather(SaveTask(layer_name, training_step, params))
        if is_full:
            self._hand_over()
        self._raise_errors()

    def _gather(self, task: SaveTask) -> bool:
        """True: the buffer is full."""
        size = task.size_bytes
        with self._pending.changed:
            self._tasks.append(task)
            self._size_bytes += size
            self._bytes_added += size
            self._counts["tasks_added"] += 1
            return self._size_bytes >= self._buffer_bytes

    def force_flush(self, timeout_s: float | None = 60.0) -> None:
        """Hand over what there is and return when the handler is done with it.

        Raises TimeoutError when it is not within `timeout_s` seconds (None: waits on), after which
        the handler goes on; CheckpointError for a handler that has failed. Without `async_save`
        `timeout_s` does not count: the handler runs inside this call, and is not left before it
        returns.
        """
        self._refuse_in_child()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        self._hand_over(until)
        pending = self._pending
        if threading.current_thread() is self._thread:
            return  # called by the handler: what it waits for could only come after it
        with pending.changed:
            while pending.batches or pending.busy:
                if not _wait(pending.changed, until):
                    raise TimeoutError(f"save_handler was not done after {timeout_s} s; {self}")
        self._raise_errors()

    def drop(self) -> None:
        """Forget the layers that have not been handed over yet: their step is not to be saved."""
        self._tasks, self._size_bytes = [], 0

    def shutdown(self, timeout_s: float | None = 60.0) -> None:
        """`force_flush`, then end the thread. Again: no effect. Raises as `force_flush` does.

        Without `async_save` `timeout_s` does not count, as there.
        """
        if os.getpid() != self._owner or self._closed:
            return
        self._closed = True
        try:
            self.force_flush(timeout_s)
        finally:
            _exit.forget(self)
            _stop(self._pending)

    def do_not_wait_at_exit(self) -> None:
        self.exit_timeout_s = 0.0

    def get_statistics(self) -> dict[str, Any]:
        """Counts, bytes and seconds so far.

        ``tasks_added``, ``tasks_handed_over``, ``batches``; ``bytes_added``, ``bytes_buffered``,
        ``bytes_pending`` and the most there ever were; ``largest_batch_bytes``; ``waited_s``:
        seconds that `add_save_task` was held back; ``handler_s``: seconds spent in the handler.
        """
        with self._pending.changed:
            pending, handler_s = self._pending.size_bytes, self._pending.handler_s
        return {
            **self._counts,
            "bytes_added": self._bytes_added,
            "bytes_buffered": self._size_bytes,
            "bytes_pending": pending,
            "most_bytes_pending": self._most_pending_seen,
            "largest_batch_bytes": self._largest_batch_bytes,
            "waited_s": self._waited_s,
            "handler_s": handler_s,
        }

    def __repr__(self) -> str:
        with self._pending.changed:
            busy = self._pending.busy
            waiting = sum(len(tasks) for tasks, _ in self._pending.batches)
        return (
            f"{type(self).__name__}: the handler {'has a batch' if busy else 'is idle'}, {waiting} "
            f"layers wait for it, {len(self._tasks)} are being gathered"
        )

    def __del__(self) -> None:
        tasks = getattr(self, "_tasks", ())
        if tasks and os.getpid() == self._owner:
            names = ", ".join(task.layer_name for task in tasks)
            warnings.warn(
                "a scheduler was dropped without shutdown(); these layers of step "
                f"{tasks[0].training_step} had not been handed over and are lost: {names}",
                ResourceWarning,
                stacklevel=2,
            )

    def _hand_over(self, until: float | None = None) -> None:
        """By `until` (None: whenever there is room); TimeoutError: nothing was handed over."""
        if self.async_save and self._tasks and self._thread is None:
            self._thread = self._started()
        with self._pending.changed:  # the handler may add layers and flush, too
            tasks, size = self._tasks, self._size_bytes
            self._tasks, self._size_bytes = [], 0
        if not tasks:
            return
        if self.async_save:
            if not self._enqueue(tasks, size, until):
                with self._pending.changed:
                    self._tasks, self._size_bytes = tasks + self._tasks, size + self._size_bytes
                raise TimeoutError(f"there was no room for another batch in time; {self}")
            return
        self._count(tasks, size)
        start = time.perf_counter()
        try:
            self.save_handler(tasks)
        finally:
            self._pending.handler_s += time.perf_counter() - start

    def _count(self, tasks: list[SaveTask], size: int) -> None:
        self._counts["tasks_handed_over"] += len(tasks)
        self._counts["batches"] += 1
        self._largest_batch_bytes = max(self._largest_batch_bytes, size)
        if self.verbose:
            print(
                f"LayerwiseCheckpointScheduler: step {tasks[0].training_step}: {len(tasks)} layers,"
                f" {size / _MIB:.2f} MiB"
            )

    def _enqueue(self, tasks: list[SaveTask], size: int, until: float | None) -> bool:
        """False where there is no room for them by then."""
        pending = self._pending
        start = time.perf_counter()
        there_is_room = True
        with pending.changed:
            own = threading.current_thread() is self._thread
            try:
                while (
                    not own  # the handler adding tasks itself cannot wait for itself
                    and not pending.errors
                    and pending.size_bytes > 0
                    and pending.size_bytes + size > self._most_pending
                ):
                    if not _wait(pending.changed, until):
                        there_is_room = False
                        break
            finally:
                self._waited_s += time.perf_counter() - start
                if there_is_room:  # interrupted, too: the next step's layers may come behind them
                    pending.batches.append((tasks, size))
                    pending.size_bytes += size
                    self._most_pending_seen = max(self._most_pending_seen, pending.size_bytes)
                    pending.changed.notify_all()
                    self._count(tasks, size)
        return there_is_room

    def _started(self) -> threading.Thread:
        thread = threading.Thread(
            target=_handle, args=(self.save_handler, self._pending), name="pccheck-handler"
        )
        thread.daemon = True  # or the exit would wait for it before it is told to end
        thread.start()
        # Not at exit, where more may have to be handed over: shutdown() comes there.
        weakref.finalize(self, _stop, self._pending).atexit = False
        return thread

    def _refuse_in_child(self) -> None:
        # Before any lock is asked for: the handler's thread may have held it at the fork.
        if self.async_save and os.getpid() != self._owner:
            raise RuntimeError(
                f"layers are saved by process {self._owner}, which this one was forked from; make "
                "a scheduler of its own"
            )

    def _raise_errors(self) -> None:
        with self._pending.changed:
            errors, self._pending.errors = self._pending.errors, []
        if errors:
            more = f"; and {len(errors) - 1} batches more" if len(errors) > 1 else ""
            raise CheckpointError(f"save_handler failed: {errors[0]!r}{more}") from errors[0]


def _wait(changed: threading.Condition, until: float | None) -> bool:
    """For a change; False once it is later than `until`."""
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        return False
    changed.wait(left)
    return True


def _handle(handler: SaveHandler, pending: _Pending) -> None:
    """The handler's thread; it does not hold the scheduler, which may be dropped meanwhile."""
    while True:
        with pending.changed:
            while not pending.batches:
                if pending.stop:
                    return
                pending.changed.wait()
            tasks, size = pending.batches.popleft()
            pending.busy = True
        start = time.perf_counter()
        errors: list[BaseException] = []
        try:
            handler(tasks)
        except BaseException as raised:  # told by the scheduler's next method
            errors.append(raised)
        del tasks
        with pending.changed:
            pending.busy = False
            pending.size_bytes -= size
            pending.handler_s += time.perf_counter() - start
            pending.errors += errors
            pending.changed.notify_all()
        del errors


def _stop(pending: _Pending) -> None:
    with pending.changed:
        pending.stop = True
        pending.changed.notify_all()
