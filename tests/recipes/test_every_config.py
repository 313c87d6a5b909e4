"""Test that every config of the tiny world runs: three steps, in process, on a small model that sometimes succeeds.

Nothing but sizes and folders is changed. What a config names of another's output (`runs/tiny/<stage>/...`) is made by running
that config first, so that methods of several stages are chained as their make targets chain them. With two processes one
config per recipe, and all of them under the marker `all_processes`.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from pidistill.data.dataset import ExampleDataset
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.types import Example
from tests.support.forks import launch_several
from tests.support.runs import MODEL, RECIPES, TINY, assert_close_rows, metrics, run, weights

ROWS = 4  # few enough to be learned by heart in a second
ROUND = {
    "max_steps": 3,
    "prompts_per_round": 2,
    "micro_batch_tokens": 400,
    "eval_every_steps": None,
    "save_every_steps": None,
    "rollout_log_steps": 0,
}
SFT = {"max_steps": 3, "batch_size": 5, "micro_batch_tokens": 150, "eval_every_steps": None, "save_every_steps": None}
SIZES: dict[str, dict[str, Any]] = {
    "pi_distill_distributed": ROUND,
    "opsd_distributed": ROUND,
    "sft_distributed": SFT,
    "sample_distributed": {"samples_per_prompt": 6, "prompts_per_batch": 3},
    "evaluate_distributed": {"eval_samples": 2},
}
ONE_PER_RECIPE = {
    "pi_distill_distributed": "pi_distill",
    "opsd_distributed": "sdpo",
    "sft_distributed": "sft",
    "sample_distributed": "rft_sample",
    "evaluate_distributed": "evaluate",
}
STAGE = re.compile(r"runs/tiny/(\w+)(/|$)")


def both_views() -> ExampleDataset:
    """The first rows as student and as teacher see them, each with its own solution and, so that half fail, another's."""
    tokenizer, prompt = tiny_world_tokenizer(max_seq_len=96), PrivilegedPrompt(template="{privileged}")
    examples = list(tiny_world_dataset(split="train", privileged="dfk", completion="cot", max_rows=ROWS))
    rows = []
    for i, example in enumerate(examples):
        views = prompt.build(example, tokenizer)
        for solved in (example, examples[i - 1]):
            rows.append(Example(f"{example.id} student", views.student_messages, completion=solved.completion))
            rows.append(Example(f"{example.id} teacher", views.teacher_messages, completion=solved.completion))
    return ExampleDataset(rows)


def shrunk(name: str, output_dir: Path, stage: Callable[[str], Path]) -> DictConfig:
    """configs/tiny/<name>.yaml with a small model, few rows and few steps; ``stage`` gives the folder of another's output."""
    cfg = OmegaConf.load(TINY / f"{name}.yaml")
    settings = MODEL | SIZES[RECIPES[name]] | {"output_dir": str(output_dir)}
    if "group_size" in cfg:
        settings["group_size"] = min(cfg.group_size, 4)
    for key in ("dataset", "eval_dataset"):
        if cfg.get(key) and cfg[key]._component_.endswith(".tiny_world_dataset"):
            settings[f"{key}.max_rows"] = ROWS if key == "dataset" else 2
    if name == "base":
        settings |= {"dataset.n": 16, "checkpointer.checkpoint_dir": str(output_dir / "init")}
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    for node, key, path in paths_of(cfg):
        if name != "base" and (other := STAGE.match(path)) and not path.startswith(str(output_dir)):
            node[key] = str(stage(other[1])) + path[other.end() - 1 :]
    return cfg


def paths_of(node: DictConfig) -> list[tuple[DictConfig, str, str]]:
    """Every place in a config whose value is a path of another run, interpolations left alone."""
    found = []
    for key in node:
        value = OmegaConf.to_container(node, resolve=False)[key]
        if isinstance(value, dict):
            found += paths_of(node[key])
        elif isinstance(value, str) and STAGE.match(value):
            found.append((node, key, value))
    return found


# ------------------------------------------------------------------------------------------- what was run


