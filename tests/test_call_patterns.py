"""Code written for the systems before this one runs unchanged: names, defaults, call patterns."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _models import generators_kept, memory_directory
from _waiting import one_thread
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pccheck_ext
from pccheck_ext import (
    CheckpointMetadataManager,
    LayerwiseCheckpointScheduler,
    LayerwiseCheckpointTrainer,
    LayerwiseOptimizer,
    ModelRecovery,
    PCCheckAdapter,
    SaveTask,
)


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept(), one_thread():
        yield


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of the test: old code uses relative paths."""
    with memory_directory() as path:
        monkeypatch.chdir(path)
        yield path


# --- Signatures ----------------------------------------------------------------------------------

OLD = """
class LayerwiseCheckpointTrainer:
    def __init__(self, model, optimizer=None, use_pccheck=True, use_monitor=False, num_threads=4,
                 max_async=2, batch_size_mb=100.0, ratio=2.0, is_distributed=False, rank=0,
                 world_size=1, checkpoint_dir="./checkpoints", c_lib_path=None,
                 *, optimizer_class=None, optimizer_kwargs=None,
                 checkpoint_chunk_count=1, wait_for_chunks=False, device=None, verbose=False): ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...
    def train_step(self, inputs, labels, criterion, enable_checkpoint=True) -> float: ...
    def save_full_checkpoint(self, checkpoint_id: str) -> None: ...
    def load_checkpoint(self, checkpoint_id: str) -> list[str]: ...
    def shutdown(self) -> None: ...

class LayerwiseOptimizer:
    def __init__(self, base_optimizer, update_order, layer_params_dict, callback=None,
                 verbose=False, use_pinned_memory=True): ...
    def step(self): ...
    def zero_grad(self): ...
    def get_statistics(self) -> dict: ...

class LayerwiseCheckpointScheduler:
    def __init__(self, save_handler, buffer_size_mb=10.0, async_save=True, verbose=False): ...
    def add_save_task(self, layer_name, training_step, layer_params) -> None: ...
    def force_flush(self) -> None: ...
    def shutdown(self) -> None: ...
    def get_statistics(self) -> dict: ...

class PCCheckAdapter:
    def __init__(self, c_lib_path=None, checkpoint_file="layerwise_checkpoint.chk", num_threads=4,
                 max_async=2, batch_size_mb=100.0, ratio=2.0, use_pccheck=True, use_monitor=False,
                 is_distributed=False, rank=0, world_size=1, verbose=False): ...
    def allocate_staging_buffer(self, size_mb: float = 500.0) -> None: ...
    def save_layers_batch(self, tasks) -> dict: ...
    def save_entire_checkpoint_in_chunks(self, checkpoint_id: str, training_step: int,
                                         chunk_count: int = 2): ...
    def shutdown(self) -> None: ...

class CheckpointMetadataManager:
    def __init__(self, checkpoint_file: str, metadata_dir: str = "./metadata"): ...
    def record_layer_save(self, layer_name, training_step, offset, size_bytes, param_count, shapes,
                          dtypes) -> None: ...
    def get_checkpoint_info(self, checkpoint_id) -> dict: ...
    def list_checkpoints(self) -> list[str]: ...
    def verify_checkpoint(self, checkpoint_id) -> bool: ...

class ModelRecovery:
    def __init__(self, metadata_dir: str = "./metadata"): ...
    def load_checkpoint(self, model, checkpoint_id, strict=False) -> list[str]: ...
    def get_latest_checkpoint(self) -> str | None: ...
"""
"""How old code knows them. Ours may take more, but nothing of this is gone or elsewhere."""


class _Missing:
    pass


def old_signatures() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (kind.name, function)
        for kind in ast.parse(OLD).body
        if isinstance(kind, ast.ClassDef)
        for function in kind.body
        if isinstance(function, ast.FunctionDef)
    ]


