"""The Python side of torch.ops.pccheck."""

from __future__ import annotations

from pccheck_ext import _C
from pccheck_ext.errors import CheckpointError

__all__ = ["wait"]


def wait(ticket: int, timeout_s: float | None = None) -> None:
    """Return when the file of a ``torch.ops.pccheck.save_chunks`` ticket is durable and visible.

    Raises ValueError for a ticket that was never issued, TimeoutError when `timeout_s` seconds have
    passed first, CheckpointError with the reason when the save failed (once; later calls return).
    """
    try:
        finished = _C.wait_chunks(ticket, timeout_s)
    except RuntimeError as error:
        raise CheckpointError(str(error)) from None
    if not finished:
        raise TimeoutError(f"ticket {ticket} was not committed within {timeout_s} s")
