"""Test sweeps: parsing, cells, skipping and resuming, several workers, stages, best on validation, the report's numbers.

Most tests replace the one function that starts processes by one that leaves the files of a recipe, and draw no pictures.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune import _recipe_registry as recipe_registry

from pidistill import commands
from pidistill.commands import main as entry
from pidistill.commands.places import config_path, keys_of_recipe, recipe_of
from pidistill.commands.sweep import check, command, execute, search
from pidistill.commands.sweep.cells import as_text, grid_cells, read_sweep, stage_runs
from pidistill.commands.sweep.check import check_cells
from pidistill.commands.sweep.groups import (
    Difference,
    group_interval,
    groups_of,
    paired_difference,
    read_evaluations,
    shared_tasks,
)
from pidistill.commands.sweep.pictures import final_metric, final_values, heat_table, mean_curve
from pidistill.commands.sweep.results import (
    best_step,
    evaluation_numbers,
    mean_and_sd,
    read_results,
    run_numbers,
    total,
    write_report,
)
from pidistill.commands.sweep.values import Choices, Range, grid_values, parse_axis, parse_overrides, split_top_level
from pidistill.errors import InputError
from pidistill.jsonl import read_jsonl, write_jsonl
from pidistill.objectives import OPSD
from pidistill.training.checkpoint_source import check_checkpoint_folder
from pidistill.training.evaluation import bootstrap_interval
from tests.support.runs import quick_setup
from tests.support.sweeps import check_commands, overrides_of

ROOT = Path(__file__).parents[2]


class OwnObjective(OPSD):
    """An objective of the user, which may write metrics of any name."""


class Recipes:
    """Stands in for execute(): a run leaves two evaluations, two checkpoints and its words; beta decides how good it gets."""

    def __init__(self) -> None:
        self.ran: list[dict[str, str]] = []
        self.fail = lambda overrides: False
        self.of_domains: dict[str, dict] = {}

    def __call__(self, words: list[str], log: Path, lock: int) -> int:
        assert words[:4] == ["pidistill", "run", "--nproc_per_node", "1"]
        assert all(word.count("=") == 1 for word in words[7:]), "torchtune splits at every ="
        overrides = overrides_of(words)
        self.ran.append({"config": words[6]} | overrides)
        if self.fail(overrides):
            log.write_text("error: beta is too much\nTraceback\nChildFailedError: recipe failed\n")
            return 2
        log.write_text("fine\n")
        folder = Path(overrides["output_dir"])
        self.evaluate(folder, overrides) if words[4].startswith("evaluate") else self.train(folder, overrides)
        return 0

    def train(self, folder: Path, overrides: dict[str, str]) -> None:
        good = float(overrides.get("objective.beta", 0.4)) + 0.01 * int(overrides.get("seed", 0))
        rows = [{"step": 0, "eval_student_success": 0.0}]
        for step in range(1, 5):
            rows.append({"step": step, "loss": 1.0, "round": (step - 1) // 2, "rollouts": 8, "completion_tokens_mean": 5.0})
            rows[-1] |= {"policy_tokens": 40 + step, "kl_teacher_student_nats": 0.1 * step}
            if step % 2 == 0:
                rows.append({"step": step, "eval_student_success": good if step == 2 else good / 2})
                (folder / f"step_{step}").mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "latest").symlink_to("step_4")

    def evaluate(self, folder: Path, overrides: dict[str, str]) -> None:
        checkpoint = Path(overrides["checkpointer.checkpoint_dir"])
        success = {"step_2": 0.75, "step_4": 0.25}.get(checkpoint.resolve().name, 0.0)
        views = {"student greedy": {"success": success + 0.1}, "student": {"success": success, "leak_frac": 0.5}}
        views |= {"student + PI": {"success": 0.9}}
        (folder / "results.json").write_text(json.dumps(views | self.of_domains))

    def trained(self) -> list[dict[str, str]]:
        return [run for run in self.ran if run["config"] != "tiny/evaluate"]


@pytest.fixture
def recipes(monkeypatch) -> Recipes:
    made = Recipes()
    monkeypatch.setattr(execute, "execute", made)
    monkeypatch.setattr(command, "draw", lambda output_dir, rows: [])
    monkeypatch.setattr(check, "check_checkpoint_folder", lambda cfg, key: None)  # no test makes its bases
    return made


@pytest.fixture
def sweep(tmp_path):
    """Run the command in this process, into tmp_path/out; return the last row of each cell. Status 1 must mean a failed one."""

    def run(*words: str) -> dict[str, dict]:
        status = 0
        try:
            command.main([*words, "--output-dir", str(tmp_path / "out")])
        except SystemExit as end:
            status = end.code
            if status != 1:
                raise
        rows = read_results(tmp_path / "out")
        assert status == int(any(row["status"] == "failed" for row in rows.values()))
        return rows

    return run


# ------------------------------------------------------------------------------------------- words


def test_values_are_split_outside_of_brackets_only():
    assert split_top_level("0,{start: 1, end: [0, 1]},a b") == ["0", "{start: 1, end: [0, 1]}", "a b"]


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("0,0.5,1", Choices(("0", "0.5", "1"))),
        ("0..2", Range(0, 2, whole=True, log=False)),
        ("-1..1", Range(-1, 1, whole=True, log=False)),
        ("0.0..2", Range(0, 2, whole=False, log=False)),
        ("log:1e-5..1e-2", Range(1e-5, 1e-2, whole=False, log=True)),
        ("runs/../base", Choices(("runs/../base",))),
    ],
)
def test_the_values_of_a_key_are_read_as_choices_or_as_a_range(text, axis):
    assert parse_axis(text) == axis


def test_ranges_of_whole_numbers_include_both_ends_and_others_have_no_grid():
    assert grid_values("seed", parse_axis("-1..2")) == ("-1", "0", "1", "2")
    with pytest.raises(InputError, match="objective.beta=0..1 is a continuous range"):
        grid_values("objective.beta", parse_axis("0.0..1.0"))
    for text in ("2..1", "log:0.0..1.0"):
        with pytest.raises(InputError, match="range"):
            parse_axis(text)


def test_overrides_are_fixed_swept_or_seeds():
    fixed, axes, seeds = parse_overrides(["max_steps=3", "objective.beta=0,1", "seed=1..3"])
    assert fixed == {"max_steps": "3"}
    assert axes == {"objective.beta": Choices(("0", "1"))}
    assert seeds == (1, 2, 3)
    for word in ("beta", "=3", "output_dir=here", "seed=x"):
        with pytest.raises(InputError):
            parse_overrides([word])


@pytest.mark.parametrize(
    "value", [None, True, 3, 1e-4, "a b", {"start": 1.0, "end": 0, "steps": 4}, [1, "x"], "runs/{sft}/latest"]
)
def test_a_value_of_a_sweep_file_arrives_as_the_same_value(value):
    text = as_text(value)
    assert "\n" not in text
    if not (isinstance(value, str) and "{" in value):
        assert OmegaConf.to_container(OmegaConf.from_dotlist([f"key={text}"]))["key"] == value


def test_the_recipe_comes_from_the_configs_first_line(tmp_path):
    assert recipe_of("tiny/pi_distill") == recipe_of(str(ROOT / "configs/tiny/pi_distill.yaml")) == "pi_distill_distributed"
    own = tmp_path / "own.yaml"
    own.write_text("# tune run --nproc_per_node 1 my/recipe.py --config own.yaml\nseed: 0\n")
    assert recipe_of(str(own)) == "my/recipe.py"
    own.write_text("# pidistill run opsd_distributed --config own.yaml\nseed: 0\n")
    assert recipe_of(str(own)) == "opsd_distributed"
    own.write_text("seed: 0\n")
    with pytest.raises(InputError, match="does not say its recipe; begin it with a line like"):
        recipe_of(str(own))
    with pytest.raises(InputError, match="config tiny/nothing is neither a file nor a bundled config"):
        config_path("tiny/nothing")


@pytest.mark.parametrize("named", ["opsd_distributed.py", "recipes/opsd_distributed.py"])
def test_an_edited_copy_of_a_recipe_in_the_working_folder_is_run_in_place_of_the_bundled_one(named, tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text(f"# tune run --nproc_per_node 1 {named} --config own.yaml\nseed: 0\n")
    monkeypatch.chdir(tmp_path)
    assert recipe_of("own.yaml") == "opsd_distributed"  # there is no such file: the bundled one is meant
    Path(named).parent.mkdir(exist_ok=True)
    text = (ROOT / "recipes" / "opsd_distributed.py").read_text()
    Path(named).write_text(text.replace('keys_of("opsd")', 'keys_of("opsd") | {"my_key"}'))
    assert recipe_of("own.yaml") == named
    assert "my_key" in keys_of_recipe(recipe_of("own.yaml"))[0]
    assert recipe_of("tiny/opsd") == "opsd_distributed"  # a bundled config's line names the bundled recipe
    monkeypatch.chdir(ROOT)
    assert recipe_of(str(own)) == "opsd_distributed"


# ------------------------------------------------------------------------------------------- cells


def test_the_grid_is_the_product_and_every_cell_one_command():
    sweep = read_sweep("tiny/pi_distill,tiny/opsd", ["objective.beta=0,1", "max_steps=2", "seed=0..2"], output_dir=Path("out"))
    cells = grid_cells(sweep)
    expected = itertools.product(["tiny/pi_distill", "tiny/opsd"], ["0", "1"], [0, 1, 2])
    assert [(cell.arm.name, cell.settings["objective.beta"], cell.seed) for cell in cells] == list(expected)
    runs = [list(stage_runs(sweep, cell)) for cell in cells]
    assert all(len(stages) == 1 for stages in runs)
    assert len({stages[0].folder for stages in runs}) == len({stages[0].fingerprint for stages in runs}) == 12
    words = runs[0][0].command
    assert words[:7] == ["pidistill", "run", "--nproc_per_node", "1", "pi_distill_distributed", "--config", "tiny/pi_distill"]
    folder = "out/runs/tiny-pi_distill+max_steps_2+objective.beta_0+seed_0"
    assert overrides_of(words) == {"output_dir": folder, "max_steps": "2", "objective.beta": "0", "seed": "0"}


STAGES = """
base: some/base
seeds: [0, 1]
overrides: {save_every_steps: 2, batch_size: 7}
evaluate: tiny/evaluate
arms:
  sft: {config: tiny/sft, overrides: {batch_size: 8}}
  sft_rl:
    title: SFT → RL
    stages:
      - {name: sft, config: tiny/sft, overrides: {batch_size: 8}}
      - {name: rl, config: tiny/rl, overrides: {checkpointer.checkpoint_dir: "{sft}/latest"}}
  opsd: {config: tiny/opsd}
