"""Layers: the modules that own parameters, and the order in which they are updated and saved.

Pure functions over modules and parameters; no device, clock or file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

__all__ = ["ROOT_LAYER", "GradientOrder", "group_parameters_by_layer", "plain_name", "unwrap"]

ROOT_LAYER = "(root)"
"""The layer of parameters that the outermost module owns itself."""


def plain_name(name: str) -> str:
    """A state_dict key without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile, DistributedDataParallel and DataParallel."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def group_parameters_by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Layer name -> its parameters, in registration order.

    Containers are skipped; a parameter that several modules share belongs to the first; those the
    outermost module owns itself form the layer ``(root)``.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, module in unwrap(model).named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            layers.setdefault(plain_name(name + ".")[:-1] or ROOT_LAYER, []).extend(own)
    return layers


class GradientOrder:
    """Watches one backward pass and tells in which order the layers' gradients became ready.

    The hooks go away with `close()`. A layer is ready with its last parameter; layers that received
    no gradient come last, in reversed registration order.
    """

    def __init__(self, layers: Mapping[str, Iterable[torch.Tensor]]) -> None:
        self._layers = list(layers)
        self._ready: dict[str, int] = {}
        self._events = 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(layer))  # type: ignore[no-untyped-call]
            for layer, parameters in layers.items()
            for parameter in parameters
            if parameter.requires_grad and parameter.is_leaf
        ]

    def _hook(self, layer: str) -> Callable[[torch.Tensor], None]:
        def gradient_ready(_: torch.Tensor) -> None:
            self._events += 1
            self._ready[layer] = self._events

        return gradient_ready

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def source(self) -> str:
        """``"gradients"`` if a backward pass was seen, else ``"registration"``."""
        return "gradients" if self._ready else "registration"

    def update_order(self) -> list[str]:
        seen = sorted(self._ready, key=self._ready.__getitem__)
        return seen + [layer for layer in reversed(self._layers) if layer not in self._ready]
