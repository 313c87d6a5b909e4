"""Test against TRL's and Liger's divergences and clipped losses where they are right, and show where they are not.

Runs under ``make test-peers`` (the extra ``peers``); otherwise skipped as a whole. torchtune's losses are held to in
tests/test_published.py, which needs no extra. fp32 throughout: values and gradients agree to 1e-5.
"""

import importlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pidistill.losses.divergences import divergence, generalised_jsd, kl
from pidistill.losses.estimators import k2, k3
from pidistill.losses.policy_gradient import ppo_clip_loss, reinforce_loss
from pidistill.losses.reductions import token_mean
from pidistill.objectives import SDPO
from pidistill.scoring.score import score
from pidistill.types import Divergence, ScoreRequest, Scores
from tests.support.builders import batch_of, gradients, model, random_rollouts, relative_difference
from tests.support.oracles import MarkovChain

if not os.environ.get("PIDISTILL_PEERS"):  # `make test-peers` sets it: there a missing peer is an error, not a skip
    for package in ("trl", "liger_kernel"):
        pytest.importorskip(package, reason="optional peers: make test-peers, or pip install -e '.[test,peers]'")

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
gold = importlib.import_module("trl.experimental.gold.gold_trainer").GOLDTrainer
sdpo = importlib.import_module("trl.experimental.sdpo.loss_utils")
server = importlib.import_module("trl.experimental.server_distillation.server_distillation_trainer")
chunked = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
liger = importlib.import_module("liger_kernel.chunked_loss")
liger_grpo = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TEMPERATURES = [1.0, 0.7, 2.0]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def randn(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Equal values per token, and equal gradients under unequal token weights."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = 1.0 + randn(9, ours.numel()).abs().view_as(ours)
    both = (torch.autograd.grad((weights * value).sum(), inputs, retain_graph=True) for value in (ours, theirs))
    for own, peer in zip(*both, strict=True):
        assert own.abs().max() > 1e-4
        torch.testing.assert_close(own, peer, **CLOSE)


# ------------------------------------------------------------------------------------------------ full vocabulary


def per_token(loss):
    """TRL's trainers take logits and leave the vocabulary unsummed with reduction="none"."""
    return lambda student, teacher, beta, t: loss(student, teacher, beta=beta, temperature=t, reduction="none").sum(-1)


def from_log_probs(function):
    def on_logits(student, teacher, beta, temperature):
        return function(*(torch.log_softmax(x / temperature, -1) for x in (student, teacher)), beta)

    return on_logits


GENERALISED_JSD = {
    "trl gkd": per_token(gkd.generalized_jsd_loss),
    "trl gold": per_token(gold.generalized_jsd_loss),
    "trl sdpo and sdft": from_log_probs(sdpo.compute_divergence),
    "trl server": from_log_probs(lambda s, t, beta: server._jsd_divergence(s, t, beta).sum(-1)),
    "trl server with a mask": from_log_probs(lambda s, t, beta: server._jsd_divergence(s, t, beta, s > -1e9).sum(-1)),
}


@pytest.mark.parametrize("peer", GENERALISED_JSD)
def test_the_generalised_jsd_is_the_peers_in_value_and_gradient(peer):
    student, teacher = randn(0, 2, 3, 11).requires_grad_(), randn(1, 2, 3, 11).requires_grad_()
    for beta, temperature in itertools.product(BETAS, TEMPERATURES):
        ours = generalised_jsd(*(torch.log_softmax(x / temperature, -1) for x in (teacher, student)), beta)
        assert_same(ours, GENERALISED_JSD[peer](student, teacher, beta, temperature), (student, teacher))


def test_the_two_kls_are_those_of_trl_by_the_order_of_their_arguments():
    """Names by argument order: TRL's alpha=0 "forward" is KL(teacher||student), alpha=1 "reverse" KL(student||teacher)."""
    teacher, student = (torch.log_softmax(randn(seed, 5, 13), -1).requires_grad_() for seed in (0, 1))
    assert_same(kl(teacher, student), sdpo.compute_divergence(student, teacher, 0.0), (teacher, student))
    assert_same(kl(student, teacher), sdpo.compute_divergence(student, teacher, 1.0), (teacher, student))
    assert not torch.allclose(kl(teacher, student), kl(student, teacher), atol=1e-2)


# ------------------------------------------------------------------------------------------------ fused with the head


def trl_chunked(h_student, w_student, h_teacher, w_teacher, beta, temperature):
    per_token, _ = chunked.apply(h_student, w_student, None, h_teacher, w_teacher, None, beta, temperature)
    return token_mean(per_token, len(per_token))


def liger_fused(h_student, w_student, h_teacher, w_teacher, beta, temperature):
    fused = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False, chunk_size=4
    )
    return fused(h_student, w_student, h_teacher, w_teacher, torch.zeros(len(h_student), dtype=torch.long))


