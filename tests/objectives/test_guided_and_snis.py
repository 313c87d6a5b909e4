"""Test expected gradients by exact enumeration (OPD, its trust region, SNIS), `sft` and `snis` terms, turn returns."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.errors import InputError
from pidistill.losses.reductions import token_mean
from pidistill.losses.token_weights import ClipTerm, SkipFirst
from pidistill.objectives import GKD, GRPO, OPD, OPDPPO, OPSD, GuideGRPO, PiDistill
from pidistill.scoring.score import score
from pidistill.types import Example, PromptPair, Rollout, Scores
from tests.support.builders import batch_of, model, random_rollouts, relative_difference
from tests.support.objective_runs import dense_scores, expected_gradient, gradient, leaf_scores, on_policy, pathwise_gradient
from tests.support.oracles import MarkovChain

# ---------------------------------------------------------------------------------------- on-policy distillation


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("divergence", ["sampled", "kl_student_teacher"])
def test_opd_has_the_gradient_of_each_steps_kl_student_teacher(divergence, seed):
    """The sampled token's log-ratio as its own advantage: Σ_t kl(S||T)_t at fixed prefixes, as is that KL as a loss."""
    chain = MarkovChain.seeded(seed, sampler="student")
    ours = expected_gradient(OPD(divergence=divergence), chain)
    torch.testing.assert_close(ours, pathwise_gradient(chain), atol=2e-6, rtol=1e-5)


def test_opd_as_ppo_has_the_same_gradient_on_the_first_update():
    chain = MarkovChain.seeded(0, sampler="student", end=1)
    ours = expected_gradient(OPDPPO(), chain)
    torch.testing.assert_close(ours, pathwise_gradient(chain), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_opds_trust_region_has_the_gradient_of_kl_behaviour_student(seed):
    """y ~ μ ≠ S, as on later updates of a round; the chain's "teacher" is μ here."""
    chain = MarkovChain.seeded(seed, sampler="teacher", live="student")
    with_region, without = (expected_gradient(OPDPPO(beta=beta), chain) for beta in (0.7, 0.0))
    expected = 0.7 * chain.gradient(chain.sequence_kl)
    assert expected.norm() > 0.1
    torch.testing.assert_close(with_region - without, expected, atol=2e-6, rtol=1e-5)


def test_opds_trust_region_has_no_expected_gradient_where_the_student_sampled():
    chain = MarkovChain.seeded(0, sampler="student")
    with_region, without = (expected_gradient(OPDPPO(beta=0.7), chain), expected_gradient(OPDPPO(), chain))
    torch.testing.assert_close(with_region, without, atol=2e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------- SNIS


def snis(**changes) -> PiDistill:
    settings = {"alpha": 0.0, "student_kl": "none", "student_term": "snis", "snis_beta": 0.5, "snis_level": "sequence"}
    return PiDistill(**(settings | changes))


def chain_rollout(y: tuple[int, ...], log_mu: float, reward: float, group: int = 0) -> Rollout:
    return Rollout(
        example=Example(id="chain", messages=[], privileged="pi"),
        prompts=PromptPair([0], [0, 0], has_privileged=True),
        completion=list(y),
        policy_mask=[True] * len(y),
        sampled_logprobs=[log_mu] + [0.0] * (len(y) - 1),
        sampled_by="teacher",
        group=group,
        stop_reason="done",
        turns=[],
        reward=reward,
    )


def student_scores(chain: MarkovChain, W: torch.Tensor, rollouts: list[Rollout]) -> Scores:
    logp = torch.log_softmax(chain.logits("student", W), -1)
    own = torch.stack([logp[p, t] for r in rollouts for p, t in zip(chain.previous(r.completion), r.completion, strict=True)])
    return Scores(own, own.detach(), {d: torch.zeros_like(own) for d in PiDistill().score_request(0).divergences}, None, None)


def snis_gradient(chain: MarkovChain, rollouts: list[Rollout]) -> torch.Tensor:
    """Of Σ_k −w_k·log S(y_k), through the objective: behaviour pass, weights of the round, batch, loss."""
    objective = snis()
    assert objective.behaviour_request().views == ("student",)
    values = objective.behaviour_values(student_scores(chain, chain.W, rollouts))
    for rollout, own in zip(rollouts, values.split([r.policy_tokens for r in rollouts]), strict=True):
        rollout.behaviour_values = own.tolist()
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))

    def loss(W):
        return objective.token_loss(batch, student_scores(chain, W, rollouts), 0).loss.sum() / len(rollouts)

    return chain.gradient(loss)


