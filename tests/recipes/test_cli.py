"""Test the recipes as commands: from a checkout, installed, from another folder, copied and edited, and as a wheel."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune import _recipe_registry as recipe_registry

from pidistill.commands import main as _cli
from tests.support.forks import run_tune
from tests.support.runs import (
    OVERRIDES,
    RECIPES,
    ROOT,
    metrics,
    save_config,
    shell,
    small_config,
)


def as_overrides(settings: dict) -> list[str]:
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def small_overrides(name: str, base: Path, output_dir: Path, **more) -> list[str]:
    """What small_config does, as a user would type it."""
    checkpoint = {"checkpointer.checkpoint_dir": base, "checkpointer.checkpoint_files": "[model.safetensors]"}
    return as_overrides(OVERRIDES[RECIPES[name]] | {"output_dir": output_dir} | checkpoint | more)


@pytest.fixture
def pidistill(monkeypatch):
    """Return a function that runs `pidistill` with arguments in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pidistill", *arguments])
        registered = list(recipe_registry._ALL_RECIPES)
        try:
            _cli.main()
        except SystemExit as ended:
            if ended.code:
                raise
        finally:
            recipe_registry._ALL_RECIPES[:] = registered
            sys.modules.pop("my_recipe", None)
            sys.modules.pop("my_rewards", None)

    return main


def test_ls_shows_ours_first_and_then_torchtunes(pidistill, capsys):
    pidistill("ls")
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["RECIPE", "CONFIG"]
    listed: dict[str, list[str]] = {}
    for words in map(str.split, lines):  # a recipe's name stands in front of its first config only
        listed.setdefault(words[0] if len(words) == 2 else list(listed)[-1], []).append(words[-1])
    ours = sorted(path.stem for path in (ROOT / "recipes").glob("*_distributed.py"))
    assert list(listed)[: len(ours)] == ours
    assert "full_finetune_distributed" in listed
    found = {config for recipe in ours for config in listed[recipe]}
    configs = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps"]
    assert found == {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in configs}


def test_run_by_name_from_another_folder_with_a_reward_of_ones_own(pidistill, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "class Length:\n"
        "    def __init__(self, unit=1.0):\n"
        "        self.unit = unit\n"
        "    def __call__(self, example, turns):\n"
        "        return self.unit * (len(turns[-1]['content'].split()) % 3)\n"
    )
    own = {"environment._component_": "pidistill.envs.SingleTurn", "environment.reward._component_": "my_rewards.Length"}
    overrides = small_overrides("opsd", tiny_base, "out", max_steps=2, **own, **{"environment.reward.unit": 0.5})
    pidistill("run", "opsd_distributed", "--config", "tiny/opsd", *overrides)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out" / "latest" / "model-00001-of-00001.safetensors").is_file()
    assert any(row["reward_std"] > 0 for row in metrics(tmp_path / "out"))


def test_tune_run_from_the_checkout(tmp_path):
    """Start one process, without the launcher, with which test_two_processes.py starts `tune run`."""
    settings = {"output_dir": tmp_path / "out", "checkpointer.checkpoint_dir": tmp_path / "init", "max_steps": 2}
    settings |= {"batch_size": 4, "dataset.n": 8}
    words = ["run", "recipes/sft_distributed.py", "--config", "configs/tiny/base.yaml", *as_overrides(settings)]
    status, printed = run_tune(words)
    assert status == 0, printed[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]


def test_a_copied_and_edited_recipe_runs_elsewhere(pidistill, capsys, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pidistill("cp", "opsd_distributed", "my_recipe.py")
    pidistill("cp", "tiny/opsd", "my_config.yaml")
    assert "Copied file to my_recipe.py" in capsys.readouterr().out
    recipe, line = Path("my_recipe.py").read_text(), "        row = step_report("
    assert recipe.count(line) == 1
    Path("my_recipe.py").write_text(
        recipe.replace(line, '        row = {"longest": max(r.policy_tokens for r, _ in kept)} | step_report(')
    )
    assert OmegaConf.load("my_config.yaml") == OmegaConf.load(ROOT / "configs" / "tiny" / "opsd.yaml")
    overrides = small_overrides("opsd", tiny_base, "out", max_steps=2)
    overrides = [text for text in overrides if not text.startswith("environment.")]
    pidistill("run", "my_recipe.py", "--config", "my_config.yaml", *overrides)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]
    assert all(1 <= row["longest"] <= 16 for row in metrics(tmp_path / "out"))


