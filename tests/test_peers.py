"""Independent implementations, where they are right: torchtune's PPO, and (if installed) TRL's and Liger's generalised JSD.

TRL and Liger are no dependency: ``pip install trl liger-kernel accelerate`` to run their part.
"""

import itertools

import pytest
import torch
from torchtune.rlhf.loss import PPOLoss

from pidistill.divergences import generalised_jsd
from pidistill.policy_gradient import ppo_clip_loss
from pidistill.reductions import token_mean

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_torchtune_ppo():
    logp, log_mu, A = randn(0, 6, 20), randn(0, 6, 20) + 0.3 * randn(1, 6, 20), randn(2, 6, 20)
    ours, theirs = logp.flatten().requires_grad_(), logp.clone().requires_grad_()
    loss, ratio, clipped = ppo_clip_loss(ours, log_mu.flatten(), A.flatten(), clip_low=1.0 - 0.2, clip_high=1.0 + 0.2)
    zero = torch.zeros_like(A)  # no value function
    total, policy_loss, _, mean_ratio, clip_fraction = PPOLoss(epsilon=0.2)(log_mu, theirs, A, zero, zero, zero)
    reduced = token_mean(loss, A.numel())
    torch.testing.assert_close(reduced.detach(), policy_loss)
    torch.testing.assert_close(ratio.mean(), mean_ratio)
    torch.testing.assert_close(clipped.double().mean(), clip_fraction)
    assert 0.1 < clip_fraction < 0.9
    gradient = torch.autograd.grad(reduced, ours)[0]
    torch.testing.assert_close(gradient.view(6, 20), torch.autograd.grad(total, theirs)[0])


def test_trl_generalized_jsd(monkeypatch):
    pytest.importorskip("trl", reason="optional peer: pip install trl accelerate")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="this TRL has no experimental GKD trainer")
    student, teacher = randn(0, 2, 3, 11).requires_grad_(), randn(1, 2, 3, 11).requires_grad_()
    for beta, temperature in itertools.product(BETAS, (1.0, 0.7, 2.0)):
        theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none")
        logp = [torch.log_softmax(x / temperature, -1) for x in (teacher, student)]
        ours = generalised_jsd(*logp, beta)
        torch.testing.assert_close(ours, theirs.sum(-1))
        gradients = (torch.autograd.grad(value.sum(), (student, teacher)) for value in (ours, theirs))
        for own, peer in zip(*gradients, strict=True):
            torch.testing.assert_close(own, peer)


def test_liger_fused_linear_jsd():
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="optional peer: pip install liger-kernel")
    tokens, hidden, vocabulary = 8, 5, 11
    h_student, h_teacher = randn(0, tokens, hidden).float().requires_grad_(), randn(1, tokens, hidden).float()
    w_student, w_teacher = randn(2, vocabulary, hidden).float().requires_grad_(), randn(3, vocabulary, hidden).float()
    for beta, temperature in itertools.product(BETAS, (1.0, 0.7)):
        fused = chunked.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False, chunk_size=4
        )
        theirs = fused(h_student, w_student, h_teacher, w_teacher, torch.zeros(tokens, dtype=torch.long))
        teacher = torch.log_softmax(h_teacher @ w_teacher.T / temperature, -1)
        student = torch.log_softmax(h_student @ w_student.T / temperature, -1)
        ours = token_mean(generalised_jsd(teacher, student, beta), tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        gradients = (torch.autograd.grad(value, (h_student, w_student)) for value in (ours, theirs))
        for own, peer in zip(*gradients, strict=True):
            torch.testing.assert_close(own, peer, rtol=1e-4, atol=1e-6)
