"""Test avg@k, pass@k and pass^k against drawn samples, intervals against theory, and other domains in whole runs."""

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
from omegaconf import OmegaConf

from pidistill.commands.report.read import read_runs
from pidistill.data import RecipeData
from pidistill.envs.tiny_world import tiny_world_dataset
from pidistill.errors import InputError
from pidistill.training.evaluation import bootstrap_interval, chosen_views, pass_at_k, pass_hat_k, success_numbers
from pidistill.types import Example, PromptPair
from recipes.evaluate_distributed import Domain, domain_configs, sampled, weights_folder
from tests.support.runs import EVALUATION, recipe_class, run, sample_config, small_config


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


def _all_resamples(tables: list[list[list[float]]], clusters: list[str]) -> list[float]:
    """List the mean of the first table minus that of the second, if any, over every draw of seeds and of whole clusters."""
    members = [[i for i, name in enumerate(clusters) if name == one] for one in sorted(set(clusters))]
    means = []
    for drawn in itertools.product(members, repeat=len(members)):
        rows = [i for member in drawn for i in member]
        for seeds in itertools.product(*(itertools.product(range(len(table)), repeat=len(table)) for table in tables)):
            parts = [[table[seed][i] for seed in own for i in rows] for table, own in zip(tables, seeds, strict=True)]
            first, *rest = [sum(part) / len(part) for part in parts]
            means.append(first - sum(rest))
    return means


@pytest.mark.parametrize("paired", [False, True])
def test_an_interval_over_clusters_is_that_of_all_resamples_of_whole_clusters(paired):
    rng = np.random.default_rng(0)
    clusters = ["b", "a", "b", "c", "c", "b", "d"]
    alike = np.array([{"a": 0.2, "b": 1.0, "c": 0.0, "d": 0.6}[name] for name in clusters])
    tables = [(alike * scale + 0.1 * rng.random((seeds, 7))).tolist() for seeds, scale in ((2, 1.0), (1, 0.3))[: 1 + paired]]
    expected = np.percentile(_all_resamples(tables, clusters), [2.5, 97.5])
    minus = tables[1] if paired else None
    found = bootstrap_interval(tables[0], 0, 10_000, clusters=clusters, minus=minus)
    assert found == pytest.approx(expected, abs=0.02)
    apart = bootstrap_interval(tables[0], 0, 2000, minus=minus)
    assert found[1] - found[0] > 1.15 * (apart[1] - apart[0]), "rows of a cluster are drawn together"


def test_six_questions_about_each_fact_say_no_more_than_one_where_they_are_right_together():
    facts = [float(i % 3 == 0) for i in range(48)]
    rows, clusters = [value for value in facts for _ in range(6)], [f"{i:02}" for i in range(48) for _ in range(6)]
    over_facts = bootstrap_interval(rows, seed=0, clusters=clusters)
    assert over_facts == pytest.approx(bootstrap_interval(facts, seed=0))
    low, high = bootstrap_interval(rows, seed=0)
    assert over_facts[1] - over_facts[0] == pytest.approx(math.sqrt(6) * (high - low), rel=0.1)


def test_two_arms_that_gain_on_every_row_differ_surely_however_much_the_rows_differ():
    base = [float(i % 2) / 2 for i in range(20)]
    better = [value + 0.25 for value in base]
    assert bootstrap_interval([better], 0, minus=[base]) == pytest.approx((0.25, 0.25))
    low, high = bootstrap_interval(better, 0)
    assert high - low > 0.15


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
    clustered = success_numbers(rows, samples=4, seed=0, clusters={0: "x", 1: "y", 2: "x"})
    assert clustered["clusters"] == 2 and clustered["success"] == numbers["success"]
    # Row 2 does not count for k = 2: there are two rows in two clusters.
    assert clustered["success_interval"] == (0.0, 0.875) and clustered["pass@2_interval"] == numbers["pass@2_interval"]
    one = success_numbers(rows, samples=2, seed=0, clusters=dict.fromkeys(rows, "x"))
    assert one["clusters"] == 1 and not [name for name in one if name.endswith("_interval")]


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
    assert [name for name in rows if not name.endswith("prompts")] == expected and set(rows["other_world/student"]) != set(
        rows["student"]
    )
    printed = capsys.readouterr().out
    assert "3 rows, per view" in printed and "other_world 2 rows, per view" in printed and "[" in printed


