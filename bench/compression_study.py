"""Would coding what is saved beat writing it as it is? Prints tables and writes JSON.

    python bench/compression_study.py                  # the study, from scratch: about 40 minutes
    python bench/compression_study.py --quick          # a smoke run: the figures mean nothing

It needs what the extra `bench` brings. It trains a small GPT in three recipes (float32; bfloat16;
bfloat16 with float32 master weights and moments), takes its state early and late, and measures:

1. Each codec on one core, on whole states, block by block. Processor time is what counts, so that
   others on the machine matter little. What it makes of a save's time is a model: `_study.gain`.
2. Some of them in processes that really code and write, on one core and on two, in turn with plain
   writes, to this disk and to one of 500 MB/s, imitated by pacing the writes: does the model hold?
3. A loop that trains and saves at every step to the slow disk, on all cores and with one to spare:
   what is left of the gain where coding takes processor time from training, and what training pays.

Every block is decoded and compared before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import _states
import torch
from _coders import CODECS, FINALISTS, Codec
from _disk import MIB, BareLoop, Disk, Instrument, Operation, compile_loop, describe
from _quiet import Quiet
from _saver import BLOCK_BYTES
from _states import LARGE, RECIPES, SMALL, Sample
from _stats import Interval
from _study import (
    OPTIMIZER,
    WHOLE,
    Bench,
    CodecRow,
    LoopRow,
    SaveRow,
    study_codecs,
    study_loop,
    study_saves,
)

GIB = 1 << 30
DISK_BYTES = 128 * MIB
RESULTS = Path(__file__).resolve().parent / "results"


# --- What it runs on ------------------------------------------------------------------------------


def disk_speeds(
    folder: Path, quiet: Quiet, quick: bool
) -> tuple[Instrument, dict[Operation, float]]:
    """The bare loop's fastest configuration here, and its bytes per second."""
    disk = Disk(folder, MIB if quick else DISK_BYTES)
    loop: Instrument = BareLoop(compile_loop(), MIB, 4)
    if not quick:
        loop = disk.best("overwrite", quick=True, progress=lambda text: None)[0]
    operations: tuple[Operation, ...] = ("overwrite", "fresh", "read")
    times: dict[Operation, list[float]] = {operation: [] for operation in operations}
    for _, operation in itertools.product(range(1 if quick else 7), operations):
        quiet.wait(1)
        times[operation].append(disk.seconds(loop, operation))
    return loop, {o: disk.size_bytes / statistics.median(seen) for o, seen in times.items()}


def facts(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    cpu = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu}, {os.cpu_count()} cores, {memory / GIB:.0f} GiB, {platform.machine()}",
        "load when it began": f"{os.getloadavg()[0]:.2f}",
        "kernel": platform.release(),
        **describe(folder),
        "slow disk": f"{options.slow_mb_s:g} MB/s: modelled, and imitated by pacing writes",
        "block size": f"{BLOCK_BYTES // MIB} MiB",
        "rounds": f"{options.rounds}; {options.save_rounds} where processes save",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def choose(only: Sequence[str] | None) -> list[Codec]:
    """The codecs to compare. Raises SystemExit where the package of one is missing."""
    wanted = [CODECS[name] for name in only or CODECS]
    missing = sorted({codec.package for codec in wanted if not codec.is_installed()})
    if missing:
        names = ", ".join(missing)
        sys.exit(f"compression_study: missing {names}: pip install {' '.join(missing)}")
    return wanted


def about(sample: Sample) -> dict[str, Any]:
    """What a reader has to know of a sample, and how much of it did not change in its last step."""
    found: dict[str, Any] = {
        "recipe": sample.recipe, "step": sample.step, "learning_rate": sample.learning_rate,
        "loss": sample.loss,
        "bytes": {kind: tensor.nbytes for kind, tensor in sample.kinds.items()},
        "unchanged": {
            kind: round((tensor == sample.previous[kind]).float().mean().item(), 4)
            for kind, tensor in sample.kinds.items()
        },
    }  # fmt: skip
    if "master" in sample.kinds:
        same = torch.equal(sample.kinds["master"].bfloat16(), sample.kinds["weights"])
        found["weights are their masters rounded"] = same
    return found


