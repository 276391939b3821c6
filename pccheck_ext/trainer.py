"""LayerwiseCheckpointTrainer: the front door."""

from __future__ import annotations

import math
import os
import sys
import warnings
import weakref
from array import array
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from pccheck_ext import _C, _codec, _exit, _names, _restore, _rng
from pccheck_ext._saver import StepSaver
from pccheck_ext.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch
from pccheck_ext.layers import group_parameters_by_layer
from pccheck_ext.optimizer import LayerwiseOptimizer

__all__ = ["LayerwiseCheckpointTrainer"]

HISTORY = 10_000
"""How many of the newest losses are kept and saved."""

_MIB = 1 << 20
_MONITOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pccheck-monitor")
_DATA_WORDS = ("loader", "data", "sampler")


class LayerwiseCheckpointTrainer:
    """Trains with checkpoints: wraps an optimizer so that its step saves the state as it goes.

    ::

        trainer = LayerwiseCheckpointTrainer(model, optimizer, checkpoint_dir="runs/a",
                                             extra={"scheduler": scheduler, "loader": loader})
        start = trainer.resume("auto")
        for step in range(start, steps):
            loss = criterion(model(next(batches)), target)
            trainer.zero_grad()
            loss.backward()
            trainer.step(loss)
            scheduler.step()
        trainer.shutdown()

    A checkpoint of step s holds model (parameters, buffers), optimizer, `extra`, RNG states, step
    and loss history, all as of step s. Objects in `extra` that are data positions (iterable, or
    with loader, data or sampler in their name) and RNG states are read in `step()`; everything else
    when the step is sealed: by the next backward pass or `step()`, by `end_step()`, `wait()` or
    `shutdown()`, whichever comes first. So the loop may call ``scheduler.step()`` and
    ``scaler.update()`` after `step()` and fetch the next batch before the next forward. Where it
    draws random numbers in between (an evaluation through a DataLoader does), or runs another
    backward pass over these parameters before it calls ``scheduler.step()``, it says with
    `end_step()` where a step ends: RNG and data positions are read there again.

    Args:
        model: The module that is trained; inside DistributedDataParallel or torch.compile too.
        optimizer: A torch optimizer, or a `LayerwiseOptimizer`, over the model's parameters. Or
            `optimizer_class` and `optimizer_kwargs`.
        num_threads: Writer threads, 1 to 256.
        max_async: Checkpoints in flight; one more waits in `step()`.
        batch_size_mb, ratio: Their product, in MiB, is the staging memory.
        block_size_mb: MiB written at once; the staging memory must hold several.
        checkpoint_dir: The run's directory, held by one trainer at a time.
        checkpoint_every: Steps from one checkpoint to the next.
        keep_last: Checkpoints of steps kept; 0 keeps all. Custom ids are always kept.
        extra: Name -> object with ``state_dict()`` and ``load_state_dict()``.
        on_error: A failed checkpoint raises `CheckpointError` where the loop next calls in
            ("raise"), or warns and training goes on ("warn").
        save_gradients: Save ``.grad`` too, for loops that let gradients survive a step.
        verify_staged: Also compare checksums of the live tensors, twice a checkpoint, to find
            changes that PyTorch's version counters do not see. CPU time for certainty.
        checkpoint_chunk_count: Ranges in which `save_full_checkpoint` writes, in parallel.
        wait_for_chunks: `step()` and `save_full_checkpoint` return when durable.
        lock_timeout_s: How long to wait for another process to let go of the directory.
        use_monitor: Write from a process of its own, which commits what was sealed even if this
            one is killed.
        on_monitor_death: "restart" warns and goes on with a new monitor, "direct" warns and goes
            on without one, "raise" raises `CheckpointError`.
        drain_timeout_s: How long a monitor whose trainer was killed may take to commit the rest.

    Raises:
        ValueError, TypeError: an argument that cannot be; nothing has been written then.
        OSError: the directory cannot be made or locked.
        CheckpointError: another process holds the directory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        use_pccheck: bool = True,
        use_monitor: bool = False,
        num_threads: int = 4,
        max_async: int = 2,
        batch_size_mb: float = 100.0,
        ratio: float = 2.0,
        is_distributed: bool = False,
        rank: int = 0,
        world_size: int = 1,
        checkpoint_dir: str | os.PathLike[str] = "./checkpoints",
        c_lib_path: str | None = None,
        *,
        optimizer_class: Callable[..., Optimizer] | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        checkpoint_chunk_count: int = 1,
        wait_for_chunks: bool = False,
        device: str | torch.device | None = None,
        verbose: bool = False,
        checkpoint_every: int = 1,
        keep_last: int = 3,
        extra: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        save_gradients: bool = False,
        block_size_mb: float = 2.0,
        lock_timeout_s: float = 30.0,
        verify_staged: bool = False,
        on_monitor_death: str = "restart",
        drain_timeout_s: float = 60.0,
        _manual_copier: bool = False,
    ) -> None:
        _refuse_modes(use_pccheck, is_distributed, world_size)
        if c_lib_path is not None:
            warnings.warn("c_lib_path is ignored: the engine is built in", stacklevel=2)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
        _whole_number("num_threads", num_threads, 1, 256)
        _whole_number("max_async", max_async, 1, 1024)
        _whole_number("checkpoint_every", checkpoint_every, 1)
        _whole_number("keep_last", keep_last, 0)
        _whole_number("checkpoint_chunk_count", checkpoint_chunk_count, 1, 4096)
        staging = _positive("batch_size_mb", batch_size_mb) * _positive("ratio", ratio)
        block_bytes = max(1, round(_positive("block_size_mb", block_size_mb) * _MIB / 4096)) * 4096
        if staging * _MIB < 4 * block_bytes:
            raise ValueError(
                f"batch_size_mb x ratio = {staging:g} MiB of staging memory holds fewer than four "
                f"blocks of block_size_mb = {block_size_mb:g}; enlarge the former or shrink this"
            )
        if on_error not in ("raise", "warn"):
            raise ValueError(f'on_error must be "raise" or "warn", not {on_error!r}')
        if on_monitor_death not in ("restart", "direct", "raise"):
            raise ValueError(
                f'on_monitor_death must be "restart", "direct" or "raise", not {on_monitor_death!r}'
            )
        _check_extra(extra)
        if device is not None:
            model.to(device)
        base = _optimizer(model, optimizer, optimizer_class, optimizer_kwargs)
        _check_storable(model)

        self.model = model
        self.extra = dict(extra or {})
        self.verbose = verbose
        self.device = torch.device(device) if device is not None else None
        self.checkpoint_chunk_count = checkpoint_chunk_count
        self.wait_for_chunks = wait_for_chunks
        self.on_error = on_error
        self.checkpoint_dir = os.path.abspath(checkpoint_dir)  # wherever the process goes later
        self._losses, self._loss_steps = array("d"), array("q")
        self._owner = os.getpid()
        try:
            self._session = _C.Session(
                self.checkpoint_dir,
                block_bytes=block_bytes,
                staging_bytes=int(staging * _MIB),
                writer_threads=num_threads,
                max_in_flight=max_async,
                keep_last=keep_last,
                lock_timeout_s=float(lock_timeout_s),
                device=str(_device_of(model)),
                manual_copier=_manual_copier,
                verify_staged=verify_staged,
                monitor=_MONITOR if use_monitor else None,
                drain_timeout_s=_positive("drain_timeout_s", drain_timeout_s),
            )
        except RuntimeError as error:
            raise CheckpointError(str(error)) from None

        order_is_given = isinstance(base, LayerwiseOptimizer)
        if isinstance(base, LayerwiseOptimizer):
            self.optimizer = base
        else:
            layers = group_parameters_by_layer(model)
            self.optimizer = LayerwiseOptimizer(base, list(reversed(layers)), layers)
        self._saver = StepSaver(
            self._session,
            model,
            self.optimizer,
            extra=self.extra,
            at_step=frozenset(n for n, v in self.extra.items() if _is_data(n, v)),
            every=checkpoint_every,
            block_bytes=block_bytes,
            save_gradients=save_gradients,
            on_error=on_error,
            progress=self._progress,
            config={
                "checkpoint_every": checkpoint_every,
                "block_bytes": block_bytes,
                "save_gradients": save_gradients,
            },
            order_is_given=order_is_given,
            on_monitor_death=on_monitor_death,
        )
        self.optimizer._observer = self._saver
        self._gate = register_optimizer_step_pre_hook(_gate_hook(weakref.ref(self._saver)))
        self._gradient_watch = None if save_gradients else _SurvivingGradients(model)
        _exit.remember(self)

    # -- training ----------------------------------------------------------------------------------

    @property
    def training_step(self) -> int:
        """Optimizer steps done."""
        return self._saver.step

    @property
    def loss_history(self) -> list[float]:
        """The newest 10,000 losses that were given to `step`."""
        return self._losses[-HISTORY:].tolist()

    @property
    def step_history(self) -> list[int]:
        """The step of each loss in `loss_history`."""
        return self._loss_steps[-HISTORY:].tolist()

    @property
    def update_order(self) -> list[str]:
        """Layers in the order in which they are updated and saved."""
        return list(self.optimizer.layers)

    @property
    def order_source(self) -> str:
        """Where `update_order` is from: "gradients", "registration" or "given"."""
        return self._saver.order_source

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Take one optimizer step and save what is due; `loss` goes into the history.

        Raises CheckpointError for a checkpoint that failed since the last call, before anything is
        changed (unless ``on_error="warn"``).
        """
        if loss is not None:
            # Before the step: what it saves includes this loss. A voided step's is taken out again.
            self._losses.append(loss.item() if isinstance(loss, torch.Tensor) else float(loss))
            self._loss_steps.append(self._saver.step + 1)
        before = self._saver.step
        try:
            self.optimizer.step()
        finally:
            if loss is not None and self._saver.step == before:
                self._losses.pop()
                self._loss_steps.pop()
        if len(self._losses) > 2 * HISTORY:
            del self._losses[:-HISTORY], self._loss_steps[:-HISTORY]
        if self._gradient_watch is not None:
            self._gradient_watch.step_taken()
        if self.wait_for_chunks:
            # This step's own is sealed later, when the loop has done what belongs to it.
            self._saver.wait_sealed()

    def zero_grad(self) -> None:
        """Clear the gradients, as the optimizer's own ``zero_grad`` does."""
        self.optimizer.zero_grad()

    def train_step(
        self,
        inputs: Any,
        labels: Any,
        criterion: Callable[[Any, Any], torch.Tensor],
        enable_checkpoint: bool = True,
    ) -> float:
        """Clear gradients, forward, backward, step; the loss. Seals the step it takes."""
        if self.device is not None:
            inputs, labels = (
                x.to(self.device) if isinstance(x, torch.Tensor) else x for x in (inputs, labels)
            )
        self.zero_grad()
        loss = criterion(self.model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        self._saver.skip_next = not enable_checkpoint
        try:
            self.step(value)
        finally:
            self._saver.skip_next = False
        self.end_step()
        return value

    def end_step(self) -> None:
        """Say that everything that belongs to the step has been done: seals its checkpoint.

        RNG states and data positions are read again, now.
        """
        self._saver.seal(reread=True)
        if self.wait_for_chunks:
            self.wait()

    # -- saving ------------------------------------------------------------------------------------

    def save_full_checkpoint(self, checkpoint_id: str) -> None:
        """Save the whole state as it is now under a name of your own; it is never retired.

        Returns when the save is on its way (durable if ``wait_for_chunks``). Raises ValueError for
        a name that cannot be or is there already, CheckpointError as `step` does.
        """
        _names.check_id(checkpoint_id)
        if _names.step_of(checkpoint_id) not in (None, self.training_step):
            raise ValueError(
                f"checkpoint_id {checkpoint_id!r} names another step than {self.training_step}, "
                "the one to be saved"
            )
        if os.path.lexists(os.path.join(self.checkpoint_dir, checkpoint_id)):
            raise ValueError(
                f"checkpoint_id {checkpoint_id!r} is there already in {self.checkpoint_dir}; "
                "choose another name or remove it first"
            )
        self._saver.save_whole(checkpoint_id, self.checkpoint_chunk_count)
        if self.wait_for_chunks:
            self.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Seal what is pending and return when everything in flight is committed.

        Raises CheckpointError for what failed, TimeoutError when the time has passed first.
        """
        self._saver.seal()
        if not self._saver.wait(timeout_s):
            raise TimeoutError(f"checkpoints were still in flight after {timeout_s} s")
        self._saver.raise_failures()

    def shutdown(self) -> None:
        """Finish every save, or tell which failed, and let go of the directory. Again: no effect.

        In a forked child this does nothing: the saves are the parent's.
        """
        if os.getpid() != self._owner or not self._session.is_open:
            return
        try:
            self.wait()
        finally:
            self._gate.remove()
            if self._gradient_watch is not None:
                self._gradient_watch.close()
            self._saver.close()
            self.optimizer._observer = None
            self._last_stats = self.stats()
            _exit.forget(self)
            complaint = self._session.close()
            if complaint:
                warnings.warn(
                    f"clearing up after checkpoints: {complaint}", RuntimeWarning, stacklevel=2
                )

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is None or not session.is_open or os.getpid() != self._owner:
            return
        warnings.warn(
            f"a trainer over {self.checkpoint_dir} was dropped without shutdown(); its saves are "
            "being finished now",
            ResourceWarning,
            stacklevel=2,
        )
        try:
            self.shutdown()
        except Exception as error:  # nobody could catch it: tell
            print(f"pccheck_ext: {error}", file=sys.stderr)

    def __enter__(self) -> LayerwiseCheckpointTrainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.shutdown()
        except CheckpointError as failed:
            if error is None:
                raise
            # The loop's own error is what ends the program; this one is told beside it.
            warnings.warn(str(failed), RuntimeWarning, stacklevel=2)

    # -- restoring ---------------------------------------------------------------------------------

    def resume(self, checkpoint: str = "auto") -> int:
        """Load everything and return the step to go on from.

        ``"auto"`` takes the newest checkpoint that verifies, telling of those that do not by a
        warning; 0 where there is none at all. Otherwise the id of one. Later checkpoints are left
        aside as ``*.stale`` when the first new one is begun.

        Raises CheckpointMismatch where model, optimizer or `extra` are not those that were saved;
        CheckpointCorrupt where checkpoints are there but none verifies; CheckpointNotFound.
        """
        self._settle()
        if checkpoint != "auto":
            self._load(checkpoint, strict=True)
            return self.training_step
        candidates = _restore.newest_first(self.checkpoint_dir)
        for _, name in candidates:
            try:
                self._load(name, strict=True)
            except CheckpointMismatch:
                raise
            except (CheckpointCorrupt, OSError) as error:
                warnings.warn(
                    f"checkpoint {name} cannot be used, trying the one before it: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            return self.training_step
        if candidates:
            names = ", ".join(name for _, name in candidates)
            raise CheckpointCorrupt(f"no checkpoint in {self.checkpoint_dir} verifies: {names}")
        return 0

    def load_checkpoint(self, checkpoint_id: str) -> list[str]:
        """Load everything from one checkpoint; returns the layers that it has nothing of.

        Raises as `resume` does, but for layers that are missing.
        """
        self._settle()
        return self._load(checkpoint_id, strict=False)

    def _settle(self) -> None:
        """What is in flight still reads the tensors that are about to be overwritten."""
        self.wait()
        self._saver.open_gates()

    def _load(self, checkpoint_id: str, *, strict: bool) -> list[str]:
        stored = _restore.open_checkpoint(self.checkpoint_dir, checkpoint_id)
        stored.read_ahead()
        restored = _restore.restore_model(stored, self.model, strict=strict)
        saved = stored.manifest["extra"]
        if sorted(saved) != sorted(self.extra):
            raise CheckpointMismatch(
                f"{stored.path} was saved with extra={sorted(saved)}, this trainer has "
                f"{sorted(self.extra)}; give it the same objects"
            )
        extra = stored.extra_tensors()
        optimizer = _restore.OptimizerRestore(
            stored, self.model, self.optimizer.base_optimizer, extra
        )
        values = {name: _restore.decoded(saved[name], extra, f"extra.{name}") for name in saved}
        progress = _codec.decode(stored.manifest["progress"], extra, path="progress")
        rng = _codec.decode(stored.manifest["rng"], extra, path="rng")

        gradients = _restore.GradientRestore(stored, self.model, self.optimizer.base_optimizer)
        stored.read([*restored.pairs, *optimizer.pairs, *gradients.pairs])
        optimizer.apply()
        gradients.apply()
        _restore.restore_extra_state(stored, self.model, restored, extra)
        for name, value in values.items():
            self.extra[name].load_state_dict(value)
        self._saver.restart_from(stored.step)
        self.optimizer.training_step = stored.step
        self._losses = array("d", progress["losses"].tolist())
        self._loss_steps = array("q", progress["loss_steps"].tolist())
        _rng.restore(rng)  # last: anything above may have drawn
        return restored.missing_layers

    def _progress(self) -> dict[str, Any]:
        return {
            "losses": _newest(self._losses, torch.float64),
            "loss_steps": _newest(self._loss_steps, torch.int64),
        }

    # -- looking at it -----------------------------------------------------------------------------

    _last_stats: dict[str, Any] | None = None

    def stats(self) -> dict[str, Any]:
        """Counts, bytes and seconds so far.

        ``stall_s``: seconds training was held, in all; ``stall_per_checkpoint_s``: mean;
        ``durable_s_mean``, ``durable_s_last``: seconds from a checkpoint's begin to its commit;
        ``lag_steps``: steps between the newest update and the newest committed checkpoint.
        """
        if not self._session.is_open:
            return dict(self._last_stats or {})
        stats = self._session.stats()
        committed = stats["checkpoints_committed"]
        saved = self._saver.steps_saved
        total = stats.pop("durable_s_total")
        stats["durable_s_mean"] = total / committed if committed else math.nan
        failed = stats["checkpoints_failed"] - self._saver.given_up
        stats["checkpoints_failed"] = max(0, failed)  # those given up may not have ended yet
        stats["stall_s"] = self._saver.stall_s
        stats["stall_per_checkpoint_s"] = self._saver.stall_s / saved if saved else math.nan
        stats["lag_steps"] = self.training_step - stats["last_committed_step"]
        return stats


class _SurvivingGradients:
    """Warns, once, when gradients of one step are still there in the next backward pass.

    They are then part of what the next step sees, and a checkpoint without them does not continue
    bit for bit. Looks at one small parameter in the first backward pass after each of the first
    steps.
    """

    _LOOKS = 3

    def __init__(self, model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf and p.numel()]
        self._armed = False
        self._looks = 0
        self._hook = None
        if trained:
            smallest = min(trained, key=torch.Tensor.numel)
            reference = weakref.ref(smallest)
            self._hook = smallest.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._look(reference())
            )

    def step_taken(self) -> None:
        self._armed = True

    def _look(self, parameter: torch.Tensor | None) -> None:
        if not self._armed or parameter is None:
            return
        self._armed = False
        self._looks += 1
        survived = parameter.grad is not None and bool(parameter.grad.any())
        if survived:
            warnings.warn(
                "gradients of the last step are still there in this backward pass: they are part "
                "of the training state, but not of the checkpoints. Call zero_grad() after each "
                "step, or give the trainer save_gradients=True",
                RuntimeWarning,
                stacklevel=2,
            )
        if survived or self._looks == self._LOOKS:
            self.close()

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _newest(history: array[Any], dtype: torch.dtype) -> torch.Tensor:
    """A copy of the end of the history, without a Python object for each entry."""
    if not history:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(history, dtype=dtype)[-HISTORY:].clone()


def _gate_hook(saver: weakref.ref[StepSaver]) -> Callable[..., None]:
    def gate(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        there = saver()
        if there is not None:
            there.gate_optimizer(optimizer)

    return gate


def _refuse_modes(use_pccheck: bool, is_distributed: bool, world_size: int) -> None:
    wanted = None
    if not use_pccheck:
        wanted = "use_pccheck=False (mock mode)"
    elif is_distributed or world_size != 1:
        wanted = "is_distributed=True or world_size over 1"
    if wanted is not None:
        raise NotImplementedError(
            f"{wanted} is not in this version; it has direct mode on one process"
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


def _optimizer(
    model: nn.Module,
    optimizer: Optimizer | None,
    optimizer_class: Callable[..., Optimizer] | None,
    optimizer_kwargs: Mapping[str, Any] | None,
) -> Optimizer:
    if (optimizer is None) == (optimizer_class is None):
        raise ValueError("give either optimizer or optimizer_class (with optimizer_kwargs)")
    if optimizer_class is not None:
        return optimizer_class(model.parameters(), **(optimizer_kwargs or {}))
    if optimizer_kwargs is not None:
        raise ValueError("optimizer_kwargs goes with optimizer_class; the optimizer is there")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__qualname__}"
        )
    return optimizer


def _check_extra(extra: Mapping[str, Any] | None) -> None:
    for name, value in (extra or {}).items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"extra must be named by strings, not {name!r}")
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(value, method, None)):
                raise TypeError(
                    f"extra[{name!r}] is a {type(value).__qualname__} without {method}(); give "
                    "objects that have state_dict() and load_state_dict()"
                )


def _check_storable(model: nn.Module) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            _C.dtype_name(tensor, name)


def _is_data(name: str, value: object) -> bool:
    if isinstance(value, (nn.Module, Optimizer)):
        return False
    words = name.lower()
    return (
        hasattr(value, "__iter__")
        or hasattr(value, "__next__")
        or any(word in words for word in _DATA_WORDS)
    )


def _device_of(model: nn.Module) -> torch.device:
    devices = {t.device for t in model.state_dict(keep_vars=True).values() if torch.is_tensor(t)}
    others = sorted(str(device) for device in devices if device.type != "cpu")
    if len(others) > 1:
        raise ValueError(f"the model's tensors are on several devices: {', '.join(others)}")
    return torch.device(others[0] if others else "cpu")
