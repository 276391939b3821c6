"""Typed JSON: training state that is not a tensor, saved and restored with its exact types.

``decode(loads(dumps(encode(x, path, tensors))), tensors)`` equals ``x``, types included, or
``encode`` raises before anything is written. Plain JSON does neither: it turns tuples into lists,
integer keys into strings and infinities into something that other readers refuse.

What JSON can hold stays as it is, so that a person can read a manifest. Everything else is an
object with one key that begins with ``$``; a dict that has such a key itself is escaped::

    {"milestones": {"$counter": [[30, 1], [80, 2]]},   Counter({80: 2, 30: 1})
     "best": {"$float": "inf"},                        math.inf
     "betas": {"$tuple": [0.9, 0.999]},                (0.9, 0.999)
     "shadow": {"$tensor": "ema.shadow"}}              its values: in a tensor file, by this key

Reading executes nothing, imports nothing that the file names, and does work in proportion to the
size of what is read. Identity is kept for tensors and arrays (one object met twice is stored once
and comes back as one object), not for containers: JSON is a tree.
"""

from __future__ import annotations

import base64
import binascii
import enum
import importlib
import json
import math
import pathlib
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias, Union

import torch

__all__ = [
    "MAX_DEPTH",
    "DecodeError",
    "EncodeError",
    "JSONValue",
    "Written",
    "decode",
    "dumps",
    "encode",
    "loads",
]

JSONValue: TypeAlias = Union[bool, int, float, str, "list[JSONValue]", "dict[str, JSONValue]", None]

MAX_DEPTH = 64
"""How deep values may be nested: far beyond any real state, far below the interpreter's limit."""

# One nested value costs up to three levels of JSON ({"$dict": [[key, value]]}), and the manifest
# around it some more.
_MAX_JSON_DEPTH = 4 * MAX_DEPTH
_OPEN_LEVELS = 3  # of the written text: deeper containers stand on one line
_MAX_SEGMENT = 64  # characters of one dict key that go into a path

_INT_LIMIT = 1 << 63  # plain JSON up to here, hexadecimal beyond: other readers, digit limits

_Path: TypeAlias = "tuple[_Path | None, object]"  # linked, so that a path costs nothing until shown


class EncodeError(TypeError):
    """A value that cannot be saved: says where it is, what it is and what to do about it."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class DecodeError(ValueError):
    """Saved state that is malformed: says where and how."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


def encode(value: object, path: str, tensors: dict[str, torch.Tensor]) -> JSONValue:
    """Return ``value`` as typed JSON; its tensors and arrays go into ``tensors``.

    ``path`` names the value in errors and begins the keys given to its tensors, such as
    "scheduler.base_lrs.0". Tensors are put into ``tensors`` as they are, not copied (arrays share
    their memory where they can): they must not change until they have been copied. Complex ones are
    stored as pairs of reals. A tensor that is in ``tensors`` already is referenced, not added.

    Raises EncodeError for what cannot be saved faithfully, subclasses of supported types included;
    ``tensors`` may have gained entries by then. Not kept: a tensor's strides and its history (one
    that was computed comes back as a plain tensor), the payload of a NaN.
    """
    try:
        return _Encoder(tensors).node(value, (None, path), 0)
    except RecursionError:
        raise EncodeError(path, "nested too deeply for the call stack left") from None


def decode(
    node: object,
    tensors: Mapping[str, torch.Tensor],
    *,
    path: str = "state",
    to_device: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
) -> Any:
    """Return the value that ``encode`` made ``node`` of; the exact inverse.

    Tensors and arrays share the memory of those in ``tensors``. They stay on the device where they
    are, unless ``to_device`` is given: it is called with each that was not on the CPU when it was
    saved, and with the device where it was. Raises DecodeError, which names the place below
    ``path``, for what ``encode`` cannot have made.
    """
    try:
        return _Decoder(tensors, to_device).node(node, (None, path), 0)
    except RecursionError:
        raise DecodeError(path, "nested too deeply for the call stack left") from None


def dumps(node: JSONValue) -> bytes:
    """Return JSON text in ASCII: the outer levels one entry a line, what is deeper on one line.

    ``node`` must be JSON throughout, as ``encode`` returns it; dict keys must be strings.
    """
    parts: list[str] = []
    try:
        _write(node, 0, parts)
    except RecursionError:
        raise EncodeError("JSON", "nested too deeply, or it contains itself") from None
    except (TypeError, ValueError) as error:
        raise EncodeError("JSON", f"cannot be written: {error}") from None
    parts.append("\n")
    return "".join(parts).encode("ascii")


