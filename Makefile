# `make` lists what there is. PYTHON chooses the interpreter (3.11 or newer), VENV the virtual environment,
# WORKERS how many processes share the tests: they wait more than they compute.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
# schemathesis gives the tests of all operations one ID, and pytest-xdist runs an ID once. Chromium drops every
# connection, to this machine too, when a network interface comes or goes, as with each container of another test.
ALONE := tests/compat/test_openapi.py tests/browser tests/e2e/test_dashboard.py
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Nothing but what requirements/ names, byte for byte; then fnqueue itself.
LOCKED := $(PIP) --require-hashes -r
SELF := $(PIP) --no-deps -e .
TOOLS ?= .venv-tools
COMPILE := $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" $(UPGRADE)

.DEFAULT_GOAL := help
.PHONY: help venv run demo stack stack-down stack-status stack-doctor test lint check docs chaos fuzz bench format lock audit sbom \
	image release clean

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

stack-doctor: $(VENV)/.run ## Look at the servers of the stack, and say what is wrong with them
	$(PY) -m infra.local.stack doctor

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
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(addprefix --ignore=,$(ALONE))

docs: $(VENV)/.docs ## Write the pages that are made from code, and the site into build/site; a broken link is an error
	$(PY) -m infra.docs
	$(PY) -m sphinx -qEaW --keep-going -b html -c docs -d build/doctrees . build/site

chaos: $(VENV)/.dev ## Strike at everything at random and check the promises: N=10000 KILLS=50 SEED=7 (0: a random one)
	$(PY) -m infra.local.servers ensure
	$(PY) -m tests.faults.chaos --requests $(or $(N),10000) --kills $(or $(KILLS),50) --seed $(or $(SEED),7)

fuzz: $(VENV)/.dev ## Send what nobody should, for longer and otherwise than the tests do: SECONDS=300 SEED=7
	$(PY) -m infra.local.servers ensure
	$(PY) -m tests.fuzz --seconds $(or $(SECONDS),300) --seed $(or $(SEED),0)

bench: $(VENV)/.dev ## Measure, as a ratio to a floor measured in the same run
	$(PY) -m infra.local.servers ensure
	$(PY) -m benchmarks

format: $(VENV)/.dev ## Format the code and apply the safe fixes
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

lock: $(TOOLS)/.made ## Write requirements/*.txt anew after pyproject.toml changed; UPGRADE=--upgrade takes what is newest
	$(COMPILE) pyproject.toml --extra grpc --extra tracing -o requirements/run.txt
	$(COMPILE) pyproject.toml --extra grpc --extra tracing --extra ocr -c requirements/run.txt -o requirements/ocr.txt
	$(COMPILE) pyproject.toml --extra grpc --extra tracing --extra ocr --extra dev -c requirements/ocr.txt -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra grpc --extra tracing --extra docs -c requirements/dev.txt -o requirements/docs.txt
	$(COMPILE) requirements/build.in -o requirements/build.txt
	$(COMPILE) requirements/tools.in -o requirements/tools.txt

image: $(VENV)/.run ## Build the container image where no registry can be reached, and try it: needs root, takes minutes
	$(PY) -m infra.image

audit: $(TOOLS)/.made ## Compare what is installed for production with PyPI's list of known vulnerabilities
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r requirements/ocr.txt

release: $(TOOLS)/.made ## Build wheel and sdist into dist/ and check what is in them; uploads nothing
	$(PY) -m infra.release $(TOOLS)/bin/python

sbom: $(TOOLS)/.made ## Write build/sbom.json (CycloneDX): what production is made of, with the hashes
	@mkdir -p build
	$(TOOLS)/bin/cyclonedx-py requirements requirements/run.txt --output-format JSON --output-file build/sbom.json

clean: ## Remove caches, builds and the virtual environment; data in .fnqueue stays
	rm -rf $(VENV) $(TOOLS) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: what is installed is newer than what asks for it.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fnqueue needs Python 3.11 or newer, not $$($(PYTHON) -V 2>&1); choose one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml requirements/run.txt
	$(LOCKED) requirements/run.txt
	$(SELF)
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml requirements/dev.txt
	$(LOCKED) requirements/dev.txt
	$(SELF)
	@touch $(VENV)/.run $@

$(VENV)/.ocr: $(VENV)/.run requirements/ocr.txt
	$(LOCKED) requirements/ocr.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.run requirements/docs.txt
	$(LOCKED) requirements/docs.txt
	@touch $@

$(TOOLS)/.made: $(VENV)/.made requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	@touch $@
