"""Test what a run says about the rows that it does not take."""

import json
import logging
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from pidistill.data import RecipeData, load_prompts
from pidistill.data.load import trained_rows_sentence
from pidistill.envs.tiny_world.world import Task
from pidistill.errors import InputError
from pidistill.rollouts import CollectResult
from pidistill.testing import TINY_SIZES
from pidistill.training.evaluation import TextSamples
from pidistill.types import Example, PromptPair
from tests.support.episodes import LetterTokenizer
from tests.support.siblings import ONE
from tests.support.tiny_tokenizers import qwen_folder


def test_rows_that_are_left_out_are_said_by_reason_and_part(tmp_path, caplog):
    rows = [{"question": question, "answer": "4", "hint": hint} for question, hint in
            [("q", "h"), ("q", None), ("q", ""), ("q " * 400, "h"), ("other", "h"), ("last", None)]]  # fmt: skip
    for name, some in (("train", rows[:4]), ("eval", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    folder = qwen_folder(tmp_path / "model")
    dataset = {"_component_": "pidistill.data.qa_dataset", "privileged_key": "hint", "completion_key": "answer"}
    cfg = OmegaConf.create({
        "model": {"_component_": "torchtune.models.llama3.llama3", **TINY_SIZES, "vocab_size": 700, "max_seq_len": 400},
        "tokenizer": {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder)},
        "checkpointer": {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder)},
        "dataset": dataset | {"source": str(tmp_path / "train.jsonl")},
        "eval_dataset": dataset | {"source": str(tmp_path / "eval.jsonl")},
        "on_overflow": "drop",
    })  # fmt: skip
    caplog.set_level(logging.INFO)
    load_prompts(cfg, no_pi="drop")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "`dataset` gives 1 rows; left out are: rows_without_pi 2, prompt_too_long 1; the first is train.jsonl row 1"
    ]
    caplog.clear()
    cfg.dataset.split, cfg.eval_dataset.source = "train[1:]", cfg.dataset.source
    load_prompts(cfg, no_pi="rl")
    assert [record.getMessage() for record in caplog.records][:2] == [
        "`dataset` gives 2 rows; left out are: prompt_too_long 1; the first is train.jsonl row 2",
        "`eval_dataset` gives 3 rows; left out are: prompt_too_long 1; the first is train.jsonl row 3",
    ]
    cfg.on_overflow, cfg.dataset.max_rows, cfg.eval_dataset.source = None, 2, str(tmp_path / "eval.jsonl")
    caplog.clear()
    load_prompts(cfg, no_pi="rl")
    assert caplog.records == []


def small_config(tmp_path, rows, held_out):
    """Return a config of rows with questions and answers."""
    for name, some in (("train", rows), ("eval", held_out)):
        lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in some]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    folder = qwen_folder(tmp_path / "model")
    dataset = {"_component_": "pidistill.data.qa_dataset", "privileged_key": None}
    return OmegaConf.create({
        "model": {"_component_": "torchtune.models.llama3.llama3", **TINY_SIZES, "vocab_size": 700, "max_seq_len": 400},
        "tokenizer": {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder)},
        "checkpointer": {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder)},
        "dataset": dataset | {"source": str(tmp_path / "train.jsonl")},
        "eval_dataset": dataset | {"source": str(tmp_path / "eval.jsonl")},
    })  # fmt: skip


def test_evaluation_rows_that_are_training_rows_are_counted_in_one_warning(tmp_path, caplog):
    train = [(f"question {n}", str(n)) for n in range(5)]
    cfg = small_config(tmp_path, train, [train[0], ("question 1", "another answer"), train[3], ("question 9", "9")])
    load_prompts(cfg, no_pi="rl")
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("2 of 4 evaluation rows are training rows (the same prompt and reference)")
    assert "eval_dataset.split" in warning.getMessage()


def test_rows_whose_tasks_differ_are_others_though_their_prompts_are_equal():
    def pair(task):
        example = Example("row", [{"role": "user", "content": "play"}], data={"task": task})
        return example, PromptPair([1, 2], [1, 2], has_privileged=False)

    tasks = [Task(n, 0, 0, (1, 2, 3), 0, 0, 0, 0) for n in range(3)]
    assert trained_rows_sentence([pair(tasks[0])], [pair(tasks[1]), pair(tasks[2])]) is None
    assert trained_rows_sentence([pair(tasks[0])], [pair(tasks[0]), pair(tasks[2])]).startswith("1 of 2 evaluation rows")


