"""Test the reward-free family, OPD, SDPO and GRPO, each against its equation per token in float64 loops."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pidistill.errors import InputError
from pidistill.losses.divergences import check_divergence
from pidistill.losses.token_weights import ClipTerm
from pidistill.objectives import (
    GKD,
    GRPO,
    OPD,
    OPDPPO,
    OPSD,
    OPSDUCLA,
    PCSD,
    SDFT,
    SDPO,
    GuideGRPO,
    Objective,
    PiDistill,
    SemiOPD,
)
from pidistill.objectives.base import BOTH_KLS
from pidistill.types import Batch, Rollout
from tests.support import oracles
from tests.support.builders import batch_of, model, random_rollouts, relative_difference
from tests.support.objective_runs import VOCABULARY, dense_scores, gradient, on_policy


@dataclass(frozen=True)
class Token:
    """What the equations say of one token: constants but for the student's logits ``s``."""

    t: Tensor
    s: Tensor
    target: int
    mu: float
    advantage: float
    has_pi: bool
    index: int

    @property
    def log_s(self) -> Tensor:
        return torch.log_softmax(self.s, -1)[self.target]

    @property
    def log_t(self) -> float:
        return torch.log_softmax(self.t, -1)[self.target].item()

    @property
    def ratio(self) -> Tensor:
        return torch.exp(self.log_s - self.mu)


def clipped_kl(p: Tensor, q: Tensor, bound: float) -> Tensor:
    """Σ_v min(p_v·log(p_v/q_v), bound)."""
    p, q = torch.softmax(p, -1), torch.softmax(q, -1)
    total = torch.zeros((), dtype=p.dtype)
    for v in range(len(p)):
        term = p[v] * torch.log(p[v] / q[v])
        if term.item() > bound:
            term = torch.tensor(bound, dtype=p.dtype)
        total = total + term
    return total


def merged(logits: Tensor, ids: list[int]) -> Tensor:
    """Logits of the (K+1)-way distribution in which all but ``ids`` are one bucket."""
    p = torch.softmax(logits, -1)
    rest = sum(p[v] for v in range(len(p)) if v not in ids)
    return torch.log(torch.stack([*(p[v] for v in ids), rest]))


def top(token: Token, k: int) -> list[int]:
    return sorted(range(VOCABULARY), key=lambda v: -token.s[v].item())[:k]


def only_with_pi(term: Callable[[Token], Tensor]) -> Callable[[Token], Tensor]:
    return lambda token: term(token) if token.has_pi else 0.0 * token.log_s


def ppo(token: Token, advantage: float | None = None, low: float = 0.8, high: float = 1.2) -> Tensor:
    a = token.advantage if advantage is None else advantage
    rho = token.ratio
    return -torch.minimum(rho * a, rho.clamp(low, high) * a)


def sdpo(token: Token, bound: float | None, k: int) -> Tensor:
    if not token.has_pi:
        return ppo(token)
    ids = top(token, k)
    importance = 1.0 if bound is None else min(token.ratio.item(), bound)
    return importance * oracles.jsd(merged(token.t, ids), merged(token.s, ids), 0.5)


def opd_ppo(token: Token, beta: float) -> Tensor:
    gap = token.log_t - token.log_s.item()
    return ppo(token, gap if token.has_pi else 0.0) - beta * token.log_s


def top_k_kl(token: Token, k: int, teacher_first: bool) -> Tensor:
    p, q = (token.t, token.s) if teacher_first else (token.s, token.t)
    return oracles.kl_topk_with_tail(p, q, top(token, k))


def merged_jsd(token: Token, k: int, beta: float) -> Tensor:
    return oracles.jsd(merged(token.t, top(token, k)), merged(token.s, top(token, k)), beta)


