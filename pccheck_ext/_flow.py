"""The data flow between layers, from a forward pass over copies without data.

Every tensor operation of the pass is seen, whatever called it. One that combines a layer's
parameters with data is a use of the layer: what it computes comes from that layer, and so does what
is computed from this until another layer is used. Data are the inputs and what comes from a layer.
What is computed from parameters and constants (a weight that is cast, normalised, masked) is still
a weight, until its layer's forward returns it (an embedding of positions).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode

from pccheck_ext import _rng
from pccheck_ext._fake import Inputs, autocast_now, faked
from pccheck_ext.layers import ROOT_LAYER

__all__ = ["DataFlow", "record_data_flow"]

_NOTHING: frozenset[str] = frozenset()


@dataclass
class DataFlow:
    """Which layer's output reaches which without another layer in between.

    `first_use` grows with the operation that first used a layer, and is more for what works there
    than for what is worked on. `edges`: pairs (consumer, producer), in the order they came up.
    """

    first_use: dict[str, int] = field(default_factory=dict)
    edges: dict[tuple[str, str], None] = field(default_factory=dict)


def record_data_flow(
    model: nn.Module,
    layers: Mapping[str, Sequence[nn.Parameter]],
    inputs: Inputs,
    *,
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> DataFlow | str:
    """Run forward once on copies of `model` and `inputs` and tell how data flows between `layers`.

    No kernel runs; parameters, buffers, generators and modes are as before. A string says why it
    could not be: forward branched on the data, called an operator that has no shape rule, wrote to
    a tensor of neither the model nor the inputs, began an operation more than `limit_s` seconds
    after the start, or raised anything else. Warns where forward has put tensors without data into
    objects that are not the model's own.
    """
    recorder = _Recorder(clock() + limit_s, clock)
    failure = None
    try:
        _run_forward(model, layers, inputs, recorder)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        failure = f"tracing failed with {type(error).__name__}: {lines[0][:200]}"
    recorder.let_go()
    if recorder.survivors():
        gc.collect()  # they may only wait for it
    if recorder.survivors():
        warnings.warn(
            f"the forward of {type(model).__name__} was traced on tensors without data and keeps "
            "some of them outside the model (in a cache, or what it logs to), where they are of no "
            "use: clear it, or trace after a first forward pass has filled it",
            RuntimeWarning,
            stacklevel=2,
        )
    return failure or recorder.flow


def _run_forward(
    model: nn.Module,
    layers: Mapping[str, Sequence[nn.Parameter]],
    inputs: Inputs,
    recorder: _Recorder,
) -> None:
    fakes = _fake_mode()
    with _nothing_left_behind(inputs.autocast), fakes:
        copied, given, copy_of = faked(model, inputs)
        for layer, parameters in layers.items():
            owner = copied if layer == ROOT_LAYER else copied.get_submodule(layer)
            recorder.add_layer(layer, owner, [(own, copy_of(own)) for own in parameters])
        recorder.add_inputs([*_tensors([given.args, given.kwargs])])
        with recorder:
            copied(*given.args, **given.kwargs)


def _fake_mode() -> FakeTensorMode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch imports what it has deprecated
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # takes long: SymPy
    return FakeTensorMode(
        allow_fallback_kernels=False,  # they run the real kernel, on memory of the real size
        allow_non_fake_inputs=True,  # tensors in closures and globals
        shape_env=ShapeEnv(),
        static_shapes=True,
    )


@contextlib.contextmanager
def _nothing_left_behind(autocast: Mapping[str, torch.dtype]) -> Iterator[None]:
    """The surroundings of a training step's forward pass, without traces of its having run."""
    generators = _rng.capture(())
    with contextlib.ExitStack() as stack:
        stack.callback(_rng.restore, generators, ())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_torch_is_quiet())
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on, too
        for kind, dtype in {**autocast_now(), **autocast}.items():
            # An autocast that is on already would keep the casts of parameters until it ends.
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        yield


@contextlib.contextmanager
def _torch_is_quiet() -> Iterator[None]:
    """Keeps to itself what torch logs in this thread of operations that have failed on fakes.

    It would alarm, and handlers that keep records would keep the tensors of their tracebacks.
    """
    thread = threading.get_ident()

    def is_anothers(record: logging.LogRecord) -> bool:
        return record.thread != thread

    known = [logging.getLogger("torch"), *logging.root.manager.loggerDict.values()]
    loggers = [
        logger
        for logger in known
        if isinstance(logger, logging.Logger) and logger.name.split(".")[0] == "torch"
    ]
    for logger in loggers:
        logger.addFilter(is_anothers)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_anothers)


