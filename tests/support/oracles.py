"""Compute the mathematics slowly and obviously, in float64, with Python loops: the tests hold pidistill to these.

Nothing here imports the functions it checks.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------- one token's distributions


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Σ_v p_v·log(p_v/q_v) of two [V] logit vectors, differentiable on both sides."""
    p, q = torch.softmax(p_logits, -1), torch.softmax(q_logits, -1)
    return sum(p[v] * torch.log(p[v] / q[v]) for v in range(len(p)))


def jsd(teacher_logits: Tensor, student_logits: Tensor, beta: float) -> Tensor:
    """The generalised JSD of two [V] logit vectors, with its endpoints as defined."""
    if beta == 0:
        return kl(teacher_logits, student_logits)
    if beta == 1:
        return kl(student_logits, teacher_logits)
    t, s = torch.softmax(teacher_logits, -1), torch.softmax(student_logits, -1)
    total = 0.0
    for v in range(len(t)):
        m = beta * t[v] + (1 - beta) * s[v]
        total = total + beta * t[v] * torch.log(t[v] / m) + (1 - beta) * s[v] * torch.log(s[v] / m)
    return total


def entropy(logits: Tensor) -> Tensor:
    p = torch.softmax(logits, -1)
    return -sum(p[v] * torch.log(p[v]) for v in range(len(p)))


def kl_topk_with_tail(p_logits: Tensor, q_logits: Tensor, ids: list[int]) -> Tensor:
    """KL of two [V] logit vectors after all tokens but ``ids`` became one."""
    p, q = torch.softmax(p_logits, -1), torch.softmax(q_logits, -1)
    total = sum(p[v] * torch.log(p[v] / q[v]) for v in ids)
    rest = [v for v in range(len(p)) if v not in ids]
    if rest:
        p_rest, q_rest = sum(p[v] for v in rest), sum(q[v] for v in rest)
        total = total + p_rest * torch.log(p_rest / q_rest)
    return total


# ---------------------------------------------------------------------------------------- rollouts and groups


def kl_to_go(kls: list[float], gamma: float) -> list[float]:
    """Σ_{u>t} γ^{u−t}·K_u of one rollout."""
    return [sum(gamma ** (u - t) * kls[u] for u in range(t + 1, len(kls))) for t in range(len(kls))]


def complete_kl_advantages(kls: list[list[float]], groups: list[int], gamma: float) -> list[list[float]]:
    """KL-to-go minus the siblings' mean KL-to-go at the same index, an ended sibling counting as 0."""
    to_go = [kl_to_go(k, gamma) for k in kls]
    result = []
    for i, own in enumerate(to_go):
        siblings = [to_go[j] for j in range(len(kls)) if groups[j] == groups[i] and j != i]
        baseline = [sum(s[t] if t < len(s) else 0.0 for s in siblings) / max(len(siblings), 1) for t in range(len(own))]
        result.append([a - b for a, b in zip(own, baseline, strict=True)])
    return result


def advantages(name: str, rewards: list[float], groups: list[int]) -> list[float]:
    """``group_mean``, ``leave_one_out`` or ``standardised``; 0 where the group's rewards are all equal."""
    result = []
    for i, reward in enumerate(rewards):
        group = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
        others = [r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == groups[i] and j != i]
        mean = sum(group) / len(group)
        if len(set(group)) == 1:
            result.append(0.0)
        elif name == "group_mean":
            result.append(reward - mean)
        elif name == "leave_one_out":
            result.append(reward - sum(others) / len(others))
        elif name == "standardised":
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
            result.append((reward - mean) / (std + 1e-4))
    return result


# ---------------------------------------------------------------------------------------- policy gradients


