"""Several objectives in one run, one per row: gradients add as those of two runs, and no method sees another's rows."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.data import ExampleDataset, joined_dataset
from pidistill.data.dataset import collect_refused_rows
from pidistill.data.load import check_references
from pidistill.envs import RoutedEnvironment, SingleTurn
from pidistill.errors import InputError
from pidistill.losses.token_weights import EntropyMask
from pidistill.objectives import (
    GKD,
    GRPO,
    OPD,
    OPSD,
    OPSDUCLA,
    RLSD,
    SDAR,
    SDFT,
    SDPO,
    ConstantNegative,
    GuideGRPO,
    PiDistill,
    RoutedObjective,
)
from pidistill.rewards import ExactMatch
from pidistill.scoring.score import score
from pidistill.scoring.served_teacher import ServedTeacher, check_served
from pidistill.teachers import FrozenTeacher, LiveTeacher
from pidistill.training.compatibility import build_objective
from pidistill.training.health import reads_rewards
from pidistill.training.metrics import token_means, token_sums
from pidistill.types import Example
from tests.support.builders import batch_of, gradients, model, random_rollouts, relative_difference
from tests.support.objective_runs import fill_behaviour_kl, on_policy


def rows(module, view="student", count=8):
    rollouts = on_policy(module, random_rollouts(count), view)
    for rollout in rollouts:
        rollout.example = replace(rollout.example, data={"domain": "ab"[rollout.group % 2]})
    return rollouts


def step(module, rollouts, objective, teacher=None, denominator=None, packing="tree"):
    """Return (loss per token, metrics, batch, scores) and the gradient of the loss over ``denominator`` tokens."""
    module.zero_grad()
    advantages = objective.advantages(rollouts, 0)
    kept = [(r, a) for r, a in zip(rollouts, advantages, strict=True) if a.keep]
    batch = batch_of([r for r, _ in kept], [a for _, a in kept], packing=packing)
    loss = objective.per_token_loss(0)
    scores = score(module, batch, objective.score_request(0), teacher=teacher, loss=loss)
    answer = objective.weighted_loss(batch, scores, 0)
    (answer.loss.sum() / (denominator or len(batch.targets))).backward()
    return answer, batch, scores, gradients(module)


PAIRS = {
    "rl beside a frozen teacher's divergence": (GRPO, OPSDUCLA),
    "a KL in the reward beside one in the loss": (lambda: OPSD(kl_mode="loss_k2"), lambda: OPSD(beta=0.1)),
    "sampled log-ratios beside gates": (OPD, SDAR),
    "credit beside skipped tokens": (RLSD, SDFT),
    "clipped importance beside a drop of rows": (lambda: SDPO(top_k=10), lambda: GRPO(drop_zero_advantage="row")),
    "extremes of a round beside a divergence": (lambda: ConstantNegative(entropy_scaled=False), OPSDUCLA),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_gradient_is_the_sum_of_two_runs_gradients_each_on_its_own_rows(name, packing):
    module, teacher = model(), FrozenTeacher()
    teacher.attach(lambda: model(7))
    a, b = (make() for make in PAIRS[name])
    rollouts = rows(module)
    routed = RoutedObjective("domain", {"a": a, "b": b})
    answer, batch, _, gradient = step(module, rollouts, routed, teacher, 100, packing)
    assert routed.per_token_loss(0) is not None
    total, parts = 0.0, []
    for key, objective in (("a", a), ("b", b)):
        own = [r for r in rollouts if r.example.data["domain"] == key]
        alone, own_batch, _, own_gradient = step(module, own, objective, teacher, 100, packing)
        total += float(alone.loss.sum())
        parts.append(own_gradient)
        # Per objective: its loss, and its own metrics, over its own tokens.
        means = token_means(token_sums(batch, step(module, rollouts, routed, teacher)[2], answer.metrics), len(batch.targets))
        assert means[f"loss/{key}"] == pytest.approx(float(alone.loss.mean()), rel=1e-4, abs=1e-6)
        for metric, values in alone.metrics.items():
            assert means[f"{metric}/{key}"] == pytest.approx(float(values.float().mean()), rel=1e-4, abs=1e-6)
        assert own_batch.targets.numel() > 0
    assert float(answer.loss.sum()) == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert relative_difference(gradient, {key: parts[0][key] + parts[1][key] for key in parts[0]}) < 1e-4
    assert all(part_norm(part) > 1e-6 for part in parts)


def part_norm(gradient) -> float:
    return sum(float(g.double().pow(2).sum()) for g in gradient.values()) ** 0.5


def test_halves_of_pi_distill_with_other_weights_add_up_too():
    module = model()
    rollouts = rows(module, "teacher")
    a, b = PiDistill(alpha=0.5, beta=0.25), PiDistill(alpha=1.0, kl_mode="loss_rb", beta=0.7)
    routed = RoutedObjective("domain", {"a": a, "b": b})
    assert routed.sampling_view() == "teacher"
    *_, gradient = step(module, rollouts, routed, LiveTeacher(), 100)
    parts = []
    for key, objective in (("a", a), ("b", b)):
        own = [r for r in rollouts if r.example.data["domain"] == key]
        parts.append(step(module, own, objective, LiveTeacher(), 100)[3])
    assert relative_difference(gradient, {key: parts[0][key] + parts[1][key] for key in parts[0]}) < 1e-4


def test_one_method_under_two_names_is_the_method_and_rows_of_one_name_alone_leave_the_other_out():
    module, rollouts = model(), None
    rollouts = rows(module)
    for make in (OPSDUCLA, GRPO, OPSD):
        answer, *_, gradient = step(module, rollouts, RoutedObjective("domain", {"a": make(), "b": make()}))
        plain, *_, expected = step(module, rollouts, make())
        assert torch.equal(answer.loss, plain.loss)
        assert relative_difference(gradient, expected) < 1e-6
    alone = [r for r in rollouts if r.example.data["domain"] == "b"]
    answer, *_ = step(module, alone, RoutedObjective("domain", {"a": GRPO(), "b": OPSDUCLA()}))
    assert torch.equal(answer.loss, step(module, alone, OPSDUCLA())[0].loss) and "loss/a" not in answer.metrics
    empty, *_, gradient = step(module, [], RoutedObjective("domain", {"a": GRPO(), "b": OPSDUCLA()}), denominator=1)
    assert len(empty.loss) == 0 and gradient and part_norm(gradient) == 0.0


def test_what_changes_the_flow_of_a_run_is_refused_and_coefficients_have_their_names():
    routed = RoutedObjective("domain", {"a": OPSD(beta=0.3), "b": GRPO()}, default="b")
    assert routed.coefficients(0) == {"beta/a": 0.3, "reward_weight/a": 1.0}
    assert routed.takes_importance_weights and routed.uses_teacher and routed.no_pi == "rl"
    assert RoutedObjective("domain", {"a": OPSDUCLA(), "b": SDFT()}).no_pi == "drop"
    assert routed.name_of(Example("row", [])) == "b"
    for objectives, match in (
        ({}, r"objective\.default=None must be null or one of objective\.objectives \(none\)"),
        ({"a": PiDistill(), "b": GRPO()}, r"\(a: PiDistill, b: GRPO\) differ in sampling_view"),
        ({"a": GuideGRPO()}, r"objectives\.a: GuideGRPO changes which rows are sampled"),
        ({"a": GKD(lmbda=0.5)}, r"objectives\.a: GKD changes which rows are sampled"),
        (
            {"a": OPSD(kl_mode="reward_rb"), "b": ConstantNegative()},
            "OPSD and ConstantNegative each need a number",
        ),
        ({"a/b": GRPO()}, "has the name 'a/b'; the / divides"),
    ):
        with pytest.raises(InputError, match=match):
            RoutedObjective("domain", objectives)
    with pytest.raises(InputError, match="differ in whether the teacher's view is trained"):
        RoutedObjective("domain", {"a": PiDistill(alpha=0.0), "b": PiDistill()}).score_request(0)
    with pytest.raises(InputError, match=r"row: its domain is 'c', and objective\.objectives has a; add that objective"):
        RoutedObjective("domain", {"a": GRPO()}).name_of(Example("row", [], data={"domain": "c"}))


def test_what_a_part_needs_of_a_run_is_asked_for_the_whole():
    lag = RoutedObjective("domain", {"a": GRPO(), "b": OPSD(kl_mode="loss_k2")})
    assert lag.needs_present_samples == "objectives.b.kl_mode=loss_k2" and lag.ratio_denominator == "behaviour"
    ratio = RoutedObjective("domain", {"a": PiDistill(student_term="ppo", ratio_denominator="live_teacher")})
    assert ratio.ratio_denominator == "live_teacher" and not ratio.needs_present_samples
    schedule = {"start": 1.0, "end": 0.0, "steps": 4}
    mixed = RoutedObjective("domain", {"a": PiDistill(alpha=schedule), "b": PiDistill()})
    mixed.check_steps(4)
    with pytest.raises(InputError, match=r"\(a: PiDistill, b: PiDistill\) differ in "):
        mixed.check_steps(5)
    served = RoutedObjective("domain", {"a": OPD(), "b": OPD(token_weight=EntropyMask(view="teacher"))})
    with pytest.raises(InputError, match="reads the teacher's entropy"):
        check_served(ServedTeacher("http://localhost:1/v1", "big", top_k=8), served, 1.0, "RoutedObjective")


def test_a_row_without_information_is_refused_where_its_own_objective_says_so():
    routed = RoutedObjective("domain", {"a": OPSD(no_pi="error"), "b": GRPO()})
    told = Example("row", [], privileged="x", data={"domain": "a"})
    routed.check_rows([told, replace(told, privileged=None, data={"domain": "b"})])
    routed.check_rows([replace(told, privileged=None)], told_later=True)
    with pytest.raises(InputError, match=r"row has no privileged information and objective\.objectives\.a\.no_pi is error"):
        routed.check_rows([replace(told, privileged=None)])


def test_the_number_that_one_objective_needs_before_the_update_reaches_it():
    module, rollouts = model(), rows(model())
    a = OPSD(kl_mode="reward_rb")
    routed = RoutedObjective("domain", {"a": a, "b": GRPO()})
    scores = score(module, batch_of(rollouts), routed.behaviour_request(), teacher=LiveTeacher())
    for rollout, values in zip(
        rollouts, routed.behaviour_values(scores).split([r.policy_tokens for r in rollouts]), strict=True
    ):
        rollout.behaviour_values = values.tolist()
    own = [r for r in rollouts if r.example.data["domain"] == "a"]
    together = dict(zip([id(r) for r in rollouts], routed.advantages(rollouts, 0), strict=True))
    assert [together[id(r)] for r in own] == a.advantages(own, 0)
    assert all(together[id(r)].kl is None for r in rollouts if r not in own)


SHARED = {
    "reward_k1": ("student", GRPO(), OPSD(kl_mode="reward_k1")),
    "reward_rb": ("student", GRPO(), OPSD(kl_mode="reward_rb")),
    "loss_rb_complete": ("student", GRPO(), OPSD(kl_mode="loss_rb_complete")),
    "snis": ("teacher", PiDistill(), PiDistill(student_term="snis", snis_beta=0.7)),
}


@pytest.mark.parametrize("name", SHARED)
def test_the_loss_is_that_of_each_objective_alone_however_rows_are_divided_among_ranks(name):
    """One rank's rows may all be of one objective; groups then move, and a micro-batch holds rows of both."""
    view, a, b = SHARED[name]
    module, routed = model(), RoutedObjective("domain", {"a": a, "b": b})
    rollouts = rows(module, view)
    fill_behaviour_kl(routed, module, rollouts)
    parts = [[r for r in rollouts if r.example.data["domain"] == key] for key in "ab"]
    expected = torch.cat([step(module, own, o)[0].loss for own, o in zip(parts, (a, b), strict=True)])
    mixed = parts[0] + parts[1]
    for ranks in ([mixed], parts, [parts[0] + parts[1][:2], parts[1][2:]]):
        batch = batch_of(mixed, [advantage for own in ranks for advantage in routed.advantages(own, 0)])
        scores = score(module, batch, routed.score_request(0), teacher=LiveTeacher())
        torch.testing.assert_close(routed.weighted_loss(batch, scores, 0).loss, expected, rtol=1e-4, atol=1e-6)
    alone = batch_of(parts[0], GRPO().advantages(parts[0], 0))
    assert alone.kl_advantages is None and alone.snis_weights is None


