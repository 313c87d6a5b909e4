"""Test the log of training rollouts: which it holds, that its numbers are the step's, and that training is untouched."""

import functools
import json

import pytest
import torch

from pidistill.jsonl import TRAINING_ROLLOUTS
from pidistill.tokenizers.byte import byte_tokenizer
from pidistill.training.rollout_log import token_texts
from tests.support.runs import metrics, run, small_config, training_state, weights

SETTINGS = {"group_size": 2, "max_steps": 3}  # four rollouts a step: fewer than the log keeps of a step


def rows_of(folder):
    return [json.loads(line) for line in (folder / TRAINING_ROLLOUTS).read_text(encoding="utf-8").splitlines()]


def nats(row, name):
    return row["values"][name]


@pytest.fixture(scope="module")
def logged(tiny_base, tmp_path_factory):
    folders = {}
    for method in ("pi_distill", "opsd"):
        folders[method] = tmp_path_factory.mktemp(method)
        run(method, small_config(method, tiny_base, folders[method], **SETTINGS))
    return folders


@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_means_of_the_logged_tokens_are_those_of_metrics_where_every_rollout_is_logged(logged, method):
    rows = rows_of(logged[method])
    for step in (row for row in metrics(logged[method]) if "loss" in row):
        own = [row for row in rows if row["step"] == step["step"]]
        assert len(own) == 4 and {row["round"] for row in own} == {step["round"]}
        columns = {"student_entropy": "entropy_nats", "teacher_entropy": "teacher_entropy_nats"}
        columns |= {name: f"{name}_nats" for name in ("kl_teacher_student", "kl_student_teacher")}
        for name, key in columns.items():
            values = [value for row in own for value in nats(row, name)]
            assert len(values) == step["policy_tokens"]
            assert sum(values) / len(values) == pytest.approx(step[key], abs=1e-4), name
        for view in ("student", "teacher"):
            values = [-value for row in own for value in nats(row, f"{view}_logprobs")]
            assert sum(values) / len(values) == pytest.approx(step[f"{view}_nll_nats"], abs=1e-4)
        assert sum(row["reward"] for row in own) / 4 == pytest.approx(step["reward_mean"])
        assert sum(row["leak"] for row in own) / 4 == pytest.approx(step["leak_frac"])


@pytest.mark.parametrize("method", ["pi_distill", "opsd"])
def test_the_view_that_sampled_gives_the_tokens_the_sampled_log_probs(logged, method):
    rows = rows_of(logged[method])
    assert {row["sampled_by"] for row in rows} == {"teacher" if method == "pi_distill" else "student"}
    for row in rows:
        assert nats(row, "sampled_logprobs") == pytest.approx(nats(row, f"{row['sampled_by']}_logprobs"), abs=1e-3)
        assert len(nats(row, "sampled_logprobs")) == sum(row["policy"]) == row["policy_tokens"]
        assert row["privileged"] in row["teacher_prompt"] and row["privileged"] not in row["student_prompt"]
        assert [turn["role"] for turn in row["turns"]][:1] == ["assistant"]


def test_training_without_the_log_is_the_same_bit_for_bit(logged, tiny_base, tmp_path):
    run("opsd", small_config("opsd", tiny_base, tmp_path, **SETTINGS, rollout_log_total=0))
    assert not (tmp_path / TRAINING_ROLLOUTS).exists()
    assert metrics(tmp_path) == metrics(logged["opsd"])
    for ours, theirs in zip(weights(tmp_path).values(), weights(logged["opsd"]).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert training_state(tmp_path)["step"] == 3


def test_the_total_is_spread_over_the_steps_and_bounded_in_tokens(tiny_base, tmp_path, logged):
    run("opsd", small_config("opsd", tiny_base, tmp_path, **SETTINGS, rollout_log_total=4, rollout_log_max_tokens=3))
    rows, whole = rows_of(tmp_path), rows_of(logged["opsd"])
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    for row in rows:
        (same,) = [r for r in whole if (r["step"], r["tokens"][: len(row["tokens"])], r["group"], r["values"]["advantage"][0],
                   r["policy_tokens"], r["reward"]) == (row["step"], row["tokens"], row["group"], row["values"]["advantage"][0],
                   row["policy_tokens"], row["reward"])][:1]  # fmt: skip
        assert sum(row["policy"]) == 3 < row["policy_tokens"]
        assert row["values"]["student_logprobs"] == same["values"]["student_logprobs"][:3]


def test_a_resumed_run_logs_the_same_rollouts(tiny_base, tmp_path, logged):
    run("opsd", small_config("opsd", tiny_base, tmp_path, **SETTINGS | {"max_steps": 2}, save_every_steps=1))
    with (tmp_path / TRAINING_ROLLOUTS).open("a") as file:
        file.write('{"step": 3, "tok')
    run("opsd", small_config("opsd", tiny_base, tmp_path, **SETTINGS, resume_from_checkpoint=True))
    assert (tmp_path / TRAINING_ROLLOUTS).read_text() == (logged["opsd"] / TRAINING_ROLLOUTS).read_text()


@pytest.mark.parametrize("text", ["plain words", "a 🎲 rolls, ünïcödé", "漢字", ""])
def test_the_texts_of_tokens_join_to_the_whole_text(text, tmp_path):
    tokenizer = byte_tokenizer(str(tmp_path))
    ids = tokenizer.encode_turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": text})
    decode = functools.cache(lambda part: tokenizer.decode(list(part)))
    texts = token_texts(decode, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids) and text in tokenizer.decode(ids)


def test_bytes_that_are_no_character_are_shown_and_do_not_hide_what_follows():
    decode = functools.cache(lambda part: bytes(part).decode(errors="replace"))
    texts = token_texts(decode, [0xFF, *b"ab", 0xF0, 0x9F, *b"end"])
    assert len(texts) == 8 and "".join(texts).replace("\ufffd", "") == "abend"
    assert texts[-2:] == ["n", "d"]