@pytest.mark.parametrize("reference", [None, "4"])
def test_tasks_in_plain_columns_tell_rows_without_a_reference_apart(reference):
    def pair(seed):
        example = Example("row", [{"role": "user", "content": "play"}], data={"seed": seed}, reference=reference)
        return example, PromptPair([1, 2], [1, 2], has_privileged=False)

    assert (trained_rows_sentence([pair(0)], [pair(100)]) is None) == (reference is None)
    assert trained_rows_sentence([pair(0)], [pair(0)]) is not None


def test_a_round_of_more_prompts_than_rows_is_said_once(tmp_path, caplog):
    cfg = small_config(tmp_path, [("a", "1"), ("b", "2"), ("c", "3")], [("d", "4")])
    cfg.prompts_per_round = 3
    load_prompts(cfg, no_pi="rl")
    assert caplog.records == []
    cfg.prompts_per_round = 4
    load_prompts(cfg, no_pi="rl")
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("prompts_per_round=4 is more than the 3 rows of `dataset`")


WINDOWED = {"_component_": "torchtune.models.gemma2.gemma2", "head_dim": 16, "sliding_window_size": 100, "vocab_size": 700}
WINDOWED |= {key: value for key, value in TINY_SIZES.items() if key != "rope_base"}
SAMPLERS = {
    "vLLM": ({"_component_": "pidistill.rollouts.VLLMSampler", "max_model_len": 100, "max_new_tokens": 20}, None),
    "a sliding window": ({"_component_": "pidistill.rollouts.TorchtuneSampler", "max_new_tokens": 20}, WINDOWED),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_beyond_the_samplers_own_limit_is_refused_or_dropped_at_load(name, tmp_path):
    cfg = small_config(tmp_path, [("a", "1"), ("b " * 100, "2")], [("d", "4"), ("e " * 100, "5")])
    load_prompts(cfg, no_pi="rl")
    sampler, model = SAMPLERS[name]
    cfg.sampler, cfg.model = sampler, model or cfg.model
    with pytest.raises(
        InputError, match=r"train.jsonl row 1: .* exceeds the 100 tokens of .*(max_model_len|window).* of 1 such"
    ):
        load_prompts(cfg, no_pi="rl")
    assert len(load_prompts(cfg | {"eval_dataset": None}, no_pi="rl", samples=False).prompts) == 2
    cfg.on_overflow = "drop"
    data = load_prompts(cfg, no_pi="rl")
    assert data.dropped == data.eval_dropped == {"prompt_too_long": 1}
    assert [row.id for row, _ in data.prompts + data.eval_prompts] == ["train.jsonl row 0", "eval.jsonl row 0"]
    assert data.sampled_len == 100 and data.max_seq_len > 200
    cfg.sampler.max_new_tokens = 99
    with pytest.raises(InputError, match="2 such rows among 2"):
        load_prompts(cfg, no_pi="rl")


def test_logged_texts_are_shortened_to_the_room_of_the_longest_logged_row_with_a_warning(caplog):
    row = (Example("row", [{"role": "user", "content": "q"}]), PromptPair([1] * 150, [1] * 201, has_privileged=True))
    data = RecipeData(LetterTokenizer(), [row], [], {}, {}, 0, (), 1.0, 256)
    cfg = OmegaConf.create({"rollout_log_steps": 1, "rollout_log_max_new_tokens": 64})

    def logged(data):
        seen = []

        def collect(model, **arguments):
            seen.append(arguments["max_new_tokens"])
            return CollectResult([], {}, 0)

        TextSamples(cfg, ONE, data, collect).sample(None)
        return seen

    assert logged(data) == [55, 55]
    assert "rollout_log_max_new_tokens=64 is more than the 55 tokens" in caplog.text
    assert logged(replace(data, sampled_len=230)) == [29, 29]
    caplog.clear()
    cfg.rollout_log_max_new_tokens = 55
    assert logged(data) == [55, 55] and not caplog.records
    cfg.rollout_log_max_new_tokens, cfg.rollout_log_steps = 64, 0
    assert logged(data) == [55, 55] and not caplog.records
