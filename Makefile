# Every target sets up what it needs: `make train` in a fresh clone is enough.

VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip --disable-pip-version-check
SHELL  := /bin/bash
ARGS   ?=

# The environment is current when a stamp of this very folder, pyproject.toml and constraints.txt is in it.
STAMP := $(VENV)/.installed-$(firstword $(shell (pwd; cat pyproject.toml constraints.txt) | cksum))

.DEFAULT_GOAL := help
.PHONY: help env train test test-all check format audit clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  ARGS=\"...\" reaches the command of train, test and test-all: make train ARGS=\"seed=1\""

env: $(STAMP)  ## make .venv and install the project in it (once)
	@:

train: env  ## run the main job as configured in configs/
	@$(PYTHON) -m unimrg.train $(ARGS)

test: env  ## run the fast tests
	@$(PYTHON) -m pytest $(ARGS)

test-all: env  ## run every test, the slow ones too; those of the GPU where there is one
	@$(PYTHON) -m pytest -m "" $(ARGS)

check: env  ## look at formatting, lint and types; changes nothing
	@status=0; \
	$(PYTHON) -m ruff format --quiet --check --output-format concise . || { echo "mended by: make format"; status=1; }; \
	$(PYTHON) -m ruff check --quiet --output-format concise . || status=1; \
	$(PYTHON) -m mypy || status=1; \
	exit $$status

format: env  ## format the code and mend what lint can mend
	@$(PYTHON) -m ruff check --quiet --fix-only .
	@$(PYTHON) -m ruff format --quiet .

audit: env  ## look for known holes in what constraints.txt pins; asks the OSV database
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit; }
	@build/audit/bin/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip --requirement constraints.txt

clean:  ## remove the environment, caches and builds; outputs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find unimrg cluster tune tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that nothing after it can bring another build; the constraints hold the rest.
$(STAMP): | $(PYTHON)
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP) install --quiet --constraint constraints.txt torch
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@rm -f $(VENV)/.installed-* && touch $@

# A Python that runs and for which every dependency has wheels, not the newest that has a name: version managers leave names that don't run.
$(PYTHON):
	@for python in python3.12 python3.11 python3.13 python3 python3.14; do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "unimrg needs Python 3.11 or newer (with its venv module): none of python3.11 ... python3 runs here" >&2; \
	exit 1
