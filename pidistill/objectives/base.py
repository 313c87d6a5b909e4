"""What every objective answers, and the pieces that more than one objective is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.advantages import group_mean, leave_one_out, standardised, turn_returns
from pidistill.divergences import check_divergence
from pidistill.errors import InputError
from pidistill.estimators import complete_kl_advantages
from pidistill.token_weights import TokenWeight, weighted
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

Number = float | Mapping[str, float]  # a constant, or {start, end, steps}

KL_TEACHER_STUDENT = Divergence("kl_teacher_student", grad="none")
KL_STUDENT_TEACHER = Divergence("kl_student_teacher", grad="none")
BOTH_KLS = (KL_TEACHER_STUDENT, KL_STUDENT_TEACHER)  # reported by every run that looks at both views, whatever is trained


@runtime_checkable
class Objective(Protocol):
    """One method: which numbers it needs of a batch, and the loss per policy token it makes of them.

    A method subclasses this and says what differs; as written here it samples from the student, looks at no KL before the
    update and has no reward-free rows to drop.

    Attributes:
        uses_teacher: False where the method never looks at the teacher view (plain RL).
        no_pi: what happens to rows without privileged information: "rl", "distill", "drop" or "error".
        guides_failed_groups: a group without any reward is sampled again from the view with privileged information.
        on_policy_frac: share of the prompts that are answered by the policy; the others by the dataset's own completion.
        takes_importance_weights: its policy-gradient loss is multiplied with ``Batch.importance_weights`` where there are any.
    """

    uses_teacher: bool = True
    no_pi: str = "rl"
    guides_failed_groups: bool = False
    on_policy_frac: float = 1.0
    takes_importance_weights: bool = False

    def sampling_view(self) -> ViewName:
        """The view whose prompt the sampler sees."""
        return "student"

    def samples_from_teacher_weights(self, step: int) -> bool:
        """True where the sampler is the `teacher` component's weights rather than the trained model's."""
        return False

    def behaviour_request(self) -> ScoreRequest | None:
        """Numbers needed of a whole round, without gradient, before its first update; None for nothing."""
        return None

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        """From those numbers, the one per policy token that :meth:`advantages` finds as ``Rollout.behaviour_nats``."""
        raise NotImplementedError(f"{type(self).__name__} asks for no number before the update")

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        """One advantage per rollout of a round made of whole groups."""
        return rollout_advantages(rollouts, "group_mean", drop_zero_advantage=False)

    def coefficients(self, step: int) -> dict[str, float]:
        """The weights in force at this step, for the log."""
        return {}

    def score_request(self, step: int) -> ScoreRequest:
        """Numbers needed of a micro-batch in an update."""
        ...

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        """Loss per policy token, to be minimised; not masked, not averaged."""
        ...

    def per_token_loss(self, step: int) -> PerTokenLoss | None:
        """The loss as :func:`pidistill.scoring.score` takes it, on any slice of a batch.

        None where a token's loss depends on the numbers of other tokens; the head then runs a second time in the backward.
        """
        return lambda batch, scores: self.token_loss(batch, scores, step).loss


# -------------------------------------------------------------------------------- the KL of the view that samples

KL_MODES = {
    "loss_rb": "full-vocabulary KL at each token as a loss (pathwise gradient; low variance, ignores how tokens move later KL)",
    "loss_rb_complete": "loss_rb plus the future-KL term; with kl_gamma=1 the whole gradient of the sequence KL",
    "loss_k2": "half the squared log-ratio of the sampled token as a loss; its expected gradient is that of loss_rb",
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
    """kl(P||sg Q) of the sequence, y ~ P: P the view that samples and is trained, Q the other one.

    Attributes:
        policy: P.
        mode: a key of ``KL_MODES``.
        gamma: discount of the future-KL term of ``loss_rb_complete``: 0 is ``loss_rb``, 1 the complete gradient.
        reward_scale: "sum" (nats of the whole sequence) or "token_mean"; only for ``reward_rb``.
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
        if self.mode not in KL_MODES:
            raise InputError(f"objective.kl_mode={self.mode} is unknown; choose one of {', '.join(KL_MODES)}")
        if not 0.0 <= self.gamma <= 1.0:
            raise InputError(f"objective.kl_gamma={self.gamma} is outside [0, 1]")
        if self.gamma != 1.0 and self.mode != "loss_rb_complete":
            raise InputError(f"objective.kl_gamma={self.gamma} needs kl_mode=loss_rb_complete, not {self.mode}")
        if self.reward_scale not in ("sum", "token_mean"):
            raise InputError(f"objective.kl_reward_scale={self.reward_scale} is unknown; choose sum or token_mean")
        if self.reward_scale == "token_mean" and self.mode != "reward_rb":
            raise InputError(f"objective.kl_reward_scale=token_mean needs kl_mode=reward_rb, not {self.mode}")

    @property
    def in_reward(self) -> bool:
        return self.mode in ("reward_k1", "reward_rb")

    @property
    def needs_behaviour(self) -> bool:
        return self.in_reward or self.mode == "loss_rb_complete"

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
            return self._log_ratio(scores)
        return scores.divergences[self.divergence()]

    def token_loss(self, scores: Scores) -> Float[Tensor, " N"] | None:
        """The term to minimise per token, with gradient through P only; None in the reward modes."""
        if self.in_reward:
            return None
        if self.mode == "loss_k2":
            return 0.5 * self._log_ratio(scores) ** 2
        return scores.divergences[self.divergence(self.policy)]

    def advantages(self, rollouts: Sequence[Rollout], beta: float, advantage: str, no_pi: str) -> list[list[float]] | None:
        """Per policy token, what this term adds to the reward's advantage for P; None where it adds nothing."""
        if not self.needs_behaviour:
            return None
        kls = [
            _fp32(r.behaviour_nats if r.prompts.has_privileged or no_pi == "distill" else [0.0] * r.policy_tokens)
            for r in rollouts
        ]
        groups = [r.group for r in rollouts]
        if self.mode == "loss_rb_complete":
            to_go = complete_kl_advantages(kls, groups, self.gamma)
            return [(-beta * x).tolist() for x in to_go]
        penalties = [float(k.sum() if self.reward_scale == "sum" else k.mean()) if len(k) else 0.0 for k in kls]
        rewards = [r.reward for r in rollouts]
        with_kl = group_advantages(advantage, [x - beta * p for x, p in zip(rewards, penalties, strict=True)], groups)
        without = group_advantages(advantage, rewards, groups)
        return [[a - b] * r.policy_tokens for a, b, r in zip(with_kl, without, rollouts, strict=True)]

    def _log_ratio(self, scores: Scores) -> Float[Tensor, " N"]:
        """log P − log sg Q of the sampled token."""
        if self.policy == "teacher":
            return scores.teacher_logprobs - scores.student_logprobs.detach()
        return scores.student_logprobs - scores.teacher_logprobs.detach()


