# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer, make, and a package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PINNED := constraints.txt
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what is imported; all of torch and transformers takes pip a minute.
INSTALL := $(PIP) install --quiet --no-compile
# Where Python is told to keep nothing of that, each of the hundreds of processes of the tests would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-oldest test-slow pytest lint trust bench clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint pytest

# Each of the two workers has a core; threads of torch in both would wait for each other.
pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# With the oldest releases that pyproject.toml allows, in an environment of their own: gigabytes.
test-oldest:
	$(MAKE) pytest VENV=.venv-oldest PINNED=constraints-oldest.txt

# The rest of the tests: every family, spelling and architecture in every form. It takes half an hour.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Hostile files in full, then random graphs, damaged files and kills, then mutants of the core, for BUDGET seconds each.
BUDGET ?= 7200
trust: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu" tests/test_attacks.py tests/test_pt2_attacks.py tests/test_near_misses.py \
	  tests/test_large_models.py
	$(BIN)/python -m tests.fuzz all --budget $(BUDGET) --json build/trust.json
	$(BIN)/python -m tests.mutation --jobs 2 --budget $(BUDGET)

bench: $(STAMP)
	$(INSTALL) -c $(PINNED) -e ".[bench]"
	$(BIN)/python -m tests.bench.peers
	$(BIN)/python -m tests.bench.pretrained
	$(BIN)/python -m tests.bench.speed --peers
	$(BIN)/python -m tests.bench.latency
	$(BIN)/python -m tests.bench.latency --pretrained build/wheels
	$(BIN)/python -m tests.bench.ort_ops
	$(BIN)/python -m tests.bench.models
	$(BIN)/python -m tests.bench.kernels

clean:
	rm -rf $(VENV) build dist normfuse.egg-info .pytest_cache .ruff_cache .mypy_cache

# ONNX Runtime: the GPU build where there is a wheel of it (it runs on the CPU too), else the CPU build.
# The last three are there for the models they hold, which any Python reads; --no-deps, or they bring a second ONNX Runtime.
$(STAMP): pyproject.toml $(PINNED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "NormFuse needs Python 3.11 or newer, and '$(PYTHON)' is not: try 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(INSTALL) -c $(PINNED) -e ".[test,transformers]"
	$(INSTALL) -c $(PINNED) onnxruntime-gpu || $(INSTALL) -c $(PINNED) onnxruntime
	$(INSTALL) -c $(PINNED) --no-deps --ignore-requires-python rapidocr-onnxruntime
	$(INSTALL) -c $(PINNED) --no-deps --only-binary :all: magika pipecat-ai || \
	  echo "without magika and pipecat-ai, whose models tests/test_pretrained.py reads" >&2
	@touch $@