def defaults_of(function: ast.FunctionDef) -> dict[str, object]:
    arguments = function.args
    positional = [argument.arg for argument in arguments.args]
    found: dict[str, object] = dict.fromkeys(positional, _Missing)
    for name, value in zip(
        positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True
    ):
        found[name] = ast.literal_eval(value)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        assert default is not None
        found[argument.arg] = ast.literal_eval(default)
    return found


@pytest.mark.parametrize(
    ("kind", "old"), old_signatures(), ids=lambda value: getattr(value, "name", value)
)
def test_every_argument_is_where_it_was_and_has_the_default_it_had(
    kind: str, old: ast.FunctionDef
) -> None:
    ours = inspect.signature(getattr(getattr(pccheck_ext, kind), old.name)).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in ours.values())
    places = [argument.arg for argument in old.args.args]
    if not takes_any:
        assert list(ours)[: len(places)] == places
    for name, default in defaults_of(old).items():
        if takes_any and name not in ours:
            continue
        if default is _Missing:
            assert ours[name].default is inspect.Parameter.empty
        else:
            assert ours[name].default == default
            assert type(ours[name].default) is type(default)
    for name, parameter in ours.items():
        if name not in defaults_of(old):  # more may be given, none needs to be
            optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            assert optional or parameter.default is not inspect.Parameter.empty


def test_a_task_has_what_handlers_read_from_it() -> None:
    task = SaveTask("fc", 7, [torch.ones(2)])
    assert (task.layer_name, task.training_step, len(task.layer_params)) == ("fc", 7, 1)


# --- 1, 2: the basic loop ------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(10, 20)
        self.norm = nn.BatchNorm1d(20)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.layer1(x))))


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(8, 10, generator=drawn), torch.randint(0, 3, (8,), generator=drawn)


def never_zeroing(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Path:
    """Pattern 1, as it was written."""
    criterion = nn.CrossEntropyLoss()
    trainer = LayerwiseCheckpointTrainer(
        model=model,
        optimizer=optimizer,
        use_pccheck=True,
        num_threads=8,
        max_async=4,
        batch_size_mb=100.0,
        checkpoint_dir="./checkpoints",
        **options,
    )
    for data, target in batches(6):
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        trainer.step()
    trainer.shutdown()
    return Path("checkpoints")


def assert_holds(directory: Path, checkpoint_id: str, model: nn.Module) -> None:
    recovery = ModelRecovery(directory)
    assert recovery.verify(checkpoint_id)
    loaded = Net()
    assert recovery.load_checkpoint(loaded, checkpoint_id, strict=True) == []
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


OPTIMIZERS: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
    lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
]


@pytest.mark.parametrize("use_monitor", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["SGD", "Adam"])
def test_patterns_1_and_2_run_warn_once_of_gradients_never_cleared_and_save_every_step(
    make: Callable[[nn.Module], torch.optim.Optimizer], use_monitor: bool, directory: Path
) -> None:
    model = Net()
    options = {"use_monitor": True} if use_monitor else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = never_zeroing(model, make(model), **options)
    assert (
        len([w for w in told if "gradients of the last step are still there" in str(w.message)])
        == 1
    )
    assert [str(w.message) for w in told if w.category is not RuntimeWarning] == []
    assert ModelRecovery(run).get_latest_checkpoint() == "step-00000006"
    assert_holds(run, "step-00000006", model)
    assert len(list(run.glob("step-*"))) == 3  # those kept by default