CASES: dict[str, tuple[Objective, Callable[[Token], Tensor]]] = {
    "ucla_jsd": (OPSDUCLA(), only_with_pi(lambda x: oracles.jsd(x.t, x.s, 0.5))),
    "ucla_jsd_towards_the_student": (OPSDUCLA(jsd_beta=0.3), only_with_pi(lambda x: oracles.jsd(x.t, x.s, 0.3))),
    "ucla_entry_clip": (
        OPSDUCLA(divergence="kl_teacher_student", entry_clip=0.05),
        only_with_pi(lambda x: clipped_kl(x.t, x.s, 0.05)),
    ),
    "ucla_entry_clip_reverse": (
        OPSDUCLA(divergence="kl_student_teacher", entry_clip=0.1),
        only_with_pi(lambda x: clipped_kl(x.s, x.t, 0.1)),
    ),
    "pcsd": (PCSD(), only_with_pi(lambda x: oracles.kl(x.t, x.s))),
    "pcsd_distill": (PCSD(no_pi="distill"), lambda x: oracles.kl(x.t, x.s)),
    "pcsd_clipped": (
        PCSD(token_weight=ClipTerm(0.5)),
        only_with_pi(lambda x: min(oracles.kl(x.t, x.s), 0.5 + 0.0 * x.log_s, key=Tensor.item)),
    ),
    "sdft": (SDFT(), only_with_pi(lambda x: oracles.kl(x.t, x.s) * (x.index >= 3))),
    "sdft_reverse": (
        SDFT(skip_first_tokens=1, divergence="kl_student_teacher"),
        only_with_pi(lambda x: oracles.kl(x.s, x.t) * (x.index >= 1)),
    ),
    "gkd_0": (GKD(beta=0.0), only_with_pi(lambda x: oracles.kl(x.t, x.s))),
    "gkd_quarter": (GKD(beta=0.25), only_with_pi(lambda x: oracles.jsd(x.t, x.s, 0.25))),
    "gkd_1": (GKD(beta=1.0), only_with_pi(lambda x: oracles.kl(x.s, x.t))),
    "opd_sampled": (OPD(), lambda x: -x.ratio * (x.log_t - x.log_s.item())),
    "opd_kl": (OPD(divergence="kl_student_teacher"), lambda x: oracles.kl(x.s, x.t)),
    "opd_top_k": (OPD(divergence="kl_student_teacher", top_k=3), lambda x: top_k_kl(x, 3, teacher_first=False)),
    "opd_top_k_teacher": (OPD(divergence="kl_teacher_student", top_k=2), lambda x: top_k_kl(x, 2, teacher_first=True)),
    "opd_jsd_top_k": (OPD(divergence="jsd", jsd_beta=0.7, top_k=4), lambda x: merged_jsd(x, 4, 0.7)),
    "opd_ppo": (OPDPPO(), lambda x: opd_ppo(x, 0.0)),
    "opd_ppo_trust_region": (OPDPPO(beta=0.3), lambda x: opd_ppo(x, 0.3)),
    "sdpo": (SDPO(top_k=3), lambda x: sdpo(x, 2.0, 3)),
    "sdpo_drop": (SDPO(top_k=3, no_pi="drop"), only_with_pi(lambda x: sdpo(x, 2.0, 3))),
    "sdpo_unweighted": (SDPO(top_k=3, importance_clip=None), lambda x: sdpo(x, None, 3)),
    "grpo": (GRPO(), ppo),
    "guide_grpo": (GuideGRPO(), ppo),
    "grpo_other_clip": (GRPO(clip_low=0.3, clip_high=2.5), lambda x: ppo(x, low=0.3, high=2.5)),
    "guide_grpo_other_clip": (GuideGRPO(clip_low=0.3, clip_high=2.5), lambda x: ppo(x, low=0.3, high=2.5)),
    "opd_ppo_other_clip": (
        OPDPPO(clip_low=0.3, clip_high=2.5, no_pi="distill"),
        lambda x: ppo(x, x.log_t - x.log_s.item(), low=0.3, high=2.5),
    ),
}


def mixed_rollouts(count: int = 6) -> list[Rollout]:
    """Every other rollout has no privileged information."""
    rollouts = random_rollouts(count, group_size=3, turns=3)
    for rollout in rollouts[::2]:
        rollout.prompts = replace(rollout.prompts, teacher=rollout.prompts.student, has_privileged=False)
    return rollouts


