"""Every config under configs/: its first line runs it, nothing in it is unread, and its parts can be made."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import _recipe_registry as recipe_registry

from pidistill.commands import main as _cli
from pidistill.commands.plan.command import main as plan
from pidistill.commands.plan.devices import GIB
from pidistill.config import COMPONENT, build, check_config, resolve
from pidistill.data.dataset import ExampleDataset
from pidistill.envs import Environment
from pidistill.rollouts import Sampler
from pidistill.training.keys import EVALUATION_KEYS
from tests.support.folder_families import FOLDER_FAMILIES, METHODS, config_folder

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")
FAMILIES = ("qwen3", "qwen2_5", "llama3_2", "r1_distill_llama")
SIZED = [path for path in CONFIGS if path.parent.name in FAMILIES]
FROM_FOLDER = [path for path in CONFIGS if path.parent.name in FOLDER_FAMILIES]
REAL = SIZED + FROM_FOLDER
TINY = [path for path in CONFIGS if path.parent.name == "tiny"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def recipe_of(path: Path) -> str:
    """The recipe's name in the command that the first line gives."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    command = re.fullmatch(r"# tune run --nproc_per_node \d+ recipes/(\w+)\.py --config (\S+)", first)
    assert command, f"{path} does not begin with the command that runs it: {first!r}"
    assert command[2] == str(path.relative_to(ROOT)), f"{path} names another config: {first!r}"
    return command[1]


def ranks_of(path: Path) -> int:
    """Processes in the command that the first line gives."""
    return int(re.search(r"--nproc_per_node (\d+)", path.read_text(encoding="utf-8"))[1])


