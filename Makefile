# `make demo` and `make test` set up all they need in .venv; nothing else has to be installed but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test parity lint types wheel clean

demo: $(STAMP)  ## Draw a picture with the built-in model, offline.
	$(BIN)/mlxdiff generate "a small red circle left of a large blue square on a yellow background" \
	  --seed 0 --guidance 4 --steps 12 --output outputs/demo.png --force

# Files side by side, each test on one thread: twice as fast as one after the other on all of them.
test: $(STAMP)  ## The whole test suite; needs no torch.
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1 \
	  $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

parity: $(STAMP)  ## The comparisons with an installed diffusers (installs torch: large).
	$(BIN)/python -m pip install -q -e '.[dev,parity]'
	$(BIN)/python -m pytest -q -m parity

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Type checkers cannot follow package-dir mappings, so they look at an installed copy.
types: $(STAMP)
	rm -rf build/typed && $(BIN)/python -m pip install -q --no-deps --target build/typed .
	$(BIN)/mypy build/typed/mlxdiff

wheel: $(STAMP)
	$(BIN)/python -m build

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mlxdiff needs Python 3.10 or newer; run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist outputs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
