"""Define what every objective answers, and the pieces that more than one objective is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.components import resolve
from pidistill.errors import InputError, check_choice, check_share
from pidistill.losses.divergences import NAMES as DIVERGENCE_NAMES
from pidistill.losses.divergences import check_divergence, divergence
from pidistill.losses.rollout_advantages import ADVANTAGES, rollout_advantages
from pidistill.losses.sampling_kl import SamplingKL
from pidistill.losses.token_weights import TokenWeight, divergences_of, weight_metrics, weighted
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
    """Say for one method which numbers it needs of a batch, and the loss per policy token it makes of them.

    A method subclasses this and says what differs; as written here it samples from the student, looks at no KL before the
    update and has no reward-free rows to drop.

    Attributes:
        uses_teacher: False where the method never looks at the teacher view (plain RL).
        no_pi: what happens to rows without privileged information: "rl", "distill", "drop" or "error".
        guides_failed_groups: a group without any reward is sampled again from the view with privileged information.
        on_policy_frac: share of the prompts that are answered by the policy; the others by the dataset's own completion.
        takes_importance_weights: its policy-gradient loss is multiplied with ``Batch.importance_weights`` where there are any.
        needs_present_samples: the setting, as "key=value", under which its loss is right for samples of the present weights'
            whole distribution alone, so that `rollout_lag: 1`, `updates_per_round` above 1, top-p and top-k are refused; empty
            where ratios correct for these or no sampled token is looked at.
    """

    uses_teacher: bool = True
    no_pi: str = "rl"
    guides_failed_groups: bool = False
    on_policy_frac: float = 1.0
    takes_importance_weights: bool = False
    needs_present_samples: str = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Objective":
        missing = [name for name in ("score_request", "token_loss") if getattr(cls, name) is getattr(Objective, name)]
        if missing:
            raise InputError(
                f"objective {cls.__name__} has no method {' and no method '.join(missing)}; every objective says in "
                "score_request which numbers it needs, and in token_loss what it makes of them"
            )
        return super().__new__(cls)

    def sampling_view(self) -> ViewName:
        """Return the view whose prompt the sampler sees."""
        return "student"

    def samples_from_teacher_weights(self, step: int) -> bool:
        """Return whether the sampler is the `teacher` component's weights rather than the trained model's."""
        return False

    def behaviour_request(self) -> ScoreRequest | None:
        """Return the numbers needed of a whole round, without gradient, before its first update; None for nothing."""
        return None

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        """Return, from those numbers, the one per token that :meth:`advantages` finds as ``Rollout.behaviour_values``."""
        raise NotImplementedError(f"{type(self).__name__} asks for no number before the update")

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        """Return one advantage per rollout of a round made of whole groups."""
        return drop_untold(self.no_pi, rollouts, rollout_advantages(rollouts, "group_mean", drop_zero_advantage=False))

    def coefficients(self, step: int) -> dict[str, float]:
        """Return the objective's weights at this step, for the log."""
        return {}

    def score_request(self, step: int) -> ScoreRequest:
        """Return the numbers needed of a micro-batch in an update."""
        ...

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        """Return the loss per policy token, to be minimised; not masked, not averaged."""
        ...

    def weighted_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        """Return :meth:`token_loss` times ``Batch.loss_weights``: masks and weights that act on every term of any method."""
        answer = self.token_loss(batch, scores, step)
        metrics = answer.metrics | weight_metrics(getattr(self, "token_weight", None), batch, scores)
        if batch.loss_weights is None:
            return TokenLoss(answer.loss, metrics)
        return TokenLoss(answer.loss.masked_fill(batch.loss_weights == 0, 0.0) * batch.loss_weights, metrics)

    def per_token_loss(self, step: int) -> PerTokenLoss | None:
        """Return the loss as :func:`pidistill.scoring.score.score` takes it, on any slice of a batch.

        None where a token's loss depends on the numbers of other tokens; the head then runs a second time in the backward.
        """
        return lambda batch, scores: self.weighted_loss(batch, scores, step).loss


def drop_untold(no_pi: str, rollouts: Sequence[Rollout], advantages: Sequence[RolloutAdvantage]) -> list[RolloutAdvantage]:
    """Drop, with `no_pi: drop`, rollouts without any privileged information from the loss and from the token count.

    Rows without it are dropped at load, except where it comes with the rollouts, or where the parts of a routed objective
    differ in `no_pi`. Rewards of dropped rollouts stay in the group's mean.
    """
    if no_pi != "drop":
        return list(advantages)
    pairs = zip(rollouts, advantages, strict=True)
    return [replace(a, keep=a.keep and any(rollout.tokens_with_privileged())) for rollout, a in pairs]


def distill_weight(no_pi: str, batch: Batch) -> Float[Tensor, " N"]:
    """Return 1 where the KL term counts: on rows with privileged information, and on all with `no_pi: distill`."""
    ones = torch.ones_like(batch.has_privileged, dtype=torch.float32)
    return ones if no_pi == "distill" else ones * batch.has_privileged


