"""Test avg@k, pass@k and pass^k against drawn samples, intervals against theory, and other domains in whole runs."""

import itertools
import json
import math
import random

import pytest
from omegaconf import OmegaConf

from pidistill.errors import InputError
from pidistill.training.evaluation import bootstrap_interval, chosen_views, pass_at_k, pass_hat_k, success_numbers
from recipes.evaluate_distributed import domain_configs
from tests.support.runs import recipe_class, run, sample_config, small_config


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_and_pass_hat_k_are_means_over_all_choices_of_k_samples(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(c, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))
        assert pass_hat_k(c, n, k) == pytest.approx(sum(map(all, draws)) / len(draws))


def test_intervals_are_as_wide_as_the_standard_error_says_and_depend_on_the_seed_alone():
    rng = random.Random(0)
    values = [float(rng.random() < 0.3) for _ in range(400)]
    low, high = bootstrap_interval(values, seed=1)
    mean = sum(values) / len(values)
    assert low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(mean * (1 - mean) / 400), rel=0.1)
    assert bootstrap_interval(values, seed=1) == (low, high) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([0.5] * 9, seed=0) == (0.5, 0.5) == bootstrap_interval([0.5], seed=0)


def test_rows_count_alike_and_those_with_too_few_samples_do_not_count_for_k():
    rows = {0: [True, True, False, True], 1: [False] * 4, 2: [True]}
    numbers = success_numbers(rows, samples=4, seed=0)
    assert numbers["success"] == pytest.approx((0.75 + 0.0 + 1.0) / 3)
    assert (numbers["pass@2"], numbers["pass^2"]) == (0.5, pytest.approx(0.5 * 3 / 6))
    assert (numbers["pass@4"], numbers["pass^4"]) == (0.5, 0.0)
    assert {name for name in numbers if not name.endswith("_interval")} == {
        *("success", "pass@2", "pass^2", "pass@4", "pass^4")
    }
    assert all(
        numbers[f"{name}_interval"][0] <= numbers[name] <= numbers[f"{name}_interval"][1] for name in ("pass@2", "pass^2")
    )
    assert success_numbers({}, samples=2, seed=0) == {}


def test_other_domains_are_evaluated_beside_the_own_one(tiny_base, tmp_path, capsys):
    world = "pidistill.envs.tiny_world.tiny_world_dataset"
    cfg = small_config(
        "evaluate",
        tiny_base,
        tmp_path,
        dataset__max_rows=3,
        eval_samples=2,
        reward_shaping=[{"_component_": "pidistill.rewards.LeakPenalty", "phrases": ["hint"]}],
        domains={
            "other_world": {"dataset": {"_component_": world, "split": "test", "max_rows": 2, "world_seed": 4321}},
            "no_pi": {"dataset": {"_component_": world, "split": "test", "max_rows": 1, "privileged": "none"}},
        },
    )
    run("evaluate", cfg)
    results = json.loads((tmp_path / "results.json").read_text())
    views = ("student greedy", "student", "student + PI")
    expected = [*views, *(f"other_world/{view}" for view in views), "no_pi/student greedy", "no_pi/student"]
    assert list(results) == expected
    assert [results[name]["rollouts"] for name in expected] == [3, 6, 6, 2, 4, 4, 1, 2]
    assert all("reward/leak" in row for row in results.values())
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(rows) == expected and set(rows["other_world/student"]) != set(rows["student"])
    printed = capsys.readouterr().out
    assert "3 rows, per view" in printed and "other_world 2 rows, per view" in printed and "[" in printed


PENALTY = [{"_component_": "tests.rewards.test_shaping.Fixed", "value": -5.0}]


def test_a_penalty_moves_the_reward_and_no_success(tiny_base, tmp_path):
    results = {}
    for name, shaping in (("plain", None), ("shaped", PENALTY)):
        cfg = small_config("evaluate", tiny_base, tmp_path / name, dataset__max_rows=6, eval_samples=2,
                           eval_success_threshold=0.2, reward_shaping=shaping)  # fmt: skip
        run("evaluate", cfg)
        results[name] = json.loads((tmp_path / name / "results.json").read_text())["student"]
        results[name]["rows"] = json.loads((tmp_path / name / "rows.json").read_text())["student"]
    plain, shaped = results["plain"], results["shaped"]
    assert 0 < plain["success"] < 1
    for key in ("success", "pass@2", "pass^2", "rows"):
        assert plain[key] == shaped[key]
    assert shaped["reward_mean"] < plain["reward_mean"] - 4 and "reward/fixed" in shaped


