"""A checkpoint read with safetensors, json and a dozen lines of struct, as cpp/format.md has it."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import Live, Program, Zoo, generators_kept, optimizer, raw
from safetensors.torch import load_file

from pccheck_ext import CheckpointCorrupt, ModelRecovery


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@dataclass
class Seal:
    block_bytes: int
    step: int
    run_id: bytes
    save_id: bytes
    manifest: tuple[int, int]  # size, CRC32C
    files: dict[str, tuple[int, list[int]]]  # size, CRC32C of each block


def read_seal(path: Path) -> Seal:
    """The reader that the format page promises is easily written."""
    data = path.read_bytes()
    assert struct.unpack("<I", data[-4:]) == (crc32c(data[:-4]),)
    magic, version, block, step, run, save, size, crc, count = struct.unpack_from(
        "<8sIIQ16s16sQII", data
    )
    assert (magic, version) == (b"PCCKSUMS", 1)
    seal, at = Seal(block, step, run, save, (size, crc), {}), 72
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        name, size = struct.unpack_from(f"<{length}sQ", data, at + 2)
        at += 2 + length + 8
        blocks = -(-size // block)
        seal.files[name.decode()] = size, list(struct.unpack_from(f"<{blocks}I", data, at))
        at += 4 * blocks
    assert at == len(data) - 4
    return seal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two steps with everything there is to save, in blocks of 4 KiB."""
    program = Program(
        optimizer=optimizer(torch.optim.AdamW, lr=0.01),
        averaged=True,
        options={"block_size_mb": 1 / 256, "save_gradients": True},
    )
    with generators_kept():
        live = Live(program, tmp_path_factory.mktemp("run")).run(2)
        live.trainer.shutdown()
        yield live


@pytest.fixture
def checkpoint(run: Live) -> Path:
    return Path(run.trainer.checkpoint_dir) / "step-00000002"


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    found = json.loads((checkpoint / "manifest.json").read_bytes())
    assert isinstance(found, dict)
    return found


def test_the_checksum_is_the_one_that_the_page_names() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_every_block_of_every_file_has_the_checksum_told(checkpoint: Path) -> None:
    seal = read_seal(checkpoint / "checksums.bin")
    assert seal.block_bytes == 4096
    assert sorted([*seal.files, "checksums.bin", "manifest.json"]) == sorted(os.listdir(checkpoint))
    for name, (size, sums) in seal.files.items():
        data = (checkpoint / name).read_bytes()
        assert len(data) == size
        blocks = [data[at : at + seal.block_bytes] for at in range(0, size, seal.block_bytes)]
        assert [crc32c(block) for block in blocks] == sums
    manifest = (checkpoint / "manifest.json").read_bytes()
    assert seal.manifest == (len(manifest), crc32c(manifest))


def test_manifest_and_seal_agree_on_which_checkpoint_it_is(checkpoint: Path) -> None:
    seal, manifest = read_seal(checkpoint / "checksums.bin"), manifest_of(checkpoint)
    assert (manifest["format"], manifest["version"]) == ("pccheck", 1)
    assert manifest["checkpoint_id"] == checkpoint.name
    assert manifest["training_step"] == seal.step == 2
    assert manifest["run_id"] == seal.run_id.hex()
    assert manifest["save_id"] == seal.save_id.hex()
    other = read_seal(checkpoint.parent / "step-00000001" / "checksums.bin")
    assert other.run_id == seal.run_id
    assert other.save_id != seal.save_id
    assert other.step == 1


def test_the_manifest_tells_where_each_tensor_is_and_of_which_layer(
    run: Live, checkpoint: Path
) -> None:
    manifest = manifest_of(checkpoint)
    stored = {
        path.name: load_file(path)
        for path in checkpoint.iterdir()
        if path.name.endswith(".safetensors")
    }
    assert set(stored) == {f"{n}.safetensors" for n in ("model", "optimizer", "gradients", "extra")}
    told: dict[str, set[str]] = {name: set() for name in stored}
    entries = [entry for layer in manifest["layers"] for entry in layer["tensors"]]
    for entry in [*entries, *manifest["extra_tensors"]]:
        tensor = stored[entry["file"]][entry["name"]]
        data = (checkpoint / entry["file"]).read_bytes()
        assert data[entry["offset"] : entry["offset"] + entry["bytes"]] == raw(tensor)
        assert entry["shape"] == list(tensor.shape)
        assert f"torch.{entry['dtype']}" == str(tensor.dtype)
        assert entry["device"] == "cpu"
        assert entry["name"] not in told[entry["file"]]
        told[entry["file"]].add(entry["name"])
    assert told == {name: set(tensors) for name, tensors in stored.items()}

    for layer in manifest["layers"]:
        assert layer["size_bytes"] == sum(entry["bytes"] for entry in layer["tensors"])
        for entry in layer["tensors"]:
            assert entry["name"].startswith(layer["name"]) or layer["name"] == "(root)"
    by_layer = {layer["name"]: layer["param_count"] for layer in manifest["layers"]}
    assert by_layer["embed"] == run.model.embed.weight.numel()
    assert list(by_layer) == [name for name in run.trainer.update_order if name in by_layer]
    assert manifest["aliases"] == {"head.weight": "embed.weight"}
    assert manifest["optimizer"]["type"] == "AdamW"
    names = [name for group in manifest["optimizer"]["parameters"] for name in group]
    assert sorted(names) == sorted(name for name, _ in Zoo().named_parameters())


