"""Test the configs of the tool world in the same recipes as the tiny world's: three steps on a CPU.

A random model solves nothing, so half of the episodes are played by a sampler that says what the expert says: rewards have
spread, and whole conversations with calls, results and a customer go through packing, scoring and the update.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.config import build
from pidistill.envs.tool_world import tool_world_tokenizer
from pidistill.envs.tool_world.customer import Customer
from pidistill.envs.tool_world.dataset import SCHEMAS, expert_turn
from pidistill.envs.tool_world.tasks import draw_tasks
from pidistill.envs.tool_world.wishes import Say
from pidistill.privileged.prompt import DEFAULT_TEMPLATE
from pidistill.rollouts import Sample
from pidistill.types import Rollout
from tests.support.runs import ROOT, metrics, weights

CONFIGS = ROOT / "configs" / "tool_world"
MODEL = {"model.num_layers": 1, "model.embed_dim": 32, "model.intermediate_dim": 64}
ROUND = {
    "max_steps": 3, "prompts_per_round": 2, "group_size": 2, "dataset.n": 4, "eval_dataset": None, "rollout_log_steps": 0,
}  # fmt: skip


@dataclass
class ScriptedSampler:
    """Even members of a group play the expert, odd ones say goodbye at once; log-probs are the model's."""

    path: str
    max_new_tokens: int = 2560
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None

    @torch.no_grad()
    def sample(self, model, prompts, *, group_size, on_turn_end, **settings) -> list[Sample]:
        tokenizer = tool_world_tokenizer(self.path)
        moves = {Customer(t.identity, t.wishes).opening: t.moves for t in draw_tasks("train", 4, levels=(1, 2))}
        samples = []
        for row in range(len(prompts) * group_size):
            prompt = list(prompts[row // group_size])
            said = tokenizer.decode(prompt)
            expert = next(moves[opening] for opening in moves if f"{opening}<|end|>" in said)
            samples.append(self._play(tokenizer, row, [Say("Is there anything else?")] * 9 if row % 2 else expert, on_turn_end))
            self._score(model, prompt, samples[-1])
        return samples

    def _play(self, tokenizer, row: int, moves: Sequence, on_turn_end) -> Sample:
        sample = Sample([], [], [], "length")
        for move in moves:
            turn = tokenizer.encode_turn([{"role": "user", "content": "any"}], expert_turn(move), SCHEMAS)
            forced = on_turn_end(row, turn)
            sample.tokens += [*turn, *(forced or [])]
            sample.policy_mask += [True] * len(turn) + [False] * len(forced or [])
            if forced is None:
                sample.stop_reason = "done"
                break
        return sample

    def _score(self, model, prompt: list[int], sample: Sample) -> None:
        model.eval()
        logits = model(torch.tensor([[*prompt, *sample.tokens]]))[0, len(prompt) - 1 : -1].float()
        logprobs = logits.log_softmax(-1)[range(len(sample.tokens)), sample.tokens].tolist()
        sample.logprobs = [one if own else float("nan") for one, own in zip(logprobs, sample.policy_mask, strict=True)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tool_world") / "tokenizer")
    tool_world_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def random_base(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tool_world_base")
    paths = {"checkpointer.checkpoint_dir": str(folder / "init")}
    cfg = small("base", folder / "unused", tokenizer_folder, **paths)
    build(cfg.checkpointer, output_dir=cfg.output_dir)
    return folder / "init"


def small(name: str, output_dir: Path, tokenizer_folder: str, **settings):
    cfg = OmegaConf.load(CONFIGS / f"{name}.yaml")
    fixed = MODEL | {"output_dir": str(output_dir), "threads": 1, "tokenizer.path": tokenizer_folder}
    for key, value in (fixed | settings).items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def run(name: str, cfg, rollouts: list | None = None):
    """Metrics of a run; its rollouts are added to ``rollouts``."""
    recipe_name = re.search(r"recipes/(\w+)\.py", (CONFIGS / f"{name}.yaml").read_text())[1]
    module = importlib.import_module(f"recipes.{recipe_name}")
    (recipe_class,) = [value for key, value in vars(module).items() if key.endswith("Recipe")]
    recipe = recipe_class(cfg)
    recipe.setup(cfg)
    if rollouts is not None:
        sample_round = recipe.sample_round
        recipe.sample_round = lambda: [rollouts.append(one) or one for one in sample_round()]
    recipe.train()
    recipe._log.close()
    return metrics(Path(cfg.output_dir))


def from_base(base: Path) -> dict:
    return {"checkpointer.checkpoint_dir": str(base), "checkpointer.checkpoint_files": ["model.safetensors"]}


def test_the_tests_below_list_every_config_of_the_tool_world():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"base", "pi_distill", "opsd", "qwen3_4B_pi_distill"}


def test_the_base_learns_from_the_experts_episodes(tokenizer_folder, tmp_path):
    settings = {"max_steps": 3, "batch_size": 2, "dataset.n": 6, "checkpointer.checkpoint_dir": str(tmp_path / "init")}
    rows = run("base", small("base", tmp_path, tokenizer_folder, **settings))
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["grad_norm"] > 0 for row in rows)
    assert 0 < rows[0]["policy_tokens"] < 2000, "the shop's and the customer's words are not the agent's"


@pytest.mark.slow(reason="tests/data/test_demonstrations.py counts rows that are too long")
def test_an_episode_that_is_too_long_does_not_stop_the_base(tokenizer_folder, tmp_path):
    """Row 195 of the config's own rows is: the base could not be trained at all."""
    settings = {"max_steps": 1, "batch_size": 1, "dataset.n": 196, "checkpointer.checkpoint_dir": str(tmp_path / "init")}
    (row,) = run("base", small("base", tmp_path, tokenizer_folder, **settings))
    dropped = {key: value for key, value in row.items() if key.startswith("dropped_rows/") and value}
    assert dropped == {"dropped_rows/demonstration_too_long": 1}


def only_teachers_see(rollouts: Sequence[Rollout], tokenizer) -> None:
    """No line of the privileged information is in the student's ids; the expert makes the same calls, written otherwise."""
    around = DEFAULT_TEMPLATE.replace("{privileged}", "The calls that solve this task, in order:\n").split("\n")
    for rollout in rollouts:
        student, teacher = (
            tokenizer.decode(ids + rollout.completion) for ids in (rollout.prompts.student, rollout.prompts.teacher)
        )
        assert all(line in teacher and line not in student for line in filter(None, around))
        calls = rollout.example.privileged.splitlines()[1:]
        assert all(call in teacher and call not in student for call in calls)


OTHER_RECIPE = pytest.mark.slow(reason="one recipe plays and one samples in the default run")


@pytest.mark.parametrize("name", ["pi_distill", pytest.param("opsd", marks=OTHER_RECIPE)])
def test_whole_conversations_are_trained_on(name, tokenizer_folder, random_base, tmp_path):
    sampler = {"_component_": "tests.recipes.test_tool_world_runs.ScriptedSampler", "path": tokenizer_folder}
    cfg = small(name, tmp_path, tokenizer_folder, **ROUND, **from_base(random_base), sampler=sampler | {"max_new_tokens": 2560})
    rollouts: list[Rollout] = []
    rows = run(name, cfg, rollouts)
    only_teachers_see(rollouts, tool_world_tokenizer(tokenizer_folder))
    assert [row["step"] for row in rows] == [1, 2, 3] and len(rollouts) == 12
    for row in rows:
        assert row["reward_mean"] == 0.5 and row["reward/database"] >= 0.5 and row["truncated_frac"] == 0.0
        assert row["grad_norm"] > 0 and row["kl_teacher_student_nats"] > 0
        assert row["nonfinite_steps"] == row["empty_steps"] == 0 and row["policy_tokens"] > 200
    assert rows[0]["ess_frac"] == pytest.approx(1.0, abs=1e-3), "what was sampled is what is scored"
    assert weights(tmp_path)


@pytest.mark.parametrize("name", ["opsd", pytest.param("pi_distill", marks=OTHER_RECIPE)])
def test_a_model_samples_and_trains_on_episodes_of_its_own(name, tokenizer_folder, random_base, tmp_path):
    limits = {"sampler.max_new_tokens": 60, "sampler.max_turn_tokens": 20, "environment_threads": 2}
    rows = run(name, small(name, tmp_path, tokenizer_folder, **ROUND, **from_base(random_base), **limits))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["reward_mean"] == 0.0 and row["turn_truncated_frac"] > 0.5 for row in rows)
