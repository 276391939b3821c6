"""Training that goes on from a checkpoint: every bit as if it had never stopped."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import (
    LITTLE_MEMORY,
    WORDS,
    Live,
    Matrices,
    Plain,
    Program,
    SparseRows,
    Stream,
    Zoo,
    assert_resumes_bit_for_bit,
    assert_same,
    generators_kept,
    gradients,
    memory_directory,
    optimizer,
    raw,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import pccheck_ext
from pccheck_ext import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    LayerwiseCheckpointTrainer,
    LayerwiseOptimizer,
    ModelRecovery,
)


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


# --- Optimizers ----------------------------------------------------------------------------------

KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05, "t0": 2.0}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
MODES = {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in KINDS for mode in MODES if mode != "fused" or name in FUSED],
)
def test_every_optimizer_resumes(name: str, mode: str, directory: Path) -> None:
    kind, settings = KINDS[name]
    # torch's fused SGD cannot do with parameters that get their first gradient late.
    model = Plain if (name, mode) == ("SGD", "fused") else Zoo
    program = Program(model=model, optimizer=optimizer(kind, **settings, **MODES[mode]))
    assert_resumes_bit_for_bit(program, directory, stops=(2,))


def test_muon_and_an_optimizer_for_sparse_gradients_resume(directory: Path) -> None:
    muon = Program(model=Matrices, optimizer=optimizer(torch.optim.Muon, lr=0.01))
    assert_resumes_bit_for_bit(muon, directory / "muon")
    sparse = Program(
        model=SparseRows,
        optimizer=lambda model: torch.optim.SparseAdam(model.parameters(), lr=0.1),
        loop=unclipped,
    )
    assert_resumes_bit_for_bit(sparse, directory / "sparse")


def unclipped(live: Live) -> None:
    live.zero_grad()
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    live.step()


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.filterwarnings("ignore:LBFGS is stepped whole")
def test_lbfgs_with_closures_resumes(search: str | None, directory: Path) -> None:
    def by_closure(live: Live) -> None:
        batch = next(live.data)

        def closure() -> Tensor:
            live.zero_grad()
            loss = live.forward(batch)
            loss.backward()
            return loss

        live.loss = live.stepped.step(closure)

    program = Program(
        model=Matrices,
        optimizer=lambda model: torch.optim.LBFGS(
            model.parameters(), max_iter=2, history_size=3, line_search_fn=search
        ),
        loop=by_closure,
    )
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3))


class Foreign(Optimizer):
    """An optimizer from elsewhere that keeps whatever it likes as state."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "seen": {"steps": 0, "names": ("a", 1)}})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"]["steps"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(best=None, count=0, norms=[], sums={1: torch.zeros(())})
                state["count"] += 1
                state["norms"] = [*state["norms"][-2:], p.grad.norm()]
                state["sums"][1] = state["sums"][1] + p.grad.sum()
                if state["count"] == 2:
                    state["best"] = p.grad.clone()
                elif state["count"] > 2:
                    state["best"].mul_(0.5).add_(p.grad)
                    p.add_(state["best"], alpha=-0.01)
                p.add_(p.grad, alpha=-group["lr"] / state["count"])
                p.mul_(1 - 1e-3 * float(state["sums"][1].tanh()))


@pytest.mark.filterwarnings("ignore:Foreign.*stepped whole")
def test_foreign_state_resumes_also_where_a_tensor_takes_the_place_of_something_else(
    directory: Path,
) -> None:
    program = Program(optimizer=lambda m: Foreign(m.parameters()), iterations=6)
    assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4))


class Noted(torch.optim.SGD):
    """State that belongs to no parameter, and names with dots: both are allowed by torch."""

    def step(self, closure: Any = None) -> None:
        notes = self.state["notes"]
        notes["steps"] = notes.get("steps", 0) + 1
        notes["total"] = notes.get("total", torch.zeros(2)) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 / notes["steps"]
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["grad.square"] = state.get("grad.square", 0) + p.grad**2
                    p.grad.add_(state["grad.square"])
        super().step()


@pytest.mark.filterwarnings("ignore:Noted.*stepped whole")
def test_state_of_no_parameter_and_keys_with_dots_resume(directory: Path) -> None:
    program = Program(model=Plain, optimizer=lambda m: Noted(m.parameters(), lr=0.1))
    assert_resumes_bit_for_bit(program, directory)


def test_a_learning_rate_that_is_a_tensor_resumes(directory: Path) -> None:
    program = Program(
        optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
        scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    )
    assert_resumes_bit_for_bit(program, directory)


# --- What models hold ----------------------------------------------------------------------------


class Temperature(nn.Module):
    """A loss with a parameter of its own, which the optimizer trains and the model does not own."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.5, 2.0]))


def test_parameters_that_only_the_optimizer_knows_resume(directory: Path) -> None:
    class WithTemperature(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["outside"] = Temperature()  # not registered

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * self.outside.value.prod()

    program = Program(
        model=WithTemperature,
        optimizer=lambda m: torch.optim.Adam(
            [{"params": m.parameters()}, {"params": [m.outside.value], "lr": 0.1}], lr=0.01
        ),
    )
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3))


class Counting(nn.Module):
    """Counts its training forwards, outside of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x / self.count

    def get_extra_state(self) -> Any:
        return {"count": self.count, "root": (0.5, torch.tensor(self.count).sqrt())}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]
        assert state["root"][1] == torch.tensor(self.count).sqrt()


