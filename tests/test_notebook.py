"""Test examples/demo.ipynb: its form, its shell commands, the files that it shows; and, slow, its cells with a short demo."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pidistill.commands.main import COMMANDS
from pidistill.commands.sweep import command, pictures, results
from tests.support.tiny_base import make_base

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


def shell(line: str, folder: Path) -> None:
    """Run a line as the kernel of a notebook does: in its folder, with the environment of its kernel."""
    if line == "make install":
        return
    words = shlex.split(line)
    if line == "make demo":  # four steps from a random base, in place of eighty from a trained one
        words = [".venv/bin/pidistill", "demo", "--max-steps", "4"]
    assert words[0] == ".venv/bin/pidistill"
    words[0] = str(Path(sys.executable).with_name("pidistill"))
    kernel = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=os.environ | kernel, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def display(folder: Path) -> dict:
    """Return what a cell shows things with: each reads its file, as the ones of IPython do."""

    def image(name: str) -> None:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    def frame(name: str, **size: object) -> None:
        assert "<html" in (folder / "examples" / name).read_text(encoding="utf-8")

    def markdown(text: str) -> None:
        assert "π-Distill" in text and "RL (GRPO)" in text

    return {"Image": image, "IFrame": frame, "Markdown": markdown}


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_one_after_another(tmp_path, monkeypatch):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "examples").mkdir()
    base = make_base(tmp_path / "runs" / "tiny" / "base" / "latest", {})
    (base / "model.safetensors").rename(
        base / "model-00001-of-00001.safetensors"
    )  # as a run of torchtune's checkpointer names it
    monkeypatch.chdir(tmp_path / "examples")
    names = display(tmp_path)
    for source in CODE:
        for line in source.splitlines():
            if line.startswith("!"):
                shell(line[1:], tmp_path)
            elif line.startswith("%cd "):
                os.chdir(eval(line[len("%cd {") : -1], names))
            elif line.startswith("%env "):
                monkeypatch.setenv(*line.removeprefix("%env ").split("="))
            elif "IPython" not in line:
                exec(line, names)
