"""The benchmarks start, at sizes that say nothing, and their help names the options that the documents use."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "measure")
SMALL = {
    "update_phase.py": "--question 6 --privileged 5 --completion 4 --group 2 --vocabulary 8192 --turns 1 --no-memory",
    "real_step.py": "--methods sdft --prompts 1 --group 2 --new-tokens 4 --layers 1 --vocabulary 512 --device cpu",
}


def run_script(name: str, arguments: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")


@pytest.mark.parametrize("name", SMALL)
def test_a_small_run_prints_its_table(name, monkeypatch, capsys):
    run_script(name, SMALL[name], monkeypatch)
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_that_the_documents_give_exists(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(name, "--help", monkeypatch)
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "README.md")]
    commands = [line for text in texts for line in text.splitlines() if re.search(rf"python benchmarks/{name}", line)]
    assert commands, f"no document shows how to run {name}"
    for command in commands:
        used = re.findall(r"--[a-z][\w-]*", command.partition(name)[2].partition("  #")[0])
        assert set(used) <= known, command