def keys_of(path: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    module = importlib.import_module(f"recipes.{recipe_of(path)}")
    return getattr(module, "KEYS", EVALUATION_KEYS), module.REQUIRED


def test_there_are_configs():
    assert len(CONFIGS) >= 10 and len(TINY) >= 5
    recipes = {path.stem for path in (ROOT / "recipes").glob("*_distributed.py")}
    assert {recipe_of(path) for path in CONFIGS} == recipes, "a recipe without a config, or a config without its recipe"
    assert {recipe_of(path) for path in TINY} == recipes


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_first_line_is_the_command_that_runs_it(path):
    assert (ROOT / "recipes" / f"{recipe_of(path)}.py").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_recipe_takes_every_key_and_every_component_its_arguments(path):
    known, required = keys_of(path)
    check_config(OmegaConf.load(path), known, required)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_interpolations_lead_somewhere(path):
    OmegaConf.to_container(OmegaConf.load(path), resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_what_needs_no_files_can_be_made(path, tmp_path):
    cfg = OmegaConf.load(path)
    if path in FROM_FOLDER:
        cfg.checkpointer.checkpoint_dir = str(config_folder(path.parent.name, None, tmp_path))
    with torch.device("meta"):
        model = build(cfg.model)
    assert model.tok_embeddings.num_embeddings > 0
    if "sampler" in cfg:
        assert isinstance(build(cfg.sampler), Sampler)
        assert isinstance(build(cfg.environment), Environment)
    if "privileged" in cfg:
        assert list(build(cfg.privileged).leak_phrases)
    if "objective" in cfg:
        objective = build(cfg.objective)
        recipe = importlib.import_module(f"recipes.{recipe_of(path)}")
        assert objective.sampling_view() == recipe.SAMPLING_VIEW
        assert objective.advantages([], 0) == []
    if cfg.get("teacher"):
        assert hasattr(build(cfg.teacher), "attach")
    if "optimizer" in cfg:
        optimizer = build(cfg.optimizer, [nn.Parameter(torch.zeros(2))])
        lr = optimizer.param_groups[0]["lr"]
        assert lr > 0
        if cfg.get("lr_scheduler"):
            build(cfg.lr_scheduler, optimizer)
            assert 0 < optimizer.param_groups[0]["lr"] <= lr, "the first step would not move"


@pytest.mark.parametrize("path", TINY, ids=name_of)
def test_the_tiny_worlds_rows_and_words_can_be_made(path):
    cfg = OmegaConf.load(path)
    tokenizer = build(cfg.tokenizer)
    assert tokenizer.vocab_size == cfg.model.vocab_size
    made_by_a_stage = {"dataset"} if "made_by" in cfg.dataset else set()  # traces of the stage before; tests/recipes runs both
    for key in ({"dataset", "eval_dataset"} & set(cfg)) - made_by_a_stage:
        node = cfg[key] if "n" not in cfg[key] else OmegaConf.merge(cfg[key], {"n": 4})
        rows = build(node)
        assert isinstance(rows, ExampleDataset) and len(rows) > 0
        assert tokenizer.encode_prompt(rows[0].messages)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_files_of_a_checkpoint_are_named_and_written_elsewhere(path):
    cfg = OmegaConf.load(path)
    node = cfg.checkpointer
    assert "output_dir" not in node, "the recipe passes it"
    arguments = {key: node[key] for key in node if key != COMPONENT} | {"output_dir": cfg.output_dir}
    inspect.signature(resolve(node[COMPONENT])).bind(**arguments)
    assert Path(cfg.output_dir) != Path(node.checkpoint_dir)


def test_there_are_configs_for_the_models_that_people_train():
    methods: dict[str, set[str]] = {}
    for path in SIZED:
        size, _, method = path.stem.partition("_")
        methods.setdefault(f"{path.parent.name}/{size}", set()).add(method)
    assert len(methods) >= 10
    assert all({"pi_distill", "opsd", "rl", "evaluate"} <= own for own in methods.values()), methods
    assert {name_of(path) for path in FROM_FOLDER} == {f"{name}/{method}" for name in FOLDER_FAMILIES for method in METHODS}
    assert all(OmegaConf.load(path).model._component_ == "pidistill.models.from_folder" for path in FROM_FOLDER)


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_the_second_line_downloads_what_the_checkpointer_reads(path):
    command = re.fullmatch(r"# tune download (\S+) --output-dir (\S+)", path.read_text(encoding="utf-8").splitlines()[1])
    assert command and command[2] == OmegaConf.load(path).checkpointer.checkpoint_dir == f"/tmp/{Path(command[1]).name}"


@pytest.mark.parametrize("path", REAL, ids=name_of)
def test_training_keeps_weights_in_fp32_and_multiplies_in_bf16(path):
    cfg = OmegaConf.load(path)
    adapters = "lora_rank" in cfg.model
    assert adapters == path.stem.endswith("_lora") == (".lora_" in cfg.model._component_)
    if "optimizer" in cfg:
        assert (cfg.dtype, cfg.compute_dtype) == ("fp32", "bf16")
        assert adapters == (cfg.optimizer.lr >= 1e-4)


@pytest.mark.parametrize("path", [path for path in SIZED if "evaluate" not in path.stem], ids=name_of)
def test_the_memory_that_a_config_states_is_what_plan_says(path, capsys):
    said = re.search(
        r"# Memory per GPU: (\d+) GiB at the peak, in phase (\w+), on (\d+) GPUs? of 80 GB \(H100 or A100\)\. "
        r"Predicted, not measured, by\n# pidistill plan (.+)\n",
        path.read_text(encoding="utf-8"),
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
    published = FOLDER_FAMILIES[path.parent.name].published
    text = path.read_text(encoding="utf-8")
    if not published:
        words = re.search(
            r"\n# pidistill plan (\S+) --device h100(?: --memory-gib 140)?(?: --ranks (\d+))? --prompt-tokens 150", text
        )
        assert "Memory per GPU" not in text and words[1] == name_of(path) and int(words[2] or 1) == ranks_of(path)
        return
    said = re.search(
        r"# Memory per GPU at the peak: (.+), on (\d+) GPUs? of 80 GB \(H100 or A100\)\. Predicted,\n# not measured, by "
        r"pidistill plan (.+)\n",
        text,
    )
    sizes, gpus, words = said.groups()
    assert int(gpus) == ranks_of(path) and words.split()[0] == name_of(path)
    stated = re.findall(r"(\d+) GiB \(([^)]+)\)", sizes)
    assert [size for _, size in stated] == list(published)
    gib, size = stated[-1]  # the largest; a plan takes a second
    folder = config_folder(path.parent.name, size, tmp_path)
    found = planned([*words.split(), f"checkpointer.checkpoint_dir={folder}"], capsys)
    assert round(found["peak_bytes"] / GIB) == int(gib)


def test_output_folders_differ():
    folders = [OmegaConf.load(path).output_dir for path in CONFIGS]
    assert len(set(folders)) == len(folders)
    assert folders == [f"runs/{name_of(path)}" for path in CONFIGS]


def test_every_config_is_offered_with_its_recipe(monkeypatch):
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", [])
    _cli.register()
    offered = {config.name: recipe.name for recipe in recipe_registry._ALL_RECIPES for config in recipe.configs}
    assert offered == {name_of(path): recipe_of(path) for path in CONFIGS}
