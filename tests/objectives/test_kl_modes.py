"""The exact expected gradient of every `kl_mode`, over all pairs of sequences of a chain.

The pieces are held to the estimator table in tests/losses/test_estimators.py; here the objective's own path is: behaviour pass,
group advantages with a baseline, ratio, loss. Two rollouts a group, all 27 × 27 pairs weighed by their probability.
"""

import itertools

import pytest
import torch

from pidistill.losses.divergences import divergence
from pidistill.objectives import OPSD, PiDistill
from pidistill.types import Example, PromptPair, Rollout, Scores
from tests.support.builders import batch_of
from tests.support.oracles import MarkovChain

BETA = 0.7


def expected_gradient(objective, chain: MarkovChain) -> torch.Tensor:
    """E over pairs of independent sequences of the gradient of the summed loss of one of them, by autograd."""
    sequences = chain.sequences()
    rollouts = [_rollout(y, chain, group) for group, pair in enumerate(itertools.product(sequences, repeat=2)) for y in pair]

    def scores_of(W, request):
        logp = {view: torch.log_softmax(chain.logits(view, W), -1) for view in ("student", "teacher")}
        previous = torch.tensor([p for r in rollouts for p in chain.previous(tuple(r.completion))])
        targets = torch.tensor([t for r in rollouts for t in r.completion])[:, None]
        rows = {view: x[previous] for view, x in logp.items()}
        picked = {view: x.gather(1, targets).squeeze(1) for view, x in rows.items()}
        divergences = {d: divergence(d, rows["teacher"], rows["student"]) for d in request.divergences}
        return Scores(picked["student"], picked["teacher"], divergences, None, None)

    request = objective.behaviour_request()
    if request is not None:
        kl = objective.behaviour_values(scores_of(chain.W, request))
        for rollout, values in zip(rollouts, kl.split([len(r.completion) for r in rollouts]), strict=True):
            rollout.behaviour_values = values.tolist()
    batch = exact_batch(rollouts, objective.advantages(rollouts, 0))
    log_probability = torch.stack([chain.logprob(chain.sampler, chain.W, tuple(r.completion)) for r in rollouts])
    pair_probability = log_probability.view(-1, 2).sum(1).exp().repeat_interleave(2)[batch.rollout_index]

    def expectation(W):
        loss = objective.token_loss(batch, scores_of(W, objective.score_request(0)), 0).loss
        return 0.5 * (pair_probability * loss).sum()

    return chain.gradient(expectation)


def exact_batch(rollouts, advantages):
    """A batch whose recorded numbers are in float64, not rounded to fp32."""
    batch = batch_of(rollouts, advantages)
    pairs = zip(rollouts, advantages, strict=True)
    given = [x for r, a in pairs for x in a.tokens or [a.advantage] * r.policy_tokens]
    batch.advantages = torch.tensor(given, dtype=torch.float64)
    batch.ratio_logprobs = torch.tensor([x for r in rollouts for x in r.sampled_logprobs], dtype=torch.float64)
    return batch


def _rollout(y: tuple[int, ...], chain: MarkovChain, group: int) -> Rollout:
    logp = torch.log_softmax(chain.logits(chain.sampler, chain.W), -1)
    logprobs = [float(logp[p, t]) for p, t in zip(chain.previous(y), y, strict=True)]
    return Rollout(
        example=Example(id="chain", messages=[], privileged="pi"),
        prompts=PromptPair([0], [0, 0], has_privileged=True),
        completion=list(y),
        policy_mask=[True] * len(y),
        sampled_logprobs=logprobs,
        sampled_by=chain.sampler,
        group=group,
        stop_reason="done",
        turns=[],
        reward=0.0,
    )


def pathwise_gradient(chain: MarkovChain) -> torch.Tensor:
    """E[Σ_t ∇K_t] with the sequences' probabilities held fixed."""

    def value(W):
        total = 0.0
        for y in chain.sequences():
            p, q = (torch.log_softmax(chain.logits(v, W), -1) for v in (chain.sampler, chain.other))
            steps = sum((p[prev].exp() * (p[prev] - q[prev])).sum() for prev in chain.previous(y))
            total = total + chain.logprob(chain.sampler, chain.W, y).exp() * steps
        return total

    return chain.gradient(value)


def build(sampler: str, kl_mode: str, **kwargs):
    if sampler == "teacher":
        return PiDistill(alpha=1.0, beta=BETA, kl_mode=kl_mode, **kwargs)
    return OPSD(beta=BETA, kl_mode=kl_mode, **kwargs)


@pytest.mark.parametrize("sampler", ["teacher", "student"])
@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_modes_have_the_gradient_of_the_sequence_kl(sampler, seed):
    """reward_k1 with a leave-one-out baseline and loss_rb_complete: β·∇KL(P||sg Q), exactly."""
    chain = MarkovChain.seeded(seed, sampler=sampler)
    expected = BETA * chain.true_gradient()
    for objective in (build(sampler, "reward_k1", advantage="leave_one_out"), build(sampler, "loss_rb_complete")):
        torch.testing.assert_close(expected_gradient(objective, chain), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["teacher", "student"])
def test_the_group_mean_that_includes_the_rollout_scales_a_reward_mode(sampler):
    """With G=2 the expected gradient is (G−1)/G = half of the true one."""
    chain = MarkovChain.seeded(0, sampler=sampler)
    objective = build(sampler, "reward_k1", advantage="group_mean")
    torch.testing.assert_close(expected_gradient(objective, chain), 0.5 * BETA * chain.true_gradient(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["teacher", "student"])
@pytest.mark.parametrize(
    "mode", [{"kl_mode": "loss_rb"}, {"kl_mode": "loss_k2"}, {"kl_mode": "loss_rb_complete", "kl_gamma": 0.0}]
)
def test_loss_modes_have_the_pathwise_gradient(sampler, mode):
    chain = MarkovChain.seeded(0, sampler=sampler)
    ours = expected_gradient(build(sampler, **mode), chain)
    torch.testing.assert_close(ours, BETA * pathwise_gradient(chain), atol=2e-6, rtol=1e-5)


def test_reward_rb_is_not_a_gradient_of_the_kl():
    """Compute what the paper's text describes: on this chain the cosine to the true gradient is −0.33."""
    chain = MarkovChain.seeded(0)
    ours = expected_gradient(build("teacher", "reward_rb", advantage="leave_one_out"), chain)
    cosine = torch.cosine_similarity(ours.flatten(), chain.true_gradient().flatten(), dim=0)
    assert cosine.item() == pytest.approx(-0.33, abs=0.005)


@pytest.mark.parametrize("kl_mode", ["loss_rb", "reward_k1"])
def test_the_student_half_has_the_gradient_of_its_kl(kl_mode):
    """J_S's −β·kl(sg T||S) with y ~ T: teacher-forced cross-entropy, the pathwise term only, whatever the teacher half does."""
    chain = MarkovChain.seeded(0, live="student")
    ours = expected_gradient(PiDistill(alpha=0.0, beta=BETA, kl_mode=kl_mode), chain)
    torch.testing.assert_close(ours, BETA * chain.gradient(chain.sequence_kl), atol=2e-6, rtol=1e-5)
