"""However a program ends, what was begun is committed or it is said what was lost; never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pccheck_ext

START = """
import os, sys, threading, signal, torch, pccheck_ext
from torch import nn
model = nn.Linear(64, 64)
trainer = pccheck_ext.LayerwiseCheckpointTrainer(
    model, torch.optim.Adam(model.parameters()), checkpoint_dir=sys.argv[1],
    batch_size_mb=2, ratio=2, block_size_mb=0.25)
def step():
    trainer.zero_grad()
    model(torch.ones(1, 64)).sum().backward()
    trainer.step()
step(); step()
"""

ENDINGS = {
    "the script's end": "",
    "sys.exit": "sys.exit(0)",
    "an exception": "raise ZeroDivisionError('mine')",
    "the last reference": "del trainer, step; import gc; gc.collect()",
    "a thread that still runs": "threading.Thread(target=lambda: None).start()",
    "a forked child that ends first": (
        "pid = os.fork()\nif pid == 0: sys.exit(0)\nos.waitpid(pid, 0)"
    ),
    "a forked child that outlives it": (
        "r, w = os.pipe()\nif os.fork() == 0:\n    os.close(w); os.read(r, 1); os._exit(0)"
    ),
    "a forked child that ends while an operator saves": (
        "torch.ops.pccheck.save_chunks([torch.ones(1 << 24)], ['t'],"
        " sys.argv[1] + '/one.safetensors')\n"
        "pid = os.fork()\nif pid == 0: sys.exit(0)\nos.waitpid(pid, 0)"
    ),
    "a saving operator's ticket nobody waited for": (
        "torch.ops.pccheck.save_chunks([torch.ones(9)], ['t'], sys.argv[1] + '/one.safetensors')"
    ),
}


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_both_steps_are_committed_at(ending: str, tmp_path: Path) -> None:
    done = run(START + ENDINGS[ending], tmp_path)
    expected = 1 if ending == "an exception" else 0
    assert done.returncode == expected, done.stderr
    own = [line for line in done.stderr.splitlines() if "pccheck" in line]
    assert not own, done.stderr
    assert pccheck_ext.ModelRecovery(tmp_path).get_latest_checkpoint() == "step-00000002"
    left = set(os.listdir(tmp_path)) - {".lock", "step-00000001", "step-00000002"}
    assert left <= {"one.safetensors"}


def test_at_exit_it_is_said_which_checkpoint_was_lost_and_why(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    lose = "import shutil\ntrainer.wait(); shutil.rmtree(sys.argv[1]); step()"
    done = run(START + lose, run_directory)
    assert "pccheck_ext: at exit: checkpoint step-00000003 failed" in done.stderr
    assert str(run_directory) in done.stderr


def test_a_save_that_fails_at_exit_is_told_of(tmp_path: Path) -> None:
    script = START + (
        "import shutil\nos.mkdir(sys.argv[1] + '/gone')\n"
        "big = torch.ones(1 << 24)\n"
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "trainer.wait()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "torch.ops.pccheck.save_chunks([big], ['t'], sys.argv[1] + '/gone/one.safetensors')\n"
    )
    done = run(script, tmp_path)
    assert "at exit: save_chunks failed" in done.stderr
    assert "one.safetensors" in done.stderr
    assert "File too large" in done.stderr


def test_a_forked_child_is_told_that_it_cannot_save(tmp_path: Path) -> None:
    script = START + (
        "if os.fork() == 0:\n"
        "    try:\n        step()\n"
        "    except RuntimeError as error:\n        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait(); step()\n"
    )
    done = run(script, tmp_path)
    assert "which this one was forked from" in done.stdout, done.stderr
    assert pccheck_ext.ModelRecovery(tmp_path).get_latest_checkpoint() == "step-00000003"


def test_a_forked_child_may_use_the_model(tmp_path: Path) -> None:
    script = START + (
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    model(torch.ones(1, 64)).sum().backward()\n"
        "    torch.optim.SGD(model.parameters()).step()\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = run(script, tmp_path)
    assert done.stdout == "7\n", done.stderr
    assert pccheck_ext.ModelRecovery(tmp_path).get_latest_checkpoint() == "step-00000002"


def test_the_lock_is_free_although_a_forked_child_of_a_killed_trainer_lives_on(
    tmp_path: Path,
) -> None:
    script = START + (
        "r, w = os.pipe()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os.close(w); os.read(r, 1); os._exit(0)\n"
        "print(pid, flush=True); trainer.wait(); print('ready', flush=True); os.read(r, 1)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    child = int(trainer.stdout.readline())
    assert trainer.stdout.readline() == "ready\n"
    keep_alive = os.open(f"/proc/{child}/fd", os.O_RDONLY)  # the child is really there
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    os.close(keep_alive)
    next_one = START + "print(trainer.training_step)"
    script = next_one.replace("checkpoint_dir", "lock_timeout_s=2, checkpoint_dir")
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    trainer.stdout.close()


def test_sigint_while_waiting_for_the_disk_interrupts_and_the_save_still_ends(
    tmp_path: Path,
) -> None:
    script = START.replace("block_size_mb=0.25)", "block_size_mb=0.25, _manual_copier=True)") + ""
    script = script.replace("step(); step()\n", "step()\n") + (
        "timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "timer.start()\n"
        "try:\n    trainer.wait()\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        "trainer._session.release_all_copies()\n"
    )
    done = run(script, tmp_path)
    assert done.stdout == "interrupted\n", done.stderr
    assert done.returncode == 0, done.stderr
    assert pccheck_ext.ModelRecovery(tmp_path).get_latest_checkpoint() == "step-00000001"
