"""What a device changes: batch, loader, allocator, cuDNN, compilation, and the old rate rule.

`device_settings` is the whole policy, a pure function: it can be read and tested for devices that
are not here. `apply` and `available_kinds` are all that touches torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from _settings import Asked, Config, Effect, Setting, Settings, Source, TrainError

__all__ = [
    "CompileMode",
    "Kind",
    "apply",
    "apply_environment",
    "available_kinds",
    "choose_device",
    "device_settings",
    "environment_settings",
    "kind_of",
    "likely_kind",
    "scaled_learning_rate",
]

Kind = Literal["cuda", "mps", "cpu"]


@dataclass(frozen=True)
class CompileMode:
    """Arguments of ``torch.compile``; the mode "eager" means not to call it."""

    mode: str
    dynamic: bool | None = None

    def __str__(self) -> str:
        how = {True: " (dynamic)", False: " (not dynamic)", None: ""}[self.dynamic]
        return self.mode + how


EAGER = CompileMode("eager")
_COMPILE: dict[Kind, tuple[CompileMode, ...]] = {
    "cuda": (CompileMode("max-autotune", True), CompileMode("reduce-overhead")),
    "mps": (CompileMode("reduce-overhead", False),),
    "cpu": (CompileMode("default"),),
}


# ---- The rules -----------------------------------------------------------------------------------


def device_settings(
    kind: Kind, cores: int, configured: Config, environment: Mapping[str, str], asked: Asked
) -> list[Setting]:
    """All settings that depend on the device, with where each value is from.

    What the command line or the environment says wins over the device's rule, and that over the
    config.
    """
    batch = _batch_size(kind, configured, asked)
    return [
        batch,
        _micro_batch_size(batch.value, asked),
        *_learning_rate(kind, configured, batch.value, asked),
        _dataloader_workers(kind, cores, asked),
        Setting("pin memory", kind == "cuda", "device rule", "no"),
        _compile_modes(kind, asked),
        *_determinism(kind, asked),
        *_memory(kind),
        *environment_settings(kind, environment, asked.deterministic),
    ]


def _batch_size(kind: Kind, configured: Config, asked: Asked) -> Setting:
    if asked.batch_size is not None:
        return Setting("batch size", asked.batch_size, "command line", "yes")
    size = configured.batch_size
    if kind == "cuda":
        return Setting("batch size", min(2 * size, 16), "device rule", "yes", f"config: {size}")
    if kind == "mps":
        return Setting("batch size", min(size, 4), "device rule", "yes", f"config: {size}")
    return Setting("batch size", size, "config", "yes", "1 or 2 is advised on a CPU")


def _micro_batch_size(batch_size: int, asked: Asked) -> Setting:
    """How many samples are computed at a time; gradients are accumulated over the batch."""
    size = asked.micro_batch_size
    if size is None:
        return Setting("micro-batch size", batch_size, "default", "only bits", "the whole batch")
    if size > batch_size:
        raise TrainError(f"--micro-batch-size {size} is more than the batch size, {batch_size}")
    return Setting("micro-batch size", size, "command line", "only bits")


def _learning_rate(
    kind: Kind, configured: Config, batch_size: int, asked: Asked
) -> tuple[Setting, Setting]:
    rule = asked.lr_scaling or "none"
    rate = asked.learning_rate if asked.learning_rate is not None else configured.learning_rate
    scaled, how = scaled_learning_rate(rate, rule, kind, batch_size, configured.batch_size)
    source: Source = "config" if asked.learning_rate is None else "command line"
    if scaled != rate:
        source = "device rule" if rule == "device" else "command line"
    was_asked: Source = "default" if asked.lr_scaling is None else "command line"
    return (
        Setting("learning-rate scaling", rule, was_asked, "no" if rule == "none" else "yes"),
        Setting("learning rate", scaled, source, "yes", how),
    )


def scaled_learning_rate(
    rate: float, rule: str, kind: Kind, batch_size: int, configured_batch_size: int
) -> tuple[float, str]:
    """The learning rate under `--lr-scaling`, and how it came about ("" where it is unchanged).

    "linear" and "sqrt" go by the global batch, relative to the configured one; "device" is the old
    rule: at least 1e-4 on CUDA, at most 5e-5 on MPS.
    """
    ratio = batch_size / configured_batch_size
    if rule == "none":
        return rate, ""
    if rule == "linear":
        return rate * ratio, f"{rate:g} x {batch_size}/{configured_batch_size}"
    if rule == "sqrt":
        return rate * math.sqrt(ratio), f"{rate:g} x sqrt({batch_size}/{configured_batch_size})"
    if rule == "device":
        if kind == "cuda":
            return max(rate, 1e-4), f"{rate:g}, at least 1e-4 on CUDA"
        if kind == "mps":
            return min(rate, 5e-5), f"{rate:g}, at most 5e-5 on MPS"
        return rate, ""
    raise ValueError(f"unknown learning-rate rule {rule!r}")


def _dataloader_workers(kind: Kind, cores: int, asked: Asked) -> Setting:
    rule, most = {
        "cuda": (min(8, cores), "the lesser of 8 and the cores"),
        "mps": (min(1, cores), "at most 1"),
        "cpu": (min(4, max(2, cores)), "2 to 4"),
    }[kind]
    if asked.dataloader_workers is not None:
        note = f"rule of {kind}: {most}" if asked.dataloader_workers != rule else ""
        return Setting("dataloader workers", asked.dataloader_workers, "command line", "no", note)
    return Setting("dataloader workers", rule, "device rule", "no", most)


def _compile_modes(kind: Kind, asked: Asked) -> Setting:
    if not asked.enable_compile:
        return Setting("compile", (EAGER,), "default", "only bits")
    return Setting("compile", (*_COMPILE[kind], EAGER), "device rule", "only bits")


def _determinism(kind: Kind, asked: Asked) -> list[Setting]:
    on = asked.deterministic
    source: Source = "command line" if on else "default"
    rows = [Setting("deterministic algorithms", on, source, "only bits")]
    if kind == "cuda":
        rule: Source = "command line" if on else "device rule"
        rows += [
            Setting("cuDNN enabled", True, "device rule", "only bits"),
            Setting("cuDNN benchmark", not on, rule, "only bits"),
            Setting("cuDNN deterministic", on, rule, "only bits"),
        ]
    return rows


def _memory(kind: Kind) -> list[Setting]:
    if kind == "cuda":
        return [Setting("empty cache at start", True, "device rule", "no")]
    if kind == "mps":
        return [Setting("memory fraction", 0.8, "device rule", "no")]
    return []


# ---- Environment variables -----------------------------------------------------------------------

_ALLOCATOR: dict[Kind, dict[str, str]] = {
    "cuda": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"},
    "mps": {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0", "PYTORCH_ENABLE_MPS_FALLBACK": "1"},
    "cpu": {},
}
_OTHER_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPRODUCIBLE_CUBLAS = (":4096:8", ":16:8")


def environment_settings(
    kind: Kind, environment: Mapping[str, str], deterministic: bool
) -> list[Setting]:
    """Environment variables of the allocator and of cuBLAS. A value that is there already wins."""
    rows = []
    for name, value in _ALLOCATOR[kind].items():
        effect: Effect = "only bits" if "FALLBACK" in name else "no"
        there = next((n for n in (name, _OTHER_NAMES.get(name)) if n and n in environment), None)
        if there is not None:
            rows.append(Setting(there, environment[there], "environment", effect))
        else:
            rows.append(Setting(name, value, "device rule", effect))
    if kind == "cuda" and _CUBLAS in environment:
        wrong = deterministic and environment[_CUBLAS] not in _REPRODUCIBLE_CUBLAS
        note = f"torch demands {' or '.join(_REPRODUCIBLE_CUBLAS)}" if wrong else ""
        rows.append(Setting(_CUBLAS, environment[_CUBLAS], "environment", "only bits", note))
    elif kind == "cuda" and deterministic:
        rows.append(Setting(_CUBLAS, _REPRODUCIBLE_CUBLAS[0], "command line", "only bits"))
    return rows


def apply_environment(
    settings: list[Setting], environment: MutableMapping[str, str]
) -> dict[str, str]:
    """Put into `environment` what is not there yet; returns what was put."""
    put = {s.name: str(s.value) for s in settings if s.source != "environment"}
    environment.update(put)
    return put


# ---- Which device --------------------------------------------------------------------------------


def kind_of(device: str) -> Kind:
    """The kind of "cuda:1" is "cuda"; TrainError for what is no device to train on."""
    for kind in ("cuda", "mps", "cpu"):
        if device == kind or (kind == "cuda" and _is_indexed(device)):
            return kind
    raise TrainError(f"--device {device!r}: use cuda, cuda:<number>, mps or cpu")


def _is_indexed(device: str) -> bool:
    name, _, index = device.partition(":")
    return name == "cuda" and index.isascii() and index.isdigit()


def likely_kind(asked: str | None, platform: str) -> Kind:
    """The kind of device that will be chosen, as far as that can be known without torch.

    Some variables count only if they are there when torch is imported (that of the MPS fallback is
    read while its libraries are loaded), and which devices there are is known only afterwards.
    """
    if asked is not None:
        return kind_of(asked)
    return "mps" if platform == "darwin" else "cuda"


def choose_device(asked: str | None, available: Mapping[Kind, bool]) -> Setting:
    """CUDA before MPS before CPU, unless one is asked for; TrainError where that is not there."""
    if asked is None:
        kinds: tuple[Kind, ...] = ("cuda", "mps", "cpu")
        first = next(kind for kind in kinds if available[kind])
        return Setting("device", first, "device rule", "only bits", "of CUDA, MPS, CPU the first")
    if not available[kind_of(asked)]:
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise TrainError(f"--device {asked}: torch finds no such device here, only {there}")
    return Setting("device", asked, "command line", "only bits")


# ---- Touching torch ------------------------------------------------------------------------------


def available_kinds(torch: Any) -> dict[Kind, bool]:
    return {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }


def apply(torch: Any, device: str, settings: Settings, announce: Callable[[str], None]) -> None:
    """Set in torch what the settings say, once the device is known and before it is used."""
    torch.use_deterministic_algorithms(settings["deterministic algorithms"])
    kind = kind_of(device)
    if kind == "cuda":
        if _is_indexed(device):
            torch.cuda.set_device(device)
        torch.backends.cudnn.enabled = settings["cuDNN enabled"]
        torch.backends.cudnn.benchmark = settings["cuDNN benchmark"]
        torch.backends.cudnn.deterministic = settings["cuDNN deterministic"]
        if settings["empty cache at start"]:
            torch.cuda.empty_cache()
    elif kind == "mps":
        try:
            torch.mps.set_per_process_memory_fraction(settings["memory fraction"])
        except (AttributeError, RuntimeError) as error:
            announce(f"fallback: the memory fraction stays at MPS's own: {error}")
