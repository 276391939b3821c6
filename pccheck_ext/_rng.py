"""The random number generators of this process, read and set as one value.

``restore(capture())`` makes Python's ``random``, NumPy's global generator and torch's generators of
the CPU and of the devices in use go on exactly where they stood. The value consists of what the
state codec saves, tensors on the CPU that share nothing with the generators. ``capture`` is called
at every step: it takes tens of microseconds and starts no device.

Not included, because nobody but their owner knows them: generators that the program made itself
(``torch.Generator``, ``random.Random``, ``numpy.random.Generator``). They belong into the state of
the object that uses them.
"""

from __future__ import annotations

import importlib
import random
import struct
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["capture", "restore"]

# random.getstate() is (3, 624 words and a position, gauss's spare value or None). As 2500 bytes
# instead of 625 numbers it is cheap to save; little-endian, to be read on any machine.
_mersenne = struct.Struct("<625I")


def capture(devices: Iterable[torch.device | str | int] | None = None) -> dict[str, Any]:
    """Return the state of every generator, as a value that belongs to the caller.

    ``devices`` limits the accelerators to those named, "cuda" being every CUDA device; None means
    all. Those that are not initialised are left alone: they have drawn nothing. The CPU is always
    included. Raises ValueError for a device that is not there.
    """
    generators = {"cpu": torch.get_rng_state()}
    for device in _initialised(devices):
        # Generators live on the host: this neither waits for the device nor touches its memory.
        generators[str(device)] = _module(device.type).get_rng_state(device)
    state = {"python": _capture_python(), "torch": generators}
    # Where it was not imported, nothing was drawn from it.
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        state["numpy"] = numpy_random.get_state(legacy=False)
    return state


def restore(
    state: Mapping[str, Any], devices: Iterable[torch.device | str | int] | None = None
) -> None:
    """Set every generator to where it stood when ``capture`` returned ``state``.

    ``devices`` limits the accelerators as for ``capture``; None means all that ``state`` has. They
    are initialised if need be. A generator whose device or library is not here is passed over with
    a RuntimeWarning that names it, for what is drawn in its place will be other numbers.

    Raises ValueError, which names the generator, for a state that it does not take. Those named
    before it have been set by then.
    """
    wanted = None if devices is None else [_device(name) for name in devices]
    try:
        python, generators = state["python"], dict(state["torch"])
        cpu = generators.pop("cpu")
    except (KeyError, TypeError, ValueError):
        raise ValueError("not a saved state of random number generators") from None
    with _naming("Python's random"):
        _restore_python(python)
    with _naming("torch on the CPU"):
        torch.set_rng_state(_bytes_on_cpu(cpu))
    if "numpy" in state:
        with _naming("numpy.random"):
            _restore_numpy(state["numpy"])
    for name, saved in generators.items():
        with _naming(f"torch on {name}"):
            device = _device(name)
            if wanted is None or any(_covers(some, device) for some in wanted):
                _restore_device(device, saved)


@contextmanager
def _naming(generator: str) -> Iterator[None]:
    try:
        yield
    except Warning:  # where the program has made an error of ours
        raise
    except Exception as error:
        raise ValueError(f"random state of {generator}: {error}") from error


def _warn_absent(what: str, why: str) -> None:
    warnings.warn(
        f"the random state of {what} was saved but cannot be restored: {why}; "
        "what is drawn there will differ from a run that was not interrupted",
        RuntimeWarning,
        stacklevel=4,  # restore's caller
    )


# --- Python and NumPy ---------------------------------------------------------------------------


def _capture_python() -> Any:
    state = random.getstate()
    version, words, spare = state
    if version != 3 or len(words) != 625:
        return state  # of an interpreter to come: more to save, but right
    packed = bytearray(_mersenne.pack(*words))
    return {"words": torch.frombuffer(packed, dtype=torch.uint8), "spare": spare}


def _restore_python(state: Any) -> None:
    if isinstance(state, tuple):
        random.setstate(state)
        return
    words, spare = _bytes_on_cpu(state["words"]), state["spare"]
    if words.numel() != _mersenne.size:
        raise ValueError(f"has {words.numel()} bytes instead of {_mersenne.size}")
    if spare is not None and type(spare) is not float:
        raise ValueError(f"the spare value is a {type(spare).__name__}")
    random.setstate((3, _mersenne.unpack(bytes(words.tolist())), spare))


def _restore_numpy(state: Any) -> None:
    try:
        numpy_random: Any = importlib.import_module("numpy.random")
    except ImportError:
        _warn_absent("numpy.random", "NumPy is not installed")
        return
    numpy_random.set_state(state)


# --- torch --------------------------------------------------------------------------------------


def _device(name: torch.device | str | int) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name!r} is not a device") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{name!r}: only the generators of cpu, cuda and mps can be saved")
    return device


def _covers(some: torch.device, device: torch.device) -> bool:
    return some.type == device.type and some.index in (None, device.index)


def _module(kind: str) -> Any:
    return torch.cuda if kind == "cuda" else torch.mps


def _is_initialised(kind: str) -> bool:
    if kind == "cuda":
        return bool(_module(kind).is_initialized())
    # MPS starts with the first use of its one generator, which torch.manual_seed() is already.
    return torch.backends.mps.is_available()


def _initialised(names: Iterable[torch.device | str | int] | None) -> list[torch.device]:
    """The accelerators among ``names`` (None: of all) whose generators can have drawn."""
    wanted = None if names is None else [_device(name) for name in names]
    found: list[torch.device] = []
    for kind in ("cuda", "mps"):
        if (wanted is None or any(d.type == kind for d in wanted)) and _is_initialised(kind):
            present = [torch.device(kind, i) for i in range(_module(kind).device_count())]
            if wanted is None:
                found += present
                continue
            for some in wanted:
                if some.type == kind and not any(_covers(some, device) for device in present):
                    raise ValueError(
                        f"{some} is not here: this process has {len(present)} of {kind}"
                    )
            found += [d for d in present if any(_covers(some, d) for some in wanted)]
    return found


def _restore_device(device: torch.device, saved: Any) -> None:
    value = _bytes_on_cpu(saved)
    module = _module(device.type)
    count = module.device_count()
    if (device.index or 0) >= count:
        _warn_absent(str(device), f"this process has {count} {device.type} devices")
        return
    if device.type == "cuda":
        # Before CUDA starts, torch would queue this call and run it *before* a manual_seed() that
        # is queued as well, which then undoes it.
        module.init()
    module.set_rng_state(value, device)


def _bytes_on_cpu(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.uint8:
        raise ValueError("not a tensor of bytes")
    return value.cpu()
