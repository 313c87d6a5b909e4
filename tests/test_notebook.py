"""Test examples/demo.ipynb without running it: its form, its shell commands, and the files that it shows."""

import ast
import json
import re
import shlex
from pathlib import Path

import yaml

from pidistill.commands.main import COMMANDS
from pidistill.commands.sweep import command, pictures, results

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "demo.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
LINES = [line for source in CODE for line in source.splitlines()]
SHELL = [line[1:] for line in LINES if line.startswith("!")]


def test_the_notebook_has_the_form_of_nbformat_4_5_and_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(ids) == len(set(ids)) > 8 and all(re.fullmatch(r"[\w-]{1,64}", each) for each in ids)
    for cell in NOTEBOOK["cells"]:
        run = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell == {name: cell[name] for name in ("cell_type", "id", "metadata", "source")} | run


def test_every_line_of_code_is_python_or_a_command():
    for source in CODE:
        ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("!", "%"))))


def test_every_shell_command_is_one_of_the_makefile_or_of_pidistill():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert "make demo" in SHELL and len(SHELL) >= 4
    for line in SHELL:
        program, name, *words = shlex.split(line)
        assert (program, name) in {("make", each) for each in targets} | {(".venv/bin/pidistill", each) for each in COMMANDS}
        if name == "preview":
            assert (ROOT / "configs" / f"{words[0]}.yaml").is_file()


def test_the_notebook_shows_files_that_the_demo_writes():
    output_dir = yaml.safe_load((ROOT / "configs" / "sweeps" / "demo.yaml").read_text())["output_dir"]
    shown = re.findall(r"runs/[\w./]+\.\w+", "\n".join(LINES))
    written = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (command, pictures, results))
    assert {Path(path).name for path in shown} == {"results.md", "curves.png", "success.png", "kl_success.png", "report.html"}
    for path in map(Path, shown):
        assert str(path.parent) == output_dir
        assert f'"{path.name}"' in written or path.name == "report.html"  # the command of the same cell writes the page
