"""Test what a run of each recipe reads and leaves: no key unread, no number undocumented, none made up."""

import itertools
import json
import math
import re

import pytest
from omegaconf import DictConfig, OmegaConf

from pidistill.training import metrics as metrics_module
from pidistill.training import start as training
from pidistill.training.evaluation import pass_at_k
from pidistill.training.keys import EVALUATION_KEYS
from tests.support.runs import EVALUATION, RECIPES, ROWS, metrics, recipe_module, run, small_config

TRAINED = ["base", "sft", "rl", "opsd", "pi_distill"]  # the others: test_every_config.py
SHARDED = {"fsdp_reshard_after_forward", "custom_sharded_layers"}  # read where there is more than one rank
STARTED = {
    "output_dir",
    "seed",
    "device",
    "dtype",
    "compute_dtype",
    "threads",
}  # read by `start`, with the numbers that it checks


def everything_on(name: str, base, folder) -> DictConfig:
    changes = {"rollout_log_steps": 1} if "prompts_per_round" in keys(name) else {}
    if name != "base" and RECIPES[name] != "evaluate_distributed":
        changes |= {"max_steps": 2, "eval_every_steps": 1, "save_every_steps": 1, **EVALUATION}
    return small_config(name, base, folder, **changes)


def keys(name: str) -> frozenset[str]:
    return getattr(recipe_module(name), "KEYS", EVALUATION_KEYS)


@pytest.fixture
def reads(monkeypatch):
    """The top-level keys of a config that code has asked for."""
    found: set[str] = set()
    monkeypatch.setattr(training, "check_values", lambda cfg: None)

    def record(method):
        original = getattr(DictConfig, method)

        def asking(self, key, *arguments, **keywords):
            if self._get_parent() is None:
                found.add(key)
            return original(self, key, *arguments, **keywords)

        monkeypatch.setattr(DictConfig, method, asking)

    for method in ("get", "__getattr__", "__getitem__"):
        record(method)
    return found


@pytest.mark.parametrize("name", ["pi_distill", "opsd", "rl", "sft", "evaluate"])
def test_every_key_that_a_recipe_takes_is_read_by_it(name, tiny_base, tmp_path, reads):
    cfg = everything_on(name, tiny_base, tmp_path)
    reads.clear()
    run(name, cfg)
    assert keys(name) - reads - SHARDED - STARTED == set()
    assert STARTED - {"threads"} <= reads


