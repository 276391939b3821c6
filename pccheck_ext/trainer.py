"""LayerwiseCheckpointTrainer: the front door."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pccheck_ext import _C, _codec, _exit, _restore, _rng
from pccheck_ext._names import step_id
from pccheck_ext._order import OrderWatch
from pccheck_ext._policy import Best, Interval
from pccheck_ext._saver import StepSaver
from pccheck_ext._sigterm import Sigterm
from pccheck_ext.adapter import PCCheckAdapter
from pccheck_ext.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
)
from pccheck_ext.graph import DependencyGraphBuilder
from pccheck_ext.layers import group_parameters_by_layer
from pccheck_ext.optimizer import LayerwiseOptimizer
from pccheck_ext.recovery import ModelRecovery
from pccheck_ext.scheduler import LayerwiseCheckpointScheduler

__all__ = ["LayerwiseCheckpointTrainer"]

HISTORY = 10_000
"""How many of the newest losses are kept and saved."""

_AT_ONCE_MB = 1 / (1 << 20)  # a byte: any layer fills the scheduler's buffer
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

    The loop may as well go on calling ``optimizer.step()`` itself: the trainer hears of it by the
    optimizer's hooks, counts the step and saves what is due, layer by layer after the update.

    Args:
        model: The module that is trained; inside DistributedDataParallel or torch.compile too.
        optimizer: A torch optimizer, or a `LayerwiseOptimizer`, over the model's parameters. Or
            `optimizer_class` and `optimizer_kwargs`.
        use_pccheck: False is mock mode: nothing touches the disk, `adapter.recorded` tells what
            would have been saved.
        use_monitor: Write from a process of its own, which commits what was sealed even if this
            one is killed.
        num_threads: Writer threads, 1 to 256.
        max_async: Checkpoints in flight; one more waits in `step()`.
        batch_size_mb, ratio: Their product, in MiB, is the staging memory.
        checkpoint_dir: The run's directory, held by one trainer at a time.
        checkpoint_chunk_count: Ranges in which `save_full_checkpoint` writes, in parallel, or
            "auto".
        wait_for_chunks: `train_step`, `end_step` and `save_full_checkpoint` return when durable;
            `step`, after which the loop still has to do what belongs to the step (a scheduler's
            step), when the one before is.
        checkpoint_every: Steps from one checkpoint to the next (1), or "continuous": the next one
            starts at the first step at which none is in flight.
        checkpoint_every_s: Seconds from one checkpoint to the next, instead or as well.
        keep_last: Checkpoints of steps kept; 0 keeps all. Custom ids are always kept.
        keep_every: Steps that are multiples of this are kept, too; 0: none.
        keep_best: ``("loss", "min")``: the best checkpoint by a metric is kept, too. The loss is
            that given to `step`, others are told by `report_metric`.
        buffer_size_mb: MiB of updated parameters that are handed to the adapter at a time; None:
            each layer at once.
        extra: Name -> object with ``state_dict()`` and ``load_state_dict()``.
        on_error: A failed checkpoint raises `CheckpointError` where the loop next calls in
            ("raise"), or warns and training goes on ("warn").
        save_gradients: Save ``.grad`` too, for loops that let gradients survive a step.
        block_size_mb: MiB written at once; the staging memory must hold several.
        lock_timeout_s: How long to wait for another process to let go of the directory.
        verify_staged: Also compare checksums of the live tensors, twice a checkpoint, to find
            changes that PyTorch's version counters do not see. CPU time for certainty.
        on_monitor_death: "restart" warns and goes on with a new monitor, "direct" warns and goes
            on without one, "raise" raises `CheckpointError`.
        drain_timeout_s: How long a monitor whose trainer was killed may take to commit the rest.
        sigterm_deadline_s: Handle SIGTERM: training ends between two steps with its newest state
            committed, within so many seconds, or it is said what was lost. None: not handled.
        example_inputs: What forward is called with, as `DependencyGraphBuilder` takes it, to find
            the layers' order by; None: copies without data of what the first forward is given.
        incremental: Give every layer files of its own and write only those whose bytes differ, by
            a digest of 128 bits, from the last committed checkpoint's; the others become hard links
            to these. For states of which much stays the same, such as a frozen body's; where every
            layer changes it is slower, for many files have to be made durable.

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
        checkpoint_chunk_count: int | str = 1,
        wait_for_chunks: bool = False,
        device: str | torch.device | None = None,
        verbose: bool = False,
        checkpoint_every: int | str | None = None,
        checkpoint_every_s: float | None = None,
        keep_last: int = 3,
        keep_every: int = 0,
        keep_best: tuple[str, str] | None = None,
        buffer_size_mb: float | None = None,
        extra: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        save_gradients: bool = False,
        block_size_mb: float = 2.0,
        lock_timeout_s: float = 30.0,
        verify_staged: bool = False,
        on_monitor_death: str = "restart",
        drain_timeout_s: float = 60.0,
        sigterm_deadline_s: float | None = None,
        example_inputs: Any = None,
        incremental: bool = False,
        _manual_copier: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
        interval = Interval.of(checkpoint_every, checkpoint_every_s)
        best = Best.of(keep_best)
        _check_chunk_count(checkpoint_chunk_count)
        if buffer_size_mb is not None:
            _positive("buffer_size_mb", buffer_size_mb)
        if sigterm_deadline_s is not None:
            _positive("sigterm_deadline_s", sigterm_deadline_s)
            Sigterm.check_thread()
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
        self._losses, self._loss_steps = array("d"), array("q")
        self._metrics: dict[str, tuple[int, float]] = {}  # with the step of each
        self._owner = os.getpid()

        order: OrderWatch | None = None
        if not isinstance(base, LayerwiseOptimizer):
            order = OrderWatch(model, example_inputs, verbose)
        try:
            self.adapter = PCCheckAdapter(
                c_lib_path,
                num_threads=num_threads,
                max_async=max_async,
                batch_size_mb=batch_size_mb,
                ratio=ratio,
                use_pccheck=use_pccheck,
                use_monitor=use_monitor,
                is_distributed=is_distributed,
                rank=rank,
                world_size=world_size,
                verbose=verbose,
                checkpoint_dir=checkpoint_dir,
                block_size_mb=block_size_mb,
                keep_last=keep_last,
                keep_every=keep_every,
                on_error=on_error,
                lock_timeout_s=lock_timeout_s,
                device=_device_of(model),
                verify_staged=verify_staged,
                on_monitor_death=on_monitor_death,
                drain_timeout_s=drain_timeout_s,
                _manual_copier=_manual_copier,
            )
        except BaseException:
            if order is not None:
                order.close()
            raise
        self.checkpoint_dir = self.adapter.directory
        self.scheduler = LayerwiseCheckpointScheduler(
            self.adapter.save_layers_batch,
            buffer_size_mb or _AT_ONCE_MB,
            async_save=False,
            verbose=verbose,
        )
        self.metadata_manager = self.adapter.metadata
        self.recovery = ModelRecovery(self.checkpoint_dir)
        self._session = self.adapter.session
        if isinstance(base, LayerwiseOptimizer):
            self.optimizer = base
        else:
            layers = group_parameters_by_layer(model)
            self.optimizer = LayerwiseOptimizer(base, list(reversed(layers)), layers)
        self._saver = StepSaver(
            self.adapter,
            self.scheduler,
            model,
            self.optimizer,
            extra=self.extra,
            at_step=frozenset(n for n, v in self.extra.items() if _is_data(n, v)),
            interval=interval,
            best=best,
            save_gradients=save_gradients,
            progress=self._progress,
            metrics=self._metrics_of_step,
            config={
                "optimizer": type(self.optimizer.base_optimizer).__qualname__,
                "checkpoint_every": checkpoint_every,
                "checkpoint_every_s": checkpoint_every_s,
                "keep_last": keep_last,
                "keep_every": keep_every,
                "keep_best": list(keep_best) if keep_best is not None else None,
                "use_monitor": use_monitor,
                "num_threads": num_threads,
                "max_async": max_async,
                "staging_mb": batch_size_mb * ratio,
                "buffer_size_mb": buffer_size_mb,
                "block_bytes": self.adapter.block_bytes,
                "checkpoint_chunk_count": checkpoint_chunk_count,
                "save_gradients": save_gradients,
                "incremental": incremental,
            },
            order=order,
            incremental=incremental,
        )
        self.optimizer._observer = self._saver
        self._hooks = [
            register_optimizer_step_pre_hook(_pre_hook(weakref.ref(self._saver))),
            register_optimizer_step_post_hook(_post_hook(weakref.ref(self))),
        ]
        self._gradient_watch = None if save_gradients else _SurvivingGradients(model)
        self._sigterm: Sigterm | None = None
        if sigterm_deadline_s is not None:
            myself = weakref.ref(self)
            self._sigterm = Sigterm(sigterm_deadline_s, lambda: _lost(myself()))
            self._saver.at_boundary = lambda: _end_if_told(myself())
        _exit.forget(self.adapter)  # it is this object that ends it
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
        """Where `update_order` is from: "data flow", "gradients", "registration" or "given".

        Found out before the first step that is saved; "registration" until then.
        """
        return self._saver.order_source

    @property
    def order_reason(self) -> str:
        """Why the order is from there, and not from the data flow if it is not."""
        return self._saver.order_reason

    @property
    def graph_builder(self) -> DependencyGraphBuilder | None:
        """What found the order out; None before that, and where the order was given."""
        return self._saver.graph_builder

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Take one optimizer step and save what is due; `loss` goes into the history.

        Raises CheckpointError for a checkpoint that failed since the last call, before anything is
        changed (unless ``on_error="warn"``).
        """
        self._require_open()
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
        self._step_taken()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                f"the trainer of {self.checkpoint_dir} was shut down, and what it trains would not "
                "be saved; make a new one, or go on with the optimizer alone"
            )

    def _step_taken(self) -> None:
        if self._gradient_watch is not None:
            self._gradient_watch.step_taken()
        if self.wait_for_chunks:
            # This step's own is sealed later, when the loop has done what belongs to it.
            self._saver.wait_sealed()

    def _stepped_by_itself(self, optimizer: Optimizer) -> None:
        if self._saver.optimizer_stepped(optimizer):
            self._step_taken()

    def report_metric(self, name: str, value: torch.Tensor | float) -> None:
        """A number of the step to come, for `keep_best` and the manifest: before `step()`.

        The loss that `step` is given is there already, as "loss".
        """
        number = value.item() if isinstance(value, torch.Tensor) else value
        if not isinstance(number, (int, float)):
            raise TypeError(f"metric {name!r} must be a number, not {number!r}")
        self._metrics[name] = (self._saver.step + 1, float(number))

    def _metrics_of_step(self) -> dict[str, float]:
        step = self._saver.step
        metrics = {name: value for name, (of, value) in self._metrics.items() if of == step}
        if self._losses and self._loss_steps[-1] == step:
            metrics["loss"] = self._losses[-1]
        return metrics

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
        self._require_open()
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
        self.adapter.save_entire_checkpoint_in_chunks(
            checkpoint_id, self.training_step, self.checkpoint_chunk_count
        )
        if self.wait_for_chunks:
            self.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Seal what is pending and return when everything in flight is committed.

        Raises CheckpointError for what failed, TimeoutError, naming what is still in flight, when
        `timeout_s` seconds have passed first (None: waits on).
        """
        if not self._saver.wait(timeout_s):
            raise TimeoutError(self.adapter.flight.still_in_flight(timeout_s))
        self._saver.raise_failures()

    exit_timeout_s: float | None = None

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Finish every save, or tell which failed, and let go of the directory. Again: no effect.

        Raises CheckpointError for what failed, TimeoutError, naming what is still in flight, when
        `timeout_s` seconds have passed first (None: waits on). Then everything goes on, and it may
        be called again; the end of the process waits no longer for it, but says what is lost. In a
        forked child this does nothing: the saves are the parent's.
        """
        if os.getpid() != self._owner or not self._session.is_open:
            return
        until = None if timeout_s is None else time.monotonic() + timeout_s
        unsealed: Exception | None = None
        try:
            self._saver.seal_last()
        except Exception as error:  # told of when the steps before are safe
            unsealed = error
        try:
            self.wait(timeout_s)
        except TimeoutError as error:
            self.do_not_wait_at_exit()
            raise error from unsealed
        except CheckpointError as error:  # what has failed has ended; an interrupt changes nothing
            self._close(until)
            raise error from unsealed
        self._close(until)
        if unsealed is not None:
            raise unsealed

    def do_not_wait_at_exit(self) -> None:
        """Nor when this is dropped: it has been waited for in vain."""
        self.exit_timeout_s = 0.0
        self.adapter.do_not_wait_at_exit()

    _closed = False

    def _close(self, until: float | None) -> None:
        best = None if self._closed else self._saver.best
        self._closed = True
        if best is not None and not best.was_told and self._saver.steps_saved:
            warnings.warn(
                f'keep_best=("{best.metric}", "{best.mode}") has kept nothing: no step that was '
                f"saved told {best.metric!r}; give it to report_metric(), or a loss to step()",
                RuntimeWarning,
                stacklevel=3,
            )
        for hook in self._hooks:
            hook.remove()
        if self._gradient_watch is not None:
            self._gradient_watch.close()
        self._saver.close()
        self.optimizer._observer = None
        self._last_stats = self.stats()
        try:
            self.adapter.shutdown(None if until is None else max(0.0, until - time.monotonic()))
        except TimeoutError:  # all goes on, and this may be called again
            self.do_not_wait_at_exit()
            raise
        finally:
            if not self._session.is_open:
                _exit.forget(self)
                if self._sigterm is not None:
                    self._sigterm.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is None or not session.is_open or os.getpid() != self._owner:
            return
        if sys.is_finalizing():
            return  # as has been told
        warnings.warn(
            f"a trainer over {self.checkpoint_dir} was dropped without shutdown(); its saves are "
            "being finished now",
            ResourceWarning,
            stacklevel=2,
        )
        try:
            self.shutdown(self.exit_timeout_s)
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
        aside as ``*.stale`` when the first new one is begun. Mock mode looks at no disk: there is
        no checkpoint in it.

        Raises CheckpointMismatch where model, optimizer or `extra` are not those that were saved;
        CheckpointCorrupt where checkpoints are there but none verifies; CheckpointNotFound.
        """
        self._settle()
        if checkpoint != "auto":
            self._load(checkpoint, strict=True)
            return self.training_step
        mock = self.adapter.mode == "mock"
        candidates = [] if mock else _restore.newest_first(self.checkpoint_dir)
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

    def start_at(
        self, step: int, losses: Sequence[float] = (), loss_steps: Sequence[int] = ()
    ) -> None:
        """Count from `step`: for a state that was loaded by other means than `resume`.

        Checkpoints of later steps that are in the directory are left aside, as after `resume`.
        `losses` and the steps they are of become the history. Raises ValueError for what cannot be.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step must be a whole number, 0 or more, not {step!r}")
        if len(losses) != len(loss_steps):
            raise ValueError(f"{len(losses)} losses of {len(loss_steps)} steps")
        self._settle()
        self._saver.restart_from(step)
        self.optimizer.training_step = step
        self._losses, self._loss_steps = array("d", losses), array("q", loss_steps)

    def load_checkpoint(self, checkpoint_id: str) -> list[str]:
        """Load everything from one checkpoint; returns the layers that it has not all of.

        Layers of the model that the checkpoint has nothing of stay as they are, their optimizer
        state too. Otherwise raises as `resume` does.
        """
        self._settle()
        return self._load(checkpoint_id, strict=False)

    def _settle(self) -> None:
        """What is in flight still reads the tensors that are about to be overwritten."""
        self.wait()
        self._saver.open_gates()

    def _load(self, checkpoint_id: str, *, strict: bool) -> list[str]:
        if self.adapter.mode == "mock":
            raise CheckpointNotFound(
                f"no checkpoint {checkpoint_id!r}: mock mode saves and reads none. Load it with "
                "ModelRecovery, or with a trainer with use_pccheck=True"
            )
        stored = _restore.open_checkpoint(self.checkpoint_dir, checkpoint_id)
        stored.require_whole_state()
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
        if self._saver.best is not None:
            _find_metrics(self._saver.best, self.checkpoint_dir)
        if self._saver.incremental:
            stored.become_base(self._session)
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
        ``bytes_persisted``, ``bytes_linked``: payload of committed checkpoints that was written,
        and that is shared with older ones; ``links_refused``: unchanged files written all the same;
        ``lag_steps``: steps between the newest update and the newest committed checkpoint.
        """
        if not self._session.is_open:
            return dict(self._last_stats or {})
        stats = self._session.stats()
        committed = stats["checkpoints_committed"]
        saved = self._saver.steps_saved
        total = stats.pop("durable_s_total")
        stats["durable_s_mean"] = total / committed if committed else math.nan
        failed = stats["checkpoints_failed"] - self.adapter.flight.given_up
        stats["checkpoints_failed"] = max(0, failed)  # those given up may not have ended yet
        stats["stall_s"] = self._saver.stall_s
        stats["stall_per_checkpoint_s"] = self._saver.stall_s / saved if saved else math.nan
        stats["lag_steps"] = self.training_step - self._saver.flight.newest(
            stats, "last_committed_step"
        )
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


def _pre_hook(saver: weakref.ref[StepSaver]) -> Callable[..., None]:
    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        there = saver()
        if there is not None:
            there.gate_optimizer(optimizer)

    return before


def _post_hook(trainer: weakref.ref[LayerwiseCheckpointTrainer]) -> Callable[..., None]:
    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        there = trainer()
        if there is not None:
            there._stepped_by_itself(optimizer)

    after.changes_nothing = True  # type: ignore[attr-defined]  # layers are final before it has run
    return after


def _find_metrics(best: Best, directory: str) -> None:
    """What the checkpoints that are there already are worth."""
    for step, name in _restore.newest_first(directory):
        if name != step_id(step):
            continue
        try:
            manifest = _restore.open_checkpoint(directory, name).manifest
            metrics = _codec.decode(manifest.get("metrics", {}), {}, path="metrics")
        except (CheckpointCorrupt, _codec.DecodeError, OSError):
            continue
        if isinstance(metrics, dict):
            best.found(step, {k: v for k, v in metrics.items() if isinstance(v, float)})


def _lost(trainer: LayerwiseCheckpointTrainer | None) -> str:
    """What is lost if the process ends now."""
    if trainer is None:
        return "its trainer is gone"
    step = trainer.training_step
    safe = trainer.adapter.flight.newest(trainer.stats(), "last_sealed_step")
    where = trainer.checkpoint_dir
    if safe >= step:
        return f"step {step} is saved in {where}; nothing is lost but the step under way"
    if safe == 0:
        return f"nothing is saved in {where}: steps 1 to {step} are lost"
    return f"step {safe} is saved in {where}; steps {safe + 1} to {step} are lost"


def _end_if_told(trainer: LayerwiseCheckpointTrainer | None) -> None:
    """Between two steps: after SIGTERM, ends with the newest state saved, or sees to it."""
    if trainer is None or trainer._sigterm is None or not trainer._sigterm.received:
        return
    saver, sigterm = trainer._saver, trainer._sigterm
    if saver.last_saved != saver.step:
        saver.save_next = True  # RNG and data have moved on since: the next step is the last
        return
    saver.seal()
    try:
        trainer.shutdown(sigterm.left_s)
    except CheckpointError as error:
        print(f"pccheck_ext: {error}", file=sys.stderr)
    except TimeoutError:
        sigterm.deadline_has_passed()
    sigterm.end()


def _check_chunk_count(value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096
    if not whole and value != "auto":
        raise ValueError(
            f'checkpoint_chunk_count must be a whole number, 1 to 4096, or "auto", not {value!r}'
        )


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
