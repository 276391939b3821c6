"""How fast the disk itself is: fio in several configurations, and a bare O_DIRECT loop.

Both move the same number of bytes, durably, and neither's process start is counted. Which
configuration is fastest differs between machines, so the candidates are tried first; the best of
each kind is then measured in turn with what is compared with the disk. Where a file lies can matter
as much, so the bare loop can be given the very files that what is compared uses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

__all__ = [
    "BareLoop",
    "Disk",
    "Files",
    "Fio",
    "Instrument",
    "Operation",
    "compile_loop",
    "describe",
]

Operation = Literal["overwrite", "fresh", "read"]
Files = Sequence[tuple[Path, int]]
"""Files and how many bytes of each, from its beginning."""

KIB, MIB = 1 << 10, 1 << 20
SOURCE = Path(__file__).with_name("disk_loop.cpp")


def _size(size_bytes: int) -> str:
    return f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB"


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Instrument(Protocol):
    """One way to measure the disk."""

    def name(self) -> str: ...

    def seconds(self, operation: Operation, files: Files) -> float:
        """Moves the bytes of the files and returns how long that took, to durability if it wrote.

        Only the bare loop takes more than one file.
        """


@dataclass(frozen=True)
class Fio:
    engine: str
    block_bytes: int
    depth: int
    jobs: int

    def name(self) -> str:
        jobs = f"{self.jobs} job{'s' if self.jobs > 1 else ''}"
        return f"fio {self.engine}, {_size(self.block_bytes)}, depth {self.depth}, {jobs}"

    def seconds(self, operation: Operation, files: Files) -> float:
        ((path, size_bytes),) = files
        # fio lays the file out, or fallocates it, before its clock starts.
        if operation == "fresh" and path.exists():
            path.unlink()
            sync_folder(path.parent)  # what deleting costs must not meet the measurement
        reads = operation == "read"
        each = size_bytes // self.jobs
        arguments = {
            "name": "disk",
            "filename": str(path),
            "rw": "read" if reads else "write",
            "ioengine": self.engine,
            "bs": self.block_bytes,
            "iodepth": self.depth,
            "numjobs": self.jobs,
            "size": each,
            "offset_increment": each,
            "direct": 1,
            "end_fsync": int(not reads),
            "overwrite": int(operation == "overwrite"),
            "invalidate": 1,
            "thread": 1,
            "group_reporting": 1,
            "scramble_buffers": 0,  # it would cost fio processor time between its writes
            "output-format": "json",
        }
        answer = subprocess.run(
            ["fio", *(f"--{key}={value}" for key, value in arguments.items())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if answer.returncode != 0:
            raise OSError(f"{self.name()}: {(answer.stderr or answer.stdout).strip()[-300:]}")
        job = json.loads(answer.stdout[answer.stdout.index("{") :])["jobs"][0]
        done = job["read" if reads else "write"]
        if job.get("error") or done["io_bytes"] != each * self.jobs:
            raise OSError(f"{self.name()}: moved {done['io_bytes']} bytes, error {job['error']}")
        # `runtime` ends after end_fsync. It is rounded up to whole milliseconds: on average half of
        # one too many.
        return (float(done["runtime"]) - 0.5) / 1000


@dataclass(frozen=True)
class BareLoop:
    program: Path
    block_bytes: int
    threads: int

    def name(self) -> str:
        return f"bare loop, {_size(self.block_bytes)}, {self.threads} threads"

    def seconds(self, operation: Operation, files: Files) -> float:
        return self._run(operation, files)["ns"] / 1e9

    def is_direct(self, path: Path) -> bool:
        return bool(self._run("overwrite", [(path, self.block_bytes)])["direct"])

    def _run(self, operation: Operation, files: Files) -> dict[str, int]:
        named = [f"{path}:{size_bytes}" for path, size_bytes in files]
        words = (operation, self.block_bytes, self.threads, *named)
        answer = subprocess.run(
            [str(self.program), *map(str, words)], capture_output=True, text=True, check=False
        )
        if answer.returncode != 0:
            raise OSError(answer.stderr.strip() or f"{self.program} ended {answer.returncode}")
        result: dict[str, int] = json.loads(answer.stdout)
        return result


def compile_loop() -> Path:
    """The bare loop's program, compiled if need be. Raises OSError saying what is missing."""
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next((path for name in compilers if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler for bench/disk_loop.cpp: name one with CXX=")
    command = [compiler, "-std=c++20", "-O2", "-pthread", str(SOURCE)]
    key = hashlib.sha256(" ".join(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pccheck_ext-bench"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = Path(tempfile.mkdtemp(prefix="pccheck_ext-bench-"))
    program = cache / f"disk_loop-{key}"
    if not program.exists():
        # Renamed into place, so that two runs do not execute each other's half-written file.
        unfinished = cache / f".{program.name}.{os.getpid()}"
        answer = subprocess.run(
            [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
        )
        if answer.returncode != 0:
            raise OSError(f"{' '.join(command)}\n{answer.stderr.strip()[-2000:]}")
        unfinished.replace(program)
    return program


class Disk:
    """The instruments that fit one folder, and the file they all use there."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.path = folder / "disk.dat"
        self._program = compile_loop()
        self.direct = BareLoop(self._program, 4 * MIB, 1).is_direct(self.path)
        self.fio_missing = self._why_no_fio()
        self._best: dict[Operation, tuple[Instrument, ...]] = {}

    def seconds(
        self, instrument: Instrument, operation: Operation, files: Files | None = None
    ) -> float:
        """By the bare loop on `files`, where given; on a file of its own otherwise."""
        if files is not None and isinstance(instrument, BareLoop):
            return instrument.seconds(operation, files)
        own = [(self.path, self.size_bytes)]
        if operation == "read" and not self._has_all_bytes():
            next(self._loops()).seconds("overwrite", own)
        return instrument.seconds(operation, own)

    def best(
        self, operation: Operation, *, quick: bool, progress: Callable[[str], None]
    ) -> tuple[Instrument, ...]:
        """The fastest bare loop and, where there is fio, its fastest configuration."""
        if operation in self._best:
            return self._best[operation]

        def run(instrument: Instrument) -> float:
            progress(f"disk, {operation}: trying {instrument.name()}")
            return self.seconds(instrument, operation)

        rounds = 2 if quick else 4
        loops: list[Instrument] = list(self._loops())
        best = [_fastest(loops, run, first=len(loops), rounds=rounds)]
        if not self.fio_missing:
            # All combinations would take minutes: engine and block first, then depth and jobs.
            blocks = (MIB,) if quick else (256 * KIB, MIB, 4 * MIB)
            shapes = itertools.product(self._engines, blocks)
            rough = min((Fio(engine, block, 4, 2) for engine, block in shapes), key=run)
            depths, jobs = ((4, 16), (1, 2)) if quick else ((1, 4, 16), (1, 2, 4))
            fine: list[Instrument] = [
                replace(rough, depth=depth, jobs=count)
                for depth, count in itertools.product(depths, jobs)
            ]
            best.append(_fastest(fine, run, first=3, rounds=rounds))
        self._best[operation] = tuple(best)
        return self._best[operation]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _loops(self) -> Iterator[BareLoop]:
        for block, threads in ((4, 1), (4, 2), (4, 4), (4, 8), (1, 4), (1, 8), (1, 16)):
            yield BareLoop(self._program, block * MIB, threads)

    def _why_no_fio(self) -> str | None:
        """None where fio runs here; which of its engines do is kept."""
        self._engines: list[str] = []
        if shutil.which("fio") is None:
            return "fio is not installed"
        why = ""
        for engine in ("io_uring", "libaio"):  # io_uring is often forbidden to containers
            try:
                Fio(engine, MIB, 1, 1).seconds("fresh", [(self.path, MIB)])
                self._engines.append(engine)
            except (OSError, ValueError, KeyError) as error:
                why = f"fio does not run here: {error}"
        self.path.unlink(missing_ok=True)
        return None if self._engines else why

    def _has_all_bytes(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.size_bytes


def _fastest(
    candidates: Sequence[Instrument],
    run: Callable[[Instrument], float],
    *,
    first: int,
    rounds: int,
) -> Instrument:
    """Tries all once, then the `first` best in turn for `rounds` more; the median decides.

    One run says more about the moment than about the configuration.
    """
    times = [[run(candidate)] for candidate in candidates]
    chosen = sorted(range(len(candidates)), key=times.__getitem__)[:first]
    for _ in range(rounds):
        for i in chosen:
            times[i].append(run(candidates[i]))
    return candidates[min(chosen, key=lambda i: statistics.median(times[i]))]


def describe(folder: Path) -> dict[str, str]:
    """The file system and the device under `folder`, for the record."""
    found = {"file system": "unknown", "device": "unknown"}
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    best = ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, (kind, source, options) = left.split(), right.split(" ", 2)
        where = fields[4]
        if fields[2] == number and len(where) >= len(best) and _is_under(folder, where):
            best = where
            found["file system"] = f"{kind} ({fields[5]}; {options.split(',', 1)[-1]})"
            found["device"] = source
    block = Path("/sys/dev/block") / number
    if block.exists():
        queue = block / "queue" if (block / "queue").exists() else block.resolve().parent / "queue"
        for label, path in (
            ("model", queue.parent / "device" / "model"),
            ("scheduler", queue / "scheduler"),
            ("write cache", queue / "write_cache"),
        ):
            if path.exists():
                found["device"] += f", {label} {path.read_text().strip()}"
    return found


def _is_under(folder: Path, mount: str) -> bool:
    return folder.resolve().is_relative_to(mount)