def test_the_first_command_of_a_new_user_without_the_base_says_what_to_do(pidistill, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        pidistill("run", "opsd_distributed", "--config", "tiny/opsd")
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(
        "error: checkpoint folder runs/tiny/base/latest does not exist; run `make base`"
    )


def test_under_tune_run_with_two_processes_the_sentence_is_printed_once_and_last(tmp_path):
    words = ["run", "--nproc_per_node", "2", "recipes/sft_distributed.py", "--config", "configs/tiny/sft.yaml"]
    status, printed = run_tune([*words, f"output_dir={tmp_path}", "optimizer.lr=fast"])
    assert status != 0
    lines = printed.splitlines()
    assert lines[-1] == "error: optimizer.lr=fast must be a number"
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in printed
    assert "Running SFTRecipe" not in printed, "the config is printed before it is checked"
    assert printed.count("Skipping import of cpp extensions") == 0, "a worker says it"


def test_a_file_that_is_not_yaml_is_refused_under_tune_run(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\n b: 2")
    status, printed = run_tune(["run", "recipes/sft_distributed.py", "--config", f"{tmp_path}/bad.yaml"])
    assert status != 0
    assert printed.splitlines()[-1].startswith(f"error: config {tmp_path}/bad.yaml is not valid YAML")
    assert "Traceback" not in printed


def test_the_recipe_file_itself_is_a_program(tiny_base, tmp_path, monkeypatch, capsys):
    """Run `recipes/x.py` as `python recipes/x.py` does, which a debugger or a cluster's launcher starts."""
    config = save_config(small_config("evaluate", tiny_base, tmp_path / "out", dataset__max_rows=2), tmp_path / "config.yaml")
    program = str(ROOT / "recipes" / "evaluate_distributed.py")
    monkeypatch.setattr(sys, "argv", [program, "--config", str(config)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(program, run_name="__main__")
    assert not ended.value.code
    printed = "".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "results.json").read_text()).keys() == {"student greedy", "student", "student + PI"}
    assert "student+PI" in printed and str(tmp_path / "out" / "results.json") in printed


# Several commands in one process: the import is what takes the time.
ONE_PROCESS = """
import json, sys
import pidistill.commands.main as c
print(c.__file__)
for words in json.loads(sys.argv[1]):
    sys.argv = ["pidistill", *words]
    try:
        c.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def test_the_wheel_holds_recipes_and_configs_inside_the_package(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pidistill", "recipes", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
        str(source),
    ]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pidistill"}, "something is installed beside the package"
    expected = {f"pidistill/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    expected |= {f"pidistill/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "pidistill").rglob("*.py")}
    beside = [path for path in (ROOT / "pidistill").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.name for path in beside} >= {"py.typed", "report.js", "uplot.min.js", "report.html.jinja", "card.md.jinja"}
    expected |= {str(path.relative_to(ROOT)) for path in beside}
    assert len(expected) > 60
    assert expected <= set(names)

    # Unpacked somewhere else, it lists, copies, previews and runs without the checkout.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    settings = {"output_dir": tmp_path / "out", "checkpointer.checkpoint_dir": tmp_path / "init", "max_steps": 1}
    settings |= {"batch_size": 4, "dataset.n": 8}
    commands = [
        ["ls"],
        ["cp", "llama3_2/1B_opsd", "mine.yaml"],
        ["preview", "tiny/opsd", "--rows", "1", "--scan", "1"],
        ["run", "sft_distributed", "--config", "tiny/base", *as_overrides(settings)],
        ["report", str(tmp_path / "out")],
        ["export", str(tmp_path / "out"), "--output", str(tmp_path / "shared")],
    ]
    done = shell([sys.executable, "-c", ONE_PROCESS, json.dumps(commands)], tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "shared" / "README.md").is_file()
    assert str(tmp_path / "installed") in done.stdout.splitlines()[0]
    assert all(name in done.stdout for name in ("pi_distill_distributed", "tiny/pi_distill", "qwen3/8B_pi_distill_paper"))
    assert (tmp_path / "mine.yaml").read_bytes() == (ROOT / "configs" / "llama3_2" / "1B_opsd.yaml").read_bytes()
    assert "⟦" in done.stdout
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1]


def test_the_help_lists_all_commands_and_imports_no_torch():
    program = "import sys, pidistill.commands.main as c; c.main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("ls", "cp", "run", "preview", "plan", "keys", "prepare", "sweep", "demo"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("name", ["tiny/opsd", "llama2/7B_full", "own.yaml"])
def test_cat_prints_bundled_configs_torchtunes_and_files(name, pidistill, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("output_dir: mine")
    pidistill("cat", name)
    assert "output_dir: " in capsys.readouterr().out


def test_the_version_is_the_package_s(pidistill, capsys):
    pidistill("--version")
    assert capsys.readouterr().out == f"pidistill {version('pidistill')}\n"


def test_cp_keeps_a_file_that_exists(pidistill, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("mine")
    for name in ("mine.yaml", "mine"):
        with pytest.raises(SystemExit) as ended:
            pidistill("cp", "tiny/opsd", name)
        assert ended.value.code == 2 and Path("mine.yaml").read_text() == "mine"
        assert re.fullmatch(f"error: {name} exists and is kept; name another file.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nosuch"], "command nosuch is unknown; choose one of ls, cp, run"),
        (["run", "nosuch", "--config", "tiny/opsd"], "recipe nosuch is neither a recipe of `pidistill ls` nor a Python file"),
        (["run", "opsd_distributed", "--config", "nosuch"], "config nosuch is neither a file nor a bundled config"),
        (["run", "opsd_distributedd", "--config", "tiny/opsd"], r"nor a Python file; did you mean opsd_distributed\?"),
        (["run", "opsd_distributed", "--config", "tiny/opsdd"], r"nor a bundled config; did you mean tiny/opsd\?"),
        (["run", "opsd_distributed", "--config", "configs/tiny/opsdd.yaml"], r"config; did you mean tiny/opsd\?"),
        (["cat", "tiny/opsdd"], r"config tiny/opsdd is unknown; did you mean tiny/opsd\?"),
        (["cat", "tiny/opsdd.yaml"], r"config tiny/opsdd.yaml is unknown; did you mean tiny/opsd\?"),
        (["cat", "nosuch"], "config nosuch is unknown; name one of `pidistill ls` or a YAML file"),
        (["run", "opsd_distributed", "--config"], "a run needs --config"),
        (["run", "opsd_distributed"], "a run needs --config"),
        (["run", "--nproc_per_nod", "1"], "the following arguments are required: recipe"),
        (["run", "opsd_distributed", "--config", "bad.yaml"], "config bad.yaml is not valid YAML .*line 1"),
        (["run", "opsd_distributed", "--config", "tiny/opsd", "lr"], "config .*tiny/opsd.yaml does not take lr .*key=value"),
        (
            ["run", "opsd_distributed", "--config", "tiny/opsd", "seed=${nowhere}"],
            "tiny/opsd.yaml does not take seed=.*nowhere",
        ),
        (["cp", "nosuch", "x.py"], "Invalid file name: nosuch. Try `pidistill ls`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_refused_with_one_sentence(words, expected, pidistill, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("a: [1\n b: 2")
    with pytest.raises(SystemExit) as ended:
        pidistill(*words)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert re.fullmatch(f"error: .*{expected}.*\n", printed.err), printed.err
