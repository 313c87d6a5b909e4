"""Measure success with and without privileged information, which every comparison rests on."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torchtune.utils import get_logger, log_rank_zero

from pidistill.chat.phrases import privileged_overlap, turn_text
from pidistill.data import RecipeData
from pidistill.data.sources import get
from pidistill.distributed.run import Run
from pidistill.errors import InputError, check_choice
from pidistill.rollouts import CollectResult, rollout_seed
from pidistill.training.collector import Collect
from pidistill.training.interrupts import between_updates
from pidistill.training.keys import setting
from pidistill.training.metrics import rollout_means, rollout_sums
from pidistill.training.rounds import check_rewards
from pidistill.training.update import crossed
from pidistill.types import Example, PromptPair, Rollout, ViewName

_log = get_logger("INFO")

# Evaluation draws from its own streams, the same at every step, so that only the model changes a curve.
EVALUATION_STREAM = -1
MAX_KINDS = 50  # of `eval_kind_key`: each is a line of the table
# What the recipe `evaluate` can sample. Name: (view, temperature; None is the sampler's).
VIEWS: Mapping[str, tuple[ViewName, float | None]] = {
    "student greedy": ("student", 0.0),
    "student": ("student", None),
    "student + PI greedy": ("teacher", 0.0),
    "student + PI": ("teacher", None),
}
DEFAULT_VIEWS = ("student greedy", "student", "student + PI")


class Evaluation:
    """Evaluate the model of a training run on the rows of `eval_dataset`."""

    def __init__(self, cfg: DictConfig, run: Run, data: RecipeData, collect: Collect | None) -> None:
        # `collect` may be None where there are no such rows.
        self._run, self._data, self._collect = run, data, collect
        self._samples = setting(cfg, "eval_samples")

    def numbers(self, model, step: int) -> dict[str, float]:
        """Return the `eval_*` numbers of the model, the same on every rank; empty without rows.

        An environment that fails after the first ``step`` must not end the run; one that fails before it has never worked.
        """
        data = self._data
        if not data.eval_prompts:
            return {}
        settings = {"success_threshold": data.success_threshold, "leak_phrases": data.leak_phrases, "samples": self._samples}
        dropped = {f"eval_dropped_rows/{reason}": count for reason, count in data.eval_dropped.items()}
        with between_updates(self._run.processes):
            numbers = evaluate(model, data.eval_prompts, self._collect, self._run, may_fail=step > 0, **settings)
        return numbers | dropped


def evaluate(
    model,
    prompts: Sequence[tuple[Example, PromptPair]],
    collect: Collect,
    run: Run,
    *,
    samples: int,
    success_threshold: float,
    leak_phrases: Sequence[str],
    may_fail: bool = False,
) -> dict[str, float]:
    """Return `eval_*` numbers of the model on ``prompts``, the same on every rank; see :mod:`pidistill.training.metrics`.

    Greedy without privileged information; ``samples`` per prompt at the sampling temperature without it, and with it
    (the ceiling), where any row has it. Where the environment gives no reward, only the second is sampled, for its lengths.
    Unless it ``may_fail``, it raises InputError where every rollout of the first view has failed: the reward cannot work then.
    """
    sampled = sample_view(model, prompts, collect, run, view="student", samples=samples)
    if not may_fail:
        check_rewards(run.sum(len(sampled.rollouts)), run.sums(sampled.dropped), "of the evaluation")
    views = {"eval_student_success": sampled}
    judged = run.sum(sum(r.task_reward is not None for r in sampled.rollouts)) or not run.sum(len(sampled.rollouts))
    if judged:
        views["eval_student_success_greedy"] = sample_view(
            model, prompts, collect, run, view="student", samples=1, temperature=0.0
        )
    if judged and any(pair.has_privileged for _, pair in prompts):
        views["eval_teacher_success"] = sample_view(model, prompts, collect, run, view="teacher", samples=samples)
    result = {name: mean_success(view.rollouts, success_threshold, run) for name, view in views.items()}
    result |= eval_dropped(views.values(), run)
    means = rollout_means(run.sums(rollout_sums(sampled.rollouts, success_threshold, leak_phrases)))
    names = {"reward_mean": "eval_student_reward_mean"}
    names |= {name: f"eval_{name}" for name in ("leak_frac", "completion_tokens_mean", "truncated_frac")}
    names |= {name: f"eval_{name}" for name in means if name.startswith("reward/")}
    result |= {names[name]: value for name, value in means.items() if name in names}
    overlaps = [privileged_overlap(r) for r in sampled.rollouts]
    shared, said = run.sum(sum(a for a, _ in overlaps)), run.sum(sum(b for _, b in overlaps))
    if said:
        result["eval_privileged_overlap_frac"] = shared / said
    if "eval_teacher_success" in result:
        result["eval_privileged_gain"] = result["eval_teacher_success"] - result["eval_student_success"]
    return {name: value for name, value in result.items() if not math.isnan(value)}


def eval_dropped(views: Iterable[CollectResult], run: Run) -> dict[str, float]:
    """Count the rollouts of an evaluation that have no reward, by reason, over all ranks; no entry where there are none."""
    views = list(views)
    reasons = {reason for view in views for reason in view.dropped}
    counts = run.sums({f"eval_dropped/{reason}": sum(view.dropped.get(reason, 0) for view in views) for reason in reasons})
    return {name: count for name, count in counts.items() if count}


def row_names(data: RecipeData) -> list[str]:
    """Return a name of each evaluated row: its id, with a number behind it where an earlier row has the same one."""
    seen: Counter[str] = Counter()
    names = []
    for example, _ in data.prompts:
        seen[example.id] += 1
        names.append(example.id if seen[example.id] == 1 else f"{example.id} ({seen[example.id]})")
    return names


def row_counts(data: RecipeData) -> dict[str, int]:
    """Count the rows that were left out, by reason, and those with privileged information where not all have some.

    The views with privileged information play all rows; those without any get the student's prompt there.
    """
    counts = {f"dropped_rows/{reason}": count for reason, count in data.dropped.items() if count}
    privileged = sum(pair.has_privileged for _, pair in data.prompts)
    return counts if privileged in (0, len(data.prompts)) else counts | {"rows_with_privileged": privileged}


def sample_view(
    model,
    prompts: Sequence[tuple[Example, PromptPair]],
    collect: Collect,
    run: Run,
    *,
    view: ViewName,
    samples: int,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> CollectResult:
    """Return this rank's share: ``samples`` rollouts of each of its prompts; ``Rollout.group`` is the prompt's index."""
    mine = run.share(list(enumerate(prompts)))
    seeds = [rollout_seed(run.seed, EVALUATION_STREAM, index, member) for index, _ in mine for member in range(samples)]
    return collect(
        model,
        examples=[example for _, (example, _) in mine],
        prompts=[pair for _, (_, pair) in mine],
        view=view,
        group_size=samples,
        seeds=seeds,
        groups=[index for index, _ in mine],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )


def mean_success(rollouts: Sequence[Rollout], threshold: float, run: Run) -> float:
    """Return the mean over all ranks and rollouts with a reward; NaN without any."""
    judged = [r.task_reward for r in rollouts if r.task_reward is not None]
    total = run.sum(len(judged))
    return run.sum(sum(reward >= threshold for reward in judged)) / total if total else math.nan


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """Estimate P(at least one of k samples succeeds) without bias: 1 − C(n−c, k)/C(n, k) (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def pass_hat_k(successes: int, samples: int, k: int) -> float:
    """Estimate P(all of k samples succeed) without bias: pass^k = C(c, k)/C(n, k) (τ-bench, arXiv 2406.12045): reliability."""
    return math.comb(successes, k) / math.comb(samples, k)


def bootstrap_interval(
    values: Sequence[float] | Sequence[Sequence[float]],
    seed: int,
    resamples: int = 2000,
    *,
    clusters: Sequence[str] | None = None,
    minus: Sequence[Sequence[float]] | None = None,
) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean of a seeds × rows table, seeds and rows resampled with replacement.

    A plain sequence has one number per row, of one seed. Rows are what a held-out set is a sample of; more samples per row
    narrow each value, not the choice of rows. A dimension of length 1 has no spread to resample, and rows that are all alike
    give an interval without width, although n of them still allow about 3/n of the other kind.

    Args:
        clusters: the cluster of each row. Rows of one cluster are right or wrong together, so that whole clusters are drawn
            (2411.00640); None makes each row a cluster of its own.
        minus: a table over the same rows whose mean is subtracted; each resample draws the same rows for both (a paired
            comparison), and the seeds of each table by themselves.
    """
    generator = np.random.default_rng(seed)
    _, place = np.unique(range(np.shape(values)[-1]) if clusters is None else clusters, return_inverse=True)
    sizes = np.bincount(place)
    sums = [_sum_clusters(table, place, len(sizes)) for table in (values, *([] if minus is None else [minus]))]
    means = []
    for _ in range(resamples):
        seeds = [generator.integers(len(sums[0]), size=len(sums[0]))]
        drawn = generator.integers(len(sizes), size=len(sizes))
        seeds += [generator.integers(len(table), size=len(table)) for table in sums[1:]]
        parts = [table[own][:, drawn].mean(0).sum() / sizes[drawn].sum() for table, own in zip(sums, seeds, strict=True)]
        means.append(parts[0] - sum(parts[1:]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _sum_clusters(values: Sequence[float] | Sequence[Sequence[float]], place: np.ndarray, count: int) -> np.ndarray:
    """Return [seeds, clusters], the sum of each cluster's rows; ``place`` is the number of each row's cluster."""
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    return np.stack([np.bincount(place, weights=row, minlength=count) for row in table])


def success_numbers(
    rows: Mapping[int, Sequence[bool]], samples: int, seed: int, clusters: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Return avg@k, pass@k and pass^k of rows with up to ``samples`` samples each, k = 2, 4, ..., each with its interval.

    A dropped rollout can leave a row fewer than k samples: it then does not count towards those of k. Intervals resample rows,
    or the ``clusters`` of rows; `clusters` is how many there are.
    """
    measures: dict[str, Mapping[int, float]] = {"success": {row: sum(got) / len(got) for row, got in rows.items()}}
    for k in (2**i for i in range(1, samples.bit_length())):
        whole = {row: got for row, got in rows.items() if len(got) >= k}
        for name, measure in (("pass@", pass_at_k), ("pass^", pass_hat_k)):
            measures[f"{name}{k}"] = {row: measure(sum(got), len(got), k) for row, got in whole.items()}
    result: dict[str, Any] = {"clusters": len({clusters[row] for row in rows})} if clusters and rows else {}
    for name, values in measures.items():
        if values:
            result[name] = sum(values.values()) / len(values)
            own = None if clusters is None else [clusters[row] for row in values]
            if own is None or len(set(own)) > 1:  # one cluster has no spread to resample
                result[f"{name}_interval"] = bootstrap_interval(list(values.values()), seed, clusters=own)
    return result


def kind_numbers(
    rows: Mapping[int, Sequence[bool]], kinds: Mapping[int, str], seed: int, clusters: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Return `success/<kind>` of each kind of row, with its interval; arguments as in :func:`success_numbers`."""
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(kinds[row] for row in sorted(rows)):
        own = {row: got for row, got in rows.items() if kinds[row] == kind}
        numbers = success_numbers(own, 1, seed, clusters)
        numbers.pop("clusters", None)
        result |= {name.replace("success", f"success/{kind}"): value for name, value in numbers.items()}
    return result


def row_column(data: RecipeData, cfg: DictConfig, setting_name: str, most: int | None = None) -> list[str] | None:
    """Return the value of each evaluated row in the column that a key of the config names, as text; None without the key.

    Refuse a row that lacks it, and more than ``most`` different values.
    """
    key = cfg.get(setting_name)
    if key is None:
        return None
    found = []
    for example, _ in data.prompts:
        value = get(example.data, key)
        if value is None:
            raise InputError(f"{example.id} has no value in {key!r}; fill it, leave the row out, or remove {setting_name}")
        found.append(str(value))
    found = [" ".join(value.split()) for value in found] if most is not None else found  # names of lines in tables
    if most is not None and len(set(found)) > most:
        raise InputError(
            f"{setting_name}={key} names a column with {len(set(found))} different values in {len(found)} rows; "
            f"name one with at most {most}"
        )
    return found


def text_row(rollout: Rollout, max_chars: int | None = None) -> dict[str, Any]:
    """Return what rollouts.jsonl holds of a rollout: its row, its reward with the parts, why it stopped, and its text."""
    text = "\n".join(f"{turn['role']}: {turn_text(turn)}" for turn in rollout.turns)
    row = {"row": rollout.group, "example": rollout.example.id, "reward": rollout.reward}
    return row | {"reward_parts": rollout.reward_parts, "stop_reason": rollout.stop_reason, "text": text[:max_chars]}


class TextSamples:
    """Show what student and teacher each write for the same rows, side by side, every `rollout_log_steps` steps."""

    def __init__(self, cfg: DictConfig, run: Run, data: RecipeData, collect: Collect) -> None:
        self._run, self._collect = run, collect
        self._every = setting(cfg, "rollout_log_steps")
        self._prompts = data.prompts[: setting(cfg, "rollout_log_samples")]
        self._max_new_tokens = self._limit(cfg.get("rollout_log_max_new_tokens"), data)
        self._max_chars = setting(cfg, "rollout_log_max_chars")

    def _limit(self, asked: int | None, data: RecipeData) -> int | None:
        """Return the tokens of a logged text that the longest row leaves room for, ``asked`` at most; warn where it is less."""
        longest = max((len(ids) for _, pair in self._prompts for ids in (pair.student, pair.teacher)), default=0)
        room = (data.sampled_len or data.max_seq_len) - longest
        if asked is None or asked <= room:
            return asked
        if self._every:
            log_rank_zero(
                _log,
                f"rollout_log_max_new_tokens={asked} is more than the {room} tokens that the longest of the logged rows leaves "
                f"of {longest + room}, so that logged texts end after {room}; lower it, or raise model.max_seq_len",
                level=logging.WARNING,
            )
        return room

    def due(self, before: int, now: int) -> bool:
        return crossed(self._every, before, now)

    def sample(self, model) -> list[dict[str, Any]]:
        """Return one entry per row and view; the same list on every rank."""
        rows: list[dict[str, Any]] = []
        settings = {"samples": 1, "max_new_tokens": self._max_new_tokens}
        for view in ("student", "teacher"):
            for rollout in sample_view(model, self._prompts, self._collect, self._run, view=view, **settings).rollouts:
                rows.append({"view": view} | text_row(rollout, self._max_chars))
        return sorted(self._run.gather(rows), key=lambda row: (row["row"], row["view"]))


def chosen_views(cfg: DictConfig) -> tuple[str, ...]:
    """Return the names of the views to sample, of `views`, each once."""
    given = cfg.get("views")
    names = DEFAULT_VIEWS if given is None else tuple(dict.fromkeys(given))
    if not names:
        raise InputError(f"views=[] leaves nothing to sample; name some of {', '.join(VIEWS)}, or remove the key")
    for name in names:
        check_choice("views", name, VIEWS)
    return names
