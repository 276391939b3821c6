"""The gather kernel, pinned slots and the D2H copier on a real device.

Late devices are made by gates that hold a stream back, so nothing here depends on timing. Whatever
must not wait for the device is called while a gate is closed: had it waited, the gate would have
timed out.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pccheck_ext import _C

pytestmark = pytest.mark.needs_cuda

KIB = 1024
MIB = 1024 * KIB
SMALL = 64 * KIB
SCRATCH = 4 * MIB

Piece = tuple[int, int, int]


def random_bytes(count: int, device: str = "cuda") -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def end_to_end(tensors: Sequence[Tensor], offset: int = 0) -> list[Piece]:
    """Pieces that fill the slots with the tensors, one behind the other."""
    pieces = []
    for tensor in tensors:
        pieces.append((tensor.data_ptr(), offset, tensor.nbytes))
        offset += tensor.nbytes
    return pieces


class Copier:
    """A copier and its slots; tensors that are under way are kept alive."""

    def __init__(self, slots: int = 8 * MIB, small: int = SMALL, scratch: int = SCRATCH) -> None:
        self.probe = _C.CudaCopierProbe(torch.cuda.current_device(), slots, small, scratch)

    def submit(self, tensors: Sequence[Tensor], stream: torch.cuda.Stream | None = None) -> int:
        return self.submit_pieces(end_to_end(tensors), stream)

    def submit_pieces(self, pieces: list[Piece], stream: torch.cuda.Stream | None = None) -> int:
        number = self.probe.submit(pieces, None if stream is None else stream.cuda_stream)
        assert isinstance(number, int)
        return number

    def slots(self, count: int, offset: int = 0) -> bytes:
        return ctypes.string_at(self.probe.slots_address + offset, count)


@pytest.fixture(autouse=True)
def _warm_device() -> Iterator[None]:
    """Kernels are loaded at their first launch, which may wait for everything that runs."""
    if torch.cuda.is_available():
        tensor = torch.zeros(MIB, dtype=torch.uint8, device="cuda").fill_(1).add_(1)
        torch.zeros(MIB, dtype=torch.uint8).pin_memory().copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gathered(ranges: list[Tensor], out: Tensor) -> None:
    stream = torch.cuda.current_stream()
    _C.cuda_gather([(r.data_ptr(), r.nbytes) for r in ranges], out.data_ptr(), stream.cuda_stream)


@pytest.mark.parametrize("seed", range(8))
def test_gather_equals_cat_for_any_size_and_alignment(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    source = random_bytes(4 * MIB)
    most = chance.choice([20, 700, 5000, 200_000])
    ranges = []
    for _ in range(chance.randrange(1, 700)):
        count = chance.randrange(most)
        begin = chance.randrange(source.numel() - count)
        if chance.random() < 0.5:
            begin -= begin % chance.choice([2, 4, 8, 16])
        ranges.append(source[begin : begin + count])
    total = sum(r.numel() for r in ranges)
    before, after = chance.randrange(32), 64
    out = torch.full((before + total + after,), 0xEE, dtype=torch.uint8, device="cuda")
    gathered(ranges, out[before:])
    assert torch.equal(out[before : before + total], torch.cat(ranges))
    assert torch.all(out[:before] == 0xEE), "bytes before the buffer were written"
    assert torch.all(out[before + total :] == 0xEE), "bytes behind the buffer were written"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_gather_keeps_the_bits_of_every_element_size(dtype: torch.dtype) -> None:
    shapes = [1, 3, 0, 768, 4096, 50_257, 7]
    tensors = [(torch.rand(n, device="cuda") * 100).to(dtype) for n in shapes]
    out = torch.empty(sum(shapes), dtype=dtype, device="cuda")
    gathered(tensors, out)
    assert as_bytes(out) == as_bytes(torch.cat(tensors))


def test_gather_of_single_bytes_and_of_nothing() -> None:
    source = random_bytes(1000)
    out = torch.zeros(1000, dtype=torch.uint8, device="cuda")
    gathered([], out)
    gathered([source[5:5]], out)
    assert not out.any()
    gathered([source[i : i + 1] for i in reversed(range(1000))], out)
    assert torch.equal(out, source.flip(0))


def test_gather_is_ordered_on_its_stream() -> None:
    stream = torch.cuda.Stream()
    source, out = random_bytes(MIB), torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(stream.cuda_stream)
    with torch.cuda.stream(stream):
        source.fill_(7)
        gathered([source], out)
    gate.open()
    stream.synchronize()
    assert torch.all(out == 7)
    assert not gate.timed_out


def test_slots_are_pinned() -> None:
    copier = Copier(slots=3 * MIB + 4096)
    count = copier.probe.slots_bytes
    assert count == 3 * MIB + 4096
    for offset in (0, count - 1):
        byte = ctypes.c_uint8.from_address(copier.probe.slots_address + offset)
        assert torch.frombuffer(byte, dtype=torch.uint8).is_pinned()
    assert not torch.zeros(8).is_pinned()


def test_a_copier_gives_its_device_memory_back() -> None:
    Copier()
    torch.cuda.synchronize()
    free_before = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        Copier()
    torch.cuda.synchronize()
    assert free_before - torch.cuda.mem_get_info()[0] < 2 * 2 * SCRATCH


@pytest.mark.parametrize("scratch", [0, 4 * KIB, SCRATCH])
@pytest.mark.parametrize(
    "sizes",
    [
        [8 * MIB],
        [5 * MIB + 3, MIB, 1],
        [4 * KIB] * 300,
        [1, 2, 3, 0, 5, 17, 4096, 4097, SMALL - 1, SMALL, SMALL + 1] * 8,
        [0],
        [],
    ],
    ids=["one large", "large", "small", "mixed", "empty", "none"],
)
def test_copies_are_exact(sizes: list[int], scratch: int) -> None:
    copier = Copier(scratch=scratch)
    tensors = [random_bytes(size) for size in sizes]
    copier.probe.wait(copier.submit(tensors, torch.cuda.current_stream()))
    assert copier.slots(sum(sizes)) == b"".join(as_bytes(t) for t in tensors)


@pytest.mark.parametrize("seed", range(6))
def test_many_submissions_of_any_kind_of_memory_are_exact(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    copier = Copier(slots=16 * MIB, scratch=chance.choice([0, 8 * KIB, MIB]))
    storage = random_bytes(2 * MIB)
    host = random_bytes(64 * KIB, "cpu")
    pinned = random_bytes(64 * KIB, "cpu").pin_memory()
    expected: list[tuple[int, bytes]] = []
    last, offset = 0, 0
    for _ in range(40):
        pieces = []
        for _ in range(chance.randrange(60)):
            source = chance.choice([storage] * 6 + [host, host, pinned])
            count = chance.choice([0, 1, 4, 4, 8, 100, 3000, 30_000])
            begin = chance.randrange(source.numel() - count)
            offset += chance.choice([0] * 9 + [13])
            if offset + count > copier.probe.slots_bytes:
                break
            piece = source[begin : begin + count]
            pieces.append((piece.data_ptr(), offset, count))
            expected.append((offset, as_bytes(piece)))
            offset += count
        last = copier.submit_pieces(pieces, torch.cuda.current_stream())
    copier.probe.wait(last)
    wrong = [at for at, value in expected if copier.slots(len(value), at) != value]
    assert not wrong


def test_steps_in_host_memory_travel_with_the_moments_around_them() -> None:
    copier = Copier()
    tensors = []
    for count in range(200):
        moments = torch.rand(700, device="cuda"), torch.rand(5, device="cuda")
        tensors += [*moments, torch.tensor(float(count))]
    number = copier.submit(tensors, torch.cuda.current_stream())
    expected = b"".join(as_bytes(t) for t in tensors)
    for tensor in tensors:
        if not tensor.is_cuda:
            tensor.fill_(-1.0)  # read when it was handed over
    copier.probe.wait(number)
    assert copier.slots(len(expected)) == expected


@pytest.mark.parametrize("sizes", [[4 * MIB], [3000] * 200], ids=["large", "small"])
def test_copies_come_after_what_the_stream_was_given_before(sizes: list[int]) -> None:
    copier, stream = Copier(), torch.cuda.Stream()
    tensors = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(stream.cuda_stream)
    with torch.cuda.stream(stream):
        for tensor in tensors:
            tensor.fill_(7)
    number = copier.submit(tensors, stream)
    assert not copier.probe.done(number)
    gate.open()
    copier.probe.wait(number)
    assert copier.slots(sum(sizes)) == b"\x07" * sum(sizes)
    assert not gate.timed_out


@pytest.mark.parametrize("sizes", [[4 * MIB], [3000] * 200], ids=["large", "small"])
def test_copies_without_a_mark_do_not_wait(sizes: list[int]) -> None:
    """The test above sees a missing mark."""
    copier, stream = Copier(), torch.cuda.Stream()
    tensors = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(stream.cuda_stream)
    with torch.cuda.stream(stream):
        for tensor in tensors:
            tensor.fill_(7)
    copier.probe.wait(copier.submit(tensors))
    assert copier.slots(sum(sizes)) == bytes(sum(sizes))
    assert not gate.timed_out
    gate.open()
    stream.synchronize()


def test_pinned_sources_are_read_after_the_mark() -> None:
    copier, stream = Copier(), torch.cuda.Stream()
    source = torch.full((MIB,), 7, dtype=torch.uint8, device="cuda")
    target = torch.zeros(MIB, dtype=torch.uint8).pin_memory()
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(stream.cuda_stream)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    with ThreadPoolExecutor(1) as thread:
        submission = thread.submit(copier.submit, [target], stream)
        gate.open()
        copier.probe.wait(submission.result())
    assert copier.slots(MIB) == b"\x07" * MIB


def test_a_mark_on_the_default_stream_counts() -> None:
    copier = Copier()
    tensor = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(0)
    tensor.fill_(7)
    number = copier.submit([tensor], torch.cuda.default_stream())
    assert not copier.probe.done(number)
    gate.open()
    copier.probe.wait(number)
    assert copier.slots(MIB) == b"\x07" * MIB


def test_submissions_end_in_order() -> None:
    copier, stream = Copier(), torch.cuda.Stream()
    large, small = random_bytes(4 * MIB), [random_bytes(100) for _ in range(10)]
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(stream.cuda_stream)
    first = copier.submit([large], stream)
    second = copier.submit_pieces(end_to_end(small, 4 * MIB))
    third = copier.submit([])
    assert [first, second, third] == [1, 2, 3]
    assert not any(copier.probe.done(n) for n in (third, second, first))
    gate.open()
    copier.probe.wait(second)
    assert copier.probe.done(first)
    copier.probe.wait(third)
    copier.probe.wait(first)
    assert copier.slots(4 * MIB) == as_bytes(large)
    assert copier.slots(1000, 4 * MIB) == b"".join(as_bytes(t) for t in small)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_a_stream_that_waits_for_a_submission_does_not_tear_it(gated: bool) -> None:
    copier, handed_over, compute = Copier(), torch.cuda.Stream(), torch.cuda.Stream()
    tensor = torch.full((4 * MIB,), 3, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(handed_over.cuda_stream)  # the copy is late
    number = copier.submit([tensor], handed_over)
    if gated:
        copier.probe.make_stream_wait(number, compute.cuda_stream)
    with torch.cuda.stream(compute):
        tensor.fill_(9)  # the next update
    if gated:
        assert not compute.query()
    else:
        compute.synchronize()
    gate.open()
    copier.probe.wait(number)
    assert copier.slots(4 * MIB) == (b"\x03" if gated else b"\x09") * 4 * MIB
    compute.synchronize()
    assert torch.all(tensor == 9)
    copier.probe.make_stream_wait(number, compute.cuda_stream)  # it has ended: holds nothing
    compute.synchronize()
    assert not gate.timed_out


def test_nothing_synchronises_the_device() -> None:
    copier, busy, stream = Copier(), torch.cuda.Stream(), torch.cuda.Stream()
    tensors = [random_bytes(2 * MIB), *(random_bytes(500) for _ in range(50)), torch.rand(1)]
    expected = b"".join(as_bytes(t) for t in tensors)
    torch.cuda.synchronize()
    gate = _C.CudaStreamGate(busy.cuda_stream)
    for _ in range(5):
        number = copier.submit(tensors, stream)
        copier.probe.make_stream_wait(number, stream.cuda_stream)
        copier.probe.done(number)
        copier.probe.wait(number)
        assert copier.probe.done(number)
    stream.synchronize()
    assert not busy.query()
    assert not gate.timed_out
    gate.open()
    busy.synchronize()
    assert copier.slots(len(expected)) == expected


def test_a_captured_stream_is_refused_and_its_capture_goes_on() -> None:
    copier = Copier()
    tensor, other = torch.zeros(MIB, dtype=torch.uint8, device="cuda"), random_bytes(MIB)
    torch.cuda.synchronize()
    number = copier.submit([other])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1)
        captured = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match="CUDA graph"):
            copier.submit([tensor], captured)
        with pytest.raises(RuntimeError, match="CUDA graph"):
            copier.probe.make_stream_wait(number, captured.cuda_stream)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.all(tensor == 1)


def test_copies_go_on_while_another_thread_captures_a_graph() -> None:
    copier, stream = Copier(), torch.cuda.Stream()
    tensors = [random_bytes(MIB), *(random_bytes(500) for _ in range(50))]
    expected = b"".join(as_bytes(t) for t in tensors)
    counter = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()

    def copy() -> None:
        number = copier.submit(tensors, stream)
        copier.probe.done(number)
        copier.probe.wait(number)

    graph = torch.cuda.CUDAGraph()
    with ThreadPoolExecutor(1) as thread, torch.cuda.graph(graph):
        counter.add_(1)
        thread.submit(copy).result()
        counter.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.all(counter == 2)
    assert copier.slots(len(expected)) == expected


def test_a_copier_that_goes_away_has_finished_its_copies() -> None:
    tensor = random_bytes(64 * MIB)
    for _ in range(5):
        copier = Copier(slots=64 * MIB)
        copier.submit([tensor], torch.cuda.current_stream())
        del copier  # its slots are unmapped: a copy still running would crash
    torch.cuda.synchronize()


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scratch memory must be at least 4096 bytes, not 100"):
        Copier(scratch=100)
    with pytest.raises(ValueError, match="0 bytes"):
        Copier(slots=0)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice: .*ordinal"):
        _C.CudaCopierProbe(torch.cuda.device_count(), MIB, SMALL, SCRATCH)
    copier = Copier()
    with pytest.raises(ValueError, match="submission 1 has not been made"):
        copier.probe.wait(1)
