"""What a run reports, and what each number means.

`metrics.jsonl` holds one JSON object per optimiser step, and one per evaluation (keys `eval_*`), each with `step`. A number
that was not computed is absent; nothing stands in for it.

| key | meaning |
| --- | --- |
| step | optimiser steps done, this one included |
| loss | the minimised loss, per policy token of the whole step, nats where it is a KL |
| reward_mean, reward_std | of this round's rollouts; parts of a reward, `reward_shaping` among them, as `reward/<name>` |
| success_frac | share of this round's rollouts with reward ≥ `eval_success_threshold`, `reward_shaping` left out |
| kl_teacher_student_nats | kl(teacher||student) per policy token, full vocabulary, on the sampled traces |
| kl_student_teacher_nats | kl(student||teacher), likewise |
| kl_teacher_student_q1 … q4 | the same by quarter of the completion |
| entropy_nats, teacher_entropy_nats | entropy per policy token of the student and of the teacher view |
| leak_frac | share of rollouts in which an assistant turn says a leak phrase |
| clip_frac | share of policy tokens whose policy gradient is clipped to zero (halves weighted by α and 1−α) |
| ratio_mean | mean of sampling view / μ (hinted rollouts: S/μ); 1 on the first update unless top-p or top-k is on |
| student_ratio_mean | mean of S/μ (or S/T) in π-Distill's student half |
| sampler_mismatch_k3_nats | kl(sampler||trainer) per token, estimated by e^Δ − 1 − Δ ≥ 0; at a round's first update only |
| sampler_mismatch_mean_nats | mean |Δ| over those tokens, Δ = log-prob of the trainer − the sampler, in the view that sampled |
| sampler_mismatch_max_nats | the largest |Δ| of them |
| importance_weight_mean | mean truncated importance weight of the round's policy tokens, with `importance_weights` |
| importance_truncated_frac | share of them whose weight the cap cut |
| ess_frac | effective sample size of the student's token ratios S/μ, as a share of the policy tokens |
| grad_norm, lr | before clipping; of this step |
| round | the round that the step's rollouts were sampled in, from 0 |
| policy_tokens | policy tokens in the step, all ranks: the loss's denominator |
| completion_tokens_mean | policy tokens per rollout |
| rollouts | sampled in this round, all ranks, dropped and replaced ones included |
| sampled_tokens | policy tokens sampled in this round, all ranks, those of replaced rollouts included |
| guided_groups | groups sampled again with the hint; the round's reward and leak numbers hold the hinted samples (Guide-GRPO) |
| rollouts_with_pi_frac | share of this round's rollouts for which hindsight found privileged information |
| hindsight_too_long | rollouts of this round whose hindsight did not fit, and was left out |
| hindsight_judge_failures | rollouts of this round about which the judge gave no critique, and which have none |
| snis_ess | effective sample size of SNIS's weights, in rollouts: 1 to the group's size |
| sft_loss | mean −log S per token of the demonstrations behind `sft_weight` |
| zero_advantage_frac | share of rollouts whose advantage from the reward is 0 |
| truncated_frac | share of rollouts cut off by the token limit |
| turn_truncated_frac | share of rollouts whose last turn reached `sampler.max_turn_tokens`; part of truncated_frac |
| rows_without_pi | rows of the training data without privileged information |
| dropped/<reason> | rollouts left out of this round, by reason: those of :class:`pidistill.rollouts.CollectResult` |
| dropped_rows/<reason> | rows left out of the training data, by reason |
| reward_weight | weight of OPSD's policy-gradient term at this step |
| nonfinite_steps | steps skipped so far because the loss or the gradient was not finite |
| empty_steps | steps skipped so far because no policy token was left |
| tokens_per_s | policy tokens sampled and trained per second of the step, all ranks |
| time_rollout_s, time_score_s, time_update_s | sampling and rewards; forward and the head's gradient; backward, optimiser |
| alpha, beta | the objective's weights at this step |
| eval_student_success_greedy | mean success at temperature 0, without privileged information |
| eval_student_success | the same at the sampling temperature |
| eval_teacher_success | with privileged information: the ceiling |
| eval_privileged_gain | eval_teacher_success − eval_student_success |
| eval_student_reward_mean | mean reward of the samples behind eval_student_success |
| eval_dropped/<reason>, eval_dropped_rows/<reason> | rollouts and rows left out of the evaluation, by reason |
| eval_leak_frac | leak_frac of the evaluated student's samples |
| eval_privileged_overlap_frac | share of the student's word 4-grams that stand in the privileged text it was not shown |
| eval_completion_tokens_mean, eval_truncated_frac | length of the student's samples; share cut off by the token limit |
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from pidistill.advantages import group_slots
from pidistill.config import build
from pidistill.messages import messages_text
from pidistill.policy_gradient import effective_sample_size
from pidistill.rewards.shaping import count_phrases
from pidistill.training import Run, log, write_jsonl
from pidistill.types import Batch, Message, Rollout, RolloutAdvantage, Scores


class MetricsLog:
    """metrics.jsonl, the configured torchtune metric logger and the progress bar, on rank 0.

    On resume, rows after the checkpoint's step are cut off: they are about to be written again. A fresh run starts empty files.
    """

    def __init__(self, cfg: DictConfig, run: Run, *, first_step: int, last_step: int, title: str) -> None:
        self._active = run.is_main
        self.path = run.output_dir / "metrics.jsonl"
        self._alarm = CollapseAlarm()
        if not self._active:
            return
        for row in _keep_rows_until(self.path, first_step):
            self._alarm.look(row)  # where the run started is where it is measured from, also after a resume
        _keep_rows_until(self.path.with_name("rollouts.jsonl"), first_step)
        self._logger = build(cfg.metric_logger) if cfg.get("metric_logger") else None
        self._bar = tqdm(total=last_step, initial=first_step, desc=title, unit="step", mininterval=0.5)

    def write(self, row: dict[str, Any], shown: Sequence[str] = ()) -> None:
        """Append one row, without numbers that are not finite; ``shown`` names those that the progress bar carries."""
        row = {key: value for key, value in row.items() if not isinstance(value, float) or _is_finite(value)}
        if not self._active:
            return
        self._alarm.look(row)
        write_jsonl(self.path, [row])
        if self._logger is not None:
            numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
            self._logger.log_dict(numbers, step=row["step"])
        self._bar.n = row["step"]
        self._bar.set_postfix({key: f"{row[key]:.3g}" for key in shown if key in row}, refresh=False)
        self._bar.refresh()

    def texts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append what student and teacher wrote to rollouts.jsonl, and show it."""
        if not self._active:
            return
        write_jsonl(self.path.with_name("rollouts.jsonl"), [{"step": step} | row for row in rows])
        for row in rows:
            self._bar.write(f"── step {step} · {row['example']} · {row['view']} · reward {row['reward']:g}\n{row['text']}")

    def close(self) -> None:
        if self._active:
            self._bar.close()
            if self._logger is not None:
                self._logger.close()


