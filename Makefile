# Two commands set up a clean machine: `make train` and `make test`.
PYTHON ?= python3
PIP_FLAGS ?= --quiet --disable-pip-version-check
BIN := .venv/bin

.PHONY: help train test slow extras lint types format check coverage notebook lock
.DEFAULT_GOAL := help
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/installed: pyproject.toml locks/build.txt locks/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is missing or older than Python 3.11: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into .venv: about 3 GB to fetch, 7 GB on the disk, a few minutes"
	@$(PYTHON) -m venv .venv
	@$(PYTHON) locks/install.py $(BIN)/python locks/build.txt
	@$(PYTHON) locks/install.py $(BIN)/python locks/dev.txt
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $@
	@echo "installed. Once in each shell: source .venv/bin/activate"

train: .venv/installed  ## install, then train a LoRA on the embedded demo
	@$(BIN)/python train.py model=demo data=demo $(ARGS)

test: .venv/installed  ## install, then run the tests (no network, no GPU)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

slow: .venv/installed  ## run the slow tests, end-to-end ones included (12 GB of free memory)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

extras: .venv/installed  ## install every optional package but those for clusters
	@$(PYTHON) locks/install.py $(BIN)/python locks/extras.txt

lint: .venv/installed  ## check style and formatting with ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/installed  ## check types with mypy
	@$(BIN)/mypy $(ARGS)

format: .venv/installed  ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

check: lint types test  ## everything a pull request must pass

coverage: .venv/installed  ## run the tests in one process and list uncovered lines
	@HF_HUB_OFFLINE=1 $(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report --skip-covered --show-missing

notebook: .venv/installed  ## write the notebook again from its Python file
	@$(BIN)/jupytext --quiet --update --to ipynb notebooks/ghibli_lora.py

LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
	--custom-compile-command "make lock" pyproject.toml
EXTRAS = dev app bitsandbytes browser heif hub joblib lycoris notebook prodigy schedulefree search tensorboard trackio

lock:  ## pin every package with its hashes again, after a change of pyproject.toml or constraints.txt
	@$(LOCK) -c constraints.txt $(EXTRAS:%=--extra %) -o locks/extras.txt
	@$(LOCK) -c locks/extras.txt --extra dev -o locks/dev.txt
	@echo setuptools | $(LOCK:pyproject.toml=-) -c locks/dev.txt -o locks/build.txt
