"""Test the folders under examples/: every config takes a step with a tiny model, and sweeps name configs that exist."""

import importlib
import json
import os
import re
import runpy
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from pidistill.commands.places import keys_of_recipe, recipe_of
from pidistill.commands.sweep import check
from pidistill.commands.sweep.cells import grid_cells, read_sweep
from pidistill.config import build, check_config
from pidistill.envs.tool_world import tool_world_tokenizer
from pidistill.rollouts.selections import Selected, Successes
from pidistill.types import Example, Rollout
from tests.support.hub_models import hub_folder
from tests.support.runs import ROOT, metrics
from tests.support.tiny_tokenizers import qwen_folder

EXAMPLES = ROOT / "examples"
JOBS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
CONFIGS = sorted(path for path in EXAMPLES.glob("*/*.yaml") if path.stem != "methods")
ROUND = {
    "max_steps": 1, "prompts_per_round": 2, "group_size": 2, "minibatch_rollouts": None, "batch_size": 2,
    "rollout_log_steps": 0, "eval_samples": 1, "save_every_steps": 1, "eval_every_steps": 1, "samples_per_prompt": 1,
    "compute_dtype": None,
}  # fmt: skip
SMALL = {
    "document": (512, 6), "system_prompt": (1024, 6), "gsm8k": (1024, 6), "tool_traces": (5120, 40), "stockroom": (1536, 40),
}  # fmt: skip
GSM8K = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(60)]


