"""Test π-Distill against its equations, and the laws of its halves."""

import pytest
import torch

from pidistill.errors import InputError
from pidistill.losses.reductions import token_mean
from pidistill.objectives import GRPO, OPSD, PiDistill
from pidistill.scoring.score import score
from pidistill.types import Divergence, ScoreRequest
from tests.support.builders import batch_of, gradients, model, random_rollouts, relative_difference
from tests.support.objective_runs import gradient, leaf_scores, on_policy


def combine(a, b, alpha):
    return {k: alpha * a[k] + (1 - alpha) * b[k] for k in a}


@pytest.mark.parametrize("kl_mode", ["loss_rb", "loss_rb_complete", "loss_k2", "reward_k1", "reward_rb"])
def test_gradient_is_linear_in_alpha(kl_mode):
    """grad(α) = α·grad(1) + (1−α)·grad(0), for every kl_mode."""
    module, rollouts = model(), random_rollouts(6, group_size=3)
    one, zero, mixed = (gradient(PiDistill(alpha=a, beta=0.7, kl_mode=kl_mode), module, rollouts)[1] for a in (1, 0, 0.3))
    assert relative_difference(mixed, combine(one, zero, 0.3)) < 1e-5


def sides(objective, *, group_size=2):
    rollouts = random_rollouts(4, group_size=group_size)
    for rollout in rollouts:
        rollout.behaviour_values = [0.1 * i for i in range(rollout.policy_tokens)]
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores, logits = leaf_scores(batch, objective)
    objective.token_loss(batch, scores, 0).loss.sum().backward()
    return {view: x.grad for view, x in logits.items()}


@pytest.mark.parametrize("kl_mode", ["loss_rb", "loss_rb_complete", "loss_k2", "reward_k1", "reward_rb"])
@pytest.mark.parametrize("student_term", ["ppo", "topr"])
def test_at_alpha_1_the_student_has_no_gradient_and_at_alpha_0_the_teacher_has_none(kl_mode, student_term):
    """no gradient to the student at α=1, none to the teacher at α=0; both get some in between."""
    build = lambda alpha: PiDistill(alpha=alpha, beta=0.5, kl_mode=kl_mode, student_term=student_term)  # noqa: E731
    assert sides(build(1.0))["student"] is None or not sides(build(1.0))["student"].any()
    assert sides(build(1.0))["teacher"].any()
    assert sides(build(0.0))["teacher"] is None or not sides(build(0.0))["teacher"].any()
    assert sides(build(0.0))["student"].any()
    both = sides(build(0.5))
    assert both["student"].any()
    assert both["teacher"].any()


@pytest.mark.parametrize("kl_mode", ["loss_rb", "loss_rb_complete", "loss_k2", "reward_k1", "reward_rb"])
def test_opsd_gives_the_teacher_no_gradient(kl_mode):
    grads = sides(OPSD(beta=0.5, kl_mode=kl_mode))
    assert grads["teacher"] is None or not grads["teacher"].any()
    assert grads["student"].any()


def differentiated(objective, rollouts):
    """Return the batch, the loss per token, the logits with their gradients, and copies of them for the equations."""
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores, logits = leaf_scores(batch, objective)
    loss = objective.token_loss(batch, scores, 0).loss
    loss.sum().backward()
    return batch, loss, logits, {view: x.detach().clone().requires_grad_() for view, x in logits.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_equals_the_equations_written_out(alpha):
    """Eq. 2–4 with PPO on both halves, straight from float64 logits; value and gradient on both sides."""
    objective = PiDistill(alpha=alpha, beta=0.6, advantage="group_mean")
    rollouts = random_rollouts(4)
    batch, loss, logits, copies = differentiated(objective, rollouts)
    T, S = (torch.log_softmax(copies[v], -1) for v in ("teacher", "student"))
    picked = (batch.targets % 11)[:, None]
    rewards = torch.tensor([r.reward for r in rollouts])
    means = rewards.view(2, 2).mean(1, keepdim=True).expand(2, 2).reshape(-1)
    A = (rewards - means)[batch.rollout_index].double()

    def clipped(logp):
        rho = (logp.gather(1, picked).squeeze(1) - batch.ratio_logprobs.double()).exp()
        return torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)

    kl_T = (T.exp() * (T - S.detach())).sum(-1)
    kl_S = (T.detach().exp() * (T.detach() - S)).sum(-1)
    J = alpha * (clipped(T) - 0.6 * kl_T) + (1 - alpha) * (clipped(S) - 0.6 * kl_S)
    torch.testing.assert_close(loss.double(), -J, atol=1e-6, rtol=1e-6)
    (-J).sum().backward()
    for view in copies:
        expected = copies[view].grad
        got = logits[view].grad if logits[view].grad is not None else torch.zeros_like(expected)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