def test_the_warning_names_the_way_out_which_silences_it_and_makes_the_loop_resumable(
    directory: Path,
) -> None:
    def train(model: Net, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
        for i, (data, target) in enumerate(batches(stop)):
            if i >= start:
                nn.CrossEntropyLoss()(model(data), target).backward()
                optimizer.step()

    torch.manual_seed(1)
    whole = Net()
    train(whole, OPTIMIZERS[0](whole), 0, 9)
    torch.manual_seed(1)
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never_zeroing(model, OPTIMIZERS[0](model), save_gradients=True)
    again = Net()
    with LayerwiseCheckpointTrainer(
        again, OPTIMIZERS[0](again), checkpoint_dir="checkpoints", save_gradients=True
    ) as trainer:
        assert trainer.resume() == 6
        train(again, trainer.optimizer, 6, 9)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# --- 3: distributed ------------------------------------------------------------------------------


@pytest.fixture
def one_process_group(directory: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_pattern_3_saves_a_distributed_model_under_its_own_names(directory: Path) -> None:
    rank = dist.get_rank()
    model = Net()
    ddp = DistributedDataParallel(model)
    trainer = LayerwiseCheckpointTrainer(
        model=ddp,
        optimizer=torch.optim.Adam(ddp.parameters(), lr=1e-3),
        is_distributed=True,
        rank=rank,
        world_size=dist.get_world_size(),
        checkpoint_dir=f"./checkpoints/rank{rank}",
    )
    for data, target in batches(3):
        trainer.zero_grad()
        nn.CrossEntropyLoss()(ddp(data), target).backward()
        trainer.step()
    trainer.shutdown()
    run = Path("checkpoints") / "rank0"
    stored = load_file(run / "step-00000003" / "model.safetensors")
    assert set(stored) == set(model.state_dict())  # no "module." in front
    state = load_file(run / "step-00000003" / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in state} == {n for n, _ in model.named_parameters()}
    assert trainer.update_order == ["fc", "norm", "layer1"]
    assert_holds(run, "step-00000003", model)
    again = DistributedDataParallel(Net())
    with LayerwiseCheckpointTrainer(
        again, torch.optim.Adam(again.parameters(), lr=1e-3), checkpoint_dir=run
    ) as resumed:
        assert resumed.resume() == 3
    assert_holds(run, "step-00000003", again.module)


# --- 4: restoring --------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_pattern_4_finds_a_checkpoint_by_the_old_metadata_folder(
    there: bool, directory: Path
) -> None:
    model = Net()
    trainer = LayerwiseCheckpointTrainer(model, OPTIMIZERS[1](model))  # in ./checkpoints
    for data, target in batches(2):
        trainer.zero_grad()
        nn.CrossEntropyLoss()(model(data), target).backward()
        trainer.step()
    trainer.save_full_checkpoint("epoch_10_step_1000")
    trainer.shutdown()
    if there:  # it may hold records, or what an old run has left
        CheckpointMetadataManager("old.chk", "./checkpoints/metadata").record_layer_save(
            "fc", 1, 0, 252, 63, [[3, 20], [3]], ["float32", "float32"]
        )
    recovery = ModelRecovery(metadata_dir="./checkpoints/metadata")
    loaded = Net()
    missing = recovery.load_checkpoint(model=loaded, checkpoint_id="epoch_10_step_1000")
    assert missing == []
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert recovery.get_latest_checkpoint() in ("step-00000002", "epoch_10_step_1000")
    again = Net()
    with LayerwiseCheckpointTrainer(again, OPTIMIZERS[1](again)) as resumed:
        assert resumed.load_checkpoint("epoch_10_step_1000") == []
        assert resumed.training_step == 2


# --- 5: train_step, in chunks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "use_monitor"), [(1, False), (2, False), (3, False), (4, False), (3, True)]
)
def test_pattern_5_saves_the_steps_that_it_enables(
    chunks: int, use_monitor: bool, directory: Path
) -> None:
    trainer = LayerwiseCheckpointTrainer(
        Net(),
        use_monitor=use_monitor,
        optimizer_class=torch.optim.Adam,
        optimizer_kwargs={"lr": 1e-3},
        checkpoint_chunk_count=chunks,
        device="cpu",
        keep_last=0,
    )
    losses = []
    for i, (inputs, labels) in enumerate(batches(23)):
        loss = trainer.train_step(
            inputs, labels, nn.CrossEntropyLoss(), enable_checkpoint=(i % 10 == 0)
        )
        losses.append(loss)
    assert all(type(loss) is float for loss in losses)
    assert trainer.loss_history == losses
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    trainer.save_full_checkpoint("whole")
    trainer.shutdown()
    recovery = ModelRecovery("checkpoints")
    assert recovery.list_checkpoints() == [
        "step-00000001",
        "step-00000011",
        "step-00000021",
        "whole",
    ]
    assert all(recovery.verify(name) for name in recovery.list_checkpoints())
    assert_holds(Path("checkpoints"), "whole", trainer.model)


