"""Test wrong configs, data and checkpoints: one sentence says what to change, before any weights are loaded."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from pidistill.data import epoch_order
from pidistill.errors import InputError
from pidistill.rollouts import DROP_REASONS
from tests.support.runs import (
    EVALUATION,
    MODEL,
    RECIPES,
    ROWS,
    assert_same_tensors,
    metrics,
    recipe_module,
    run,
    save_config,
    small_config,
    training_state,
    weights,
)

LLAMA = "torchtune.models.llama3.llama3"
HF = "torchtune.training.FullModelHFCheckpointer"
CHAT = "pidistill.data.chat_dataset"
ASK = {"role": "user", "content": "req i1 c2 g3 1 2 3 go"}
SIZES = {
    "vocab_size": 85,
    "num_heads": 4,
    "num_kv_heads": 4,
    "max_seq_len": 96,
    **{key.partition(".")[2]: value for key, value in MODEL.items()},
}
ROW = {"messages": [ASK], "privileged_messages": "[ d2 f0 ? k3 ]"}


@pytest.fixture
def sentence(monkeypatch, capsys, tmp_path):
    """(recipe, config, command line overrides) → the sentence that a run of it ends with."""

    def run_main(name: str, cfg: DictConfig, *overrides: str) -> str:
        module = recipe_module(name)
        loads = vars(module).keys() & {"load_model", "load_initial"}
        assert loads
        for load in loads:
            monkeypatch.setattr(module, load, lambda *a, **k: pytest.fail("weights were loaded before the refusal"))
        path = save_config(cfg, tmp_path / "config.yaml")
        monkeypatch.setattr(sys, "argv", [module.__file__, "--config", str(path), *overrides])
        with pytest.raises(SystemExit) as exit_status:
            module.recipe_main()
        assert exit_status.value.code == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        (said,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert printed.err.splitlines()[-1] == said
        assert len(said) < 700
        return said.removeprefix("error: ")

    return run_main


# ------------------------------------------------------------------------------------------- configs

ONE_CYCLE = ["lr_scheduler._component_=torch.optim.lr_scheduler.OneCycleLR", "lr_scheduler.max_lr=0.001"]
ADAPTED_HEAD = [
    "model._component_=torchtune.models.llama3.lora_llama3",
    "model.lora_attn_modules=[q_proj]",
    "model.lora_rank=2",
    "model.lora_alpha=4",
    "model.apply_lora_to_output=True",
]
BY_COMMAND_LINE = [
    # a key that nothing reads, a component's argument that it does not have, or lacks
    ("opsd", ["groupsize=4"], "config key groupsize is not read by this recipe; did you mean group_size?"),
    ("sft", ["batchsize=4"], "config key batchsize is not read by this recipe; did you mean batch_size?"),
    ("evaluate", ["max_steps=4"], "config key max_steps is not read by this recipe"),
    ("sft", ["prompts_per_round=4"], "config key prompts_per_round is not read by this recipe"),
    # keys of torchtune's recipes
    ("opsd", ["gradient_accumulation_steps=4"], "gradient_accumulation_steps is not read by this recipe; micro_batch_tokens"),
    ("sft", ["epochs=1"], "config key epochs is not read by this recipe; max_steps is the length of a run"),
    ("opsd", ["max_steps_per_epoch=1"], "max_steps_per_epoch is not read by this recipe; max_steps is the length of a run"),
    ("opsd", ["log_every_n_steps=1"], "log_every_n_steps is not read by this recipe; every step is logged"),
    ("sft", ["optimizer_in_bwd=True"], "optimizer_in_bwd is not read .*fsdp_cpu_offload and .*torchao.optim.AdamW8bit"),
    ("pi_distill", ["profiler.enabled=True"], "profiler is not read by this recipe; it is not available"),
    ("opsd", ["batch_size=8"], "batch_size is not read by this recipe; one step trains on prompts_per_round × group_size"),
    ("opsd", ["sampler.temprature=0.7"], "sampler.temprature is not an argument of .*; did you mean temperature?"),
    ("pi_distill", ["objective.betta=1"], "objective.betta is not an argument of .*PiDistill; did you mean beta?"),
    ("opsd", ["optimizer.learning_rate=1"], "optimizer.learning_rate is not an argument of torch.optim.AdamW"),
    ("opsd", ["~sampler.max_new_tokens"], "config key sampler.max_new_tokens is missing; .*TorchtuneSampler needs it"),
    ("opsd", ["lr_scheduler._component_=torch.optim.lr_scheduler.StepLR"], "lr_scheduler.num_warmup_steps is not an argument"),
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
    ("opsd", ["packing=trees"], "packing=trees is unknown; choose tree or padded"),
    (
        "pi_distill",
        ["micro_batch_rollouts=4"],
        "micro_batch_rollouts is not read by this recipe; did you mean minibatch_rollouts?",
    ),
    ("opsd", ["group_size=2.5"], "group_size=2.5 must be a whole number of at least 1"),
    ("opsd", ["minibatch_rollouts=4"], "minibatch_rollouts=4 must be a multiple of group_size=3"),
    ("opsd", ["minibatch_rollouts=9"], "minibatch_rollouts=9 must be .* at most prompts_per_round × group_size = 6"),
    ("sft", ["batch_size=0"], "batch_size=0 must be a whole number of at least 1"),
    ("sft", ["max_steps=many"], "max_steps=many must be a whole number of at least 1"),
    ("opsd", ["max_steps=null"], "config key max_steps is missing"),
    ("opsd", ["eval_samples=0"], "eval_samples=0 must be a whole number of at least 1"),
    ("evaluate", ["eval_samples=0"], "eval_samples=0 must be a whole number of at least 1"),
    ("opsd", ["save_every_steps=-2"], "save_every_steps=-2 must be a whole number of at least 0"),
    ("opsd", ["environment_timeout_s=0"], "environment_timeout_s=0 must be a number of seconds above 0, or null"),
    ("rl", ["environment_timeout_s=soon"], "environment_timeout_s=soon must be a number of seconds"),
    ("opsd", ["clip_grad_norm=-1"], "clip_grad_norm=-1 must be a number above 0, or null"),
    ("opsd", ["dtype=fp12"], "dtype=fp12 is unknown; choose fp32 or bf16"),
    ("opsd", ["teacher._component_=pidistill.teachers.EMATeacher", "teacher.rate=0"], r"teacher.rate=0 must lie in \(0, 1\]"),
    # NaN, infinity, text, null, and the wrong type
    ("opsd", ["optimizer.lr=fast"], "optimizer.lr=fast must be a number"),
    ("opsd", ["optimizer.lr=.nan"], "config key optimizer.lr is nan; set it to a finite number"),
    ("sft", ["optimizer.lr=.inf"], "config key optimizer.lr is inf; set it to a finite number"),
    ("opsd", ["sampler.temperature=.nan"], "config key sampler.temperature is nan"),
    ("evaluate", ["sampler.temperature=.inf"], "config key sampler.temperature is inf"),
    ("opsd", ["sampler.max_new_tokens=null"], "sampler.max_new_tokens=null must be a whole number"),
    ("pi_distill", ["objective.beta={start: .nan, end: 1, steps: 5}"], "config key objective.beta.start is nan"),
    ("rl", ["clip_grad_norm=.nan"], "config key clip_grad_norm is nan; set it to a finite number"),
    ("rl", ["clip_grad_norm=.inf"], "clip_grad_norm=inf must be a number above 0, or null for no clipping"),
    ("rl", ["clip_grad_norm=true"], "clip_grad_norm=True must be a number above 0, or null for no clipping"),
    ("opsd", ["sft_weight=.inf"], "sft_weight=inf must be a number, at least 0"),
    ("opsd", ["eval_success_threshold=.inf"], "eval_success_threshold=inf must be a finite number"),
    ("sft", ["compile=maybe"], "compile=maybe must be true or false"),
    ("sft", ["output_dir=3"], "output_dir=3 must be text"),
    ("sft", ["custom_sharded_layers=output"], "custom_sharded_layers=output must be a list of texts"),
    ("opsd", ["importance_weights=3"], "importance_weights=3 is not a component; write importance_weights._component_=dotted"),
    ("opsd", ["on_overflow=crop"], "on_overflow=crop is unknown; choose error or drop"),
    ("opsd", ["seed=${nowhere}"], r"config .* does not take seed=.* \(Interpolation key 'nowhere' not found"),
    # what a run needs around it
    ("sft", ["output_dir=/proc/run"], "output_dir=/proc/run cannot be written to .*; set output_dir to another folder"),
    (
        "opsd",
        ["metric_logger._component_=torchtune.training.metric_logging.WandBLogger"],
        "WandBLogger needs the package wandb, which is not installed; run `pip install wandb`",
    ),
    # optimizers and schedules that a recipe cannot step
    (
        "opsd",
        ["~optimizer.betas", "~optimizer.weight_decay", "optimizer._component_=torch.optim.LBFGS"],
        "optimizer._component_ builds LBFGS, whose step.. needs closure.*; set optimizer._component_ to torch.optim.AdamW",
    ),
    ("opsd", ["~optimizer.betas", "optimizer._component_=torch.optim.Muon"], "Muon cannot be built .*only supports 2D"),
    (
        "sft",
        ["~lr_scheduler.num_warmup_steps", "lr_scheduler._component_=torch.optim.lr_scheduler.ReduceLROnPlateau"],
        "lr_scheduler._component_ builds ReduceLROnPlateau, whose step.. needs metrics.*pidistill.training.lr_schedules",
    ),
    (
        "opsd",
        ["~lr_scheduler.num_warmup_steps", *ONE_CYCLE, "lr_scheduler.total_steps=3"],
        "lr_scheduler.total_steps=3 of OneCycleLR ends before max_steps=4.*; set lr_scheduler.total_steps=4",
    ),
    (
        "opsd",
        ["~optimizer.betas", "optimizer._component_=torch.optim.Adafactor", "compute_dtype=bf16"],
        "torch.optim.Adafactor does not work with weights that FSDP2 shards.*torchao.optim.AdamW8bit",
    ),
    ("opsd", [f"seed={2**63}"], "seed=9223372036854775808 must be a whole number of at least 0 and at most 9,223,372"),
    # options that train nothing, or something else
    ("pi_distill", ["objective.kl_mode=loss_k1"], "kl_mode=loss_k1 is refused: .* zero expected gradient"),
    ("opsd", ["objective.kl_mode=loss_k1"], "kl_mode=loss_k1 is refused: .* zero expected gradient"),
    ("opsd", ["objective.kl_mode=advantage_rb"], "kl_mode=advantage_rb is refused: .* zero expected gradient"),
    ("pi_distill", ["objective.student_kl=shared_reward"], "student_kl=shared_reward shares a reward"),
    ("opsd", ["objective.kl_mode=loss_bb"], "objective.kl_mode=loss_bb is unknown; choose one of"),
    ("opsd", ["sampler.temperature=0"], "sampler.temperature=0 always takes the likeliest token"),
    ("pi_distill", ["sampler.temperature=0"], "sampler.temperature=0 always takes the likeliest token"),
    (
        "opsd",
        ["objective=pidistill.objectives.PiDistill"],
        "PiDistill trains on what the teacher view samples, .* run pi_distill_distr",
    ),
    (
        "pi_distill",
        ["objective={_component_: pidistill.objectives.GRPO}"],
        r"objective._component_ is \{.*\}, not a dotted path; .*write objective=dotted",
    ),
    (
        "pi_distill",
        ["teacher_checkpointer={_component_: pidistill.models.from_scratch}"],
        "teacher_checkpointer.checkpoint_dir is missing",
    ),
    # models, tokenizers, lengths
    (
        "opsd",
        ["model.vocab_size=80"],
        "is another model than torchtune.models.llama3.llama3 builds: its config.json says vocab_size=85, and .* vocab_size=80",
    ),
    (
        "opsd",
        ["sampler.max_new_tokens=90"],
        r"example tiny_world train row 0: teacher prompt \(question 9 \+ privileged .* exceeds "
        "max_seq_len 96 by .*; raise `tokenizer.max_seq_len`",
    ),
    (
        "sft",
        ["tokenizer.max_seq_len=20", "sampler.max_new_tokens=1"],
        r"tiny_world train row 0: prompt \(9 tokens\) plus completion",
    ),
    *(
        (name, ADAPTED_HEAD, "cannot score with an output layer of type LoRALinear.*apply_lora_to_output=False")
        for name in ("opsd", "sft")
    ),
    # checkpoints
    ("opsd", ["resume_from_checkpoint=True"], "resume_from_checkpoint=True but .*latest holds no training_state.pt"),
    (
        "opsd",
        ["checkpointer.checkpoint_files=[model-1.safetensors]"],
        r"has no model-1.safetensors \(it holds config.json, model.saf",
    ),
    (
        "sft",
        ["checkpointer.checkpoint_dir=nowhere"],
        "checkpoint folder nowhere does not exist; check checkpointer.checkpoint_dir",
    ),
    (
        "evaluate",
        ["checkpointer.checkpoint_dir=runs/tiny/base/latest"],
        "runs/tiny/base/latest does not exist; run `make base`",
    ),
]
if not torch.cuda.is_available():
    BY_COMMAND_LINE.append(("opsd", ["device=cuda"], "device is cuda, which this machine does not have"))


def case_name(value):
    return " ".join(value) if isinstance(value, list) else value if isinstance(value, str) and value in RECIPES else ""


@pytest.mark.parametrize(("name", "overrides", "expected"), BY_COMMAND_LINE, ids=case_name)
def test_wrong_overrides_are_refused_in_one_sentence_before_weights_are_loaded(
    name, overrides, expected, sentence, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    said = sentence(name, small_config(name, tiny_base, tmp_path / "run"), *overrides)
    assert re.search(expected, said), said


SCRATCH = {
    "_component_": "pidistill.models.from_scratch",
    "checkpoint_dir": "scratch",
    "model": {},
    "hf_config": {},
    "model_type": "LLAMA3",
}
BY_FILE = [
    ("opsd", {"objective": None}, "config key objective is missing; this recipe needs it"),
    (
        "pi_distill",
        {"objective": {"_component_": "pidistill.objectives.GRPO"}},
        "GRPO trains on what the student .* run opsd_distributed",
    ),
    (
        "opsd",
        {
            "environment": {
                "_component_": "pidistill.envs.SingleTurn",
                "reward": {"_component_": "pidistill.rewards.ExactMatch", "case_fold": True},
            }
        },
        "environment.reward.case_fold is not an argument .*did you mean casefold",
    ),
    (
        "opsd",
        {"environment": {"_component_": "pidistill.envs.SingleTurn"}},
        "objective OPSD learns from the reward, and the environment has none; set environment.reward, or another objective",
    ),
    (
        "opsd",
        {"teacher_model": {"_component_": LLAMA, **SIZES}},
        "teacher_model has no weights of its own; set teacher_checkpointer",
    ),
    *(
        (name, {"model__vocab_size": 80, "checkpointer": SCRATCH}, "tokenizer has 85 ids but the model's vocabulary has 80")
        for name in ("opsd", "sft")
    ),
    (
        "opsd",
        {"teacher": {"_component_": "pidistill.teachers.LiveTeacher"}, "teacher_checkpointer": SCRATCH},
        "teacher_checkpointer is not read while the trained model is the teacher",
    ),
    (
        "opsd",
        {"teacher": {"_component_": "pidistill.teachers.EMATeacher"}, "teacher_checkpointer": SCRATCH},
        "an EMA teacher averages the student's own weights; remove teacher_model and teacher_checkpointer",
    ),
    (
        "opsd",
        {"teacher_model": {"_component_": LLAMA, **SIZES, "vocab_size": 80}},
        "teacher's vocabulary is 80 and the student's tokenizer has 85 ids",
    ),
    (
        "opsd",
        {
            "teacher_checkpointer": {
                "_component_": HF,
                "checkpoint_dir": "gone",
                "checkpoint_files": ["a"],
                "model_type": "LLAMA3",
            }
        },
        "checkpoint folder gone does not exist; check teacher_checkpointer.checkpoint_dir",
    ),
    (
        "opsd",
        {"teacher_checkpointer": {"_component_": HF, "checkpoint_dir": "gone", "checkpoint_files": ["a"]}},
        "teacher_checkpointer.model_type is missing",
    ),
    ("sft", {"dataset__completion": None}, "tiny_world train row 0 has no assistant turn to learn from"),
    (
        "pi_distill",
        {"objective__no_pi": "error", "dataset__privileged": "none"},
        "tiny_world train row 0 has no privileged information",
    ),
    (
        "pi_distill",
        {"objective__no_pi": "drop", "privileged__control": "none"},
        f"none of the {ROWS} rows has privileged information",
    ),
]


def test_an_output_dir_that_is_a_file_is_refused(sentence, tiny_base, tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run"):
        said = sentence("sft", small_config("sft", tiny_base, tmp_path / path))
        assert re.search("file.* cannot be written to .*; set output_dir to another folder", said), said


def test_a_checkpointer_that_still_gives_output_dir_is_accepted(tiny_base, tmp_path):
    run("sft", small_config("sft", tiny_base, tmp_path / "run", checkpointer__output_dir="elsewhere", max_steps=1))
    assert (tmp_path / "run" / "latest" / "config.json").is_file() and not Path("elsewhere").exists()


def test_a_run_that_starts_inside_a_folder_with_saved_steps_is_refused_and_loses_nothing(sentence, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "run" / "step_3")
    (tmp_path / "run" / "latest").symlink_to("step_3")
    said = sentence("opsd", small_config("opsd", tmp_path / "run" / "latest", tmp_path / "run"))
    assert re.search("holds a run .* set resume_from_checkpoint=true", said), said
    assert (tmp_path / "run" / "latest" / "config.json").is_file()


@pytest.mark.parametrize(("name", "changes", "expected"), BY_FILE, ids=case_name)
def test_wrong_components_are_refused_in_one_sentence_before_weights_are_loaded(
    name, changes, expected, sentence, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    said = sentence(name, small_config(name, tiny_base, tmp_path / "run", **changes))
    assert re.search(expected, said), said


# ------------------------------------------------------------------------------------------- rows


def write_rows(path: Path, rows: list) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"_component_": CHAT, "source": str(path)}


def with_messages(messages) -> list:
    """Three rows, the last one with these messages."""
    return [ROW, ROW, ROW | {"messages": messages}]


MALFORMED = [
    (with_messages([]), "rows.jsonl row 2: messages is empty"),
    (with_messages([{"content": "req"}]), r"rows.jsonl row 2: messages\[0\] has no 'role'"),
    (with_messages([ASK, {"role": "robot", "content": "x"}]), r"rows.jsonl row 2: messages\[1\] has the unknown role 'robot'"),
    (with_messages([{"role": "user"}]), r"rows.jsonl row 2: messages\[0\] has no 'content'"),
    (
        with_messages([ASK, {"role": "assistant", "content": "act"}]),
        "rows.jsonl row 2: messages ends with an assistant message",
    ),
    (with_messages(None), "rows.jsonl row 2 has no value in 'messages'"),
    ([{**ROW, "messages": [["user", "req"]]}], r"rows.jsonl row 0: messages\[0\] is a list, not a message"),
    (
        [{"prompt": [ASK], "privileged_messages": "[ ]"}],
        r"rows.jsonl has no column 'messages' with values \(it has: prompt, priv",
    ),
    (
        [{"messages": [ASK]}],
        r"rows.jsonl has no column 'privileged_messages' with values .*set dataset.privileged_key, or null",
    ),
    ([ROW | {"privileged_messages": None}] * 2, "rows.jsonl has no column 'privileged_messages' with values"),
    ([], "rows.jsonl (has no rows|cannot be loaded)"),
    ([ROW, ROW | {"messages": [{"role": "user", "content": "a word unknown"}]}], "the word 'a' is not among the 85 words"),
]


@pytest.mark.parametrize(("rows", "expected"), MALFORMED, ids=lambda value: None if isinstance(value, list) else value[:60])
@pytest.mark.parametrize("name", ["opsd", "pi_distill"])
def test_wrong_rows_are_refused_in_one_sentence_before_weights_are_loaded(name, rows, expected, sentence, tiny_base, tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    said = sentence(name, small_config(name, tiny_base, tmp_path / "run", dataset=dataset))
    assert re.search(expected, said), said


def test_a_file_that_is_not_json_is_refused_by_name(sentence, tiny_base, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [\n')
    dataset = {"_component_": CHAT, "source": str(tmp_path / "rows.jsonl")}
    said = sentence("opsd", small_config("opsd", tiny_base, tmp_path / "run", dataset=dataset))
    assert re.search("rows.jsonl cannot be loaded .*; check the file", said), said


@pytest.mark.parametrize("name", ["opsd", "pi_distill"])
def test_some_rows_without_privileged_information_are_fine(name, tiny_base, tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", [ROW, ROW | {"privileged_messages": None}, ROW])
    run(name, small_config(name, tiny_base, tmp_path / "run", dataset=dataset, max_steps=2))
    assert [row["rows_without_pi"] for row in metrics(tmp_path / "run")] == [1, 1]


def test_rows_that_are_too_long_are_dropped_and_counted_on_request(tiny_base, tmp_path):
    long = ROW | {"messages": [{"role": "user", "content": "req " * 90}]}
    dataset = write_rows(tmp_path / "rows.jsonl", [ROW, long, ROW])
    run("opsd", small_config("opsd", tiny_base, tmp_path / "run", dataset=dataset, max_steps=1, privileged__on_overflow="drop"))
    (row,) = metrics(tmp_path / "run")
    assert row["dropped_rows/prompt_too_long"] == 1


# ------------------------------------------------------------------------------------------- while a run goes on


@pytest.mark.parametrize(("fail", "reason"), [("raise", "reward_error"), ("nan", "reward_not_finite")])
@pytest.mark.parametrize("name", ["rl", "pi_distill"])
def test_a_rollout_whose_reward_fails_is_dropped_and_counted(name, fail, reason, tiny_base, tmp_path):
    changes = {"environment__fail": fail, "environment__fail_episodes": [1], "max_steps": 3}
    recipe = run(name, small_config(name, tiny_base, tmp_path, **changes))
    rows = metrics(tmp_path)
    other = set(DROP_REASONS) - {reason}
    assert [row[f"dropped/{reason}"] for row in rows] == [1, 0, 0]
    assert all(row[f"dropped/{name}"] == 0 for row in rows for name in other)
    assert [round(row["policy_tokens"] / row["completion_tokens_mean"]) for row in rows] == [5, 6, 6]
    assert all("loss" in row for row in rows) and any(row["grad_norm"] > 0 for row in rows)
    assert all(torch.isfinite(parameter).all() for parameter in recipe._model.parameters())


def test_a_round_in_which_every_reward_fails_ends_the_run_with_a_sentence(tiny_base, tmp_path):
    rows = epoch_order(ROWS, 0, 2, 2)  # the second round's
    changes = {"environment__fail": "nan", "environment__fail_on": [f"tiny_world train row {row}" for row in rows]}
    sentence = (
        r"no rollout of the round has a reward \(reward_not_finite 6\).*; step 1 is saved: set resume_from_checkpoint=true"
    )
    with pytest.raises(InputError, match=sentence):
        run("opsd", small_config("opsd", tiny_base, tmp_path / "failed", **changes))
    assert [row["step"] for row in metrics(tmp_path / "failed")] == [1]
    run("opsd", small_config("opsd", tiny_base, tmp_path / "failed", resume_from_checkpoint=True))
    run("opsd", small_config("opsd", tiny_base, tmp_path / "whole"))
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "whole")
    assert_same_tensors(weights(tmp_path / "failed"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["sft", "opsd"])
@pytest.mark.parametrize("step, remedy", [(2, ": set resume_from_checkpoint=true to continue$"), (4, "$")])
def test_an_evaluation_that_cannot_be_sampled_costs_no_step(step, remedy, name, tiny_base, tmp_path):
    def refuse_at_step(recipe):
        collect = recipe._evaluation._collect

        def refuse(*arguments, **keywords):
            if recipe._step == step:
                raise InputError("the judge is down")
            return collect(*arguments, **keywords)

        recipe._evaluation._collect = refuse

    cfg = small_config(name, tiny_base, tmp_path, max_steps=4, eval_every_steps=2, **EVALUATION)
    with pytest.raises(InputError, match=rf"the judge is down; step {step} is saved{remedy}"):
        run(name, cfg, refuse_at_step)
    assert training_state(tmp_path)["step"] == step


def test_an_error_within_an_update_saves_nothing(tiny_base, tmp_path):
    def refuse_third_step(recipe):
        step = recipe._updates.step

        def refuse(*arguments, **keywords):
            if recipe._step == 2:
                raise InputError("the loss is wrong")
            return step(*arguments, **keywords)

        recipe._updates.step = refuse

    with pytest.raises(InputError, match="^the loss is wrong$"):
        run("opsd", small_config("opsd", tiny_base, tmp_path), refuse_third_step)
    assert len(metrics(tmp_path)) == 2 and not list(tmp_path.glob("step_*"))


def poisoned(steps, **changes):
    return {"objective": {"_component_": "tests.support.worlds.PoisonedGRPO", "steps": steps}, "save_every_steps": 1} | changes


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_dumped(tiny_base, tmp_path):
    run("rl", small_config("rl", tiny_base, tmp_path, **poisoned([1, 3], max_steps=4)))
    rows = metrics(tmp_path)
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 1, 2]
    assert ["loss" in row for row in rows] == [True, False, True, False]
    saved = [weights(tmp_path, f"step_{step}") for step in (1, 2, 3, 4)]
    assert_same_tensors(saved[0], saved[1])
    assert not torch.equal(saved[1]["lm_head.weight"], saved[2]["lm_head.weight"])
    assert_same_tensors(saved[2], saved[3])
    dumps = sorted(tmp_path.glob("nonfinite_step_*"))
    assert [path.name for path in dumps] == ["nonfinite_step_2_rank_0.jsonl", "nonfinite_step_4_rank_0.jsonl"]
    rollouts = [json.loads(line) for line in dumps[0].read_text().splitlines()]
    assert len(rollouts) == 6 and {rollout["group"] for rollout in rollouts} == {0, 1}
    assert all(len(r["completion"]) == len(r["policy_mask"]) == len(r["sampled_logprobs"]) for r in rollouts)
    assert sum(sum(rollout["policy_mask"]) for rollout in rollouts) == rows[1]["policy_tokens"]


def test_a_skipped_step_moves_no_moving_average(tiny_base, tmp_path):
    averages = []

    def poison_and_watch(recipe):
        token_loss, update = recipe._objective.token_loss, recipe._updates.step

        def poisoned_loss(batch, scores, step):
            result = token_loss(batch, scores, step)
            return dataclasses.replace(result, loss=result.loss * (float("nan") if step == 1 else 1.0))

        def watch(*arguments, **keywords):
            averages.append(recipe._teacher.state_dict()["output.weight"].clone())  # before each step
            return update(*arguments, **keywords)

        recipe._objective.token_loss, recipe._updates.step = poisoned_loss, watch

    teacher = {"_component_": "pidistill.teachers.EMATeacher", "rate": 0.5}
    run("opsd", small_config("opsd", tiny_base, tmp_path, teacher=teacher), poison_and_watch)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(averages)]
    assert moved == [True, False, True]


def test_too_many_steps_in_a_row_end_the_run_with_a_sentence(tiny_base, tmp_path):
    cfg = small_config("rl", tiny_base, tmp_path, **poisoned([0, 2, 3, 4], max_steps=9, max_nonfinite_steps=3))
    with pytest.raises(InputError, match=r"3 steps in a row had a loss or gradient that is not finite .*lower optimizer.lr"):
        run("rl", cfg)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("nonfinite_step_*"))) == 4


def test_steps_in_a_row_are_counted_across_a_resume(tiny_base, tmp_path):
    changes = poisoned([1, 2, 3], max_nonfinite_steps=3)
    run("rl", small_config("rl", tiny_base, tmp_path, **changes, max_steps=3))
    resumed = small_config("rl", tiny_base, tmp_path, **changes, max_steps=5, resume_from_checkpoint=True)
    with pytest.raises(InputError, match="3 steps in a row"):
        run("rl", resumed)
