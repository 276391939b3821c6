"""Kill -9 at random moments: what was acknowledged is there, and nothing else is left behind.

Children are forked from this process, which has imported torch but started no engine: a cycle costs
tens of milliseconds instead of seconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pccheck_ext

KILLS = 200
SEED = 20_240_229


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def trainer_in(directory: Path, seed: int) -> pccheck_ext.LayerwiseCheckpointTrainer:
    model, optimizer = make(seed)
    layers = pccheck_ext.DependencyGraphBuilder(model).group_parameters_by_layer()
    return pccheck_ext.LayerwiseCheckpointTrainer(
        model,
        # In a given order: to find it out would take most of the time before the kill.
        pccheck_ext.LayerwiseOptimizer(optimizer, list(reversed(layers)), layers),
        checkpoint_dir=directory,
        batch_size_mb=1,
        ratio=1,
        block_size_mb=1 / 32,
        num_threads=2,
    )


def take_step(trainer: pccheck_ext.LayerwiseCheckpointTrainer) -> None:
    generator = torch.Generator().manual_seed(trainer.training_step)
    inputs = torch.randn(16, 32, generator=generator)
    trainer.zero_grad()
    loss = trainer.model(inputs).square().mean()
    loss.backward()
    trainer.step(loss)
    trainer.end_step()


def train_until_killed(directory: Path, acknowledge: int) -> None:
    """Tells, through the pipe, each step whose commit has been acknowledged."""
    trainer = trainer_in(directory, seed=os.getpid())
    trainer.resume("auto")
    told = trainer.training_step
    os.write(acknowledge, told.to_bytes(8, "little"))
    while True:
        take_step(trainer)
        committed = trainer.stats()["last_committed_step"]
        if committed > told:
            told = committed
            os.write(acknowledge, told.to_bytes(8, "little"))


def fork_trainer(directory: Path) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            torch.set_num_threads(1)
            train_until_killed(directory, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    return child, read_end


def last_acknowledged(read_end: int) -> int:
    told = b""
    while part := os.read(read_end, 1 << 16):
        told += part
    os.close(read_end)
    whole = len(told) // 8 * 8
    return int.from_bytes(told[whole - 8 : whole], "little") if whole else -1


@pytest.fixture(autouse=True)
def ready_to_fork() -> Iterator[None]:
    # A forked child of a process whose thread pool has run would wait for threads it does not have.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # What the first step of all imports would otherwise be imported by each child.
    model, optimizer = make(seed=0)
    model(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    yield
    torch.set_num_threads(threads)


def test_every_acknowledged_commit_survives_200_kills_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(SEED)
    directory = tmp_path / "run"
    newest = 0
    committed_in_all = 0
    for kill in range(KILLS):
        child, read_end = fork_trainer(directory)
        first = os.read(read_end, 8)  # it has resumed, and trains
        assert len(first) == 8, f"child {kill} ended by itself: {os.waitpid(child, 0)}"
        resumed = int.from_bytes(first, "little")
        assert resumed >= newest, f"kill {kill}: step {newest} was acknowledged, {resumed} resumed"
        time.sleep(moments.random() * 0.03)  # the moment of the kill is what is random here
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        acknowledged = max(resumed, last_acknowledged(read_end))
        committed_in_all += acknowledged - newest
        newest = acknowledged
    assert committed_in_all > KILLS / 4, "the children hardly ever got to commit anything"

    recovery = pccheck_ext.ModelRecovery(directory)
    latest = recovery.get_latest_checkpoint()
    assert latest is not None
    assert int(latest.removeprefix("step-")) >= newest
    with trainer_in(directory, seed=0) as trainer:
        assert trainer.resume("auto") >= newest
        assert all(recovery.verify(name) for name in recovery.list_checkpoints())
        take_step(trainer)  # retires, too, what those could not that were killed after a commit
    names = sorted(os.listdir(directory))
    assert all(re.fullmatch(r"\.lock|step-\d{8}", name) for name in names), names
    assert len(names) == 1 + 3  # the lock and keep_last


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    model, _ = make(seed=7)
    reference = model.state_dict()
    undisturbed = trainer_in(tmp_path / "undisturbed", seed=7)
    killed = tmp_path / "killed"
    first = trainer_in(killed, seed=7)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, reference[key])
    take_step(first)
    first.shutdown()

    moments = random.Random(SEED + 1)
    for _ in range(10):
        child, read_end = fork_trainer(killed)
        assert len(os.read(read_end, 8)) == 8
        time.sleep(moments.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last_acknowledged(read_end)
    with trainer_in(killed, seed=99) as last, undisturbed:
        steps = last.resume("auto") + 3
        while last.training_step < steps:
            take_step(last)
        while undisturbed.training_step < steps:
            take_step(undisturbed)
        assert last.loss_history == undisturbed.loss_history
        for key, value in undisturbed.model.state_dict().items():
            assert torch.equal(value, last.model.state_dict()[key]), key
