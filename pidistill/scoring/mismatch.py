"""Compare the sampler's distribution with the trainer's: measured, bounded, and corrected by truncated importance weights.

The policy gradient takes every token for a sample of the policy that the trainer sees. A sampler draws from another one, μ,
where its kernels round differently, where its weights are stale, and where top-p or top-k cuts the distribution. With π the
trainer's policy under the weights that sampled, in the view that sampled:

    measured      Δ = log π(y) − log μ(y) of each sampled token; k3 = e^Δ − 1 − Δ ≥ 0 has the mean kl(μ||π) under y ~ μ
                  (http://joschu.net/blog/kl-approx.html)
    bounded       a mean |Δ| above `max_sampler_mismatch_nats` ends the run. With top-p, Δ is the log of the mass that was kept,
                  which lies in [log top_p, 0], and with top-k in (−∞, 0]: only what is outside of that counts
    masked        with `mismatch_mask`, tokens or whole rollouts whose π/μ lies outside its bounds leave every term of the loss
    corrected     with `importance_weights`, w = sg min(π/μ, cap) multiplies the policy-gradient loss of each token, and π takes
                  the place of μ as the denominator of its ratios: E_μ[w·f] = E_π[f] but for what the cap takes away and for
                  the mass of tokens that μ never samples, because top-p or top-k cut them off: no weight brings those back
                  (truncated importance sampling, Ionides 2008; between two engines of one policy, "Your efficient RL framework
                  secretly brings you off-policy RL training", 2025)
"""

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Float64, Int
from omegaconf import DictConfig
from torch import Tensor

from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.errors import InputError, check_choice
from pidistill.losses.estimators import k1, k3
from pidistill.losses.reductions import sum_by_rollout
from pidistill.rollouts import Sampler
from pidistill.scoring.batch import policy_positions
from pidistill.types import Batch, Rollout, RolloutAdvantage, RolloutKey, ScoreRequest, Scores, ViewName

DEFAULT_LIMIT_NATS = 0.1
"""The default limit of the mean |Δ| per token.

On a small random model, CPU, our own sampler is 1e-6 away in fp32 and .012 in bf16, vLLM 1e-6 and .04.
"""


# ------------------------------------------------------------------------------------------------- measured and bounded