class CountingInTensor(Counting):
    def get_extra_state(self) -> Any:
        return torch.tensor([self.count])

    def set_extra_state(self, state: Any) -> None:
        self.count = int(state)


@pytest.mark.parametrize("kind", [Counting, CountingInTensor])
def test_extra_state_that_forward_changes_is_of_the_step(
    kind: type[Counting], directory: Path
) -> None:
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.counting = kind()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.counting(super().forward(tokens))

    assert_resumes_bit_for_bit(Program(model=Model), directory, stops=(1, 3))


def test_a_buffer_that_is_first_set_later_is_saved_from_then_on(directory: Path) -> None:
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", None)
            self.calls = 0

        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            self.calls += 1
            if self.calls >= 3:
                seen = logits.detach().mean(0)
                self.mean = seen if self.mean is None else 0.5 * self.mean + seen
            return logits

    saved = Live(Program(model=Model), directory).run(4)
    saved.trainer.wait()
    fresh = Model()
    fresh.mean = torch.zeros(WORDS)
    for step in (1, 2, 3, 4):
        stored = ModelRecovery(directory)
        assert stored.load_checkpoint(fresh, f"step-{step:08d}") == ([] if step > 2 else ["(root)"])
    assert_same(fresh.mean, saved.model.mean)
    saved.trainer.shutdown()


def test_a_parameter_that_is_replaced_in_model_and_optimizer_is_saved_with_its_state(
    directory: Path,
) -> None:
    live = Live(Program(model=Plain, optimizer=optimizer(torch.optim.Adam, lr=0.01)), directory)
    live.run(2)
    old = live.model.hidden.weight
    live.trainer.wait()
    live.model.hidden.weight = nn.Parameter(torch.randn_like(old))
    del live.base.state[old]
    for group in live.base.param_groups:
        group["params"] = [live.model.hidden.weight if p is old else p for p in group["params"]]
    live.run(4)
    wanted = live.state()
    live.trainer.shutdown()
    resumed = Live(live.program, directory, seed=3)
    assert resumed.resume() == 4
    assert_same(resumed.state()["model"], wanted["model"])
    state = resumed.base.state[resumed.model.hidden.weight]
    assert state["step"] == 2
    assert_same(state["exp_avg"], live.base.state[live.model.hidden.weight]["exp_avg"])
    resumed.trainer.shutdown()


def test_parametrized_layers_resume(directory: Path) -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            parametrizations.weight_norm(self.out)
            parametrizations.spectral_norm(self.hidden)
            prune.random_unstructured(self.embed, "weight", 0.3)

    assert_resumes_bit_for_bit(Program(model=Normed), directory, stops=(1, 3))


class Rivals(nn.ModuleDict):
    """Two models against each other, of which the first is the trainer's."""

    def __init__(self) -> None:
        super().__init__({"one": Plain(), "other": Plain()})


def contest(live: Live, *, end: bool = False, trainer_first: bool = False) -> None:
    one, other = live.model["one"], live.rival
    tokens, targets = next(live.data)

    def update_other() -> None:
        live.rival_optimizer.zero_grad()
        nn.functional.cross_entropy(other(tokens) + one(tokens).detach(), targets).backward()
        live.rival_optimizer.step()

    if not trainer_first:
        update_other()
    live.zero_grad()
    live.loss = -nn.functional.cross_entropy(other(tokens) * one(tokens), targets)
    live.loss.backward()
    live.step()
    if trainer_first:
        update_other()
    if end:
        live.end_step()


def contesting(within: bool) -> Callable[[Live], dict[str, Any]]:
    def extra(live: Live) -> dict[str, Any]:
        live.rival = live.model["other"] if within else Plain()
        live.rival_optimizer = torch.optim.Adam(live.rival.parameters(), lr=0.02)
        found = {"rival_optimizer": live.rival_optimizer}
        return found if within else {**found, "rival": live.rival}

    return extra


def test_a_second_optimizer_within_the_model_resumes_where_the_trainers_comes_last(
    directory: Path,
) -> None:
    program = Program(
        model=Rivals,
        optimizer=lambda m: torch.optim.AdamW(m["one"].parameters(), lr=0.01),
        extra=contesting(within=True),
        loop=contest,
    )
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3))


@pytest.mark.parametrize("trainer_first", [False, True])
def test_a_second_model_and_optimizer_in_extra_resume_where_the_loop_ends_its_steps(
    trainer_first: bool, directory: Path
) -> None:
    program = Program(
        model=Rivals,
        optimizer=lambda m: torch.optim.AdamW(m["one"].parameters(), lr=0.01),
        extra=contesting(within=False),
        loop=functools.partial(contest, end=True, trainer_first=trainer_first),
    )
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3))


