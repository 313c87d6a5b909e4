"""Rollouts that a token limit cut off, and groups without a difference: what is masked, dropped, penalised, sampled instead."""

import copy
from dataclasses import dataclass

import pytest

from pidistill.envs.base import EnvStep
from pidistill.errors import InputError
from pidistill.rewards import OverlongPenalty
from pidistill.rollouts import rollout_seed
from pidistill.training.collector import mark_overlong
from pidistill.types import Message
from tests.support.builders import random_rollouts
from tests.support.runs import assert_same_tensors, back_to_checkpoint, metrics, run, small_config, training_state, weights
from tests.support.worlds import Episode, VariedEnvironment


@dataclass
class CoinEnvironment(VariedEnvironment):
    """One turn with one or nothing, by what it says: some groups of two are uniform, some are mixed."""

    def step(self, state: Episode, turn: Message, *, truncated: bool) -> EnvStep:
        return EnvStep([], float(len(turn["content"]) % 2), done=True)


COIN = {"environment___component_": "tests.recipes.test_overlong_and_refill.CoinEnvironment"}
SHORT = {"sampler__max_new_tokens": 4, "prompts_per_round": 4, "max_steps": 2}  # some rollouts are cut off


# ------------------------------------------------------------------------------------------- overlong


def test_mask_keeps_rewards_and_takes_every_token_of_what_was_cut_off_and_drop_takes_it_out_of_the_mean():
    for reason, cut in (("done", False), ("max_turns", False), ("length", True), ("turn_length", True)):
        for how in ("mask", "drop"):
            (rollout,) = random_rollouts(1)
            rollout.stop_reason = reason
            reward = rollout.reward
            mark_overlong([rollout], how)
            assert rollout.reward == reward
            assert rollout.loss_weights == ([0.0] * rollout.policy_tokens if cut else None)
            assert rollout.keep == (not cut or how == "mask")


def step_of(base, folder, how: str) -> tuple[list, list, list]:
    """A run's rows, the rollouts of its first step, and their advantages."""
    seen = []

    def watch(recipe):
        update = recipe.update

        def watched(minibatch, report):
            seen.append([(copy.copy(r), a) for r, a in minibatch])
            update(minibatch, report)

        recipe.update = watched

    run("rl", small_config("rl", base, folder, overlong=how, **COIN, **SHORT), watch)
    return metrics(folder), [r for r, _ in seen[0]], [a for _, a in seen[0]]


def test_overlong_changes_the_numerator_or_the_mean_and_no_advantage(tiny_base, tmp_path):
    runs = {how: step_of(tiny_base, tmp_path / how, how) for how in ("train", "mask", "drop")}
    rows, rollouts, advantages = runs["train"]
    cut = [r.stop_reason == "length" for r in rollouts]
    assert 0 < sum(cut) < len(cut) and any(a.advantage for a, c in zip(advantages, cut, strict=True) if c)
    for how in ("mask", "drop"):
        own_rows, own, own_advantages = runs[how]
        assert [r.completion for r in own] == [r.completion for r in rollouts]
        assert own_advantages == advantages
        assert own_rows[0]["success_frac"] == rows[0]["success_frac"] and own_rows[0]["reward_mean"] == rows[0]["reward_mean"]
        kept = sum(r.policy_tokens for r, c in zip(rollouts, cut, strict=True) if not c or how == "mask")
        assert own_rows[0]["policy_tokens"] == kept
        # On the first update ρ is 1, so that the loss is −Σ A over the tokens that count, over the denominator.
        pairs = [(r.policy_tokens, a.advantage) for r, a, c in zip(rollouts, advantages, cut, strict=True) if not c]
        assert own_rows[0]["loss"] == pytest.approx(-sum(n * a for n, a in pairs) / kept, abs=1e-5)


