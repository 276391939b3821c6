"""torch.ops.pccheck: one safetensors file, written and read in parallel."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _models import assert_same, memory_directory
from safetensors.torch import load_file, save_file
from torch import Tensor

import pccheck_ext
from pccheck_ext import CheckpointCorrupt, CheckpointError

BLOCK_BYTES = 4 << 20


def save(tensors: dict[str, Tensor], path: Path, chunk_count: int = 0, wait: bool = True) -> int:
    ticket = torch.ops.pccheck.save_chunks(
        list(tensors.values()), list(tensors), str(path), chunk_count, wait
    )
    assert isinstance(ticket, int)
    return ticket


def load(tensors: dict[str, Tensor], path: Path) -> None:
    nothing = torch.ops.pccheck.load_chunks(list(tensors.values()), list(tensors), str(path))
    assert nothing is None


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(t, memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }


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


def some_of_every_type() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for dtype in TYPES:
        high = 2 if dtype is torch.bool else 256
        bits = torch.randint(0, high, (105 * dtype.itemsize,), dtype=torch.uint8)
        name = str(dtype).removeprefix("torch.")
        tensors[name] = bits.view(dtype).reshape(3, 5, 7)
        tensors[f"{name}.number"] = bits[: dtype.itemsize].view(dtype).reshape(())
        tensors[f"{name}.empty"] = torch.empty(4, 0, dtype=dtype)
        tensors[f"{name}.turned"] = bits.view(dtype).reshape(3, 5, 7).permute(2, 0, 1)
    return tensors


@pytest.mark.parametrize("chunk_count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("wait", [True, False])
def test_what_is_saved_is_what_safetensors_and_load_chunks_read(
    chunk_count: int, wait: bool, directory: Path
) -> None:
    tensors = some_of_every_type()
    tensors["large"] = torch.randn(BLOCK_BYTES // 2 + 11)  # two blocks and a little
    tensors["bytes"] = torch.arange(BLOCK_BYTES + 3).to(torch.uint8)
    path = directory / "all.safetensors"
    ticket = save(tensors, path, chunk_count, wait)
    if wait:
        assert path.exists()
    pccheck_ext.wait(ticket)
    pccheck_ext.wait(ticket)
    assert_same(load_file(path), tensors)
    found = blank(tensors)
    load(found, path)
    assert_same(found, tensors)
    assert os.listdir(directory) == ["all.safetensors"]


def test_the_bytes_do_not_depend_on_the_number_of_chunks(directory: Path) -> None:
    tensors = {"a": torch.randn(3 * BLOCK_BYTES // 4 + 5), "b": torch.arange(7)}
    files = set()
    for chunk_count in (0, 1, 2, 4096):
        save(tensors, directory / "one", chunk_count)
        files.add((directory / "one").read_bytes())
    assert len(files) == 1


def test_inputs_may_change_as_soon_as_the_call_returns(directory: Path) -> None:
    tensors = {f"{i}": torch.full((BLOCK_BYTES // 4 + i,), float(i)) for i in range(4)}
    tensors["turned"] = torch.ones(300, 200).t()
    wanted = {name: t.clone() for name, t in tensors.items()}
    tickets = []
    for i in range(3):
        tickets.append(save(tensors, directory / f"{i}", wait=False))
        for t in tensors.values():
            t.add_(1)
    for i, ticket in enumerate(tickets):
        pccheck_ext.wait(ticket, timeout_s=60)
        assert_same(load_file(directory / f"{i}"), {n: t + i for n, t in wanted.items()})


def test_loading_reads_only_what_is_asked_for_and_keeps_the_tensors(directory: Path) -> None:
    tensors = {"a": torch.randn(5, 4), "b": torch.randn(6), "c": torch.randn(2, 2)}
    save(tensors, directory / "f")
    with torch.inference_mode():
        inferred = torch.zeros(6)
    given = {
        "c": torch.nn.Parameter(torch.zeros(2, 2)),
        "a": torch.zeros(4, 5).t(),
        "b": inferred,
    }
    versions = given["c"]._version, given["a"]._version
    places = [t.data_ptr() for t in given.values()]
    load(given, directory / "f")
    for name, t in given.items():
        assert torch.equal(t, tensors[name])
    assert [t.data_ptr() for t in given.values()] == places
    assert given["c"].requires_grad
    assert given["c"]._version > versions[0]
    assert given["a"]._version > versions[1]


def test_a_conjugated_or_negated_view_is_saved_by_value(directory: Path) -> None:
    z = torch.randn(4, dtype=torch.complex64)
    tensors = {"conjugated": z.conj(), "negative": z.conj().imag}
    save(tensors, directory / "f")
    wanted = {name: t.clone().resolve_conj().resolve_neg() for name, t in tensors.items()}
    assert_same(load_file(directory / "f"), wanted)
    found = blank(wanted)
    load(found, directory / "f")
    assert_same(found, wanted)


def test_a_file_is_replaced_in_one_piece(directory: Path) -> None:
    path = directory / "f"
    save({"a": torch.zeros(10)}, path)
    old = path.open("rb")
    before = path.read_bytes()
    save({"a": torch.ones(10_000)}, path)
    with old:
        assert old.read() == before  # who has it open keeps what it has
    assert torch.equal(load_file(path)["a"], torch.ones(10_000))
    assert os.listdir(directory) == ["f"]


def test_saves_of_many_threads_do_not_meet(directory: Path) -> None:
    failed = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                own = {"a": torch.full((1000,), float(10 * number + turn))}
                pccheck_ext.wait(save(own, directory / f"{number}", wait=turn % 2 == 0))
                save(own, directory / "shared", wait=False)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    pccheck_ext.wait(save({"a": torch.zeros(1)}, directory / "last", wait=False))
    for number in range(4):
        assert torch.equal(
            load_file(directory / f"{number}")["a"], torch.full((1000,), 10.0 * number + 4)
        )
    assert load_file(directory / "shared")["a"].unique().numel() == 1
    assert sorted(os.listdir(directory)) == ["0", "1", "2", "3", "last", "shared"]


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "names", "chunk_count", "error", "message"),
    [
        ([torch.ones(1)], ["a", "b"], 0, ValueError, "1 tensors but 2 names"),
        ([torch.ones(1), torch.ones(1)], ["a", "a"], 0, ValueError, "'a'"),
        ([torch.ones(1)], ["a"], -1, ValueError, "chunk_count must be .*, not -1"),
        ([torch.ones(1)], ["a"], 5000, ValueError, "chunk_count must be .*, not 5000"),
        ([torch.ones(1, dtype=torch.complex128)], ["odd"], 0, TypeError, "'odd'.*ComplexDouble"),
        ([torch.ones(1)], ["__metadata__"], 0, ValueError, "__metadata__"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    tensors: list[Tensor],
    names: list[str],
    chunk_count: int,
    error: type[Exception],
    message: str,
    directory: Path,
) -> None:
    with pytest.raises(error, match=message):
        torch.ops.pccheck.save_chunks(tensors, names, str(directory / "f"), chunk_count, True)
    assert os.listdir(directory) == []


def test_a_folder_that_is_not_there_is_named(directory: Path) -> None:
    path = directory / "missing" / "f"
    with pytest.raises(FileNotFoundError, match="missing"):
        save({"a": torch.ones(1)}, path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load({"a": torch.ones(1)}, path)
    with pytest.raises(FileNotFoundError, match="/f: "):
        load({"a": torch.ones(1)}, directory / "f")


def test_a_save_that_fails_later_is_told_by_wait_and_leaves_nothing(directory: Path) -> None:
    (directory / "f").mkdir()
    ticket = save({"a": torch.ones(1)}, directory / "f", wait=False)
    with pytest.raises(CheckpointError, match=r"/f"):
        pccheck_ext.wait(ticket)
    pccheck_ext.wait(ticket)  # told once
    with pytest.raises((OSError, RuntimeError), match=r"/f"):
        save({"a": torch.ones(1)}, directory / "f", wait=True)
    assert os.listdir(directory) == ["f"]
    save({"a": torch.ones(1)}, directory / "g")  # and the next goes well


@pytest.mark.parametrize("ticket", [0, -1, 1 << 40])
def test_a_ticket_that_was_never_issued_is_refused(ticket: int) -> None:
    with pytest.raises(ValueError, match=f"no ticket {ticket}"):
        pccheck_ext.wait(ticket)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": torch.zeros(6)}, r"'a' is F32\s?\[2, 3\] in .*given for it is F32\s?\[6\]"),
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, r"F32.*F64"),
        ({"b": torch.zeros(2, 3)}, "no tensor 'b'"),
    ],
)
def test_tensors_that_do_not_fit_the_file_are_refused_unchanged(
    given: dict[str, Tensor], message: str, directory: Path
) -> None:
    save({"a": torch.ones(2, 3)}, directory / "f")
    with pytest.raises(ValueError, match=message):
        load(given, directory / "f")
    assert not any(t.any() for t in given.values())


def flip(data: bytearray, position: int) -> None:
    data[position] ^= 1


def header_bytes(data: bytearray) -> int:
    return 8 + struct.unpack_from("<Q", data)[0]


DAMAGES: dict[str, Callable[[bytearray], None]] = {
    "the first byte of the data": lambda data: flip(data, header_bytes(data)),
    "the last byte": lambda data: flip(data, len(data) - 1),
    "a space of the header": lambda data: flip(data, header_bytes(data) - 1),
    "a name in the header": lambda data: flip(data, data.index(b'"a"') + 1),
    "a checksum": lambda data: flip(data, data.index(b"pccheck.crc32c") + 18),
    "cut short by one": lambda data: data.__delitem__(-1),
    "longer by one": lambda data: data.append(0),
    "nothing left": lambda data: data.clear(),
    "nothing but the header": lambda data: data.__delitem__(slice(header_bytes(data), None)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_anywhere_is_found(damage: str, directory: Path) -> None:
    path = directory / "f"
    save({"a": torch.ones(BLOCK_BYTES // 4 + 100)}, path)
    data = bytearray(path.read_bytes())
    DAMAGES[damage](data)
    path.write_bytes(data)
    given = torch.zeros(BLOCK_BYTES // 4 + 100)
    with pytest.raises(CheckpointCorrupt, match=r"/f\b"):
        load({"a": given}, path)
    if damage not in ("the first byte of the data", "the last byte"):  # found while it is read
        assert not given.any()


def test_a_damaged_block_harms_only_those_who_need_it(directory: Path) -> None:
    tensors = {"a": torch.ones(BLOCK_BYTES // 4), "b": torch.ones(BLOCK_BYTES // 4)}
    save(tensors, directory / "f")
    data = bytearray((directory / "f").read_bytes())
    flip(data, len(data) - 1)
    (directory / "f").write_bytes(data)
    load({"a": torch.zeros(BLOCK_BYTES // 4)}, directory / "f")
    with pytest.raises(CheckpointCorrupt):
        load({"b": torch.zeros(BLOCK_BYTES // 4)}, directory / "f")


def test_a_file_of_other_making_has_no_checksums_and_is_refused(directory: Path) -> None:
    save_file({"a": torch.ones(3)}, directory / "f")
    with pytest.raises(CheckpointCorrupt, match=r"/f: .*checksums"):
        load({"a": torch.zeros(3)}, directory / "f")


def test_importing_the_library_changes_no_error_of_torch() -> None:
    with pytest.raises(IndexError):
        torch.ops.aten.select.int(torch.zeros(3), 5, 0)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.ops.aten.linalg_cholesky(-torch.eye(2))
    with pytest.raises(NotImplementedError):
        torch.ops.aten.histc(torch.zeros(3, dtype=torch.int32))


# --- Checksums as the format page has them -------------------------------------------------------


def test_the_header_tells_blocks_and_is_sealed_itself(directory: Path) -> None:
    path = directory / "f"
    save({"a": torch.ones(BLOCK_BYTES // 4 + 1)}, path)
    data = path.read_bytes()
    size = header_bytes(bytearray(data))
    metadata = json.loads(data[8:size])["__metadata__"]
    assert size % 4096 == 0
    assert metadata["format"] == "pt"
    assert int(metadata["pccheck.block_bytes"]) == BLOCK_BYTES
    assert len(metadata["pccheck.crc32c"]) == 2 * 8
    assert len(metadata["pccheck.header_crc32c"]) == 8


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_saves_at_each_call_once_although_the_result_is_unused(
    backend: str, directory: Path
) -> None:
    path = str(directory / "f")

    def compute(x: Tensor) -> Tensor:
        y = torch.sin(x) * 2
        torch.ops.pccheck.save_chunks([y, x], ["y", "x"], path, 0, True)
        return y + torch.cos(y)

    torch._dynamo.reset()
    compiled = torch.compile(compute, backend=backend)
    issued = save({"a": torch.ones(1)}, directory / "before")
    for turn in range(1, 4):
        x = torch.randn(4, 4)
        y = torch.sin(x) * 2
        assert torch.equal(compiled(x), y + torch.cos(y))
        assert_same(load_file(path), {"y": y, "x": x})
        os.unlink(path)
        assert save({"a": torch.ones(1)}, directory / "after") == issued + 2 * turn
    torch._dynamo.reset()


def test_a_compiled_function_may_use_the_ticket_and_load(directory: Path) -> None:
    path = str(directory / "f")

    def compute(x: Tensor, into: Tensor) -> tuple[Tensor, int]:
        ticket = torch.ops.pccheck.save_chunks([x + 1], ["a"], path, 0, True)
        torch.ops.pccheck.load_chunks([into], ["a"], path)
        return into * 2, ticket

    torch._dynamo.reset()
    into = torch.zeros(3)
    doubled, ticket = torch.compile(compute, backend="eager")(torch.ones(3), into)
    assert doubled.tolist() == [4, 4, 4]
    assert into.tolist() == [2, 2, 2]
    assert ticket > 0
    torch._dynamo.reset()