def test_layers_that_are_thawed_later_resume(directory: Path) -> None:
    def thawing(live: Live) -> None:
        live.model.frozen.requires_grad_(live.data.position >= 2)
        live.zero_grad()
        live.loss = live.forward(next(live.data))
        live.loss.backward()
        live.step()

    program = Program(loop=thawing, optimizer=optimizer(torch.optim.Adam, lr=0.01))
    assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4))


def test_parameters_in_channels_last_keep_their_format_with_their_state(directory: Path) -> None:
    program = Program(optimizer=optimizer(torch.optim.Adam, lr=0.01))
    saved = Live(program, directory).run(2)
    saved.trainer.shutdown()
    resumed = Live(program, directory, seed=9)
    assert resumed.resume() == 2
    for live in (saved, resumed):
        weight = live.model.conv.weight
        assert weight.stride() == live.base.state[weight]["exp_avg"].stride()
    resumed.trainer.shutdown()


# --- Loops ---------------------------------------------------------------------------------------


def cleared_before_the_scheduler(live: Live) -> None:
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    live.step()
    live.zero_grad()
    live.scheduler.step()


def cleared_after_the_scheduler(live: Live) -> None:
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    live.step()
    live.scheduler.step()
    live.zero_grad()


def evaluated_in_between(live: Live) -> None:
    cleared_after_the_scheduler(live)
    live.model.eval()
    with torch.no_grad():
        live.evaluation = live.forward(next(Stream()))
    live.model.train()


def prefetching(live: Live) -> None:
    if live.batch is None:
        live.batch = next(live.data)
    live.zero_grad()
    live.loss = live.forward(live.batch)
    live.loss.backward()
    live.step()
    live.scheduler.step()
    live.batch = next(live.data)


def averaging(live: Live) -> None:
    cleared_before_the_scheduler(live)
    live.averaged.update_parameters(live.model)


def noisy(live: Live) -> None:
    """Draws from every generator, an odd number of times, in the forward's course."""
    live.zero_grad()
    factor = 1 + random.random() + random.gauss(0, 0.1) + np.random.randn() + torch.rand(()).item()
    live.loss = live.forward(next(live.data)) * factor
    live.loss.backward()
    live.step()
    live.scheduler.step()


def ending_its_steps(live: Live) -> None:
    """An evaluation whose loader draws from torch's generator, then end_step()."""
    cleared_before_the_scheduler(live)
    loader = DataLoader(TensorDataset(torch.arange(7)), batch_size=2, shuffle=True)
    live.order = [int(x) for (batch,) in loader for x in batch]
    random.random()
    live.end_step()


def accumulating(live: Live) -> None:
    live.zero_grad()
    live.loss = torch.tensor(0.0)
    for _ in range(2):
        loss = live.forward(next(live.data)) / 2
        loss.backward()
        live.loss = live.loss + loss.detach()
    live.step()
    live.scheduler.step()


def on_plateau(live: Live) -> None:
    live.zero_grad()
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    live.step()
    live.scheduler.step(live.loss.item())


def decaying(o: Optimizer) -> Any:
    return lr_scheduler.ExponentialLR(o, 0.7)


@pytest.mark.parametrize(
    "program",
    [
        Program(loop=cleared_before_the_scheduler, scheduler=decaying),
        Program(loop=cleared_after_the_scheduler, scheduler=decaying),
        Program(loop=evaluated_in_between, scheduler=decaying),
        Program(loop=prefetching, scheduler=decaying),
        Program(loop=averaging, scheduler=decaying, averaged=True),
        Program(loop=noisy, scheduler=decaying),
        Program(loop=ending_its_steps, scheduler=decaying),
        Program(loop=accumulating, scheduler=decaying, batches=2),
        Program(
            loop=on_plateau,
            scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
        ),
    ],
    ids=lambda program: program.loop.__name__,
)
def test_loops_in_every_customary_order_resume_from_any_step(
    program: Program, directory: Path
) -> None:
    assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
        lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step)] * 3),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 1)], [2]
        ),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.PolynomialLR(o, 8)]
        ),
    ],
    ids=["MultiStep", "OneCycle", "Cyclic", "WarmRestarts", "Lambda", "Sequential", "Chained"],
)
def test_every_kind_of_scheduler_resumes(
    scheduler: Callable[[Optimizer], Any], directory: Path
) -> None:
    assert_resumes_bit_for_bit(Program(scheduler=scheduler), directory)


def scaled(live: Live) -> None:
    """The third batch overflows: its step is skipped, or void."""
    live.zero_grad()
    batch = next(live.data)
    live.loss = live.forward(batch) * (float("inf") if live.data.position == 3 else 1.0)
    live.scaler.scale(live.loss).backward()
    live.scaler.step(live.stepped)
    live.scaler.update()
    live.scheduler.step()


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("mode", ["foreach", "fused"])
def test_a_step_that_the_scaler_skips_is_no_step_and_the_state_before_it_is_kept(
    kind: type[Optimizer], mode: str, directory: Path
) -> None:
    program = Program(
        model=Plain,
        optimizer=optimizer(kind, lr=0.01, **MODES[mode]),
        scheduler=decaying,
        scaler=scaler,
        loop=scaled,
    )
    assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4))
    assert not (directory / "whole" / "step-00000005").exists()


