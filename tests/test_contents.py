"""What is in a checkpoint's files: the model as other tools read it, whatever its tensors are."""

from __future__ import annotations

import json
import os
import struct
from collections import OrderedDict
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
    Zoo,
    assert_same,
    generators_kept,
    memory_directory,
    optimizer,
    raw,
)
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from pccheck_ext import (
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointNotFound,
    LayerwiseCheckpointTrainer,
    ModelRecovery,
)

SMALL_BLOCKS: dict[str, Any] = {**LITTLE_MEMORY, "block_size_mb": 1 / 256}  # 4 KiB


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept():
        torch.manual_seed(0)
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


class Holding(nn.Module):
    """A model that trains one number and holds the given tensors as buffers."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def trained(model: nn.Module, directory: Path, **options: Any) -> LayerwiseCheckpointTrainer:
    """A trainer that has taken a step with gradients of one."""
    trainer = LayerwiseCheckpointTrainer(
        model,
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01),
        checkpoint_dir=directory,
        **{**LITTLE_MEMORY, **options},
    )
    take_step(trainer)
    return trainer


def take_step(trainer: LayerwiseCheckpointTrainer) -> None:
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    trainer.step()


def saved_file(directory: Path, step: int = 1, name: str = "model") -> Path:
    return directory / f"step-{step:08d}" / f"{name}.safetensors"


def plain(model: nn.Module) -> dict[str, Tensor]:
    """state_dict(), copied, in the order that does not matter."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


# --- The model's file ----------------------------------------------------------------------------


def test_the_models_file_is_its_state_dict_of_that_step(directory: Path) -> None:
    live = Live(Program(model=Plain), directory)
    wanted = {}
    for step in (1, 2, 3):
        live.run(step)
        wanted[step] = plain(live.model)
    live.trainer.shutdown()
    for step in wanted:
        assert_same(load_file(saved_file(directory, step)), wanted[step])


def test_tied_tensors_are_stored_once_and_load_model_ties_them_again(directory: Path) -> None:
    live = Live(Program(), directory).run(2)
    wanted = plain(live.model)
    live.trainer.shutdown()
    path = saved_file(directory, 2)
    assert_same(load_file(path), {k: v for k, v in wanted.items() if k != "head.weight"})
    fresh = Zoo()
    missing, unexpected = load_model(fresh, path)
    assert (missing, unexpected) == (set(), [])
    assert_same(plain(fresh), wanted)
    for strict in (False, True):
        recovered = Zoo()
        found = ModelRecovery(directory).load_checkpoint(recovered, "step-00000002", strict=strict)
        assert found == []
        assert_same(plain(recovered), wanted)
        assert recovered.head.weight is recovered.embed.weight


def test_an_untied_model_gets_the_tied_tensor_under_both_names(directory: Path) -> None:
    live = Live(Program(), directory).run(1)
    wanted = plain(live.model)
    live.trainer.shutdown()
    untied = Zoo()
    untied.head.weight = nn.Parameter(torch.zeros_like(untied.embed.weight))
    assert ModelRecovery(directory).load_checkpoint(untied, "step-00000001", strict=True) == []
    assert_same(plain(untied), wanted)


TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits that are a value of the type, NaN payloads included."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def test_tensors_of_every_type_and_shape_come_back(directory: Path) -> None:
    buffers = {}
    for dtype in TYPES:
        name = str(dtype).removeprefix("torch.")
        buffers[f"{name}_odd"] = filled(dtype, 3, 5, 7)
        buffers[f"{name}_number"] = filled(dtype, 1).reshape(())
        buffers[f"{name}_empty"] = filled(dtype, 3, 0, 2)
    model = Holding(**buffers)
    wanted = plain(model)
    trained(model, directory, **SMALL_BLOCKS).shutdown()
    stored = load_file(saved_file(directory))
    assert_same({k: v for k, v in stored.items() if k != "weight"}, buffers)
    fresh = Holding(**{name: torch.zeros_like(buffer) for name, buffer in buffers.items()})
    assert ModelRecovery(directory).load_checkpoint(fresh, "step-00000001", strict=True) == []
    del wanted["weight"]
    assert_same({k: v for k, v in plain(fresh).items() if k != "weight"}, wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
)
def test_parameters_of_every_type_resume_with_their_state(
    dtype: torch.dtype, directory: Path
) -> None:
    def model() -> nn.Module:
        made = nn.Module()
        made.number = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        made.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
        made.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).to(dtype).t())
        return made

    trainer = trained(model(), directory)
    take_step(trainer)
    trainer.wait()
    wanted, state = plain(trainer.model), trainer.optimizer.state_dict()
    fresh = trained(model(), directory / "other")
    (directory / "step-00000002").rename(directory / "other" / "step-00000002")
    assert fresh.resume("step-00000002") == 2
    assert_same(plain(fresh.model), wanted)
    assert_same(fresh.optimizer.state_dict(), state)
    for one in (fresh, trainer):
        take_step(one)
    assert_same(plain(fresh.model), plain(trainer.model))
    fresh.shutdown()
    trainer.shutdown()


