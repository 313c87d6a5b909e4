"""Test other clips and reward weights than the defaults, on older samples, against the equation of each method in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pidistill.objectives import GRPO, OPDPPO, OPSD, SDPO, ConstantNegative, Objective, PiDistill
from pidistill.types import Rollout
from tests.support.builders import batch_of, random_rollouts
from tests.support.objective_runs import leaf_scores

REWARDS = [1.0, 0.0, 0.4, 0.0, 1.0, 0.7]


def older_rollouts() -> list[Rollout]:
    """Return two groups of three, sampled by older weights; the middle one of each group has no privileged information."""
    rollouts, generator = random_rollouts(6, group_size=3, turns=3), torch.Generator().manual_seed(5)
    for rollout, reward in zip(rollouts, REWARDS, strict=True):
        rollout.reward = rollout.task_reward = reward
        rollout.trainer_logprobs = (-4 * torch.rand(rollout.policy_tokens, generator=generator)).tolist()
        rollout.importance_weights = (2 * torch.rand(rollout.policy_tokens, generator=generator)).tolist()
        rollout.behaviour_values = [0.1 * (t + 1) * (1 + reward) for t in range(rollout.policy_tokens)]
    for rollout in rollouts[1::3]:
        rollout.prompts = replace(rollout.prompts, teacher=rollout.prompts.student, has_privileged=False)
    return rollouts


@dataclass(frozen=True)
class Tokens:
    """Hold what the equations say of the N policy tokens of some rollouts: log-probs [N, V] of both views, all else [N].

    Attributes:
        T, S: log-probs of teacher and student. log_t, log_s: of the token itself. mu: of the older weights.
        A: reward minus the group's mean. K: the recorded KL of the sequence minus its mean over those of the group with PI.
        w: importance weight. told: 1 with privileged information, else 0.
    """

    T: Tensor
    S: Tensor
    log_t: Tensor
    log_s: Tensor
    mu: Tensor
    A: Tensor
    K: Tensor
    w: Tensor
    told: Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def ppo(log_p: Tensor, mu: Tensor, A: Tensor, low: float = 0.8, high: float = 1.2, dual_clip: float | None = None) -> Tensor:
    """Return min(ρA, clip(ρ)·A), and where A < 0 at least dual_clip·A."""
    rho = (log_p - mu).exp()
    J = torch.minimum(rho * A, rho.clamp(low, high) * A)
    return J if dual_clip is None else torch.where(A < 0, J.maximum(dual_clip * A), J)


def tokens_of(rollouts: list[Rollout], logits: dict[str, Tensor], targets: Tensor) -> Tokens:
    def per_token(values: Callable[[int, Rollout], list[float]]) -> Tensor:
        return torch.tensor([x for i, r in enumerate(rollouts) for x in values(i, r)], dtype=torch.float64)

    def centred(numbers: list[float], counts: list[bool]) -> list[float]:
        own = [[x for x, r, c in zip(numbers, rollouts, counts, strict=True) if c and r.group == g] for g in (0, 1)]
        return [
            x - sum(own[r.group]) / len(own[r.group]) if c else 0.0 for x, r, c in zip(numbers, rollouts, counts, strict=True)
        ]

    T, S = (torch.log_softmax(logits[view], -1) for view in ("teacher", "student"))
    has_pi = [r.prompts.has_privileged for r in rollouts]
    advantages = centred(REWARDS, [True] * len(rollouts))
    kls = centred([sum(r.behaviour_values) for r in rollouts], has_pi)
    return Tokens(
        T,
        S,
        *(x.gather(1, (targets % 11)[:, None]).squeeze(1) for x in (T, S)),
        mu=per_token(lambda i, r: r.trainer_logprobs),
        A=per_token(lambda i, r: [advantages[i]] * r.policy_tokens),
        K=per_token(lambda i, r: [kls[i]] * r.policy_tokens),
        w=per_token(lambda i, r: r.importance_weights),
        told=per_token(lambda i, r: [float(has_pi[i])] * r.policy_tokens),
    )


def check_equation(objective: Objective, equation: Callable[[Tokens], Tensor]) -> Tokens:
    """Compare loss and gradients of both views with those of −J; return what the equation saw."""
    rollouts = older_rollouts()
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores, logits = leaf_scores(batch, objective)
    loss = objective.token_loss(batch, scores, 0).loss
    loss.sum().backward()
    copies = {view: x.detach().clone().requires_grad_() for view, x in logits.items()}
    tokens = tokens_of(rollouts, copies, batch.targets)
    expected = -equation(tokens)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=2e-6)
    for view, x in copies.items():
        got, wanted = (torch.zeros_like(x) if y.grad is None else y.grad for y in (logits[view], x))
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-6, msg=lambda m, view=view: f"gradient of the {view}: {m}")
    return tokens


def pi_distill(x: Tokens, clip: dict[str, float]) -> Tensor:
    teacher = x.w * ppo(x.log_t, x.mu, x.A, **clip) - 0.6 * x.told * kl(x.T, x.S.detach())
    student = x.w * ppo(x.log_s, x.mu, x.A, **clip) - 0.6 * x.told * kl(x.T.detach(), x.S)
    return 0.3 * teacher + 0.7 * student


METHODS: dict[str, tuple[Callable[..., Objective], Callable[[Tokens, dict[str, float]], Tensor]]] = {
    "grpo": (GRPO, lambda x, clip: x.w * ppo(x.log_s, x.mu, x.A, **clip)),
    "opsd": (
        lambda **k: OPSD(beta=0.4, **k),
        lambda x, clip: x.w * ppo(x.log_s, x.mu, x.A, **clip) - 0.4 * x.told * kl(x.S, x.T.detach()),
    ),
    "pi_distill": (lambda **k: PiDistill(alpha=0.3, beta=0.6, **k), pi_distill),
    "opd_ppo": (
        lambda **k: OPDPPO(no_pi="distill", **k),
        lambda x, clip: x.w * ppo(x.log_s, x.mu, (x.log_t - x.log_s).detach(), **clip),
    ),
    "sdpo": (
        lambda **k: SDPO("kl_teacher_student", top_k=None, importance_clip=None, **k),
        lambda x, clip: torch.where(x.told > 0, -kl(x.T.detach(), x.S), ppo(x.log_s, x.mu, x.A, **clip)),
    ),
    "constant_negative": (
        lambda **k: ConstantNegative(quantile=1.0, entropy_scaled=False, **k),
        lambda x, clip: x.w * ppo(x.log_s, x.mu, -torch.ones_like(x.A), **clip),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_dual_clip_bounds_the_loss_of_bad_tokens_in_every_method_that_takes_it(method):
    build, equation = METHODS[method]
    x = check_equation(build(dual_clip=2.0), lambda tokens: equation(tokens, {"dual_clip": 2.0}))
    for log_p in (x.log_t, x.log_s):
        rho, bad = (log_p - x.mu).exp(), (x.A < 0) & (x.told == 0)
        assert (bad & (rho > 2.0)).any() and (bad & (rho > 0.8) & (rho < 2.0)).any()


@pytest.mark.parametrize("method", METHODS)
def test_other_bounds_of_the_ratio_than_the_defaults_are_those_of_the_equation(method):
    build, equation = METHODS[method]
    x = check_equation(build(clip_low=0.3, clip_high=2.5), lambda tokens: equation(tokens, {"low": 0.3, "high": 2.5}))
    for log_p in (x.log_t, x.log_s):
        for sign, low, high in ((1, 1.2, 2.5), (1, 2.5, 99), (-1, 0.3, 0.8), (-1, 0, 0.3)):
            assert ((x.A * sign > 0) & ((log_p - x.mu).exp() > low) & ((log_p - x.mu).exp() < high)).any(), (sign, low, high)


@pytest.mark.parametrize("reward_weight", [0.5, 1.0])
def test_opsd_with_reward_and_kl_on_older_samples_equals_its_equation(reward_weight):
    check_equation(
        OPSD(beta=0.4, reward_weight=reward_weight),
        lambda x: x.w * reward_weight * ppo(x.log_s, x.mu, x.A) - 0.4 * x.told * kl(x.S, x.T.detach()),
    )


@pytest.mark.parametrize("reward_weight", [0.5, 1.0])
def test_opsds_reward_weight_does_not_weigh_a_kl_in_the_reward(reward_weight):
    check_equation(
        OPSD(beta=0.4, kl_mode="reward_rb", reward_weight=reward_weight),
        lambda x: x.w * ppo(x.log_s, x.mu, reward_weight * x.A - 0.4 * x.K),
    )
