"""The ids that top-k and top-p left are recorded, and the trainer's policy is the truncated one: value, gradient, guards."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from pidistill.errors import InputError
from pidistill.objectives import GRPO, OPD, OPDPPO
from pidistill.rollouts import TorchtuneSampler, VLLMSampler
from pidistill.rollouts.distribution import sampling_logprobs
from pidistill.scoring.head import apply_head
from pidistill.scoring.head_numbers import ScorePlan
from pidistill.scoring.mismatch import MismatchMask
from pidistill.scoring.score import score
from pidistill.types import Example, KeptSets, PromptPair, Rollout, RolloutAdvantage, ScoreRequest, Scores
from tests.support.builders import VOCABULARY, batch_of, model, random_rollouts, relative_difference
from tests.support.oracles import MarkovChain
from tests.support.siblings import ONE

# ------------------------------------------------------------------------------------------- the chain


def kept_of(chain: MarkovChain, top_k: int, top_p: float) -> torch.Tensor:
    """[V+1, V] True where the sampler's own truncation leaves the token, at W's value."""
    return sampling_logprobs(chain.W, 1.0, top_k, top_p) > -torch.inf


def truncated(W: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[V+1, V] log π_K, written out: each kept id's logit against those of the kept ids; -inf elsewhere."""
    rows = []
    for logits, keep in zip(W, kept, strict=True):
        total = torch.stack([logits[v].exp() for v in range(len(keep)) if keep[v]]).sum().log()
        rows.append(torch.stack([logits[v] - total if keep[v] else logits.new_tensor(-torch.inf) for v in range(len(keep))]))
    return torch.stack(rows)


def sequences_of(chain: MarkovChain, kept: torch.Tensor) -> list[tuple[int, ...]]:
    return [y for y in chain.sequences() if all(kept[p, t] for p, t in zip(chain.previous(y), y, strict=True))]


def expected(chain, kept, rewards, objective, replay: bool, step_scores=None) -> torch.Tensor:
    """The exact expected gradient of −J of what the objective does with samples of the truncated policy."""
    sequences = sequences_of(chain, kept)
    logp = truncated(chain.W, kept)
    previous = torch.tensor([p for y in sequences for p in chain.previous(y)])
    targets = torch.tensor([t for y in sequences for t in y])
    rollouts = [
        Rollout(
            Example("chain", []), PromptPair([0], [0, 0], True), list(y), [True] * len(y),
            [float(logp[p, t]) for p, t in zip(chain.previous(y), y, strict=True)], "student", n, "done", [], reward=0.0,
        )
        for n, y in enumerate(sequences)
    ]  # fmt: skip
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    batch.ratio_logprobs = logp[previous, targets]
    batch.advantages = torch.tensor([rewards[y] for y in sequences for _ in y], dtype=torch.float64)
    probability = torch.stack([sum(logp[p, t] for p, t in zip(chain.previous(y), y, strict=True)).exp() for y in sequences])

    def expectation(W):
        full = torch.log_softmax(W, -1)[previous]
        mass = torch.logsumexp(full.masked_fill(~kept[previous], -torch.inf), -1) if replay else None
        picked = full.gather(1, targets[:, None])[:, 0]
        teacher = torch.log_softmax(chain.W + chain.P, -1)[previous, targets]
        scores = Scores(picked, teacher, {}, None, None, student_kept_mass=mass)
        loss = objective.weighted_loss(batch, scores, 0).loss
        return (probability[batch.rollout_index] * loss).sum()

    return chain.gradient(expectation)


