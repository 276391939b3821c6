"""Trains a small GPT with a checkpoint at every step, kills it, resumes it: no bit may differ.

Three processes train the same model on the sources of Python's standard library:

1. never killed: what has to come out. Blocks of its steps save a checkpoint each, the blocks
   between save none and are plain PyTorch; that is also how the cost of a checkpoint is measured.
2. killed: saves at every step, until a SIGKILL ends it at a random moment.
3. resumed: a new process that goes on from the newest checkpoint. It starts from another seed, so
   that nothing which is not restored can be equal by chance.

Then every step's loss, gradient norm and learning rate, the final weights, optimizer, schedule,
data position and random numbers, and the last checkpoint on the disk are compared bit for bit. The
exit status is 0 if all are equal.

What to copy is `Crops` and `train`; the rest starts, kills, compares and shows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, TextIO

import torch
from _gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

try:
    from pccheck_ext import LayerwiseCheckpointTrainer, ModelRecovery
except ImportError as error:
    sys.exit(f"demo: {error}\n`make demo` builds everything that it needs, in .venv.")

# ---- What is trained, and how --------------------------------------------------------------------


class Crops:
    """Endless batches of random crops of a text. Where it stands is its generator's state."""

    def __init__(self, text: Tensor, batch: int, length: int, seed: int) -> None:
        self.text = text
        self.batch = batch
        self.window = torch.arange(length + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        last = len(self.text) - len(self.window)
        starts = torch.randint(last + 1, (self.batch, 1), generator=self.generator)
        crops = self.text[starts + self.window].long()
        return crops[:, :-1], crops[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def train(
    plan: Plan, log: Log, trainer_class: type[LayerwiseCheckpointTrainer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train until `plan.steps`, from the newest checkpoint if there is one; return what came out:
    the final state and a summary."""
    torch.manual_seed(plan.seed)
    model = GPT(plan.gpt)
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-3, betas=(0.9, 0.95))
    warm_up = plan.steps // 6
    scheduler = SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, 0.1, 1.0, warm_up),
            CosineAnnealingLR(optimizer, plan.steps - warm_up),
        ],
        milestones=[warm_up],
    )
    loader = Crops(read_text(), plan.batch, plan.gpt.context, plan.seed)

    extra = {"scheduler": scheduler, "loader": loader}
    extra.pop(plan.forget, None)
    with trainer_class(model, optimizer, checkpoint_dir=plan.checkpoints, extra=extra) as trainer:
        start = trainer.resume("auto")  # 0 where nothing has been saved yet
        model.train()
        for step in range(start + 1, plan.steps + 1):
            inputs, targets = next(loader)
            trainer.zero_grad()
            loss = model.loss(inputs, targets)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.step(loss)  # saves each layer as soon as it is updated
            log.write(step, loss.item(), norm.item(), scheduler.get_last_lr()[0])
            scheduler.step()
            trainer.end_step()  # nothing of this step is to come: its checkpoint can be committed

    summary = {"start": start, "losses": trainer.loss_history, "stats": trainer.stats()}
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": scheduler.state_dict(),
        "data position": loader.state_dict(),
        "random numbers": torch.get_rng_state(),
    }
    return state, summary


def read_text() -> Tensor:
    """The sources of the standard library, one after the other, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(p for p in (*folder.glob("*.py"), *folder.glob("*/*.py")) if p.is_file())
    text = b"".join(p.read_bytes() for p in names if p.parent.name != "site-packages")
    if len(text) < 100_000:
        raise SystemExit(f"demo: {folder} does not hold the standard library's sources")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# ---- One process ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What one process is told."""

    run: str  # "reference", "killed" or "resumed"
    folder: str
    gpt: GPTConfig
    batch: int
    steps: int
    seed: int
    threads: int
    forget: str

    @property
    def checkpoints(self) -> str:
        name = "reference" if self.run == "reference" else "killed"
        return str(Path(self.folder, f"checkpoints-{name}"))

    def path(self, suffix: str) -> Path:
        return Path(self.folder, self.run + suffix)

    @staticmethod
    def from_json(text: str) -> Plan:
        values = json.loads(text)
        return Plan(**{**values, "gpt": GPTConfig(**values["gpt"])})


class Log:
    """A line for each step, out of the process before the step's checkpoint can be committed: what
    a resumed run starts from has always been logged."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1, encoding="ascii")

    def write(self, step: int, loss: float, norm: float, lr: float) -> None:
        entry = {"step": step, "loss": loss, "norm": norm, "lr": lr, "at": time.monotonic()}
        self.file.write(json.dumps(entry) + "\n")


IN_FLIGHT = 2  # checkpoints: the trainer's default for max_async
BLOCK = 4  # steps


def is_saved(step: int) -> bool:
    """Whether the run that is never killed saves this step: the first two blocks, in which the
    first files are allocated, then every other block."""
    block = (step - 1) // BLOCK
    return block < 2 or block % 2 == 1


class EveryOtherBlock(LayerwiseCheckpointTrainer):
    """Takes the steps that are not saved with the optimizer alone, as if there was no trainer."""

    done = 0

    def step(self, loss: Tensor | float | None = None) -> None:
        self.done += 1
        if is_saved(self.done):
            super().step(loss)
        else:
            self.optimizer.base_optimizer.step()

    def end_step(self) -> None:
        super().end_step()
        if is_saved(self.done) and not is_saved(self.done + 1):
            self.wait()  # or what is still being written slows the steps that do without


def work(plan: Plan) -> None:
    torch.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(True)
    kind = EveryOtherBlock if plan.run == "reference" else LayerwiseCheckpointTrainer
    state, summary = train(plan, Log(plan.path(".jsonl")), kind)
    torch.save(state, plan.path(".pt"))
    plan.path(".json").write_text(json.dumps(summary), encoding="ascii")


# ---- Starting, watching and killing it -----------------------------------------------------------


class DemoError(Exception):
    """The demo cannot go on: the message says why."""


@dataclass
class Kill:
    """When to: `after_s` from the first step's end, else in the middle of step `at_step`."""

    at_step: float
    after_s: float | None
    took_s: float = 0.0  # from the first step's end

    def due(self, entries: Sequence[Mapping[str, Any]]) -> float | None:
        """The time to kill, once it is known."""
        if not entries:
            return None
        if self.after_s is not None:
            return entries[0]["at"] + self.after_s
        if entries[-1]["step"] < int(self.at_step):
            return None
        return entries[-1]["at"] + self.at_step % 1 * step_seconds(entries)


def step_seconds(entries: Sequence[Mapping[str, Any]]) -> float:
    recent = entries[-5:]
    return (recent[-1]["at"] - recent[0]["at"]) / max(1, len(recent) - 1)


def run(plan: Plan, bar: Bar, kill: Kill | None = None) -> list[dict[str, Any]]:
    """Run `plan` in a process of its own, to its end or until it is killed; return its log."""
    # With threads that spin while they wait, two cores that have anything else to do (saving, for
    # one) wait for each other's time slices.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    complaints = plan.path(".stderr")
    with complaints.open("wb") as stderr, plan.path(".jsonl").open("w+", encoding="ascii") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(asdict(plan))],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=environment,
        )
        try:
            entries, was_killed = watch(process, log, bar, kill)
        finally:
            process.kill()
            process.wait()
    said = complaints.read_text(errors="replace").strip()
    if process.returncode != 0 and not was_killed:
        reason = said.splitlines()[-1] if said else f"exit status {process.returncode}"
        raise DemoError(f"the {plan.run} run failed: {reason}\nAll that it said: {complaints}")
    if kill is not None and not was_killed:
        raise DemoError("the run that was to be killed had finished before that: kill it earlier")
    bar.close(said)
    return entries


def watch(
    process: subprocess.Popen[bytes], log: TextIO, bar: Bar, kill: Kill | None
) -> tuple[list[dict[str, Any]], bool]:
    """Follow the log until the process ends, or kill it when that is due."""
    entries: list[dict[str, Any]] = []
    torn = ""
    killed = False
    while True:
        ended = process.poll() is not None
        *lines, torn = (torn + log.read()).split("\n")
        if lines:
            entries += map(json.loads, lines)
            bar.show(entries)
        if ended:
            killed = killed and process.returncode == -signal.SIGKILL
            if killed:
                bar.killed(entries)
            return entries, killed
        due = kill.due(entries) if kill is not None else None
        if due is None:
            time.sleep(0.02)
            continue
        assert kill is not None
        time.sleep(max(0.0, min(0.02, due - time.monotonic())))
        if time.monotonic() >= due:
            process.kill()
            kill.took_s = time.monotonic() - entries[0]["at"]
            process.wait()
            killed = True


# ---- Comparing -----------------------------------------------------------------------------------


def differences(got: object, expected: object, where: str) -> Iterator[str]:
    """Where two states differ, types and bits included; nothing if they are equal."""
    if type(got) is not type(expected):
        yield f"{where}: {type(got).__name__} instead of {type(expected).__name__}"
    elif isinstance(got, Tensor) and isinstance(expected, Tensor):
        yield from tensor_differences(got, expected, where)
    elif isinstance(got, dict) and isinstance(expected, dict):
        if got.keys() != expected.keys():
            yield f"{where}: other entries: {sorted(map(str, got.keys() ^ expected.keys()))}"
        for key in got.keys() & expected.keys():
            yield from differences(got[key], expected[key], f"{where}.{key}")
    elif isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        if len(got) != len(expected):
            yield f"{where}: {len(got)} entries instead of {len(expected)}"
        for i, (a, b) in enumerate(zip(got, expected, strict=False)):
            yield from differences(a, b, f"{where}.{i}")
    elif repr(got) != repr(expected):  # tells -0.0 from 0.0, and NaN is itself
        yield f"{where}: {got!r} instead of {expected!r}"


def tensor_differences(got: Tensor, expected: Tensor, where: str) -> Iterator[str]:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        is_, was = (f"{t.dtype} {list(t.shape)}" for t in (got, expected))
        yield f"{where}: {is_} instead of {was}"
        return
    unequal = as_bytes(got) != as_bytes(expected)
    if unequal.any():
        count = int(unequal.any(dim=1).sum())
        most = (got.double() - expected.double()).abs().max().item()
        yield f"{where}: {count} of {got.numel()} values differ, by {most:.3g} at most"


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def log_differences(
    entries: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], name: str
) -> Iterator[str]:
    by_step = {entry["step"]: entry for entry in reference}
    for entry in entries:
        for key in ("loss", "norm", "lr"):
            where = f"{name} run, step {entry['step']}: {key}"
            yield from differences(entry[key], by_step[entry["step"]][key], where)


@dataclass
class Check:
    what: str
    note: str
    wrong: list[str]


def compare(
    plan: Plan, logs: Mapping[str, Sequence[Mapping[str, Any]]], start: int
) -> Iterator[Check]:
    """Check all that has to be equal."""
    resumed, reference = replace(plan, run="resumed"), replace(plan, run="reference")
    summary = json.loads(resumed.path(".json").read_text())
    got, expected = (torch.load(p.path(".pt"), weights_only=True) for p in (resumed, reference))

    wrong: list[str] = []
    for name in ("killed", "resumed"):
        wrong += log_differences(logs[name], logs["reference"], name)
    losses = [entry["loss"] for entry in logs["reference"]]
    wrong += differences(summary["losses"], losses, "loss history")
    steps = [entry["step"] for entry in logs["resumed"]]
    if steps != list(range(start + 1, plan.steps + 1)):
        wrong.append(f"resumed run: has the steps {steps}")
    lost = logs["killed"][-1]["step"] - start
    if lost > IN_FLIGHT:
        wrong.append(f"{lost} steps were lost, and {IN_FLIGHT} checkpoints at most were in flight")
    yield Check("losses", f"{plan.steps} steps; gradient norms and learning rates, too", wrong)

    weights = {w.data_ptr(): w.numel() for w in got["model"].values()}  # tied ones once
    yield Check(
        "weights",
        f"{sum(weights.values()):,} values in {len(weights)} tensors",
        list(differences(got.pop("model"), expected["model"], "weights")),
    )
    moments = [v for s in got["optimizer"]["state"].values() for v in s.values()]
    yield Check(
        "optimizer",
        f"{sum(v.numel() for v in moments):,} values in {len(moments)} tensors",
        list(differences(got.pop("optimizer"), expected["optimizer"], "optimizer")),
    )
    wrong = [line for key in got for line in differences(got[key], expected[key], key)]
    yield Check("the rest", ", ".join(got), wrong)

    recovery = ModelRecovery(plan.checkpoints)
    newest = recovery.get_latest_checkpoint()
    wrong = []
    if newest is None:
        wrong.append(f"on disk: no checkpoint in {plan.checkpoints} verifies")
    else:
        wrong += differences(newest, f"step-{plan.steps:08d}", "on disk: the newest checkpoint")
        wrong += unsaved(summary["stats"], plan.steps - start)
        model = GPT(plan.gpt)
        recovery.load_checkpoint(model, newest, strict=True)
        wrong += differences(model.state_dict(), expected["model"], "on disk")
    yield Check("on disk", f"{newest}, read back", wrong)


def unsaved(stats: Mapping[str, Any], expected: int) -> Iterator[str]:
    committed, failed = stats["checkpoints_committed"], stats["checkpoints_failed"]
    if committed != expected or failed:
        yield f"resumed run: {committed} of {expected} checkpoints committed, {failed} failed"


# ---- Measuring -----------------------------------------------------------------------------------


@dataclass
class Inflation:
    """By how much steps with a checkpoint take longer, as fractions."""

    saved: list[float]  # each block with checkpoints, against the blocks beside it, which have none
    noise: list[float]  # each block without, against those without that come before and after


def inflation(entries: Sequence[Mapping[str, Any]]) -> Inflation:
    """Neighbours are compared: a machine with other work gets faster and slower all the time.

    The first step of a block is left out. It is the step before it that decides whether something
    is saved in its course.
    """
    seconds: dict[int, list[float]] = {}
    for last, entry in pairwise(entries):
        block, position = divmod(entry["step"] - 1, BLOCK)
        if position:
            seconds.setdefault(block, []).append(entry["at"] - last["at"])
    mean = {block: fmean(s) for block, s in seconds.items() if block >= 2 and len(s) == BLOCK - 1}

    def against(block: int, distance: int) -> float:
        return mean[block] / fmean((mean[block - distance], mean[block + distance])) - 1

    def between(distance: int) -> list[int]:
        return [b for b in mean if b - distance in mean and b + distance in mean]

    return Inflation(
        saved=[against(b, 1) for b in between(1) if b % 2 == 1],
        noise=[against(b, 2) for b in between(2) if b % 2 == 0],
    )


def place(killed: Sequence[Mapping[str, Any]], steps: int) -> str:
    finished = killed[-1]["step"]
    return f"in step {finished + 1}" if finished < steps else "after the last step"


def span(fractions: Sequence[float]) -> str:
    return f"{100 * min(fractions):+.1f} to {100 * max(fractions):+.1f} %"


def table(
    plan: Plan, logs: Mapping[str, Sequence[Mapping[str, Any]]], kill: Kill, start: int
) -> list[tuple[str, str, str]]:
    """What it cost and what was lost: rows of a name, a figure and a note."""
    stats = [
        json.loads(replace(plan, run=name).path(".json").read_text())["stats"]
        for name in ("resumed", "reference")
    ]
    committed = sum(s["checkpoints_committed"] for s in stats) or 1
    size = sum(s["bytes_persisted"] for s in stats) / committed
    stall = sum(s["stall_s"] for s in stats) / committed
    durable = sum(s["durable_s_mean"] * s["checkpoints_committed"] for s in stats) / committed
    saving = [pair for name in ("killed", "resumed") for pair in pairwise(logs[name])]
    step = fmean(after["at"] - before["at"] for before, after in saving)
    lost = logs["killed"][-1]["step"] - start
    after = stats[0]["checkpoints_committed"]

    rows = [
        (
            "steps",
            str(plan.steps),
            f"{1e3 * step:.0f} ms and {plan.batch * plan.gpt.context} bytes of text each",
        ),
        (
            "checkpoints committed",
            str(start + after),
            f"{start} before the kill, {after} after it; {size / 1e6:.1f} MB each",
        ),
        (
            "stall per checkpoint",
            f"{1e3 * stall:.2f} ms",
            f"that training was held, {100 * stall / step:.2f} % of a step",
        ),
    ]
    measured = inflation(logs["reference"])
    if measured.saved and measured.noise:
        note = (
            f"from {span(measured.saved)} in {len(measured.saved)} blocks;"
            f" noise: {span(measured.noise)}"
        )
        rows.append(("step inflation", f"{100 * median(measured.saved):+.1f} %", note))
    else:
        rows.append(("step inflation", "-", f"needs {7 * BLOCK} steps to be measured"))
    rows += [
        (
            "durable",
            f"{size / durable / 1e9:.2f} GB/s" if durable else "-",
            f"{1e3 * durable:.0f} ms from the first layer's update to the commit",
        ),
        (
            "lost",
            f"{lost} step" + "s" * (lost != 1),
            f"killed {kill.took_s:.2f} s after step 1, {place(logs['killed'], plan.steps)};"
            f" resumed from step {start}",
        ),
    ]
    return rows


# ---- Showing -------------------------------------------------------------------------------------

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
PLAIN = str.maketrans({"━": "=", "─": "-", "✗": "x", "✓": "+", "·": "-"})


class Screen:
    """The terminal; colours only where it has them, ASCII where it wants that."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.is_terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self.has_colours = self.is_terminal and not os.environ.get("NO_COLOR")
        try:
            "━✗✓·".encode(out.encoding or "ascii")
            self.is_plain = False
        except UnicodeEncodeError:
            self.is_plain = True

    def styled(self, text: str, *styles: str) -> str:
        if not self.has_colours or not text:
            return text
        return f"\033[{';'.join(STYLES[s] for s in styles)}m{text}\033[0m"

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def write(self, text: str) -> None:
        self.out.write(text.translate(PLAIN) if self.is_plain else text)
        self.out.flush()


class Bar:
    """One run's progress: a bar on a terminal, elsewhere a line for each quarter."""

    def __init__(self, screen: Screen, label: str, plan: Plan) -> None:
        self.screen = screen
        self.label = label
        self.steps = plan.steps
        self.start = 0  # steps that the checkpoint brought along
        self.quarter = 0
        self.text = ""
        self.began = time.monotonic()
        self.draw([], "starts")

    def show(self, entries: Sequence[Mapping[str, Any]]) -> None:
        entry = entries[-1]
        self.start = entries[0]["step"] - 1
        speed = f"   {step_seconds(entries):.2f} s/step" if len(entries) > 1 else ""
        self.draw(entries, f"loss {entry['loss']:.3f}{speed}")

    def killed(self, entries: Sequence[Mapping[str, Any]]) -> None:
        note = self.screen.styled(f"✗ SIGKILL {place(entries, self.steps)}", "red", "bold")
        self.quarter = -1  # so that it is told in any case
        self.draw(entries, note, "red")

    def draw(self, entries: Sequence[Mapping[str, Any]], note: str, colour: str = "green") -> None:
        done = entries[-1]["step"] if entries else 0
        count = f"{done:>{len(str(self.steps))}}/{self.steps}"
        self.text = f"  {self.label:<13} {self.bar(done, colour)}  {count}   {note}"
        if self.screen.is_terminal:
            self.screen.write(f"\r{self.text}\033[K")
        elif (quarter := 4 * done // self.steps) > self.quarter:
            self.quarter = quarter
            self.screen.line(f"  {self.label:<13} {count}   {note}")

    def bar(self, done: int, colour: str) -> str:
        width = max(10, min(40, shutil.get_terminal_size().columns - 60))
        before, filled = (width * n // self.steps for n in (self.start, done))
        styled = self.screen.styled
        return (
            styled("━" * before, "dim")
            + styled("━" * (filled - before), colour)
            + styled("─" * (width - filled), "dim")
        )

    def close(self, said: str) -> None:
        took = self.screen.styled(f"{time.monotonic() - self.began:.1f} s", "dim")
        if self.screen.is_terminal:
            self.screen.write(f"\r{self.text}   {took}\033[K\n")
        for line in said.splitlines():
            self.screen.line("    " + self.screen.styled(line, "yellow"))


# ---- The whole -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    gpt: GPTConfig
    batch: int
    steps: int


SIZES = {
    "default": Size(GPTConfig(), batch=8, steps=60),
    "tiny": Size(GPTConfig(context=16, width=32, layers=2, heads=2), batch=4, steps=200),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="Exit status: 0 all is equal, 1 something differs or failed, 2 wrong arguments.",
    )

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise ValueError
        return value

    def seconds(text: str) -> float:
        if not 0 <= (value := float(text)) < float("inf"):
            raise ValueError
        return value

    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--steps", type=positive, help="optimizer steps of a run, 8 or more")
    parser.add_argument(
        "--seed", type=int, help="of the training and of the kill; random if absent"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("runs"), help="where to make a folder (default: ./runs)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep that folder; else it goes if all is equal"
    )
    parser.add_argument(
        "--threads", type=positive, default=min(8, cores), help="of torch (default: %(default)s)"
    )
    parser.add_argument("--config", choices=SIZES, default="default", help="size of the model")
    parser.add_argument(
        "--kill-after",
        type=seconds,
        metavar="SECONDS",
        help="from the end of the first step; random if absent",
    )
    parser.add_argument(
        "--forget",
        choices=("scheduler", "loader"),
        default="",
        help="leave it out of the checkpoints, to see the comparison fail",
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = SIZES[options.config].steps
    if options.steps < 8:
        parser.error("argument --steps: 8 or more, or there is no middle to be killed in")
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 31)
    elif not 0 <= options.seed < 1 << 31:
        parser.error("argument --seed: from 0 to 2147483647")
    return options


def make_plan(options: argparse.Namespace, folder: Path) -> Plan:
    size = SIZES[options.config]
    return Plan(
        run="reference",
        folder=str(folder),
        gpt=size.gpt,
        batch=size.batch,
        steps=options.steps,
        seed=options.seed,
        threads=options.threads,
        forget=options.forget,
    )


def demonstrate(options: argparse.Namespace, folder: Path, screen: Screen) -> bool:
    """Run all three, compare, and print what came out; whether all is equal."""
    plan = make_plan(options, folder)
    at_step = random.Random(options.seed).uniform(0.2, 0.7) * plan.steps
    kill = Kill(at_step, options.kill_after)
    screen.line(
        screen.styled("Train, be killed, resume bit for bit", "bold")
        + f" · GPT of {count_parameters(plan.gpt):,} parameters, a checkpoint at every step"
    )
    threads = f"{plan.threads} thread" + "s" * (plan.threads > 1)
    screen.line(screen.styled(f"{threads} · seed {plan.seed} · {folder}", "dim"))
    screen.line()

    logs = {}
    logs["reference"] = run(plan, Bar(screen, "never killed", plan))
    if not options.keep:
        shutil.rmtree(plan.checkpoints)
    plan = replace(plan, run="killed")
    logs["killed"] = run(plan, Bar(screen, "killed", plan), kill)
    plan = replace(plan, run="resumed")
    if any(Path(plan.checkpoints).glob("step-" + "[0-9]" * 8)):
        plan = replace(plan, seed=plan.seed + 1)
    logs["resumed"] = run(plan, Bar(screen, "resumed", plan))
    start = json.loads(plan.path(".json").read_text())["start"]

    screen.line()
    for name, figure, note in table(plan, logs, kill, start):
        row(screen, name, figure, note, "bold")
    screen.line()
    checks = list(compare(plan, logs, start))
    for check in checks:
        verdict, colour = ("✗ differs", "red") if check.wrong else ("✓ equal", "green")
        row(screen, check.what, verdict, check.note, colour)
    screen.line()
    failed = [check for check in checks if check.wrong]
    for check in failed:
        for line in check.wrong[:3]:
            screen.line("  " + screen.styled(line, "red"))
        if len(check.wrong) > 3:
            screen.line(f"    and {len(check.wrong) - 3} more")
    if failed:
        screen.line()
    return not failed


def row(screen: Screen, name: str, figure: str, note: str, style: str) -> None:
    screen.line(
        f"  {name:<22}{screen.styled(f'{figure:>10}', style)}   {screen.styled(note, 'dim')}"
    )


def count_parameters(gpt: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(gpt).parameters())


def make_folder(options: argparse.Namespace) -> Path:
    options.dir.mkdir(parents=True, exist_ok=True)
    # Three checkpoints kept, two in flight, one being recycled, for each run; two final states.
    states = 14 if options.keep else 8
    needed = states * 12 * count_parameters(SIZES[options.config].gpt) + (16 << 20)
    free = shutil.disk_usage(options.dir).free
    if free < needed:
        raise DemoError(
            f"{options.dir} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed:"
            " name another folder with --dir"
        )
    return Path(tempfile.mkdtemp(prefix="demo-", dir=options.dir))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.work is not None:
        work(Plan.from_json(options.work))
        return 0
    screen = Screen(sys.stdout)
    began = time.monotonic()
    is_wanted = True
    try:
        folder = make_folder(options)
        try:
            is_equal = demonstrate(options, folder, screen)
            is_wanted = options.keep or not is_equal
        except KeyboardInterrupt:
            is_wanted = options.keep
            raise
        finally:
            if not is_wanted:
                shutil.rmtree(folder)
    except (DemoError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    took = f"{time.monotonic() - began:.0f} s"
    if not is_equal:
        screen.line(
            screen.styled("What was resumed is not what was killed.", "red", "bold") + f" {took}"
        )
        screen.line(f"All that it wrote is in {folder}")
        return 1
    screen.line(screen.styled("Killed, resumed, and no bit differs.", "green", "bold") + f" {took}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it started, too
    sys.exit(main())
