"""pccheck_ext: the whole training state on NVMe at every step, while training goes on.

The front door is `LayerwiseCheckpointTrainer`; `ModelRecovery` reads what it wrote;
`DependencyGraphBuilder` tells, and draws, in which order layers are updated. Also
`torch.ops.pccheck.save_chunks` and `load_chunks`: one safetensors file, written and read in
parallel; `wait` waits for the former's ticket.
"""

from __future__ import annotations

from pccheck_ext import _build_check

_build_check.check()

from pccheck_ext import _C  # noqa: E402  # the check says why it cannot be imported, if so
from pccheck_ext._exit import drain_at_exit  # noqa: E402
from pccheck_ext._ops import wait  # noqa: E402
from pccheck_ext.adapter import PCCheckAdapter  # noqa: E402
from pccheck_ext.errors import (  # noqa: E402
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
)
from pccheck_ext.graph import DependencyGraphBuilder, capture_first_forward  # noqa: E402
from pccheck_ext.metadata import CheckpointMetadataManager  # noqa: E402
from pccheck_ext.optimizer import LayerwiseOptimizer  # noqa: E402
from pccheck_ext.recovery import ModelRecovery  # noqa: E402
from pccheck_ext.scheduler import LayerwiseCheckpointScheduler, SaveTask  # noqa: E402
from pccheck_ext.trainer import LayerwiseCheckpointTrainer  # noqa: E402

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMetadataManager",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "DependencyGraphBuilder",
    "LayerwiseCheckpointScheduler",
    "LayerwiseCheckpointTrainer",
    "LayerwiseOptimizer",
    "ModelRecovery",
    "PCCheckAdapter",
    "SaveTask",
    "built_with_cuda",
    "capture_first_forward",
    "wait",
]

built_with_cuda: bool = _C.built_with_cuda()
"""Whether this build can save tensors on CUDA devices."""

drain_at_exit()
