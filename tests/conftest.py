"""Markers. `needs_cuda` skips where the CUDA part cannot run; FAIL_WITHOUT_CUDA=1 fails there."""

from __future__ import annotations

import os

import pytest
import torch


def why_no_cuda() -> str | None:
    """What keeps the CUDA part from running here; None where it runs."""
    import pccheck_ext

    if not pccheck_ext.built_with_cuda:
        return "pccheck_ext is built without the CUDA part"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs_cuda: needs a CUDA device and the CUDA part of the extension"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") is None:
        return
    reason = why_no_cuda()
    if reason is None:
        return
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(f"FAIL_WITHOUT_CUDA=1, and {reason}", pytrace=False)
    pytest.skip(reason)
