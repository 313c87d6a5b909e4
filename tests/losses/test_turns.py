"""Turns that count alike, and a limit of turns that grows with the steps."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.errors import InputError
from pidistill.losses.token_weights import TurnBalance
from pidistill.objectives import GRPO, OPSD, OPSDUCLA
from pidistill.training.collector import mark_cut_short
from pidistill.training.rounds import RoundSizes
from pidistill.types import Scores
from tests.support.builders import batch_of, random_rollouts

NOTHING = Scores(None, None, {}, None, None)


def rollouts_with_turns(count: int = 5):
    """Rollouts whose turns are the stretches of their policy mask."""
    rollouts = random_rollouts(count, turns=3)
    for r in rollouts:
        stretches = "".join("x" if policy else " " for policy in r.policy_mask).split()
        r.turn_policy_tokens = [len(stretch) for stretch in stretches]
    return rollouts


def test_turn_numbers_follow_the_policy_mask_and_weights_make_turns_alike():
    rollouts = rollouts_with_turns()
    batch = batch_of(rollouts)
    ones = torch.ones(len(batch.targets))
    weight = TurnBalance()(ones, batch, NOTHING)
    start = 0
    for r in rollouts:
        n, k = r.policy_tokens, len(r.turn_policy_tokens)
        own, turns = weight[start : start + n], batch.turn_index[start : start + n]
        assert turns.tolist() == [i for i, length in enumerate(r.turn_policy_tokens) for _ in range(length)]
        assert float(own.sum()) == pytest.approx(n, rel=1e-6)
        for i in range(k):
            assert float(own[turns == i].sum()) == pytest.approx(n / k, rel=1e-6)
        start += n
    half = TurnBalance(share=0.25)(ones, batch, NOTHING)
    torch.testing.assert_close(half, 0.75 + 0.25 * weight)


def test_share_0_changes_no_bit_and_one_turn_has_weight_1():
    batch = batch_of(rollouts_with_turns())
    term = torch.randn(len(batch.targets))
    assert TurnBalance(share=0.0)(term, batch, NOTHING) is term
    single = [replace(r, turn_policy_tokens=[]) for r in rollouts_with_turns()]
    assert torch.equal(TurnBalance()(term, batch_of(single), NOTHING), term)
    with pytest.raises(InputError, match=r"token_weight\.share=2\.0 must lie in \[0, 1\]"):
        TurnBalance(share=2.0)


def test_the_weight_is_the_same_on_any_slice_of_a_batch():
    rollouts = rollouts_with_turns()
    batch, objective = batch_of(rollouts, GRPO().advantages(rollouts, 0)), GRPO(token_weight=TurnBalance())
    logprobs = batch.ratio_logprobs + 0.1
    whole = objective.token_loss(batch, replace(NOTHING, student_logprobs=logprobs), 0).loss
    parts = [slice(0, 7), slice(7, None)]
    pieces = [
        objective.token_loss(batch.slice(part), replace(NOTHING, student_logprobs=logprobs[part]), 0).loss for part in parts
    ]
    assert torch.equal(whole, torch.cat(pieces)) and OPSDUCLA(token_weight=TurnBalance()).token_weight is not None


# ------------------------------------------------------------------------------------------- the curriculum


def sizes(**more):
    cfg = {"prompts_per_round": 2, "group_size": 2, "objective": {"_component_": "pidistill.objectives.OPSD"}} | more
    return RoundSizes(OmegaConf.create(cfg))


def test_the_limit_grows_by_one_turn_every_so_many_steps():
    grown = sizes(turn_curriculum={"start": 1, "every": 6})
    assert [grown.turn_limit(step) for step in (0, 5, 6, 11, 12, 60)] == [1, 1, 2, 2, 3, 11]
    assert sizes().turn_limit(3) is None
    for node in ({"start": 0, "every": 6}, {"start": 1}, {"start": 1, "every": 1.5}, {"start": 1, "every": 6, "end": 3}):
        with pytest.raises(InputError, match="turn_curriculum="):
            sizes(turn_curriculum=node)
    with pytest.raises(InputError, match="hindsight, refill and Guide-GRPO choose by rewards"):
        sizes(turn_curriculum={"start": 1, "every": 6}, objective={"_component_": "pidistill.objectives.GuideGRPO"})


def test_what_the_curriculum_ends_has_no_reward_and_a_reason_of_its_own():
    rollouts = random_rollouts(2)
    rollouts[0].stop_reason = "max_turns"
    mark_cut_short(rollouts)
    assert (rollouts[0].stop_reason, rollouts[0].reward, rollouts[0].task_reward) == ("curriculum", None, None)
    assert rollouts[1].stop_reason == "done" and rollouts[1].reward is not None


@pytest.mark.parametrize("kl_mode", ["reward_k1", "loss_rb"])
def test_what_the_curriculum_ends_is_distilled_also_where_rollouts_without_an_advantage_are_dropped(kl_mode):
    rollouts = random_rollouts(4, group_size=2)
    for rollout in rollouts:
        rollout.reward, rollout.behaviour_values = 1.0, [0.5] * rollout.policy_tokens
    rollouts[0].stop_reason = "max_turns"
    mark_cut_short(rollouts)
    for how in ("row", "policy_gradient"):
        answers = OPSD(beta=1.0, kl_mode=kl_mode, drop_zero_advantage=how).advantages(rollouts, 0)
        assert [a.keep for a in answers] == [True, *[how != "row"] * 3]
        assert all(a.advantage == 0.0 for a in answers)
        if kl_mode == "reward_k1":
            assert any(answers[0].kl) and not (how == "policy_gradient" and any(any(a.kl) for a in answers[1:]))