controls:
  arms: [opsd]
  values: {none: {privileged.control: none}}
"""


@pytest.fixture
def stages_file(tmp_path) -> str:
    (tmp_path / "stages.yaml").write_text(STAGES)
    return str(tmp_path / "stages.yaml")


def test_stages_name_the_folders_of_earlier_ones_and_start_from_the_base(stages_file):
    sweep = read_sweep(stages_file, output_dir=Path("out"))
    assert [arm.name for arm in sweep.arms] == ["base", "sft", "sft_rl", "opsd", "opsd [none]"]
    cells = {cell.id: list(stage_runs(sweep, cell)) for cell in grid_cells(sweep)}
    assert next(iter(cells)) == "base" and len(cells) == 1 + 4 * 2
    first, second = cells["sft_rl,seed=1"]
    assert first.folder == cells["sft,seed=1"][0].folder, "the same run of the same stage"
    assert first.folder != cells["sft_rl,seed=0"][0].folder
    assert overrides_of(first.command)["checkpointer.checkpoint_dir"] == "some/base"
    assert overrides_of(second.command)["checkpointer.checkpoint_dir"] == f"{first.folder}/latest"
    # Keys of the file go where a config has them, and an arm's own value wins.
    assert overrides_of(first.command).keys() == {
        "output_dir", "checkpointer.checkpoint_dir", "save_every_steps", "batch_size", "seed"
    }  # fmt: skip
    assert overrides_of(first.command)["batch_size"] == "8"
    assert "batch_size" not in overrides_of(second.command)
    (control,) = cells["opsd [none],seed=0"]
    assert overrides_of(control.command)["privileged.control"] == "none"


def test_typed_keys_go_to_the_stages_that_have_their_first_part_or_else_to_all(stages_file):
    sweep = read_sweep(
        stages_file, ["objective.clip_lwo=0.5", "nothing=1", "max_steps=2"], output_dir=Path("out"), arms=["sft_rl"]
    )
    (first, second) = stage_runs(sweep, grid_cells(sweep)[0])
    keys = {"max_steps", "nothing", "objective.clip_lwo"}
    assert keys & overrides_of(first.command).keys() == {"max_steps", "nothing"}
    assert keys & overrides_of(second.command).keys() == keys, "a wrong key reaches the recipe, which knows its keys"


def test_a_typed_key_does_not_replace_what_a_stage_takes_from_an_earlier_one(tmp_path):
    (tmp_path / "rft.yaml").write_text(
        "arms:\n  rft:\n    stages:\n      - {name: sample, config: examples/gsm8k/rft_sample.yaml}\n"
        "      - {name: sft, config: examples/gsm8k/rft.yaml, overrides: {dataset.source: '{sample}/traces.jsonl'}}\n"
    )
    words = ["dataset.source=train.jsonl", "eval_dataset.source=train.jsonl"]
    sweep = read_sweep(str(tmp_path / "rft.yaml"), words, output_dir=Path("out"))
    first, second = (overrides_of(run.command) for run in stage_runs(sweep, grid_cells(sweep)[0]))
    assert first["dataset.source"] == "train.jsonl" and second["eval_dataset.source"] == "train.jsonl"
    assert second["dataset.source"] == f"{first['output_dir']}/traces.jsonl"


def test_the_evaluation_runs_where_the_training_is_told_to(recipes, sweep, stages_file, capsys):
    sweep(stages_file, "--arms", "base", "opsd", "device=cpu", "threads=1", "group_size=4", "seed=0")
    assert len(recipes.ran) == 3 + 1
    assert all((run["device"], run["threads"]) == ("cpu", "1") for run in recipes.ran)
    assert [run.get("group_size") for run in recipes.ran] == [None, "4", None, None]
    capsys.readouterr()
    sweep(stages_file, "--arms", "base", "device=cpu", "threads=2")
    assert len(recipes.ran) == 3 + 1  # where it runs makes it no other evaluation, and the cell no other cell
    assert "changed" not in "".join(capsys.readouterr())


def test_where_a_cell_runs_makes_it_no_other_cell_unless_that_is_swept(recipes, sweep):
    first = sweep("tiny/opsd", "seed=0", "threads=1", "device=cpu", "--evaluate", "tiny/evaluate")
    assert list(first) == ["tiny/opsd,seed=0"] and first["tiny/opsd,seed=0"]["settings"] == {}
    assert all(run["threads"] == "1" and run["device"] == "cpu" for run in recipes.ran)
    done = len(recipes.ran)
    again = sweep("tiny/opsd", "seed=0", "threads=2", "--evaluate", "tiny/evaluate")
    assert list(again) == list(first) and len(recipes.ran) == done
    assert len(sweep("tiny/opsd", "seed=0", "threads=1,2")) == 1 + 2 and len(recipes.ran) == done + 2


def test_a_sweep_file_is_checked(tmp_path):
    path = tmp_path / "sweep.yaml"
    for text, message in {
        "arms: {a: {config: tiny/rl}}\nseed: [0]": "key seed, which nothing reads",
        "arms: {a: {confg: tiny/rl}}": "arm a has the key confg",
        "arms: {a: {title: x}}": "a stage needs `config`",
        "arms: {a: {config: tiny/rl, overrides: {checkpointer.checkpoint_dir: '{base}/x'}}}": "the sweep has no `base`",
        "arms: {a: {config: tiny/rl}}\ncontrols: {arms: [b], values: {none: {x: 1}}}": "controls name the arm b",
        "arms: {a: {config: tiny/rl}}\ncontrols: {arms: [a]}": "controls: values is missing or empty",
        "arms: {a: {config: tiny/rl}}\ncontrols: {arms: [a], values: {none: x}}": "controls.values: none is 'x', and must",
        "arms: [tiny/rl]": r"arms is \['tiny/rl'\], and must be a mapping",
        "arms: ": "arms is missing or empty",
        "arms: {a: tiny/rl}": "arm a is 'tiny/rl', and must be a mapping with title, config",
        "arms: {a: {stages: {x: tiny/rl}}}": "arm a: stages is .*, and must be a list",
        "arms: {a: {config: tiny/rl}}\nseeds: 3": "seeds is 3, and must be a list",
        "arms: {a: {config: tiny/rl}}\nbase: 3": "base is 3, and must be a text or a list",
        "arms: {a: {config: tiny/rl, overrides: [a=b]}}": "overrides is .*, and must be a mapping",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_sweep(str(path))
    path.write_text("arms: {a: {config: tiny/rl}}")
    with pytest.raises(InputError, match="arm b is not in the sweep; known here: a$"):
        read_sweep(str(path), arms=["b"])


SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_bundled_sweeps_name_configs_and_keys_that_exist(path):
    assert path.read_text().startswith(f"# pidistill sweep configs/sweeps/{path.name}")
    sweep = read_sweep(f"sweeps/{path.stem}")
    cells = grid_cells(sweep)
    assert len(cells) > 2 and len({cell.id for cell in cells}) == len(cells)
    first_seeds = {(cell.arm.name, json.dumps(cell.settings)): cell for cell in reversed(cells)}.values()
    for cell in first_seeds:  # another seed is another number under the same key
        check_commands(sweep, cell)
    assert len(SWEEPS) >= 2


# ------------------------------------------------------------------------------------------- running


def test_cells_run_are_evaluated_and_land_in_the_results(recipes, sweep, tmp_path, capsys):
    rows = sweep("tiny/opsd", "objective.beta=0.2,0.4", "seed=0,1", "--evaluate", "tiny/evaluate")
    assert list(rows) == [f"tiny/opsd,objective.beta={beta},seed={seed}" for beta in (0.2, 0.4) for seed in (0, 1)]
    row = rows["tiny/opsd,objective.beta=0.4,seed=1"]
    assert row["status"] == "ok" and row["config"] == "tiny/opsd" and row["settings"] == {"objective.beta": "0.4"}
    # Step 2 is the better one on validation, step 4 the last: each evaluated on the held-out split.
    assert row["validation"] == {
        "metric": "eval_student_success", "last": pytest.approx(0.205), "best": pytest.approx(0.41), "best_step": 2
    }  # fmt: skip
    assert (row["last"]["step"], row["last"]["student_success"]) == (4, 0.25)
    assert (row["best"]["step"], row["best"]["student_success"]) == (2, 0.75)
    assert row["last"]["student_with_pi_success"] == 0.9 and row["last"]["leak_frac"] == 0.5
    # Two rounds of 8 rollouts of 5 tokens, each trained on twice.
    assert (row["rollouts"], row["policy_tokens_sampled"], row["policy_tokens_trained"], row["steps"]) == (16, 80, 170, 4)
    assert row["kl_teacher_student_nats"] == pytest.approx(0.25)
    assert row["stages"][0]["command"].startswith(
        "pidistill run --nproc_per_node 1 opsd_distributed --config tiny/opsd output_dir="
    )
    assert len(recipes.ran) == 4 * 3
    printed = capsys.readouterr().out
    assert printed.count("$ pidistill run") == 12
    assert (
        "Best on validation (eval_student_success at the last evaluation, mean over 2 seeds): tiny/opsd objective.beta=0.4"
        in printed
    )
    assert "| tiny/opsd objective.beta=0.4 | 2 | 0.350 ± 0.000 | 0.250 ± 0.000 |" in (tmp_path / "out/results.md").read_text()


def test_the_table_shows_the_greedy_success_on_other_rows(recipes, sweep, tmp_path):
    recipes.of_domains = {"other/student greedy": {"success": 0.625}, "other/student": {"success": 0.5}}
    recipes.of_domains["no/student greedy"] = {}
    sweep("tiny/opsd", "objective.beta=0.4", "seed=0,1", "--evaluate", "tiny/evaluate")
    head, _, row = (tmp_path / "out/results.md").read_text().split("\n| arm")[1].split("\n")[:3]
    cells = dict(zip(head.split(" | ")[1:], row.split(" | ")[1:], strict=True))
    assert cells["other, greedy"] == "0.625 ± 0.000" and not any(name.startswith("no,") for name in cells)


def test_finished_cells_are_skipped_and_new_ones_join(recipes, sweep, capsys):
    sweep("tiny/opsd", "objective.beta=0.2", "seed=0")
    sweep("tiny/opsd", "objective.beta=0.2", "seed=0..1")
    assert [run["seed"] for run in recipes.ran] == ["0", "1"]
    assert "2 cells, 1 of them finished before" in capsys.readouterr().out
    sweep("tiny/opsd", "objective.beta=0.2", "seed=0..1")
    assert len(recipes.ran) == 2


def test_a_failed_cell_is_reported_leaves_the_rest_alone_and_is_tried_again(recipes, sweep, capsys):
    recipes.fail = lambda overrides: overrides.get("objective.beta") == "9"
    rows = sweep("tiny/opsd", "objective.beta=9,0.4", "--evaluate", "tiny/evaluate")
    assert [row["status"] for row in rows.values()] == ["failed", "ok"]
    error = rows["tiny/opsd,objective.beta=9"]["error"]
    assert error.startswith("exit code 2: error: beta is too much (all of it in ") and error.endswith("/log.txt)")
    printed = capsys.readouterr().out
    assert "FAILED tiny/opsd,objective.beta=9: exit code 2" in printed and "0 (1 failed)" in printed
    recipes.fail = lambda overrides: False
    done = len(recipes.ran)
    assert {row["status"] for row in sweep("tiny/opsd", "objective.beta=9,0.4", "--evaluate", "tiny/evaluate").values()} == {
        "ok"
    }
    assert [run.get("objective.beta") for run in recipes.ran[done:]] == ["9", None, None]


def test_a_failed_evaluation_does_not_repeat_the_training(recipes, sweep):
    recipes.fail = lambda overrides: overrides.get("checkpointer.checkpoint_dir", "").endswith("step_2")
    words = ("tiny/opsd", "seed=0", "--evaluate", "tiny/evaluate")
    assert sweep(*words)["tiny/opsd,seed=0"]["status"] == "failed"
    recipes.fail = lambda overrides: False
    assert sweep(*words)["tiny/opsd,seed=0"]["status"] == "ok"
    assert len(recipes.trained()) == 1 and len(recipes.ran) == 1 + 1 + 1 + 1


def test_a_changed_config_is_noticed_and_its_cells_run_again(recipes, sweep, tmp_path, capsys):
    config = tmp_path / "own.yaml"
    text = (ROOT / "configs/tiny/opsd.yaml").read_text()
    config.write_text(text)
    sweep(str(config), "seed=0")
    config.write_text(text.replace("# more: closer", "# more is closer"))
    sweep(str(config), "seed=0")
    assert len(recipes.ran) == 1, "a comment changes nothing"
    (leftover,) = (tmp_path / "out/runs").glob("own*")
    (leftover / "step_99").mkdir()
    config.write_text(text.replace("max_steps: 80", "max_steps: 81"))
    rows = sweep(str(config), "seed=0")
    assert len(recipes.ran) == 2 and len(rows) == 1
    assert "its config has changed since" in capsys.readouterr().out
    assert not (leftover / "step_99").exists(), "a checkpoint of the earlier run would pass for one of this"


def test_a_changed_first_stage_reruns_the_second(recipes, sweep, tmp_path):
    config, file = tmp_path / "own_sft.yaml", tmp_path / "two.yaml"
    text = (ROOT / "configs/tiny/sft.yaml").read_text()
    config.write_text(text)
    file.write_text(STAGES.split("arms:")[0] + "arms:\n  sft_rl:\n" + STAGES.split("sft_rl:\n")[1].split("  opsd:")[0])
    file.write_text(file.read_text().replace("tiny/sft", str(config)))
    sweep(str(file), "--seeds", "0")
    assert [run["config"] for run in recipes.trained()] == [str(config), "tiny/rl"]
    config.write_text(text.replace("lr: 3e-4", "lr: 1e-4"))
    sweep(str(file), "--seeds", "0")
    assert [run["config"] for run in recipes.trained()] == [str(config), "tiny/rl"] * 2


def test_shared_stages_run_once_and_costs_are_summed(recipes, sweep, stages_file):
    rows = sweep(stages_file, "--seeds", "0", "--arms", "base", "sft", "sft_rl")
    assert [run["config"] for run in recipes.trained()] == ["tiny/sft", "tiny/rl"]
    assert rows["base"]["last"]["student_success"] == 0.0 and rows["base"]["stages"] == []
    assert rows["sft_rl,seed=0"]["steps"] == 8 and rows["sft,seed=0"]["steps"] == 4
    assert rows["sft_rl,seed=0"]["rollouts"] == 32
    evaluations = [run["checkpointer.checkpoint_dir"] for run in recipes.ran if run["config"] == "tiny/evaluate"]
    assert evaluations[0] == "some/base" and len(evaluations) == 5


def test_several_bases_run_every_arm_from_each_and_the_table_says_how_far_they_spread(recipes, sweep, stages_file, tmp_path):
    success = {"one": 0.2, "two": 0.6}

    def evaluate(folder: Path, overrides: dict[str, str]) -> None:
        origin = json.loads((Path(overrides["checkpointer.checkpoint_dir"]).parent / "origin.json").read_text())
        seed = 0.1 * int(origin.get("seed", 0))
        by_task = {"a": success[origin["checkpointer.checkpoint_dir"]], "b": 1 - seed}
        (folder / "rows.json").write_text(json.dumps({"student": by_task}))
        (folder / "results.json").write_text(json.dumps({"student": {"success": statistics.fmean(by_task.values())}}))

    train = recipes.train
    recipes.train = lambda folder, overrides: [
        train(folder, overrides),
        (folder / "origin.json").write_text(json.dumps(overrides)),
    ]
    recipes.evaluate = evaluate
    rows = sweep(stages_file, "--arms", "sft", "opsd", "--base", "one", "two")
    assert set(rows) == {f"{arm},base={base},seed={seed}" for arm in ("sft", "opsd") for base in success for seed in (0, 1)}
    started = {(run["config"], run["checkpointer.checkpoint_dir"], run["seed"]) for run in recipes.trained()}
    assert started == {(f"tiny/{arm}", base, str(seed)) for arm in ("sft", "opsd") for base in success for seed in (0, 1)}
    first = next(group for group in groups_of(list(rows.values())) if group.arm == "sft")
    assert len(first.rows) == 4 and [len(part.rows) for part in first.by_base()] == [2, 2]
    # Per task the mean over the seeds of a base, then bases and tasks are resampled.
    expected = bootstrap_interval([[0.2, 0.95], [0.6, 0.95]], seed=0, resamples=4000)
    assert group_interval(tmp_path / "out", first) == (expected, "bases × tasks")
    table = (tmp_path / "out/results.md").read_text()
    assert "between bases" in table and f"{statistics.stdev([0.575, 0.775]):.3f} of 2" in table and "Bases: one, two" in table


def test_several_bases_are_evaluated_once_each_before_the_arms(recipes, sweep, stages_file):
    rows = sweep(stages_file, "--arms", "base", "--base", "one", "two")
    assert set(rows) == {"base,base=one", "base,base=two"} and len({row["last"]["folder"] for row in rows.values()}) == 2
    assert [run["checkpointer.checkpoint_dir"] for run in recipes.ran] == ["one", "two"]


def test_a_base_that_was_run_alone_before_counts_once_among_several(recipes, sweep, stages_file, tmp_path):
    sweep(stages_file, "--arms", "base", "opsd", "--base", "one")
    first = len(recipes.ran)
    rows = sweep(stages_file, "--arms", "base", "opsd", "--base", "one", "two")
    assert len(recipes.trained()) == 4 and len(recipes.ran) == first + 2 + 2 * 3, (
        "of the first base only itself is evaluated again"
    )
    groups = {group.arm: group for group in groups_of(list(rows.values()))}
    assert [len(groups[arm].rows) for arm in ("base", "opsd")] == [2, 4]
    assert [[row["base"] for row in part.rows] for part in groups["opsd"].by_base()] == [["one"] * 2, ["two"] * 2]


@pytest.mark.parametrize("bases", ["[]", "[a, a]"])
def test_bases_that_are_none_or_equal_are_refused(bases, tmp_path):
    (tmp_path / "sweep.yaml").write_text(f"base: {bases}\narms: {{a: {{config: tiny/rl}}}}")
    with pytest.raises(InputError, match="name one checkpoint, or several that differ"):
        read_sweep(str(tmp_path / "sweep.yaml"))


def test_a_folder_that_no_sweep_wrote_is_not_emptied(recipes, sweep, tmp_path):
    folder = tmp_path / "out/runs/tiny-opsd+seed_0"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("precious")
    rows = sweep("tiny/opsd", "seed=0")
    assert "holds files that no sweep wrote" in rows["tiny/opsd,seed=0"]["error"]
    assert (folder / "mine.txt").read_text() == "precious" and not recipes.ran


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["tiny/opsd", "objective.bta=1", "seed=0"], "objective.bta is not an argument"),
        (["tiny/opsd", "group_size=2,0"], "cell tiny/opsd,group_size=0 cannot run, so nothing was started: group_size=0"),
        (["tiny/opsd", "objective._component_=pidistill.objectives.OPSD,pidistill.objectives.Nothing"], "Nothing"),
        (["tiny/opsd", "no_such_key=1..3", "--search", "random", "--trials", "2"], "no_such_key"),
        (["tiny/opsd", "group_size=0..4", "--search", "tpe", "--trials", "2"], "group_size=0"),
        (["tiny/opsd", "--evaluate", "tiny/rl"], "tiny/rl is no config of an evaluation"),
    ],
)
def test_all_cells_are_checked_before_the_first_one_starts(recipes, sweep, tmp_path, words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        sweep("--evaluate", "tiny/evaluate", *words)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said.startswith("error: ") and "\n" not in said
    assert sentence in said and "nothing was started" in said
    assert not recipes.ran and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["tiny/opsd", "objective.bta=1"], "objective.bta is not an argument"),
        (["tiny/opsd", "group_size=2,0"], "group_size=0"),
        (["tiny/opsd", "--select", "eval_student_sucess"], "did you mean eval_student_success?"),
        (["tiny/opsd", "--trials", "2"], "--trials counts the trials of random and tpe"),
        (["tiny/opsd", "objective.beta=0.1..1.0", "--search", "tpe", "--trials", "2"], "--dry-run prints a grid's commands"),
    ],
)
def test_a_dry_run_refuses_what_the_sweep_refuses(sweep, words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        sweep("--dry-run", *words)
    printed = capsys.readouterr()
    assert end.value.code == 2 and sentence in printed.err and printed.out == ""


def test_a_dry_run_prints_commands_alone_and_needs_no_checkpoint(sweep, tmp_path, capsys):
    words = ["tiny/opsd", "seed=0,1", "--base", str(tmp_path / "base"), "--evaluate", "tiny/evaluate"]
    assert not sweep("--dry-run", *words, "eval_dataset.split=test", "eval_dataset.max_rows=7")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2 and all(line.startswith("pidistill run ") for line in lines) and not (tmp_path / "out").exists()
    assert "`eval_dataset` reads the rows of the evaluation" in printed.err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--select", "eval_student_sucess"],
         "select=eval_student_sucess is no metric of a run, so nothing was started; did you mean eval_student_success?"),
        (["--select", "succes_frac"], "did you mean success_frac?"),
        (["objective.beta=0.1..1.0", "--search", "tpe", "--trials", "2", "eval_dataset=null"],
         "tiny/opsd: select=eval_student_success is measured on `eval_dataset`"),
    ],
)  # fmt: skip
def test_a_metric_that_no_run_writes_is_refused_before_the_first_cell_starts(recipes, sweep, tmp_path, words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        sweep("tiny/opsd", *words)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and sentence in said and "nothing was started" in said and "\n" not in said
    assert not recipes.ran and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ["--select", "eval_reward/success_strict"], ["--select", "kl_teacher_student_q2"], ["--select", "reward/format"],
    ["--select", "selected_frac"], ["eval_dataset=null"], ["eval_every_steps=null", "--select", "eval_teacher_success"],
    ["--select", "succes_frac", "objective._component_=tests.commands.test_sweep.OwnObjective"],
    ["--select", "masked_success_frac", "eval_dataset=null"], ["--select", "eval_teacher_success", "eval_dataset=null"],
], ids=" ".join)  # fmt: skip
def test_metrics_that_a_run_may_write_and_grids_without_validation_are_taken(recipes, sweep, words, capsys):
    assert sweep("tiny/opsd", *words) and recipes.ran
    told = "tiny/opsd: select=eval_teacher_success is measured on `eval_dataset`, which the config lacks, so that nothing"
    assert (told in capsys.readouterr().out) == ("eval_dataset=null" in words and "eval_teacher_success" in words)


@pytest.mark.parametrize("split, said", [("test", True), ("validation", False)])
def test_validation_rows_that_the_evaluation_reads_too_are_said(recipes, sweep, split, said, capsys):
    sweep("tiny/opsd", f"eval_dataset.split={split}", "eval_dataset.max_rows=7", "--evaluate", "tiny/evaluate")
    assert ("tiny/opsd: `eval_dataset` reads the rows of the evaluation" in capsys.readouterr().out) is said


@pytest.mark.parametrize("more", [[], ["--evaluate", "tiny/evaluate"]])
def test_a_base_that_does_not_exist_is_refused_before_the_first_cell_starts(
    recipes, sweep, tmp_path, more, monkeypatch, capsys
):
    monkeypatch.setattr(check, "check_checkpoint_folder", check_checkpoint_folder)
    with pytest.raises(SystemExit) as end:
        sweep("tiny/opsd", "--base", str(tmp_path / "nothing"), *more)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and f"checkpoint folder {tmp_path / 'nothing'} does not exist" in said
    assert "nothing was started" in said and not recipes.ran and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command_, library", [("sweep", "optuna"), ("demo", "matplotlib")])
def test_a_missing_library_is_one_sentence_with_the_extra_that_installs_it(command_, library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    for name in list(sys.modules):  # so that they are imported again, and put back in the end
        if name.startswith(("pidistill.commands.sweep", "pidistill.commands.demo")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("sweep", "demo"):
        monkeypatch.setattr(commands, name, None, raising=False)
    monkeypatch.setattr(sys, "argv", ["pidistill", command_, "--help"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said.startswith(f"error: the library {library} is not usable here")
    assert "pip install 'pidistill[sweep]'" in said


def test_wrong_commands_get_one_sentence(sweep, capsys):
    for words, sentence in [
        (("tiny/opsd", "objective.beta=0.0..1.0"), "has no grid"),
        (("tiny/opsd", "objective.beta=0,1", "--trials", "2"), "--trials counts the trials of random and tpe"),
        (("tiny/opsd", "objective.beta=0,1", "--search", "tpe"), "needs --trials of at least 1"),
        (("tiny/opsd", "seed=0,1", "--search", "tpe", "--trials", "2"), "a key to search"),
        (("tiny/opsd", "--workers", "0"), "--workers=0 must be at least 1"),
        ((), "name a config or a sweep file"),
        (
            ("configs/sweeps/methods.yaml", "--arms", "rl", "pi_distil"),
            "arm pi_distil is not in the sweep; did you mean pi_distill?",
        ),
        (("tiny/opsd", "--evaluate", "tiny/evalute"), "a bundled config; did you mean tiny/evaluate?"),
        (("tiny/opsd,tiny/rl", "--against", "tiny/opsdd"), "--against tiny/opsdd is no arm here; did you mean tiny/opsd?"),
        (("--report", "nowhere"), "nowhere has no results.jsonl"),
    ]:
        with pytest.raises(SystemExit):
            sweep(*words)
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and sentence in said and "\n" not in said


# ------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_search_runs_each_setting_with_all_seeds_and_goes_on_where_it_was(recipes, sweep, search):
    words = ("tiny/opsd", "objective.beta=log:0.1..1.0", "objective.clip_low=0.7,0.8", "seed=0,1", "--search", search)
    rows = sweep(*words, "--trials", "3")
    settings = [json.dumps(row["settings"]) for row in rows.values()]
    assert len(settings) == 6 and len(set(settings)) == 3, "three trials of two seeds, no two alike"
    for row in rows.values():
        assert 0.1 <= float(row["settings"]["objective.beta"]) <= 1.0
        assert row["settings"]["objective.clip_low"] in ("0.7", "0.8")
    sweep(*words, "--trials", "3")
    assert len(recipes.ran) == 6
    assert len(sweep(*words, "--trials", "4")) == 8 and len(recipes.ran) == 8


def test_the_objective_of_a_trial_is_the_mean_of_the_last_validation_values(recipes, sweep, tmp_path):
    import optuna

    recipes.fail = lambda overrides: float(overrides["objective.beta"]) > 0.9
    sweep("tiny/opsd", "objective.beta=0.2,0.6,0.95", "seed=0,1", "--search", "random", "--trials", "8")
    storage = f"sqlite:///{tmp_path / 'out/study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    assert len(trials) == 8 and {trial.state.name for trial in trials} == {"COMPLETE", "FAIL"}
    for trial in trials:
        beta = float(trial.params["objective.beta"])
        expected = None if beta > 0.9 else pytest.approx(statistics.fmean([beta / 2, (beta + 0.01) / 2]))
        assert trial.value == expected
    assert len([run for run in recipes.ran if run["objective.beta"] == "0.2"]) == 2, "a setting drawn twice runs once"


def test_a_search_from_several_bases_has_its_trials_from_each(recipes, sweep, stages_file, capsys):
    words = (stages_file, "objective.beta=0.1..1.0", "--search", "random", "--trials", "2", "--arms", "opsd", "--seeds", "0")
    rows = sweep(*words, "--base", "one", "two")
    assert [row["base"] for row in rows.values()] == ["one", "one", "two", "two"]
    assert "this one starts from the beginning" not in capsys.readouterr().out


def test_a_changed_config_starts_a_search_anew(recipes, sweep, tmp_path, capsys):
    config = tmp_path / "own.yaml"
    text = (ROOT / "configs/tiny/opsd.yaml").read_text()
    words = (str(config), "objective.beta=0.1..1.0", "--search", "tpe", "--trials", "2")
    config.write_text(text)
    sweep(*words)
    config.write_text(text.replace("max_steps: 80", "max_steps: 81"))
    sweep(*words)
    assert len(recipes.ran) == 4
    assert "this one starts from the beginning" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- several workers


def work(folder: Path, wait_s: float, words: tuple[str, ...], output: Path) -> None:
    """Be a worker whose runs take ``wait_s``; each leaves a line in the file `started` first."""
    fake = Recipes()

    def slow(words: list[str], log: Path, lock: int) -> int:
        with (folder / "started").open("a") as file:
            file.write(words[7].rpartition("/")[2] + "\n")
        time.sleep(wait_s)
        return fake(words, log, lock)

    execute.execute = slow
    command.draw = lambda output_dir, rows: []
    check.check_checkpoint_folder = lambda cfg, key: None
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        command.main([*words, "--output-dir", str(folder / "out")])


class Worker:
    """A worker in a process of its own: a copy of this one, which has imported everything already."""

    def __init__(self, folder: Path, wait_s: float, *words: str) -> None:
        self.output = folder / f"worker_{time.monotonic_ns()}.txt"
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(folder, wait_s, words, self.output))
        self.process.start()

    def ended(self) -> str:
        self.process.join(120)
        text = self.output.read_text()
        assert self.process.exitcode == 0, text
        return text


@pytest.mark.parametrize("search", [(), ("--search", "random", "--trials", "6")])
def test_two_workers_on_one_folder_share_the_cells(tmp_path, search):
    values = "objective.beta=0.0..1.0" if search else "objective.beta=0,0.1,0.2,0.3,0.4,0.5"
    workers = [Worker(tmp_path, 0.3, "tiny/opsd", values, *search) for _ in range(2)]
    outputs = [worker.ended() for worker in workers]
    started = (tmp_path / "started").read_text().split()
    assert len(started) == len(set(started)) == 6
    rows = read_jsonl(tmp_path / "out/results.jsonl")
    assert len(rows) == 6 and all(row["status"] == "ok" for row in rows)
    assert all(output.count("$ pidistill run") >= 1 for output in outputs), "both worked"


def test_a_command_starts_the_workers_that_it_is_asked_for(tmp_path, monkeypatch):
    """Fork them here, with the stand-in: they would import everything again."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(search.multiprocessing, "get_context", lambda method: fork)
    plan = search.SweepPlan(read_sweep("tiny/opsd"), "grid", 0)
    assert pickle.loads(pickle.dumps(plan)) == plan, "a spawned worker could not be given its plan"
    Worker(tmp_path, 0.1, "tiny/opsd", "objective.beta=0,0.1,0.2", "--workers", "2").ended()
    assert len((tmp_path / "started").read_text().split()) == 3
    assert {row["status"] for row in read_results(tmp_path / "out").values()} == {"ok"}


