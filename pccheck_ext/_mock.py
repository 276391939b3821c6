"""Mock mode: a session that touches no disk and records what would be saved.

The same calls as `_C.Session` and `_C.Ticket` take, so that everything above the engine runs as it
does otherwise: plans, gates, order, intervals. Nothing is copied; checkpoints are "committed" when
they are sealed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pccheck_ext import _C

__all__ = ["MockSession", "RecordedCheckpoint", "RecordedLayer"]


@dataclass(frozen=True)
class RecordedLayer:
    """A layer that was handed over: when, seconds after its checkpoint was begun."""

    name: str  # "" for what belongs to no layer: `extra` and the like
    tensors: tuple[str, ...]  # "<file>:<name>"
    size_bytes: int
    after_s: float


@dataclass
class RecordedCheckpoint:
    """What would have been saved, layers in the order in which they were handed over."""

    checkpoint_id: str
    training_step: int
    layers: list[RecordedLayer] = field(default_factory=list)
    manifest: bytes = b""
    committed: bool = False
    error: str | None = None
    durable_s: float = 0.0

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.layers)


class MockTicket:
    def __init__(
        self, session: MockSession, record: RecordedCheckpoint, save_id: bytes, layout: _C.Layout
    ) -> None:
        self.name = record.checkpoint_id
        self.step = record.training_step
        self.save_id = save_id
        self._session = session
        self._record = record
        self.layer_names: list[str] = []
        self._layouts = [(layout, index) for index in range(layout.layer_count)]
        self._begun = time.perf_counter()

    def hand_over(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        layout, index = self._layouts[layer]
        placed = layout.layer_tensors(index)
        if len(placed) != len(tensors):
            raise ValueError(
                f"layer {layer} of checkpoint {self.name} has {len(placed)} tensors, "
                f"not {len(tensors)}"
            )
        names = tuple(f"{file}:{name}" for file, name, _, _ in placed)
        size = sum(size for _, _, _, size in placed)
        named = layer < len(self.layer_names)
        self._record.layers.append(
            RecordedLayer(
                self.layer_names[layer] if named else "",
                names,
                size,
                time.perf_counter() - self._begun,
            )
        )

    def add(self, layout: _C.Layout, tensors: Sequence[torch.Tensor]) -> int:
        self._layouts.append((layout, 0))
        self.hand_over(len(self._layouts) - 1, tensors)
        return len(self._layouts) - 1

    def seal(
        self,
        manifest: bytes,
        addition: _C.Layout | None = None,
        tensors: Sequence[torch.Tensor] = (),
    ) -> None:
        if not self.in_flight():
            return  # as a checkpoint that has failed: it stays failed
        if addition is not None:
            self.add(addition, tensors)
        self._record.manifest = manifest
        self._record.durable_s = time.perf_counter() - self._begun
        self._end(committed=True)

    def abandon(self, reason: str) -> None:
        if self.in_flight():
            self._record.error = reason
            self._end(committed=False)

    def _end(self, *, committed: bool) -> None:
        self._record.committed = committed
        self._session.ended(self._record)

    def leaves_time_to_update(self) -> bool:
        return False

    def update_ended(self) -> None: ...

    def open_gate(self, layer: int) -> None: ...

    def open_all_gates(self) -> None: ...

    @property
    def written_bytes(self) -> int:
        return self._record.size_bytes

    @property
    def payload_bytes(self) -> int:
        return self._record.size_bytes

    def staged(self) -> bool:
        return True

    def layer_staged(self, layer: int) -> bool:
        return True

    def wait_layer_staged(self, layer: int, timeout_s: float | None = None) -> bool:
        return True

    def in_flight(self) -> bool:
        return not self._record.committed and self._record.error is None

    def committed(self) -> bool:
        return self._record.committed

    def error(self) -> tuple[str, int] | None:
        return None if self._record.error is None else (self._record.error, 0)

    def wait(self, timeout_s: float | None = None) -> bool:
        return not self.in_flight()


class MockSession:
    """`checkpoints`: everything recorded so far, in the order in which it was begun."""

    monitor_process = None

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_open = True
        self.checkpoints: list[RecordedCheckpoint] = []
        self._counts = {"committed": 0, "failed": 0, "bytes": 0}
        self._durable_s, self._durable_s_last, self._last_step = 0.0, 0.0, 0

    def begin(
        self,
        name: str,
        step: int,
        run_id: bytes,
        save_id: bytes,
        layout: _C.Layout,
        during_update: bool = False,
    ) -> MockTicket:
        if any(c.checkpoint_id == name and c.error is None for c in self.checkpoints):
            raise RuntimeError(f"checkpoint {name} was recorded already")
        self.checkpoints.append(RecordedCheckpoint(name, step))
        return MockTicket(self, self.checkpoints[-1], save_id, layout)

    def ended(self, record: RecordedCheckpoint) -> None:
        if not record.committed:
            self._counts["failed"] += 1
            return
        self._counts["committed"] += 1
        self._counts["bytes"] += record.size_bytes
        self._durable_s += record.durable_s
        self._durable_s_last = record.durable_s
        self._last_step = record.training_step

    def set_aside_after(self, step: int) -> list[str]:
        return []

    def adopt_base(self, reader: object, threads: int) -> bool:
        return False

    def keep(self, steps: set[int]) -> None: ...

    def close(self, timeout_s: float | None = None) -> str | None:
        self.is_open = False
        return None

    def leave(self) -> None:
        self.is_open = False

    def monitor_death(self) -> str | None:
        return None

    def restart_monitor(self) -> None: ...

    def go_direct(self) -> None: ...

    def reap(self) -> None: ...

    def take_complaint(self) -> str | None:
        return None

    def stats(self) -> dict[str, int | float]:
        return {
            "checkpoints_committed": self._counts["committed"],
            "checkpoints_failed": self._counts["failed"],
            "bytes_persisted": self._counts["bytes"],
            "bytes_linked": 0,
            "links_refused": 0,
            "durable_s_total": self._durable_s,
            "durable_s_last": self._durable_s_last,
            "last_committed_step": self._last_step,
            "last_sealed_step": self._last_step,
            "in_flight": sum(c.error is None and not c.committed for c in self.checkpoints),
            "staging_bytes": 0,
            "free_slots": 0,
            "slots": 0,
        }
