"""Say which tokens a term counts, and how much: one line in the config of any objective.

    objective:
      token_weight: {_component_: pidistill.losses.token_weights.SkipFirst, tokens: 3}

A token weight takes the term of a method (its divergence, or its policy gradient where it has no other), one number per policy
token, and returns it with some tokens changed. The denominator of the mean stays all policy tokens of the step, so that leaving
tokens out lowers the term and never inflates the others. Weights are constants: gradient reaches only the term.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError, check_share
from pidistill.losses.token_gap import token_gap
from pidistill.types import Batch, Divergence, Scores

TokenWeight = Callable[[Float[Tensor, " N"], Batch, Scores], Float[Tensor, " N"]]


def divergences_of(token_weight: TokenWeight | None) -> tuple[Divergence, ...]:
    """Return the divergences, without gradient, that a token weight reads beside the term of its method."""
    return tuple(getattr(token_weight, "divergences", ()))


def weighted(token_weight: TokenWeight | None, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
    return term if token_weight is None else token_weight(term, batch, scores)


def weight_metrics(token_weight: TokenWeight | None, batch: Batch, scores: Scores) -> dict[str, Float[Tensor, " N"]]:
    """Return what a token weight multiplies with, per token, and where that is 0, for the log."""
    if token_weight is None:
        return {}
    weights = weighted(token_weight, torch.ones(len(batch.targets), device=batch.targets.device), batch, scores).detach()
    return {"token_weight_mean": weights, "token_weight_zero_frac": weights == 0}


@dataclass(frozen=True)
class SkipFirst:
    """Give 0 to the first ``tokens`` policy tokens of every completion (SDFT, arXiv 2601.19897, skips 3)."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise InputError(f"token_weight.tokens={self.tokens} must be at least 0")

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        return term.masked_fill(batch.token_index < self.tokens, 0.0)


@dataclass(frozen=True)
class ClipTerm:
    """Bound the term to ``max_nats`` per token: min(term, max_nats); a clipped token has no gradient."""

    max_nats: float

    def __post_init__(self) -> None:
        if not self.max_nats > 0.0:
            raise InputError(f"token_weight.max_nats={self.max_nats} must be above 0, or no token has a gradient")

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        return term.clamp(max=self.max_nats)


@dataclass(frozen=True)
class EntropyMask:
    """Keep only tokens whose next-token entropy in ``view`` lies in [min_nats, max_nats]."""

    min_nats: float = 0.0
    max_nats: float = float("inf")
    view: str = "student"

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_nats < self.max_nats or self.view not in ("student", "teacher"):
            raise InputError(
                f"token_weight needs 0 <= min_nats < max_nats and view student or teacher, not min_nats={self.min_nats}, "
                f"max_nats={self.max_nats}, view={self.view}"
            )

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        entropy = scores.student_entropy if self.view == "student" else scores.teacher_entropy
        if entropy is None:
            raise InputError(
                f"token_weight.view={self.view} is not scored by this `objective`; set token_weight.view to the other one"
            )
        return term.masked_fill(~((entropy >= self.min_nats) & (entropy <= self.max_nats)), 0.0)


@dataclass(frozen=True)
class SignGate:
    """Keep only tokens on which teacher and reward agree: sign(log T − log S) of the sampled token = sign of its advantage.

    In a rollout better than its group the teacher may make tokens likelier, in a worse one less likely. Rollouts of
    advantage 0 are left out.
    """

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        if scores.teacher_logprobs is None or batch.advantages is None:
            raise InputError(
                "token_weight SignGate needs a teacher and a reward, and this `objective` lacks one; remove token_weight"
            )
        return term.masked_fill(~(token_gap(scores) * batch.advantages > 0), 0.0)


@dataclass(frozen=True)
class PositionDecay:
    """Weigh by 0.5^(t / half_life) for policy token t = 0, 1, … of its completion."""

    half_life: float

    def __post_init__(self) -> None:
        if not self.half_life > 0.0:
            raise InputError(f"token_weight.half_life={self.half_life} must be above 0 (in policy tokens)")

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        return term * torch.exp2(-batch.token_index / self.half_life)


@dataclass(frozen=True)
class MeanOverTokens:
    """Divide by the number of policy tokens of the token's rollout, so that `beta` weighs the term's mean, not its sum.

    A divergence summed over a long answer outweighs a reward of 1. The published trainer of π-Distill (arXiv 2602.04942)
    averages the KL over tokens; its beta of 0.25 is this one. Long and short rollouts then count alike.
    """

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        return term / batch.rollout_tokens


@dataclass(frozen=True)
class TurnBalance:
    """Weigh by (1 − share) + share·N/(K·n): turns count alike, not tokens (TurnOPD, arXiv 2607.05804, from its abstract).

    N is the rollout's policy tokens, K its turns, n those of the token's turn, so that the weights of a rollout sum to N. A
    rollout of one turn has weight 1.

    Attributes:
        share: 0 leaves every token alike, 1 every turn.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        check_share("token_weight.share", self.share, "0 is tokens alike, 1 turns alike")

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        return term if self.share == 0.0 else term * ((1.0 - self.share) + self.share * batch.turn_balance)


DISAGREEMENT = Divergence("jsd", grad="none", beta=0.5)


@dataclass(frozen=True)
class DisagreementDamping:
    """Weigh by 1 − most·tanh(beta·d/2), d the JSD of teacher and student at the token (DemoPSD, arXiv 2607.02502).

    For kl(S||T) with a live student this is exactly the paper's target ∝ T^(1−α)·S^α: its kl is (1−α)·kl(S||T) plus terms whose
    gradient is 0 where S^α is the student itself. (The paper's S is an average of earlier weights, which adds one pull.)

    Attributes:
        most: the largest damping, α_max; the paper's is .15.
        beta: how fast it is reached, per nat; third parties use 50.
    """

    most: float = 0.15
    beta: float = 50.0
    divergences: ClassVar[tuple[Divergence, ...]] = (DISAGREEMENT,)

    def __post_init__(self) -> None:
        check_share("token_weight.most", self.most, "the weight is 1 − most·tanh(beta·d/2)")
        if not self.beta > 0.0:
            raise InputError(f"token_weight.beta={self.beta} must be above 0: the weight is 1 − most·tanh(beta·d/2)")

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        if DISAGREEMENT not in scores.divergences:
            raise InputError(
                "token_weight DisagreementDamping needs both views, and this `objective` scores one; remove token_weight"
            )
        return term * (1.0 - self.most * torch.tanh(0.5 * self.beta * scores.divergences[DISAGREEMENT].detach()))


@dataclass(frozen=True)
class Chain:
    """Apply several, one after another."""

    steps: Sequence[TokenWeight]

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        return tuple(dict.fromkeys(d for step in self.steps for d in divergences_of(step)))

    def __call__(self, term: Float[Tensor, " N"], batch: Batch, scores: Scores) -> Float[Tensor, " N"]:
        for step in self.steps:
            term = step(term, batch, scores)
        return term
