"""What compression_study.py measures: codecs alone, codecs that write, a loop that trains."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from _coders import Codec, Coded, Words
from _disk import Instrument
from _quiet import Quiet
from _saver import Memory, Saved, Saver, blocks_of, rounded
from _states import GPTConfig, Sample, Training
from _stats import Interval, bootstrap, paired_ratios
from torch import Tensor

__all__ = [
    "OPTIMIZER",
    "PLAIN",
    "WHOLE",
    "Bench",
    "CodecRow",
    "LoopRow",
    "SaveRow",
    "gain",
    "study_codecs",
    "study_loop",
    "study_saves",
]

T = TypeVar("T")
GIB = 1 << 30
EARLY_STEP = 10
LOOP_STEPS = 3
RESAMPLES = 1_000
WHOLE, OPTIMIZER = "whole", "optimizer alone"
PLAIN, AGAIN = "as it is", " again"
NOTHING = "nothing"


@dataclass
class Bench:
    """What the measurements share: the disk, the codecs, how often and how fast."""

    folder: Path
    loop: Instrument
    config: GPTConfig
    steps: int
    rounds: int
    save_rounds: int
    slow_bytes_s: float
    write_bytes_s: float
    read_bytes_s: float
    quiet: Quiet
    started: float = field(default_factory=time.monotonic)

    def progress(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:4.0f} s  {text}", file=sys.stderr, flush=True)

    def in_turn(
        self, label: str, arms: Mapping[str, Callable[[], T]], rounds: int
    ) -> dict[str, list[T]]:
        """Each arm once a round, in their order; a first round warms up and is left out."""
        self.progress(f"{label}: {len(arms)} in turn, {rounds} rounds")
        found: dict[str, list[T]] = {name: [] for name in arms}
        for turn in range(1 + rounds):
            for name, arm in arms.items():
                measured = self.quiet.measure(os.cpu_count() or 1, arm)
                if turn > 0:
                    found[name].append(measured)
        return found


def interval(samples: Sequence[float]) -> Interval:
    return bootstrap(samples, resamples=RESAMPLES)


def words_of(tensor: Tensor) -> Words:
    """The bits of a flat tensor as unsigned integers, without a copy."""
    return tensor.view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


# --- Part 1: codecs on one core, and what a model makes of them -----------------------------------


def gain(plain_s: float, code_s: float, share: float, blocks: int) -> float:
    """How many times sooner a save is durable than without a codec.

    `plain_s` is what writing all bytes takes, `share` how many of them are left to write, `code_s`
    what coding takes on the cores given to it. A block is coded while the one before is written,
    and the slower of the two decides, but for the first block or the last. Copying and checksumming
    are left out on both sides, and so is what coding and writing take from each other: what is
    measured beside this can only be worse.
    """
    write_s = plain_s * share
    return plain_s / (max(code_s, write_s) + min(code_s, write_s) / blocks)


@dataclass
class Timed:
    """What one codec did to one kind of tensors, round by round."""

    size_bytes: int
    coded: list[Coded]
    code_s: list[float] = field(default_factory=list)  # of the processor, as decode_s
    decode_s: list[float] = field(default_factory=list)

    @property
    def written_bytes(self) -> int:
        """Coded blocks begin at multiples of 4096; stored ones lie as without a codec."""
        return sum(c.size_bytes if c.stored else rounded(c.size_bytes) for c in self.coded)


@dataclass(frozen=True)
class CodecRow:
    recipe: str
    step: int
    scope: str  # WHOLE, or OPTIMIZER: the weights stay as they are
    codec: str
    ratio: float  # of all bytes
    ratio_by_kind: Mapping[str, float]
    code_gb_s: Interval  # of what is coded, on one core
    decode_gb_s: Interval
    core_s_per_gib: Interval  # of all bytes
    breaks_even_gb_s: float  # one core does not keep up with a disk that is faster than this
    gains: Mapping[str, Interval]  # of saving; "restore ..." of reading back


def study_codecs(bench: Bench, sample: Sample, codecs: Sequence[Codec]) -> list[CodecRow]:
    """One whole state under all codecs.

    Raises AssertionError, before anything is timed, when a block does not come back bit for bit.
    """
    label = f"{sample.recipe}, step {sample.step}"
    blocks = {
        kind: list(
            zip(*(blocks_of(words_of(t)) for t in (now, sample.previous[kind])), strict=True)
        )
        for kind, now in sample.kinds.items()
    }

    def checked(codec: Codec, kind: str) -> Iterator[Coded]:
        for words, previous in blocks[kind]:
            coded = codec.encode(words, previous)
            if not np.array_equal(codec.decode(coded, words.dtype, len(words), previous), words):
                raise AssertionError(f"{codec.name} does not bring {kind} of {label} back")
            yield coded

    def time_one(codec: Codec, kind: str, timed: Timed) -> None:
        """Coders have one thread: its processor time is the time on a core of its own."""
        start = time.process_time()
        for words, previous in blocks[kind]:
            # What comes out is dropped at once: the engine would code into a slot it has.
            codec.encode(words, previous)
        between = time.process_time()
        for coded, (words, previous) in zip(timed.coded, blocks[kind], strict=True):
            codec.decode(coded, words.dtype, len(words), previous)
        timed.code_s.append(between - start)
        timed.decode_s.append(time.process_time() - between)

    bench.progress(f"{label}: {len(codecs)} codecs, {bench.rounds} rounds")
    found = {
        codec.name: {
            kind: Timed(tensor.nbytes, list(checked(codec, kind)))
            for kind, tensor in sample.kinds.items()
        }
        for codec in codecs
    }
    for _ in range(bench.rounds):  # checking was the warm-up
        for codec in codecs:
            bench.quiet.wait(1)
            for kind, timed in found[codec.name].items():
                time_one(codec, kind, timed)
    return [
        codec_row(bench, sample, name, scope, timed)
        for name, timed in found.items()
        for scope in (WHOLE, OPTIMIZER)
    ]


def codec_row(
    bench: Bench, sample: Sample, codec: str, scope: str, by_kind: Mapping[str, Timed]
) -> CodecRow:
    used = [t for kind, t in by_kind.items() if scope == WHOLE or kind != "weights"]
    code_s = [sum(seconds) for seconds in zip(*(t.code_s for t in used), strict=True)]
    decode_s = [sum(seconds) for seconds in zip(*(t.decode_s for t in used), strict=True)]
    all_bytes = sum(t.size_bytes for t in by_kind.values())
    coded_bytes = sum(t.size_bytes for t in used)
    share = 1 - (coded_bytes - sum(t.written_bytes for t in used)) / all_bytes
    blocks = sum(len(t.coded) for t in used)

    def gained(bytes_s: float, cores: int, seconds: Sequence[float]) -> Interval:
        return interval([gain(all_bytes / bytes_s, s / cores, share, blocks) for s in seconds])

    gains = {  # two cores are taken to be twice as fast: part 2 measures it
        f"{disk}, {cores}": gained(bytes_s, cores, code_s)
        for disk, bytes_s in (("this disk", bench.write_bytes_s), ("slow disk", bench.slow_bytes_s))
        for cores in (1, 2)
    }
    gains["restore, this disk, 1"] = gained(bench.read_bytes_s, 1, decode_s)
    gains["restore, slow disk, 1"] = gained(bench.slow_bytes_s, 1, decode_s)
    return CodecRow(
        sample.recipe, sample.step, scope, codec, 1 / share,
        {kind: t.size_bytes / t.written_bytes for kind, t in by_kind.items()},
        interval([coded_bytes / s / 1e9 for s in code_s]),
        interval([coded_bytes / s / 1e9 for s in decode_s]),
        interval([s * GIB / all_bytes for s in code_s]),
        all_bytes / statistics.median(code_s) / 1e9,
        gains,
    )  # fmt: skip


# --- Part 2: the best ones, coding and writing ----------------------------------------------------


@dataclass(frozen=True)
class SaveRow:
    recipe: str
    step: int
    codec: str
    cores: int
    core_s_per_gib: Interval  # slow disk: copying, coding, writing
    seconds: Mapping[str, Interval]  # by disk
    sooner: Mapping[str, Interval]  # durable so many times sooner than the plain one


def study_saves(bench: Bench, sample: Sample, names: Sequence[str]) -> list[SaveRow]:
    """Processes that code and write a state, in turn with plain writes.

    On this disk the plain one is the faster of the bare loop and the processes that do not code, on
    the slow disk one such process.
    """
    arrays = {kind: words_of(tensor) for kind, tensor in sample.kinds.items()}
    arrays |= {f"previous.{kind}": words_of(tensor) for kind, tensor in sample.previous.items()}
    size_bytes = sum(tensor.nbytes for tensor in sample.kinds.values())
    memory = Memory(arrays)
    savers = {cores: Saver(memory, cores, writers=4) for cores in (1, 2)}
    plain_file = [(bench.folder / "plain", rounded(size_bytes))]

    def arm(codec: str, cores: int, disk: str) -> Callable[[], Saved]:
        coded = None if codec.startswith(PLAIN) else codec
        pace = bench.slow_bytes_s if disk == "slow disk" else None
        return lambda: savers[cores].save(coded, bench.folder / f"saved-{cores}", pace)

    disks = ("this disk", "slow disk")
    kinds = list(itertools.product((PLAIN, *names, PLAIN + AGAIN), (1, 2)))
    arms = {
        f"{codec}; {cores}; {disk}": arm(codec, cores, disk)
        for (codec, cores), disk in itertools.product(kinds, disks)
    }
    arms["bare loop"] = lambda: Saved(bench.loop.seconds("overwrite", plain_file), 0.0)
    try:
        found = bench.in_turn(f"{sample.recipe}, saving", arms, bench.save_rounds)
    finally:
        for saver in savers.values():
            saver.close()
        memory.close()
    times = {key: [saved.durable_s for saved in each] for key, each in found.items()}
    here = ("bare loop", f"{PLAIN}; 1; this disk", f"{PLAIN}; 2; this disk")
    plain = {
        "this disk": min((times[key] for key in here), key=statistics.median),
        "slow disk": times[f"{PLAIN}; 1; slow disk"],
    }
    rows = []
    for codec, cores in kinds:
        taken = {disk: times[f"{codec}; {cores}; {disk}"] for disk in disks}
        used = [saved.core_s for saved in found[f"{codec}; {cores}; slow disk"]]
        rows.append(
            SaveRow(
                sample.recipe, sample.step, codec, cores,
                interval([s * GIB / size_bytes for s in used]),
                {disk: interval(taken[disk]) for disk in disks},
                {disk: interval(paired_ratios(plain[disk], taken[disk])) for disk in disks},
            )
        )  # fmt: skip
    return rows


# --- Part 3: in a training loop -------------------------------------------------------------------


@dataclass(frozen=True)
class LoopRow:
    recipe: str
    threads: int  # that train
    codec: str
    step_s: Interval
    longer_percent: Interval  # than the step of the loop that saves nothing
    durable_s: Interval | None
    sooner: Interval | None  # durable so many times sooner than what is saved as it is


def study_loop(bench: Bench, recipe: str, threads: int, names: Sequence[str]) -> list[LoopRow]:
    """Trains on so many threads, a checkpoint every step to the slow disk, one in flight."""
    torch.set_num_threads(threads)
    training = Training(recipe, bench.config, steps=bench.steps)
    for _ in range(EARLY_STEP):
        training.gradients()
        training.update()
    flat = training.flat()
    memory = Memory({kind: words_of(tensor) for kind, tensor in flat.items()})
    training.move_to(
        {
            kind: torch.frombuffer(memory.map, dtype=flat[kind].dtype, count=count, offset=offset)
            for kind, (offset, _, count) in memory.layout.items()
        }
    )
    saver = Saver(memory, 1, writers=1)
    path = bench.folder / "loop"

    def steps(name: str) -> tuple[float, float]:
        """The mean step and durable time. The first step, which waits for nothing, is left out."""
        saves = not name.startswith(NOTHING)
        codec = None if name.startswith(PLAIN) else name
        saved: list[Saved] = []
        start = 0.0
        for i in range(1 + LOOP_STEPS):
            if i == 1:
                start = time.perf_counter()
            training.gradients()
            if saves and i > 0:
                saver.staged()
            training.update()
            if saves:
                if i > 0:
                    saved.append(saver.end())
                saver.begin(codec, path, bench.slow_bytes_s)
        took = (time.perf_counter() - start) / LOOP_STEPS
        if not saves:
            return took, math.nan
        saver.end()
        return took, statistics.fmean(one.durable_s for one in saved)

    kinds = (NOTHING, PLAIN, *names, PLAIN + AGAIN, NOTHING + AGAIN)
    arms = {name: lambda name=name: steps(name) for name in kinds}
    try:
        label = f"{recipe}, training on {threads}"
        found = bench.in_turn(label, arms, bench.rounds)
    finally:
        saver.close()
        memory.close()
        torch.set_num_threads(1)
    step_s = {name: [step for step, _ in each] for name, each in found.items()}
    durable_s = {name: [durable for _, durable in each] for name, each in found.items()}
    rows = []
    for name in kinds:
        longer = [100 * (r - 1) for r in paired_ratios(step_s[name], step_s[NOTHING])]
        saves = not name.startswith(NOTHING)
        rows.append(
            LoopRow(
                recipe, threads, name, interval(step_s[name]), interval(longer),
                interval(durable_s[name]) if saves else None,
                interval(paired_ratios(durable_s[PLAIN], durable_s[name])) if saves else None,
            )
        )  # fmt: skip
    return rows