def three_gradients(seed: int, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The exact gradient of the truncated policy's expected reward, and GRPO's with and without replay."""
    chain = MarkovChain.seeded(seed, sampler="student", vocabulary=5)
    kept = kept_of(chain, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    rewards = {y: float(torch.randn(1, generator=generator, dtype=torch.float64)) for y in chain.sequences()}

    def value(W):
        logp = truncated(W, kept)
        return -sum(
            rewards[y] * sum(logp[p, t] for p, t in zip(chain.previous(y), y, strict=True)).exp()
            for y in sequences_of(chain, kept)
        )

    objective = GRPO(clip_low=0.0, clip_high=1e9)
    with_replay, without = (expected(chain, kept, rewards, objective, replay=replay) for replay in (True, False))
    return chain.gradient(value), with_replay, without


@pytest.mark.parametrize("seed", range(4))
def test_replay_has_the_exact_gradient_of_the_truncated_policy_and_without_it_there_is_another(seed):
    kept = kept_of(MarkovChain.seeded(seed, sampler="student", vocabulary=5), 3, 0.8)
    assert 1 <= int(kept.sum(-1).min()) < 5
    truth, ours, ignored = three_gradients(seed, 3, 0.8)
    torch.testing.assert_close(ours, truth, atol=1e-10, rtol=1e-9)
    assert (ignored - truth).norm() > 0.05 * truth.norm()


@pytest.mark.slow(reason="the test above holds the gradients; this one holds the figures of docs/methods.md")
@pytest.mark.parametrize(("top_k", "least", "median", "most"), [(5, 0.12, 0.22, 0.47), (3, 0.22, 0.35, 0.60)])
def test_without_replay_the_gradient_is_off_by_what_the_documentation_says(top_k, least, median, most):
    errors = []
    for seed in range(16):
        truth, _, ignored = three_gradients(seed, top_k, 0.8)
        errors.append(float((ignored - truth).norm() / truth.norm()))
    found = [min(errors), statistics.median_low(errors), max(errors)]
    assert found == pytest.approx([least, median, most], abs=0.005)


@pytest.mark.parametrize("objective", [OPD(), OPDPPO(clip_low=0.0, clip_high=1e9, no_pi="distill")], ids=["opd", "opd_ppo"])
def test_a_log_ratio_as_advantage_is_of_the_whole_vocabulary_and_its_ratio_of_the_kept_ids(objective):
    chain = MarkovChain.seeded(0, sampler="student", vocabulary=4)
    kept = kept_of(chain, 3, 0.9)
    student, teacher = torch.log_softmax(chain.W, -1), torch.log_softmax(chain.W + chain.P, -1)

    def value(W):
        logp, sampled = truncated(W, kept), truncated(chain.W, kept)
        total = 0.0
        for y in sequences_of(chain, kept):
            steps = list(zip(chain.previous(y), y, strict=True))
            probability = sum(sampled[p, t] for p, t in steps).exp()
            total = total - probability * sum((teacher - student)[p, t] * logp[p, t] for p, t in steps)
        return total

    ours = expected(chain, kept, dict.fromkeys(chain.sequences(), 0.0), objective, replay=True)
    torch.testing.assert_close(ours, chain.gradient(value), atol=1e-10, rtol=1e-9)


# ------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_heads_mass_and_gradient_equal_the_dense_ones(chunk, temperature, side):
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width = 7, 11, 4
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    sets = [sorted({int(t), *range(n % 5)}) for n, t in enumerate(targets)]
    sets[2], sets[4] = [], [int(targets[4])]  # the whole vocabulary, and a single id
    starts = torch.tensor(list(itertools.accumulate(map(len, sets), initial=0)))
    of_side = torch.arange(tokens) != 5  # a token that the other view sampled: its set says nothing of this side
    assert sets[5]
    kept = KeptSets(torch.tensor([i for ids in sets for i in ids]), starts, {side: of_side})
    sets[5] = []
    request = ScoreRequest(side == "student", side == "teacher", views=(side,), entropy=False)
    scores = ScorePlan(targets, request, temperature, chunk, kept=kept)
    ours = scores.as_scores(apply_head(scores, {side: hidden}, weight)).policy_logprobs(side)
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    dense = torch.stack(
        [logp[n, t] - (torch.logsumexp(logp[n, sets[n]], 0) if sets[n] else 0.0) for n, t in enumerate(targets.tolist())]
    )
    torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)
    factors = torch.randn(tokens, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad((factors * dense).sum(), (hidden, weight), retain_graph=True)
    found = torch.autograd.grad((factors * ours).sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-10)
    (single,) = torch.autograd.grad(ours[4], hidden)
    assert ours[4] == 0.0 and not single.any()  # one id was left: nothing was chosen, and nothing is learned


# ------------------------------------------------------------------------------------------- sampler and scorer


def sampled(module, **settings) -> list[Rollout]:
    sampler = TorchtuneSampler(max_new_tokens=6, record_kept=True, **settings)
    prompts = [[1, 2, 3], [4, 5]]
    samples = sampler.sample(
        module, prompts, group_size=4, seeds=range(8), stop_ids=frozenset(), pad_id=0, on_turn_end=lambda row, ids: None
    )
    return [
        Rollout(
            Example(f"row {n}", []), PromptPair(prompts[n // 4], prompts[n // 4], False), s.tokens, s.policy_mask, s.logprobs,
            "student", n // 4, s.stop_reason, [], reward=float(n % 2), kept=s.kept,
        )
        for n, s in enumerate(samples)
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.8, "top_k": 20, "temperature": 0.7}])
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_a_fresh_sample_has_ratio_1_under_top_p_and_top_k(settings, packing):
    module = model()
    rollouts = sampled(module, **settings)
    assert all(len(r.kept) == r.policy_tokens for r in rollouts) and any(len(k) > 1 for r in rollouts for k in r.kept)
    batch = batch_of(rollouts, packing=packing)
    request = ScoreRequest(False, False, views=("student",), entropy=False)
    with torch.no_grad():
        scores = score(module, batch, request, temperature=settings.get("temperature", 1.0))
    ratio = (scores.policy_logprobs("student") - batch.ratio_logprobs).exp()
    assert (ratio - 1).abs().max() < 1e-5
    assert (scores.student_logprobs - batch.ratio_logprobs).abs().max() > 0.05  # without replay it is the kept mass


def test_ids_that_the_teachers_view_kept_say_nothing_of_the_students_distribution():
    """Where a sure teacher keeps one id, the student's log-prob of it must stay below 0, and have a gradient."""
    module = model()
    rollouts = [replace(r, sampled_by="teacher") for r in sampled(module, top_p=0.8, top_k=20)]
    told = [replace(r, prompts=PromptPair([7], r.prompts.teacher, True)) for r in rollouts]
    both = ScoreRequest(False, False, views=("student", "teacher"), entropy=False)
    with torch.no_grad():
        scores, alike = score(module, batch_of(told), both), score(module, batch_of(rollouts), both)
    assert torch.equal(scores.policy_logprobs("student"), scores.student_logprobs)
    for equal in (scores.policy_logprobs("teacher"), alike.policy_logprobs("teacher"), alike.policy_logprobs("student")):
        assert (equal - batch_of(rollouts).ratio_logprobs).abs().max() < 1e-5, "without information the views are one"


def test_top_k_of_the_whole_vocabulary_changes_no_bit():
    module = model()
    whole = sampled(module, top_k=VOCABULARY)
    assert all(k is None for r in whole for k in r.kept)
    plain = [replace(r, kept=None) for r in whole]
    objective, losses, gradients = GRPO(), [], []
    for rollouts in (whole, plain):
        batch = batch_of(rollouts, objective.advantages(rollouts, 0))
        module.zero_grad()
        loss = objective.weighted_loss(batch, score(module, batch, objective.score_request(0)), 0).loss.sum()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    assert torch.equal(*losses) and relative_difference(*gradients) == 0.0


def test_a_token_outside_its_recorded_set_is_refused_and_vllm_records_none_without_a_top_k():
    rollouts = random_rollouts(2)
    for r in rollouts:
        r.kept = [[token] for token, policy in zip(r.completion, r.policy_mask, strict=True) if policy]
    rollouts[1].kept[0] = [VOCABULARY - 1 if rollouts[1].completion[0] != VOCABULARY - 1 else 1, 2]
    with pytest.raises(InputError, match=r"row 1: policy token 0, id \d+, is not among the 2 ids that the sampler says"):
        batch_of(rollouts)
    with pytest.raises(InputError, match=r"record_kept with sampler\.top_p=0\.9 needs sampler\.top_k, which bounds"):
        VLLMSampler(max_new_tokens=4, model_dir="unused", top_p=0.9, record_kept=True)


# ------------------------------------------------------------------------------------------- masks


def ratios_of(rows: list[list[float]], metric: str, low: float, high: float) -> list[list[bool]]:
    """The definition, token by token, in Python's floats."""
    kept = []
    for ratios in rows:
        whole = {
            "geometric_mean": math.prod(ratios) ** (1 / len(ratios)),
            "product": math.prod(ratios),
            "mean_error": sum(max(r, 1 / r) for r in ratios) / len(ratios),
        }
        if metric == "ratio":
            kept.append([low <= r <= high for r in ratios])
        elif metric == "any_ratio":
            kept.append([all(low <= r <= high for r in ratios)] * len(ratios))
        else:
            kept.append([low <= whole[metric] <= high] * len(ratios))
    return kept


@pytest.mark.parametrize("metric", ["ratio", "geometric_mean", "product", "mean_error", "any_ratio"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_equal_their_definition_are_counted_and_take_the_whole_loss(metric, seed):
    mask, rollouts = MismatchMask(metric), [replace(r, sampled_by="student") for r in random_rollouts(12, seed)]
    batch = batch_of(rollouts)
    spread = {"geometric_mean": 0.03, "any_ratio": 6.0}.get(metric, 1.0)
    gaps = spread * torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lengths = [r.policy_tokens for r in rollouts]
    rows = [[math.exp(x) for x in part.tolist()] for part in gaps.split(lengths)]
    expected = ratios_of(rows, metric, mask.low, mask.high)
    batch.ratio_logprobs = batch.ratio_logprobs.double()
    mask.weigh(rollouts, batch, batch.ratio_logprobs + gaps)
    mask.mask(rollouts, [RolloutAdvantage(0.0)] * len(rollouts), success_threshold=0.5)
    for r, kept in zip(rollouts, expected, strict=True):
        assert (r.loss_weights or [1.0] * len(kept)) == [float(k) for k in kept]
    flat = [k for kept in expected for k in kept]
    assert 0 < sum(flat) < len(flat)
    touched = [r for r, kept in zip(rollouts, expected, strict=True) if not all(kept)]
    successes = [r for r in rollouts if r.reward >= 0.5]
    hit = sum(r.reward >= 0.5 for r in touched)
    report = mask.report(ONE)
    assert report == {
        "masked_tokens": len(flat) - sum(flat), "masked_rollouts": len(touched), "masked_successes": hit,
        "masked_success_frac": hit / len(successes),
    }  # fmt: skip
    assert not any(mask.report(ONE).values())
    objective = GRPO()
    masked = batch_of(rollouts, objective.advantages(rollouts, 0))
    logprobs = (masked.ratio_logprobs + 0.1).requires_grad_()
    loss = objective.weighted_loss(masked, Scores(logprobs, None, {}, None, None), 0).loss
    plain = objective.token_loss(masked, Scores(logprobs.detach(), None, {}, None, None), 0).loss
    loss.sum().backward()
    keep = torch.tensor(flat)
    assert torch.equal(loss.detach(), plain * keep) and not logprobs.grad[~keep].any() and logprobs.grad[keep].any()


def test_an_outlier_is_masked_alone_at_token_level_and_with_its_rollout_at_sequence_level():
    rollouts = [replace(r, sampled_by="student") for r in random_rollouts(4)]
    for metric, expected in (("ratio", 1), ("any_ratio", rollouts[2].policy_tokens)):
        fresh = [replace(r) for r in rollouts]
        batch = batch_of(fresh)
        trainer = batch.ratio_logprobs.clone()
        trainer[sum(r.policy_tokens for r in fresh[:2])] += 7.0
        mask = MismatchMask(metric)
        mask.weigh(fresh, batch, trainer)
        mask.mask(fresh, [RolloutAdvantage(0.0)] * 4, 1.0)
        assert [r.loss_weights is None for r in fresh] == [True, True, False, True]
        assert fresh[2].loss_weights.count(0.0) == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_by_sign_leaves_out_negative_advantages_with_a_large_mean_of_log_mu_over_pi(seed):
    """The definition of DeepSeek-V3.2's mask, in Python's floats; with "positive" the same rollouts of the other sign."""
    generator = torch.Generator().manual_seed(seed)
    plain = [replace(r, sampled_by="student") for r in random_rollouts(16, seed)]
    advantages = [RolloutAdvantage(x) for x in torch.randn(16, generator=generator).tolist()]
    advantages[0], advantages[1] = RolloutAdvantage(0.0), RolloutAdvantage(9.0, tokens=[-1.0] * plain[1].policy_tokens)
    batch = batch_of(plain)
    batch.ratio_logprobs = batch.ratio_logprobs.double()
    lengths = [r.policy_tokens for r in plain]
    shifts = torch.randn(16, generator=generator, dtype=torch.float64)
    shifts[:2] = -2.0
    trainer = batch.ratio_logprobs + shifts.repeat_interleave(torch.tensor(lengths))
    for only, sign in (("negative", -1.0), ("positive", 1.0)):
        rollouts = [replace(r) for r in plain]
        mask = MismatchMask("geometric_mean", low=math.exp(-0.5), high=math.inf, only=only)
        mask.weigh(rollouts, batch, trainer)
        mask.mask(rollouts, advantages, 1.0)
        expected = [
            (-1.0 if n == 1 else advantages[n].advantage) * sign > 0.0 and -float(shift) > 0.5 for n, shift in enumerate(shifts)
        ]
        assert [r.loss_weights == [0.0] * r.policy_tokens for r in rollouts] == expected
        assert [r.loss_weights is None for r in rollouts] == [not masked for masked in expected]
        assert any(expected) or only == "positive"
        assert not expected[0]
        assert mask.report(ONE)["masked_tokens"] == sum(n for n, masked in zip(lengths, expected, strict=True) if masked)


def test_all_tokens_masked_give_a_finite_zero_loss_with_a_graph():
    rollouts = [replace(r, loss_weights=[0.0] * r.policy_tokens) for r in random_rollouts(3)]
    batch, objective = batch_of(rollouts, GRPO().advantages(rollouts, 0)), GRPO()
    logprobs = torch.full((len(batch.targets),), -torch.inf).requires_grad_()
    loss = objective.weighted_loss(batch, Scores(logprobs, None, {}, None, None), 0).loss
    assert loss.requires_grad and torch.equal(loss.detach(), torch.zeros_like(loss))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"metric": "mean"}, "mismatch_mask.metric=mean is unknown"),
        ({"low": 2.0}, "must satisfy 0 <= low <= 1 <= high"),
        ({"only": "neg"}, "mismatch_mask.only=neg is unknown; choose one of all, negative, positive"),
    ],
)
def test_masks_that_would_mask_agreement_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        MismatchMask(**settings)