def towards_the_tilted_student(chain: MarkovChain, rewards: dict, beta: float) -> torch.Tensor:
    """∇_W KL(S*‖S) at S's own W, S*(y) = S(y)·exp(R(y)/β)/Z over all sequences."""
    tilted = {y: math.exp(float(chain.logprob("student", chain.W, y)) + rewards[y] / beta) for y in chain.sequences()}
    Z = sum(tilted.values())

    def value(W):
        return -sum(weight / Z * chain.logprob("student", W, y) for y, weight in tilted.items())

    return chain.gradient(value)


@pytest.mark.parametrize("end", [None, 1])
def test_snis_moves_the_student_towards_its_own_distribution_tilted_by_the_reward(end):
    """With every sequence in the group once, μ uniform, the weights are S·exp(R/β)/Z: the limit, by enumeration."""
    chain = MarkovChain.seeded(0, sampler="student", end=end)
    rewards = {y: float(sum(y) % 2) for y in chain.sequences()}
    rollouts = [chain_rollout(y, -math.log(len(rewards)), reward) for y, reward in rewards.items()]
    expected = towards_the_tilted_student(chain, rewards, beta=0.5)
    assert expected.norm() > 0.05
    torch.testing.assert_close(snis_gradient(chain, rollouts), expected, atol=1e-5, rtol=1e-4)


def test_snis_corrects_for_who_sampled():
    """Each sequence c_k times with μ(y_k) = c_k/N, not S: as if N samples fell as they should. The same direction."""
    chain = MarkovChain.seeded(1, sampler="student", end=0)
    sequences = chain.sequences()
    rewards = {y: 1.0 if y[-1] == 2 else 0.0 for y in sequences}
    counts = {y: 1 + (7 * i) % 5 for i, y in enumerate(sequences)}
    log_mu = {y: math.log(Fraction(c, sum(counts.values()))) for y, c in counts.items()}
    rollouts = [chain_rollout(y, log_mu[y], rewards[y]) for y, c in counts.items() for _ in range(c)]
    expected = towards_the_tilted_student(chain, rewards, beta=0.5)
    torch.testing.assert_close(snis_gradient(chain, rollouts), expected, atol=1e-5, rtol=1e-4)
    for rollout in rollouts:
        rollout.sampled_logprobs = [0.0] * len(rollout.completion)
    assert relative_difference({"": snis_gradient(chain, rollouts)}, {"": expected}) > 0.1


def test_means_over_samples_of_snis_approach_the_exact_direction():
    """1 000 samples of μ come nearer than 20 (Monte Carlo with a fixed seed)."""
    chain = MarkovChain.seeded(0, sampler="student")
    sequences = chain.sequences()
    rewards = {y: float(y[0] == y[-1]) for y in sequences}
    expected = towards_the_tilted_student(chain, rewards, beta=0.5)
    probabilities = torch.softmax(torch.randn(len(sequences), generator=torch.Generator().manual_seed(1)), 0)

    def error(n: int) -> float:
        drawn = torch.multinomial(probabilities, n, replacement=True, generator=torch.Generator().manual_seed(2)).tolist()
        rollouts = [chain_rollout(sequences[k], math.log(probabilities[k]), rewards[sequences[k]]) for k in drawn]
        return relative_difference({"": snis_gradient(chain, rollouts)}, {"": expected})

    assert error(1000) < 0.25 < error(20)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_snis_weights_are_the_softmax_over_the_group_times_its_size(level):
    rollouts = random_rollouts(7, group_size=3)
    order = [3, 0, 6, 1, 4, 2, 5]
    rollouts = [rollouts[i] for i in order]  # groups need not be neighbours; the last group has one rollout
    for i, rollout in enumerate(rollouts):
        rollout.behaviour_values = [-0.3 * (i + 1) / (t + 1) for t in range(rollout.policy_tokens)]
    answers = snis(snis_level=level, snis_beta=0.8).advantages(rollouts, 0)

    def score(r: Rollout) -> float:
        mu = [x for x, m in zip(r.sampled_logprobs, r.policy_mask, strict=True) if m]
        n = 1 if level == "sequence" else len(mu)
        return (sum(r.behaviour_values) - sum(mu)) / n + r.reward / 0.8

    for rollout, answer in zip(rollouts, answers, strict=True):
        group = [math.exp(score(r)) for r in rollouts if r.group == rollout.group]
        assert answer.snis_weight == pytest.approx(len(group) * math.exp(score(rollout)) / sum(group), rel=1e-5)
    assert sum(a.snis_weight for a in answers) == pytest.approx(len(rollouts), rel=1e-5)