def distill_weight(no_pi: str, batch: Batch) -> Float[Tensor, " N"]:
    """1 where the KL term counts: on rows with privileged information, and on all of them with `no_pi: distill`."""
    ones = torch.ones_like(batch.has_privileged, dtype=torch.float32)
    return ones if no_pi == "distill" else ones * batch.has_privileged


def _fp32(values: Sequence[float]) -> Float[Tensor, " T"]:
    return torch.tensor(values, dtype=torch.float32)


# -------------------------------------------------------------------------------- distillation of the student's own samples


def student_divergence(name: str, jsd_beta: float, **options: Any) -> Divergence:
    """The divergence an objective's keys `divergence` and `jsd_beta` name, with gradient to the student alone."""
    check_choice("divergence", name, ("kl_teacher_student", "kl_student_teacher", "jsd"))
    if not 0.0 < jsd_beta < 1.0:
        raise InputError(
            f"objective.jsd_beta={jsd_beta} must lie inside (0, 1); the ends are divergence: kl_teacher_student (0) and "
            "kl_student_teacher (1)"
        )
    divergence = Divergence(name, grad="student", beta=jsd_beta if name == "jsd" else None, **options)
    check_divergence(divergence)
    return divergence


def distill_request(divergence: Divergence) -> ScoreRequest:
    """Student with gradient, teacher without; both KLs for the log beside ``divergence``."""
    return ScoreRequest(student_grad=True, teacher_grad=False, divergences=(*BOTH_KLS, divergence))


def distill_loss(
    divergence: Divergence, no_pi: str, token_weight: TokenWeight | None, batch: Batch, scores: Scores
) -> Float[Tensor, " N"]:
    """The divergence per token, on the rows and tokens that count."""
    term = weighted(token_weight, scores.divergences[divergence], batch, scores)
    return term.masked_fill(distill_weight(no_pi, batch) == 0, 0.0)  # 0 · inf would be NaN


# -------------------------------------------------------------------------------- advantages of a round

_ADVANTAGES = {"group_mean": group_mean, "leave_one_out": leave_one_out, "standardised": standardised}
ADVANTAGES = (*_ADVANTAGES, "turn_returns")


