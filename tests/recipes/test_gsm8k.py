"""Test the recipes from the command line on real GSM8K rows, with the Qwen2.5 configs made small."""

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import training

from pidistill.config import build
from pidistill.data import epoch_order, gsm8k_dataset
from pidistill.distributed.run import Run
from pidistill.rewards import last_answer
from pidistill.scoring.batch import make_batch
from pidistill.training.load import load_model
from pidistill.training.start import cleanup
from pidistill.types import Example, Message
from tests.support.tiny_qwen import load_config, qwen_checkpoint, read_metrics, run_config, set_up, small_model

DATA = os.environ.get("PIDISTILL_TEST_DATA")
ROWS = Path(DATA or ".") / "gsm8k_train.jsonl"
pytestmark = pytest.mark.skipif(not DATA, reason="PIDISTILL_TEST_DATA is not set: no GSM8K rows to run on")

LR, STEPS = 1e-3, 3
RECIPES = {"pi_distill": "pi_distill_distributed", "opsd": "opsd_distributed", "rl": "opsd_distributed"}
STEP_KEYS = {
    *("step", "round", "loss", "grad_norm", "lr", "policy_tokens", "tokens_per_s", "nonfinite_steps", "rows_without_pi"),
    *("reward_mean", "reward_std", "success_frac", "completion_tokens_mean", "truncated_frac", "leak_frac"),
    *("kl_teacher_student_nats", "kl_student_teacher_nats", "entropy_nats", "teacher_entropy_nats", "ess_frac"),
    *(f"kl_teacher_student_q{q}" for q in range(1, 5)),
    *("ratio_mean", "clip_frac", "dropped/reward_error", "dropped/reward_not_finite"),
    *("time_rollout_s", "time_score_s", "time_update_s"),
}
EVAL_KEYS = {"step", "eval_student_success_greedy", "eval_student_success", "eval_teacher_success", "eval_privileged_gain"}


@dataclass(frozen=True)
class DigitShare:
    """The share of digits in an answer: a reward that a random model gets some of."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        text = last_answer(turns)
        return sum(character.isdigit() for character in text) / max(1, len(text))


DIGITS = ["environment.reward._component_=tests.recipes.test_gsm8k.DigitShare", "~environment.reward.format"]


# ------------------------------------------------------------------------------------------- a model, and runs of it


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    rows = [json.loads(line) for line in ROWS.open()][:1000]
    texts = [text for row in rows for text in (row["question"], row["answer"])]
    return qwen_checkpoint(tmp_path_factory.mktemp("qwen"), texts)


def small(qwen, output_dir):
    """A round is 4 prompts × 5 completions, used by two optimiser steps of 10 each."""
    return [
        *small_model(qwen, output_dir),
        f"dataset.source={ROWS}",
        "dataset.max_rows=48",
        "eval_dataset.max_rows=4",
        f"max_steps={STEPS}",
        f"optimizer.lr={LR}",
        "lr_scheduler.num_warmup_steps=1",
    ]


def small_round(qwen, output_dir):
    return [*small(qwen, output_dir), "prompts_per_round=4", "minibatch_rollouts=10", "micro_batch_tokens=1200"]


@pytest.fixture(scope="session")
def trained(qwen, tmp_path_factory):
    """The folder of a run of the method from the command line; each method is run once."""

    @functools.cache
    def train(method):
        output_dir = tmp_path_factory.mktemp(method)
        run_config(RECIPES[method], f"qwen2_5/0.5B_{method}", [*small_round(qwen, output_dir), "rollout_log_steps=2"])
        return output_dir

    return train


@pytest.fixture
def process_group():
    yield
    cleanup()


def load_as_recipes_do(output_dir, checkpoint):
    """torchtune's model with a checkpoint's weights, by the recipes' own way."""
    cfg = OmegaConf.load(output_dir / "config.yaml")
    files = [path.name for path in checkpoint.glob("*.safetensors")]
    checkpointer = build(cfg.checkpointer, output_dir=cfg.output_dir, checkpoint_dir=str(checkpoint), checkpoint_files=files)
    run = Run(torch.device("cpu"), torch.float32, rank=0, world_size=1, seed=0, output_dir=output_dir)
    return load_model(cfg, run, cfg.model, checkpointer.load_checkpoint()[training.MODEL_KEY], trained=False)


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def transformers_tokenizer(qwen):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(qwen)


