"""Weigh the KL of the view that samples: in the reward, as a loss, or as a loss with the future term."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError, check_choice, check_share
from pidistill.losses.estimators import complete_kl_advantages, k1, k2
from pidistill.losses.rollout_advantages import as_fp32, group_advantages
from pidistill.types import Divergence, Rollout, ScoreRequest, Scores, ViewName

# -------------------------------------------------------------------------------- the KL of the view that samples

KL_MODES = {
    "loss_rb": "full-vocabulary KL at each token as a loss (pathwise gradient; low variance, ignores how tokens move later KL)",
    "loss_rb_complete": "loss_rb plus the future-KL term; with kl_gamma=1 the whole gradient of the sequence KL",
    "loss_k2": "half the squared log-ratio of the sampled token as a loss; its expected gradient is that of loss_rb on samples "
    "of the present weights without top-p and top-k, so that these and updates_per_round above 1 are refused",
    "reward_k1": "the sequence's summed log-ratio, taken from the reward; unbiased, high variance",
    "reward_rb": "the sequence's summed full-vocabulary KL, taken from the reward; the paper's text, biased",
}

REFUSED_KL_MODES = {
    "loss_k1": "the log-ratio of a token as a loss has zero expected gradient through the policy that sampled the token",
    "loss_k3": "differentiated through the policy that sampled the token, k3 follows the other KL's gradient, not its own",
    "advantage_rb": "a token's own full-vocabulary KL as that token's advantage has zero expected gradient",
}


@dataclass(frozen=True)
class SamplingKL:
    """Weigh kl(P||sg Q) of the sequence, y ~ P: P the view that samples and is trained, Q the other one.

    Attributes:
        policy: P.
        mode: a key of ``KL_MODES``.
        gamma: discount of the future-KL term of ``loss_rb_complete``: 0 is ``loss_rb``, 1 the complete gradient.
        reward_scale: "sum" (nats of the whole sequence) or "token_mean" (their mean); only for ``reward_rb``.
    """

    policy: ViewName
    mode: str = "loss_rb"
    gamma: float = 1.0
    reward_scale: str = "sum"

    def __post_init__(self) -> None:
        if self.mode in REFUSED_KL_MODES:
            raise InputError(
                f"objective.kl_mode={self.mode} is refused: {REFUSED_KL_MODES[self.mode]}; use loss_rb or reward_k1"
            )
        check_choice("objective.kl_mode", self.mode, KL_MODES)
        check_share("objective.kl_gamma", self.gamma, "it discounts the KL of later tokens")
        if self.gamma != 1.0 and self.mode != "loss_rb_complete":
            raise InputError(f"objective.kl_gamma={self.gamma} needs kl_mode=loss_rb_complete, not {self.mode}")
        check_choice("objective.kl_reward_scale", self.reward_scale, ("sum", "token_mean"))
        if self.reward_scale == "token_mean" and self.mode != "reward_rb":
            raise InputError(f"objective.kl_reward_scale=token_mean needs kl_mode=reward_rb, not {self.mode}")

    @property
    def in_reward(self) -> bool:
        return self.mode in ("reward_k1", "reward_rb")

    @property
    def needs_behaviour(self) -> bool:
        return self.in_reward or self.mode == "loss_rb_complete"

    @property
    def needs_present_samples(self) -> str:
        """Return the setting whose expected gradient is right on samples of P alone: it has no ratio to another policy."""
        return "kl_mode=loss_k2" if self.mode == "loss_k2" else ""

    def divergence(self, grad: ViewName | Literal["none"] = "none") -> Divergence:
        return Divergence("kl_teacher_student" if self.policy == "teacher" else "kl_student_teacher", grad=grad)

    def loss_divergences(self) -> tuple[Divergence, ...]:
        return (self.divergence(self.policy),) if self.mode in ("loss_rb", "loss_rb_complete") else ()

    def behaviour_request(self) -> ScoreRequest | None:
        if not self.needs_behaviour:
            return None
        divergences = () if self.mode == "reward_k1" else (self.divergence(),)
        return ScoreRequest(student_grad=False, teacher_grad=False, divergences=divergences, entropy=False)

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        if self.mode == "reward_k1":
            return k1(*self._logprobs(scores))
        return scores.divergences[self.divergence()]

    def token_loss(self, scores: Scores) -> Float[Tensor, " N"] | None:
        """Return the term to minimise per token, with gradient through P only; None in the reward modes."""
        if self.in_reward:
            return None
        if self.mode == "loss_k2":
            return k2(*self._logprobs(scores))
        return scores.divergences[self.divergence(self.policy)]

    def advantages(self, rollouts: Sequence[Rollout], beta: float, advantage: str, no_pi: str) -> list[list[float]] | None:
        """Return, per policy token, what this term adds to the reward's advantage for P; None where it adds nothing.

        The KL is compared among those rollouts of a group that are distilled; the others get 0. It stays in nats: divided by
        its own deviation in the group, as `standardised` divides the reward, it would no longer depend on β.
        """
        if not self.needs_behaviour:
            return None
        result = [[0.0] * rollout.policy_tokens for rollout in rollouts]
        distilled = [i for i, rollout in enumerate(rollouts) if _is_distilled(rollout, no_pi)]
        kls = [as_fp32(_distilled_values(rollouts[i], no_pi)) for i in distilled]
        groups = [rollouts[i].group for i in distilled]
        if self.mode == "loss_rb_complete":
            values = [x.tolist() for x in complete_kl_advantages(kls, groups, self.gamma)]
        else:
            penalties = [float(k.sum() if self.reward_scale == "sum" else k.mean()) if len(k) else 0.0 for k in kls]
            centred = group_advantages("group_mean" if advantage == "standardised" else advantage, penalties, groups)
            values = [[x] * len(k) for x, k in zip(centred, kls, strict=True)]
        for i, own in zip(distilled, values, strict=True):
            result[i] = [-beta * x for x in own]
        return result

    def _logprobs(self, scores: Scores) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return log P and log sg Q of the sampled token."""
        if self.policy == "teacher":
            return scores.teacher_logprobs, scores.student_logprobs.detach()
        return scores.student_logprobs, scores.teacher_logprobs.detach()


def _is_distilled(rollout: Rollout, no_pi: str) -> bool:
    return no_pi == "distill" or rollout.prompts.has_privileged or any(rollout.tokens_with_privileged())


def _distilled_values(rollout: Rollout, no_pi: str) -> list[float]:
    """Return the KL of each policy token that is distilled, and 0 of the others; see :func:`distill_weight`."""
    told = [True] * rollout.policy_tokens if no_pi == "distill" else rollout.tokens_with_privileged()
    return [value if counts else 0.0 for value, counts in zip(rollout.behaviour_values, told, strict=True)]