def group_advantages(name: str, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    return _ADVANTAGES[name](_fp32(rewards), torch.tensor(groups, dtype=torch.long)).tolist()


def rollout_advantages(
    rollouts: Sequence[Rollout],
    advantage: str,
    drop_zero_advantage: str | bool,
    kl: list[list[float]] | None = None,
    *,
    kl_in_reward: bool = False,
) -> list[RolloutAdvantage]:
    """Group-relative advantages of a round of whole groups; what "zero" drops is judged on the reward without KL.

    "policy_gradient" takes a KL that is part of the reward along; one that is a loss, its future term included, stays.
    Demonstrations, which have no reward, get 0.
    """
    sampled = [r for r in rollouts if r.reward is not None]
    groups = [r.group for r in sampled]
    if advantage == "turn_returns":
        of_tokens = iter(turn_return_advantages(sampled))
        values = ((max(map(abs, tokens), default=0.0), tokens) for tokens in of_tokens)
    else:
        values = ((value, None) for value in group_advantages(advantage, [r.reward for r in sampled], groups))
    result = []
    for i, rollout in enumerate(rollouts):
        reward, tokens = (0.0, None) if rollout.reward is None else next(values)
        own_kl = kl[i] if kl is not None else None
        if reward == 0.0 and drop_zero_advantage == "policy_gradient" and kl_in_reward:
            own_kl = [0.0] * len(own_kl)
        keep = not (reward == 0.0 and drop_zero_advantage == "row")
        result.append(RolloutAdvantage(reward, own_kl, keep=keep, tokens=tokens))
    return result


def turn_return_advantages(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Per policy token, the advantage of its turn from the environment's reward per turn; see :func:`turn_returns`."""
    for rollout in rollouts:
        if sum(rollout.turn_policy_tokens) != rollout.policy_tokens:
            raise InputError(
                f"{rollout.example.id}: objective.advantage=turn_returns needs a reward and a length per turn, and turns of "
                f"{sum(rollout.turn_policy_tokens)} tokens do not make up its {rollout.policy_tokens} policy tokens"
            )
    per_turn = turn_returns([r.turn_rewards for r in rollouts], [r.group for r in rollouts])
    return [
        [value for value, length in zip(values, r.turn_policy_tokens, strict=True) for _ in range(length)]
        for values, r in zip(per_turn, rollouts, strict=True)
    ]


# -------------------------------------------------------------------------------- checks at construction


def check_choice(key: str, value: object, choices: tuple, because: str = "") -> None:
    # `in` alone would take 0 for False.
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        reason = f" ({because})" if because else ""
        raise InputError(
            f"objective.{key}={value} is not one of {', '.join(map(str, choices))}{reason}; change objective.{key}"
        )


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0.0 <= clip_low < 1.0:
        raise InputError(
            f"objective.clip_low={clip_low} must lie in [0, 1): bounds multiply the ratio, 0.8 means at most 20% less"
        )
    if not clip_high > 1.0:
        raise InputError(
            f"objective.clip_high={clip_high} must be above 1: bounds multiply the ratio, 1.2 means at most 20% more"
        )
    if dual_clip is not None and not dual_clip > 1.0:
        raise InputError(f"objective.dual_clip={dual_clip} must be above 1, or null for none")


def check_topr(low: float, high: float, level: str, used: bool) -> None:
    check_choice("topr_level", level, ("token", "sequence"))
    if not used and (low, high, level) != (0.0, 1.0, "token"):
        raise InputError(
            "objective.topr_low, topr_high and topr_level are read with student_term=topr only; set it, or leave them"
        )
    if not 0.0 <= low <= high:
        raise InputError(f"objective.topr_low={low} and objective.topr_high={high} must satisfy 0 <= topr_low <= topr_high")


def check_advantage(advantage: str, drop_zero_advantage: str | bool, kl: SamplingKL | None = None) -> None:
    check_choice("advantage", advantage, ADVANTAGES)
    check_choice("drop_zero_advantage", drop_zero_advantage, (False, "policy_gradient", "row"))
    if advantage == "turn_returns" and kl is not None and kl.in_reward:
        raise InputError(
            f"objective.advantage=turn_returns gives every turn its own advantage and kl_mode={kl.mode} one number to the "
            "sequence; set a kl_mode that is a loss"
        )


def check_token_weight(token_weight: TokenWeight | None, kl: SamplingKL) -> None:
    if token_weight is not None and kl.mode not in ("loss_rb", "loss_k2"):
        raise InputError(
            f"objective.token_weight acts on a KL that is a loss of its own token, and kl_mode={kl.mode} reaches others; set "
            "kl_mode: loss_rb"
        )
