# `make demo` and `make test` need nothing but Python 3.11 or newer: they set up their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready

.PHONY: demo test nightly matrix lint format types wheel clean

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loopq_compile needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/loopq-compile demo --out demo-output

# One thread per worker: two workers with a thread each are faster here than one with two, and leave results the same.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not nightly" tests

# Tests that take long, property-based tests with 1,000 random cases each, and all combinations; takes hours.
nightly: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m nightly tests
	OMP_NUM_THREADS=1 LOOPQ_CASES=1000 $(BIN)/python -m pytest -q -n 2 --dist load tests/storage/test_artifact.py \
		tests/capture/test_random.py tests/test_robustness.py tests/backends/triton/test_ahead.py tests/test_simulated.py

# A quick part of the tests with the oldest and the newest releases of PyTorch and transformers; downloads gigabytes.
matrix:
	$(PYTHON) -m tests.matrix

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow the mapping of passes/ and backends/ into the package: check the package as it is installed.
types: $(READY)
	rm -rf $(VENV)/types
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/types .
	cd $(VENV)/types && $(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p loopq_compile

wheel: $(READY)
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .ruff_cache .mypy_cache