@pytest.mark.parametrize("mode", ["foreach", "fused"])
def test_a_void_step_is_not_reported_as_a_failed_checkpoint(mode: str, directory: Path) -> None:
    program = Program(
        model=Plain,
        optimizer=optimizer(torch.optim.AdamW, lr=0.01, **MODES[mode]),
        scheduler=decaying,
        scaler=scaler,
        loop=scaled,
    )
    live = Live(program, directory).run()
    live.trainer.wait()
    stats = live.trainer.stats()
    assert (stats["checkpoints_committed"], stats["checkpoints_failed"]) == (4, 0)
    assert live.trainer.training_step == 4
    assert live.trainer.optimizer.training_step == 4
    live.trainer.shutdown()


def test_a_closure_that_raises_leaves_nothing_behind_and_training_goes_on(directory: Path) -> None:
    live = Live(Program(), directory).run(2)

    def closure() -> Tensor:
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        live.stepped.step(closure)
    live.run(4)
    live.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == [f"step-{i:08d}" for i in (1, 2, 3, 4)]
    assert live.trainer.stats()["checkpoints_failed"] == 0


# --- Gradients that survive ----------------------------------------------------------------------


def never_zeroing(live: Live) -> None:
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    live.step()


@pytest.mark.parametrize(
    "make",
    [optimizer(torch.optim.SGD, lr=0.01), optimizer(torch.optim.AdamW, lr=0.01)],
    ids=["SGD", "AdamW"],
)
def test_a_loop_that_never_zeroes_its_gradients_resumes_where_they_are_saved(
    make: Callable[[nn.Module], Optimizer], directory: Path
) -> None:
    program = Program(optimizer=make, loop=never_zeroing, options={"save_gradients": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4))


def test_saved_gradients_come_back_and_absent_ones_are_absent(directory: Path) -> None:
    program = Program(
        optimizer=optimizer(torch.optim.SGD, lr=0.01),
        loop=never_zeroing,
        options={"save_gradients": True},
    )
    saved = Live(program, directory).run(4)
    wanted = gradients(saved.model)
    saved.trainer.shutdown()
    assert wanted["late.weight"] is not None
    assert wanted["frozen.weight"] is None
    resumed = Live(program, directory, seed=5)
    resumed.model.frozen.weight.grad = torch.ones(6, 6)
    resumed.resume()
    assert_same(gradients(resumed.model), wanted)
    resumed.trainer.shutdown()


def test_a_loop_that_never_zeroes_its_gradients_is_warned_once(directory: Path) -> None:
    live = Live(Program(loop=never_zeroing), directory)
    with pytest.warns(RuntimeWarning, match="save_gradients=True") as told:
        live.run()
    assert len(told) == 1
    live.trainer.shutdown()


