"""Walk a newcomer's path in a fresh folder, with the commands and files of the pages, as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from pidistill.commands.places import recipe_of
from recipes.evaluate_distributed import EvaluateRecipe
from recipes.opsd_distributed import OPSDRecipe
from tests.support.pages import commands_of, files_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-run.md"

# The keys of the page's config that its `sed` removes for an evaluation.
TRAINING = ("max_steps", "eval_dataset", "objective", "teacher", "prompts_per_round", "group_size", "optimizer",
            "eval_every_steps", "rollout_log_steps")  # fmt: skip

# What makes a command of the README short here; everything else of it stays.
TINY = ["model.num_layers=1", "model.embed_dim=32", "model.intermediate_dim=64"]
BRIEF_BASE = [*TINY, "max_steps=4", "dataset.n=256"]
BRIEF_RUN = [*TINY, "max_steps=2", "prompts_per_round=2", "group_size=2", "eval_dataset.max_rows=4"]
README_PATH = {  # the start of a line of the README → what is added to it
    "pidistill preview tiny/opsd": [],
    "pidistill validate tiny/opsd": [],
    "pidistill run sft_distributed --config tiny/base": BRIEF_BASE,
    "pidistill run pi_distill_distributed --config tiny/pi_distill": BRIEF_RUN,
    "pidistill watch runs/mine": ["--once"],
    "pidistill report runs/mine": [],
    "pidistill export runs/mine": [],
}


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder that holds nothing of the checkout, and return what it printed."""
    assert command[0] == "pidistill"
    program = [str(Path(sys.executable).with_name("pidistill")), *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("PYTHONPATH", None)
    begin = time.perf_counter()
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    print(f"{time.perf_counter() - begin:5.1f} s  {shlex.join(command)}")
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def steps_of(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def test_the_page_has_the_files_and_every_kind_of_command():
    assert list(files_of(PAGE)) == ["mine.jsonl", "mine.yaml", "my_objective.py"]
    kinds = [command.split()[1] for command in commands_of(PAGE)]
    assert set(kinds) == {"preview", "run", "cp", "watch", "report", "export"}
    assert any("objective._component_=my_objective.Mine" in command for command in commands_of(PAGE))
    assert any("resume_from_checkpoint=true" in command for command in commands_of(PAGE))


def test_the_config_of_the_page_names_its_recipe(tmp_path):
    """`pidistill plan` and `pidistill sweep` refuse one that does not."""
    (tmp_path / "mine.yaml").write_text(files_of(PAGE)["mine.yaml"], encoding="utf-8")
    assert recipe_of(str(tmp_path / "mine.yaml")) == "opsd_distributed"


def test_a_run_of_the_pages_config_resumes_and_its_checkpoint_is_evaluated(tmp_path, monkeypatch):
    """It starts from random weights, whose file has another name than that of a saved step."""
    monkeypatch.chdir(tmp_path)
    for name, text in files_of(PAGE).items():
        Path(name).write_text(text, encoding="utf-8")
    cfg = OmegaConf.load("mine.yaml")
    train(OPSDRecipe, cfg)
    train(OPSDRecipe, OmegaConf.merge(cfg, {"max_steps": 3, "resume_from_checkpoint": True}))
    assert steps_of(Path("runs/mine")) == [1, 2, 3]
    cfg = OmegaConf.create(
        {key: value for key, value in OmegaConf.load("mine.yaml").items_ex(resolve=False) if key not in TRAINING}
    )
    evaluation = {"checkpointer": {"checkpoint_dir": "runs/mine/latest"}, "output_dir": "runs/mine/test", "eval_samples": 1}
    recipe = EvaluateRecipe(OmegaConf.merge(cfg, evaluation))
    recipe.setup(OmegaConf.merge(cfg, evaluation))
    (saved,) = Path("runs/mine/step_3").glob("*.safetensors")
    assert torch.equal(recipe._model.state_dict()["norm.scale"], load_file(saved)["model.norm.weight"])


def train(kind: type, cfg: DictConfig) -> None:
    recipe = kind(cfg)
    recipe.setup(cfg)
    recipe.train()
    recipe._log.close()


def test_every_line_of_the_path_stands_in_the_readme():
    commands = commands_of(ROOT / "README.md")
    assert [start for start in README_PATH if not any(command.startswith(start) for command in commands)] == []


@pytest.mark.slow
def test_own_rows_and_an_own_objective_run_from_an_empty_folder(tmp_path):
    for name, text in files_of(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (cut,) = re.findall(r"^sed .* mine\.yaml > mine_test\.yaml$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(cut, cwd=tmp_path, shell=True, check=True)
    printed = {command: run(shlex.split(command), tmp_path) for command in commands_of(PAGE)}
    preview = next(text for command, text in printed.items() if command.startswith("pidistill preview"))
    row = json.loads(files_of(PAGE)["mine.jsonl"].splitlines()[0])
    assert row["question"] in preview and row["hint"] in preview
    assert steps_of(tmp_path / "runs" / "mine") == [1, 2, 3]
    results = json.loads((tmp_path / "runs" / "mine" / "test" / "results.json").read_text())
    assert results["student"]["rollouts"] == 4 * results["student"]["samples"]
    assert steps_of(tmp_path / "runs" / "mine_recipe") == [1, 2]
    assert "my_objective.Mine" in (tmp_path / "runs" / "mine" / "config.yaml").read_text()
    assert row["question"] in (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    card = (tmp_path / "shared" / "mine" / "README.md").read_text(encoding="utf-8")
    assert "`step_3` after 3 steps" in card and "Rows that `evaluate_distributed` answered" in card
    assert (tmp_path / "shared" / "mine" / "model-00001-of-00001.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_another_in_an_empty_folder(tmp_path):
    commands = commands_of(ROOT / "README.md")
    for start, more in README_PATH.items():
        command = next(command for command in commands if command.startswith(start))
        run([*shlex.split(command), *more], tmp_path)
    assert steps_of(tmp_path / "runs" / "mine") == [1, 2]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "shared" / "pi_distill" / "README.md").is_file()
