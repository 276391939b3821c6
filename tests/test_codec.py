"""Typed JSON: what goes in comes out with its exact types, or an error says where and why not."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import importlib
import json
import math
import pathlib
import random
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from pccheck_ext import _codec
from pccheck_ext._codec import DecodeError, EncodeError, Written, decode, dumps, encode, loads

NAN = float("nan")
INF = float("inf")


def through_json(value: Any, path: str = "x") -> Any:
    """To the bytes of a file and back, with the tensors as a file would hold them."""
    tensors: dict[str, torch.Tensor] = {}
    data = dumps({"manifest": {"state": encode(value, path, tensors)}})
    read: Any = loads(data)
    stored = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    return decode(read["manifest"]["state"], stored, path=path)


def bits(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order, and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.requires_grad == b.requires_grad
            and torch.equal(a.detach().nan_to_num(7), b.detach().nan_to_num(7))
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return bool(np.array_equal(a, b, equal_nan=True)) and str(a) == str(b)
    if isinstance(a, float):
        return bits(a) == bits(b)
    if isinstance(a, complex):
        return bits(a.real) == bits(b.real) and bits(a.imag) == bits(b.imag)
    if isinstance(a, (set, frozenset)):
        return same(sorted(a, key=order), sorted(b, key=order))
    if isinstance(a, Counter | defaultdict | OrderedDict | dict):
        return (
            getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
            and same(getattr(a, "__dict__", None), getattr(b, "__dict__", None))
            and same(list(a.keys()), list(b.keys()))
            and same(list(a.values()), list(b.values()))
        )
    if isinstance(a, SimpleNamespace):
        return same(vars(a), vars(b))
    if isinstance(a, (list, tuple, deque)):
        return (
            getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return bool(a == b)


def order(value: Any) -> str:
    # repr() refuses huge integers, and hides the order of what is in a frozenset.
    return f"{type(value)} {encode(value, 'x', {})}"


def with_metadata() -> OrderedDict[str, Any]:
    value: Any = OrderedDict(weight=1)
    value._metadata = OrderedDict({"": {"version": 1}})
    return value


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 10**5000, -(10**400)),
    *(0.0, -0.0, 0.1, 1e22, 5e-324, -1.7976931348623157e308, 1 / 3, INF, -INF, NAN, 1.0),
    *("", "plain", "ümläut 😀", 'quote " backslash \\ \n \x00 \x7f', "\ud800", "a\udfff\ud800b"),
    *("\ud83d\ude00", "😀\ud83d\ude00\ud83d\ude00", "$tensor"),
    *(b"", b"\x00\xff", bytearray(b"abc"), complex(1, -0.0), complex(NAN, -INF)),
    *([], (), {}, set(), frozenset(), deque(), OrderedDict(), Counter(), SimpleNamespace()),
    *([1.5, INF], [1e308, 1e308, 1e308], [1, 2**80], [1, True, 1.0], [0.5, -0.0], [None, None]),
    *((1,), (1, (2, [3, (4,)])), [[]], [()], ({},)),
    {"a": 1, "b": [1, 2], "": {"c": None}},
    {1: "a", "1": "b", 2.5: "c", None: "d", b"1": "e", (1, "1"): "f"},
    {True: 1, 2: 2},
    {False: 0, "False": 1},
    {0.0: "zero"},
    {-0.0: "minus zero"},
    {NAN: 1, INF: 2, -INF: 3},
    {(): 1, ((),): 2, frozenset({1, "1"}): 3, (1, (2, (NAN,))): 4},
    {2**70: 1, 10**5000: [{1: 2}], complex(1, 2): 3, torch.float32: 4, range(3): 5},
    {"$tensor": "not one"},
    {"$dict": {"$dict": 1}, "x": 2},
    {"$": 1},
    {"$tuple": [1, 2]},
    {"$tuple": (1, 2), 3: {"$set": {4}}},
    {"\ud83d\ude00": 1, "😀": 2},
    {"z": 1, "a": 2, "m": 3},
    OrderedDict(z=1, a=(2,)),
    OrderedDict({3: 1, "$tuple": 2}),
    OrderedDict({"$ordereddict": 1}),
    with_metadata(),
    defaultdict(None, {1: 2}),
    *(defaultdict(f, {"a": f(), 1: f()}) for f in (list, dict, int, float, bool, set, str)),
    Counter({30: 1, 80: 2}),
    Counter("hello"),
    Counter({"$x": 0, "y": -3}),
    deque([1, (2,), deque([3], 4)]),
    deque([1.5, 2.5], maxlen=2),
    deque(maxlen=0),
    {1, "1", (1,), 2.5, None, b"1", frozenset({1})},
    frozenset({(1, 2), (1, "2"), True}),
    {INF, NAN, -0.0},
    *(range(0), range(10), range(5, -7, -3), range(0, 2**70, 2**65)),
    *(slice(None), slice(1, None, -1), slice(0.5, "x", (1,))),
    *(pathlib.Path("/a/b c"), pathlib.Path(), pathlib.Path("\udcff😀")),
    *(torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2),
    *(torch.device("cpu"), torch.device("cuda"), torch.device("cuda:3"), torch.device("meta")),
    *(torch.Size([]), torch.Size([2, 3]), torch.Size([0, 2**62])),
    SimpleNamespace(a=1, b=(2, SimpleNamespace(c={3}))),
    *(np.float64(0.1), np.float64(NAN), np.float64(-0.0), np.float32(0.1), np.float16(INF)),
    *(np.float32(-INF), np.int64(-(2**63)), np.uint64(2**64 - 1), np.int8(-128), np.uint8(255)),
    *(np.bool_(True), np.bool_(False), np.complex64(1 - 2j), np.complex128(complex(-0.0, NAN))),
    {np.int64(1): np.float32(2), np.float64(0.5): np.bool_(True)},
]


def show(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 2**100:
        return "huge integer"
    try:
        return f"{type(value).__name__}-{ascii(value)[:40]}"
    except ValueError:
        return f"{type(value).__name__}-with-huge-integer"


@pytest.mark.parametrize("value", VALUES, ids=show)
def test_a_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    assert same(through_json(value), value)
    assert same(through_json([value, {"k": (value,)}]), [value, {"k": (value,)}])


G = torch.Generator().manual_seed(1)

TENSORS: list[torch.Tensor] = [
    *(torch.arange(6, dtype=dtype).reshape(2, 3) for dtype in (torch.uint8, torch.int8)),
    *(torch.arange(6, dtype=dtype).reshape(2, 3) for dtype in (torch.int16, torch.int64)),
    *(
        torch.randn(3, 4, generator=G).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    ),
    *(torch.randn(3, 4, dtype=dtype, generator=G) for dtype in (torch.complex64, torch.complex128)),
    torch.randn(4, dtype=torch.complex64, generator=G).conj(),
    torch.randn(4, dtype=torch.complex64, generator=G)
    .conj()
    .imag,  # carries torch's lazy minus sign
    torch.tensor([NAN, INF, -INF, -0.0]),
    torch.tensor([True, False]),
    torch.tensor(3.5),
    torch.empty(0),
    torch.empty(2, 0, 3, dtype=torch.int32),
    torch.arange(12.0).reshape(3, 4).t(),
    torch.arange(12.0)[::3],
    torch.ones(1).expand(5),
    torch.ones(3, requires_grad=True),
    torch.nn.Parameter(torch.randn(2, 2, generator=G)),
    torch.nn.Parameter(torch.arange(3), requires_grad=False),
    torch.nn.Parameter(torch.randn(2, dtype=torch.complex64, generator=G)),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{type(t).__name__}-{t.dtype}")
def test_a_tensor_comes_back_with_dtype_shape_and_values(tensor: torch.Tensor) -> None:
    back = through_json({"t": tensor})["t"]
    assert same(back, tensor)
    assert torch.equal(torch.signbit(back.detach().real), torch.signbit(tensor.detach().real))


def test_what_is_stored_is_real_and_without_history() -> None:
    tensors: dict[str, torch.Tensor] = {}
    leaf = torch.ones(3, requires_grad=True)
    conjugate = torch.ones(2, dtype=torch.complex64).conj()
    value = [leaf, leaf * 2, torch.nn.Parameter(leaf), conjugate, conjugate.imag]
    assert conjugate.imag.is_neg()
    node = encode(value, "x", tensors)
    for stored in tensors.values():
        assert not stored.is_neg()
        assert type(stored) is torch.Tensor
        assert not stored.requires_grad
        assert not stored.is_complex()
    back = decode(node, tensors)
    assert [t.requires_grad for t in back] == [True, False, True, False, False]
    assert torch.equal(back[1], torch.full((3,), 2.0))


def test_plain_tensors_are_handed_on_without_a_copy() -> None:
    tensors: dict[str, torch.Tensor] = {}
    tensor, array = torch.ones(3), np.ones(3)
    node = encode({"t": tensor, "a": array}, "x", tensors)
    assert tensors["x.t"] is tensor
    assert tensors["x.a"].data_ptr() == array.ctypes.data
    assert decode(node, tensors)["t"] is tensor


ARRAYS: list[Any] = [
    *(np.arange(6).astype(name).reshape(2, 3) for name in _codec._array_dtypes),
    *(np.arange(6, dtype=code).reshape(2, 3) for code in (">i2", ">u4", ">f8", ">f4", "<i8")),
    np.array([1 + 2j, complex(-0.0, NAN)], dtype=">c16"),
    np.array(3.5),
    np.array(7, dtype=">i4"),
    np.empty((2, 0, 3), dtype="float32"),
    np.arange(12.0).reshape(3, 4).T,
    np.arange(12.0)[::-3],
    np.frombuffer(b"\x00" + struct.pack("<3d", 1, 2, 3), dtype="<f8", offset=1),
    np.array([NAN, -0.0, INF]),
    np.arange(3, dtype=np.longlong),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}-{a.shape}")
def test_an_array_comes_back_with_dtype_byte_order_shape_and_bits(array: Any) -> None:
    back = through_json({"a": array})["a"]
    assert same(back, array)
    assert back.dtype.str == array.dtype.str
    assert back.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.frombuffer(bytes(24)),  # not writeable
        np.frombuffer(bytearray(25), offset=1),  # not aligned
        np.arange(3.0)[::-1],
        np.arange(6.0).reshape(2, 3).T,
        np.ones(3, dtype=">f8"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_array_that_torch_could_not_share_is_stored_as_a_sound_copy(array: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    encode(array, "x", tensors)
    stored = tensors["x"]
    assert stored.is_contiguous()
    assert stored.data_ptr() % 8 == 0
    stored.add_(1)
    assert not np.array_equal(stored.numpy(), array)


def test_one_tensor_met_twice_is_stored_once_and_comes_back_as_one_object() -> None:
    tensor, array = torch.ones(3), np.arange(3, dtype=">i4")
    weight = torch.nn.Parameter(torch.ones(2))
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": tensor, "b": [tensor, array, weight], "c": (array, weight), "d": torch.ones(3)}
    node = encode(value, "x", tensors)
    assert list(tensors) == ["x.a", "x.b.1", "x.b.2", "x.d"]
    back = decode(node, tensors)
    assert back["a"] is back["b"][0]
    assert back["b"][1] is back["c"][0]
    assert back["b"][2] is back["c"][1]
    assert back["a"] is not back["d"]


def test_a_tensor_stored_by_an_earlier_call_is_referred_to() -> None:
    tensor = torch.ones(3)
    tensors: dict[str, torch.Tensor] = {}
    encode({"shadow": tensor}, "ema", tensors)
    assert encode([tensor], "other", tensors) == [{"$tensor": "ema.shadow"}]
    assert list(tensors) == ["ema.shadow"]


def test_the_keys_of_tensors_are_readable_and_unique() -> None:
    def t() -> torch.Tensor:
        return torch.ones(1)

    tensors: dict[str, torch.Tensor] = {"scheduler.taken": t()}
    value = {
        "base_lrs": [t()],
        "taken": t(),
        "a.b": t(),
        "a": {"b": t(), 1: t(), "1": t()},
        "\ud800ü\n": t(),
        "long" * 1000: t(),
        "long" * 1001: t(),
        10**5000: t(),
    }
    node = encode(value, "scheduler", tensors)
    assert list(tensors) == [
        "scheduler.taken",
        "scheduler.base_lrs.0",
        "scheduler.taken~2",
        "scheduler.a.b",
        "scheduler.a.b~2",
        "scheduler.a.1",
        "scheduler.a.1~2",
        "scheduler.\\ud800\\xfc\\n",
        "scheduler." + "long" * 15 + "l...",
        "scheduler." + "long" * 15 + "l...~2",
        "scheduler.<int>",
    ]
    assert len({id(tensor) for tensor in tensors.values()}) == 11
    assert same(decode(node, tensors), value)


def test_no_tensor_gets_the_one_name_that_safetensors_reserves() -> None:
    tensors: dict[str, torch.Tensor] = {}
    node = encode(torch.ones(1), "__metadata__", tensors)
    assert list(tensors) == ["__metadata__~2"]
    assert same(decode(node, tensors), torch.ones(1))


def test_a_tensor_off_the_cpu_remembers_its_device_for_whoever_places_it() -> None:
    # Lazy tensors are the one other device that is on every machine.
    lazy: Any = importlib.import_module("torch._lazy.ts_backend")
    lazy.init()
    tensors: dict[str, torch.Tensor] = {}
    node = encode({"a": torch.ones(2, device="lazy"), "b": torch.ones(2)}, "x", tensors)
    assert node == {"a": {"$tensor": "x.a", "device": "lazy:0"}, "b": {"$tensor": "x.b"}}
    asked: list[torch.device] = []

    def place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        asked.append(device)
        return tensor + 1

    read = {"x.a": torch.ones(2), "x.b": torch.ones(2)}
    assert decode(node, read)["a"] is read["x.a"]
    back = decode([node, node], read, to_device=place)
    assert asked == [torch.device("lazy:0")]
    assert torch.equal(back[0]["a"], torch.full((2,), 2.0))
    assert back[1]["a"] is back[0]["a"]
    assert back[0]["b"] is read["x.b"]


# --- any nesting of anything --------------------------------------------------------------------


def random_leaf(rng: random.Random) -> Any:
    choice = rng.randrange(8)
    if choice == 0:
        return struct.unpack("<d", rng.randbytes(8))[0]
    if choice == 1:
        return rng.randint(-(2 ** rng.randrange(1, 200)), 2 ** rng.randrange(1, 200))
    if choice == 2:
        return "".join(chr(rng.choice([36, 65, 0xD83D, 0xDE00, 0x1F600, 10])) for _ in range(4))
    if choice == 3:
        return rng.randbytes(rng.randrange(5))
    leaves = [value for value in VALUES if not isinstance(value, (list, dict, deque))]
    return copy.copy(rng.choice(leaves))


def random_key(rng: random.Random, depth: int) -> Any:
    if depth > 0 and rng.random() < 0.3:
        parts = [random_key(rng, depth - 1) for _ in range(rng.randrange(3))]
        return tuple(parts) if rng.random() < 0.5 else frozenset(parts)
    while True:
        leaf = random_leaf(rng)
        if isinstance(leaf, slice):  # hashable in some versions of Python only
            continue
        try:
            hash(leaf)
        except TypeError:
            continue
        return leaf


def random_value(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.2:
        if rng.random() < 0.2:
            pick = rng.choice([*TENSORS, *ARRAYS])
            return copy.deepcopy(pick) if isinstance(pick, np.ndarray) else pick.detach().clone()
        return random_leaf(rng)
    size = rng.randrange(4)
    values = [random_value(rng, depth - 1) for _ in range(size)]
    keys = [random_key(rng, 2) for _ in range(size)]
    makers: list[Callable[[], Any]] = [
        lambda: values,
        lambda: tuple(values),
        lambda: deque(values, rng.choice([None, 5])),
        lambda: dict(zip(keys, values, strict=True)),
        lambda: dict(zip("abc", values, strict=False)),
        lambda: OrderedDict(zip(keys, values, strict=True)),
        lambda: defaultdict(rng.choice([None, list, int]), zip(keys, values, strict=True)),
        lambda: Counter(dict(zip(keys, values, strict=True))),
        lambda: set(keys),
        lambda: frozenset(keys),
        lambda: SimpleNamespace(**dict(zip(["a", "$b", "c d"], values, strict=False))),
        lambda: slice(values, None, tuple(values)),
    ]
    return rng.choice(makers)()


@pytest.mark.parametrize("seed", range(20))
def test_random_nestings_come_back_equal_and_of_the_same_types(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        value = random_value(rng, rng.randrange(1, 6))
        assert same(through_json(value), value)


def test_the_comparison_used_here_sees_what_plain_json_and_pickle_free_shortcuts_lose() -> None:
    differing: list[tuple[Any, Any]] = [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ((1,), [1]),
        ({1: 2}, {"1": 2}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (with_metadata(), OrderedDict(weight=1)),
        (Counter({1: 2}), {1: 2}),
        (defaultdict(int), defaultdict(list)),
        (deque([1], 1), deque([1], 2)),
        ({1}, {True}),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), np.float64(0.5)),
        (np.arange(2, dtype=">i4"), np.arange(2, dtype="<i4")),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.nn.Parameter(torch.ones(2))),
        (torch.ones(2), torch.ones(1, 2)),
        (bytearray(b"a"), b"a"),
        (torch.Size([1]), (1,)),
        (slice(1, 2), slice(1, 2.0)),
    ]
    for a, b in differing:
        assert not same(a, b), (a, b)
        assert not same([a], [b]), (a, b)


# --- what is written ----------------------------------------------------------------------------

WRITTEN: list[tuple[Any, Any]] = [
    ([1, -2.5, "s", None, True], [1, -2.5, "s", None, True]),
    ({"a": {"b": []}}, {"a": {"b": []}}),
    ((1,), {"$tuple": [1]}),
    ({1: 2}, {"$dict": [[1, 2]]}),
    ({"$a": 1}, {"$dict": {"$a": 1}}),
    (OrderedDict(a=1), {"$ordereddict": {"a": 1}}),
    (OrderedDict({1: 2}), {"$ordereddict": [[1, 2]]}),
    (with_metadata(),) * 1
    + (
        {
            "$ordereddict": {"weight": 1},
            "metadata": {"$ordereddict": {"": {"version": 1}}},
        },
    ),
    (defaultdict(list, a=[]), {"$defaultdict": {"a": []}, "factory": "list"}),
    (Counter({3: 1}), {"$counter": [[3, 1]]}),
    (deque([1], 2), {"$deque": [1], "maxlen": 2}),
    ({2, 1}, {"$set": [1, 2]}),
    (frozenset({"b", "a"}), {"$frozenset": ["a", "b"]}),
    (SimpleNamespace(a=1), {"$namespace": {"a": 1}}),
    (b"\x00\x01", {"$bytes": "AAE="}),
    (bytearray(b"\x00\x01"), {"$bytearray": "AAE="}),
    (2**64, {"$int": "0x10000000000000000"}),
    (-(2**64), {"$int": "-0x10000000000000000"}),
    ([INF, -INF, NAN], [{"$float": "inf"}, {"$float": "-inf"}, {"$float": "nan"}]),
    (1 + 2j, {"$complex": [1.0, 2.0]}),
    ("\ud83d\ude00", {"$str": ["\ud83d", "\ude00"]}),
    (range(1, 9, 2), {"$range": [1, 9, 2]}),
    (slice(1, None), {"$slice": [1, None, None]}),
    (pathlib.Path("a/b"), {"$path": "a/b"}),
    (torch.bfloat16, {"$dtype": "bfloat16"}),
    (torch.device("cuda:1"), {"$device": "cuda:1"}),
    (torch.Size([2, 3]), {"$size": [2, 3]}),
    (np.float32(0.5), {"$numpy": "float32", "value": 0.5}),
    (torch.ones(1), {"$tensor": "x"}),
    (torch.ones(1, dtype=torch.complex64), {"$tensor": "x", "complex": True}),
    (torch.ones(1, requires_grad=True), {"$tensor": "x", "requires_grad": True}),
    (torch.nn.Parameter(torch.ones(1)), {"$tensor": "x", "parameter": True}),
    (np.ones(1, "<f4"), {"$ndarray": "x", "dtype": "float32"}),
    (np.ones(1, ">f4"), {"$ndarray": "x", "dtype": "float32", "big_endian": True}),
]


@pytest.mark.parametrize(("value", "node"), WRITTEN, ids=lambda x: ascii(x)[:40])
def test_the_written_form_stays_readable_by_later_versions(value: Any, node: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    assert same(encode(value, "x", tensors), node)
    assert same(decode(node, tensors), value)


def test_every_type_tag_is_among_the_written_forms_above() -> None:
    assert {key for _, node in WRITTEN for key in tags_in(node)} == set(_codec._tags)


def tags_in(node: Any) -> set[str]:
    if isinstance(node, dict):
        return {k for k in node if k[:1] == "$"}.union(*map(tags_in, node.values())) - {"$a"}
    return set().union(*map(tags_in, node)) if isinstance(node, list) else set()


def test_the_text_is_for_people_too() -> None:
    node: Any = {
        "step": 3,
        "layers": {"fc": {"w": {"shape": [2, 3], "dtype": "F32"}, "b": {"shape": []}}, "e": {}},
        "losses": [0.1, 0.2],
        "lists": [[1], {"a": 1}],
        "tagged": {"$tuple": [1, {"a": 2}]},
        "naïve": "😀\ud800",
    }
    text = dumps(node)
    assert text.decode("ascii") == (
        "{\n"
        ' "step": 3,\n'
        ' "layers": {\n'
        '  "fc": {\n'
        '   "w": {"shape": [2, 3], "dtype": "F32"},\n'
        '   "b": {"shape": []}\n'
        "  },\n"
        '  "e": {}\n'
        " },\n"
        ' "losses": [0.1, 0.2],\n'
        ' "lists": [\n'
        "  [1],\n"
        "  {\n"
        '   "a": 1\n'
        "  }\n"
        " ],\n"
        ' "tagged": {"$tuple": [1, {"a": 2}]},\n'
        ' "na\\u00efve": "\\ud83d\\ude00\\ud800"\n'
        "}\n"
    )
    assert loads(text) == node == json.loads(text)


def test_the_same_set_is_written_in_the_same_way_in_whatever_order_it_was_filled() -> None:
    names = [f"layer.{i}" for i in range(100)]
    texts = set()
    for seed in range(5):
        random.Random(seed).shuffle(names)
        texts.add(dumps(encode({"seen": set(names)}, "x", {})))
    assert len(texts) == 1


@pytest.mark.parametrize("node", [NAN, [1, INF], {1: 2}, {"a": {2: 3}}, {"a": object()}, [{1}]])
def test_dumps_refuses_what_is_not_json(node: Any) -> None:
    with pytest.raises(EncodeError):
        dumps(node)


def test_text_written_before_stands_for_its_node_at_its_level_alone() -> None:
    node = {"a": [[1, {"b": None}]], "c": [{"d": "\u00e9"}, {}], "e": {"f": [[], [2.5]]}}
    assert dumps({"x": Written(node, 1), "y": 1}) == dumps({"x": node, "y": 1})
    assert dumps({"x": {"y": Written(node, 2)}}) == dumps({"x": {"y": node}})
    with pytest.raises(EncodeError, match="written for level 1 stands at level 2"):
        dumps({"x": {"y": Written(node, 1)}})


def test_dumps_refuses_a_node_that_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(EncodeError):
        dumps(loop)
    with pytest.raises(EncodeError):
        dumps({"a": {"b": {"c": {"d": loop}}}})
    with pytest.raises(EncodeError, match="nested too deeply"):
        dumps(nested(100_000, lambda x: [x]))


# --- what cannot be saved -----------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


class Table(dict):  # type: ignore[type-arg]
    pass


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> int:
        return 1


@dataclasses.dataclass
class Config:
    rate: float = 0.1


Point = namedtuple("Point", "x y")


def counter_with_attribute() -> Any:
    value: Any = Counter({1: 2})
    value.note = 1
    return value


def ordered_with_attribute() -> Any:
    value: Any = OrderedDict()
    value.note = 1
    return value


def namespace_with_a_number_for_a_name() -> Any:
    value: Any = SimpleNamespace()
    vars(value)[1] = 2
    return value


UNSAVABLE: list[tuple[Callable[[], Any], str]] = [
    (lambda: object(), "object cannot be saved; leave it out"),
    (lambda: len, "builtin_function_or_method"),
    (lambda: lambda: 0, "function"),
    (lambda: Config, "type"),
    (lambda: datetime.datetime(2020, 1, 1), "datetime.datetime"),
    (lambda: Colour.RED, "Colour cannot be saved; save its value"),
    (lambda: Text("a"), "str that would come back as a plain one"),
    (lambda: Whole(1), "int that would come back as a plain one"),
    (lambda: Table(a=1), "dict that would come back as a plain one"),
    (lambda: Point(1, 2), "_asdict()"),
    (lambda: Config(), "dataclasses.asdict"),
    (lambda: torch.__version__, "str that would come back"),
    (lambda: torch.nn.Linear(1, 1), "save its state_dict()"),
    (lambda: torch.Generator(), "save its get_state()"),
    (lambda: defaultdict(lambda: 0), "factory"),
    (lambda: defaultdict(Unhashable()), "factory"),
    (lambda: counter_with_attribute(), "note"),
    (lambda: ordered_with_attribute(), "note"),
    (lambda: namespace_with_a_number_for_a_name(), "name is 1"),
    (lambda: torch.ones(2, 2).to_sparse(), "to_dense()"),
    (lambda: torch.ones(2, 2).to_sparse_csr(), "to_dense()"),
    (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "int_repr()"),
    (lambda: torch.nested.nested_tensor([torch.ones(1)], layout=torch.strided), "unbind()"),
    (lambda: torch.ones(2, device="meta"), "meta"),
    (lambda: torch.nn.UninitializedParameter(), "cannot be saved"),
    (lambda: np.array([None]), "array of object"),
    (lambda: np.array(["a"]), "array of <U1"),
    (lambda: np.zeros(1, dtype="datetime64[s]"), "array of datetime64"),
    (lambda: np.zeros(1, dtype=[("a", "i4")]), "cannot be saved"),
    (lambda: np.zeros(1, dtype=np.longdouble), "cannot be saved"),
    (lambda: np.matrix([[1]]), "numpy.ndarray that would come back as a plain one"),
    (lambda: np.ma.masked_array([1]), "numpy.ndarray that would come back"),
    (lambda: np.str_("a"), "numpy.str_"),
    (lambda: np.longdouble(1), "numpy.longdouble"),
    (lambda: np.longlong(1), "numpy.longlong"),
    (lambda: np.datetime64(1, "s"), "numpy.datetime64"),
]


@pytest.mark.parametrize(("make", "hint"), UNSAVABLE)
@pytest.mark.filterwarnings("ignore")  # some of these warn when they are made
def test_what_cannot_be_saved_is_an_error_with_its_place_and_a_remedy(
    make: Callable[[], Any], hint: str
) -> None:
    with pytest.raises(EncodeError) as caught:
        encode({"a": [1, ({"b": make()},)]}, "extra.mine", {})
    assert caught.value.path == "extra.mine.a.1.0.b"
    assert str(caught.value).startswith("extra.mine.a.1.0.b: ")
    assert hint in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_key_or_member_that_cannot_be_saved_is_an_error_with_its_place() -> None:
    for value in ({Colour.RED: 1}, {Colour.RED}, {(1, Colour.RED): 1}, Counter([Colour.RED])):
        with pytest.raises(EncodeError, match=r"^x\.0\..*key.*Colour"):
            encode([value], "x", {})
    for value in ({torch.ones(1): 1}, {torch.ones(1)}, {(torch.ones(1),): 1}):
        with pytest.raises(EncodeError, match="cannot be saved as a key"):
            encode([value], "x", {})
    # ... and not where it merely stands beside such keys
    assert through_json({(1,): torch.ones(1)})[(1,)].shape == (1,)


def test_a_cycle_is_an_error_with_its_place() -> None:
    value: dict[str, Any] = {"a": [1, ({},)]}
    value["a"][1][0]["back"] = value["a"]
    with pytest.raises(EncodeError, match=r"^x\.a\.1\.0\.back: this list contains itself"):
        encode(value, "x", {})


def test_a_container_met_twice_is_not_a_cycle() -> None:
    shared = [1]
    assert through_json({"a": shared, "b": [shared, shared]}) == {"a": [1], "b": [[1], [1]]}


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0.5
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: [x],
        lambda x: (x,),
        lambda x: {"a": x},
        lambda x: {1: x},
        lambda x: OrderedDict({1: x}),
        lambda x: deque([x]),
        lambda x: frozenset({x}),
        lambda x: slice(x),
        lambda x: SimpleNamespace(a=x),
    ],
)
def test_nesting_is_saved_up_to_the_limit_and_refused_with_its_place_beyond(
    wrap: Callable[[Any], Any],
) -> None:
    value = nested(_codec.MAX_DEPTH, wrap)
    tensors: dict[str, torch.Tensor] = {}
    text = dumps({"manifest": {"state": encode(value, "x", tensors)}})
    back: Any = loads(text)
    assert encode(decode(back["manifest"]["state"], {}), "x", {}) == back["manifest"]["state"]
    with pytest.raises(EncodeError, match=r"^x\..*nested more than 64 levels"):
        encode(wrap(value), "x", {})


def test_nesting_counts_in_keys_too() -> None:
    key = nested(_codec.MAX_DEPTH - 1, lambda x: (x,))
    assert through_json({key: key}) == {key: key}
    with pytest.raises(EncodeError, match="nested more than 64 levels"):
        encode({(key,): 1}, "x", {})


def test_a_call_stack_that_is_nearly_used_up_gives_the_same_kind_of_error() -> None:
    value = nested(60, lambda x: {1: x})
    node: Any = encode(value, "x", {})
    text = dumps(node)

    def with_less_and_less_stack(call: Callable[[], Any]) -> None:
        def descend(levels: int) -> None:
            if levels:
                descend(levels - 1)
            else:
                call()

        for levels in range(sys.getrecursionlimit()):
            descend(levels)

    with pytest.raises(EncodeError, match="call stack"):
        with_less_and_less_stack(lambda: encode(value, "x", {}))
    with pytest.raises(DecodeError, match="call stack"):
        with_less_and_less_stack(lambda: decode(node, {}))
    with pytest.raises(DecodeError, match="call stack"):
        with_less_and_less_stack(lambda: loads(text))


# --- what cannot be read ------------------------------------------------------------------------

MALFORMED: list[Any] = [
    *({"$": 1}, {"$nope": 1}, {"$Tuple": []}, {"$tuple": [], "$list": []}, {"$tuple": [], "x": 1}),
    *({"$os.system": "true"}, {"$eval": "1"}, {"$reduce": ["os.system", ["true"]]}),
    *({"$tuple": 1}, {"$tuple": {}}, {"$tuple": None}, {"$tuple": "ab"}, {"$tuple": [{"$": 1}]}),
    *({"$dict": 1}, {"$dict": [1]}, {"$dict": [[1]]}, {"$dict": [[1, 2, 3]]}, {"$dict": ["ab"]}),
    *({"$dict": [[1, 2], [1, 3]]}, {"$dict": [[1, 2], [True, 3]]}, {"$dict": [[0.0, 1], [0, 2]]}),
    *({"$dict": [[[], 1]]}, {"$dict": [[{}, 1]]}, {"$dict": [[{"$tuple": [[]]}, 1]]}),
    *({"$dict": [[{"$set": []}, 1]]}, {"$dict": [[{"$tensor": "t"}, 1]]}),
    *({"$dict": [[{"$tuple": [{"$tensor": "t"}]}, 1]]}, {"$dict": [[{"$bytearray": ""}, 1]]}),
    *({"$ordereddict": 1}, {"$ordereddict": [], "metadata": {"$x": 1}}, {"$ordereddict": None}),
    *({"$ordereddict": [], "factory": None}, {"$counter": 1}, {"$counter": [1]}, {"metadata$": 0}),
    *({"$defaultdict": []}, {"$defaultdict": [], "factory": "eval"}, {"$namespace": [[1, 2]]}),
    *({"$defaultdict": [], "factory": "os.system"}, {"$defaultdict": [], "factory": ["list"]}),
    *({"$defaultdict": [], "factory": {"$tuple": []}}, {"$defaultdict": 1, "factory": None}),
    *({"$set": 1}, {"$set": [1, 1]}, {"$set": [1, True]}, {"$set": [[]]}, {"$set": [{}]}),
    *({"$set": [{"$tensor": "t"}]}, {"$frozenset": [{"$set": []}]}, {"$frozenset": {"a": 1}}),
    *({"$deque": []}, {"$deque": [1, 2], "maxlen": 1}, {"$deque": [], "maxlen": -1}),
    *({"$deque": [], "maxlen": 2**63}, {"$deque": [], "maxlen": "1"}, {"$deque": 1, "maxlen": 1}),
    *({"$deque": [], "maxlen": True}, {"$deque": [], "maxlen": 1.0}, {"$namespace": 1}),
    *({"$bytes": 1}, {"$bytes": "A"}, {"$bytes": "AAE"}, {"$bytes": "A!=="}, {"$bytes": "ü"}),
    *({"$bytes": " AAE="}, {"$bytes": None}, {"$bytearray": []}, {"$bytearray": "="}),
    *({"$int": 1}, {"$int": "1"}, {"$int": "0x"}, {"$int": "0xg"}, {"$int": " 0x1"}),
    *({"$int": "0x1_0"}, {"$int": "+0x1"}, {"$int": None}, {"$int": "0x1\n"}, {"$int": "--0x1"}),
    *({"$float": 1.0}, {"$float": "1.0"}, {"$float": "Infinity"}, {"$float": None}),
    *({"$complex": [1.0]}, {"$complex": [1, 2]}, {"$complex": "1j"}, {"$complex": [1.0, None]}),
    *({"$str": "a"}, {"$str": [1]}, {"$str": None}, {"$str": [["a"]]}, {"$str": {}}),
    *({"$range": [0, 1, 0]}, {"$range": [0, 1]}, {"$range": [0.0, 1, 1]}, {"$range": [True, 1, 1]}),
    *({"$slice": [1, 2]}, {"$slice": 1}, {"$slice": [1, 2, 3, 4]}, {"$slice": {"start": 1}}),
    *({"$path": 1}, {"$path": ["a"]}, {"$path": None}, {"$path": {"$path": "a"}}),
    *({"$dtype": "nope"}, {"$dtype": "nn"}, {"$dtype": "__name__"}, {"$dtype": 1}, {"$dtype": []}),
    *({"$device": "nope"}, {"$device": "cuda:-1"}, {"$device": 0}, {"$device": ""}),
    *({"$device": "cuda:999"}, {"$device": "cuda:0\n"}, {"$device": "CUDA"}, {"$device": None}),
    *({"$size": [1.0]}, {"$size": 1}, {"$size": [True]}, {"$size": [2**63]}, {"$size": [[1]]}),
    *({"$tensor": "absent"}, {"$tensor": 1}, {"$tensor": None}, {"$tensor": ["t"]}),
    *({"$tensor": "t", "complex": 1}, {"$tensor": "t", "parameter": None}, {"$tensor": {}}),
    *({"$tensor": "i", "parameter": True}, {"$tensor": "i", "requires_grad": True}),
    *({"$tensor": "t", "complex": True}, {"$tensor": "i", "complex": True}),
    *({"$tensor": "t", "device": 1}, {"$tensor": "t", "device": "x y"}, {"$tensor": "t", "x": 1}),
    *({"$ndarray": "t"}, {"$ndarray": "t", "dtype": "float64"}, {"$ndarray": "t", "dtype": 1}),
    *({"$ndarray": "t", "dtype": "object"}, {"$ndarray": "absent", "dtype": "float32"}),
    *({"$ndarray": "t", "dtype": "float32", "big_endian": 1}, {"$ndarray": "t", "dtype": "O"}),
    *({"$ndarray": "t", "dtype": "complex64"}, {"$ndarray": 1, "dtype": "float32"}),
    *({"$ndarray": "t", "dtype": ["float32"]}, {"$ndarray": "t", "dtype": "float32,float32"}),
    *({"$numpy": "float32"}, {"$numpy": "float32", "value": 1}, {"$numpy": "f4", "value": 1.0}),
    *(
        {"$numpy": "object", "value": 1},
        {"$numpy": "int8", "value": 200},
        {"$numpy": 1, "value": 1},
    ),
    *({"$numpy": "uint8", "value": -1}, {"$numpy": "bool", "value": 1}, {"$numpy": [], "value": 1}),
    *({"$numpy": "float32", "value": 1e300}, {"$numpy": "float16", "value": 0.1}),
    *({"$numpy": "int64", "value": {"$int": "0x8000000000000000"}},),
    *(NAN, INF, [NAN], (1,), {1: 2}, {None: 1}, {1}, b"a", object(), 1j, Colour.RED, Text("a")),
    *([(1,)], {"a": (1,)}, {"$tuple": (1,)}, {"$dict": ([1, 2],)}, {"$dict": {1: 2}}),
]


@pytest.mark.parametrize("node", MALFORMED, ids=lambda x: ascii(x)[:60])
def test_a_malformed_node_is_an_error_with_its_place(node: Any) -> None:
    if node == {"metadata$": 0}:  # not a tag: one begins with it
        assert decode(node, {}) == node
        return
    tensors = {"t": torch.ones(3), "i": torch.ones(3, dtype=torch.int32)}
    with pytest.raises(DecodeError) as caught:
        decode({"a": [0, {"$tuple": [node]}]}, tensors, path="extra.mine")
    assert caught.value.path.startswith("extra.mine.a.1.0")
    assert isinstance(caught.value, ValueError)


def test_reading_hostile_input_imports_and_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = importlib.import_module

    def only_numpy(name: str, package: str | None = None) -> Any:
        assert name == "numpy"
        return allowed(name, package)

    monkeypatch.setattr(importlib, "import_module", only_numpy)
    before = set(sys.modules)
    for name in ("antigravity", "antigravity.x", "this:s", "os.system", "__import__"):
        for node in (
            {f"${name}": ["true"]},
            {"$defaultdict": [], "factory": name},
            {"$dtype": name},
            {"$device": name},
            {"$numpy": name, "value": 1},
            {"$ndarray": "t", "dtype": name},
        ):
            with pytest.raises(DecodeError):
                decode(node, {"t": torch.ones(1)})
    assert set(sys.modules) == before


def test_a_large_array_referred_to_many_times_is_converted_once() -> None:
    tensors = {"t": torch.arange(1000), "c": torch.ones(1000, 2)}
    big = {"$ndarray": "t", "dtype": "int64", "big_endian": True}
    paired = {"$tensor": "c", "complex": True, "parameter": True}
    back = decode([big] * 50 + [paired] * 50, tensors)
    assert len({id(value) for value in back}) == 2


def test_junk_put_anywhere_into_a_good_node_is_read_or_refused_never_a_crash() -> None:
    rng = random.Random(5)
    junk = [None, True, 0, -1, 1.5, NAN, "", "$tuple", "x", [], {}, [[1, 2]], {"$": 0}, 2**70, ()]

    def mutate(node: Any) -> Any:
        if rng.random() < 0.05:
            return copy.deepcopy(rng.choice(junk))
        if isinstance(node, dict):
            tags = list(_codec._tags)
            rename = rng.random() < 0.1
            return {
                rng.choice(tags) if rename and k[:1] == "$" else k: mutate(v)
                for k, v in node.items()
                if rng.random() > 0.02
            }
        if isinstance(node, list):
            return [mutate(x) for x in node if rng.random() > 0.02]
        return node

    read = refused = 0
    for _ in range(1500):
        tensors: dict[str, torch.Tensor] = {}
        node = encode(random_value(rng, 4), "x", tensors)
        try:
            decode(mutate(node), tensors)
            read += 1
        except DecodeError:
            refused += 1
    assert read > 100
    assert refused > 100


BAD_TEXT: list[bytes] = [
    *(b"", b" ", b"{", b'{"a": 1', b'{"a": 1}}', b"[1,]", b"{'a': 1}", b'{"a" 1}', b"nul", b"\x00"),
    *(b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"-1e999", b'{"a": [1E400]}'),
    *(b"9" * 21, b"-" + b"9" * 5000, b"[" + b"1" * 100_000 + b"]", b"01", b"1.", b".5", b"+1"),
    *(b'{"a": 1, "a": 1}', b'{"x": {"a": 1, "b": 2, "\\u0061": 3}}', b'{"": 1, "": 2}'),
    *(b'"\xff"', b"\xff\xfe[\x00]\x00", b'\xef\xbb\xbf{"a": 1}', b'"\xed\xa0\x80"', b'"\xc0\x80"'),
    *(b'"a\nb"', b'"\\x"', b'"\\u12"', b'"unclosed', b'"closed" "again"', b"[1] [2]"),
    *(b"[" * 257 + b"]" * 257, b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 10_000_000),
    *(b"[" * 200 + b'"]"' + b"[" * 200, b'["\\"]' + b"[" * 300),
]


@pytest.mark.parametrize("data", BAD_TEXT, ids=lambda d: ascii(d[:30]))
def test_loads_refuses_loose_or_broken_text(data: bytes) -> None:
    with pytest.raises(DecodeError):
        loads(data)


def test_loads_takes_brackets_in_strings_for_what_they_are() -> None:
    assert loads(b'["' + b"[" * 1000 + b'\\"[{", "\\\\", [[]]]') == ["[" * 1000 + '"[{', "\\", [[]]]
    assert loads(b"[" * 256 + b"]" * 256) is not None


def test_loads_stays_linear_on_text_made_to_be_slow() -> None:
    # A quadratic scan would take hours over these.
    for data in (b'"' + b'\\"' * 2_000_000, b'"' + b"\\" * 3_000_001, b'"a' * 1_000_001):
        with pytest.raises(DecodeError):
            loads(data)


def test_flipped_bytes_are_read_or_refused_never_a_crash() -> None:
    rng = random.Random(7)
    tensors: dict[str, torch.Tensor] = {}
    text = dumps(encode([random_value(rng, 4) for _ in range(10)], "x", tensors))
    refused = 0
    for _ in range(1500):
        broken = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            decode(loads(bytes(broken)), tensors)
        except DecodeError:
            refused += 1
    assert refused > 100


def test_an_array_is_an_error_that_says_so_where_numpy_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    node = encode({"a": np.ones(2), "b": np.float32(1)}, "x", tensors)
    monkeypatch.setitem(sys.modules, "numpy", None)
    for key in ("a", "b"):
        with pytest.raises(DecodeError, match=rf"^state\.{key}: .*numpy, which is not installed"):
            decode({key: node[key]}, tensors)  # type: ignore[index, call-overload]
    with pytest.raises(EncodeError, match=r"^x\.0: a builtins\.object"):
        encode([object()], "x", {})
    assert same(through_json([1, (2,), torch.ones(1)]), [1, (2,), torch.ones(1)])


# --- real training state ------------------------------------------------------------------------


class Warmup:
    """A callable that keeps state: LambdaLR saves the attributes of such."""

    def __init__(self) -> None:
        self.peak = (3, 0.5)
        self.calls = Counter({0: 1})

    def __call__(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.peak[0]) * self.peak[1]


def lambda_lr(o: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(o, [Warmup(), lambda epoch: 0.9**epoch])


def sequential(o: torch.optim.Optimizer) -> Any:
    parts: list[Any] = [
        lr_scheduler.LinearLR(o, total_iters=3),
        lr_scheduler.MultiStepLR(o, [2, 2, 5]),
        lr_scheduler.ExponentialLR(o, 0.9),
    ]
    return lr_scheduler.SequentialLR(o, parts, [4, 9])


def chained(o: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [3, 8]), lambda_lr(o)]
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda_lr,
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4, 9], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=8),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.5, 0.25], total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=8),
}


def test_every_scheduler_of_torch_is_tested_below() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


def two_group_optimizer() -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.02}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def advance(scheduler: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[Any]:
    seen = []
    for step in steps:
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 / (1 + step // 4))
        else:
            scheduler.step()
        seen.append([(g["lr"].hex(), float(g["momentum"]).hex()) for g in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("done", [0, 5, 10])
def test_a_scheduler_restored_from_saved_state_goes_on_with_the_same_rates(
    name: str, done: int
) -> None:
    optimizer = two_group_optimizer()
    scheduler = SCHEDULERS[name](optimizer)
    advance(scheduler, optimizer, range(done))
    state = {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}
    back = through_json(state)
    assert same(back, state)

    fresh_optimizer = two_group_optimizer()
    fresh = SCHEDULERS[name](fresh_optimizer)
    fresh_optimizer.load_state_dict(back["optimizer"])
    fresh.load_state_dict(back["scheduler"])
    rest = range(done, 19)
    assert advance(fresh, fresh_optimizer, rest) == advance(scheduler, optimizer, rest)
    assert same(fresh.state_dict(), scheduler.state_dict())


def test_a_grad_scaler_restored_from_saved_state_goes_on_with_the_same_scale() -> None:
    def run(scaler: torch.amp.GradScaler, steps: int) -> list[float]:
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        seen = []
        for step in range(steps):
            optimizer.zero_grad()
            scaler.scale(weight.sum() * (INF if step % 5 == 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale())
        return seen

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    run(scaler, 4)
    state = scaler.state_dict()
    back = through_json(state)
    assert same(back, state)
    fresh = torch.amp.GradScaler("cpu", growth_interval=2)
    fresh.load_state_dict(back)
    assert run(fresh, 12) == run(scaler, 12)
    assert through_json(torch.amp.GradScaler("cpu", enabled=False).state_dict()) == {}


def test_an_averaged_model_comes_back_with_its_buffers_and_module_versions() -> None:
    def build() -> torch.optim.swa_utils.AveragedModel:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return torch.optim.swa_utils.AveragedModel(model, use_buffers=True)

    averaged = build()
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model(torch.randn(5, 3))
    averaged.update_parameters(model)
    state = averaged.state_dict()
    back = through_json(state)
    assert same(back, state)
    assert back._metadata["module.1"] == {"version": 2}
    fresh = build()
    fresh.load_state_dict(back)
    assert same(fresh.state_dict(), state)


def test_an_optimizer_state_dict_comes_back_and_takes_the_same_next_step() -> None:
    torch.manual_seed(3)
    gradients = [torch.randn(3) for _ in range(4)]
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.99), amsgrad=True)
    for gradient in gradients[:3]:
        weight.grad = gradient
        optimizer.step()
    state = optimizer.state_dict()
    back = through_json(state)
    assert same(back, state)
    other = torch.nn.Parameter(weight.detach().clone())
    fresh = torch.optim.AdamW([other])
    fresh.load_state_dict(back)
    weight.grad = other.grad = gradients[3]
    optimizer.step()
    fresh.step()
    assert torch.equal(other, weight)


def test_the_state_of_every_kind_of_random_generator_comes_back() -> None:
    state = {
        "python": random.Random(3).getstate(),
        "torch": torch.Generator().manual_seed(3).get_state(),
        "mersenne": np.random.RandomState(3).get_state(),
        **{
            name: getattr(np.random, name)(3).state
            for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
        },
    }
    back = through_json(state)
    assert same(back, state)
    fresh = random.Random()
    fresh.setstate(back["python"])
    assert fresh.random() == random.Random(3).random()
    generator = np.random.PCG64()
    generator.state = back["PCG64"]
    assert np.random.Generator(generator).random() == np.random.default_rng(3).random()


def test_pickle_has_no_place_here() -> None:
    source = pathlib.Path(_codec.__file__).read_text()
    for word in ("pickle", "marshal", "eval(", "exec(", "torch.load", "getattr("):
        assert word not in source
