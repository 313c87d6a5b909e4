"""Test that every config of a real model runs: one step, in process, with a tiny model of its family in the Hub's layout.

Replaced: the model's sizes, the checkpoint, the rows, what decides how long it takes, and the reward, which a random model
never earns. Objective, teacher, adapters, hindsight, dtype, privileged prompt, optimizer and schedule are the config's own.
"""

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from pidistill.commands.prepare import main as prepare
from pidistill.commands.preview.command import main as preview
from pidistill.rewards import last_answer
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES
from pidistill.types import Example, Message
from tests.support.chat_templates import LLAMA32, QWEN3
from tests.support.configs import REAL, name_of, recipe_of
from tests.support.folder_families import FOLDER_FAMILIES, tiny_folder
from tests.support.hub_models import hub_folder
from tests.support.runs import metrics, weights
from tests.support.tiny_tokenizers import llama_folder, qwen_folder, r1_folder

VOCABULARY = 640
# Family → (a model of hub_models.py, its builder with and without adapters, what else the builder takes, its tokenizer).
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "qwen3": (
        "qwen3, tied",
        "pidistill.models.{}qwen3",
        {"head_dim": QWEN3_HEAD_DIM, "tie_word_embeddings": True},
        lambda folder: qwen_folder(folder, QWEN3),
    ),
    "qwen2_5": ("qwen2, tied", "torchtune.models.qwen2.{}qwen2", {"tie_word_embeddings": True}, qwen_folder),
    "llama3_2": ("llama3.2, tied", "torchtune.models.llama3_2.{}llama3_2", {}, lambda folder: llama_folder(folder, LLAMA32)),
    "r1_distill_llama": ("llama3.1", "torchtune.models.llama3_1.{}llama3_1", {}, r1_folder),
}
SHORT = {
    "device": "cpu",
    "threads": 1,
    "tokenizer.max_seq_len": 1024,
    "sampler.max_new_tokens": 6,
    "sampler.max_batch_size": 16,
}
ONE_STEP = {"max_steps": 1, "eval_dataset.max_rows": 1, "eval_every_steps": None, "save_every_steps": None}
ROUND = ONE_STEP | {"prompts_per_round": 2, "updates_per_round": 1, "minibatch_rollouts": None, "rollout_log_steps": 0}
SIZES: dict[str, dict[str, Any]] = {
    "pi_distill_distributed": ROUND,
    "opsd_distributed": ROUND,
    "sft_distributed": ONE_STEP | {"batch_size": 3},
    "evaluate_distributed": {"dataset.max_rows": 2, "eval_samples": 2},
}