# --- Tables ---------------------------------------------------------------------------------------


def number(figure: float) -> str:
    return f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:.0f}"


def ranged(figure: Interval | None) -> str:
    if figure is None:
        return ""
    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def codec_tables(rows: Sequence[CodecRow]) -> Iterator[str]:
    for recipe, step, scope in dict.fromkeys((r.recipe, r.step, r.scope) for r in rows):
        mine = [r for r in rows if (r.recipe, r.step, r.scope) == (recipe, step, scope)]
        kinds, gains = list(mine[0].ratio_by_kind), list(mine[0].gains)
        lines = [
            [
                row.codec, f"{row.ratio:.3f}", *(f"{row.ratio_by_kind[k]:.3f}" for k in kinds),
                ranged(row.code_gb_s), number(row.decode_gb_s.value), ranged(row.core_s_per_gib),
                number(row.breaks_even_gb_s), *(ranged(row.gains[g]) for g in gains),
            ]
            for row in mine
        ]  # fmt: skip
        heads = [
            "codec", "ratio", *kinds, "codes GB/s", "decodes GB/s", "core-s/GiB",
            "keeps up with GB/s", *gains,
        ]  # fmt: skip
        what = {WHOLE: "whole state", OPTIMIZER: "optimizer coded, weights as they are"}[scope]
        yield f"### {recipe}, step {step}: {what}\n\n{table(heads, lines)}"


def save_table(rows: Sequence[SaveRow]) -> str:
    disks = list(rows[0].sooner)
    heads = ["state", "codec", "cores", "core-s/GiB", *disks, *(f"{d}, ms" for d in disks)]
    lines = [
        [
            f"{row.recipe}, step {row.step}", row.codec, str(row.cores), ranged(row.core_s_per_gib),
            *(ranged(row.sooner[disk]) for disk in disks),
            *(ranged(row.seconds[disk].scaled(1e3)) for disk in disks),
        ]
        for row in rows
    ]  # fmt: skip
    return table(heads, lines)


def loop_table(rows: Sequence[LoopRow]) -> str:
    heads = [
        "training", "threads", "saving", "step, ms", "longer than without saving, %",
        "durable after, ms", "times sooner than as it is",
    ]  # fmt: skip
    lines = [
        [
            row.recipe, str(row.threads), row.codec, ranged(row.step_s.scaled(1e3)),
            ranged(row.longer_percent), ranged(row.durable_s and row.durable_s.scaled(1e3)),
            ranged(row.sooner),
        ]
        for row in rows
    ]  # fmt: skip
    return table(heads, lines)


# --- The run --------------------------------------------------------------------------------------


