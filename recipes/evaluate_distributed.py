"""Evaluate a checkpoint: student (without privileged information), student greedy, and the ceiling with it.

every row of `dataset` × `eval_samples` samples per view → avg@k, pass@k, pass^k with bootstrap intervals over rows, or over
clusters of rows (`eval_cluster_key`), success of each kind of row (`eval_kind_key`), length, leak rate;
the same for every entry of `domains` → a table each, `results.json`, `rows.json` with the success of every row,
`rollouts.jsonl` with every text and the parts of its reward, `checkpoint.json` with the step that answered

tune run --nproc_per_node 1 recipes/evaluate_distributed.py --config configs/tiny/evaluate.yaml
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pidistill.config import build
from pidistill.data import RecipeData, load_prompts
from pidistill.data.row_marks import asked_marks
from pidistill.errors import InputError
from pidistill.jsonl import EVALUATED, write_jsonl
from pidistill.training.collector import Collect, build_collector
from pidistill.training.compatibility import check_reward
from pidistill.training.evaluation import (
    MAX_KINDS,
    VIEWS,
    chosen_views,
    eval_dropped,
    kind_numbers,
    row_column,
    row_counts,
    row_names,
    sample_view,
    success_numbers,
    text_row,
)
from pidistill.training.keys import check_values, keys_of, setting
from pidistill.training.load import load_initial
from pidistill.training.metrics import rollout_means, rollout_sums
from pidistill.training.rounds import check_rewards
from pidistill.training.run_folder import log_config
from pidistill.training.start import cleanup, one_sentence_errors, start
from pidistill.types import Rollout
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torchtune import config

KEYS = keys_of("evaluate")
REQUIRED = ("output_dir", "model", "tokenizer", "checkpointer", "dataset", "environment", "sampler")
# What an entry of `domains` may say in the config's place; it must have a dataset.
ROW_KEYS = ("eval_cluster_key", "eval_kind_key")  # columns of the config's own rows, which an entry does not inherit
DOMAIN_KEYS = ("dataset", "environment", "privileged", "max_turns", "eval_success_threshold", *ROW_KEYS)


@dataclass(frozen=True)
class Domain:
    """Hold rows, and what plays episodes on them. ``prefix`` stands before a view's name; "" is the config's own."""

    prefix: str
    data: RecipeData
    collect: Collect
    clusters: list[str] | None = None  # of each row, where `eval_cluster_key` names a column
    kinds: list[str] | None = None  # of each row, where `eval_kind_key` does


class EvaluateRecipe:
    """Sample a checkpoint with and without privileged information and count successes, in its domain and in others."""

    def __init__(self, cfg: DictConfig) -> None:
        self._run = start(cfg, KEYS, REQUIRED)
        self._samples = setting(cfg, "eval_samples")
        self._views = chosen_views(cfg)

    def setup(self, cfg: DictConfig) -> None:
        sampler = build(cfg.sampler)
        self._domains = [load_domain(own, prefix, sampler) for prefix, own in domain_configs(cfg)]
        if not any(sampled(name, domain) for name in self._views for domain in self._domains):
            raise InputError(f"views={list(self._views)} show the privileged information, and no row has any; add student")
        self._weights = weights_folder(cfg)
        self._model = load_initial(cfg, self._run)

    def evaluate(self) -> dict[str, dict[str, Any]]:
        results, self._rows, self._texts = {}, {}, []
        for domain in self._domains:
            for name in self._views:
                if not sampled(name, domain):
                    continue
                view, temperature = VIEWS[name]
                samples = 1 if temperature == 0.0 else self._samples
                prompts, settings = domain.data.prompts, {"view": view, "samples": samples, "temperature": temperature}
                collected = sample_view(self._model, prompts, domain.collect, self._run, **settings)
                rollouts = self._run.gather(collected.rollouts)
                check_rewards(len(rollouts), self._run.sums(collected.dropped), f"of {domain.prefix}{name}")
                numbers = self.summarise(domain, rollouts, samples) | eval_dropped([collected], self._run)
                results[domain.prefix + name] = numbers | row_counts(domain.data)
                self._rows[domain.prefix + name] = self.row_success(domain, rollouts)
                self._texts += [{"view": domain.prefix + name} | text_row(rollout) for rollout in rollouts]
            columns = {"clusters": domain.clusters, "kinds": domain.kinds, "prompts": asked_marks(domain.data.prompts)}
            names = row_names(domain.data)
            for name, values in columns.items():
                if values is not None:
                    self._rows[domain.prefix + name] = dict(zip(names, values, strict=True))
        return results

    def summarise(self, domain: Domain, rollouts: list[Rollout], samples: int) -> dict[str, Any]:
        """Return means over rollouts; `success` (avg@samples), pass@k and pass^k over rows."""
        threshold = domain.data.success_threshold
        means = rollout_means(rollout_sums(rollouts, threshold, domain.data.leak_phrases))
        means.pop("success_frac", None)
        successes: dict[int, list[bool]] = {}
        for rollout in judged(rollouts):
            successes.setdefault(rollout.group, []).append(rollout.task_reward >= threshold)
        result = {"samples": samples, "rollouts": len(rollouts)}
        clusters = None if domain.clusters is None else dict(enumerate(domain.clusters))
        result |= success_numbers(successes, samples, self._run.seed, clusters)
        if domain.kinds is not None:
            result |= kind_numbers(successes, dict(enumerate(domain.kinds)), self._run.seed, clusters)
        return result | means

    def row_success(self, domain: Domain, rollouts: list[Rollout]) -> dict[str, float]:
        """Return the share of successes of each row's samples, by the row's name."""
        names, successes = row_names(domain.data), {}
        for rollout in judged(rollouts):
            successes.setdefault(names[rollout.group], []).append(rollout.task_reward >= domain.data.success_threshold)
        return {row: sum(values) / len(values) for row, values in successes.items()}

    def report(self, results: dict[str, dict[str, Any]]) -> None:
        if not self._run.is_main:
            return
        path = self._run.output_dir / "results.json"
        path.write_text(json.dumps(results, indent=2))
        path.with_name("rows.json").write_text(json.dumps(self._rows, indent=1))
        # A relative path is still right where a run has been copied with its evaluations.
        weights = self._weights and os.path.relpath(self._weights, path.parent.resolve())
        path.with_name(EVALUATED).write_text(json.dumps({"weights": weights}))
        path.with_name("rollouts.jsonl").unlink(missing_ok=True)
        write_jsonl(path.with_name("rollouts.jsonl"), self._texts)
        for domain in self._domains:
            columns = {name: results[domain.prefix + name] for name in self._views if domain.prefix + name in results}
            title = f"{domain.prefix.removesuffix('/')} ".lstrip() + f"{len(domain.data.prompts)} rows, per view"
            if not any("success" in column for column in columns.values()):
                title += "; no success is counted, because the environment has no reward"
            if columns:
                Console().print(table_of(title, columns))
        print(path)


def weights_folder(cfg: DictConfig) -> Path | None:
    """Return the folder of the checkpoint, or of the adapter on it; None where the weights come from no folder.

    `latest` becomes the step that it leads to, also in the config: a run that is still training moves it.
    """
    node = cfg.checkpointer
    if node.get("checkpoint_dir"):
        node.checkpoint_dir = str(Path(node.checkpoint_dir).resolve())
    if cfg.get("adapter_dir"):
        cfg.adapter_dir = str(Path(cfg.adapter_dir).resolve())
    folder = cfg.get("adapter_dir") or node.get("checkpoint_dir")
    return Path(folder) if folder else None


def domain_configs(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """Return (prefix, config) of the config's own rows, then of each entry of `domains` put in the config's place."""
    found = [("", cfg)]
    for name, entry in OmegaConf.to_container(cfg.get("domains") or OmegaConf.create({}), resolve=True).items():
        entry = entry if isinstance(entry, dict) else {}
        unknown = sorted(set(entry) - set(DOMAIN_KEYS))
        missing = ["dataset"] if not entry.get("dataset") else ["environment"] if entry.get("environment", "") is None else []
        if unknown or missing:
            wrong = f"has the key {unknown[0]}" if unknown else f"has no {missing[0]}"
            raise InputError(f"domains.{name} {wrong}; an entry has a dataset, and may have {', '.join(DOMAIN_KEYS[1:])}")
        own = OmegaConf.merge(cfg, dict.fromkeys([*entry, *ROW_KEYS]), entry)  # in the place of a node, not into it
        try:
            check_values(own)
            check_reward(own)
        except InputError as error:
            raise InputError(f"domains.{name}.{error}") from error
        found.append((f"{name}/", own))
    return found


def load_domain(cfg: DictConfig, prefix: str, sampler: Any) -> Domain:
    try:
        data = load_prompts(cfg, no_pi="rl")
        clusters = row_column(data, cfg, "eval_cluster_key")
        kinds = row_column(data, cfg, "eval_kind_key", most=MAX_KINDS)
        return Domain(prefix, data, build_collector(cfg, sampler, data.tokenizer), clusters, kinds)
    except InputError as error:
        if not prefix:
            raise
        raise InputError(f"domains.{prefix.removesuffix('/')}: {error}") from error


def judged(rollouts: list[Rollout]) -> list[Rollout]:
    """Return the rollouts that have a reward; an environment with `reward: null` gives none."""
    return [rollout for rollout in rollouts if rollout.task_reward is not None]


def sampled(name: str, domain: Domain) -> bool:
    """Return whether a view is sampled: one with privileged information needs rows that have some."""
    return VIEWS[name][0] == "student" or any(pair.has_privileged for _, pair in domain.data.prompts)


def table_of(title: str, columns: dict[str, dict[str, Any]]) -> Table:
    """Make a table with a row per number, with its interval where it has one."""
    table = Table(title=Text(title, "table.title"), show_edge=False)  # rich takes [easy] in a str for markup
    for column in ["", *columns]:
        table.add_column(column, justify="right" if column else "left")
    for key in dict.fromkeys(key for column in columns.values() for key in column if not key.endswith("_interval")):
        table.add_row(Text(key), *[shown(column, key) for column in columns.values()])
    return table


def shown(column: dict[str, Any], key: str) -> str:
    if key not in column:
        return "–"
    low_high = column.get(f"{key}_interval")
    return f"{column[key]:.4g}" + (" [{:.3g}, {:.3g}]".format(*low_high) if low_high else "")


@one_sentence_errors
@config.parse
def recipe_main(cfg: DictConfig) -> None:
    recipe = EvaluateRecipe(cfg)
    recipe.setup(cfg)
    log_config(cfg, "EvaluateRecipe")
    recipe.report(recipe.evaluate())
    cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
