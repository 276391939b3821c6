"""What each tuning argument does, measured while the disk stands still.

This file is also the program that measures: it runs with a library of a few lines preloaded that
counts the engine's writes, notes where they go, and holds them for as long as it is told to.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import memory_directory
from _waiting import DEADLINE_S, Running, eventually, threads_of
from torch import nn

import pccheck_ext
from pccheck_ext import LayerwiseCheckpointTrainer, PCCheckAdapter, SaveTask

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
LAYERS, LAYER_BYTES = 12, 256 * KIB  # a state of three MiB

THREADS = (1, 3, 6)
IN_FLIGHT = (1, 2, 4)
STAGING = ((1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (1.0, 4.0))  # batch_size_mb, ratio
CHUNKS = (1, 2, 4)

SLOW_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int held, in_flight, most, count;
static long offsets[4096];

static int is_writer(void) {
  char name[16];
  prctl(PR_GET_NAME, name);
  return strcmp(name, "pccheck-write") == 0;
}

ssize_t pwrite(int file, const void* bytes, size_t size, off_t offset) {
  static ssize_t (*real)(int, const void*, size_t, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "pwrite");
  if (!is_writer()) return real(file, bytes, size, offset);
  pthread_mutex_lock(&mutex);
  if (++in_flight > most) most = in_flight;
  if (count < 4096) offsets[count++] = offset;
  while (held) pthread_cond_wait(&changed, &mutex);
  pthread_mutex_unlock(&mutex);
  const ssize_t written = real(file, bytes, size, offset);
  pthread_mutex_lock(&mutex);
  --in_flight;
  pthread_mutex_unlock(&mutex);
  return written;
}

void slow_disk_hold(int hold) {
  pthread_mutex_lock(&mutex);
  held = hold;
  if (hold) most = count = 0;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&mutex);
}

int slow_disk_in_flight(void) { return in_flight; }
int slow_disk_most(void) { return most; }
long slow_disk_offset(int i) { return i < count ? offsets[i] : -1; }
"""


# --- The program ---------------------------------------------------------------------------------


class Disk:
    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    def hold(self) -> None:
        self._library.slow_disk_hold(1)

    def go_on(self) -> None:
        self._library.slow_disk_hold(0)

    @property
    def writes_in_flight(self) -> int:
        return int(self._library.slow_disk_in_flight())

    @property
    def most_in_flight(self) -> int:
        return int(self._library.slow_disk_most())

    def offsets(self, count: int) -> list[int]:
        return [int(self._library.slow_disk_offset(i)) for i in range(count)]


def state() -> nn.Module:
    """Equal layers; stepped by SGD without momentum, they are all there is to save."""
    elements = LAYER_BYTES // 4
    return nn.Sequential(*(nn.Linear(elements, 1, bias=False) for _ in range(LAYERS)))


class Training:
    def __init__(self, directory: Path, **options: Any) -> None:
        self.model = state()
        settings = {
            "checkpoint_dir": directory,
            "block_size_mb": BLOCK / MIB,
            "batch_size_mb": 16.0,
            "ratio": 2.0,
            "max_async": 8,
            "num_threads": 4,
        }
        self.trainer = LayerwiseCheckpointTrainer(
            self.model,
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            **{**settings, **options},  # type: ignore[arg-type]
        )

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.trainer.step()

    def stat(self, name: str) -> int:
        return int(self.trainer.stats()[name])


def writes_at_once(disk: Disk, directory: Path, threads: int) -> int:
    training = Training(directory, num_threads=threads)
    disk.hold()
    training.step()
    training.trainer.end_step()
    eventually(lambda: disk.writes_in_flight == threads, f"{threads} writes are in flight")
    disk.go_on()
    training.trainer.shutdown()
    return disk.most_in_flight


def checkpoints_at_once(disk: Disk, directory: Path, max_async: int) -> dict[str, int]:
    training = Training(directory, max_async=max_async)
    disk.hold()
    running = Running(lambda: [training.step() for _ in range(8)])
    eventually(lambda: training.stat("in_flight") == max_async, "so many are in flight")
    begin = training.trainer.adapter.flight
    eventually(
        lambda: begin.count() == max_async and training.trainer.training_step == max_async,
        "the loop is held before the next step",
    )
    found = {"in_flight": training.stat("in_flight"), "steps": training.trainer.training_step}
    disk.go_on()
    running.end()
    training.trainer.shutdown()
    return found


def staged_ahead(disk: Disk, directory: Path, batch_size_mb: float, ratio: float) -> dict[str, Any]:
    """How far the loop comes in its second step, and how much is staged of the first by then."""
    training = Training(directory, batch_size_mb=batch_size_mb, ratio=ratio)
    disk.hold()
    training.step()
    running = Running(training.step)
    eventually(
        lambda: training.stat("free_slots") == 0 or not running.is_alive(),
        "the pool is full, or the step taken",
    )
    slot = training.stat("staging_bytes") // training.stat("slots")
    found = {
        "passed": not running.is_alive(),
        "staging_bytes": training.stat("staging_bytes"),
        "taken_bytes": slot * (training.stat("slots") - training.stat("free_slots")),
    }
    disk.go_on()
    running.end()
    training.trainer.shutdown()
    return found


