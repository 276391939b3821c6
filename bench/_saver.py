"""Processes that code blocks and write them: what a writer pool with a codec in it would cost.

The state lies in memory that both sides see, so the process that trains spends nothing on saving,
and no interpreter lock couples the two: some codecs hold it while they code. `Saver` is the
trainer's side; run as a program this file is the other one: a thread that copies blocks into slots,
one that codes them, a few that write, all of the priority that the engine's threads have:

    python _saver.py MEMORY_FD LAYOUT_JSON

It reads one request a line (JSON) and answers in lines. Writing is direct, in blocks at offsets of
their own that are multiples of 4096, over a file that has its extents already. A device slower than
the one there is is imitated by pacing: a write ends no sooner than that device would have ended it.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _coders import CODECS, Part, Words
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "Layout", "Memory", "Saved", "Saver", "blocks_of", "rounded"]

BLOCK_BYTES = 2 << 20
ALIGNMENT = 4096
Layout = dict[str, tuple[int, str, int]]
"""Kind -> offset in the shared memory, NumPy dtype, number of elements."""


def rounded(size_bytes: int) -> int:
    """What a block of that size takes on disk."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def blocks_of(words: Words) -> list[Words]:
    step = BLOCK_BYTES // words.itemsize
    return [words[at : at + step] for at in range(0, len(words), step)]


