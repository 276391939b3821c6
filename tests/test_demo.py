"""The demo: that it passes, and that it fails where something differs."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pccheck_ext

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    # Its processes import the package that is tested here, installed or not.
    paths = [str(Path(pccheck_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return importlib.import_module("demo")


def tiny(folder: Path, *more: str) -> list[str]:
    return ["--config", "tiny", "--threads", "1", "--dir", str(folder), *more]


def test_a_killed_run_is_resumed_and_no_bit_differs(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(tiny(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "no bit differs" in out
    assert "SIGKILL in step" in out
    assert out.count("equal") == 5
    assert "differs\n" not in out
    for row in ("checkpoints committed", "stall per checkpoint", "step inflation", "durable"):
        assert row in out
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_in_the_checkpoint_makes_the_demo_fail(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(tiny(tmp_path, "--forget", "loader")) == 1
    out = capsys.readouterr().out
    assert "no bit differs" not in out
    assert "resumed run, step" in out
    assert "data position.generator: " in out
    [kept] = tmp_path.iterdir()
    assert str(kept) in out


def test_a_run_that_fails_says_why(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "gone.py"))
    assert demo.main(tiny(tmp_path)) == 1
    assert "the reference run failed: " in capsys.readouterr().err


def flipped(value: torch.Tensor) -> torch.Tensor:
    """`value` with the lowest bit of its last byte turned over."""
    turned = value.clone()
    turned.view(-1).view(torch.uint8)[-4] ^= 1
    return turned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["model"].update(w=flipped(s["model"]["w"])), "state.model.w: 1 of 6 values"),
        (lambda s: s["model"].update(w=s["model"]["w"].double()), "state.model.w: torch.float64"),
        (lambda s: s["model"].update(w=-s["model"]["w"]), "state.model.w: 6 of 6 values"),
        (lambda s: s["model"].pop("w"), "state.model: other entries"),
        (lambda s: s["groups"][0].update(lr=0.1 + 2**-56), "state.groups.0.lr: "),
        (lambda s: s["groups"].append({}), "state.groups: 2 entries instead of 1"),
        (lambda s: s.update(step=3.0), "state.step: float instead of int"),
        (lambda s: s.update(zero=-0.0), "state.zero: -0.0 instead of 0.0"),
    ],
)
def test_every_difference_is_found(
    demo: Any, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    def state() -> dict[str, Any]:
        model = {"w": torch.zeros(2, 3), "n": torch.tensor(float("nan"))}
        return {"model": model, "groups": [{"lr": 0.1}], "step": 3, "zero": 0.0}

    assert list(demo.differences(state(), state(), "state")) == []
    changed = state()
    change(changed)
    [line] = demo.differences(changed, state(), "state")
    assert line.startswith(said)


def entries(steps: range, seconds: Callable[[int], float]) -> list[dict[str, Any]]:
    def each() -> Iterator[dict[str, Any]]:
        at = 100.0
        for step in steps:
            at += seconds(step)
            yield {"step": step, "loss": 1 / step, "norm": 0.5, "lr": 0.1, "at": at}

    return list(each())


def test_a_step_that_was_logged_differently_is_named(demo: Any) -> None:
    reference = entries(range(1, 9), lambda step: 1.0)
    resumed = entries(range(5, 9), lambda step: 2.0)
    assert list(demo.log_differences(resumed, reference, "resumed")) == []
    resumed[2]["loss"] += 1e-15
    [line] = demo.log_differences(resumed, reference, "resumed")
    assert line.startswith("resumed run, step 7: loss: ")


def test_inflation_compares_neighbours_and_leaves_out_what_surrounds_a_block(demo: Any) -> None:
    def seconds(step: int) -> float:
        if (step - 1) % demo.BLOCK == 0 or step <= 2 * demo.BLOCK:
            return 50.0
        return 1.25 if demo.is_saved(step) else 1.0

    measured = demo.inflation(entries(range(1, 61), seconds))
    assert measured.saved == pytest.approx([0.25] * 6)
    assert measured.noise == pytest.approx([0.0] * 5)


def test_the_moment_of_the_kill_lies_within_a_step(demo: Any) -> None:
    log = entries(range(1, 11), lambda step: 2.0)
    kill = demo.Kill(at_step=10.25, after_s=None)
    assert kill.due(log[:9]) is None
    assert kill.due(log) == pytest.approx(log[-1]["at"] + 0.5)
    assert replace(kill, after_s=3.0).due(log) == pytest.approx(log[0]["at"] + 3.0)


def test_more_lost_steps_than_can_be_in_flight_are_a_difference(demo: Any, tmp_path: Path) -> None:
    options = demo.parse(tiny(tmp_path, "--steps", "8"))
    plan = demo.make_plan(options, tmp_path)
    state = {"model": demo.GPT(plan.gpt).state_dict(), "optimizer": {"state": {}}}
    reference = entries(range(1, 9), lambda step: 1.0)
    summary = {"losses": [entry["loss"] for entry in reference], "stats": {}}
    for run in ("reference", "resumed"):
        torch.save(state, replace(plan, run=run).path(".pt"))
    replace(plan, run="resumed").path(".json").write_text(json.dumps(summary))

    def wrong(finished: int) -> list[str]:
        logs = {"reference": reference, "killed": reference[:finished], "resumed": reference[2:]}
        checks = demo.compare(replace(plan, run="resumed"), logs, 2)
        return [line for check in checks for line in check.wrong if not line.startswith("on disk")]

    assert wrong(finished=4) == []
    assert wrong(finished=5) == ["3 steps were lost, and 2 checkpoints at most were in flight"]
