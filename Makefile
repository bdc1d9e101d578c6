# asd. `make demo` and `make test` need Python 3.11 or later and nothing else; `make models` needs a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_EXTRAS := stage,policy,gateway
DEV_EXTRAS := stage,policy,gateway,policy-train,bench,docs,dev
INSTALLED_BY := pyproject.toml $(addprefix clients/python/,pyproject.toml hatch_build.py) $(wildcard protos/asd/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help install demo up test fuzz mutants faults drains images e2e lint chart-checks docs format bench bench-escalation bench-policy experiments models policy clean

help: ## Say what there is to make
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(VENV)/.run ## Install what running a cascade needs, into .venv
	@$(BIN)/asd models prepare

demo: install ## Start a cascade, ask it 60 prompts, compare with always asking the largest stage
	@$(BIN)/asd demo

up: install ## Start the cascade and stay
	@$(BIN)/asd up

test: $(VENV)/.dev ## Run the tests
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

fuzz: $(VENV)/.dev ## Damage files and messages for ASD_FUZZ_SECONDS each (60); ASD_FUZZ_SEED repeats a run
	$(BIN)/python -m tests.fuzz

mutants: $(VENV)/.dev ## Say how many of 200 random mutants of the router's loop the tests kill (hours, resumable)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "cosmic-ray>=8.7,<9"
	$(BIN)/python -m tests.mutants

faults: $(VENV)/.dev ## Say which of thirty faults of the router's loop the tests catch (an hour, resumable)
	$(BIN)/python -m tests.mutants.faults

drains: $(VENV)/.dev ## Test at length that processes which end and return lose no request (minutes)
	TEST_DRAINS=whole $(BIN)/pytest tests/integration/local/test_disruption.py

images: $(VENV)/.dev ## Build the Dockerfile's CPU targets and start each (Linux, root, buildah, debootstrap)
	$(BIN)/python -m tools.images
	$(BIN)/pytest tests/cluster/test_images.py

e2e: $(VENV)/.dev ## Test a release on a real cluster: KUBECONFIG's, or a node of its own (Linux, root, Go)
	$(BIN)/pytest tests/cluster

lint: $(VENV)/.dev ## Check style, types, imports, the contract and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against tools/protocheck/released.txtpb
	$(BIN)/hadolint Dockerfile tools/node/Dockerfile

chart-checks: $(VENV)/.dev ## Check the chart's objects with checkov, installed in build/checkov
	$(BIN)/python -m tests.chart.checks

docs: $(VENV)/.dev ## Build the documentation into build/site; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev ## Format the Python code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure services and cascade; writes benchmarks/results/service.json
	$(BIN)/asd models prepare
	$(BIN)/python -m benchmarks.service

bench-escalation: $(VENV)/.dev ## Measure verification of drafts; writes benchmarks/results/escalation.json and plots
	$(BIN)/asd models prepare
	$(BIN)/python -m benchmarks.escalation

models: ## Train the embedded family anew (a GPU; torch of the `train` extra)
	$(PYTHON) -m models.train --out build/models

policy: build/policy.zip ## Fit the policy anew to outcomes of the embedded family (hours on CPUs, resumable)

build/policy.zip: build/outcomes/train.parquet build/outcomes/calibration.parquet
	$(BIN)/asd-policy fit $^ --output $@

# As many as the shipped policy was made from; `python -m models.train outcomes` makes the same on a GPU in minutes.
build/outcomes/train.parquet: ROWS := --split train --prompts 100000 --conversations 20000
build/outcomes/calibration.parquet: ROWS := --split calibration --prompts 25000 --conversations 5000
build/outcomes/evaluation.parquet: ROWS := --split evaluation --prompts 27384
build/outcomes/conversations.parquet: ROWS := --split evaluation --prompts 0 --conversations 5000
build/outcomes/%.parquet: | $(VENV)/.dev
	$(BIN)/asd models prepare
	$(BIN)/python -m benchmarks.outcomes $@ $(ROWS)

experiments: build/outcomes/evaluation.parquet ## Reproduce the grid of 69 experiments; writes docs/results/experiments
	$(BIN)/python -m benchmarks.experiments --outcomes $< --out docs/results/experiments

bench-policy: $(addprefix build/outcomes/,$(addsuffix .parquet,train calibration evaluation conversations)) ## Measure the policy; writes benchmarks/results/policy.json
	$(BIN)/python -m benchmarks.policy --outcomes build/outcomes

clean: ## Remove what was built and installed
	rm -rf $(VENV) build dist clients/python/asd/v1 .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "asd needs Python 3.11 or later; say which one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python cannot make environments: install python3-venv" >&2; exit 1; }

# Until 0.1.0 stubs were compiled into asd/ at the top, which would hide the client, and the project's name was asd.
PIP_INSTALL = rm -rf asd/v1 && { [ ! -d asd ] || rmdir asd 2>/dev/null || true; } && $(BIN)/python -m pip --quiet --disable-pip-version-check uninstall --yes asd 2>/dev/null && \
  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable clients/python --editable

$(VENV)/.run: $(BIN)/python $(INSTALLED_BY)
	@echo "installing into $(VENV)"
	@$(PIP_INSTALL) ".[$(RUN_EXTRAS)]"
	@touch $@

$(VENV)/.dev: $(BIN)/python $(INSTALLED_BY)
	@echo "installing into $(VENV)"
	@$(PIP_INSTALL) ".[$(DEV_EXTRAS)]"
	@touch $@ $(VENV)/.run