WITH_RATIO = [(term, below) for term in ("ppo", "topr", "topr of sequences") for below in ("behaviour", "live_teacher")]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("term, denominator", [*WITH_RATIO, ("sft", "behaviour"), ("snis", "behaviour")])
def test_every_student_term_on_older_samples_equals_its_equation(term, denominator, alpha):
    """Value, gradient and metrics with importance weights: the trainer's log-probs take the place of the sampler's."""
    kind, level = term.partition(" ")[0], "sequence" if "sequences" in term else "token"
    more = {"topr_low": 0.3, "topr_high": 1.4, "topr_level": level} if kind == "topr" else {}
    objective = PiDistill(alpha=alpha, beta=0.6, student_term=kind, ratio_denominator=denominator, **more)
    rollouts = random_rollouts(6, group_size=3)
    generator = torch.Generator().manual_seed(5)
    for i, rollout in enumerate(rollouts):
        rollout.reward = rollout.task_reward = [1.0, 0.0, 0.4, 0.0, 1.0, 1.0][i]
        rollout.trainer_logprobs = (-3 * torch.rand(rollout.policy_tokens, generator=generator)).tolist()
        rollout.importance_weights = (2 * torch.rand(rollout.policy_tokens, generator=generator)).tolist()
        rollout.behaviour_values = [-0.2 * t for t in range(rollout.policy_tokens)]
    advantages = objective.advantages(rollouts, 0)
    batch = batch_of(rollouts, advantages)
    scores, logits = leaf_scores(batch, objective)
    answer = objective.token_loss(batch, scores, 0)
    answer.loss.sum().backward()

    copies = {v: x.detach().clone().requires_grad_() for v, x in logits.items()}
    T, S = (torch.log_softmax(copies[v], -1) for v in ("teacher", "student"))
    log_t, log_s = (x.gather(1, (batch.targets % 11)[:, None]).squeeze(1) for x in (T, S))
    mean = {group: sum(r.reward for r in rollouts if r.group == group) / 3 for group in (0, 1)}
    A, w, mu, R = (
        torch.tensor([x for r in rollouts for x in values(r)], dtype=torch.float64)
        for values in (
            lambda r: [r.reward - mean[r.group]] * r.policy_tokens,
            lambda r: r.importance_weights,
            lambda r: r.trainer_logprobs,
            lambda r: [r.reward] * r.policy_tokens,
        )
    )
    below = mu if denominator == "behaviour" else log_t.detach()

    def surrogate(log_p, under):
        rho = (log_p - under).exp()
        return torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)

    rho = (log_s - below).exp().detach()
    if kind == "ppo":
        student = w * surrogate(log_s, below)
    elif kind == "topr":
        product = torch.stack([rho[batch.rollout_index == i].prod() for i in batch.rollout_index])
        student = w * torch.where(A > 0, 1.0, (product if level == "sequence" else rho).clamp(0.3, 1.4)) * A * log_s
    elif kind == "sft":
        student = (R > 0) * log_s
    else:
        student = torch.tensor([advantages[i].snis_weight for i in batch.rollout_index.tolist()]) * log_s
    teacher = w * surrogate(log_t, mu) - 0.6 * (T.exp() * (T - S.detach())).sum(-1)
    student = student - 0.6 * (T.detach().exp() * (T.detach() - S)).sum(-1)
    loss = -(alpha * teacher + (1 - alpha) * student)
    loss.sum().backward()
    torch.testing.assert_close(answer.loss.double(), loss, atol=1e-6, rtol=1e-6)
    for view, x in copies.items():
        got = torch.zeros_like(x) if logits[view].grad is None else logits[view].grad
        torch.testing.assert_close(got, torch.zeros_like(x) if x.grad is None else x.grad, atol=1e-6, rtol=1e-6)

    def clipped(log_p, under):
        rho = (log_p - under).exp()
        return ((A > 0) & (rho > 1.2) | (A < 0) & (rho < 0.8)).double()

    share = (1 - alpha) * clipped(log_s, below) if kind == "ppo" else 0.0
    expected = {
        "ratio_mean": (log_t - mu).exp(),
        "student_ratio_mean": rho,
        "clip_frac": alpha * clipped(log_t, mu) + share,
    }
    for name, value in expected.items():
        torch.testing.assert_close(answer.metrics[name].double(), value.detach().double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kl_mode", ["loss_rb", "loss_rb_complete", "reward_k1", "reward_rb"])
def test_without_pi_it_is_the_rl_baseline(alpha, kl_mode):
    """no PI and a live teacher: teacher = student, KL 0, and the gradient is GRPO's for every α."""
    module = model()
    rollouts = on_policy(module, random_rollouts(6, group_size=3, with_pi=False), "student")
    loss, ours = gradient(PiDistill(alpha=alpha, beta=0.7, kl_mode=kl_mode), module, rollouts)
    rl_loss, control = gradient(GRPO(), module, rollouts)
    assert loss == pytest.approx(rl_loss, abs=1e-6)
    assert relative_difference(ours, control) < 1e-5
    batch = batch_of(rollouts)
    scores = score(module, batch, PiDistill().score_request(0))
    torch.testing.assert_close(scores.student_logprobs, scores.teacher_logprobs, atol=1e-6, rtol=1e-6)
    for kl in scores.divergences.values():
        assert kl.abs().max() < 1e-6


def test_without_pi_and_reward_nothing_moves():
    """equal rewards and no PI: zero loss, zero gradient."""
    module = model()
    rollouts = on_policy(module, random_rollouts(4, with_pi=False), "student")
    for rollout in rollouts:
        rollout.reward = 0.3
    loss, grads = gradient(PiDistill(alpha=0.5, beta=1.0), module, rollouts)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert all(g.abs().max() < 1e-7 for g in grads.values())


def test_a_row_without_pi_has_no_kl_term_even_with_another_teacher():
    """`no_pi: rl`: the distillation weight of such a row is 0; `no_pi: distill` keeps it."""
    rollouts = random_rollouts(4, with_pi=False)
    for no_pi, expected in (("rl", 0.0), ("distill", 1.0)):
        objective = PiDistill(alpha=0.0, beta=1.0, no_pi=no_pi)
        batch = batch_of(rollouts, objective.advantages(rollouts, 0))
        batch.advantages.zero_()
        scores, _ = leaf_scores(batch, objective)
        kl = scores.divergences[Divergence("kl_teacher_student", "student")]
        torch.testing.assert_close(objective.token_loss(batch, scores, 0).loss, expected * kl)


def test_micro_batches_and_order_change_nothing():
    """the sum over micro-batches, in any order, is the whole batch's loss and gradient."""
    module, rollouts = model(), random_rollouts(6, group_size=3)
    objective = PiDistill(alpha=0.5, beta=0.5)
    _, whole = gradient(objective, module, rollouts)
    advantages = objective.advantages(rollouts, 0)
    tokens = sum(r.policy_tokens for r in rollouts)
    module.zero_grad()
    for part in ([5, 1], [0], [4, 2, 3]):
        batch = batch_of([rollouts[i] for i in part], [advantages[i] for i in part])
        scores = score(module, batch, objective.score_request(0))
        token_mean(objective.token_loss(batch, scores, 0).loss, tokens).backward()
    assert relative_difference(gradients(module), whole) < 1e-5


def test_live_teacher_denominator_is_the_teacher_now():
    """`ratio_denominator: live_teacher`: the student half's ratio is S/sg T whatever μ was; no gradient through it."""
    objective = PiDistill(alpha=0.0, beta=0.0, ratio_denominator="live_teacher")
    rollouts = random_rollouts(4)
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    scores, logits = leaf_scores(batch, objective)
    answer = objective.token_loss(batch, scores, 0)
    expected = (scores.student_logprobs - scores.teacher_logprobs).detach().exp()
    torch.testing.assert_close(answer.metrics["student_ratio_mean"].double(), expected)
    answer.loss.sum().backward()
    assert logits["teacher"].grad is None or not logits["teacher"].grad.any()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_teacher_half_is_corrected_by_the_behaviour_policy_whatever_the_denominator(alpha):
    """`ratio_denominator` concerns the student half; T/sg T would leave later updates of a round without correction or clip."""
    rollouts = random_rollouts(4)
    grads = []
    for denominator in ("behaviour", "live_teacher"):
        objective = PiDistill(alpha=alpha, beta=0.0, ratio_denominator=denominator)
        batch = batch_of(rollouts, objective.advantages(rollouts, 0))
        scores, logits = leaf_scores(batch, objective)
        objective.token_loss(batch, scores, 0).loss.sum().backward()
        grads.append(logits["teacher"].grad)
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].any()


