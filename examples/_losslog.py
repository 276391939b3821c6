"""losses.jsonl: a line for each step, and the audit that compares replayed steps with it.

::

    {"resumed_from": 0, "audited": true, "settings": {"learning rate": 0.001, ...}}
    {"step": 1, "loss": 5.56, "norm": 3.1, "rate": 0.0001, "micro_batch": 8, "compiled": "eager"}

After a crash the log is ahead of the newest checkpoint. A run that goes on from there takes those
steps again, and every loss has to come out as it is logged, to the last bit: then what was resumed
is what was interrupted. Nothing in the log is ever rewritten; of several lines for one step the
last counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from _settings import TrainError, changes

__all__ = ["Audit", "AuditFailed", "Entry", "History", "LossLog", "read_log"]


class AuditFailed(TrainError):
    """A replayed step came out otherwise than it was logged."""


@dataclass(frozen=True)
class Entry:
    """One step as it was logged. How it was computed stands in it, for that may change on the way:
    `micro_batch` samples at a time, `compiled` in which mode."""

    step: int
    loss: float
    norm: float
    rate: float
    micro_batch: int
    compiled: str


@dataclass
class Logged:
    """An entry, the line it stands on, and the settings of the run that wrote it."""

    entry: Entry
    line: int
    settings: Mapping[str, Any]


@dataclass
class History:
    """What a log holds: the newest entry of each step that still counts."""

    path: Path
    steps: dict[int, Logged] = field(default_factory=dict)
    good_bytes: int = 0
    torn: bool = False  # the end is no whole line: power was lost while it was on its way

    def after(self, step: int) -> dict[int, Logged]:
        return {s: logged for s, logged in self.steps.items() if s > step}

    def differing(self, step: int, settings: Mapping[str, Any]) -> list[str]:
        """Names of the settings in which what was logged after `step` differs from these."""
        names: dict[str, None] = {}
        for logged in self.after(step).values():
            names.update(dict.fromkeys(changes(logged.settings, settings)))
        return list(names)

    def _resumed(self, step: int, settings: Mapping[str, Any], audited: bool) -> None:
        """A run that went on from `step` otherwise than before made what came after it void."""
        for s, logged in self.after(step).items():
            if not audited or changes(logged.settings, settings):
                del self.steps[s]

    def add(self, line: int, fields: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
        """Take a line in; returns the settings of what follows. KeyError, TypeError: it is none."""
        if "resumed_from" in fields:
            settings = dict(fields["settings"])
            self._resumed(int(fields["resumed_from"]), settings, bool(fields["audited"]))
            return settings
        entry = Entry(**fields)
        if type(entry.step) is not int or type(entry.loss) is not float:
            raise TypeError("step and loss have to be numbers")
        self.steps[entry.step] = Logged(entry, line, settings)
        return settings


def read_log(path: Path) -> History:
    """Read a log, of which there need be nothing yet.

    TrainError for a line that is none of it; only the end may be torn.
    """
    history = History(path)
    if not path.exists():
        return history
    settings: Mapping[str, Any] = {}
    wrong: int | None = None
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            settings = history.add(number, json.loads(line), settings)
        except (KeyError, TypeError, ValueError):
            wrong = wrong or number
            continue
        if wrong is not None:
            raise TrainError(
                f"{path}:{wrong}: not a line of this log, and whole lines come after it. Somebody "
                "changed it; move it away to go on without what it tells"
            )
        history.good_bytes += len(line)
    history.torn = wrong is not None
    return history


class LossLog:
    """Appends lines, each with one write and without a sync: they survive the process at once,
    a power loss not always. What is torn at the end of `history` is cut off first."""

    def __init__(
        self, history: History, start: int, settings: Mapping[str, Any], *, audited: bool
    ) -> None:
        self.path = history.path
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(history.good_bytes)
        self._write({"resumed_from": start, "audited": audited, "settings": dict(settings)})

    def write(self, entry: Entry) -> None:
        self._write(entry.__dict__)

    def _write(self, fields: Mapping[str, Any]) -> None:
        line = json.dumps(fields).encode("ascii") + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: only a part of a line could be written: is the disk full?")

    def __enter__(self) -> LossLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class Audit:
    """Compares the steps after `start` with those of them that were logged before.

    `why_not` is the reason for which nothing is compared, "" for none.
    """

    def __init__(self, history: History, start: int, why_not: str, say: Callable[[str], None]):
        self.path = history.path
        self.start = start
        self.why_not = why_not
        self.say = say
        self.equal = 0
        self.passed_over = 0
        self.left = {} if why_not else history.after(start)
        self.last = max(self.left, default=start)
        self._told = False

    def begin(self) -> None:
        """Say what is going to be compared."""
        if self.why_not:
            self.say(f"audit: {self.why_not}")
        elif not self.left:
            if self.start:
                self.say(f"audit: nothing was logged after step {self.start}, nothing to compare")
        else:
            self.say(f"audit: logged up to step {self.last}, comparing from step {self.start + 1}")
        self._told = not self.left

    def micro_batch(self, step: int) -> int | None:
        """How many samples at a time the step was computed with, where it was logged."""
        logged = self.left.get(step)
        return logged.entry.micro_batch if logged else None

    def check(self, entry: Entry) -> None:
        """Raises AuditFailed where the step was logged with another loss.

        Called before the step changes anything, so that nothing of a history that parted from the
        logged one is saved.
        """
        logged = self.left.pop(entry.step, None)
        if logged is not None:
            then = logged.entry
            if (then.micro_batch, then.compiled) != (entry.micro_batch, entry.compiled):
                self.passed_over += 1
            elif not _same_bits(then.loss, entry.loss):
                raise AuditFailed(
                    f"AUDIT FAILED: step {entry.step}, replayed from step {self.start}, has the "
                    f"loss {entry.loss!r}; {self.path}:{logged.line} has {then.loss!r}. What was "
                    f"resumed is not what was interrupted ({self.equal} losses before it are "
                    "equal). Nothing of this step is saved; --no-audit goes on regardless"
                )
            else:
                self.equal += 1
        if entry.step >= self.last:
            self.end()

    def end(self) -> None:
        """Say what came out; again: no effect."""
        if self._told:
            return
        self._told = True
        text = f"audit: {self.equal} replayed losses equal"
        if self.passed_over:
            text += f"; {self.passed_over} were computed in other pieces or another compile mode"
        if self.left:
            text += f"; {len(self.left)} logged ones were not reached"
        self.say(text)


def _same_bits(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):  # whose payload JSON does not keep
        return math.isnan(one) and math.isnan(other)
    return one.hex() == other.hex()
