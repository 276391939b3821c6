# `make demo` and `make test` do all the set-up on a Linux machine with Python, a C++ compiler and
# make: an environment in .venv, torch from pip's index, the extension built in place. What changed
# is built again. `make test-system` needs Debian packages and a CUDA compiler besides.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
JOBS ?= $(shell nproc)

export MAX_JOBS := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

venv := .venv
py := $(venv)/bin/python
build_tools := 'setuptools>=77' ninja
# The stamp's name holds the requirement, so that another TORCH= is installed and built for.
key = $(shell printf %s "$(1)" | cksum | cut -d ' ' -f 1)
torch_stamp := $(venv)/.torch-$(call key,$(TORCH))
built := $(venv)/.built
lint_stamp := $(venv)/.lint
cuda_stamp := .venv-cuda/.torch-$(call key,$(CUDA_TORCH))
cuda_copy := build/cuda_check

# The folders stand for files that were added or removed.
sources := setup.py pyproject.toml cpp cuda python $(wildcard cpp/* cpp/bin/* cuda/* python/*)
cxx_files := $(wildcard $(foreach room,cpp cpp/bin cuda python tests/cpp,\
  $(room)/*.h $(room)/*.cuh $(room)/*.cpp $(room)/*.cu))

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench bench-arguments bench-monitor test-system lint types test-core test-cuda cuda-check test-disk \
  format clean distclean

help:
	@echo "make demo         train, be killed, resume bit for bit: shows what the package does"
	@echo "make test         the Python tests"
	@echo "make test-system  lint, types, core tests under sanitizers, CUDA build; needs packages"
	@echo "make bench        the figures of the README; needs fio"
	@echo "make bench-arguments, bench-monitor   those of docs/tuning.md and docs/modes.md"
	@echo "make format       formats all sources"
	@echo "make clean        removes what was built; distclean: the environments, too"

demo: $(built)
	$(py) examples/demo.py $(DEMO_ARGS)

test: $(built)
	$(py) -m pytest $(TEST_ARGS)

bench: $(built)
	@command -v fio >/dev/null || { \
	  echo "make bench: fio is not installed (Debian, Ubuntu: apt-get install fio)" >&2; exit 1; }
	$(py) bench/first_slice.py $(BENCH_ARGS)

bench-arguments: $(built)
	$(py) bench/arguments.py $(BENCH_ARGS)

bench-monitor: $(built)
	$(py) bench/monitor_stall.py $(BENCH_ARGS)

test-system: lint types test-core test-cuda test-disk

# --- The environment -----------------------------------------------------------------------------

# What a missing piece would otherwise turn into a long traceback after a long download.
$(venv)/.made .venv-cuda/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' is not Python 3.10 or newer: name one that is," \
	    "as in 'make PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' cannot make virtual environments: install its venv module" \
	    "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
	  sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || { \
	  echo "make: the headers of '$(PYTHON)' are missing (Python.h): install them" \
	    "(Debian, Ubuntu: apt-get install python3-dev)" >&2; exit 1; }
	@for compiler in "$${CXX:-c++}" g++ clang++; do \
	  command -v $${compiler%% *} >/dev/null && exit 0; done; \
	  echo "make: there is no C++ compiler: install one (Debian, Ubuntu: apt-get install g++)" \
	    "or name it with CXX=" >&2; exit 1
	$(PYTHON) -m venv --clear $(@D)
	@touch $@

$(torch_stamp): $(venv)/.made
	@rm -f $(@D)/.torch-*
	$(py) -m pip install '$(TORCH)' $(build_tools)
	@touch $@

$(built): $(torch_stamp) $(sources)
	@echo "Compiling the extension; this takes a minute or more."
	$(py) -m pip install --quiet --no-build-isolation --editable '.[test]'
	@$(py) -c 'import pccheck_ext, torch; print("pccheck_ext is built for torch", \
	  torch.__version__, "with" if pccheck_ext.built_with_cuda else "without", "the CUDA part")'
	@touch $@

$(lint_stamp): pyproject.toml $(built)
	$(py) -m pip install --quiet $$(sed -n 's/^lint = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	@touch $@

# --- Checks --------------------------------------------------------------------------------------

lint: $(lint_stamp)
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(venv)/bin/clang-format --dry-run -Werror $(cxx_files)

types: $(lint_stamp)
	$(py) -m mypy

format: $(lint_stamp)
	$(py) -m ruff check --fix --exit-zero .
	$(py) -m ruff format .
	$(venv)/bin/clang-format -i $(cxx_files)

# ThreadSanitizer wants its part of the address space to itself: no address randomization, where
# that may be switched off.
fixed_addresses := $(shell setarch $$(uname -m) -R true 2>/dev/null && echo setarch $$(uname -m) -R)

define run_core_tests
	cmake -S . -B build/core-$(1) -G Ninja -DPCCHECK_SANITIZE=$(2)
	cmake --build build/core-$(1) --parallel $(JOBS)
	$(3) ctest --test-dir build/core-$(1) --output-on-failure --no-tests=error --parallel $(JOBS)
endef
comma := ,

test-core:
	@for tool in cmake ninja; do command -v $$tool >/dev/null || { \
	  echo "make: $$tool is not installed (Debian, Ubuntu:" \
	    "apt-get install cmake ninja-build libgtest-dev)" >&2; exit 1; }; done
	$(call run_core_tests,plain,)
	$(call run_core_tests,address,address$(comma)undefined)
	$(call run_core_tests,thread,thread,$(fixed_addresses))

# Fills a small file system, mounted in a namespace of its own.
test-disk: $(built)
	$(py) -m pytest tests/system

# Compiles, links and imports the CUDA part, which needs no GPU: in a copy, for the source folder
# holds the extension of .venv.
test-cuda:
	@if command -v nvcc >/dev/null || [ -x "$$CUDA_HOME/bin/nvcc" ] || \
	    [ -x /usr/local/cuda/bin/nvcc ]; then \
	  $(MAKE) --no-print-directory cuda-check; \
	elif [ "$$PCCHECK_NO_CUDA_CHECK" = 1 ]; then \
	  echo "The CUDA build was NOT checked: no nvcc, and PCCHECK_NO_CUDA_CHECK=1."; \
	else \
	  echo "make: no nvcc, so the CUDA build cannot be checked: install the CUDA toolkit, or" \
	    "leave the check out with PCCHECK_NO_CUDA_CHECK=1" >&2; exit 1; \
	fi

$(cuda_stamp): .venv-cuda/.made
	@rm -f $(@D)/.torch-*
	.venv-cuda/bin/python -m pip install '$(CUDA_TORCH)' $(build_tools)
	@touch $@

cuda-check: $(cuda_stamp)
	@mkdir -p $(cuda_copy)
	@cd $(cuda_copy) && rm -rf cpp cuda python pccheck_ext
	@tar -c --exclude='*.so' --exclude=pccheck-monitor --exclude=_build_info.py --exclude=__pycache__ setup.py \
	  pyproject.toml README.md LICENSE cpp cuda python pccheck_ext | tar -x -C $(cuda_copy)
	PCCHECK_CUDA=1 PCCHECK_WERROR=1 .venv-cuda/bin/python -m pip install --no-build-isolation \
	  --force-reinstall --no-deps ./$(cuda_copy)
	.venv-cuda/bin/python -m pip install --quiet numpy tqdm networkx pytest safetensors
	cd / && '$(CURDIR)/.venv-cuda/bin/python' -c 'import pccheck_ext, torch; \
	  assert pccheck_ext.built_with_cuda; \
	  print("The CUDA build compiles, links and imports: torch", torch.__version__)'
	@echo "The Python tests on that build, the oldest torch there is support for:"
	cd build && ../.venv-cuda/bin/pytest -q $(addprefix ../tests/test_,codec.py contents.py \
	  errors.py gates.py ops.py optimizer.py resume.py rng.py)

# --- Cleaning ------------------------------------------------------------------------------------

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	rm -f pccheck_ext/*.so pccheck_ext/pccheck-monitor pccheck_ext/_build_info.py $(built)
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-cuda
