"""Try wrong inputs over all commands and recipes: each is refused with one sentence, which is the last thing on the screen."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.support.runs import MODEL, pidistill_command, shell, tune_command
from tests.support.tiny_base import make_base
from tests.trials.figures import figures, print_figures
from tests.trials.inputs import Input, Inputs
from tests.trials.warm import outcome, run_all

REFUSED = "refused with one sentence"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(folder, make_base(folder / "base", MODEL))


def try_all(tries: list[Input], folder: Path) -> list[dict]:
    """Return the answers to inputs, and leave them as JSON lines in the folder for whoever looks into a failure."""
    answers = []
    with (folder / "answers.jsonl").open("w") as file:
        for tried, answer in zip(tries, run_all([(list(tried.words), folder) for tried in tries]), strict=True):
            answers.append(answer)
            file.write(json.dumps({"input": str(tried), "kind": tried.kind, "wrong": tried.wrong} | answer) + "\n")
            shutil.rmtree(folder / "run", ignore_errors=True)
    return answers


def show_failures(tries: list[Input], answers: list[dict], allowed: set[str]) -> list[str]:
    pairs = zip(tries, answers, strict=True)
    return [f"{a['outcome']}: {t}\n    {a['output'][-300:]}" for t, a in pairs if a["outcome"] not in allowed]


@pytest.mark.trials
def test_at_least_99_of_100_wrong_inputs_are_refused_with_one_sentence(inputs):
    tries = inputs.every
    answers = try_all(tries, inputs.folder)
    wrong = [(t, a) for t, a in zip(tries, answers, strict=True) if t.wrong]
    unclear = [(t, a) for t, a in zip(tries, answers, strict=True) if not t.wrong]
    print_figures("wrong inputs", [(t.kind, a["outcome"]) for t, a in wrong])
    print_figures("inputs that may be right", [(t.kind, a["outcome"]) for t, a in unclear])
    assert len(wrong) >= 450
    failures = show_failures(*map(list, zip(*wrong, strict=True)), {REFUSED})
    assert len(failures) <= 0.01 * len(wrong), "\n".join(failures)
    assert not (set(Counter(a["outcome"] for _, a in wrong)) & {"hang", "crash"}), "\n".join(failures)
    assert not (failures := show_failures(*map(list, zip(*unclear, strict=True)), {REFUSED, "accepted"})), "\n".join(failures)


def test_a_sample_of_the_wrong_inputs_is_refused_with_one_sentence(inputs):
    by_kind = {tried.kind: tried for tried in inputs.every if tried.wrong}
    tries = list(by_kind.values())[::2]
    assert len(tries) >= 12
    assert not (failures := show_failures(tries, try_all(tries, inputs.folder), {REFUSED})), "\n".join(failures)


# Without --nproc_per_node, torchtune imports its own package `recipes`, which raises, whatever the config says.
COMMANDS = {
    "pidistill run": lambda words: pidistill_command("run", *words),
    "pidistill run, two processes": lambda words: pidistill_command("run", "--nproc_per_node", "2", *words),
    "tune run, one process": lambda words: tune_command("run", "--nproc_per_node", "1", *words),
    "tune run, two processes": lambda words: tune_command("run", "--nproc_per_node", "2", *words),
}


@pytest.mark.trials
@pytest.mark.parametrize("name", COMMANDS)
def test_real_commands_end_with_the_sentence(name, inputs):
    runs = [tried for tried in inputs.every if tried.wrong and tried.words[:1] == ("run",)]
    tries = [tried for tried in runs if "_distributed" in "".join(tried.words[1:2]) and "--config" in tried.words]
    by_kind = {tried.kind: tried for tried in reversed(tries)}
    tries = [tried for kind, tried in by_kind.items() if kind != "command line"][::4]
    results = []
    for tried in tries:
        words = [f"recipes/{tried.words[1]}.py" if name.startswith("tune") else tried.words[1], *tried.words[2:]]
        done = shell(COMMANDS[name](words), cwd=inputs.folder) if name.startswith("pidistill") else shell(COMMANDS[name](words))
        results.append((tried.kind, outcome(done.returncode, done.stdout + done.stderr)))
    print_figures(name, results)
    assert {result for _, result in results} == {REFUSED}, results


def test_the_figures_count_every_kind_and_outcome():
    shown = figures("t", [("a", "hang"), ("a", REFUSED), ("b", REFUSED)])
    assert [line.split() for line in shown.splitlines()[2:]] == [
        ["a", "2", "1", "1"],
        ["b", "1", "1", "0"],
        ["all", "3", "2", "1"],
    ]
