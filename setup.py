"""Builds the extension module `pccheck_ext._C` against the torch that is installed.

It is a script and pip's build backend in one. Whatever is missing on the machine is told in one
sentence, before anything is compiled: torch, a C++20 compiler, Python's headers, recent setuptools,
and, where it was asked for, the CUDA toolkit.

The CUDA part is built when torch is a CUDA build and nvcc is found; `PCCHECK_CUDA=0` or `1`
overrides. Builders have no GPU, so whether one is present is never asked. `CXX`, `CUDA_HOME`,
`TORCH_CUDA_ARCH_LIST` and `MAX_JOBS` mean what they mean to every torch extension;
`PCCHECK_WERROR=1` turns the C++ compiler's warnings into errors.
"""

# This file has to be understood by the Pythons and setuptools that it refuses: no newer syntax.
from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from typing import NoReturn

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77  # the first to read `license = "Apache-2.0"`; needs no `wheel` beside it
INSTALL = "`pip install --no-build-isolation .`"
PACKAGE = "pccheck_ext"
ROOMS = ("cpp", "cpp/bin", "cuda", "python")
HERE = os.path.dirname(os.path.abspath(__file__))


def stop(sentence: str) -> NoReturn:
    """Ends the build with a sentence on stderr and no traceback."""
    sys.exit("pccheck_ext cannot be built: " + sentence)


def require_python() -> None:
    if sys.version_info[:2] < OLDEST_PYTHON:
        stop(f"it needs Python 3.10 or newer, and this is Python {sys.version.split()[0]}.")


def require_torch():
    """The installed torch; the extension is tied to its version, so none is fetched for a build."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            stop(f"importing torch failed ({error}): repair torch's installation, then try again.")
        stop(
            "there is no torch in the environment that builds it (pip's isolated one never has "
            f"it): `pip install 'torch>=2.11' 'setuptools>=77' ninja`, then {INSTALL}."
        )
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        stop(f"importing torch failed ({reason}): repair torch's installation, then try again.")
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        stop(
            f"it needs torch 2.11 or newer, and torch {torch.__version__} is installed: "
            f"`pip install --upgrade 'torch>=2.11'`, then {INSTALL}."
        )
    return torch


def require_setuptools() -> None:
    try:
        import setuptools

        found, major = setuptools.__version__, int(setuptools.__version__.split(".")[0])
    except ModuleNotFoundError:
        found, major = "none", 0
    if major < OLDEST_SETUPTOOLS:
        stop(
            f"it needs setuptools {OLDEST_SETUPTOOLS} or newer, and {found} is installed: "
            f"`pip install --upgrade 'setuptools>={OLDEST_SETUPTOOLS}' ninja`, then {INSTALL}."
        )


def choose_compiler() -> str:
    """The C++ compiler's command line, tried out on what every source file needs."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    found = [cxx for cxx in candidates if shutil.which(shlex.split(cxx)[0])]
    if not found:
        missing = f"CXX={named} names no program" if named else "there is no C++ compiler"
        stop(
            f"{missing}: install GCC 11 or newer (Debian, Ubuntu: `apt-get install g++`) or name "
            f"a compiler with CXX=, then {INSTALL}."
        )

    def accepts(source: str) -> bool:
        headers = ["-I" + sysconfig.get_path(name) for name in ("include", "platinclude")]
        command = [*shlex.split(found[0]), "-std=c++20", "-fsyntax-only", *headers, "-x", "c++"]
        tried = subprocess.run([*command, "-"], input=source.encode(), capture_output=True)
        return tried.returncode == 0

    standard = "#include <concepts>\n#include <span>\n#include <stop_token>\n"
    if not accepts(standard + "#include <Python.h>\n"):
        if accepts(standard):
            stop(
                "Python's header Python.h is missing: install it (Debian, Ubuntu: "
                f"`apt-get install python3-dev`), then {INSTALL}."
            )
        stop(
            f"the C++ compiler `{found[0]}` does not compile C++20: install GCC 11 or newer "
            f"(Debian, Ubuntu: `apt-get install g++`) or name one with CXX=, then {INSTALL}."
        )
    return found[0]


