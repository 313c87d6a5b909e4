"""Give objectives scores of small models, of free leaves and of chains, and take their gradients."""

import itertools

import torch
from torch import Tensor

from pidistill.losses.divergences import divergence
from pidistill.losses.reductions import token_mean
from pidistill.objectives import Objective
from pidistill.scoring.score import score
from pidistill.types import Batch, Example, PromptPair, Rollout, ScoreRequest, Scores, TokenLoss
from tests.support.builders import batch_of, gradients
from tests.support.oracles import MarkovChain


def on_policy(module, rollouts: list[Rollout], view: str) -> list[Rollout]:
    """Record as μ what the module itself says of each token in ``view``: the first update after sampling."""
    scores = score(module, batch_of(rollouts), ScoreRequest(False, False))
    logprobs = scores.teacher_logprobs if view == "teacher" else scores.student_logprobs
    for rollout, own in zip(rollouts, logprobs.split([r.policy_tokens for r in rollouts]), strict=True):
        values = iter(own.tolist())
        rollout.sampled_logprobs = [next(values) if m else float("nan") for m in rollout.policy_mask]
    return rollouts


def gradient(objective, module, rollouts: list[Rollout], step: int = 0):
    """(loss, gradients by parameter) of one update on ``rollouts``."""
    fill_behaviour_kl(objective, module, rollouts)
    advantages = objective.advantages(rollouts, step)
    module.zero_grad()
    batch = batch_of(rollouts, advantages)
    scores = score(module, batch, objective.score_request(step))
    answer = objective.token_loss(batch, scores, step)
    assert isinstance(answer, TokenLoss)
    loss = token_mean(answer.loss, len(batch.targets))
    loss.backward()
    return loss.item(), gradients(module)


def leaf_scores(batch, objective, step=0) -> tuple[Scores, dict[str, torch.Tensor]]:
    """Scores computed densely from leaf logits in float64, so that gradient to each side can be read off."""
    n, vocabulary = len(batch.targets), 11
    generator = torch.Generator().manual_seed(3)
    logits = {
        v: torch.randn(n, vocabulary, generator=generator, dtype=torch.float64).requires_grad_() for v in ("student", "teacher")
    }
    logp = {v: torch.log_softmax(x, -1) for v, x in logits.items()}
    request = objective.score_request(step)
    picked = (batch.targets % vocabulary)[:, None]
    scores = Scores(
        student_logprobs=logp["student"].gather(1, picked).squeeze(1),
        teacher_logprobs=logp["teacher"].gather(1, picked).squeeze(1),
        divergences={d: divergence(d, logp["teacher"], logp["student"]) for d in request.divergences},
        student_entropy=None,
        teacher_entropy=None,
    )
    return scores, logits


def expected_gradient(
    objective, chain: MarkovChain, sampled_by: MarkovChain | None = None, weighed: bool = False
) -> torch.Tensor:
    """E over pairs of independent sequences of the gradient of the summed loss of one of them, by autograd.

    ``sampled_by`` has the weights that sampled where these are not the present ones; ``weighed`` with whole rollouts' weights.
    """
    sequences, older = chain.sequences(), sampled_by or chain
    rollouts = [rollout_of(y, older, group) for group, pair in enumerate(itertools.product(sequences, repeat=2)) for y in pair]

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
    present, log_probability = (
        torch.stack([one.logprob(one.sampler, one.W, tuple(r.completion)) for r in rollouts]) for one in (chain, older)
    )
    if weighed:
        batch.importance_weights = (present - log_probability).exp()[batch.rollout_index]
        batch.ratio_logprobs = scores_of(chain.W, objective.score_request(0)).policy_logprobs(chain.sampler)
    pair_probability = log_probability.view(-1, 2).sum(1).exp().repeat_interleave(2)[batch.rollout_index]

    def expectation(W):
        loss = objective.token_loss(batch, scores_of(W, objective.score_request(0)), 0).loss
        return 0.5 * (pair_probability * loss).sum()

    return chain.gradient(expectation)


def exact_batch(rollouts, advantages):
    """Return a batch whose recorded numbers are in float64, not rounded to fp32."""
    batch = batch_of(rollouts, advantages)
    pairs = zip(rollouts, advantages, strict=True)
    given = [x for r, a in pairs for x in a.tokens or [a.advantage] * r.policy_tokens]
    batch.advantages = torch.tensor(given, dtype=torch.float64)
    batch.ratio_logprobs = torch.tensor([x for r in rollouts for x in r.sampled_logprobs], dtype=torch.float64)
    return batch


def rollout_of(y: tuple[int, ...], chain: MarkovChain, group: int) -> Rollout:
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


def pathwise_gradient(chain: MarkovChain, prefixes: MarkovChain | None = None) -> torch.Tensor:
    """E[Σ_t ∇K_t] with the sequences' probabilities held fixed, those of ``prefixes`` where it is given."""
    likely = prefixes or chain

    def value(W):
        total = 0.0
        for y in chain.sequences():
            p, q = (torch.log_softmax(chain.logits(v, W), -1) for v in (chain.sampler, chain.other))
            steps = sum((p[prev].exp() * (p[prev] - q[prev])).sum() for prev in chain.previous(y))
            total = total + likely.logprob(likely.sampler, likely.W, y).exp().detach() * steps
        return total

    return chain.gradient(value)


VOCABULARY = 7


def dense_scores(objective: Objective, batch: Batch, seed: int = 3) -> tuple[Scores, dict[str, Tensor], Tensor]:
    """Scores from leaf logits [N, V] in float64, the logits of both views, and which of the V ids each token is."""
    n = len(batch.targets)
    generator = torch.Generator().manual_seed(seed)
    logits = {
        view: (1.5 * torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64)).requires_grad_()
        for view in ("student", "teacher")
    }
    logp = {view: torch.log_softmax(x, -1) for view, x in logits.items()}
    picked = batch.targets % VOCABULARY
    request = objective.score_request(0)
    assert request.student_grad and not request.teacher_grad
    own = {view: x.gather(1, picked[:, None])[:, 0] for view, x in logp.items()}
    entropies = {view: -(x.exp() * x).sum(-1).detach() for view, x in logp.items()}
    scores = Scores(
        student_logprobs=own["student"],
        teacher_logprobs=own["teacher"] if "teacher" in request.views else None,
        divergences={d: divergence(d, logp["teacher"], logp["student"]) for d in request.divergences},
        student_entropy=entropies["student"],
        teacher_entropy=entropies["teacher"] if "teacher" in request.views else None,
    )
    return scores, logits, picked


def fill_behaviour_kl(objective, module, rollouts) -> None:
    request = objective.behaviour_request()
    if request is None:
        return
    kl = objective.behaviour_values(score(module, batch_of(rollouts), request))
    for rollout, values in zip(rollouts, kl.split([r.policy_tokens for r in rollouts]), strict=True):
        rollout.behaviour_values = values.tolist()