def tokens_of(batch: Batch, logits: dict[str, Tensor], picked: Tensor) -> list[Token]:
    return [
        Token(
            t=logits["teacher"][n].detach(),
            s=logits["student"][n],
            target=int(picked[n]),
            mu=float(batch.ratio_logprobs[n]),
            advantage=float(batch.advantages[n]),
            has_pi=bool(batch.has_privileged[n]),
            index=int(batch.token_index[n]),
        )
        for n in range(len(picked))
    ]


@pytest.mark.parametrize("name", CASES)
def test_equals_its_equation_value_and_gradient_and_leaves_the_teacher_alone(name):
    """the teacher's gradient is exactly zero."""
    objective, equation = CASES[name]
    rollouts = mixed_rollouts()
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores, logits, picked = dense_scores(objective, batch)
    loss = objective.token_loss(batch, scores, 0).loss
    loss.sum().backward()

    student = logits["student"].detach().clone().requires_grad_()
    tokens = tokens_of(batch, logits | {"student": student}, picked)
    expected = torch.stack([equation(token) for token in tokens])
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits["student"].grad, student.grad, atol=1e-6, rtol=1e-6)
    assert student.grad.any()
    assert logits["teacher"].grad is None or not logits["teacher"].grad.any()


def test_the_cases_of_the_equation_test_reach_every_branch():
    rollouts = mixed_rollouts()
    batch = batch_of(rollouts, GRPO().advantages(rollouts, 0))
    _, logits, picked = dense_scores(GRPO(), batch)
    tokens = tokens_of(batch, logits, picked)
    assert {t.has_pi for t in tokens} == {True, False}
    assert {t.ratio.item() > 2 for t in tokens if t.has_pi} == {True, False}
    assert {oracles.kl(t.t, t.s).item() > 0.5 for t in tokens if t.has_pi} == {True, False}
    assert {t.index >= 3 for t in tokens if t.has_pi} == {True, False}
    for wanted in [(1, 1.2, 9), (1, 0, 1.2), (-1, 0, 0.8), (-1, 0.8, 9)]:
        sign, low, high = wanted
        assert any(t.advantage * sign > 0 and low < t.ratio.item() < high for t in tokens), wanted
    p, q = torch.softmax(logits["teacher"], -1), torch.softmax(logits["student"], -1)
    for a, b, bound in ((p, q, 0.05), (q, p, 0.1)):
        terms = a * torch.log(a / b)
        assert (terms > bound).any() and ((terms > 0) & (terms < bound)).any()


# ---------------------------------------------------------------------------------------- one method is another


SAME = {
    "sdft without a skip is pcsd": (SDFT(skip_first_tokens=0), PCSD()),
    "gkd at beta 0 is pcsd": (GKD(beta=0.0), PCSD()),
    "ucla's kl is pcsd": (OPSDUCLA(divergence="kl_teacher_student"), PCSD()),
    "gkd at beta 1 is ucla's other kl": (GKD(beta=1.0), OPSDUCLA(divergence="kl_student_teacher")),
    "gkd at beta .5 is ucla's jsd": (GKD(beta=0.5), OPSDUCLA()),
    "an entry clip that nothing reaches": (OPSDUCLA(divergence="kl_teacher_student", entry_clip=1e3), PCSD()),
    "guide-grpo's update is grpo's": (GuideGRPO(), GRPO()),
}


@pytest.mark.parametrize("name", SAME)
def test_settings_that_make_two_methods_one_give_equal_losses_and_gradients(name):
    module, rollouts = model(), mixed_rollouts()
    (loss_a, a), (loss_b, b) = (gradient(objective, module, rollouts) for objective in SAME[name])
    assert loss_a == pytest.approx(loss_b, rel=1e-5, abs=1e-7)
    assert relative_difference(a, b) < 1e-5


REWARD_FREE = {
    "ucla": OPSDUCLA, "ucla_kl": lambda **k: OPSDUCLA(divergence="kl_student_teacher", **k), "pcsd": PCSD, "sdft": SDFT,
    "gkd": GKD, "opd_ppo": OPDPPO,
}  # fmt: skip


