"""What goes wrong is said clearly, where it happened, and harms no earlier checkpoint."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pccheck_ext
from pccheck_ext import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointNotFound

SMALL = {"batch_size_mb": 2, "ratio": 2, "block_size_mb": 0.25}


def make_model(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))


def make_trainer(directory: Path, **options: Any) -> pccheck_ext.LayerwiseCheckpointTrainer:
    model = options.pop("model", None) or make_model()
    optimizer = torch.optim.Adam(model.parameters())
    return pccheck_ext.LayerwiseCheckpointTrainer(
        model, optimizer, checkpoint_dir=directory, **SMALL, **options
    )


def take_step(trainer: pccheck_ext.LayerwiseCheckpointTrainer) -> None:
    trainer.zero_grad()
    width = next(trainer.model.parameters()).shape[1]
    trainer.model(torch.randn(8, width)).square().sum().backward()
    trainer.step()


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    with make_trainer(directory) as trainer:
        take_step(trainer)
        take_step(trainer)
    return directory


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_threads", 0),
        ("num_threads", -1),
        ("num_threads", 257),
        ("num_threads", 2.5),
        ("num_threads", True),
        ("max_async", 0),
        ("batch_size_mb", 0),
        ("batch_size_mb", -100.0),
        ("batch_size_mb", float("nan")),
        ("ratio", 0),
        ("ratio", float("inf")),
        ("block_size_mb", -1),
        ("block_size_mb", "4"),
        ("checkpoint_every", 0),
        ("keep_last", -1),
        ("checkpoint_chunk_count", 0),
        ("on_error", "ignore"),
    ],
)
def test_an_impossible_argument_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, argument: str, value: object
) -> None:
    options = {**SMALL, argument: value}
    model = make_model()
    with pytest.raises(ValueError, match=argument):
        pccheck_ext.LayerwiseCheckpointTrainer(
            model, torch.optim.SGD(model.parameters()), checkpoint_dir=tmp_path / "run", **options
        )
    assert not (tmp_path / "run").exists()


def test_staging_memory_smaller_than_a_few_blocks_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"batch_size_mb x ratio = 4 MiB .* block_size_mb = 8"):
        pccheck_ext.LayerwiseCheckpointTrainer(
            model,
            torch.optim.SGD(model.parameters()),
            checkpoint_dir=tmp_path / "run",
            batch_size_mb=2,
            ratio=2,
            block_size_mb=8,
        )
    assert not (tmp_path / "run").exists()


def test_staging_memory_too_small_for_the_state_s_dtypes_names_what_it_needs(
    tmp_path: Path,
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            for i, dtype in enumerate((torch.int64, torch.float16, torch.int8)):
                self.register_buffer(f"b{i}", torch.zeros(4, dtype=dtype))

    model = Mixed()
    trainer = pccheck_ext.LayerwiseCheckpointTrainer(
        model,
        torch.optim.Adam(model.parameters()),
        checkpoint_dir=tmp_path / "run",
        batch_size_mb=2,
        ratio=2,
        block_size_mb=1,
    )
    model.linear(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"holds 4 blocks of \d+; this state needs at least \d+"):
        trainer.step()
    trainer.shutdown()


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "../a", "a b", "x.partial", "x" * 129, "a\0b", "x.stale"]
)
def test_a_checkpoint_id_that_cannot_be_a_directory_s_name_is_refused(
    tmp_path: Path, name: str
) -> None:
    with make_trainer(tmp_path / "run") as trainer:
        with pytest.raises(ValueError, match="checkpoint_id"):
            trainer.save_full_checkpoint(name)
        with pytest.raises(ValueError, match="checkpoint_id"):
            trainer.load_checkpoint(name)


def test_a_custom_id_that_is_there_already_is_refused_and_left_alone(tmp_path: Path) -> None:
    with make_trainer(tmp_path / "run") as trainer:
        take_step(trainer)
        trainer.save_full_checkpoint("best")
        trainer.wait()
        before = (tmp_path / "run/best/checksums.bin").read_bytes()
        with pytest.raises(ValueError, match="'best' is there already"):
            trainer.save_full_checkpoint("best")
        assert (tmp_path / "run/best/checksums.bin").read_bytes() == before


def test_extra_objects_without_state_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"extra\['thing'\] is a object without state_dict"):
        make_trainer(tmp_path / "run", extra={"thing": object()})
    assert not (tmp_path / "run").exists()


def test_extra_state_that_cannot_be_encoded_names_its_path_and_training_can_go_on(
    tmp_path: Path,
) -> None:
    class Odd:
        value: object = object()

        def state_dict(self) -> dict[str, object]:
            return {"inner": [1, self.value]}

        def load_state_dict(self, state: dict[str, object]) -> None:
            raise AssertionError

    odd = Odd()
    trainer = make_trainer(tmp_path / "run", extra={"odd": odd})
    take_step(trainer)
    with pytest.raises(TypeError, match=r"extra\.odd\.inner\.1"):
        take_step(trainer)
    odd.value = 2
    take_step(trainer)
    trainer.shutdown()
    assert pccheck_ext.ModelRecovery(tmp_path / "run").list_checkpoints() == ["step-00000002"]


def test_a_seal_that_fails_halfway_costs_that_checkpoint_and_hangs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run")
    take_step(trainer)

    def out_of_memory(node: object) -> bytes:
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr("pccheck_ext._codec.dumps", out_of_memory)
    with pytest.raises(MemoryError):
        trainer.end_step()
    take_step(trainer)
    trainer.shutdown()
    assert pccheck_ext.ModelRecovery(tmp_path / "run").list_checkpoints() == ["step-00000002"]


# -- the disk --------------------------------------------------------------------------------------


@pytest.fixture
def small_file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # More than the test runner's own files need, less than the model's.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_size_limit_fails_the_checkpoint_by_path_and_training_goes_on(
    two_checkpoints: Path, small_file_limit: None
) -> None:
    big = make_model(width=1 << 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(two_checkpoints, model=big, on_error="warn")
        for _ in range(3):
            take_step(trainer)
            trainer.wait()
        assert trainer.training_step == 3
        assert trainer.stats()["checkpoints_failed"] == 3
        trainer.shutdown()
    failures = [str(w.message) for w in caught if "failed" in str(w.message)]
    assert len(failures) == 3
    assert "step-00000001.partial/model.safetensors" in failures[0]
    assert "File too large" in failures[0]
    assert not [name for name in os.listdir(two_checkpoints) if name.endswith(".partial")]
    stale = [n for n in os.listdir(two_checkpoints) if n.endswith(".stale")]
    assert sorted(stale) == ["step-00000001.stale", "step-00000002.stale"]


def test_a_directory_that_cannot_be_written_is_an_error_naming_it() -> None:
    # Nobody, root included, makes directories in /proc.
    with pytest.raises(OSError, match="/proc/pccheck"):
        make_trainer(Path("/proc/pccheck/run"))


def test_a_directory_in_whose_place_a_file_stands_is_an_error_naming_it(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match=str(tmp_path / "run")):
        make_trainer(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_directory_removed_under_way_fails_the_checkpoint_by_path(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    trainer = make_trainer(directory)
    take_step(trainer)
    trainer.wait()
    shutil.rmtree(directory)
    take_step(trainer)
    with pytest.raises(CheckpointError, match=rf"step-00000002 failed: .*{directory}"):
        trainer.wait()
    before = trainer.training_step
    take_step(trainer)
    assert trainer.training_step == before + 1
    with pytest.raises(CheckpointError, match="step-00000003"):
        trainer.shutdown()


def test_a_directory_removed_with_retired_checkpoints_in_it_is_let_go_of(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    trainer = make_trainer(directory, on_error="warn", keep_last=1)
    for _ in range(4):
        take_step(trainer)
        trainer.wait()
    until = time.monotonic() + 30
    while {n for n in os.listdir(directory) if "partial" not in n} != {".lock", "step-00000004"}:
        assert time.monotonic() < until, os.listdir(directory)  # retired behind our back
    shutil.rmtree(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.shutdown()
    assert any("clearing up after checkpoints" in str(w.message) for w in caught)
    with make_trainer(directory, lock_timeout_s=0.1) as next_one:
        take_step(next_one)


def test_a_checkpoint_replaced_by_a_link_is_told_of_once_and_the_others_are_retired(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    trainer = make_trainer(directory, keep_last=2)
    take_step(trainer)
    take_step(trainer)
    trainer.wait()
    (directory / "step-00000001").rename(tmp_path / "archived")
    (directory / "step-00000001").symlink_to(tmp_path / "archived")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            take_step(trainer)
            trainer.wait()
        trainer.shutdown()
    told = [str(w.message) for w in caught if "clearing up" in str(w.message)]
    assert len(told) == 1
    assert "step-00000001" in told[0]
    kept = {"step-00000001", "step-00000006", "step-00000007"}
    assert set(os.listdir(directory)) == {".lock"} | kept
    assert (tmp_path / "archived" / "manifest.json").exists()


def test_what_a_killed_saving_operator_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "one.safetensors.0.partial"  # where the first save of a process writes
    left.write_bytes(b"half")
    script = (
        "import sys, torch, pccheck_ext\n"
        "torch.ops.pccheck.save_chunks([torch.ones(3)], ['a'], sys.argv[1], 0, True)\n"
    )
    path = str(tmp_path / "one.safetensors")
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=120)
    assert os.listdir(tmp_path) == ["one.safetensors"]


def test_a_second_process_on_the_same_directory_waits_and_then_is_told_who_holds_it(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    first = make_trainer(directory)
    script = (
        "import sys, torch, pccheck_ext\n"
        "m = torch.nn.Linear(2, 2)\n"
        "try:\n"
        "    pccheck_ext.LayerwiseCheckpointTrainer(m, torch.optim.SGD(m.parameters()),\n"
        "        checkpoint_dir=sys.argv[1], lock_timeout_s=0.2)\n"
        "except pccheck_ext.CheckpointError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, timeout=120
    )
    assert "another process is writing checkpoints to" in told.stdout, told.stderr
    assert str(directory) in told.stdout
    take_step(first)
    first.shutdown()
    assert pccheck_ext.ModelRecovery(directory).get_latest_checkpoint() == "step-00000001"
    with make_trainer(directory, lock_timeout_s=0.2) as second:
        assert second.resume("auto") == 1


# -- what is in the directory ----------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "extra.safetensors", "manifest.json",
             "checksums.bin"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "empty", "directory"])
def test_a_damaged_newest_checkpoint_is_told_of_and_the_one_before_it_resumed(
    two_checkpoints: Path, file: str, damage: str
) -> None:
    path = two_checkpoints / "step-00000002" / file
    size = path.stat().st_size
    if damage == "flip":
        flip(path, size - 1)
    elif damage == "truncate":
        os.truncate(path, size - 1)
    elif damage == "extend":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        path.unlink()
        if damage == "empty":
            path.touch()
        elif damage == "directory":
            path.mkdir()
    recovery = pccheck_ext.ModelRecovery(two_checkpoints)
    assert not recovery.verify("step-00000002")
    assert recovery.get_latest_checkpoint() == "step-00000001"
    with make_trainer(two_checkpoints) as trainer:
        with pytest.warns(RuntimeWarning, match="step-00000002 cannot be used"):
            assert trainer.resume("auto") == 1
        with pytest.raises((CheckpointCorrupt, OSError), match=r"step-00000002|checksums\.bin"):
            trainer.load_checkpoint("step-00000002")


def test_where_no_checkpoint_verifies_resuming_is_an_error_that_lists_them(
    two_checkpoints: Path,
) -> None:
    for step in (1, 2):
        flip(two_checkpoints / f"step-0000000{step}" / "model.safetensors", 4095)
    with make_trainer(two_checkpoints) as trainer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointCorrupt, match=r"step-00000002, step-00000001"):
            trainer.resume("auto")


def test_foreign_files_and_directories_are_neither_read_nor_touched(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    (directory / "mine.partial").mkdir()
    (directory / "mine.partial" / "data.bin").write_bytes(b"precious")
    (directory / "step-00000009").mkdir()
    (directory / "step-00000008.partial").write_text("a file")
    (directory / "loop").symlink_to(".")
    with make_trainer(directory) as trainer:
        assert trainer.resume("auto") == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            take_step(trainer)
    assert (directory / "notes.txt").read_text() == "mine"
    assert (directory / "mine.partial" / "data.bin").read_bytes() == b"precious"
    assert (directory / "step-00000008.partial").read_text() == "a file"
    assert (directory / "loop").is_symlink()
    assert pccheck_ext.ModelRecovery(directory).get_latest_checkpoint() == "step-00000001"


def test_a_missing_checkpoint_is_an_error_that_lists_what_is_there(two_checkpoints: Path) -> None:
    model = make_model()
    with pytest.raises(CheckpointNotFound, match=r"'nope' .*step-00000001, step-00000002"):
        pccheck_ext.ModelRecovery(two_checkpoints).load_checkpoint(model, "nope")


def test_an_empty_or_missing_directory_has_no_latest_checkpoint(tmp_path: Path) -> None:
    assert pccheck_ext.ModelRecovery(tmp_path).get_latest_checkpoint() is None
    assert pccheck_ext.ModelRecovery(tmp_path / "missing").get_latest_checkpoint() is None


# -- the wrong model -------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_model_of_other_shapes_is_refused_by_tensor_and_left_unchanged(
    two_checkpoints: Path,
) -> None:
    model = make_model(width=17)
    before = snapshot(model)
    with make_trainer(two_checkpoints, model=model) as trainer:
        for load in (lambda: trainer.resume("auto"),
                     lambda: trainer.load_checkpoint("step-00000001")):  # fmt: skip
            with pytest.raises(CheckpointMismatch, match=r"0\.weight is torch.float32 \[32, 16\]"):
                load()
    assert_unchanged(model, before)


def test_a_model_with_a_layer_less_is_refused_on_resume(two_checkpoints: Path) -> None:
    model = make_model()[:2]
    trainer = make_trainer(two_checkpoints, model=model)
    with trainer, pytest.raises(CheckpointMismatch, match=r"2\.weight is not in the model"):
        trainer.resume("auto")


def test_layers_that_the_checkpoint_has_not_are_returned(two_checkpoints: Path) -> None:
    model = nn.Sequential(*make_model(), nn.Linear(4, 4))
    recovery = pccheck_ext.ModelRecovery(two_checkpoints)
    assert recovery.load_checkpoint(model, "step-00000002") == ["3"]
    with pytest.raises(CheckpointMismatch, match=r"3\.weight is not in the checkpoint"):
        recovery.load_checkpoint(model, "step-00000002", strict=True)


def test_a_model_with_nothing_in_common_is_refused(two_checkpoints: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="no tensor in common"):
        pccheck_ext.ModelRecovery(two_checkpoints).load_checkpoint(
            nn.ModuleDict({"other": nn.Linear(3, 3)}), "step-00000002"
        )


def test_another_optimizer_is_refused_and_nothing_is_changed(two_checkpoints: Path) -> None:
    model = make_model()
    before = snapshot(model)
    trainer = pccheck_ext.LayerwiseCheckpointTrainer(
        model, torch.optim.SGD(model.parameters(), momentum=0.9), checkpoint_dir=two_checkpoints,
        **SMALL,
    )  # fmt: skip
    with trainer, pytest.raises(CheckpointMismatch, match=r"saved with Adam .* this is SGD"):
        trainer.resume("auto")
    assert_unchanged(model, before)


def test_other_extra_objects_are_refused_and_nothing_is_changed(two_checkpoints: Path) -> None:
    model = make_model()
    before = snapshot(model)
    ema = torch.optim.swa_utils.AveragedModel(model)
    trainer = make_trainer(two_checkpoints, model=model, extra={"ema": ema})
    told = r"extra=\[\], this trainer has \['ema'\]"
    with trainer, pytest.raises(CheckpointMismatch, match=told):
        trainer.resume("auto")
    assert_unchanged(model, before)


def test_an_argument_that_is_refused_leaves_no_directory_and_no_hook(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError):
        pccheck_ext.LayerwiseCheckpointTrainer(
            model,
            torch.optim.SGD(model.parameters()),
            checkpoint_dir=tmp_path / "run",
            example_inputs=object(),
        )
    assert not (tmp_path / "run").exists()
    assert not model._forward_pre_hooks


def test_a_damaged_checkpoint_does_not_verify_under_its_older_name_either(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pccheck_ext.LayerwiseCheckpointTrainer(
        model, torch.optim.SGD(model.parameters()), checkpoint_dir=tmp_path
    ) as trainer:
        trainer.step()
    (tmp_path / "step-00000001" / "model.safetensors").unlink()
    recovery = pccheck_ext.ModelRecovery(tmp_path)
    assert recovery.verify("step-00000001") is False
    assert recovery.verify("step_1") is False
    with pytest.raises(FileNotFoundError):
        recovery.verify("step_2")
