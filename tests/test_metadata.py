"""CheckpointMetadataManager: records of one's own, and what is where in a run's checkpoints."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import LITTLE_MEMORY, Live, Program, generators_kept, memory_directory, optimizer
from test_format import crc32c
from torch import nn

from pccheck_ext import (
    CheckpointCorrupt,
    CheckpointMetadataManager,
    CheckpointNotFound,
    LayerwiseCheckpointTrainer,
    ModelRecovery,
    PCCheckAdapter,
    SaveTask,
)

ENTRY = {  # one layer's, as old code knows it
    "checkpoint_id": "step_100",
    "training_step": 100,
    "offset_in_file": 0,
    "size_bytes": 1024,
    "param_count": 256,
    "shapes": [[64, 3, 3, 3]],
    "dtypes": ["float32"],
    "timestamp": 1698123456.789,
}


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


# --- Records of one's own ------------------------------------------------------------------------


def manager_of(directory: Path) -> CheckpointMetadataManager:
    return CheckpointMetadataManager(str(directory / "layers.chk"), str(directory / "metadata"))


def record(
    manager: CheckpointMetadataManager, layer: str = "conv", step: int = 100, **changed: Any
) -> None:
    told = {
        "offset": 0,
        "size_bytes": 1024,
        "param_count": 256,
        "shapes": [[64, 3, 3, 3]],
        "dtypes": ["float32"],
        **changed,
    }
    manager.record_layer_save(layer, step, **told)


def test_a_recorded_layer_has_every_field_that_old_code_looks_for(directory: Path) -> None:
    manager = manager_of(directory)
    before = time.time()
    manager.record_layer_save("conv", 100, 0, 1024, 256, [[64, 3, 3, 3]], ["float32"])
    info = manager.get_checkpoint_info("step_100")
    entry = info["layers"]["conv"]
    assert list(entry) == list(ENTRY)
    assert {k: type(v) for k, v in entry.items()} == {k: type(v) for k, v in ENTRY.items()}
    assert {**entry, "timestamp": ENTRY["timestamp"]} == ENTRY
    assert before <= entry["timestamp"] <= time.time()
    assert info["training_step"] == 100
    assert info["timestamp"] == entry["timestamp"]
    assert info["checkpoint_file"] == str(directory / "layers.chk")


def test_layers_and_steps_are_kept_apart_and_listed_in_order(directory: Path) -> None:
    manager = manager_of(directory)
    for step in (100, 20, 3):
        for layer in ("fc", "conv"):
            record(manager, layer, step, offset=step)
    assert manager.list_checkpoints() == ["step_3", "step_20", "step_100"]
    again = manager_of(directory)  # as another process finds them
    for step in (3, 20, 100):
        layers = again.get_checkpoint_info(f"step_{step}")["layers"]
        assert {name: e["offset_in_file"] for name, e in layers.items()} == {
            "fc": step,
            "conv": step,
        }


def test_the_later_of_two_records_of_a_layer_counts(directory: Path) -> None:
    manager = manager_of(directory)
    record(manager, offset=0)
    record(manager, offset=4096)
    assert manager.get_checkpoint_info("step_100")["layers"]["conv"]["offset_in_file"] == 4096


def test_dtypes_may_be_torchs_own_and_shapes_any_sequences(directory: Path) -> None:
    manager = manager_of(directory)
    shapes = (torch.Size([2, 3]), ())
    record(manager, shapes=shapes, dtypes=(torch.bfloat16, "int64"))
    entry = manager.get_checkpoint_info("step_100")["layers"]["conv"]
    assert entry["shapes"] == [[2, 3], []]
    assert entry["dtypes"] == ["bfloat16", "int64"]


def test_a_record_torn_by_a_crash_is_left_out_and_the_next_is_whole(directory: Path) -> None:
    manager = manager_of(directory)
    record(manager, "a")
    (path,) = (directory / "metadata").iterdir()
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert list(manager.get_checkpoint_info("step_100")["layers"]) == ["a"]
        record(manager, "b")
        assert list(manager.get_checkpoint_info("step_100")["layers"]) == ["a", "b"]
        assert path.read_bytes().startswith(whole)
    path.write_bytes(b"x" * 10_000)  # torn, and no whole line at all
    record(manager, "c")
    assert list(manager.get_checkpoint_info("step_100")["layers"]) == ["c"]


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"layer_name": "a"}\n', b"\xff\n"])
def test_a_whole_line_that_is_no_record_is_told_of_with_its_place(
    line: bytes, directory: Path
) -> None:
    manager = manager_of(directory)
    record(manager)
    (path,) = (directory / "metadata").iterdir()
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(CheckpointCorrupt, match=r"step_100\.layers\.jsonl, line 2, is no record"):
        manager.get_checkpoint_info("step_100")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step": -1}, "training_step must be a whole number"),
        ({"step": 1.0}, "training_step must be a whole number"),
        ({"step": True}, "training_step must be a whole number"),
        ({"offset": -4}, "offset must be a whole number"),
        ({"size_bytes": "1024"}, "size_bytes must be a whole number"),
        ({"param_count": None}, "param_count must be a whole number"),
        ({"shapes": [[1], [2]]}, "2 shapes, but 1 dtypes, of 'conv'"),
        ({"shapes": [[2, -3]]}, "shapes of 'conv' cannot have negative extents"),
    ],
)
def test_arguments_that_cannot_be_are_refused_and_nothing_is_written(
    wrong: dict[str, Any], message: str, directory: Path
) -> None:
    manager = manager_of(directory)
    with pytest.raises(ValueError, match=message):
        record(manager, **wrong)
    assert list(directory.iterdir()) == []


def test_of_recorded_layers_it_can_be_told_whether_the_file_is_long_enough(
    directory: Path,
) -> None:
    manager = manager_of(directory)
    record(manager, "a", offset=0, size_bytes=1000)
    record(manager, "b", offset=1000, size_bytes=24)
    assert manager.verify_checkpoint("step_100") is False  # there is no file yet
    (directory / "layers.chk").write_bytes(bytes(1023))
    assert manager.verify_checkpoint("step_100") is False
    (directory / "layers.chk").write_bytes(bytes(1024))
    assert manager.verify_checkpoint("step_100") is True


def test_a_folder_that_cannot_be_made_is_an_error_naming_it(directory: Path) -> None:
    (directory / "metadata").touch()
    with pytest.raises(OSError, match="metadata"):
        record(manager_of(directory))


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_checkpoint_is_an_error_that_lists_those_there_are(
    there: bool, directory: Path
) -> None:
    manager = manager_of(directory)
    if there:
        record(manager, step=7)
    for ask in (manager.get_checkpoint_info, manager.verify_checkpoint):
        with pytest.raises(
            CheckpointNotFound, match="'step_8'.*found: " + ("step_7" if there else "none")
        ):
            ask("step_8")


@pytest.mark.parametrize("wrong", ["", "../step_1", "a/b", ".hidden", "x.partial", 7, None])
def test_what_cannot_be_an_id_is_refused(wrong: Any, directory: Path) -> None:
    manager = manager_of(directory)
    for ask in (manager.get_checkpoint_info, manager.verify_checkpoint):
        with pytest.raises(ValueError, match="cannot name a checkpoint"):
            ask(wrong)


# --- Over a run's directory ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A run with everything there is to save, in blocks of 4 KiB."""
    program = Program(
        optimizer=optimizer(torch.optim.AdamW, lr=0.01),
        options={"block_size_mb": 1 / 256, "save_gradients": True},
    )
    with generators_kept(), memory_directory() as path:
        one = Live(program, path / "run").run(2)
        one.trainer.save_full_checkpoint("mine")
        one.trainer.shutdown()
        yield one


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begin."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}