@pytest.mark.parametrize("name", REWARD_FREE)
def test_without_pi_a_live_teacher_teaches_nothing(name):
    """exactly nothing where such rows do not count, and zero up to rounding where they do: teacher = student."""
    module = model()
    rollouts = on_policy(module, random_rollouts(4, with_pi=False), "student")
    for no_pi, bound in (("drop", 0.0), ("distill", 1e-6)):
        loss, grads = gradient(REWARD_FREE[name](no_pi=no_pi), module, rollouts)
        assert abs(loss) <= bound
        assert all(float(g.abs().max()) <= bound for g in grads.values()), no_pi


@pytest.mark.parametrize("divergence", ["sampled", "kl_student_teacher", "kl_teacher_student", "jsd"])
def test_opd_from_the_student_itself_teaches_nothing(divergence):
    module = model()
    rollouts = on_policy(module, random_rollouts(4, with_pi=False), "student")
    loss, grads = gradient(OPD(divergence=divergence), module, rollouts)
    assert abs(loss) < 1e-6
    assert all(float(g.abs().max()) < 1e-6 for g in grads.values())


def test_sdpo_without_hindsight_is_grpo():
    module = model()
    rollouts = on_policy(module, random_rollouts(6, group_size=3, with_pi=False), "student")
    loss, ours = gradient(SDPO(top_k=5), module, rollouts)
    expected, control = gradient(GRPO(), module, rollouts)
    assert loss == pytest.approx(expected, abs=1e-7)
    assert relative_difference(ours, control) < 1e-6
    assert any(g.any() for g in control.values())


def test_sdpo_keeps_or_drops_rollouts_without_hindsight():
    rollouts = mixed_rollouts()
    assert [a.keep for a in SDPO().advantages(rollouts, 0)] == [True] * 6
    assert [a.keep for a in SDPO(no_pi="drop").advantages(rollouts, 0)] == [False, True] * 3
    with_drop, without = (SDPO(no_pi=n).advantages(rollouts, 0) for n in ("drop", "rl"))
    assert [a.advantage for a in with_drop] == [a.advantage for a in without]  # the group's mean is of all its rollouts


@pytest.mark.parametrize("make", [OPSD, PiDistill, SDPO, OPSDUCLA, PCSD, SDFT, GKD, OPDPPO, SemiOPD])
def test_no_pi_drop_leaves_rollouts_without_information_out_and_keeps_those_told_in_one_turn(make):
    """Wherever the rows were not dropped at load: the information comes with the rollouts, or another part trains the rows."""
    rollouts = mixed_rollouts()
    assert [a.keep for a in make(no_pi="drop").advantages(rollouts, 0)] == [False, True] * 3
    first = rollouts[0].policy_mask.index(False)
    rollouts[0].teacher_reads = [(first, rollouts[0].policy_mask.index(True, first), [7, 7])]
    assert 0 < sum(rollouts[0].tokens_with_privileged()) < rollouts[0].policy_tokens
    kept = make(no_pi="drop").advantages(rollouts, 0)
    assert [a.keep for a in kept] == [True, True, False, True, False, True]
    others = make(no_pi="distill").advantages(rollouts, 0)
    assert all(a.keep for a in others) and [a.advantage for a in kept] == [a.advantage for a in others]


def test_sdpo_gives_turns_without_information_no_loss_and_no_clipped_token_where_it_drops_them():
    objective, batch = SDPO(top_k=3, no_pi="drop"), batch_of(mixed_rollouts(), GRPO().advantages(mixed_rollouts(), 0))
    batch.ratio_logprobs = batch.ratio_logprobs - 2.0  # far from the samples, beyond the clip
    scores, logits, _ = dense_scores(objective, batch)
    answer = objective.token_loss(batch, scores, 0)
    answer.loss.sum().backward()
    assert not answer.metrics["clip_frac"].any() and not answer.loss[~batch.has_privileged].any()
    assert not logits["student"].grad[~batch.has_privileged].any() and logits["student"].grad.any()


def test_sdpo_refuses_rollouts_without_hindsight_where_it_must():
    with pytest.raises(InputError, match="3 of the round's 6 rollouts have no privileged information"):
        SDPO(no_pi="error").advantages(mixed_rollouts(), 0)
    assert all(a.keep for a in SDPO(no_pi="error").advantages(random_rollouts(4), 0))


