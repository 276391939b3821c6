"""Training programs that tests run whole, in parts and again: tiny models, optimizers, loops.

A `Program` says what a script builds and what one iteration of its loop does. A `Live` one has been
built, as a process would build it: with a trainer, or as plain PyTorch without. Batches depend on
the position in the data alone; dropout and the loops' own noise draw from the global generators.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pccheck_ext import LayerwiseCheckpointTrainer

WORDS, WIDTH, BATCH = 11, 6, 5

LITTLE_MEMORY: dict[str, Any] = {"batch_size_mb": 8, "ratio": 2, "block_size_mb": 1}


@contextmanager
def memory_directory() -> Iterator[Path]:
    """An empty directory whose syncs cost nothing, where there is one."""
    shared = "/dev/shm"
    path = tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves the generators as other tests had them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- Models --------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Three layers, every parameter used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.embed(tokens).mean(1))))


class Zoo(nn.Module):
    """What makes states hard: tied weights, statistics, dropout, a root parameter of no dimension,
    two dtypes, a layer without gradient on odd batches, one that is first used in the third, one
    that loops thaw later."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.3)
        self.conv = nn.Conv2d(1, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.late = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.wide = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.unsqueeze(1)).sum(1)
        x = self.drop(self.norm(x.mean(1)))
        seen = int(self.norm.num_batches_tracked)
        if seen % 2 == 0:
            x = x + self.sometimes(x)
        if seen >= 3:
            x = x + self.late(x)
        x = self.wide(self.frozen(x).double()).float() * self.scale
        return self.head(x)


class Matrices(nn.Module):
    """Nothing but 2-D weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.out = nn.Linear(2 * WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(tokens.float().repeat(1, 2))))


class SparseRows(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WORDS, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).mean(1)


class Stream:
    """Batches for ever; knows its position."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(1000 + self.position)
        self.position += 1
        tokens = torch.randint(0, WORDS, (BATCH, 3), generator=drawn)
        return tokens, torch.randint(0, WORDS, (BATCH,), generator=drawn)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


