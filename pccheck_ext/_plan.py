"""Which tensors a checkpoint has, of which layer and under which names, and how to fetch them.

A plan is made once and used as long as the set of tensors stays the same; `PlanChangedError` says
that it does not. Everything runs on the training thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from pccheck_ext import _C, _codec
from pccheck_ext._shards import INDEX_FILE, index_text, kind_of, shard_names
from pccheck_ext.layers import ROOT_LAYER, plain_name, unwrap

__all__ = ["BUFFERS_LAYER", "PlanChangedError", "SavePlan", "make_plan", "model_tensors"]

BUFFERS_LAYER = "(buffers)"
"""The layer of buffers whose modules own no parameters."""

UNNAMED_LAYER = "(optimizer)"
"""The layer of parameters that an optimizer updates and no module of the model owns."""

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
GRADIENTS_FILE = "gradients.safetensors"
EXTRA_FILE = "extra.safetensors"

_EXTRA_STATE = "_extra_state"  # torch's, in a state_dict

Fetch = Callable[[], "torch.Tensor | None"]

_StateOf: TypeAlias = "tuple[weakref.ref[torch.Tensor], int, tuple[Any, ...]]"
"""A parameter, how many values the optimizer keeps of it, the keys of those that are not planned as
tensors."""


class PlanChangedError(Exception):
    """The set of tensors, or one's shape or dtype, is not what was planned."""


@dataclass
class PlannedTensor:
    file: str
    name: str
    layer: int
    fetch: Fetch
    copied: bool  # to memory of its own at hand-over: others may change it before the next gate
    dtype: torch.dtype
    shape: torch.Size
    device: str

    def live(self) -> torch.Tensor:
        """The tensor itself; PlanChangedError if it is gone or looks different."""
        value = self.fetch()
        if value is None or value.dtype != self.dtype or value.shape != self.shape:
            raise PlanChangedError(self.name)
        return value

    def tensor(self) -> torch.Tensor:
        """What is handed over."""
        value = self.live()
        return value.detach().clone() if self.copied else value


@dataclass
class BarePlan:
    """Which layers a checkpoint holds, and where."""

    layers: list[str]
    layout: _C.Layout
    by_layer: list[list[PlannedTensor]]  # in the order in which the layout wants them


@dataclass
class SavePlan(BarePlan):
    """What one checkpoint holds; `layout` is where. Immutable once made."""

    tensors: list[PlannedTensor]
    static_manifest: dict[str, _codec.Written]  # the same for every checkpoint of this plan
    state_sizes: list[list[_StateOf]]
    groups: list[list[int]]  # ids of the parameters; `names` keeps them from being used again
    grouping: object  # the optimizer's, of parameters into layers: replaced, never changed
    tables: _Tables
    without_gradient: list[weakref.ref[torch.Tensor]]  # where gradients are saved
    names: dict[torch.Tensor, str]  # of every parameter
    has_extra_state: bool  # some module returns other than a tensor from get_extra_state
    index: dict[str, int] = field(default_factory=dict)
    layer_bytes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index = {layer: i for i, layer in enumerate(self.layers)}
        self.layer_bytes = [
            sum(size for _, _, _, size in self.layout.layer_tensors(i))
            for i in range(self.layout.layer_count)
        ]

    def has_all_tensors(self) -> bool:
        """Whether everything planned is still there and looks the same."""
        try:
            for planned in self.tensors:
                planned.live()
        except PlanChangedError:
            return False
        return True

    def still_fits(self, optimizer: torch.optim.Optimizer, layer: int | None = None) -> bool:
        """Whether nothing has come to what is to be saved since the plan was made."""
        checked = self.state_sizes
        if layer is not None:
            checked = checked[layer : layer + 1]
        elif (
            self.groups != _ids(optimizer)
            or self.grouping is not getattr(optimizer, "_given", None)
            or not self.tables.unchanged()
            or not all(_has_no_gradient(reference()) for reference in self.without_gradient)
        ):
            return False
        state = optimizer.state
        for parameters in checked:
            for reference, size, others in parameters:
                parameter = reference()
                if parameter is None:
                    return False
                values = state.get(parameter, ())
                if len(values) != size:
                    return False
                if others and any(_is_tensor_entry(k, values.get(k)) for k in others):
                    return False
        return True


