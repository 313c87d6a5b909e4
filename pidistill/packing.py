"""Rollouts as what a model reads: one packed tree, or right-padded rows; and how many of them go through it at once.

A group of G completions shares its prompt, the two views of a rollout share the text before the privileged information, and all
prompts of a dataset often begin alike. ``packing: tree`` lays each shared stretch down once:

    system, question ─┬─ completion 1                    student view
                      ├─ …
                      └─ privileged ─┬─ completion 1     teacher view
                                     └─ …

Positions count along the path from the root, and a token sees its ancestors only (:mod:`pidistill.tree_attention`), so every
number is what the padded rows of ``packing: padded`` give, up to rounding. The last token of a sequence predicts nothing and is
not read.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from omegaconf import DictConfig
from torch import Tensor

from pidistill.config import empty_model
from pidistill.training import Run
from pidistill.tree_attention import FLEX_BLOCK, TreeMask, read_trees
from pidistill.types import Batch, Rollout, RolloutAdvantage, View, ViewName

Item = TypeVar("Item")

BOTH: tuple[ViewName, ...] = ("student", "teacher")


def policy_positions(rollout: Rollout) -> list[int]:
    """Indices into ``rollout.completion`` of the tokens that the policy produced."""
    return [t for t, is_policy in enumerate(rollout.policy_mask) if is_policy]


# ------------------------------------------------------------------------------------------------- sequences → rows


@dataclass(frozen=True)
class Tree:
    """Token sequences with their common beginnings merged, depth first.

    Attributes:
        tokens, positions, ends: [L] id, distance from the root, and the column behind the last token of the subtree.
        columns: per sequence, in the order given, where its tokens stand.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    columns: list[list[int]]


def make_tree(sequences: Sequence[list[int]]) -> Tree:
    """In sorted order each sequence shares with those before it exactly what it shares with the last one."""
    tree = Tree([], [], [], [[] for _ in sequences])
    path: list[int] = []
    last: list[int] = []
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        shared = _common_length(last, sequences[i])
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


