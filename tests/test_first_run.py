"""Walk a newcomer's path in a fresh folder, with the commands and files of the pages, as they stand there."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.pages import commands_of, files_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-run.md"

# What makes a command of the README short here; everything else of it stays.
TINY = ["model.num_layers=1", "model.embed_dim=32", "model.intermediate_dim=64"]
BRIEF_BASE = [*TINY, "max_steps=4", "dataset.n=256"]
BRIEF_RUN = [*TINY, "max_steps=2", "prompts_per_round=2", "group_size=2", "eval_dataset.max_rows=4"]
README_PATH = {  # the start of a line of the README → what is added to it
    "pidistill preview tiny/opsd": [],
    "pidistill validate tiny/opsd": [],
    "pidistill run sft_distributed --config tiny/base": BRIEF_BASE,
    "pidistill run pi_distill_distributed --config tiny/pi_distill": BRIEF_RUN,
    "pidistill watch runs/tiny/pi_distill": ["--once"],
    "pidistill report runs/tiny/pi_distill": [],
    "pidistill export runs/tiny/pi_distill": [],
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


def test_every_line_of_the_path_stands_in_the_readme():
    commands = commands_of(ROOT / "README.md")
    assert [start for start in README_PATH if not any(command.startswith(start) for command in commands)] == []


@pytest.mark.slow
def test_own_rows_and_an_own_objective_run_from_an_empty_folder(tmp_path):
    for name, text in files_of(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    printed = {command: run(shlex.split(command), tmp_path) for command in commands_of(PAGE)}
    preview = next(text for command, text in printed.items() if command.startswith("pidistill preview"))
    row = json.loads(files_of(PAGE)["mine.jsonl"].splitlines()[0])
    assert row["question"] in preview and row["hint"] in preview
    assert steps_of(tmp_path / "runs" / "mine") == [1, 2]
    assert steps_of(tmp_path / "runs" / "mine_recipe") == [1, 2]
    assert "my_objective.Mine" in (tmp_path / "runs" / "mine" / "config.yaml").read_text()
    assert row["question"] in (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "shared" / "mine" / "README.md").is_file()
    assert (tmp_path / "shared" / "mine" / "model-00001-of-00001.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_another_in_an_empty_folder(tmp_path):
    commands = commands_of(ROOT / "README.md")
    for start, more in README_PATH.items():
        command = next(command for command in commands if command.startswith(start))
        run([*shlex.split(command), *more], tmp_path)
    assert steps_of(tmp_path / "runs" / "tiny" / "pi_distill") == [1, 2]
    assert (tmp_path / "runs" / "tiny" / "pi_distill" / "report.html").is_file()
    assert (tmp_path / "shared" / "pi_distill" / "README.md").is_file()
