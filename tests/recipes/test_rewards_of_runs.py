"""Test rewards in real runs: plain functions, parts in the log, and a run in which no episode has a reward."""

import pytest

from pidistill.errors import InputError
from tests.support.runs import EVALUATION, metrics, run, small_config

FUNCTION = {"_component_": "pidistill.envs.SingleTurn", "reward": "tests.support.own_rewards.with_parts"}
EVERY_ROW = [f"tiny_world {split} row {row}" for split in ("train", "validation", "test") for row in range(512)]
FAILING = {"environment__fail": "raise", "environment__fail_on": EVERY_ROW}


def test_a_function_is_the_reward_of_a_run_and_its_parts_are_logged_in_training_and_evaluation(tiny_base, tmp_path):
    run("rl", small_config("rl", tiny_base, tmp_path, environment=FUNCTION, max_steps=2, **EVALUATION))
    rows = metrics(tmp_path)
    trained, evaluated = [row for row in rows if "loss" in row], [row for row in rows if "eval_student_success" in row]
    assert len(trained) == 2 and all(row["reward/words"] > 0 and "reward_mean" in row for row in trained)
    assert evaluated and all(row["eval_reward/words"] > 0 for row in evaluated)


def test_an_evaluation_without_any_reward_ends_in_one_sentence(tiny_base, tmp_path):
    cfg = small_config("evaluate", tiny_base, tmp_path, **FAILING)
    with pytest.raises(InputError, match=r"no rollout of student greedy has a reward \(reward_error \d+\); the warning above"):
        run("evaluate", cfg)
