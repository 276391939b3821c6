"""The rooms and who may enter them: pccheck_ext -> python -> cuda -> cpp, and python -> cpp."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cpp", "cuda", "python")

# What a room's files may include with quotes, by the first folder of the path.
MAY_ENTER = {
    "cpp": {"cpp"},
    "cuda": {"cuda", "cpp"},
    "python": {"python", "cuda", "cpp"},
}

TORCH = r"torch/|ATen/|c10/|caffe2/"
PYTHON = r"Python\.h|pybind11/"
CUDA = r"cuda|cub/|thrust/|cooperative_groups|nv"
FOREIGN = {
    "cpp": re.compile(f"(?:{TORCH}|{PYTHON}|{CUDA})"),
    "cuda": re.compile(f"(?:{TORCH}|{PYTHON})"),
    # The ATen CUDA context needs libraries that are often absent: c10/cuda alone.
    "python": re.compile(r"ATen/cuda/|torch/csrc/.*cuda"),
}

# The build chooses files, not lines. What a compiler can say only with #if stands here.
CONDITIONAL = {
    "cpp/crc32c.cpp": re.compile(r"__x86_64__|__aarch64__|__ARM_FEATURE_CRC32"),
    "cpp/digest.cpp": re.compile(r"__x86_64__"),
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b(.*)$", re.MULTILINE)


def files_of(room: str) -> list[Path]:
    kinds = (".h", ".cuh", ".cpp", ".cu")
    return sorted(path for path in (ROOT / room).rglob("*") if path.suffix in kinds)


def wrong_includes(room: str, path: str, text: str) -> Iterator[str]:
    for bracket, name in INCLUDE.findall(text):
        if FOREIGN[room].match(name):
            yield f"{path} includes {name}, which {room}/ must not know"
        elif bracket == '"' and name.split("/")[0] not in MAY_ENTER[room]:
            yield (
                f'{path} includes "{name}": paths start at the repository\'s root, '
                f"and {room}/ may enter {sorted(MAY_ENTER[room])} only"
            )


def wrong_conditions(path: str, text: str) -> Iterator[str]:
    allowed = CONDITIONAL.get(path)
    for condition in CONDITION.findall(text):
        if allowed is None or not allowed.search(condition):
            yield f"{path} compiles conditionally on{condition}"


def wrong_python(path: str, text: str) -> Iterator[str]:
    """Ways of serializing that execute code on loading, and imports of what stands outside."""
    outside = {"bench", "examples", "tests"}
    picklers = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
            yield f"{path}:{node.lineno} uses torch.{node.attr}, which pickles"
        for name in names:
            if name.split(".")[0] in picklers | outside:
                yield f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_includes_only_what_lies_below_it(room: str) -> None:
    files = files_of(room)
    assert files, f"{room}/ is empty"
    wrong = [
        line
        for path in files
        for line in wrong_includes(room, str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_quoted_includes_name_files_that_are_there() -> None:
    wrong = [
        f'{path.relative_to(ROOT)} includes "{name}"'
        for room in ROOMS
        for path in files_of(room)
        for bracket, name in INCLUDE.findall(path.read_text())
        if bracket == '"' and not (ROOT / name).is_file()
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_compiles_conditionally_but_for_the_processor() -> None:
    wrong = [
        line
        for room in ROOMS
        for path in files_of(room)
        for line in wrong_conditions(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_header_is_included_once_by_pragma() -> None:
    headers = [path for room in ROOMS for path in files_of(room) if path.suffix in (".h", ".cuh")]
    assert not [str(path) for path in headers if "#pragma once" not in path.read_text()]


def test_no_two_sources_of_a_room_share_an_object_file() -> None:
    # gather.cpp and gather.cu would both become gather.o: one would silently replace the other.
    sources = [path for room in ROOMS for path in files_of(room) if path.suffix in (".cpp", ".cu")]
    objects = [str(path.relative_to(ROOT).with_suffix(".o")) for path in sources]
    assert sorted(set(objects)) == sorted(objects)


def test_the_build_can_choose_between_two_backends() -> None:
    backends = sorted(path.name for path in (ROOT / "python").glob("backend_*.cpp"))
    assert backends == ["backend_cpu.cpp", "backend_cuda.cpp"]


def test_the_package_neither_pickles_nor_imports_what_stands_outside() -> None:
    files = sorted((ROOT / "pccheck_ext").rglob("*.py"))
    assert files
    wrong = [
        line
        for path in files
        for line in wrong_python(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("cpp", "#include <torch/torch.h>"),
        ("cpp", "#include <c10/util/Exception.h>"),
        ("cpp", "#include <cuda_runtime.h>"),
        ("cpp", "#  include <Python.h>"),
        ("cpp", '#include "cuda/pinned_memory.h"'),
        ("cpp", '#include "engine.h"'),
        ("cuda", "#include <c10/cuda/CUDAStream.h>"),
        ("cuda", '#include "python/tensor_view.h"'),
        ("python", "#include <ATen/cuda/CUDAContext.h>"),
    ],
)
def test_a_planted_include_is_found(room: str, line: str) -> None:
    assert list(wrong_includes(room, "planted", f"#pragma once\n{line}\n"))


@pytest.mark.parametrize("line", ["#ifdef PCCHECK_CUDA", "#if defined(__x86_64__)", "#ifndef A_H_"])
def test_a_planted_condition_is_found(line: str) -> None:
    assert list(wrong_conditions("cpp/engine.cpp", line + "\n"))


@pytest.mark.parametrize(
    "text", ["import pickle", "from pickle import dumps", "torch.load(path)", "import tests.tools"]
)
def test_a_planted_pickle_or_import_is_found(text: str) -> None:
    assert list(wrong_python("planted", text))
