"""Incremental saves: only what has changed is written, and every checkpoint is whole by itself."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import (
    Live,
    Program,
    Zoo,
    assert_resumes_bit_for_bit,
    assert_same,
    generators_kept,
    memory_directory,
    optimizer,
    raw,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import pccheck_ext
from pccheck_ext import CheckpointCorrupt, ModelRecovery
from pccheck_ext._shards import index_text, kind_of, shard_names

INDEX = "model.safetensors.index.json"
INCREMENTAL: dict[str, Any] = {"incremental": True}


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    with generators_kept():
        yield


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


def step_dir(live: Live, step: int) -> Path:
    return Path(live.trainer.checkpoint_dir) / f"step-{step:08d}"


def model_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The model's state_dict read as other tools do: by the index, aliases by the metadata."""
    index = json.loads((checkpoint / INDEX).read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(checkpoint / file)
        assert {name for name, of in index["weight_map"].items() if of == file} == set(held)
        assert not set(tensors) & set(held)
        tensors |= held
        with safe_open(checkpoint / file, "pt") as opened:
            for alias, name in opened.metadata().items():
                if alias != "format":
                    tensors[alias] = held[name]
    sizes = {id(t): t.numel() * t.element_size() for t in tensors.values()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    return tensors


def inodes(checkpoint: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in checkpoint.iterdir()}


def written_files(live: Live, step: int, base: int) -> set[str]:
    """Payload files of a step that are not the base's."""
    own, other = inodes(step_dir(live, step)), inodes(step_dir(live, base))
    always = {"manifest.json", "checksums.bin", "extra.safetensors"}
    return {name for name, inode in own.items() if inode != other.get(name)} - always


def take_steps(live: Live, count: int) -> None:
    for _ in range(count):
        live.run(live.done + 1)
        live.trainer.wait()


# --- Fine-tuning with a frozen body --------------------------------------------------------------


class Tuned(nn.Module):
    """A frozen body and a head: 4 MiB of parameters to be trained, 20 MiB that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(5)))
        self.body.requires_grad_(False)
        self.head = nn.Linear(1024, 1024)

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.one_hot(tokens[:, 0] % 1024, 1024).float()
        return self.head(torch.relu(self.body[0](x)))


def of_head(model: nn.Module) -> torch.optim.Optimizer:
    assert isinstance(model, Tuned)
    return torch.optim.Adam(model.head.parameters(), lr=1e-3)


def bytes_written_by_process() -> int:
    told = Path("/proc/self/io").read_text()
    return int(dict(line.split(": ") for line in told.splitlines())["write_bytes"])


def bytes_on_disk(paths: list[Path]) -> int:
    return sum(path.stat().st_blocks * 512 for path in paths)


@pytest.mark.parametrize("use_monitor", [False, True], ids=["direct", "monitor"])
def test_fine_tuning_a_head_writes_the_heads_state_and_next_to_nothing_else(
    use_monitor: bool, tmp_path: Path
) -> None:
    options = {**INCREMENTAL, "keep_last": 0, "use_monitor": use_monitor}
    live = Live(Program(Tuned, of_head, options=options), tmp_path)
    take_steps(live, 2)  # the second has all optimizer state planned
    head = [*live.model.head.parameters()]
    state = [v for p in head for v in live.base.state[p].values()]
    trainable = sum(t.numel() * t.element_size() for t in [*head, *state])
    frozen = sum(p.numel() * 4 for p in live.model.body.parameters())
    for _ in range(4):
        before, by_process = live.trainer.stats(), bytes_written_by_process()
        last = live.trainer.training_step
        take_steps(live, 1)
        stats = live.trainer.stats()
        assert trainable <= stats["bytes_persisted"] - before["bytes_persisted"] < 1.02 * trainable
        assert stats["bytes_linked"] - before["bytes_linked"] >= frozen
        assert bytes_written_by_process() - by_process < 1.02 * trainable
        known = set(inodes(step_dir(live, last)).values())
        new = [p for p in step_dir(live, last + 1).iterdir() if p.stat().st_ino not in known]
        assert trainable <= bytes_on_disk(new) < 1.02 * trainable
    assert live.trainer.stats()["links_refused"] == 0
    live.trainer.shutdown()


# --- Every checkpoint stands alone ---------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        optimizer(torch.optim.AdamW, lr=0.01),
        optimizer(torch.optim.SGD, lr=0.05),
        optimizer(torch.optim.SGD, lr=0.05, momentum=0.9),
    ],
    ids=["AdamW", "SGD", "momentum"],
)
def test_a_copy_of_one_directory_resumes_bit_for_bit(kind: Any, in_memory: Path) -> None:
    program = Program(optimizer=kind, options=INCREMENTAL, averaged=True)
    assert_resumes_bit_for_bit(program, in_memory, stops=(1, 3, 4))


def test_each_directory_alone_is_what_other_tools_read(in_memory: Path, tmp_path: Path) -> None:
    run = in_memory / "run"
    live = Live(Program(options={**INCREMENTAL, "save_gradients": True}), run)
    expected = []
    for _ in range(5):
        take_steps(live, 1)
        expected.append({k: raw(v) for k, v in live.model.state_dict().items()})
    live.trainer.shutdown()
    for step in range(1, 6):
        shutil.copytree(step_dir(live, step), tmp_path / f"step-{step:08d}")
    shutil.rmtree(run)
    for step, state in enumerate(expected, 1):
        alone = tmp_path / f"step-{step:08d}"
        assert {k: raw(v) for k, v in model_tensors(alone).items()} == state
        model = Zoo()
        assert ModelRecovery(tmp_path).load_checkpoint(model, alone.name, strict=True) == []
        assert {k: raw(v) for k, v in model.state_dict().items()} == state


def test_a_layer_is_recovered_from_its_own_file_alone(in_memory: Path) -> None:
    live = Live(Program(options=INCREMENTAL), in_memory)
    take_steps(live, 3)
    live.trainer.shutdown()
    stored = {k: raw(v) for k, v in live.model.state_dict().items()}
    own = json.loads((step_dir(live, 3) / INDEX).read_text())["weight_map"]["late.weight"]
    for path in step_dir(live, 3).glob("*.safetensors"):
        if path.name != own:
            corrupt(path)
    model, recovery = Zoo(), ModelRecovery(in_memory)
    recovery.load_layer(model, "step-00000003", "late")
    assert raw(model.late.weight) == stored["late.weight"]
    with pytest.raises(CheckpointCorrupt):
        recovery.load_layer(model, "step-00000003", "wide")


def test_the_manifest_tells_each_tensors_own_file(in_memory: Path) -> None:
    live = Live(Program(options=INCREMENTAL), in_memory)
    take_steps(live, 2)
    live.trainer.shutdown()
    manifest = json.loads((step_dir(live, 2) / "manifest.json").read_bytes())
    numbers = set()
    for layer in manifest["layers"]:
        files = {entry["file"] for entry in layer["tensors"]}
        numbers |= {file.split("-")[1] for file in files if "-" in file}
        assert len({file.split("-")[1] for file in files}) <= 1, "one number for a layer"
        for entry in layer["tensors"]:
            tensor = load_file(step_dir(live, 2) / entry["file"])[entry["name"]]
            data = (step_dir(live, 2) / entry["file"]).read_bytes()
            assert data[entry["offset"] :][: entry["bytes"]] == raw(tensor)
    assert len(numbers) == len(manifest["layers"])
    counted = sum(layer["param_count"] for layer in manifest["layers"])
    assert counted == sum(p.numel() for p in live.model.parameters())
    assert manifest["aliases"] == {"head.weight": "embed.weight"}


# --- What is written, and what is not ------------------------------------------------------------


class Pair(nn.Module):
    """Two layers of which the loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float().repeat(1, 2)
        return nn.functional.pad(self.used(x) + 0 * self.spare(x), (0, 5))


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def pair(directory: Path, **options: Any) -> Live:
    return Live(Program(Pair, plain_sgd, options={**INCREMENTAL, **options}), directory)


def test_a_layer_that_an_update_left_as_it_was_is_not_written_though_its_counter_moved(
    in_memory: Path,
) -> None:
    live = pair(in_memory)
    take_steps(live, 1)
    counter = live.model.spare.weight._version
    take_steps(live, 1)
    assert live.model.spare.weight._version > counter
    assert written_files(live, 2, 1) == {"model-00001-of-00002.safetensors"}
    live.trainer.shutdown()


def test_a_layer_changed_behind_the_counters_back_is_written(in_memory: Path) -> None:
    live = pair(in_memory)
    take_steps(live, 2)
    counter = live.model.spare.weight._version
    live.trainer._saver.open_gates()
    live.model.spare.weight.data.view(-1)[7] += 1
    assert live.model.spare.weight._version == counter
    take_steps(live, 1)
    assert written_files(live, 3, 2) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    changed = model_tensors(step_dir(live, 3))["spare.weight"]
    assert raw(changed) == raw(live.model.spare.weight)
    live.trainer.shutdown()


def test_a_layer_that_is_as_it_was_two_checkpoints_ago_is_written_again(in_memory: Path) -> None:
    live = pair(in_memory)
    weight = live.model.spare.weight
    first = weight.detach().clone()
    for value in (first, first + 1, first):
        live.trainer._saver.open_gates()
        weight.data.copy_(value)
        take_steps(live, 1)
    assert "model-00002-of-00002.safetensors" in written_files(live, 3, 2)
    assert raw(model_tensors(step_dir(live, 3))["spare.weight"]) == raw(first)
    live.trainer.shutdown()


def test_files_keep_their_names_and_links_when_a_layers_state_appears_later(
    in_memory: Path,
) -> None:
    live = Live(Program(iterations=6, options=INCREMENTAL), in_memory)
    names = []
    for _ in range(6):
        take_steps(live, 1)
        names.append(set(inodes(step_dir(live, live.done))))
    assert all(before <= after for before, after in pairwise(names))
    assert names[0] < names[-1], "the layer first used in the third step has no optimizer file"
    frozen = json.loads((step_dir(live, 1) / INDEX).read_text())["weight_map"]["frozen.weight"]
    for step in range(2, 7):
        assert frozen not in written_files(live, step, 1)
        assert INDEX not in written_files(live, step, 1)
    live.trainer.shutdown()


def test_whole_saves_in_chunks_have_the_layers_files_too(in_memory: Path) -> None:
    live = pair(in_memory, checkpoint_chunk_count=3)
    take_steps(live, 1)
    live.trainer.save_full_checkpoint("best")
    live.trainer.wait()
    best = Path(live.trainer.checkpoint_dir) / "best"
    shared = set(inodes(best).values()) & set(inodes(step_dir(live, 1)).values())
    assert len(shared) == 3
    take_steps(live, 1)
    assert raw(model_tensors(best)["spare.weight"]) == raw(live.model.spare.weight)
    live.trainer.shutdown()


def test_without_it_there_are_no_links_and_one_file_of_each_kind(in_memory: Path) -> None:
    live = Live(Program(Pair, plain_sgd), in_memory)
    take_steps(live, 2)
    assert set(inodes(step_dir(live, 2))) == {
        "model.safetensors",
        "extra.safetensors",
        "manifest.json",
        "checksums.bin",
    }
    assert live.trainer.stats()["bytes_linked"] == 0
    live.trainer.shutdown()


def test_from_a_device_whose_memory_cannot_be_read_the_same_files_are_written(
    in_memory: Path,
) -> None:
    live = pair(in_memory, _manual_copier=True)
    live.trainer._session.release_all_copies()
    take_steps(live, 3)
    assert written_files(live, 3, 2) == {"model-00001-of-00002.safetensors"}
    assert raw(model_tensors(step_dir(live, 3))["used.weight"]) == raw(live.model.used.weight)
    live.trainer.shutdown()


# --- Retiring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_monitor", [False, True], ids=["direct", "monitor"])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_retiring_never_breaks_another_checkpoint(
    keep_last: int, use_monitor: bool, in_memory: Path
) -> None:
    options = {**INCREMENTAL, "keep_last": keep_last, "use_monitor": use_monitor}
    live = Live(Program(options=options), in_memory)
    recovery = ModelRecovery(in_memory)
    saved: dict[str, dict[str, bytes]] = {}
    for step in range(1, 9):
        take_steps(live, 1)
        saved[f"step-{step:08d}"] = {k: raw(v) for k, v in live.model.state_dict().items()}
        if step == 4:
            live.trainer.save_full_checkpoint("kept")
            live.trainer.wait()
            saved["kept"] = saved["step-00000004"]
        for name in recovery.list_checkpoints():
            try:
                assert recovery.verify(name)
                tensors = model_tensors(in_memory / name)
            except FileNotFoundError:  # retired since it was listed
                assert name < f"step-{step - keep_last + 1:08d}"
                continue
            assert {k: raw(v) for k, v in tensors.items()} == saved[name], (step, name)
    live.trainer.shutdown()
    assert live.trainer.stats()["bytes_linked"] > 0
    left = [f"step-{step:08d}" for step in range(9 - keep_last, 9)]
    assert {*left, "kept"} <= set(recovery.list_checkpoints())


def test_a_shared_file_never_changes_a_byte_while_checkpoints_come_and_go(tmp_path: Path) -> None:
    live = pair(tmp_path, keep_last=1, max_async=3)
    take_steps(live, 2)
    shared = "model-00002-of-00002.safetensors"
    first = step_dir(live, 2) / shared
    inode, content = first.stat().st_ino, hashlib.sha256(first.read_bytes()).digest()
    for step in range(3, 20):
        live.run(step)
        live.trainer.end_step()
        if step % 3:
            continue
        live.trainer.wait()
        newest = step_dir(live, step) / shared
        assert newest.stat().st_ino == inode
        assert hashlib.sha256(newest.read_bytes()).digest() == content
    live.trainer.shutdown()


def test_damage_to_a_shared_file_shows_in_every_checkpoint_that_has_it(in_memory: Path) -> None:
    live = pair(in_memory)
    take_steps(live, 3)
    live.trainer.shutdown()
    corrupt(step_dir(live, 1) / "model-00002-of-00002.safetensors")
    recovery = ModelRecovery(in_memory)
    assert [recovery.verify(f"step-{step:08d}") for step in (1, 2, 3)] == [False] * 3
    assert recovery.get_latest_checkpoint() is None


# --- Going on ------------------------------------------------------------------------------------


def corrupt(path: Path) -> None:
    """Flips a bit in the file's last byte, in place."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize("use_monitor", [False, True], ids=["direct", "monitor"])
def test_the_first_checkpoint_of_a_resumed_run_links_to_the_one_restored(
    use_monitor: bool, in_memory: Path
) -> None:
    live = pair(in_memory)
    take_steps(live, 3)
    live.trainer.shutdown()
    resumed = pair(in_memory, use_monitor=use_monitor)
    assert resumed.resume("step-00000002") == 2
    with pytest.warns(RuntimeWarning, match=r"left aside as \*\.stale: step-00000003"):
        take_steps(resumed, 1)
    assert written_files(resumed, 3, 2) == {"model-00001-of-00002.safetensors"}
    assert_same(resumed.state()["model"], live.state()["model"])
    resumed.trainer.shutdown()


def test_a_resumed_run_with_optimizer_state_makes_the_very_same_files(in_memory: Path) -> None:
    live = Live(Program(iterations=9, options=INCREMENTAL), in_memory)
    take_steps(live, 4)
    live.trainer.shutdown()
    resumed = Live(live.program, in_memory, seed=7)
    assert resumed.resume() == 4
    resumed.trainer.save_full_checkpoint("again")
    resumed.trainer.wait()
    again = inodes(in_memory / "again")
    shared = {n for n, inode in inodes(step_dir(live, 4)).items() if again.get(n) == inode}
    assert shared == set(again) - {"manifest.json", "checksums.bin", "extra.safetensors"}
    resumed.trainer.shutdown()


def test_a_part_that_was_not_needed_and_is_damaged_makes_the_next_one_whole_with_a_warning(
    in_memory: Path,
) -> None:
    live = pair(in_memory)
    take_steps(live, 1)
    live.trainer.shutdown()
    index = step_dir(live, 1) / INDEX
    corrupt(index)
    resumed = pair(in_memory)
    with pytest.warns(RuntimeWarning, match=r"written whole.*index\.json"):
        assert resumed.resume("step-00000001") == 1
    take_steps(resumed, 1)
    assert len(written_files(resumed, 2, 1)) == 3
    assert ModelRecovery(in_memory).verify("step-00000002")
    resumed.trainer.shutdown()


@pytest.mark.parametrize("first", [False, True], ids=["to incremental", "from incremental"])
def test_a_run_goes_on_in_the_other_way_of_saving(first: bool, in_memory: Path) -> None:
    live = pair(in_memory, incremental=first)
    take_steps(live, 2)
    live.trainer.shutdown()
    other = pair(in_memory, incremental=not first)
    assert other.resume() == 2
    assert_same(other.state()["model"], live.state()["model"])
    take_steps(other, 2)
    assert all(ModelRecovery(in_memory).verify(f"step-{s:08d}") for s in range(1, 5))
    assert other.trainer.stats()["bytes_linked"] == (0 if first else linked_of(other, 4, 3))
    other.trainer.shutdown()


def linked_of(live: Live, step: int, base: int) -> int:
    own, other = inodes(step_dir(live, step)), inodes(step_dir(live, base))
    shared = [name for name, inode in own.items() if other.get(name) == inode]
    return sum((step_dir(live, step) / name).stat().st_size for name in shared)


def test_a_reader_of_another_directory_is_refused_as_a_base(in_memory: Path) -> None:
    one, other = pair(in_memory / "one"), pair(in_memory / "other")
    take_steps(one, 1)
    reader = pccheck_ext._C.Reader(str(in_memory / "one"), "step-00000001")
    with pytest.raises(ValueError, match="no checkpoint of"):
        other.trainer._session.adopt_base(reader, 1)
    assert one.trainer._session.adopt_base(reader, 1)
    one.trainer.shutdown()
    other.trainer.shutdown()


# --- Kill -9 -------------------------------------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 64).requires_grad_(False)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def frozen_trainer(
    directory: Path, use_monitor: bool, seed: int
) -> pccheck_ext.LayerwiseCheckpointTrainer:
    torch.manual_seed(seed)
    model = Frozen()
    layers = pccheck_ext.DependencyGraphBuilder(model).group_parameters_by_layer()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return pccheck_ext.LayerwiseCheckpointTrainer(
        model,
        # In a given order: to find it out would take most of the time before a kill.
        pccheck_ext.LayerwiseOptimizer(optimizer, list(reversed(layers)), layers),
        checkpoint_dir=directory,
        batch_size_mb=1,
        ratio=1,
        block_size_mb=1 / 32,
        num_threads=2,
        keep_last=2,
        incremental=True,
        use_monitor=use_monitor,
    )


def train_until_killed(directory: Path, use_monitor: bool, told: int) -> None:
    trainer = frozen_trainer(directory, use_monitor, seed=3)
    trainer.resume("auto")
    os.write(told, trainer.training_step.to_bytes(8, "little"))
    while True:
        inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(trainer.training_step))
        trainer.zero_grad()
        trainer.model(inputs).square().mean().backward()
        trainer.step()
        trainer.end_step()


def fork_trainer(directory: Path, use_monitor: bool) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            torch.set_num_threads(1)
            train_until_killed(directory, use_monitor, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    return child, read_end


@pytest.fixture
def ready_to_fork() -> Iterator[None]:
    # A forked child of a process whose thread pool has run would wait for threads it does not have.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Frozen()
    model(torch.ones(2, 32)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("ready_to_fork")
@pytest.mark.parametrize(("use_monitor", "kills"), [(False, 40), (True, 10)], ids=str)
def test_killed_at_random_moments_it_goes_on_with_every_checkpoint_whole(
    use_monitor: bool, kills: int, tmp_path: Path
) -> None:
    moments = random.Random(11)
    directory = tmp_path / "run"
    recovery = ModelRecovery(directory)
    newest = 0
    for _ in range(kills):
        child, read_end = fork_trainer(directory, use_monitor)
        first = os.read(read_end, 8)
        assert len(first) == 8, f"the child ended by itself: {os.waitpid(child, 0)}"
        resumed = int.from_bytes(first, "little")
        assert resumed >= newest
        newest = resumed
        time.sleep(moments.random() * 0.05)  # the moment of the kill is what is random here
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)
        if not use_monitor:
            assert all(recovery.verify(name) for name in recovery.list_checkpoints())
    with frozen_trainer(directory, use_monitor, seed=9) as last:
        assert last.resume("auto") >= newest > 0
        there = recovery.list_checkpoints()
        assert all(recovery.verify(name) for name in there)
        body = {raw(model_tensors(directory / name)["body.weight"]) for name in there}
        assert body == {raw(last.model.body.weight)}
        torch.manual_seed(3)
        assert body == {raw(Frozen().body.weight)}
    # Of half-made checkpoints nothing is left, of their links neither.
    assert all(name == ".lock" or name.startswith("step-") for name in os.listdir(directory))
    links = (directory / there[-1] / "model-00001-of-00003.safetensors").stat().st_nlink
    assert links <= len(recovery.list_checkpoints())


# --- Names and the index -------------------------------------------------------------------------


def test_a_layer_has_one_number_in_every_kind() -> None:
    pairs = [("model.x", 4), ("model.x", 2), ("model.x", 4), ("optimizer.x", 2), ("optimizer.x", 9)]
    assert shard_names(pairs, first="model.x") == {
        ("model.x", 4): "model-00001-of-00002.x",
        ("model.x", 2): "model-00002-of-00002.x",
        ("optimizer.x", 2): "optimizer-00002-of-00003.x",
        ("optimizer.x", 9): "optimizer-00003-of-00003.x",
    }


def test_names_of_divided_files_lead_back_to_their_kind() -> None:
    assert kind_of("model-00002-of-00007.safetensors") == "model.safetensors"
    assert kind_of("optimizer-123456-of-123456.safetensors") == "optimizer.safetensors"
    for other in ("model.safetensors", "model-2-of-7.safetensors", INDEX, "extra.safetensors"):
        assert kind_of(other) == other


def test_the_index_is_the_usual_one() -> None:
    assert json.loads(index_text({"b": "two", "a": "one"}, 12)) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "one", "b": "two"},
    }