@pytest.fixture(scope="module")
def left(tiny_base, tmp_path_factory):
    """name → the folder of a small run with evaluation, texts and checkpoints."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            run(name, everything_on(name, tiny_base, folders[name]))
        return folders[name]

    return folder


def documented() -> list[re.Pattern]:
    """The keys in the first column of the table in pidistill.training.metrics, `<name>` standing for anything."""
    rows = re.findall(r"^\| (\S.*?) \| ", metrics_module.__doc__, re.MULTILINE)
    names = [name for row in rows[2:] for name in re.split(r", | … ", row)]
    names += re.findall(r"`(reward/<name>)`", metrics_module.__doc__)
    names += [f"kl_teacher_student_q{quarter}" for quarter in (2, 3, 4)]
    return [re.compile(re.sub(r"<\w+>", ".+", name)) for name in names]


@pytest.mark.parametrize("name", TRAINED)
def test_every_number_is_documented_and_finite(name, left):
    table = documented()
    assert len(table) > 30
    rows = [json.loads(line) for line in (left(name) / "metrics.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        for key, value in row.items():
            assert any(pattern.fullmatch(key) for pattern in table), f"{key} is not in the table of pidistill.training.metrics"
            if key != "alarms":  # sentences, by alarm
                assert isinstance(value, int | float) and math.isfinite(value), key


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "base"])
def test_every_step_and_evaluation_reports_what_it_should(name, left):
    rows = metrics(left(name))
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_student_success" in row]
    assert [row["step"] for row in steps] == [1, 2] and [row["step"] for row in evaluations] == [0, 1, 2]
    for row in steps:
        assert {"grad_norm", "lr", "policy_tokens", "entropy_nats", "nonfinite_steps"} <= row.keys()
        if RECIPES[name] != "sft_distributed":
            assert {"reward_mean", "success_frac", "kl_teacher_student_nats", "kl_student_teacher_nats"} <= row.keys()
            assert {"kl_teacher_student_q1", "kl_teacher_student_q4", "teacher_entropy_nats", "ess_frac"} <= row.keys()
            assert {"leak_frac", "clip_frac", "completion_tokens_mean", "rows_without_pi", "ratio_mean"} <= row.keys()
            assert {"dropped/reward_error", "dropped/reward_not_finite", "zero_advantage_frac"} <= row.keys()
            if RECIPES[name] == "pi_distill_distributed":  # each rollout is sampled once, and none is dropped
                assert row["sampled_tokens"] == pytest.approx(row["rollouts"] * row["completion_tokens_mean"])
            # One update per round: what sampled is what is trained.
            assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    for row in evaluations:
        gain = row["eval_teacher_success"] - row["eval_student_success"]
        assert row["eval_privileged_gain"] == pytest.approx(gain)
        assert {"eval_student_success_greedy", "eval_leak_frac", "eval_truncated_frac"} <= row.keys()


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in ("base", "sft")])
def test_texts_show_both_views_of_the_same_rows(name, left):
    texts = [json.loads(line) for line in (left(name) / "rollouts.jsonl").read_text().splitlines()]
    assert [(text["step"], text["view"]) for text in texts] == [(1, "student"), (1, "teacher"), (2, "student"), (2, "teacher")]
    assert all(text["example"] == "tiny_world train row 0" and text["text"].startswith("assistant: ") for text in texts)


def test_torchtunes_own_loggers_get_the_numbers(tiny_base, tmp_path):
    logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path / "log"),
        "filename": "a.txt",
    }
    run("rl", small_config("rl", tiny_base, tmp_path / "run", metric_logger=logger, max_steps=2))
    lines = (tmp_path / "log" / "a.txt").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["Step 1", "Step 2"]
    assert "reward_mean:" in lines[0] and "grad_norm:" in lines[0]


@pytest.mark.parametrize("name", [*TRAINED, "evaluate"])
def test_the_config_in_the_folder_is_the_one_that_ran(name, left):
    """Complete: nothing in it refers to something outside it."""
    text = (left(name) / "config.yaml").read_text()
    assert OmegaConf.create(text).output_dir == str(left(name))
    assert "${" not in text


def test_evaluation_counts_every_view(left):
    results = json.loads((left("evaluate") / "results.json").read_text())
    samples = {view: (row["samples"], row["rollouts"]) for view, row in results.items()}
    assert samples == {"student greedy": (1, ROWS), "student": (4, 4 * ROWS), "student + PI": (4, 4 * ROWS)}
    for row in results.values():
        assert 0 <= row["success"] <= 1
    rows = json.loads((left("evaluate") / "rows.json").read_text())
    for view, row in results.items():
        assert len(rows[view]) == ROWS and sum(rows[view].values()) / ROWS == pytest.approx(row["success"])
    texts = [json.loads(line) for line in (left("evaluate") / "rollouts.jsonl").read_text().splitlines()]
    for view, row in results.items():
        own = [text for text in texts if text["view"] == view]
        assert len(own) == row["rollouts"] and all(text["text"].startswith("assistant: ") for text in own)
        assert sum(text["reward"] for text in own) / len(own) == pytest.approx(row["reward_mean"])
        for part in own[0]["reward_parts"]:
            assert sum(text["reward_parts"].get(part, 0.0) for text in own) / len(own) == pytest.approx(row[f"reward/{part}"])
    for row in (results["student"], results["student + PI"]):
        assert row["success"] < row["pass@2"] < row["pass@4"]


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples):
    for successes in range(samples + 1):
        outcomes = [True] * successes + [False] * (samples - successes)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(successes, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