NOT_CONTIGUOUS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(9, 9)[1::2, ::3],
    "expanded": lambda: torch.randn(1, 5).expand(3, 5),
    "number expanded": lambda: torch.randn(()).expand(2, 2),
    "conjugated": lambda: torch.randn(3, 2, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, 2, dtype=torch.complex64).conj().imag,
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", NOT_CONTIGUOUS)
def test_tensors_that_are_not_contiguous_come_back_in_place(kind: str, directory: Path) -> None:
    model = Holding(buffer=NOT_CONTIGUOUS[kind]())
    wanted = plain(model)["buffer"]
    trained(model, directory).shutdown()
    assert_same(load_file(saved_file(directory))["buffer"], wanted.resolve_conj().resolve_neg())
    fresh = Holding(buffer=NOT_CONTIGUOUS[kind]())
    place, strides = fresh.buffer.data_ptr(), fresh.buffer.stride()
    ModelRecovery(directory).load_checkpoint(fresh, "step-00000001")
    assert_same(fresh.buffer, wanted)
    assert (fresh.buffer.data_ptr(), fresh.buffer.stride()) == (place, strides)


def test_slices_of_one_base_are_saved_each_by_itself_and_keep_sharing_it(directory: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.randn(10)
            self.first = nn.Parameter(base[:4])
            self.second = nn.Parameter(base[4:].reshape(2, 3))
            self.register_buffer("both", base[2:6])
            self.register_buffer("again", self.first.data)  # the very same as a parameter

    trainer = trained(Flat(), directory)
    wanted = plain(trainer.model)
    take_step(trainer)
    take_step(trainer)
    trainer.wait()
    later = plain(trainer.model)
    trainer.shutdown()
    stored = load_file(saved_file(directory, 1))
    assert {"first", "second", "both"} <= stored.keys() | {"first"}
    assert_same({k: stored[k] for k in stored}, {k: wanted[k] for k in stored})
    for step, values in ((1, wanted), (3, later)):
        fresh = Flat()
        ModelRecovery(directory).load_checkpoint(fresh, f"step-{step:08d}", strict=True)
        assert_same(plain(fresh), values)
        with torch.no_grad():
            fresh.first[2] = 77.0
        assert fresh.both[0] == 77.0


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:Sparse CSR")
@pytest.mark.parametrize(
    "make",
    [
        sparse,
        lambda: torch.eye(3).to_sparse_csr(),
        quantized,
        lambda: torch.empty(3, device="meta"),
        lambda: torch.zeros(3, dtype=torch.complex128),
    ],
    ids=["sparse", "compressed", "quantized", "meta", "complex128"],
)
def test_a_tensor_that_no_file_can_hold_is_refused_by_name_before_anything_is_written(
    make: Callable[[], Tensor], directory: Path
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Holding(culprit=make()))
    with pytest.raises(TypeError, match=r"'1\.culprit'"):
        trained(model, directory / "new")
    assert not (directory / "new").exists()


def test_a_tensor_that_becomes_unstorable_is_refused_by_name_and_nothing_hangs(
    directory: Path,
) -> None:
    trainer = trained(Holding(culprit=torch.zeros(3)), directory)
    trainer.model.culprit = torch.eye(3).to_sparse()
    with pytest.raises(TypeError, match="culprit"):
        take_step(trainer)
    trainer.model.culprit = torch.ones(3)
    take_step(trainer)
    trainer.shutdown()
    assert ModelRecovery(directory).list_checkpoints() == ["step-00000001", "step-00000003"]
    assert load_file(saved_file(directory, 3))["culprit"].tolist() == [1, 1, 1]


def test_what_is_not_persistent_is_not_saved(directory: Path) -> None:
    model = Plain()
    model.register_buffer("mask", torch.ones(3), persistent=False)
    model.register_buffer("absent", None)
    trained(model, directory).shutdown()
    assert sorted(load_file(saved_file(directory))) == sorted(model.state_dict())
    assert "mask" not in load_file(saved_file(directory))


class WithTensorState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.arange(int(self.weight.detach().abs().sum() * 100) % 7 + 1)

    def set_extra_state(self, state: Tensor) -> None:
        self.told = state


class WithOtherState(nn.Linear):
    def get_extra_state(self) -> Any:
        return OrderedDict(kept=(1, 2.5), tensor=torch.ones(2, dtype=torch.bfloat16))

    def set_extra_state(self, state: Any) -> None:
        self.told = state


def test_extra_state_of_modules_comes_back_as_what_it_was(directory: Path) -> None:
    model = nn.Sequential(WithTensorState(3, 3), WithOtherState(3, 2))
    trainer = trained(model, directory)
    take_step(trainer)
    wanted = dict(model.state_dict())
    trainer.shutdown()
    other = wanted.pop("1._extra_state")
    assert_same(load_file(saved_file(directory, 2)), wanted)
    fresh = nn.Sequential(WithTensorState(3, 3), WithOtherState(3, 2))
    assert ModelRecovery(directory).load_checkpoint(fresh, "step-00000002", strict=True) == []
    assert_same(fresh[0].told, wanted["0._extra_state"])
    assert_same(fresh[1].told, other)


class Remembering(nn.Linear):
    """Puts into its state_dict what is no buffer: a tensor of its own and one that it computes."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.seen = torch.zeros(3)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "seen"] = self.seen
        destination[prefix + "norm"] = self.weight.detach().norm()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.seen = state.pop(prefix + "seen", self.seen)
        self.told = state.pop(prefix + "norm", None)
        super()._load_from_state_dict(state, prefix, *rest)


def test_what_modules_add_to_their_state_dict_is_saved_as_it_is_then(directory: Path) -> None:
    model = nn.Sequential(Remembering())
    trainer = trained(model, directory)
    model[0].seen = torch.ones(3)
    take_step(trainer)
    wanted = plain(model)
    trainer.shutdown()
    assert_same(load_file(saved_file(directory, 2)), wanted)
    fresh = nn.Sequential(Remembering())
    assert ModelRecovery(directory).load_checkpoint(fresh, "step-00000002", strict=True) == []
    assert_same(plain(fresh), wanted)
    assert_same(fresh[0].told, wanted["0.norm"])


def test_a_data_parallel_model_is_saved_under_its_own_names(directory: Path) -> None:
    model = Plain()
    trained(nn.DataParallel(model), directory).shutdown()
    assert_same(load_file(saved_file(directory)), plain(model))


def test_another_default_device_or_mode_changes_nothing(directory: Path) -> None:
    def made() -> LayerwiseCheckpointTrainer:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        return LayerwiseCheckpointTrainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            checkpoint_dir=directory,
            save_gradients=True,
            **LITTLE_MEMORY,
        )

    trainer = made()
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    with torch.device("meta"):  # stands for a device that is not the model's
        trainer.step(1.5)
        trainer.step(2.5)
        trainer.wait()
    with torch.inference_mode():
        trainer.save_full_checkpoint("inferred")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        trainer.save_full_checkpoint("cast")
    wanted, state = plain(trainer.model), trainer.optimizer.state_dict()
    trainer.shutdown()
    for name in ("step-00000002", "inferred", "cast"):
        fresh = made()
        with torch.device("meta"):
            assert fresh.resume(name) == 2
        assert_same(plain(fresh.model), wanted)
        assert_same(fresh.optimizer.state_dict(), state)
        assert fresh.loss_history == [1.5, 2.5]
        assert all(
            p.grad is not None and p.grad.device.type == "cpu" for p in fresh.model.parameters()
        )
        fresh.shutdown()


def test_a_compiled_model_is_saved_under_its_plain_names(directory: Path) -> None:
    inner = Plain()
    inner.hidden = torch.compile(inner.hidden, backend="eager")
    compiled = torch.compile(inner, backend="eager")
    assert any("_orig_mod" in name for name in compiled.state_dict())
    trained(compiled, directory).shutdown()
    assert sorted(load_file(saved_file(directory))) == sorted(Plain().state_dict())
    for fresh in (Plain(), torch.compile(Plain(), backend="eager")):
        found = ModelRecovery(directory).load_checkpoint(fresh, "step-00000001", strict=True)
        assert found == []
        assert [raw(p) for p in fresh.parameters()] == [raw(p) for p in inner.parameters()]
    layers = json.loads((directory / "step-00000001" / "manifest.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["out", "hidden", "embed"]


def test_names_of_any_kind_survive(directory: Path) -> None:
    model = nn.Module()
    names = ['quo"te', "back\\slash", "tab\tnew\nline", "ünï☃😀", " ", "__metadata__x", "a" * 300]
    for i, name in enumerate(names):
        setattr(model, name, nn.Parameter(torch.full((2,), float(i))))
    trainer = trained(model, directory)
    wanted = plain(model)
    trainer.shutdown()
    assert_same(load_file(saved_file(directory)), wanted)
    fresh = nn.Module()
    for name in names:
        setattr(fresh, name, nn.Parameter(torch.zeros(2)))
    assert ModelRecovery(directory).load_checkpoint(fresh, "step-00000001", strict=True) == []
    assert_same(plain(fresh), wanted)


def test_a_model_without_buffers_and_an_optimizer_without_state_are_saved(directory: Path) -> None:
    live = Live(Program(model=Plain, optimizer=optimizer(torch.optim.SGD, lr=0.1)), directory)
    live.run(2)
    live.trainer.shutdown()
    files = sorted(os.listdir(directory / "step-00000002"))
    assert files == ["checksums.bin", "extra.safetensors", "manifest.json", "model.safetensors"]


def test_a_model_with_nothing_at_all_is_saved(directory: Path) -> None:
    outside = nn.Parameter(torch.ones(3))
    outside.grad = torch.ones(3)
    with LayerwiseCheckpointTrainer(
        nn.ReLU(), torch.optim.SGD([outside], lr=0.5), checkpoint_dir=directory, **LITTLE_MEMORY
    ) as trainer:
        trainer.step()
    with torch.no_grad():
        outside.zero_()
    with LayerwiseCheckpointTrainer(
        nn.ReLU(), torch.optim.SGD([outside], lr=0.5), checkpoint_dir=directory, **LITTLE_MEMORY
    ) as trainer:
        assert trainer.resume() == 1
    assert outside.tolist() == [0.5, 0.5, 0.5]


# --- The optimizer's file ------------------------------------------------------------------------


def test_optimizer_state_is_under_the_parameters_names(directory: Path) -> None:
    model = Plain()
    trainer = trained(model, directory)
    state = {
        f"{name}.{key}": trainer.optimizer.state[p][key].clone()
        for name, p in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    trainer.shutdown()
    assert_same(load_file(saved_file(directory, name="optimizer")), state)


# --- One layer -----------------------------------------------------------------------------------


class Wide(nn.Module):
    """Layers of several blocks of 4 KiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.third = nn.BatchNorm1d(4096)


def extent(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(size))[name]["data_offsets"]
    return 8 + size + begin, 8 + size + end


def corrupt(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_one_layer_reads_its_own_blocks_and_no_other(directory: Path) -> None:
    model = Wide()
    trained(model, directory, **SMALL_BLOCKS).shutdown()
    path = saved_file(directory)
    begin, end = extent(path, "first.weight")
    corrupt(path, (begin + end) // 2)
    recovery = ModelRecovery(directory)
    assert not recovery.verify("step-00000001")
    for layer in ("second", "third"):
        fresh = Wide()
        before = plain(fresh)
        recovery.load_layer(fresh, "step-00000001", layer)
        wanted = {k: (model if k.startswith(layer) else fresh).state_dict()[k] for k in before}
        assert_same(plain(fresh), {k: v.detach().clone() for k, v in wanted.items()})
        assert_same(plain(fresh), {**before, **{k: plain(model)[k] for k in before if layer in k}})
    fresh = Wide()
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
        recovery.load_layer(fresh, "step-00000001", "first")
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
        recovery.load_checkpoint(fresh, "step-00000001")


@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_one_layer_is_recovered_alone_however_many_chunks_it_straddles(
    chunks: int, directory: Path
) -> None:
    model = Wide()
    trainer = trained(model, directory, checkpoint_chunk_count=chunks, **SMALL_BLOCKS)
    trainer.save_full_checkpoint("whole")
    trainer.shutdown()
    path = directory / "whole" / "model.safetensors"
    assert path.read_bytes() == saved_file(directory).read_bytes()
    begin, end = extent(path, "first.weight")
    corrupt(path, (begin + end) // 2)
    for layer in ("second", "third"):
        fresh = Wide()
        ModelRecovery(directory).load_layer(fresh, "whole", layer)
        assert_same(plain(getattr(fresh, layer)), plain(getattr(model, layer)))
    with pytest.raises(CheckpointCorrupt):
        ModelRecovery(directory).load_layer(Wide(), "whole", "first")


def test_one_layer_needs_no_other_file(directory: Path) -> None:
    model = Wide()
    trained(model, directory, **SMALL_BLOCKS).shutdown()
    for name in ("optimizer", "extra"):
        path = saved_file(directory, name=name)
        path.write_bytes(bytes(path.stat().st_size))
    fresh = Wide()
    ModelRecovery(directory).load_layer(fresh, "step-00000001", "second")
    assert_same(fresh.second.weight, model.second.weight)


def test_a_layer_or_checkpoint_that_is_not_there_is_named_with_those_that_are(
    directory: Path,
) -> None:
    trained(Wide(), directory).shutdown()
    recovery = ModelRecovery(directory)
    with pytest.raises(KeyError, match=r"no layer 'fourth'.*third, second, first"):
        recovery.load_layer(Wide(), "step-00000001", "fourth")
    with pytest.raises(CheckpointNotFound, match=r"'step-00000009'.*found: step-00000001"):
        recovery.load_checkpoint(Wide(), "step-00000009")
    with pytest.raises(FileNotFoundError):
        recovery.verify("step-00000009")
    with pytest.raises(ValueError, match="checkpoint_id"):
        recovery.load_checkpoint(Wide(), "../elsewhere")


def test_what_the_checkpoint_lacks_is_returned_and_what_differs_is_refused(directory: Path) -> None:
    trained(Wide(), directory).shutdown()
    recovery = ModelRecovery(directory)
    larger = nn.ModuleDict({"first": nn.Linear(64, 64), "fourth": nn.Linear(2, 2)})
    before = plain(larger)
    with pytest.raises(CheckpointMismatch, match=r"fourth\.\w+ is not in the checkpoint"):
        recovery.load_checkpoint(larger, "step-00000001", strict=True)
    assert_same(plain(larger), before)
    assert recovery.load_checkpoint(larger, "step-00000001") == ["fourth"]
    for other in (
        nn.ModuleDict({"first": nn.Linear(64, 65)}),
        nn.ModuleDict({"first": nn.Linear(64, 64, dtype=torch.float64)}),
        nn.ModuleDict({"fifth": nn.Linear(64, 64)}),
    ):
        before = plain(other)
        with pytest.raises(CheckpointMismatch, match=r"first|no tensor in common"):
            recovery.load_checkpoint(other, "step-00000001")
        assert_same(plain(other), before)


def test_the_old_metadata_folder_names_the_run_it_is_in(directory: Path) -> None:
    trained(Wide(), directory).shutdown()
    recovery = ModelRecovery(metadata_dir=str(directory / "metadata"))
    assert recovery.get_latest_checkpoint() == "step-00000001"
    assert ModelRecovery(str(directory / "metadata") + "/").list_checkpoints() == ["step-00000001"]
    assert ModelRecovery(directory / "elsewhere").get_latest_checkpoint() is None


def test_recovery_keeps_the_models_tensors_and_what_they_require(directory: Path) -> None:
    trained(Wide(), directory).shutdown()
    fresh = Wide()
    fresh.first.weight.requires_grad_(False)
    places = [(p.data_ptr(), p.requires_grad, p._version) for p in fresh.parameters()]
    ModelRecovery(directory).load_checkpoint(fresh, "step-00000001")
    for p, (place, requires_grad, version) in zip(fresh.parameters(), places, strict=True):
        assert (p.data_ptr(), p.requires_grad) == (place, requires_grad)
        assert p._version > version