class CollapseAlarm:
    """Warns, once each, when a run looks lost: the entropy gone, or the KL gone while the reward has not risen."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._said: set[str] = set()

    def look(self, row: dict[str, Any]) -> None:
        for key in ("kl_teacher_student_nats", "reward_mean"):
            if key in row:
                self._first.setdefault(key, row[key])
        if row.get("entropy_nats", 1.0) < 1e-3:
            self._say(
                "entropy", f"step {row['step']}: entropy is {row['entropy_nats']:.1e} nats per token; the policy is frozen"
            )
        start = self._first.get("kl_teacher_student_nats")
        if (
            start
            and row.get("kl_teacher_student_nats", start) < 0.02 * start
            and row.get("reward_mean", 1.0) <= self._first.get("reward_mean", 0.0)
        ):
            self._say("kl", f"step {row['step']}: kl(teacher||student) fell below 2% of its start and the reward has not risen")

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(f"collapse alarm: {text}")


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _keep_rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut off the rows after ``step``; returns those that stay. Step 0 is a fresh run: none stays."""
    if not path.is_file():
        return []
    # Not splitlines(): texts hold characters such as U+2028 that it takes for line ends. What follows the last newline is
    # empty, or the half of a line that a kill left.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines] if step > 0 else []
    kept = [row["step"] <= step for row in rows]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line, keep in zip(lines, kept, strict=False) if keep), encoding="utf-8")
    temporary.replace(path)
    return [row for row, keep in zip(rows, kept, strict=True) if keep]


# ---------------------------------------------------------------------------------------------- numbers of a batch


def token_sums(batch: Batch, scores: Scores, extra: dict[str, Tensor]) -> dict[str, float]:
    """Sums over the policy tokens of a micro-batch, to be added over micro-batches and ranks and divided by their number."""
    columns = dict(extra)
    for divergence, value in scores.divergences.items():
        if divergence.grad == "none":
            columns[f"{divergence.name}_nats"] = value
    if scores.student_entropy is not None:
        columns["entropy_nats"] = scores.student_entropy
    if scores.teacher_entropy is not None:
        columns["teacher_entropy_nats"] = scores.teacher_entropy
    sums = {name: value.detach().double().sum().item() for name, value in columns.items()}
    kl = columns.get("kl_teacher_student_nats")
    if kl is not None and kl.numel():
        sums |= _by_quarter("kl_teacher_student_q", kl.detach(), batch)
    if batch.sampled_logprobs is not None and scores.student_logprobs is not None:
        ratio = (scores.student_logprobs.detach() - batch.sampled_logprobs).double().exp()
        sums |= {"_ratio": ratio.sum().item(), "_ratio_squared": (ratio**2).sum().item()}
    else:
        sums["_without_ratio"] = float(len(batch.targets))
    return sums


