"""A disk that hangs while the engine clears up: no other thread is held, and deadlines are kept.

This file is also the program that is tested: it runs with a library of a few lines preloaded that
holds what is done in directories of a given name for as long as it is told to.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import memory_directory
from _waiting import DEADLINE_S, Running, eventually

import pccheck_ext
from pccheck_ext import CheckpointError, LayerwiseCheckpointTrainer, PCCheckAdapter, SaveTask

HUNG_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char held[256];  // how the path of the directory ends
static int waiting;

static int is_held(int directory) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  const ssize_t length = readlink(link, path, sizeof path);
  const ssize_t end = (ssize_t)strlen(held);
  return end > 0 && length >= end && memcmp(path + length - end, held, end) == 0;
}

static void wait_at(int directory) {
  pthread_mutex_lock(&mutex);
  ++waiting;
  while (is_held(directory)) pthread_cond_wait(&changed, &mutex);
  --waiting;
  pthread_mutex_unlock(&mutex);
}

int fsync(int file) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  wait_at(file);
  return real(file);
}

int unlinkat(int directory, const char* name, int flags) {
  static int (*real)(int, const char*, int);
  if (!real) real = dlsym(RTLD_NEXT, "unlinkat");
  wait_at(directory);
  return real(directory, name, flags);
}

void hung_disk_hold(const char* path_end) {
  pthread_mutex_lock(&mutex);
  strncpy(held, path_end, sizeof held - 1);
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&mutex);
}

int hung_disk_waiting(void) { return waiting; }
"""

TIMEOUT_S = 0.2
LATE_S = 5.0
"""Far later than a deadline may be kept, far sooner than a disk that hangs goes on."""


# --- The program ---------------------------------------------------------------------------------


class Disk:
    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    def hang_at(self, path_end: str) -> None:
        self._library.hung_disk_hold(path_end.encode())

    def go_on(self) -> None:
        self.hang_at("")

    def await_somebody(self) -> None:
        eventually(lambda: self._library.hung_disk_waiting() > 0, "the disk is waited for")


def adapter_in(directory: Path) -> PCCheckAdapter:
    return PCCheckAdapter(
        checkpoint_dir=directory, batch_size_mb=1, ratio=1, block_size_mb=1 / 16, keep_last=1
    )


def save(adapter: PCCheckAdapter, step: int) -> None:
    adapter.save_layers_batch([SaveTask("layer", step, [torch.ones(3)])])
    adapter.finish_step()
    adapter.wait()


def try_shutdown(shutdown: Callable[[float], None]) -> str:
    begun = time.monotonic()
    try:
        shutdown(TIMEOUT_S)
    except TimeoutError as error:
        return str(error) if time.monotonic() - begun < LATE_S else "too late"
    return "returned"


def retiring(disk: Disk, directory: Path) -> dict[str, Any]:
    disk.hang_at("/step-00000001")
    adapter = adapter_in(directory)
    save(adapter, 1)
    save(adapter, 2)
    disk.await_somebody()
    keep = Running(lambda: adapter.session.keep({2}))
    keep.end()
    told = [try_shutdown(adapter.shutdown) for _ in range(2)]
    found = {"told": told, "open": adapter.session.is_open, "stats": adapter.stats()}
    disk.go_on()
    adapter.shutdown()
    return {**found, "open after": adapter.session.is_open, "left": sorted(os.listdir(directory))}


def removing(disk: Disk, directory: Path) -> dict[str, Any]:
    model = torch.nn.Linear(3, 3)
    trainer = LayerwiseCheckpointTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        checkpoint_dir=directory,
        batch_size_mb=1,
        ratio=1,
        block_size_mb=1 / 16,
        keep_last=1,
    )
    for _ in range(2):
        trainer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        trainer.step()
    trainer.wait()
    disk.hang_at("/step-00000001.partial")
    told = [try_shutdown(trainer.shutdown) for _ in range(2)]
    try:
        trainer.save_full_checkpoint("more")
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    disk.go_on()
    trainer.shutdown()
    return {
        "told": told,
        "refused": refused,
        "open after": trainer._session.is_open,
        "committed": trainer.stats()["checkpoints_committed"],
        "left": sorted(os.listdir(directory)),
    }


def setting_aside(disk: Disk, directory: Path) -> dict[str, Any]:
    before = adapter_in(directory)
    save(before, 5)
    before.shutdown()
    adapter = adapter_in(directory)
    disk.hang_at(f"/{directory.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saving = Running(lambda: save(adapter, 1))
        disk.await_somebody()  # which needs the GIL
        disk.go_on()
        saving.end()
    adapter.shutdown()
    return {"left": sorted(os.listdir(directory))}


def left_hanging(disk: Disk, directory: Path) -> dict[str, Any]:
    disk.hang_at("/step-00000001")
    adapter = adapter_in(directory)
    save(adapter, 1)
    save(adapter, 2)
    disk.await_somebody()
    return {"told": try_shutdown(adapter.shutdown)}


def run_all(library: str, directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    disk = Disk(library)
    cases = (retiring, removing, setting_aside, left_hanging)  # the last to the process's end
    return {case.__name__: case(disk, directory / case.__name__) for case in cases}


# --- The tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as built, memory_directory() as directory:
        library = Path(built) / "hung_disk.so"
        compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-x", "c", "-"]
        subprocess.run(
            [*compiler, "-o", str(library), "-ldl"], input=HUNG_DISK.encode(), check=True
        )
        path = [str(Path(pccheck_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        preloaded = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(path)}
        done = subprocess.run(
            [sys.executable, __file__, str(library), str(directory)],
            env={**os.environ, **preloaded},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        yield {**json.loads(done.stdout), "stderr": done.stderr}


def assert_told_of_clearing_up(told: str) -> None:
    assert "still being cleared up" in told


def test_shutdown_keeps_its_timeout_while_an_old_checkpoint_is_retired(
    done: dict[str, Any],
) -> None:
    found = done["retiring"]
    for told in found["told"]:
        assert_told_of_clearing_up(told)
    assert found["open"]
    assert found["stats"]["checkpoints_committed"] == 2
    assert not found["open after"]
    assert found["left"] == [".lock", "step-00000002"]


def test_shutdown_keeps_its_timeout_while_what_could_be_recycled_is_removed(
    done: dict[str, Any],
) -> None:
    found = done["removing"]
    for told in found["told"]:
        assert_told_of_clearing_up(told)
    assert "being closed" in found["refused"]
    assert not found["open after"]
    assert found["committed"] == 2
    assert found["left"] == [".lock", "step-00000002"]


def test_other_threads_run_while_later_checkpoints_are_set_aside(done: dict[str, Any]) -> None:
    assert done["setting_aside"]["left"] == [".lock", "step-00000001", "step-00000005.stale"]


def test_the_process_ends_all_the_same_and_says_so(done: dict[str, Any]) -> None:
    assert_told_of_clearing_up(done["left_hanging"]["told"])
    assert "at exit: saving to" in done["stderr"]


if __name__ == "__main__":
    print(json.dumps(run_all(sys.argv[1], Path(sys.argv[2]))))