def clustered_rows(**settings):
    """Make rows of the tiny world of which two neighbours have the same `about.fact`."""
    examples = enumerate(tiny_world_dataset(split="test", **settings))
    return [replace(example, data={**example.data, "about": {"fact": 10 + i // 2}}) for i, example in examples]


def test_an_evaluation_resamples_the_clusters_that_its_key_names_and_keeps_them_for_a_comparison(tiny_base, tmp_path, capsys):
    rows = {"_component_": f"{__name__}.clustered_rows", "max_rows": 6}
    domains = {"other": {"dataset": rows | {"world_seed": 4321}}}
    cfg = small_config(
        "evaluate", tiny_base, tmp_path, dataset=rows, eval_samples=4, eval_success_threshold=0.2, views=["student"],
        eval_cluster_key="about.fact", domains=domains,
    )  # fmt: skip
    run("evaluate", cfg)
    results, kept = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "rows.json"))
    assert list(kept) == ["student", "clusters", "prompts", "other/student", "other/prompts"], (
        "the column is not one of the other rows"
    )
    assert sorted(kept["clusters"].values()) == ["10", "10", "11", "11", "12", "12"]
    clusters = [kept["clusters"][name] for name in kept["student"]]
    values = list(kept["student"].values())
    expected = bootstrap_interval(values, cfg.seed, clusters=clusters)
    assert results["student"]["success_interval"] == pytest.approx(expected) and results["student"]["clusters"] == 3
    assert expected != bootstrap_interval(values, cfg.seed) and "clusters" not in results["other/student"]
    assert re.search(r"clusters\s+│ +3", capsys.readouterr().out)
    cfg.eval_cluster_key = "about.facts"
    with pytest.raises(InputError, match=r"row 0 has no value in 'about.facts'; .* or remove eval_cluster_key"):
        run("evaluate", cfg)


def test_an_evaluation_shows_the_success_of_each_kind_of_row(tiny_base, tmp_path, capsys):
    rows = {"_component_": f"{__name__}.clustered_rows", "max_rows": 6}
    cfg = small_config(
        "evaluate", tiny_base, tmp_path, dataset=rows, eval_samples=4, eval_success_threshold=0.2, views=["student"],
        eval_kind_key="about.fact", domains={"other": {"dataset": rows | {"world_seed": 4321}}},
    )  # fmt: skip
    run("evaluate", cfg)
    results, kept = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "rows.json"))
    by_kind = {kind: [] for kind in ("10", "11", "12")}
    for name, value in kept["student"].items():
        by_kind[kept["kinds"][name]].append(value)
    assert len({sum(values) for values in by_kind.values()}) > 1, "alike kinds would show nothing"
    for kind, values in by_kind.items():
        assert results["student"][f"success/{kind}"] == pytest.approx(sum(values) / 2)
        assert results["student"][f"success/{kind}_interval"] == pytest.approx(bootstrap_interval(values, cfg.seed))
    assert not any("/" in key for key in results["other/student"] if key.startswith("success")) and "other/kinds" not in kept
    assert re.search(r"success/11\s+│ +\d", capsys.readouterr().out)
    cfg.eval_cluster_key = "about.fact"  # one cluster per kind has no spread
    run("evaluate", cfg)
    results = json.loads((tmp_path / "results.json").read_text())
    assert not [key for key in results["student"] if key.startswith("success/") and key.endswith("_interval")]


@dataclass(frozen=True)
class World:
    doors: frozenset[str]
    draws: random.Random
    rooms: dict[str, int]


def test_digests_are_the_same_in_every_process():
    script = (
        "import random; from unittest import mock; from pidistill.types import Example; "
        "from pidistill.data.row_marks import asked_marks; from tests.recipes.test_evaluation import World; "
        "world = World(frozenset('abcdefgh'), random.Random(0), {'x': 1}); "
        "row = Example('r', [{'role': 'user', 'content': '?'}], data={'world': world}); "
        "print(asked_marks([(row, None)]))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in "12"
    ]
    assert said[0].stdout == said[1].stdout != "", said[0].stderr


def rows_of_many_kinds():
    example = next(iter(tiny_world_dataset(split="test", max_rows=1)))
    return [replace(example, id=f"row {i}", data={**example.data, "kind": i}) for i in range(51)]


def test_a_column_with_too_many_kinds_is_refused(tiny_base, tmp_path):
    cfg = small_config(
        "evaluate", tiny_base, tmp_path, dataset={"_component_": f"{__name__}.rows_of_many_kinds"}, eval_kind_key="kind"
    )
    with pytest.raises(
        InputError, match="eval_kind_key=kind names a column with 51 different values in 51 rows; .* at most 50"
    ):
        run("evaluate", cfg)


def test_rows_keep_a_digest_of_what_they_ask(tiny_base, tmp_path):
    asked = []
    for folder, world_seed in (("a", 1), ("b", 1), ("c", 4321)):
        rows = {"_component_": f"{__name__}.clustered_rows", "max_rows": 3, "world_seed": world_seed}
        run("evaluate", small_config("evaluate", tiny_base, tmp_path / folder, dataset=rows, views=["student greedy"]))
        asked.append(json.loads((tmp_path / folder / "rows.json").read_text())["prompts"])
    assert asked[0] == asked[1] and len(asked[0]) == 3 and not set(asked[0].values()) & set(asked[2].values())


