"""Arrange sequences as a model reads them: one packed tree, or right-padded rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from pidistill.scoring.tree_attention import FLEX_BLOCK, TreeMask
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.types import Batch, ModelInput, Rollout, RolloutAdvantage, ViewName

BOTH: tuple[ViewName, ...] = ("student", "teacher")


def policy_positions(rollout: Rollout) -> list[int]:
    """Return the indices into ``rollout.completion`` of the tokens that the policy produced."""
    return [t for t, is_policy in enumerate(rollout.policy_mask) if is_policy]


# ------------------------------------------------------------------------------------------------- sequences → rows


@dataclass(frozen=True)
class Tree:
    """Hold token sequences with their common beginnings merged, depth first."""

    tokens: list[int]  # [L] ids
    positions: list[int]  # [L] distance from the root
    ends: list[int]  # [L] the column behind the last token of the subtree
    columns: list[list[int]]  # per sequence, in the order given, where its tokens stand


def make_tree(sequences: Sequence[list[int]]) -> Tree:
    """Merge sequences: in sorted order each sequence shares with those before it exactly what it shares with the last one."""
    tree = Tree([], [], [], [[] for _ in sequences])
    path: list[int] = []
    last: list[int] = []
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        shared = common_prefix_length(last, sequences[i])
        _close(tree, path[shared:])
        start, last = len(tree.tokens), sequences[i]
        tree.tokens.extend(last[shared:])
        tree.positions.extend(range(shared, len(last)))
        path = path[:shared] + list(range(start, len(tree.tokens)))
        tree.ends.extend([0] * (len(tree.tokens) - start))
        tree.columns[i] = path
    _close(tree, path)
    return tree


def _close(tree: Tree, columns: list[int]) -> None:
    for column in columns:
        tree.ends[column] = len(tree.tokens)


class ModelInputs:
    """Make the views of a batch's rollouts into model inputs, when they are asked for.

    Views that the same weights read go through them together, so that a tree can share what both have.
    """

    def __init__(self, rollouts: Sequence[Rollout], packing: str, pad_id: int, device: torch.device) -> None:
        self.rollouts, self._packing, self._pad_id, self._device = rollouts, packing, pad_id, device
        self._made: dict[tuple[ViewName, ...], ModelInput] = {}

    def of(self, *names: ViewName) -> ModelInput:
        """Return ``names`` as one input: the policy tokens of the first view, then those of the second, each in batch order."""
        if names not in self._made:
            sequences = [(r.prompts.of(name) + r.completion)[:-1] for name in names for r in self.rollouts]
            # The token at index t of the completion is predicted by the one before it.
            predicted = [
                [len(r.prompts.of(name)) + t - 1 for t in policy_positions(r)] for name in names for r in self.rollouts
            ]
            self._made[names] = (self._packed if self._packing == "tree" else self._padded)(sequences, predicted)
        return self._made[names]

    def _packed(self, sequences: list[list[int]], predicted: list[list[int]]) -> ModelInput:
        tree = make_tree(sequences)
        columns = [path[i] for path, indices in zip(tree.columns, predicted, strict=True) for i in indices]
        # A batch without rollouts is one pad token: all ranks run forward. On CUDA rows are whole blocks; a pad sees itself.
        length = max(1, len(tree.tokens))
        length = -(-length // FLEX_BLOCK) * FLEX_BLOCK if self._device.type == "cuda" else length
        pads = range(len(tree.tokens), length)
        return ModelInput(
            tokens=self._ids([tree.tokens + [self._pad_id] * len(pads)]),
            rows=self._ids([0] * len(columns)),
            columns=self._ids(columns),
            positions=self._ids([tree.positions + [0] * len(pads)]),
            mask=TreeMask(self._ids(tree.ends + [column + 1 for column in pads])),
            depth=max(tree.positions, default=0) + 1,
        )

    def _padded(self, sequences: list[list[int]], predicted: list[list[int]]) -> ModelInput:
        """Pad rows: padding stands only on the right, so the causal mask alone keeps it from every policy token."""
        length = max((len(s) for s in sequences), default=0) or 1
        tokens = [s + [self._pad_id] * (length - len(s)) for s in sequences] or [[self._pad_id]]
        rows = [row for row, indices in enumerate(predicted) for _ in indices]
        return ModelInput(
            self._ids(tokens), self._ids(rows), self._ids([i for indices in predicted for i in indices]), depth=length
        )

    def _ids(self, values: list) -> Int[Tensor, "..."]:
        return torch.tensor(values, dtype=torch.long, device=self._device)


# ------------------------------------------------------------------------------------------------- rollouts → batch


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: Sequence[RolloutAdvantage] | None,
    *,
    pad_id: int,
    device: torch.device,
    packing: str = "tree",
) -> Batch:
    """Collate rollouts (and their advantages, in the same order) into flat per-policy-token tensors; see :class:`Batch`.

    An empty list gives a batch of one pad token and no policy token: its loss is zero and has a gradient function, so that a
    rank without work still takes part in every collective.
    """
    positions = [policy_positions(r) for r in rollouts]
    sampled = all(r.sampled_logprobs is not None for r in rollouts)
    weighed = len(rollouts) > 0 and all(r.importance_weights is not None for r in rollouts)

    def ids(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Batch(
        views=ModelInputs(rollouts, packing, pad_id, device),
        targets=ids([r.completion[t] for r, ts in zip(rollouts, positions, strict=True) for t in ts]),
        rollout_index=ids([row for row, ts in enumerate(positions) for _ in ts]),
        token_index=ids([n for ts in positions for n in range(len(ts))]),
        ratio_logprobs=per_token([x for r in rollouts for x in r.trainer_logprobs])
        if weighed
        else per_token([r.sampled_logprobs[t] for r, ts in zip(rollouts, positions, strict=True) for t in ts])
        if sampled
        else None,
        rewards=per_token([r.task_reward for r, ts in zip(rollouts, positions, strict=True) for _ in ts])
        if all(r.reward is not None for r in rollouts)
        else None,
        advantages=per_token(
            [x for a, ts in zip(advantages, positions, strict=True) for x in a.tokens or [a.advantage] * len(ts)]
        )
        if advantages is not None
        else None,
        kl_advantages=per_token([x for a in advantages for x in a.kl])
        if advantages is not None and all(a.kl is not None for a in advantages)
        else None,
        snis_weights=per_token([a.snis_weight for a, ts in zip(advantages, positions, strict=True) for _ in ts])
        if advantages is not None and all(a.snis_weight is not None for a in advantages)
        else None,
        has_privileged=torch.tensor(
            [r.prompts.has_privileged for r, ts in zip(rollouts, positions, strict=True) for _ in ts],
            dtype=torch.bool,
            device=device,
        ),
        importance_weights=per_token([x for r in rollouts for x in r.importance_weights]) if weighed else None,
    )
