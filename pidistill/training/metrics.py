"""Compute what a run reports; the list says what each number means.

`metrics.jsonl` holds one JSON object per optimiser step, and one per evaluation (keys `eval_*`), each with `step`. A number
that was not computed is absent, such as those of rewards and successes where the environment gives no reward; no placeholder
is used.

| key | meaning |
| --- | --- |
| step | optimiser steps done, this one included |
| loss | the minimised loss, per policy token of the whole step, nats where it is a KL |
| reward_mean, reward_std | of this round's rollouts; `reward/<name>`: mean of a part (also `reward_shaping`) over all of them |
| success_frac | share of this round's rollouts with reward ≥ `eval_success_threshold`, `reward_shaping` left out |
| kl_teacher_student_nats | kl(teacher||student) per policy token, full vocabulary, on the sampled traces |
| kl_student_teacher_nats | kl(student||teacher), likewise |
| kl_teacher_student_nats/<name> … | the same, and the teacher's entropy and NLL, on the rows of one of several teachers |
| kl_teacher_student_q1 … q4 | the same by quarter of the completion |
| entropy_nats, teacher_entropy_nats | entropy per policy token of the student and of the teacher view |
| student_nll_nats, teacher_nll_nats | −log-prob per sampled token in the student and in the teacher view |
| leak_frac | share of rollouts in which an assistant turn says a leak phrase |
| clip_frac | share of policy tokens whose policy gradient is clipped to zero (halves weighted by α and 1−α) |
| ratio_mean | mean of sampling view / μ (hinted rollouts: S/μ); 1 on the first update unless top-p or top-k is on |
| student_ratio_mean | mean of S/μ (or S/T) in π-Distill's student half |
| sampler_mismatch_k3_nats | kl(sampler||trainer) per token, estimated by e^Δ − 1 − Δ ≥ 0; at a round's first update only |
| sampler_mismatch_mean_nats | mean |Δ| over those tokens, Δ = log-prob of the trainer − the sampler, in the view that sampled |
| sampler_mismatch_max_nats | the largest |Δ| of them |
| sampler_mismatch_rollout_max_nats | the largest mean |Δ| of a rollout, without what top-p or top-k explains |
| rollout_lag_k3_nats, rollout_lag_mean_nats, … | the same four in a lagged round (`rollout_lag: 1`): Δ holds the lag, too |
| importance_weight_mean | mean truncated importance weight of the round's policy tokens, with `importance_weights` |
| importance_truncated_frac | share of them whose weight the cap cut |
| masked_tokens, masked_rollouts | policy tokens of this round, and rollouts with any, that `mismatch_mask` leaves out |
| masked_successes | rollouts with a reward ≥ `eval_success_threshold` among them; masked_success_frac: as a share of all such |
| token_weight_mean | mean of what `objective.token_weight` makes of a term of 1; token_weight_zero_frac: share it leaves out |
| gap_gate_mean | mean gate of SDAR, ½ taken off; credit_factor_mean: of what RLSD multiplies advantages with |
| gap_weight | SDAR's and RLSD's weight of the log-ratio at this step |
| selected_frac | share of the round's tokens that ConstantNegative trains |
| router_loss | load-balancing loss of a mixture of experts |
| <function>_nats | mean of a divergence of one's own, named by its function |
| kept, kept_frac | `sample_distributed`: rows written down, and as a share of the rollouts |
| proximal_change_nats | mean difference that TOP-D's `proximal_alpha` makes to an advantage |
| loss/<name>, <metric>/<name> | loss and metrics of one of several objectives, over its own tokens |
| ess_frac | effective sample size of the student's token ratios S/μ, as a share of the policy tokens |
| grad_norm, lr | before clipping; of this step |
| round | the round that the step's rollouts were sampled in, from 0 |
| policy_tokens | policy tokens in the step, all ranks: the loss's denominator |
| completion_tokens_mean | policy tokens per rollout |
| rollouts | sampled in this round, all ranks, dropped and replaced ones included |
| sampled_tokens | policy tokens sampled in this round, all ranks, those of replaced and failed rollouts too |
| guided_groups | groups sampled again with the hint; the round's reward and leak numbers hold the hinted samples (Guide-GRPO) |
| refilled_groups | groups of equal rewards that `refill` replaced in this round; uniform_groups: those left at its end |
| rollouts_with_pi_frac | share of this round's rollouts for which hindsight found privileged information |
| hindsight_too_long | rollouts of this round whose hindsight did not fit, and was left out |
| hindsight_failures | calls of `hindsight.sibling` and `hindsight.feedback` in this round that raised or wrote no text |
| hindsight_judge_failures | rollouts of this round about which the judge gave no critique, and which have none |
| turn_privileged_mean | texts per rollout that an answer of the environment brought for the teacher alone |
| turn_privileged_too_long_mean | such texts per rollout that were left out, since the teacher's view had no room for them |
| snis_ess | effective sample size of SNIS's weights, in rollouts: 1 to the group's size |
| sft_loss | mean −log S per token of the demonstrations behind `sft_weight` |
| zero_advantage_frac | share of rollouts whose advantage from the reward is 0 |
| truncated_frac | share of rollouts cut off by the token limit |
| turn_truncated_frac | share of rollouts whose last turn reached `sampler.max_turn_tokens`; part of truncated_frac |
| rows_without_pi | rows of the training data without privileged information |
| dropped/<reason> | rollouts left out of this round, by reason: those of :class:`pidistill.rollouts.CollectResult` |
| dropped_rows/<reason> | rows left out of the training data, by reason |
| reward_weight | weight of OPSD's policy-gradient term at this step |
| alarms | {name: sentence} of each alarm that this row gave; the one key that holds text |
| nonfinite_steps | steps skipped so far because the loss or the gradient was not finite |
| empty_steps | steps skipped so far because no policy token was left |
| tokens_per_s | policy tokens sampled and trained per second of the step, all ranks |
| time_rollout_s, time_score_s, time_update_s | sampling and rewards; forward and the head's gradient; backward, optimiser |
| time_ahead_s | with `rollout_lag: 1` what the round took to sample; time_rollout_s is then what the training waited for it |
| alpha, beta | the objective's weights at this step |
| eval_student_success_greedy | mean success at temperature 0, without privileged information |
| eval_student_success | the same at the sampling temperature |
| eval_teacher_success | with privileged information: the ceiling |
| eval_privileged_gain | eval_teacher_success − eval_student_success |
| eval_student_reward_mean | mean reward of the samples behind eval_student_success |
| eval_reward/<name> | parts of their reward, such as `success_strict` and `success_last_number` of GSM8K answers |
| eval_dropped/<reason>, eval_dropped_rows/<reason> | rollouts and rows left out of the evaluation, by reason |
| eval_leak_frac | leak_frac of the evaluated student's samples |
| eval_privileged_overlap_frac | share of the student's word 4-grams that stand in the privileged text it was not shown |
| eval_completion_tokens_mean, eval_truncated_frac | length of the student's samples; share cut off by the token limit |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pidistill.chat.phrases import says_leak_phrase
from pidistill.distributed.run import Timer
from pidistill.losses.advantages import group_slots
from pidistill.losses.policy_gradient import effective_sample_size
from pidistill.training.update import StepResult
from pidistill.types import Batch, Rollout, RolloutAdvantage, Scores

# ---------------------------------------------------------------------------------------------- numbers of a batch


OF_TEACHER = ("kl_teacher_student_nats", "kl_student_teacher_nats", "teacher_entropy_nats", "teacher_nll_nats")


def token_sums(
    batch: Batch, scores: Scores, extra: dict[str, Tensor], teachers: Sequence[str] | None = None
) -> dict[str, float]:
    """Return sums over the policy tokens of a micro-batch; added over batches and ranks and divided by their number: means.

    ``teachers``: the name of each rollout's teacher; its numbers are then also summed as ``<metric>/<name>``.
    """
    columns = dict(extra)
    for divergence, value in scores.divergences.items():
        if divergence.grad == "none" or divergence.fn is not None:
            columns[f"{divergence.name}_nats"] = value
    if scores.student_entropy is not None:
        columns["entropy_nats"] = scores.student_entropy
    if scores.teacher_entropy is not None:
        columns["teacher_entropy_nats"] = scores.teacher_entropy
    if isinstance(scores.router_loss, Tensor):
        columns["router_loss"] = scores.router_loss.detach().expand(len(batch.targets))
    for view in ("student", "teacher"):
        logprobs = getattr(scores, f"{view}_logprobs")
        if logprobs is not None:
            columns[f"{view}_nll_nats"] = -logprobs
    sums = {name: value.detach().double().sum().item() for name, value in columns.items()}
    for name in sorted(set(teachers or ())):
        own = torch.tensor([other == name for other in teachers], device=batch.rollout_index.device)[batch.rollout_index]
        for metric in OF_TEACHER:
            if metric in columns:
                key = f"{metric}/{name}"
                sums |= {key: columns[metric].detach()[own].double().sum().item(), f"_{key}_tokens": float(own.sum())}
    kl = columns.get("kl_teacher_student_nats")
    if kl is not None and kl.numel():
        sums |= _by_quarter("kl_teacher_student_q", kl.detach(), batch)
    if batch.ratio_logprobs is not None and scores.student_logprobs is not None:
        ratio = (scores.policy_logprobs("student").detach() - batch.ratio_logprobs).double().exp()
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
    """Return means per policy token of summed :func:`token_sums`; the keys that start with `_` are consumed."""
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


def rollout_sums(rollouts: Sequence[Rollout], success_threshold: float, leak_phrases: Sequence[str]) -> dict[str, float]:
    """Return sums over rollouts, to be added over ranks; see :func:`rollout_means`."""
    judged = [r for r in rollouts if r.reward is not None]
    sums = {
        "_rollouts": float(len(rollouts)),
        "_judged": float(len(judged)),
        "reward_mean": sum(r.reward for r in judged),
        "_reward_squared": sum(r.reward**2 for r in judged),
        "success_frac": float(sum(r.task_reward >= success_threshold for r in judged)),
        "completion_tokens_mean": float(sum(r.policy_tokens for r in rollouts)),
        "truncated_frac": float(sum(r.stop_reason in ("length", "turn_length") for r in rollouts)),
        "turn_truncated_frac": float(sum(r.stop_reason == "turn_length" for r in rollouts)),
    }
    if leak_phrases:
        sums["leak_frac"] = float(sum(says_leak_phrase(r, leak_phrases) for r in rollouts))
    if any(r.teacher_reads or r.teacher_reads_left_out for r in rollouts):
        sums["turn_privileged_mean"] = float(sum(len(r.teacher_reads) for r in rollouts))
        sums["turn_privileged_too_long_mean"] = float(sum(r.teacher_reads_left_out for r in rollouts))
    for rollout in rollouts:
        for name, part in rollout.reward_parts.items():
            sums[f"reward/{name}"] = sums.get(f"reward/{name}", 0.0) + part
    return sums


def advantage_sums(pairs: Sequence[tuple[Rollout, RolloutAdvantage]]) -> dict[str, float]:
    """Return sums over rollouts, to be added over ranks; see :func:`rollout_means`."""
    judged = [advantage for rollout, advantage in pairs if rollout.reward is not None]
    sums = {"zero_advantage_frac": float(sum(advantage.advantage == 0.0 for advantage in judged))}
    weighted = [(rollout.group, advantage.snis_weight) for rollout, advantage in pairs if advantage.snis_weight is not None]
    if weighted:
        groups = torch.tensor([group for group, _ in weighted])
        slot, size = group_slots(groups)
        weights = torch.tensor([weight for _, weight in weighted]) / size[slot]
        sums |= {"snis_ess": float(effective_sample_size(weights, groups)[slot].sum()), "_weighted": float(len(weighted))}
    return sums


OF_REWARDS = ("reward_mean", "success_frac", "zero_advantage_frac")  # means over the rollouts that have a reward


def rollout_means(sums: dict[str, float]) -> dict[str, float]:
    """Return means over rollouts; those of rewards are absent where no rollout has one."""
    count, judged = sums["_rollouts"], sums["_judged"]
    if not count:
        return {}
    counts = {name: judged if name in OF_REWARDS else count for name in sums if not name.startswith("_")}
    if "snis_ess" in sums:  # several objectives: over the rollouts that SNIS weighs
        counts["snis_ess"] = sums["_weighted"]
    means = {name: sums[name] / over for name, over in counts.items() if over}
    if judged:
        means["reward_std"] = max(0.0, sums["_reward_squared"] / judged - means["reward_mean"] ** 2) ** 0.5
    return means


# ---------------------------------------------------------------------------------------------- numbers of a step


def step_report(
    loss: float, tokens: int, result: StepResult, timer: Timer, phases: Sequence[str] = ("rollout", "score", "update")
) -> dict[str, float]:
    """Return what every recipe reports of an optimiser step; ``loss`` and ``tokens`` are over all ranks.

    ``phases`` are reported as `time_<phase>_s`; the timer starts again from 0.
    """
    seconds = timer.take()
    return {
        "loss": loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "policy_tokens": tokens,
        **{f"time_{phase}_s": seconds.get(phase, 0.0) for phase in phases},
        "tokens_per_s": tokens / max(sum(seconds.values()), 1e-9),
        "nonfinite_steps": result.nonfinite_steps,
        "empty_steps": result.empty_steps,
    }
