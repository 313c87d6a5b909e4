# Each target is enough on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNE := $(BIN)/tune run --nproc_per_node 1

.PHONY: install base demo test test-all lint clean

install: $(VENV)/.installed  ## create .venv and install the package with its test extra

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

base: runs/tiny/base/latest/config.json  ## train the tiny base, once

runs/tiny/base/latest/config.json: | install
	$(TUNE) recipes/sft_distributed.py --config configs/tiny/base.yaml

demo: install base  ## pi-Distill against RL at equal rollouts: a table, runs/demo/results.json, runs/demo/results.png
	$(BIN)/pidistill demo

test: install  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf runs $(VENV)
