"""PCCheckAdapter: staging memory, the writers, and the modes; where layers meet the engine.

In a trainer it is handed the layers of the step that has been begun. Alone it is given layers by
`save_layers_batch` and makes a checkpoint of each training step's.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pccheck_ext import _C, _exit, _names, _plan, _policy
from pccheck_ext._flight import Begun, Flight, Session, Ticket
from pccheck_ext._mock import MockSession, RecordedCheckpoint
from pccheck_ext.errors import CheckpointError
from pccheck_ext.metadata import CheckpointMetadataManager
from pccheck_ext.scheduler import SaveTask

__all__ = ["PCCheckAdapter"]

_MIB = 1 << 20
_MONITOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pccheck-monitor")

SaveWhole = Callable[[str, int, int], int]
"""Saves the whole state of a step under a name in so many chunks; returns its size in bytes.

ValueError where the state is that of another step.
"""

StateBytes = Callable[[], int]
"""The size in bytes of the state that there is now."""


class PCCheckAdapter:
    """Opens a run's directory in one of three modes, and saves layers to it.

    | mode | `use_pccheck` | `use_monitor` | |
    |---|---|---|---|
    | mock | False | - | nothing touches the disk; `recorded` tells what would have been saved |
    | direct | True | False | staged and written by threads of this process |
    | monitor | True | True | a process of its own writes, and commits if this one is killed |

    Args:
        c_lib_path: Ignored, with a warning: the engine is built in.
        checkpoint_file: Names the run's directory; a suffix such as ``.chk`` is dropped.
        checkpoint_dir: The run's directory; `checkpoint_file` does not count then.
        num_threads: Writer threads, 1 to 256.
        max_async: Checkpoints in flight; one more waits.
        batch_size_mb, ratio: Their product, in MiB, is the staging memory.
        block_size_mb: MiB written at once; the staging memory must hold several.
        keep_last, keep_every: Checkpoints of steps kept: so many of the newest (0: all), and those
            whose step is a multiple (0: none).
        on_error: "raise" or "warn".
        verbose: Print a line for each checkpoint begun and one for each found committed.
        lock_timeout_s: How long to wait for another process to let go of the directory.
        device: Where the tensors live; tensors in host memory may come as well.
        verify_staged: Also compare checksums of the live tensors, twice a checkpoint.
        on_monitor_death: "restart", "direct" or "raise".
        drain_timeout_s: How long a monitor whose trainer was killed may take to commit the rest.

    Raises:
        ValueError, TypeError: an argument that cannot be; nothing has been written then.
        OSError: the directory cannot be made or locked.
        CheckpointError: another process holds the directory.

    Alone, it may be called from several threads, such as a scheduler's handler and the loop.
    """

    exit_timeout_s: float | None = None
    _last_stats: dict[str, Any] | None = None

    def __init__(
        self,
        c_lib_path: str | None = None,
        checkpoint_file: str | os.PathLike[str] = "layerwise_checkpoint.chk",
        num_threads: int = 4,
        max_async: int = 2,
        batch_size_mb: float = 100.0,
        ratio: float = 2.0,
        use_pccheck: bool = True,
        use_monitor: bool = False,
        is_distributed: bool = False,
        rank: int = 0,
        world_size: int = 1,
        verbose: bool = False,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        block_size_mb: float = 2.0,
        keep_last: int = 3,
        keep_every: int = 0,
        on_error: str = "raise",
        lock_timeout_s: float = 30.0,
        device: str | torch.device = "cpu",
        verify_staged: bool = False,
        on_monitor_death: str = "restart",
        drain_timeout_s: float = 60.0,
        _manual_copier: bool = False,
    ) -> None:
        _check_world(is_distributed, rank, world_size)
        if c_lib_path is not None:
            warnings.warn("c_lib_path is ignored: the engine is built in", stacklevel=2)
        _whole_number("num_threads", num_threads, 1, 256)
        _whole_number("max_async", max_async, 1, 1024)
        _whole_number("keep_last", keep_last, 0)
        _whole_number("keep_every", keep_every, 0)
        _one_of("on_error", on_error, ("raise", "warn"))
        _one_of("on_monitor_death", on_monitor_death, ("restart", "direct", "raise"))
        staging = _positive("batch_size_mb", batch_size_mb) * _positive("ratio", ratio)
        self.block_bytes = max(1, round(_positive("block_size_mb", block_size_mb) * 256)) * 4096
        if staging * _MIB < 4 * self.block_bytes:
            raise ValueError(
                f"batch_size_mb x ratio = {staging:g} MiB of staging memory holds fewer than four "
                f"blocks of block_size_mb = {block_size_mb:g}; enlarge the former or shrink this"
            )
        lock_timeout_s = _seconds("lock_timeout_s", lock_timeout_s)
        drain_timeout_s = _positive("drain_timeout_s", drain_timeout_s)
        named = _directory(checkpoint_dir, checkpoint_file)
        self._opened_as = "mock" if not use_pccheck else "monitor" if use_monitor else "direct"
        self.num_threads = num_threads
        self.device = torch.device(device)
        self.verbose = verbose
        # Wherever the process goes later.
        self.directory = os.path.abspath(named)
        self.metadata = CheckpointMetadataManager(
            self.directory, self.directory, directory=self.directory
        )
        self._owner = os.getpid()
        if self._opened_as == "mock":
            self.session: Session = MockSession(self.directory)
        else:
            try:
                self.session = _C.Session(
                    self.directory,
                    block_bytes=self.block_bytes,
                    staging_bytes=int(staging * _MIB),
                    writer_threads=num_threads,
                    max_in_flight=max_async,
                    keep_last=keep_last,
                    keep_every=keep_every,
                    lock_timeout_s=lock_timeout_s,
                    device=str(self.device),
                    manual_copier=_manual_copier,
                    verify_staged=verify_staged,
                    monitor=_MONITOR if self._opened_as == "monitor" else None,
                    drain_timeout_s=drain_timeout_s,
                )
            except RuntimeError as error:
                raise CheckpointError(str(error)) from None
        self.flight = Flight(
            self.session, on_error=on_error, on_monitor_death=on_monitor_death, verbose=verbose
        )
        self._lock = threading.RLock()  # guards flight and session where there is no trainer
        self._save_whole: SaveWhole | None = None
        self._state_bytes: StateBytes = lambda: self._loose.state_bytes
        self._unsealed: Callable[[], Ticket | None] = lambda: self._loose.ticket
        self._current: Begun | None = None  # a trainer's, whose layers are being handed over
        self._loose = _LooseLayers(self)
        _exit.remember(self)

    @property
    def mode(self) -> str:
        """``"mock"``, ``"direct"`` or ``"monitor"``; direct after going on without monitor."""
        return "direct" if self.flight.went_direct else self._opened_as

    @property
    def recorded(self) -> list[RecordedCheckpoint]:
        """Mock mode: what would have been saved, in the order in which it was begun."""
        if not isinstance(self.session, MockSession):
            raise AttributeError(f"recorded is mock mode's; this is {self.mode} mode")
        return self.session.checkpoints

    # -- layers ------------------------------------------------------------------------------------

    def save_layers_batch(self, tasks: Sequence[SaveTask]) -> dict[str, Any]:
        """Save some layers of one training step; returns once they may change again.

        Alone: the layers of a training step make one checkpoint, ``step-<step>``, sealed when a
        layer of another step comes, by `finish_step` or `shutdown`. A layer's tensors are called
        ``<layer>.0``, ``<layer>.1`` and so on there. What the directory holds of the first step
        that comes, or of later ones, is set aside as ``*.stale``, with a warning. In a trainer's
        step the layers are read after the call has returned: its gates keep them as they are.

        Returns ``{"checkpoint_id", "layers", "bytes"}``: the layers' number and size in bytes.
        Raises ValueError for a layer that this step has already and TypeError for a tensor that
        cannot be saved: the step then makes no checkpoint, and further layers of it are dropped.
        ValueError for a layer that comes after its step's seal, which the checkpoint lacks. Raises
        CheckpointError for what failed: a step that cannot be begun, which makes no checkpoint, or
        an older checkpoint, after the layers have been taken.
        """
        begun = self._current
        if begun is None and self._save_whole is not None:
            raise RuntimeError("no step of the trainer's is being saved that layers could be of")
        if begun is None:
            with self._locked():
                return self._loose.save(tasks)
        size = 0
        for task in tasks:
            index = begun.plan.index[task.layer_name]
            self.flight.hand_over(begun, index)
            size += begun.plan.layer_bytes[index]
        return {"checkpoint_id": begun.ticket.name, "layers": len(tasks), "bytes": size}

    def finish_step(self) -> None:
        """Alone: seal the checkpoint of the step whose layers came last."""
        with self._locked():
            self._loose.seal()

    def allocate_staging_buffer(self, size_mb: float = 500.0) -> None:
        """Staging memory on the device, so that a layer may change before it has left it.

        Not needed: staging goes on straight from the live tensors, and a layer's gate waits for
        that one layer alone. Tensors in host memory have no use for it; on a device it is refused
        rather than ignored.
        """
        _positive("size_mb", size_mb)
        if isinstance(self.session, _C.Session) and self.device.type != "cpu":
            raise NotImplementedError(
                "staging memory on the device is not in this version; layers are staged from the "
                "live tensors, which needs none"
            )

    # -- the whole state ---------------------------------------------------------------------------

    def save_entire_checkpoint_in_chunks(
        self, checkpoint_id: str, training_step: int, chunk_count: int | str = 2
    ) -> dict[str, Any]:
        """Save the whole state under a name, in `chunk_count` ranges written in parallel.

        ``"auto"`` chooses by the state's size and the bandwidth seen so far. The state is the
        trainer's, or, alone, the newest layers that came by `save_layers_batch`: their tensors are
        kept for it, and read as they are now. Their step is sealed by this. The bytes are the same
        for every count.

        Returns ``{"checkpoint_id", "chunks", "bytes"}`` when the save is on its way. Raises
        ValueError for a name that cannot be, is there already or in flight, or for another step
        than that of the state.
        """
        _names.check_id(checkpoint_id)
        _whole_number("training_step", training_step, 0)
        if chunk_count != "auto":
            _whole_number("chunk_count", chunk_count, 1, 4096)
        if _names.step_of(checkpoint_id) not in (None, training_step):
            raise ValueError(
                f"checkpoint_id {checkpoint_id!r} names another step than {training_step}, "
                "the one to be saved"
            )
        with self._locked():
            self._refuse_known(checkpoint_id)
            chunks = self._chunks(chunk_count)
            save = self._save_whole or self._loose.save_whole
            size = save(checkpoint_id, training_step, chunks)
        return {"checkpoint_id": checkpoint_id, "chunks": chunks, "bytes": size}

    def _refuse_known(self, checkpoint_id: str) -> None:
        if self.flight.has_in_flight(checkpoint_id):  # first: it may be there the next moment
            raise ValueError(
                f"checkpoint_id {checkpoint_id!r} is in flight already to {self.directory}; "
                "choose another name"
            )
        if self._is_there(checkpoint_id):
            raise ValueError(
                f"checkpoint_id {checkpoint_id!r} is there already in {self.directory}; "
                "choose another name or remove it first"
            )

    def _is_there(self, checkpoint_id: str) -> bool:
        if self.mode == "mock":
            return any(c.checkpoint_id == checkpoint_id and c.committed for c in self.recorded)
        return os.path.lexists(os.path.join(self.directory, checkpoint_id))

    def _chunks(self, chunk_count: int | str) -> int:
        if isinstance(chunk_count, int):
            return chunk_count
        stats = self.session.stats()
        seconds, persisted = stats["durable_s_total"], stats["bytes_persisted"]
        bandwidth = persisted / seconds if seconds and persisted else None
        return _policy.chunks_for(self._state_bytes(), bandwidth, self.num_threads)

    # -- for a trainer -----------------------------------------------------------------------------

    def bind(
        self,
        save_whole: SaveWhole,
        state_bytes: StateBytes,
        unsealed: Callable[[], Ticket | None],
    ) -> None:
        """Whose state `save_entire_checkpoint_in_chunks` saves from now on.

        `unsealed` tells which checkpoint `wait` need not wait for: it is not sealed yet.
        """
        self._save_whole = save_whole
        self._state_bytes = state_bytes
        self._unsealed = unsealed

    def hand_over_to(self, begun: Begun | None) -> None:
        """Which checkpoint the layers of `save_layers_batch` are of, from now on."""
        self._current = begun

    # -- the end -----------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        if self._last_stats is None:
            return dict(self.session.stats())
        return dict(self._last_stats)

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when everything sealed is committed.

        Raises CheckpointError for what failed, TimeoutError, naming what is still in flight, when
        `timeout_s` seconds have passed first (None: waits on).
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        if not self.flight.wait(timeout_s, but=self._unsealed()):
            raise TimeoutError(self.flight.still_in_flight(timeout_s))
        with self._locked(timeout_s, until):
            self.flight.raise_failures()

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Finish every save, or tell which failed, and let go of the directory. Again: no effect.

        Raises CheckpointError for what failed, TimeoutError, naming what is still in flight, when
        `timeout_s` seconds have passed first (None: waits on). Then everything goes on, and it may
        be called again; the end of the process waits no longer for it, but says what is lost. In a
        forked child this does nothing: the saves are the parent's.
        """
        if os.getpid() != self._owner or not self.session.is_open:
            return
        until = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            with self._locked(timeout_s, until):
                try:
                    self._loose.seal()
                    self.wait(_left(until))
                except CheckpointError:  # what has failed has ended; an interrupt leaves all as is
                    self._close(until)
                    raise
                self._close(until)
        except TimeoutError:
            self.do_not_wait_at_exit()
            if self.flight.count() == 0:
                raise  # it is the clearing up that hangs
            raise TimeoutError(self.flight.still_in_flight(timeout_s)) from None

    def do_not_wait_at_exit(self) -> None:
        """Nor when this is dropped: it has been waited for in vain."""
        if self.exit_timeout_s is None and isinstance(self.session, _C.Session):
            _exit.never_destroy(self.session)
        self.exit_timeout_s = 0.0

    def _close(self, until: float | None) -> None:
        stats = dict(self.session.stats())
        try:
            complaint = self.session.close(_left(until))
        except TimeoutError:
            self.do_not_wait_at_exit()
            raise
        self._last_stats = stats
        _exit.forget(self)
        if complaint:
            warnings.warn(
                f"clearing up after checkpoints: {complaint}", RuntimeWarning, stacklevel=3
            )

    @contextmanager
    def _locked(self, timeout_s: float | None = None, until: float | None = None) -> Iterator[None]:
        """Another thread has it while it waits for the disk: so until then, `timeout_s` in all."""
        left = _left(until)
        if not self._lock.acquire(timeout=-1 if left is None else left):
            raise TimeoutError(self.flight.still_in_flight(timeout_s))
        try:
            yield
        finally:
            self._lock.release()

    def __del__(self) -> None:
        session = getattr(self, "session", None)
        if session is None or not session.is_open or os.getpid() != self._owner:
            return
        if getattr(self, "_save_whole", None) is not None or self._opened_as == "mock":
            return  # a trainer's, which does this itself
        if sys.is_finalizing():
            return  # as has been told
        warnings.warn(
            f"an adapter over {self.directory} was dropped without shutdown(); its saves are being "
            "finished now",
            ResourceWarning,
            stacklevel=2,
        )
        try:
            self.shutdown(self.exit_timeout_s)
        except Exception as error:  # nobody could catch it: tell
            print(f"pccheck_ext: {error}", file=sys.stderr)