# --- Optimizers ----------------------------------------------------------------------------------


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups with settings of their own, spread over the layers."""
    params = list(model.parameters())
    groups = [{"params": params[0::3]}, {"params": params[1::3], "lr": 0.02}]
    rest = params[2::3]
    return [*groups, {"params": rest, "lr": 0.005}] if rest else groups


def optimizer(kind: type[Optimizer], **settings: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(groups_of(model), **settings)


adamw = optimizer(torch.optim.AdamW, lr=0.01)


# --- Programs ------------------------------------------------------------------------------------


def customary(live: Live) -> None:
    """zero_grad, forward, backward, clipping, step, scheduler."""
    live.zero_grad()
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    nn.utils.clip_grad_norm_(live.model.parameters(), 5.0)
    live.step()
    if live.scheduler is not None:
        live.scheduler.step()


@dataclass(frozen=True)
class Program:
    model: Callable[[], nn.Module] = Zoo
    optimizer: Callable[[nn.Module], Optimizer] = adamw
    scheduler: Callable[[Optimizer], Any] | None = None
    scaler: Callable[[], Any] | None = None
    averaged: bool = False
    loop: Callable[[Live], None] = customary
    iterations: int = 5
    batches: int = 1  # that one iteration takes from the data
    options: Mapping[str, Any] = field(default_factory=dict)  # of the trainer
    extra: Callable[[Live], dict[str, Any]] | None = None


class Live:
    """A program as a process has built it; `directory=None`: without a trainer."""

    trainer: LayerwiseCheckpointTrainer

    def __init__(self, program: Program, directory: Path | None, seed: int = 0) -> None:
        seed_all(seed)
        self.program = program
        self.data = Stream()
        self.model = program.model()
        self.base = program.optimizer(self.model)
        self.scheduler = program.scheduler(self.base) if program.scheduler else None
        self.scaler = program.scaler() if program.scaler else None
        self.averaged = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
            if program.averaged
            else None
        )
        self.done = 0
        self.loss = torch.tensor(0.0)
        self.losses: dict[int, float] = {}  # by iteration
        self.batch: Any = None  # fetched ahead
        self.extra: dict[str, Any] = {"data": self.data}
        for name in ("scheduler", "scaler", "averaged"):
            if getattr(self, name) is not None:
                self.extra[name] = getattr(self, name)
        if program.extra is not None:
            self.extra |= program.extra(self)
        self.has_trainer = directory is not None
        self.stepped = self.base
        if directory is not None:
            self.trainer = LayerwiseCheckpointTrainer(
                self.model,
                self.base,
                checkpoint_dir=directory,
                extra=self.extra,
                **{**LITTLE_MEMORY, "keep_last": 0, **program.options},
            )
            self.stepped = self.trainer.optimizer
        if seed:
            self._forget_initial_values()

    def _forget_initial_values(self) -> None:
        """A process that resumes has no business with what it was initialised to."""
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return nn.functional.cross_entropy(self.model(tokens), targets)

    def step(self) -> None:
        if self.has_trainer:
            self.trainer.step(self.loss)
        else:
            self.stepped.step()

    def zero_grad(self) -> None:
        (self.trainer if self.has_trainer else self.stepped).zero_grad()

    def end_step(self) -> None:
        if self.has_trainer:
            self.trainer.end_step()

    def resume(self, checkpoint: str = "auto") -> int:
        step = self.trainer.resume(checkpoint)
        self.done = self.data.position // self.program.batches
        return step

    def run(self, until: int | None = None) -> Live:
        until = self.program.iterations if until is None else until
        while self.done < until:
            self.program.loop(self)
            self.done += 1
            self.losses[self.done] = self.loss.item()
        return self

    def state(self) -> dict[str, Any]:
        """Everything, copied, that the next iteration could depend on, but for gradients."""
        optimizer = self.stepped.state_dict()
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "optimizer": optimizer,
                "extra": {name: value.state_dict() for name, value in self.extra.items()},
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
            }
        )


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def assert_same(found: Any, wanted: Any, path: str = "state") -> None:
    """Equal in type and bits, all the way down."""
    assert type(found) is type(wanted), f"{path}: {type(found)} instead of {type(wanted)}"
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype, path
        assert found.shape == wanted.shape, path
        assert raw(found) == raw(wanted), f"{path}: {found} instead of {wanted}"
    elif isinstance(wanted, np.ndarray):
        assert_same(torch.from_numpy(found.copy()), torch.from_numpy(wanted.copy()), path)
    elif isinstance(wanted, Mapping):
        assert set(found) == set(wanted), f"{path}: {list(found)} instead of {list(wanted)}"
        for key in wanted:
            assert_same(found[key], wanted[key], f"{path}.{key}")
    elif isinstance(wanted, Sequence) and not isinstance(wanted, (str, bytes)):
        assert len(found) == len(wanted), path
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    elif isinstance(wanted, float):
        assert float(found).hex() == float(wanted).hex(), f"{path}: {found} instead of {wanted}"
    else:
        assert found == wanted, f"{path}: {found} instead of {wanted}"


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, in the order of its elements."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_resumes_bit_for_bit(
    program: Program, directory: Path, stops: Sequence[int] = (3,)
) -> None:
    """Plain PyTorch, a run that saves, and runs that go on from its steps `stops`: all the same."""
    with generators_kept():
        plain = Live(program, None).run()
        wanted = plain.state()
        whole = directory / "whole"
        saved = Live(program, whole).run()
        assert_same(saved.state(), wanted, "saved")
        saved.trainer.shutdown()
        assert saved.losses == plain.losses
        for stop in stops:
            left = directory / f"left-at-{stop}"
            name = f"step-{stop:08d}"
            shutil.copytree(whole / name, left / name)
            resumed = Live(program, left, seed=100 + stop)
            assert resumed.resume() == stop
            first = resumed.done + 1
            resumed.run()
            assert_same(resumed.state(), wanted, f"resumed from {stop}")
            resumed.trainer.shutdown()
            assert resumed.losses == {i: plain.losses[i] for i in range(first, plain.done + 1)}
            assert resumed.trainer.training_step == saved.trainer.training_step
            assert resumed.trainer.loss_history == saved.trainer.loss_history
            assert resumed.trainer.step_history == saved.trainer.step_history
