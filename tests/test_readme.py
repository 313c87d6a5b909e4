"""Test that all commands, snippets, names and links of the README, docs/ and examples/ exist; tests/recipes runs commands."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from pidistill.commands.common import parse_with_overrides
from pidistill.commands.main import main as pidistill
from pidistill.commands.plan.command import parser as plan_parser
from pidistill.commands.plan.reading import read
from pidistill.commands.sweep.cells import grid_cells, read_sweep
from pidistill.commands.sweep.command import parser as sweep_parser
from pidistill.commands.sweep.search import SweepPlan, check_plan
from pidistill.commands.watch import parser as watch_parser
from pidistill.components import resolve
from pidistill.config import check_config
from tests.support.pages import files_of
from tests.support.reported_runs import write_run
from tests.support.sweeps import check_commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
READERS_OWN = ("mine.", "my_rewards.")  # files that a page lets the reader write
OWN_FILES = {name: text for page in PAGES for name, text in files_of(page).items()}  # that a page tells its reader to save
STOCK = {"full_finetune_distributed"}  # torchtune's own
MADE = {"mine_test.yaml"}  # a command before makes it; tests/test_first_run.py runs both


def code_lines() -> list[str]:
    blocks = re.findall(r"^```[\w ]*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]


PLANS = [line for line in code_lines() if line.startswith("pidistill plan ")]
SWEEPS = [line for line in code_lines() if re.match(r"pidistill sweep (?!--)", line)]
COMMANDS = [line for line in code_lines() if re.match(r"(tune|pidistill) run", line)]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 6 and len(PLANS) >= 2 and len(SWEEPS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_command_names_a_recipe_a_config_and_real_keys(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    recipe = words[words.index("--config") - 1]
    config = words[words.index("--config") + 1]
    if recipe in STOCK or config in MADE:
        return
    name = Path(recipe).stem.replace("my_recipe", "pi_distill_distributed")
    if config in OWN_FILES:
        path = tmp_path / config
        for file, text in OWN_FILES.items():
            (tmp_path / file).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        path = ROOT / config if config.endswith(".yaml") else ROOT / "configs" / f"{config}.yaml"
    assert path.is_file(), config
    overrides = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words if "=" in word]
    cfg = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
    module = importlib.import_module(f"recipes.{name}")
    check_config(cfg, getattr(module, "KEYS", None) or module.EVALUATION_KEYS)


@pytest.mark.parametrize("command", SWEEPS)
def test_a_sweep_command_of_the_readme_can_be_planned(command):
    arguments = parse_with_overrides(sweep_parser(), shlex.split(command)[2:])
    sweep = read_sweep(
        arguments.config,
        arguments.overrides,
        output_dir=arguments.output_dir,
        arms=arguments.arms,
        seeds=arguments.seeds,
        base=arguments.base,
        evaluate=arguments.evaluate,
        select=arguments.select,
    )
    check_plan(SweepPlan(sweep, arguments.search, arguments.trials))
    for cell in grid_cells(sweep) if arguments.search == "grid" else ():
        check_commands(sweep, cell)


@pytest.mark.parametrize("command", PLANS)
def test_a_plan_command_of_the_readme_names_a_config_and_real_keys(command):
    arguments = parse_with_overrides(plan_parser(), shlex.split(command)[2:])
    assert read(arguments.config, arguments.overrides).model


READING = [line for line in code_lines() if re.match(r"pidistill (report|watch|export) ", line)]


@pytest.mark.parametrize("command", READING)
def test_a_command_that_reads_a_run_does_so_as_it_is_written(command, tmp_path, monkeypatch):
    """In a folder where the runs that the pages name lie; a server is not started."""
    for name in ("tiny/pi_distill", "tiny/opsd", "demo", "mine"):
        folder = write_run(tmp_path / "runs" / name)
        (folder / "latest").resolve().mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / "latest" / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    if "--serve" in words:
        assert watch_parser().parse_args(words[1:]).serve == 0
        return
    monkeypatch.setattr("sys.argv", ["pidistill", *words])
    pidistill()


def test_the_pages_read_runs():
    assert {command.split()[1] for command in READING} == {"report", "watch", "export"}


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in code_lines() if line.startswith("make ") for word in line.split()[1:] if word.isalpha()}
    named -= {"source", "bin", "activate"}
    assert {"demo", "test", "install", "base"} <= named
    assert named <= targets


def test_dotted_names_resolve():
    names = set(re.findall(r"`(pidistill(?:\.\w+)+)`", TEXT))
    assert len(names) >= 4
    for name in names:
        resolve(name)


def components(node):
    """All dotted paths behind `_component_`, at any depth."""
    if isinstance(node, dict):
        own = [node["_component_"]] if "_component_" in node else []
        return own + [path for value in node.values() for path in components(value)]
    return [path for value in node for path in components(value)] if isinstance(node, list) else []


SNIPPETS = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_yaml_snippets_resolve(snippet):
    node = yaml.safe_load(snippet)
    paths = [path for path in components(node) if not path.startswith(READERS_OWN)]
    for path in paths:
        resolve(path)
    wrapped = node.get("dataset", {}).get("_component_") == "pidistill.data.stock_sft_dataset"
    known = {"dataset"} if wrapped else set(node)
    node = {"dataset": node["dataset"]["dataset"]} if wrapped else node  # torchtune's recipe adds the tokenizer
    if not any(own in snippet for own in READERS_OWN):
        check_config(OmegaConf.create(node), known)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


def test_files_that_are_named_exist():
    paths = set(re.findall(r"`((?:pidistill|tests|benchmarks|recipes|configs)/[\w./-]+\.(?:py|yaml))`", TEXT))
    assert len(paths) >= 4
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_table_of_methods_names_every_objective_and_every_config_of_the_tiny_world():
    table = README.split("## Methods")[1].split("## Run")[0]
    assert table.count("| method | who samples |") == 2  # methods; baselines
    objectives = {path.name for path in (ROOT / "pidistill" / "objectives").glob("*.py")} - {
        "__init__.py",
        "base.py",
        "schedule.py",
        "routed.py",  # joins methods, is none itself
    }
    configs = {f"tiny/{path.stem}" for path in (ROOT / "configs" / "tiny").glob("*.yaml")} - {"tiny/base", "tiny/evaluate"}
    assert len(objectives) > 8 and len(configs) > 15
    assert objectives == set(re.findall(r"`(\w+\.py)`", table))
    assert configs == set(re.findall(r"`(tiny/\w+)`", table))
    recipes = set(re.findall(r"`(\w+_distributed)`", table))
    assert recipes == {path.stem for path in (ROOT / "recipes").glob("*_distributed.py")} - {"evaluate_distributed"}


def test_the_status_row_counts_the_tables_of_methods():
    tables = README.split("## Methods")[1].split("## Run")[0].split("| method | who samples |")[1:]
    rows = [len(re.findall(r"^\| (?!---)", table.partition("\n")[2], re.MULTILINE)) for table in tables]
    assert re.search(r"^\| status \| (\d+) methods and (\d+) baselines", README, re.MULTILINE).groups() == tuple(map(str, rows))


LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*/*.md"))]


def anchor(heading: str) -> str:
    """Return the anchor that the forge and mkdocs make of a heading: words in lower case, with hyphens between them."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())