@pytest.fixture(scope="session")
def able_base(tiny_base, tmp_path_factory) -> Path:
    """A small model that knows the first rows by heart, in both views, well enough to succeed now and then."""
    folder = tmp_path_factory.mktemp("able_base")
    cfg = OmegaConf.load(TINY / "sft.yaml")
    settings = MODEL | SFT | {
        "output_dir": str(folder), "max_steps": 150, "batch_size": 4 * ROWS, "micro_batch_tokens": 2000, "eval_dataset": None,
        "checkpointer.checkpoint_dir": str(tiny_base), "checkpointer.checkpoint_files": ["model.safetensors"],
        "dataset": {"_component_": "tests.recipes.test_every_config.both_views"}, "optimizer.lr": 1e-2,
    }  # fmt: skip
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    run("sft", cfg)
    return folder


@pytest.fixture(scope="session")
def one(able_base, tmp_path_factory) -> Callable[[str], Path]:
    """name → the output folder of that config, run in this process if it was not yet, and the stages before it first."""
    root, folders = tmp_path_factory.mktemp("every_config"), {"base": able_base}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = root / name
            run(name, shrunk(name, root / name, folder))
        return folders[name]

    return folder


# ------------------------------------------------------------------------------------------- one process


def test_every_recipe_and_every_config_is_covered():
    assert set(RECIPES) == {path.stem for path in TINY.glob("*.yaml")}
    assert set(RECIPES.values()) == set(SIZES) == set(ONE_PER_RECIPE)
    assert all(RECIPES[name] == recipe for recipe, name in ONE_PER_RECIPE.items())


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "base"])
def test_every_tiny_config_runs_three_steps(name, one, able_base):
    folder = one(name)
    if RECIPES[name] == "evaluate_distributed":
        assert json.loads((folder / "results.json").read_text())["student"]
        return
    rows = metrics(folder)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    if RECIPES[name] == "sample_distributed":
        traces = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
        assert len(traces) == rows[0]["kept"] > 0
        return
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["policy_tokens"] > 0 and row["nonfinite_steps"] == row["empty_steps"] == 0 for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps)
    before = load_file(start_of(folder))
    after = weights(folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in after), "nothing was trained"


def start_of(folder: Path) -> Path:
    """The weights that a run began with, as its config.yaml records it."""
    checkpointer = OmegaConf.load(folder / "config.yaml").checkpointer
    return Path(checkpointer.checkpoint_dir) / checkpointer.checkpoint_files[0]


def test_the_base_is_made_from_nothing(tmp_path):
    run("base", shrunk("base", tmp_path, one_that_is_not_needed))
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["loss"] > 0 for row in rows)
    assert weights(tmp_path)


def one_that_is_not_needed(name: str) -> Path:
    raise AssertionError(f"the base needs {name}")