def hidden_states(module, view) -> torch.Tensor:
    """The normed hidden states that predict policy tokens, [N, H]: what reaches the output layer."""
    seen = []
    hook = module.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(view.tokens)
    hook.remove()
    return seen[0][view.rows, view.columns]


@pytest.mark.parametrize("peer", [trl_chunked, liger_fused])
def test_the_scorer_against_a_fused_linear_jsd_with_the_heads_gradient(peer):
    """Every parameter's gradient through the chunked scorer, head included, against the peer's own head backward."""
    batch = batch_of(random_rollouts(4), packing="padded")
    student, teacher = model(0), model(1)
    tokens = batch.targets.numel()
    for beta, temperature in itertools.product(BETAS, (1.0, 0.7)):
        jsd = Divergence("jsd", "student", beta=beta)
        request = ScoreRequest(student_grad=True, teacher_grad=False, divergences=(jsd,))
        scores = score(student, batch, request, temperature=temperature, teacher=teacher, chunk_tokens=5)
        ours = token_mean(scores.divergences[jsd], tokens)
        student.zero_grad()
        ours.backward()
        own = gradients(student)
        with torch.no_grad():
            h_teacher = hidden_states(teacher, batch.views.of("teacher"))
        theirs = peer(
            hidden_states(student, batch.views.of("student")),
            student.output.weight,
            h_teacher,
            teacher.output.weight.detach(),
            beta,
            temperature,
        )
        student.zero_grad()
        theirs.backward()
        torch.testing.assert_close(ours, theirs, **CLOSE)
        peers = gradients(student)
        assert "output.weight" in own and own.keys() == peers.keys()
        torch.testing.assert_close(own["output.weight"], peers["output.weight"], **CLOSE)
        assert relative_difference(own, peers) < 1e-5


def test_liger_gives_a_padded_output_vocabulary_logit_0_where_we_crop():
    """Liger fills the student's missing columns with logit 0, which has probability; its number is that of those logits."""
    tokens, hidden, vocabulary, padded = 6, 5, 11, 14
    h_student, h_teacher = randn(0, tokens, hidden), randn(1, tokens, hidden)
    w_student, w_teacher = randn(2, vocabulary, hidden), randn(3, padded, hidden)
    theirs = liger_fused(h_student, w_student, h_teacher, w_teacher, 0.5, 1.0)
    student, teacher = h_student @ w_student.T, h_teacher @ w_teacher.T
    filled = torch.nn.functional.pad(student, (0, padded - vocabulary))
    of_filled = generalised_jsd(*(torch.log_softmax(x, -1) for x in (teacher, filled)), 0.5).mean()
    cropped = generalised_jsd(*(torch.log_softmax(x, -1) for x in (teacher[:, :vocabulary], student)), 0.5).mean()
    torch.testing.assert_close(theirs, of_filled, **CLOSE)
    assert abs(theirs - cropped) > 0.01


def test_trls_batchmean_without_labels_divides_by_sequences_not_tokens():
    student, teacher = randn(0, 2, 3, 11), randn(1, 2, 3, 11)
    ours = generalised_jsd(*(torch.log_softmax(x, -1) for x in (teacher, student)), 0.5)
    torch.testing.assert_close(gkd.generalized_jsd_loss(student, teacher, beta=0.5), ours.sum() / 2, **CLOSE)
    labels = torch.zeros(2, 3, dtype=torch.long)
    torch.testing.assert_close(gkd.generalized_jsd_loss(student, teacher, labels, beta=0.5), ours.sum() / 6, **CLOSE)


