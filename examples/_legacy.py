"""Files of the old form, ``checkpoint_step_4000.pt`` and ``final_model.pt``.

They are pickles, so they are read with ``weights_only=True``: nothing but tensors and plain values
can come out of them, and nothing is executed. They hold neither random numbers nor a data position:
what goes on from one is not bit for bit what would have gone on without the interruption.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _settings import TrainError
from torch import Tensor, nn

__all__ = ["OldCheckpoint", "OldFileError", "adopt", "is_old_name", "old_step", "read_old"]

KEYS = (
    "model_state_dict",
    "optimizer_state_dict",
    "step",
    "loss_history",
    "step_history",
    "config",
)
_NAME = re.compile(r"checkpoint_step_(\d{1,18})\.pt")
_FINAL = "final_model.pt"

# How the old configurations called the fields of the architecture.
_OLD_FIELDS = {
    "vocab_size": "vocabulary",
    "max_seq_len": "context",
    "seq_len": "context",
    "block_size": "context",
    "d_model": "width",
    "hidden_size": "width",
    "n_embd": "width",
    "num_layers": "layers",
    "n_layer": "layers",
    "nhead": "heads",
    "num_heads": "heads",
    "n_head": "heads",
}


class OldFileError(TrainError):
    """A file of the old form that cannot be read or is not whole."""


@dataclass(frozen=True)
class OldCheckpoint:
    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    losses: list[float]
    loss_steps: list[int]
    architecture: dict[str, Any]  # as far as the file tells it, under our names


def is_old_name(name: str) -> bool:
    return name == _FINAL or _NAME.fullmatch(name) is not None


def old_step(path: Path) -> int:
    """The step of an old file: by its name, or by its content where the name does not tell it."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else read_old(path).step


def read_old(path: Path) -> OldCheckpoint:
    """Read and check a file. OldFileError says what is wrong with it."""
    try:
        # Mapped where the format allows it: often only the step is looked at.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise OldFileError(
            f"{path} cannot be read as tensors and plain values alone, and nothing else is read: "
            f"{type(error).__name__}: {first}"
        ) from None
    if not isinstance(content, dict):
        raise OldFileError(f"{path} holds a {type(content).__name__}, not a dict with {KEYS}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise OldFileError(
            f"{path} has no {', '.join(missing)}; it has {sorted(map(str, content))}"
        )
    step = content["step"]
    if type(step) is not int or step < 0:
        raise OldFileError(f"{path}: step is {step!r}, not a number of steps")
    losses, loss_steps = content["loss_history"], content["step_history"]
    if not _are_numbers(losses) or not _are_numbers(loss_steps) or len(losses) != len(loss_steps):
        raise OldFileError(f"{path}: loss_history and step_history are not two equally long lists")
    return OldCheckpoint(
        path=path,
        model=_tensors(path, content["model_state_dict"]),
        optimizer=_optimizer(path, content["optimizer_state_dict"]),
        step=step,
        losses=[float(loss) for loss in losses],
        loss_steps=[int(s) for s in loss_steps],
        architecture=_architecture(content["config"]),
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _tensors(path: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise OldFileError(f"{path}: model_state_dict is not a dict of tensors")
    # What torch.compile and DataParallel put before the names.
    return {re.sub(r"^(?:_orig_mod\.|module\.)+", "", name): t for name, t in state.items()}


def _optimizer(path: Path, state: Any) -> dict[str, Any]:
    fits = (
        isinstance(state, dict)
        and isinstance(state.get("state"), dict)
        and all(isinstance(entry, dict) for entry in state["state"].values())
        and isinstance(state.get("param_groups"), list)
        and all(
            isinstance(g, dict) and isinstance(g.get("params"), list) for g in state["param_groups"]
        )
    )
    if not fits:
        raise OldFileError(f"{path}: optimizer_state_dict is not what an optimizer returns")
    checked: dict[str, Any] = state
    return checked


def _architecture(config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {}
    return {
        _OLD_FIELDS.get(name, name): value
        for name, value in config.items()
        if isinstance(name, str) and type(value) in (int, float, str)
    }


# ---- Taking it over ------------------------------------------------------------------------------


def adopt(old: OldCheckpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load model and optimizer. TrainError, before either is changed, where they do not fit."""
    ours = model.state_dict()
    problems = [f"{name} is not in the file" for name in ours if name not in old.model]
    problems += [f"{name} is not in the model" for name in old.model if name not in ours]
    problems += [
        f"{name} is {list(old.model[name].shape)} in the file and {list(ours[name].shape)} here"
        for name in ours
        if name in old.model and old.model[name].shape != ours[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TrainError(
            f"{old.path} does not fit the model, which is unchanged: "
            + "; ".join(problems[:5])
            + more
        )
    state = _state_by_parameter(old, model, optimizer)
    model.load_state_dict(old.model)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _state_by_parameter(
    old: OldCheckpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Any]]:
    """The file's optimizer state under the numbers that `optimizer` gives its parameters.

    Old optimizers had the parameters in the model's order, in one group; ours has them in several.
    """
    numbers = [number for group in old.optimizer["param_groups"] for number in group["params"]]
    groups = [group["params"] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group]
    sizes = [len(group["params"]) for group in old.optimizer["param_groups"]]
    if sizes == [len(parameters)]:
        there = list(model.parameters())
    elif sizes == list(map(len, groups)):
        there = parameters
    else:
        raise TrainError(
            f"{old.path} has an optimizer over groups of {sizes} parameters, which is neither all "
            f"{len(parameters)} in one nor {list(map(len, groups))}"
        )
    ours = {id(parameter): number for number, parameter in enumerate(parameters)}
    state = {}
    for number, parameter in zip(numbers, there, strict=True):
        entry = old.optimizer["state"].get(number)
        if entry is None:
            continue
        if not {"step", "exp_avg", "exp_avg_sq"} <= entry.keys():
            raise TrainError(
                f"{old.path}: the optimizer's state of parameter {number} has {sorted(entry)}: "
                "it is not Adam's or AdamW's, and this one is AdamW"
            )
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise TrainError(
                    f"{old.path}: the optimizer's {name} of parameter {number} is "
                    f"{list(value.shape)}, the parameter is {list(parameter.shape)}"
                )
        # Copied, for the file's tensors may be mapped from it.
        state[ours[id(parameter)]] = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
    return state
