"""Training states as they come about: a GPT of 10.8 million parameters learns Python's own sources.

Random tensors would mislead a study of their bytes: a trained weight's exponent, a moment that has
averaged gradients, and two steps that follow each other all carry what training put there. Three
recipes, one for each layout of a state that people save:

- `fp32`: everything in float32.
- `bf16`: weights and moments in bfloat16.
- `mixed`: bfloat16 weights that compute, and float32 master weights and moments.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from _gpt import GPT, GPTConfig

__all__ = [
    "LARGE",
    "MOMENTS",
    "RECIPES",
    "SMALL",
    "GPTConfig",
    "Sample",
    "Training",
    "keep",
    "load",
    "path_of",
]

RECIPES = ("fp32", "bf16", "mixed")
MOMENTS = ("exp_avg", "exp_avg_sq")
LARGE = GPTConfig()
SMALL = GPTConfig(context=32, width=64, layers=2, heads=2)
LEAST_TEXT_BYTES = 1 << 20
SEED = 20_261_120
PEAK, FLOOR, WARM_UP_STEPS = 1e-3, 1e-4, 20


@dataclass(frozen=True)
class Sample:
    """The state after `step` steps, and the one a step before.

    By kind (`weights`, `master` in the mixed recipe alone, `exp_avg`, `exp_avg_sq`), each flat: its
    parameters one after the other, as they lie in a payload file.
    """

    recipe: str
    step: int
    learning_rate: float
    loss: float  # of the step's batch, in nats per byte
    kinds: Mapping[str, Tensor]
    previous: Mapping[str, Tensor]


def text() -> Tensor:
    """The standard library's sources as bytes: uint8. Raises FileNotFoundError below 1 MiB."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = bytearray().join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if len(found) < LEAST_TEXT_BYTES:
        raise FileNotFoundError(
            f"{folder} holds {len(found)} bytes of Python's sources and {LEAST_TEXT_BYTES} are "
            "needed to train on: use a Python whose standard library is there as *.py files"
        )
    return torch.frombuffer(found, dtype=torch.uint8)


class Training:
    """A model, its AdamW and its text. The learning rate warms up, then falls along a cosine."""

    def __init__(self, recipe: str, config: GPTConfig, steps: int, batch: int = 4) -> None:
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        torch.manual_seed(SEED)
        self.recipe, self.steps, self.batch, self.context = recipe, steps, batch, config.context
        self.text = text()
        self.model = GPT(config)
        if recipe != "fp32":
            self.model.bfloat16()
        self.live = list(self.model.parameters())
        self.masters = [nn.Parameter(p.detach().float()) for p in self.live]
        self.updated = self.masters if recipe == "mixed" else self.live
        groups = [
            {"params": [p for p in self.updated if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.updated if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK)
        self.done = 0

    def gradients(self) -> float:
        """Forward and backward; returns the mean loss in nats per byte."""
        starts = torch.randint(len(self.text) - self.context - 1, (self.batch,)).tolist()
        rows = torch.stack([self.text[s : s + self.context + 1] for s in starts]).long()
        self.model.zero_grad(set_to_none=True)
        loss = self.model.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.live, 1.0)
        return loss.item()

    def update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        if self.recipe == "mixed":
            for master, live in zip(self.masters, self.live, strict=True):
                assert live.grad is not None
                master.grad = live.grad.float()
        self.optimizer.step()
        if self.recipe == "mixed":
            with torch.no_grad():
                for master, live in zip(self.masters, self.live, strict=True):
                    live.copy_(master)
        self.done += 1

    def learning_rate(self) -> float:
        """Of the step to come."""
        step = self.done + 1
        cosine = math.cos(math.pi * min(1.0, step / self.steps))
        return min(1.0, step / WARM_UP_STEPS) * (FLOOR + (PEAK - FLOOR) * (1 + cosine) / 2)

    def tensors(self) -> dict[str, list[Tensor]]:
        """The state by kind, in the order of the parameters. There is one after the first step."""
        found = {"weights": [p.detach() for p in self.live]}
        if self.recipe == "mixed":
            found["master"] = [p.detach() for p in self.masters]
        for kind in MOMENTS:
            found[kind] = [self.optimizer.state[p][kind] for p in self.updated]
        return found

    def flat(self) -> dict[str, Tensor]:
        return {kind: torch.cat([t.reshape(-1) for t in ts]) for kind, ts in self.tensors().items()}

    def move_to(self, flat: Mapping[str, Tensor]) -> None:
        """From here on the state lies in these flat tensors, one for each kind."""
        for kind, tensors in self.tensors().items():
            at = 0
            for i, tensor in enumerate(tensors):
                place = flat[kind][at : at + tensor.numel()].view_as(tensor)
                place.copy_(tensor)
                at += tensor.numel()
                if kind in MOMENTS:
                    self.optimizer.state[self.updated[i]][kind] = place
                else:
                    (self.masters if kind == "master" else self.live)[i].data = place


def train(recipe: str, config: GPTConfig, at: Sequence[int]) -> Iterator[Sample]:
    """Trains for max(at) steps and yields a sample after each step of `at`; the least is 2."""
    training = Training(recipe, config, max(at))
    previous: dict[str, Tensor] = {}
    for step in range(1, max(at) + 1):
        rate = training.learning_rate()
        loss = training.gradients()
        training.update()
        if step in at:
            yield Sample(recipe, step, rate, loss, training.flat(), previous)
        previous = training.flat() if step + 1 in at else {}
        if step % 50 == 0:
            print(f"training {recipe}: step {step}, loss {loss:.2f}", file=sys.stderr, flush=True)


def keep(folder: Path, recipe: str, config: GPTConfig, at: Sequence[int]) -> None:
    """Leaves a file for each sample, trained if they are not all there."""
    if all(path_of(folder, recipe, step).exists() for step in at):
        return
    for sample in train(recipe, config, at):
        torch.save(vars(sample), path_of(folder, recipe, sample.step))


def path_of(folder: Path, recipe: str, step: int) -> Path:
    return folder / f"{recipe}-{step}.pt"


def load(folder: Path, recipe: str, step: int) -> Sample:
    fields: dict[str, Any] = torch.load(path_of(folder, recipe, step), weights_only=True)
    return Sample(**fields)