ROWS = {"_component_": "pidistill.data.qa_dataset", "source": "rows.jsonl"}


@pytest.mark.parametrize(
    "entry, message",
    [
        ({}, "other has no dataset"),
        ({"dataset": {"a": 1}, "sampler": {}}, "other has the key sampler"),
        (None, "has no dataset"),
        (5, "has no dataset"),
        ({"dataset": "rows.jsonl"}, r"domains\.other\.dataset=rows\.jsonl is not a component"),
        ({"dataset": ROWS, "environment": None}, r"domains\.other has no environment"),
        ({"dataset": ROWS, "max_turns": "x"}, r"domains\.other\.max_turns=x must be a whole number"),
        ({"dataset": ROWS, "eval_success_threshold": "x"}, r"domains\.other\.eval_success_threshold=x must be"),
    ],
)
def test_a_domain_that_lacks_rows_or_says_too_much_is_refused(entry, message):
    with pytest.raises(InputError, match=message):
        domain_configs(OmegaConf.create({"domains": {"other": entry}}))


def test_a_domain_whose_file_is_missing_is_named(tiny_base, tmp_path):
    rows = {"_component_": "pidistill.data.qa_dataset", "source": str(tmp_path / "nothing.jsonl")}
    cfg = small_config("evaluate", tiny_base, tmp_path, domains={"other": {"dataset": rows}})
    with pytest.raises(InputError, match=r"^domains\.other: dataset\.source .*nothing\.jsonl does not exist"):
        run("evaluate", cfg)


def test_only_the_named_views_are_sampled(tiny_base, tmp_path):
    world = {
        "_component_": "pidistill.envs.tiny_world.tiny_world_dataset",
        "split": "test",
        "max_rows": 1,
        "privileged": "none",
    }
    views = ["student + PI greedy", "student greedy", "student greedy"]
    cfg = small_config(
        "evaluate", tiny_base, tmp_path, dataset__max_rows=2, eval_samples=3, views=views, domains={"no_pi": {"dataset": world}}
    )
    run("evaluate", cfg)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: row["rollouts"] for name, row in results.items()} == {
        "student + PI greedy": 2, "student greedy": 2, "no_pi/student greedy": 1
    }  # fmt: skip
    texts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    own = {view: [row for row in texts if row["view"] == view] for view in results}
    assert [len(rows) for rows in own.values()] == [2, 2, 1]
    assert {row["text"] for row in own["student + PI greedy"]} != {row["text"] for row in own["student greedy"]}


def test_an_evaluation_that_would_sample_nothing_is_refused(tiny_base, tmp_path):
    with pytest.raises(InputError, match=r"^views=\[\] leaves nothing to sample"):
        chosen_views(OmegaConf.create({"views": []}))
    views = ["student + PI"]
    cfg = small_config("evaluate", tiny_base, tmp_path, dataset__max_rows=2, dataset__privileged="none", views=views)
    with pytest.raises(InputError, match=r"^views=\['student \+ PI'\] show the privileged information, and no row has any"):
        run("evaluate", cfg)


def test_a_view_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"views=teacher is unknown; choose one of student greedy, student, "):
        chosen_views(OmegaConf.create({"views": ["student", "teacher"]}))


@pytest.mark.parametrize("recipe, config", [("evaluate", small_config), ("rft_sample", sample_config)])
def test_what_trains_nothing_is_refused_in_the_folder_of_a_training_run(recipe, config, tiny_base, tmp_path):
    (tmp_path / "latest").symlink_to(tiny_base)
    (tmp_path / "config.yaml").write_text("max_steps: 40\n")
    with pytest.raises(InputError, match=r"^output_dir=.* holds a training run .* would overwrite; set another output_dir"):
        recipe_class(recipe)(config(recipe, tiny_base, tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "max_steps: 40\n"


def test_a_domain_of_which_no_view_is_sampled_has_no_table(tiny_base, tmp_path, capsys):
    rows = {"_component_": "pidistill.envs.tiny_world.tiny_world_dataset", "split": "test", "max_rows": 1}
    more = {"views": ["student + PI"], "domains": {"no_pi": {"dataset": rows | {"privileged": "none"}}}}
    run("evaluate", small_config("evaluate", tiny_base, tmp_path, dataset__max_rows=1, eval_samples=1, **more))
    printed = capsys.readouterr().out
    assert "1 rows, per view" in printed and "no_pi" not in printed