def prose(text: str) -> str:
    """Return a page without its blocks and spans of code, in which brackets are no links and `#` is no heading."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)}


def test_an_anchor_is_what_the_forge_makes_of_a_heading():
    assert anchor("Mixed precision: `dtype` and more") == "mixed-precision-dtype-and-more"
    assert anchor("See [that page](x.md), too") == "see-that-page-too"


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(text)):
        name, _, part = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (part and target.suffix == ".md" and part not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_a_link_to_a_file_or_a_heading_that_is_not_there_is_found():
    text = "[a](docs/running.md) [b](docs/none.md) [c](#results) [d](docs/running.md#none) `[e](none.md)` [f](https://x.org)"
    assert broken_links(ROOT / "README.md", text) == ["docs/none.md", "docs/running.md#none"]
    assert sum(len(re.findall(r"\]\(", page.read_text(encoding="utf-8"))) for page in LINKED) > 100


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """With mkdocs of this environment, or of the one that `make docs` makes."""
    places = [Path(sys.executable).with_name("mkdocs"), ROOT / ".venv-docs" / "bin" / "mkdocs"]
    mkdocs = next((path for path in places if path.is_file()), None)
    if mkdocs is None:
        pytest.skip("mkdocs is not installed: run `make docs` once")
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "running" / "index.html").is_file() and "Objective" in (tmp_path / "api" / "index.html").read_text()