# ------------------------------------------------------------------------------------------------ top-k


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_divergence_over_top_k_and_tail_is_trls_in_value_and_gradient(alpha):
    """TRL's SDPO on the student's top-k: the same (K+1)-way divergence, with gradient to both sides."""
    student, teacher = randn(0, 4, 30).requires_grad_(), randn(1, 4, 30).requires_grad_()
    for top_k in (1, 5, 20):
        theirs = sdpo.compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=top_k, distillation_alpha=alpha, distillation_add_tail=True
        )
        request = Divergence("jsd", "both", beta=alpha, top_k=top_k)
        ours = divergence(request, torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))
        assert_same(ours, theirs, (student, teacher))


def test_the_tail_of_a_served_teacher():
    logp = torch.log_softmax(randn(0, 4, 30), -1).topk(6, -1).values.requires_grad_()
    with_bucket, _ = server._add_tail_bucket(logp, torch.ones_like(logp, dtype=torch.bool))
    # log(1 − Σ_K p), kept at the dtype's epsilon where the known mass rounds to 1.
    known = logp.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logp.dtype).eps)
    ours = torch.cat([logp, torch.log(-torch.expm1(known))], dim=-1)
    assert_same(ours, with_bucket, (logp,))
    assert_same(ours, sdpo.add_tail_bucket(logp), (logp,))


def test_trls_top_k_without_the_tail_compares_conditionals_and_is_zero_for_k_1():
    """The default of TRL's SDPO and SDFT (distillation_add_tail=False): mass outside the top-k has no price."""
    student, teacher = randn(0, 4, 30).requires_grad_(), randn(1, 4, 30)

    def theirs(top_k: int) -> torch.Tensor:
        return sdpo.compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=top_k, distillation_alpha=1.0, distillation_add_tail=False
        )

    ids = student.detach().topk(5, -1).indices
    conditional = [torch.log_softmax(x.gather(-1, ids), -1) for x in (student, teacher)]
    assert_same(kl(*conditional), theirs(5), (student,))
    ours = divergence(
        Divergence("kl_student_teacher", "student", top_k=5), torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    )
    assert not torch.allclose(ours, theirs(5), atol=1e-2)
    assert (theirs(1).abs() < 1e-6).all() and torch.autograd.grad(theirs(1).sum(), student)[0].abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ sampled estimators


def test_trls_sampled_token_reverse_kl_has_the_gradient_of_k2_and_the_value_of_no_kl():
    student, teacher, ids = randn(0, 8, 12).requires_grad_(), randn(1, 8, 12), torch.arange(8)
    theirs = sdpo.compute_sampled_token_self_distillation_loss(student, teacher, ids, distillation_alpha=1.0)
    log_s, log_t = (torch.log_softmax(x, -1).gather(-1, ids[:, None]).squeeze(-1) for x in (student, teacher))
    assert_same(reinforce_loss(log_s, log_t - log_s), theirs, (student,))
    (own,) = torch.autograd.grad(k2(log_s, log_t).sum(), student, retain_graph=True)
    torch.testing.assert_close(own, torch.autograd.grad(theirs.sum(), student)[0], **CLOSE)
    # What is logged as the loss: for a uniform student its expectation over y ~ S is −ln V times KL(S||T), of the wrong sign.
    uniform, other, every_id = torch.zeros(12, 12), randn(1, 12).expand(12, 12), torch.arange(12)
    expected = sdpo.compute_sampled_token_self_distillation_loss(uniform, other, every_id, distillation_alpha=1.0).mean()
    divergence_value = kl(torch.log_softmax(uniform[0], -1), torch.log_softmax(other[0], -1))
    torch.testing.assert_close(expected, -math.log(12) * divergence_value, **CLOSE)