@pytest.mark.parametrize("loop", [cleared_after_the_scheduler, accumulating, ending_its_steps])
def test_loops_that_zero_their_gradients_are_not_warned(
    loop: Callable[[Live], None], directory: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Live(Program(loop=loop, scheduler=decaying), directory).run().trainer.shutdown()


# --- Which steps are saved, and kept -------------------------------------------------------------


def test_a_checkpoint_of_every_third_step_resumes_from_one_that_is_not_the_newest_step(
    directory: Path,
) -> None:
    program = Program(
        loop=averaging,
        scheduler=decaying,
        averaged=True,
        iterations=9,
        options={"checkpoint_every": 3},
    )
    whole = directory / "whole"
    assert_resumes_bit_for_bit(program, directory, stops=(3, 6))
    assert ModelRecovery(whole).list_checkpoints() == [f"step-{i:08d}" for i in (3, 6, 9)]

    left = Live(program, directory / "left").run(8)
    wanted = left.losses[7], left.losses[8]
    left.trainer.shutdown()
    resumed = Live(program, directory / "left", seed=3)
    assert resumed.resume() == 6
    resumed.run(8)
    assert (resumed.losses[7], resumed.losses[8]) == wanted
    resumed.trainer.shutdown()


def test_only_the_newest_are_kept_and_custom_ids_always(directory: Path) -> None:
    live = Live(Program(options={"keep_last": 2}), directory).run(1)
    live.trainer.save_full_checkpoint("first")
    live.run(5)
    live.trainer.shutdown()
    assert sorted(os.listdir(directory)) == [".lock", "first", "step-00000004", "step-00000005"]
    resumed = Live(Program(options={"keep_last": 2}), directory, seed=2)
    assert resumed.resume() == 5
    resumed.run(7)
    resumed.trainer.shutdown()
    assert sorted(os.listdir(directory)) == [".lock", "first", "step-00000006", "step-00000007"]


def test_going_on_sets_later_checkpoints_aside_and_says_so(directory: Path) -> None:
    program = Program(iterations=5)
    first = Live(program, directory).run()
    wanted = first.state()
    first.trainer.save_full_checkpoint("end")
    first.trainer.shutdown()
    resumed = Live(program, directory, seed=7)
    assert resumed.resume("step-00000002") == 2
    assert ModelRecovery(directory).get_latest_checkpoint() in ("step-00000005", "end")
    with pytest.warns(RuntimeWarning, match=r"from step 2 .*stale: end, step-00000003, "):
        resumed.run()
    assert_same(resumed.state(), wanted)
    resumed.trainer.shutdown()
    assert sorted(os.listdir(directory)) == [
        ".lock",
        "end.stale",
        *(f"step-{i:08d}" for i in (1, 2)),
        *(f"step-{i:08d}{suffix}" for i in (3, 4, 5) for suffix in ("", ".stale")),
    ]


def test_a_newest_checkpoint_that_is_corrupt_is_passed_over_loudly_and_set_aside(
    directory: Path,
) -> None:
    program = Program(loop=noisy, scheduler=decaying, iterations=5)
    first = Live(program, directory).run()
    wanted = first.state()
    first.trainer.shutdown()
    corrupt(directory / "step-00000005" / "model.safetensors")
    corrupt(directory / "step-00000004" / "manifest.json")
    assert ModelRecovery(directory).get_latest_checkpoint() == "step-00000003"
    resumed = Live(program, directory, seed=7)
    with pytest.warns(RuntimeWarning, match="cannot be used") as told:
        assert resumed.resume() == 3
    names = [str(w.message).split()[1] for w in told]
    assert names == ["step-00000005", "step-00000004"]
    with pytest.warns(RuntimeWarning, match="stale"):
        resumed.run()
    assert_same(resumed.state(), wanted)
    resumed.trainer.shutdown()
    again = Live(program, directory, seed=8)
    assert again.resume() == 5
    assert_same(again.state(), wanted)
    again.trainer.shutdown()


def corrupt(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "extra.safetensors", "checksums.bin"]
)
def test_a_newest_checkpoint_with_a_file_missing_is_passed_over_loudly(
    file: str, directory: Path
) -> None:
    Live(Program(), directory).run(2).trainer.shutdown()
    (directory / "step-00000002" / file).unlink()
    resumed = Live(Program(), directory, seed=7)
    with pytest.warns(RuntimeWarning, match="step-00000002 cannot be used"):
        assert resumed.resume() == 1
    assert not any(torch.isnan(p).any() for p in resumed.model.parameters())
    resumed.trainer.shutdown()


def test_where_no_checkpoint_verifies_it_is_an_error_that_names_them(directory: Path) -> None:
    Live(Program(), directory).run(2).trainer.shutdown()
    for step in (1, 2):
        corrupt(directory / f"step-{step:08d}" / "model.safetensors")
    resumed = Live(Program(), directory, seed=7)
    with (
        pytest.warns(RuntimeWarning, match="cannot be used"),
        pytest.raises(CheckpointCorrupt, match="step-00000002, step-00000001"),
    ):
        resumed.resume()
    resumed.trainer.shutdown()


def test_a_fresh_start_in_a_used_directory_sets_the_old_history_aside(directory: Path) -> None:
    Live(Program(), directory).run(3).trainer.shutdown()
    again = Live(Program(), directory)
    with pytest.warns(RuntimeWarning, match="from step 0 "):
        again.run(1)
    again.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000001"]
    assert Live(Program(), directory).resume() == 1


@pytest.mark.filterwarnings("ignore:training goes on from step")
def test_histories_are_not_mixed_where_only_some_steps_are_saved(directory: Path) -> None:
    """Checkpoints of the abandoned history between the step gone on from and the first new one."""
    Live(Program(), directory).run(5).trainer.shutdown()
    sparse = Program(options={"checkpoint_every": 4})
    resumed = Live(sparse, directory, seed=4)
    assert resumed.resume("step-00000001") == 1
    resumed.run(5)
    resumed.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000001", "step-00000004"]

    fresh = Live(sparse, directory).run(4)
    fresh.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000004"]


def test_resuming_twice_in_a_row_is_resuming_once(directory: Path) -> None:
    program = Program(loop=noisy, scheduler=decaying)
    wanted = Live(program, None).run().state()
    Live(program, directory).run(3).trainer.shutdown()
    resumed = Live(program, directory, seed=7)
    assert resumed.resume() == 3
    assert resumed.resume() == 3
    resumed.run()
    assert_same(resumed.state(), wanted)
    assert resumed.resume("step-00000002") == 2
    with pytest.warns(RuntimeWarning, match="stale"):
        resumed.run()
    assert_same(resumed.state(), wanted)
    resumed.trainer.shutdown()


def test_resuming_again_and_again_by_new_trainers_is_one_run(directory: Path) -> None:
    program = Program(loop=averaging, scheduler=decaying, averaged=True, iterations=6)
    wanted = Live(program, None).run().state()
    live = Live(program, directory)
    for until in (1, 2, 4, 5, 6):
        live.run(until)
        live.trainer.shutdown()
        live = Live(program, directory, seed=until)
        assert live.resume() == until
    assert_same(live.state(), wanted)
    assert len(live.trainer.loss_history) == 6
    live.trainer.shutdown()