@dataclass(frozen=True)
class _Origin:
    """Where a tensor's values come from: the layers last used, or those it is a weight of."""

    layers: frozenset[str] = _NOTHING
    weights: frozenset[str] = _NOTHING
    is_data: bool = False


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows origins through operations; kept by storage, so that views and writes are seen."""

    supports_higher_order_operators = True

    def __init__(self, deadline: float, clock: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = DataFlow()
        self._deadline = deadline
        self._clock = clock
        self._operations = 0
        self._calls: list[str] = []  # layers whose forward is running, the innermost last
        self._owners: dict[int, _Origin] = {}  # by id, of parameters
        self._owned: set[int] = set()  # addresses of their storages
        self._origins: dict[int, _Origin] = {}  # by address of storage
        self._kept: list[object] = []  # so that no id or address is used again
        self._made: list[weakref.ref[torch.Tensor]] = []

    def add_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            self._set_origin(tensor, _Origin(is_data=True))
        self._watch(tensors)

    def _watch(self, tensors: Iterable[torch.Tensor]) -> None:
        self._made += [weakref.ref(tensor) for tensor in tensors if isinstance(tensor, FakeTensor)]

    def let_go(self) -> None:
        self._kept.clear()

    def survivors(self) -> int:
        """How many of the tensors that were made, inputs included, are still there."""
        return sum(tensor() is not None for tensor in self._made)

    def add_layer(
        self, layer: str, module: nn.Module, parameters: Iterable[tuple[nn.Parameter, torch.Tensor]]
    ) -> None:
        """`parameters`: the model's own and their copies. A closure may hold the former."""
        origin = _Origin(weights=frozenset([layer]))
        for own, copied in parameters:
            address, storage = _storage(copied)
            self._owners[id(own)] = self._owners[id(copied)] = self._origins[address] = origin
            self._owned.add(address)
            self._kept += own, copied, storage

        def enter(*_: object) -> None:
            self._calls.append(layer)

        def leave(_: nn.Module, args: object, output: object) -> None:
            self._calls.pop()
            if not isinstance(module, ParametrizationList):  # what those return is still a weight
                self._return_from(layer, _tensors(output))

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def _return_from(self, layer: str, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            weights = self._origin(tensor).weights
            if layer in weights and _storage(tensor)[0] not in self._owned:
                self._use({layer}, weights)
                self._set_origin(tensor, _Origin(frozenset({layer}), is_data=True))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        written = [*_tensors(_written(func, args, kwargs))]
        for tensor in written:
            if not isinstance(tensor, FakeTensor):
                raise RuntimeError(f"{func} writes to a tensor that is not the model's own")
        result = func(*args, **kwargs)
        made = [*_tensors(result)]
        if not made and not written:
            return result  # torch asks for a tensor's device in this way, and takes no exception
        if self._clock() > self._deadline:
            raise TimeoutError("the time allowed for it has passed")
        self._operations += 1
        self._follow([*_tensors(args), *_tensors(kwargs)], made + written)
        self._watch(made)
        return result

    def _follow(self, read: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        origins = [self._origin(tensor) for tensor in read]
        layers = _NOTHING.union(*(origin.layers for origin in origins))
        weights = _NOTHING.union(*(origin.weights for origin in origins))
        is_data = any(origin.is_data for origin in origins)
        if weights and is_data:
            # The weights of others in a layer's forward are what it works on, as on data.
            used = weights.intersection(self._calls[-1:]) or weights
            self._use(used, layers | weights)
            origin = _Origin(used, is_data=True)
        else:
            origin = _Origin(layers, weights, is_data)
        for tensor in made:
            self._set_origin(tensor, origin)

    def _use(self, layers: Set[str], producers: Set[str]) -> None:
        now = 2 * self._operations
        for producer in producers - layers:  # those that no operation has used before this one
            self.flow.first_use.setdefault(producer, now)
        for layer in sorted(layers):
            self.flow.first_use.setdefault(layer, now + 1)
            for producer in sorted(producers - layers):
                self.flow.edges[layer, producer] = None

    def _origin(self, tensor: torch.Tensor) -> _Origin:
        owner = self._owners.get(id(tensor))
        return owner or self._origins.get(_storage(tensor)[0], _Origin())

    def _set_origin(self, tensor: torch.Tensor, origin: _Origin) -> None:
        address, storage = _storage(tensor)
        if address in self._owned:
            return  # a parameter stays one whatever is written to it
        if address not in self._origins:
            self._kept.append(storage)
        self._origins[address] = origin


def _storage(tensor: torch.Tensor) -> tuple[int, object]:
    """Its address, and what keeps the address from being used again."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return id(tensor), tensor
    return storage._cdata, storage


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operator's schema says it writes to."""
    schema = getattr(func, "_schema", None)  # operators on functions have none
    if schema is None or not schema.is_mutable:
        return []
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
