"""What saving at every step costs, in one table: prints it and writes it as JSON.

    python bench/first_slice.py                    # all rows
    python bench/first_slice.py --quick            # a smoke run: the figures mean nothing
    python bench/first_slice.py --only durable --only restore

The state is a model of 32 parameters under AdamW, 512 MiB in 96 large tensors, saved through
`LayerwiseOptimizer.step()` with checksums and full durability on. What is compared runs in turn, in
one process, and every ratio has a bootstrap 95 % interval; a goal is reached when the interval's
worse end reaches it. A/A rows pair the bare loop with itself: they show the noise. Restored bytes
are checked after timing.

Two ways to take a step are timed, and each row says which it is:

- "saved, not updated": the gradients are None, so `step()` updates nothing, hands every layer over
  and saves. Durable time is from the call of `step()` to the commit.
- "emulated compute": `time.sleep` stands for an accelerator that leaves the processor idle, then
  comes a real AdamW step through LayerwiseOptimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import platform
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from _disk import MIB, Disk, Files, Instrument, Operation, describe, sync_folder
from _stats import Goal, Interval, bootstrap, in_turn, paired_differences, paired_ratios
from torch import Tensor, nn

try:
    from pccheck_ext import LayerwiseCheckpointTrainer, ModelRecovery
except ModuleNotFoundError as missing:
    sys.exit(f"bench: {missing}. Build the package first: pip install --no-build-isolation -e .")

GIB = 1 << 30
LAYERS = 32
TENSORS = 3 * LAYERS  # parameter, exp_avg, exp_avg_sq
WIDTH = 1024
NEVER = 10**9  # steps between checkpoints
FEWEST_LONG_ROUNDS = 9  # where a round takes over a second ...
ROW_S = 100.0  # ... and this much time has been spent on the row
RESULTS = Path(__file__).resolve().parent / "results"
EMULATED = "emulated compute: sleep, then a real AdamW step"
NOT_UPDATED = "saved, not updated: gradients are None"


# --- What is saved --------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, WIDTH))


class State:
    """A model of 32 parameters and its AdamW after one real step: 96 large tensors."""

    def __init__(self, size_bytes: int) -> None:
        rows = -(-size_bytes // (3 * 4 * WIDTH))
        each, more = divmod(rows, LAYERS)
        torch.manual_seed(1)
        self.model = nn.Sequential(*(Layer(each + (i < more)) for i in range(LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.size_bytes = sum(t.nbytes for t in self.tensors().values())

    def without_gradients(self) -> State:
        self.optimizer.zero_grad(set_to_none=True)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint has to bring back, the optimizer's 0-d step counts included."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}.{key}"] = value
        return found

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


class WrongBytesError(AssertionError):
    """What was restored is not what was saved."""


def check_equal(restored: Mapping[str, Tensor], saved: Mapping[str, Tensor], by: str) -> None:
    if restored.keys() != saved.keys():
        raise WrongBytesError(f"{by}: other tensors came back")
    for name, tensor in saved.items():
        if not torch.equal(_bits(restored[name]), _bits(tensor)):
            raise WrongBytesError(f"{by}: {name} came back with other bytes")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def payload_of(checkpoint: Path) -> Files:
    names = ("model.safetensors", "optimizer.safetensors")
    return [(checkpoint / name, (checkpoint / name).stat().st_size) for name in names]


def scribble(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(float("nan"))


# --- How it is saved ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """One save: how long the call held the loop, and when the checkpoint was durable."""

    stall: float
    durable: float


class Ours:
    """A trainer on `state`, saving to a folder of its own."""

    def __init__(self, bench: Bench, state: State, **more: Any) -> None:
        self.state = state
        self.folder = bench.new_folder("ours")
        self.saves: list[Took] = []
        self.keep_last: int = bench.options.keep_last
        self.trainer = LayerwiseCheckpointTrainer(
            state.model,
            state.optimizer,
            num_threads=bench.options.num_threads,
            batch_size_mb=bench.options.batch_size_mb,
            block_size_mb=bench.options.block_size_mb,
            keep_last=self.keep_last,
            checkpoint_dir=str(self.folder),
            **more,
        )
        bench.note_trainer(self.trainer)

    def save(self) -> Took:
        start = time.perf_counter()
        self.trainer.step()
        returned = time.perf_counter()
        self.finish()
        self.saves.append(Took(returned - start, time.perf_counter() - start))
        return self.saves[-1]

    def save_until_recycled(self) -> None:
        """From here on every checkpoint overwrites the files of a retired one."""
        for _ in range(self.keep_last + 4):
            self.save()
        self.saves.clear()

    def next_payload(self) -> Files:
        """What the next save will overwrite: the files of the oldest retired checkpoint."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:  # a commit is acknowledged before the retiring
            time.sleep(0.005)
            if retired := sorted(self.folder.glob("*.partial")):
                return payload_of(retired[0])
        raise WrongBytesError(f"no retired checkpoint in {self.folder}")

    def finish(self) -> None:
        self.trainer.end_step()
        self.trainer.wait()

    def newest(self) -> str:
        found = ModelRecovery(str(self.folder)).get_latest_checkpoint()
        if found is None:
            raise WrongBytesError("there is no checkpoint that verifies")
        return found

    def check(self) -> None:
        """The newest checkpoint brings every byte of the state back."""
        saved = copies(self.state.tensors())
        newest = self.newest()
        scribble(self.state.tensors())
        self.trainer.load_checkpoint(newest)
        check_equal(self.state.tensors(), saved, f"{newest} restored")

    def close(self) -> None:
        self.trainer.shutdown()
        remove_folder(self.folder)


