"""Files by layer: how an incremental checkpoint's payload is divided, named and indexed.

A layer's tensors of one kind (model, optimizer, gradients) have a file of their own, which can be
left unwritten when nothing in it has changed. Pure functions over names and numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

__all__ = ["INDEX_FILE", "index_text", "kind_of", "shard_names"]

INDEX_FILE = "model.safetensors.index.json"
"""Which of the model's files has which tensor; other tools know it by this name."""

_SHARD = re.compile(r"(.+)-\d{5,}-of-\d{5,}(\.safetensors)")


def kind_of(file: str) -> str:
    """``"model-00002-of-00007.safetensors"`` -> ``"model.safetensors"``; others as they are."""
    shard = _SHARD.fullmatch(file)
    return shard[1] + shard[2] if shard else file


def shard_names(tensors: Iterable[tuple[str, int]], first: str) -> dict[tuple[str, int], str]:
    """A file's name for each kind and layer of `tensors`, pairs of these.

    Layers are numbered as they appear in kind `first`, then the others; a layer has the same number
    in every kind, whether or not all have something of it. So a name lasts when a layer's first
    optimizer state appears, and whatever the order of updates is.
    """
    pairs = list(dict.fromkeys(tensors))
    of_first = list(dict.fromkeys(layer for kind, layer in pairs if kind == first))
    layers = list(dict.fromkeys([*of_first, *(layer for _, layer in pairs)]))
    number = {layer: i for i, layer in enumerate(layers, 1)}
    names = {}
    for kind, layer in pairs:
        stem, _, suffix = kind.rpartition(".")
        count = len(of_first if kind == first else layers)
        names[kind, layer] = f"{stem}-{number[layer]:05d}-of-{count:05d}.{suffix}"
    return names


def index_text(file_of: Mapping[str, str], total_bytes: int) -> str:
    """The index of sharded safetensors: `file_of` tells the file of each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    return json.dumps(index, indent=2) + "\n"
