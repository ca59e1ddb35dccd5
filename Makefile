# Every target makes what it needs: on a fresh clone `make demo` or `make test` is the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(wildcard packages/*)
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench bench-check clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with every package, editable (does nothing when current)

$(STAMP): constraints.txt pyproject.toml $(PACKAGES:=/pyproject.toml) $(wildcard packages/*/setup.py)
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

BENCH := $(BIN)/python -m pytest bench -q --benchmark-enable --benchmark-only --benchmark-columns=median,rounds
RATIOS := bench/results/kernels.json

bench: install ## Measure every kernel beside what it replaces, three times; keep the ratios
	rm -f $(RATIOS)
	for run in 1 2 3; do $(BENCH) --save-ratios $(RATIOS) || exit 1; done

bench-check: install ## Fail where a kernel's ratio has become worse by more than a fifth
	$(BENCH) --check-ratios $(RATIOS)

clean: ## Remove the environment and what runs wrote
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
