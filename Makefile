# Every target makes what it needs: on a fresh clone `make demo` or `make test` is the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(wildcard packages/*)
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with every package, editable (does nothing when current)

$(STAMP): constraints.txt pyproject.toml $(PACKAGES:=/pyproject.toml)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt pip
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --group dev $(addprefix -e ,$(PACKAGES))
	@touch $@

demo: install ## Train on real digits, sample, score, report (minutes on 2 cores)
	$(BIN)/cdm-run --plugin cdm train --steps 1600 --out runs/digits
	$(BIN)/cdm-run sample runs/digits --num 100
	$(BIN)/cdm-run report runs/digits

test: install ## Run every test
	$(BIN)/python -m pytest

lint: install ## Style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: install ## Rewrite to the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: install ## Measure the kernels side by side with their references
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only

clean: ## Remove the environment and what runs wrote
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
