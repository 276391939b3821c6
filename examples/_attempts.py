"""One step's gradients, whatever it takes: smaller pieces when memory runs out, less compilation
when the compiler gives up.

The step is taken again from its beginning each time, with the same batch, the same random numbers
and no gradient left of the attempt that failed.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _devices import CompileMode
from _settings import TrainError
from torch import Tensor, nn

__all__ = ["Attempts", "Rewind", "is_out_of_memory"]

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",  # Linux, macOS
    "DefaultCPUAllocator: not enough memory",  # Windows
    "MPS backend out of memory",
    "CUDA error: out of memory",  # what is allocated past the caching allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was memory that there was too little of, on whatever device.

    CUDA has an exception of its own for it; the CPU's allocator and MPS raise a RuntimeError that
    can be told by its text alone.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)


class Rewind:
    """What forward and backward passes change besides gradients: generators and buffers."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._module = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._device = self._module.get_rng_state() if self._module is not None else None
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._module is not None and self._device is not None:
            self._module.set_rng_state(self._device)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)


class Attempts:
    """Computes gradients of batches, `micro_batch` samples at a time.

    `loss_of` gives the mean loss of samples; `clear` drops all gradients, whose norm is clipped to
    `clip`; `modes` are tried in order, the last one has to be eager. `compiler` is
    ``torch.compile``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
        *,
        clear: Callable[[], None],
        clip: float,
        micro_batch: int,
        modes: Sequence[CompileMode],
        announce: Callable[[str], None],
        compiler: Callable[..., Any] = torch.compile,
    ) -> None:
        self.model = model
        self.loss_of = loss_of
        self.device = device
        self.clear = clear
        self.clip = clip
        self.micro_batch = micro_batch
        self.announce = announce
        self.compiler = compiler
        self._modes = list(modes)
        self._computed: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def compiled(self) -> CompileMode:
        """The mode in force."""
        return self._modes[0]

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """The batch's mean loss and its gradients' norm; clipped, they are in the parameters.

        Raises TrainError when a single sample is too much for the memory; an error of the model
        itself comes out as it is, once nothing is compiled any more.
        """
        rewind = Rewind(self.model, self.device)
        while True:
            try:
                self.clear()
                return self._forward_backward(inputs, targets)
            except Exception as error:
                out_of_memory = is_out_of_memory(error)
                if not out_of_memory and len(self._modes) == 1:
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # Not in the handler: as long as there is the error, its traceback holds activations.
            self.clear()
            rewind.restore()
            if out_of_memory:
                self._take_smaller_pieces(len(inputs), reason)
            else:
                self._compile_less(reason)

    def _forward_backward(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        count = len(inputs)
        total = torch.zeros((), device=self.device)
        size = self.micro_batch
        for some_inputs, some_targets in zip(
            torch.split(inputs, size), torch.split(targets, size), strict=True
        ):
            loss = self._compute(
                some_inputs.to(self.device, non_blocking=True),
                some_targets.to(self.device, non_blocking=True),
            )
            # Of the batch's mean: the last piece may be smaller than the others.
            loss = loss * (len(some_inputs) / count)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return total.item(), norm.item()

    def _compute(self, inputs: Tensor, targets: Tensor) -> Tensor:
        mode = self.compiled
        if self._computed is None:
            self._computed = self.loss_of
            if mode.mode != "eager":
                self._computed = self.compiler(self.loss_of, mode=mode.mode, dynamic=mode.dynamic)
        if mode.mode != "eager" and self.device.type == "cuda":
            # What the last piece left in the memory of a CUDA graph may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._computed(inputs, targets)

    def _take_smaller_pieces(self, count: int, reason: str) -> None:
        before = min(self.micro_batch, count)
        if before == 1:
            raise TrainError(
                f"out of memory with one sample at a time: {reason}. Take a smaller --config, or a "
                "device with more memory; checkpoints up to the step before are complete"
            )
        self.micro_batch = (before + 1) // 2
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()
        self.announce(
            f"out of memory ({reason}): micro-batch {before} -> {self.micro_batch}, gradients of "
            f"{-(-count // before)} -> {-(-count // self.micro_batch)} accumulated, batch size "
            f"{count} as before; the step is taken again from its beginning"
        )

    def _compile_less(self, reason: str) -> None:
        failed = self._modes.pop(0)
        self._computed = None
        self.announce(
            f"fallback: compile mode {failed} failed ({reason}); going on with {self.compiled}; "
            "the step is taken again from its beginning"
        )
