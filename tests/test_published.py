"""Test what docs/published-differences.md says of other people's formulas and code, where no other test file shows it.

Only what the test extra installs; TRL and Liger are in tests/test_peers.py.
"""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss, SymmetricKLLoss
from torchtune.rlhf.loss import PPOLoss

from pidistill.losses.divergences import entropy, generalised_jsd, kl, kl_topk_with_tail
from pidistill.losses.estimators import k2, k3
from pidistill.losses.policy_gradient import ppo_clip_loss
from pidistill.losses.reductions import sum_by_rollout, token_mean
from tests.support.oracles import ChainTokens, MarkovChain, cosine_and_norm_ratio

ROOT = Path(__file__).resolve().parent.parent


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def log_probabilities(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


# ------------------------------------------------------------------------------------------------ the document


def test_every_test_that_the_document_names_exists_and_every_row_names_one():
    text = (ROOT / "docs" / "published-differences.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    assert len(named) > 15
    for file, name in sorted(named):
        functions = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| Published", "| ---"))]
    for row in rows:
        assert "tests/" in row, f"no test in: {row[:80]}"
    assert text.count("::") == len(re.findall(r"`tests/[\w/]+\.py::\w+`", text)), "a test is not named as `tests/file.py::name`"


# ------------------------------------------------------------------------------------------------ names


def test_torchs_kl_div_is_the_divergence_of_its_second_argument_from_its_first():
    p, q = (torch.log_softmax(logits(seed, 4, 7), -1) for seed in (1, 2))
    torch.testing.assert_close(F.kl_div(q, p, reduction="none", log_target=True).sum(-1), kl(p, q))
    assert not torch.allclose(kl(p, q), kl(q, p), atol=1e-2)
    distributions = [torch.distributions.Categorical(logits=x) for x in (p, q)]
    torch.testing.assert_close(torch.distributions.kl_divergence(*distributions), kl(p, q))


def test_torchtunes_forward_kl_loss_is_a_cross_entropy_with_the_gradient_of_kl_teacher_student():
    teacher, student = logits(1, 6, 9, dtype=torch.float32), logits(2, 6, 9, dtype=torch.float32).requires_grad_()
    theirs = ForwardKLLoss()(student, teacher, torch.zeros(6, dtype=torch.long))
    teacher_logp = torch.log_softmax(teacher, -1)
    ours = kl(teacher_logp, torch.log_softmax(student, -1)).mean()
    torch.testing.assert_close(theirs, ours + entropy(teacher_logp).mean(), rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    teacher = teacher.clone().requires_grad_()
    of_teacher = torch.autograd.grad(ForwardKLLoss()(student, teacher, torch.zeros(6, dtype=torch.long)), teacher)[0]
    of_kl = torch.autograd.grad(kl(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)).mean(), teacher)[0]
    assert not torch.allclose(of_teacher, of_kl, atol=1e-3)
    # Nor is it 0 where student and teacher agree.
    at_the_teacher = ForwardKLLoss()(teacher, teacher, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(at_the_teacher, entropy(teacher_logp).mean())
    assert at_the_teacher > 1


def test_torchtunes_reverse_kl_loss_is_kl_student_teacher():
    teacher, student = logits(1, 6, 9, dtype=torch.float32), logits(2, 6, 9, dtype=torch.float32).requires_grad_()
    theirs = ReverseKLLoss()(student, teacher, torch.zeros(6, dtype=torch.long))
    ours = kl(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)).mean()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_torchtunes_symmetric_kl_loss_is_not_zero_at_equality():
    x = logits(1, 6, 9, dtype=torch.float32)
    value = SymmetricKLLoss(sym_kd_ratio=0.3)(x, x, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(value, 0.3 * entropy(torch.log_softmax(x, -1)).mean(), rtol=1e-5, atol=1e-6)


def test_a_mixture_with_the_weights_exchanged_ends_at_the_other_kl():
    t, s = (torch.log_softmax(logits(seed, 5, 8), -1) for seed in (1, 2))

    def exchanged(beta: float) -> torch.Tensor:
        mixture = torch.logaddexp(s + math.log(beta), t + math.log1p(-beta))
        return beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)

    torch.testing.assert_close(exchanged(0.5), generalised_jsd(t, s, 0.5))
    assert not torch.allclose(exchanged(0.1), generalised_jsd(t, s, 0.1), rtol=0.5)
    torch.testing.assert_close(exchanged(1e-9), kl(s, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exchanged(1 - 1e-9), kl(t, s), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ truncated top-k


def truncated(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Σ_{v in top-k} p_v·log(p_v/q_v), nothing for the rest."""
    p, q = p.gather(-1, ids), q.gather(-1, ids)
    return (p.exp() * (p - q)).sum(-1)


def test_a_bare_truncated_sum_is_negative_where_the_kl_is_not_and_a_clamp_at_0_leaves_no_gradient():
    student, teacher = log_probabilities([0.6, 0.4]), log_probabilities([0.9, 0.1])
    top = torch.tensor([[0]])
    assert truncated(student, teacher, top).item() == pytest.approx(-0.243279, abs=1e-6)
    assert kl(student, teacher).item() == pytest.approx(0.311239, abs=1e-6)
    assert kl_topk_with_tail(student, teacher, top).item() == pytest.approx(0.311239, abs=1e-6)  # two buckets are all there is
    x = student.clone().requires_grad_()
    clamped = truncated(torch.log_softmax(x, -1), teacher, top).clamp_min(0.0)
    assert clamped.item() == 0.0 and torch.autograd.grad(clamped.sum(), x)[0].eq(0).all()


@pytest.mark.parametrize("student_first", [False, True])
def test_a_bare_truncated_sum_is_not_at_its_minimum_where_student_and_teacher_agree(student_first):
    x = logits(1, 4, 10)
    teacher = torch.log_softmax(x, -1)
    ids = teacher.topk(3).indices

    def gradient(divergence) -> torch.Tensor:
        y = x.clone().requires_grad_()
        student = torch.log_softmax(y, -1)
        pair = (student, teacher) if student_first else (teacher, student)
        return torch.autograd.grad(divergence(*pair, ids).sum(), y)[0]

    assert gradient(kl_topk_with_tail).abs().max() < 1e-12
    pushed = -gradient(truncated).gather(-1, ids)
    # Descending KL(T||S) draws all mass into the top-k; descending KL(S||T) empties it.
    assert (pushed < 0).all() if student_first else (pushed > 0).all()


def test_a_renormalised_top_1_is_zero_whatever_the_two_distributions():
    p, q = (torch.log_softmax(logits(seed, 6, 9), -1) for seed in (1, 2))
    ids = p.topk(1).indices
    renormalised = [torch.log_softmax(x.gather(-1, ids), -1) for x in (p, q)]
    assert (kl(*renormalised) == 0).all() and (kl_topk_with_tail(p, q, ids) > 1e-3).any()


# ------------------------------------------------------------------------------------------------ clips and precision


def test_a_clip_of_each_vocabulary_entry_is_no_clip_of_the_token_and_can_reverse_the_gradient():
    teacher, student = log_probabilities([0.5, 0.5]), log_probabilities([0.05, 0.95])
    assert kl(teacher, student).item() > 0.8
    assert kl(teacher, student, entry_clip=0.05).item() < -0.2
    x = student.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(kl(teacher, torch.log_softmax(x, -1), entry_clip=clip).sum(), x)[0][0, 0] for clip in (None, 0.05)
    ]
    assert gradients[0] < 0 < gradients[1]  # descending raises the student's .05 without the clip, lowers it with it


def test_kl_of_bf16_log_probs_is_noise_where_student_and_teacher_are_close():
    x, y = logits(1, 50, 2000), logits(1, 50, 2000) + 0.02 * logits(2, 50, 2000)
    exact = kl(torch.log_softmax(x, -1), torch.log_softmax(y, -1)).mean()
    in_fp32 = kl(torch.log_softmax(x.float(), -1), torch.log_softmax(y.float(), -1)).mean()
    rounded = [torch.log_softmax(z.bfloat16(), -1).float() for z in (x, y)]
    in_bf16 = (rounded[0].exp() * (rounded[0] - rounded[1])).sum(-1)
    assert abs(in_fp32 / exact - 1) < 0.01
    assert (in_bf16 - exact).abs().mean() > 10 * exact and (in_bf16 < 0).any()
    deep = torch.tensor([-20.03])
    assert (deep.bfloat16().float() - deep).abs().item() > 0.02
    with pytest.raises(ValueError, match=r"divergences need fp32"):
        kl(rounded[0].bfloat16(), rounded[1].bfloat16())


# ------------------------------------------------------------------------------------------------ policy gradient


def ppo_weight(ratio: float, advantage: float, dual_clip: float | None = None) -> float:
    """The number that multiplies ∇log π in the gradient of J."""
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([advantage], dtype=torch.float64)
    loss, _, _ = ppo_clip_loss(logp, torch.zeros(1, dtype=torch.float64), A, dual_clip=dual_clip)
    return -torch.autograd.grad(loss.sum(), logp)[0].item()


def test_ppo_clip_bounds_neither_the_push_on_a_likely_bad_token_nor_reinforces_an_unlikely_good_one():
    assert ppo_weight(50.0, -1.0) == pytest.approx(-50.0)
    assert ppo_weight(50.0, -1.0, dual_clip=3.0) == 0.0
    assert ppo_weight(1e-6, 1.0) == pytest.approx(1e-6)


def test_torchtunes_ppo_loss_is_ours():
    for dtype, tolerance in ((torch.float64, {}), (torch.float32, {"rtol": 1e-5, "atol": 1e-6})):
        logp, A = logits(0, 6, 20, dtype=dtype), logits(2, 6, 20, dtype=dtype)
        log_mu = logp + 0.3 * logits(1, 6, 20, dtype=dtype)
        ours, theirs = logp.flatten().requires_grad_(), logp.clone().requires_grad_()
        loss, ratio, clipped = ppo_clip_loss(ours, log_mu.flatten(), A.flatten(), clip_low=1.0 - 0.2, clip_high=1.0 + 0.2)
        zero = torch.zeros_like(A)  # no value function
        total, policy_loss, _, mean_ratio, clip_fraction = PPOLoss(epsilon=0.2)(log_mu, theirs, A, zero, zero, zero)
        reduced = token_mean(loss, A.numel())
        torch.testing.assert_close(reduced.detach(), policy_loss, **tolerance)
        torch.testing.assert_close(ratio.mean(), mean_ratio, **tolerance)
        torch.testing.assert_close(clipped.to(dtype).mean(), clip_fraction)
        assert 0.05 < clip_fraction < 0.9
        gradient = torch.autograd.grad(reduced, ours)[0]
        torch.testing.assert_close(gradient.view(6, 20), torch.autograd.grad(total, theirs)[0], **tolerance)


# ------------------------------------------------------------------------------------------------ estimators


def pathwise(tokens: ChainTokens) -> torch.Tensor:
    return kl(tokens.p_full, tokens.q_full)


def test_k2_is_k1_in_the_reward_for_a_whole_sequence_and_the_pathwise_part_for_a_sum_over_tokens():
    def whole(tokens: ChainTokens) -> torch.Tensor:
        logp, logq = (sum_by_rollout(x, tokens.rollout_index, len(tokens.lengths)) for x in (tokens.p, tokens.q))
        per_rollout = k2(logp, logq) / torch.tensor(tokens.lengths)  # spread over its tokens, which are summed again
        return per_rollout[tokens.rollout_index]

    for seed in range(4):
        chain = MarkovChain.seeded(seed)
        torch.testing.assert_close(chain.expected_gradient(whole), chain.true_gradient(), rtol=0, atol=1e-12)
        per_token = chain.expected_gradient(lambda tokens: k2(tokens.p, tokens.q))
        torch.testing.assert_close(per_token, chain.expected_gradient(pathwise), rtol=0, atol=1e-12)
    assert_no_gradient_of_the_sequence_kl(lambda tokens: k2(tokens.p, tokens.q))


def test_k3_times_the_live_ratio_has_the_gradient_of_the_per_token_kl_without_the_future_term():
    def corrected_k3(tokens: ChainTokens) -> torch.Tensor:
        return (tokens.p - tokens.p_sampled).exp() * k3(tokens.p, tokens.q)

    for seed in range(4):
        chain = MarkovChain.seeded(seed)
        got, expected = chain.expected_gradient(corrected_k3), chain.expected_gradient(pathwise)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert_no_gradient_of_the_sequence_kl(corrected_k3)


def assert_no_gradient_of_the_sequence_kl(estimator) -> None:
    cosines = []
    for seed in range(8):
        chain = MarkovChain.seeded(seed)
        cosines.append(cosine_and_norm_ratio(chain.expected_gradient(estimator), chain.true_gradient())[0])
    assert min(cosines) < 0.9