@pytest.mark.parametrize("wait", [False, True])
def test_pattern_5_saves_every_step_unless_told_otherwise(wait: bool, directory: Path) -> None:
    trainer = LayerwiseCheckpointTrainer(
        Net(),
        optimizer_class=torch.optim.Adam,
        optimizer_kwargs={"lr": 1e-3},
        checkpoint_chunk_count=2,
        wait_for_chunks=wait,
        device="cpu",
    )
    for i, (inputs, labels) in enumerate(batches(4), 1):
        trainer.train_step(inputs, labels, nn.CrossEntropyLoss(), True)
        if wait:
            assert ModelRecovery("checkpoints").get_latest_checkpoint() == f"step-{i:08d}"
            assert trainer.stats()["in_flight"] == 0
    trainer.shutdown()
    assert ModelRecovery("checkpoints").list_checkpoints() == [f"step-{i:08d}" for i in (2, 3, 4)]


# --- 6: each part alone --------------------------------------------------------------------------


def test_pattern_6_an_optimizer_alone_calls_back_layer_by_layer() -> None:
    model = Net()
    seen: list[tuple[str, int, list[Tensor]]] = []
    optimizer = LayerwiseOptimizer(
        torch.optim.Adam(model.parameters()),
        ["fc", "norm", "layer1"],
        {name: list(module.parameters()) for name, module in model.named_children()},
        callback=lambda name, step, params: seen.append((name, step, params)),
    )
    for data, target in batches(2):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(data), target).backward()
        optimizer.step()
    order = ["fc", "norm", "layer1"]
    assert [(name, step) for name, step, _ in seen] == [(n, s) for s in (1, 2) for n in order]
    newest = {name: params for name, _, params in seen}
    for name, module in model.named_children():
        for copy, param in zip(newest[name], module.parameters(), strict=True):
            assert torch.equal(copy, param)
            assert copy.data_ptr() != param.data_ptr()
    assert optimizer.get_statistics()["steps"] == 2


def test_pattern_6_a_scheduler_alone_hands_batches_to_any_handler() -> None:
    got: list[SaveTask] = []
    scheduler = LayerwiseCheckpointScheduler(save_handler=got.extend, buffer_size_mb=10.0)
    scheduler.add_save_task("fc", 1, [torch.ones(3)])
    scheduler.add_save_task(layer_name="layer1", training_step=1, layer_params=[torch.ones(2)])
    scheduler.force_flush()
    assert [task.layer_name for task in got] == ["fc", "layer1"]
    scheduler.shutdown()
    assert scheduler.get_statistics()["tasks_handed_over"] == 2


def test_pattern_6_adapter_and_metadata_manager_alone(directory: Path) -> None:
    adapter = PCCheckAdapter(
        checkpoint_file="layerwise_checkpoint.chk", num_threads=4, max_async=2, batch_size_mb=100.0
    )
    adapter.allocate_staging_buffer(size_mb=500.0)
    model = Net()
    tasks = [SaveTask(n, 100, list(m.parameters())) for n, m in model.named_children()]
    assert adapter.save_layers_batch(tasks)["checkpoint_id"] == "step-00000100"
    adapter.save_entire_checkpoint_in_chunks("mine", 100, chunk_count=2)
    adapter.shutdown()
    manager = CheckpointMetadataManager("layerwise_checkpoint.chk", metadata_dir="./metadata")
    assert manager.list_checkpoints() == ["step-00000100", "mine"]
    assert manager.verify_checkpoint("step_100")
    entry = manager.get_checkpoint_info("step_100")["layers"]["fc"]
    assert entry["shapes"] == [[3, 20], [3]]
    assert entry["dtypes"] == ["float32", "float32"]
    manager.record_layer_save("fc", 101, 0, 252, 63, [[3, 20], [3]], ["float32", "float32"])
    assert manager.list_checkpoints() == ["step-00000100", "mine", "step_101"]