class Memory:
    """Flat arrays by name, in anonymous memory that other processes can map."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.layout: Layout = {}
        at = 0
        for name, array in arrays.items():
            self.layout[name] = (at, array.dtype.str, array.size)
            at += rounded(array.nbytes)
        self.fd = os.memfd_create("state")
        os.ftruncate(self.fd, at)
        self.map = mmap.mmap(self.fd, at)
        for name, mapped in mapped_arrays(self.map, self.layout).items():
            np.copyto(mapped, arrays[name])

    def close(self) -> None:
        """The mapping goes with the last array on it."""
        os.close(self.fd)


def mapped_arrays(memory: mmap.mmap, layout: Layout) -> dict[str, Words]:
    return {
        name: np.frombuffer(memory, dtype, count, offset)
        for name, (offset, dtype, count) in layout.items()
    }


@dataclass(frozen=True)
class Saved:
    """One save by one process or several: seconds from the request, processor time of all."""

    durable_s: float
    core_s: float


class Saver:
    """`count` processes that share out the blocks.

    The arrays named `previous.<kind>` are what deltas differ from.
    """

    def __init__(self, memory: Memory, count: int, writers: int) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(memory.fd), json.dumps(memory.layout)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                pass_fds=[memory.fd],
            )
            for _ in range(count)
        ]  # fmt: skip
        self.writers = -(-writers // count)
        self.started = 0.0

    def save(self, codec: str | None, path: Path, pace: float | None) -> Saved:
        """Writes the state to `path`, coded or as it is; `pace` in bytes per second."""
        self.begin(codec, path, pace)
        return self.end()

    def begin(self, codec: str | None, path: Path, pace: float | None) -> None:
        self.started = time.perf_counter()
        for i, process in enumerate(self.processes):
            request = {
                "codec": codec,
                "share": [i, len(self.processes)],
                "path": f"{path}.{i}",
                "pace": pace and pace / len(self.processes),
                "writers": self.writers,
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        self.is_staged = False

    def staged(self) -> None:
        """Returns when the state may change."""
        if not self.is_staged:
            for process in self.processes:
                self._answer(process)
            self.is_staged = True

    def end(self) -> Saved:
        self.staged()
        answers = [self._answer(process) for process in self.processes]
        # All processes of a machine read the same clock.
        durable_s = max(answer["durable_at"] for answer in answers) - self.started
        return Saved(durable_s, sum(answer["core_s"] for answer in answers))

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a saving process ended with exit status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


# --- The other side -------------------------------------------------------------------------------


class Slots:
    """Page-aligned places for a block each, made once."""

    def __init__(self, count: int) -> None:
        self.free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(count):
            memory = mmap.mmap(-1, BLOCK_BYTES + ALIGNMENT)
            memory[:] = bytes(len(memory))
            self.free.put(memoryview(memory))


class Device:
    """A file that is written directly, as fast as there or as a slower device would."""

    def __init__(self, path: str, size_bytes: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self.fd = os.open(path, flags | os.O_DIRECT, 0o644)
        if os.fstat(self.fd).st_size < size_bytes:
            fill = mmap.mmap(-1, BLOCK_BYTES)
            for at in range(0, size_bytes, BLOCK_BYTES):
                os.pwrite(self.fd, fill, at)
            os.fsync(self.fd)
        self.idle_at = 0.0

    def write(
        self, place: memoryview, size_bytes: int, offset: int, pace: float | None, queued: float
    ) -> None:
        if pace is not None:
            # From when it was queued: a device goes on with the next write without being woken.
            self.idle_at = max(self.idle_at, queued) + size_bytes / pace
        ends = self.idle_at
        if os.pwrite(self.fd, place[:size_bytes], offset) != size_bytes:
            raise OSError(f"pwrite wrote less than {size_bytes} bytes at {offset}")
        if pace is not None:
            time.sleep(max(0.0, ends - time.perf_counter()))


class Worker:
    def __init__(self, memory: mmap.mmap, layout: Layout) -> None:
        arrays = mapped_arrays(memory, layout)
        self.blocks: list[tuple[Words, Words | None]] = []
        for name, words in arrays.items():
            if not name.startswith("previous."):
                older = arrays.get(f"previous.{name}")
                olds: Sequence[Words | None] = blocks_of(older) if older is not None else []
                news = blocks_of(words)
                self.blocks += zip(news, olds or [None] * len(news), strict=True)
        self.slots = Slots(2 * len(self.blocks))  # staged, and coded
        self.devices: dict[str, Device] = {}

    def run(self, request: Mapping[str, Any]) -> None:
        cores = time.process_time()
        first, step = request["share"]
        self.write(self.blocks[first::step], request)
        answer({"durable_at": time.perf_counter(), "core_s": time.process_time() - cores})

    def write(
        self, blocks: Sequence[tuple[Words, Words | None]], request: Mapping[str, Any]
    ) -> None:
        codec = CODECS[request["codec"]] if request["codec"] else None
        path, pace = request["path"], request["pace"]
        if path not in self.devices:
            self.devices[path] = Device(path, len(blocks) * (BLOCK_BYTES + ALIGNMENT))
        device = self.devices[path]
        # A device that is imitated takes one write at a time.
        writers = ThreadPoolExecutor(request["writers"] if pace is None else 1)
        coder = ThreadPoolExecutor(1)

        def pass_on(
            i: int, staged: memoryview, words: Words, previous: Words | None
        ) -> Future[None]:
            place, size_bytes = staged, words.nbytes
            if codec is not None:
                place = self.slots.free.get()
                block = np.frombuffer(staged, words.dtype, len(words))
                size_bytes = fill(place, codec.encode(block, previous).parts)
                self.slots.free.put(staged)
            offset = i * (BLOCK_BYTES + ALIGNMENT)
            queued = time.perf_counter()
            job = writers.submit(device.write, place, rounded(size_bytes), offset, pace, queued)
            job.add_done_callback(lambda _: self.slots.free.put(place))
            return job

        with writers, coder:
            jobs = []
            for i, (words, previous) in enumerate(blocks):
                staged = self.slots.free.get()
                np.copyto(np.frombuffer(staged, words.dtype, len(words)), words)
                jobs.append(coder.submit(pass_on, i, staged, words, previous))
            answer({})
            for job in jobs:
                job.result().result()
        os.fdatasync(device.fd)


def fill(place: memoryview, parts: Sequence[Part]) -> int:
    """Puts the parts into a slot, one after the other; returns how many bytes they are."""
    at = 0
    for part in parts:
        data = memoryview(part).cast("B")  # type: ignore[arg-type]
        place[at : at + len(data)] = data
        at += len(data)
    return at


def answer(fields: Mapping[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(10)
    descriptor, layout = int(sys.argv[1]), json.loads(sys.argv[2])
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    worker = Worker(memory, {name: tuple(place) for name, place in layout.items()})
    for line in sys.stdin:
        worker.run(json.loads(line))


if __name__ == "__main__":
    main()