def _common_length(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return int(np.argmax(np.asarray(a[:n]) != np.asarray(b[:n])))


class Views:
    """The views of a batch's rollouts as model inputs, made when they are asked for.

    Views that the same weights read go through them together, so that a tree can share what both have.
    """

    def __init__(self, rollouts: Sequence[Rollout], packing: str, pad_id: int, device: torch.device) -> None:
        self.rollouts, self._packing, self._pad_id, self._device = rollouts, packing, pad_id, device
        self._made: dict[tuple[ViewName, ...], View] = {}

    def of(self, *names: ViewName) -> View:
        """``names`` as one input; the policy tokens of the first view before those of the second, each in batch order."""
        if names not in self._made:
            sequences = [(r.prompts.of(name) + r.completion)[:-1] for name in names for r in self.rollouts]
            # The token at index t of the completion is predicted by the one before it.
            predicted = [
                [len(r.prompts.of(name)) + t - 1 for t in policy_positions(r)] for name in names for r in self.rollouts
            ]
            self._made[names] = (self._packed if self._packing == "tree" else self._padded)(sequences, predicted)
        return self._made[names]

    def _packed(self, sequences: list[list[int]], predicted: list[list[int]]) -> View:
        tree = make_tree(sequences)
        columns = [path[i] for path, indices in zip(tree.columns, predicted, strict=True) for i in indices]
        # A batch without rollouts is one pad token: all ranks run forward. On CUDA rows are whole blocks; a pad sees itself.
        length = max(1, len(tree.tokens))
        length = -(-length // FLEX_BLOCK) * FLEX_BLOCK if self._device.type == "cuda" else length
        pads = range(len(tree.tokens), length)
        return View(
            tokens=self._ids([tree.tokens + [self._pad_id] * len(pads)]),
            rows=self._ids([0] * len(columns)),
            columns=self._ids(columns),
            positions=self._ids([tree.positions + [0] * len(pads)]),
            mask=TreeMask(self._ids(tree.ends + [column + 1 for column in pads])),
            depth=max(tree.positions, default=0) + 1,
        )

    def _padded(self, sequences: list[list[int]], predicted: list[list[int]]) -> View:
        """Padding stands only on the right, so the causal mask alone keeps it from every policy token."""
        length = max((len(s) for s in sequences), default=0) or 1
        tokens = [s + [self._pad_id] * (length - len(s)) for s in sequences] or [[self._pad_id]]
        rows = [row for row, indices in enumerate(predicted) for _ in indices]
        return View(self._ids(tokens), self._ids(rows), self._ids([i for indices in predicted for i in indices]), depth=length)

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
        views=Views(rollouts, packing, pad_id, device),
        targets=ids([r.completion[t] for r, ts in zip(rollouts, positions, strict=True) for t in ts]),
        rollout_index=ids([row for row, ts in enumerate(positions) for _ in ts]),
        token_index=ids([n for ts in positions for n in range(len(ts))]),
        sampled_logprobs=per_token([x for r in rollouts for x in r.trainer_logprobs])
        if weighed
        else per_token([r.sampled_logprobs[t] for r, ts in zip(rollouts, positions, strict=True) for t in ts])
        if sampled
        else None,
        rewards=per_token([r.task_reward for r, ts in zip(rollouts, positions, strict=True) for _ in ts])
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
        importance_weights=per_token([x for r in rollouts for x in r.importance_weights]) if weighed else None,
    )


# ------------------------------------------------------------------------------------------------- how many at once


class Packer:
    """Cuts rollouts into micro-batches by tokens and makes batches of them.

    Config keys: ``packing`` (``tree`` | ``padded``) and ``micro_batch_tokens``, the tokens of one forward per rank, counted as
    the model reads them: shared stretches once in a tree, padding included in padded rows. Memory grows with it, the result
    stays the same. A single rollout beyond it goes alone.
    """

    def __init__(self, cfg: DictConfig, run: Run, pad_id: int) -> None:
        self.packing: str = cfg.get("packing") or "tree"
        self.budget: int = cfg.get("micro_batch_tokens") or 8192
        for key in ("model", "teacher_model"):
            if self.packing == "tree" and cfg.get(key):
                read_trees(empty_model(cfg[key]))  # refuses an attention that cannot, before weights are loaded
        self._run, self._pad_id = run, pad_id

    def batch(self, items: Sequence[Rollout] | Sequence[tuple[Rollout, RolloutAdvantage]]) -> Batch:
        rollouts = [rollout_of(item) for item in items]
        demonstrations = len(items) > 0 and isinstance(items[0], Rollout)  # an empty batch has every field, empty
        advantages = None if demonstrations else [advantage for _, advantage in items]
        return make_batch(rollouts, advantages, pad_id=self._pad_id, device=self._run.device, packing=self.packing)

    def micro_batches(self, items: Sequence[Item], views: tuple[ViewName, ...] = BOTH) -> Iterator[list[Item]]:
        """Equally many lists on every rank (empty ones where a rank has too little), at least one, so that collectives match.

        A rank that could do with fewer spreads its rollouts evenly over as many.
        """
        sizes = _sizes([rollout_of(item) for item in items], views)
        most = max(1, self._run.max(len(self._cut(sizes, self.budget))))
        low, high = 1, self.budget
        while low < high:  # the smallest budget that needs no more lists
            middle = (low + high) // 2
            low, high = (low, middle) if len(self._cut(sizes, middle)) <= most else (middle + 1, high)
        first = 0
        lengths = self._cut(sizes, high)
        for length in lengths + [0] * (most - len(lengths)):
            yield list(items[first : first + length])
            first += length

    def _cut(self, sizes: "Sequence[_Size]", budget: int) -> list[int]:
        """Lengths of consecutive lists: a new one begins where the next rollout would not fit."""
        lengths: list[int] = []
        load = _Load(self.packing)
        for size in sizes:
            if not lengths or load.tokens_with(size) > budget:
                load = _Load(self.packing)
                lengths.append(0)
            load.add(size)
            lengths[-1] += 1
        return lengths

    def balanced(
        self, items: list[tuple[Rollout, RolloutAdvantage]], views: tuple[ViewName, ...] = BOTH
    ) -> list[tuple[Rollout, RolloutAdvantage]]:
        """Whole groups moved between ranks where one has a tenth more tokens than the mean: the others would wait for it.

        Groups that stay are the same objects as before.
        """
        own: dict[int, int] = {}
        for (rollout, _), size in zip(items, _sizes([rollout for rollout, _ in items], views), strict=True):
            own[rollout.group] = own.get(rollout.group, size.prompt_tokens) + size.completion_tokens
        groups = self._run.gather([(tokens, group, self._run.rank) for group, tokens in own.items()])
        loads = [sum(tokens for tokens, _, rank in groups if rank == r) for r in range(self._run.world_size)]
        if max(loads) <= 1.1 * sum(loads) / len(loads):
            return items
        owner, free = {}, [(0, rank) for rank in range(self._run.world_size)]
        for tokens, group, _ in sorted(groups, reverse=True):  # the largest first, to whoever has least
            load, rank = heapq.heappop(free)
            owner[group] = rank
            heapq.heappush(free, (load + tokens, rank))
        if max(load for load, _ in free) >= max(loads):
            return items
        home = {group: rank for _, group, rank in groups}
        leaving = [item for item in items if owner[item[0].group] != self._run.rank]
        arriving = [item for item in self._run.gather(leaving) if owner[item[0].group] == self._run.rank]
        staying = [item for item in items if owner[item[0].group] == home[item[0].group]]
        return staying + arriving


def rollout_of(item: Any) -> Rollout:
    return item[0] if isinstance(item, tuple) else item


@dataclass(frozen=True)
class _Size:
    """What one rollout adds to a forward: a row per view, or its completion once per view and its prompts if they are new."""

    prompts: int  # which prompts, as a number
    prompt_tokens: int
    completion_tokens: int
    rows: int
    longest: int


def _sizes(rollouts: Sequence[Rollout], views: tuple[ViewName, ...]) -> list[_Size]:
    """Further sharing (text that two groups or two completions begin with) is left out: the true tree is smaller."""
    numbers: dict[Any, int] = {}
    tree_tokens: list[int] = []
    sizes = []
    for rollout in rollouts:
        prompts = [rollout.prompts.of(view) for view in views]
        key = tuple(map(tuple, prompts))
        if key not in numbers:
            numbers[key] = len(tree_tokens)
            tree_tokens.append(len(make_tree(prompts).tokens))
        length = len(rollout.completion) - 1
        number = numbers[key]
        sizes.append(
            _Size(number, tree_tokens[number], length * len(set(key)), len(views), length + max(len(p) for p in prompts))
        )
    return sizes


class _Load:
    """Tokens of the micro-batch so far."""

    def __init__(self, packing: str) -> None:
        self._padded = packing == "padded"
        self._rows = self._longest = self._tokens = 0
        self._prompts: set[int] = set()

    def tokens_with(self, size: _Size) -> int:
        if self._padded:
            return (self._rows + size.rows) * max(self._longest, size.longest)
        return self._tokens + size.completion_tokens + (0 if size.prompts in self._prompts else size.prompt_tokens)

    def add(self, size: _Size) -> None:
        self._tokens = self.tokens_with(size)
        self._rows += size.rows
        self._longest = max(self._longest, size.longest)
        self._prompts.add(size.prompts)