def test_what_a_killed_worker_left_is_taken_over(tmp_path):
    words = ("tiny/opsd", "objective.beta=0.1,0.2")
    killed = Worker(tmp_path, 60, *words)
    waited = time.monotonic()
    while not (tmp_path / "started").exists():
        assert killed.process.is_alive() and time.monotonic() - waited < 60
        time.sleep(0.05)
    killed.process.kill()
    killed.process.join()
    Worker(tmp_path, 0, *words).ended()
    started = (tmp_path / "started").read_text().split()
    assert len(started) == 3 and len(set(started)) == 2
    assert {row["status"] for row in read_results(tmp_path / "out").values()} == {"ok"}


def test_a_cell_whose_run_outlives_its_worker_is_left_alone(tmp_path):
    """The run holds the lock too: a second one must not start over in the folder that the first still writes to."""
    with execute.locked(tmp_path, "run") as lock:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    try:
        assert execute.try_lock(tmp_path, "run") is None
    finally:
        child.kill()
        child.wait()
    free = execute.try_lock(tmp_path, "run")
    assert free is not None
    free.close()


def test_one_run_leaves_the_exit_status_the_output_the_last_error_and_its_cost(tmp_path):
    record = execute.run_once(tmp_path, tmp_path / "run", ["pidistill", "no_such_command"], "mark")
    assert record["status"] == "failed" and record["exit_code"] == 2
    assert record["error"] == (tmp_path / "run" / "log.txt").read_text().strip()
    assert record["error"].startswith("error: command no_such_command is unknown")
    assert record["cpu_seconds"] > 0 and 0 < record["wall_seconds"] < 60


