"""CheckpointMetadataManager: what is where on disk.

Of a run's directory it reads the manifests and seals that the engine wrote; it also composes the
manifest of a checkpoint that is being saved. Beside that it keeps records of layers that somebody
else has written to a file of his own, one line of JSON each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch

from pccheck_ext import _codec, _names, _plan, _restore
from pccheck_ext.errors import CheckpointCorrupt, CheckpointNotFound

__all__ = ["CheckpointMetadataManager"]

MANIFEST_VERSION = 1

_RECORDS = ".layers.jsonl"
_FIELDS = (
    "checkpoint_id",
    "training_step",
    "offset_in_file",
    "size_bytes",
    "param_count",
    "shapes",
    "dtypes",
    "timestamp",
)


class CheckpointMetadataManager:
    """Tells which checkpoints there are, what each holds of each layer, and whether it is sound.

    `checkpoint_file` names the run's directory (a suffix such as ``.chk`` is dropped), or the file
    that recorded layers lie in. `metadata_dir` is where `record_layer_save` writes; a run's
    directory, or its ``metadata`` child, may stand for both. Checkpoints are known by their ids;
    ``step_100`` finds ``step-00000100`` too. `directory` is the run's, where it is known.
    """

    def __init__(
        self,
        checkpoint_file: str | os.PathLike[str],
        metadata_dir: str | os.PathLike[str] = "./metadata",
        *,
        directory: str | None = None,
    ) -> None:
        self.checkpoint_file = os.fspath(checkpoint_file)
        self.metadata_dir = os.fspath(metadata_dir)
        self._directory = directory

    @property
    def directory(self) -> str:
        """The run's; looked for anew each time, as it may not have been there before."""
        if self._directory is not None:
            return self._directory
        named = _names.directory_of(self.checkpoint_file)
        return named if os.path.isdir(named) else _names.run_directory(self.metadata_dir)

    # -- records of one's own ----------------------------------------------------------------------

    def record_layer_save(
        self,
        layer_name: str,
        training_step: int,
        offset: int,
        size_bytes: int,
        param_count: int,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[str | torch.dtype],
    ) -> None:
        """Record that a layer lies at `offset` of `checkpoint_file`, `size_bytes` long.

        Kept in ``<metadata_dir>/step_<training_step>.layers.jsonl``; the later of two records of a
        layer counts. What a crash left of a record is removed by the next. Not synced to the disk.
        Raises ValueError for what cannot be, OSError naming the path.
        """
        for name, value in (
            ("training_step", training_step),
            ("offset", offset),
            ("size_bytes", size_bytes),
            ("param_count", param_count),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
        if len(shapes) != len(dtypes):
            raise ValueError(f"{len(shapes)} shapes, but {len(dtypes)} dtypes, of {layer_name!r}")
        extents = [[int(extent) for extent in shape] for shape in shapes]
        if any(extent < 0 for shape in extents for extent in shape):
            raise ValueError(f"shapes of {layer_name!r} cannot have negative extents: {extents}")
        checkpoint_id = f"step_{training_step}"
        entry = {
            "layer_name": str(layer_name),
            "checkpoint_id": checkpoint_id,
            "training_step": training_step,
            "offset_in_file": offset,
            "size_bytes": size_bytes,
            "param_count": param_count,
            "shapes": extents,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "timestamp": time.time(),
        }
        os.makedirs(self.metadata_dir, exist_ok=True)
        line = json.dumps(entry) + "\n"
        with open(self._records(checkpoint_id), "ab+") as file:
            _drop_torn_line(file)
            file.write(line.encode())

    def _records(self, checkpoint_id: str) -> str:
        return os.path.join(self.metadata_dir, checkpoint_id + _RECORDS)

    def _recorded(self, checkpoint_id: str) -> dict[str, dict[str, Any]] | None:
        try:
            with open(self._records(checkpoint_id), "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return None
        layers: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines[:-1], 1):  # what ends without a newline was torn
            try:
                entry = json.loads(line)
                layers[entry["layer_name"]] = {field: entry[field] for field in _FIELDS}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointCorrupt(
                    f"{self._records(checkpoint_id)}, line {number}, is no record of a layer: "
                    f"{error!r}"
                ) from error
        return layers

    # -- reading -----------------------------------------------------------------------------------

    def list_checkpoints(self) -> list[str]:
        """Ids of the checkpoints there are, unverified: steps in order, others, records."""
        recorded = []
        if os.path.isdir(self.metadata_dir):
            names = [n for n in os.listdir(self.metadata_dir) if n.endswith(_RECORDS)]
            recorded = [name.removesuffix(_RECORDS) for name in names]
        steps = sorted(recorded, key=lambda name: (_names.old_step_of(name) or 0, name))
        return _restore.checkpoint_ids(self.directory) + steps

    def get_checkpoint_info(self, checkpoint_id: str) -> dict[str, Any]:
        """``{"checkpoint_id", "training_step", "timestamp", "layers": {name: entry}, ...}``.

        A layer's entry has ``checkpoint_id``, ``training_step``, ``offset_in_file`` (bytes) and
        ``size_bytes``, ``shapes`` and ``dtypes``, all of the layer's tensors in the model: where
        the first begins in its file, the size of all, buffers included. ``param_count`` counts
        elements of parameters alone, ``timestamp`` is in s since 1970. Of checkpoints of the
        engine's there are ``total_bytes``, the size with optimizer state and gradients,
        ``tensors``, each with ``file``, ``name``, ``offset``, ``bytes``, and ``checksums``, the
        CRC32C of each block that the layer has a part in, by file. Raises CheckpointNotFound,
        CheckpointCorrupt, and ValueError for what cannot be an id.
        """
        _names.check_id(checkpoint_id)
        recorded = self._recorded(checkpoint_id)
        found = _restore.find_id(self.directory, checkpoint_id)
        if found is None and recorded is not None:
            entries = list(recorded.values())
            return {
                "checkpoint_id": checkpoint_id,
                "training_step": entries[0]["training_step"] if entries else None,
                "timestamp": max((entry["timestamp"] for entry in entries), default=None),
                "checkpoint_file": self.checkpoint_file,
                "layers": recorded,
            }
        if found is None:
            there = ", ".join(self.list_checkpoints()) or "none"
            raise CheckpointNotFound(
                f"no checkpoint {checkpoint_id!r} in {self.directory}; found: {there}"
            )
        return self._info(_restore.open_checkpoint(self.directory, found))

    def _info(self, stored: _restore.Stored) -> dict[str, Any]:
        manifest = stored.manifest
        block_bytes = stored.reader.block_bytes
        sums = {name: stored.reader.block_sums(i) for i, name in enumerate(stored.files)}
        told = {key: manifest[key] for key in ("checkpoint_id", "training_step", "timestamp")}
        layers = {}
        for layer in manifest["layers"]:
            tensors = layer["tensors"]
            blocks: dict[str, set[int]] = {}
            for tensor in tensors:
                first = tensor["offset"] // block_bytes
                end = -(-(tensor["offset"] + tensor["bytes"]) // block_bytes)
                of_file = blocks.setdefault(tensor["file"], set())
                if tensor["bytes"]:  # or it has no part in any, and may stand behind the last
                    of_file.update(range(first, end))
            own = [t for t in tensors if _plan.is_of_model(t["file"])]
            layers[layer["name"]] = {
                **told,
                "offset_in_file": min((t["offset"] for t in own or tensors), default=0),
                "size_bytes": sum(t["bytes"] for t in own),
                "total_bytes": sum(t["bytes"] for t in tensors),
                "param_count": layer["param_count"],
                "shapes": [t["shape"] for t in own],
                "dtypes": [t["dtype"] for t in own],
                "tensors": tensors,
                "checksums": {
                    file: {block: sums[file][block] for block in sorted(numbers)}
                    for file, numbers in blocks.items()
                },
            }
        return {
            **told,
            "path": stored.path,
            "files": dict(stored.reader.files),
            "layers": layers,
            "metrics": _restore.decoded(manifest.get("metrics", {}), {}, "metrics"),
            **{key: manifest[key] for key in ("config", "versions") if key in manifest},
        }

    def verify_checkpoint(self, checkpoint_id: str) -> bool:
        """Whether every block matches its checksum; of records: whether the file is long enough.

        Raises CheckpointNotFound, and ValueError for what cannot be an id.
        """
        _names.check_id(checkpoint_id)
        found = _restore.find_id(self.directory, checkpoint_id)
        if found is not None:
            return _restore.verifies(self.directory, found)
        recorded = self._recorded(checkpoint_id)
        if recorded is None:
            self.get_checkpoint_info(checkpoint_id)  # raises, naming those there are
            return False
        try:
            size = os.path.getsize(self.checkpoint_file)
        except OSError:
            return False
        return all(e["offset_in_file"] + e["size_bytes"] <= size for e in recorded.values())

    # -- composing ---------------------------------------------------------------------------------

    def compose(
        self,
        *,
        checkpoint_id: str,
        training_step: int,
        run_id: bytes,
        save_id: bytes,
        parts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The manifest of a checkpoint: who it is, and `parts`, encoded already."""
        return {
            "format": "pccheck",
            "version": MANIFEST_VERSION,
            "checkpoint_id": checkpoint_id,
            "training_step": training_step,
            "run_id": run_id.hex(),
            "save_id": save_id.hex(),
            "timestamp": time.time(),
            "versions": {"torch": str(torch.__version__)},
            **parts,
        }

    @staticmethod
    def to_bytes(manifest: Mapping[str, Any]) -> bytes:
        """As it is written: of a size that seldom changes.

        A file that keeps its size is synced without a journal.
        """
        text = _codec.dumps(dict(manifest))
        return text.ljust(-len(text) // 4096 * -4096)


def _drop_torn_line(file: BinaryIO) -> None:
    """Of a file opened to append and read: what is behind its last whole line."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