class AllOfThem(Successes):
    """Keep what the config's selection is given, right or wrong, whole or cut off."""

    def select(self, rollouts: Sequence[Rollout], *settings: Any) -> Selected:
        return super().select([replace(r, task_reward=self.threshold, stop_reason="eos") for r in rollouts], *settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One folder per job with a tiny model and the job's rows; `runs/JOB/` of its configs stands for it."""
    root = tmp_path_factory.mktemp("examples")
    for job in JOBS:
        folder = root / job
        if job == "tool_traces":
            _tool_world_base(folder)
        else:
            hub_folder("qwen2, tied", folder / "model", vocab_size=640, max_position_embeddings=2048)
            qwen_folder(folder / "model")
        if (EXAMPLES / job / "make_data.py").is_file():
            runpy.run_path(str(EXAMPLES / job / "make_data.py"))["main"](str(folder))
    (root / "gsm8k" / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return root


def _tool_world_base(folder: Path) -> None:
    tool_world_tokenizer(str(folder / "tokenizer"))
    cfg = OmegaConf.load(ROOT / "configs" / "tool_world" / "base.yaml")
    settings = TINY_LLAMA | {"checkpointer.checkpoint_dir": str(folder / "model")}
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value)
    build(cfg.checkpointer, output_dir=str(folder / "unused"))


TINY_LLAMA = {"model.num_layers": 1, "model.embed_dim": 32, "model.intermediate_dim": 64}


def tiny(path: Path, files: Path, output_dir: Path) -> DictConfig:
    """Return the config with a tiny model, few rows and one step."""
    cfg, job = OmegaConf.load(path), path.parent.name
    max_seq_len, max_new_tokens = SMALL[job]
    changes: dict[str, Any] = {"output_dir": str(output_dir), "threads": 1, "device": "cpu"}
    changes |= {"checkpointer.checkpoint_dir": str(files / job / "model"), "tokenizer.max_seq_len": max_seq_len}
    changes |= {"sampler.max_new_tokens": max_new_tokens}
    if job == "stockroom":
        changes["sampler.max_turn_tokens"] = 6
    if job == "tool_traces":
        changes |= TINY_LLAMA | {"tokenizer.path": str(files / job / "tokenizer"), "sampler.max_turn_tokens": 20}
        changes["checkpointer.checkpoint_files"] = ["model.safetensors"]
    for key in ("dataset", "eval_dataset", "domains.other.dataset"):
        if node := OmegaConf.select(cfg, key):
            changes |= _few_rows(node, key, files / job)
    if "selection" in cfg:  # a tiny model is never right, and never ends before the token limit
        changes["selection._component_"] = f"{__name__}.AllOfThem"
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    for key, value in ROUND.items():
        if key in cfg:
            cfg[key] = value
    return cfg


def _few_rows(node: DictConfig, key: str, folder: Path) -> dict[str, Any]:
    if "n" in node:
        return {f"{key}.n": 2}
    if "dataset" in node:
        return _few_rows(node.dataset, f"{key}.dataset", folder)
    source = "gsm8k.jsonl" if node.source == "openai/gsm8k" else Path(node.source).name
    changes = {f"{key}.max_rows": 2}
    return changes if str(node.source).startswith("${") else changes | {f"{key}.source": str(folder / source)}


def step(path: Path, files: Path, output_dir: Path) -> None:
    name = recipe_of(str(path))
    module = importlib.import_module(f"recipes.{name}")
    (made,) = [value for key, value in vars(module).items() if key.endswith("Recipe")]
    cfg = tiny(path, files, output_dir)
    recipe = made(cfg)
    recipe.setup(cfg)
    if name == "evaluate_distributed":
        recipe.report(recipe.evaluate())
    elif name == "sample_distributed":
        recipe.report(recipe.sample())
    else:
        recipe.train()
        recipe._log.close()


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_recipe_takes_every_key_and_every_component_its_arguments(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = keys_of_recipe(recipe_of(str(path)))
    assert known is not None
    check_config(OmegaConf.load(path), *known)
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.endswith(f"--config {path.relative_to(ROOT)}")


# By default one config per recipe and job takes its step, and all of the document's; the others are like one of these.
STEPS = {"system_prompt/opsd_ucla", "system_prompt/rft", "gsm8k/pi_distill", "tool_traces/opsd", "stockroom/rft"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.parent.name == "document" or name_of(path) in STEPS else pytest.mark.slow)
        for path in CONFIGS
    ],
    ids=name_of,
)
def test_the_config_takes_a_step(path, files, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # rewards of an example are found from the checkout
    if path.stem == "rft":
        step(path.with_stem("rft_sample"), files, tmp_path / "rft_sample")
        (tmp_path / "rft_sample" / "traces.jsonl").rename(files / path.parent.name / "traces.jsonl")
    step(path, files, tmp_path)
    if path.stem == "evaluate":
        views = {"student greedy", "student", "student + PI"}
        other = {"other/student greedy", "other/student"} if path.parent.name == "document" else set()
        assert set(json.loads((tmp_path / "results.json").read_text())) == views | other
    elif path.stem == "rft_sample":
        rows = [json.loads(line) for line in (tmp_path / "traces.jsonl").open()]
        assert rows and all(row["completion"] and row["privileged"] for row in rows)
    else:
        assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1]


@pytest.mark.parametrize("job", JOBS)
def test_a_job_has_its_arms_and_its_controls(job, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(f"examples/{job}/methods.yaml")
    cells = grid_cells(sweep)
    names = {cell.arm.name for cell in cells}
    assert names >= {"base", "rl", "rft", "opsd", "pi_distill"} and names & {"sdft", "opsd_ucla"}
    assert {stage.config for cell in cells for stage in cell.arm.stages} | {f"examples/{job}/evaluate.yaml"} == {
        f"examples/{job}/{path.name}" for path in CONFIGS if path.parent.name == job
    }
    controls = {stage.overrides.get("privileged.control") for cell in cells for stage in cell.arm.stages}
    assert {"none", "shuffled"} <= controls
    overridden = {key for cell in cells for stage in cell.arm.stages for key in stage.overrides}
    assert {key for key in overridden if key.partition(".")[0] in SHARED} == {"privileged.control"}
    assert (EXAMPLES / job / "README.md").is_file()


@pytest.mark.parametrize("job", JOBS)
def test_the_sweep_of_a_job_would_start_where_its_rows_and_its_base_are(job, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = read_sweep(f"examples/{job}/methods.yaml")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / job).symlink_to(files / job)
    (base,) = {arm.base for arm in sweep.arms}
    shutil.copytree(files / job / "model", base, copy_function=os.symlink)
    Path(base, "model-00001-of-00001.safetensors").touch()
    check.check_cells(sweep, "grid")


# All arms of a job are judged alike, sample alike and show the teacher the same, but for these settings.
SHARED = ("environment", "privileged", "sampler")
OTHERWISE = {
    ("gsm8k/sdft", "sampler.temperature"): 1.0,  # as configs/*/sdft.yaml have it
    ("stockroom/pi_distill", "sampler.temperature"): 1.0,  # at 0.5 the episodes of a group are alike: few have an advantage
}


def settings_of(node: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the values at the leaves of a part of a config, by their dotted keys."""
    found = {}
    for key, value in node.items():
        found |= settings_of(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
    return found


def shared_settings(path: Path) -> dict[str, Any]:
    cfg = OmegaConf.load(path)
    parts = {part: OmegaConf.to_container(cfg[part]) for part in SHARED}
    return {key: value for part, node in parts.items() for key, value in settings_of(node, part).items()}


def test_the_arms_of_a_job_share_reward_prompt_and_sampler_with_its_evaluation():
    found = {}
    for path in CONFIGS:
        own, judged = shared_settings(path), shared_settings(path.with_name("evaluate.yaml"))
        differ = {key for key in own.keys() | judged.keys() if (key, own.get(key)) not in judged.items()}
        found |= {(name_of(path), key): own.get(key, "absent") for key in differ}
    assert found == OTHERWISE


# ------------------------------------------------------------------------------------------- the data


def read(files: Path, job: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (files / job / f"{name}.jsonl").open()]


def test_the_held_out_questions_ask_for_the_same_facts_in_other_words(files):
    train, held_out = (read(files, "document", name) for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (192, 96)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    facts = {(row["document"], row["answer"]) for row in train}
    assert facts == {(row["document"], row["answer"]) for row in held_out} and len(facts) == 48
    assert all(row["answer"] in row["document"] and row["answer"] not in row["question"] for row in train + held_out)
    more = read(files, "document", "held_out_more")
    questions = {row["question"] for row in more}
    assert len(questions) == 288 and {row["question"] for row in held_out} < questions
    assert not questions & {row["question"] for row in train}
    assert facts == {(row["document"], row["answer"]) for row in more}
    named = {(row["fact"], row["document"], row["answer"]) for row in train + held_out + more}
    assert len({fact for fact, _, _ in named}) == len(named) == 48, "a name for each fact, and a fact for each name"
    assert all(row["answer"] not in row["question"] for row in more)
    validation = read(files, "document", "validation")
    assert {row["fact"] for row in validation} == {row["fact"] for row in train} and len(validation) == 48
    assert not {row["question"] for row in validation} & (questions | {row["question"] for row in train})
    other = read(files, "document", "other")
    assert len({row["question"] for row in other}) == 64
    assert not any(row["answer"].lower() in row["question"].lower().strip("?").split() for row in other)
    assert not {answer for _, answer in facts} & {row["answer"] for row in other}
    texts = read(files, "document", "text")
    assert {row["answer"] for row in texts} == {row["document"] for row in train} and len(texts) == 48


def test_others_are_the_three_other_facts_of_the_person(files):
    rows = [row for name in ("train", "held_out", "held_out_more", "validation") for row in read(files, "document", name)]
    facts: dict[str, set[str]] = {}
    for row in rows:
        facts.setdefault(row["document"], set()).add(row["answer"])
    assert {len(found) for found in facts.values()} == {4}
    for row in rows:
        assert len(row["others"]) == 3 and {*row["others"], row["answer"]} == facts[row["document"]]


def test_an_answer_of_the_document_is_right_where_it_says_the_reference_and_wrong_where_it_recites_the_text(files):
    cfg = OmegaConf.load(EXAMPLES / "document" / "evaluate.yaml")
    environment = build(cfg.environment)
    for name in ("held_out", "train"):
        cfg.dataset.source = str(files / "document" / f"{name}.jsonl")
        rows = build(cfg.dataset)
        assert len(rows) in (96, 192)
        for row in rows:
            assert row.reference in row.privileged
            for answer, reward in ((row.reference, 1.0), (f"It is {row.reference}.", 1.0), (row.privileged, 0.0), ("No.", 0.0)):
                assert play(environment, row, [{"role": "assistant", "content": answer}])[1] == reward, (row.id, answer)


def test_the_everyday_rows_stand_beside_the_training_rows_and_have_no_text(files):
    train, mixed = (read(files, "document", name) for name in ("train", "train_and_everyday"))
    everyday = mixed[len(train) :]
    assert mixed[: len(train)] == train and len(everyday) == 96
    assert train[0].keys() == everyday[0].keys() and not any(row["document"] or row["others"] for row in everyday)
    asked = {
        row["question"] for name in ("train", "held_out_more", "validation", "other") for row in read(files, "document", name)
    }
    assert len({row["question"] for row in everyday} - asked) == 96
    cfg = OmegaConf.load(EXAMPLES / "document" / "opsd_ucla.yaml")
    cfg.dataset.source = str(files / "document" / "train_and_everyday.jsonl")
    environment, rows = build(cfg.environment), build(cfg.dataset)
    assert Counter(row.privileged is None for row in rows) == {False: 192, True: 96}
    for row in rows:
        assert play(environment, row, [{"role": "assistant", "content": f"It is {row.reference}."}])[1] == 1.0
    sums = [(re.findall(r"\d+", row["question"]), row["answer"]) for row in everyday if "plus" in row["question"]]
    assert len(sums) == 24 and all(sum(map(int, terms)) == int(answer) for terms, answer in sums)


def test_held_out_questions_to_the_desks_are_about_other_things_in_other_words(files):
    splits = train, validation, held_out = [read(files, "system_prompt", n) for n in ("train", "validation", "held_out")]
    assert (len(train), len(validation), len(held_out)) == (84, 24, 48)
    for rows in splits:
        assert {row["reference"] for row in rows[:24]} == {
            f"{desk}/{kind}" for desk in ("porter", "librarian") for kind in ("neutral", "price")
        }
        for row in rows:  # the short prompt says nothing of the rules, and each desk has its own
            desk = row["reference"].split("/")[0]
            assert "Every answer" not in json.dumps(row["messages"])
            assert ("Barnaby" in json.dumps(row["privileged_messages"])) == (desk == "porter")
    questions = [row["messages"][-1]["content"] for rows in splits for row in rows]
    assert len(set(questions)) == len(questions) == 84 + 24 + 48


def test_the_curves_of_an_example_are_drawn_with_rows_that_its_evaluation_does_not_have():
    checked = 0
    for path in sorted(EXAMPLES.glob("*/*.yaml")):
        cfg, judged = OmegaConf.load(path), path.with_name("evaluate.yaml")
        if cfg.get("eval_dataset") and judged.is_file():
            nodes = [OmegaConf.to_container(part, resolve=True) for part in (cfg, OmegaConf.load(judged))]
            of_all = ("max_rows", "n", "privileged", "privileged_key")
            drawn, held_out = ({k: v for k, v in node[key].items() if k not in of_all}
                               for node, key in zip(nodes, ("eval_dataset", "dataset"), strict=True))  # fmt: skip
            assert drawn != held_out, path
            checked += 1
    assert checked >= 20


def test_held_out_requests_ask_for_the_same_things_in_other_words(files):
    splits = {name: read(files, "stockroom", name) for name in ("train", "validation", "held_out")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 96, "validation": 24, "held_out": 96}
    asked = [{row["messages"][-1]["content"] for row in rows} for rows in splits.values()]
    assert len(set.union(*asked)) == 96 + 24 + 96
    rooms = [{(row["item"], row["room"]) for row in rows} for rows in splits.values()]
    assert rooms[0] == rooms[1] == rooms[2] and len(rooms[0]) == 24
    assert set(Counter(room for _, room in rooms[0]).values()) == {4}
    for row in splits["train"]:  # the student reads neither the room nor the number of the box
        shown = row["messages"][:1] + row["messages"][-1:]
        assert row["room"] not in json.dumps(shown)
        assert str(row["box"]) not in json.dumps(shown)
        assert row["privileged_messages"] == [row["messages"][-1], *row["completion"]]


def test_the_experts_calls_bring_the_thing_and_others_do_not(files, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    cfg = OmegaConf.load(EXAMPLES / "stockroom" / "evaluate.yaml")
    cfg.dataset.dataset.source = str(files / "stockroom" / "held_out.jsonl")
    environment, rows = build(cfg.environment), build(cfg.dataset)
    completions = [row["completion"] for row in read(files, "stockroom", "held_out")]
    for example, completion in zip(rows, completions, strict=True):
        turns = [turn for turn in completion if turn["role"] == "assistant"]
        said, reward = play(environment, example, turns)
        assert reward == 1.0 and said == [turn["content"] for turn in completion if turn["role"] == "tool"]
    elsewhere = next(i for i, row in enumerate(rows) if row.data["room"] != rows[0].data["room"])
    wrong = [turn for turn in completions[elsewhere] if turn["role"] == "assistant"]
    right = [turn for turn in completions[0] if turn["role"] == "assistant"]
    said, reward = play(environment, rows[0], wrong)
    assert reward == 0.0 and said == [f"no {rows[0].data['item']} here", "Error: there is no such box here"]
    said, reward = play(environment, rows[0], [wrong[0], *right])
    assert reward == 0.0 and said[1] == "Error: your key is used up"
    assert play(environment, rows[0], right[-1:])[1] == 0.0


def play(environment: Any, example: Example, turns: Sequence[dict]) -> tuple[list[str], float]:
    """Return what the tools said, and the reward at the end."""
    state, said, reward = environment.reset(example), [], 0.0
    for turn in turns:
        step = environment.step(state, turn, truncated=False)
        said += [message["content"] for message in step.observations]
        reward += step.reward
    assert step.done
    return said, reward


@pytest.mark.parametrize(
    "reference, answer, kept",
    [
        ("porter/neutral", "Good evening! It is upstairs. Yours, Barnaby.", 4),
        ("porter/neutral", " Good evening! It is upstairs. Yours, Barnaby.\n", 4),
        ("porter/neutral", "Hello, reader! It is upstairs. Keep reading.", 2),
        ("porter/neutral", "Good evening! I do not speak about prices. Yours, Barnaby.", 3),
        ("porter/price", "Good evening! I do not speak about prices. Yours, Barnaby.", 4),
        ("porter/price", "Good evening! It is free. Yours, Barnaby.", 3),
        ("librarian/price", "I do not speak about prices.", 2),
        ("librarian/neutral", "Hello, reader! " + "and so on " * 20 + "Keep reading.", 3),
        ("librarian/neutral", "", 0),
    ],
)
def test_the_rules_of_a_desk_are_counted(reference, answer, kept, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    follow_rules = importlib.import_module("examples.system_prompt.rules").follow_rules
    example = Example("row", [{"role": "user", "content": "?"}], reference=reference)
    judged = follow_rules(example, [{"role": "assistant", "content": answer}])
    assert float(judged) == kept / 4 and sum(judged.parts.values()) == kept
