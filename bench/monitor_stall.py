"""How long training is held for a checkpoint in monitor mode, beside direct mode: prints a table.

    python bench/monitor_stall.py                       # 31 pairs of each kind of loop
    python bench/monitor_stall.py --pairs 3 --steps 5   # a smoke run: the figures mean nothing
    python bench/monitor_stall.py --json FILE

Each run is a new trainer that saves at every step; what counts is `stats()["stall_s"]` over the
steps after the first few, when plans are made and files are recycled, divided by the checkpoints.
Runs of both modes take turns in one process, and each monitor run is divided by the direct one
beside it; the A/A row divides direct runs by direct ones. The goal, a stall no larger than direct
mode's, counts as reached when the ratio's interval ends below 1 + MARGIN. Durable time
stands beside the stall: less of the one for more of the other would be no gain. "Direct, small
pages" is direct mode without huge pages, which most systems do not grant to the memory that monitor
mode shares: what these pages cost is none of the two processes' making.

Two loops: "processor busy" computes forward and backward on the processors that staging needs too;
"emulated compute" sleeps instead, as with an accelerator, and then takes the same AdamW step.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _disk import MIB, describe
from _stats import Interval, bootstrap, in_turn, paired_differences, paired_ratios
from torch import nn

try:
    from pccheck_ext import LayerwiseCheckpointTrainer
except ModuleNotFoundError as missing:
    sys.exit(f"bench: {missing}. Build the package first: pip install --no-build-isolation -e .")

LEAD = 6  # steps until plans are settled and files are recycled
LOOPS = ("processor busy", "emulated compute")


MARGIN = 0.1
ARMS = ("direct", "monitor", "direct, small pages", "direct again")
PR_SET_THP_DISABLE = 41


@dataclass(frozen=True)
class Run:
    """Milliseconds per checkpoint, and per step of the loop."""

    stall: float
    durable: float
    step: float


class Loop:
    """A small training, the same in every run."""

    def __init__(self, kind: str, width: int, steps: int, folder: Path) -> None:
        self.kind, self.width, self.steps, self.folder = kind, width, steps, folder

    def run(self, *, use_monitor: bool, huge_pages: bool = True) -> Run:
        if ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, not huge_pages, 0, 0, 0) != 0:
            raise OSError("prctl(PR_SET_THP_DISABLE) is refused here")
        torch.manual_seed(1)
        layers = [nn.Linear(self.width, self.width) for _ in range(8)]
        model = nn.Sequential(*layers)
        trainer = LayerwiseCheckpointTrainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-4),
            use_monitor=use_monitor,
            checkpoint_dir=tempfile.mkdtemp(dir=self.folder),
            checkpoint_every=1,
        )
        inputs = torch.randn(64, self.width)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)

        def step() -> None:
            if self.kind == "emulated compute":
                time.sleep(0.03)
            else:
                trainer.zero_grad()
                model(inputs).square().mean().backward()
            trainer.step()

        for _ in range(LEAD):
            step()
        trainer.wait()
        before, begun = trainer.stats(), time.perf_counter()
        for _ in range(self.steps):
            step()
        took = time.perf_counter() - begun
        trainer.wait()
        after = trainer.stats()
        trainer.shutdown()
        shutil.rmtree(trainer.checkpoint_dir)
        count = after["checkpoints_committed"] - before["checkpoints_committed"]
        if count != self.steps:
            raise RuntimeError(f"{count} checkpoints of {self.steps} steps were committed")
        durable = (
            after["durable_s_mean"] * after["checkpoints_committed"]
            - before["durable_s_mean"] * before["checkpoints_committed"]
        )
        return Run(
            stall=(after["stall_s"] - before["stall_s"]) / count * 1e3,
            durable=durable / count * 1e3,
            step=took / self.steps * 1e3,
        )


def show(name: str, figure: Interval, unit: str) -> None:
    print(f"  {name:<44} {figure.value:8.3f} {unit:<2} [{figure.low:.3f}, {figure.high:.3f}]")


def measure(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    loop = Loop(kind, options.width, options.steps, folder)
    runs: dict[str, list[Run]] = {name: [] for name in ARMS}

    def arm(name: str) -> Callable[[], float]:
        def one() -> float:
            small = name == "direct, small pages"
            runs[name].append(loop.run(use_monitor=name == "monitor", huge_pages=not small))
            return runs[name][-1].stall

        return one

    stalls = in_turn({name: arm(name) for name in runs}, options.pairs)
    counted = {name: found[-options.pairs :] for name, found in runs.items()}
    print(f"{kind}: {options.pairs} pairs, {options.steps} checkpoints a run")
    for name in runs:
        show(f"stall of a checkpoint, {name}", bootstrap(stalls[name]), "ms")
    for name in runs:
        show(f"durable, {name}", bootstrap([run.durable for run in counted[name]]), "ms")
    for name in runs:
        show(f"step, {name}", bootstrap([run.step for run in counted[name]]), "ms")
    ratio = bootstrap(paired_ratios(stalls["monitor"], stalls["direct"]))
    beyond = bootstrap(paired_differences(stalls["monitor"], stalls["direct"]))
    noise = bootstrap(paired_ratios(stalls["direct again"], stalls["direct"]))
    show("stall, monitor / direct", ratio, "x")
    show("stall, monitor less direct", beyond, "ms")
    show("A/A: direct again / direct", noise, "x")
    pages = bootstrap(paired_ratios(stalls["monitor"], stalls["direct, small pages"]))
    show("stall, monitor / direct, small pages", pages, "x")
    reached = ratio.high <= 1 + MARGIN
    print(f"  no larger than direct mode's, within {MARGIN:.0%}: {'yes' if reached else 'NO'}")
    return {
        "ratio": ratio.as_dict(),
        "difference_ms": beyond.as_dict(),
        "noise": noise.as_dict(),
        "ratio_to_small_pages": pages.as_dict(),
        "runs": {name: [asdict(run) for run in found] for name, found in counted.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--steps", type=int, default=15, help="checkpoints that count, of each run")
    parser.add_argument("--width", type=int, default=512, help="of 8 square layers")
    parser.add_argument("--loop", choices=LOOPS, action="append", help="default: both")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where checkpoints go")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    state = 3 * 4 * 8 * options.width * (options.width + 1)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "state": f"{state / MIB:.1f} MiB",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "processors": str(len(os.sched_getaffinity(0))),
        **describe(options.dir),
    }
    print("; ".join(f"{what}: {value}" for what, value in about.items()))
    folder = Path(tempfile.mkdtemp(prefix="pccheck-bench-", dir=options.dir))
    try:
        found = {kind: measure(kind, options, folder) for kind in options.loop or LOOPS}
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
