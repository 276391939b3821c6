"""PCCheckAdapter alone: layers in, sound checkpoints out, and back into a model."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import (
    LITTLE_MEMORY,
    Live,
    Plain,
    Program,
    Stream,
    Zoo,
    generators_kept,
    memory_directory,
    raw,
)
from _waiting import DEADLINE_S, Child, Running, eventually, go_on, one_thread, stall
from torch import Tensor, nn

from pccheck_ext import (
    _C,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMetadataManager,
    CheckpointMismatch,
    LayerwiseCheckpointScheduler,
    LayerwiseOptimizer,
    ModelRecovery,
    PCCheckAdapter,
    SaveTask,
    _policy,
)
from pccheck_ext.layers import group_parameters_by_layer

SMALL_BLOCKS = {**LITTLE_MEMORY, "block_size_mb": 1 / 256}
CHUNKS = [1, 2, 3, 4, 8, "auto"]


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept(), one_thread():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


@pytest.fixture
def open_adapter(directory: Path) -> Iterator[Callable[..., PCCheckAdapter]]:
    made: list[PCCheckAdapter] = []

    def make(**options: Any) -> PCCheckAdapter:
        settings = {"checkpoint_file": directory / "run.chk", "keep_last": 0}
        made.append(PCCheckAdapter(**{**settings, **LITTLE_MEMORY, **options}))
        return made[-1]

    yield make
    for adapter in made:  # whatever the test came to, nothing stands still any more
        if not adapter.session.is_open:
            continue
        if adapter.session.monitor_process is not None:
            go_on(adapter.session.monitor_process)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter.flight.on_error = "warn"
            adapter.shutdown()


OpenAdapter = Callable[..., PCCheckAdapter]


def layers_of(model: nn.Module) -> dict[str, list[Tensor]]:
    return {name: list(params) for name, params in group_parameters_by_layer(model).items()}


def tasks_of(model: nn.Module, step: int) -> list[SaveTask]:
    return [SaveTask(name, step, params) for name, params in reversed(layers_of(model).items())]


def parameters(model: nn.Module) -> dict[str, bytes]:
    return {name: raw(p) for name, p in model.named_parameters()}


def other(model: type[nn.Module], seed: int = 99) -> nn.Module:
    torch.manual_seed(seed)
    return model()


# --- The whole chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_monitor", [False, True])
@pytest.mark.parametrize("async_save", [False, True])
def test_optimizer_scheduler_and_adapter_save_every_step_as_it_was(
    async_save: bool, use_monitor: bool, directory: Path, open_adapter: OpenAdapter
) -> None:
    model, data = other(Plain), Stream()
    adapter = open_adapter(use_monitor=use_monitor)
    scheduler = LayerwiseCheckpointScheduler(
        adapter.save_layers_batch, buffer_size_mb=400 / (1 << 20), async_save=async_save
    )
    order = ["out", "hidden", "embed"]
    optimizer = LayerwiseOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1),
        order,
        layers_of(model),
        callback=scheduler.add_save_task,
    )
    after = {}
    for step in range(1, 7):
        tokens, targets = next(data)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
        after[step] = parameters(model)
    scheduler.shutdown()
    adapter.shutdown()
    assert scheduler.get_statistics()["batches"] == 12  # two to a step
    recovery = ModelRecovery(directory / "run")
    assert recovery.list_checkpoints() == [f"step-{step:08d}" for step in after]
    assert recovery.get_latest_checkpoint() == "step-00000006"
    manager = CheckpointMetadataManager(directory / "run.chk")
    for step, wanted in after.items():
        assert manager.verify_checkpoint(f"step_{step}")
        assert list(manager.get_checkpoint_info(f"step_{step}")["layers"]) == order
        loaded = other(Plain, seed=step)
        assert recovery.load_checkpoint(loaded, f"step_{step}") == []
        assert parameters(loaded) == wanted


def test_what_a_batch_made_is_told(open_adapter: OpenAdapter) -> None:
    adapter = open_adapter()
    tasks = [SaveTask("a", 3, [torch.ones(4), torch.ones(2)]), SaveTask("b", 3, [torch.ones(1)])]
    told = adapter.save_layers_batch(tasks)
    assert told == {"checkpoint_id": "step-00000003", "layers": 2, "bytes": 28}
    assert adapter.save_layers_batch([]) == {"checkpoint_id": "", "layers": 0, "bytes": 0}


def test_layers_may_change_once_the_batch_has_been_taken(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    model = other(Plain)
    wanted = {}
    for step in range(1, 6):
        wanted[step] = parameters(model)
        adapter.save_layers_batch(tasks_of(model, step))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    adapter.shutdown()
    for step, values in wanted.items():
        loaded = other(Plain)
        ModelRecovery(directory / "run").load_checkpoint(loaded, f"step_{step}")
        assert parameters(loaded) == values


def test_batches_of_several_steps_may_come_in_one(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch([SaveTask("a", step, [torch.ones(2)]) for step in (1, 2, 5)])
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == [
        "step-00000001",
        "step-00000002",
        "step-00000005",
    ]


def test_tensors_of_any_kind_and_layers_without_any_come_back(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(()))
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.half = nn.Linear(3, 2, dtype=torch.bfloat16)
            self.none = nn.Parameter(torch.randn(0, 5))
            self.many = nn.ParameterList([torch.randn(i + 1) for i in range(12)])

    model = other(Odd)
    adapter = open_adapter()
    adapter.save_layers_batch([*tasks_of(model, 1), SaveTask("empty", 1, [])])
    adapter.save_layers_batch([SaveTask("empty too", 1, [])])
    adapter.shutdown()
    loaded = other(Odd, seed=5)
    assert ModelRecovery(directory / "run").load_checkpoint(loaded, "step_1", strict=True) == []
    assert parameters(loaded) == parameters(model)
    assert loaded.conv.weight.is_contiguous(memory_format=torch.channels_last)


# --- When a step ends ----------------------------------------------------------------------------


def test_a_step_is_sealed_by_the_next_by_itself_and_at_the_end(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    recovery = ModelRecovery(directory / "run")
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(2)])])
    adapter.wait(DEADLINE_S)  # for nothing: the step may get further layers
    assert recovery.list_checkpoints() == []
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    adapter.wait(DEADLINE_S)
    assert recovery.list_checkpoints() == ["step-00000001"]
    adapter.finish_step()
    adapter.wait(DEADLINE_S)
    assert recovery.list_checkpoints() == ["step-00000001", "step-00000002"]
    adapter.save_layers_batch([SaveTask("a", 3, [torch.ones(2)])])
    adapter.shutdown()
    assert recovery.get_latest_checkpoint() == "step-00000003"


def test_a_layer_that_comes_after_the_seal_is_refused(open_adapter: OpenAdapter) -> None:
    adapter = open_adapter()
    for seal in (
        lambda step: adapter.finish_step(),
        lambda step: adapter.save_entire_checkpoint_in_chunks(f"whole-{step}", step),
    ):
        step = len(adapter.metadata.list_checkpoints()) + 1
        adapter.save_layers_batch([SaveTask("a", step, [torch.ones(2)])])
        seal(step)
        with pytest.raises(ValueError, match=f"step {step} is sealed"):
            adapter.save_layers_batch([SaveTask("b", step, [torch.ones(2)])])
        adapter.wait()


@pytest.mark.parametrize("again", ["in the same batch", "later"])
def test_a_layer_that_comes_twice_is_refused_and_its_step_is_no_checkpoint(
    again: str, directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(2)])])
    tasks = [SaveTask("b", 1, [torch.ones(3)]), SaveTask("b", 1, [torch.ones(3)])]
    if again == "later":
        tasks = [SaveTask("a", 1, [torch.ones(2)])]
    name = tasks[0].layer_name
    message = f"step 1 has a layer '{name}' already; it makes no checkpoint now"
    with pytest.raises(ValueError, match=message):
        adapter.save_layers_batch(tasks)
    adapter.save_layers_batch([SaveTask("c", 1, [torch.ones(4)])])
    with pytest.raises(ValueError, match="of step 1 to be saved: a layer of it was refused"):
        adapter.save_entire_checkpoint_in_chunks("mine", 1)
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000002"]


def fail_at(directory: Path, step: int) -> None:
    """Makes this step's checkpoint fail: its name is taken by what is no checkpoint."""
    (directory / "run" / f"step-{step:08d}").mkdir()
    (directory / "run" / f"step-{step:08d}" / "foreign").touch()