def test_there_is_nothing_to_resume_in_a_new_directory(directory: Path) -> None:
    live = Live(Program(), directory / "new")
    before = live.state()
    assert live.resume() == 0
    assert_same(live.state(), before)
    with pytest.raises(CheckpointNotFound, match=r"step-00000009.*none"):
        live.resume("step-00000009")
    live.trainer.shutdown()


def test_a_relative_directory_stays_where_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "elsewhere").mkdir()
    monkeypatch.chdir(directory)
    Live(Program(), Path("run")).run(2).trainer.shutdown()
    live = Live(Program(), Path("run"), seed=2)
    monkeypatch.chdir(directory / "elsewhere")
    assert live.resume() == 2
    live.run(3)
    live.trainer.shutdown()
    assert ModelRecovery(directory / "run").get_latest_checkpoint() == "step-00000003"
    assert os.listdir(directory / "elsewhere") == []


def test_the_newest_ten_thousand_losses_are_kept_and_come_back(directory: Path) -> None:
    weight = nn.Linear(1, 1, bias=False)
    weight.weight.grad = torch.zeros(1, 1)

    def trainer() -> LayerwiseCheckpointTrainer:
        return LayerwiseCheckpointTrainer(
            weight,
            torch.optim.SGD(weight.parameters(), lr=0.1),
            checkpoint_dir=directory,
            checkpoint_every=10_003,
            **LITTLE_MEMORY,
        )

    with trainer() as first:
        for i in range(1, 10_004):
            first.step(i / 7)
        assert first.loss_history == [i / 7 for i in range(4, 10_004)]
    with trainer() as second:
        assert second.resume() == 10_003
        assert second.loss_history == [i / 7 for i in range(4, 10_004)]
        assert second.step_history == list(range(4, 10_004))


def test_a_trainer_that_was_dropped_lets_go_of_its_directory(directory: Path) -> None:
    live = Live(Program(), directory).run(3)
    del live
    with pytest.warns(ResourceWarning, match="dropped without shutdown"):
        gc.collect()
    resumed = Live(Program(options={"lock_timeout_s": 0.1}), directory, seed=3)
    assert resumed.resume() == 3
    resumed.trainer.shutdown()


# --- Saving on demand ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_the_whole_state_is_saved_under_a_name_in_any_number_of_chunks(
    chunks: int, directory: Path
) -> None:
    program = Program(
        loop=averaging,
        scheduler=decaying,
        averaged=True,
        options={"checkpoint_chunk_count": chunks, "block_size_mb": 1 / 256},
    )
    wanted = Live(program, None).run().state()
    live = Live(program, directory).run(3)
    live.trainer.save_full_checkpoint("after.three-1")  # step 3 has its own checkpoint as well
    live.run(4)
    live.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == [
        *(f"step-{i:08d}" for i in (1, 2, 3, 4)),
        "after.three-1",
    ]
    shutil.rmtree(directory / "step-00000003")
    for load in ("resume", "load_checkpoint"):
        resumed = Live(program, directory, seed=chunks)
        if load == "resume":
            assert resumed.resume("after.three-1") == 3
        else:
            assert resumed.trainer.load_checkpoint("after.three-1") == []
            resumed.done = resumed.data.position
            assert resumed.trainer.training_step == 3
        with pytest.warns(RuntimeWarning, match=r"stale: step-00000004"):
            resumed.run()
        assert_same(resumed.state(), wanted)
        resumed.trainer.shutdown()
        for name in ("step-00000005", "step-00000003"):
            shutil.rmtree(directory / name, ignore_errors=True)


def test_a_state_can_be_saved_before_the_first_step_and_between_saved_ones(directory: Path) -> None:
    program = Program(options={"checkpoint_every": 3}, scheduler=decaying)
    wanted = Live(program, None).run().state()
    live = Live(program, directory)
    live.trainer.save_full_checkpoint("untrained")
    live.run(2)
    live.trainer.save_full_checkpoint("two")
    live.trainer.shutdown()
    for name, step in (("untrained", 0), ("two", 2)):
        resumed = Live(program, directory, seed=5)
        assert resumed.resume(name) == step
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "training goes on from step 0")
            resumed.run()
        assert_same(resumed.state(), wanted)
        resumed.trainer.shutdown()
        if step == 0:
            (directory / "two.stale").rename(directory / "two")
            shutil.rmtree(directory / "step-00000003")


@pytest.mark.parametrize(
    "name", ["step-00000002", "", ".hidden", "a/b", "x.partial", "é", "a" * 129]
)
def test_a_name_that_cannot_be_is_refused(name: str, directory: Path) -> None:
    live = Live(Program(), directory).run(1)
    with pytest.raises(ValueError, match="checkpoint_id"):
        live.trainer.save_full_checkpoint(name)
    live.run(2)
    live.trainer.wait()
    with pytest.raises(ValueError, match=r"'step-00000002' .* there already"):
        live.trainer.save_full_checkpoint("step-00000002")
    live.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000001", "step-00000002"]


