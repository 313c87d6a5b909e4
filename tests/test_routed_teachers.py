"""Several teachers, one per row: each row's numbers and gradient are those of its own teacher, whatever stands beside it."""

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.errors import InputError
from pidistill.objectives import OPD, OPSDUCLA
from pidistill.scoring.score import score
from pidistill.teachers import EMATeacher, FrozenTeacher, LiveTeacher, RoutedTeacher, SnapshotTeacher, TrustRegionTeacher
from pidistill.training.compatibility import check_routed
from pidistill.training.metrics import token_means, token_sums
from tests.support.builders import batch_of, gradients, model, random_rollouts, relative_difference

NAMES = ("math", "code")


def rows(count: int = 6, names=NAMES):
    rollouts = random_rollouts(count)
    for n, rollout in enumerate(rollouts):
        rollout.sampled_by = "student"
        rollout.example = type(rollout.example)(id=f"row {n}", messages=[], data={"domain": names[n % len(names)]})
    return rollouts


def routed(**teachers) -> RoutedTeacher:
    teacher = RoutedTeacher("domain", teachers)
    own = {name: model(seed) for seed, name in enumerate(teachers, start=5)}
    teacher.attach(lambda teacher, name: own[name])
    return teacher


def frozen(seed: int) -> FrozenTeacher:
    teacher = FrozenTeacher()
    teacher.attach(lambda: model(seed))
    return teacher


def step(module, rollouts, teacher, objective, packing="tree", denominator=None):
    """Scores, and the gradient of the mean loss over ``denominator`` tokens."""
    module.zero_grad()
    batch = batch_of(rollouts, objective.advantages(rollouts, 0), packing=packing)
    loss = lambda b, s: objective.weighted_loss(b, s, 0).loss  # noqa: E731
    scores = score(module, batch, objective.score_request(0), teacher=teacher, loss=loss)
    (loss(batch, scores).sum() / (denominator or len(batch.targets))).backward()
    return batch, scores, gradients(module)


@pytest.mark.parametrize("objective", [OPSDUCLA(), OPSDUCLA("kl_teacher_student"), OPD()], ids=["jsd", "kl", "opd"])
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_two_teachers_give_each_row_its_own_numbers_and_add_up_two_runs_gradients(objective, packing):
    module, rollouts, teacher = model(), rows(), routed(math=FrozenTeacher(), code=FrozenTeacher())
    total = sum(r.policy_tokens for r in rollouts)
    batch, scores, gradient = step(module, rollouts, teacher, objective, packing, total)
    parts = []
    for seed, name in enumerate(NAMES, start=5):
        chosen = [r for r in rollouts if r.example.data["domain"] == name]
        _, own, own_gradient = step(module, chosen, frozen(seed), objective, packing, total)
        parts.append(own_gradient)
        mask = torch.tensor([rollouts[i].example.data["domain"] == name for i in batch.rollout_index.tolist()])
        torch.testing.assert_close(scores.teacher_logprobs[mask], own.teacher_logprobs, rtol=1e-5, atol=1e-5)
        for divergence, values in own.divergences.items():
            torch.testing.assert_close(scores.divergences[divergence][mask], values, rtol=1e-4, atol=1e-5)
    added = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    assert relative_difference(gradient, added) < 1e-5


def test_two_names_with_equal_weights_are_one_teacher():
    rollouts, objective = rows(), OPSDUCLA()
    teacher = RoutedTeacher("domain", {"math": FrozenTeacher(), "code": FrozenTeacher()})
    teacher.attach(lambda teacher, name: model(5))
    _, scores, gradient = step(model(), rollouts, teacher, objective)
    _, one, expected = step(model(), rollouts, frozen(5), objective)
    torch.testing.assert_close(scores.teacher_logprobs, one.teacher_logprobs, rtol=1e-6, atol=1e-6)
    assert relative_difference(gradient, expected) < 1e-6


def test_the_order_of_rows_and_a_batch_without_rows_of_a_teacher_change_nothing():
    teacher, objective, rollouts = routed(math=FrozenTeacher(), code=EMATeacher(0.5)), OPSDUCLA(), rows()
    _, _, expected = step(model(), rollouts, teacher, objective)
    _, _, turned = step(model(), rollouts[::-1], teacher, objective)
    assert relative_difference(turned, expected) < 1e-5
    alone = [r for r in rollouts if r.example.data["domain"] == "math"]
    _, scores, gradient = step(model(), alone, teacher, objective)
    _, one, other = step(model(), alone, frozen(5), objective)
    torch.testing.assert_close(scores.teacher_logprobs, one.teacher_logprobs, rtol=1e-6, atol=1e-6)
    assert relative_difference(gradient, other) < 1e-6


def test_a_live_teacher_beside_others_has_exactly_no_divergence_on_rows_without_information():
    rollouts = random_rollouts(4, with_pi=False)
    for n, rollout in enumerate(rollouts):
        rollout.example = type(rollout.example)(id=f"row {n}", messages=[], data={"domain": NAMES[n % 2]})
    teacher, objective = routed(math=LiveTeacher(), code=TrustRegionTeacher()), OPSDUCLA(no_pi="distill")
    batch, scores, _ = step(model(), rollouts, teacher, objective)
    live = torch.tensor([rollouts[i].example.data["domain"] == "math" for i in batch.rollout_index.tolist()])
    values = scores.divergences[objective.divergence]
    assert not values[live].any() and (values[~live] > 0).all()