@pytest.mark.parametrize("checkpoint_id", ["step-00000001", "step-00000002", "mine"])
def test_entries_agree_with_the_files_own_headers(checkpoint_id: str, live: Live) -> None:
    run = Path(live.trainer.checkpoint_dir)
    info = CheckpointMetadataManager(run).get_checkpoint_info(checkpoint_id)
    step = 1 if checkpoint_id.endswith("1") else 2
    assert info["checkpoint_id"] == checkpoint_id
    assert info["training_step"] == step
    assert Path(info["path"]) == run / checkpoint_id
    headers = {}
    told: dict[str, set[str]] = {}
    for name, size in info["files"].items():
        assert os.path.getsize(run / checkpoint_id / name) == size
        headers[name], told[name] = header_of(run / checkpoint_id / name), set()
    assert {"embed", "(root)", "norm", "frozen"} <= set(info["layers"])
    for entry in info["layers"].values():
        assert set(ENTRY) <= set(entry)
        assert entry["checkpoint_id"] == checkpoint_id
        assert entry["training_step"] == step
        assert entry["timestamp"] == info["timestamp"]
        own = [t for t in entry["tensors"] if t["file"] == "model.safetensors"]
        assert entry["offset_in_file"] == min(t["offset"] for t in own)
        assert entry["size_bytes"] == sum(t["bytes"] for t in own)
        assert entry["total_bytes"] == sum(t["bytes"] for t in entry["tensors"])
        assert entry["shapes"] == [t["shape"] for t in own]
        assert entry["dtypes"] == [t["dtype"] for t in own]
        for tensor in entry["tensors"]:
            header, data_begin = headers[tensor["file"]]
            there = header[tensor["name"]]
            begin, end = there["data_offsets"]
            assert (data_begin + begin, end - begin) == (tensor["offset"], tensor["bytes"])
            assert there["shape"] == tensor["shape"]
            assert there["dtype"] == DTYPES[tensor["dtype"]]
            told[tensor["file"]].add(tensor["name"])
    told.pop("extra.safetensors")  # of no layer
    assert told == {name: set(headers[name][0]) for name in told}