class Written:
    """JSON text of a node, made once, to stand for it at one level of what ``dumps`` is given."""

    def __init__(self, node: JSONValue, level: int) -> None:
        parts: list[str] = []
        _write(node, level, parts)
        self.level = level
        self.text = "".join(parts)


def loads(data: bytes) -> JSONValue:
    """Return the JSON value of UTF-8 text; raises DecodeError for anything loose.

    Refused: duplicate keys, NaN, Infinity, numbers beyond what ``dumps`` writes, deep nesting.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError("JSON", f"not UTF-8 at byte {error.start}") from None
    _check_json_depth(data)
    try:
        value: JSONValue = json.loads(
            text,
            object_pairs_hook=_unique_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise DecodeError("JSON", f"{error.msg} at {place}") from None
    except RecursionError:
        raise DecodeError("JSON", "nested too deeply for the call stack left") from None
    return value


# --- text ---------------------------------------------------------------------------------------


_compact = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(", ", ": "))


def _write(node: JSONValue | Written, level: int, parts: list[str]) -> None:
    """Append the text of ``node``: only the outer levels are laid out here, as json.dumps is many
    times slower with an indent."""
    entries: Iterable[tuple[str, JSONValue]]
    if isinstance(node, Written):
        if node.level != level:
            raise ValueError(f"text written for level {node.level} stands at level {level}")
        parts.append(node.text)
        return
    if type(node) is dict and node and level < _OPEN_LEVELS and not _is_tagged(node):
        opening, closing = "{}"
        for key in node:
            if type(key) is not str:
                raise TypeError(f"the dict key {key!r} is not a string")
        entries = ((_compact.encode(key) + ": ", value) for key, value in node.items())
    elif type(node) is list and level < _OPEN_LEVELS and any(type(x) in (dict, list) for x in node):
        opening, closing = "[]"
        entries = (("", value) for value in node)
    else:
        parts.append(_compact.encode(node))
        return
    separator = "\n" + " " * (level + 1)
    parts.append(opening)
    for label, value in entries:
        parts.append(separator)
        parts.append(label)
        _write(value, level + 1, parts)
        separator = ",\n" + " " * (level + 1)
    parts.append("\n" + " " * level + closing)


def _is_tagged(node: Mapping[str, object]) -> bool:
    return any(type(key) is str and key.startswith("$") for key in node)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DecodeError("JSON", f"the key {_show(key)} stands twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise DecodeError("JSON", f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DecodeError("JSON", f"the number {_show(text)} is out of range")
    return value


def _bounded_int(text: str) -> int:
    # Before int() sees it: its time grows with the square of the digits.
    if len(text) > 20:
        raise DecodeError("JSON", f"the number {_show(text)} is out of range")
    return int(text)


# A string, closed or not: never failing is what keeps a hostile text from making this quadratic.
_json_string = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_not_brackets = bytes(sorted(set(range(256)) - set(b"[]{}")))


def _check_json_depth(data: bytes) -> None:
    depth = 0
    for bracket in _json_string.sub(b"", data).translate(None, _not_brackets):
        if bracket in b"[{":
            depth += 1
            if depth > _MAX_JSON_DEPTH:
                raise DecodeError("JSON", f"nested more than {_MAX_JSON_DEPTH} levels deep")
        else:
            depth -= 1


# --- what both directions know ------------------------------------------------------------------


# "\ud83d" next to "\ude00" in ASCII JSON is read back as one character, so such strings are split.
_pair_seam = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")

_factories: dict[str, type] = {t.__name__: t for t in (bool, dict, float, int, list, set, str)}
_factory_names: dict[type, str] = {factory: name for name, factory in _factories.items()}

_dtypes: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}

_device_name = re.compile(r"[a-z][a-z0-9_]{0,31}(?::(?:0|[1-9][0-9]{0,2}))?")
_hex_integer = re.compile(r"-?0x[0-9a-f]+")
_native_path = type(pathlib.Path())

# NumPy's name of an element type -> how the tensor that carries it is typed.
_array_dtypes: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.float32,
    "complex128": torch.float64,
}


def _show(value: str) -> str:
    text = ascii(value)
    return text if len(text) <= _MAX_SEGMENT else text[: _MAX_SEGMENT - 3] + "..."


def _segment(key: object) -> str:
    """One step of a path."""
    try:
        text = key if type(key) is str else repr(key)
    except ValueError:  # an integer of more digits than the interpreter turns into text
        text = f"<{type(key).__name__}>"
    return text if len(text) <= _MAX_SEGMENT else text[: _MAX_SEGMENT - 3] + "..."


def _render(path: _Path) -> str:
    """The path as text. Printable ASCII, because it becomes a tensor's key in a file."""
    segments: list[str] = []
    here: _Path | None = path
    while here is not None:
        parent, key = here
        segments.append(str(key) if parent is None else _segment(key))
        here = parent
    text = ".".join(reversed(segments))
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


