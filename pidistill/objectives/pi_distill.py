"""Train with π-Distill: joint teacher-student policy gradient on traces that the teacher samples (arXiv 2602.04942).

    J_T = E_{y~T}[R(y)] − β·kl(T||sg S)                         (Eq. 2, the teacher learns to use PI and stay imitable)
    J_S = E_{y~T}[(S/sg μ)·R(y)] − β·kl(sg T||S)                (Eq. 3, the student learns from the same traces)
    J   = α·J_T + (1−α)·J_S                                     (Eq. 4)

T is θ with privileged information (PI), S is θ without, μ the policy that sampled. The KL points T||S in both halves; only the
stop-gradient moves. The anchor is the live student: a frozen base as anchor collapses (the paper's appendix D.2).

What we do differently from the paper, all of it by configuration:
  1. `kl_mode: loss_rb` (the full-vocabulary KL as a loss) is the default; the paper's text describes `reward_rb`, which is not
     a gradient of the KL. `reward_k1` and `loss_rb_complete` are unbiased.
  2. β multiplies the KL summed over the sequence in every mode; the authors' trainer averages it over tokens in the reward
     (`kl_mode: reward_rb`, `kl_reward_scale: token_mean`, which averages the student half's KL too). With `loss_rb` and
     `loss_k2` `token_weight: MeanOverTokens` averages it; take it where answers are long, or the KL outweighs the reward and
     the teacher learns to answer as the student does.
  3. `student_kl: loss` is Eq. 3; `shared_reward` is their Algorithm 1 as printed, one advantage for both halves.
  4. `student_term` replaces the PPO term of the student half: `topr` (arXiv 2503.14286), `sft` (log S of the traces with a
     reward above 0, unweighted: rejection sampling when α=0 and β=0), `snis` (Σ_k w_k·log S(y_k), w = softmax over the group
     of log S − log μ + R/snis_beta, constants taken at the round's start).
  5. Zero-advantage rows stay (`drop_zero_advantage: row` is theirs), because their KL still teaches.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError, check_choice
from pidistill.losses.advantages import group_slots
from pidistill.losses.policy_gradient import importance_weighted, ppo_clip_loss, reinforce_loss, snis_weights, topr_loss
from pidistill.losses.rollout_advantages import rollout_advantages
from pidistill.losses.sampling_kl import SamplingKL
from pidistill.losses.token_weights import TokenWeight, divergences_of, weighted
from pidistill.objectives.base import (
    BOTH_KLS,
    Number,
    Objective,
    check_advantage,
    check_clip,
    check_token_weight,
    check_topr,
    distill_loss,
    distill_weight,
    drop_untold,
)
from pidistill.objectives.schedule import as_schedule
from pidistill.types import (
    Batch,
    Divergence,
    PerTokenLoss,
    Rollout,
    RolloutAdvantage,
    ScoreRequest,
    Scores,
    TokenLoss,
    ViewName,
)

STUDENT_KL = Divergence("kl_teacher_student", grad="student")


class PiDistill(Objective):
    """Minimise α·(teacher half) + (1−α)·(student half), both on the same teacher-sampled traces.

    Args:
        alpha: weight of the teacher half in [0, 1], or ``{start, end, steps}``. The paper uses 0, 0.5 and 1.
        beta: weight of the KL in nats summed over the sequence, or a schedule. The paper uses 0.25.
        kl_mode: how the teacher half's KL is estimated; see ``losses.sampling_kl.KL_MODES``.
        kl_gamma: discount of the future-KL term of ``loss_rb_complete``.
        kl_reward_scale: "sum", or, for ``reward_rb``, "token_mean": β multiplies the KL's mean over the answer's tokens, in the
            student half too.
        student_kl: the student half's KL: "loss" (Eq. 3), "shared_reward" (the teacher half's advantage, KL and all, and no
            term of its own; needs a reward ``kl_mode``), "none".
        student_term: "ppo" (Eq. 3), "topr", "sft" or "snis", for the student half; see 4. above.
        snis_beta: temperature of the reward in SNIS's weights, in reward per nat; null takes ``beta``.
        snis_level: "sequence" (log-ratios summed over the policy tokens: exact) or "token" (their mean: biased, but of usable
            effective sample size).
        ratio_denominator: of the student half: "behaviour" (μ, as recorded at sampling) or "live_teacher" (T as it is now).
        clip_low, clip_high: multiplicative bounds on the ratio.
        dual_clip: caps the ratio at this value where the advantage is negative.
        topr_low, topr_high, topr_level: truncation of TOPR's weight, per "token" or "sequence".
        advantage: "group_mean" (the paper's), "leave_one_out", "standardised", or "turn_returns" for process rewards.
        drop_zero_advantage: False, "policy_gradient" (no RL term, and no KL where it is part of the reward) or "row" (the
            rollout leaves every term and the token count).
        token_weight: see :mod:`pidistill.losses.token_weights`; acts on the KLs of both halves.
        no_pi: "rl" (a row without PI trains only by RL), "drop" or "error"; "distill" makes sense only with other weights.
    """

    def __init__(
        self,
        alpha: Number = 0.5,
        beta: Number = 0.25,
        kl_mode: str = "loss_rb",
        kl_gamma: float = 1.0,
        kl_reward_scale: str = "sum",
        student_kl: str = "loss",
        student_term: str = "ppo",
        ratio_denominator: str = "behaviour",
        clip_low: float = 0.8,
        clip_high: float = 1.2,
        dual_clip: float | None = None,
        topr_low: float = 0.0,
        topr_high: float = 1.0,
        topr_level: str = "token",
        advantage: str = "group_mean",
        drop_zero_advantage: str | bool = False,
        no_pi: str = "rl",
        snis_beta: float | None = None,
        snis_level: str = "token",
        token_weight: TokenWeight | None = None,
    ) -> None:
        check_choice("objective.student_kl", student_kl, ("loss", "shared_reward", "none"))
        check_choice("objective.student_term", student_term, ("ppo", "topr", "sft", "snis"))
        check_choice("objective.ratio_denominator", ratio_denominator, ("behaviour", "live_teacher"))
        check_choice("objective.no_pi", no_pi, ("rl", "distill", "drop", "error"))
        if ratio_denominator != "behaviour" and student_term in ("sft", "snis"):
            raise InputError(
                f"objective.ratio_denominator={ratio_denominator} is not read with student_term={student_term}, which "
                "has no ratio; leave it at behaviour"
            )
        check_clip(clip_low, clip_high, dual_clip)
        check_topr(topr_low, topr_high, topr_level, used=student_term == "topr")
        self.alpha = as_schedule("alpha", alpha, low=0.0, high=1.0)
        self.beta = as_schedule("beta", beta, low=0.0, high=float("inf"))
        self.kl = SamplingKL("teacher", kl_mode, kl_gamma, kl_reward_scale)
        check_advantage(advantage, drop_zero_advantage, self.kl)
        check_token_weight(token_weight, self.kl)
        check_snis(student_term, snis_beta, snis_level, self.kl)
        if student_term == "snis" and snis_beta is None and min(self.beta.start, self.beta.end) == 0.0:
            raise InputError(
                "student_term=snis divides the reward by objective.beta, which is 0; set objective.snis_beta above 0"
            )
        self.snis_beta, self.snis_level, self.token_weight = snis_beta, snis_level, token_weight
        if student_kl == "shared_reward" and not self.kl.in_reward:
            check_choice(
                "objective.kl_mode", kl_mode, ("reward_k1", "reward_rb"), because="student_kl=shared_reward shares a reward"
            )
        self.student_kl, self.student_term, self.ratio_denominator = student_kl, student_term, ratio_denominator
        # Not on `sft`, which has no ratio, and not on `snis`, which has importance weights of its own.
        self._weighs_student = student_term in ("ppo", "topr")
        self.takes_importance_weights = self._weighs_student or max(self.alpha.start, self.alpha.end) > 0
        self.needs_present_samples = self.kl.needs_present_samples
        self.clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        self.topr = {"low": topr_low, "high": topr_high, "level": topr_level}
        self.advantage, self.drop_zero_advantage, self.no_pi = advantage, drop_zero_advantage, no_pi

    # ------------------------------------------------------------------------------------------------ the round

    def sampling_view(self) -> ViewName:
        return "teacher"

    def samples_from_teacher_weights(self, step: int) -> bool:
        """Return whether α=0: the teacher half is absent then, and the `teacher` component's weights sample."""
        return self.alpha(step) == 0.0

    def behaviour_request(self) -> ScoreRequest | None:
        if self.student_term == "snis":
            return ScoreRequest(student_grad=False, teacher_grad=False, views=("student",), entropy=False)
        return self.kl.behaviour_request()

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        """Return, with SNIS, log S; else the estimate of kl(T||S)."""
        return scores.policy_logprobs("student") if self.student_term == "snis" else self.kl.behaviour_values(scores)

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        kl = self.kl.advantages(rollouts, self.beta(step), self.advantage, self.no_pi)
        result = rollout_advantages(rollouts, self.advantage, self.drop_zero_advantage, kl, kl_in_reward=self.kl.in_reward)
        result = drop_untold(self.no_pi, rollouts, result)
        if self.student_term != "snis":
            return result
        weights = self.snis_weights(rollouts, step)
        return [replace(advantage, snis_weight=weight) for advantage, weight in zip(result, weights, strict=True)]

    def snis_weights(self, rollouts: Sequence[Rollout], step: int) -> list[float]:
        """Return w_k × the group's size (1 on average), from log S and log μ of rollouts under the weights that sampled."""
        beta = self.beta(step) if self.snis_beta is None else self.snis_beta
        sampled = [[x for x, policy in zip(r.sampled_logprobs, r.policy_mask, strict=True) if policy] for r in rollouts]
        scale = [1 if self.snis_level == "sequence" else max(1, r.policy_tokens) for r in rollouts]
        student = torch.tensor([math.fsum(r.behaviour_values) / n for r, n in zip(rollouts, scale, strict=True)])
        behaviour = torch.tensor([math.fsum(x) / n for x, n in zip(sampled, scale, strict=True)])
        groups = torch.tensor([r.group for r in rollouts], dtype=torch.long)
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float32)
        slot, size = group_slots(groups)
        return (snis_weights(student, behaviour, rewards, beta, groups) * size[slot]).tolist() if rollouts else []

    # ------------------------------------------------------------------------------------------------ the update

    def coefficients(self, step: int) -> dict[str, float]:
        return {"alpha": self.alpha(step), "beta": self.beta(step)}

    def score_request(self, step: int) -> ScoreRequest:
        alpha = self.alpha(step)
        divergences = BOTH_KLS + divergences_of(self.token_weight)
        if alpha > 0:
            divergences += self.kl.loss_divergences()
        if alpha < 1 and self.student_kl == "loss":
            divergences += (STUDENT_KL,)
        return ScoreRequest(student_grad=alpha < 1, teacher_grad=alpha > 0, divergences=divergences)

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        """Return −J per policy token: α·teacher half + (1−α)·student half."""
        alpha = self.alpha(step)
        loss = torch.zeros_like(batch.advantages)
        metrics = {
            "ratio_mean": (scores.policy_logprobs("teacher") - batch.ratio_logprobs).detach().exp(),
            "clip_frac": 0.0 * loss,
        }
        if alpha > 0:
            half, clipped = self.teacher_half(batch, scores, step)
            loss = loss + alpha * half
            metrics["clip_frac"] = metrics["clip_frac"] + alpha * clipped
        if alpha < 1:
            half, ratio, clipped = self.student_half(batch, scores, step)
            loss = loss + (1 - alpha) * half
            metrics["clip_frac"] = metrics["clip_frac"] + (1 - alpha) * clipped
            metrics["student_ratio_mean"] = ratio
        return TokenLoss(loss, metrics)

    def per_token_loss(self, step: int) -> PerTokenLoss | None:
        """Return None with `topr_level: sequence`, whose ratio is of the whole rollout."""
        return None if self.topr["level"] == "sequence" else super().per_token_loss(step)

    def teacher_half(self, batch: Batch, scores: Scores, step: int) -> tuple[Tensor, Tensor]:
        """Return −J_T per token: PPO on T/μ plus, in the loss modes, β·kl(T||sg S). Gradient through T only."""
        advantages = batch.advantages if batch.kl_advantages is None else batch.advantages + batch.kl_advantages
        loss, _, clipped = ppo_clip_loss(scores.policy_logprobs("teacher"), batch.ratio_logprobs, advantages, **self.clip)
        loss, kl = importance_weighted(loss, batch.importance_weights), self.kl.token_loss(scores)
        if kl is not None:
            loss = loss + self.beta(step) * distill_weight(self.no_pi, batch) * weighted(self.token_weight, kl, batch, scores)
        return loss, clipped

    def student_half(self, batch: Batch, scores: Scores, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return −J_S per token: PPO on S/μ, or TOPR, plus β·kl(sg T||S). Gradient through S only."""
        advantages, denominator = batch.advantages, self._denominator(batch, scores)
        if self.student_kl == "shared_reward" and batch.kl_advantages is not None:
            advantages = advantages + batch.kl_advantages
        student = scores.policy_logprobs("student")
        ratio = (student - denominator).detach().exp()
        clipped = torch.zeros_like(ratio)
        if self.student_term == "ppo":
            loss, ratio, clipped = ppo_clip_loss(student, denominator, advantages, **self.clip)
        elif self.student_term == "topr":
            loss, ratio = topr_loss(student, denominator, advantages, rollout_index=batch.rollout_index, **self.topr)
        elif self.student_term == "sft":
            loss = reinforce_loss(scores.student_logprobs, (batch.rewards > 0).float())
        else:
            loss = reinforce_loss(student, batch.snis_weights)
        loss = importance_weighted(loss, batch.importance_weights if self._weighs_student else None)
        if self.student_kl == "loss":
            kl = distill_loss(STUDENT_KL, self.no_pi, self.token_weight, batch, scores)
            loss = loss + self.beta(step) * (kl / batch.rollout_tokens if self.kl.reward_scale == "token_mean" else kl)
        return loss, ratio, clipped

    def _denominator(self, batch: Batch, scores: Scores) -> Tensor:
        return batch.ratio_logprobs if self.ratio_denominator == "behaviour" else scores.policy_logprobs("teacher").detach()


def check_snis(student_term: str, beta: float | None, level: str, kl: SamplingKL) -> None:
    check_choice("objective.snis_level", level, ("sequence", "token"))
    if student_term != "snis" and (beta, level) != (None, "token"):
        raise InputError("objective.snis_beta and snis_level are read only with student_term=snis; set that, or remove them")
    if beta is not None and not beta > 0.0:
        raise InputError(f"objective.snis_beta={beta} must be above 0 (reward per nat), or null to take beta")
    if student_term == "snis" and kl.needs_behaviour:
        raise InputError(
            f"student_term=snis and kl_mode={kl.mode} each need their own numbers of the round before its update; set "
            "kl_mode: loss_rb"
        )