def _by_quarter(name: str, values: Tensor, batch: Batch) -> dict[str, float]:
    lengths = torch.bincount(batch.rollout_index)[batch.rollout_index]
    quarter = (4 * batch.token_index) // lengths
    result = {}
    for q in range(4):
        inside = quarter == q
        result |= {f"{name}{q + 1}": values[inside].sum().item(), f"_{name}{q + 1}_tokens": inside.sum().item()}
    return result


def token_means(sums: dict[str, float], tokens: float) -> dict[str, float]:
    """Means per policy token of summed :func:`token_sums`; the keys that start with `_` are consumed."""
    if tokens == 0:
        return {}
    means = {}
    for name, value in sums.items():
        if not name.startswith("_"):
            count = sums.get(f"_{name}_tokens", tokens)
            if count:
                means[name] = value / count
    # Demonstrations among the rollouts (GKD) have no ratio, nor has the micro-batch that they are in.
    if sums.get("_ratio_squared") and not sums.get("_without_ratio"):
        means["ess_frac"] = sums["_ratio"] ** 2 / sums["_ratio_squared"] / tokens
    return means


# ---------------------------------------------------------------------------------------------- numbers of rollouts


def assistant_text(turns: Sequence[Message]) -> str:
    """What the policy wrote, tool calls included."""
    return messages_text([turn for turn in turns if turn["role"] == "assistant"])


def says_leak_phrase(rollout: Rollout, phrases: Sequence[str]) -> bool:
    """True if an assistant turn says one of the phrases as whole words, whatever the case."""
    return count_phrases(assistant_text(rollout.turns), phrases) > 0


def privileged_overlap(rollout: Rollout, n: int = 4) -> tuple[int, int]:
    """(word n-grams of the student's text that stand in the privileged text, all its n-grams)."""
    privileged = rollout.example.privileged
    if privileged is None:
        return 0, 0
    text = privileged if isinstance(privileged, str) else messages_text(privileged)
    known, said = set(_ngrams(text, n)), _ngrams(assistant_text(rollout.turns), n)
    return sum(gram in known for gram in said), len(said)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def rollout_sums(rollouts: Sequence[Rollout], success_threshold: float, leak_phrases: Sequence[str]) -> dict[str, float]:
    """Sums over rollouts, to be added over ranks; see :func:`rollout_means`."""
    sums = {
        "_rollouts": float(len(rollouts)),
        "reward_mean": sum(r.reward for r in rollouts),
        "_reward_squared": sum(r.reward**2 for r in rollouts),
        "success_frac": float(sum(r.task_reward >= success_threshold for r in rollouts)),
        "completion_tokens_mean": float(sum(r.policy_tokens for r in rollouts)),
        "truncated_frac": float(sum(r.stop_reason in ("length", "turn_length") for r in rollouts)),
        "turn_truncated_frac": float(sum(r.stop_reason == "turn_length" for r in rollouts)),
    }
    if leak_phrases:
        sums["leak_frac"] = float(sum(says_leak_phrase(r, leak_phrases) for r in rollouts))
    for rollout in rollouts:
        for name, part in rollout.reward_parts.items():
            sums[f"reward/{name}"] = sums.get(f"reward/{name}", 0.0) + part
    return sums


def advantage_sums(pairs: Sequence[tuple[Rollout, RolloutAdvantage]]) -> dict[str, float]:
    """Sums over rollouts, to be added over ranks; see :func:`rollout_means`."""
    sums = {"zero_advantage_frac": float(sum(advantage.reward == 0.0 for _, advantage in pairs))}
    weighted = [(rollout.group, advantage.weight) for rollout, advantage in pairs if advantage.weight is not None]
    if weighted:
        groups = torch.tensor([group for group, _ in weighted])
        slot, size = group_slots(groups)
        weights = torch.tensor([weight for _, weight in weighted]) / size[slot]
        sums["snis_ess"] = float(effective_sample_size(weights, groups)[slot].sum())
    return sums


def rollout_means(sums: dict[str, float]) -> dict[str, float]:
    count = sums["_rollouts"]
    if not count:
        return {}
    means = {name: value / count for name, value in sums.items() if not name.startswith("_")}
    means["reward_std"] = max(0.0, sums["_reward_squared"] / count - means["reward_mean"] ** 2) ** 0.5
    return means