def ppo_objective(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> float:
    """J_t of one token, from the formula."""
    value = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    return max(value, dual_clip * advantage) if dual_clip is not None and advantage < 0 else value


def ppo_coefficient(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> float:
    """The number that multiplies ∇log π in ∇J_t, as a table."""
    if advantage > 0:
        return ratio * advantage if ratio <= high else 0.0
    if advantage < 0:
        inside = ratio >= low and (dual_clip is None or ratio <= dual_clip)
        return ratio * advantage if inside else 0.0
    return 0.0


def topr_coefficient(ratio: float, advantage: float, low: float, high: float) -> float:
    """The number that multiplies ∇log π in ∇J_t of TOPR, ``ratio`` that of the token or of its sequence."""
    return advantage if advantage > 0 else min(max(ratio, low), high) * advantage


# ---------------------------------------------------------------------------------------- exact enumeration


@dataclass(frozen=True)
class MarkovChain:
    """A first-order Markov chain over V tokens whose every sequence can be written down.

    Student logits are ``W[prev]``, teacher logits ``W[prev] + P[prev]``, row V of both is the start. W is the one parameter;
    one view depends on it, the other is frozen at W's value. All in float64.

    Attributes:
        W, P: [V+1, V]
        sampler: "teacher" or "student", the view that samples; p below, the other view is q.
        live: the view that depends on W.
        length: tokens of a sequence.
        end: a token that ends the sequence, so that lengths differ; None for none.
    """

    W: Tensor
    P: Tensor
    sampler: str = "teacher"
    live: str = "teacher"
    length: int = 3
    end: int | None = None

    @staticmethod
    def seeded(
        seed: int, sampler: str = "teacher", live: str | None = None, end: int | None = None, vocabulary: int = 3
    ) -> "MarkovChain":
        """Return the chain of seed 0; ``live`` None is the sampler."""
        torch.manual_seed(seed)
        W = torch.randn(vocabulary + 1, vocabulary, dtype=torch.float64)
        P = torch.randn(vocabulary + 1, vocabulary, dtype=torch.float64)
        return MarkovChain(W, P, sampler, live or sampler, end=end)

    @property
    def other(self) -> str:
        return "student" if self.sampler == "teacher" else "teacher"

    def logits(self, view: str, W: Tensor) -> Tensor:
        """[V+1, V], following W only if the view is live."""
        W = W if view == self.live else self.W
        return W + self.P if view == "teacher" else W

    def sequences(self) -> list[tuple[int, ...]]:
        vocabulary = range(self.W.shape[1])
        if self.end is None:
            return list(itertools.product(vocabulary, repeat=self.length))
        found = set()
        for y in itertools.product(vocabulary, repeat=self.length):
            stop = y.index(self.end) + 1 if self.end in y else self.length
            found.add(y[:stop])
        return sorted(found)

    def previous(self, y: tuple[int, ...]) -> list[int]:
        return [self.W.shape[1], *y[:-1]]

    def logprob(self, view: str, W: Tensor, y: tuple[int, ...]) -> Tensor:
        """log-prob of a whole sequence."""
        logp = torch.log_softmax(self.logits(view, W), -1)
        return sum(logp[prev, token] for prev, token in zip(self.previous(y), y, strict=True))

    def sequence_kl(self, W: Tensor) -> Tensor:
        """KL(sampler||other) over whole sequences, as the sum over all of them of P(y)·log(P(y)/Q(y))."""
        total = 0.0
        for y in self.sequences():
            logp, logq = self.logprob(self.sampler, W, y), self.logprob(self.other, W, y)
            total = total + torch.exp(logp) * (logp - logq)
        return total

    def true_gradient(self) -> Tensor:
        """[V+1, V] ∇_W of ``sequence_kl``, by autograd through the enumeration."""
        return self.gradient(self.sequence_kl)

    def gradient(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        W = self.W.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(W), W, allow_unused=True, materialize_grads=True)
        return gradient

    def tokens(self, W: Tensor, sequences: list[tuple[int, ...]] | None = None) -> "ChainTokens":
        """All sequences (or those given), flat over their tokens."""
        sequences = self.sequences() if sequences is None else sequences
        prev = torch.tensor([p for y in sequences for p in self.previous(y)])
        targets = torch.tensor([token for y in sequences for token in y])
        lengths = torch.tensor([len(y) for y in sequences])
        p_logp = torch.log_softmax(self.logits(self.sampler, W), -1)[prev]
        q_logp = torch.log_softmax(self.logits(self.other, W), -1)[prev]
        weights = torch.stack([torch.exp(self.logprob(self.sampler, self.W, y)) for y in sequences])
        return ChainTokens(
            p_full=p_logp,
            q_full=q_logp,
            p=p_logp.gather(-1, targets[:, None])[:, 0],
            q=q_logp.gather(-1, targets[:, None])[:, 0],
            p_sampled=torch.log_softmax(self.logits(self.sampler, self.W), -1)[prev].gather(-1, targets[:, None])[:, 0],
            rollout_index=torch.arange(len(sequences)).repeat_interleave(lengths),
            lengths=lengths.tolist(),
            probability=weights,
        )

    def expected_gradient(self, loss: Callable[["ChainTokens"], Tensor]) -> Tensor:
        """[V+1, V] the exact expectation over y ~ sampler of ∇_W Σ_t loss_t; ``loss`` gives a number per token [N]."""

        def expectation(W: Tensor) -> Tensor:
            tokens = self.tokens(W)
            return (tokens.probability[tokens.rollout_index] * loss(tokens)).sum()

        return self.gradient(expectation)


@dataclass(frozen=True)
class ChainTokens:
    """Sequences of a chain, flat over N tokens; p is the sampler, q the other view.

    Attributes:
        p_full, q_full: [N, V] log-probs at each token's prefix. p, q: [N] of the token itself.
        p_sampled: [N] p as a constant: what the sampler recorded.
        rollout_index: [N]. lengths: tokens of each sequence. probability: [R] of each sequence, constant.
    """

    p_full: Tensor
    q_full: Tensor
    p: Tensor
    q: Tensor
    p_sampled: Tensor
    rollout_index: Tensor
    lengths: list[int]
    probability: Tensor


def cosine_and_norm_ratio(estimate: Tensor, truth: Tensor) -> tuple[float, float]:
    """(cosine, ‖estimate‖/‖truth‖); a zero estimate has cosine 0."""
    ratio = (estimate.norm() / truth.norm()).item()
    return (torch.cosine_similarity(estimate.flatten(), truth.flatten(), dim=0).item() if ratio > 0 else 0.0), ratio