def run(options: argparse.Namespace, folder: Path) -> int:
    codecs = choose(options.codec)
    finalists = [codec for codec in codecs if options.codec or codec.name in FINALISTS]
    names = [codec.name for codec in finalists]
    alone = [codec.name for codec in finalists if not codec.delta]
    known = facts(options, folder)
    known["codecs"] = ", ".join(dict.fromkeys(codec.version() for codec in codecs))
    torch.set_num_threads(1)
    states: Path = options.states or folder
    states.mkdir(parents=True, exist_ok=True)
    config = SMALL if options.quick else LARGE
    recipes = options.recipe or RECIPES
    for recipe in recipes:
        _states.keep(states, recipe, config, [options.early, options.steps])

    quiet = Quiet(0.0 if options.quick else options.patience_s)
    loop, speeds = disk_speeds(folder, quiet, options.quick)
    known |= {f"disk, {o}": f"{speed / 1e9:.2f} GB/s" for o, speed in speeds.items()}
    known["disk is"] = loop.name()
    bench = Bench(
        folder, loop, config, options.steps, options.rounds, options.save_rounds,
        options.slow_mb_s * 1e6, speeds["overwrite"], speeds["read"], quiet,
    )  # fmt: skip
    samples: list[dict[str, Any]] = []
    coded: list[CodecRow] = []
    saved: list[SaveRow] = []
    looped: list[LoopRow] = []
    for recipe, step in itertools.product(recipes, (options.early, options.steps)):
        sample = _states.load(states, recipe, step)
        samples.append(about(sample))
        coded += study_codecs(bench, sample, codecs)
    for recipe in recipes:
        saved += study_saves(bench, _states.load(states, recipe, options.steps), names)
    cores = os.cpu_count() or 1
    for recipe, threads in itertools.product(recipes, sorted({max(1, cores - 1), cores})):
        looped += study_loop(bench, recipe, threads, alone)
    known["quiet"] = str(quiet)

    for key, value in known.items():
        print(f"{key + ':':24} {value}")
    for described in samples:
        print(f"{'sample:':24} {json.dumps(described)}")
    print("\n## Codecs alone, and what the model makes of them\n")
    print("\n\n".join(codec_tables(coded)))
    print(f"\n## Coding and writing: times sooner durable\n\n{save_table(saved)}")
    print(f"\n## In a training loop, slow disk\n\n{loop_table(looped)}")
    if options.quick:
        print("\nA smoke run: these figures mean nothing.")
    path: Path = options.output or RESULTS / f"compression-{datetime.date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(known, samples, coded=coded, saved=saved, looped=looped))
    print(f"\nwritten to {path}")
    return 0


def as_json(known: dict[str, str], samples: Sequence[Any], **parts: Sequence[Any]) -> str:
    """A line for each row; figures to four digits, an interval as [value, low, high]."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"value", "low", "high", "samples"}:
                return [plain(value[key]) for key in ("value", "low", "high")]
            return {key: plain(inner) for key, inner in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    rows = {"samples": samples} | {k: [plain(asdict(r)) for r in v] for k, v in parts.items()}
    listed = [
        f'"{name}": [\n' + ",\n".join(map(json.dumps, each)) + "\n]" for name, each in rows.items()
    ]
    return "{\n" + ",\n".join([f'"facts": {json.dumps(known, indent=1)}', *listed]) + "\n}\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke run: a tiny model, few steps and rounds")
    add("--steps", type=int, help="to train each recipe for (default 300)")
    add("--rounds", type=int, help="of parts 1 and 3 (default 7)")
    add("--save-rounds", type=int, help="of part 2 (default 13)")
    add("--slow-mb-s", type=float, default=500.0, help="the slow disk's speed (default 500)")
    add("--patience-s", type=float, default=480.0,
        help="to wait in all for cores that others use (default 480)")  # fmt: skip
    add("--recipe", action="append", choices=RECIPES, help="this one alone; may be given again")
    add("--codec", action="append", choices=list(CODECS), metavar="NAME",
        help=f"this one alone, in all parts; may be given again: {'; '.join(CODECS)}")  # fmt: skip
    add("--dir", type=Path, default=Path(), help="on the disk to measure (default: here)")
    add("--states", type=Path, help="keeps the trained states here, and takes those that are here")
    add("--output", type=Path, help="where the figures go (default: under bench/results/)")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (6 if options.quick else 300)
    options.early = 3 if options.quick else 10
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.save_rounds = options.save_rounds or (2 if options.quick else 13)
    if options.steps <= options.early or options.rounds < 1 or options.save_rounds < 1:
        parser.error(f"--steps is more than {options.early}, rounds are at least 1")
    if options.slow_mb_s <= 0:
        parser.error("--slow-mb-s is more than 0")
    return options


@contextlib.contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, also after Ctrl-C and SIGTERM."""

    def ended(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)
    folder = Path(tempfile.mkdtemp(prefix="compression-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with working_folder(options.dir) as folder:
        return run(options, folder)


if __name__ == "__main__":
    sys.exit(main())
