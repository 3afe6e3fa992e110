# Two commands do everything on a fresh machine with Python and git: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
WORKERS ?= auto
PYTEST_DATA := $(if $(DATA),--data=$(DATA),)

.PHONY: demo test test-slow check format pages site wheel clean

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

check: $(VENV)/.installed  ## lint, types, the lists of large files and functions, and how dense the code is
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/helpers/house.py
	$(BIN)/python tests/helpers/density.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(VENV)/.installed  ## the pages that are made from the code: command line, recipes, gates, tutorial
	for page in command_line recipes gates tutorial; do $(BIN)/python docs/generate/$$page.py || exit 1; done

site: $(VENV)/.installed  ## the documentation as a web site in site/; a broken link stops it
	$(BIN)/zensical build --clean --strict

wheel: $(VENV)/.installed  ## source distribution and wheel in dist/
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) out build dist site .pytest_cache .mypy_cache .ruff_cache