def test_sdpo_distils_every_rollout_where_another_model_teaches():
    """`no_pi: distill` is the default then: a teacher that is another model teaches without privileged information."""
    objective, control = SDPO(top_k=3, no_pi="distill"), SDPO(top_k=3)
    rollouts = mixed_rollouts()
    assert all(a.keep for a in objective.advantages(rollouts, 0))
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores, _, _ = dense_scores(objective, batch)
    loss = objective.token_loss(batch, scores, 0).loss
    batch.has_privileged = torch.ones_like(batch.has_privileged)
    torch.testing.assert_close(loss, control.token_loss(batch, scores, 0).loss)


def test_both_kls_are_asked_for_the_log_by_every_method_with_a_teacher():
    for objective in (OPSDUCLA(), PCSD(), SDFT(), GKD(), OPD(), OPD(divergence="jsd"), OPDPPO(), SDPO()):
        assert set(BOTH_KLS) <= set(objective.score_request(0).divergences)
        assert objective.uses_teacher and objective.sampling_view() == "student"
        assert not objective.samples_from_teacher_weights(0) and objective.behaviour_request() is None
    for objective in (GRPO(), GuideGRPO()):
        assert not objective.uses_teacher and objective.score_request(0).views == ("student",)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_has_a_finite_zero_loss_with_a_gradient_function(name):
    """a rank without work takes part in the backward."""
    objective, _ = CASES[name]
    batch = batch_of([], [])
    scores, _, _ = dense_scores(objective, batch)
    loss = objective.token_loss(batch, scores, 0).loss.sum()
    assert loss.item() == 0.0 and loss.grad_fn is not None


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: OPSDUCLA(divergence="kl"), "objective.divergence=kl is unknown"),
        (lambda: OPSDUCLA(jsd_beta=0.0), "objective.jsd_beta=0.0 must lie in \\(0, 1\\)"),
        (lambda: OPSDUCLA(entry_clip=0.05), "entry_clip=0.05 bounds the terms of a KL"),
        (lambda: OPSDUCLA(divergence="kl_teacher_student", entry_clip=0.0), "entry_clip=0.0 must be above 0"),
        (lambda: OPSDUCLA(no_pi="rl"), "objective.no_pi=rl is unknown"),
        (lambda: PCSD(no_pi="rl"), "objective.no_pi=rl is unknown"),
        (lambda: SDFT(skip_first_tokens=-1), "must be at least 0"),
        (lambda: SDFT(divergence="jsd"), "objective.divergence=jsd is unknown"),
        (lambda: GKD(lmbda=1.5), r"objective.lmbda=1.5 must lie in \[0, 1\]"),
        (lambda: GKD(beta=-0.1), r"objective.beta=-0.1 must lie in \[0, 1\]"),
        (lambda: OPD(top_k=5), "divergence=sampled looks at the sampled token only"),
        (lambda: OPD(divergence="jsd", top_k=0), "top_k=0 must be at least 1"),
        (lambda: OPDPPO(beta=-1.0), "objective.beta=-1.0 is outside"),
        (lambda: OPDPPO(clip_low=1.0), "objective.clip_low=1.0"),
        (lambda: SDPO(importance_clip=0.0), "objective.importance_clip=0.0 must be above 0"),
        (lambda: SDPO(advantage="turn_returns"), "objective.advantage=turn_returns is unknown"),
        (lambda: GuideGRPO(drop_zero_advantage=True), "choose one of False, policy_gradient, row"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def test_no_case_asks_for_a_divergence_that_the_scorer_refuses():
    for objective, _ in CASES.values():
        for request in objective.score_request(0).divergences:
            check_divergence(request)


def test_views_without_a_teacher_are_enough_for_grpo():
    rollouts = random_rollouts(2)
    batch = batch_of(rollouts, GRPO().advantages(rollouts, 0))
    scores, _, _ = dense_scores(GRPO(), batch)
    assert torch.isfinite(GRPO().token_loss(batch, scores, 0).loss).all()
