"""Test docs/gsm8k.md: every command of it, in its order, on published rows, with a tiny model in place of the named one."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from torchtune import _recipe_registry as recipe_registry

from pidistill.commands import main as _cli
from tests.support.forks import run_recipe
from tests.support.runs import metrics
from tests.support.tiny_qwen import ROOT, qwen_checkpoint, small_model

DATA = os.environ.get("PIDISTILL_TEST_DATA")
DOC = (ROOT / "docs" / "gsm8k.md").read_text(encoding="utf-8")
TRAINING = [
    *("max_steps=2", "prompts_per_round=2", "minibatch_rollouts=null", "updates_per_round=1", "eval_dataset.max_rows=2"),
    *("optimizer.lr=1e-3", "lr_scheduler.num_warmup_steps=1", "rollout_log_steps=2", "micro_batch_tokens=1200"),
]


def commands(kind: str) -> list[str]:
    blocks = re.findall(rf"^```sh{kind}\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    return [line for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if line]


def test_only_downloads_are_left_out():
    assert len(commands(" download")) == 3 and len(commands("")) >= 9
    assert all(re.match(r"(tune download|curl -LO https://)", command) for command in commands(" download"))
    assert len(commands("")) + 3 == len(re.findall(r"^(?:tune|pidistill|curl) ", DOC, re.MULTILINE))
    folders = set(re.findall(r"`(\w+)`", DOC.split("## 1.")[0])) - {"configs"}
    assert folders and all((ROOT / "configs" / folder).is_dir() for folder in folders)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader would stand: the checkout's recipes and configs, the rows, and the model's folder."""
    made = tmp_path_factory.mktemp("walk")
    for name in ("recipes", "configs"):
        (made / name).symlink_to(ROOT / name)
    train = (Path(DATA) / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)[:400]
    test = (Path(DATA) / "gsm8k_test_400.jsonl").read_text().splitlines(keepends=True)[:3]
    (made / "train.jsonl").write_text("".join(train))
    (made / "test.jsonl").write_text("".join(test))
    qwen_checkpoint(made / "model", [text for line in train for text in json.loads(line).values()])
    return made


def shrunk(command: str) -> list[str]:
    """The command's words and what makes it small; what it says itself stays."""
    words = shlex.split(command)
    if words[1] == "prepare":
        return words
    said = {word.partition("=")[0] for word in words if "=" in word}
    small = [*small_model(Path("model"), Path("unused"))[1:], "sampler.max_new_tokens=8"]
    small += TRAINING if words[:2] == ["tune", "run"] and "evaluate" not in command else []
    return words + [word for word in small if word.partition("=")[0] not in said]


def run(words: list[str], monkeypatch, capsys) -> str:
    """Run the recipe of a `tune run` in a process of its own, and `pidistill` in this process."""
    if words[0] == "tune":
        *start, processes, recipe, config, name = words[1:7]
        assert [*start, Path(recipe).parent.name, config] == ["run", "--nproc_per_node", "recipes", "--config"]
        assert int(processes) > 0
        rest = [config, name, *words[7:]]
        return run_recipe(Path(recipe).stem, rest, Path.cwd())
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", [])
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        _cli.main()
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    return out.out


@pytest.mark.skipif(not DATA, reason="PIDISTILL_TEST_DATA is not set: no GSM8K rows to walk through")
def test_every_command_of_the_walk_works_after_those_before_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    printed = {command: run(shrunk(command), monkeypatch, capsys) for command in commands("")}
    previews = [text for command, text in printed.items() if " preview " in command]
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()]
    assert len(previews) == 3 and all(rows[0]["question"] in text for text in previews)
    answer, solution, shuffled = (re.search("⟦(.*?)⟧", text, re.DOTALL)[1] for text in previews)
    assert answer.startswith("<privileged_information>\nThe final answer is 72.")
    assert "24 clips in May." in solution and "clips in May." not in shuffled
    assert not any("warning" in text for text in previews)
    for method in ("pcsd", "pi_distill"):
        steps = [row for row in metrics(folder / f"runs/qwen2_5/0.5B_{method}") if "loss" in row]
        assert [row["step"] for row in steps] == [1, 2] and all(row["kl_teacher_student_nats"] > 0 for row in steps)
    for output in ("0.5B_evaluate", "0.5B_pi_distill/test"):
        results = json.loads((folder / "runs/qwen2_5" / output / "results.json").read_text())
        assert [view["rollouts"] for view in results.values()] == [3, 24, 24]
        assert {"pass@2", "pass@4", "pass@8"} <= set(results["student"]) & set(results["student + PI"])
    shutil.rmtree(folder / "runs")
