"""Batches of text whose position is a number: it continues bit for bit, worker processes or not."""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _settings import TrainError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["BatchLoader", "read_text"]

_MADE_UP_BYTES = 1 << 20
_FINGERPRINT_BYTES = 1 << 20


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Batch `number` consists of random crops that depend on nothing but the seed and `number`."""

    def __init__(self, text: Tensor, batch: int, length: int, seed: int) -> None:
        self.text = text
        self.batch = batch
        self.window = torch.arange(length + 1)
        self.seed = seed

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both `(batch, length)` int64; targets are one byte further on."""
        mixed = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
        last = len(self.text) - len(self.window)
        starts = torch.randint(last + 1, (self.batch, 1), generator=generator)
        crops = self.text[starts + self.window].long()
        return crops[:, :-1].contiguous(), crops[:, 1:].contiguous()


class BatchLoader:
    """Endless batches, made by `workers` processes ahead of time.

    Its state is the number of batches that have been *consumed*. Those that are only prefetched are
    made again after a resume, the same ones.
    """

    def __init__(self, crops: Crops, workers: int = 0, pin_memory: bool = False) -> None:
        self.crops = crops
        self.workers = workers
        self.pin_memory = pin_memory
        self.position = 0
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self.position += 1
        return batch

    def _start(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            self.crops,
            batch_size=None,
            sampler=itertools.count(self.position),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_interrupts_to_main,
            # Or starting the workers would draw from the generator that dropout draws from, and a
            # resumed run starts them once more than a run that was never interrupted.
            generator=torch.Generator(),
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        self.position = int(state["position"])

    def close(self) -> None:
        """End the worker processes; the next batch starts others."""
        self._batches = None


def _leave_interrupts_to_main(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: the main one decides what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read_text(path: Path | None, length: int) -> tuple[Tensor, str]:
    """The text's bytes, uint8, and what tells it from other texts.

    TrainError where it cannot be read or has not more than `length` bytes.
    """
    if path is None:
        return _made_up_text(), f"made-up text of {_MADE_UP_BYTES} bytes"
    try:
        size = path.stat().st_size
        if size <= length:
            raise TrainError(
                f"--data {path}: {size} bytes are too few for crops of {length + 1} bytes"
            )
        fingerprint = _fingerprint(path, size)
        text = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise TrainError(f"--data {path}: cannot be read: {error}") from None
    return text, f"{path.name}, {size} bytes, {fingerprint}"


def _fingerprint(path: Path, size: int) -> str:
    """Of both ends: a text may be larger than anyone wants to read before the first step."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_FINGERPRINT_BYTES))
        file.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _made_up_text() -> Tensor:
    """Words drawn by Zipf's law: there is something to learn in them, and no file is needed."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (500, 8), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(2, 9, (500,), generator=generator).tolist()
    words = [bytes(row[:n]) for row, n in zip(letters.tolist(), lengths, strict=True)]
    odds = 1 / torch.arange(1, 501)
    drawn = torch.multinomial(odds, _MADE_UP_BYTES // 3, replacement=True, generator=generator)
    text = b" ".join(words[i] for i in drawn.tolist())[:_MADE_UP_BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