# ------------------------------------------------------------------------------------------- π-Distill and OPSD


@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_metrics_of_a_run_are_whole_finite_and_consistent(trained, method):
    rows = read_metrics(trained(method))
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "eval_student_success" in r]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["step"] for row in evaluations] == [0, 3]
    assert all(EVAL_KEYS.issubset(row) for row in evaluations)
    wanted = STEP_KEYS | {"beta"} | ({"alpha", "student_ratio_mean"} if method == "pi_distill" else set())
    for row in steps:
        assert wanted.issubset(row), wanted - set(row)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values()), row
        # A random model answers nothing right, and its two views differ: only the KL is left to train on.
        assert row["reward_mean"] == row["nonfinite_steps"] == row["dropped/reward_error"] == row["rows_without_pi"] == 0
        assert row["grad_norm"] > 0 and row["lr"] == pytest.approx(LR)
        assert row["kl_teacher_student_nats"] > 0.01 and row["kl_student_teacher_nats"] > 0.01
        assert 0 < row["entropy_nats"] < math.log(2048)
    # Steps 1 and 3 are the first after sampling; step 2 trains on the other half of round 0, with weights that have moved.
    assert [row["round"] for row in steps] == [0, 0, 1]
    assert [abs(row["ratio_mean"] - 1) < 1e-5 for row in steps] == [True, False, True]
    assert steps[0]["policy_tokens"] + steps[1]["policy_tokens"] == round(20 * steps[0]["completion_tokens_mean"])
    texts = [json.loads(line) for line in (trained(method) / "rollouts.jsonl").open()]
    assert {text["view"] for text in texts} == {"student", "teacher"} and all(text["text"] for text in texts)


@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_the_saved_checkpoint_is_a_transformers_model_with_the_trained_weights(trained, qwen, method):
    output_dir = trained(method)
    latest = output_dir / "latest"
    initial, saved = (dict(transformers_model(folder).named_parameters()) for folder in (qwen, latest))
    assert saved.keys() == initial.keys()
    for name, weight in saved.items():
        moved = (weight - initial[name]).abs().max().item()
        # AdamW without decay moves a weight by about lr in a step: a weight under another's name would be further off.
        assert 0.1 * LR < moved < 1.5 * STEPS * LR, f"{name} moved by {moved}"

    tokens = torch.randint(2000, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = transformers_model(latest)(tokens).logits
        ours = load_as_recipes_do(output_dir, latest)(tokens)
        before = transformers_model(qwen)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - before).abs().max() > 0.01, "the comparison would not see whether the trained weights were loaded"


def test_the_saved_checkpoint_can_be_evaluated(trained, tmp_path):
    overrides = [
        *small_model(trained("pi_distill") / "latest", tmp_path),
        f"dataset.source={Path(DATA) / 'gsm8k_test_400.jsonl'}",
        "dataset.max_rows=6",
        "eval_samples=2",
    ]
    printed = run_config("evaluate_distributed", "qwen2_5/0.5B_evaluate", overrides)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["student greedy", "student", "student + PI"] and "student greedy" in printed
    assert [view["rollouts"] for view in results.values()] == [6, 12, 12]
    assert all(view["success"] == 0 and view["completion_tokens_mean"] > 1 for view in results.values())
    numbers = [
        x for view in results.values() for value in view.values() for x in (value if isinstance(value, list) else [value])
    ]
    assert all(map(math.isfinite, numbers))


# ------------------------------------------------------------------------------------------- what the student sees

SENTINEL = "zyxquartz"


