"""Saving while training: watches the optimizer's step and feeds scheduler and adapter.

Step s is begun before its first layer is updated, each layer is handed over once it has been, and
the step is sealed when the loop has done what belongs to it (see `StepSaver.seal`). Everything here
runs while the training thread waits for it, on that thread or, called by a gradient's hook, on
autograd's; the time it takes is the stall.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pccheck_ext import _codec, _plan, _rng
from pccheck_ext._flight import Begun, Ticket
from pccheck_ext._names import step_id
from pccheck_ext._order import OrderWatch
from pccheck_ext._plan import PlanChangedError, SavePlan
from pccheck_ext._policy import Best, Interval
from pccheck_ext.adapter import PCCheckAdapter
from pccheck_ext.graph import DependencyGraphBuilder
from pccheck_ext.optimizer import LayerwiseOptimizer
from pccheck_ext.scheduler import LayerwiseCheckpointScheduler

__all__ = ["StepSaver"]

_UNFINISHED = "the optimizer's step did not end"  # it raised, where the loop took it by itself


@dataclass
class _AtStep:
    """What belongs to a step and changes before it is sealed: read when the step was taken."""

    rng: dict[str, Any]
    data: dict[str, Any]
    optimizer_state: dict[str, Any]
    unbound_state: Any
    model: Any  # what modules return from get_extra_state: forward may change it
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]
    metrics: dict[str, float]


class _FirstGradient:
    """Tells a saver when a backward pass is under way.

    A hook on every parameter would cost a call for each in each pass. The first and the last layer
    in update order stand for all: hardly a pass leaves out both.
    """

    def __init__(self, saver: weakref.ref[StepSaver]) -> None:
        self._saver = saver
        self._hooks: dict[torch.Tensor, Any] = {}

    def watch(self, layers: Mapping[str, list[torch.Tensor]]) -> None:
        trained = [[p for p in own if p.requires_grad and p.is_leaf] for own in layers.values()]
        trained = [own for own in trained if own]
        for parameter in [p for own in trained[:1] + trained[-1:] for p in own]:
            if parameter not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._told)  # type: ignore[no-untyped-call]
                self._hooks[parameter] = hook

    def _told(self, _: torch.Tensor) -> None:
        saver = self._saver()
        if saver is not None:
            saver.gradient_arrived()

    def close(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()


class StepSaver:
    """A `StepObserver` that makes a checkpoint of the steps that `interval` makes due.

    `progress` is called for the step count and history to save, `metrics` for the numbers that
    `best` goes by; `extra` holds the objects with a ``state_dict()``, of which those in `at_step`
    are read at the step and the others at the seal. `clock` is in seconds.
    """

    def __init__(
        self,
        adapter: PCCheckAdapter,
        scheduler: LayerwiseCheckpointScheduler,
        model: nn.Module,
        optimizer: LayerwiseOptimizer,
        *,
        extra: Mapping[str, Any],
        at_step: frozenset[str],
        interval: Interval,
        best: Best | None,
        save_gradients: bool,
        progress: Callable[[], dict[str, Any]],
        metrics: Callable[[], dict[str, float]],
        config: dict[str, Any],
        order: OrderWatch | None,
        incremental: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.adapter = adapter
        self.flight = adapter.flight
        self.flight.ended = self._ended
        self.scheduler = scheduler
        self.model = model
        self.optimizer = optimizer
        self.extra = dict(extra)
        self.at_step = at_step
        self.interval = interval
        self.best = best
        self.save_gradients = save_gradients
        self.progress = progress
        self.metrics = metrics
        self.config = config
        self.incremental = incremental
        self.clock = clock
        self._owner = os.getpid()
        self.step = 0
        self.skip_next = False
        self.save_next = False
        self.last_saved = -1  # the newest step that was handed over whole
        self.at_boundary: Callable[[], None] | None = None  # between two steps; may raise
        self.stall_s = 0.0
        self.steps_saved = 0
        self._due = False  # whether the step that is being taken is to be saved
        self._last_begun = self._begun_at = clock()
        self._plan: SavePlan | None = None
        self._whole_plan: SavePlan | None = None
        self._whole_chunks = 0  # of that plan
        self._extra_planner = _plan.ExtraPlanner(adapter.block_bytes)
        self._begun: Begun | None = None  # this step's, between before_step and after_step
        self._pending: tuple[Begun, _AtStep] | None = None  # taken, not sealed
        self._arrival = _FirstGradient(weakref.ref(self))
        self._listed: dict[str, list[torch.Tensor]] = {}  # by layer, what the optimizer updates
        self.order_source = "given" if order is None else "registration"
        self.order_reason = (
            "the optimizer came with its layers in order"
            if order is None
            else "no step has been saved yet, before which the order is found out"
        )
        self.graph_builder: DependencyGraphBuilder | None = None
        self._order = order
        adapter.bind(self._save_whole, self._state_bytes, self._unsealed)

    # -- StepObserver ------------------------------------------------------------------------------

    def before_step(self) -> bool:
        if self.at_boundary is not None:
            self.at_boundary()
        self._due = self._is_due()
        if self._pending is None and self.flight.is_idle and not self._due:
            # Most steps, where few are saved: nothing to look after.
            if self.flight.monitor_has_died:
                self.flight.survive_monitor()
            return False
        start = time.perf_counter()
        try:
            if self._begun is not None:
                self._abandon_begun(_UNFINISHED)
            if self.flight.monitor_has_died:
                self.seal()
                self.flight.survive_monitor()
            self.raise_failures(survive=True)
            self.seal()
            self.flight.open_gates_of_staged()
            if not self._due:
                return False
            self._settle_order()
            plan = self._plan
            if plan is None or not plan.still_fits(self.optimizer):
                return False  # planned once the step has made its state
            name = step_id(self.step + 1)
            self._begun = self._begin(name, self.step + 1, plan, during_update=True)
            return self._begun is not None
        finally:
            self.stall_s += time.perf_counter() - start

    def before_update(self, layer: str | None) -> None:
        if not self.flight.gated:
            return  # as for most layers, where staging keeps up
        start = time.perf_counter()
        self.flight.pass_gates(layer, self._begun)
        self.stall_s += time.perf_counter() - start

    def after_layer(self, layer: str) -> None:
        begun = self._begun
        if begun is None or begun.ticket.leaves_time_to_update():
            return  # handed over with the rest, once the update has ended
        start = time.perf_counter()
        index = begun.plan.index.get(layer)
        try:
            if index is not None:
                self._add_task(begun, index)
        except PlanChangedError:
            # Planned anew once the step is done.
            self._abandon_begun("the set of tensors changed during the step")
        self.stall_s += time.perf_counter() - start

    def after_step(self, applied: bool) -> None:
        if not applied:
            self._abandon_begun("the step was voided by the gradient scaler")
            return
        self.skip_next = self.save_next = False
        self.step += 1
        if self._order is not None:
            self._order.stop()
        if not self._due:
            self._begun = None
            return
        start = time.perf_counter()
        try:
            self._finish_step()
        finally:
            self.stall_s += time.perf_counter() - start

    def abort_step(self, error: BaseException) -> None:
        self._abandon_begun(f"the optimizer's step raised {type(error).__name__}: {error}")

    # -- steps -------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        if self.skip_next or self.save_next:
            return self.save_next
        interval = self.interval
        if interval.seconds is None and not interval.continuous:
            return interval.due(self.step + 1, 0.0, 0)
        since = self.clock() - self._last_begun
        return interval.due(self.step + 1, since, self.flight.count())

    def _settle_order(self) -> None:
        if self._order is None:
            return
        self.graph_builder = builder = self._order.settle()
        self._order = None
        self.optimizer.set_update_order(
            builder.get_update_order(), builder.group_parameters_by_layer()
        )
        self.order_source, self.order_reason = builder.order_source, builder.order_reason

    def _finish_step(self) -> None:
        begun, self._begun = self._begun, None
        # A first save's order is known by now even where the step before was not to be saved.
        self._settle_order()
        # Gates of an older checkpoint: a step taken whole has passed them all, one by layers too.
        self.flight.gated = [older for older in self.flight.gated if older is begun]
        if begun is None or not self._complete(begun):
            begun = self._begin_planned_now(step_id(self.step), whole=False)
            if begun is None:
                return
            if not self._complete(begun):
                raise RuntimeError("the set of tensors changes while it is being read")
        self.steps_saved += 1
        self.last_saved = self.step
        self._last_begun = self._begun_at  # not where the step was voided: the next is due then

    def _complete(self, begun: Begun) -> bool:
        """Hand over what is left and read what belongs to the step. False: the plan is outdated."""
        try:
            self._hand_over_rest(begun)
            begun.ticket.update_ended()
            self._pending = (begun, self._read_at_step(begun.plan))
        except PlanChangedError:
            self._give_up(begun, "the set of tensors changed during the step")
            return False
        except BaseException as error:
            self._give_up(begun, f"{type(error).__name__}: {error}")
            raise
        finally:
            self.adapter.hand_over_to(None)
        return True

    def _begin_planned_now(self, name: str, *, whole: bool, chunk_count: int = 1) -> Begun | None:
        plan = self._whole_plan if whole else self._plan
        if whole and chunk_count != self._whole_chunks:
            plan = None
        self._arrival.watch(self.optimizer.layers)
        if plan is None or not plan.still_fits(self.optimizer) or not plan.has_all_tensors():
            self._listed = self.optimizer.layers
            plan = _plan.make_plan(
                self.model,
                self.optimizer,
                list(self._listed),
                self._listed,
                block_bytes=self.adapter.block_bytes,
                save_gradients=self.save_gradients,
                chunk_count=chunk_count,
                incremental=self.incremental,
            )
            if whole:
                self._whole_plan, self._whole_chunks = plan, chunk_count
            else:
                self._plan = plan
        return self._begin(name, self.step, plan)

    def _begin(
        self, name: str, step: int, plan: SavePlan, *, during_update: bool = False
    ) -> Begun | None:
        begun = self.flight.begin(name, step, plan, during_update=during_update)
        if begun is not None:
            self._begun_at = self.clock()
            self.adapter.hand_over_to(begun)
        return begun

    def _add_task(self, begun: Begun, index: int) -> None:
        if not begun.plan.still_fits(self.optimizer, index):
            raise PlanChangedError(begun.plan.layers[index])
        layer = begun.plan.layers[index]
        self.scheduler.add_save_task(layer, begun.ticket.step, self._listed.get(layer, ()))

    def _hand_over_rest(self, begun: Begun) -> None:
        self.scheduler.force_flush()
        for index in range(len(begun.plan.layers)):
            if index not in begun.handed_over:
                self._add_task(begun, index)
        self.scheduler.force_flush()

    def _abandon_begun(self, reason: str) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            self._give_up(begun, reason)

    def _give_up(self, begun: Begun, reason: str) -> None:
        self.scheduler.drop()
        self.adapter.hand_over_to(None)
        self.flight.give_up(begun, reason)

    # -- what belongs to a step --------------------------------------------------------------------

    def _read_at_step(self, plan: SavePlan) -> _AtStep:
        tensors: dict[str, torch.Tensor] = {}
        rng = _codec.encode(_rng.capture(), "rng", tensors)
        data = {
            name: _codec.encode(self.extra[name].state_dict(), f"extra.{name}", tensors)
            for name in self.extra
            if name in self.at_step
        }
        state, unbound = _plan.non_tensor_state(self.optimizer, plan.names, tensors)
        others: dict[str, Any] = {}
        if plan.has_extra_state:
            _, others = _plan.model_tensors(self.model)
        model = _codec.encode(others, "model", tensors)
        progress = _codec.encode(self.progress(), "progress", tensors)
        owned = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        metrics = self.metrics()
        return _AtStep(rng, data, state, unbound, model, owned, progress, metrics)  # type: ignore[arg-type]

    def seal(self, *, reread: bool = False) -> None:
        """Read what loops change after the optimizer's step, and let the checkpoint commit.

        Param groups and `extra` objects are read now. `reread`: RNG and data positions too, since
        the caller knows that the step ends here.
        """
        if self._pending is None:
            return
        (begun, at_step), self._pending = self._pending, None
        try:
            if reread:
                at_step = self._read_at_step(begun.plan)
            tensors = dict(at_step.tensors)
            parts = self._parts(begun, at_step, tensors)
            layout, described = self._extra_planner.plan(tensors)
            owned = [
                tensor if name in at_step.tensors else tensor.detach().clone()
                for name, tensor in tensors.items()
            ]
            ticket = begun.ticket
            manifest = self.adapter.metadata.compose(
                checkpoint_id=ticket.name,
                training_step=ticket.step,
                run_id=self.flight.run_id,
                save_id=ticket.save_id,
                parts={**parts, "extra_tensors": described},
            )
            if self.best is not None and ticket.name == step_id(ticket.step):
                self.best.begun(ticket.step, at_step.metrics)
                self.flight.session.keep(self.best.kept())
            ticket.seal(self.adapter.metadata.to_bytes(manifest), layout, owned)
        except BaseException as error:
            # Or it would be in flight for ever, and with it whatever waits for it.
            self._give_up(begun, f"{type(error).__name__}: {error}")
            raise

    def _parts(
        self, begun: Begun, at_step: _AtStep, tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        extra = {
            name: at_step.data[name]
            if name in at_step.data
            else _codec.encode(value.state_dict(), f"extra.{name}", tensors)
            for name, value in self.extra.items()
        }
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        return {
            "config": self.config,
            "progress": at_step.progress,
            "metrics": _codec.encode(at_step.metrics, "metrics", tensors),
            "optimizer": {
                "type": type(self.optimizer.base_optimizer).__qualname__,
                "param_groups": _codec.encode(groups, "optimizer.param_groups", tensors),
                "parameters": begun.plan.static_manifest["parameters"],
                "state": at_step.optimizer_state,
                "unbound": at_step.unbound_state,
            },
            "model": at_step.model,
            "rng": at_step.rng,
            "extra": extra,
            "aliases": begun.plan.static_manifest["aliases"],
            "layers": begun.plan.static_manifest["layers"],
        }

    def _save_whole(self, name: str, step: int, chunk_count: int) -> int:
        """Save everything as it is now under `name`, sealed at once; its size in bytes."""
        if step != self.step:
            raise ValueError(f"training_step {step} is to be saved, but the state is {self.step}'s")
        self._abandon_begun(_UNFINISHED)
        self.raise_failures()
        self.seal()
        self._settle_order()
        begun = self._begin_planned_now(name, whole=chunk_count > 1, chunk_count=chunk_count)
        if begun is None:
            return 0
        if not self._complete(begun):
            raise RuntimeError("the set of tensors changes while it is being read")
        self.seal()
        return begun.plan.layout.total_bytes

    def _state_bytes(self) -> int:
        plan = self._plan or self._whole_plan
        if plan is not None:
            return plan.layout.total_bytes
        return _plan.state_bytes(self.model, self.optimizer)

    # -- the gate for others, and failures ---------------------------------------------------------

    def gate_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The step pre-hook of every optimizer there is: opens the gates if it owns anything."""
        if self._is_own(optimizer) or os.getpid() != self._owner:
            return
        if optimizer is self.optimizer.base_optimizer:
            # The loop steps it by itself: a step as any other, but that it is taken whole.
            self.before_step()
            self.before_update(None)
            return
        if self._pending is None and not self.flight.gated:
            return
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        owned.update(id(p) for p in self.model.parameters())
        if any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            self.seal()
            self.before_update(None)

    def _is_own(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step is one that `LayerwiseOptimizer` takes, and tells of itself."""
        return optimizer is self.optimizer or (
            optimizer is self.optimizer.base_optimizer and self.optimizer.stepping
        )

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> bool:
        """The step post-hook of every optimizer. True: it was the loop's own step of the base."""
        if optimizer is not self.optimizer.base_optimizer or self._is_own(optimizer):
            return False
        if os.getpid() != self._owner:
            return False
        found_inf = getattr(optimizer, "found_inf", None)
        applied = found_inf is None or not bool(found_inf != 0)
        if applied:
            self.optimizer.training_step += 1
        self.after_step(applied)
        return applied

    def open_gates(self) -> None:
        self.before_update(None)

    def restart_from(self, step: int) -> None:
        """Another state was loaded: its step counts, and it may have other tensors."""
        self.step = step
        self.flight.restart_from(step)
        self._plan = self._whole_plan = None
        if self.best is not None:
            self.best.forget_after(step)
            self.flight.session.keep(self.best.kept())

    def raise_failures(self, *, survive: bool = False) -> None:
        """Tell of checkpoints that failed since the last call, each once."""
        try:
            self.flight.raise_failures(survive=survive)
        finally:
            if self._pending is not None and self._pending[0].ticket.error() is not None:
                self._pending = None

    def _ended(self, ticket: Ticket) -> None:
        if self.best is not None and ticket.name == step_id(ticket.step):
            self.best.ended(ticket.step, ticket.committed())
            if self.flight.session.is_open:
                self.flight.session.keep(self.best.kept())

    def wait(self, timeout_s: float | None = None) -> bool:
        """Seal, and wait for what is in flight. False when the time has passed first."""
        self.seal_last()
        return self.flight.wait(timeout_s)

    def seal_last(self) -> None:
        """Nothing that is begun waits for more of the loop after this."""
        self._abandon_begun(_UNFINISHED)
        self.seal()

    def wait_sealed(self) -> None:
        """Wait for what is in flight, but for the step that was taken last if it is not sealed."""
        self.flight.wait(but=self._unsealed())

    def _unsealed(self) -> Ticket | None:
        begun = self._begun if self._pending is None else self._pending[0]
        return begun.ticket if begun is not None else None

    def gradient_arrived(self) -> None:
        """The next backward pass is under way: the loop has done what belongs to the step.

        Sealing waits no longer, for this iteration may end without a step of the optimizer, when
        a gradient scaler or the loop itself skips it, and what is in `extra` moves on all the same.
        """
        if self._pending is not None and os.getpid() == self._owner:
            start = time.perf_counter()
            try:
                self.seal()
            finally:
                self.stall_s += time.perf_counter() - start

    def close(self) -> None:
        """Let go of the model: no gate is needed any more once nothing is in flight."""
        self._abandon_begun("the trainer was shut down")
        self.flight.gated.clear()
        self._arrival.close()
        if self._order is not None:
            self._order.close()
            self._order = None
