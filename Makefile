# `make demo` and `make test` set up everything in .venv. Only Python and make must be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread for each test; pytest-xdist runs files side by side.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1 \
  $(BIN)/python -m pytest -q

.PHONY: help demo quick test parity lint types audit docs wheel clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Draw a picture with the built-in model, offline.
	$(BIN)/mlxdiff generate "a small red circle left of a large blue square on a yellow background" \
	  --seed 0 --guidance 4 --steps 12 --output outputs/demo.png --force
	@echo "Now type: . $(BIN)/activate; then mlxdiff --help"

quick: $(STAMP)  ## Run the unit tests, less than a minute.
	$(PYTEST) --quick -n auto --maxprocesses 4

test: $(STAMP)  ## Run the whole test suite; needs no torch.
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile

parity: $(STAMP)  ## Compare with an installed diffusers (installs torch: large).
	$(BIN)/python -m pip install -q -e '.[dev,parity]'
	$(BIN)/python -m pytest -q -m parity

lint: $(STAMP)  ## Check style and format.
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Type checkers cannot follow package-dir mappings, so they look at an installed copy.
types: $(STAMP)  ## Check types with mypy's strict settings.
	rm -rf build && $(BIN)/python -m pip install -q --no-deps --target build/typed .
	$(BIN)/mypy build/typed/mlxdiff

audit: $(STAMP)  ## Look for known holes in the dependencies (asks PyPI).
	.ci/audit

docs: $(STAMP)  ## Build the site into site/, which opens from the disk.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/site/check_links.py site

wheel: $(STAMP)  ## Build the wheel and the source distribution.
	$(BIN)/python -m build

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mlxdiff needs Python 3.10 or newer; run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e '.[dev]'
	@# It pins a Pillow with known holes and asks for tkinter; its reader needs piexif alone.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q --no-deps sd-prompt-reader==1.3.5
	@touch $(STAMP)

clean:  ## Remove everything that make and the tools made.
	rm -rf $(VENV) build dist outputs site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