STAGES = {
    "sft_rl": "sft", "rft": "rft_sample", "int_sft": "int_sample", "int_rl": "int_sft", "opd": "sft_cot",
    "semi_opd": "semi_opd_sample",
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_later_stage_takes_what_the_one_before_left(name, one):
    assert str(one(STAGES[name])) in (one(name) / "config.yaml").read_text()


def test_semi_opd_starts_at_ratio_1_samples_nothing_and_at_rate_0_its_epochs_are_alike(tiny_base, tmp_path):
    def stage(name: str):
        assert name in ("base", "semi_opd_sample")
        return tiny_base.parent if name == "base" else tmp_path / "sample"

    def config(name: str, folder):
        cfg = shrunk(name, folder, stage)
        cfg.checkpointer.checkpoint_dir, cfg.checkpointer.checkpoint_files = str(tiny_base), ["model.safetensors"]
        return cfg

    run("semi_opd_sample", config("semi_opd_sample", tmp_path / "sample"))
    cfg = config("semi_opd", tmp_path / "run")
    cfg.objective.form, cfg.eval_dataset, cfg.optimizer.lr = "importance", None, 0.0
    cfg.prompts_per_round, cfg.max_steps = 24, 2

    def refuse_to_sample(recipe):
        sample = recipe._sampler.sample

        def watched(model, prompts, **more):
            assert not prompts
            return sample(model, prompts, **more)

        recipe._sampler.sample = watched

    run("semi_opd", cfg, refuse_to_sample)
    first, second = metrics(tmp_path / "run")
    assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and first["policy_tokens"] == second["policy_tokens"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_a_teachers_numbers_on_disk_are_written_by_one_run_and_read_by_the_next_which_loads_no_teacher(one, tmp_path):
    cfg = shrunk("semi_opd", tmp_path, one)
    cfg.objective.form, cfg.eval_dataset = "kl_teacher_student", None
    cfg.teacher = {"_component_": "pidistill.scoring.stored_teacher.StoredTeacher", "folder": str(tmp_path / "numbers")}
    for folder in ("writes", "reads"):
        cfg.output_dir, recipes = str(tmp_path / folder), []
        run("semi_opd", cfg, recipes.append)
        assert (recipes[0]._teacher._module is None) == (folder == "reads")
    for wrote, read in zip(metrics(tmp_path / "writes"), metrics(tmp_path / "reads"), strict=True):
        assert (wrote["loss"], wrote["grad_norm"]) == (read["loss"], read["grad_norm"])
    cfg.output_dir, cfg.teacher.add, cfg.privileged.template = str(tmp_path / "other"), False, "hint {privileged}"
    with pytest.raises(InputError, match=r"numbers has no numbers of the teacher for these ids; the completion, the chat"):
        run("semi_opd", cfg)
    changed = shutil.copytree(one("base") / "latest", tmp_path / "changed")
    for path in changed.glob("*.safetensors"):
        save_file({name: 1.001 * weight for name, weight in load_file(path).items()}, path)
    cfg.teacher_checkpointer = OmegaConf.merge(cfg.checkpointer, {"checkpoint_dir": str(changed)})
    with pytest.raises(InputError, match=r"numbers holds the numbers of another teacher: its weights differ"):
        run("semi_opd", cfg)


def test_the_small_base_earns_some_rewards_in_either_view(one):
    """What makes the runs above say something: rewards with spread, in either view."""
    for name in ("pi_distill", "rl", "sdpo", "guide_grpo"):
        successes = [row["reward_mean"] for row in metrics(one(name)) if "loss" in row]
        assert 0 < sum(successes) < len(successes), name
    assert any(row["zero_advantage_frac"] < 1 for row in metrics(one("rl")) if "loss" in row)
    assert any(row["rollouts_with_pi_frac"] > 0 for row in metrics(one("sdpo")) if "loss" in row)


# ------------------------------------------------------------------------------------------- two processes


def run_with_two(names: list[str], folder: Path, one: Callable[[str], Path]) -> None:
    """All ``names`` in one launch of two processes; what the stages before left is taken from the runs with one."""
    launch_several(folder, {name: (name, shrunk(name, folder / name, one)) for name in names})


def assert_two_left_what_one_did(name: str, ours: Path, theirs: Path) -> None:
    if RECIPES[name] == "evaluate_distributed":
        first, second = (json.loads((folder / "results.json").read_text()) for folder in (ours, theirs))
        assert first.keys() == second.keys()
        for view in first:
            assert first[view].keys() == second[view].keys()
            for key, value in first[view].items():
                assert value == pytest.approx(second[view][key], rel=1e-9), (view, key)
        return
    assert_close_rows(metrics(ours), metrics(theirs), rel=2e-3)
    if RECIPES[name] == "sample_distributed":
        first, second = ([json.loads(x) for x in (f / "traces.jsonl").read_text().splitlines()] for f in (ours, theirs))
        assert first == second
        return
    for (key, first), second in zip(weights(ours).items(), weights(theirs).values(), strict=True):
        # Adam divides by the gradient's size: rounding moves an element whose gradient is nearly 0 by a share of lr, 3e-4, and
        # gradients of methods without a reward are small. test_two_processes.py compares runs closely.
        assert (first - second).abs().mean() < 1e-6, key
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="session")
def two(one, tmp_path_factory) -> Path:
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "configs_with_two_processes"
    with FileLock(root / "configs_with_two_processes.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run_with_two(list(ONE_PER_RECIPE.values()), folder, one)
            (folder / "done").touch()
    return folder


@pytest.mark.parametrize("name", ONE_PER_RECIPE.values())
def test_two_processes_leave_what_one_does(name, one, two):
    assert_two_left_what_one_did(name, two / name, one(name))


@pytest.mark.all_processes
def test_two_processes_leave_what_one_does_with_every_config(one, tmp_path):
    names = [name for name in RECIPES if name != "base"]
    run_with_two(names, tmp_path, one)
    failures = []  # all of them are looked at: the launch is what takes the time
    for name in names:
        try:
            assert_two_left_what_one_did(name, tmp_path / name, one(name))
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)
