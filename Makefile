# `make` lists what there is. PYTHON chooses the interpreter (3.11 or newer), VENV the virtual environment,
# WORKERS how many processes share the tests: they wait more than they compute.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
# schemathesis gives the tests of all operations one ID, and pytest-xdist runs an ID once.
ALONE := tests/compat/test_openapi.py
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv run demo stack stack-down stack-status test lint check chaos bench format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.run ## Make the virtual environment and install fnqueue in it

run: $(VENV)/.run ## Start fnqueue in one process, with a sample function, on nothing but Python
	$(PY) -P -m fnqueue dev

demo: $(VENV)/.ocr ## Register, deploy and invoke a text recognition function on a picture
	$(PY) examples/demo.py

stack: $(VENV)/.run ## Start the production shape: RabbitMQ, Redis, S3, api and controller; ENGINE=podman: with containers
	ENGINE=$(ENGINE) $(PY) -m infra.local.stack up

stack-down: $(VENV)/.run ## Stop the stack; its data stays in .fnqueue/stack
	$(PY) -m infra.local.stack down

stack-status: $(VENV)/.run ## Show what runs of the stack
	$(PY) -m infra.local.stack status

lint: $(VENV)/.dev ## Format, lint, types, import contracts
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

check: lint ## The same, and the tests that need no server
	$(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m "not servers" tests/unit tests/contract tests/simulation

test: $(VENV)/.dev ## All tests, against real servers (installed if missing: needs root, or says what to install)
	$(PY) -m infra.local.servers ensure-all
	$(PY) -m pytest $(ALONE)
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --ignore $(ALONE)

chaos: $(VENV)/.dev ## Strike at everything at random and check the promises: N=10000 KILLS=50 SEED=7
	$(PY) -m infra.local.servers ensure
	$(PY) -m tests.faults.chaos --requests $(or $(N),10000) --kills $(or $(KILLS),50) --seed $(or $(SEED),0)

bench: $(VENV)/.dev ## Measure, as a ratio to a floor measured in the same run
	$(PY) -m infra.local.servers ensure
	$(PY) -m benchmarks

format: $(VENV)/.dev ## Format the code and apply the safe fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## Remove caches, builds and the virtual environment; data in .fnqueue stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: what is installed is newer than what asks for it.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fnqueue needs Python 3.11 or newer, not $$($(PYTHON) -V 2>&1); choose one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.run $@

$(VENV)/.ocr: $(VENV)/.run examples/ocr/requirements.txt
	$(PIP) -r examples/ocr/requirements.txt
	@touch $@