def test_payload_files_end_at_4_kib_and_tensors_stand_aligned_without_holes(
    checkpoint: Path,
) -> None:
    for name in ("model", "optimizer", "gradients", "extra"):
        path = checkpoint / f"{name}.safetensors"
        data = path.read_bytes()
        size = 8 + struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:size])
        metadata = header.pop("__metadata__")
        assert metadata["format"] == "pt"
        extents = sorted((entry["data_offsets"], entry["dtype"]) for entry in header.values())
        assert size % 8 == 0
        assert extents[0][0][0] == 0
        assert extents[-1][0][1] == len(data) - size
        for ((_, end), _), ((begin, _), _) in pairwise(extents):
            assert begin == end
        widths = {"F64": 8, "I64": 8, "F32": 4, "U32": 4, "U8": 1}
        for (begin, _), dtype in extents:
            assert begin % widths[dtype] == 0
        found = [widths[dtype] for _, dtype in extents]
        assert found == sorted(found, reverse=True)
        if (len(data) - size) % 8 == 0:
            assert len(data) % 4096 == 0
        else:
            assert size % 4096 == 0


def test_a_checkpoints_files_are_plain_files_of_the_users(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        found = path.lstat()
        assert stat.S_ISREG(found.st_mode)
        assert found.st_nlink == 1
        assert found.st_mode & 0o400


def reseal(checkpoint: Path, **changed: Any) -> None:
    """Writes checksums.bin anew, right in itself, with some of it changed."""
    path = checkpoint / "checksums.bin"
    seal = read_seal(path)
    manifest = (checkpoint / "manifest.json").read_bytes()
    seal.manifest = len(manifest), crc32c(manifest)
    for key, value in changed.items():
        setattr(seal, key, value)
    data = struct.pack(
        "<8sIIQ16s16sQII",
        b"PCCKSUMS",
        1,
        seal.block_bytes,
        seal.step,
        seal.run_id,
        seal.save_id,
        *seal.manifest,
        len(seal.files),
    )
    for name, (size, sums) in seal.files.items():
        encoded = name.encode()
        data += struct.pack(f"<H{len(encoded)}sQ", len(encoded), encoded, size)
        data += struct.pack(f"<{len(sums)}I", *sums)
    path.write_bytes(data + struct.pack("<I", crc32c(data)))


def copied(checkpoint: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_seal_written_after_the_page_is_accepted(checkpoint: Path, tmp_path: Path) -> None:
    copy = copied(checkpoint, tmp_path / "step-00000002")
    before = (copy / "checksums.bin").read_bytes()
    reseal(copy)
    assert (copy / "checksums.bin").read_bytes() == before
    assert ModelRecovery(tmp_path).verify("step-00000002")


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 3},
        {"run_id": bytes(16)},
        {"save_id": bytes(16)},
        {"block_bytes": 8192},
        {"block_bytes": 0},
        {"block_bytes": 4095},
        {"files": {}},
        {"files": {"../../etc/passwd": (0, [])}},
        {"files": {"model.safetensors": (1 << 60, [])}},
        {"manifest": (1 << 62, 0)},
    ],
    ids=str,
)
def test_a_seal_that_tells_something_else_is_no_seal(
    changed: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    copy = copied(checkpoint, tmp_path / "step-00000002")
    reseal(copy, **changed)
    recovery = ModelRecovery(tmp_path)
    assert not recovery.verify("step-00000002")
    assert recovery.get_latest_checkpoint() is None
    with pytest.raises(CheckpointCorrupt, match="step-00000002"):
        recovery.load_checkpoint(Zoo(), "step-00000002")


def test_a_sound_checkpoint_under_another_steps_name_is_not_that_steps(
    checkpoint: Path, tmp_path: Path
) -> None:
    copied(checkpoint, tmp_path / "step-00000007")
    recovery = ModelRecovery(tmp_path)
    assert not recovery.verify("step-00000007")
    assert recovery.get_latest_checkpoint() is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 1', '"version": 2'),
        ('"format": "pccheck"', '"format": "other"'),
        ('"step-00000002"', '"step-00000003"'),
        ('"offset": ', '"offset": 9'),
        ('"dtype": "float32"', '"dtype": "float64"'),
        ('"dtype": "float32"', '"dtype": "ops"'),
        ('"file": "model.safetensors"', '"file": "../model.safetensors"'),
        ('"shape": [', '"shape": [-'),
        ('"layers"', '"leiers"'),
    ],
)
def test_a_manifest_that_is_sealed_and_wrong_is_an_error_and_changes_nothing(
    old: str, new: str, checkpoint: Path, tmp_path: Path
) -> None:
    copy = copied(checkpoint, tmp_path / "step-00000002")
    path = copy / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    reseal(copy)
    model = Zoo()
    before = [raw(p) for p in model.state_dict().values()]
    with pytest.raises(CheckpointCorrupt, match="step-00000002"):
        ModelRecovery(tmp_path).load_checkpoint(model, "step-00000002")
    assert [raw(p) for p in model.state_dict().values()] == before