# --- encoding -----------------------------------------------------------------------------------


class _Encoder:
    """One encode() call: the tensors found so far and the containers being walked."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        # By identity. Nothing met on the walk dies before it ends, so no id is used twice.
        self.keys_by_id = {id(tensor): key for key, tensor in tensors.items()}
        self.next_suffix: dict[str, int] = {}
        self.open: set[int] = set()
        self.in_key = False

    def node(self, value: Any, path: _Path, depth: int) -> JSONValue:
        kind = type(value)
        if kind is str:
            return value if value.isascii() else self.put_string(value)
        if kind is bool or value is None:
            return value  # type: ignore[no-any-return]
        if kind is float:
            if math.isfinite(value):
                return value  # type: ignore[no-any-return]
            return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
        if kind is int:
            return value if -_INT_LIMIT <= value < _INT_LIMIT else {"$int": hex(value)}
        walk = _containers.get(kind)
        if walk is not None:
            return self.container(walk, value, path, depth)
        leaf = _leaves.get(kind)
        if leaf is not None:
            return leaf(self, value, path)
        np = sys.modules.get("numpy")  # where there is no numpy, there is no numpy value
        if np is not None:
            if kind is np.ndarray:
                return self.put_array(value, path, np)
            if isinstance(value, np.generic):
                return self.put_array_scalar(value, path, np)
        raise EncodeError(_render(path), _advice(value))

    def container(
        self,
        walk: Callable[[_Encoder, Any, _Path, int], JSONValue],
        value: object,
        path: _Path,
        depth: int,
    ) -> JSONValue:
        if id(value) in self.open:
            raise EncodeError(
                _render(path),
                f"this {type(value).__name__} contains itself; state must be a tree",
            )
        if depth >= MAX_DEPTH:
            raise EncodeError(_render(path), f"nested more than {MAX_DEPTH} levels deep")
        self.open.add(id(value))
        try:
            return walk(self, value, path, depth)
        finally:
            self.open.discard(id(value))

    # Containers: (value, path, depth) -> node.

    def put_list(self, value: list[Any], path: _Path, depth: int) -> JSONValue:
        return self.elements(value, path, depth)

    def put_tuple(self, value: tuple[Any, ...], path: _Path, depth: int) -> JSONValue:
        return {"$tuple": self.elements(value, path, depth)}

    def put_deque(self, value: deque[Any], path: _Path, depth: int) -> JSONValue:
        return {"$deque": self.elements(value, path, depth), "maxlen": value.maxlen}

    def put_set(self, value: set[Any], path: _Path, depth: int) -> JSONValue:
        return {"$set": self.members(value, path, depth)}

    def put_frozenset(self, value: frozenset[Any], path: _Path, depth: int) -> JSONValue:
        return {"$frozenset": self.members(value, path, depth)}

    def put_dict(self, value: dict[Any, Any], path: _Path, depth: int) -> JSONValue:
        items = self.items(value, path, depth)
        return {"$dict": items} if type(items) is list or _is_tagged(value) else items

    def put_ordered_dict(self, value: OrderedDict[Any, Any], path: _Path, depth: int) -> JSONValue:
        node: dict[str, JSONValue] = {"$ordereddict": self.items(value, path, depth)}
        attributes = vars(value)
        if attributes:
            # nn.Module.state_dict() hangs the modules' versions on its result.
            if set(attributes) != {"_metadata"}:
                raise EncodeError(_render(path), f"would lose its attributes {[*attributes]}")
            node["metadata"] = self.node(attributes["_metadata"], (path, "_metadata"), depth + 1)
        return node

    def put_default_dict(self, value: defaultdict[Any, Any], path: _Path, depth: int) -> JSONValue:
        factory: Any = value.default_factory
        if factory is not None and (type(factory) is not type or factory not in _factory_names):
            raise EncodeError(
                _render(path),
                "a defaultdict can be saved with a factory of None or one of "
                f"{', '.join(sorted(_factories))}, not {factory!r}; save dict(...) of it",
            )
        return {
            "$defaultdict": self.items(value, path, depth),
            "factory": None if factory is None else _factory_names[factory],
        }

    def put_counter(self, value: Counter[Any], path: _Path, depth: int) -> JSONValue:
        if vars(value):
            raise EncodeError(_render(path), f"would lose its attributes {[*vars(value)]}")
        return {"$counter": self.items(value, path, depth)}

    def put_namespace(self, value: SimpleNamespace, path: _Path, depth: int) -> JSONValue:
        for name in vars(value):
            if type(name) is not str:
                raise EncodeError(_render(path), f"has an attribute whose name is {name!r}")
        return {"$namespace": self.items(vars(value), path, depth)}

    def put_slice(self, value: slice, path: _Path, depth: int) -> JSONValue:
        return {"$slice": self.elements((value.start, value.stop, value.step), path, depth)}

    # What containers share.

    def elements(self, values: Any, path: _Path, depth: int) -> list[JSONValue]:
        # Long lists of numbers (a loss history, a generator's state) at the speed of C.
        kinds = set(map(type, values))
        if kinds == {float}:
            # Overflow of the sum only sends finite numbers the long way round.
            if math.isfinite(sum(values)):
                return [*values]
        elif kinds == {int} and min(values) >= -_INT_LIMIT and max(values) < _INT_LIMIT:
            return [*values]
        return [self.node(x, (path, i), depth + 1) for i, x in enumerate(values)]

    def members(self, values: Any, path: _Path, depth: int) -> list[JSONValue]:
        nodes = [self.hashed(value, path, depth) for value in values]
        # By their text: the same set gives the same file, whatever the hash seed.
        return sorted(nodes, key=_compact.encode)

    def items(self, value: Mapping[Any, Any], path: _Path, depth: int) -> JSONValue:
        """An object where every key is a string that JSON keeps, else a list of pairs."""
        if all(type(key) is str and (key.isascii() or not _pair_seam.search(key)) for key in value):
            return {key: self.node(x, (path, key), depth + 1) for key, x in value.items()}
        return [
            [self.hashed(key, path, depth), self.node(x, (path, key), depth + 1)]
            for key, x in value.items()
        ]

    def hashed(self, value: object, path: _Path, depth: int) -> JSONValue:
        outer, self.in_key = self.in_key, True
        try:
            return self.node(value, (path, f"<{type(value).__name__} key>"), depth + 1)
        finally:
            self.in_key = outer

    # Leaves: (value, path) -> node.

    def put_string(self, value: str) -> JSONValue:
        parts = _pair_seam.split(value)
        return value if len(parts) == 1 else {"$str": [*parts]}

    def put_bytes(self, value: bytes, path: _Path) -> JSONValue:
        return {"$bytes": base64.b64encode(value).decode("ascii")}

    def put_bytearray(self, value: bytearray, path: _Path) -> JSONValue:
        return {"$bytearray": base64.b64encode(value).decode("ascii")}

    def put_complex(self, value: complex, path: _Path) -> JSONValue:
        return {"$complex": [self.node(value.real, path, 0), self.node(value.imag, path, 0)]}

    def put_range(self, value: range, path: _Path) -> JSONValue:
        bounds = (value.start, value.stop, value.step)
        return {"$range": [self.node(bound, path, 0) for bound in bounds]}

    def put_file_path(self, value: pathlib.Path, path: _Path) -> JSONValue:
        return {"$path": self.node(str(value), path, 0)}

    def put_dtype(self, value: torch.dtype, path: _Path) -> JSONValue:
        return {"$dtype": str(value).removeprefix("torch.")}

    def put_device(self, value: torch.device, path: _Path) -> JSONValue:
        return {"$device": str(value)}

    def put_size(self, value: torch.Size, path: _Path) -> JSONValue:
        if any(type(n) is not int for n in value):
            raise EncodeError(_render(path), "a torch.Size with symbolic sizes cannot be saved")
        return {"$size": [*value]}

    def put_tensor(self, value: torch.Tensor, path: _Path) -> JSONValue:
        problem = _tensor_problem(value)
        if problem is not None:
            raise EncodeError(_render(path), problem)
        node: dict[str, JSONValue] = {"$tensor": self.store(value, path, _as_stored)}
        if value.is_complex():
            node["complex"] = True
        if value.device.type != "cpu":
            node["device"] = str(value.device)
        if type(value) is torch.nn.Parameter:
            node["parameter"] = value.requires_grad
        elif value.requires_grad and value.is_leaf:
            node["requires_grad"] = True
        return node

    def put_array(self, value: Any, path: _Path, np: Any) -> JSONValue:
        if value.dtype.name not in _array_dtypes:
            raise EncodeError(
                _render(path),
                f"an array of {value.dtype} cannot be saved; only of {', '.join(_array_dtypes)}",
            )

        def as_tensor(array: Any) -> torch.Tensor:
            if not array.dtype.isnative:
                array = array.byteswap().view(array.dtype.newbyteorder("="))
            if not array.flags.carray:  # contiguous, aligned, writeable: what torch can share
                array = np.array(array, order="C", copy=True)
            return _as_stored(torch.from_numpy(array))

        node: dict[str, JSONValue] = {
            "$ndarray": self.store(value, path, as_tensor),
            "dtype": value.dtype.name,
        }
        if value.dtype.str.startswith(">"):
            node["big_endian"] = True
        return node

    def put_array_scalar(self, value: Any, path: _Path, np: Any) -> JSONValue:
        name = value.dtype.name
        # The second half: "long long" has the name of "long" but is another type.
        if name not in _array_dtypes or np.dtype(name).type is not type(value):
            raise EncodeError(
                _render(path),
                f"a numpy.{type(value).__name__} cannot be saved; convert it with its item() "
                f"method or to one of {', '.join(_array_dtypes)}",
            )
        return {"$numpy": name, "value": self.node(value.item(), path, 0)}

    def store(self, value: Any, path: _Path, convert: Callable[[Any], torch.Tensor]) -> str:
        """Return the key by which the value is found in ``tensors``, put there if it was not."""
        if self.in_key:
            raise EncodeError(
                _render(path), f"a {type(value).__name__} cannot be saved as a key or set member"
            )
        key = self.keys_by_id.get(id(value))
        if key is None:
            key = self.free_key(_render(path))
            self.tensors[key] = convert(value)
            self.keys_by_id[id(value)] = key
        return key

    def free_key(self, base: str) -> str:
        # {"a.b": x, "a": {"b": y}} has two values of one path; and "__metadata__" cannot be a
        # tensor's name in a safetensors file.
        key = base
        while key in self.tensors or key == "__metadata__":
            count = self.next_suffix.get(base, 2)
            self.next_suffix[base] = count + 1
            key = f"{base}~{count}"
        return key


_containers: dict[type, Callable[[_Encoder, Any, _Path, int], JSONValue]] = {
    list: _Encoder.put_list,
    tuple: _Encoder.put_tuple,
    dict: _Encoder.put_dict,
    OrderedDict: _Encoder.put_ordered_dict,
    defaultdict: _Encoder.put_default_dict,
    Counter: _Encoder.put_counter,
    deque: _Encoder.put_deque,
    set: _Encoder.put_set,
    frozenset: _Encoder.put_frozenset,
    SimpleNamespace: _Encoder.put_namespace,
    slice: _Encoder.put_slice,
}

_leaves: dict[type, Callable[[_Encoder, Any, _Path], JSONValue]] = {
    bytes: _Encoder.put_bytes,
    bytearray: _Encoder.put_bytearray,
    complex: _Encoder.put_complex,
    range: _Encoder.put_range,
    _native_path: _Encoder.put_file_path,
    torch.dtype: _Encoder.put_dtype,
    torch.device: _Encoder.put_device,
    torch.Size: _Encoder.put_size,
    torch.Tensor: _Encoder.put_tensor,
    torch.nn.Parameter: _Encoder.put_tensor,
}


_saved_types = {bool, int, float, str, *_containers, *_leaves}


def _tensor_problem(value: torch.Tensor) -> str | None:
    if value.is_nested:
        return "a nested tensor cannot be saved; save its parts, from unbind()"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout}) cannot be saved; save to_dense() of it"
    if value.is_quantized:
        return "a quantized tensor cannot be saved; save int_repr() of it, its scale and zero point"
    if value.device.type == "meta":
        return "a tensor on the meta device has no values to save"
    return None


def _as_stored(value: torch.Tensor) -> torch.Tensor:
    """The same values in the form that tensor files hold: no history, no lazy bits, no complex."""
    if value.requires_grad:
        value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return value.resolve_neg()


def _advice(value: object) -> str:
    kind = type(value)
    remedy = "leave it out of the state, or make it of numbers, strings, lists, dicts and tensors"
    if isinstance(value, enum.Enum):
        remedy = "save its value, and look the member up when loading"
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        remedy = "save tuple(...) or _asdict() of it"
    elif hasattr(kind, "__dataclass_fields__"):
        remedy = "save dataclasses.asdict(...) of it"
    elif isinstance(value, torch.Generator):
        remedy = "save its get_state()"
    elif hasattr(kind, "state_dict"):
        remedy = "save its state_dict()"
    else:
        for base in kind.__mro__:
            name = f"{base.__module__}.{base.__name__}".removeprefix("builtins.")
            if base in _saved_types or name == "numpy.ndarray":
                remedy = f"it is a {name} that would come back as a plain one; convert it to one"
                break
    return f"a {kind.__module__}.{kind.__qualname__} cannot be saved; {remedy}"


# --- decoding -----------------------------------------------------------------------------------


class _Decoder:
    """One decode() call. Nothing is looked up by a name in the input but in the tables above."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        to_device: Callable[[torch.Tensor, torch.device], torch.Tensor] | None,
    ) -> None:
        self.tensors = tensors
        self.to_device = to_device
        # One object for each way to see a tensor: identity is kept, and a small file that refers to
        # a large array many times cannot have it converted many times.
        self.made: dict[tuple[object, ...], Any] = {}
        self.in_key = False

    def node(self, node: Any, path: _Path, depth: int) -> Any:
        kind = type(node)
        if kind is str or kind is int or kind is bool or node is None:
            return node
        if kind is float:
            if not math.isfinite(node):
                raise self.error(path, "a plain number must be finite")
            return node
        if kind is not list and kind is not dict:
            raise self.error(path, f"{kind.__name__} is not a JSON type")
        # Leaves stand one below the deepest container, and may be made of parts.
        if depth > MAX_DEPTH + 1:
            raise self.error(path, f"nested more than {MAX_DEPTH} levels deep")
        if kind is list:
            return self.elements(node, path, depth)
        tags = [key for key in node if type(key) is not str or key.startswith("$")]
        if not tags:
            return {key: self.node(x, (path, key), depth + 1) for key, x in node.items()}
        tag = tags[0]
        if tag not in _tags:
            raise self.error(path, f"unknown type tag {_show(str(tag))}")
        make, required, optional = _tags[tag]
        rest = node.keys() - {tag}
        if not (required <= rest <= required | optional):
            raise self.error(path, f"{tag} does not go with the keys {_show(str(sorted(rest)))}")
        return make(self, node[tag], node, path, depth)

    def error(self, path: _Path, problem: str) -> DecodeError:
        return DecodeError(_render(path), problem)

    def typed(self, value: Any, kind: type, path: _Path, what: str) -> Any:
        if type(value) is not kind:
            name = type(value).__name__
            raise self.error(path, f"{what} must be a {kind.__name__}, not a {name}")
        return value

    def elements(self, nodes: Any, path: _Path, depth: int) -> list[Any]:
        if type(nodes) is not list:
            raise self.error(path, f"expected a list, not a {type(nodes).__name__}")
        return [self.node(x, (path, i), depth + 1) for i, x in enumerate(nodes)]

    def exactly(self, nodes: Any, count: int, kind: type, path: _Path, depth: int) -> list[Any]:
        values = self.elements(nodes, path, depth)
        if len(values) != count or any(type(value) is not kind for value in values):
            raise self.error(path, f"expected {count} of type {kind.__name__}")
        return values

    def items(self, nodes: Any, path: _Path, depth: int) -> dict[Any, Any]:
        if type(nodes) is dict:
            for key in nodes:
                self.typed(key, str, path, "a key")
            return {key: self.node(x, (path, key), depth + 1) for key, x in nodes.items()}
        result: dict[Any, Any] = {}
        for i, pair in enumerate(self.typed(nodes, list, path, "a dict's content")):
            if type(pair) is not list or len(pair) != 2:
                raise self.error((path, i), "expected a pair of key and value")
            key = self.hashed(pair[0], (path, i), depth)
            if key in result:
                raise self.error((path, i), "this key stands twice in one dict")
            result[key] = self.node(pair[1], (path, key), depth + 1)
        return result

    def members(self, nodes: Any, path: _Path, depth: int) -> set[Any]:
        result: set[Any] = set()
        for i, node in enumerate(self.typed(nodes, list, path, "a set's content")):
            value = self.hashed(node, (path, i), depth)
            if value in result:
                raise self.error((path, i), "this member stands twice in one set")
            result.add(value)
        return result

    def hashed(self, node: Any, path: _Path, depth: int) -> Any:
        outer, self.in_key = self.in_key, True
        try:
            value = self.node(node, path, depth + 1)
            hash(value)
        except TypeError:
            raise self.error(path, "cannot be a key or set member") from None
        finally:
            self.in_key = outer
        return value

    # One for each tag: (content, whole node, path, depth) -> value.

    def make_tuple(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return tuple(self.elements(content, path, depth))

    def make_dict(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return self.items(content, path, depth)

    def make_ordered_dict(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        result: Any = OrderedDict(self.items(content, path, depth))
        if "metadata" in node:
            result._metadata = self.node(node["metadata"], (path, "_metadata"), depth + 1)
        return result

    def make_default_dict(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        name = node["factory"]
        if name is not None and (type(name) is not str or name not in _factories):
            raise self.error(path, f"unknown defaultdict factory {_show(str(name))}")
        factory = None if name is None else _factories[name]
        return defaultdict(factory, self.items(content, path, depth))

    def make_counter(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return Counter(self.items(content, path, depth))

    def make_namespace(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        items = self.items(content, path, depth)
        for key in items:
            self.typed(key, str, path, "an attribute's name")
        return SimpleNamespace(**items)

    def make_deque(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        limit = node["maxlen"]
        values = self.elements(content, path, depth)
        if limit is not None:
            self.typed(limit, int, path, "maxlen")
            if not len(values) <= limit <= sys.maxsize:
                raise self.error(path, f"a deque of {len(values)} does not fit its maxlen")
        return deque(values, limit)

    def make_set(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return self.members(content, path, depth)

    def make_frozenset(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return frozenset(self.members(content, path, depth))

    def make_slice(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        bounds = self.elements(content, path, depth)
        if len(bounds) != 3:
            raise self.error(path, "a slice has a start, a stop and a step")
        return slice(*bounds)

    def make_string(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        parts = self.typed(content, list, path, "a split string")
        return "".join(self.typed(part, str, path, "a string's part") for part in parts)

    def make_bytes(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        try:
            return base64.b64decode(self.typed(content, str, path, "base64"), validate=True)
        except (ValueError, binascii.Error) as error:
            raise self.error(path, f"not base64: {error}") from None

    def make_bytearray(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return bytearray(self.make_bytes(content, node, path, depth))

    def make_float(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        if type(content) is not str or content not in ("nan", "inf", "-inf"):
            raise self.error(path, "expected nan, inf or -inf")
        return float(content)

    def make_int(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        if type(content) is not str or _hex_integer.fullmatch(content) is None:
            raise self.error(path, "expected a hexadecimal integer")
        return int(content, 16)

    def make_complex(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return complex(*self.exactly(content, 2, float, path, depth))

    def make_range(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        start, stop, step = self.exactly(content, 3, int, path, depth)
        if step == 0:
            raise self.error(path, "a range's step must not be 0")
        return range(start, stop, step)

    def make_file_path(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        return _native_path(self.typed(self.node(content, path, depth + 1), str, path, "a path"))

    def make_dtype(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        if type(content) is not str or content not in _dtypes:
            raise self.error(path, f"this torch has no dtype {_show(str(content))}")
        return _dtypes[content]

    def make_device(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        if type(content) is str and _device_name.fullmatch(content) is not None:
            try:
                device = torch.device(content)
            except RuntimeError:
                device = None
            # torch takes "cuda:999" and makes "cuda:-25" of it.
            if device is not None and str(device) == content:
                return device
        raise self.error(path, f"this torch has no device {_show(str(content))}")

    def make_size(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        sizes = self.typed(content, list, path, "a torch.Size's content")
        if any(type(n) is not int or not -_INT_LIMIT <= n < _INT_LIMIT for n in sizes):
            raise self.error(path, "a torch.Size holds 64-bit integers")
        return torch.Size(sizes)

    def make_tensor(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        for flag in ("complex", "parameter", "requires_grad"):
            self.typed(node.get(flag, False), bool, path, flag)
        device = self.make_device(node["device"], node, path, depth) if "device" in node else None

        def make(value: torch.Tensor) -> torch.Tensor:
            if device is not None and self.to_device is not None:
                value = self.to_device(value, device)
            if node.get("complex", False):
                value = self.as_complex(value, path)
            try:
                if "parameter" in node:
                    return torch.nn.Parameter(value, requires_grad=node["parameter"])
                if node.get("requires_grad", False):
                    return value.detach().requires_grad_()
            except RuntimeError as error:  # integers have no gradients
                raise self.error(path, str(error)) from None
            return value

        rest = {key: x for key, x in node.items() if key != "$tensor"}
        return self.once(content, ("tensor", *sorted(rest.items())), make, path)

    def make_array(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        name = node["dtype"]
        if type(name) is not str or name not in _array_dtypes:
            raise self.error(path, f"unknown numpy type {_show(str(name))}")
        big_endian = self.typed(node.get("big_endian", False), bool, path, "big_endian")
        dtype = self.numpy(path).dtype(name).newbyteorder(">" if big_endian else "<")

        def make(value: torch.Tensor) -> Any:
            if value.dtype is not _array_dtypes[name]:
                raise self.error(path, f"numpy's {name} cannot be in a tensor of {value.dtype}")
            if dtype.kind == "c":
                value = self.as_complex(value, path)
            array = value.detach().cpu().numpy()
            return array if dtype.isnative else array.byteswap().view(dtype)

        return self.once(content, ("array", name, big_endian), make, path)

    def make_array_scalar(self, content: Any, node: Any, path: _Path, depth: int) -> Any:
        if type(content) is not str or content not in _array_dtypes:
            raise self.error(path, f"unknown numpy type {_show(str(content))}")
        np = self.numpy(path)
        kind = np.dtype(content).type
        value = self.node(node["value"], path, depth + 1)
        self.typed(value, type(kind().item()), path, f"the value of a {content}")
        try:
            with np.errstate(all="ignore"):
                result = kind(value)
        except OverflowError:
            result = None
        if result is None or (result.item() != value and value == value):
            raise self.error(path, f"the value does not fit a {content}")
        return result

    def numpy(self, path: _Path) -> Any:
        try:
            return importlib.import_module("numpy")
        except ImportError:
            raise self.error(path, "was saved from numpy, which is not installed here") from None

    def as_complex(self, value: torch.Tensor, path: _Path) -> torch.Tensor:
        try:
            return torch.view_as_complex(value.contiguous())
        except RuntimeError:
            problem = f"a tensor of {value.dtype} and shape {[*value.shape]} is not pairs of reals"
            raise self.error(path, problem) from None

    def once(
        self,
        key: Any,
        form: tuple[object, ...],
        make: Callable[[torch.Tensor], Any],
        path: _Path,
    ) -> Any:
        if self.in_key:
            raise self.error(path, "a tensor cannot be a key or set member")
        value = self.tensors.get(self.typed(key, str, path, "a tensor's key"))
        if not isinstance(value, torch.Tensor):
            raise self.error(path, f"the tensor {_show(key)} is missing")
        identity = (key, *form)
        if identity not in self.made:
            self.made[identity] = make(value)
        return self.made[identity]


_Maker: TypeAlias = Callable[[_Decoder, Any, Any, _Path, int], Any]

_NONE: frozenset[str] = frozenset()

# Tag -> how to make the value, the keys that must stand beside the tag, those that may.
_tags: dict[str, tuple[_Maker, frozenset[str], frozenset[str]]] = {
    "$tuple": (_Decoder.make_tuple, _NONE, _NONE),
    "$dict": (_Decoder.make_dict, _NONE, _NONE),
    "$ordereddict": (_Decoder.make_ordered_dict, _NONE, frozenset({"metadata"})),
    "$defaultdict": (_Decoder.make_default_dict, frozenset({"factory"}), _NONE),
    "$counter": (_Decoder.make_counter, _NONE, _NONE),
    "$namespace": (_Decoder.make_namespace, _NONE, _NONE),
    "$deque": (_Decoder.make_deque, frozenset({"maxlen"}), _NONE),
    "$set": (_Decoder.make_set, _NONE, _NONE),
    "$frozenset": (_Decoder.make_frozenset, _NONE, _NONE),
    "$slice": (_Decoder.make_slice, _NONE, _NONE),
    "$str": (_Decoder.make_string, _NONE, _NONE),
    "$bytes": (_Decoder.make_bytes, _NONE, _NONE),
    "$bytearray": (_Decoder.make_bytearray, _NONE, _NONE),
    "$float": (_Decoder.make_float, _NONE, _NONE),
    "$int": (_Decoder.make_int, _NONE, _NONE),
    "$complex": (_Decoder.make_complex, _NONE, _NONE),
    "$range": (_Decoder.make_range, _NONE, _NONE),
    "$path": (_Decoder.make_file_path, _NONE, _NONE),
    "$dtype": (_Decoder.make_dtype, _NONE, _NONE),
    "$device": (_Decoder.make_device, _NONE, _NONE),
    "$size": (_Decoder.make_size, _NONE, _NONE),
    "$tensor": (
        _Decoder.make_tensor,
        _NONE,
        frozenset({"complex", "device", "parameter", "requires_grad"}),
    ),
    "$ndarray": (_Decoder.make_array, frozenset({"dtype"}), frozenset({"big_endian"})),
    "$numpy": (_Decoder.make_array_scalar, frozenset({"value"}), _NONE),
}
