"""Copies of models and of their inputs that have shapes, dtypes and devices but no data.

A forward pass over them costs neither memory nor arithmetic and changes nothing of the originals.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    "FirstForward",
    "Inputs",
    "TensorForm",
    "autocast_now",
    "capture_first_forward",
    "described",
    "faked",
]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_MAPPINGS = (dict, collections.UserDict)
_SEQUENCES = (list, collections.deque)
_HOOKS = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}


@dataclasses.dataclass(frozen=True)
class TensorForm:
    """What is known of a tensor without its data; `stride` in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorForm:
        # What another tensor's history requires is not this one's own: forward may write to it.
        requires_grad = tensor.requires_grad and tensor.is_leaf
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, requires_grad)

    def empty(self) -> torch.Tensor:
        """A tensor of this form, from the tensor mode that is active."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a forward pass, and the dtype of autocast on each device type it was on for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)


def described(inputs: Inputs) -> Inputs:
    """The inputs with a `TensorForm` in place of each tensor; what else is in them stays."""
    return _Copier(TensorForm.of, modules=False).copy_inputs(inputs)


def faked(
    model: nn.Module, inputs: Inputs
) -> tuple[nn.Module, Inputs, Callable[[torch.Tensor], torch.Tensor]]:
    """Copies of both and what leads from a tensor of the model to its copy.

    Tensors come from the tensor mode that is active; a `TensorForm` becomes one, too. Inputs are
    put where the model is, as DistributedDataParallel does, if that is one device. Hooks are left
    behind, but for those by which torch.nn.utils computes weights: a program's own do not expect to
    be called. Raises TypeError for modules of torch.jit, which cannot be copied so.
    """
    devices = {tensor.device for tensor in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    of_model = _Copier(_fake, modules=True)
    of_inputs = _Copier(lambda tensor: _fake(tensor, device), modules=False)
    copied = of_model.copy(model)
    return copied, of_inputs.copy_inputs(inputs), of_model.copy


def _fake(tensor: torch.Tensor | TensorForm, device: torch.device | None = None) -> torch.Tensor:
    form = tensor if isinstance(tensor, TensorForm) else TensorForm.of(tensor)
    if device is not None:
        form = dataclasses.replace(form, device=device)
    if isinstance(tensor, nn.Parameter):
        plain = dataclasses.replace(form, requires_grad=False).empty()
        return nn.Parameter(plain, requires_grad=form.requires_grad)
    return form.empty()


class _Copier:
    """Copies containers and, if `modules`, modules; `tensor` gives what stands for a tensor.

    Objects of other types are shared with the original.
    """

    def __init__(self, tensor: Callable[[Any], object], *, modules: bool) -> None:
        self._tensor = tensor
        self._modules = modules
        # With the originals, so that no id is used again.
        self._made: dict[int, tuple[object, Any]] = {}

    def copy(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, (torch.Tensor, TensorForm)):
            return self._keep(value, self._tensor(value))
        if isinstance(value, nn.Module):
            return self._copy_module(value) if self._modules else value
        if isinstance(value, _SEQUENCES):
            return self._copy_sequence(value)
        if isinstance(value, _MAPPINGS):
            return self._copy_mapping(value)
        if isinstance(value, tuple):
            return self._copy_tuple(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._copy_dataclass(value)
        if type(value) is types.MethodType:
            return self._copy_method(value)
        if type(value) is functools.partial:
            return functools.partial(
                self.copy(value.func), *self.copy(value.args), **self.copy(value.keywords)
            )
        return value

    def copy_inputs(self, inputs: Inputs) -> Inputs:
        return Inputs(self.copy(inputs.args), self.copy(inputs.kwargs), inputs.autocast)

    def _keep(self, value: object, made: Any) -> Any:
        self._made[id(value)] = (value, made)
        return made

    def _copy_sequence(self, value: Any) -> Any:
        made = self._keep(value, copy.copy(value))
        for i, item in enumerate(value):
            copied = self.copy(item)
            if copied is not item:
                made[i] = copied
        return made

    def _copy_mapping(self, value: Any) -> Any:
        made = self._keep(value, copy.copy(value))
        for key, item in value.items():
            copied = self.copy(item)
            if copied is not item:
                made[key] = copied
        return made

    def _copy_tuple(self, value: tuple[Any, ...]) -> Any:
        items = [self.copy(item) for item in value]
        if all(copied is item for copied, item in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return tuple.__new__(type(value), items)
        return type(value)(items)

    def _copy_dataclass(self, value: Any) -> Any:
        self._keep(value, value)  # for those that lead back to themselves
        items = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if hasattr(value, field.name)
        }
        changed = {k: made for k, v in items.items() if (made := self.copy(v)) is not v}
        if not changed:
            return value
        made = self._keep(value, copy.copy(value))
        for name, item in changed.items():
            object.__setattr__(made, name, item)
        return made

    def _copy_method(self, value: types.MethodType) -> Any:
        owner = self.copy(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)

    def _copy_module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError("modules of torch.jit have no Python forward to follow")
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.Module):  # torch.compile's wrapper
            made: nn.Module = self._keep(module, self.copy(inner))
            return made
        made = self._keep(module, object.__new__(type(module)))
        for name, value in vars(module).items():
            if name in _HOOKS:
                made.__dict__[name] = copy.copy(_HOOKS[name])
            elif name == "_compiled_call_impl":
                made.__dict__[name] = None
            else:
                made.__dict__[name] = self.copy(value)
        made._forward_pre_hooks.update(
            (key, hook)
            for key, hook in module._forward_pre_hooks.items()
            if type(hook).__module__.startswith("torch.nn.utils.")
        )
        return made


class FirstForward:
    """What the first forward pass of a model was given: shapes, dtypes and devices, not the data.

    `inputs` is None until then, and stays so where the pass runs compiled or never calls hooks.
    """

    inputs: Inputs | None = None
    failure: str | None = None
    _hook: Any = None

    def close(self) -> None:
        """Stop waiting. Again: no effect.

        Where the model runs compiled, the compiler notices that the hook is gone and may compile
        once more: leave it there while training.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def capture_first_forward(model: nn.Module) -> FirstForward:
    """Watch for the model's next forward pass, by a hook that removes itself.

    Give the returned object to `DependencyGraphBuilder` as `example_inputs` once training has run
    a forward pass. Tensors among the arguments, in containers and dataclasses too, are not kept
    alive; objects of other types are.
    """
    first = FirstForward()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiler that inlines this would record tensors of its own; it folds the line away.
        if torch.compiler.is_compiling():
            return
        first.close()
        try:
            first.inputs = described(Inputs(args, kwargs, autocast_now()))
        except Exception as error:  # training goes on; the builder tells why it cannot trace
            first.failure = f"{type(error).__name__}: {error}"

    # The last of the hooks that there are: those before it may replace the arguments.
    if not isinstance(model, torch.jit.ScriptModule):
        first._hook = model.register_forward_pre_hook(look, with_kwargs=True)
    return first


def autocast_now() -> dict[str, torch.dtype]:
    """Device types it is on for, and its dtype there."""
    return {
        kind: torch.get_autocast_dtype(kind)
        for kind in ("cpu", "cuda", "mps", "xpu")
        if torch.is_autocast_enabled(kind)
    }