@pytest.mark.parametrize(
    "a", [OPSD(no_pi="drop"), OPSD(no_pi="drop", kl_mode="reward_k1"), SDPO(no_pi="drop", top_k=10), SDFT()]
)
def test_rows_without_information_of_an_objective_that_drops_them_leave_loss_and_token_count(a):
    module, routed = model(), RoutedObjective("domain", {"a": a, "b": GRPO()})
    assert routed.no_pi == "rl"  # the dataset keeps them for the other objective
    rollouts = rows(module)
    for rollout in rollouts[:4]:  # a group of each objective
        rollout.prompts = replace(rollout.prompts, teacher=rollout.prompts.student, has_privileged=False)
    fill_behaviour_kl(routed, module, rollouts)
    assert [x.keep for x in routed.advantages(rollouts, 0)] == [False] * 2 + [True] * 6
    answer, batch, _, gradient = step(module, rollouts, routed)
    expected, fewer, _, control = step(module, rollouts[2:], routed)
    assert len(batch.targets) == len(fewer.targets) == sum(r.policy_tokens for r in rollouts[2:])
    assert torch.equal(answer.loss, expected.loss) and relative_difference(gradient, control) < 1e-6


def test_a_config_names_objectives_environments_and_datasets_together():
    node = {"_component_": "pidistill.objectives.RoutedObjective", "key": "domain"}
    node["objectives"] = {"a": {"_component_": "pidistill.objectives.GRPO"}, "b": {"_component_": "pidistill.objectives.SDFT"}}
    cfg = OmegaConf.create({"objective": node, "teacher_checkpointer": {"checkpoint_dir": "x"}})
    built = build_objective(cfg)
    assert built.objectives["b"].no_pi == "distill" and reads_rewards(node)
    assert build_objective(OmegaConf.create({"objective": node})).objectives["b"].no_pi == "drop"
    del node["objectives"]["a"]
    assert not reads_rewards(node)


