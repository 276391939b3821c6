"""What each tuning argument does, measured: durable time, and how long training is held.

Every argument is varied alone, from the default setting; its values run in turn (A B C A B C), so
that the shared machine meets them alike, and each is compared with the default beside it. Two
figures for each value: the time from the call of step() to the commit, with nothing else to do; and
the time of one step in a loop that does nothing but step, where every further checkpoint meets the
one before it. Chunks are those of save_full_checkpoint(), to new files. `make bench-arguments` runs
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _disk
import _stats
import first_slice
import torch

from pccheck_ext import LayerwiseCheckpointTrainer

STEPS = 6  # in the loop that only steps
DEFAULT: dict[str, Any] = {
    "num_threads": 4,
    "max_async": 2,
    "batch_size_mb": 100.0,
    "ratio": 2.0,
    "buffer_size_mb": None,
    "use_monitor": False,
}
VALUES: dict[str, list[Any]] = {
    "num_threads": [1, 2, 4, 8, 16],
    "max_async": [1, 2, 4, 8],
    "batch_size_mb": [25.0, 50.0, 100.0, 200.0],
    "ratio": [1.5, 2.0, 3.0],
    "buffer_size_mb": [None, 5.0, 10.0, 50.0],
    "use_monitor": [False, True],
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "high throughput": {"num_threads": 16, "max_async": 8, "batch_size_mb": 200.0, "ratio": 3.0},
    "low latency": {"num_threads": 4, "max_async": 2, "batch_size_mb": 50.0, "ratio": 1.5},
    "little memory": {
        "num_threads": 4,
        "max_async": 2,
        "batch_size_mb": 50.0,
        "ratio": 1.5,
        "buffer_size_mb": 5.0,
    },
}
CHUNKS: list[int | str] = [1, 2, 3, 4, 8, "auto"]


class Setting:
    """A trainer with some arguments on a state of its own."""

    def __init__(self, folder: Path, size_bytes: int, arguments: Mapping[str, Any]) -> None:
        self.state = first_slice.State(size_bytes).without_gradients()
        self.folder = folder
        self.trainer = LayerwiseCheckpointTrainer(
            self.state.model,
            self.state.optimizer,
            checkpoint_dir=folder,
            keep_last=2,
            **{**DEFAULT, **arguments},
        )
        self._saves = 0

    def durable_s(self) -> float:
        start = time.perf_counter()
        self.trainer.step()
        self.trainer.end_step()
        self.trainer.wait()
        return time.perf_counter() - start

    def held_s(self) -> float:
        """Seconds for one step of a loop that does nothing else."""
        start = time.perf_counter()
        for _ in range(STEPS):
            self.trainer.step()
            self.trainer.end_step()
        took = time.perf_counter() - start
        self.trainer.wait()
        return took / STEPS

    def whole_s(self) -> float:
        self._saves += 1
        start = time.perf_counter()
        self.trainer.save_full_checkpoint(f"whole-{self._saves}")
        self.trainer.wait()
        took = time.perf_counter() - start
        first_slice.remove_folder(self.folder / f"whole-{self._saves}")
        return took

    def close(self) -> None:
        self.trainer.shutdown()
        first_slice.remove_folder(self.folder)


def compare(
    folder: Path, options: argparse.Namespace, settings: Mapping[str, Mapping[str, Any]], base: str
) -> list[dict[str, Any]]:
    """Durable and held times of every setting, as ratios to `base` too."""
    live = {
        name: Setting(folder / f"s{i}", options.size_mib << 20, arguments)
        for i, (name, arguments) in enumerate(settings.items())
    }
    try:
        durable = _stats.in_turn(
            {n: s.durable_s for n, s in live.items()}, options.rounds, warm_up=4
        )
        held = _stats.in_turn({n: s.held_s for n, s in live.items()}, options.rounds, warm_up=1)
        staging = {n: s.trainer.stats()["staging_bytes"] / 2**20 for n, s in live.items()}
    finally:
        for setting in live.values():
            setting.close()
    return [
        {
            "value": name,
            "durable_ms": 1e3 * statistics.median(durable[name]),
            "durable_ratio": interval(durable[name], durable[base]),
            "held_ms": 1e3 * statistics.median(held[name]),
            "held_ratio": interval(held[name], held[base]),
            "staging_mib": staging[name],
        }
        for name in live
    ]


def chunks(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole saves in so many chunks, one trainer for each count."""
    live = {
        str(count): Setting(
            folder / f"c{count}", options.size_mib << 20, {"checkpoint_chunk_count": count}
        )
        for count in CHUNKS
    }
    try:
        for setting in live.values():
            setting.durable_s()  # "auto" goes by what it has seen
        took = _stats.in_turn({n: s.whole_s for n, s in live.items()}, options.rounds)
    finally:
        for setting in live.values():
            setting.close()
    return [
        {
            "value": name,
            "durable_ms": 1e3 * statistics.median(took[name]),
            "throughput_ratio": interval(took["1"], took[name]),
        }
        for name in live
    ]


def interval(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    return _stats.bootstrap(_stats.paired_ratios(numerators, denominators)).as_dict()


def shown(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def report(figures: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = []
    for argument, rows in figures.items():
        lines += ["", f"### {argument}", ""]
        if argument == "checkpoint_chunk_count":
            lines += ["| value | durable | throughput / one chunk's |", "|---|---|---|"]
            lines += [
                f"| {r['value']} | {r['durable_ms']:.0f} ms | {shown(r['throughput_ratio'])} |"
                for r in rows
            ]
            continue
        lines += [
            "| value | durable | / default | a step of a loop that only steps | / default "
            "| staging memory |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['value']} | {r['durable_ms']:.0f} ms | {shown(r['durable_ratio'])} "
            f"| {r['held_ms']:.0f} ms | {shown(r['held_ratio'])} | {r['staging_mib']:.0f} MiB |"
            for r in rows
        ]
    return "\n".join(lines)


def named(argument: str) -> dict[str, dict[str, Any]]:
    return {str(value): {argument: value} for value in VALUES[argument]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    rows = [*VALUES, "checkpoint_chunk_count", "presets"]
    parser.add_argument("--only", action="append", choices=rows, help="this argument alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size-mib", type=int, default=256, help="the state's size")
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures: dict[str, list[dict[str, Any]]] = {}
    with first_slice.working_folder(options.dir) as folder:
        runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
            argument: lambda argument=argument: compare(  # type: ignore[misc]
                folder, options, named(argument), str(DEFAULT[argument])
            )
            for argument in VALUES
        }
        runs["checkpoint_chunk_count"] = lambda: chunks(folder, options)
        runs["presets"] = lambda: compare(folder, options, PRESETS, "default")
        for argument in options.only or rows:
            print(f"{argument} ...", file=sys.stderr, flush=True)
            figures[argument] = runs[argument]()
        about = {"state": f"{options.size_mib} MiB", **_disk.describe(folder)}
    print(report(figures))
    if options.json:
        record = SimpleNamespace(date=time.strftime("%Y-%m-%d"), about=about, figures=figures)
        options.json.write_text(json.dumps(vars(record), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