def test_a_layers_size_is_that_of_its_tensors_shapes_and_dtypes(live: Live) -> None:
    manager = CheckpointMetadataManager(live.trainer.checkpoint_dir)
    entry = manager.get_checkpoint_info("mine")["layers"]["norm"]
    sizes = [
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(entry["shapes"], entry["dtypes"], strict=True)
    ]
    module = live.model.get_submodule("norm")
    stored = [*module.parameters(), *module.buffers()]
    assert entry["size_bytes"] == sum(sizes) == sum(t.nbytes for t in stored)
    assert entry["total_bytes"] > entry["size_bytes"]  # AdamW keeps two values more of each


def test_parameters_alone_are_counted_by_layer(live: Live) -> None:
    layers = CheckpointMetadataManager(live.trainer.checkpoint_dir).get_checkpoint_info("mine")[
        "layers"
    ]
    counted = {name: entry["param_count"] for name, entry in layers.items()}
    for name, module in live.model.named_modules():
        own = [t.numel() for t in module.parameters(False)]
        if (
            own or [*module.buffers(False)]
        ) and name != "head":  # its only tensor is the embedding's
            assert counted.pop(name or "(root)") == sum(own), name
    assert not counted


@pytest.mark.parametrize("checkpoint_id", ["step-00000002", "mine"])
def test_checksums_are_those_of_the_files_bytes_and_of_the_layers_blocks(
    checkpoint_id: str, live: Live
) -> None:
    run = Path(live.trainer.checkpoint_dir)
    info = CheckpointMetadataManager(run).get_checkpoint_info(checkpoint_id)
    block = 4096
    for name, entry in info["layers"].items():
        wanted: dict[str, set[int]] = {}
        for tensor in entry["tensors"]:
            touched = {
                at // block for at in range(tensor["offset"], tensor["offset"] + tensor["bytes"])
            }
            wanted.setdefault(tensor["file"], set()).update(touched)
        assert {file: set(sums) for file, sums in entry["checksums"].items()} == wanted, name
        for file, sums in entry["checksums"].items():
            data = (run / checkpoint_id / file).read_bytes()
            for number, told in sums.items():
                assert crc32c(data[number * block : (number + 1) * block]) == told