def test_the_last_error_of_a_log_is_the_recipes_sentence_or_the_last_exception(tmp_path):
    log = tmp_path / "some.txt"
    log.write_text("[rank0]: ValueError: first\n  at line 3\ntorch.X.ChildFailedError: all\nbye\n")
    assert execute.last_error(log) == "[rank0]: ValueError: first"
    log.write_text("Error: seen\nerror: the recipe's own sentence\nbye\n")
    assert execute.last_error(log) == "error: the recipe's own sentence"


# ------------------------------------------------------------------------------------------- numbers


def metrics(folder: Path, rows: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_best_on_validation_is_chosen_among_saved_steps_and_the_latest_of_equals(tmp_path):
    values = {0: 0.9, 10: 0.8, 20: 0.6, 30: 0.6, 40: 0.1}
    metrics(tmp_path, [{"step": step, "eval_x": value} for step, value in values.items()] + [{"step": 41, "loss": 1.0}])
    assert best_step(tmp_path, "eval_x") == ({"metric": "eval_x", "last": 0.1, "best": None, "best_step": None}, None)
    for step in (20, 30, 40):
        (tmp_path / f"step_{step}").mkdir()
    assert best_step(tmp_path, "eval_x") == ({"metric": "eval_x", "last": 0.1, "best": 0.6, "best_step": 30}, 30)
    assert best_step(tmp_path, "eval_y")[0]["last"] is None


def test_numbers_of_a_run_are_counted_once_per_round_and_unknown_ones_are_none(tmp_path):
    rows = [
        {"step": i, "loss": 0.0, "round": i // 3, "policy_tokens": 10, "rollouts": 4, "completion_tokens_mean": 7.5}
        for i in range(6)
    ]
    numbers = run_numbers(metrics(tmp_path, rows))
    assert (numbers["rollouts"], numbers["policy_tokens_sampled"], numbers["policy_tokens_trained"]) == (8, 60, 60)
    assert numbers["kl_teacher_student_nats"] is None
    del rows[-1]["rollouts"]
    numbers = run_numbers(metrics(tmp_path, rows))
    assert numbers["rollouts"] is numbers["policy_tokens_sampled"] is None
    # A run that only samples (recipes/sample_distributed.py) trains on nothing.
    numbers = run_numbers(metrics(tmp_path, [{"step": 0, "rollouts": 512, "policy_tokens": 9000}]))
    assert (numbers["rollouts"], numbers["policy_tokens_sampled"], numbers["policy_tokens_trained"]) == (512, 9000, 0)
    (tmp_path / "metrics.jsonl").unlink()
    assert run_numbers(tmp_path)["steps"] is None
    assert total([1, 2]) == 3 and total([1, None]) is None and total([]) is None


def result(arm: str, seed: int, success: float, settings: dict | None = None, **more) -> dict:
    row = {"cell": f"{arm}{seed}{settings}", "arm": arm, "title": arm, "seed": seed, "settings": settings or {}, "status": "ok"}
    return row | {"last": {"student_success": success}, "select": "eval_x", "stages": [], "config": "c"} | more


def test_rows_are_grouped_with_their_mean_and_sd():
    rows = [result("a", 0, 0.1), result("a", 1, 0.4), result("b", 0, 0.5), result("a", 2, 0.0, status="failed", error="e")]
    first, second = groups_of(rows)
    assert (first.title, len(first.rows), first.failed) == ("a", 2, 1)
    assert mean_and_sd(first, "last", "student_success") == "0.250 ± 0.212"  # |0.1 − 0.4| / √2
    assert mean_and_sd(second, "last", "student_success") == "0.500", "one seed has no sd"
    assert mean_and_sd(second, "best", "student_success") == "–"


def test_the_bootstrap_interval_is_that_of_all_resamples():
    values = [0.1, 0.4, 0.7, 0.75, 0.95]
    means = [statistics.fmean(resample) for resample in itertools.product(values, repeat=5)]  # all 3125, equally likely
    expected = np.percentile(means, [2.5, 97.5])
    for table in ([[value] for value in values], [values], values):
        assert bootstrap_interval(table, 0, 20_000) == pytest.approx(expected, abs=0.02)
    crossed = bootstrap_interval([[0.1, 0.5], [0.5, 0.9]], 0, 20_000)
    alone = bootstrap_interval([[0.3], [0.7]], 0, 20_000)
    assert crossed[0] < alone[0] and crossed[1] > alone[1], "both seeds and tasks spread it"


def test_the_interval_says_what_was_resampled(tmp_path):
    rows = [result("a", seed, 0.5, last={"student_success": 0.5, "folder": f"e{seed}"}) for seed in (0, 1)]
    (group,) = groups_of(rows)
    assert group_interval(tmp_path, group)[1] == "seeds"
    for seed in (0, 1):
        (tmp_path / f"e{seed}").mkdir()
        (tmp_path / f"e{seed}/rows.json").write_text(json.dumps({"student": {"t0": 0.0, "t1": 1.0}}))
    interval, what = group_interval(tmp_path, group)
    assert what == "seeds × tasks" and interval == (0.0, 1.0)
    assert group_interval(tmp_path, groups_of(rows[:1])[0])[1] == "tasks"


CLUSTERS = {"t0": "x", "t1": "x", "t2": "x", "t3": "y", "t4": "z"}
BASE = [0.0, 0.0, 0.0, 1.0, 0.0]
BASE_MEANS = {"one": 0.25, "two": 0.75}


def evaluated(folder: Path, arm: str, seed: int, values: list[float], clusters: bool = True, base: str | None = None) -> dict:
    place = f"{arm}{seed}{base}"
    (folder / place).mkdir()
    rows = {"student": dict(zip(CLUSTERS, values, strict=True))} | ({"clusters": CLUSTERS} if clusters else {})
    (folder / place / "rows.json").write_text(json.dumps(rows))
    return result(arm, seed, 0.5, last={"student_success": 0.5, "folder": place}, base=base)


def test_the_interval_of_a_sweep_resamples_the_clusters_that_its_evaluation_names(tmp_path):
    values = [[1.0, 1.0, 1.0, 0.0, 1.0], [1.0, 0.5, 1.0, 0.0, 0.0]]
    rows = [evaluated(tmp_path, "a", seed, own) for seed, own in enumerate(values)]
    interval, what = group_interval(tmp_path, groups_of(rows)[0])
    assert what == "seeds × clusters"
    assert interval == bootstrap_interval(values, 0, 4000, clusters=list(CLUSTERS.values()))


@pytest.mark.parametrize("clusters", [True, False])
def test_two_arms_are_compared_on_the_same_tasks_or_clusters(clusters, tmp_path):
    rows = [evaluated(tmp_path, "base", 0, BASE, clusters)]
    values = [[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]]
    rows += [evaluated(tmp_path, "a", seed, own, clusters) for seed, own in enumerate(values)]
    base, arm = groups_of(rows)
    found = paired_difference(tmp_path, arm, base)
    # Means over the two seeds: 1, .5, 0, .5, 0 against 0, 0, 0, 1, 0.
    assert found.mean == pytest.approx(0.2)
    assert (found.higher, found.lower) == ((1, 1) if clusters else (2, 1))
    names = list(CLUSTERS.values()) if clusters else None
    assert found.interval == bootstrap_interval(values, 0, 4000, clusters=names, minus=[BASE])
    assert found.resampled == ("seeds × clusters" if clusters else "seeds × tasks")
    back = paired_difference(tmp_path, base, arm)
    assert back.mean == -found.mean and (back.lower, back.higher) == (found.higher, found.lower)


def test_two_arms_of_several_bases_are_compared_base_by_base(tmp_path):
    started = {"one": 0.0, "two": 1.0}
    rows = [evaluated(tmp_path, "base", 0, [v] * 5, base=b) for b, v in started.items()]
    own = [[0.5, 0.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0, 0.5]]
    rows += [evaluated(tmp_path, "a", 0, v, base=b) for b, v in zip(started, own, strict=True)]
    base, arm = groups_of(rows)
    found = paired_difference(tmp_path, arm, base)
    expected = bootstrap_interval([[0.5, 0, 0, 0.5, 0], [0, 0, 0, 0, -0.5]], 0, 4000, clusters=list(CLUSTERS.values()))
    assert found.mean == pytest.approx(0.05) and found.interval == expected and found.resampled == "bases × clusters"
    assert (found.higher, found.lower) == (2, 1)


def test_bases_that_were_evaluated_on_different_tasks_are_resampled_by_their_means(tmp_path):
    rows = [
        result("a", 0, mean, last={"student_success": mean, "folder": base}, base=base) for base, mean in BASE_MEANS.items()
    ]
    for base in BASE_MEANS:
        (tmp_path / base).mkdir()
        (tmp_path / base / "rows.json").write_text(json.dumps({"student": {f"{base} {i}": 0.0 for i in range(4)}}))
    interval, what = group_interval(tmp_path, groups_of(rows)[0])
    assert what == "bases" and interval == bootstrap_interval([[0.25], [0.75]], 0, 4000)


@pytest.mark.parametrize("higher, lower", [(0, 0), (5, 5), (6, 1), (1, 6), (10, 0)])
def test_the_sign_test_is_the_share_of_all_signs_that_are_split_as_unevenly(higher, lower):
    signs = list(itertools.product([1, -1], repeat=higher + lower))
    expected = sum(abs(sum(one)) >= abs(higher - lower) for one in signs) / len(signs)
    assert Difference(0.0, (0.0, 0.0), "tasks", higher, lower).sign_test == pytest.approx(expected)


def test_arms_are_measured_by_their_greedy_answers_where_no_evaluation_sampled(tmp_path, capsys):
    rows = [evaluated(tmp_path, arm, 0, values) for arm, values in (("base", BASE), ("a", [1.0, 1.0, 1.0, 1.0, 0.0]))]
    for row in rows:
        row["last"] = {"student_greedy_success": row["last"].pop("student_success"), "folder": row["last"]["folder"]}
        row["last"] |= {"student_with_pi_greedy_success": 0.321, "student_greedy_leak_frac": 0.123}
        path = tmp_path / row["last"]["folder"] / "rows.json"
        path.write_text(path.read_text().replace('"student"', '"student greedy"'))
    base, arm = groups_of(rows)
    interval, what = group_interval(tmp_path, arm)
    assert what == "clusters" and interval == bootstrap_interval([[1.0, 1.0, 1.0, 1.0, 0.0]], 0, 4000, clusters=[*"xxxyz"])
    assert paired_difference(tmp_path, arm, base).mean == pytest.approx(0.6)
    assert final_metric(arm) == "success without PI, greedy, held-out, last checkpoint" and final_values(arm) == [0.5]
    write_jsonl(tmp_path / "results.jsonl", rows)
    write_report(tmp_path, "base")
    printed = capsys.readouterr().out
    assert "Success greedy, last, against base on the same tasks" in printed and "+0.600" in printed
    table = (tmp_path / "results.md").read_text()
    assert "greedy, 95% interval over" in table and "0.321" in table and "0.123" in table and "Not compared" not in table
    # One evaluation with samples is enough for the whole table: no line may hold another number than its neighbours.
    mixed = groups_of([*rows, evaluated(tmp_path, "b", 0, BASE)])
    assert {group.view for group in mixed} == {"student"} and group_interval(tmp_path, mixed[0])[0] is None


def test_an_evaluation_of_greedy_answers_alone_keeps_its_leak_rate(tmp_path):
    views = {"student greedy": {"success": 0.5, "leak_frac": 0.25}}
    (tmp_path / "results.json").write_text(json.dumps(views))
    assert evaluation_numbers(tmp_path) == {"student_greedy_success": 0.5, "student_greedy_leak_frac": 0.25}


def test_the_table_shows_each_kind_of_row(recipes, sweep, tmp_path, capsys):
    kinds = {"success": 0.5, "success/year": 0.125, "success/year_interval": [0.1, 0.2], "success/town": 0.875}
    kinds |= {"success/arm": 0.25, "success/a|b_interval": 0.75}
    recipes.of_domains = {"student": kinds, "student greedy": {"success": 0.5, "success/pet": 0.5}}
    sweep("tiny/opsd", "objective.beta=0.4", "seed=0,1", "--evaluate", "tiny/evaluate")
    table = (tmp_path / "out/results.md").read_text()
    assert "| arm | year | town | kind arm | a\\|b_interval |" in table
    assert "| 0.125 ± 0.000 | 0.875 ± 0.000 | 0.250 ± 0.000 | 0.750 ± 0.000 |" in table
    assert "Success by kind, sampled" in capsys.readouterr().out


def test_arms_that_were_asked_other_questions_under_the_same_names_are_not_compared(tmp_path):
    rows = [evaluated(tmp_path, arm, 0, BASE) for arm in "abc"]
    for row, question in zip(rows, ("x", "y", None), strict=True):
        path = tmp_path / row["last"]["folder"] / "rows.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | ({"prompts": dict.fromkeys(kept["student"], question)} if question else {})))
    one, other, old = groups_of(rows)
    assert paired_difference(tmp_path, one, other) is None
    assert paired_difference(tmp_path, one, old) is not None, "an evaluation of an older version does not say what it asked"
    seeds = read_evaluations(tmp_path, replace(one, rows=[*one.rows, *other.rows]))
    assert shared_tasks(seeds) is None and shared_tasks(seeds[:1]).names == list(CLUSTERS)


def test_arms_that_the_comparison_lacks_are_named(tmp_path, capsys):
    rows = [evaluated(tmp_path, "a", 0, BASE), evaluated(tmp_path, "b", 0, BASE), result("c", 0, 0.5)]
    write_jsonl(tmp_path / "results.jsonl", rows)
    write_report(tmp_path, "a")
    assert "Not compared with a" in capsys.readouterr().out and "same tasks: c\n" in (tmp_path / "results.md").read_text()
    write_report(tmp_path, "c")
    assert "Not compared with c" in capsys.readouterr().out


def test_arms_without_the_same_tasks_are_not_compared(tmp_path):
    rows = [evaluated(tmp_path, "a", 0, BASE), result("b", 0, 0.5, last={"student_success": 0.5, "folder": "b0"})]
    first, second = groups_of(rows)
    assert paired_difference(tmp_path, second, first) is None
    (tmp_path / "b0").mkdir()
    (tmp_path / "b0/rows.json").write_text(json.dumps({"student": {"other": 1.0, "t0": 0.0}}))
    assert paired_difference(tmp_path, second, first) is None


def test_the_report_compares_the_arms_with_the_one_that_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "draw", lambda output_dir, rows: [])
    monkeypatch.setattr(command, "write_page", lambda folders: "page")
    rows = [evaluated(tmp_path, "base", 0, BASE), evaluated(tmp_path, "rl", 0, [1.0] * 5), evaluated(tmp_path, "sft", 0, BASE)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command.main(["--report", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert (
        "against base on the same tasks" in text
        and "| rl | +0.800 | [+0.000, +1.000] clusters | 2 / 0 clusters | 0.5 |" in text
    )
    assert "| sft | +0.000 | [+0.000, +0.000] clusters | 0 / 0 clusters | 1 |" in text
    command.main(["--report", str(tmp_path), "--against", "rl"])
    text = (tmp_path / "results.md").read_text()
    assert "against rl on the same tasks" in text and "| base | -0.800 |" in text
    with pytest.raises(SystemExit):
        command.main(["--report", str(tmp_path), "--against", "opsd"])
    assert "--against opsd is no arm here; known here: base, rl, sft" in capsys.readouterr().err


def test_curves_and_heat_maps_hold_means_over_seeds():
    assert mean_curve([{0: 0.0, 10: 1.0}, {0: 0.5, 10: 0.0, 20: 1.0}]) == {0: 0.25, 10: 0.5}
    places = [("1", "0.5", 0.1), ("1", "2", 0.2), ("10", "2", 0.4)]
    rows = [
        result("a", seed, value + 0.1 * seed, {"x": x, "y": y}) for (x, y, value), seed in itertools.product(places, (0, 1))
    ]
    xs, ys, table = heat_table(groups_of(rows), "x", "y")
    assert (xs, ys) == ([1.0, 10.0], [0.5, 2.0])
    np.testing.assert_allclose(table, [[0.15, np.nan], [0.25, 0.45]])


def test_the_report_of_twenty_five_arms_and_two_keys_is_drawn(tmp_path, capsys):
    stage = [{"folder": "run", "config": "c", "commit": "abc"}]
    (tmp_path / "run").mkdir()
    metrics(tmp_path / "run", [{"step": step, "eval_x": 0.5} for step in (0, 5)])
    more = {"stages": stage, "kl_teacher_student_nats": 0.3, "steps": 5, "validation": {"last": 0.5}}
    keys = [{"x": str(x), "y": str(y)} for x in range(5) for y in range(5)]
    rows = [result(f"arm {i} [none]", seed, 0.5, **more) for i in range(25) for seed in (0, 1)]
    rows += [result("grid", 0, 0.1, setting, **more) for setting in keys]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command.main(["--report", str(tmp_path)])
    for name in ("curves.png", "success.png", "kl_success.png", "heatmap.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert "arm 24 [none]" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- for real


def run_in_this_process(words: list[str], log: Path, lock: int) -> int:
    """Stand in for execute(): run the same words without a new process."""
    program, run, option, ranks, *rest = words
    assert (program, run, option, ranks) == ("pidistill", "run", "--nproc_per_node", "1")
    with log.open("w") as file, contextlib.redirect_stdout(file), mock.patch.object(sys, "argv", [program, run, *rest]):
        try:
            entry.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return 0


def test_a_real_cell_goes_from_random_weights_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "execute", run_in_this_process)
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", list(recipe_registry._ALL_RECIPES))
    with quick_setup():
        command.main(real_sweep(tmp_path, "2"))
    check_real_results(tmp_path, "2")


@pytest.mark.slow(reason="test_a_real_cell_goes_from_random_weights_to_the_table runs the same sweep in one process")
def test_real_cells_run_in_processes_that_two_workers_start(tmp_path):
    command_line = [sys.executable, "-m", "pidistill.commands.main", "sweep", *real_sweep(tmp_path, "1,2"), "--workers", "2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = check_real_results(tmp_path, "1,2")
    assert all(row["cpu_seconds"] > 1 and row["wall_seconds"] > 1 for row in rows.values())
    assert done.stdout.count("$ pidistill run --nproc_per_node 1 sft_distributed") == 1


def real_sweep(tmp_path: Path, prompts: str) -> list[str]:
    """Write a sweep of two stages from random weights; return the words of its command."""
    small = {"model.num_layers": 1, "model.embed_dim": 32, "model.intermediate_dim": 64}
    first = small | {"max_steps": 2, "batch_size": 4, "dataset.n": 8, "checkpointer.checkpoint_dir": str(tmp_path / "init")}
    few_rows = {"sampler.max_new_tokens": 8, "eval_dataset.max_rows": 3, "micro_batch_tokens": 400, "rollout_log_steps": 0}
    then = small | few_rows | {"checkpointer.checkpoint_dir": "{init}/latest", "max_steps": 2, "group_size": 2}
    then |= {"eval_every_steps": 1, "save_every_steps": 1}
    stages = [
        {"name": "init", "config": "tiny/base", "overrides": first},
        {"name": "rl", "config": "tiny/rl", "overrides": then},
    ]
    content = {"evaluate": "tiny/evaluate", "arms": {"rl": {"stages": stages}}}
    content["evaluate_overrides"] = small | {"sampler.max_new_tokens": 8, "dataset.max_rows": 3}
    OmegaConf.save(OmegaConf.create(content), tmp_path / "sweep.yaml")
    return [str(tmp_path / "sweep.yaml"), f"prompts_per_round={prompts}", "--output-dir", str(tmp_path / "out")]


def check_real_results(tmp_path: Path, prompts: str) -> dict[str, dict]:
    rows = read_results(tmp_path / "out")
    assert sorted(rows) == [f"rl,prompts_per_round={count}" for count in prompts.split(",")]
    for count, row in zip(prompts.split(","), (rows[name] for name in sorted(rows)), strict=True):
        assert row["status"] == "ok", row
        # Two rounds of 1 or 2 prompts × 2 rollouts; the first stage samples nothing and takes two steps too.
        assert (row["steps"], row["rollouts"]) == (4, 2 * 2 * int(count))
        assert row["policy_tokens_trained"] > 0
        assert row["last"]["step"] == 2 and 0 <= row["last"]["student_success"] <= 1
        assert row["best"]["step"] in (1, 2) and row["kl_teacher_student_nats"] > 0
    assert len(list((tmp_path / "out/runs").iterdir())) == 1 + len(rows), "the first stage ran once"
    assert "rl prompts_per_round=2" in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    return rows


def test_a_run_that_a_signal_stopped_is_not_recorded_as_ended_well_and_runs_again(tmp_path, monkeypatch):
    calls = []

    def stopped_once(words, log, lock):
        calls.append(words)
        log.write_text("SIGTERM: the round is finished and saved, then the run stops\n" if len(calls) == 1 else "done\n")
        return 0

    monkeypatch.setattr(execute, "execute", stopped_once)
    first = execute.run_once(tmp_path, tmp_path / "run", ["train"], "mark")
    assert first["status"] == "failed" and first["error"].startswith("SIGTERM: ")
    assert [execute.run_once(tmp_path, tmp_path / "run", ["train"], "mark")["status"] for _ in range(2)] == ["ok", "ok"]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "override, words",
    [
        ("objective.kl_mode=loss_rbb", "objective.kl_mode=loss_rbb is unknown"),
        ("privileged.control=shufled", "privileged.control=shufled is unknown"),
    ],
)
def test_a_value_that_a_part_of_the_method_refuses_stops_a_sweep_before_it_starts(override, words, tmp_path):
    sweep = read_sweep("tiny/opsd", ["seed=0", override], output_dir=tmp_path)
    with pytest.raises(InputError, match=words) as refused:
        check_cells(sweep, "grid")
    assert "nothing was started" in str(refused.value)