def model_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The model's state_dict under plain names: its tensors (live, not copies) and what else.

    "What else" is what modules return from ``get_extra_state``.
    """
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    for key, value in unwrap(model).state_dict(keep_vars=True).items():
        (tensors if isinstance(value, torch.Tensor) else others)[plain_name(key)] = value
    return tensors, others


class _Tables:
    """Where a model's modules keep parameters, buffers and modules: tells when one is added.

    What is removed or replaced by other than its like shows when it is fetched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: list[tuple[Mapping[str, Any], int, list[str]]] = []
        self._modules: list[tuple[Mapping[str, Any], list[nn.Module | None]]] = []
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                absent = [key for key, value in table.items() if value is None]
                self._tensors.append((table, len(table), absent))
            self._modules.append((module._modules, list(module._modules.values())))

    def unchanged(self) -> bool:
        for table, size, absent in self._tensors:
            if len(table) != size or any(table.get(key) is not None for key in absent):
                return False
        return all(list(table.values()) == modules for table, modules in self._modules)


def _ids(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def _has_no_gradient(parameter: torch.Tensor | None) -> bool:
    return parameter is None or parameter.grad is None


def extra_state_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Per state_dict name of what ``get_extra_state`` returns: the module's name, the module."""
    found = {}
    for name, module in unwrap(model).named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            key = f"{name}.{_EXTRA_STATE}" if name else _EXTRA_STATE
            found[plain_name(key)] = (plain_name(name + ".")[:-1], module)
    return found


def is_computed(model: nn.Module) -> Callable[[str], bool]:
    """Tells of state_dict names whose tensors no table of the model's modules holds."""
    known = _fetchers(model)
    return lambda name: name not in known


def _extra_state(module: nn.Module) -> Fetch:
    def fetch() -> torch.Tensor | None:
        value = module.get_extra_state()
        return value if isinstance(value, torch.Tensor) else None

    return fetch


def _fetchers(model: nn.Module) -> dict[str, tuple[str, Fetch]]:
    """Per state_dict name, the module's name and how to read the tensor there is at the time."""
    fetchers: dict[str, tuple[str, Fetch]] = {
        key: (name, _extra_state(module))
        for key, (name, module) in extra_state_modules(model).items()
    }
    for module_name, module in unwrap(model).named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key in table:
                name = plain_name(f"{module_name}.{key}" if module_name else key)
                fetchers[name] = (plain_name(module_name + ".")[:-1], _table_entry(table, key))
    return fetchers


def _table_entry(table: Mapping[str, Any], key: str) -> Fetch:
    return lambda: table.get(key)


def _state_entry(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, key: str) -> Fetch:
    def fetch() -> torch.Tensor | None:
        value = optimizer.state.get(parameter, {}).get(key)
        return value if isinstance(value, torch.Tensor) else None

    return fetch


def _constant(tensor: torch.Tensor) -> Fetch:
    return lambda: tensor


def _state_dict_entry(model: nn.Module, name: str) -> Fetch:
    return lambda: model_tensors(model)[0].get(name)


def _gradient(parameter: torch.Tensor) -> Fetch:
    return lambda: parameter.grad


def same_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the very same bytes in the same order."""
    return (
        tensor.data_ptr() if tensor.numel() else id(tensor),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The size of what a plan of model and optimizer would hold now, aliases counted once."""
    tensors = {same_tensor(t): t for t in model_tensors(model)[0].values()}
    values = [v for state in optimizer.state.values() for v in state.values()]
    kept = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*tensors.values(), *kept])


def parameter_names(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[torch.Tensor, str], list[torch.Tensor]]:
    """A name for each parameter of model and optimizer; and those that no module owns."""
    names: dict[torch.Tensor, str] = {}
    for name, parameter in unwrap(model).named_parameters():
        names.setdefault(parameter, plain_name(name))
    unowned: list[torch.Tensor] = []
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if parameter not in names:
                names[parameter] = f"{UNNAMED_LAYER}.{g}.{i}"
                unowned.append(parameter)
    return names, unowned


