"""The extension module: control of the engine. See python/module.cpp."""

from collections.abc import Sequence

import torch

_Tensor = tuple[str, str, Sequence[int], int]  # name, safetensors dtype, shape, layer
_File = tuple[str, Sequence[tuple[str, str]], Sequence[_Tensor]]  # name, metadata, tensors

class Layout:
    """Where every tensor of a checkpoint stands in its files. Immutable.

    ValueError names the tensor or argument that cannot be.
    """

    def __init__(
        self,
        files: Sequence[_File],
        layer_count: int,
        block_bytes: int,
        chunk_count: int = 1,
        *,
        texts: Sequence[tuple[str, str]] = (),
        files_of_layers: bool = False,
    ) -> None:
        """`texts`: files of other than tensors, word for word.

        `files_of_layers`: every file belongs to one layer, and is linked instead of written where
        it is the same in the newest committed checkpoint.
        """

    def layer_tensors(self, layer: int) -> list[tuple[str, str, int, int]]:
        """File, name, offset and bytes of a layer's tensors, in the order hand_over() wants."""

    @property
    def layer_count(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def open_blocks(self) -> int: ...

class Ticket:
    """One checkpoint, from begin() to its end."""

    @property
    def name(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def save_id(self) -> bytes: ...
    def hand_over(self, layer: int, tensors: Sequence[torch.Tensor]) -> None: ...
    def add(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> int:
        """Files of their own for tensors not planned at begin(); the number of their layer."""

    def seal(
        self,
        manifest: bytes,
        addition: Layout | None = None,
        tensors: Sequence[torch.Tensor] = (),
    ) -> None: ...
    def leaves_time_to_update(self) -> bool:
        """Whether what is handed over now is not read before `update_ended`, but in a hurry."""

    def update_ended(self) -> None: ...
    def abandon(self, reason: str) -> None: ...
    def open_gate(self, layer: int) -> None:
        """Return when the layer is staged; a change found since its hand-over fails the ticket."""

    def open_all_gates(self) -> None: ...
    @property
    def written_bytes(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...
    def staged(self) -> bool: ...
    def layer_staged(self, layer: int) -> bool: ...
    def wait_layer_staged(self, layer: int, timeout_s: float | None = None) -> bool: ...
    def in_flight(self) -> bool: ...
    def committed(self) -> bool: ...
    def error(self) -> tuple[str, int] | None:
        """What failed it and errno (0 if it was no system call)."""

    def wait(self, timeout_s: float | None = None) -> bool: ...

class Session:
    """A run's directory, locked, and the engine that writes to it.

    RuntimeError when the lock is not to be had in time or in a forked child, OSError naming the
    path, ValueError naming the argument.
    """

    def __init__(
        self,
        path: str,
        *,
        block_bytes: int,
        staging_bytes: int,
        writer_threads: int,
        max_in_flight: int,
        keep_last: int,
        keep_every: int = 0,
        lock_timeout_s: float,
        device: str = "cpu",
        manual_copier: bool = False,
        verify_staged: bool = False,
        monitor: str | None = None,
        drain_timeout_s: float = 60.0,
    ) -> None:
        """`monitor`: the executable that is to write, in a process of its own."""

    def begin(
        self,
        name: str,
        step: int,
        run_id: bytes,
        save_id: bytes,
        layout: Layout,
        during_update: bool = False,
    ) -> Ticket:
        """`during_update`: the optimizer needs the processor until `Ticket.update_ended`."""

    def set_aside_after(self, step: int) -> list[str]: ...
    def keep(self, steps: set[int]) -> None:
        """Steps that are not retired until the next call names others."""

    def adopt_base(self, reader: Reader, threads: int) -> bool:
        """Let what is saved next link to the files of a checkpoint of this run.

        What was not read yet is verified first. False where its seal has no digests, or it has
        blocks of another size.
        """

    def close(self, timeout_s: float | None = None) -> str | None:
        """Finish what was sealed; returns what could not be cleared up, if anything.

        TimeoutError when `timeout_s` seconds have passed first (None: waits on); then it goes on,
        nothing more can be begun, and it may be called again.
        """

    def leave(self) -> None:
        """Let go of everything without waiting; what is in flight goes on if the process does."""

    @property
    def monitor_process(self) -> int | None: ...
    def monitor_death(self) -> str | None:
        """What the monitor has died of: until one of the next two, nothing can be begun."""

    def restart_monitor(self) -> None:
        """Where it throws, the session is without a monitor; the next `begin` tries again."""

    def go_direct(self) -> None: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def path(self) -> str: ...
    def reap(self) -> None:
        """Drop the tensors of checkpoints that have ended."""

    def stats(self) -> dict[str, int | float]: ...
    def take_complaint(self) -> str | None: ...
    def release_copies(self, count: int) -> None: ...
    def release_all_copies(self) -> None: ...
    def copies_submitted(self) -> int: ...

class Reader:
    """A committed checkpoint, opened and locked against recycling; its seal is checked."""

    def __init__(self, run_path: str, name: str) -> None: ...
    @property
    def manifest(self) -> bytes: ...
    @property
    def step(self) -> int: ...
    @property
    def run_id(self) -> bytes: ...
    @property
    def save_id(self) -> bytes: ...
    @property
    def files(self) -> list[tuple[str, int]]: ...
    @property
    def bytes_read(self) -> int:
        """How far `read` and `verify` are; they may be under way on another thread."""

    @property
    def block_bytes(self) -> int: ...
    def block_sums(self, file: int) -> list[int]:
        """The CRC32C of each block of a file."""

    def read_ahead(self, file: int, threads: int) -> None:
        """Begin to read a file's first blocks, for a `read` with as many threads to take over."""

    def read(self, reads: Sequence[tuple[int, int, torch.Tensor]], threads: int) -> None:
        """Read (file index, offset) into contiguous tensors in host memory, verified."""

    def verify(self, threads: int) -> None: ...

def built_with_cuda() -> bool: ...
def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The tensor's dtype as safetensors names it; TypeError naming it if it cannot be stored."""

def wait_chunks(ticket: int, timeout_s: float | None = None) -> bool: ...
def close_chunks() -> list[str]: ...
