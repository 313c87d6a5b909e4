"""Test the folders under examples/: every config takes a step with a tiny model, and the sweep names configs that exist."""

import importlib
import json
import runpy
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from pidistill.commands.places import recipe_of
from pidistill.commands.sweep.cells import grid_cells, read_sweep
from tests.support.hub_models import hub_folder
from tests.support.runs import metrics
from tests.support.tiny_tokenizers import qwen_folder

DOCUMENT = Path(__file__).parents[2] / "examples" / "document"
CONFIGS = sorted(path for path in DOCUMENT.glob("*.yaml") if path.stem != "methods")
SHORT = {"tokenizer.max_seq_len": 512, "sampler.max_new_tokens": 6}
ROUND = {"max_steps": 1, "prompts_per_round": 2, "batch_size": 2, "rollout_log_steps": 0, "eval_samples": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("document")
    hub_folder("qwen2, tied", folder / "model", vocab_size=640, max_position_embeddings=512)
    qwen_folder(folder / "model")
    runpy.run_path(str(DOCUMENT / "make_data.py"))["main"](str(folder))
    return folder


def test_the_held_out_questions_ask_for_the_same_facts_in_other_words(files):
    train, held_out = ([json.loads(line) for line in (files / f"{name}.jsonl").open()] for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (192, 96)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    facts = {(row["document"], row["answer"]) for row in train}
    assert facts == {(row["document"], row["answer"]) for row in held_out} and len(facts) == 48
    assert all(row["answer"] in row["document"] and row["answer"] not in row["question"] for row in train + held_out)


def tiny(path: Path, files: Path, output_dir: Path) -> DictConfig:
    """The config with a tiny model, few rows and one step."""
    cfg = OmegaConf.load(path)
    rows = [key for key in ("dataset", "eval_dataset") if key in cfg]
    changes = SHORT | {"checkpointer.checkpoint_dir": str(files / "model"), "output_dir": str(output_dir), "threads": 1}
    changes |= {f"{key}.source": str(files / Path(cfg[key].source).name) for key in rows}
    changes[f"{rows[-1]}.max_rows"] = 2
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    for key, value in ROUND.items():
        if key in cfg:
            cfg[key] = value
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_config_takes_a_step(path, files, tmp_path):
    name = recipe_of(str(path))
    module = importlib.import_module(f"recipes.{name}")
    (made,) = [value for key, value in vars(module).items() if key.endswith("Recipe")]
    cfg = tiny(path, files, tmp_path)
    recipe = made(cfg)
    recipe.setup(cfg)
    if name == "evaluate_distributed":
        recipe.report(recipe.evaluate())
        assert set(json.loads((tmp_path / "results.json").read_text())) == {"student greedy", "student", "student + PI"}
    else:
        recipe.train()
        recipe._log.close()
        assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1]


def test_the_sweep_names_configs_that_exist(monkeypatch):
    monkeypatch.chdir(DOCUMENT.parents[1])
    sweep = read_sweep("examples/document/methods.yaml")
    assert next(iter(grid_cells(sweep))).arm.name == "base"
    assert {stage.config for cell in grid_cells(sweep) for stage in cell.arm.stages} <= {
        f"examples/document/{path.name}" for path in CONFIGS
    }
