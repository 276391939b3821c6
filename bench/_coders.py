"""Codecs that lose nothing, on blocks of floats: each by the Python package that keeps it.

A block is a flat NumPy array of uint16 or uint32: the bits of bfloat16 or float32. A float's bytes
differ in what they hold: the exponent's repeat themselves, the mantissa's are noise. So besides
coding a block as it lies there is grouping it first, into byte planes: all first bytes, then all
second ones.

A delta codes what changed since the step before: XOR of the bits, or their difference as integers,
folded so that small negative ones have leading zeros as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "CODECS",
    "FINALISTS",
    "Codec",
    "Coded",
    "add_difference",
    "difference",
    "merge",
    "planes",
    "size_of",
]

Words: TypeAlias = NDArray[Any]
Part: TypeAlias = "bytes | bytearray | NDArray[Any]"


def size_of(part: Part) -> int:
    return part.nbytes if isinstance(part, np.ndarray) else len(part)


# --- Grouping -------------------------------------------------------------------------------------


def planes(words: Words) -> list[Words]:
    """Byte planes, the lowest byte's first. A shift and a cast: both are vectorized in NumPy."""
    shifts = range(0, 8 * words.itemsize, 8)
    return [(words >> s if s else words).astype(np.uint8) for s in shifts]


def merge(parts: Sequence[Any], dtype: DTypeLike, count: int) -> Words:
    """The words whose byte planes these are."""
    words = np.empty(count, dtype)
    lanes = words.view(np.uint8)
    for at, part in enumerate(parts):
        lanes[at :: words.itemsize] = np.frombuffer(part, np.uint8)
    return words


def difference(words: Words, previous: Words) -> Words:
    """The words less the previous ones, as integers, folded: 0, -1, 1, -2 become 0, 1, 2, 3."""
    signed = (words - previous).view(f"i{words.itemsize}")
    folded: Words = ((signed << 1) ^ (signed >> (8 * words.itemsize - 1))).view(words.dtype)
    return folded


def add_difference(folded: Words, previous: Words) -> Words:
    """The words whose `difference` from the previous ones this is."""
    unfolded: Words = (folded >> 1) ^ (0 - (folded & 1))
    return previous + unfolded


# --- Coders ---------------------------------------------------------------------------------------


class Coder(Protocol):
    """Codes blocks of one element type, by one thread."""

    def encode(self, words: Words) -> list[Part]: ...

    def decode(self, parts: list[Part], dtype: DTypeLike, count: int) -> Words: ...


@dataclass(frozen=True)
class Whole:
    """The block as it lies."""

    compress: Callable[[Any], Part]
    decompress: Callable[[Any], Any]

    def encode(self, words: Words) -> list[Part]:
        return [self.compress(words)]

    def decode(self, parts: list[Part], dtype: DTypeLike, count: int) -> Words:
        return np.frombuffer(self.decompress(parts[0]), dtype, count)


@dataclass(frozen=True)
class Planes:
    """Each byte plane by itself."""

    compress: Callable[[Any], Part]
    decompress: Callable[[Any], Any]

    def encode(self, words: Words) -> list[Part]:
        return [self.compress(plane) for plane in planes(words)]

    def decode(self, parts: list[Part], dtype: DTypeLike, count: int) -> Words:
        return merge([self.decompress(part) for part in parts], dtype, count)


def zstd(group: Callable[..., Coder], level: int) -> Callable[[int], Coder]:
    def make(width: int) -> Coder:
        import zstandard

        coder = zstandard.ZstdCompressor(level=level, write_checksum=False)
        return group(coder.compress, zstandard.ZstdDecompressor().decompress)

    return make


def lz4(group: Callable[..., Coder]) -> Callable[[int], Coder]:
    def make(width: int) -> Coder:
        import lz4.block

        return group(lz4.block.compress, lz4.block.decompress)

    return make


def blosc2(codec: str, filter_name: str, level: int) -> Callable[[int], Coder]:
    """Its filters group by bytes or by bits, with vector instructions."""

    def make(width: int) -> Coder:
        import blosc2

        blosc2.set_nthreads(1)
        options = {
            "codec": blosc2.Codec[codec],
            "filters": [blosc2.Filter[filter_name]],
            "clevel": level,
            "typesize": width,
            "nthreads": 1,
        }
        return Whole(lambda words: blosc2.compress2(words, **options), blosc2.decompress2)

    return make


class OpenZL:
    """`exponents`: float deconstruction, exponents by Huffman. `planes`: each by its entropy coder.

    Its own checksums are off: a block has one already.
    """

    def __init__(self, graph: str, width: int) -> None:
        import openzl.ext as zl

        self._zl = zl
        made = zl.Compressor()
        made.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        off = 2
        made.set_parameter(zl.CParam.ContentChecksum, off)
        made.set_parameter(zl.CParam.CompressedChecksum, off)
        if graph == "exponents":
            node = {2: zl.nodes.BFloat16Deconstruct, 4: zl.nodes.Float32Deconstruct}[width]()
            start = node(
                made,
                sign_frac=zl.graphs.Store()(made),
                exponent=zl.graphs.Huffman()(made),
            )
        else:
            start = zl.nodes.TransposeSplit()(made, zl.graphs.Entropy()(made))
        made.select_starting_graph(start)
        self._compressor, self._encoding, self._decoding = made, zl.CCtx(), zl.DCtx()

    def encode(self, words: Words) -> list[Part]:
        self._encoding.ref_compressor(self._compressor)
        return [self._encoding.compress([self._zl.Input(self._zl.Type.Numeric, words)])]

    def decode(self, parts: list[Part], dtype: DTypeLike, count: int) -> Words:
        content: Words = self._decoding.decompress(parts[0])[0].content.as_nparray()
        return content.reshape(-1).view(dtype)