def rows_of_two_files(max_rows):
    """Make rows of which every second one has the id of the row before, and the last has no privileged information."""
    rows = list(tiny_world_dataset(split="test", max_rows=max_rows))
    rows[-1] = replace(rows[-1], privileged=None)
    return [replace(row, id=rows[i // 2 * 2].id) for i, row in enumerate(rows)]


def test_rows_with_the_same_id_stay_apart_and_rows_without_privileged_information_or_too_long_are_counted(tiny_base, tmp_path):
    cfg = small_config(
        "evaluate", tiny_base, tmp_path, dataset={"_component_": f"{__name__}.rows_of_two_files", "max_rows": 5},
        eval_success_threshold=0.2, views=["student"],
    )  # fmt: skip
    run("evaluate", cfg)
    result, rows = (json.loads((tmp_path / name).read_text())["student"] for name in ("results.json", "rows.json"))
    first, third, fifth = [example.id for example in rows_of_two_files(5)][::2]
    assert list(rows) == [first, f"{first} (2)", third, f"{third} (2)", fifth]
    assert sum(rows.values()) / 5 == pytest.approx(result["success"]) and result["rows_with_privileged"] == 4
    assert not [name for name in result if name.startswith("dropped_rows")]
    cfg.tokenizer.max_seq_len = cfg.sampler.max_new_tokens + 10  # room for the prompts without privileged information alone
    cfg.on_overflow = "drop"
    run("evaluate", cfg)
    result = json.loads((tmp_path / "results.json").read_text())["student"]
    assert result["dropped_rows/prompt_too_long"] == 4 and result["rollouts"] == result["samples"]


PENALTY = [{"_component_": "tests.rewards.test_shaping.Fixed", "value": -5.0}]


@pytest.mark.parametrize("resume", [False, "auto"])
def test_an_evaluation_that_never_worked_ends_a_fresh_run(resume, tiny_base, tmp_path):
    rows = [f"tiny_world validation row {row}" for row in range(3)]
    broken = {"environment__fail": "raise", "environment__fail_on": rows, "resume_from_checkpoint": resume}
    with pytest.raises(InputError, match="no rollout of the evaluation has a reward"):
        run("opsd", small_config("opsd", tiny_base, tmp_path, **EVALUATION, **broken))


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


def test_an_evaluation_records_the_step_that_latest_led_to_when_the_weights_were_read(tiny_base, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(tiny_base, tmp_path / "run" / "step_20")
    (tmp_path / "run" / "latest").symlink_to("step_20")
    output = tmp_path / "run" / "test"
    cfg = small_config("evaluate", tmp_path / "run" / "latest", output, dataset__max_rows=1, views=["student greedy"])
    run("evaluate", cfg)
    assert json.loads((output / "checkpoint.json").read_text()) == {"weights": "../step_20"}
    assert OmegaConf.load(output / "config.yaml").checkpointer.checkpoint_dir == str(tmp_path / "run" / "latest")
    cfg = OmegaConf.load(output / "config.yaml")
    run("evaluate", cfg)
    assert not (output / "previous_1").exists(), "the same step answers again"
    shutil.copytree(tiny_base, tmp_path / "run" / "step_40")
    (tmp_path / "run" / "latest").unlink()
    (tmp_path / "run" / "latest").symlink_to("step_40")
    run("evaluate", OmegaConf.load(output / "config.yaml"))
    assert json.loads((output / "checkpoint.json").read_text()) == {"weights": "../step_40"}
    assert json.loads((output / "previous_1" / "checkpoint.json").read_text()) == {"weights": "../../step_20"}
    (read,) = read_runs([output])
    assert list(read.evaluations) == ["student greedy"], "the report shows what was moved aside"


def test_the_weights_that_answer_are_those_of_the_adapter_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.create({"checkpointer": {"checkpoint_dir": "base"}})
    assert weights_folder(cfg) == tmp_path / "base"
    cfg.adapter_dir = "run/step_2/adapter"
    assert weights_folder(cfg) == tmp_path / "run" / "step_2" / "adapter"
    assert weights_folder(OmegaConf.create({"checkpointer": {"_component_": "from_scratch"}})) is None


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


def test_rows_that_were_left_out_do_not_hide_those_that_have_privileged_information():
    told, plain = (PromptPair([1], [1, 2], has_privileged=has) for has in (True, False))
    row = Example("row 0", [{"role": "user", "content": "?"}])
    for kept, expected in (([told], True), ([plain], False)):
        data = mock.Mock(spec=RecipeData, prompts=[(row, pair) for pair in kept], rows_without_pi=3)  # three did not fit
        domain = Domain("", data, mock.Mock(), None)
        assert [sampled(name, domain) for name in ("student", "student + PI")] == [True, expected]


def test_a_domain_of_which_no_view_is_sampled_has_no_table(tiny_base, tmp_path, capsys):
    rows = {"_component_": "pidistill.envs.tiny_world.tiny_world_dataset", "split": "test", "max_rows": 1}
    more = {"views": ["student + PI"], "domains": {"no_pi": {"dataset": rows | {"privileged": "none"}}}}
    run("evaluate", small_config("evaluate", tiny_base, tmp_path, dataset__max_rows=1, eval_samples=1, **more))
    printed = capsys.readouterr().out
    assert "1 rows, per view" in printed and "no_pi" not in printed