def test_train_step_saves_where_it_is_told_to(directory: Path) -> None:
    def trained(live: Live, counts: Callable[[int], bool]) -> None:
        while live.done < 6:
            loss = live.trainer.train_step(
                *next(live.data), nn.functional.cross_entropy, enable_checkpoint=counts(live.done)
            )
            live.done += 1
            live.losses[live.done] = loss

    plain = Live(Program(loop=unclipped, iterations=6), None).run()
    program = Program(
        options={"checkpoint_chunk_count": 2, "device": "cpu", "wait_for_chunks": True}
    )
    live = Live(program, directory)
    trained(live, lambda i: i % 2 == 0)
    assert ModelRecovery(directory).list_checkpoints() == [f"step-{i:08d}" for i in (1, 3, 5)]
    assert live.losses == plain.losses
    assert_same(live.state(), plain.state())
    live.trainer.shutdown()
    resumed = Live(program, directory, seed=3)
    assert resumed.resume() == 5
    trained(resumed, lambda i: True)
    assert_same(resumed.state(), plain.state())
    resumed.trainer.shutdown()
    assert resumed.trainer.loss_history == list(plain.losses.values())


def test_a_train_step_that_is_not_to_be_saved_and_fails_does_not_silence_the_next_step(
    directory: Path,
) -> None:
    def failing(*_: Any) -> Tensor:
        raise KeyError("criterion")

    def diverging(logits: Tensor, _: Tensor) -> Tensor:
        return logits.sum()

    live = Live(Program(), directory)
    with pytest.raises(KeyError):
        live.trainer.train_step(*next(live.data), failing, enable_checkpoint=False)

    def refusing(*_: Any) -> None:
        raise ValueError("hook")

    hook = live.base.register_step_pre_hook(refusing)
    with pytest.raises(ValueError, match="hook"):
        live.trainer.train_step(*next(live.data), diverging, enable_checkpoint=False)
    hook.remove()
    live.run(1)
    live.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000001"]


def test_waiting_for_every_step_does_not_change_what_a_step_is(directory: Path) -> None:
    program = Program(
        loop=averaging, scheduler=decaying, averaged=True, options={"wait_for_chunks": True}
    )
    assert_resumes_bit_for_bit(program, directory, stops=(2,))


def test_a_trainer_that_was_shut_down_takes_no_step_that_it_would_not_save(
    directory: Path,
) -> None:
    live = Live(Program(model=Plain), directory).run(2)
    live.trainer.shutdown()
    before = live.state()["model"]
    tokens, targets = next(live.data)
    for step in (
        lambda: live.trainer.step(1.0),
        lambda: live.trainer.train_step(tokens, targets, torch.nn.functional.cross_entropy),
    ):
        with pytest.raises(RuntimeError, match="was shut down"):
            step()
    assert_same(live.state()["model"], before)
    assert live.trainer.training_step == 2
    live.trainer.wait()
    live.trainer.shutdown()
    live.base.step()  # the loop's own business


def test_a_step_that_waits_returns_when_the_one_before_is_durable_and_its_own_at_its_end(
    directory: Path,
) -> None:
    live = Live(Program(model=Plain, options={"wait_for_chunks": True}), directory)
    recovery = ModelRecovery(directory)
    for step in (1, 2, 3):
        for parameter in live.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        live.trainer.step()
        assert len(recovery.list_checkpoints()) == step - 1
        live.trainer.end_step()
        assert len(recovery.list_checkpoints()) == step
    live.trainer.shutdown()