class MismatchMeter:
    """Look at the first update after each sampling, where the trained weights still are those that sampled.

    Config key `max_sampler_mismatch_nats`: the largest mean |Δ| per token that a run accepts, without the part that top-p or
    top-k explains; null is DEFAULT_LIMIT_NATS.

    In a lagged round (`rollout_lag: 1`) other weights sampled, and Δ holds what they have learned since: the numbers are then
    reported as `rollout_lag_*` and not bounded. The first round of a run, which is not lagged, is.
    """

    def __init__(self, cfg: DictConfig, run: Run, sampler: Sampler, view: ViewName) -> None:
        self._run, self._view, self._sampler = run, view, sampler
        self._limit = _limit(cfg.get("max_sampler_mismatch_nats"))
        self.start_round()

    def start_round(self, lagged: bool = False) -> None:
        """Begin to count, as a round has been sampled; ``lagged``: by other weights than those that train on it first."""
        self._lagged = lagged
        self._due, self._sums = True, {"tokens": 0.0, "k3": 0.0, "mean": 0.0, "unexplained": 0.0}
        self._max = self._worst_rollout = 0.0

    def look(self, batch: Batch, scores: Scores) -> None:
        """Add a micro-batch; nothing where its weights are no longer those that sampled."""
        if not self._due:
            return
        trainer, recorded, rollout_index = logprobs_of_both(batch, scores, self._view)
        if not len(trainer):
            return
        gap = k1(trainer, recorded)
        unexplained = _unexplained(gap, self._sampler)
        self._sums["tokens"] += len(gap)
        self._sums["k3"] += k3(recorded, trainer).sum().item()
        self._sums["mean"] += gap.abs().sum().item()
        self._sums["unexplained"] += unexplained.sum().item()
        self._max = max([self._max, *gap.abs().tolist()])
        rollouts = int(rollout_index.max()) + 1
        tokens = sum_by_rollout(torch.ones_like(unexplained), rollout_index, rollouts).clamp(min=1.0)
        means = sum_by_rollout(unexplained, rollout_index, rollouts) / tokens
        self._worst_rollout = max(self._worst_rollout, means.max().item())

    def report(self) -> dict[str, float]:
        """Return metrics over all ranks at a round's first update, and nothing after. Called before the optimiser steps.

        A mean |Δ| above the limit, beyond what the sampler's top-p or top-k explains, is refused on every rank.
        """
        if not self._due:
            return {}
        self._due = False
        sums = self._run.sums(self._sums)
        if not sums["tokens"]:
            return {}
        k3, mean, unexplained = (sums[name] / sums["tokens"] for name in ("k3", "mean", "unexplained"))
        largest, rollout = (max(values) for values in zip(*self._run.gather([(self._max, self._worst_rollout)]), strict=True))
        if unexplained > self._limit and not self._lagged:
            raise InputError(
                f"the sampler's log-probs are {unexplained:.3g} nats per token away from the trainer's"
                f"{_cut_off(self._sampler)} (k3 {k3:.3g}, largest {largest:.3g}, over {sums['tokens']:.0f} tokens), above "
                f"max_sampler_mismatch_nats={self._limit:g}; the sampler has other weights or another model than the trainer "
                "(check sampler.model_dir against `model`), or rounds coarsely (sampler.dtype): mend that, or raise "
                "max_sampler_mismatch_nats"
            )
        numbers = {"k3": k3, "mean": mean, "max": largest, "rollout_max": rollout}
        return {
            f"{'rollout_lag' if self._lagged else 'sampler_mismatch'}_{name}_nats": value for name, value in numbers.items()
        }


def _unexplained(gap: Float64[Tensor, " M"], sampler: Sampler) -> Float64[Tensor, " M"]:
    """Return the distance of each Δ from the values that it has where sampler and trainer agree: [log of the kept mass, 0]."""
    if not cuts_off(sampler):
        return gap.abs()
    least = -math.inf if sampler.top_k is not None else math.log(sampler.top_p)
    return (gap.clamp(min=0.0) + (least - gap).clamp(min=0.0)).masked_fill(gap.isnan(), math.nan)


def _cut_off(sampler: Sampler) -> str:
    """Return what the sampler's truncation adds to the sentence."""
    if not cuts_off(sampler):
        return ""
    return f", beyond what {'top_k' if sampler.top_k is not None else 'top_p'} explains"


def logprobs_of_both(
    batch: Batch, scores: Scores, view: ViewName
) -> tuple[Float64[Tensor, " M"], Float64[Tensor, " M"], Int[Tensor, " M"]]:
    """Return log π and log μ, in float64, of the policy tokens that ``view`` sampled, and the rollout of each.

    Demonstrations, and what the other view sampled, are left out.
    """
    recorded = torch.tensor(
        [x for r in batch.views.rollouts for x in _recorded(r, view)], dtype=torch.float64, device=batch.targets.device
    )
    trainer = scores.policy_logprobs(view)
    counted = ~recorded.isnan()
    return trainer.detach().double()[counted], recorded[counted], batch.rollout_index[counted]


def _recorded(rollout: Rollout, view: ViewName) -> list[float]:
    """Return log μ per policy token; NaN where nobody sampled it in this view."""
    if rollout.sampled_logprobs is None or rollout.sampled_by != view:
        return [math.nan] * rollout.policy_tokens
    return [rollout.sampled_logprobs[t] for t in policy_positions(rollout)]


def truncates(sampler: Sampler) -> bool:
    """Return whether the sampler draws from less than the whole distribution."""
    return sampler.top_k is not None or (sampler.top_p is not None and sampler.top_p < 1.0)


def cuts_off(sampler: Sampler) -> bool:
    """Return whether the sampler draws from less than the whole distribution, and the trainer cannot replay what was left."""
    return truncates(sampler) and not getattr(sampler, "record_kept", False)


