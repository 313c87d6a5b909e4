"""Wrong configs, data and checkpoints as a user meets them: one sentence that says what to change, before weights are loaded."""

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from pidistill.errors import InputError
from tests.recipes.runs import (
    assert_same_tensors,
    metrics,
    recipe_module,
    run,
    save_config,
    small_config,
    weights,
)

LLAMA = "torchtune.models.llama3.llama3"
HF = "torchtune.training.FullModelHFCheckpointer"
CHAT = "pidistill.data.chat_dataset"
ASK = {"role": "user", "content": "req i1 c2 g3 1 2 3 go"}
ROW = {"messages": [ASK], "privileged_messages": "[ d2 f0 ? k3 ]"}


@pytest.fixture
def sentence(monkeypatch, capsys, tmp_path):
    """(recipe, config, command line overrides) → the sentence that a run of it ends with."""

    def run_main(name: str, cfg: DictConfig, *overrides: str) -> str:
        module = recipe_module(name)
        monkeypatch.setattr(module, "load_model", lambda *a, **k: pytest.fail("weights were loaded before the refusal"))
        path = save_config(cfg, tmp_path / "config.yaml")
        monkeypatch.setattr(sys, "argv", [module.__file__, "--config", str(path), *overrides])
        with pytest.raises(SystemExit) as exit_status:
            module.recipe_main()
        assert exit_status.value.code == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        (said,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert printed.err.splitlines()[-1] == said
        assert sum(len(line) for line in [said]) < 700
        return said.removeprefix("error: ")

    return run_main


# ------------------------------------------------------------------------------------------- configs

BY_COMMAND_LINE = [
    # a key that nothing reads, a component's argument that it does not have, or lacks
    ("opsd", ["groupsize=4"], "config key groupsize is read by nothing in this recipe; did you mean group_size?"),
    ("sft", ["batchsize=4"], "config key batchsize is read by nothing in this recipe; did you mean batch_size?"),
    ("evaluate", ["max_steps=4"], "config key max_steps is read by nothing in this recipe"),
    ("sft", ["prompts_per_round=4"], "config key prompts_per_round is read by nothing in this recipe"),
    ("opsd", ["sampler.temprature=0.7"], "sampler.temprature is not an argument of .*; did you mean temperature?"),
    ("pi_distill", ["objective.betta=1"], "objective.betta is not an argument of .*PiDistill; did you mean beta?"),
    ("opsd", ["optimizer.learning_rate=1"], "optimizer.learning_rate is not an argument of torch.optim.AdamW"),
    ("opsd", ["~sampler.max_new_tokens"], "config key sampler.max_new_tokens is missing; .*TorchtuneSampler needs it"),
    ("opsd", ["lr_scheduler._component_=torch.optim.lr_scheduler.StepLR"], "lr_scheduler.num_warmup_steps is not an argument"),
    ("opsd", ["~objective"], "config key objective is missing; this recipe needs it"),
    ("opsd", ["objective._component_=pidistill.objectives.OPDS"], "pidistill.objectives.OPDS cannot be found"),
    ("opsd", ["environment._component_=my_world.World"], "component my_world.World cannot be found .*check the dotted path"),
    # numbers
    ("pi_distill", ["objective.alpha=1.5"], r"objective.alpha=1.5 is outside \[0.0, 1.0\]"),
    ("pi_distill", ["objective.alpha=-0.1"], r"objective.alpha=-0.1 is outside \[0.0, 1.0\]"),
    ("pi_distill", ["objective.alpha={start: 0, end: 2, steps: 5}"], r"objective.alpha=2.0 is outside"),
    ("pi_distill", ["objective.beta=-1"], "objective.beta=-1.0 is outside"),
    ("opsd", ["objective.beta=-1"], "objective.beta=-1.0 is outside"),
    ("opsd", ["objective.clip_low=1.0"], r"objective.clip_low=1.0 must lie in \[0, 1\)"),
    ("rl", ["objective.clip_low=1.2"], r"objective.clip_low=1.2 must lie in \[0, 1\)"),
    ("rl", ["objective.clip_high=1.0"], "objective.clip_high=1.0 must be above 1"),
    ("pi_distill", ["objective.clip_high=0.9"], "objective.clip_high=0.9 must be above 1"),
    ("opsd", ["prompts_per_round=0"], "prompts_per_round=0 must be a whole number of at least 1"),
    ("opsd", ["group_size=2.5"], "group_size=2.5 must be a whole number of at least 1"),
    ("opsd", ["minibatch_rollouts=4"], "minibatch_rollouts=4 must be a multiple of group_size=3"),
    ("opsd", ["minibatch_rollouts=9"], "minibatch_rollouts=9 must be .* at most prompts_per_round × group_size = 6"),
    ("sft", ["batch_size=0"], "batch_size=0 must be a whole number of at least 1"),
    ("sft", ["max_steps=many"], "max_steps=many must be a whole number of at least 1"),
    ("opsd", ["max_steps=null"], "config key max_steps is missing"),
    ("opsd", ["eval_samples=0"], "eval_samples=0 must be a whole number of at least 1"),
    ("evaluate", ["eval_samples=0"], "eval_samples=0 must be a whole number of at least 1"),
    ("opsd", ["save_every_steps=-2"], "save_every_steps=-2 must be a whole number of at least 1"),
    ("opsd", ["dtype=fp12"], "dtype=fp12 is not one of .*bf16"),
    ("opsd", ["teacher._component_=pidistill.teachers.EMATeacher", "teacher.rate=0"], r"teacher.rate=0 is outside \(0, 1\]"),
    # options that train nothing, or something else
    ("pi_distill", ["objective.kl_mode=loss_k1"], "kl_mode=loss_k1 is refused: .* zero expected gradient"),
    ("opsd", ["objective.kl_mode=loss_k1"], "kl_mode=loss_k1 is refused: .* zero expected gradient"),
    ("opsd", ["objective.kl_mode=advantage_rb"], "kl_mode=advantage_rb is refused: .* zero expected gradient"),
    ("pi_distill", ["objective.student_kl=shared_reward"], "student_kl=shared_reward shares a reward"),
    ("opsd", ["objective.kl_mode=loss_bb"], "objective.kl_mode=loss_bb is unknown; choose one of"),
    ("opsd", ["sampler.temperature=0"], "sampler.temperature=0 always takes the likeliest token"),
    ("pi_distill", ["sampler.temperature=0"], "sampler.temperature=0 always takes the likeliest token"),
    ("opsd", ["objective=pidistill.objectives.PiDistill"], "PiDistill trains on what the teacher view samples, .* run pi_distill_distr"),
    ("pi_distill", ["objective={_component_: pidistill.objectives.GRPO}"], "GRPO trains on what the student view samples, .*run opsd_dist"),
    ("pi_distill", ["teacher_checkpointer={_component_: pidistill.checkpoints.from_scratch}"], "teacher_checkpointer.checkpoint_dir is missing"),
    # models, tokenizers, lengths
    ("opsd", ["model.vocab_size=80"], "tokenizer has 85 ids but the model's vocabulary is 80"),
    ("sft", ["model.vocab_size=80"], "tokenizer has 85 ids but the model's vocabulary is 80"),
    ("opsd", ["sampler.max_new_tokens=90"], r"example tiny_world train row 0: teacher prompt \(question 9 \+ privileged .* exceeds "
     "max_seq_len 96 by .*; raise `tokenizer.max_seq_len`"),
    ("sft", ["tokenizer.max_seq_len=20", "sampler.max_new_tokens=1"], r"tiny_world train row 0: prompt \(9 tokens\) plus completion"),
    # checkpoints
    ("opsd", ["resume_from_checkpoint=True"], "resume_from_checkpoint=True but .*latest holds no training_state.pt"),
    ("opsd", ["checkpointer.checkpoint_files=[model-1.safetensors]"], r"has no model-1.safetensors \(it holds config.json, model.saf"),
    ("sft", ["checkpointer.checkpoint_dir=nowhere"], "checkpoint folder nowhere does not exist; check checkpointer.checkpoint_dir"),
    ("evaluate", ["checkpointer.checkpoint_dir=runs/tiny/base/latest"], "runs/tiny/base/latest does not exist; run `make base` first"),
]  # fmt: skip
if not torch.cuda.is_available():
    BY_COMMAND_LINE.append(("opsd", ["device=cuda"], "device is cuda, which this machine does not show"))


@pytest.mark.parametrize(("name", "overrides", "expected"), BY_COMMAND_LINE, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_command_line(name, overrides, expected, sentence, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = sentence(name, small_config(name, tiny_base, tmp_path / "run"), *overrides)
    assert matches(expected, said)


def matches(expected: str, said: str) -> bool:
    import re

    assert re.search(expected, said), said
    return True
