"""Compute advantages of rollouts: group-relative, leave-one-out, and by turn."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError
from pidistill.losses.advantages import group_mean, leave_one_out, standardised, turn_returns
from pidistill.types import Rollout, RolloutAdvantage

# -------------------------------------------------------------------------------- advantages of a round

_ADVANTAGES = {"group_mean": group_mean, "leave_one_out": leave_one_out, "standardised": standardised}

ADVANTAGES = (*_ADVANTAGES, "turn_returns")


def as_fp32(values: Sequence[float]) -> Float[Tensor, " T"]:
    return torch.tensor(values, dtype=torch.float32)


def group_advantages(name: str, rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    return _ADVANTAGES[name](as_fp32(rewards), torch.tensor(groups, dtype=torch.long)).tolist()


def rollout_advantages(
    rollouts: Sequence[Rollout],
    advantage: str,
    drop_zero_advantage: str | bool,
    kl: list[list[float]] | None = None,
    *,
    kl_in_reward: bool = False,
) -> list[RolloutAdvantage]:
    """Return the group-relative advantages of whole groups; what "zero" drops is judged on the reward without KL.

    "policy_gradient" takes a KL that is part of the reward along; one that is a loss, its future term included, stays.
    Rollouts without a reward (demonstrations, episodes that `turn_curriculum` ended) get 0, and nothing of them is dropped.
    """
    sampled = [r for r in rollouts if r.reward is not None]
    groups = [r.group for r in sampled]
    if advantage == "turn_returns":
        of_tokens = iter(turn_return_advantages(sampled))
        values = ((max(map(abs, tokens), default=0.0), tokens) for tokens in of_tokens)
    else:
        values = ((value, None) for value in group_advantages(advantage, [r.reward for r in sampled], groups))
    result = []
    for i, rollout in enumerate(rollouts):
        reward, tokens = (0.0, None) if rollout.reward is None else next(values)
        own_kl = kl[i] if kl is not None else None
        is_zero = rollout.reward is not None and reward == 0.0
        if is_zero and drop_zero_advantage == "policy_gradient" and kl_in_reward:
            own_kl = [0.0] * len(own_kl)
        keep = not (is_zero and drop_zero_advantage == "row")
        result.append(RolloutAdvantage(reward, own_kl, keep=keep, tokens=tokens))
    return result


def turn_return_advantages(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Return, per policy token, the advantage of its turn from the environment's reward per turn; see :func:`turn_returns`."""
    for rollout in rollouts:
        if sum(rollout.turn_policy_tokens) != rollout.policy_tokens:
            raise InputError(
                f"{rollout.example.id}: objective.advantage=turn_returns needs a reward and a length per turn, and turns of "
                f"{sum(rollout.turn_policy_tokens)} tokens do not make up its {rollout.policy_tokens} policy tokens"
            )
    per_turn = turn_returns([r.turn_rewards for r in rollouts], [r.group for r in rollouts])
    return [
        [value for value, length in zip(values, r.turn_policy_tokens, strict=True) for _ in range(length)]
        for values, r in zip(per_turn, rollouts, strict=True)
    ]
