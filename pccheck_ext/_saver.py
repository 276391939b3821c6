"""Saving while training: watches the optimizer's step and feeds the engine.

Step s is begun before its first layer is updated, each layer is handed over once it has been, and
the step is sealed when the loop has done what belongs to it (see `StepSaver.seal`). Everything here
runs while the training thread waits for it, on that thread or, called by a gradient's hook, on
autograd's; the time it takes is the stall.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pccheck_ext import _C, _codec, _plan, _rng
from pccheck_ext._names import step_id
from pccheck_ext._plan import PlanChangedError, SavePlan
from pccheck_ext.errors import CheckpointError
from pccheck_ext.layers import GradientOrder, group_parameters_by_layer
from pccheck_ext.optimizer import LayerwiseOptimizer

__all__ = ["StepSaver"]

MANIFEST_VERSION = 1


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


@dataclass
class _Begun:
    ticket: _C.Ticket
    plan: SavePlan
    handed_over: set[int]


class StepSaver:
    """A `StepObserver` that makes a checkpoint of every `every`-th step.

    `progress` is called for the step count and history to save, `extra` holds the objects with a
    ``state_dict()``, of which those in `at_step` are read at the step and the others at the seal.
    """

    def __init__(
        self,
        session: _C.Session,
        model: nn.Module,
        optimizer: LayerwiseOptimizer,
        *,
        extra: Mapping[str, Any],
        at_step: frozenset[str],
        every: int,
        block_bytes: int,
        save_gradients: bool,
        on_error: str,
        progress: Callable[[], dict[str, Any]],
        config: dict[str, Any],
        order_is_given: bool,
        on_monitor_death: str = "restart",
    ) -> None:
        self.session = session
        self.model = model
        self.optimizer = optimizer
        self.extra = dict(extra)
        self.at_step = at_step
        self.every = every
        self.block_bytes = block_bytes
        self.save_gradients = save_gradients
        self.on_error = on_error
        self.progress = progress
        self.config = config
        self.on_monitor_death = on_monitor_death
        self.run_id = os.urandom(16)
        self._owner = os.getpid()
        self.step = 0
        self.skip_next = False
        self.stall_s = 0.0
        self.steps_saved = 0
        self.given_up = 0  # checkpoints dropped on purpose; the engine counts them as failed
        self._origin = 0  # the step that training goes on from
        self._first_save = True
        self._plan: SavePlan | None = None
        self._whole_plan: SavePlan | None = None
        self._extra_planner = _plan.ExtraPlanner(block_bytes)
        self._begun: _Begun | None = None  # this step's, between before_step and after_step
        self._pending: tuple[_Begun, _AtStep] | None = None  # taken, not sealed
        self._gated: list[_Begun] = []  # tensors may not change yet
        self._in_flight: list[_C.Ticket] = []
        self._dropped: list[_C.Ticket] = []  # given up, and perhaps not cleared away yet
        self._arrival = _FirstGradient(weakref.ref(self))
        self.order_source = "given"
        self._order: GradientOrder | None = None
        if not order_is_given:
            self._order = GradientOrder(group_parameters_by_layer(model))

    # -- StepObserver ------------------------------------------------------------------------------

    def before_step(self) -> bool:
        idle = self._pending is None and not self._in_flight and not self._dropped
        if idle and not self._is_due():
            return False  # most steps, where few are saved: nothing to look after
        start = time.perf_counter()
        try:
            self._survive_monitor()
            self.raise_failures()
            self.seal()
            self._open_gates_of_staged()
            if not self._is_due():
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
        if not self._gated:
            return  # as for most layers, where staging keeps up
        start = time.perf_counter()
        for begun in self._gated:
            index = None if layer is None else begun.plan.index.get(layer)
            if index is None:
                begun.ticket.open_all_gates()
            elif index in begun.handed_over:
                begun.ticket.open_gate(index)
        if layer is None:  # one that is still being handed over has gates to come
            self._gated = [begun for begun in self._gated if begun is self._begun]
        self.stall_s += time.perf_counter() - start

    def _open_gates_of_staged(self) -> None:
        """All at once: with nothing to wait for, there is nothing to do layer by layer."""
        left = []
        for begun in self._gated:
            if begun.ticket.staged():
                begun.ticket.open_all_gates()
            else:
                left.append(begun)
        self._gated = left

    def after_layer(self, layer: str) -> None:
        begun = self._begun
        if begun is None or begun.ticket.leaves_time_to_update():
            return  # handed over with the rest, once the update has ended
        start = time.perf_counter()
        index = begun.plan.index.get(layer)
        try:
            if index is not None:
                self._hand_over(begun, index)
        except PlanChangedError:
            # Planned anew once the step is done.
            self._abandon_begun("the set of tensors changed during the step")
        self.stall_s += time.perf_counter() - start

    def after_step(self, applied: bool) -> None:
        if not applied:
            self._abandon_begun("the step was voided by the gradient scaler")
            return
        due = self._is_due()
        self.skip_next = False
        self.step += 1
        if not due:
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
        return not self.skip_next and (self.step + 1) % self.every == 0

    def _settle_order(self) -> None:
        if self._order is None:
            return
        self._order.close()
        self.optimizer.set_update_order(
            self._order.update_order(), group_parameters_by_layer(self.model)
        )
        self.order_source = self._order.source
        self._order = None

    def _finish_step(self) -> None:
        begun, self._begun = self._begun, None
        # A first save's order is known by now even where the step before was not to be saved.
        self._settle_order()
        # Gates of an older checkpoint: a step taken whole has passed them all, one by layers too.
        self._gated = [older for older in self._gated if older is begun]
        if begun is None or not self._complete(begun):
            begun = self._begin_planned_now(step_id(self.step), whole=False)
            if begun is None:
                return
            if not self._complete(begun):
                raise RuntimeError("the set of tensors changes while it is being read")
        self.steps_saved += 1

    def _complete(self, begun: _Begun) -> bool:
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
        return True

    def _begin_planned_now(self, name: str, *, whole: bool, chunk_count: int = 1) -> _Begun | None:
        plan = self._whole_plan if whole else self._plan
        self._arrival.watch(self.optimizer.layers)
        if plan is None or not plan.still_fits(self.optimizer) or not plan.has_all_tensors():
            plan = _plan.make_plan(
                self.model,
                self.optimizer,
                list(self.optimizer.layers),
                self.optimizer.layers,
                block_bytes=self.block_bytes,
                save_gradients=self.save_gradients,
                chunk_count=chunk_count,
            )
            if whole:
                self._whole_plan = plan
            else:
                self._plan = plan
        return self._begin(name, self.step, plan)

    def _begin(
        self, name: str, step: int, plan: SavePlan, *, during_update: bool = False
    ) -> _Begun | None:
        """None where the checkpoint cannot be begun and `on_error` lets training go on."""
        for older in [*self._in_flight, *self._dropped]:
            if older.name == name:
                older.wait()  # an attempt at the same name that failed: let it clear its files away
        try:
            self._survive_monitor()
            if self._first_save:
                self._set_aside(self._origin)
                self._first_save = False
            save_id = os.urandom(16)
            begin = (name, step, self.run_id, save_id, plan.layout, during_update)
            try:
                ticket = self.session.begin(*begin)
            except RuntimeError:
                if not self._survive_monitor():
                    raise
                ticket = self.session.begin(*begin)
        except (OSError, RuntimeError) as error:
            self._report(f"checkpoint {name} could not be begun: {error}", error)
            return None
        begun = _Begun(ticket, plan, set())
        self._in_flight.append(ticket)
        return begun

    def _set_aside(self, step: int) -> None:
        aside = self.session.set_aside_after(step)
        if aside:
            warnings.warn(
                f"training goes on from step {step} in a directory that holds later checkpoints; "
                f"left aside as *.stale: {', '.join(aside)}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _hand_over(self, begun: _Begun, index: int) -> None:
        if not begun.plan.still_fits(self.optimizer, index):
            raise PlanChangedError(begun.plan.layers[index])
        tensors = [planned.tensor() for planned in begun.plan.by_layer[index]]
        if not begun.handed_over:
            self._gated.append(begun)
        begun.ticket.hand_over(index, tensors)
        begun.handed_over.add(index)

    def _hand_over_rest(self, begun: _Begun) -> None:
        for index in range(len(begun.plan.layers)):
            if index not in begun.handed_over:
                self._hand_over(begun, index)

    def _abandon_begun(self, reason: str) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            self._give_up(begun, reason)

    def _give_up(self, begun: _Begun, reason: str) -> None:
        """Drop a checkpoint that cannot be finished; whoever calls tells, if it has to be told."""
        begun.ticket.abandon(reason)
        begun.ticket.open_all_gates()
        self.given_up += 1
        self._dropped.append(begun.ticket)
        self._in_flight = [ticket for ticket in self._in_flight if ticket is not begun.ticket]
        self._gated = [other for other in self._gated if other is not begun]

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
        return _AtStep(rng, data, state, unbound, model, owned, progress)  # type: ignore[arg-type]

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
            manifest = self._manifest(begun, at_step, tensors)
            layout, described = self._extra_planner.plan(tensors)
            owned = [
                tensor if name in at_step.tensors else tensor.detach().clone()
                for name, tensor in tensors.items()
            ]
            text = _codec.dumps(manifest | {"extra_tensors": described})
            # Of a size that seldom changes: a file that keeps its size is synced without a journal.
            begun.ticket.seal(text.ljust(-len(text) // 4096 * -4096), layout, owned)
        except BaseException as error:
            # Or it would be in flight for ever, and with it whatever waits for it.
            self._give_up(begun, f"{type(error).__name__}: {error}")
            raise

    def _manifest(
        self, begun: _Begun, at_step: _AtStep, tensors: dict[str, torch.Tensor]
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
            "format": "pccheck",
            "version": MANIFEST_VERSION,
            "checkpoint_id": begun.ticket.name,
            "training_step": begun.ticket.step,
            "run_id": self.run_id.hex(),
            "save_id": begun.ticket.save_id.hex(),
            "timestamp": time.time(),
            "versions": {"torch": str(torch.__version__)},
            "config": self.config,
            "progress": at_step.progress,
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

    def save_whole(self, name: str, chunk_count: int) -> _C.Ticket | None:
        """Save everything as it is now under `name`, sealed at once."""
        self.raise_failures()
        self.seal()
        self._settle_order()
        begun = self._begin_planned_now(name, whole=chunk_count > 1, chunk_count=chunk_count)
        if begun is None:
            return None
        if not self._complete(begun):
            raise RuntimeError("the set of tensors changes while it is being read")
        self.seal()
        return begun.ticket

    # -- the gate for others, and failures ---------------------------------------------------------

    def _survive_monitor(self) -> bool:
        """After the monitor's death: tell, and go on as `on_monitor_death` says. False: it lives.

        What it had not committed is lost, which the next checkpoint makes up for; so training is
        not stopped for it, unless it was asked to be.
        """
        death = self.session.monitor_death()
        if death is None:
            return False
        self.seal()
        for ticket in [*self._in_flight, *self._dropped]:
            ticket.wait()
        lost = [ticket.name for ticket in self._in_flight if not ticket.committed()]
        for begun in self._gated:
            begun.ticket.open_all_gates()
        if self.on_monitor_death == "raise":
            self.raise_failures()
        self._gated, self._in_flight, self._dropped = [], [], []
        direct = self.on_monitor_death == "direct"
        warnings.warn(
            f"{death}. Lost: {', '.join(lost) or 'none'}. Training goes on, "
            + ("writing from its own process" if direct else "with a new monitor"),
            RuntimeWarning,
            stacklevel=3,
        )
        try:
            (self.session.go_direct if direct else self.session.restart_monitor)()
        except (OSError, RuntimeError) as error:
            self._report(f"{death}, and there is no going on: {error}", error)
        return True

    def gate_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The step pre-hook of every optimizer there is: opens the gates if it owns anything."""
        own = optimizer is self.optimizer or (
            optimizer is self.optimizer.base_optimizer and self.optimizer.stepping
        )
        if own or os.getpid() != self._owner:
            return
        if self._pending is None and not self._gated:
            return
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        owned.update(id(p) for p in self.model.parameters())
        if any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            self.seal()
            self.before_update(None)

    def open_gates(self) -> None:
        self.before_update(None)

    def restart_from(self, step: int) -> None:
        """Another state was loaded: its step counts, and it may have other tensors."""
        self.step = self._origin = step
        self._first_save = True
        self._plan = self._whole_plan = None

    def raise_failures(self) -> None:
        """Tell of checkpoints that failed since the last call, each once."""
        failed = []
        still = []
        for ticket in self._in_flight:
            error = ticket.error()
            if error is not None:
                failed.append((ticket, *error))
            elif ticket.in_flight():
                still.append(ticket)
        self._in_flight = still
        self._dropped = [ticket for ticket in self._dropped if ticket.in_flight()]
        if self.session.is_open:
            self.session.reap()
        for ticket, _, _ in failed:
            self._gated = [begun for begun in self._gated if begun.ticket is not ticket]
            if self._pending is not None and self._pending[0].ticket is ticket:
                self._pending = None
        complaint = self.session.take_complaint() if self.session.is_open else None
        if complaint is not None:
            warnings.warn(f"clearing up after checkpoints: {complaint}", RuntimeWarning, 2)
        if failed:
            text = "; ".join(f"checkpoint {t.name} failed: {message}" for t, message, _ in failed)
            errno = next((code for _, _, code in failed if code), 0)
            cause = OSError(errno, os.strerror(errno)) if errno else None
            self._report(text, cause)

    def _report(self, text: str, cause: BaseException | None) -> None:
        text = f"{text} ({self.session.path}; earlier checkpoints are untouched)"
        if self.on_error == "warn":
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            return
        raise CheckpointError(text) from cause

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for what is in flight. False when the time has passed first."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for ticket in [*self._in_flight, *self._dropped]:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not ticket.wait(left):
                return False
        return True

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

    def wait_sealed(self) -> None:
        pending = self._pending[0].ticket if self._pending is not None else None
        for ticket in [ticket for ticket in self._in_flight if ticket is not pending]:
            ticket.wait()

    def close(self) -> None:
        """Let go of the model: no gate is needed any more once nothing is in flight."""
        self._abandon_begun("the trainer was shut down")
        self._gated.clear()
        self._arrival.close()
        if self._order is not None:
            self._order.close()
            self._order = None