def test_a_tensor_without_elements_has_a_part_in_no_block(directory: Path) -> None:
    """Where it stands at the file's end there is no block that it could be in."""
    model = nn.Linear(2, 2)
    model.register_buffer("nothing", torch.zeros(0, 3))
    # Up to the end of a block: whatever the header takes, one of these fills it.
    model.fill = nn.Parameter(torch.zeros(4096 // 4 * 3))
    trainer = LayerwiseCheckpointTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        checkpoint_dir=directory,
        **{**LITTLE_MEMORY, "block_size_mb": 1 / 256},
    )
    model(torch.ones(1, 2)).sum().backward()
    trainer.step()
    trainer.shutdown()
    info = CheckpointMetadataManager(directory).get_checkpoint_info("step_1")
    (layer,) = info["layers"].values()
    (nothing,) = [t for t in layer["tensors"] if t["name"] == "nothing"]
    assert nothing["bytes"] == 0
    assert nothing["offset"] == info["files"]["model.safetensors"]
    assert nothing["offset"] % 4096 == 0
    blocks = nothing["offset"] // 4096
    assert sorted(layer["checksums"]["model.safetensors"]) == list(range(blocks))


@pytest.mark.parametrize("at", [0, 9, 5000, -1])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "manifest.json", "checksums.bin"]
)
def test_one_flipped_bit_anywhere_is_seen(file: str, at: int, live: Live) -> None:
    run = Path(live.trainer.checkpoint_dir)
    manager = CheckpointMetadataManager(run)
    path = run / "step-00000002" / file
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[min(at, len(whole) // 2)] ^= 4
    try:
        path.write_bytes(damaged)
        assert manager.verify_checkpoint("step_2") is False
        assert manager.verify_checkpoint("step-00000001") is True
    finally:
        path.write_bytes(whole)
    assert manager.verify_checkpoint("step_2") is True


def test_steps_are_found_by_their_old_names_too(live: Live) -> None:
    manager = CheckpointMetadataManager(live.trainer.checkpoint_dir)
    assert manager.list_checkpoints() == ["step-00000001", "step-00000002", "mine"]
    assert manager.get_checkpoint_info("step_2") == manager.get_checkpoint_info("step-00000002")
    assert ModelRecovery(live.trainer.checkpoint_dir).verify("step_2")
    for ask in (manager.get_checkpoint_info, manager.verify_checkpoint):
        with pytest.raises(CheckpointNotFound, match=r"step_3.*found: step-00000001, .*mine"):
            ask("step_3")


def test_information_about_the_run_comes_with_a_checkpoint(live: Live) -> None:
    info = live.trainer.metadata_manager.get_checkpoint_info("step_2")
    assert info["config"]["save_gradients"] is True
    assert info["versions"] == {"torch": torch.__version__}
    assert info["metrics"] == {"loss": live.losses[2]}
    assert abs(info["timestamp"] - time.time()) < 3600


# --- Which directory -----------------------------------------------------------------------------


def save_in(directory: Path, step: int) -> None:
    adapter = PCCheckAdapter(checkpoint_dir=directory, **LITTLE_MEMORY)
    adapter.save_layers_batch([SaveTask("a", step, [torch.ones(4)])])
    adapter.shutdown()


def test_a_run_that_comes_later_is_found(directory: Path) -> None:
    managers = [
        CheckpointMetadataManager(directory / "run.chk", directory / "metadata"),
        CheckpointMetadataManager("elsewhere.chk", directory / "run"),
        CheckpointMetadataManager("elsewhere.chk", directory / "run" / "metadata"),
    ]
    assert [manager.list_checkpoints() for manager in managers] == [[], [], []]
    save_in(directory / "run", 1)
    assert [m.list_checkpoints() for m in managers] == [["step-00000001"]] * 3


@pytest.mark.parametrize("name", ["run.v2", "metadata", "run"])
def test_a_trainers_manager_looks_into_that_trainers_directory(name: str, directory: Path) -> None:
    save_in(directory / "run", 9)  # whose name is another's without its suffix
    with Live(Program(options={"keep_last": 1}), directory / name).trainer as trainer:
        assert trainer.metadata_manager.directory == str(directory / name)
        assert trainer.recovery.directory == str(directory / name)


def test_recorded_layers_and_a_runs_checkpoints_are_listed_together(directory: Path) -> None:
    save_in(directory / "run", 5)
    manager = CheckpointMetadataManager(directory / "run.chk", directory / "metadata")
    record(manager, step=6)
    assert manager.list_checkpoints() == ["step-00000005", "step_6"]
    assert manager.get_checkpoint_info("step_5")["training_step"] == 5
    assert manager.get_checkpoint_info("step_6")["training_step"] == 6
