"""Mock mode: everything above the engine runs as it does otherwise, and no disk is touched."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import LITTLE_MEMORY, Live, Plain, Program, Zoo, generators_kept, memory_directory
from _waiting import one_thread

from pccheck_ext import (
    CheckpointNotFound,
    LayerwiseCheckpointTrainer,
    PCCheckAdapter,
    SaveTask,
)
from pccheck_ext._mock import RecordedCheckpoint

MOCK = {"use_pccheck": False}


@pytest.fixture(autouse=True)
def _generators_of_other_tests() -> Iterator[None]:
    with generators_kept(), one_thread():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every path that Python code asks the system for while the test runs."""
    paths: list[str] = []
    watching = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        is_file = event in (
            "open",
            "os.mkdir",
            "os.scandir",
            "os.listdir",
            "os.rename",
            "os.remove",
        )
        if watching and is_file and args and isinstance(args[0], (str, bytes, os.PathLike)):
            paths.append(os.fsdecode(args[0]))

    sys.addaudithook(hook)  # it cannot be taken off again
    yield paths
    watching.clear()


def recorded(trainer: LayerwiseCheckpointTrainer) -> list[RecordedCheckpoint]:
    return trainer.adapter.recorded


def test_nothing_is_written_or_read_and_the_directory_is_not_even_made(
    directory: Path, touched: list[str]
) -> None:
    run = directory / "run"
    program = Program(options={**MOCK, "keep_best": ("loss", "min"), "checkpoint_chunk_count": 2})
    live = Live(program, run)
    assert live.resume() == 0
    live.run(3)
    live.trainer.save_full_checkpoint("mine")
    live.trainer.wait(0.0)
    live.trainer.shutdown()
    assert len([one for one in recorded(live.trainer) if one.committed]) == 4
    assert not [path for path in touched if str(directory) in path]
    assert list(directory.iterdir()) == []


def test_layers_are_recorded_in_update_order_with_their_tensors_and_bytes(directory: Path) -> None:
    live = Live(Program(model=Plain, options=MOCK), directory / "run").run(2)
    live.trainer.shutdown()
    first, second = recorded(live.trainer)
    assert (first.checkpoint_id, first.training_step) == ("step-00000001", 1)
    assert (second.checkpoint_id, second.training_step) == ("step-00000002", 2)
    assert live.trainer.update_order == ["out", "hidden", "embed"]
    for one in (first, second):
        layers = [layer for layer in one.layers if layer.name in live.trainer.update_order]
        assert [layer.name for layer in layers] == ["out", "hidden", "embed"]
        for layer in layers:
            module = live.model.get_submodule(layer.name)
            of_model = [name for name in layer.tensors if name.startswith("model.safetensors:")]
            wanted = {f"model.safetensors:{layer.name}.{n}" for n, _ in module.named_parameters()}
            assert set(of_model) == wanted
            with_moments = {
                f"optimizer.safetensors:{layer.name}.{name}.{key}"
                for name, p in module.named_parameters()
                for key in live.base.state[p]
            }
            assert set(layer.tensors) == wanted | with_moments
            params = sum(p.nbytes for p in module.parameters())
            assert layer.size_bytes == 3 * params + 4 * len(of_model)  # two moments, and the step
        times = [layer.after_s for layer in one.layers]
        assert times == sorted(times)
        assert 0 < times[0] <= times[-1] <= one.durable_s
        assert one.size_bytes == sum(layer.size_bytes for layer in one.layers)


def test_what_is_recorded_is_what_a_real_run_saves(directory: Path) -> None:
    program = Program(iterations=3, averaged=True, options={"save_gradients": True})
    real = Live(program, directory / "real").run()
    real.trainer.shutdown()
    options = {**program.options, **MOCK}
    mock = Live(Program(iterations=3, averaged=True, options=options), directory / "mock").run()
    mock.trainer.shutdown()
    assert mock.trainer.update_order == real.trainer.update_order
    assert mock.losses == real.losses
    assert [one.checkpoint_id for one in recorded(mock.trainer)] == [
        f"step-{step:08d}" for step in (1, 2, 3)
    ]
    for one in recorded(mock.trainer):
        assert one.committed
        manifest = json.loads(
            (directory / "real" / one.checkpoint_id / "manifest.json").read_text()
        )
        told = json.loads(one.manifest)
        differs = {"run_id", "save_id", "timestamp", "rng"}
        assert {k: v for k, v in told.items() if k not in differs} == {
            k: v for k, v in manifest.items() if k not in differs
        }
        of_layers = [e for layer in manifest["layers"] for e in layer["tensors"]]
        entries = [*of_layers, *manifest["extra_tensors"]]
        names = [name for layer in one.layers for name in layer.tensors]
        assert sorted(names) == sorted(f"{e['file']}:{e['name']}" for e in entries)
        assert one.size_bytes == sum(e["bytes"] for e in entries)


