"""What a training run is told, and by whom: values with their provenance, and the table of them.

No torch in here: part of this has to be known before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["CONFIGS", "Asked", "Config", "Setting", "Settings", "TrainError", "changes", "table"]


class TrainError(Exception):
    """Training cannot start or go on: the message says why and what to do."""


Source = Literal["command line", "environment", "checkpoint", "device rule", "config", "default"]

Effect = Literal["yes", "only bits", "no"]
"""Whether a value changes the mathematics; "only bits": other roundings or random draws."""


@dataclass(frozen=True)
class Setting:
    name: str
    value: Any
    source: Source
    effect: Effect
    note: str = ""


class Settings:
    """Settings by name: ``settings["batch size"]`` is the value."""

    def __init__(self, settings: Iterable[Setting]) -> None:
        self._by_name: dict[str, Setting] = {}
        for setting in settings:
            if setting.name in self._by_name:
                raise ValueError(f"setting {setting.name!r} is given twice")
            self._by_name[setting.name] = setting

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Any:
        return self._by_name[name].value

    def replaced(self, setting: Setting) -> Settings:
        """A copy in which `setting` stands in the place of the one of its name."""
        if setting.name not in self._by_name:
            raise KeyError(setting.name)
        return Settings([setting if s.name == setting.name else s for s in self])

    def deciding(self) -> dict[str, Any]:
        """Names and values, fit for JSON, of all that can change a bit of what comes out.

        How many samples are computed at a time is not among them: running out of memory changes
        it on the way, so it is told for each step.
        """
        return {
            s.name: s.value if isinstance(s.value, (bool, int, float, str)) else shown(s.value)
            for s in self
            if s.effect != "no" and s.name != "micro-batch size"
        }


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], absent: Any = None
) -> dict[str, tuple[Any, Any]]:
    """Name -> (value before, value now) of what differs; `absent` stands for what is not there."""
    names = [*before, *(name for name in now if name not in before)]
    both = {name: (before.get(name, absent), now.get(name, absent)) for name in names}
    # As JSON, for one side has been read from it: 1.0 and 1 differ, nan and nan do not.
    return {n: (b, a) for n, (b, a) in both.items() if json.dumps(b) != json.dumps(a)}


def shown(value: Any) -> str:
    """A value as a person reads it in the table."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return ", then ".join(map(shown, value)) or "-"
    return "-" if value is None else str(value)


def table(settings: Iterable[Setting], before: Mapping[str, Any]) -> list[str]:
    """The lines of the table; `before` tells other values that the run had until now."""
    rows = [("setting", "value", "from", "changes the mathematics")]
    for setting in settings:
        value = shown(setting.value)
        if setting.name in before:
            value += f" (was {shown(before[setting.name])})"
        if setting.note:
            value += f"; {setting.note}"
        rows.append((setting.name, value, setting.source, setting.effect))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return [*lines, "only bits: the same mathematics with other roundings or random draws"]


# ---- Sizes ---------------------------------------------------------------------------------------

ARCHITECTURE = ("vocabulary", "context", "width", "layers", "heads")
"""The fields of a Config without which the tensors of a checkpoint do not fit or mean others."""


@dataclass(frozen=True)
class Config:
    """What `--config` names. Lengths in bytes of text, rates per optimizer step."""

    context: int
    width: int
    layers: int
    heads: int
    batch_size: int
    learning_rate: float
    warm_up_steps: int
    max_steps: int
    vocabulary: int = 256
    dropout: float = 0.1
    weight_decay: float = 0.1
    gradient_clip: float = 1.0

    def architecture(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ARCHITECTURE}

    def settings(self) -> list[Setting]:
        """Those that no argument changes."""
        rows = [
            Setting(name, value, "config", "yes") for name, value in self.architecture().items()
        ]
        for name in ("dropout", "weight_decay", "gradient_clip", "warm_up_steps"):
            label = name.replace("_", " ")
            rows.append(Setting(label, getattr(self, name), "config", "yes"))
        return rows


CONFIGS = {
    # 34 thousand parameters, 10.7, 85.5 and 473 million
    "tiny": Config(16, 32, 2, 2, 4, 1e-3, 10, 200),
    "small": Config(128, 384, 6, 6, 8, 1e-3, 100, 2_000),
    "medium": Config(256, 768, 12, 12, 8, 3e-4, 500, 20_000),
    "large": Config(512, 1280, 24, 20, 8, 2e-4, 1_000, 50_000),
}


@dataclass(frozen=True)
class Asked:
    """What the command line says about settings that the device has a rule for; None: nothing."""

    batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    lr_scaling: str | None = None
    dataloader_workers: int | None = None
    enable_compile: bool = False
    deterministic: bool = False