def test_snis_takes_beta_where_it_has_none_of_its_own():
    rollouts = random_rollouts(4)
    for rollout in rollouts:
        rollout.behaviour_values = [-0.5] * rollout.policy_tokens
    own, given = (snis(beta=b, snis_beta=s).advantages(rollouts, 0) for b, s in ((0.3, None), (9.0, 0.3)))
    assert [a.snis_weight for a in own] == [a.snis_weight for a in given]
    assert snis().advantages([], 0) == []


def test_snis_gives_the_weights_no_gradient_and_the_teacher_none():
    rollouts = random_rollouts(4)
    for rollout in rollouts:
        rollout.behaviour_values = [-0.5] * rollout.policy_tokens
    objective = snis()
    advantages = objective.advantages(rollouts, 0)
    batch = batch_of(rollouts, advantages)
    scores, logits, picked = dense_scores(objective, batch)
    objective.token_loss(batch, scores, 0).loss.sum().backward()
    student = logits["student"].detach().clone().requires_grad_()
    logp = torch.log_softmax(student, -1)
    weights = [advantages[i].snis_weight for i in batch.rollout_index.tolist()]
    sum(-w * logp[n, picked[n]] for n, w in enumerate(weights)).backward()
    torch.testing.assert_close(logits["student"].grad, student.grad, atol=1e-6, rtol=1e-6)
    assert logits["teacher"].grad is None or not logits["teacher"].grad.any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"snis_beta": 0.5}, "read only with student_term=snis"),
        ({"snis_level": "sequence"}, "read only with student_term=snis"),
        ({"student_term": "snis", "snis_level": "word"}, "objective.snis_level=word is unknown"),
        ({"student_term": "snis", "snis_beta": 0.0}, "objective.snis_beta=0.0 must be above 0"),
        ({"student_term": "snis", "beta": 0.0}, "divides the reward by objective.beta"),
        ({"student_term": "snis", "beta": {"start": 0.5, "end": 0.0, "steps": 10}}, "divides the reward by objective.beta"),
        ({"student_term": "snis", "kl_mode": "reward_k1"}, "each need their own numbers"),
        ({"student_term": "snis", "kl_mode": "loss_rb_complete"}, "each need their own numbers"),
    ],
)
def test_wrong_snis_settings_are_refused_at_construction(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        PiDistill(**arguments)


# ---------------------------------------------------------------------------------------- rejection sampling as a term


def test_the_sft_term_is_mean_nll_of_the_rewarded_traces():
    """α=0, β=0, no student KL: −log S on the traces with a reward above 0, over all policy tokens of the step.

    The reward is the environment's: `reward_shaping` takes 0.5 from every rollout here.
    """
    module, rollouts = model(), random_rollouts(6, group_size=3)
    for rollout, reward in zip(rollouts, (1.0, 0.0, 0.2, -1.0, 0.0, 0.7), strict=True):
        rollout.task_reward, rollout.reward = reward, reward - 0.5
    loss, ours = gradient(PiDistill(alpha=0.0, beta=0.0, student_kl="none", student_term="sft"), module, rollouts)
    rewarded = [r for r in rollouts if r.task_reward > 0]
    tokens = sum(r.policy_tokens for r in rollouts)

    module.zero_grad()
    total = 0.0
    for r in rewarded:
        ids = r.prompts.student + r.completion
        logp = torch.log_softmax(module(torch.tensor([ids])).float(), -1)[0]
        for t, is_policy in enumerate(r.policy_mask):
            at = len(r.prompts.student) + t
            total = total - logp[at - 1, ids[at]] * is_policy
    (total / tokens).backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(total.item() / tokens, rel=1e-5)
    assert relative_difference(ours, expected) < 1e-5


def test_the_student_terms_keep_the_teacher_half_and_the_kl():
    """student_term changes the student's policy gradient alone: grad(term) − grad(ppo) does not depend on β or the PI."""
    rollouts = random_rollouts(4)
    grads = {}
    for beta in (0.0, 0.8):
        for term in ("ppo", "sft"):
            objective = PiDistill(alpha=0.5, beta=beta, student_term=term)
            batch = batch_of(rollouts, objective.advantages(rollouts, 0))
            objective_scores, logits = leaf_scores(batch, objective)
            objective.token_loss(batch, objective_scores, 0).loss.sum().backward()
            grads[beta, term] = {view: x.grad for view, x in logits.items()}
    for view in ("student", "teacher"):
        without, with_kl = (grads[beta, "sft"][view] - grads[beta, "ppo"][view] for beta in (0.0, 0.8))
        torch.testing.assert_close(without, with_kl, atol=1e-7, rtol=1e-5)
    assert not (grads[0.8, "sft"]["teacher"] - grads[0.8, "ppo"]["teacher"]).any()
    assert (grads[0.8, "sft"]["student"] - grads[0.8, "ppo"]["student"]).any()


# ---------------------------------------------------------------------------------------- guided groups, process rewards


def test_guide_grpo_without_a_failed_group_is_grpo_through_the_whole_round():
    module = model()
    rollouts = on_policy(module, random_rollouts(6, group_size=3), "student")
    for advantage in ("group_mean", "leave_one_out", "standardised"):
        ours, control = ([a.advantage for a in kind(advantage=advantage).advantages(rollouts, 0)] for kind in (GuideGRPO, GRPO))
        assert ours == control
    assert relative_difference(gradient(GuideGRPO(), module, rollouts)[1], gradient(GRPO(), module, rollouts)[1]) == 0.0


def test_only_the_methods_that_say_so_guide_or_mix():
    assert GuideGRPO().guides_failed_groups and not GRPO().guides_failed_groups
    assert GKD(lmbda=0.3).on_policy_frac == 0.3 and GRPO().on_policy_frac == 1.0 and PiDistill().on_policy_frac == 1.0


def with_turns(rollouts: list[Rollout], rewards: list[list[float]]) -> list[Rollout]:
    for rollout, own in zip(rollouts, rewards, strict=True):
        n = rollout.policy_tokens
        lengths = [n - (len(own) - 1), *[1] * (len(own) - 1)]
        rollout.turn_rewards, rollout.turn_policy_tokens, rollout.reward = own, lengths, math.fsum(own)
    return rollouts


def test_every_token_carries_its_turns_return_relative_to_the_group():
    rollouts = with_turns(random_rollouts(3, group_size=3), [[0.5, 0.0], [0.0, 1.0], [0.25]])
    batch = batch_of(rollouts, GRPO(advantage="turn_returns").advantages(rollouts, 0))
    first, second = (0.5 + 1.0 + 0.25) / 3, (0.0 + 1.0) / 2
    per_turn = [[0.5 - first, 0.0 - second], [1.0 - first, 1.0 - second], [0.25 - first]]
    expected = []
    for values, rollout in zip(per_turn, rollouts, strict=True):
        for value, length in zip(values, rollout.turn_policy_tokens, strict=True):
            expected += [value] * length
    torch.testing.assert_close(batch.advantages, torch.tensor(expected), atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=4, max_size=4))