def test_intervals_and_voided_steps_are_recorded_as_they_would_be_saved(directory: Path) -> None:
    options = {**MOCK, "checkpoint_every": 2}
    live = Live(Program(model=Plain, options=options), directory / "run").run(3)
    live.trainer.optimizer.found_inf = torch.tensor(1.0)
    live.run(4)
    del live.trainer.optimizer.found_inf
    live.run(6)
    live.trainer.shutdown()
    assert [(c.checkpoint_id, c.committed) for c in recorded(live.trainer)] == [
        ("step-00000002", True),
        ("step-00000004", False),
        ("step-00000004", True),
    ]
    assert "voided" in str(recorded(live.trainer)[1].error)


def test_statistics_have_what_those_of_a_real_run_have(directory: Path) -> None:
    mock = Live(Program(model=Plain, options=MOCK), directory / "mock")
    real = Live(Program(model=Plain), directory / "real")
    assert set(mock.trainer.stats()) == set(real.trainer.stats())
    mock.run(2)
    mock.trainer.end_step()
    stats = mock.trainer.stats()
    assert stats["checkpoints_committed"] == 2
    assert stats["checkpoints_failed"] == stats["in_flight"] == stats["staging_bytes"] == 0
    assert stats["bytes_persisted"] == sum(one.size_bytes for one in recorded(mock.trainer))
    assert stats["bytes_persisted"] > 0
    assert stats["last_committed_step"] == stats["last_sealed_step"] == 2
    assert stats["lag_steps"] == 0
    assert 0 < stats["durable_s_mean"] < 60
    assert stats["stall_per_checkpoint_s"] > 0
    mock.trainer.shutdown()
    assert mock.trainer.stats()["checkpoints_committed"] == 2
    assert mock.trainer.adapter.stats()["checkpoints_committed"] == 2
    real.trainer.shutdown()


def test_there_is_nothing_to_resume_from_even_where_a_real_run_has_been(directory: Path) -> None:
    real = Live(Program(), directory).run(2)
    real.trainer.shutdown()
    mock = Live(Program(options=MOCK), directory)
    assert mock.resume() == 0
    for load in (mock.trainer.resume, mock.trainer.load_checkpoint):
        with pytest.raises(CheckpointNotFound, match="mock mode saves and reads none"):
            load("step-00000002")
    mock.run(1)
    mock.trainer.shutdown()
    assert [one.checkpoint_id for one in recorded(mock.trainer)] == ["step-00000001"]
    assert not list(directory.glob("*.stale"))


def test_a_name_is_recorded_once(directory: Path) -> None:
    live = Live(Program(options=MOCK), directory).run(1)
    live.trainer.save_full_checkpoint("mine")
    with pytest.raises(ValueError, match="'mine' is there already"):
        live.trainer.save_full_checkpoint("mine")
    live.trainer.shutdown()


def test_an_adapter_alone_records_too(directory: Path) -> None:
    adapter = PCCheckAdapter(checkpoint_file=directory / "run.chk", **MOCK, **LITTLE_MEMORY)
    assert adapter.mode == "mock"
    for step in (1, 2):
        adapter.save_layers_batch([SaveTask("b", step, [torch.ones(3), torch.ones(2)])])
        adapter.save_layers_batch([SaveTask("a", step, [torch.ones(5)])])
    adapter.wait(0.0)
    adapter.save_entire_checkpoint_in_chunks("mine", 2, "auto")
    adapter.shutdown()
    assert [one.checkpoint_id for one in adapter.recorded] == [
        "step-00000001",
        "step-00000002",
        "mine",
    ]
    first, _, mine = adapter.recorded
    assert [layer.tensors for layer in first.layers] == [
        ("model-00001.safetensors:b.0", "model-00001.safetensors:b.1"),
        ("model-00002.safetensors:a.0",),
    ]
    assert [layer.size_bytes for layer in first.layers] == [20, 20]
    assert mine.size_bytes == 40
    assert list(directory.iterdir()) == []


def test_a_real_adapter_has_no_record(directory: Path) -> None:
    adapter = PCCheckAdapter(checkpoint_dir=directory / "run", **LITTLE_MEMORY)
    with pytest.raises(AttributeError, match="recorded is mock mode's; this is direct mode"):
        _ = adapter.recorded
    adapter.shutdown()


def test_hard_models_run_too(directory: Path) -> None:
    live = Live(Program(model=Zoo, options=MOCK), directory / "run").run()
    live.trainer.shutdown()
    assert [one.committed for one in recorded(live.trainer) if one.error is None] == [True] * 5