def test_joined_rows_are_played_each_in_its_own_environment_and_judged_by_its_own_reward():
    parts = {
        "a": ExampleDataset([Example("row 1", [], reference="x")], {"too_long": 1}),
        "b": ExampleDataset([Example("row 1", [], data={"n": 2})], {"too_long": 2}),
    }
    joined = joined_dataset(parts)
    assert [row.id for row in joined] == ["a: row 1", "b: row 1"] and joined.dropped == {"too_long": 3}
    assert joined[1].data == {"n": 2, "domain": "b"}
    rewards = {"a": lambda example, turns: 1.0, "b": lambda example, turns: 2.0}
    environment = RoutedEnvironment("domain", {name: SingleTurn(reward) for name, reward in rewards.items()})
    answer = {"role": "assistant", "content": "x"}
    given = [environment.step(environment.reset(row), answer, truncated=False).reward for row in joined]
    assert given == [1.0, 2.0]
    with pytest.raises(InputError, match=r"row: its domain is None, and environment\.environments has a, b; add that"):
        environment.reset(Example("row", []))
    with pytest.raises(InputError, match=r"environment\.default=c must be null or one of environment\.environments \(a\)"):
        RoutedEnvironment("domain", {"a": environment}, default="c")
    exact = {"_component_": "pidistill.envs.SingleTurn", "reward": {"_component_": "pidistill.rewards.ExactMatch"}}
    with pytest.raises(InputError, match="a: row 1|b: row 1|reference"):
        check_references(exact, [replace(joined[1], reference=None)])
    node = {"_component_": "pidistill.envs.RoutedEnvironment", "key": "domain", "environments": {"a": exact, "b": {}}}
    check_references(node, [joined[0], joined[1]])
    assert hasattr(ExactMatch, "check_reference")
    for outer in (node, {"_component_": "pidistill.envs.ProcessEnvironment", "environment": node}):  # before any weights
        check_references(outer, [joined[0], joined[1]])
        with pytest.raises(InputError, match=r"row: its domain is 'c', and environment\.environments has a, b"):
            check_references(outer, [replace(joined[0], id="row", data={"domain": "c"})])
        with pytest.raises(InputError, match="a: row 1"):
            check_references(outer, [replace(joined[0], reference=None)])
    check_references(node | {"default": "b"}, [Example("row", [])])


def test_a_joined_row_with_a_field_of_the_key_s_name_is_refused_and_not_overwritten():
    parts = {"a": [Example("row 1", [])], "b": [Example("t.jsonl row 7", [], data={"domain": "retail"})]}
    with pytest.raises(
        InputError, match=r"b: t\.jsonl row 7 has a field domain .*'retail'.*'b'; set dataset\.key.*environment"
    ):
        joined_dataset(parts)
    assert joined_dataset(parts, key="method")[1].data == {"domain": "retail", "method": "b"}
    same = [Example("row 1", [], data={"domain": "a"}), Example("row 2", [], data={"domain": None})]
    assert [row.data for row in joined_dataset({"a": same})] == [{"domain": "a"}] * 2
    with collect_refused_rows() as refused:
        assert [row.id for row in joined_dataset(parts)] == ["a: row 1"] and len(refused) == 1