def refuse_to_begin(patch: pytest.MonkeyPatch, step: int) -> None:
    begin = _C.Session.begin

    def refusing(session: _C.Session, name: str, *rest: Any) -> _C.Ticket:
        if name == f"step-{step:08d}":
            raise OSError("refused")
        return begin(session, name, *rest)

    patch.setattr(_C.Session, "begin", refusing)


def test_layers_that_come_when_an_older_checkpoint_has_failed_are_all_of_their_step(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    save_and_wait(adapter, 1)
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    fail_at(directory, 2)
    adapter.finish_step()
    failing = adapter.flight._in_flight[-1]
    assert failing.wait(DEADLINE_S)
    assert failing.error() is not None
    with pytest.raises(CheckpointError, match="step-00000002 failed"):
        adapter.save_layers_batch([SaveTask("a", 3, [torch.ones(2)])])
    adapter.save_layers_batch([SaveTask("b", 3, [torch.ones(2)])])
    adapter.shutdown()
    info = CheckpointMetadataManager(directory / "run.chk").get_checkpoint_info("step_3")
    assert list(info["layers"]) == ["a", "b"]


def test_a_step_that_cannot_be_begun_costs_the_next_of_its_batch_no_layer(
    directory: Path, open_adapter: OpenAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter()
    save_and_wait(adapter, 1)
    refuse_to_begin(monkeypatch, 2)
    with pytest.raises(CheckpointError, match="step-00000002 could not be begun"):
        adapter.save_layers_batch([SaveTask("a", step, [torch.ones(2)]) for step in (2, 3)])
    adapter.save_layers_batch([SaveTask("b", 3, [torch.ones(2)])])
    adapter.shutdown()
    manager = CheckpointMetadataManager(directory / "run.chk")
    assert manager.list_checkpoints() == ["step-00000001", "step-00000003"]
    assert list(manager.get_checkpoint_info("step_3")["layers"]) == ["a", "b"]


def test_later_layers_of_a_step_that_could_not_be_begun_make_no_checkpoint(
    directory: Path, open_adapter: OpenAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter()
    save_and_wait(adapter, 1)
    with monkeypatch.context() as patch:
        refuse_to_begin(patch, 2)
        with pytest.raises(CheckpointError, match="step-00000002 could not be begun"):
            adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    adapter.save_layers_batch([SaveTask("b", 2, [torch.ones(2)])])
    adapter.finish_step()
    with pytest.raises(ValueError, match="step 2 is sealed"):
        adapter.save_layers_batch([SaveTask("c", 2, [torch.ones(2)])])
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000001"]


def test_a_step_whose_seal_fails_costs_the_next_no_layer(
    directory: Path, open_adapter: OpenAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(2)])])

    def fail(**_: object) -> dict[str, Any]:
        raise ValueError("no manifest")

    with monkeypatch.context() as patch:
        patch.setattr(adapter.metadata, "compose", fail)
        with pytest.raises(ValueError, match="no manifest"):
            adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    adapter.save_layers_batch([SaveTask("b", 2, [torch.ones(2)])])
    adapter.shutdown(DEADLINE_S)  # the first is not waited for
    manager = CheckpointMetadataManager(directory / "run.chk")
    assert manager.list_checkpoints() == ["step-00000002"]
    assert list(manager.get_checkpoint_info("step_2")["layers"]) == ["a", "b"]


def test_an_interrupted_batch_gives_its_step_up(
    directory: Path, open_adapter: OpenAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(2)])])

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_C.Ticket, "wait_layer_staged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapter.save_layers_batch([SaveTask("b", 1, [torch.ones(2)])])
    adapter.save_layers_batch([SaveTask("c", 1, [torch.ones(2)])])
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000002"]