# -------------------------------------------------------------------------------- distillation of the student's own samples


def student_divergence(name: str, jsd_beta: float, choices: tuple[str, ...] = DIVERGENCE_NAMES, **options: Any) -> Divergence:
    """Return the divergence that an objective's keys `divergence` and `jsd_beta` name, with gradient only to the student.

    A name with a dot is the path of a function of one's own, see :class:`pidistill.types.Divergence`.
    """
    if isinstance(name, str) and "." in name:
        return own_divergence(name, **options)
    check_choice("objective.divergence", name, choices)
    ends = "the ends are divergence: kl_teacher_student (0) and kl_student_teacher (1)"
    check_share("objective.jsd_beta", jsd_beta, ends, "(0, 1)")
    request = Divergence(name, grad="student", beta=jsd_beta if name == "jsd" else None, **options)
    check_divergence(request)
    return request


def own_divergence(path: str, **options: Any) -> Divergence:
    """Return the divergence of the function under a dotted path, after a trial on two small distributions."""
    fn = resolve(path)
    if not callable(fn):
        raise InputError(
            f"objective.divergence={path} is not a function; name one that takes teacher and student log-probs [C, V]"
        )
    request = Divergence(path.rsplit(".", 1)[1], grad="student", fn=fn, **options)
    check_divergence(request)
    teacher = torch.log_softmax(torch.arange(10.0).view(2, 5), -1)
    student = torch.log_softmax(torch.zeros(2, 5), -1).requires_grad_()
    with torch.enable_grad():
        try:
            value = divergence(replace(request, top_k=None), teacher, student)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"objective.divergence={path} raised {type(error).__name__} ({error}) on log-probs of shape [2, 5]; it must "
                "take those of the teacher and of the student and give one number per token"
            ) from error
    if not value.requires_grad:
        raise InputError(
            f"objective.divergence={path} has no gradient to the student's log-probs; compute it from them in torch"
        )
    return request


def distill_request(divergence: Divergence, token_weight: TokenWeight | None = None) -> ScoreRequest:
    """Ask for the student with gradient, the teacher without, both KLs for the log, and what ``token_weight`` reads."""
    divergences = (*BOTH_KLS, divergence, *divergences_of(token_weight))
    return ScoreRequest(student_grad=True, teacher_grad=False, divergences=divergences)


def distill_loss(
    divergence: Divergence, no_pi: str, token_weight: TokenWeight | None, batch: Batch, scores: Scores
) -> Float[Tensor, " N"]:
    """Return the divergence per token, on the rows and tokens that count."""
    term = weighted(token_weight, scores.divergences[divergence], batch, scores)
    return term.masked_fill(distill_weight(no_pi, batch) == 0, 0.0)  # 0 · inf would be NaN


# -------------------------------------------------------------------------------- checks at construction


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    check_share("objective.clip_low", clip_low, "bounds multiply the ratio, 0.8 means at most 20% less", "[0, 1)")
    if not clip_high > 1.0:
        raise InputError(
            f"objective.clip_high={clip_high} must be above 1: bounds multiply the ratio, 1.2 means at most 20% more"
        )
    if dual_clip is not None and not dual_clip > 1.0:
        raise InputError(f"objective.dual_clip={dual_clip} must be above 1, or null for none")


def check_topr(low: float, high: float, level: str, used: bool) -> None:
    check_choice("objective.topr_level", level, ("token", "sequence"))
    if not used and (low, high, level) != (0.0, 1.0, "token"):
        raise InputError(
            "objective.topr_low, topr_high and topr_level are read only with student_term=topr; set that, or remove them"
        )
    if not 0.0 <= low <= high:
        raise InputError(f"objective.topr_low={low} and objective.topr_high={high} must satisfy 0 <= topr_low <= topr_high")


def check_advantage(advantage: str, drop_zero_advantage: str | bool, kl: SamplingKL | None = None) -> None:
    check_choice("objective.advantage", advantage, ADVANTAGES)
    check_choice("objective.drop_zero_advantage", drop_zero_advantage, (False, "policy_gradient", "row"))
    if advantage == "turn_returns" and kl is not None and kl.in_reward:
        raise InputError(
            f"objective.advantage=turn_returns gives every turn its own advantage and kl_mode={kl.mode} one number to the "
            "sequence; set a kl_mode that is a loss"
        )


def check_token_weight(token_weight: TokenWeight | None, kl: SamplingKL) -> None:
    if token_weight is not None and kl.mode not in ("loss_rb", "loss_k2"):
        raise InputError(
            f"objective.token_weight acts on a KL that is a loss of its own token, and kl_mode={kl.mode} reaches others; set "
            "objective.kl_mode=loss_rb or objective.token_weight=null"
        )
