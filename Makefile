# Each target is enough on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNE := $(BIN)/tune run --nproc_per_node 1

.PHONY: install base demo compare test test-all lint clean

install: $(VENV)/.installed  ## create .venv and install the package with its test extra

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

base: runs/tiny/base/latest/config.json  ## train the tiny base, once

runs/tiny/base/latest/config.json: | install
	$(TUNE) recipes/sft_distributed.py --config configs/tiny/base.yaml

demo: install base  ## pi-Distill against RL at equal rollouts: runs/demo/results.md and its pictures
	$(BIN)/pidistill demo

compare: install base  ## every method, its controls, three seeds: runs/sweeps/methods/results.md; goes on where it was stopped
	$(BIN)/pidistill sweep configs/sweeps/methods.yaml --workers 2

test: install  ## all tests but those marked all_processes
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

test-all: install  ## all tests, every config with two processes among them
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m ''

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf runs $(VENV)
