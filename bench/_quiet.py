"""When to measure on a machine that others use as well."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["Quiet"]

T = TypeVar("T")
PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
LONG_S = 0.5  # what takes less cannot be told from ticks of 10 ms
OTHERS = 0.1  # of a core


class Quiet:
    """Begins a measurement when as many cores as it needs are idle; takes a long one again during
    which others took more than a tenth of a core. Spends so many seconds on that in all.

    What decides is what the rest of the machine did, never what came out. Without any patience,
    nobody looks.
    """

    def __init__(self, patience_s: float) -> None:
        self.looks = patience_s > 0
        self.patience_s = patience_s
        self.begun = self.again = self.beside_others = 0

    def wait(self, cores: int) -> bool:
        """A core counts as idle that has been so for 85 % of the last 50 ms."""
        if not self.looks:
            return True
        while idle_cores(0.05) < 0.85 * cores:
            if self.patience_s <= 0:
                return False
            time.sleep(0.2)
            self.patience_s -= 0.25
        return True

    def measure(self, cores: int, arm: Callable[[], T]) -> T:
        """What the arm returns."""
        self.begun += 1
        while True:
            alone = self.wait(cores)
            start, before_s = time.perf_counter(), others_s()
            figure = arm()
            took_s = time.perf_counter() - start
            if self.looks and took_s > LONG_S:
                alone = others_s() - before_s < OTHERS * took_s
            if alone or self.patience_s <= 0:
                self.beside_others += not alone
                return figure
            self.again += 1
            self.patience_s -= took_s

    def __str__(self) -> str:
        if not self.looks:
            return "not looked for"
        return (
            f"{self.beside_others} of {self.begun} measurements were made on busy cores, "
            f"{self.again} were discarded and made again"
        )


def idle_cores(seconds: float) -> float:
    """Over that time, in which this process sleeps."""
    before = ticks()
    time.sleep(seconds)
    after = ticks()
    idle = after[3] + after[4] - before[3] - before[4]  # waiting for the disk is idle, too
    return (os.cpu_count() or 1) * idle / max(1, sum(after) - sum(before))


def ticks() -> list[int]:
    """Of all cores since boot: user, nice, system, idle, iowait, irq, softirq, steal."""
    line = (PROC / "stat").read_text().split("\n", 1)[0]
    return [int(field) for field in line.split()[1:9]]


def others_s() -> float:
    """Processor time since boot of all processes outside this one's group."""
    own = 0
    for status in PROC.glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[2]) == os.getpgrp():
            own += sum(map(int, fields[11:15]))  # with the children that it has waited for
    return (sum(ticks()[:3]) - own) * TICK_S
