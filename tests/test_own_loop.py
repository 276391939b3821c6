"""Loops that step their optimizer themselves: counted, saved, resumed as if by the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _models import (
    Live,
    Matrices,
    Plain,
    Program,
    Zoo,
    assert_resumes_bit_for_bit,
    assert_same,
    generators_kept,
    memory_directory,
    optimizer,
)
from _waiting import DEADLINE_S, Child, one_thread
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

from pccheck_ext import ModelRecovery


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept(), one_thread():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def unchanged(live: Live) -> None:
    """A loop that has never heard of a trainer."""
    live.base.zero_grad()
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    nn.utils.clip_grad_norm_(live.model.parameters(), 5.0)
    live.base.step()
    if live.scheduler is not None:
        live.scheduler.step()


def decaying(base: Optimizer) -> Any:
    return lr_scheduler.StepLR(base, 2, 0.5)


def steps_in(directory: Path) -> list[int]:
    recovery = ModelRecovery(directory)
    names = recovery.list_checkpoints()
    assert all(recovery.verify(name) for name in names)
    return [int(name.removeprefix("step-")) for name in names]


# --- Resumed bit for bit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
        optimizer(torch.optim.AdamW, lr=0.01, foreach=True),
        optimizer(torch.optim.Adam, lr=0.01, fused=True),
    ],
    ids=["SGD", "AdamW by foreach", "fused Adam"],
)
def test_an_unchanged_loop_is_saved_at_every_step(
    make: Callable[[nn.Module], Optimizer], directory: Path
) -> None:
    program = Program(optimizer=make, scheduler=decaying, loop=unchanged)
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3, 4))
    assert steps_in(directory / "whole") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "options", [{"use_monitor": True}, {"checkpoint_every": 2}, {"buffer_size_mb": 1.0}]
)
def test_so_it_is_with_other_options(options: dict[str, Any], directory: Path) -> None:
    program = Program(loop=unchanged, scheduler=decaying, options=options)
    assert_resumes_bit_for_bit(program, directory, stops=(2, 4))
    every = options.get("checkpoint_every", 1)
    assert steps_in(directory / "whole") == list(range(every, 6, every))


def scaled(live: Live) -> None:
    """The third batch overflows: the scaler skips its step, or voids it."""
    live.base.zero_grad()
    batch = next(live.data)
    live.loss = live.forward(batch) * (float("inf") if live.data.position == 3 else 1.0)
    live.scaler.scale(live.loss).backward()
    live.scaler.unscale_(live.base)
    nn.utils.clip_grad_norm_(live.model.parameters(), 5.0)
    live.scaler.step(live.base)
    live.scaler.update()
    live.scheduler.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_steps_that_a_gradient_scaler_skips_do_not_count(
    kind: type[Optimizer], fused: bool, directory: Path
) -> None:
    program = Program(
        model=Plain,
        optimizer=optimizer(kind, lr=0.01, fused=fused),
        scheduler=decaying,
        scaler=lambda: torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2),
        loop=scaled,
    )
    assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4))
    assert steps_in(directory / "whole") == [1, 2, 3, 4]
    live = Live(program, directory / "counted").run()
    live.trainer.shutdown()
    assert live.trainer.training_step == 4
    assert live.trainer.stats()["checkpoints_failed"] == 0


def by_closure(live: Live) -> None:
    batch = next(live.data)

    def closure() -> Tensor:
        live.base.zero_grad()
        loss = live.forward(batch)
        loss.backward()
        return loss

    loss = live.base.step(closure)
    assert isinstance(loss, Tensor)
    live.loss = loss


@pytest.mark.filterwarnings("ignore:LBFGS is stepped whole")
@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=2),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    ],
    ids=["LBFGS", "SGD"],
)
def test_closures_run_as_often_as_ever(
    make: Callable[[nn.Module], Optimizer], directory: Path
) -> None:
    program = Program(model=Matrices, optimizer=make, loop=by_closure)
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3))
    assert steps_in(directory / "whole") == [1, 2, 3, 4, 5]


def accumulating(live: Live) -> None:
    live.base.zero_grad()
    for _ in range(3):
        live.loss = live.forward(next(live.data)) / 3
        live.loss.backward()
    live.base.step()


def test_gradients_accumulated_over_several_batches_make_one_step(directory: Path) -> None:
    program = Program(loop=accumulating, batches=3)
    assert_resumes_bit_for_bit(program, directory, stops=(1, 3))
    assert steps_in(directory / "whole") == [1, 2, 3, 4, 5]


def mixing(live: Live) -> None:
    """Now the trainer steps, now its wrapper, now the optimizer itself."""
    live.zero_grad()
    live.loss = live.forward(next(live.data))
    live.loss.backward()
    way = live.data.position % 3
    if way == 0 and live.has_trainer:
        live.trainer.step()
    elif way == 1:
        live.stepped.step()
    else:
        live.base.step()
    if live.scheduler is not None:
        live.scheduler.step()


def test_whoever_steps_every_step_counts_once(directory: Path) -> None:
    program = Program(loop=mixing, scheduler=decaying, iterations=8)
    assert_resumes_bit_for_bit(program, directory, stops=(1, 2, 3, 4, 5))
    assert steps_in(directory / "whole") == list(range(1, 9))
    live = Live(program, directory / "counted").run()
    live.trainer.shutdown()
    assert live.trainer.training_step == live.trainer.optimizer.training_step == 8


def test_a_compiled_model_trains_and_resumes(directory: Path) -> None:
    def compiled() -> nn.Module:
        model = torch.compile(Plain(), backend="eager")
        assert isinstance(model, nn.Module)
        return model

    program = Program(model=compiled, loop=unchanged, scheduler=decaying)
    assert_resumes_bit_for_bit(program, directory, stops=(2,))
    stored = load_file(directory / "whole" / "step-00000002" / "model.safetensors")
    assert set(stored) == set(Plain().state_dict())


def test_a_distributed_model_trains_and_resumes(directory: Path) -> None:
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        program = Program(
            model=lambda: DistributedDataParallel(Plain()), loop=unchanged, scheduler=decaying
        )
        assert_resumes_bit_for_bit(program, directory, stops=(2,))
    finally:
        dist.destroy_process_group()
    stored = load_file(directory / "whole" / "step-00000002" / "model.safetensors")
    assert set(stored) == set(Plain().state_dict())


# --- What is counted and saved -------------------------------------------------------------------


def test_layers_are_handed_over_after_the_update_in_update_order(directory: Path) -> None:
    live = Live(Program(model=Plain, loop=unchanged, options={"use_pccheck": False}), directory)
    live.run(3)
    live.trainer.shutdown()
    order = live.trainer.update_order
    assert order == ["out", "hidden", "embed"]
    for one in live.trainer.adapter.recorded:
        assert [layer.name for layer in one.layers if layer.name in order] == order


def test_what_is_saved_is_the_model_after_the_step(directory: Path) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory)
    after = {}
    for step in range(1, 5):
        live.run(step)
        after[step] = {name: t.clone() for name, t in live.model.state_dict().items()}
    live.trainer.shutdown()
    for step, wanted in after.items():
        stored = load_file(directory / f"step-{step:08d}" / "model.safetensors")
        assert_same(stored, {name: wanted[name] for name in stored})


def test_a_closure_that_raises_makes_no_step_and_training_goes_on(directory: Path) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory).run(2)

    def closure() -> Tensor:
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        live.base.step(closure)
    assert live.trainer.training_step == 2
    live.run(4)
    live.trainer.shutdown()
    assert steps_in(directory) == [1, 2, 3, 4]
    assert live.trainer.training_step == 4
    assert live.trainer.stats()["checkpoints_failed"] == 0


def test_a_hook_that_raises_after_the_trainers_own_leaves_no_step_half_begun(
    directory: Path,
) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory).run(1)

    def fails(*_: object) -> None:
        raise ValueError("not now")

    hook = live.base.register_step_pre_hook(fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="not now"):
            live.base.step()
    hook.remove()
    live.run(3)
    live.trainer.shutdown()
    assert steps_in(directory) == [1, 2, 3]
    assert live.trainer.stats()["checkpoints_failed"] == 0


@pytest.mark.parametrize("before", ["the end", "a whole checkpoint"])
def test_an_error_just_before_it_leaves_no_checkpoint_to_be_waited_for(
    before: str, directory: Path
) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory).run(1)

    def fails(*_: object) -> None:
        raise ValueError("not now")

    live.base.register_step_pre_hook(fails)
    with pytest.raises(ValueError, match="not now"):
        live.base.step()
    if before == "a whole checkpoint":
        live.trainer.save_full_checkpoint("whole")
    else:
        live.trainer.shutdown(DEADLINE_S)
    live.trainer.shutdown()
    found = ["step-00000001", "whole"][: 2 if before == "a whole checkpoint" else 1]
    assert ModelRecovery(directory).list_checkpoints() == found
    assert live.trainer.stats()["checkpoints_failed"] == 0


def test_hooks_that_change_parameters_after_the_step_are_in_the_checkpoint(directory: Path) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory)

    def clamp(*_: object) -> None:
        with torch.no_grad():
            live.model.out.weight.clamp_(-0.1, 0.1)

    live.base.register_step_post_hook(clamp)
    live.run(2)
    live.trainer.shutdown()
    stored = load_file(directory / "step-00000002" / "model.safetensors")
    assert stored["out.weight"].abs().max() <= 0.1
    assert_same(stored["out.weight"], live.model.out.weight.detach())


def test_steps_of_other_optimizers_are_not_counted(directory: Path) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory).run(1)
    elsewhere = nn.Linear(2, 2)
    other = torch.optim.SGD(elsewhere.parameters(), lr=0.1)
    same = torch.optim.SGD(live.model.parameters(), lr=0.0)
    for one in (other, same):
        elsewhere(torch.ones(1, 2)).sum().backward()
        one.step()
    assert live.trainer.training_step == 1
    live.run(2)
    live.trainer.shutdown()
    assert steps_in(directory) == [1, 2]


def test_two_trainers_count_their_own_optimizers_steps_only(directory: Path) -> None:
    one = Live(Program(model=Plain, loop=unchanged), directory / "one")
    two = Live(Program(model=Plain, loop=unchanged), directory / "two")
    one.run(3)
    two.run(1)
    for live in (one, two):
        live.trainer.shutdown()
    assert steps_in(directory / "one") == [1, 2, 3]
    assert steps_in(directory / "two") == [1]


def test_after_the_shutdown_the_loop_may_go_on_without(directory: Path) -> None:
    live = Live(Program(model=Plain, loop=unchanged), directory).run(2)
    live.trainer.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.run(4)
    assert live.trainer.training_step == 2
    assert steps_in(directory) == [1, 2]


def test_a_forked_child_may_step_the_optimizer_and_nobody_counts_that(directory: Path) -> None:
    run = directory / "run"
    live = Live(Program(model=Plain, loop=unchanged), run).run(2)

    def in_child() -> None:
        live.run(4)
        print("took", live.trainer.training_step)

    child = Child(in_child, directory)
    assert child.end() == 0, child.said()
    assert child.said() == "took 2\n"
    live.run(3)
    live.trainer.shutdown()
    assert steps_in(run) == [1, 2, 3]


def test_the_best_may_be_told_by_metrics_reported_beside(directory: Path) -> None:
    options = {"keep_last": 1, "keep_best": ("loss", "min")}
    live = Live(Program(model=Zoo, loop=unchanged, options=options), directory)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], 1):
        live.trainer.report_metric("loss", loss)
        live.run(step)
        live.trainer.wait()
    live.trainer.shutdown()
    assert steps_in(directory) == [2, 4]


def test_gradients_never_cleared_are_warned_of_here_too(directory: Path) -> None:
    def never_clearing(live: Live) -> None:
        live.forward(next(live.data)).backward()
        live.base.step()

    live = Live(Program(model=Plain, loop=never_clearing), directory)
    with pytest.warns(RuntimeWarning, match="save_gradients=True") as told:
        live.run(4)
    assert len(told) == 1
    live.trainer.shutdown()
