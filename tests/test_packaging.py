"""What a user meets before the package runs: how it is built, refused, and checked on import."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pccheck_ext
from pccheck_ext import _build_check

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install --no-build-isolation ."

BUILT = _build_check.BuildInfo(
    with_cuda=True,
    torch_version="2.13.0+cu130",
    torch_cuda="13.0",
    cxx11_abi=True,
    python_version="3.11",
)
# A torch that has all setup.py looks at before it compiles anything.
NO_CUDA_TORCH = "__version__ = '2.13.0+cpu'\nclass version:\n    cuda = None\n"
CUDA_TORCH = "__version__ = '2.13.0+cu130'\nclass version:\n    cuda = '13.0'\n"


def complaint(built: _build_check.BuildInfo | None = BUILT, **running: object) -> str | None:
    here = {
        "extension_found": True,
        "torch_version": "2.13.0+cu130",
        "torch_cuda": "13.0",
        "python_version": "3.11",
    }
    return _build_check.complaint(built, **{**here, **running})  # type: ignore[arg-type]


def run_setup(
    tmp_path: Path, torch_source: str | None, *flags: str, **environment: str
) -> list[str]:
    """The lines that `setup.py` prints on stderr where `torch_source` stands for torch."""
    if torch_source is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(torch_source)
    dropped = ("PYTHONPATH", "CXX", "CUDA_HOME", "CUDA_PATH", "PCCHECK_CUDA")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [sys.executable, *flags, str(ROOT / "setup.py"), "--version"],
        env={**inherited, "PYTHONPATH": str(tmp_path), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout
    return done.stderr.splitlines()


def fake_program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# --- Metadata ------------------------------------------------------------------------------------


def test_the_version_is_the_one_of_pyproject() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert importlib.metadata.version("pccheck_ext") == declared[1]


def test_torch_and_python_are_required_as_setup_checks_them() -> None:
    metadata = importlib.metadata.metadata("pccheck_ext")
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])


def test_the_package_says_what_it_was_built_for() -> None:
    built = _build_check.read_build_info()
    assert built is not None
    assert built.with_cuda is pccheck_ext.built_with_cuda
    assert built.torch_version == str(torch.__version__)
    assert built.torch_cuda == torch.version.cuda
    assert built.cxx11_abi is torch.compiled_with_cxx11_abi()
    assert built.python_version == sysconfig.get_python_version()


def test_the_package_ships_its_annotations() -> None:
    assert (Path(pccheck_ext.__file__).parent / "py.typed").is_file()


# --- The check on import -------------------------------------------------------------------------


def test_an_extension_built_for_what_runs_is_welcome() -> None:
    assert complaint() is None
    assert complaint(torch_version="2.13.1+cu130") is None
    assert complaint(torch_cuda="13.2") is None


@pytest.mark.parametrize(
    ("running", "named"),
    [
        ({"extension_found": False}, ["without its compiled extension"]),
        ({"torch_version": "2.11.0+cu130"}, ["2.13.0+cu130", "2.11.0+cu130"]),
        ({"torch_version": "2.1.3"}, ["2.13.0+cu130", "2.1.3"]),
        ({"torch_version": "2.13.0+cpu", "torch_cuda": None}, ["CUDA 13.0", "no CUDA"]),
        ({"torch_cuda": "12.8"}, ["CUDA 13.0", "CUDA 12.8"]),
        ({"python_version": "3.12", "extension_found": False}, ["Python 3.11", "Python 3.12"]),
    ],
)
def test_an_extension_that_does_not_fit_is_refused_in_one_sentence_with_the_remedy(
    running: dict[str, object], named: list[str]
) -> None:
    sentence = complaint(**running)
    assert sentence is not None
    assert "\n" not in sentence
    assert all(name in sentence for name in named), sentence
    assert "pip install --no-build-isolation --force-reinstall --no-deps ." in sentence


def test_an_extension_that_was_never_built_is_refused() -> None:
    sentence = complaint(None, extension_found=False)
    assert sentence is not None
    assert "without its compiled extension" in sentence


def test_without_the_cuda_part_the_cuda_version_does_not_matter() -> None:
    built = replace(BUILT, with_cuda=False)
    assert complaint(built, torch_cuda="12.8") is None
    assert complaint(built, torch_cuda=None) is not None


def test_importing_under_another_torch_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _build_check.check()
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    with pytest.raises(ImportError, match=r"this is torch 2\.12\.0"):
        _build_check.check()


# --- What setup.py refuses -----------------------------------------------------------------------


def test_without_torch_setup_says_how_to_install(tmp_path: Path) -> None:
    (line,) = run_setup(tmp_path, None, "-S", "-E")
    assert "there is no torch" in line
    assert INSTALL in line


def test_as_a_build_backend_it_says_the_same_where_even_setuptools_is_missing(
    tmp_path: Path,
) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup"
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-I", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "there is no torch" in line


def test_an_old_torch_is_refused(tmp_path: Path) -> None:
    (line,) = run_setup(tmp_path, "__version__ = '2.10.1+cu128'")
    assert "needs torch 2.11 or newer, and torch 2.10.1+cu128 is installed" in line
    assert INSTALL in line


def test_a_torch_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    (line,) = run_setup(tmp_path, "raise OSError('libcudart.so.13: no such file')")
    assert "importing torch failed (libcudart.so.13: no such file)" in line


def test_an_old_setuptools_is_refused(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    (line,) = run_setup(tmp_path, NO_CUDA_TORCH)
    assert "needs setuptools 77 or newer, and 65.5.0 is installed" in line


def test_a_missing_compiler_is_told_before_anything_is_compiled(tmp_path: Path) -> None:
    (line,) = run_setup(tmp_path, NO_CUDA_TORCH, PATH=str(tmp_path))
    assert "there is no C++ compiler" in line
    assert "apt-get install g++" in line


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    (line,) = run_setup(tmp_path, NO_CUDA_TORCH, CXX="no-such-compiler")
    assert "CXX=no-such-compiler names no program" in line


def test_a_compiler_without_cpp20_is_refused(tmp_path: Path) -> None:
    old = fake_program(tmp_path, "old-c++", "exit 1")
    (line,) = run_setup(tmp_path, NO_CUDA_TORCH, CXX=old)
    assert "does not compile C++20" in line


def test_missing_python_headers_are_told(tmp_path: Path) -> None:
    blind = fake_program(tmp_path, "blind-c++", "! grep -q Python.h")
    (line,) = run_setup(tmp_path, NO_CUDA_TORCH, CXX=blind)
    assert "Python.h is missing" in line
    assert "apt-get install python3-dev" in line


@pytest.mark.parametrize(
    ("torch_source", "asked", "said"),
    [
        (NO_CUDA_TORCH, "1", "torch 2.13.0+cpu is not a CUDA build"),
        (CUDA_TORCH, "1", "no nvcc was found"),
        (CUDA_TORCH, "yes", "PCCHECK_CUDA=yes means nothing"),
    ],
    ids=["torch without CUDA", "no nvcc", "neither 0 nor 1"],
)
def test_asking_for_cuda_without_the_means_is_refused(
    tmp_path: Path, torch_source: str, asked: str, said: str
) -> None:
    anything = fake_program(tmp_path, "c++", "exit 0")
    (line,) = run_setup(
        tmp_path, torch_source, CXX=anything, PCCHECK_CUDA=asked, CUDA_HOME=str(tmp_path)
    )
    assert said in line


def test_the_toolkit_is_found_behind_a_wrapper_of_nvcc(tmp_path: Path) -> None:
    # The wrapper lies where no toolkit is; nvcc's own word leads to the real one, an old one here.
    anything = fake_program(tmp_path, "c++", "exit 0")
    toolkit = tmp_path / "cuda-12.8"
    real = fake_program(
        toolkit,
        "bin/nvcc",
        f"""case "$1" in
        --dryrun) echo '#$ TOP={toolkit}/bin/..' >&2 ;;
        --version) echo 'Cuda compilation tools, release 12.8, V12.8.93' ;;
        esac""",
    )
    fake_program(tmp_path, "bin/nvcc", f'exec "{real}" "$@"')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    (line,) = run_setup(tmp_path, CUDA_TORCH, CXX=anything, PCCHECK_CUDA="1", PATH=path)
    assert f"nvcc in {toolkit} is of CUDA 12.8 and torch 2.13.0+cu130 of CUDA 13.0" in line
