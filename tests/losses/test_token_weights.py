"""Test each token weight against its loop; tokens that it leaves out have no gradient, and it gives none to anything else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pidistill.config import build
from pidistill.errors import InputError
from pidistill.losses.token_weights import (
    Chain,
    ClipTerm,
    EntropyMask,
    MeanOverTokens,
    PositionDecay,
    SignGate,
    SkipFirst,
    TokenWeight,
    weight_metrics,
    weighted,
)
from pidistill.objectives import GKD, SDFT
from pidistill.types import Batch, RolloutAdvantage, Scores
from tests.support.builders import batch_of, random_rollouts


def case(seed: int, n_rollouts: int = 3) -> tuple[Batch, Scores, torch.Tensor]:
    """A batch with positive, negative and zero advantages, scores that carry gradient, and a term [N] of either sign."""
    rollouts = random_rollouts(n_rollouts, seed=seed)
    advantages = [RolloutAdvantage((1.0, -0.5, 0.0)[i % 3]) for i in range(n_rollouts)]
    batch = batch_of(rollouts, advantages)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(len(batch.targets), generator=generator)  # noqa: E731
    scores = Scores(
        student_logprobs=draw().requires_grad_(),
        teacher_logprobs=draw().requires_grad_(),
        divergences={},
        student_entropy=draw().abs().requires_grad_(),
        teacher_entropy=draw().abs().requires_grad_(),
    )
    return batch, scores, draw().requires_grad_()


def skip_first(n: int, x: float, batch: Batch, scores: Scores) -> float:
    earlier = sum(1 for m in range(n) if batch.rollout_index[m] == batch.rollout_index[n])
    return 0.0 if earlier < 2 else x


def clip(n: int, x: float, batch: Batch, scores: Scores) -> float:
    return min(x, 0.3)


def entropy_of_student(n: int, x: float, batch: Batch, scores: Scores) -> float:
    return x if 0.4 <= scores.student_entropy[n].item() <= 1.1 else 0.0


def entropy_of_teacher(n: int, x: float, batch: Batch, scores: Scores) -> float:
    return x if scores.teacher_entropy[n].item() >= 0.7 else 0.0


def sign_gate(n: int, x: float, batch: Batch, scores: Scores) -> float:
    gap, advantage = (scores.teacher_logprobs[n] - scores.student_logprobs[n]).item(), batch.advantages[n].item()
    agree = (gap > 0 and advantage > 0) or (gap < 0 and advantage < 0)
    return x if agree else 0.0


def decay(n: int, x: float, batch: Batch, scores: Scores) -> float:
    return x * 0.5 ** (batch.token_index[n].item() / 1.5)


def mean_over_tokens(n: int, x: float, batch: Batch, scores: Scores) -> float:
    return x / sum(1 for rollout in batch.rollout_index.tolist() if rollout == batch.rollout_index[n].item())


def chain(n: int, x: float, batch: Batch, scores: Scores) -> float:
    return min(decay(n, skip_first(n, x, batch, scores), batch, scores), 0.1)


WEIGHTS: dict[str, tuple[TokenWeight, object]] = {
    "skip": (SkipFirst(2), skip_first),
    "clip": (ClipTerm(0.3), clip),
    "entropy_student": (EntropyMask(0.4, 1.1), entropy_of_student),
    "entropy_teacher": (EntropyMask(min_nats=0.7, view="teacher"), entropy_of_teacher),
    "sign": (SignGate(), sign_gate),
    "decay": (PositionDecay(1.5), decay),
    "mean": (MeanOverTokens(), mean_over_tokens),
    "chain": (Chain([SkipFirst(2), PositionDecay(1.5), ClipTerm(0.1)]), chain),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_token_weight_equals_the_loop_and_passes_gradient_to_the_term_alone(name):
    weight, loop = WEIGHTS[name]

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 10**6))
    def check(seed):
        batch, scores, term = case(seed)
        result = weight(term, batch, scores)
        expected = torch.tensor([loop(n, x, batch, scores) for n, x in enumerate(term.tolist())])
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        # Every weight is linear in the term but at a bound, where one token at most may lie.
        slopes = [
            (loop(n, x + 1e-3, batch, scores) - loop(n, x - 1e-3, batch, scores)) / 2e-3 for n, x in enumerate(term.tolist())
        ]
        assert sum(abs(own - slope) > 0.01 for own, slope in zip(term.grad.tolist(), slopes, strict=True)) <= 1
        for leaf in (scores.student_logprobs, scores.teacher_logprobs, scores.student_entropy, scores.teacher_entropy):
            assert leaf.grad is None or not leaf.grad.any()

    check()


@pytest.mark.parametrize("name", ["skip", "entropy_student", "entropy_teacher", "sign"])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_masked_token_is_exactly_0_with_exactly_0_gradient_whatever_its_term(name, poison):
    """An infinite KL at a token that is left out would come back as 0·∞."""
    weight, loop = WEIGHTS[name]
    batch, scores, term = case(5, n_rollouts=6)
    masked = torch.tensor([loop(n, 1.0, batch, scores) == 0.0 for n in range(len(term))])
    assert masked.any() and not masked.all()
    poisoned = term.detach().masked_fill(masked, poison).requires_grad_()
    result = weight(poisoned, batch, scores)
    result.sum().backward()
    assert torch.equal(result[masked], torch.zeros(int(masked.sum())))
    assert torch.equal(poisoned.grad, (~masked).float())


def test_the_mean_over_tokens_is_the_same_on_any_slice_of_a_batch():
    batch, scores, term = case(4, n_rollouts=4)
    whole = MeanOverTokens()(term, batch, scores)
    pieces = [MeanOverTokens()(term[part], batch.slice(part), scores) for part in (slice(0, 5), slice(5, None))]
    assert torch.equal(whole, torch.cat(pieces))


def test_a_clipped_token_has_no_gradient_and_the_others_all_of_theirs():
    batch, scores, term = case(1)
    ClipTerm(0.3)(term, batch, scores).sum().backward()
    assert torch.equal(term.grad, (term.detach() <= 0.3).float())
    assert {0.0, 1.0} == set(term.grad.tolist())


def test_skipping_nothing_and_no_weight_change_nothing():
    batch, scores, term = case(2)
    for weight in (None, SkipFirst(0), ClipTerm(math.inf), EntropyMask(), Chain([])):
        assert torch.equal(weighted(weight, term, batch, scores), term)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 20), st.integers(0, 4))
def test_token_weights_shrink_a_divergence_and_never_reverse_it(seed, half_life, skip):
    """On terms ≥ 0: 0 ≤ weighted ≤ term."""
    batch, scores, term = case(seed)
    term = term.detach().abs()
    for weight in (PositionDecay(half_life), SkipFirst(skip), ClipTerm(half_life), EntropyMask(0.2, 1.0), SignGate()):
        result = weight(term, batch, scores)
        assert (result >= 0).all() and (result <= term).all()


def test_the_order_of_a_chain_counts():
    batch, scores, _ = case(3)
    term = torch.ones(len(batch.targets))
    clip_last, clip_first = Chain([PositionDecay(1.0), ClipTerm(0.4)]), Chain([ClipTerm(0.4), PositionDecay(1.0)])
    at_second = batch.token_index == 1
    torch.testing.assert_close(clip_last(term, batch, scores)[at_second], torch.full((int(at_second.sum()),), 0.4))
    torch.testing.assert_close(clip_first(term, batch, scores)[at_second], torch.full((int(at_second.sum()),), 0.2))


def test_a_config_line_makes_one_and_a_list_makes_a_chain():
    node = OmegaConf.create(
        {
            "_component_": "pidistill.objectives.GKD",
            "token_weight": {
                "_component_": "pidistill.losses.token_weights.Chain",
                "steps": [
                    {"_component_": "pidistill.losses.token_weights.SkipFirst", "tokens": 3},
                    {"_component_": "pidistill.losses.token_weights.ClipTerm", "max_nats": 0.05},
                ],
            },
        }
    )
    objective = build(node)
    assert isinstance(objective, GKD)
    assert objective.token_weight == Chain([SkipFirst(3), ClipTerm(0.05)])


def test_sdft_skips_first_and_weighs_the_rest():
    objective = SDFT(skip_first_tokens=2, token_weight=PositionDecay(1.0))
    assert objective.token_weight == Chain([SkipFirst(2), PositionDecay(1.0)])


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: SkipFirst(-1), "token_weight.tokens=-1"),
        (lambda: ClipTerm(0.0), "token_weight.max_nats=0.0"),
        (lambda: EntropyMask(1.0, 0.5), "0 <= min_nats < max_nats"),
        (lambda: EntropyMask(view="both"), "view=both"),
        (lambda: PositionDecay(0.0), "token_weight.half_life=0.0"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def test_what_a_method_does_not_compute_is_refused_in_one_sentence():
    batch, scores, term = case(4)
    without = Scores(scores.student_logprobs, None, {}, scores.student_entropy, None)
    with pytest.raises(InputError, match="token_weight.view=teacher is not scored by this `objective`"):
        EntropyMask(view="teacher")(term, batch, without)
    with pytest.raises(InputError, match="SignGate needs a teacher and a reward"):
        SignGate()(term, batch, without)
    batch.advantages = None
    with pytest.raises(InputError, match="SignGate needs a teacher and a reward"):
        SignGate()(term, batch, scores)


CHAIN = Chain([SkipFirst(1), EntropyMask(0.5)])


@pytest.mark.parametrize("weight", [SkipFirst(2), SignGate(), PositionDecay(3.0), CHAIN], ids=str)
def test_the_log_has_the_mean_weight_and_the_share_that_is_left_out(weight):
    batch, scores, term = case(0)
    metrics = weight_metrics(weight, batch, scores)
    torch.testing.assert_close(weight(term, batch, scores).detach(), term.detach() * metrics["token_weight_mean"])
    assert torch.equal(metrics["token_weight_zero_frac"], metrics["token_weight_mean"] == 0)
    assert weight_metrics(None, batch, scores) == {} and not metrics["token_weight_mean"].requires_grad
    scores.divergences = {GKD().divergence: torch.rand(len(batch.targets))}
    answer = GKD(token_weight=weight, no_pi="distill").weighted_loss(batch, scores, 0)
    assert torch.equal(answer.metrics["token_weight_mean"], metrics["token_weight_mean"])
