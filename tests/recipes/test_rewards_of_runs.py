"""Test rewards in real runs: plain functions, parts in the log, and a run in which no episode has a reward."""

import json
import re

import pytest
from omegaconf import OmegaConf

from pidistill.config import build
from pidistill.data.load import gives_no_reward
from pidistill.errors import InputError
from pidistill.rollouts import DROP_REASONS, CollectResult
from pidistill.training import evaluation
from pidistill.training.compatibility import check_reward, check_routed_rewards
from pidistill.types import Example
from tests.support.runs import EVALUATION, TIMES, TINY, assert_same_tensors, metrics, run, small_config, weights

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


def test_a_training_whose_reward_never_works_ends_after_the_first_view_of_its_first_evaluation(
    tiny_base, tmp_path, monkeypatch
):
    views, sample = [], evaluation.sample_view

    def counted(*arguments, **settings):
        views.append(settings["view"])
        return sample(*arguments, **settings)

    monkeypatch.setattr(evaluation, "sample_view", counted)
    with pytest.raises(InputError, match=r"no rollout of the evaluation has a reward \(reward_error \d+\); the warning above"):
        run("rl", small_config("rl", tiny_base, tmp_path, **FAILING, **EVALUATION))
    assert views == ["student"] and not (tmp_path / "metrics.jsonl").exists()


def test_an_environment_that_fails_in_a_later_evaluation_does_not_cost_the_run(tiny_base, tmp_path, monkeypatch):
    sample, calls = evaluation.sample_view, []

    def fail_later(*arguments, **settings):
        calls.append(settings["view"])
        if len(calls) <= 3:
            return sample(*arguments, **settings)
        return CollectResult([], dict.fromkeys(DROP_REASONS, 0) | {"environment_crash": 4}, 0)

    monkeypatch.setattr(evaluation, "sample_view", fail_later)
    run("rl", small_config("rl", tiny_base, tmp_path, max_steps=2, **EVALUATION))
    evaluated = [row for row in metrics(tmp_path) if "loss" not in row]
    assert "eval_student_success" in evaluated[0] and "eval_student_success" not in evaluated[-1]
    assert evaluated[-1]["eval_dropped/environment_crash"] >= 4 and (tmp_path / "step_2").is_dir()


# ---------------------------------------------------------------------------------------------- no reward at all

SILENT = {"_component_": "pidistill.envs.SingleTurn"}
WORDS_OF_REWARDS = re.compile("reward|success|zero_advantage|privileged_gain")


def test_sdft_without_a_reward_learns_the_same_and_writes_no_number_of_rewards(tiny_base, tmp_path):
    changes = {"max_steps": 2, "rollout_log_steps": 2} | EVALUATION
    for name, environment in (("with", FUNCTION), ("without", SILENT)):
        run("sdft", small_config("sdft", tiny_base, tmp_path / name, environment=environment, **changes))
    assert_same_tensors(weights(tmp_path / "with"), weights(tmp_path / "without"))
    judged, silent = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert not [name for row in silent for name in row if WORDS_OF_REWARDS.search(name) and not name.startswith("dropped/")]
    for ours, theirs in zip(silent, judged, strict=True):  # everything else is the same
        times = {name for name in theirs if name.startswith(TIMES)}
        kept = {name for name in theirs if not WORDS_OF_REWARDS.search(name)} - times
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
        assert "truncated_frac" in ours or "eval_truncated_frac" in ours
    logged = [json.loads(line) for line in (tmp_path / "without" / "rollouts.jsonl").read_text().splitlines()]
    assert logged and all(row["reward"] is None for row in logged)
    tokens = [json.loads(line) for line in (tmp_path / "without" / "training_rollouts.jsonl").read_text().splitlines()]
    assert tokens and all("reward" not in row and "advantage" not in row["values"] for row in tokens)


class Defaults:
    """Have a reward that no config need repeat."""

    def __init__(self, reward=1.0):
        self.reward = reward


@pytest.mark.parametrize(("node", "lacks"), [({}, False), ({"reward": 0.5}, False), ({"reward": None}, True)])
def test_a_reward_by_default_is_a_reward(node, lacks):
    assert gives_no_reward({"_component_": f"{__name__}.Defaults"} | node) == lacks


def test_an_evaluation_without_a_reward_reports_lengths_and_no_success(tiny_base, tmp_path):
    run("evaluate", small_config("evaluate", tiny_base, tmp_path, environment=SILENT, eval_samples=2, dataset__max_rows=2))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"student greedy", "student", "student + PI"}
    for view in results.values():
        assert view["completion_tokens_mean"] > 0 and not [name for name in view if re.search("success|reward|pass", name)]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows.pop("prompts")) == 2 and rows == {view: {} for view in results}


SHAPING = [{"_component_": "pidistill.rewards.OverlongPenalty", "limit": 8, "buffer": 4}]
GATE = {"_component_": "pidistill.losses.token_weights.SignGate"}


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [
        ("rl", {}, r"objective GRPO learns from the reward, and the environment has none; set environment\.reward, or another"),
        ("opsd", {}, "objective OPSD learns from the reward"),
        ("pi_distill", {}, "objective PiDistill learns from the reward"),
        ("sdft", {"reward_shaping": SHAPING}, "reward_shaping adds to the reward, .* or reward_shaping=null"),
        ("sdft", {"objective__token_weight": GATE}, "objective.token_weight SignGate reads the reward"),
        ("rft_sample", {}, "selection Successes chooses by the reward, .* or selection .*All"),
    ],
)
def test_what_reads_a_reward_is_refused_before_weights_are_loaded_where_the_environment_has_none(
    config, changes, match, tiny_base, tmp_path
):
    cfg = OmegaConf.load(TINY / f"{config}.yaml")
    cfg = OmegaConf.merge(cfg, {"environment": None}, {"environment": SILENT, "output_dir": str(tmp_path)})
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    with pytest.raises(InputError, match=match):
        check_reward(cfg)


def test_distillation_alone_and_all_samples_need_no_reward():
    for objective in ({"_component_": "pidistill.objectives.OPSD", "reward_weight": 0}, None):
        node = {
            "environment": SILENT,
            "objective": objective,
            "selection": {"_component_": "pidistill.rollouts.selections.All"},
        }
        check_reward(OmegaConf.create(node))
    own = {"_component_": "tests.support.own_rewards.Silent"}
    with pytest.raises(InputError, match="the environment has none"):
        check_reward(OmegaConf.create({"environment": own, "objective": {"_component_": "pidistill.objectives.GRPO"}}))


def test_a_row_is_refused_whose_own_objective_needs_a_reward_that_its_own_environment_lacks():
    environments = {"a": SILENT, "b": {**SILENT, "reward": {"_component_": "pidistill.rewards.Contains"}}}
    parts = {"a": {"_component_": "pidistill.objectives.SDFT"}, "b": {"_component_": "pidistill.objectives.GRPO"}}
    cfg = OmegaConf.create(
        {
            "environment": {"_component_": "pidistill.envs.RoutedEnvironment", "key": "domain", "environments": environments},
            "objective": {"_component_": "pidistill.objectives.RoutedObjective", "key": "domain", "objectives": parts},
        }
    )
    check_reward(cfg)
    rows = [Example(f"row {name}", [], data={"domain": name}) for name in "ab"]
    check_routed_rewards(cfg, rows, build(cfg.objective))
    cfg.environment.environments.b.reward = None
    with pytest.raises(InputError, match=r"row b: objective\.objectives\.b learns from .*environments\.b has none"):
        check_routed_rewards(cfg, rows, build(cfg.objective))