class Taller(Plain):
    """With a layer that older checkpoints have nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Linear(3, 3)


def test_layers_that_a_checkpoint_has_nothing_of_stay_as_they_are(
    directory: Path, tmp_path: Path
) -> None:
    adam = optimizer(torch.optim.Adam, lr=0.01)
    live = Live(Program(model=Plain, optimizer=adam), directory).run(3)
    live.trainer.shutdown()
    taller = Live(Program(model=Taller, optimizer=adam), tmp_path)
    for parameter in taller.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    taller.trainer.step()
    taller.trainer.shutdown()
    other = LayerwiseCheckpointTrainer(
        taller.model, taller.base, checkpoint_dir=directory, extra={"data": Stream()}
    )
    added = [*taller.model.added.parameters()]
    before = [(raw(p), raw(taller.base.state[p]["exp_avg"])) for p in added]
    with pytest.raises(CheckpointMismatch):
        other.resume()
    assert other.load_checkpoint("step-00000003") == ["added"]
    assert [(raw(p), raw(taller.base.state[p]["exp_avg"])) for p in added] == before
    loaded = dict(taller.model.named_parameters())
    for name, parameter in live.model.named_parameters():
        assert raw(loaded[name]) == raw(parameter)
        assert raw(taller.base.state[loaded[name]]["exp_avg"]) == raw(
            live.base.state[parameter]["exp_avg"]
        )
    other.shutdown()


def test_with_statement_commits_the_last_step(directory: Path) -> None:
    live = Live(Program(), directory)
    with live.trainer as trainer:
        live.run(2)
    assert trainer.stats()["last_committed_step"] == 2
    trainer.shutdown()
    assert ModelRecovery(directory).get_latest_checkpoint() == "step-00000002"


def test_with_statement_lets_the_loops_own_error_through(directory: Path) -> None:
    def failing(live: Live) -> None:
        if live.done == 2:
            raise ZeroDivisionError
        unclipped(live)

    live = Live(Program(loop=failing), directory)
    with pytest.raises(ZeroDivisionError), live.trainer:
        live.run()
    assert ModelRecovery(directory).get_latest_checkpoint() == "step-00000002"


def test_an_optimizer_that_is_layerwise_already_keeps_its_layers(directory: Path) -> None:
    torch.manual_seed(0)
    model = Plain()
    layers = {"all": list(model.parameters())}
    told: list[str] = []
    own = LayerwiseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        ["all"],
        layers,
        callback=lambda layer, step, params: told.append(f"{layer} {step}"),
    )
    with LayerwiseCheckpointTrainer(model, own, checkpoint_dir=directory, **LITTLE_MEMORY) as t:
        assert t.optimizer is own
        for tokens, targets in (next(Stream()), next(Stream())):
            t.train_step(tokens, targets, nn.functional.cross_entropy)
        assert (t.update_order, t.order_source) == (["all"], "given")
    assert told == ["all 1", "all 2"]
    assert ModelRecovery(directory).load_checkpoint(Plain(), "step-00000002", strict=True) == []


# --- What does not fit ---------------------------------------------------------------------------


def test_another_optimizer_or_model_or_other_objects_are_refused_unchanged(directory: Path) -> None:
    Live(Program(), directory).run(1).trainer.shutdown()
    others = [
        Program(optimizer=optimizer(torch.optim.Adam, lr=0.01)),
        Program(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)),
        Program(model=Plain),
        Program(scheduler=decaying),
    ]
    for other in others:
        live = Live(other, directory)
        before = live.state()
        with pytest.raises(CheckpointMismatch):
            live.resume()
        assert_same(live.state(), before)
        live.trainer.shutdown()
    assert ModelRecovery(directory).get_latest_checkpoint() == "step-00000001"


class Unwilling(Stream):
    """A data position that cannot tell where it stands."""

    error: type[Exception] | None = RuntimeError

    def state_dict(self) -> Any:
        if self.error is not None:
            raise self.error("position unknown")
        return {"position": self.position, "handle": object()}


@pytest.mark.parametrize("error", [RuntimeError, KeyError, None], ids=str)
@pytest.mark.parametrize("name", ["loader", "other"])
def test_extra_state_that_cannot_be_had_is_an_error_and_nothing_hangs(
    error: type[Exception] | None, name: str, directory: Path
) -> None:
    unwilling = Unwilling() if name == "loader" else NotData(Unwilling())
    live = Live(Program(extra=lambda _: {name: unwilling}), directory)
    Unwilling.error = error
    with pytest.raises(error or TypeError, match=r"position unknown|handle"):
        live.run(2)
    ended = threading.Event()

    def end() -> None:
        with contextlib.suppress(CheckpointError, RuntimeError, KeyError, TypeError):
            live.trainer.shutdown()
        ended.set()

    threading.Thread(target=end, daemon=True).start()
    assert ended.wait(20), "shutdown() hangs"
    assert ModelRecovery(directory).list_checkpoints() == []
    assert os.listdir(directory) == [".lock"]


class NotData:
    def __init__(self, inner: Any) -> None:
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict


# --- Other processes -----------------------------------------------------------------------------

TWO_LIVES = """
import json, os, sys, traceback
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
import torch
import test_resume
from _models import Live, Program, raw

program = Program(loop=test_resume.averaging, scheduler=test_resume.decaying, averaged=True,
                  iterations=6)

def in_a_child(work):  # forked before any engine was started
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # no shutdown, no atexit: as good as killed
    assert os.waitpid(child, 0)[1] == 0

def first():
    live = Live(program, Path(sys.argv[1])).run(4)
    while live.trainer.stats()["last_committed_step"] < 3:
        pass

def second():
    live = Live(program, Path(sys.argv[1]), seed=99)
    step = live.resume()
    live.run()
    weights = b"".join(raw(p) for p in live.model.state_dict().values()).hex()
    print(json.dumps([step, weights, list(live.losses.values()), raw(torch.rand(3)).hex()]),
          flush=True)

in_a_child(first)
in_a_child(second)
"""


def test_another_process_goes_on_from_one_that_ended_without_a_word(tmp_path: Path) -> None:
    here = Path(__file__).parent
    package = str(Path(pccheck_ext.__file__).parent.parent)  # the very one that is tested here
    done = subprocess.run(
        [sys.executable, "-c", TWO_LIVES, str(tmp_path), str(here), package],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    step, weights, losses, drawn = json.loads(done.stdout)
    program = Program(loop=averaging, scheduler=decaying, averaged=True, iterations=6)
    plain = Live(program, None).run()
    assert step == 3
    assert losses == [plain.losses[i] for i in (4, 5, 6)]
    assert weights == b"".join(raw(p) for p in plain.model.state_dict().values()).hex()
    assert drawn == raw(torch.rand(3)).hex()
