"""Putting a checkpoint back: what it holds is checked against what is there before anything is
changed, then read into the tensors themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pccheck_ext import _C, _codec, _plan, _progress
from pccheck_ext._mock import MockSession
from pccheck_ext._names import check_id, is_id, old_step_of, step_id, step_of
from pccheck_ext._shards import kind_of
from pccheck_ext.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound
from pccheck_ext.layers import ROOT_LAYER, group_parameters_by_layer, plain_name, unwrap

__all__ = ["Restored", "checkpoint_ids", "newest_first", "open_checkpoint", "restore_model"]

READ_THREADS = 4
SUPPORTED_VERSION = 1


@dataclass(frozen=True)
class StoredTensor:
    layer: str
    file: int
    offset: int
    size_bytes: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str


class Stored:
    """One checkpoint on disk, opened: its manifest, checked, and where its tensors are."""

    def __init__(self, directory: str, checkpoint_id: str) -> None:
        self.id = checkpoint_id
        self.path = os.path.join(directory, checkpoint_id)
        try:
            self.reader = _C.Reader(directory, checkpoint_id)
        except CheckpointCorrupt as error:
            if self.path in str(error):
                raise
            raise CheckpointCorrupt(f"{self.path}: {error}") from None
        try:
            self.manifest: dict[str, Any] = self._checked(_codec.loads(self.reader.manifest))
            self.files = [name for name, _ in self.reader.files]
            self.tensors = self._tensors()
        except (_codec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointCorrupt(
                f"{self.path}/manifest.json is not what this library writes: {error!r}"
            ) from error

    @property
    def step(self) -> int:
        return self.reader.step

    @property
    def is_positional(self) -> bool:
        """Whether `PCCheckAdapter` saved it alone, which knows layers but not tensors' names."""
        return self.manifest.get("positional") is True

    def require_whole_state(self) -> None:
        """CheckpointMismatch where there is less than it takes to go on training."""
        if self.is_positional:
            raise CheckpointMismatch(
                f"{self.path} was saved without a trainer: it holds layers, but no optimizer or "
                "other state to go on from; load the model with ModelRecovery"
            )

    def _checked(self, manifest: Any) -> dict[str, Any]:
        if not isinstance(manifest, dict) or manifest.get("format") != "pccheck":
            raise ValueError("it does not begin as one")
        if manifest["version"] != SUPPORTED_VERSION:
            raise ValueError(
                f"it has version {manifest['version']}, this library reads {SUPPORTED_VERSION}"
            )
        told = (manifest["training_step"], manifest["run_id"], manifest["save_id"])
        sealed = (self.reader.step, self.reader.run_id.hex(), self.reader.save_id.hex())
        if told != sealed or manifest["checkpoint_id"] != self.id:
            raise ValueError(
                f"it belongs to checkpoint {manifest['checkpoint_id']!r}, {told}, not {sealed}"
            )
        return manifest

    def _tensors(self) -> dict[tuple[str, str], StoredTensor]:
        numbers = {name: i for i, name in enumerate(self.files)}
        tensors = {}
        seen: set[tuple[str, str]] = set()
        for layer in self.manifest["layers"]:
            for entry in layer["tensors"]:
                stored = _stored(layer["name"], entry, numbers)
                key = (kind_of(entry["file"]), stored.name)
                if key in seen:
                    raise ValueError(f"it has two tensors {stored.name!r}")
                seen.add(key)
                tensors[entry["file"], stored.name] = stored
        for entry in self.manifest["extra_tensors"]:
            stored = _stored("", entry, numbers)
            tensors[entry["file"], stored.name] = stored
        return tensors

    def of_file(self, file: str) -> dict[str, StoredTensor]:
        """The tensors of a file, or of those that it is divided into."""
        return {name: tensor for (of, name), tensor in self.tensors.items() if kind_of(of) == file}

    def read_ahead(self) -> None:
        """The whole model is going to be read: begin, while it is found out where to."""
        for number, file in enumerate(self.files):
            if kind_of(file) == _plan.MODEL_FILE:
                self.reader.read_ahead(number, READ_THREADS)
                return

    def become_base(self, session: _C.Session | MockSession) -> None:
        """Let what is saved next link to files of this checkpoint, once it is verified whole.

        Warns where a part that was not needed so far does not verify: then it all is written anew.
        """
        try:
            session.adopt_base(self.reader, READ_THREADS)
        except (CheckpointCorrupt, OSError) as error:
            warnings.warn(
                f"the next checkpoint is written whole, for {self.path} is damaged: {error}",
                RuntimeWarning,
                stacklevel=4,
            )

    def read(self, pairs: Iterable[tuple[StoredTensor, torch.Tensor]]) -> None:
        """Read stored tensors into given ones of the same shape and dtype, wherever they are."""
        reads = []
        beside = []
        for stored, target in pairs:
            target = target.detach()
            into = target
            if (
                not (target.is_cpu and target.is_contiguous())
                or target.is_conj()
                or target.is_neg()
            ):
                into = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
                beside.append((target, into))
            reads.append((stored.file, stored.offset, into))
        total = sum(into.nbytes for _, _, into in reads)
        with self._progress("restoring", total):
            self.reader.read(reads, READ_THREADS)
        with torch.no_grad():
            for target, into in beside:
                for dim, stride in enumerate(target.stride()):
                    if stride == 0 and target.shape[dim] > 1:  # expanded: one element is them all
                        target, into = target.narrow(dim, 0, 1), into.narrow(dim, 0, 1)
                target.copy_(into)

    def verify(self) -> None:
        """Read everything; CheckpointCorrupt where a block does not match its checksum."""
        with self._progress("verifying", sum(size for _, size in self.reader.files)):
            self.reader.verify(READ_THREADS)

    def _progress(self, what: str, total: int) -> AbstractContextManager[None]:
        before = self.reader.bytes_read
        done = lambda: self.reader.bytes_read - before  # noqa: E731
        return _progress.shown(f"{what} {self.id}", total, done)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        stored = self.of_file(_plan.EXTRA_FILE)
        tensors = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in stored.items()
        }
        self.read((stored[name], tensor) for name, tensor in tensors.items())
        return tensors


