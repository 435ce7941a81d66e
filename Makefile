# `make demo` and `make test` work on a fresh machine with Python >= 3.10, a C++ compiler and a
# package index. TORCH chooses the torch requirement, e.g. TORCH='torch==2.10.0'.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
FORKS ?= .venv-forks
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install build demo test test-forks asan lint format bench wheel clean

help:
	@echo "make demo   train and evaluate a deformable detector on the CPU (about 15 minutes)"
	@echo "make test   run every test"
	@echo "make test-forks  run the tests of layers and detectors on the forks onedl-mm*"
	@echo "make asan   run the operator tests under AddressSanitizer"
	@echo "make lint   ruff, mypy and clang-format, as pre-commit runs them"
	@echo "make format rewrite the sources in the house style"
	@echo "make bench  time the operators beside their peers"
	@echo "make wheel  build a wheel into dist/"

# torch first: mmcv and the kernels are built against it. It brings a newer setuptools, so the
# pinned one follows. mmcv's build needs the installed torch, hence no build isolation.
$(INSTALLED): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install "setuptools>=70,<81" wheel ninja
	$(BIN)/pip install --no-build-isolation -r requirements.txt
	$(BIN)/pip install --no-build-isolation -e ".[mmdet,tools,mim,test]"
	$(BIN)/pip install --no-deps openmim==0.3.9
	touch $@

install: $(INSTALLED)

build: install
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: build
	$(BIN)/python tools/demo.py

# Threads that wait by spinning would slow each other down where cores are shared. Two processes:
# much of the suite is Python; each takes whole files, whose fixtures are costly, in their order: the
# emulated kernels, which take longest, are among the first.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

test: build
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(PARALLEL) tests

# The same detectors on the maintained forks of mmengine, mmcv and mmdet, in a second environment.
# What needs torch alone is left to `make test`.
FORK_TESTS := tests/accelerate tests/configs tests/engine tests/families tests/layers tests/models \
  tests/projects tests/tools/test_training.py tests/test_*.py

test-forks: $(FORKS)/.installed
	$(FORKS)/bin/python setup.py --quiet build_ext --inplace
	OMP_WAIT_POLICY=PASSIVE $(FORKS)/bin/python -m pytest $(PARALLEL) $(wildcard $(FORK_TESTS))

$(FORKS)/.installed: requirements-forks.txt pyproject.toml
	test -x $(FORKS)/bin/python || $(PYTHON) -m venv $(FORKS)
	$(FORKS)/bin/pip install "$(TORCH)"
	$(FORKS)/bin/pip install "setuptools>=70" wheel ninja
	$(FORKS)/bin/pip install --no-build-isolation -r requirements-forks.txt
	$(FORKS)/bin/pip install --no-build-isolation -e ".[tools,test]"
	touch $@

# The interpreter is not built with AddressSanitizer, so its runtime is loaded first; leaks of the
# interpreter itself are not ours to report.
ASAN_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0

asan: build
	MMDEFORM_SANITIZE=1 MMDEFORM_CUDA=0 $(BIN)/python setup.py --quiet build_ext --build-lib build/asan
	$(ASAN_ENV) MMDEFORM_CPU_LIBRARY=build/asan/mmdeform/_C_cpu.so MMDEFORM_REQUIRE_EXT=1 \
	  $(BIN)/python -m pytest tests/ops -m "not large and not cuda"
	$(ASAN_ENV) MMDEFORM_CPU_LIBRARY="$$($(BIN)/python tests/cuda_emulation/build.py --sanitize)" \
	  MMDEFORM_REQUIRE_EXT=1 \
	  $(BIN)/python -m pytest tests/ops -m "emulated and not cuda" -k "not gradcheck"

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | xargs $(BIN)/clang-format -i

$(VENV)/.linters: $(INSTALLED)
	$(BIN)/pip install -e ".[dev]" --no-build-isolation
	touch $@

bench: build
	$(BIN)/python tools/benchmark_ops.py --device cpu

# Without what an earlier build left behind: files that are gone would go into the wheel.
wheel: build
	rm -rf build/lib*
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist mmdeform/*.so tests/cuda_emulation/build