# ------------------------------------------------------------------------------------------- balance, metrics, state


def test_balance_by_teachers_gives_each_the_same_weight_whatever_its_tokens():
    rollouts = rows(7, ("math", "math", "code"))
    teacher = RoutedTeacher(
        "domain", {"math": FrozenTeacher(), "code": FrozenTeacher(), "none": FrozenTeacher()}, balance="teachers"
    )
    teacher.balance(rollouts, dict)
    teacher.balance(rollouts, dict)  # a second step does not add up
    total, of = sum(r.policy_tokens for r in rollouts), {}
    for r in rollouts:
        of[r.example.data["domain"]] = of.get(r.example.data["domain"], 0.0) + r.balance * r.policy_tokens
    assert of == pytest.approx({"math": total / 2, "code": total / 2})
    weights = batch_of(rollouts).loss_weights
    assert float(weights.sum()) == pytest.approx(total) and len(weights) == total
    other = RoutedTeacher("domain", {"math": FrozenTeacher(), "code": FrozenTeacher()})
    plain = rows(7)
    other.balance(plain, dict)
    assert batch_of(plain).loss_weights is None


def test_the_teachers_metrics_are_also_given_by_name():
    rollouts, teacher, objective = rows(), routed(math=FrozenTeacher(), code=FrozenTeacher()), OPSDUCLA()
    batch, scores, _ = step(model(), rollouts, teacher, objective)
    sums = token_sums(batch, scores, {}, teacher.names(rollouts))
    means = token_means(sums, len(batch.targets))
    for name in NAMES:
        own = torch.tensor([rollouts[i].example.data["domain"] == name for i in batch.rollout_index.tolist()])
        expected = float(-scores.teacher_logprobs[own].double().mean())
        assert means[f"teacher_nll_nats/{name}"] == pytest.approx(expected, rel=1e-6)
    assert not any("/" in key for key in token_means(token_sums(batch, scores, {}), len(batch.targets)))


def test_the_state_of_every_teacher_is_kept_under_its_name():
    teacher, trained = routed(math=EMATeacher(0.5), code=FrozenTeacher()), model(9)
    teacher.update(trained)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert state and all(name.startswith("math/") for name in state)
    fresh = routed(math=EMATeacher(0.5), code=FrozenTeacher())
    fresh.load_state_dict(state)
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(InputError, match=r"has a state of teacher\.teachers\.math, and FrozenTeacher has none"):
        routed(math=FrozenTeacher(), code=FrozenTeacher()).load_state_dict(state)
    with pytest.raises(InputError, match=r"has no state of teacher\.teachers\.code, and EMATeacher needs it"):
        routed(math=EMATeacher(0.5), code=EMATeacher(0.5)).load_state_dict(state)
    with pytest.raises(InputError, match="another teacher than SnapshotTeacher"):
        routed(math=SnapshotTeacher(), code=FrozenTeacher()).load_state_dict(state)


@pytest.mark.parametrize("part", [LiveTeacher(), EMATeacher(0.5), SnapshotTeacher()], ids=lambda part: type(part).__name__)
def test_weights_named_for_a_teacher_that_takes_the_trained_models_are_refused(part):
    teacher = RoutedTeacher("domain", {"1": FrozenTeacher(), "2": part})
    check_routed(OmegaConf.create({"teacher_models": {1: {}}, "teacher_checkpointers": {1: {}}}), teacher)
    with pytest.raises(InputError, match=rf"teacher_checkpointers\.2 is not read, because {type(part).__name__} teaches with"):
        check_routed(OmegaConf.create({"teacher_checkpointers": {1: {}, 2: {}}}), teacher)


# ------------------------------------------------------------------------------------------- refusals, a run


def test_what_no_teacher_is_named_for_is_refused():
    teacher = RoutedTeacher("domain", {"math": FrozenTeacher()}, default="math")
    (row,) = rows(1, ("code",))
    with pytest.raises(InputError, match=r"row 0: its domain is 'code', and teacher\.teachers has math; add that teacher"):
        teacher.name_of(row.example)
    assert teacher.name_of(type(row.example)(id="x", messages=[])) == "math"
    with pytest.raises(InputError, match=r"its domain is None"):
        RoutedTeacher("domain", {"math": FrozenTeacher()}).name_of(type(row.example)(id="x", messages=[]))
    for settings, match in (
        ({"teachers": {}}, "must not be empty"),
        ({"teachers": {"a": FrozenTeacher()}, "default": "b"}, "teacher.default=b must be null or one of"),
        ({"teachers": {"a/b": FrozenTeacher()}}, "teacher.teachers has the name 'a/b'; names of states hold /"),
        ({"teachers": {"a": FrozenTeacher()}, "balance": "rows"}, "teacher.balance=rows is unknown"),
    ):
        with pytest.raises(InputError, match=match):
            RoutedTeacher("domain", **settings)