def test_the_penalty_falls_linearly_over_the_buffer_and_is_zero_before_it():
    penalty, (rollout,) = OverlongPenalty(limit=20, buffer=4, factor=0.5), random_rollouts(1)
    rollout.turn_policy_tokens = [1, 2]  # the other tokens are observations, which sampler.max_new_tokens counts too
    for tokens, expected in ((3, 0.0), (16, 0.0), (17, -0.125), (18, -0.25), (20, -0.5), (30, -0.5)):
        rollout.completion = [5] * tokens
        assert penalty(rollout) == [0.0, expected]
        assert not (expected == 0.0 and str(penalty(rollout)[1]).startswith("-"))
    with pytest.raises(InputError, match="OverlongPenalty needs 0 < buffer <= limit"):
        OverlongPenalty(limit=3, buffer=4)


# ------------------------------------------------------------------------------------------- refill

REFILL = {"prompts_per_round": 4, "group_size": 2, "max_steps": 3, "refill": {"max_batches": 2}, **COIN}


def rounds_with_refill(base, folder, **changes) -> tuple[list, list]:
    """The rollouts of each round, and what the recipe asked the collector for."""
    rounds, asked = [], []

    def watch(recipe):
        collect, sample_round = recipe._rounds._play, recipe.sample_round

        def watched(model, **arguments):
            asked.append(arguments)
            return collect(model, **arguments)

        def sampled():
            rounds.append(sample_round())
            return rounds[-1]

        recipe._rounds._play, recipe.sample_round = watched, sampled

    run("rl", small_config("rl", base, folder, **REFILL | changes), watch)
    return rounds, asked


def uniform(rollouts, group: int) -> bool:
    return len({r.reward for r in rollouts if r.group == group}) == 1


def test_uniform_groups_are_replaced_by_other_rows_and_stay_in_the_report(tiny_base, tmp_path):
    rounds, asked = rounds_with_refill(tiny_base, tmp_path)
    rows = metrics(tmp_path)
    assert sum(row["refilled_groups"] for row in rows) > 0
    for row, rollouts in zip(rows, rounds, strict=True):
        assert row["rollouts"] == len(rollouts) and row["refilled_groups"] * 2 == len(rollouts) - 8
        assert row["success_frac"] == pytest.approx(sum(r.reward >= 1.0 for r in rollouts) / len(rollouts))
        trained = [r for r in rollouts if r.group < 4]
        assert len(trained) == 8 and row["policy_tokens"] == sum(r.policy_tokens for r in trained)
        assert row["uniform_groups"] == sum(uniform(rollouts, g) for g in range(4))
        assert all(uniform(rollouts, g) for g in {r.group for r in rollouts} if g >= 4)
        if row["uniform_groups"]:  # both further batches were used up
            assert any(r.group >= 8 for r in rollouts)
    seeds = [seed for arguments in asked for seed in arguments["seeds"]]
    assert len(set(seeds)) == len(seeds)
    for arguments in asked:
        assert all(0 <= g < 4 for g in arguments["groups"])
    assert rollout_seed(0, 0, 0, 0) in seeds


def test_a_run_that_is_stopped_and_resumed_refills_with_the_same_groups(tiny_base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("rl", small_config("rl", tiny_base, whole, save_every_steps=1, **REFILL))
    back_to_checkpoint(whole, parts, "step_1")
    run("rl", small_config("rl", tiny_base, parts, save_every_steps=1, resume_from_checkpoint=True, **REFILL))
    assert_same_tensors(weights(parts), weights(whole))
    assert training_state(parts)["step"] == training_state(whole)["step"] == 3


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("opsd", {"refill": {"max_batches": 2}}, r"pidistill\.objectives\.OPSD also learns from them; remove refill"),
        ("rl", {"refill": {"max_batches": 0}}, r"refill=.* must be \{max_batches: N\}"),
        ("rl", {"refill": {"batches": 1}}, r"refill=.* must be \{max_batches: N\}"),
        ("rl", {"overlong": "cut"}, r"overlong=cut is unknown; choose train or mask or drop"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, changes, sentence, tiny_base, tmp_path):
    with pytest.raises(InputError, match=sentence):
        run(name, small_config(name, tiny_base, tmp_path, **changes))