def test_no_pi_distill_keeps_the_kl_in_every_mode():
    rollouts = random_rollouts(4, with_pi=False)
    for rollout in rollouts:
        rollout.behaviour_values = [0.1 * (i + 1) for i in range(rollout.policy_tokens)]
    for kl_mode in ("reward_k1", "reward_rb", "loss_rb_complete"):
        by_policy = {n: PiDistill(kl_mode=kl_mode, no_pi=n).advantages(rollouts, 0) for n in ("rl", "distill")}
        assert not any(any(a.kl) for a in by_policy["rl"]), kl_mode
        assert any(any(a.kl) for a in by_policy["distill"]), kl_mode


def test_opsd_that_would_train_nothing_and_weights_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="leave nothing to train"):
        OPSD(beta=0.0, reward_weight=0.0)
    with pytest.raises(InputError, match="objective.alpha=True is not a number"):
        PiDistill(alpha=True)


def test_opsd_without_a_reward_drops_rows_without_pi():
    assert OPSD(reward_weight=0.0).no_pi == "drop"
    assert OPSD().no_pi == "rl"
    assert OPSD(reward_weight=0.0, no_pi="error").no_pi == "error"


def test_shared_reward_gives_both_halves_one_advantage():
    """Algorithm 1 as printed: the student half sees the KL in the shared advantage and has no term of its own."""
    objective = PiDistill(alpha=0.0, beta=0.9, kl_mode="reward_rb", student_kl="shared_reward")
    rollouts = random_rollouts(4)
    for rollout in rollouts:
        rollout.behaviour_values = [rollout.reward] * rollout.policy_tokens
    batch = batch_of(rollouts, objective.advantages(rollouts, 0))
    totals = torch.tensor([r.reward - 0.9 * r.reward * r.policy_tokens for r in rollouts]).view(2, 2)
    expected = (totals - totals.mean(1, keepdim=True)).reshape(-1)[batch.rollout_index]
    torch.testing.assert_close(batch.advantages + batch.kl_advantages, expected, atol=1e-5, rtol=1e-5)
    assert not any(d.grad == "student" for d in objective.score_request(0).divergences)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_shared_reward_is_what_both_halves_train_on(alpha):
    """Before the first update the gradient is −A·∇log P of either half, A being the reward with the KL in it."""
    module = model()
    rollouts = on_policy(module, random_rollouts(6, group_size=3), "teacher")
    objective = PiDistill(alpha=alpha, beta=0.9, kl_mode="reward_rb", student_kl="shared_reward", ratio_denominator="behaviour")
    objective.clip = {"clip_low": 0.0, "clip_high": 1e6, "dual_clip": None}
    _, ours = gradient(objective, module, rollouts)
    totals = torch.tensor([r.reward - 0.9 * sum(r.behaviour_values) for r in rollouts]).view(2, 3)
    batch = batch_of(rollouts)
    advantage = (totals - totals.mean(1, keepdim=True)).reshape(-1)[batch.rollout_index]
    module.zero_grad()
    scores = score(module, batch, ScoreRequest(True, True))
    student_ratio = (scores.student_logprobs.detach() - batch.ratio_logprobs).exp()
    half_t, half_s = advantage * scores.teacher_logprobs, advantage * student_ratio * scores.student_logprobs
    token_mean(-(alpha * half_t + (1 - alpha) * half_s), len(batch.targets)).backward()
    assert relative_difference(ours, gradients(module)) < 1e-4