@pytest.mark.parametrize("async_save", [True, False])
def test_in_the_chain_every_committed_step_is_whole_whatever_fails(
    async_save: bool,
    directory: Path,
    open_adapter: OpenAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 3 fails when it is committed, step 6 when it is begun."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    adapter = open_adapter()
    scheduler = LayerwiseCheckpointScheduler(
        adapter.save_layers_batch, buffer_size_mb=1 / (1 << 20), async_save=async_save
    )
    order = ["3", "2", "1", "0"]
    optimizer = LayerwiseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        order,
        layers_of(model),
        callback=scheduler.add_save_task,
    )
    told = []
    for step in range(1, 9):
        if step == 6:
            refuse_to_begin(monkeypatch, step)
        model(torch.ones(3, 2)).sum().backward()
        for call in (optimizer.step, scheduler.force_flush):
            try:
                call()
            except CheckpointError as error:
                told.append(str(error))
        if step == 3:
            fail_at(directory, step)
            adapter.finish_step()
            eventually(lambda: not adapter.flight.count(), "it fails")
    scheduler.shutdown()
    adapter.shutdown()
    assert len(told) == 2
    assert "step-00000003 failed" in told[0]
    assert "step-00000006 could not be begun" in told[1]
    manager = CheckpointMetadataManager(directory / "run.chk")
    assert manager.list_checkpoints() == [f"step-{step:08d}" for step in (1, 2, 4, 5, 7, 8)]
    for name in manager.list_checkpoints():
        assert list(manager.get_checkpoint_info(name)["layers"]) == order


# --- Going on in a directory that is not empty ---------------------------------------------------


def test_a_restarted_adapter_leaves_the_checkpoints_before_its_first_step_alone(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    before = open_adapter()
    for step in (1, 2, 3):
        save_and_wait(before, step)
    before.save_entire_checkpoint_in_chunks("mine", 3)
    before.shutdown()
    adapter = open_adapter()
    recovery = ModelRecovery(directory / "run")
    there = sorted(recovery.list_checkpoints())
    assert there == ["mine", "step-00000001", "step-00000002", "step-00000003"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save_layers_batch([SaveTask("a", 4, [torch.ones(2)])])
    assert sorted(recovery.list_checkpoints()) == there  # before the new one is committed
    adapter.shutdown()
    assert recovery.get_latest_checkpoint() == "step-00000004"


def test_a_restarted_adapter_sets_aside_what_is_later_than_where_it_goes_on(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    before = open_adapter()
    for step in (1, 2, 3):
        save_and_wait(before, step)
    before.save_entire_checkpoint_in_chunks("mine", 3)
    before.shutdown()
    adapter = open_adapter()
    with pytest.warns(RuntimeWarning, match="goes on from step 1 .*aside as") as told:
        adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(3)])])
    for name in ("mine", "step-00000002", "step-00000003"):
        assert name in str(told[0].message)
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000001", "step-00000002"]


def test_a_restarted_adapter_of_the_same_steps_may_begin_at_nought(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    save_and_wait(adapter, 0)
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000000"]


def test_a_step_of_which_a_layer_cannot_be_saved_is_no_checkpoint(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(2)])])
    sparse = torch.ones(2, 2).to_sparse()
    with pytest.raises(TypeError, match=r"'b\.0'"):
        adapter.save_layers_batch([SaveTask("b", 1, [sparse])])
    adapter.save_layers_batch([SaveTask("c", 1, [torch.ones(2)])])  # which was told of
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(2)])])
    adapter.shutdown()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000002"]
    assert sorted(p.name for p in (directory / "run").iterdir()) == [".lock", "step-00000002"]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_step_that_cannot_be_begun_is_told_of_and_the_next_is_saved(
    on_error: str, directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter(on_error=on_error)
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(2)])])
    (directory / "run" / "step-00000002").mkdir()
    (directory / "run" / "step-00000002" / "foreign").touch()
    message = "step-00000002"
    tell = (
        pytest.raises(CheckpointError, match=message)
        if on_error == "raise"
        else pytest.warns(RuntimeWarning, match=message)
    )
    with tell:
        save_and_wait(adapter, 2)
    save_and_wait(adapter, 3)
    adapter.shutdown()
    recovery = ModelRecovery(directory / "run")
    assert recovery.list_checkpoints() == ["step-00000001", "step-00000003"]


def save_and_wait(adapter: PCCheckAdapter, step: int) -> None:
    adapter.save_layers_batch([SaveTask("a", step, [torch.ones(2)])])
    adapter.finish_step()
    adapter.wait()


# --- Back into a model ---------------------------------------------------------------------------


def saved(directory: Path, tasks: list[SaveTask], **options: Any) -> ModelRecovery:
    settings = {**SMALL_BLOCKS, **options}
    adapter = PCCheckAdapter(checkpoint_file=directory / "run.chk", **settings)
    for task in tasks:
        adapter.save_layers_batch([task])
    adapter.shutdown()
    return ModelRecovery(directory / "run")


def test_a_model_with_tied_root_and_frozen_parameters_comes_back(directory: Path) -> None:
    model = other(Zoo)
    recovery = saved(directory, tasks_of(model, 1))
    loaded = other(Zoo, seed=5)
    assert recovery.load_checkpoint(loaded, "step_1") == ["norm"]  # its statistics are not there
    assert parameters(loaded) == parameters(model)
    assert loaded.head.weight is loaded.embed.weight
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_a_compiled_model_takes_it_too(directory: Path) -> None:
    model = other(Plain)
    recovery = saved(directory, tasks_of(torch.compile(model, backend="eager"), 1))
    loaded = other(Plain, seed=5)
    assert recovery.load_checkpoint(torch.compile(loaded, backend="eager"), "step_1") == []
    assert parameters(loaded) == parameters(model)


def test_layers_may_be_grouped_by_larger_modules(directory: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"body": nn.Sequential(Plain(), Plain()), "head": nn.Linear(2, 2)})

    torch.manual_seed(1)
    model = make()
    tasks = [SaveTask(name, 1, [*model[name].parameters()]) for name in ("head", "body")]
    recovery = saved(directory, tasks)
    loaded = make()
    assert recovery.load_checkpoint(loaded, "step_1", strict=True) == []
    assert parameters(loaded) == parameters(model)


