"""The command line of train_optimized.py. No torch in here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from _settings import CONFIGS, Asked

__all__ = ["asked", "parse"]


def parse(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Exit status: 0 done, 1 failed, 2 wrong arguments, 3 the audit found a difference, "
        "128 and the signal's number where one ended it.",
    )
    switch = argparse.BooleanOptionalAction

    training = parser.add_argument_group("what is trained")
    training.add_argument(
        "--config", choices=CONFIGS, default="small", help="size of the model (default: small)"
    )
    training.add_argument("--data", type=Path, help="a text file (default: made-up text)")
    training.add_argument("--max-steps", type=_count(1), help="optimizer steps of the whole run")
    training.add_argument("--batch-size", type=_count(1), help="samples of one optimizer step")
    training.add_argument(
        "--micro-batch-size",
        type=_count(1),
        help="samples computed at a time, over which gradients are accumulated (default: all)",
    )
    training.add_argument("--learning-rate", type=_positive)
    training.add_argument(
        "--lr-scaling",
        choices=("none", "linear", "sqrt", "device"),
        help="by the batch size relative to the config's (linear, sqrt), or the old rule of each "
        "device (default: none)",
    )
    training.add_argument("--seed", type=_count(0, (1 << 63) - 1), help="(default: 0)")

    machine = parser.add_argument_group("on what")
    machine.add_argument("--device", help="cuda, cuda:<number>, mps or cpu (default: the first)")
    machine.add_argument("--dataloader-workers", type=_count(0), help="processes; 0: none")
    machine.add_argument("--torch-threads", type=_count(1), help="of torch's CPU operators")
    machine.add_argument(
        "--enable-compile", action=switch, default=False, help="torch.compile, or what works of it"
    )
    machine.add_argument(
        "--deterministic", action=switch, default=False, help="the same bits in every run"
    )

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--output-dir", type=Path, default=Path("runs/train"), help="(default: %(default)s)"
    )
    checkpoints.add_argument(
        "--checkpoint-every", type=_count(1), help="steps from one to the next (default: 1)"
    )
    checkpoints.add_argument("--num-threads", type=_count(1, 256), help="that write (default: 4)")
    checkpoints.add_argument("--use-monitor", action=switch, default=False, help="monitor mode")
    checkpoints.add_argument(
        "--resume-from-checkpoint",
        metavar="PATH",
        help="a checkpoint's directory, its name in --output-dir, or a file of the old form",
    )
    checkpoints.add_argument(
        "--auto-resume",
        action=switch,
        default=False,
        help="from the newest valid checkpoint in --output-dir, if there is one",
    )
    checkpoints.add_argument(
        "--audit",
        action=switch,
        default=True,
        help="compare replayed losses with those logged before (default: yes)",
    )
    return parser.parse_args(arguments)


def asked(options: argparse.Namespace) -> Asked:
    """What the device's rules have to respect."""
    return Asked(
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        learning_rate=options.learning_rate,
        lr_scaling=options.lr_scaling,
        dataloader_workers=options.dataloader_workers,
        enable_compile=options.enable_compile,
        deterministic=options.deterministic,
    )


def _count(least: int, most: int | None = None) -> Callable[[str], int]:
    bounds = f"{least} or more" if most is None else f"{least} to {most}"

    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number, {bounds}")
        return value

    return count


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