def test_kl_reward_scale_token_mean_divides_by_the_policy_tokens():
    rollouts = random_rollouts(2)
    for rollout in rollouts:
        rollout.behaviour_values = [0.2 * (i + 1) for i in range(rollout.policy_tokens)]
    answers = PiDistill(beta=0.5, kl_mode="reward_rb", kl_reward_scale="token_mean").advantages(rollouts, 0)
    penalties = [0.5 * sum(r.behaviour_values) / r.policy_tokens for r in rollouts]
    expected = -(penalties[0] - sum(penalties) / 2)
    assert answers[0].kl == pytest.approx([expected] * rollouts[0].policy_tokens, abs=1e-6)


@pytest.mark.parametrize("student_kl", ["loss", "none"])
def test_kl_reward_scale_token_mean_divides_the_student_halfs_kl_too(student_kl):
    """Value and gradient of −J_S with β times the KL's mean over the answer, from float64 logits."""
    objective = PiDistill(alpha=0.0, beta=0.6, kl_mode="reward_rb", kl_reward_scale="token_mean", student_kl=student_kl)
    rollouts = random_rollouts(4)
    for rollout in rollouts:
        rollout.behaviour_values = [0.1] * rollout.policy_tokens
    batch, loss, logits, copies = differentiated(objective, rollouts)
    T, S = (torch.log_softmax(copies[v], -1) for v in ("teacher", "student"))
    rewards = [r.reward for r in rollouts]
    gaps = [a - (rewards[i - i % 2] + rewards[i - i % 2 + 1]) / 2 for i, a in enumerate(rewards)]
    per_token = [(gap, r.policy_tokens) for gap, r in zip(gaps, rollouts, strict=True) for _ in range(r.policy_tokens)]
    A, lengths = torch.tensor(per_token, dtype=torch.float64).T
    rho = (S.gather(1, (batch.targets % 11)[:, None]).squeeze(1) - batch.ratio_logprobs.double()).exp()
    kl = (T.detach().exp() * (T.detach() - S)).sum(-1) / lengths
    expected = 0.6 * kl * (student_kl == "loss") - torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    expected.sum().backward()
    torch.testing.assert_close(logits["student"].grad, copies["student"].grad, atol=1e-6, rtol=1e-6)