def test_a_reward_at_the_end_makes_turn_returns_the_group_mean(ends):
    rollouts = with_turns(random_rollouts(4, group_size=2), [[0.0, end] for end in ends])
    by_turn, whole = (batch_of(rollouts, GRPO(advantage=a).advantages(rollouts, 0)) for a in ("turn_returns", "group_mean"))
    torch.testing.assert_close(by_turn.advantages, whole.advantages, atol=1e-6, rtol=1e-6)


def test_zero_advantages_are_judged_over_all_turns():
    rewards = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    rollouts = with_turns(random_rollouts(4, group_size=2), rewards)
    answers = GRPO(advantage="turn_returns", drop_zero_advantage="row").advantages(rollouts, 0)
    assert [a.keep for a in answers] == [False, False, True, True]
    assert answers[0].advantage == 0.0 and set(answers[0].tokens) == {0.0}
    # Same total, credited to other turns: only the return from the second turn on differs.
    assert set(answers[2].tokens) == {0.0, -0.5} and set(answers[3].tokens) == {0.0, 0.5}


def test_turns_that_do_not_make_up_the_rollout_are_refused():
    rollouts = with_turns(random_rollouts(2), [[0.0, 1.0], [1.0, 0.0]])
    rollouts[1] = replace(rollouts[1], turn_policy_tokens=[1, 1], turn_rewards=[1.0, 0.0])
    assert rollouts[1].policy_tokens > 2
    with pytest.raises(InputError, match="row 1: objective.advantage=turn_returns needs a reward and a length per turn"):
        GRPO(advantage="turn_returns").advantages(rollouts, 0)


