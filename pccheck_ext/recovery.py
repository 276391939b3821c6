"""ModelRecovery: read checkpoints without a trainer."""

from __future__ import annotations

import os

from torch import nn

from pccheck_ext import _names, _restore

__all__ = ["ModelRecovery"]


class ModelRecovery:
    """Loads models from the checkpoints in a run's directory.

    `metadata_dir` is that directory, or its ``metadata`` child, which older code names. Every byte
    read is verified against its block's checksum.
    """

    def __init__(self, metadata_dir: str | os.PathLike[str] = "./metadata") -> None:
        self.directory = _names.run_directory(metadata_dir)

    def list_checkpoints(self) -> list[str]:
        """Ids of the checkpoints there are, unverified: steps in order, then custom ids."""
        return _restore.checkpoint_ids(self.directory)

    def get_latest_checkpoint(self) -> str | None:
        """Id of the checkpoint of the highest step that verifies, or None. Reads it all."""
        for _, name in _restore.newest_first(self.directory):
            try:
                if self.verify(name):
                    return name
            except FileNotFoundError:  # retired meanwhile, by its writer
                continue
        return None

    def verify(self, checkpoint_id: str) -> bool:
        """Whether every block of the checkpoint is there and matches its checksum.

        Raises CheckpointNotFound, and ValueError for what cannot be an id.
        """
        return _restore.verifies(self.directory, checkpoint_id)

    def load_checkpoint(
        self, model: nn.Module, checkpoint_id: str, strict: bool = False
    ) -> list[str]:
        """Load parameters and buffers into `model`; returns the layers the checkpoint has not.

        A layer counts that the checkpoint has not all of. What `PCCheckAdapter` saved alone has
        parameters only, found by layer and position: layers with buffers are not all in it.

        Tensors keep their place, device and requires_grad. Raises CheckpointNotFound;
        CheckpointMismatch, before anything is changed, where shapes or dtypes differ, or, if
        `strict`, where either side has a tensor that the other has not; CheckpointCorrupt where a
        block does not match its checksum: the model is then partly loaded, load another.
        """
        stored = _restore.open_checkpoint(self.directory, checkpoint_id)
        stored.read_ahead()
        restored = _restore.restore_model(stored, model, strict=strict)
        stored.read(restored.pairs)
        _restore.restore_extra_state(stored, model, restored, stored.extra_tensors())
        return restored.missing_layers

    def load_layer(self, model: nn.Module, checkpoint_id: str, layer: str) -> None:
        """Load one layer's parameters and buffers, reading only the blocks they lie in.

        Raises as `load_checkpoint`, also where the model has nothing of the layer, and KeyError
        for a layer that the checkpoint has not.
        """
        stored = _restore.open_checkpoint(self.directory, checkpoint_id)
        layers = [entry["name"] for entry in stored.manifest["layers"]]
        if layer not in layers:
            raise KeyError(f"{stored.path} has no layer {layer!r}; it has: {', '.join(layers)}")
        stored.read(_restore.restore_model(stored, model, strict=False, layer=layer).pairs)