class _LooseLayers:
    """What came by `save_layers_batch` without a trainer: checkpoints that grow batch by batch."""

    def __init__(self, adapter: PCCheckAdapter) -> None:
        self._adapter = adapter
        self._step: int | None = None  # without a ticket: it makes no checkpoint, which was told
        self._sealed: int | None = None
        self.ticket: Ticket | None = None  # not sealed yet
        self._layers: dict[str, dict[str, Any]] = {}  # the manifest's entries
        self._files = 0
        self._newest: dict[str, SaveTask] = {}
        self._given_up: set[int] = set()  # steps of which `_newest` may lack layers

    @property
    def state_bytes(self) -> int:
        return sum(task.size_bytes for task in self._newest.values())

    def save(self, tasks: Sequence[SaveTask]) -> dict[str, Any]:
        batches: dict[int, list[SaveTask]] = {}
        for task in tasks:
            batches.setdefault(task.training_step, []).append(task)
        size = 0
        refused: BaseException | None = None
        for step, batch in batches.items():
            try:
                size += self._save_step(step, batch)
            except BaseException as error:  # of this step: those of the others are taken first
                if refused is None:
                    refused = error
                elif refused.__context__ is None:
                    refused.__context__ = error  # both are shown
        if refused is not None:
            raise refused
        # Not before: a layer that was refused for an older checkpoint would be missing in its own.
        self._adapter.flight.raise_failures()
        name = _names.step_id(next(reversed(batches))) if batches else ""
        return {"checkpoint_id": name, "layers": len(tasks), "bytes": size}

    def _save_step(self, step: int, tasks: list[SaveTask]) -> int:
        if step == self._sealed:
            raise ValueError(f"step {step} is sealed: no further layers of it can be saved")
        if step == self._step:
            return self._add(tasks)
        try:
            self.seal()
        finally:  # what the older step failed with shall not cost this one its layers
            self._begin(step)
            size = self._add(tasks)
        return size

    def _begin(self, step: int) -> None:
        # First: where it cannot be begun, its later layers shall not make a checkpoint alone.
        self._step, self._layers, self._files = step, {}, 0
        self._given_up.discard(step)
        plan = _plan.BarePlan([], _C.Layout([], 0, self._adapter.block_bytes), [])
        self.ticket = self._adapter.flight.begin_ticket(
            _names.step_id(step), step, plan, origin=max(0, step - 1)
        )

    def _add(self, tasks: list[SaveTask]) -> int:
        ticket = self.ticket
        if ticket is None:
            return 0  # it could not be begun, or was given up, which was told
        try:
            self._refuse_twice(tasks)
            tensors = _named(tasks)
            file = f"model-{self._files + 1:05d}.safetensors"
            layout, described = _plan.plan_loose(file, tensors, self._adapter.block_bytes)
            layer = ticket.add(layout, [*tensors.values()])
            ticket.wait_layer_staged(layer)
        except BaseException as error:
            self.ticket = None  # nobody shall take what lacks these layers for the step's state
            self._given_up.add(ticket.step)
            self._adapter.flight.give_up_ticket(ticket, f"{type(error).__name__}: {error}")
            raise
        self._files += 1
        self._layers.update(_entries(tasks, described))
        self._newest.update((task.layer_name, task) for task in tasks)
        ticket.open_gate(layer)
        return sum(entry["bytes"] for entry in described)

    def _refuse_twice(self, tasks: list[SaveTask]) -> None:
        names = set(self._layers)
        for task in tasks:
            if task.layer_name in names:
                raise ValueError(
                    f"step {task.training_step} has a layer {task.layer_name!r} already; "
                    "it makes no checkpoint now"
                )
            names.add(task.layer_name)

    def seal(self) -> None:
        ticket, self.ticket = self.ticket, None
        if self._step is not None:
            self._sealed, self._step = self._step, None
        if ticket is not None:
            try:
                ticket.seal(self._manifest(ticket, self._layers))
            except BaseException as error:  # or it would be in flight for ever
                self._adapter.flight.give_up_ticket(ticket, f"{type(error).__name__}: {error}")
                raise

    def _manifest(self, ticket: Ticket, layers: dict[str, dict[str, Any]]) -> bytes:
        manifest = self._adapter.metadata.compose(
            checkpoint_id=ticket.name,
            training_step=ticket.step,
            run_id=self._adapter.flight.run_id,
            save_id=ticket.save_id,
            parts={
                "positional": True,
                "layers": [*layers.values()],
                "aliases": {},
                "extra_tensors": [],
            },
        )
        return self._adapter.metadata.to_bytes(manifest)

    def save_whole(self, name: str, training_step: int, chunks: int) -> int:
        adapter, tasks = self._adapter, [*self._newest.values()]
        steps = {task.training_step for task in tasks}
        if steps != {training_step}:
            has = f"those of steps {sorted(steps)}" if steps else "none"
            raise ValueError(
                f"there is no whole state of step {training_step} to be saved: of the layers that "
                f"came by save_layers_batch, the newest are {has}"
            )
        if training_step in self._given_up:
            raise ValueError(
                f"there is no whole state of step {training_step} to be saved: a layer of it was "
                "refused"
            )
        adapter.flight.raise_failures()
        self.seal()
        tensors = _named(tasks)
        file = _plan.MODEL_FILE
        layout, described = _plan.plan_loose(file, tensors, adapter.block_bytes, chunks)
        plan = _plan.BarePlan(["(state)"], layout, [])
        ticket = adapter.flight.begin_ticket(name, training_step, plan, origin=training_step)
        if ticket is None:
            return 0
        try:
            ticket.hand_over(0, [*tensors.values()])
            ticket.seal(self._manifest(ticket, _entries(tasks, described)))
        except BaseException as error:
            adapter.flight.give_up_ticket(ticket, f"{type(error).__name__}: {error}")
            raise
        ticket.open_all_gates()
        return layout.total_bytes