def test_drop_zero_advantage_drops_the_rollout_or_its_rl_term_alone():
    """`row` drops the rollout, `policy_gradient` its RL term alone; judged on the reward without KL."""
    rollouts = random_rollouts(4)
    for rollout, reward in zip(rollouts, (1.0, 1.0, 0.0, 1.0), strict=True):
        rollout.reward = reward
        rollout.behaviour_values = [float(rollout.group)] + [0.5] * (rollout.policy_tokens - 1)
    kept = PiDistill(kl_mode="reward_k1", drop_zero_advantage="row").advantages(rollouts, 0)
    assert [a.keep for a in kept] == [False, False, True, True]
    without = PiDistill(kl_mode="reward_k1", drop_zero_advantage="policy_gradient").advantages(rollouts, 0)
    assert all(a.keep for a in without)
    assert not any(without[0].kl)
    assert any(without[2].kl)
    future = PiDistill(kl_mode="loss_rb_complete", drop_zero_advantage="policy_gradient").advantages(rollouts, 0)
    assert any(future[0].kl)  # part of the KL loss, not of the RL term
    assert all(a.keep for a in PiDistill(kl_mode="reward_k1").advantages(rollouts, 0))


def test_schedules_move_alpha_and_beta():
    objective = PiDistill(alpha={"start": 0.0, "end": 0.5, "steps": 10}, beta={"start": 1.0, "end": 0.0, "steps": 4})
    assert [objective.coefficients(s)["alpha"] for s in (0, 5, 10, 99)] == [0.0, 0.25, 0.5, 0.5]
    assert objective.coefficients(2)["beta"] == 0.5
    assert objective.samples_from_teacher_weights(0)
    assert not objective.samples_from_teacher_weights(1)
    assert not objective.score_request(0).teacher_grad
    assert objective.score_request(1).teacher_grad


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"alpha": 1.5}, r"objective.alpha=1.5 is outside \[0.0, 1.0\]"),
        ({"alpha": {"start": 0, "end": 2, "steps": 5}}, "objective.alpha=2.0 is outside"),
        ({"alpha": {"start": 0, "finish": 1}}, "is not a schedule"),
        ({"beta": -0.1}, "objective.beta=-0.1 is outside"),
        ({"clip_low": 1.0}, "objective.clip_low=1.0 must lie in"),
        ({"clip_high": 1.0}, "objective.clip_high=1.0 must be above 1"),
        ({"dual_clip": 0.5}, "objective.dual_clip=0.5"),
        ({"kl_mode": "loss_k1"}, "zero expected gradient"),
        ({"kl_mode": "advantage_rb"}, "zero expected gradient"),
        ({"kl_mode": "loss_k3"}, "follows the other KL"),
        ({"kl_mode": "rb"}, "choose one of loss_rb"),
        ({"student_kl": "shared_reward"}, "student_kl=shared_reward shares a reward"),
        ({"student_term": "grpo"}, "choose one of ppo, topr"),
        ({"kl_reward_scale": "token_mean"}, "needs kl_mode=reward_rb"),
        ({"drop_zero_advantage": True}, "choose one of False, policy_gradient, row"),
        ({"topr_low": 2.0, "student_term": "topr"}, "0 <= topr_low <= topr_high"),
        ({"topr_low": 0.5}, "read only with student_term=topr"),
        ({"kl_gamma": 0.5}, "needs kl_mode=loss_rb_complete"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        PiDistill(**arguments)


def test_opsd_is_grpo_at_beta_zero_and_has_another_gradient_above():
    module = model()
    rollouts = on_policy(module, random_rollouts(6, group_size=3), "student")
    _, ours = gradient(OPSD(beta=0.0), module, rollouts)
    _, control = gradient(GRPO(), module, rollouts)
    assert relative_difference(ours, control) < 1e-6
    _, with_kl = gradient(OPSD(beta=0.5), module, rollouts)
    assert relative_difference(with_kl, control) > 1e-2


@pytest.mark.parametrize("kl_mode", ["loss_k1", "loss_k3", "advantage_rb", "none"])
def test_opsd_refuses_the_same_kl_modes(kl_mode):
    with pytest.raises(InputError):
        OPSD(kl_mode=kl_mode)
