"""Progress bars: on terminals, for what takes longer than two seconds, and never in the way."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pccheck_ext import LayerwiseCheckpointTrainer, ModelRecovery, _progress


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """stderr as a terminal; what was written to it is in the list afterwards."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    written: list[str] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(leader, 1 << 16)
            except OSError:  # the follower was closed
                return
            written.append(piece.decode())

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        try:
            yield written
        finally:
            monkeypatch.undo()
            stream.flush()
    reader.join()
    os.close(leader)


def test_what_takes_long_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0
    looked = threading.Event()

    def done_bytes() -> int:
        looked.set()
        return done

    with (
        terminal(monkeypatch) as written,
        _progress.shown("saving it all", 8 << 20, done_bytes, patience_s=0.01),
    ):
        assert looked.wait(60)
        done = 6 << 20
    text = "".join(written)
    assert "saving it all" in text
    assert "75%" in text
    assert "6.00M/8.00M" in text


def test_what_is_soon_over_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written, _progress.shown("saving", 1, lambda: 0, patience_s=60):
        pass
    assert written == []


def test_where_nobody_looks_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with _progress.shown("saving", 1, lambda: 0, patience_s=0):
        assert threading.active_count() == before
    assert capfd.readouterr().err == ""


def test_patience_is_two_seconds() -> None:
    assert _progress.PATIENCE_S == 2.0


def trainer(directory: Path, **options: Any) -> LayerwiseCheckpointTrainer:
    model = nn.Linear(300, 300)
    return LayerwiseCheckpointTrainer(
        model, torch.optim.Adam(model.parameters()), checkpoint_dir=directory, **options
    )


def take_step(trained: LayerwiseCheckpointTrainer) -> None:
    trained.zero_grad()
    trained.model(torch.ones(2, 300)).sum().backward()
    trained.step()


def test_a_save_that_is_waited_for_tells_how_much_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "PATIENCE_S", 0.05)
    trained = trainer(tmp_path, _manual_copier=True)
    take_step(trained)
    trained.end_step()
    waiting = threading.Thread(target=trained.wait)
    with terminal(monkeypatch) as written:
        waiting.start()
        until = time.monotonic() + 60
        pause = threading.Event()
        while not any("saving" in piece for piece in written):
            assert time.monotonic() < until
            pause.wait(0.01)
        trained._session.release_all_copies()  # type: ignore[union-attr]
        waiting.join()
    assert "0.00/" in "".join(written)
    trained.shutdown()


def test_how_far_a_restore_is_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer(tmp_path) as trained:
        take_step(trained)
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def shown(what: str, total: int, done: Any, patience_s: float = 0.0) -> Iterator[None]:
        assert done() == 0
        yield
        told.append((what, total, done()))

    monkeypatch.setattr(_progress, "shown", shown)
    recovery = ModelRecovery(tmp_path)
    recovery.load_checkpoint(nn.Linear(300, 300), "step-00000001")
    assert recovery.verify("step-00000001")
    (load, load_total, read), (verify, verify_total, checked) = told[0], told[-1]
    assert load == "restoring step-00000001"
    assert load_total == 4 * (300 * 300 + 300)
    assert read >= load_total
    assert verify == "verifying step-00000001"
    sizes = [p.stat().st_size for p in (tmp_path / "step-00000001").glob("*.safetensors")]
    assert verify_total == checked == sum(sizes)