def _named(tasks: Sequence[SaveTask]) -> dict[str, torch.Tensor]:
    return {
        f"{task.layer_name}.{i}": tensor.detach()
        for task in tasks
        for i, tensor in enumerate(task.layer_params)
    }


def _entries(
    tasks: Sequence[SaveTask], described: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The manifest's entries of layers, given those of all their tensors, in the same order."""
    entries, at = {}, 0
    for task in tasks:
        end = at + len(task.layer_params)
        count = sum(tensor.numel() for tensor in task.layer_params)
        entries[task.layer_name] = _plan.describe(task.layer_name, described[at:end], count)
        at = end
    return entries


def _check_world(is_distributed: bool, rank: int, world_size: int) -> None:
    _whole_number("world_size", world_size, 1)
    _whole_number("rank", rank, 0, world_size - 1)
    if world_size != 1:
        raise NotImplementedError(
            "world_size over 1 is not in this version: give each rank a checkpoint_dir of its own "
            "and leave is_distributed, rank and world_size out"
        )


def _whole_number(name: str, value: object, least: int, most: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and value > most):  # type: ignore[operator]
        bound = f"{least} to {most}" if most is not None else f"{least} or more"
        raise ValueError(f"{name} must be a whole number, {bound}, not {value!r}")


def _positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not 0 < value < 1 << 40:
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return float(value)


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


def _directory(
    checkpoint_dir: str | os.PathLike[str] | None, checkpoint_file: str | os.PathLike[str]
) -> str:
    given, name = checkpoint_dir, "checkpoint_dir"
    if checkpoint_dir is None:
        given, name = checkpoint_file, "checkpoint_file"
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(given).__qualname__}")
    if not os.fspath(given):
        raise ValueError(f"{name} must name a directory, and is empty")
    return _names.directory_of(given) if checkpoint_dir is None else os.fspath(given)


def _seconds(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 1 << 40:
        raise ValueError(f"{name} must be a number of seconds, not {value!r}")
    return float(value)


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices[:-1])
        raise ValueError(f'{name} must be {listed} or "{choices[-1]}", not {value!r}')