def make_plan(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    update_order: list[str],
    layer_parameters: Mapping[str, list[torch.Tensor]],
    *,
    block_bytes: int,
    save_gradients: bool = False,
    chunk_count: int = 1,
    incremental: bool = False,
) -> SavePlan:
    """Plan a checkpoint of everything there is now.

    With `chunk_count` over 1 all tensors form one layer; but if it is `incremental`, each layer has
    files of its own, which are all the ranges there are. Raises TypeError naming a tensor that
    cannot be stored.
    """
    if incremental:
        chunk_count = 1
    builder = _Builder(model, optimizer, update_order, layer_parameters, chunk_count > 1)
    builder.add_model()
    builder.add_optimizer()
    if save_gradients:
        builder.add_gradients()
    if incremental:
        builder.divide_by_layer()
    return builder.finish(block_bytes, chunk_count)


class _Builder:
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        update_order: list[str],
        layer_parameters: Mapping[str, list[torch.Tensor]],
        one_layer: bool,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.layers = [*update_order, UNNAMED_LAYER, BUFFERS_LAYER]
        self.one_layer = one_layer
        self.layer_of: dict[torch.Tensor, int] = {}
        for i, layer in enumerate(update_order):
            for parameter in layer_parameters[layer]:
                self.layer_of.setdefault(parameter, i)
        self.names, self.unowned = parameter_names(model, optimizer)
        self.tensors: list[PlannedTensor] = []
        self.has_extra_state = False
        self.files_of_layers = False
        self.without_gradient: list[weakref.ref[torch.Tensor]] = []
        self.aliases: dict[str, str] = {}
        self.index = {layer: i for i, layer in enumerate(self.layers)}

    def add(self, file: str, name: str, layer: int, fetch: Fetch, copied: bool) -> None:
        tensor = fetch()
        if tensor is None:
            raise PlanChangedError(name)
        _C.dtype_name(tensor, name)  # refuses what cannot be stored
        self.tensors.append(
            PlannedTensor(
                file, name, layer, fetch, copied, tensor.dtype, tensor.shape, tensor.device.type
            )
        )

    def add_model(self) -> None:
        first: dict[tuple[Any, ...], str] = {}
        fetchers = _fetchers(self.model)
        tensors, others = model_tensors(self.model)
        self.has_extra_state = bool(others)
        for name, tensor in tensors.items():
            if tensor.layout == torch.strided:  # others are refused, by name, in add()
                kept = first.setdefault(same_tensor(tensor), name)
                if kept != name:
                    self.aliases[name] = kept
                    continue
            # A module may put into its state_dict what is in no table of its own.
            module, fetch = fetchers.get(name, ("", _state_dict_entry(self.model, name)))
            layer = self.layer_of.get(tensor)
            if layer is None:
                layer = self.index.get(module or ROOT_LAYER, self.index[BUFFERS_LAYER])
            # Forward changes buffers whenever it likes, so they are copied at once.
            self.add(MODEL_FILE, name, layer, fetch, copied=not isinstance(tensor, nn.Parameter))

    def add_optimizer(self) -> None:
        unnamed = self.index[UNNAMED_LAYER]
        for parameter in self.unowned:
            # In the layer it is updated with: another's gate would not hold that update back.
            layer = self.layer_of.get(parameter, unnamed)
            fetch = _constant(parameter)
            self.add(OPTIMIZER_FILE, self.names[parameter], layer, fetch, copied=False)
        for parameter in self.parameters():
            layer = self.layer_of.get(parameter, unnamed)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if _is_tensor_entry(key, value):
                    name = f"{self.names[parameter]}.{key}"
                    fetch = _state_entry(self.optimizer, parameter, key)
                    self.add(OPTIMIZER_FILE, name, layer, fetch, copied=False)

    def add_gradients(self) -> None:
        # Cleared by the loop before the next gate, so copied at once.
        for parameter, name in self.names.items():
            if parameter.grad is None:
                self.without_gradient.append(weakref.ref(parameter))
            else:
                layer = self.layer_of.get(parameter, self.index[UNNAMED_LAYER])
                self.add(GRADIENTS_FILE, name, layer, _gradient(parameter), copied=True)

    def parameters(self) -> Iterator[torch.Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def copy_what_shares_memory(self) -> None:
        """Tensors on one storage have one version counter: one's update looks like the other's."""
        users: dict[int, list[PlannedTensor]] = {}
        for planned in self.tensors:
            tensor = planned.fetch()
            if tensor is not None and tensor.numel() and not planned.copied:
                users.setdefault(tensor.untyped_storage().data_ptr(), []).append(planned)
        for sharing in users.values():
            if len(sharing) > 1:
                for planned in sharing:
                    planned.copied = True

    def divide_by_layer(self) -> None:
        """A file for each kind and layer, instead of one for each kind."""
        names = shard_names(((p.file, p.layer) for p in self.tensors), first=MODEL_FILE)
        for planned in self.tensors:
            planned.file = names[planned.file, planned.layer]
        self.files_of_layers = True

    def _layout(self, order: list[PlannedTensor], block_bytes: int, chunk_count: int) -> _C.Layout:
        kinds = (MODEL_FILE, OPTIMIZER_FILE, GRADIENTS_FILE)
        by_file: dict[str, list[PlannedTensor]] = {}
        for planned in sorted(order, key=lambda p: kinds.index(kind_of(p.file))):
            by_file.setdefault(planned.file, []).append(planned)
        files = []
        for file, own in by_file.items():
            metadata = [("format", "pt")]
            if kind_of(file) == MODEL_FILE:
                there = {p.name for p in own}
                metadata += [pair for pair in self.aliases.items() if pair[1] in there]
            entries = [
                (p.name, _C.dtype_name(p.live(), p.name), list(p.shape), p.layer) for p in own
            ]
            files.append((file, metadata, entries))
        texts = []
        if self.files_of_layers:
            model = [p for p in order if kind_of(p.file) == MODEL_FILE]
            total = sum(p.dtype.itemsize * p.shape.numel() for p in model)
            texts.append((INDEX_FILE, index_text({p.name: p.file for p in model}, total)))
        return _C.Layout(
            files,
            len(self.layers),
            block_bytes,
            chunk_count,
            texts=texts,
            files_of_layers=self.files_of_layers,
        )

    def finish(self, block_bytes: int, chunk_count: int) -> SavePlan:
        self.copy_what_shares_memory()
        order = sorted(self.tensors, key=lambda planned: planned.layer)
        home = {(p.file, p.name): self.layers[p.layer] for p in order}
        if self.one_layer:
            self.layers = ["(state)"]
            for planned in order:
                planned.layer = 0
        layout = self._layout(order, block_bytes, chunk_count)
        by_key = {(p.file, p.name): p for p in order}
        by_layer: list[list[PlannedTensor]] = []
        described: dict[str, list[dict[str, Any]]] = {layer: [] for layer in home.values()}
        counts = dict.fromkeys(described, 0)
        for i in range(len(self.layers)):
            by_layer.append([])
            for where in layout.layer_tensors(i):
                p = by_key[where[:2]]
                by_layer[-1].append(p)
                entry = _describe_tensor(where, p.dtype, p.shape, p.device)
                layer = home[where[:2]]
                described[layer].append(entry)
                if is_of_model(p.file) and isinstance(p.live(), nn.Parameter):
                    counts[layer] += p.shape.numel()
        return SavePlan(
            layers=self.layers,
            layout=layout,
            tensors=order,
            by_layer=by_layer,
            static_manifest={
                "layers": _codec.Written(
                    [describe(layer, own, counts[layer]) for layer, own in described.items()], 1
                ),
                "aliases": _codec.Written(dict(self.aliases), 1),
                "parameters": _codec.Written(
                    [
                        [self.names[p] for p in group["params"]]
                        for group in self.optimizer.param_groups
                    ],
                    2,
                ),
            },
            state_sizes=self.state_sizes(),
            groups=_ids(self.optimizer),
            grouping=getattr(self.optimizer, "_given", None),
            tables=_Tables(self.model),
            without_gradient=self.without_gradient,
            names=self.names,
            has_extra_state=self.has_extra_state,
        )

    def state_sizes(self) -> list[list[_StateOf]]:
        sizes: list[list[_StateOf]] = [[] for _ in self.layers]
        for parameter in self.parameters():
            layer = 0
            if not self.one_layer:
                layer = self.layer_of.get(parameter, self.index[UNNAMED_LAYER])
            values = self.optimizer.state.get(parameter, {})
            others = tuple(k for k, v in values.items() if not _is_tensor_entry(k, v))
            sizes[layer].append((weakref.ref(parameter), len(values), others))
        return sizes


def is_of_model(file: str) -> bool:
    return file == MODEL_FILE or file.startswith("model-")


def describe(layer: str, entries: list[dict[str, Any]], param_count: int) -> dict[str, Any]:
    """The manifest's entry of a layer; `param_count` elements of these are parameters of it."""
    return {
        "name": layer,
        "param_count": param_count,
        "size_bytes": sum(e["bytes"] for e in entries),
        "tensors": entries,
    }


def _describe_tensor(
    placed: tuple[str, str, int, int], dtype: torch.dtype, shape: torch.Size, device: str
) -> dict[str, Any]:
    file, name, offset, size = placed
    return {
        "file": file,
        "name": name,
        "offset": offset,
        "bytes": size,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
    }


class ExtraPlanner:
    """Plans where tensors found in other state go, known only when a checkpoint is sealed.

    They are mostly like those of the checkpoint before: then so is the plan.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._planned: list[tuple[str, torch.dtype, torch.Size, str]] = []
        self._layout: _C.Layout | None = None
        self._described = _codec.Written([], 1)

    def plan(self, tensors: Mapping[str, torch.Tensor]) -> tuple[_C.Layout | None, _codec.Written]:
        """The layout, None where there is no tensor, and the manifest's ``extra_tensors``."""
        wanted = [(name, t.dtype, t.shape, t.device.type) for name, t in tensors.items()]
        if wanted != self._planned:
            layout, described = _plan_extra(tensors, self._block_bytes)
            self._planned, self._layout = wanted, layout
            self._described = _codec.Written([*described], 1)
        return self._layout, self._described


def plan_loose(
    file: str, tensors: Mapping[str, torch.Tensor], block_bytes: int, chunk_count: int = 1
) -> tuple[_C.Layout, list[dict[str, Any]]]:
    """Where tensors that no plan knows of go: one file, one layer. TypeError names a misfit."""
    entries = [
        (name, _C.dtype_name(tensor, name), list(tensor.shape), 0)
        for name, tensor in tensors.items()
    ]
    layout = _C.Layout([(file, [("format", "pt")], entries)], 1, block_bytes, chunk_count)
    return layout, [
        _describe_tensor(placed, tensor.dtype, tensor.shape, tensor.device.type)
        for placed, tensor in zip(layout.layer_tensors(0), tensors.values(), strict=True)
    ]


def _plan_extra(
    tensors: Mapping[str, torch.Tensor], block_bytes: int
) -> tuple[_C.Layout | None, list[dict[str, Any]]]:
    if not tensors:
        return None, []
    return plan_loose(EXTRA_FILE, tensors, block_bytes)


def _is_tensor_entry(key: object, value: object) -> bool:
    return isinstance(value, torch.Tensor) and isinstance(key, str)


def non_tensor_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, Any], Any]:
    """What the optimizer keeps of parameters beside tensors, and what of no parameter; encoded.

    Both are empty for most types.
    """
    encoded: dict[str, Any] = {}
    unbound: dict[Any, Any] = {}
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor):
            unbound[parameter] = state
            continue
        rest = {k: v for k, v in state.items() if not _is_tensor_entry(k, v)}
        if rest:
            name = names[parameter]
            encoded[name] = _codec.encode(rest, f"optimizer.state.{name}", tensors)
    return encoded, _codec.encode(unbound, "optimizer.unbound", tensors)
