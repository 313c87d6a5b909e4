"""Rollouts side by side as one batch: right-padded views, and where each policy token is predicted.

Padding stands only on the right, so the causal mask alone keeps it from every policy token. The last token of a sequence
predicts nothing and is not fed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from pidistill.types import Batch, Rollout, RolloutAdvantage, View, ViewName


def policy_positions(rollout: Rollout) -> list[int]:
    """Indices into ``rollout.completion`` of the tokens that the policy produced."""
    return [t for t, is_policy in enumerate(rollout.policy_mask) if is_policy]


def make_view(rollouts: Sequence[Rollout], view: ViewName, pad_id: int, device: torch.device) -> View:
    """Pad prompt + completion of every rollout to one [B, L] and locate the hidden state that predicts each policy token."""
    sequences = [(r.prompts.of(view) + r.completion)[:-1] for r in rollouts]
    length = (
        max((len(s) for s in sequences), default=0) or 1
    )  # a batch without rollouts is one pad token: all ranks run forward
    tokens = [s + [pad_id] * (length - len(s)) for s in sequences] or [[pad_id]]
    rows = [row for row, r in enumerate(rollouts) for _ in policy_positions(r)]
    columns = [len(r.prompts.of(view)) + t - 1 for r in rollouts for t in policy_positions(r)]
    return View(_ids(tokens, device), _ids(rows, device), _ids(columns, device))


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: Sequence[RolloutAdvantage] | None,
    *,
    pad_id: int,
    device: torch.device,
    views: tuple[ViewName, ...] = ("student", "teacher"),
) -> Batch:
    """Collate rollouts (and their advantages, in the same order) into flat per-policy-token tensors; see :class:`Batch`.

    An empty list gives a batch of one pad token and no policy token: its loss is zero and has a gradient function, so that a
    rank without work still takes part in every collective.
    """
    positions = [policy_positions(r) for r in rollouts]
    sampled = all(r.sampled_logprobs is not None for r in rollouts)

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Batch(
        student=make_view(rollouts, "student", pad_id, device),
        teacher=make_view(rollouts, "teacher", pad_id, device) if "teacher" in views else None,
        targets=_ids([r.completion[t] for r, ts in zip(rollouts, positions, strict=True) for t in ts], device),
        rollout_index=_ids([row for row, ts in enumerate(positions) for _ in ts], device),
        token_index=_ids([n for ts in positions for n in range(len(ts))], device),
        sampled_logprobs=per_token([r.sampled_logprobs[t] for r, ts in zip(rollouts, positions, strict=True) for t in ts])
        if sampled
        else None,
        rewards=per_token([r.reward for r, ts in zip(rollouts, positions, strict=True) for _ in ts])
        if all(r.reward is not None for r in rollouts)
        else None,
        advantages=per_token([x for a, ts in zip(advantages, positions, strict=True) for x in a.tokens or [a.reward] * len(ts)])
        if advantages is not None
        else None,
        kl_advantages=per_token([x for a in advantages for x in a.kl])
        if advantages is not None and all(a.kl is not None for a in advantages)
        else None,
        weights=per_token([a.weight for a, ts in zip(advantages, positions, strict=True) for _ in ts])
        if advantages is not None and all(a.weight is not None for a in advantages)
        else None,
        has_privileged=torch.tensor(
            [r.prompts.has_privileged for r, ts in zip(rollouts, positions, strict=True) for _ in ts],
            dtype=torch.bool,
            device=device,
        ),
    )


def _ids(values: list, device: torch.device) -> Int[Tensor, "..."]:
    return torch.tensor(values, dtype=torch.long, device=device)
