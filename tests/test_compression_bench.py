"""The study of codecs: grouping loses no bit, the model adds up, a codec that lies is caught."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # bench/ is no package: its programs find each other there

coders = importlib.import_module("_coders")
quiet = importlib.import_module("_quiet")
saver = importlib.import_module("_saver")
states = importlib.import_module("_states")
study = importlib.import_module("_study")

WIDTHS = ("u2", "u4")


def some_words(dtype: str, count: int, seed: int = 0) -> Any:
    """Any bits at all: infinities, NaNs with a payload and negative zeros among them."""
    bits = 8 * np.dtype(dtype).itemsize
    words = np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=dtype)
    edges = np.array([0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1], dtype)
    words[: min(count, len(edges))] = edges[:count]
    return words


# --- Grouping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 4096, 100_003])
def test_grouping_by_planes_brings_every_bit_back(dtype: str, count: int) -> None:
    words = some_words(dtype, count)
    before = words.copy()
    assert np.array_equal(coders.merge(coders.planes(words), dtype, count), words)
    assert np.array_equal(words, before)


def test_byte_planes_are_the_bytes_in_order_of_their_weight() -> None:
    found = coders.planes(np.array([0x04030201, 0x08070605], "u4"))
    assert [plane.tolist() for plane in found] == [[1, 5], [2, 6], [3, 7], [4, 8]]


@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_difference_brings_every_bit_back_and_is_small_where_little_changed(dtype: str) -> None:
    words, previous = some_words(dtype, 5000, 1), some_words(dtype, 5000, 2)
    folded = coders.difference(words, previous)
    assert np.array_equal(coders.add_difference(folded, previous), words)
    near = np.array([10, 9, 11, 8], dtype)
    assert coders.difference(near, np.full(4, 10, dtype)).tolist() == [0, 1, 2, 3]


# --- Codecs ---------------------------------------------------------------------------------------

ZSTD = [name for name, codec in coders.CODECS.items() if codec.package == "zstandard"]


@pytest.mark.parametrize("name", ZSTD)
@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_codec_brings_every_bit_back_and_leaves_its_input_alone(name: str, dtype: str) -> None:
    codec = coders.CODECS[name]
    noise = some_words(dtype, 10_001)
    like = study.words_of(torch.randn(10_001).to({"u2": torch.bfloat16, "u4": torch.float}[dtype]))
    for words, previous in ((noise, some_words(dtype, 10_001, 3)), (like, np.roll(like, 1))):
        before = words.copy()
        coded = codec.encode(words, previous)
        back = codec.decode(coded, words.dtype, len(words), previous)
        assert np.array_equal(back, before)
        assert np.array_equal(words, before)


def test_a_block_that_coding_does_not_make_smaller_is_stored() -> None:
    words = some_words("u4", 50_000)
    coded = coders.CODECS["planes, zstd 1"].encode(words)
    assert coded.stored
    assert coded.size_bytes == words.nbytes


def test_a_delta_without_the_step_before_is_refused() -> None:
    with pytest.raises(ValueError, match="block of the step before"):
        coders.CODECS["xor, planes, zstd 1"].encode(some_words("u2", 10))


class ForgetsTheLastBit:
    def encode(self, words: Any) -> list[Any]:
        return [np.packbits(words.view(np.uint8) & 0)]

    def decode(self, parts: list[Any], dtype: Any, count: int) -> Any:
        return np.zeros(count, dtype)


def test_a_codec_that_changes_a_bit_is_not_timed() -> None:
    lossy = coders.Codec("lossy", "zstandard", lambda width: ForgetsTheLastBit())
    flat = {"weights": torch.tensor([0.0] * 63 + [1e-45])}
    sample = states.Sample("fp32", 2, 1e-3, 0.0, flat, flat)
    bench = SimpleNamespace(rounds=1, progress=print)
    with pytest.raises(AssertionError, match="lossy does not bring weights of fp32, step 2 back"):
        study.study_codecs(bench, sample, [lossy])


# --- The model ------------------------------------------------------------------------------------


def test_coding_that_costs_nothing_gains_the_ratio() -> None:
    assert study.gain(1.0, 0.0, share=0.5, blocks=10) == 2.0


def test_the_slower_of_coding_and_writing_decides_but_for_one_block_of_the_other() -> None:
    assert study.gain(1.0, 2.0, share=0.5, blocks=10) == pytest.approx(1 / 2.05)
    assert study.gain(1.0, 0.2, share=0.5, blocks=10) == pytest.approx(1 / 0.52)


def test_one_block_cannot_be_coded_while_it_is_written() -> None:
    assert study.gain(1.0, 0.3, 0.6, 1) == pytest.approx(1 / 0.9)


# --- When to measure ------------------------------------------------------------------------------


def gate(patience_s: float, monkeypatch: pytest.MonkeyPatch, **seen: list[float]) -> Any:
    """A Quiet whose machine shows these figures, one after the other; sleeping takes no time."""
    for name, figures in seen.items():
        monkeypatch.setattr(quiet, name, lambda *_, left=list(figures): left.pop(0))
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: None)
    return quiet.Quiet(patience_s)


def test_a_measurement_waits_for_its_cores_until_patience_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle = [0.5, 1.9, 0.5, 0.5]  # too little, enough; then never enough
    found = gate(0.5, monkeypatch, idle_cores=idle, others_s=[0.0] * 4)
    assert [found.measure(2, lambda: 7.0) for _ in range(2)] == [7.0, 7.0]
    assert found.patience_s <= 0
    assert str(found).startswith("1 of 2 measurements were made on busy cores, 0 were discarded")
    assert str(quiet.Quiet(0.0)) == "not looked for"


def test_a_long_measurement_during_which_others_worked_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 2.0, 2.0, 4.0])
    found = gate(10.0, monkeypatch, idle_cores=[2.0] * 2, others_s=[0.0, 1.0, 1.0, 1.1])
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: next(clock))
    figures = iter([9.0, 1.0])
    assert found.measure(2, lambda: next(figures)) == 1.0
    assert found.patience_s == 8.0
    assert str(found) == (
        "0 of 1 measurements were made on busy cores, 1 were discarded and made again"
    )


def test_this_process_and_its_children_are_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text("cpu  500 30 70 9000 10 1 2 3 0 0\ncpu0 1 1 1\n")
    mine, other = quiet.os.getpgrp(), quiet.os.getpgrp() + 1
    for process, group in ((101, mine), (102, mine), (103, other)):
        (tmp_path / str(process)).mkdir()
        used = "5 15 20 60"  # user and system, its own and its children's
        status = f"{process} (a) b) S 1 {group} 1 0 -1 0 0 0 0 0 {used} 20 0 1"
        (tmp_path / str(process) / "stat").write_text(status)
    monkeypatch.setattr(quiet, "PROC", tmp_path)
    assert quiet.others_s() == pytest.approx((500 + 30 + 70 - 2 * 100) * quiet.TICK_S)


# --- Processes that save --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "planes, zstd 1"])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_saving_processes_write_is_the_state(
    processes: int, codec: str | None, tmp_path: Path
) -> None:
    step = saver.BLOCK_BYTES // 4
    words = study.words_of(torch.randn(3 * step + 1000))
    memory = saver.Memory({"weights": words})
    savers = saver.Saver(memory, processes, writers=2)
    pace = 4 * words.nbytes
    saved = savers.save(codec, tmp_path / "state", pace)
    savers.close()
    memory.close()
    blocks = saver.blocks_of(words)
    written_bytes = [0] * processes
    for i in range(processes):
        data = (tmp_path / f"state.{i}").read_bytes()
        for at, block in enumerate(blocks[i::processes]):
            parts = [block] if codec is None else coders.CODECS[codec].encode(block).parts
            expected = b"".join(bytes(part) for part in parts)
            offset = at * (saver.BLOCK_BYTES + saver.ALIGNMENT)
            assert data[offset : offset + len(expected)] == expected
            written_bytes[i] += saver.rounded(len(expected))
    assert saved.durable_s >= max(written_bytes) * processes / pace
    assert saved.core_s > 0


def test_the_state_may_change_once_it_is_staged(tmp_path: Path) -> None:
    words = study.words_of(torch.randn(saver.BLOCK_BYTES))  # four blocks
    before = words.tobytes()
    memory = saver.Memory({"weights": words})
    savers = saver.Saver(memory, 1, writers=1)
    savers.begin(None, tmp_path / "state", pace=8 * words.nbytes)
    savers.staged()
    memory.map[:] = bytes(len(memory.map))
    savers.end()
    savers.close()
    memory.close()
    data = (tmp_path / "state.0").read_bytes()
    stride = saver.BLOCK_BYTES + saver.ALIGNMENT
    found = b"".join(data[i * stride : i * stride + saver.BLOCK_BYTES] for i in range(4))
    assert found == before


def test_a_paced_write_ends_no_sooner_than_the_slower_device_would_end_it(tmp_path: Path) -> None:
    device = saver.Device(str(tmp_path / "paced"), saver.ALIGNMENT)
    place = saver.Slots(1).free.get()
    begun = time.perf_counter()
    for _ in range(2):  # both are queued at once: the second waits for the first
        device.write(place, saver.ALIGNMENT, 0, pace=20 * saver.ALIGNMENT, queued=begun)
    assert time.perf_counter() - begun >= 2 / 20
    assert device.idle_at == pytest.approx(begun + 2 / 20)


# --- The program ----------------------------------------------------------------------------------


def test_a_quick_run_writes_rows_for_every_part(tmp_path: Path) -> None:
    names = ("planes, zstd 1", "xor, planes, zstd 1")
    output = tmp_path / "out.json"
    command = [
        sys.executable, str(BENCH / "compression_study.py"), "--quick", "--recipe=bf16",
        f"--dir={tmp_path}", f"--output={output}", *(f"--codec={name}" for name in names),
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "A smoke run: these figures mean nothing." in answer.stdout
    result = json.loads(output.read_text())
    assert {"date", "machine", "device", "codecs"} <= result["facts"].keys()
    assert [sample["step"] for sample in result["samples"]] == [3, 6]
    assert {(row["codec"], row["scope"], row["step"]) for row in result["coded"]} == {
        (name, scope, step)
        for name in names
        for scope in ("whole", "optimizer alone")
        for step in (3, 6)
    }
    for row in result["coded"]:
        assert row["ratio"] > 1.0
        value, low, high = row["gains"]["slow disk, 1"]
        assert low <= value <= high
    assert {(row["codec"], row["cores"]) for row in result["saved"]} == {
        (name, cores) for name in ("as it is", *names, "as it is again") for cores in (1, 2)
    }
    assert {row["codec"] for row in result["looped"]} == {
        "nothing", "nothing again", "as it is", "as it is again", names[0],
    }  # fmt: skip
    for row in result["looped"]:
        assert (row["durable_s"] is None) == row["codec"].startswith("nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


def test_a_codec_whose_package_is_missing_is_named() -> None:
    program = importlib.import_module("compression_study")
    absent = coders.Codec("absent", "no_such_package", lambda width: ForgetsTheLastBit())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(coders.CODECS, "absent", absent)
        with pytest.raises(SystemExit, match=r"missing .*no_such_package.*: pip install"):
            program.choose(None)