def test_ligers_k3_is_ours_with_the_arguments_exchanged_and_follows_the_other_kl():
    """The KL term of Liger's (and TRL's) GRPO: value KL(policy||reference), gradient that of KL(reference||policy)."""
    policy, reference = randn(0, 20).requires_grad_(), randn(1, 20)
    assert_same(k3(policy, reference), liger_grpo.k3_loss_fn(reference, policy), (policy,))
    chain = MarkovChain.seeded(0, sampler="student")
    got = chain.expected_gradient(lambda tokens: liger_grpo.k3_loss_fn(tokens.q, tokens.p))
    other = chain.expected_gradient(lambda tokens: kl(tokens.q_full, tokens.p_full))
    torch.testing.assert_close(got, other, rtol=0, atol=1e-12)
    assert not torch.allclose(got, chain.expected_gradient(lambda tokens: kl(tokens.p_full, tokens.q_full)), atol=1e-2)


# ------------------------------------------------------------------------------------------------ clipped policy gradient


@pytest.mark.parametrize("delta", [None, 3.0])
def test_ligers_clipped_loss_is_ours_with_its_delta_as_the_dual_clip(delta):
    logp = randn(0, 6, 20).requires_grad_()
    log_mu, A = logp.detach() + randn(1, 6, 20), randn(2, 6)
    mask = torch.ones(6, 20)
    theirs, (clip_fraction,) = liger_grpo.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        mask,
        A,
        mask,
        old_per_token_logps=log_mu,
        epsilon_low=0.2,
        epsilon_high=0.3,
        beta=0.0,
        loss_type="bnpo",
        delta=delta,
    )
    loss, ratio, clipped = ppo_clip_loss(logp.flatten(), log_mu.flatten(), A.repeat_interleave(20), 0.8, 1.3, delta)
    assert_same(token_mean(loss, 120), theirs, (logp,))
    # Their clip fraction leaves out the tokens that delta stopped; ours counts every token without gradient.
    stopped = ((ratio > (delta or torch.inf)) & (A.repeat_interleave(20) < 0)).float().mean()
    torch.testing.assert_close(clipped.float().mean(), clip_fraction + stopped)
    assert (stopped > 0) == (delta is not None)


def test_trls_importance_clip_is_a_constant_weight_of_at_most_2():
    """SDPO's sg(min(S/μ, 2)) per token."""
    term, log_s, log_mu = randn(0, 20).abs().requires_grad_(), randn(1, 20).requires_grad_(), randn(2, 20)
    theirs = sdpo.apply_importance_sampling_clipping(term, log_s, log_mu, 2.0)
    assert_same(term * (log_s - log_mu).detach().exp().clamp(max=2.0), theirs, (term,))
    assert torch.autograd.grad(theirs.sum(), log_s, allow_unused=True)[0] is None


def test_sdpos_loss_with_top_k_tail_and_importance_clip():
    """Our objective's number per token against TRL's pieces put together."""
    objective = SDPO(divergence="jsd", jsd_beta=0.5, top_k=6, importance_clip=2.0)
    rollouts = random_rollouts(4)
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    student, teacher = randn(0, batch.targets.numel(), 30).requires_grad_(), randn(1, batch.targets.numel(), 30)
    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    picked = log_s.gather(-1, batch.targets[:, None] % 30).squeeze(-1)
    scores = Scores(picked, None, {d: divergence(d, log_t, log_s) for d in objective.score_request(0).divergences}, None, None)
    term = sdpo.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=6, distillation_alpha=0.5, distillation_add_tail=True
    )
    theirs = sdpo.apply_importance_sampling_clipping(term, picked, batch.ratio_logprobs, 2.0)
    assert_same(objective.token_loss(batch, scores, 0).loss, theirs, (student,))


def test_a_whole_step_runs_beside_trls_trainer():
    """benchmarks/opsd_step.py at a size of seconds; it refuses to compare where the two sides' prompt ids differ."""
    root = Path(__file__).parents[1]
    sizes = {"vocabulary": 64, "prompts": 2, "group": 2, "question": 8, "privileged": 8, "new-tokens": 6, "turns": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "benchmarks/opsd_step.py", "--lengths=equal", "--no-memory", *options]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [(row[1].strip(), float(row[2])) for row in rows] == [("TRL", 6.0), ("pidistill", 6.0)]  # tokens per rollout
    for row in rows:
        assert 90 <= sum(int(share.strip().removesuffix("%")) for share in row[5:8]) <= 101