def growing_ranges(disk: Disk, directory: Path) -> dict[str, int]:
    """Per number of chunks: how many ranges of the file the four writers are in at once."""
    training = Training(directory, num_threads=4)
    found = {}
    for chunks in CHUNKS:  # of one trainer, one after the other
        disk.hold()
        training.trainer.adapter.save_entire_checkpoint_in_chunks(f"in-{chunks}", 0, chunks)
        eventually(lambda: disk.writes_in_flight == 4, "every writer has a block")
        blocks = sorted(offset // BLOCK for offset in disk.offsets(4))
        found[str(chunks)] = 1 + sum(after > block + 1 for block, after in pairwise(blocks))
        disk.go_on()
        training.trainer.wait()
    training.trainer.shutdown()
    return found


def measure(library: str, directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    disk = Disk(library)
    found: dict[str, Any] = {
        "writes": {n: writes_at_once(disk, directory / f"writes-{n}", n) for n in THREADS},
        "checkpoints": {
            n: checkpoints_at_once(disk, directory / f"checkpoints-{n}", n) for n in IN_FLIGHT
        },
        "chunks": growing_ranges(disk, directory / "chunks"),
    }
    found["staging"] = {
        f"{batch} x {ratio}": staged_ahead(disk, directory / f"{batch}-{ratio}", batch, ratio)
        for batch, ratio in STAGING
    }
    return found


# --- The tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as built, memory_directory() as directory:
        library = Path(built) / "slow_disk.so"
        compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-x", "c", "-"]
        subprocess.run(
            [*compiler, "-o", str(library), "-ldl"], input=SLOW_DISK.encode(), check=True
        )
        path = [str(Path(pccheck_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        preloaded = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(path)}
        done = subprocess.run(
            [sys.executable, __file__, str(library), str(directory)],
            env={**os.environ, **preloaded},
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout)


def test_as_many_blocks_are_being_written_at_once_as_there_are_threads(
    measured: dict[str, Any],
) -> None:
    assert measured["writes"] == {str(threads): threads for threads in THREADS}


def test_as_many_checkpoints_are_in_flight_as_may_be_and_the_next_step_waits(
    measured: dict[str, Any],
) -> None:
    wanted = {str(most): {"in_flight": most, "steps": most} for most in IN_FLIGHT}
    assert measured["checkpoints"] == wanted


@pytest.mark.parametrize(("batch", "ratio"), STAGING)
def test_what_is_staged_ahead_of_a_disk_that_hangs_is_batch_size_times_ratio(
    batch: float, ratio: float, measured: dict[str, Any]
) -> None:
    found = measured["staging"][f"{batch} x {ratio}"]
    memory = int(batch * ratio * MIB)
    assert found["staging_bytes"] == memory
    if memory >= LAYERS * LAYER_BYTES + 4 * BLOCK:
        # All of the step is staged, so that the loop may change it: it is not held.
        assert found["passed"]
    else:
        assert not found["passed"]
        assert found["taken_bytes"] == memory


def test_as_many_ranges_of_the_file_grow_at_the_same_time_as_there_are_chunks(
    measured: dict[str, Any],
) -> None:
    assert measured["chunks"] == {str(chunks): chunks for chunks in CHUNKS}


# Without the library: these need no disk that stands still.


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as path:
        yield path


@pytest.mark.parametrize(
    ("buffer_size_mb", "batches"),
    [(None, LAYERS), (0.5, LAYERS // 2), (1.0, LAYERS // 4), (2.0, 2), (50.0, 1)],
)
def test_layers_are_handed_to_the_adapter_in_batches_of_the_buffers_size(
    buffer_size_mb: float | None, batches: int, directory: Path
) -> None:
    training = Training(directory, buffer_size_mb=buffer_size_mb)
    sizes: list[int] = []
    hand_over = training.trainer.scheduler.save_handler

    def counted(tasks: list[SaveTask]) -> Any:
        size = sum(task.size_bytes for task in tasks)
        if size:  # what is of no layer's parameters comes last
            sizes.append(size)
        return hand_over(tasks)

    training.trainer.scheduler.save_handler = counted
    for _ in range(3):
        training.step()
    training.trainer.shutdown()
    assert sum(sizes) == 3 * LAYERS * LAYER_BYTES
    # Layers that the update is to be spared are handed over after it, in batches of their own.
    split = 3 if buffer_size_mb is not None else 0
    assert 3 * batches <= len(sizes) <= 3 * batches + split
    if buffer_size_mb is None:
        assert set(sizes) == {LAYER_BYTES}
    else:
        assert max(sizes) == min(buffer_size_mb * MIB, LAYERS * LAYER_BYTES)


@pytest.mark.parametrize("threads", [1, 5])
def test_in_monitor_mode_the_writers_are_the_monitors(threads: int, directory: Path) -> None:
    adapter = PCCheckAdapter(
        checkpoint_dir=directory, use_monitor=True, num_threads=threads, batch_size_mb=8.0
    )
    monitor = adapter.session.monitor_process
    assert monitor is not None

    def writers(process: int) -> int:
        names = [
            Path(f"/proc/{process}/task/{thread}/comm").read_text().strip()
            for thread in threads_of(process)
        ]
        return names.count("pccheck-write")

    before = writers(os.getpid())
    eventually(lambda: writers(monitor) == threads, "its threads have their names")
    adapter.save_layers_batch([SaveTask("a", 1, [torch.ones(4)])])
    assert writers(os.getpid()) == before
    adapter.shutdown()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
