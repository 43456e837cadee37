# Two commands set everything up on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
PIP_FLAGS ?= --quiet --disable-pip-version-check
BIN := .venv/bin

.PHONY: help train test lint
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes, 6 to 7 GB) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[dev]" -c constraints.txt
	@touch $@

train: .venv/installed  ## install, then train a LoRA on the embedded demo
	@$(BIN)/python train.py model=demo data=demo $(ARGS)

test: .venv/installed  ## install, then run the tests (no network, no GPU)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/installed  ## ruff over everything
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