class TorchSave:
    """torch.save of the whole state, made durable: fsync of the file and of its folder."""

    def __init__(self, bench: Bench, state: State) -> None:
        self.state = state
        self.folder = bench.new_folder("torch-save")
        self.path = self.folder / "state.pt"

    def save(self) -> Took:
        forget(self.path)
        start = time.perf_counter()
        with open(self.path, "wb") as file:
            torch.save(self.state.as_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        took = time.perf_counter() - start
        return Took(took, took)

    def check(self) -> None:
        restored = torch.load(self.path, weights_only=True)
        check_equal(flat(restored), flat(self.state.as_dict()), "torch.load")

    def close(self) -> None:
        remove_folder(self.folder)


class DcpAsyncSave:
    """dcp.async_save in one process, made durable: sync_files, and fsync of the folder.

    One writer thread is its default.
    """

    def __init__(self, bench: Bench, state: State, threads: int = 1) -> None:
        self.state = state
        self.folder = bench.new_folder("dcp")
        self.threads = threads
        self.count = itertools.count()
        self.newest: Path | None = None
        self.older: list[Path] = []

    def begin(self) -> Future[Any]:
        if self.newest is not None:
            self.older.append(self.newest)
        self.newest = self.folder / str(next(self.count))
        writer = dcp.FileSystemWriter(self.newest, sync_files=True, thread_count=self.threads)
        future = dcp.async_save(self.state.as_dict(), storage_writer=writer, no_dist=True)
        assert isinstance(future, Future)
        return future

    def end(self, future: Future[Any]) -> None:
        future.result()
        assert self.newest is not None
        sync_folder(self.newest)

    def save(self) -> Took:
        self.forget_older()
        start = time.perf_counter()
        future = self.begin()
        returned = time.perf_counter()
        self.end(future)
        return Took(returned - start, time.perf_counter() - start)

    def forget_older(self) -> None:
        for path in self.older:
            remove_folder(path)
        self.older.clear()

    def check(self) -> None:
        assert self.newest is not None
        saved = self.state.as_dict()
        restored = {
            "model": {name: torch.zeros_like(t) for name, t in saved["model"].items()},
            "optimizer": {
                "state": {
                    index: {key: torch.zeros_like(t) for key, t in entry.items()}
                    for index, entry in saved["optimizer"]["state"].items()
                },
            },
        }
        dcp.load(restored, checkpoint_id=self.newest, no_dist=True)
        check_equal(flat(restored), flat(saved), "dcp.load")

    def close(self) -> None:
        remove_folder(self.folder)


def flat(tree: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a nested dict by their paths."""
    if isinstance(tree, Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}


def forget(path: Path) -> None:
    """Deletes a file for good: what deleting costs the disk must not meet the next measurement."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    sync_folder(folder.parent)


# --- The run --------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    key: str
    figure: str
    goal: Goal | None
    measured: Interval
    unit: str = ""
    beside: str = ""  # what stands next to the figure
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "yes" if self.goal.reached_by(self.measured) else "NO"

    def as_dict(self) -> dict[str, Any]:
        goal = self.goal and {">=" if self.goal.at_least else "<=": self.goal.bound}
        return {
            "row": self.key, "figure": self.figure, "goal": goal, "unit": self.unit,
            "measured": self.measured.as_dict(), "reached": self.verdict, "beside": self.beside,
            **self.data,
        }  # fmt: skip


class Bench:
    """Options, the working folder and the disk; rows are functions of it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.rounds: int = options.rounds
        self.size_bytes = options.size_mib * MIB
        self.disk = Disk(folder, self.size_bytes)
        self.trainer_facts: dict[str, Any] = {}
        self._folders = itertools.count()
        self._started = time.monotonic()
        self._line = ""

    def new_folder(self, name: str) -> Path:
        folder = self.folder / f"{name}-{next(self._folders)}"
        folder.mkdir()
        sync_folder(self.folder)
        return folder

    def state(self) -> State:
        gc.collect()
        return State(self.size_bytes)

    def note_trainer(self, trainer: LayerwiseCheckpointTrainer) -> None:
        stats = trainer.stats()
        for key in ("staging_bytes", "direct_io"):
            if key in stats:
                self.trainer_facts[key] = stats[key]

    def progress(self, text: str) -> None:
        text = f"{time.monotonic() - self._started:4.0f} s  {text}"
        if sys.stderr.isatty():
            print(f"\r{text:<{len(self._line)}}", end="", file=sys.stderr, flush=True)
            self._line = text
        elif text[8:].split(":")[0] != self._line:  # a log gets a line where something else begins
            self._line = text[8:].split(":")[0]
            print(text, file=sys.stderr, flush=True)

    def end_line(self) -> None:
        if sys.stderr.isatty() and self._line:
            print(f"\r{'':<{len(self._line)}}\r", end="", file=sys.stderr, flush=True)
            self._line = ""

    def in_turn(
        self, row: str, arms: Mapping[str, Callable[[], float]], warm_up: int = 1
    ) -> dict[str, list[float]]:
        """Fewer rounds than asked for where one takes over a second and the row's time is up."""
        started = time.monotonic()

        def enough(done: int) -> bool:
            self.progress(f"{row}: round {done}/{self.rounds}")
            spent = time.monotonic() - started
            return done >= FEWEST_LONG_ROUNDS and spent > max(done, ROW_S)

        gc.collect()
        return in_turn(arms, self.rounds, warm_up=warm_up, enough=enough)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def durable_and_stall(name: str, saves: Sequence[Took]) -> str:
    durable, stall = median([s.durable for s in saves]), median([s.stall for s in saves])
    return f"{name}: durable {ms(durable)}, stall {ms(stall)}"


# --- Against the disk -----------------------------------------------------------------------------


def against_disk(
    bench: Bench,
    key: str,
    figure: str,
    bound: float,
    operation: Operation,
    ours: Callable[[], float],
    size_bytes: int,
    beside: Callable[[], str],
    files: Callable[[], Files] | None = None,
) -> list[Row]:
    """Pairs `ours` with the fastest fio and the fastest bare loop; the faster of the two counts.

    The bare loop uses the `files` that ours uses next, where there are any: identical blocks.
    """
    instruments = bench.disk.best(operation, quick=bench.options.quick, progress=bench.progress)

    def disk(instrument: Instrument) -> Callable[[], float]:
        return lambda: bench.disk.seconds(instrument, operation, files and files())

    loop = instruments[0].name()
    arms: dict[str, Callable[[], float]] = {i.name(): disk(i) for i in reversed(instruments)}
    arms |= {"bare loop again": disk(instruments[0]), "ours": ours}
    times = bench.in_turn(key, arms, warm_up=2)

    fastest = min((i.name() for i in instruments), key=lambda name: median(times[name]))
    share = size_bytes / bench.size_bytes  # rates are compared: both sides' bytes count
    ratio = bootstrap(paired_ratios(times[fastest], times["ours"])).scaled(share)
    speeds = ", ".join(
        f"{i.name()}: {ms(median(times[i.name()]))}"
        f" = {bench.size_bytes / median(times[i.name()]) / 1e9:.2f} GB/s"
        for i in instruments
    )
    again = bootstrap(paired_ratios(times[loop], times["bare loop again"]))
    data = {"seconds": times, "disk is": fastest}
    return [
        Row(key, figure, Goal(bound, at_least=True), ratio, "x", f"{beside()}; {speeds}", data),
        Row(f"{key}-aa", f"A/A: {loop}, {operation} / the same", None, again, "x", "noise"),
    ]


def row_durable(bench: Bench) -> list[Row]:
    """Steady state: every checkpoint overwrites a retired one's files."""
    state = bench.state().without_gradients()
    ours = Ours(bench, state)
    bench.progress("durable: saving until files are recycled")
    ours.save_until_recycled()
    rows = against_disk(
        bench,
        "durable",
        f"durable write, steady state (recycled files) / disk, overwriting ({NOT_UPDATED})",
        0.90,
        "overwrite",
        lambda: ours.save().durable,
        state.size_bytes,
        lambda: durable_and_stall("ours", ours.saves),
        ours.next_payload,
    )
    ours.check()
    ours.close()
    return rows


def row_first(bench: Bench) -> list[Row]:
    """A new run's first checkpoint: nothing to recycle, every block is allocated."""
    state = bench.state().without_gradients()
    saves: list[Took] = []
    last: list[Ours] = []

    def first() -> float:
        ours = Ours(bench, state)
        saves.append(ours.save())
        if not last:
            ours.check()
            last.append(ours)
        ours.close()
        return saves[-1].durable

    return against_disk(
        bench,
        "first",
        f"first checkpoint / disk, fresh file ({NOT_UPDATED})",
        0.85,
        "fresh",
        first,
        state.size_bytes,
        lambda: durable_and_stall("ours", saves),
    )


def row_restore(bench: Bench) -> list[Row]:
    """`load_checkpoint` of the whole state into the tensors that are there, all blocks verified."""
    state = bench.state().without_gradients()
    ours = Ours(bench, state)
    ours.save()
    saved = copies(state.tensors())
    newest = ours.newest()
    scribble(state.tensors())

    def restore() -> float:
        drop_cache(ours.folder)
        start = time.perf_counter()
        missing = ours.trainer.load_checkpoint(newest)
        took = time.perf_counter() - start
        if missing:
            raise WrongBytesError(f"missing after a restore: {missing}")
        return took

    rows = against_disk(
        bench,
        "restore",
        "restore into existing tensors, verified, cold cache / disk, direct read",
        0.90,
        "read",
        restore,
        state.size_bytes,
        lambda: "this machine's page cache dropped before each",
        lambda: payload_of(ours.folder / newest),
    )
    seconds = rows[0].data["seconds"]["ours"]
    rows[0].beside = f"ours: {ms(median(seconds))}; {rows[0].beside}"
    check_equal(state.tensors(), saved, "load_checkpoint")
    ours.close()
    return rows


def drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# --- Against what people use ----------------------------------------------------------------------


def row_speedup(bench: Bench) -> list[Row]:
    state = bench.state().without_gradients()
    peers: dict[str, TorchSave | DcpAsyncSave] = {
        "torch.save": TorchSave(bench, state),
        "dcp.async_save": DcpAsyncSave(bench, state),
        "dcp.async_save, 4 writers": DcpAsyncSave(bench, state, 4),
    }
    ours = Ours(bench, state)
    bench.progress("speedup: saving until files are recycled")
    ours.save_until_recycled()

    def timed(arm: Ours | TorchSave | DcpAsyncSave, saves: list[Took]) -> Callable[[], float]:
        def save() -> float:
            os.sync()  # what the one before has left to be cleared up is not this one's
            time.sleep(0.2)
            saves.append(arm.save())
            return saves[-1].durable

        return save

    def row(name: str, label: str, goal: Goal | None) -> Row:
        # Each peer in turn with ours alone: what another leaves behind in caches would meet both.
        saves: dict[str, list[Took]] = {name: [], "ours": []}
        arms = {name: timed(peers[name], saves[name]), "ours": timed(ours, saves["ours"])}
        times = bench.in_turn(f"speedup over {name}", arms)
        return Row(
            f"speedup-{name}",
            f"speed-up in durable time over {label} ({NOT_UPDATED})",
            goal,
            bootstrap(paired_ratios(times[name], times["ours"])),
            "x",
            f"{durable_and_stall('ours', saves['ours'])}; {durable_and_stall(name, saves[name])}",
            {"seconds": times},
        )

    four = Goal(4.0, at_least=True)
    rows = [
        row("torch.save", "torch.save + fsync of file and folder", four),
        row("dcp.async_save", "dcp.async_save + fsync, to its commit", four),
        row("dcp.async_save, 4 writers", "the same with thread_count=4, not its default", None),
    ]
    for arm in (*peers.values(), ours):
        arm.check()
        arm.close()
    return rows


def row_blocks(bench: Bench) -> list[Row]:
    """What a saved step takes longer than the base optimizer's, each after an idle sleep."""
    compute = 0.1
    plain, saved = bench.state(), bench.state()
    ours, theirs = Ours(bench, saved), DcpAsyncSave(bench, plain)
    saves: list[Took] = []
    dcp_saves: list[Took] = []

    def base_step() -> float:
        time.sleep(compute)
        start = time.perf_counter()
        plain.optimizer.step()
        return time.perf_counter() - start

    def our_step() -> float:
        time.sleep(compute)
        saves.append(ours.save())
        return saves[-1].stall

    def dcp_call() -> float:
        time.sleep(compute)
        dcp_saves.append(theirs.save())
        return dcp_saves[-1].stall

    bench.progress("blocks: saving until files are recycled")
    ours.save_until_recycled()
    before = ours.trainer.stats()
    arms = {"base step": base_step, "ours": our_step, "base step again": base_step}
    times = bench.in_turn("blocks", arms)
    own = stall_between(before, ours.trainer.stats())
    # Not in turn with the others: what it leaves to be cleared up would meet their steps.
    bench.in_turn("blocks beside dcp.async_save", {"dcp.async_save": dcp_call}, warm_up=0)
    ours.check()
    ours.close()
    theirs.close()
    longer = bootstrap(paired_differences(times["ours"], times["base step"]))
    beside = (
        f"step() {ms(median(times['ours']))}, without saving {ms(median(times['base step']))}; "
        f"durable {ms(median([s.durable for s in saves]))}; stats() says stall {ms(own)}; "
        + durable_and_stall("dcp.async_save", dcp_saves)
    )
    return [
        Row(
            "blocks",
            f"time the call blocks: step() saving less the base optimizer's ({EMULATED})",
            Goal(5.0, at_least=False),
            longer.scaled(1e3),
            "ms",
            beside,
            {"seconds": times, "stall by stats()": own, "sleep_s": compute},
        ),
        Row(
            "blocks-aa",
            "A/A: the base optimizer's step less the same",
            None,
            bootstrap(paired_differences(times["base step again"], times["base step"])).scaled(1e3),
            "ms",
            "noise",
        ),
    ]


def stall_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Mean stall of the checkpoints committed between two answers of `stats()`."""
    count = after["checkpoints_committed"] - before["checkpoints_committed"]
    return float(after["stall_s"] - before["stall_s"]) / max(1, int(count))


class Loop:
    """A training loop with emulated compute; `seconds()` is the mean step of a stretch of it."""

    def __init__(self, compute: float, lead: int, steps: int) -> None:
        self.compute, self.lead, self.steps = compute, lead, steps

    def seconds(self, step: Callable[[], None], settle: Callable[[], None]) -> float:
        """The lead steps bring the loop into its steady state and are not counted."""
        start = 0.0
        for i in range(self.lead + self.steps):
            if i == self.lead:
                start = time.perf_counter()
            time.sleep(self.compute)
            step()
        took = (time.perf_counter() - start) / self.steps
        settle()
        return took


def row_inflation(bench: Bench) -> list[Row]:
    """A checkpoint at every step against none, in a loop whose compute outlasts the saving."""
    plain, saved = bench.state(), bench.state()
    ours, theirs = Ours(bench, saved), DcpAsyncSave(bench, plain)
    bench.progress("inflation: saving until files are recycled")
    ours.save_until_recycled()
    for _ in range(9):
        time.sleep(0.2)
        ours.save()
    durable = median([s.durable for s in ours.saves])
    compute = 1.25 * durable

    def base(loop: Loop) -> float:
        return loop.seconds(lambda: plain.optimizer.step(), lambda: None)

    def our(loop: Loop) -> float:
        def step() -> None:
            ours.trainer.step()
            ours.trainer.end_step()  # else the next backward pass would tell, but here is none

        return loop.seconds(step, ours.finish)

    def dcp_loop(loop: Loop) -> float:
        pending: list[Future[Any]] = []

        def step() -> None:
            plain.optimizer.step()
            while pending:  # one at a time: the one before has to be durable
                theirs.end(pending.pop())
            pending.append(theirs.begin())

        def settle() -> None:
            while pending:
                theirs.end(pending.pop())
            theirs.forget_older()

        return loop.seconds(step, settle)

    quick = bench.options.quick
    tight = Loop(compute, 1, 5)
    arms = {"none": lambda: base(tight), "ours": lambda: our(tight)}
    before = ours.trainer.stats()
    times = bench.in_turn("inflation", arms)
    stats = ours.trainer.stats()
    wide = Loop(0.1 if quick else 0.5, 1, 2)
    peers = bench.in_turn(
        "inflation beside dcp.async_save",
        {
            "none": lambda: base(wide),
            "ours": lambda: our(wide),
            "dcp.async_save": lambda: dcp_loop(wide),
        },
        warm_up=0,
    )
    ours.check()
    ours.close()
    theirs.close()

    def percent(slow: Sequence[float], fast: Sequence[float]) -> Interval:
        return bootstrap([100 * (ratio - 1) for ratio in paired_ratios(slow, fast)])

    inflation = percent(times["ours"], times["none"])
    beside = (
        f"sleep {ms(compute)}, step {ms(median(times['none']))} without saving; "
        f"durable {ms(durable)}, stall {ms(stall_between(before, stats))} by stats(); "
        "end_step() says where a step ends, as no backward pass does here"
    )
    rows = [
        Row(
            "inflation",
            f"step inflation, checkpoint every step, compute 1.25x the durable time ({EMULATED})",
            Goal(2.0, at_least=False),
            inflation,
            "%",
            beside,
            {"seconds": times, "sleep_s": compute, "durable_s": durable},
        )
    ]
    for name in ("ours", "dcp.async_save"):
        rows.append(
            Row(
                f"inflation-wide-{name}",
                f"the same with a sleep of {ms(wide.compute)}: {name} ({EMULATED})",
                None,
                percent(peers[name], peers["none"]),
                "%",
                f"step {ms(median(peers['none']))} without saving, {ms(median(peers[name]))} with",
                {"seconds": {"none": peers["none"], name: peers[name]}},
            )
        )
    return rows


# --- What it takes --------------------------------------------------------------------------------


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def row_processor(bench: Bench) -> list[Row]:
    """Processor time of the process over a save, less that of the same loop without saving."""
    state = bench.state().without_gradients()
    ours = Ours(bench, state)
    bench.progress("processor: saving until files are recycled")
    ours.save_until_recycled()

    def saving() -> float:
        start = processor_seconds()
        ours.save()
        return processor_seconds() - start

    used = bench.in_turn("processor", {"saving": saving})["saving"]
    ours.check()
    ours.close()
    idle = Ours(bench, state, checkpoint_every=NEVER)

    def not_saving() -> float:
        start = processor_seconds()
        idle.save()
        return processor_seconds() - start

    unused = bench.in_turn("processor", {"not": not_saving})["not"]
    idle.close()
    per_gib = GIB / state.size_bytes
    differences = [per_gib * d for d in paired_differences(used, unused)]
    return [
        Row(
            "processor",
            f"processor time of a save ({NOT_UPDATED})",
            Goal(0.15, at_least=False),
            bootstrap(differences),
            "core-s/GiB",
            f"user and system, all threads; {durable_and_stall('ours', ours.saves)}",
            {"core_s_per_gib": differences},
        )
    ]


def memory_of_process(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_over(work: Callable[[], None]) -> int:
    """The process's largest resident size during `work`."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    work()
    return memory_of_process("VmHWM")


def memory_child(bench: Bench, method: str) -> dict[str, int]:
    """In a process of its own: the peak of a loop that saves, less that of one that does not."""
    state = bench.state()

    def base() -> None:
        for _ in range(4):
            state.optimizer.step()

    def ours() -> None:
        trainer = Ours(bench, state)
        for _ in range(bench.options.keep_last + 3):
            trainer.save()
        trainer.close()

    def theirs() -> None:
        saver = DcpAsyncSave(bench, state)
        for _ in range(4):
            state.optimizer.step()
            saver.save()
        saver.close()

    without = peak_over(base)
    extra = peak_over(ours if method == "ours" else theirs) - without
    pool = int(bench.trainer_facts.get("staging_bytes", 0))
    return {"extra_bytes": extra, "pool_bytes": pool, "state_bytes": state.size_bytes}


def row_memory(bench: Bench) -> list[Row]:
    def child(method: str) -> dict[str, int]:
        bench.progress(f"memory: a process that saves with {method}")
        options = bench.options
        command = [
            sys.executable, __file__, f"--memory-child={method}", f"--dir={bench.folder}",
            f"--size-mib={options.size_mib}", f"--num-threads={options.num_threads}",
            f"--batch-size-mb={options.batch_size_mb}", f"--block-size-mb={options.block_size_mb}",
            f"--keep-last={options.keep_last}",
        ]  # fmt: skip
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise RuntimeError(f"the memory row's process failed: {answer.stderr.strip()[-2000:]}")
        found: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
        return found

    ours = [child("ours") for _ in range(1 if bench.options.quick else 3)]
    peer = child("dcp.async_save")
    extra = [run["extra_bytes"] / MIB for run in ours]
    pool, state = ours[0]["pool_bytes"] / MIB, ours[0]["state_bytes"]
    return [
        Row(
            "memory",
            "extra memory: peak resident size over that of the loop without saving "
            f"(goal: staging pool + 32 MiB; range of {len(ours)} runs)",
            Goal(pool + 32.0, at_least=False),
            Interval(median(extra), min(extra), max(extra), len(extra)),
            "MiB",
            f"pool {pool:.0f} MiB, state {state / MIB:.0f} MiB; "
            f"dcp.async_save: {peer['extra_bytes'] / MIB:.0f} MiB"
            f" = {peer['extra_bytes'] / state:.2f}x the state",
            {"runs": ours, "dcp.async_save": peer},
        )
    ]


def row_idle(bench: Bench) -> list[Row]:
    """step() when no checkpoint is due, call by call in turn with the base optimizer's."""

    def tiny() -> tuple[nn.Module, torch.optim.SGD]:
        model = nn.ParameterList([nn.Parameter(torch.ones(10)) for _ in range(3)])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    _, base = tiny()
    model, wrapped = tiny()
    folder = bench.new_folder("idle")
    trainer = LayerwiseCheckpointTrainer(
        model, wrapped, checkpoint_dir=str(folder), checkpoint_every=NEVER
    )
    block = 100
    times: dict[str, list[float]] = {"base step": [], "ours": []}

    def a_block() -> dict[str, float]:
        spent = dict.fromkeys(times, 0)
        for _ in range(block):
            for name, step in (("base step", base.step), ("ours", trainer.step)):
                start = time.perf_counter_ns()
                step()
                spent[name] += time.perf_counter_ns() - start
        return {name: total / block / 1e3 for name, total in spent.items()}

    a_block()
    count = 5 if bench.options.quick else 100
    for done in range(count):
        for name, mean in a_block().items():
            times[name].append(mean)
        bench.progress(f"idle: {(done + 1) * block} calls")
    trainer.shutdown()
    remove_folder(folder)
    added = bootstrap(paired_differences(times["ours"], times["base step"]))
    return [
        Row(
            "idle",
            f"added by step() when nothing is due (3-parameter SGD, {count * block} calls)",
            Goal(30.0, at_least=False),
            added,
            "us",
            f"base step {median(times['base step']):.1f} us, ours {median(times['ours']):.1f} us; "
            f"means of {block} calls",
            {"microseconds": times},
        )
    ]


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "durable": row_durable,
    "first": row_first,
    "speedup": row_speedup,
    "blocks": row_blocks,
    "inflation": row_inflation,
    "processor": row_processor,
    "memory": row_memory,
    "restore": row_restore,
    "idle": row_idle,
}


# --- What it ran on, and what came out ------------------------------------------------------------


def facts(bench: Bench) -> dict[str, str]:
    options = bench.options
    cpu = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    under = describe(bench.folder)
    pool = bench.trainer_facts.get("staging_bytes")
    direct = bench.trainer_facts.get("direct_io", bench.disk.direct)
    fio = bench.disk.fio_missing
    if fio is None:
        version = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)
        fio = version.stdout.strip()
    else:
        fio = f"NOT USED, the disk is the bare loop alone: {fio}"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu}, {os.cpu_count()} cores, {memory / GIB:.0f} GiB, {platform.machine()}",
        "load when it began": f"{bench.options.load:.2f}",
        "kernel": platform.release(),
        "file system": under["file system"],
        "device": under["device"],
        "direct I/O": "yes" if direct else "no",
        "block size": f"{options.block_size_mb:g} MiB",
        "writers": str(options.num_threads),
        "staging memory": "unknown" if pool is None else f"{pool / MIB:.0f} MiB",
        "state": f"{bench.size_bytes / MIB:.0f} MiB in {TENSORS} tensors",
        "kept checkpoints": str(options.keep_last),
        "pairs": f"{bench.rounds}; down to {FEWEST_LONG_ROUNDS} where one takes over a second",
        "fio": fio,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }


