"""Says in one sentence why the compiled extension does not fit the Python or torch it runs under.

An extension built against another torch crashes, or fails with the name of a missing C++ symbol;
`check()` comes before the first import of `_C` and compares what was built with what is running.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sysconfig
from dataclasses import dataclass

import torch

__all__ = ["BuildInfo", "check", "complaint", "read_build_info"]

_PACKAGE = "pccheck_ext"
_REBUILD = "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"


@dataclass(frozen=True)
class BuildInfo:
    """What the extension was built for, as setup.py wrote it down."""

    with_cuda: bool
    torch_version: str  # such as "2.13.0+cpu"
    torch_cuda: str | None  # torch.version.cuda
    cxx11_abi: bool
    python_version: str  # such as "3.11"


def read_build_info() -> BuildInfo | None:
    """What the installed extension was built for; None where nothing was built."""
    name = f"{_PACKAGE}._build_info"
    if importlib.util.find_spec(name) is None:
        return None
    written = importlib.import_module(name)
    return BuildInfo(
        with_cuda=written.with_cuda,
        torch_version=written.torch_version,
        torch_cuda=written.torch_cuda,
        cxx11_abi=written.cxx11_abi,
        python_version=written.python_version,
    )


def complaint(
    built: BuildInfo | None,
    *,
    extension_found: bool,
    torch_version: str,
    torch_cuda: str | None,
    python_version: str,
) -> str | None:
    """What keeps the extension from running here, one sentence with the remedy; None: nothing."""
    if built is not None and built.python_version != python_version:
        return (
            f"pccheck_ext was built for Python {built.python_version} and this is Python "
            f"{python_version}: run {_REBUILD}."
        )
    if built is None or not extension_found:
        return f"pccheck_ext is here without its compiled extension: run {_REBUILD}."
    if _major_minor(built.torch_version) != _major_minor(torch_version):
        return (
            f"pccheck_ext was built for torch {built.torch_version} and this is torch "
            f"{torch_version}: run {_REBUILD}."
        )
    if _cuda_kind(built.torch_cuda, built.with_cuda) != _cuda_kind(torch_cuda, built.with_cuda):
        return (
            f"pccheck_ext was built for torch {built.torch_version} "
            f"({_cuda_name(built.torch_cuda)}) and this is torch {torch_version} "
            f"({_cuda_name(torch_cuda)}): run {_REBUILD}."
        )
    return None


def check() -> None:
    """Returns when the extension was built for the Python and torch that are running.

    Raises:
        ImportError: it was not built, or for others; the message is one sentence with the remedy.
    """
    sentence = complaint(
        read_build_info(),
        extension_found=importlib.util.find_spec(f"{_PACKAGE}._C") is not None,
        torch_version=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        python_version=sysconfig.get_python_version(),
    )
    if sentence is not None:
        raise ImportError(sentence, name=f"{_PACKAGE}._C")


def _major_minor(version: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", version)[:2])


def _cuda_kind(cuda: str | None, with_cuda: bool) -> str | None:
    # The CUDA part is linked to one major version of the runtime; without it only matters whether
    # torch is a CUDA build at all.
    if cuda is None:
        return None
    return cuda.split(".")[0] if with_cuda else "any"


def _cuda_name(cuda: str | None) -> str:
    return "no CUDA" if cuda is None else f"CUDA {cuda}"