@dataclass(frozen=True)
class VariedReward:
    """0, ½ or 1, whatever a random model says."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        return len(last_answer(turns)) % 3 / 2


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """20 rows as GSM8K publishes them, and the same in verl's layout."""
    folder = tmp_path_factory.mktemp("rows")
    made = [{"question": f"{n} * 12?", "answer": f"It is <<{n}*12={12 * n}>>{12 * n}.\n#### {12 * n}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    with pytest.raises(SystemExit) as ended:
        prepare(
            [
                "gsm8k",
                "--source",
                str(folder / "rows.jsonl"),
                "--output",
                str(folder / "rows.parquet"),
                "--privileged",
                "answer",
            ]
        )
    assert ended.value.code == 0
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for family, (name, _, _, tokenizer) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        hub_folder(name, folder, vocab_size=VOCABULARY, max_position_embeddings=1024)
        made[family] = tokenizer(folder)  # after the model, whose folder brings a generation_config.json of its own
    return made | {family: tiny_folder(family, tmp_path_factory.mktemp(family)) for family in FOLDER_FAMILIES}


def twin(path: Path, checkpoint: Path, rows: Path, output_dir: Path) -> DictConfig:
    """The config with a tiny model, tiny rows and one step."""
    cfg = OmegaConf.load(path)
    if path.parent.name in FAMILIES:  # the others take the model from the folder
        _, builder, arguments, _ = FAMILIES[path.parent.name]
        adapters = {key: value for key, value in cfg.model.items() if key.startswith(("lora_", "apply_lora"))}
        sizes = TINY_SIZES | {"vocab_size": VOCABULARY, "max_seq_len": 1024} | arguments
        cfg.model = {"_component_": builder.format("lora_" if adapters else "")} | sizes | adapters
    source = "rows.parquet" if cfg.dataset._component_.endswith("qa_dataset") else "rows.jsonl"
    settings = SHORT | SIZES[recipe_of(path)]
    settings |= {
        "output_dir": str(output_dir),
        "checkpointer.checkpoint_dir": str(checkpoint),
        "dataset.source": str(rows / source),
    }
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, force_add=key in ("threads",))
    cfg.environment.reward = {"_component_": f"{__name__}.VariedReward"}
    if cfg.get("hindsight"):
        cfg.hindsight.success_threshold = 0.5
    return cfg


def run_in_process(path: Path, cfg: DictConfig) -> None:
    module = importlib.import_module(f"recipes.{recipe_of(path)}")
    (made,) = [value for key, value in vars(module).items() if key.endswith("Recipe")]
    recipe = made(cfg)
    recipe.setup(cfg)
    if recipe_of(path) == "evaluate_distributed":
        recipe.report(recipe.evaluate())
    else:
        recipe.train()
        recipe._log.close()


def in_the_default_run() -> set[Path]:
    """Return configs among which is every method, and in every family every recipe, with adapters and without.

    The others differ from them in the model's size, which the twin replaces, and in single numbers.
    """
    chosen, seen = set(), set()
    for path in REAL:
        adapters = path.stem.endswith("_lora")
        shows = {path.stem.partition("_")[2], (path.parent.name, recipe_of(path)), (path.parent.name, adapters)}
        if not shows <= seen:
            chosen.add(path)
            seen |= shows
    return chosen


DEFAULT = in_the_default_run()
ANOTHER_SIZE = pytest.mark.slow(reason="the default run has a config of its method, and of its family and recipe")


@pytest.mark.parametrize(
    "path", [path if path in DEFAULT else pytest.param(path, marks=ANOTHER_SIZE) for path in REAL], ids=name_of
)
def test_the_tiny_twin_of_the_config_takes_a_step(path, checkpoints, rows, tmp_path):
    checkpoint = checkpoints[path.parent.name]
    run_in_process(path, twin(path, checkpoint, rows, tmp_path))
    if recipe_of(path) == "evaluate_distributed":
        results = json.loads((tmp_path / "results.json").read_text())
        assert list(results) == ["student greedy", "student", "student + PI"]
        assert [view["rollouts"] for view in results.values()] == [2, 4, 4] and "pass@2" in results["student"]
        return
    (row,) = [row for row in metrics(tmp_path) if "loss" in row]
    assert row["step"] == 1 and row["policy_tokens"] > 0 and row["nonfinite_steps"] == 0
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    before, after = load_file(checkpoint / "model.safetensors"), weights(tmp_path)
    moved = [name for name, weight in after.items() if name in before and not weight.equal(before[name].to(weight.dtype))]
    assert moved, "the step changed no weight of the saved checkpoint"


def test_there_is_a_tiny_twin_of_every_family():
    families = {path.parent.name for path in REAL}
    assert {*FAMILIES, *FOLDER_FAMILIES} == families == {path.parent.name for path in DEFAULT} and len(REAL) >= 70
    assert 15 <= len(DEFAULT) < len(REAL)


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3/8B_pi_distill_lora", "llama3_2/1B_sft", "qwen2_5/1.5B_sdpo", "r1_distill_llama/8B_evaluate"),
        *("smollm2/sdft", "gemma3/opsd", "qwen3_5/pi_distill"),
    ],
)
def test_a_config_of_every_family_can_be_previewed(name, checkpoints, rows, tmp_path, capsys):
    (path,) = [path for path in REAL if name_of(path) == name]
    cfg = twin(path, checkpoints[path.parent.name], rows, tmp_path)
    OmegaConf.save(cfg, tmp_path / "twin.yaml")
    with pytest.raises(SystemExit) as ended:
        preview([str(tmp_path / "twin.yaml"), "--rows", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert ended.value.code == 0 and found["warnings"] == [] and sum(found["dropped"].values()) == 0
    assert len(row["teacher"]["privileged_spans"]) == ("sdpo" not in name)  # there it comes with the rollouts
    # R1's template drops the reasoning that its own generation prompt opens: a given answer has no ids.
    assert (row["completion"] is None) == name.startswith("r1") == bool(row["no_completion"])