def _stored(layer: str, entry: dict[str, Any], numbers: Mapping[str, int]) -> StoredTensor:
    dtype = getattr(torch, str(entry["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    shape = tuple(int(extent) for extent in entry["shape"])
    size = dtype.itemsize
    for extent in shape:
        if extent < 0:
            raise ValueError(f"tensor {entry['name']!r} has a negative extent")
        size *= extent
    if size != entry["bytes"]:
        raise ValueError(f"tensor {entry['name']!r} does not fill its bytes")
    return StoredTensor(
        layer=str(layer),
        file=numbers[entry["file"]],
        offset=int(entry["offset"]),
        size_bytes=size,
        name=str(entry["name"]),
        dtype=dtype,
        shape=shape,
        device=str(entry.get("device", "cpu")),
    )


def checkpoint_ids(directory: str) -> list[str]:
    """Names of the checkpoint directories there are, steps in order, then the others."""
    try:
        with os.scandir(directory) as entries:
            names = [e.name for e in entries if is_id(e.name) and e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    # One of its files missing makes it a damaged checkpoint, to be told of; both, no checkpoint.
    marks = ("checksums.bin", "manifest.json")
    sealed = [n for n in names if any(os.path.lexists(f"{directory}/{n}/{m}") for m in marks)]
    return sorted(sealed, key=lambda name: (step_of(name) is None, step_of(name) or 0, name))


def open_checkpoint(directory: str, checkpoint_id: str) -> Stored:
    checkpoint_id = find_id(directory, check_id(checkpoint_id)) or checkpoint_id
    if not os.path.isdir(os.path.join(directory, checkpoint_id)):
        there = ", ".join(checkpoint_ids(directory)) or "none"
        raise CheckpointNotFound(f"no checkpoint {checkpoint_id!r} in {directory}; found: {there}")
    return Stored(directory, checkpoint_id)


def find_id(directory: str, checkpoint_id: str) -> str | None:
    """The id of the checkpoint there is by that name, ``step_100`` for ``step-00000100`` too."""
    names = [checkpoint_id]
    if (step := old_step_of(checkpoint_id)) is not None:
        names.append(step_id(step))
    for name in names:
        if is_id(name) and os.path.isdir(os.path.join(directory, name)):
            return name
    return None


def verifies(directory: str, checkpoint_id: str) -> bool:
    """Whether every block is there and matches its checksum. Raises CheckpointNotFound."""
    try:
        open_checkpoint(directory, checkpoint_id).verify()
    except FileNotFoundError:
        if find_id(directory, checkpoint_id) is None:
            raise
        return False
    except (CheckpointCorrupt, OSError):
        return False
    return True


def newest_first(directory: str) -> list[tuple[int, str]]:
    """(step, id) of every checkpoint whose name or seal tells its step, newest first."""
    found = []
    for name in checkpoint_ids(directory):
        step = step_of(name)
        if step is None:
            try:
                step = _C.Reader(directory, name).step
            except (OSError, CheckpointCorrupt):
                continue
        found.append((step, name))
    return sorted(found, reverse=True)


@dataclass
class Restored:
    """Which reads have been agreed on, and the layers that the checkpoint has nothing of."""

    pairs: list[tuple[StoredTensor, torch.Tensor]]
    missing_layers: list[str]
    extra_states: dict[str, torch.Tensor]  # those that are tensors, once they are read
    computed: dict[str, torch.Tensor]  # for modules to take over: they hold no such tensor


def restore_model(
    stored: Stored, model: nn.Module, *, strict: bool, layer: str | None = None
) -> Restored:
    """Match a model against a checkpoint, without changing either.

    Raises CheckpointMismatch where shapes or dtypes differ, where nothing fits, and, if `strict`,
    where either has a tensor that the other has not.
    """
    tensors, _ = _plan.model_tensors(model)
    in_file = stored.of_file(_plan.MODEL_FILE)
    aliases = stored.manifest["aliases"]
    pairs: list[tuple[StoredTensor, torch.Tensor]] = []
    missing: list[str] = []
    differing: list[str] = []
    if stored.is_positional:
        in_file, differing = _by_position(stored, model, tensors)
    read: set[tuple[Any, ...]] = set()  # tied tensors are read once
    extra_states: dict[str, torch.Tensor] = {}
    is_computed = _plan.is_computed(model)
    computed: dict[str, torch.Tensor] = {}
    for name in _plan.extra_state_modules(model):
        found = in_file.get(name)
        if found is not None and layer is None:
            extra_states[name] = torch.empty(found.shape, dtype=found.dtype, device="cpu")
            pairs.append((found, extra_states[name]))
            tensors[name] = extra_states[name]  # known, whatever the module returns now
    for name, target in tensors.items():
        if name in extra_states:
            continue
        found = in_file.get(aliases.get(name, name))
        if found is None:
            missing.append(name)
        elif layer is not None and found.layer != layer:
            continue
        elif found.dtype != target.dtype or found.shape != tuple(target.shape):
            differing.append(
                f"{name} is {found.dtype} {list(found.shape)} in the checkpoint, "
                f"{target.dtype} {list(target.shape)} in the model"
            )
        elif _plan.same_tensor(target) not in read:
            read.add(_plan.same_tensor(target))
            pairs.append((found, target))
            if is_computed(name) and not isinstance(target, nn.Parameter):
                computed[name] = target
    known = {aliases.get(name, name) for name in tensors}
    unexpected = [name for name in in_file if name not in known]
    problems = list(differing)
    if strict:
        problems += [f"{name} is not in the checkpoint" for name in missing]
        problems += [f"{name} is not in the model" for name in unexpected]
    if not pairs and not problems and (tensors or in_file):
        of = "" if layer is None else f" of layer {layer!r}"
        problems.append(f"they have no tensor{of} in common")
    if problems:
        raise CheckpointMismatch(
            f"{stored.path} does not fit the model, which is unchanged: "
            + "; ".join(problems[:8])
            + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        )
    return Restored(pairs, _layers_of(model, missing), extra_states, computed)


def _by_position(
    stored: Stored, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """What is known by layer and position, under the model's own names; and what does not fit.

    A layer's tensors are the parameters that `group_parameters_by_layer` finds for it, or, where it
    groups them otherwise, all those of the module of that name.
    """
    grouped = group_parameters_by_layer(model)
    modules = {plain_name(name): module for name, module in unwrap(model).named_modules()}
    of_layer: dict[str, list[StoredTensor]] = {}
    for one in stored.tensors.values():
        of_layer.setdefault(one.layer, []).append(one)
    of_parameter: dict[torch.Tensor, StoredTensor] = {}
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for layer, entries in of_layer.items():
        parameters = grouped.get(layer)
        if parameters is None and layer in modules:
            parameters = [*modules[layer].parameters()]
        if parameters is None:
            found.update((f"tensor {i} of layer {layer!r}", one) for i, one in enumerate(entries))
        elif len(parameters) != len(entries):
            problems.append(
                f"layer {layer!r} has {len(entries)} tensors in the checkpoint, {len(parameters)} "
                "parameters in the model"
            )
        else:
            of_parameter.update(zip(parameters, entries, strict=True))
    found.update((name, of_parameter[t]) for name, t in tensors.items() if t in of_parameter)
    return found, problems


def _layers_of(model: nn.Module, tensor_names: Iterable[str]) -> list[str]:
    layers: dict[str, None] = {}
    for name in tensor_names:
        layers[name.rpartition(".")[0] or ROOT_LAYER] = None
    return list(layers)


def decoded(node: Any, tensors: Mapping[str, torch.Tensor], path: str) -> Any:
    """A typed value of the manifest, its tensors on the devices where they were."""
    return _codec.decode(node, tensors, path=path, to_device=lambda tensor, at: tensor.to(at))


def restore_extra_state(
    stored: Stored, model: nn.Module, restored: Restored, extra: dict[str, torch.Tensor]
) -> None:
    """Hand modules what they returned from ``get_extra_state``, or added to the state_dict."""
    if restored.computed:
        unwrap(model).load_state_dict(restored.computed, strict=False)
    values = decoded(stored.manifest.get("model", {}), extra, "model")
    modules = _plan.extra_state_modules(model)
    for key, value in {**values, **restored.extra_states}.items():
        if key in modules:
            modules[key][1].set_extra_state(value)


class OptimizerRestore:
    """An optimizer's state, matched with a checkpoint by the parameters' names."""

    def __init__(
        self,
        stored: Stored,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, torch.Tensor],
    ) -> None:
        self.optimizer = optimizer
        saved = stored.manifest["optimizer"]
        kind = type(optimizer).__qualname__
        self.names, unowned = _plan.parameter_names(model, optimizer)
        groups = [[self.names[p] for p in g["params"]] for g in optimizer.param_groups]
        # Parameters that the checkpoint has nothing of, where that is allowed: as they are.
        there = stored.of_file(_plan.MODEL_FILE)
        own = {*unowned}  # by identity
        self.missing = [p for p, name in self.names.items() if p not in own and name not in there]
        missing = {self.names[p] for p in self.missing}
        known = [[name for name in group if name not in missing] for group in groups]
        if saved["type"] != kind or saved["parameters"] != known:
            raise CheckpointMismatch(
                f"{stored.path} was saved with {saved['type']} over "
                f"{_count(saved['parameters'])}; this is {kind} over {_count(groups)}, or their "
                "names differ: build the optimizer as it was built for the saved run"
            )
        self.groups = decoded(saved["param_groups"], extra, "optimizer.param_groups")
        rest = saved["state"]
        by_name = {name: p for p, name in self.names.items()}
        in_file = stored.of_file(_plan.OPTIMIZER_FILE)
        self.state: dict[torch.Tensor, dict[str, Any]] = {}
        self.pairs: list[tuple[StoredTensor, torch.Tensor]] = []
        for parameter in unowned:
            self.pairs.append((in_file.pop(self.names[parameter]), parameter))
        for name, entry in in_file.items():
            owner, key = _split(name, by_name)
            parameter = by_name[owner]
            value = self._destination(parameter, key, entry)
            self.state.setdefault(parameter, {})[key] = value
            self.pairs.append((entry, value))
        self.unbound = _codec.decode(saved["unbound"], extra, path="optimizer.unbound")
        for name, values in rest.items():
            self.state.setdefault(by_name[name], {}).update(
                decoded(values, extra, f"optimizer.state.{name}")
            )

    def _destination(self, parameter: torch.Tensor, key: str, entry: StoredTensor) -> torch.Tensor:
        device = torch.device("cpu") if entry.device == "cpu" else parameter.device
        there = self.optimizer.state.get(parameter, {}).get(key)
        if (
            isinstance(there, torch.Tensor)
            and there.dtype == entry.dtype
            and tuple(there.shape) == entry.shape
            and there.device == device
        ):
            return there
        if tuple(parameter.shape) == entry.shape:  # in the parameter's memory format
            return torch.empty_like(
                parameter, dtype=entry.dtype, device=device, requires_grad=False
            )
        return torch.empty(entry.shape, dtype=entry.dtype, device=device)

    def apply(self) -> None:
        """After the reads: the state replaces what the optimizer had."""
        kept = {p: self.optimizer.state[p] for p in self.missing if p in self.optimizer.state}
        self.optimizer.state.clear()
        self.optimizer.state.update({**kept, **self.state})
        self.optimizer.state.update(self.unbound)
        for group, saved in zip(self.optimizer.param_groups, self.groups, strict=True):
            for key in [key for key in group if key != "params" and key not in saved]:
                del group[key]
            group.update(saved)


def _split(name: str, owners: Mapping[str, Any]) -> tuple[str, str]:
    """An entry of the optimizer's file: parameter and key, either of which may hold dots."""
    owner, _, key = name.rpartition(".")
    while owner and owner not in owners:
        owner, _, more = owner.rpartition(".")
        key = f"{more}.{key}"
    return owner, key


def _count(groups: list[list[str]]) -> str:
    return f"{sum(map(len, groups))} parameters in {len(groups)} groups"


class GradientRestore:
    """Gradients, where the checkpoint has them; parameters it has none for lose theirs."""

    def __init__(self, stored: Stored, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        in_file = stored.of_file(_plan.GRADIENTS_FILE)
        names, _ = _plan.parameter_names(model, optimizer)
        self.saved = bool(stored.manifest["config"].get("save_gradients"))
        self.values: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.pairs: list[tuple[StoredTensor, torch.Tensor]] = []
        for parameter, name in names.items():
            entry = in_file.get(name)
            value = None
            if entry is not None:
                value = torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False)
                self.pairs.append((entry, value))
            self.values.append((parameter, value))

    def apply(self) -> None:
        if self.saved:
            for parameter, value in self.values:
                parameter.grad = value
