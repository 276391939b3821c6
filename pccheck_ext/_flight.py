"""Checkpoints in flight: their tickets, the gates in front of their tensors, and how they ended.

One object for each session, on the training thread. What goes wrong is kept until the loop next
calls in, and told once.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from pccheck_ext import _C, _progress
from pccheck_ext._mock import MockSession, MockTicket
from pccheck_ext._plan import BarePlan, SavePlan
from pccheck_ext.errors import CheckpointError

__all__ = ["Begun", "Flight", "Session", "Ticket"]

Session: TypeAlias = "_C.Session | MockSession"
Ticket: TypeAlias = "_C.Ticket | MockTicket"


@dataclass
class Begun:
    """A checkpoint that layers are being handed over for."""

    ticket: Ticket
    plan: SavePlan
    handed_over: set[int]


class Flight:
    """`ended(ticket)` is called, once, for every checkpoint that is found to have ended."""

    def __init__(
        self,
        session: Session,
        *,
        on_error: str,
        on_monitor_death: str,
        verbose: bool = False,
        ended: Callable[[Ticket], None] = lambda ticket: None,
    ) -> None:
        self.session = session
        self.on_error = on_error
        self.on_monitor_death = on_monitor_death
        self.verbose = verbose
        self.ended = ended
        self.run_id = os.urandom(16)
        self.gated: list[Begun] = []  # tensors may not change yet
        self.went_direct = False  # after the monitor's death
        self.given_up = 0  # checkpoints dropped on purpose; the engine counts them as failed
        self._in_flight: list[Ticket] = []
        self._dropped: list[Ticket] = []  # given up, and perhaps not cleared away yet
        self._origin = 0  # the step that training goes on from
        self._first_save = True
        self._committed_before = 0  # how many of the session's were when it went on from there

    @property
    def is_idle(self) -> bool:
        return not self._in_flight and not self._dropped

    @property
    def monitor_has_died(self) -> bool:
        return self.session.monitor_process is not None and bool(self.session.monitor_death())

    def count(self) -> int:
        """How many are in flight at this moment."""
        return sum(ticket.in_flight() for ticket in self._in_flight)

    def has_in_flight(self, name: str) -> bool:
        return any(ticket.name == name and ticket.in_flight() for ticket in self._in_flight)

    def still_in_flight(self, timeout_s: float | None) -> str:
        """What a TimeoutError says."""
        names = [ticket.name for ticket in self._in_flight if ticket.in_flight()]
        return f"still in flight after {timeout_s} s: {', '.join(names)} ({self.session.path})"

    def restart_from(self, step: int) -> None:
        """Training goes on from there: later checkpoints are set aside when one is begun."""
        self._origin = step
        self._first_save = True
        self._committed_before = int(self.session.stats()["checkpoints_committed"])

    def newest(self, stats: Mapping[str, int | float], which: str) -> int:
        """The newest saved step: the session's, by `stats`, or that which training went on from."""
        is_new = stats["checkpoints_committed"] > self._committed_before
        if is_new or stats[which] > stats["last_committed_step"]:
            return int(stats[which])
        return self._origin

    # -- a checkpoint's life -----------------------------------------------------------------------

    def begin(
        self, name: str, step: int, plan: SavePlan, *, during_update: bool = False
    ) -> Begun | None:
        """None where the checkpoint cannot be begun and `on_error` lets training go on."""
        ticket = self.begin_ticket(name, step, plan, during_update=during_update)
        return Begun(ticket, plan, set()) if ticket is not None else None

    def begin_ticket(
        self,
        name: str,
        step: int,
        plan: BarePlan,
        *,
        during_update: bool = False,
        origin: int | None = None,
    ) -> Ticket | None:
        """As `begin`. `origin`: which step training goes on from, where no state was loaded."""
        for older in [*self._in_flight, *self._dropped]:
            if older.name == name:
                older.wait()  # an attempt at the same name that failed: let it clear its files away
        begin = (name, step, self.run_id, os.urandom(16), plan.layout, during_update)
        try:
            self.survive_monitor()
            if self._first_save:
                self._origin = self._origin if origin is None else origin
                self._set_aside(self._origin)
                self._first_save = False
            try:
                ticket = self.session.begin(*begin)
            except RuntimeError:
                if not self.survive_monitor():
                    raise
                ticket = self.session.begin(*begin)
        except (OSError, RuntimeError) as error:
            self.report(f"checkpoint {name} could not be begun: {error}", error)
            return None
        if isinstance(ticket, MockTicket):
            ticket.layer_names = plan.layers
        self._in_flight.append(ticket)
        self._tell(ticket, "begun")
        return ticket

    def _tell(self, ticket: Ticket, what: str) -> None:
        if self.verbose:
            print(f"PCCheckAdapter: checkpoint {ticket.name} {what}")

    def _has_ended(self, ticket: Ticket) -> None:
        if ticket.committed():
            self._tell(ticket, f"committed, {ticket.payload_bytes / (1 << 20):.2f} MiB")
        self.ended(ticket)

    def _set_aside(self, step: int) -> None:
        aside = self.session.set_aside_after(step)
        if aside:
            warnings.warn(
                f"training goes on from step {step} in a directory that holds later checkpoints; "
                f"left aside as *.stale: {', '.join(aside)}",
                RuntimeWarning,
                stacklevel=2,
            )

    def hand_over(self, begun: Begun, index: int) -> None:
        """The tensors of one layer; PlanChangedError where they are not those planned."""
        tensors = [planned.tensor() for planned in begun.plan.by_layer[index]]
        if not begun.handed_over:
            self.gated.append(begun)
        begun.ticket.hand_over(index, tensors)
        begun.handed_over.add(index)

    def give_up(self, begun: Begun, reason: str) -> None:
        """Drop a checkpoint that cannot be finished; whoever calls tells, if it has to be told."""
        self.give_up_ticket(begun.ticket, reason)

    def give_up_ticket(self, ticket: Ticket, reason: str) -> None:
        ticket.abandon(reason)
        ticket.open_all_gates()
        self.given_up += 1
        self._dropped.append(ticket)
        self._in_flight = [other for other in self._in_flight if other is not ticket]
        self.gated = [begun for begun in self.gated if begun.ticket is not ticket]
        self._has_ended(ticket)

    # -- gates -------------------------------------------------------------------------------------

    def pass_gates(self, layer: str | None, current: Begun | None) -> None:
        """Return when `layer` (None: every layer) may change; `current` is being handed over."""
        for begun in self.gated:
            index = None if layer is None else begun.plan.index.get(layer)
            if index is None:
                begun.ticket.open_all_gates()
            elif index in begun.handed_over:
                begun.ticket.open_gate(index)
        if layer is None:  # one that is still being handed over has gates to come
            self.gated = [begun for begun in self.gated if begun is current]

    def open_gates_of_staged(self) -> None:
        """All at once: with nothing to wait for, there is nothing to do layer by layer."""
        left = []
        for begun in self.gated:
            if begun.ticket.staged():
                begun.ticket.open_all_gates()
            else:
                left.append(begun)
        self.gated = left

    # -- how they ended ----------------------------------------------------------------------------

    def raise_failures(self, *, survive: bool = False) -> None:
        """Tell of checkpoints that failed since the last call, each once.

        `survive`: what the monitor has died with is told as `survive_monitor` does.
        """
        failed = []
        still = []
        for ticket in self._in_flight:
            error = ticket.error()
            if error is not None:
                if survive and self.monitor_has_died:  # since it was last looked at
                    self.survive_monitor()
                    return
                failed.append((ticket, *error))
            elif ticket.in_flight():
                still.append(ticket)
                continue
            self._has_ended(ticket)
        self._in_flight = still
        self._dropped = [ticket for ticket in self._dropped if ticket.in_flight()]
        if self.session.is_open:
            self.session.reap()
        for ticket, _, _ in failed:
            self.gated = [begun for begun in self.gated if begun.ticket is not ticket]
        complaint = self.session.take_complaint() if self.session.is_open else None
        if complaint is not None:
            warnings.warn(f"clearing up after checkpoints: {complaint}", RuntimeWarning, 2)
        if failed:
            text = "; ".join(f"checkpoint {t.name} failed: {message}" for t, message, _ in failed)
            errno = next((code for _, _, code in failed if code), 0)
            cause = OSError(errno, os.strerror(errno)) if errno else None
            self.report(text, cause)

    def report(self, text: str, cause: BaseException | None) -> None:
        text = f"{text} ({self.session.path}; earlier checkpoints are untouched)"
        if self.on_error == "warn":
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            return
        raise CheckpointError(text) from cause

    def survive_monitor(self) -> bool:
        """After the monitor's death: tell, and go on as `on_monitor_death` says. False: it lives.

        What it had not committed is lost, which the next checkpoint makes up for; so training is
        not stopped for it, unless it was asked to be.
        """
        if not self.monitor_has_died:
            return False
        death = self.session.monitor_death()
        for ticket in [*self._in_flight, *self._dropped]:
            ticket.wait()
        for begun in self.gated:
            begun.ticket.open_all_gates()
        lost = [ticket.name for ticket in self._in_flight if not ticket.committed()]
        for ticket in self._in_flight:
            self._has_ended(ticket)
        self.gated, self._in_flight, self._dropped = [], [], []
        if self.on_monitor_death == "raise":
            raise CheckpointError(f"{death}. Lost: {', '.join(lost) or 'none'}")
        direct = self.on_monitor_death == "direct"
        warnings.warn(
            f"{death}. Lost: {', '.join(lost) or 'none'}. Training goes on, "
            + ("writing from its own process" if direct else "with a new monitor"),
            RuntimeWarning,
            stacklevel=3,
        )
        try:
            (self.session.go_direct if direct else self.session.restart_monitor)()
            self.went_direct = direct
        except (OSError, RuntimeError) as error:
            self.report(f"{death}, and there is no going on until a retry succeeds: {error}", error)
        return True

    def wait(self, timeout_s: float | None = None, *, but: Ticket | None = None) -> bool:
        """Wait for what is in flight. False when the time has passed first."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        awaited = [t for t in [*self._in_flight, *self._dropped] if t is not but]
        patient = time.monotonic() + _progress.PATIENCE_S
        if _wait_all(awaited, patient if until is None else min(until, patient)):
            return True
        total = sum(ticket.payload_bytes for ticket in awaited)

        def written() -> int:
            return sum(ticket.written_bytes for ticket in awaited)

        with _progress.shown("saving", total, written, patience_s=0.0):
            return _wait_all(awaited, until)


def _wait_all(tickets: list[Ticket], until: float | None) -> bool:
    for ticket in tickets:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not ticket.wait(left):
            return False
    return True
