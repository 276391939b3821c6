"""Trains a GPT on text with a checkpoint at every step, and goes on after whatever ended it.

    python examples/train_optimized.py --config tiny --output-dir runs/a --auto-resume

The device is CUDA, MPS or the CPU, the first that is there; what that decides is printed in a table
before anything starts. Killed, started again with --auto-resume: it goes on from the newest sound
checkpoint, takes the steps again that were lost, and compares their losses with those that were
logged before: no bit may differ. docs/training-script.md tells the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import _arguments
import _devices
from _losslog import AuditFailed
from _settings import TrainError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments.parse(arguments, __doc__.split("\n", 1)[0])
    environment = dict(os.environ)  # as the user left it
    try:
        likely = _devices.likely_kind(options.device, sys.platform)
        rows = _devices.environment_settings(likely, environment, options.deterministic)
        put = _devices.apply_environment(rows, os.environ)
        # Now, and no line earlier: torch reads some of them while it is imported.
        import torch
        from _training import run

        device = _devices.choose_device(options.device, _devices.available_kinds(torch))
        if _devices.kind_of(device.value) != likely:
            for name in put:
                del os.environ[name]
        return run(options, device, environment, _cores())
    except AuditFailed as error:
        print(f"\ntrain: {error}", file=sys.stderr)
        return 3
    except TrainError as error:
        print(f"\ntrain: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"\ntrain: {error}\n`make demo` builds everything that it needs", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain: interrupted; --auto-resume goes on", file=sys.stderr)
        return 130


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
