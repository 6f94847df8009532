# make serve | test | test-lowest | lint | format | docs | lock | audit | bench | fuzz | fuzz-million | soak | soak-streams | adapters. Needs Python 3.11 or newer and make; everything else goes into .venv (and .venv-lowest).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# The first of these that runs and is new enough creates .venv; or say which: make serve PYTHON=/path/to/python3.12
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# One worker per core up to two: every worker may load the model, and the services that it starts load theirs. Three took
# 23 GB. The engine's own threads are held down to match.
WORKERS ?= 2

.PHONY: serve test test-lowest lint format docs lock audit bench fuzz fuzz-million soak soak-streams adapters help
help:
	@head -1 Makefile | cut -c3-

# The stamps depend on pyproject.toml alone, so that a second start runs no pip and needs no network.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Creating $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV) && exit 0; \
	        rm -rf $(VENV); echo "$$python cannot create $(VENV): is its venv module installed?"; exit 1; \
	    fi; \
	done; \
	echo "Python 3.11 or newer is needed; if it is not on the PATH: make serve PYTHON=/path/to/python3.12"; exit 1

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing loraplex and its dependencies into $(VENV) (once; torch is the large one)"
	@$(PIP) -e '.[server]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing loraplex with its test and lint tools into $(VENV)"
	@$(PIP) -e '.[test,lint]'
	@touch $@ $(VENV)/.installed

serve: $(VENV)/.installed
	@exec $(BIN)/python -m service serve --examples $(ARGS)

# The suite starts Python hundreds of times: without the bytecode of a first time each compiles up to a hundred files.
test: $(VENV)/.installed-dev
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup \
	    --cov --cov-report=term:skip-covered --durations=10 $(ARGS)

# The same tests with the oldest releases that pyproject.toml allows of what the server needs, in .venv-lowest; torch is
# the one of .venv, as the oldest has other builds.
test-lowest: $(VENV)/.installed-dev
	@$(BIN)/python -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --disable-pip-version-check -q uv
	@.venv-lowest/bin/uv pip compile -q pyproject.toml --extra server --resolution lowest-direct --no-emit-package torch \
	    --no-emit-package triton --only-binary :all: --no-annotate --no-header -o .venv-lowest/lowest.txt
	@sed -i -E '/^(nvidia|cuda)-/d' .venv-lowest/lowest.txt  # what the oldest torch needs
	@$(BIN)/python -m pip freeze | grep '^torch==' >> .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --disable-pip-version-check -q -c .venv-lowest/lowest.txt -e '.[test]'
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-lowest/bin/python -m pytest -n $(WORKERS) \
	    --dist loadgroup $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in site/.
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks $(ARGS)

# Hostile inputs by the ten thousand: FUZZ times as many as in `make test`, from FUZZ_SEED; the counts are printed.
# Only the API with a tenant's key and the admin's, some 20,000 requests: make fuzz FUZZ=32 ARGS='-k with_keys'.
FUZZ ?= 50
FUZZ_SEED ?= 1
fuzz: $(VENV)/.installed-dev
	@FUZZ=$(FUZZ) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -q -s --timeout 0 tests/adapters/test_fuzz.py \
	    tests/service/test_openapi_fuzz.py $(ARGS)

# A million mutations of real adapter files against the parsers, from FUZZ_SEED; the counts are printed, and a crash fails it.
fuzz-million: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.adapters.fuzz_parsers --inputs 1000000 --seed $(FUZZ_SEED) $(ARGS)

# Kills processes of the service under traffic for SOAK_MINUTES (60): nothing acknowledged may be lost.
soak: $(VENV)/.installed-dev
	@SOAK_MINUTES=$${SOAK_MINUTES:-60} $(BIN)/python -m tests.crash.soak $(ARGS)

# 2,000 open streams over one service for SOAK_MINUTES (30): none may be lost, and memory has to stay flat.
soak-streams: $(VENV)/.installed-dev
	@$(BIN)/python -m benchmarks.load --streams 2000 --minutes $${SOAK_MINUTES:-30} --tokens 120 --step-s 1 $(ARGS)

# Trains the example adapters again (minutes on a CPU).
adapters: $(VENV)/.installed-dev
	$(BIN)/python examples/train_adapters.py $(ARGS)

# The images' dependencies with their hashes, requirements/*.txt: for Python 3.11 on x86-64, the Debian 12 that the images stand
# on. What is locked stays as it is unless pyproject.toml forbids it; newer versions: make lock ARGS=--upgrade. PyPI's torch is the
# one for CUDA; the CPU build comes from PyTorch's own index, or from a folder: make lock TORCH_CPU='--find-links FOLDER'.
TORCH_CPU ?= --torch-backend cpu
COMPILE = $(BIN)/uv pip compile --no-config --quiet --generate-hashes --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock' $(ARGS)
lock: $(VENV)/.installed-dev
	$(COMPILE) requirements/build.in -o requirements/build.txt
	$(COMPILE) pyproject.toml --extra server --extra traces requirements/image.in -o requirements/cuda.txt
	sed -n 's/^torch==\([0-9.]*\).*/torch==\1+cpu/p' requirements/cuda.txt | $(COMPILE) $(TORCH_CPU) \
	    pyproject.toml --extra server --extra traces requirements/image.in - -c requirements/cuda.txt -o requirements/cpu.txt

# Known vulnerabilities of what is locked. Needs PyPI's vulnerability service, which a mirror of the index may lack: then it says
# that nothing was audited. AUDIT=strict makes that a failure.
audit: $(VENV)/.installed-dev
	@AUDIT=$(AUDIT) $(BIN)/python requirements/audit.py requirements/cuda.txt
