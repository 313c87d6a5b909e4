"""Evaluate a checkpoint: student (without privileged information), student greedy, and the ceiling with it.

every row of `dataset` × `eval_samples` samples per view → avg@k, pass@k, length, leak rate, one table, `results.json`, and
`rows.json` with the success of every row

tune run --nproc_per_node 1 recipes/evaluate_distributed.py --config configs/tiny/evaluate.yaml
"""

import functools
import json
import sys

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torchtune import config, training

from pidistill.config import build
from pidistill.data import load_prompts
from pidistill.evaluation import eval_dropped, pass_at_k, sample_view
from pidistill.metrics import rollout_means, rollout_sums
from pidistill.rollouts import collect_rollouts
from pidistill.training import EVALUATION_KEYS, cleanup, load_model, one_sentence_errors, start
from pidistill.types import Rollout

REQUIRED = ("output_dir", "model", "tokenizer", "checkpointer", "dataset", "environment", "sampler")
VIEWS = {  # name: (view, temperature; None is the sampler's)
    "student greedy": ("student", 0.0),
    "student": ("student", None),
    "student + PI": ("teacher", None),
}


class EvaluateRecipe:
    """Samples a checkpoint with and without privileged information and counts successes."""

    def __init__(self, cfg: DictConfig) -> None:
        self._run = start(cfg, EVALUATION_KEYS, REQUIRED)
        self._samples = int(cfg.get("eval_samples") or 1)

    def setup(self, cfg: DictConfig) -> None:
        self._data = load_prompts(cfg, no_pi="rl")
        self._collect = functools.partial(
            collect_rollouts,
            sampler=build(cfg.sampler),
            tokenizer=self._data.tokenizer,
            environment=build(cfg.environment),
            max_turns=cfg.get("max_turns"),
            environment_threads=cfg.get("environment_threads"),
            environment_timeout_s=cfg.get("environment_timeout_s"),
        )
        weights = build(cfg.checkpointer, output_dir=str(self._run.output_dir)).load_checkpoint()[training.MODEL_KEY]
        self._model = load_model(cfg, self._run, cfg.model, weights, trained=False)

    def evaluate(self) -> dict[str, dict[str, float]]:
        results, self._rows = {}, {}
        for name, (view, temperature) in VIEWS.items():
            if view == "teacher" and self._data.rows_without_pi == len(self._data.prompts):
                continue
            samples = 1 if temperature == 0.0 else self._samples
            collected = sample_view(
                self._model, self._data.prompts, self._collect, self._run, view=view, samples=samples, temperature=temperature
            )
            rollouts = self._run.gather(collected.rollouts)
            results[name] = self.summarise(rollouts, samples) | eval_dropped([collected], self._run)
            self._rows[name] = self.row_success(rollouts)
        return results

    def summarise(self, rollouts: list[Rollout], samples: int) -> dict[str, float]:
        """Means over rollouts (`success` is avg@samples), and pass@k for k = 1, 2, 4, ... up to the samples per row."""
        threshold = self._data.success_threshold
        means = rollout_means(rollout_sums(rollouts, threshold, self._data.leak_phrases))
        successes: dict[int, list[bool]] = {}
        for rollout in rollouts:
            successes.setdefault(rollout.group, []).append(rollout.reward >= threshold)
        result = {"samples": samples, "rollouts": len(rollouts)}
        result |= {{"success_frac": "success"}.get(name, name): value for name, value in means.items()}
        for k in (2**i for i in range(1, samples.bit_length())):
            rows = [row for row in successes.values() if len(row) >= k]  # a dropped rollout can leave fewer than k
            if rows:
                result[f"pass@{k}"] = sum(pass_at_k(sum(row), len(row), k) for row in rows) / len(rows)
        return result

    def row_success(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Row id → share of its samples that succeeded."""
        successes: dict[str, list[bool]] = {}
        for rollout in rollouts:
            successes.setdefault(rollout.example.id, []).append(rollout.reward >= self._data.success_threshold)
        return {row: sum(values) / len(values) for row, values in successes.items()}

    def report(self, results: dict[str, dict[str, float]]) -> None:
        if not self._run.is_main:
            return
        path = self._run.output_dir / "results.json"
        path.write_text(json.dumps(results, indent=2))
        path.with_name("rows.json").write_text(json.dumps(self._rows, indent=1))
        table = Table(title=f"{len(self._data.prompts)} rows, per view", show_edge=False)
        for column in ["", *results]:
            table.add_column(column, justify="right" if column else "left")
        for key in dict.fromkeys(key for row in results.values() for key in row):
            table.add_row(key, *[f"{row[key]:.4g}" if key in row else "–" for row in results.values()])
        Console().print(table)
        print(path)


@config.parse
@one_sentence_errors
def recipe_main(cfg: DictConfig) -> None:
    config.log_config(recipe_name="EvaluateRecipe", cfg=cfg)
    recipe = EvaluateRecipe(cfg)
    recipe.setup(cfg)
    recipe.report(recipe.evaluate())
    cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
