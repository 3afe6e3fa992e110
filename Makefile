# Two commands do everything on a fresh machine with Python and git: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
WORKERS ?= auto
PYTEST_DATA := $(if $(DATA),--data=$(DATA),)

.PHONY: demo test test-slow check format help-pages clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## the main job on data that needs no download: two small nets, a promise, a report
	$(BIN)/offramp demo --output out/demo

test: $(VENV)/.installed  ## the fast tests, a process for each core (WORKERS=0: one); DATA=DIR adds those on real data
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_DATA)

test-slow: $(VENV)/.installed  ## slow and browser tests
	$(BIN)/python -m pytest -m 'slow or browser' $(PYTEST_DATA)

check: $(VENV)/.installed  ## lint, types, and the lists of large files and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/helpers/house.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

help-pages: $(VENV)/.installed  ## docs/help.md and docs/recipes.md, from the code itself
	$(BIN)/python docs/help.py && $(BIN)/python docs/recipes.py

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache
