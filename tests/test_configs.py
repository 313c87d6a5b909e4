"""Test every config under configs/: its first line runs it, its recipe reads every key, and its parts can be built.

Each config has one test, which asks all questions and reports every one that fails.
"""

import copy
import importlib
import inspect
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import _recipe_registry as recipe_registry

from pidistill.commands import main as _cli
from pidistill.commands.plan.command import main as plan
from pidistill.commands.plan.devices import GIB
from pidistill.components import resolve
from pidistill.config import COMPONENT, build, check_config
from pidistill.data.dataset import ExampleDataset
from pidistill.envs import Environment
from pidistill.rollouts import Sampler
from tests.support.configs import (
    CONFIGS,
    FROM_FOLDER,
    REAL,
    SIZED,
    TINY,
    assert_no_failures,
    keys_of,
    load,
    name_of,
    ranks_of,
    recipe_of,
    text_of,
)
from tests.support.folder_families import FOLDER_FAMILIES, METHODS, config_folder
from tests.support.runs import ROOT

# ------------------------------------------------------------------------------------------- questions to every config


def the_first_line_is_the_command_that_runs_it(path: Path) -> None:
    assert (ROOT / "recipes" / f"{recipe_of(path)}.py").is_file()


def the_recipe_reads_every_key_and_every_component_takes_its_arguments(path: Path) -> None:
    known, required = keys_of(path)
    check_config(load(path), known, required)


def every_interpolation_has_a_value(path: Path) -> None:
    OmegaConf.to_container(load(path), resolve=True, throw_on_missing=True)


def the_model_can_be_built(path: Path) -> None:
    cfg = copy.deepcopy(load(path))
    OmegaConf.set_readonly(cfg, False)
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        if path in FROM_FOLDER:
            cfg.checkpointer.checkpoint_dir = str(config_folder(path.parent.name, None, Path(folder)))
        model = build(cfg.model)
    assert model.tok_embeddings.num_embeddings > 0


def sampler_environment_and_privileged_can_be_built(path: Path) -> None:
    cfg = load(path)
    if "sampler" in cfg:
        assert isinstance(build(cfg.sampler), Sampler)
        assert isinstance(build(cfg.environment), Environment)
    if "privileged" in cfg:
        assert list(build(cfg.privileged).leak_phrases)


def objective_and_teacher_can_be_built_and_agree_with_the_recipe(path: Path) -> None:
    cfg = load(path)
    if "objective" in cfg:
        objective = build(cfg.objective)
        recipe = importlib.import_module(f"recipes.{recipe_of(path)}")
        assert objective.sampling_view() == recipe.SAMPLING_VIEW
        assert objective.advantages([], 0) == []
    if cfg.get("teacher"):
        assert hasattr(build(cfg.teacher), "attach")


def the_first_step_has_a_learning_rate_above_0(path: Path) -> None:
    cfg = load(path)
    if "optimizer" not in cfg:
        return
    optimizer = build(cfg.optimizer, [nn.Parameter(torch.zeros(2))])
    lr = optimizer.param_groups[0]["lr"]
    assert lr > 0
    if cfg.get("lr_scheduler"):
        build(cfg.lr_scheduler, optimizer)
        assert 0 < optimizer.param_groups[0]["lr"] <= lr, "the first step would not move"


def the_checkpointer_reads_one_folder_and_the_run_writes_to_another(path: Path) -> None:
    cfg = load(path)
    node = cfg.checkpointer
    assert "output_dir" not in node, "the recipe passes it"
    arguments = {key: node[key] for key in node if key != COMPONENT} | {"output_dir": cfg.output_dir}
    inspect.signature(resolve(node[COMPONENT])).bind(**arguments)
    assert Path(cfg.output_dir) != Path(node.checkpoint_dir)


def the_output_folder_has_the_name_of_the_config(path: Path) -> None:
    assert load(path).output_dir == f"runs/{name_of(path)}"


OF_EVERY_CONFIG = (
    the_first_line_is_the_command_that_runs_it,
    the_recipe_reads_every_key_and_every_component_takes_its_arguments,
    every_interpolation_has_a_value,
    the_model_can_be_built,
    sampler_environment_and_privileged_can_be_built,
    objective_and_teacher_can_be_built_and_agree_with_the_recipe,
    the_first_step_has_a_learning_rate_above_0,
    the_checkpointer_reads_one_folder_and_the_run_writes_to_another,
    the_output_folder_has_the_name_of_the_config,
)

# ------------------------------------------------------------------------------------------- of the tiny world


def the_rows_can_be_made_and_the_tokenizer_knows_their_words(path: Path) -> None:
    cfg = load(path)
    tokenizer = build(cfg.tokenizer)
    assert tokenizer.vocab_size == cfg.model.vocab_size
    made_by_a_stage = {"dataset"} if "made_by" in cfg.dataset else set()  # traces of the stage before; tests/recipes runs both
    for key in ({"dataset", "eval_dataset"} & set(cfg)) - made_by_a_stage:
        node = cfg[key] if "n" not in cfg[key] else OmegaConf.merge(cfg[key], {"n": 4})
        rows = build(node)
        assert isinstance(rows, ExampleDataset) and len(rows) > 0
        assert tokenizer.encode_prompt(rows[0].messages)


# ------------------------------------------------------------------------------------------- of the families of real models


def the_second_line_downloads_what_the_checkpointer_reads(path: Path) -> None:
    command = re.fullmatch(r"# tune download (\S+) --output-dir (\S+)", text_of(path).splitlines()[1])
    assert command and command[2] == load(path).checkpointer.checkpoint_dir == f"/tmp/{Path(command[1]).name}"


def training_keeps_weights_in_fp32_and_multiplies_in_bf16(path: Path) -> None:
    cfg = load(path)
    adapters = "lora_rank" in cfg.model
    assert adapters == path.stem.endswith("_lora") == (".lora_" in cfg.model._component_)
    if "optimizer" in cfg:
        assert (cfg.dtype, cfg.compute_dtype) == ("fp32", "bf16")
        assert adapters == (cfg.optimizer.lr >= 1e-4)


OF_REAL_MODELS = (
    the_second_line_downloads_what_the_checkpointer_reads,
    training_keeps_weights_in_fp32_and_multiplies_in_bf16,
)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_is_complete_and_its_parts_can_be_built(path):
    of_the_tiny_world = (the_rows_can_be_made_and_the_tokenizer_knows_their_words,) if path in TINY else ()
    assert_no_failures(path, [*OF_EVERY_CONFIG, *of_the_tiny_world, *(OF_REAL_MODELS if path in REAL else ())])


def test_a_config_that_is_wrong_in_three_places_is_reported_with_all_of_them(monkeypatch):
    wrong = ROOT / "configs" / "tiny" / "wrong.yaml"
    text = text_of(ROOT / "configs" / "tiny" / "opsd.yaml").replace("configs/tiny/opsd.yaml", "configs/tiny/wrong.yaml")
    cfg = OmegaConf.create(text.replace("lr: ", "lr: 0 # ", 1).replace("group_size:", "groupsize:", 1))
    monkeypatch.setattr("tests.support.configs.text_of", lambda path: text)
    monkeypatch.setitem(globals(), "load", lambda path: cfg)
    with pytest.raises(AssertionError) as failed:
        assert_no_failures(wrong, OF_EVERY_CONFIG)
    named = {line.partition(":")[0] for line in str(failed.value).splitlines()[1:] if re.match(r"\w+: \w+: ", line)}
    assert named >= {
        "the_recipe_reads_every_key_and_every_component_takes_its_arguments",
        "the_first_step_has_a_learning_rate_above_0",
        "the_output_folder_has_the_name_of_the_config",
    }
    assert "the_model_can_be_built" not in named


# ------------------------------------------------------------------------------------------- all configs together


def test_every_recipe_has_a_config_and_every_config_a_recipe():
    assert len(CONFIGS) >= 10 and len(TINY) >= 5
    recipes = {path.stem for path in (ROOT / "recipes").glob("*_distributed.py")}
    assert {recipe_of(path) for path in CONFIGS} == recipes
    assert {recipe_of(path) for path in TINY} == recipes


def test_there_are_configs_for_the_models_that_people_train():
    methods: dict[str, set[str]] = {}
    for path in SIZED:
        size, _, method = path.stem.partition("_")
        methods.setdefault(f"{path.parent.name}/{size}", set()).add(method)
    assert len(methods) >= 10
    assert all({"pi_distill", "opsd", "rl", "evaluate"} <= own for own in methods.values()), methods
    assert {name_of(path) for path in FROM_FOLDER} == {f"{name}/{method}" for name in FOLDER_FAMILIES for method in METHODS}
    assert all(load(path).model._component_ == "pidistill.models.from_folder" for path in FROM_FOLDER)


@pytest.mark.parametrize("path", [path for path in SIZED if "evaluate" not in path.stem], ids=name_of)
def test_the_memory_that_a_config_states_is_what_plan_says(path, capsys):
    said = re.search(
        r"# Memory per GPU: (\d+) GiB at the peak, in phase (\w+), on (\d+) GPUs? of 80 GB \(H100 or A100\)\. "
        r"Predicted, not measured, by\n# pidistill plan (.+)\n",
        text_of(path),
    )
    gib, phase, gpus, words = said.groups()
    assert int(gpus) == ranks_of(path) and words.split()[0] == name_of(path)
    found = planned(words.split(), capsys)
    assert found["peak_phase"] == phase and round(found["peak_bytes"] / GIB) == int(gib)


def planned(words, capsys):
    with pytest.raises(SystemExit) as ended:
        plan([*words, "--json"])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", [path for path in FROM_FOLDER if path.stem != "evaluate"], ids=name_of)
def test_the_memory_that_a_config_states_for_sizes_is_what_plan_says(path, tmp_path, capsys):
    said = re.search(
        r"# Memory per GPU at the peak: (.+), on (\d+) GPUs? of (80 GB \(H100 or A100\)|141 GB \(H200\))\. Predicted,\s(?:# )?"
        r"not measured, by\s(?:# )?pidistill plan (.+)\n",
        text_of(path),
    )
    sizes, gpus, memory, words = said.groups()
    assert ("--memory-gib 140" in words) == memory.startswith("141")
    assert int(gpus) == ranks_of(path) and words.split()[0] == name_of(path)
    stated = re.findall(r"(\d+) GiB \(([^)]+)\)", sizes)
    assert [size for _, size in stated] == list(FOLDER_FAMILIES[path.parent.name].published)
    gib, size = stated[-1]  # the largest; a plan takes a second
    folder = config_folder(path.parent.name, size, tmp_path)
    found = planned([*words.split(), f"checkpointer.checkpoint_dir={folder}"], capsys)
    assert round(found["peak_bytes"] / GIB) == int(gib)


def test_every_config_is_offered_with_its_recipe(monkeypatch):
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", [])
    _cli.register()
    offered = {config.name: recipe.name for recipe in recipe_registry._ALL_RECIPES for config in recipe.configs}
    assert offered == {name_of(path): recipe_of(path) for path in CONFIGS}
