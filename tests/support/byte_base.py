"""Run recipes on an environment library with a small model that reads bytes: configs/gem and configs/reasoning_gym."""

import math
from pathlib import Path

from tests.support.tiny_qwen import load_config, read_metrics, set_up

MODEL = ["model.num_layers=1", "model.embed_dim=32", "model.intermediate_dim=64"]
ROUND = ["max_steps=3", "prompts_per_round=2", "group_size=4", "dataset.n=8", "eval_dataset.n=2", "rollout_log_steps=3"]
RECIPES = {"opsd": "opsd_distributed", "pi_distill": "pi_distill_distributed"}


def train_base(config: str, folder: Path, batch_size: int) -> Path:
    """The base of ``config``, small and brief: enough that turns end."""
    where = [f"output_dir={folder}", f"checkpointer.checkpoint_dir={folder / 'init'}", f"tokenizer.path={folder / 'tokenizer'}"]
    training = ["max_steps=60", f"batch_size={batch_size}", "dataset.n=64", "optimizer.lr=1e-2"]
    recipe = set_up("sft_distributed", load_config(config, [*MODEL, *where, *training]))
    recipe.train()
    recipe.cleanup()
    losses = [row["loss"] for row in read_metrics(folder)]
    assert losses[-1] < 0.5 * losses[0]
    return folder


def settings(base: Path, output_dir: Path) -> list[str]:
    return [*MODEL, *ROUND, f"output_dir={output_dir}", f"checkpointer.checkpoint_dir={base / 'latest'}",
            f"tokenizer.path={base / 'tokenizer'}"]  # fmt: skip


def assert_trained(folder: Path, least_reward: float = 0.0) -> None:
    rows = read_metrics(folder)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and [r["step"] for r in rows if "eval_teacher_success" in r] == [0, 3]
    for row in steps:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert sum(value for name, value in row.items() if name.startswith("dropped/")) == 0
        assert row["policy_tokens"] > 0 and row["grad_norm"] > 0 and least_reward <= row["reward_mean"] <= 1
    assert len((folder / "rollouts.jsonl").read_text().splitlines()) == 2