def toolkit_of(nvcc: str) -> str | None:
    """The toolkit folder that an nvcc belongs to, even where the one on PATH is a wrapper script.

    nvcc itself says it: `#$ TOP=/usr/local/cuda-13.0/bin/..`. None where nvcc does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "empty.cu")
        with open(source, "w"):
            pass
        try:
            dry_run = subprocess.run(
                [nvcc, "--dryrun", source], capture_output=True, text=True, cwd=folder
            )
        except OSError:
            return None
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else None


def find_toolkit() -> tuple[str, str] | None:
    """Folder and version of the CUDA toolkit, or None. A folder named by CUDA_HOME is final."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        on_path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        home = toolkit_of(on_path) if on_path else None
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc")) if home else None
    if not home or not nvcc:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    return (home, release[1]) if release else None


def choose_cuda(torch_version: str, torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA part, and why. Points CUDA_HOME at the toolkit that was found."""
    asked = os.environ.get("PCCHECK_CUDA", "")
    if asked not in ("", "0", "1"):
        stop(f"PCCHECK_CUDA={asked} means nothing: set it to 0 or 1, or leave it unset.")
    if asked == "0":
        return False, "PCCHECK_CUDA=0"
    if torch_cuda is None:
        if asked:
            stop(
                f"PCCHECK_CUDA=1 asks for the CUDA part, but torch {torch_version} is not a CUDA "
                "build: install one that is, or leave PCCHECK_CUDA unset."
            )
        return False, f"torch {torch_version} is not a CUDA build"
    toolkit = find_toolkit()
    if toolkit is None:
        if asked:
            stop(
                "PCCHECK_CUDA=1 asks for the CUDA part, but no nvcc was found: install the CUDA "
                f"toolkit {torch_cuda}, name its folder with CUDA_HOME=, or leave PCCHECK_CUDA "
                "unset."
            )
        return False, f"torch {torch_version} is a CUDA build, but no nvcc was found"
    home, release = toolkit
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        if asked:
            stop(
                f"PCCHECK_CUDA=1 asks for the CUDA part, but nvcc in {home} is of CUDA {release} "
                f"and torch {torch_version} of CUDA {torch_cuda}: install CUDA {torch_cuda} and "
                "name its folder with CUDA_HOME=, or leave PCCHECK_CUDA unset."
            )
        return False, f"nvcc in {home} is of CUDA {release}, torch of CUDA {torch_cuda}"
    os.environ["CUDA_HOME"] = home
    return True, f"torch {torch_version}, nvcc {release} in {home}"


def describe_extension(torch, with_cuda: bool):
    from torch.utils import cpp_extension

    backend = "python/backend_cuda.cpp" if with_cuda else "python/backend_cpu.cpp"
    bindings = [s for s in glob.glob("python/*.cpp") if not s.startswith("python/backend_")]
    sources = glob.glob("cpp/*.cpp") + bindings + [backend]
    if with_cuda:
        sources += glob.glob("cuda/*.cpp") + glob.glob("cuda/*.cu")

    common = ["-std=c++20", "-O3"]
    strict = ["-Werror"] if os.environ.get("PCCHECK_WERROR") == "1" else []
    # Named again as system folders, torch's and CUDA's headers are searched as such and warn of
    # nothing, so that what is left to read is about this project.
    system = []
    for folder in cpp_extension.include_paths("cuda" if with_cuda else "cpu"):
        system += ["-isystem", folder]
    cxx = [*common, "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *strict, *system]
    nvcc = [*common, "-Xcompiler", "-fvisibility=hidden", "-Xcompiler", "-Wall", *system]
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return make(
        PACKAGE + "._C",
        sorted(sources),
        include_dirs=[HERE],
        # Whole rooms, not the headers alone: a source distribution is made of what stands here.
        depends=sorted(p for room in ROOMS for p in glob.glob(room + "/*") if os.path.isfile(p)),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    )


def build_command(torch, with_cuda: bool):
    from setuptools.errors import CompileError, LinkError
    from torch.utils.cpp_extension import BuildExtension

    torch_name = f"torch-{torch.__version__}-{'cuda' if with_cuda else 'cpu'}"
    build_info = "\n".join(
        [
            '"""What this build of the extension was made for. Written by setup.py."""',
            "",
            f"with_cuda = {with_cuda!r}",
            f"torch_version = {str(torch.__version__)!r}",
            f"torch_cuda = {torch.version.cuda!r}",
            f"cxx11_abi = {bool(torch.compiled_with_cxx11_abi())!r}",
            f"python_version = {sysconfig.get_python_version()!r}",
            "",
        ]
    )

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # pip gives every build a fresh folder; objects kept in one place make the next build
            # incremental. One folder for each torch, so that none is linked into the other's.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch_name}"
            self.build_temp = os.path.join(HERE, "build", tag)

        def run(self) -> None:
            try:
                super().run()
                for root in (HERE,) if self.inplace else (self.build_lib, HERE):
                    self.link_monitor(os.path.join(root, PACKAGE, "pccheck-monitor"))
            except (RuntimeError, CompileError, LinkError, subprocess.CalledProcessError):
                # what torch, setuptools and the compiler's own command line fail with
                stop("compiling or linking failed; what the compiler said stands above.")
            # Python started in the source folder imports the package from here, whichever way it
            # was installed; so the folder gets what was built, too.
            if not self.inplace:
                self.copy_extensions_to_source()
                self.write_build_info(self.build_lib)
            self.write_build_info(HERE)

        def link_monitor(self, executable: str) -> None:
            """The monitor: an executable of cpp/ alone, from the objects that were made for it."""
            objects = glob.glob(os.path.join(self.build_temp, "cpp", "*.o"))
            sources = {os.path.splitext(os.path.basename(s))[0] for s in glob.glob("cpp/*.cpp")}
            objects = [o for o in objects if os.path.splitext(os.path.basename(o))[0] in sources]
            # Runtime libraries linked in: it starts faster, and wherever it is carried.
            command = [*shlex.split(os.environ["CXX"]), "-std=c++20", "-O3", "-I" + HERE]
            command += ["cpp/bin/pccheck_monitor.cpp", *sorted(objects), "-pthread"]
            command += ["-static-libstdc++", "-static-libgcc", "-s", "-o", executable]
            subprocess.run(command, check=True)

        def write_build_info(self, folder: str) -> None:
            with open(os.path.join(folder, PACKAGE, "_build_info.py"), "w") as file:
                file.write(build_info)

    return Build


def main() -> None:
    require_python()
    torch = require_torch()
    require_setuptools()
    os.chdir(HERE)
    os.environ["CXX"] = choose_compiler()
    c_compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(c_compiler):  # the link command starts with it
        os.environ["CC"] = os.environ["CXX"]
    with_cuda, reason = choose_cuda(str(torch.__version__), torch.version.cuda)
    # torch looks for ninja on PATH; pip's lies beside an interpreter that need not be there.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = path + os.pathsep + sysconfig.get_path("scripts")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    print(f"pccheck_ext: building {'with' if with_cuda else 'without'} the CUDA part: {reason}")

    # Modules that have left the package would otherwise go on being installed from there.
    for leftover in glob.glob("build/lib*"):
        shutil.rmtree(leftover)

    from setuptools import setup

    setup(
        ext_modules=[describe_extension(torch, with_cuda)],
        cmdclass={"build_ext": build_command(torch, with_cuda)},
    )


if __name__ == "__main__":
    main()
else:
    # pip imports this file as the build backend (pyproject.toml) and calls setuptools' hooks, which
    # run it as a script. Looking first here means that even an environment without setuptools is
    # told what to install.
    require_python()
    require_torch()
    require_setuptools()
    from setuptools.build_meta import *  # noqa: F403