@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_no_student_prompt_holds_privileged_text(qwen, tmp_path, process_group, method, transformers_tokenizer):
    """Worked solutions with a word of their own: it must be in every teacher prompt and in no student's, down to the batch."""
    rows = [json.loads(line) for line in ROWS.open()][:48]
    marked = [row | {"answer": row["answer"].replace("\n", f" {SENTINEL}\n")} for row in rows]
    source = tmp_path / "marked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in marked))
    overrides = [
        *small_round(qwen, tmp_path / "run"),
        f"dataset.source={source}",
        "dataset.split=train",
        "eval_dataset.split=train",
    ]
    recipe = set_up(RECIPES[method], load_config(f"qwen2_5/0.5B_{method}", overrides))
    decode = recipe._data.tokenizer.decode

    prompts = recipe._data.prompts
    assert len(prompts) == 48
    for (example, pair), row in zip(prompts, rows, strict=True):
        assert SENTINEL not in decode(pair.student) and SENTINEL in decode(pair.teacher), example.id
        assert pair.student == reference_prompt(transformers_tokenizer, row["question"])

    rollouts = recipe.sample_round()
    assert len(rollouts) == 20 and {r.sampled_by for r in rollouts} == {"teacher" if method == "pi_distill" else "student"}
    batch = make_batch(rollouts, None, pad_id=recipe._data.tokenizer.pad_id, device=torch.device("cpu"))
    assert not any(SENTINEL in decode(ids) for ids in batch.views.of("student").tokens.tolist())
    assert all(SENTINEL in decode(ids) for ids in batch.views.of("teacher").tokens.tolist())


def reference_prompt(tokenizer, question):
    """The prompt of inference, by transformers: GSM8K's question and what the config asks for."""
    content = f"{question}\n\nReason step by step, then put the final answer, a number, within \\boxed{{}}."
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False)


# ------------------------------------------------------------------------------------------- policy gradients


def test_rl_learns_from_the_reward_alone(qwen, tmp_path):
    """Plain RL has no other term than the policy gradient: with a reward that varies it moves the weights."""
    run_config(RECIPES["rl"], "qwen2_5/0.5B_rl", [*small_round(qwen, tmp_path), *DIGITS, "eval_success_threshold=0.1"])
    steps = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert len(steps) == STEPS
    assert all(row["reward_std"] > 0 and row["grad_norm"] > 1e-3 for row in steps)
    assert all(0 < row["reward_mean"] < 1 for row in steps)
    initial, saved = (dict(transformers_model(folder).named_parameters()) for folder in (qwen, tmp_path / "latest"))
    assert all((saved[name] - weight).abs().max() > 0.1 * LR for name, weight in initial.items())


@pytest.mark.parametrize("method", ["rl", "pi_distill", "opsd"])
def test_the_policy_gradient_is_there_exactly_when_rewards_differ(qwen, tmp_path, process_group, method):
    """GSM8K's reward is 0 for every answer of a random model; without a KL the gradient is then zero, bit for bit."""
    beta = [] if method == "rl" else ["objective.beta=0.0"]
    norms = {}
    for name, reward in (("gsm8k", []), ("digits", DIGITS)):
        overrides = [*small_round(qwen, tmp_path / name), *beta, *reward, "max_steps=1", "eval_dataset=null"]
        set_up(RECIPES[method], load_config(f"qwen2_5/0.5B_{method}", overrides)).train()
        (row,) = read_metrics(tmp_path / name)
        norms[name] = row["grad_norm"]
    assert norms["gsm8k"] == 0.0
    assert norms["digits"] > 1e-3


# ------------------------------------------------------------------------------------------- supervised


def test_sft_on_worked_solutions_starts_at_the_loss_that_transformers_computes(qwen, tmp_path, transformers_tokenizer):
    batch = 4
    overrides = [*small(qwen, tmp_path), f"batch_size={batch}", "micro_batch_tokens=900", "max_steps=2"]
    run_config("sft_distributed", "qwen2_5/0.5B_sft", overrides)
    steps = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]

    model = transformers_model(qwen)
    examples = gsm8k_dataset(str(ROWS), max_rows=48)
    total, count = 0.0, 0
    for row in epoch_order(48, seed=0, start=0, count=batch):
        question = json.loads(ROWS.read_text().splitlines()[row])["question"]
        prompt = reference_prompt(transformers_tokenizer, question)
        answer = transformers_tokenizer.encode(examples[row].completion[0]["content"] + "<|im_end|>", add_special_tokens=False)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
        count += len(answer)
    assert steps[0]["policy_tokens"] == count
    assert steps[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert steps[1]["grad_norm"] > 0
    saved = transformers_model(tmp_path / "latest")
    assert not torch.equal(saved.lm_head.weight, model.lm_head.weight)