def openzl(graph: str) -> Callable[[int], Coder]:
    return lambda width: OpenZL(graph, width)


def zipnn() -> Callable[[int], Coder]:
    def make(width: int) -> Coder:
        from zipnn import ZipNN

        kind = {2: "bfloat16", 4: "float32"}[width]
        made = ZipNN(input_format="byte", bytearray_dtype=kind, threads=1)
        # It rewrites its input in place: it gets a copy.
        return Whole(lambda words: made.compress(bytearray(words)), made.decompress)

    return make


def pcodec(level: int) -> Callable[[int], Coder]:
    def make(width: int) -> Coder:
        from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

        settings = ChunkConfig(
            compression_level=level, delta_spec=DeltaSpec.no_op(), mode_spec=ModeSpec.classic()
        )
        return Whole(
            lambda words: standalone.simple_compress(words, settings), standalone.simple_decompress
        )

    return make


# --- The codecs compared --------------------------------------------------------------------------


@dataclass(frozen=True)
class Coded:
    """A block as it would lie on disk: coded, or stored where coding it saved nothing."""

    parts: list[Part]
    stored: bool

    @property
    def size_bytes(self) -> int:
        return sum(map(size_of, self.parts))


@dataclass(frozen=True)
class Codec:
    """One line of the comparison. Coders are made once for each thread and element size."""

    name: str
    package: str
    make: Callable[[int], Coder]
    delta: str = ""  # "", "xor" or "difference"

    def encode(self, words: Words, previous: Words | None = None) -> Coded:
        """Raises ValueError when a delta is given nothing to differ from."""
        changed = words
        if self.delta:
            if previous is None:
                raise ValueError(f"{self.name}: a delta needs the block of the step before")
            changed = words ^ previous if self.delta == "xor" else difference(words, previous)
        parts = self._coder(words.itemsize).encode(changed)
        if sum(map(size_of, parts)) >= words.nbytes:
            return Coded([words], stored=True)
        return Coded(parts, stored=False)

    def decode(
        self, coded: Coded, dtype: DTypeLike, count: int, previous: Words | None = None
    ) -> Words:
        if coded.stored:
            return np.frombuffer(coded.parts[0], dtype, count).copy()
        width = np.dtype(dtype).itemsize
        words = self._coder(width).decode(coded.parts, dtype, count)
        if not self.delta:
            return words
        assert previous is not None
        return words ^ previous if self.delta == "xor" else add_difference(words, previous)

    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def version(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package)}"

    def against(self, delta: str) -> Codec:
        return Codec(f"{delta}, {self.name}", self.package, self.make, delta)

    def _coder(self, width: int) -> Coder:
        made: dict[tuple[str, int], Coder] = _made.__dict__.setdefault("coders", {})
        key = (self.name, width)
        if key not in made:
            made[key] = self.make(width)
        return made[key]


_made = threading.local()  # coders keep working memory: none is used by two threads


def _codecs() -> dict[str, Codec]:
    alone = [
        Codec("lz4", "lz4", lz4(Whole)),
        Codec("zstd 1", "zstandard", zstd(Whole, 1)),
        Codec("zstd 3", "zstandard", zstd(Whole, 3)),
        Codec("planes, lz4", "lz4", lz4(Planes)),
        Codec("planes, zstd -1", "zstandard", zstd(Planes, -1)),
        Codec("planes, zstd 1", "zstandard", zstd(Planes, 1)),
        Codec("planes, zstd 3", "zstandard", zstd(Planes, 3)),
        Codec("blosc2 bitshuffle, lz4", "blosc2", blosc2("LZ4", "BITSHUFFLE", 1)),
        Codec("blosc2 shuffle, zstd 1", "blosc2", blosc2("ZSTD", "SHUFFLE", 1)),
        Codec("openzl exponents, huffman", "openzl", openzl("exponents")),
        Codec("openzl planes, entropy", "openzl", openzl("planes")),
        Codec("zipnn", "zipnn", zipnn()),
        Codec("pcodec 4", "pcodec", pcodec(4)),
    ]
    found = {codec.name: codec for codec in alone}
    deltas = [found["planes, zstd 1"].against("xor")]
    for name in ("blosc2 bitshuffle, lz4", "openzl planes, entropy"):
        deltas.append(found[name].against("difference"))
    return found | {codec.name: codec for codec in deltas}


CODECS = _codecs()
"""By name, those that need nothing but the block first."""
FINALISTS = (
    "planes, zstd 1",
    "blosc2 bitshuffle, lz4",
    "openzl exponents, huffman",
    "difference, blosc2 bitshuffle, lz4",
)
"""What processes code with: zstd's best, the two that take the processor least, and a delta."""
