"""The training script and files of the old form: what fits is gone on from, nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import at_step, log_of, losses, one_thread, train
from safetensors.torch import load_file

# isort: split
# Found where _runs says they are.
import _legacy
import _settings
from _gpt import GPT, GPTConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def old_file(path: Path, number: int, **changed: Any) -> dict[str, Any]:
    """Write a file as the older script did, of a tiny model after a step; returns its content."""
    torch.manual_seed(99)
    model = GPT(GPTConfig(context=16, width=32, layers=2, heads=2, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tokens = torch.randint(256, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    content = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "step": number,
        "loss_history": [3.0, 2.5],
        "step_history": [number - 1, number],
        "config": {"d_model": 32, "num_layers": 2, "nhead": 2, "vocab_size": 256, "note": None},
        **changed,
    }
    content = {key: value for key, value in content.items() if value is not ...}
    torch.save(content, path)
    return content


def test_a_file_of_the_old_form_is_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old_file(tmp_path / "checkpoint_step_400.pt", 400)
    old_file(tmp_path / "checkpoint_step_4000.pt", 4000)
    seeds: list[int] = []
    at_step(monkeypatch, 4001, lambda: seeds.append(torch.initial_seed()))
    assert train(tmp_path, "--auto-resume", "--max-steps", 4003) == 0
    out = capsys.readouterr().out
    assert "checkpoint_step_4000.pt at step 4000" in out
    assert list(losses(tmp_path)) == [4001, 4002, 4003]
    assert "audit: does not apply: files of the old form hold no random numbers" in out
    manifest = json.loads((tmp_path / "final" / "manifest.json").read_bytes())
    assert manifest["training_step"] == 4003
    assert manifest["extra"]["loader"] == {"position": 4003}
    assert [group["lr"] for group in manifest["optimizer"]["param_groups"]] == [1e-3, 1e-3]
    history = load_file(tmp_path / "final" / "extra.safetensors")
    assert history["progress.loss_steps"].tolist() == [3999, 4000, 4001, 4002, 4003]
    assert history["progress.losses"].tolist()[:2] == [3.0, 2.5]
    assert seeds == [4000]  # not that of the run's beginning: dropout would repeat itself
    # What was made since is newer.
    assert train(tmp_path, "--auto-resume", "--max-steps", 4004) == 0
    assert "step-00004002 at step 4002" not in capsys.readouterr().out


def test_an_old_final_model_counts_by_the_step_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_file(tmp_path / "checkpoint_step_400.pt", 400)
    old_file(tmp_path / "final_model.pt", 401)
    assert train(tmp_path, "--auto-resume", "--max-steps", 402) == 0
    assert "final_model.pt at step 401" in capsys.readouterr().out


def test_model_and_optimizer_of_the_old_form_are_taken_over(tmp_path: Path) -> None:
    content = old_file(tmp_path / "checkpoint_step_7.pt", 7)
    old = _legacy.read_old(tmp_path / "checkpoint_step_7.pt")
    assert (old.step, old.losses, old.loss_steps) == (7, [3.0, 2.5], [6, 7])
    assert old.architecture == {"width": 32, "layers": 2, "heads": 2, "vocabulary": 256}
    model = GPT(GPTConfig(context=16, width=32, layers=2, heads=2, dropout=0.1))
    optimizer = torch.optim.AdamW(model.param_groups(0.3), lr=0.2)
    _legacy.adopt(old, model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, content["model_state_dict"][name])
    moments = content["optimizer_state_dict"]["state"]
    for number, parameter in enumerate(model.parameters()):  # one group then, two now
        for key, value in moments[number].items():
            assert torch.equal(optimizer.state[parameter][key], value)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_names_of_compiled_models_are_understood(tmp_path: Path) -> None:
    state = GPT(GPTConfig(context=16, width=32, layers=2, heads=2)).state_dict()
    wrapped = {f"_orig_mod.module.{name}": value for name, value in state.items()}
    old_file(tmp_path / "a.pt", 7, model_state_dict=wrapped)
    assert list(_legacy.read_old(tmp_path / "a.pt").model) == list(state)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"optimizer_state_dict": ..., "step": ...}, "has no optimizer_state_dict, step"),
        ({"step": "400"}, "step is '400'"),
        ({"step": True}, "step is True"),
        ({"loss_history": [1.0]}, "loss_history and step_history"),
        ({"loss_history": "ab"}, "loss_history and step_history"),
        ({"model_state_dict": {"w": 1}}, "model_state_dict is not a dict of tensors"),
        ({"optimizer_state_dict": {"state": []}}, "optimizer_state_dict is not what"),
        ({"model_state_dict": {"w": torch.zeros(1)}}, "tokens.weight is not in the file"),
        (
            {"optimizer_state_dict": {"state": {}, "param_groups": []}},
            "over groups of [] parameters",
        ),
        ({"config": {"d_model": 64}}, "another architecture: width: 64 there, 32 here"),
    ],
)
def test_an_old_file_that_does_not_fit_is_a_clear_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    said: str,
) -> None:
    path = tmp_path / "checkpoint_step_400.pt"
    old_file(path, 400, **changed)
    for how in (("--auto-resume",), ("--resume-from-checkpoint", path)):
        assert train(tmp_path, *how, "--max-steps", 402) == 1
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
    assert not log_of(tmp_path).exists()


def test_a_hostile_old_file_is_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, path = tmp_path / "executed", tmp_path / "final_model.pt"
    old_file(path, 400, config=Hostile(mark))
    assert train(tmp_path, "--resume-from-checkpoint", path) == 1
    assert "cannot be read as tensors and plain values alone" in capsys.readouterr().out
    path.write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    assert train(tmp_path, "--auto-resume") == 1
    assert "final_model.pt (unreadable)" in capsys.readouterr().err
    assert not mark.exists()


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    content = old_file(tmp_path / "a.pt", 7)
    model = GPT(GPTConfig(context=16, width=32, layers=2, heads=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = content["optimizer_state_dict"]["state"]
    for entries, said in (
        ({**state[3], "exp_avg": torch.zeros(7)}, "exp_avg of parameter 3 is"),
        ({"momentum_buffer": torch.zeros(32)}, "not Adam's or AdamW's"),
    ):
        changed = {**content["optimizer_state_dict"], "state": {**state, 3: entries}}
        torch.save({**content, "optimizer_state_dict": changed}, tmp_path / "b.pt")
        old = _legacy.read_old(tmp_path / "b.pt")
        with pytest.raises(_settings.TrainError, match=said):
            _legacy.adopt(old, model, torch.optim.AdamW(model.param_groups(0.1)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