def _limit(value: object) -> float:
    if value is None:
        return DEFAULT_LIMIT_NATS
    if type(value) not in (int, float) or not value > 0.0:
        raise InputError(f"max_sampler_mismatch_nats={value} must be a number above 0, or null for its default")
    return float(value)


# ------------------------------------------------------------------------------------------------- corrected


class TruncatedImportanceWeights:
    """Weigh the policy gradient with w = min(π/μ, cap); the recipes' key `importance_weights`.

    It costs one more forward per round.

    What it cannot correct: tokens that top-p or top-k cut off are never sampled, so that no weight stands for them. With top-p
    they hold up to 1 − top_p of each token's mass; the mean weight (`importance_weight_mean`) estimates the mass that is kept.

    Args:
        level: "token": π/μ of the token, low variance, biased by what earlier tokens were drawn from; "sequence": of the whole
            rollout, the product over its policy tokens, unbiased below the cap.
        cap: at least 1; more truncates less, and lets single tokens or rollouts weigh more.
    """

    def __init__(self, level: str = "token", cap: float = 2.0) -> None:
        check_choice("importance_weights.level", level, ("token", "sequence"))
        if not 1.0 <= cap < math.inf:
            raise InputError(f"importance_weights.cap={cap} must be at least 1: a weight is 1 where sampler and trainer agree")
        self.level, self.cap = level, float(cap)
        self._sums: dict[str, float] = {}

    def weigh(self, rollouts: Sequence[Rollout], batch: Batch, scores: Scores) -> None:
        """Write π's log-probs and the weights onto each of the batch's rollouts, before the first update after sampling."""
        trainer = logprobs_of_samplers(rollouts, batch, scores)
        weights, cut = truncated_weights(trainer, batch.ratio_logprobs, batch.rollout_index, self.level, self.cap)
        lengths = [rollout.policy_tokens for rollout in rollouts]
        for rollout, logprobs, values in zip(rollouts, trainer.split(lengths), weights.split(lengths), strict=True):
            rollout.trainer_logprobs, rollout.importance_weights = logprobs.tolist(), values.tolist()
        for name, value in (("tokens", len(weights)), ("mean", weights.sum().item()), ("cut", cut.sum().item())):
            self._sums[name] = self._sums.get(name, 0.0) + value

    def report(self, run: Run) -> dict[str, float]:
        """Return metrics of what was weighed since the last report, over all ranks."""
        sums, self._sums = run.sums(self._sums), {}
        if not sums.get("tokens"):
            return {}
        return {
            "importance_weight_mean": sums["mean"] / sums["tokens"],
            "importance_truncated_frac": sums["cut"] / sums["tokens"],
        }