def test_layers_that_the_checkpoint_has_not_are_returned_and_left_alone(directory: Path) -> None:
    model = other(Plain)
    recovery = saved(directory, [t for t in tasks_of(model, 1) if t.layer_name != "hidden"])
    loaded = other(Plain, seed=5)
    before = parameters(loaded)
    assert recovery.load_checkpoint(loaded, "step_1") == ["hidden"]
    wanted = {**parameters(model), **{n: v for n, v in before.items() if "hidden" in n}}
    assert parameters(loaded) == wanted


def test_strictly_either_side_must_have_every_layer_of_the_other(directory: Path) -> None:
    model = other(Plain)
    tasks = [t for t in tasks_of(model, 1) if t.layer_name != "hidden"]
    recovery = saved(directory, [*tasks, SaveTask("foreign", 1, [torch.ones(2), torch.ones(1)])])
    loaded = other(Plain, seed=5)
    before = parameters(loaded)
    with pytest.raises(CheckpointMismatch) as told:
        recovery.load_checkpoint(loaded, "step_1", strict=True)
    assert "hidden.weight is not in the checkpoint" in str(told.value)
    assert "tensor 1 of layer 'foreign' is not in the model" in str(told.value)
    assert parameters(loaded) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "out", nn.Linear(3, 11)), r"out\.weight is torch.float32 \[11, 12\]"),
        (lambda m: m.out.double(), r"out\.bias is torch.float32 .* torch.float64"),
        (
            lambda m: setattr(m, "out", nn.Linear(12, 11, bias=False)),
            r"layer 'out' has 2 tensors in the checkpoint, 1 parameters in the model",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_unchanged(
    change: Callable[[nn.Module], object], message: str, directory: Path
) -> None:
    recovery = saved(directory, tasks_of(other(Plain), 1))
    model = other(Plain, seed=5)
    change(model)
    before = parameters(model)
    for load in (
        lambda: recovery.load_checkpoint(model, "step_1"),
        lambda: recovery.load_layer(model, "step_1", "out"),
    ):
        with pytest.raises(CheckpointMismatch, match=message):
            load()
        assert parameters(model) == before


def test_a_model_with_no_layer_of_it_is_refused(directory: Path) -> None:
    recovery = saved(directory, tasks_of(other(Plain), 1))
    with pytest.raises(CheckpointMismatch, match="no tensor in common"):
        recovery.load_checkpoint(nn.Sequential(nn.Linear(2, 2)), "step_1")


def test_one_layer_is_loaded_alone_whatever_has_become_of_the_others(directory: Path) -> None:
    model = other(Plain)
    recovery = saved(directory, tasks_of(model, 1))
    for file in (directory / "run" / "step-00000001").glob("model-*"):
        if b"hidden" not in file.read_bytes()[:4096]:
            damage(file, keep=set())
    loaded = other(Plain, seed=5)
    before = parameters(loaded)
    recovery.load_layer(loaded, "step_1", "hidden")
    after = parameters(loaded)
    assert after == {**before, **{n: v for n, v in parameters(model).items() if "hidden" in n}}
    with pytest.raises(CheckpointCorrupt):
        recovery.load_layer(loaded, "step_1", "out")
    with pytest.raises(CheckpointCorrupt):
        recovery.load_checkpoint(loaded, "step_1")


def test_a_layer_that_one_side_has_not_is_an_error_naming_it(directory: Path) -> None:
    recovery = saved(directory, [*tasks_of(other(Plain), 1), SaveTask("more", 1, [torch.ones(1)])])
    with pytest.raises(KeyError, match=r"no layer 'less'; it has: out, hidden, embed, more"):
        recovery.load_layer(other(Plain), "step_1", "less")
    with pytest.raises(CheckpointMismatch, match="no tensor of layer 'more' in common"):
        recovery.load_layer(other(Plain), "step_1", "more")


def test_a_trainer_cannot_go_on_from_layers_alone_and_says_so(directory: Path) -> None:
    saved(directory, tasks_of(other(Plain), 4))
    live = Live(Program(model=Plain), directory / "run")
    for load in (live.trainer.resume, lambda: live.trainer.load_checkpoint("step_4")):
        with pytest.raises(CheckpointMismatch, match=r"without a trainer.*ModelRecovery"):
            load()
    assert live.trainer.recovery.load_checkpoint(live.model, "step_4") == []
    live.trainer.shutdown()


# --- Chunks --------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Layers of many blocks of 4 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 128, dtype=torch.float64)
        self.third = nn.Linear(64, 128)


def payload(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


def damage(path: Path, keep: set[int], block: int = 4096) -> int:
    """Changes every block but these; how many that were."""
    data = bytearray(path.read_bytes())
    changed = [at for at in range(0, len(data), block) if at // block not in keep]
    for at in changed:
        data[at] ^= 1
    path.write_bytes(data)
    return len(changed)


def assert_each_layer_is_recovered_alone(directory: Path, name: str, model: nn.Module) -> None:
    info = CheckpointMetadataManager(directory).get_checkpoint_info(name)
    for layer, module in model.named_children():
        whole = payload(directory / name)
        damaged = 0
        for file in whole:
            keep = set(info["layers"][layer]["checksums"].get(file, {}))
            damaged += damage(directory / name / file, keep)
        assert damaged > 8
        loaded = type(model)()
        ModelRecovery(directory).load_layer(loaded, name, layer)
        assert parameters(loaded.get_submodule(layer)) == parameters(module)
        for file, data in whole.items():
            (directory / name / file).write_bytes(data)


def test_a_state_saved_alone_has_the_same_bytes_in_any_number_of_chunks(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    model = other(Wide)
    adapter = open_adapter(**SMALL_BLOCKS, num_threads=3)
    adapter.save_layers_batch(tasks_of(model, 7))
    for count in CHUNKS:
        told = adapter.save_entire_checkpoint_in_chunks(f"in-{count}", 7, count)
        assert told["checkpoint_id"] == f"in-{count}"
        assert told["chunks"] == count or (count == "auto" and 1 <= told["chunks"] <= 3)
        assert told["bytes"] == os.path.getsize(written(adapter, f"in-{count}"))
    adapter.shutdown()
    wanted = payload(directory / "run" / "in-1")
    assert list(wanted) == ["model.safetensors"]
    for count in CHUNKS:
        assert payload(directory / "run" / f"in-{count}") == wanted
        loaded = other(Wide, seed=5)
        recovery = ModelRecovery(directory / "run")
        assert recovery.load_checkpoint(loaded, f"in-{count}", strict=True) == []
        assert parameters(loaded) == parameters(model)
        assert_each_layer_is_recovered_alone(directory / "run", f"in-{count}", model)
    assert "step-00000007" in recovery.list_checkpoints()


def written(adapter: PCCheckAdapter, name: str) -> Path:
    adapter.wait()
    return Path(adapter.directory) / name / "model.safetensors"


def test_a_trainers_state_has_the_same_bytes_in_any_number_of_chunks(directory: Path) -> None:
    class Model(Wide):
        def forward(self, tokens: Tensor) -> Tensor:
            x = tokens.float().repeat(1, 22)[:, :64]
            return self.second(self.first(x).double())[:, :11].float() + self.third(x)[:, :11]

    live = Live(Program(model=Model, options=SMALL_BLOCKS), directory).run(2)
    for count in CHUNKS:
        live.trainer.adapter.save_entire_checkpoint_in_chunks(f"in-{count}", 2, count)
    live.trainer.shutdown()
    wanted = payload(directory / "in-1")
    assert set(wanted) == {f"{n}.safetensors" for n in ("model", "optimizer", "extra")}
    for count in CHUNKS:
        assert payload(directory / f"in-{count}") == wanted
        assert_each_layer_is_recovered_alone(directory, f"in-{count}", live.model)
    resumed = Live(Program(model=Model, options=SMALL_BLOCKS), directory, seed=3)
    assert resumed.resume("in-8") == 2
    assert parameters(resumed.model) == parameters(live.model)
    resumed.trainer.shutdown()


@pytest.mark.parametrize("count", [0, -1, 5000, 1.5, True, "two", None])
def test_a_number_of_chunks_that_cannot_be_is_refused(
    count: Any, open_adapter: OpenAdapter
) -> None:
    with pytest.raises(ValueError, match="chunk_count must be a whole number, 1 to 4096"):
        open_adapter().save_entire_checkpoint_in_chunks("mine", 1, count)


def test_a_name_that_is_there_or_names_another_step_is_refused(open_adapter: OpenAdapter) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch(tasks_of(other(Plain), 3))
    adapter.save_entire_checkpoint_in_chunks("mine", 3)
    adapter.wait()
    with pytest.raises(ValueError, match="'mine' is there already"):
        adapter.save_entire_checkpoint_in_chunks("mine", 3)
    with pytest.raises(ValueError, match="'step-00000004' names another step than 3"):
        adapter.save_entire_checkpoint_in_chunks("step-00000004", 3)
    with pytest.raises(ValueError, match="cannot name a checkpoint"):
        adapter.save_entire_checkpoint_in_chunks("../mine", 3)


def test_a_name_that_is_in_flight_is_refused_too(open_adapter: OpenAdapter) -> None:
    adapter, monitor = monitored(open_adapter, max_async=4)
    stall(monitor)
    adapter.save_entire_checkpoint_in_chunks("mine", 1)
    with pytest.raises(ValueError, match="'mine' is in flight already"):
        adapter.save_entire_checkpoint_in_chunks("mine", 1)
    go_on(monitor)
    adapter.save_entire_checkpoint_in_chunks("yours", 1)
    adapter.wait(DEADLINE_S)
    assert sorted(adapter.metadata.list_checkpoints()) == ["mine", "step-00000001", "yours"]


def test_a_trainers_name_that_is_in_flight_is_refused_too(directory: Path) -> None:
    live = Live(Program(model=Plain), directory).run(1)  # not sealed yet, so in flight for sure
    with pytest.raises(ValueError, match="'step-00000001' is in flight already"):
        live.trainer.save_full_checkpoint("step-00000001")
    live.trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000001"]


def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that numbers of chunks are chosen for from now on."""
    sizes: list[int] = []

    def chunks_for(state_bytes: int, *_: object) -> int:
        sizes.append(state_bytes)
        return 2

    monkeypatch.setattr(_policy, "chunks_for", chunks_for)
    return sizes


def test_the_number_of_chunks_is_chosen_for_the_states_own_size(
    open_adapter: OpenAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, sizes = open_adapter(), asked_for(monkeypatch)
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(100)]), SaveTask("b", 1, [])])
    adapter.save_entire_checkpoint_in_chunks("first", 1, "auto")
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(50)]), SaveTask("b", 2, [])])
    adapter.save_entire_checkpoint_in_chunks("second", 2, "auto")
    assert sizes == [400, 200]


@pytest.mark.parametrize("incremental", [False, True])
def test_in_a_trainer_the_number_of_chunks_is_chosen_for_the_whole_state(
    incremental: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = asked_for(monkeypatch)
    options = {"incremental": incremental, "checkpoint_every": 2}
    live = Live(Program(model=Plain, options=options), directory)
    parameters = sum(p.nbytes for p in live.model.parameters())
    live.trainer.adapter.save_entire_checkpoint_in_chunks("at-0", 0, "auto")  # nothing is planned
    state = live.trainer.optimizer.state
    live.run(2)
    kept = sum(v.nbytes for values in state.values() for v in values.values())
    for name in ("first", "second"):  # of which the latter is all links, if incremental
        live.trainer.adapter.save_entire_checkpoint_in_chunks(name, 2, "auto")
        live.trainer.wait()
    live.trainer.shutdown()
    assert sizes[0] == parameters
    assert kept > 0
    for size in sizes[1:]:
        assert parameters + kept <= size <= parameters + kept + 32768  # with headers


def test_alone_a_state_must_have_come_whole_and_of_one_step(open_adapter: OpenAdapter) -> None:
    adapter = open_adapter()
    with pytest.raises(ValueError, match=r"no whole state of step 1 .* the newest are none"):
        adapter.save_entire_checkpoint_in_chunks("mine", 1)
    adapter.save_layers_batch(tasks_of(other(Plain), 1))
    adapter.save_layers_batch([SaveTask("out", 2, [torch.ones(2)])])
    for step in (1, 2):
        with pytest.raises(ValueError, match=r"the newest are those of steps \[1, 2\]"):
            adapter.save_entire_checkpoint_in_chunks("mine", step)


def test_in_a_trainer_another_step_than_the_states_is_refused(directory: Path) -> None:
    live = Live(Program(model=Plain), directory).run(2)
    with pytest.raises(ValueError, match="training_step 3 is to be saved, but the state is 2's"):
        live.trainer.adapter.save_entire_checkpoint_in_chunks("mine", 3)
    with pytest.raises(RuntimeError, match="no step of the trainer's is being saved"):
        live.trainer.adapter.save_layers_batch([SaveTask("out", 3, [torch.ones(1)])])
    live.trainer.adapter.wait(DEADLINE_S)  # not for the step that is not sealed yet
    live.run(3)
    live.trainer.shutdown()
    assert len(ModelRecovery(directory).list_checkpoints()) == 3


# --- A disk that is slow, or hangs ---------------------------------------------------------------


def monitored(open_adapter: OpenAdapter, **options: Any) -> tuple[PCCheckAdapter, int]:
    """An adapter whose disk can be made to hang, after its first step; and its monitor."""
    adapter = open_adapter(use_monitor=True, **options)
    save_and_wait(adapter, 1)
    monitor = adapter.session.monitor_process
    assert monitor is not None
    return adapter, monitor


def test_fifty_checkpoints_on_a_slow_disk_wait_their_turn(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    """The disk stands still until as many are in flight as may be, then goes on for a while."""
    adapter, monitor = monitored(open_adapter, max_async=2)
    scheduler = LayerwiseCheckpointScheduler(
        adapter.save_layers_batch, buffer_size_mb=16 / 1024, max_pending_mb=48 / 1024
    )
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most_alive, most_in_flight = 0, 0

    def train() -> None:
        for step in range(2, 51):
            for layer in "abcd":
                tensor = torch.full((1024,), float(step))  # 4 KiB: four make a batch
                alive.add(tensor)
                scheduler.add_save_task(layer, step, [tensor])
        scheduler.shutdown(None)
        adapter.finish_step()

    def committed() -> int:
        return int(adapter.stats()["checkpoints_committed"])

    stall(monitor)
    training = Running(train)
    there: list[str] = []
    recovery = ModelRecovery(directory / "run")
    while committed() < 49:
        before = committed()
        full = lambda: adapter.stats()["in_flight"] == 2 or not training.is_alive()  # noqa: E731
        eventually(full, "two are in flight")
        most_in_flight = max(most_in_flight, int(adapter.stats()["in_flight"]))
        most_alive = max(most_alive, len(alive))
        go_on(monitor)
        eventually(lambda before=before: committed() > before, "one more is committed")
        stall(monitor)
        there = recovery.list_checkpoints()
        assert there == [f"step-{step:08d}" for step in range(1, len(there) + 1)]
    go_on(monitor)
    training.end()
    adapter.shutdown()
    assert most_in_flight == 2
    # Three steps wait for the handler, one is with it, one gathered, the newest one kept.
    assert most_alive <= 4 * 6
    for step in (2, 25, 50):
        assert recovery.verify(f"step_{step}")
        model = nn.Module()
        for layer in "abcd":
            model.add_module(layer, nn.Module())
            model.get_submodule(layer).weight = nn.Parameter(torch.zeros(1024))
        assert recovery.load_checkpoint(model, f"step_{step}") == []
        assert all(bool((p == step).all()) for p in model.parameters())
    assert len(recovery.list_checkpoints()) == 50


def test_waiting_and_shutting_down_time_out_naming_what_is_in_flight(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter, monitor = monitored(open_adapter, max_async=4)
    stall(monitor)
    adapter.save_layers_batch(tasks_of(other(Plain), 2))
    adapter.save_layers_batch(tasks_of(other(Plain), 3))
    with pytest.raises(TimeoutError, match=r"after 0\.01 s: step-00000002, step-00000003 \("):
        adapter.wait(0.01)  # the second is not sealed yet, but in flight it is
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"after 0\.01 s: step-00000002, step-00000003 \("):
            adapter.shutdown(0.01)
    adapter.save_layers_batch(tasks_of(other(Plain), 4))  # nothing has been lost by that
    go_on(monitor)
    adapter.shutdown(DEADLINE_S)
    assert len(ModelRecovery(directory / "run").list_checkpoints()) == 4
    adapter.shutdown(0.0)


def test_shutting_down_times_out_where_another_thread_waits_for_the_disk(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter, monitor = monitored(open_adapter, max_async=1)
    stall(monitor)
    adapter.save_layers_batch([SaveTask("a", 2, [torch.ones(1)])])
    waiting = threading.Event()
    begin = adapter.flight.begin_ticket

    def watched(*args: Any, **options: Any) -> Any:
        waiting.set()
        return begin(*args, **options)

    adapter.flight.begin_ticket = watched  # type: ignore[method-assign]
    one_more = Running(lambda: adapter.save_layers_batch([SaveTask("a", 3, [torch.ones(1)])]))
    assert waiting.wait(DEADLINE_S)
    with pytest.raises(TimeoutError, match=r"after 0\.01 s: step-00000002 "):
        adapter.shutdown(0.01)
    go_on(monitor)
    one_more.end()
    adapter.shutdown()
    assert len(ModelRecovery(directory / "run").list_checkpoints()) == 3


def test_waiting_times_out_where_another_thread_waits_for_the_disk(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter, monitor = monitored(open_adapter, batch_size_mb=1.0, ratio=1.0, block_size_mb=0.25)
    stall(monitor)
    large = SaveTask("a", 2, [torch.ones(1 << 20)])  # four times the staging memory
    saving = Running(lambda: adapter.save_layers_batch([large]))
    eventually(lambda: adapter._loose.ticket is not None, "it is begun")
    waiting = Running(lambda: adapter.wait(0.05))
    try:
        with pytest.raises(TimeoutError, match=r"after 0\.05 s: step-00000002 "):
            waiting.end()
    finally:
        go_on(monitor)
    saving.end()
    adapter.wait(DEADLINE_S)  # nothing that is sealed is left
    adapter.shutdown()
    assert len(ModelRecovery(directory / "run").list_checkpoints()) == 2


def test_a_trainers_shutdown_times_out_too_and_can_be_gone_on_with(directory: Path) -> None:
    live = Live(Program(model=Plain, options={"use_monitor": True}), directory).run(1)
    live.trainer.wait()
    monitor = live.trainer.adapter.session.monitor_process
    assert monitor is not None
    stall(monitor)
    live.run(2)
    with pytest.raises(TimeoutError, match=r"after 0\.01 s: step-00000002 \("):
        live.trainer.shutdown(0.01)
    with pytest.raises(TimeoutError, match=r"after 0\.01 s: step-00000002 \("):
        live.trainer.wait(0.01)
    live.run(3)  # it is a trainer still
    go_on(monitor)
    live.trainer.shutdown(DEADLINE_S)
    assert len(ModelRecovery(directory).list_checkpoints()) == 3
    assert live.trainer.stats()["checkpoints_committed"] == 3


def test_an_interrupt_leaves_a_shutdown_to_be_called_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(Program(model=Plain), directory).run(2)

    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(live.trainer.adapter.flight, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            live.trainer.shutdown()
    live.run(3)
    live.trainer.shutdown()
    assert len(ModelRecovery(directory).list_checkpoints()) == 3


def test_a_last_step_that_cannot_be_sealed_is_told_of_and_the_directory_let_go_of(
    directory: Path,
) -> None:
    class Unwilling:
        willing = True

        def state_dict(self) -> dict[str, Any]:
            return {} if self.willing else {"no": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    unwilling = Unwilling()
    program = Program(model=Plain, extra=lambda live: {"unwilling": unwilling})
    live = Live(program, directory).run(2)
    unwilling.willing = False
    with pytest.raises(TypeError, match=r"extra\.unwilling\.no"):
        live.trainer.shutdown()
    live.trainer.shutdown()
    Live(program, directory).trainer.shutdown()  # which has the lock
    assert len(ModelRecovery(directory).list_checkpoints()) == 1


HANGING = """
import os, signal, sys, torch
from pccheck_ext import *
from torch import nn
model = nn.Linear(4, 4)
small = dict(use_monitor=True, batch_size_mb=2, ratio=2, block_size_mb=0.25)
if sys.argv[2] == "trainer":
    one = LayerwiseCheckpointTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=sys.argv[1], **small)
    session = one.adapter.session
    def save(step):
        model(torch.ones(1, 4)).sum().backward()
        one.step()
        one.end_step()
        model.zero_grad()
else:
    one = PCCheckAdapter(checkpoint_file=sys.argv[1], **small)
    session = one.session
    def save(step):
        one.save_layers_batch([SaveTask("a", step, [torch.ones(3)])])
        one.finish_step()
save(1)
one.wait()
print(session.monitor_process, flush=True)
os.kill(session.monitor_process, signal.SIGSTOP)
save(2)
if sys.argv[3] == "interrupted":
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 5.0)  # while the exit waits
    sys.exit()
try:
    one.shutdown(0.05)
except TimeoutError as error:
    print(error, flush=True)
if sys.argv[3] == "dropped":
    import gc
    del one, session, save
    gc.collect()
    print("dropped", flush=True)
"""


@pytest.mark.parametrize(
    ("what", "ending"),
    [
        ("trainer", "kept"),
        ("trainer", "dropped"),
        ("trainer", "interrupted"),
        ("adapter", "kept"),
        ("adapter", "dropped"),
    ],
)
def test_after_a_shutdown_in_vain_the_process_ends_though_the_disk_still_hangs(
    what: str, ending: str, directory: Path
) -> None:
    run, output = directory / "run", directory / "output"
    script = [sys.executable, "-c", HANGING, str(run), what, ending]
    with output.open("wb") as file:  # a pipe's other end the monitor would have, too
        status = subprocess.run(script, stdout=file, stderr=file, timeout=120).returncode
    said = output.read_text()
    monitor = int(said.split()[0])
    try:
        assert status == 0, said
        in_vain = "still in flight after 0.05 s: step-00000002"
        assert (in_vain in said) is (ending != "interrupted")
        lost = "still in flight after 0.0 s: step-00000002"
        assert said.count(lost) == 1
        assert f"pccheck_ext: {'' if ending == 'dropped' else 'at exit: '}{lost}" in said
        assert ("dropped\n" in said) is (ending == "dropped")
        assert ModelRecovery(run).list_checkpoints() == ["step-00000001"]
    finally:
        go_on(monitor)
    # What had been sealed is the monitor's, which lives on.
    both = ["step-00000001", "step-00000002"]
    eventually(lambda: ModelRecovery(run).list_checkpoints() == both, "it commits")


# --- Other threads, processes, endings -----------------------------------------------------------


def test_the_loop_may_save_the_whole_state_while_layers_come_from_another_thread(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter(max_async=2)
    tasks = [tasks_of(other(Plain), step) for step in range(1, 61)]
    saving = Running(lambda: [adapter.save_layers_batch([t]) for batch in tasks for t in batch])
    whole = 0
    while saving.is_alive():
        newest = [task.training_step for task in [*adapter._loose._newest.values()]]
        if len(newest) == len(tasks[0]):
            with contextlib.suppress(ValueError):  # layers of the next step have come by now
                adapter.save_entire_checkpoint_in_chunks(f"whole-{whole}", newest[-1])
                whole += 1
        adapter.wait()
    saving.end()
    adapter.shutdown()
    recovery = ModelRecovery(directory / "run")
    names = recovery.list_checkpoints()
    assert [name for name in names if name.startswith("step")] == [
        f"step-{step:08d}" for step in range(1, 61)
    ]
    assert len(names) == 60 + whole
    manager = CheckpointMetadataManager(directory / "run.chk")
    for name in names:
        assert recovery.verify(name)
        assert len(manager.get_checkpoint_info(name)["layers"]) == 3


def test_one_that_is_dropped_finishes_its_saves_and_says_so(directory: Path) -> None:
    made = [PCCheckAdapter(checkpoint_dir=directory / "run", **LITTLE_MEMORY)]
    made[0].save_layers_batch([SaveTask("a", 1, [torch.ones(1)])])

    def drop() -> None:
        made.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match=r"adapter over .*/run was dropped without shutdown"):
        drop()
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000001"]
    PCCheckAdapter(checkpoint_dir=directory / "run", **LITTLE_MEMORY).shutdown()  # it is let go of


def test_at_exit_a_scheduler_hands_over_before_its_adapter_ends(directory: Path) -> None:
    kept = []

    def in_child() -> None:
        adapter = PCCheckAdapter(checkpoint_dir=directory / "run", **LITTLE_MEMORY)
        scheduler = LayerwiseCheckpointScheduler(adapter.save_layers_batch)
        for step in (1, 2):
            scheduler.add_save_task("a", step, [torch.ones(1)])
        kept.extend([adapter, scheduler])

    child = Child(in_child, directory)
    assert child.end() == 0
    assert child.said() == ""
    assert ModelRecovery(directory / "run").list_checkpoints() == ["step-00000001", "step-00000002"]


def test_a_forked_child_leaves_its_parents_saves_alone(
    directory: Path, open_adapter: OpenAdapter
) -> None:
    adapter = open_adapter()
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(1)])])

    def in_child() -> None:
        adapter.shutdown(0.0)
        try:
            adapter.save_layers_batch([SaveTask("b", 1, [torch.ones(1)])])
        except RuntimeError as error:
            print(error)

    child = Child(in_child, directory)
    assert child.end() == 0
    assert "which this one was forked from" in child.said()
    adapter.save_layers_batch([SaveTask("c", 1, [torch.ones(1)])])
    adapter.shutdown()
    info = CheckpointMetadataManager(directory / "run.chk").get_checkpoint_info("step_1")
    assert list(info["layers"]) == ["a", "c"]


# --- Arguments -----------------------------------------------------------------------------------


def test_the_old_librarys_path_is_ignored_with_a_warning(open_adapter: OpenAdapter) -> None:
    with pytest.warns(UserWarning, match="c_lib_path is ignored: the engine is built in"):
        open_adapter(c_lib_path="/nowhere/libpccheck.so")


def test_the_old_files_name_names_the_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    adapter = PCCheckAdapter(**LITTLE_MEMORY)
    monkeypatch.chdir("/")
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(1)])])
    adapter.shutdown()
    assert os.listdir(directory) == ["layerwise_checkpoint"]
    assert ModelRecovery(directory / "layerwise_checkpoint").verify("step_1")


def test_staging_memory_on_a_device_is_not_needed_on_this_one(open_adapter: OpenAdapter) -> None:
    adapter = open_adapter()
    assert adapter.allocate_staging_buffer() is None
    with pytest.raises(ValueError, match="size_mb must be a positive number"):
        adapter.allocate_staging_buffer(0)


def test_statistics_can_be_had_after_the_end_too(open_adapter: OpenAdapter) -> None:
    adapter = open_adapter()
    save_and_wait(adapter, 1)
    running = adapter.stats()
    adapter.shutdown()
    assert adapter.stats() == running
    assert running["checkpoints_committed"] == 1


@pytest.mark.parametrize("use_pccheck", [True, False])
@pytest.mark.parametrize(
    ("option", "value"), [("lock_timeout_s", -1), ("drain_timeout_s", -1), ("drain_timeout_s", 0)]
)
def test_seconds_that_cannot_be_are_refused_in_every_mode(
    option: str, value: float, use_pccheck: bool, directory: Path, open_adapter: OpenAdapter
) -> None:
    with pytest.raises(ValueError, match=f"{option} must be"):
        open_adapter(use_pccheck=use_pccheck, **{option: value})
    assert not (directory / "run").exists()


@pytest.mark.parametrize("use_pccheck", [True, False])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint_file": ""}, ValueError, "checkpoint_file must name a directory"),
        ({"checkpoint_file": None}, TypeError, "checkpoint_file must be a path, got NoneType"),
        ({"checkpoint_dir": ""}, ValueError, "checkpoint_dir must name a directory"),
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir must be a path, got int"),
    ],
)
def test_a_place_that_is_none_is_refused(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    use_pccheck: bool,
    open_adapter: OpenAdapter,
) -> None:
    with pytest.raises(error, match=message):
        open_adapter(use_pccheck=use_pccheck, **options)


@pytest.mark.parametrize("use_pccheck", [True, False])
def test_told_to_be_verbose_it_says_what_it_begins_and_what_is_committed(
    use_pccheck: bool, open_adapter: OpenAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = open_adapter(verbose=True, use_pccheck=use_pccheck)
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(1 << 18)])])
    assert capsys.readouterr().out == "PCCheckAdapter: checkpoint step-00000001 begun\n"
    adapter.finish_step()
    adapter.wait()
    told = capsys.readouterr().out
    assert told == "PCCheckAdapter: checkpoint step-00000001 committed, 1.00 MiB\n"
    adapter.wait()
    adapter.shutdown()
    assert capsys.readouterr().out == ""


def test_one_that_is_not_told_to_be_verbose_says_nothing(
    open_adapter: OpenAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = open_adapter()
    save_and_wait(adapter, 1)
    adapter.shutdown()
    assert capsys.readouterr().out == ""


def test_after_going_on_without_its_monitor_it_is_in_direct_mode(
    open_adapter: OpenAdapter,
) -> None:
    adapter, monitor = monitored(open_adapter, on_monitor_death="direct")
    assert adapter.mode == "monitor"
    os.kill(monitor, signal.SIGKILL)
    eventually(lambda: adapter.flight.monitor_has_died, "its death is noticed")
    with pytest.warns(RuntimeWarning, match="writing from its own process"):
        save_and_wait(adapter, 2)
    assert adapter.mode == "direct"
    assert open_adapter(use_pccheck=False).mode == "mock"
    adapter.shutdown()
    assert adapter.mode == "direct"
