"""GPT-2, Llama, BERT, ViT and ResNet: killed, resumed, opened by other tools, and traced.

Children are forked from this process, which has imported what they need and started no engine.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from _models import Live, assert_same, generators_kept, memory_directory
from _real_models import REAL_MODELS, RealModel

from pccheck_ext import DependencyGraphBuilder, ModelRecovery, capture_first_forward
from pccheck_ext.layers import GradientOrder

STEPS, COMMITTED, KILLED_AFTER = 7, 2, 4

real_models = pytest.mark.parametrize("real", REAL_MODELS.values(), ids=list(REAL_MODELS))


@pytest.fixture(autouse=True)
def ready_to_fork() -> Iterator[None]:
    # A forked child of a process whose thread pool has run would wait for threads it does not have.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with generators_kept():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child that does it, and where to read what it writes to the descriptor it is given."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            work(write_end)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    return child, read_end


def train_until_killed(real: RealModel, directory: Path, tell: int) -> None:
    """Is killed in the middle of a step; some checkpoints are committed, later ones in flight."""
    live = Live(real.program(iterations=STEPS), directory)
    live.run(until=COMMITTED)
    live.trainer.wait()
    live.run(until=KILLED_AFTER)
    real.backward(live)
    os.write(tell, b"!")
    signal.pause()


def train_on(real: RealModel, directory: Path, tell: int) -> None:
    live = Live(real.program(iterations=STEPS), directory, seed=99)
    resumed = live.resume()
    live.run()
    live.trainer.shutdown()
    history = live.trainer.loss_history
    torch.save({"resumed": resumed, "state": live.state(), "losses": history}, directory / "told")


def kill_and_resume(real: RealModel, directory: Path) -> dict[str, Any]:
    child, read_end = forked(lambda tell: train_until_killed(real, directory, tell))
    assert os.read(read_end, 1) == b"!", os.waitpid(child, 0)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read_end)
    assert os.WTERMSIG(status) == signal.SIGKILL

    child, read_end = forked(lambda tell: train_on(real, directory, tell))
    _, status = os.waitpid(child, 0)
    os.close(read_end)
    assert status == 0
    told: dict[str, Any] = torch.load(directory / "told", weights_only=False)
    return told


@real_models
def test_killed_and_resumed_it_is_trained_as_if_it_had_not_been(
    real: RealModel, directory: Path
) -> None:
    unbroken = Live(real.program(iterations=STEPS), None).run()
    told = kill_and_resume(real, directory)
    assert COMMITTED <= told["resumed"] <= KILLED_AFTER
    assert_same(told["state"], unbroken.state())
    assert_same(told["losses"], list(unbroken.losses.values()))
    assert len(set(told["losses"])) == STEPS  # it has learned something each time

    newest = directory / f"step-{STEPS:08d}"
    assert ModelRecovery(directory).verify(newest.name)
    opens_elsewhere(real, newest, unbroken.model.state_dict())


def opens_elsewhere(real: RealModel, checkpoint: Path, wanted: dict[str, torch.Tensor]) -> None:
    """By safetensors, and by the library's own from_pretrained."""
    path = checkpoint / "model.safetensors"
    stored = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as opened:
        also_named = opened.metadata()  # tied weights are stored once
    assert set(stored) <= set(wanted)
    for name, tensor in wanted.items():
        assert_same(stored[name if name in stored else also_named[name]], tensor, name)

    model = real.build()
    missing, unexpected = safetensors.torch.load_model(model, path)
    assert not missing
    assert not unexpected
    assert_same(dict(model.state_dict()), dict(wanted))

    released = checkpoint.parent / "released"
    model.config.save_pretrained(released)
    shutil.copy(path, released)
    loaded, report = type(model).from_pretrained(released, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(dict(loaded.state_dict()), dict(wanted))


@real_models
def test_its_data_flow_is_traced_and_gives_the_order_in_which_gradients_become_ready(
    real: RealModel,
) -> None:
    live = Live(real.program(), None)
    first = capture_first_forward(live.model)
    builder = DependencyGraphBuilder(live.model, example_inputs=first)
    watched = GradientOrder(builder.group_parameters_by_layer())
    real.backward(live)
    watched.close()
    before = live.state()
    assert builder.get_update_order() == watched.update_order()
    assert builder.order_source == "data flow"
    assert builder.order_reason == "a forward pass was traced"
    assert_same(live.state(), before)