def truncated_weights(
    trainer_logprobs: Float[Tensor, " N"],
    sampler_logprobs: Float[Tensor, " N"],
    rollout_index: Int[Tensor, " N"],
    level: str,
    cap: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return min(π/μ, cap) per token, detached, and where the cap cut it; cut before the exponential, so nothing overflows.

    Args:
        rollout_index: 0..B−1, which tokens' ratios are multiplied at level "sequence"; rollouts must be whole.
    """
    log_weights = (trainer_logprobs - sampler_logprobs).detach()
    if level == "sequence" and len(log_weights):
        log_weights = sum_by_rollout(log_weights, rollout_index, int(rollout_index.max()) + 1)[rollout_index]
    return log_weights.clamp(max=math.log(cap)).exp(), log_weights > math.log(cap)


# ------------------------------------------------------------------------------------------------- masked

MASKS = {  # metric → (level, default bounds)
    "ratio": ("token", 0.5, 5.0),
    "geometric_mean": ("sequence", 0.99, 1.01),
    "product": ("sequence", 0.5, 2.0),
    "mean_error": ("sequence", 0.0, 2.0),
    "any_ratio": ("sequence", 1e-4, 100.0),
}


class MismatchMask:
    """Leave out tokens or rollouts that the trainer finds much more or less likely than the sampler did; key `mismatch_mask`.

    Masked tokens stay in the denominator of the mean, their rewards in the group's mean: baselines do not change. It costs one
    more forward per round, shared with `importance_weights`.

    Args:
        metric: of r = π/μ: "ratio" masks single tokens (IcePop); "geometric_mean", "product", "mean_error" (the mean of
            exp|log r|) and "any_ratio" (one token outside) mask whole rollouts.
        low, high: what is kept; null is the published bound of the metric, see :data:`MASKS`.
        only: "negative" or "positive" masks only tokens whose advantage from the reward has this sign, "all" any token.
            DeepSeek-V3.2 (arXiv 2512.02556) masks rollouts of negative advantage whose mean log(μ/π) is above a bound of, for
            example, 0.5: ``metric="geometric_mean", low=exp(-0.5), high=inf, only="negative"``.
    """

    def __init__(self, metric: str = "ratio", low: float | None = None, high: float | None = None, only: str = "all") -> None:
        check_choice("mismatch_mask.metric", metric, MASKS)
        self.metric, (self.level, least, most) = metric, MASKS[metric]
        self.low, self.high = least if low is None else float(low), most if high is None else float(high)
        if not 0.0 <= self.low <= 1.0 <= self.high:
            raise InputError(
                f"mismatch_mask.low={self.low} and high={self.high} must satisfy 0 <= low <= 1 <= high: where sampler and "
                f"trainer agree the {metric} is 1"
            )
        check_choice("mismatch_mask.only", only, ("all", "negative", "positive"))
        self.only = only
        self._sums: dict[str, float] = {}
        self._kept: WeakKeyDictionary[RolloutKey, list[bool]] = WeakKeyDictionary()

    def weigh(self, rollouts: Sequence[Rollout], batch: Batch, trainer: Float[Tensor, " N"]) -> None:
        """Note what lies inside the bounds, under the weights that sampled."""
        kept = mismatch_kept(trainer, batch.ratio_logprobs, batch.rollout_index, self.metric, self.low, self.high)
        for rollout, keep in zip(rollouts, kept.split([rollout.policy_tokens for rollout in rollouts]), strict=True):
            self._kept[rollout.key] = keep.tolist()

    def mask(self, rollouts: Sequence[Rollout], advantages: Sequence[RolloutAdvantage], success_threshold: float) -> None:
        """Write 0 into ``loss_weights`` of what is masked, and count it; once per round, when its advantages are known."""
        for rollout, advantage in zip(rollouts, advantages, strict=True):
            inside = self._kept[rollout.key]
            values = advantage.tokens or [advantage.advantage] * len(inside)
            keep = [kept or not self._applies_to(value) for kept, value in zip(inside, values, strict=True)]
            masked, reward = keep.count(False), rollout.task_reward
            if masked:
                weights = rollout.loss_weights or [1.0] * len(keep)
                rollout.loss_weights = [weight * float(k) for weight, k in zip(weights, keep, strict=True)]
            counts = {"masked_tokens": masked, "masked_rollouts": masked > 0}
            if reward is not None:
                succeeded = reward >= success_threshold
                counts |= {"masked_successes": masked > 0 and succeeded, "_successes": succeeded}
            for name, value in counts.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def _applies_to(self, advantage: float) -> bool:
        return {"all": True, "negative": advantage < 0.0, "positive": advantage > 0.0}[self.only]

    def report(self, run: Run) -> dict[str, float]:
        """Return counts since the last report, over all ranks, and the share of the round's successes that they hold."""
        sums, self._sums = run.sums(self._sums), {}
        successes = sums.pop("_successes", 0.0)
        return sums | ({"masked_success_frac": sums["masked_successes"] / successes} if successes else {})


def mismatch_kept(
    trainer_logprobs: Float[Tensor, " N"],
    sampler_logprobs: Float[Tensor, " N"],
    rollout_index: Int[Tensor, " N"],
    metric: str,
    low: float,
    high: float,
) -> Bool[Tensor, " N"]:
    """Return where the metric of r = π/μ lies in [low, high]; of the token, or of its whole rollout."""
    gap = (trainer_logprobs - sampler_logprobs).detach().double()
    if not len(gap):
        return torch.ones_like(gap, dtype=torch.bool)
    rollouts = int(rollout_index.max()) + 1

    def summed(values: Tensor) -> Tensor:
        return sum_by_rollout(values.double(), rollout_index, rollouts)

    lengths = summed(torch.ones_like(gap)).clamp(min=1.0)
    least, most = math.log(low) if low > 0 else -math.inf, math.log(high)
    if metric in ("ratio", "any_ratio"):
        inside = (gap >= least) & (gap <= most)
        return inside if metric == "ratio" else (summed(~inside) == 0)[rollout_index]
    if metric == "mean_error":
        return (summed(gap.abs().exp()) / lengths <= high)[rollout_index]
    total = summed(gap) / (lengths if metric == "geometric_mean" else 1.0)
    return ((total >= least) & (total <= most))[rollout_index]


# ------------------------------------------------------------------------------------------------- both


class Corrections:
    """Score a round once under the weights that sampled, for `importance_weights` and for `mismatch_mask`."""

    def __init__(
        self, importance: TruncatedImportanceWeights | None, mask: MismatchMask | None, success_threshold: float = 1.0
    ) -> None:
        self.importance, self.mask, self.success_threshold = importance, mask, success_threshold

    def request(self, *views: ViewName) -> ScoreRequest:
        """Return what :meth:`weigh` needs of a batch: log-probs in the views that sampled."""
        return ScoreRequest(student_grad=False, teacher_grad=False, views=views, entropy=False)

    def weigh(self, rollouts: Sequence[Rollout], batch: Batch, scores: Scores) -> None:
        """Write importance weights onto each of the batch's rollouts and note its mismatch, before the round's first update."""
        if self.importance is not None:
            self.importance.weigh(rollouts, batch, scores)
        if self.mask is not None:
            self.mask.weigh(rollouts, batch, logprobs_of_samplers(rollouts, batch, scores))

    def report(self, run: Run) -> dict[str, float]:
        """Return metrics since the last report, over all ranks."""
        return {name: x for part in (self.importance, self.mask) if part is not None for name, x in part.report(run).items()}


def apply_mask(
    corrections: Corrections | None, rollouts: Sequence[Rollout], advantages: list[RolloutAdvantage]
) -> list[RolloutAdvantage]:
    """Write `mismatch_mask` onto the round's rollouts, once the signs of their advantages are known; return the advantages."""
    if corrections is not None and corrections.mask is not None:
        corrections.mask.mask(rollouts, advantages, corrections.success_threshold)
    return advantages


def load_mismatch(cfg: DictConfig, run: Run, sampler: Sampler, view: ViewName) -> tuple[MismatchMeter, "Corrections | None"]:
    """Return what measures the sampler against the trainer in ``view``, and what corrects for it, if the config asks for it."""
    return MismatchMeter(cfg, run, sampler, view), load_corrections(cfg)


def load_corrections(cfg: DictConfig) -> Corrections | None:
    """Return what `importance_weights` and `mismatch_mask` ask for; None where a config has neither."""
    importance, mask = build(cfg.get("importance_weights")), build(cfg.get("mismatch_mask"))
    if importance is None and mask is None:
        return None
    threshold = cfg.get("eval_success_threshold")
    return Corrections(importance, mask, 1.0 if threshold is None else float(threshold))


def logprobs_of_samplers(rollouts: Sequence[Rollout], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
    """Return the trainer's log-prob of each token in the view that sampled it."""
    by_teacher = [r.sampled_by == "teacher" for r in rollouts for _ in range(r.policy_tokens)]
    views = [view for view in ("student", "teacher") if getattr(scores, f"{view}_logprobs") is not None]
    first, last = scores.policy_logprobs(views[0]), scores.policy_logprobs(views[-1])
    return torch.where(torch.tensor(by_teacher, dtype=torch.bool, device=batch.targets.device), last, first)