@pytest.mark.parametrize("build", [PiDistill, OPSD])
@pytest.mark.parametrize("kl_mode", ["reward_k1", "reward_rb"])
def test_turn_returns_and_a_kl_in_the_reward_are_refused(build, kl_mode):
    with pytest.raises(InputError, match="gives every turn its own advantage"):
        build(advantage="turn_returns", kl_mode=kl_mode)


def test_demonstrations_among_the_rollouts_have_no_part_in_the_groups():
    """GKD's off-policy rows: no reward, advantage 0, and the others' means are as if they were not there."""
    rollouts = random_rollouts(5, group_size=2)
    sampled = GRPO().advantages(rollouts[:4], 0)
    demonstration = replace(rollouts[4], reward=None, sampled_logprobs=None, group=0)
    mixed = GRPO().advantages([demonstration, *rollouts[:4]], 0)
    assert mixed[1:] == sampled and mixed[0].advantage == 0.0
    batch = batch_of([demonstration, *rollouts[:4]], mixed)
    assert batch.rewards is None and batch.ratio_logprobs is None


# ---------------------------------------------------------------------------------------- token weights in π-Distill and OPSD


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_token_weight_acts_on_the_kls_of_both_halves_and_on_nothing_else(alpha):
    """SkipFirst beyond every token takes the KL away; ClipTerm that nothing reaches changes nothing."""
    rollouts = random_rollouts(4)

    def grads(**changes):
        objective = PiDistill(alpha=alpha, **({"beta": 0.8} | changes))
        batch = batch_of(rollouts, objective.advantages(rollouts, 0))
        scores, logits = leaf_scores(batch, objective)
        objective.token_loss(batch, scores, 0).loss.sum().backward()
        return {v: torch.zeros_like(x) if x.grad is None else x.grad for v, x in logits.items()}

    for changes, same in (({"token_weight": SkipFirst(10**6)}, {"beta": 0.0}), ({"token_weight": ClipTerm(1e6)}, {})):
        for view, ours in grads(**changes).items():
            torch.testing.assert_close(ours, grads(**same)[view])
    partly = grads(token_weight=SkipFirst(2))
    assert any(not torch.equal(partly[v], grads()[v]) and not torch.equal(partly[v], grads(beta=0.0)[v]) for v in partly)


@pytest.mark.parametrize("build", [PiDistill, OPSD])
@pytest.mark.parametrize("kl_mode", ["reward_k1", "loss_rb_complete"])
def test_a_token_weight_on_a_kl_that_reaches_other_tokens_is_refused(build, kl_mode):
    with pytest.raises(InputError, match="objective.token_weight acts on a KL"):
        build(token_weight=SkipFirst(1), kl_mode=kl_mode)


def test_the_loss_is_over_all_policy_tokens_whatever_is_skipped():
    """The denominator stays: skipping lowers the term."""
    module, rollouts = model(), random_rollouts(4)
    whole, skipped = (
        gradient(OPSD(beta=1.0, reward_weight=0.0, token_weight=w), module, rollouts)[0] for w in (None, SkipFirst(2))
    )
    batch = batch_of(rollouts)
    kl = score(module, batch, OPSD().score_request(0)).divergences
    (own,) = [x for d, x in kl.items() if d.grad == "student"]
    assert whole == pytest.approx(token_mean(own, len(own)).item(), rel=1e-5)
    assert skipped == pytest.approx(float((own * (batch.token_index >= 2)).sum() / len(own)), rel=1e-5)