def number(figure: float) -> str:
    return f"{figure:.3g}" if abs(figure) < 100 else f"{figure:.0f}"


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| figure | to reach | measured [95 %], pairs | reached | beside it |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        goal = ""
        if row.goal is not None:
            goal = f"{'>=' if row.goal.at_least else '<='} {number(row.goal.bound)} {row.unit}"
        m = row.measured
        measured = f"{number(m.value)} [{number(m.low)}, {number(m.high)}] {row.unit}, {m.samples}"
        lines.append(f"| {row.figure} | {goal} | {measured} | {row.verdict} | {row.beside} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", action="append", choices=list(ROWS), metavar="ROW",
        help=f"this row alone; may be given again: {', '.join(ROWS)}")  # fmt: skip
    add("--quick", action="store_true", help="a smoke run with a small state and few rounds")
    add("--rounds", type=int, help="pairs for each row (default 61)")
    add("--dir", type=Path, default=Path(), help="on the disk to measure (default: here)")
    add("--json", type=Path, help="where the figures go (default: under bench/results/)")
    add("--size-mib", type=int, help="the state's size (default 512)")
    add("--num-threads", type=int, default=4, help="writer threads (default 4)")
    add("--block-size-mb", type=float, default=2.0, help="(default 2)")
    add("--batch-size-mb", type=float, default=100.0, help="staging memory is twice as much")
    add("--keep-last", type=int, default=3, help="checkpoints kept (default 3)")
    add("--memory-child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 61)
    options.size_mib = options.size_mib or (48 if options.quick else 512)
    if options.rounds < 1 or options.size_mib < 1 or options.size_mib % 4:
        parser.error("--rounds is at least 1, --size-mib a positive multiple of 4")
    options.load = os.getloadavg()[0]
    return options


@contextlib.contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, also after Ctrl-C and SIGTERM."""

    def ended(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)
    folder = Path(tempfile.mkdtemp(prefix="first_slice-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(bench: Bench) -> int:
    options = bench.options
    rows: list[Row] = []
    failed: dict[str, str] = {}
    started = time.monotonic()
    for name in options.only or ROWS:
        bench.progress(f"{name}: setting up")
        try:
            rows += ROWS[name](bench)
        except KeyboardInterrupt:
            failed[name] = "interrupted; the rows after it did not run"
            break
        except Exception as error:  # the other rows are still worth having
            failed[name] = f"{type(error).__name__}: {error}"
    bench.end_line()
    known = facts(bench)
    known["run time"] = f"{time.monotonic() - started:.0f} s"
    for key, value in known.items():
        print(f"{key + ':':20} {value}")
    print("\n" + table(rows))
    if options.quick:
        print("\nA smoke run: these figures mean nothing.")
    for name, why in failed.items():
        print(f"\nROW {name} FAILED: {why}")
    when = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path: Path = options.json or RESULTS / f"first_slice-{when}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"facts": known, "rows": [row.as_dict() for row in rows], "failed": failed}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore", module=r"torch\..*")
    with working_folder(options.dir) as folder:
        bench = Bench(options, folder)
        if options.memory_child:
            print(json.dumps(memory_child(bench, options.memory_child)))
            return 0
        return run(bench)


if __name__ == "__main__":
    sys.exit(main())
