"""The training script: killed, stopped, told otherwise; what it goes on from and what it shows."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _runs import (
    EVERY,
    EXAMPLES,
    STEPS,
    arguments,
    at_step,
    checkpoints,
    killed_at,
    log_of,
    losses,
    one_thread,
    result,
    step_of,
    train,
)

# isort: split
# Found where _runs says they are.
import _arguments
import _data
import _losslog
import _parts
import _progress
import _settings
import train_optimized

pytestmark = pytest.mark.filterwarnings("ignore:training goes on from step")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted; not to be written to."""
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    assert train(folder) == 0
    return folder


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(unbroken, tmp_path / "finished"))


# ---- Killed, resumed -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_bits(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    folder = tmp_path / "killed"
    more = ("--dataloader-workers", workers, "--auto-resume")
    killed_at(14, arguments(folder, *more), tmp_path / "said")
    assert max(losses(folder)) == 14
    assert not (folder / "final").exists()

    assert train(folder, *more, "--num-threads", 2) == 0
    out = capsys.readouterr().out
    assert re.search(r"resumed from \S+/step-000000(06|09|12) at step", out)
    assert re.search(r"audit: [2-8] replayed losses equal\n", out)
    assert result(folder) == result(unbroken)


def test_a_run_that_is_killed_again_and_again_comes_to_the_same_bits(
    unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    for step in (1, 2, 8, 9, 11, 17):  # before the first checkpoint, and while it still replays
        killed_at(step, arguments(folder, "--auto-resume"), tmp_path / "said")
    assert train(folder, "--auto-resume") == 0
    assert result(folder) == result(unbroken)


def test_the_run_of_a_process_of_its_own_is_the_same(unbroken: Path, tmp_path: Path) -> None:
    import pccheck_ext

    paths = [str(Path(pccheck_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_optimized.py", *arguments(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "a") == result(unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_loses_nothing(
    unbroken: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    folder = tmp_path / "stopped"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(number))
        assert train(folder) == 128 + number
    assert signal.getsignal(number) is before
    said = capfd.readouterr()
    assert f"{number.name}: stopping after this step" in said.err
    assert f"step 5 and everything before it is in {folder}/step-00000005" in said.out
    assert f"--output-dir {folder} --auto-resume" in said.out

    assert train(folder, "--auto-resume") == 0
    assert "nothing was logged after step 5" in capfd.readouterr().out
    assert result(folder) == result(unbroken)


def test_the_rate_rises_to_its_peak_and_a_resumed_one_is_in_force_at_once() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=9.0)

    def rates(schedule: _parts.WarmUp, count: int) -> list[float]:
        seen = []
        for _ in range(count):
            assert optimizer.param_groups[0]["lr"] == schedule.rate
            seen.append(schedule.rate)
            schedule.step()
        return seen

    schedule = _parts.WarmUp(optimizer, peak=2.0, steps=4)
    assert rates(schedule, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    other = _parts.WarmUp(optimizer, peak=4.0, steps=4)
    other.load_state_dict({"done": 1})
    assert rates(other, 2) == [2.0, 3.0]


def test_a_second_signal_stops_at_once() -> None:
    with _parts.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ---- Which checkpoint ----------------------------------------------------------------------------


def test_the_final_checkpoint_counts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints(finished) == {"final", *(f"step-{s:08d}" for s in (12, 15, 18))}
    assert step_of(finished, "final") == STEPS  # which no other one holds
    assert train(finished, "--auto-resume") == 0
    assert "nothing to do: step 20 has been reached" in capsys.readouterr().out
    assert train(finished, "--auto-resume", "--max-steps", STEPS + 4) == 0
    out = capsys.readouterr().out
    assert "resumed from" in out
    assert "final at step 20" in out


def test_a_run_that_goes_on_after_its_end_leaves_the_old_end_aside(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(finished, "--auto-resume", "--max-steps", 25) == 0
    assert "left aside as final.stale" in capsys.readouterr().out
    assert step_of(finished, "final") == 25
    assert step_of(finished, "final.stale") == STEPS
    assert "step-00000025" in checkpoints(finished)  # which stood for it meanwhile
    longer = tmp_path / "longer"
    assert train(longer, "--max-steps", 25) == 0
    assert result(finished) == result(longer)
    assert train(finished, "--auto-resume", "--max-steps", 26) == 0
    assert {"final.stale", "final.stale-2"} <= checkpoints(finished)


def test_an_end_that_was_not_saved_is_saved_when_the_run_is_started_again(
    tmp_path: Path, unbroken: Path
) -> None:
    folder = tmp_path / "run"
    assert train(folder, "--checkpoint-every", 1) == 0
    shutil.rmtree(folder / "final")
    assert train(folder, "--auto-resume") == 0
    assert result(folder) == result(unbroken)


def test_a_damaged_checkpoint_is_passed_over_and_told(
    finished: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "final")
    with (finished / "step-00000018" / "model.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    (finished / "step-00000015" / "manifest.json").write_text("{")
    assert train(finished, "--auto-resume") == 0
    out = capsys.readouterr().out
    assert "step-00000018 (step 18) cannot be used" in out
    assert "step-00000015 (step 15) cannot be used" in out
    assert "step-00000012 at step 12" in out
    assert result(finished) == result(unbroken)


def test_a_folder_of_which_nothing_can_be_used_is_an_error(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in checkpoints(finished):
        (finished / name / "checksums.bin").unlink()
    before = checkpoints(finished)
    assert train(finished, "--auto-resume") == 1
    assert "no checkpoint can be gone on from; tried: final" in capsys.readouterr().err
    assert checkpoints(finished) == before


@pytest.mark.parametrize(
    "missing", ["step-00000099", "{0}/step-00000099", "{0}", "{0}/checkpoint_step_7.pt"]
)
def test_a_missing_checkpoint_is_an_error_that_lists_what_is_there(
    finished: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    assert train(finished, "--resume-from-checkpoint", missing.format(finished)) == 1
    err = capsys.readouterr().err
    assert missing.format(finished) in err
    for name in ("final (step 20)", "step-00000012 (step 12)", "step-00000018 (step 18)"):
        assert name in err


def test_without_anything_there_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "empty"
    assert train(folder, "--resume-from-checkpoint", "final") == 1
    assert f"{folder} holds none at all" in capsys.readouterr().err
    assert not folder.exists()
    assert train(folder, "--auto-resume", "--max-steps", 2) == 0
    assert "holds no checkpoint, beginning with step 1" in capsys.readouterr().out


def test_a_run_in_the_folder_of_another_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result(finished)
    assert train(finished) == 1
    assert "give --auto-resume to go on from the newest, or another" in capsys.readouterr().err
    assert result(finished) == before


def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_left_aside(
    finished: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(finished, "--auto-resume", "--resume-from-checkpoint", "step-00000012") == 0
    assert "audit: 8 replayed losses equal" in capsys.readouterr().out
    assert {"final", "final.stale", "step-00000015.stale", "step-00000018"} <= checkpoints(finished)
    assert result(finished) == result(unbroken)


def test_a_checkpoint_of_another_run_begins_a_new_one(
    unbroken: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch, source = tmp_path / "branch", unbroken / "step-00000012"
    assert train(branch, "--resume-from-checkpoint", source) == 0
    _, *weights = result(branch)
    assert weights == list(result(unbroken)[1:])
    assert source.is_dir()
    assert train(finished, "--resume-from-checkpoint", source) == 1
    assert "is another run's" in capsys.readouterr().err


# ---- The configuration ---------------------------------------------------------------------------


def test_another_architecture_is_an_error_that_names_the_fields(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(_settings.CONFIGS["tiny"], layers=3, context=8)
    monkeypatch.setitem(_settings.CONFIGS, "tiny", tiny)
    before = result(finished)
    assert train(finished, "--auto-resume") == 1
    said = capsys.readouterr()
    fields = "context: 16 there, 8 here; layers: 2 there, 3 here. "
    assert f"another architecture: {fields}" in said.err
    assert "goes on with" not in said.out
    assert result(finished) == before


def test_another_hyper_parameter_is_told_and_used(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(_settings.CONFIGS["tiny"], weight_decay=0.25)
    monkeypatch.setitem(_settings.CONFIGS, "tiny", tiny)
    shutil.rmtree(finished / "final")
    assert train(finished, "--auto-resume", "--learning-rate", 0.5) == 0
    out = capsys.readouterr().out
    assert "warning: learning rate was 0.001 in the checkpoint; this run goes on with 0.5" in out
    assert "warning: weight decay was 0.1 in the checkpoint" in out
    assert re.search(r"^learning rate +0\.5 \(was 0\.001\) +command line +yes$", out, re.MULTILINE)
    assert "audit: does not apply: changed since those steps were logged: weight decay, lea" in out
    entries = _losslog.read_log(log_of(finished)).steps
    assert [entries[step].entry.rate for step in (18, 19, 20)] == [0.001, 0.5, 0.5]
    manifest = json.loads((finished / "final" / "manifest.json").read_bytes())
    groups = manifest["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.25, 0.5), (0.0, 0.5)]


def test_another_seed_starts_the_generators_and_the_data_anew(
    finished: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(finished / "final")
    seeds: list[tuple[int, bool]] = []

    def note() -> None:
        seeds.append((torch.initial_seed(), random.getstate() == random.Random(7).getstate()))

    at_step(monkeypatch, 19, note)
    assert train(finished, "--auto-resume", "--seed", 7) == 0
    assert seeds == [(7, True)]
    assert losses(finished)[18] == losses(unbroken)[18]
    assert losses(finished)[19] != losses(unbroken)[19]


# ---- The audit -----------------------------------------------------------------------------------


def tamper(folder: Path, step: int) -> None:
    """Turn over the last bit of a logged loss."""
    lines = log_of(folder).read_text().splitlines()
    for number, line in enumerate(lines):
        fields = json.loads(line)
        if fields.get("step") == step:
            bits = torch.tensor(fields["loss"], dtype=torch.float64).view(torch.int64) ^ 1
            lines[number] = json.dumps({**fields, "loss": bits.view(torch.float64).item()})
    log_of(folder).write_text("\n".join(lines) + "\n")


def test_the_audit_finds_one_bit_of_one_loss(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(finished, 18)
    again = ("--resume-from-checkpoint", "step-00000012")
    assert train(finished, *again) == 3
    err = capsys.readouterr().err
    assert "AUDIT FAILED: step 18, replayed from step 12" in err
    assert f"{log_of(finished)}:19 has" in err
    assert "5 losses before it are equal" in err
    assert not (finished / "final").exists()
    # Of the step that parted from what was logged, and is due for a checkpoint, there is none.
    assert max(step_of(finished, n) for n in checkpoints(finished) if "stale" not in n) == 15


def test_the_audit_can_be_left_out_and_the_new_history_counts(
    finished: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(finished, 14)
    tamper(finished, 19)
    again = ("--resume-from-checkpoint", "step-00000012")
    assert train(finished, *again, "--no-audit", "--max-steps", 16) == 0
    assert "audit: off (--no-audit)" in capsys.readouterr().out
    assert train(finished, "--auto-resume") == 0  # nor does what was logged after that, at 19
    assert result(finished) == result(unbroken)


def test_a_state_that_was_not_restored_is_found(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_data.BatchLoader, "load_state_dict", lambda self, state: None)
    assert train(finished, "--resume-from-checkpoint", "step-00000012") == 3
    assert "AUDIT FAILED: step 13" in capsys.readouterr().err


def test_the_end_of_a_log_may_be_torn(
    finished: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = log_of(finished).read_bytes()
    log_of(finished).write_bytes(whole[:-20])
    assert train(finished, "--resume-from-checkpoint", "step-00000012") == 0
    out = capsys.readouterr().out
    assert "its end, torn by a crash, is cut off" in out
    assert "audit: 7 replayed losses equal" in out
    assert result(finished) == result(unbroken)


def test_a_log_that_is_damaged_in_its_middle_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log_of(finished).read_text().splitlines(keepends=True)
    lines[5] = lines[5].replace("loss", "toss")
    log_of(finished).write_text("".join(lines))
    assert train(finished, "--resume-from-checkpoint", "step-00000012") == 1
    assert "losses.jsonl:6: not a line of this log" in capsys.readouterr().err


def entry(step: int, loss: float, micro_batch: int = 4) -> _losslog.Entry:
    return _losslog.Entry(step, loss, 1.0, 0.1, micro_batch, "eager")


def test_the_audit_compares_what_was_computed_alike(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "log"
    with _losslog.LossLog(_losslog.read_log(path), 0, {"seed": 1}, audited=True) as log:
        for step, loss in ((1, 1.0), (2, float("nan")), (3, 0.1), (4, 0.5)):
            log.write(entry(step, loss, micro_batch=4 if step < 3 else 2))
    history = _losslog.read_log(path)
    audit = _losslog.Audit(history, 1, "", said.append)
    assert [audit.micro_batch(step) for step in (1, 2, 3)] == [None, 4, 2]
    audit.check(entry(2, float("nan")))
    audit.check(entry(3, 0.2, micro_batch=4))
    audit.end()
    [line] = said
    assert line.startswith("audit: 1 replayed losses equal; 1 were computed in other pieces")
    assert line.endswith("1 logged ones were not reached")
    with pytest.raises(_losslog.AuditFailed, match="step 2"):
        _losslog.Audit(history, 1, "", said.append).check(entry(2, 0.0))


def test_a_log_forgets_what_a_run_with_other_settings_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def log(start: int, settings: dict[str, Any], *steps: int) -> None:
        history = _losslog.read_log(path)
        with _losslog.LossLog(history, start, settings, audited=True) as log:
            for step in steps:
                log.write(entry(step, float(step)))

    log(0, {"rate": 1.0}, 1, 2, 3, 4)
    log(2, {"rate": 1.0}, 3)
    assert list(_losslog.read_log(path).steps) == [1, 2, 3, 4]
    assert _losslog.read_log(path).differing(2, {"rate": 2.0, "new": 1}) == ["rate", "new"]
    assert _losslog.read_log(path).differing(4, {"rate": 2.0}) == []
    log(2, {"rate": 2.0})
    assert list(_losslog.read_log(path).steps) == [1, 2]


# ---- The data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_on_from_what_was_consumed(workers: int) -> None:
    text, _ = _data.read_text(None, 16)
    crops = _data.Crops(text, batch=3, length=16, seed=5)
    expected = [crops[number] for number in range(8)]
    before = torch.get_rng_state()
    loader = _data.BatchLoader(crops, workers)
    for _ in range(5):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    assert state == {"position": 5}

    loader = _data.BatchLoader(crops, workers)
    next(loader)
    loader.load_state_dict(state)
    for number, (inputs, targets) in zip(range(5, 8), loader, strict=False):
        assert torch.equal(inputs, expected[number][0])
        assert torch.equal(targets, expected[number][1])
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws from it


def test_batches_are_crops_of_the_text_and_depend_on_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    text, name = _data.read_text(path, 16)
    assert name.startswith("text, 200 bytes, ")
    inputs, targets = _data.Crops(text, 4, 16, seed=1)[9]
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    other, _ = _data.Crops(text, 4, 16, seed=2)[9]
    assert not torch.equal(inputs, other)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b"0123456789abcdef", "16 bytes are too few")]
)
def test_a_text_that_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert train(tmp_path / "run", "--data", tmp_path / "text") == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_text_that_changed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"all work and no play " * 20)
    assert train(tmp_path / "run", "--data", path, "--max-steps", 2) == 0
    path.write_bytes(b"all play and no work " * 20)
    assert train(tmp_path / "run", "--data", path, "--max-steps", 3, "--auto-resume") == 0
    assert "warning: data was 'text, 420 bytes" in capsys.readouterr().out


# ---- What is shown, and the arguments ------------------------------------------------------------


def test_one_table_tells_every_setting_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--max-steps", 1, "--deterministic", "--lr-scaling", "sqrt") == 0
    out = capsys.readouterr().out
    assert out.count("changes the mathematics") == 1
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    told = {row[0]: row[2:] for row in rows if len(row) == 4}
    assert told["width"] == ["config", "yes"]
    assert told["dataloader workers"] == ["command line", "no"]
    assert told["seed"] == ["default", "only bits"]
    assert told["batch size"] == ["config", "yes"]
    assert told["learning-rate scaling"] == ["command line", "yes"]
    assert told["deterministic algorithms"] == ["command line", "only bits"]
    assert told["torch"] == ["environment", "only bits"]
    assert told["device"] == ["device rule", "only bits"]
    assert told["checkpoint every"] == ["command line", "no"]
    assert set(told) > {"data", "max steps", "compile", "writer threads", "micro-batch size"}
    assert out.index("changes the mathematics") < out.index("step 1/1")


def test_the_environment_is_left_as_it_was_where_the_device_has_no_use_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = dict(os.environ)
    assert train(tmp_path, "--max-steps", 1) == 0
    assert dict(os.environ) == before


def test_deterministic_algorithms_are_switched_on(tmp_path: Path) -> None:
    assert train(tmp_path, "--max-steps", 1, "--deterministic") == 0
    assert torch.are_deterministic_algorithms_enabled()


def test_what_the_trainer_refuses_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import _training

    given: dict[str, Any] = {}

    def refusing(*args: Any, **kwargs: Any) -> None:
        given.update(kwargs)
        raise NotImplementedError("not in this version")

    monkeypatch.setattr(_training, "LayerwiseCheckpointTrainer", refusing)
    assert train(tmp_path, "--use-monitor", "--num-threads", 7) == 1
    assert f"no checkpoints can be made in {tmp_path}: not in this" in capsys.readouterr().err
    assert (given["use_monitor"], given["num_threads"]) == (True, 7)
    assert given["checkpoint_every"] == EVERY


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_only_for_what_takes_longer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(stream: io.StringIO) -> str:
        progress = _progress.Progress(2, 4, stream=stream)
        for step in (3, 4):
            progress.show(step, 1.5, 0.1)
        progress.line("something else")
        progress.close()
        return stream.getvalue()

    assert shown(Terminal()) == ""
    assert capsys.readouterr().out == "something else\n"
    monkeypatch.setattr(_progress, "DELAY_S", 0)
    assert "4/4" in shown(Terminal())
    capsys.readouterr()
    assert shown(io.StringIO()) == ""
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines()[:-1]] == ["3/4", "4/4"]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    shown(Terminal())
    assert "fallback: tqdm is not installed" in capsys.readouterr().out


def test_there_are_twenty_lines_or_so_of_a_long_run(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter(range(0, 100_000, 10))
    progress = _progress.Progress(0, 1000, stream=io.StringIO(), clock=lambda: float(next(times)))
    for step in range(1, 1001):
        progress.show(step, 1.0, 0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[-1].startswith("step 1000/1000 ")
    assert lines[-1].endswith(" 0.2 s/step")  # ten seconds since the line before


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("start_cuda.sh", ("cuda", 8, 1e-4, 8, 8)),
        ("start_mps.sh", ("mps", 2, 3e-5, 1, 4)),
    ],
)
def test_start_scripts_pass_their_settings_and_what_follows_wins(
    script: str, expected: tuple[Any, ...]
) -> None:
    def parsed(*more: str) -> Any:
        done = subprocess.run(
            ["bash", EXAMPLES / script, *more],
            env={**os.environ, "PYTHON": "echo"},
            capture_output=True,
            text=True,
            check=True,
        )
        program, *words = done.stdout.split()
        assert program == str(EXAMPLES / "train_optimized.py")
        return _arguments.parse(words, "")

    def told(options: Any) -> tuple[Any, ...]:
        return (
            options.device,
            options.batch_size,
            options.learning_rate,
            options.dataloader_workers,
            options.num_threads,
        )

    options = parsed()
    assert told(options) == expected
    assert options.enable_compile
    assert options.auto_resume
    changed = parsed("--batch-size", "3", "--no-enable-compile", "--config", "tiny")
    assert told(changed) == (expected[0], 3, *expected[2:])
    assert not changed.enable_compile
    assert changed.config == "tiny"
    assert os.access(EXAMPLES / script, os.X_OK)


@pytest.mark.parametrize(
    "words",
    [
        ["--batch-size", "0"],
        ["--batch-size", "x"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "-1"],
        ["--num-threads", "257"],
        ["--config", "huge"],
        ["--lr-scaling", "cubic"],
    ],
)
def test_arguments_that_cannot_be_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train_optimized.main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err
