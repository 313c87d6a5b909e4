"""Arrange sequences as a model reads them: one packed tree, or right-padded rows."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pidistill.errors import InputError
from pidistill.scoring.tree_attention import FLEX_BLOCK, TreeMask
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.types import Batch, KeptSets, ModelInput, Rollout, RolloutAdvantage, ViewName

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
            read = [rollout.sequence(name) for name in names for rollout in self.rollouts]
            sequences = [ids[:-1] for ids, _ in read]
            predicted = [[place - 1 for place in places] for _, places in read]  # a token is predicted by the one before it
            self._made[names] = (self._packed if self._packing == "tree" else self._padded)(sequences, predicted)
        return self._made[names]

    def only(self, chosen: Sequence[int]) -> "ModelInputs":
        """Return the inputs of some of the rollouts, by their place; of none, one pad token."""
        return ModelInputs([self.rollouts[i] for i in chosen], self._packing, self._pad_id, self._device)

    def _packed(self, sequences: list[list[int]], predicted: list[list[int]]) -> ModelInput:
        tree = make_tree(sequences)
        columns = [path[i] for path, indices in zip(tree.columns, predicted, strict=True) for i in indices]
        # A batch without rollouts is one pad token: all ranks run forward. A pad sees itself.
        length = _row_length(max(1, len(tree.tokens)), self._device)
        pads = range(len(tree.tokens), length)
        return ModelInput(
            tokens=self._ids([tree.tokens + [self._pad_id] * len(pads)]),
            rows=self._ids([0] * len(columns)),
            columns=self._ids(columns),
            positions=self._ids([tree.positions + [0] * len(pads)]),
            mask=TreeMask(self._ids(tree.ends + [column + 1 for column in pads])),
            depth=max(tree.positions, default=0) + 1,
            real=_real([len(tree.tokens)], length, self._device),
        )

    def _padded(self, sequences: list[list[int]], predicted: list[list[int]]) -> ModelInput:
        """Pad rows: padding stands only on the right, so the causal mask alone keeps it from every policy token."""
        length = max((len(s) for s in sequences), default=0) or 1
        tokens = [s + [self._pad_id] * (length - len(s)) for s in sequences] or [[self._pad_id]]
        rows = [row for row, indices in enumerate(predicted) for _ in indices]
        return ModelInput(
            self._ids(tokens),
            self._ids(rows),
            self._ids([i for indices in predicted for i in indices]),
            depth=length,
            real=_real([len(s) for s in sequences], length, self._device),
        )

    def _ids(self, values: list) -> Int[Tensor, "..."]:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _row_length(tokens: int, device: torch.device) -> int:
    """Return the length of a packed row: on CUDA it is a whole number of blocks."""
    return -(-tokens // FLEX_BLOCK) * FLEX_BLOCK if device.type == "cuda" else tokens


def _real(lengths: list[int], length: int, device: torch.device) -> Bool[Tensor, "R L"] | None:
    """Return where no padding stands; None where there is none, or nothing else: an average needs one token."""
    if not any(lengths) or min(lengths) == length:
        return None
    return torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]


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
    tokens = [(row, r, t) for row, r in enumerate(rollouts) for t in policy_positions(r)]
    sampled = all(r.sampled_logprobs is not None for r in rollouts)
    judged = all(r.task_reward is not None or r.stop_reason == "curriculum" for r in rollouts)
    weighed = len(rollouts) > 0 and all(r.importance_weights is not None for r in rollouts)

    def ids(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def per_token(known: bool, values: Callable[[], list[float]]) -> Tensor | None:
        return torch.tensor(values(), dtype=torch.float32, device=device) if known else None

    recorded = per_token(sampled and not weighed, lambda: [r.sampled_logprobs[t] for _, r, t in tokens])
    trained, given = per_token(weighed, lambda: [x for r in rollouts for x in r.trainer_logprobs]), advantages or []
    return Batch(
        views=ModelInputs(rollouts, packing, pad_id, device),
        targets=ids([r.completion[t] for _, r, t in tokens]),
        rollout_index=ids([row for row, _, _ in tokens]),
        token_index=ids([n for r in rollouts for n in range(r.policy_tokens)]),
        ratio_logprobs=trained if weighed else recorded,
        rewards=per_token(sampled and judged, lambda: [r.task_reward or 0.0 for _, r, _ in tokens]),
        advantages=per_token(advantages is not None, lambda: _advantages(rollouts, given)),
        kl_advantages=per_token(_any_has(advantages, "kl"), lambda: _kl_advantages(rollouts, given)),
        snis_weights=per_token(_any_has(advantages, "snis_weight"), lambda: _snis_weights(rollouts, given)),
        has_privileged=torch.tensor([x for r in rollouts for x in r.tokens_with_privileged()], dtype=torch.bool, device=device),
        importance_weights=per_token(weighed, lambda: [x for r in rollouts for x in r.importance_weights]),
        loss_weights=per_token(
            any(r.loss_weights or r.balance != 1.0 for r in rollouts),
            lambda: [x * r.balance for r in rollouts for x in r.loss_weights or [1.0] * r.policy_tokens],
        ),
        turn_index=ids([k for r in rollouts for k, length in enumerate(turn_lengths(r)) for _ in range(length)]),
        turn_balance=per_token(True, lambda: [w for r in rollouts for w in _turn_balance(r)]),
        rollout_tokens=per_token(True, lambda: [r.policy_tokens for _, r, _ in tokens]),
        kept=_kept_sets(rollouts, device) if any(r.kept is not None for r in rollouts) else None,
    )


def _any_has(advantages: Sequence[RolloutAdvantage] | None, name: str) -> bool:
    """Return whether a batch has a number that only some objectives give; an empty batch has it."""
    return advantages is not None and (not advantages or any(getattr(a, name) is not None for a in advantages))


def _advantages(rollouts: Sequence[Rollout], advantages: Sequence[RolloutAdvantage]) -> list[float]:
    pairs = zip(rollouts, advantages, strict=True)
    return [x for rollout, a in pairs for x in a.tokens or [a.advantage] * rollout.policy_tokens]


def _kl_advantages(rollouts: Sequence[Rollout], advantages: Sequence[RolloutAdvantage]) -> list[float]:
    """Return 0 for the tokens of a rollout without any: another objective trains it, and the batch holds rollouts of both."""
    pairs = zip(rollouts, advantages, strict=True)
    return [x for rollout, a in pairs for x in a.kl or [0.0] * rollout.policy_tokens]


def _snis_weights(rollouts: Sequence[Rollout], advantages: Sequence[RolloutAdvantage]) -> list[float]:
    """Return 1 for the tokens of a rollout without a weight, which another objective trains."""
    weights = [1.0 if a.snis_weight is None else a.snis_weight for a in advantages]
    return [weight for rollout, weight in zip(rollouts, weights, strict=True) for _ in range(rollout.policy_tokens)]


def turn_lengths(rollout: Rollout) -> list[int]:
    """Return the policy tokens of each assistant turn; one turn where the rollout does not say how they are divided."""
    lengths = rollout.turn_policy_tokens
    return lengths if sum(lengths) == rollout.policy_tokens else [rollout.policy_tokens]


def _turn_balance(rollout: Rollout) -> list[float]:
    lengths = [length for length in turn_lengths(rollout) if length]
    return [rollout.policy_tokens / (len(lengths) * length) for length in lengths for _ in range(length)]


def _kept_sets(rollouts: Sequence[Rollout], device: torch.device) -> KeptSets:
    """Return the sets that the rollouts' policy tokens were drawn from; InputError where a token is not in its own."""
    sets = []
    for rollout in rollouts:
        tokens = [rollout.completion[t] for t in policy_positions(rollout)]
        for n, (token, kept) in enumerate(zip(tokens, rollout.kept or [None] * len(tokens), strict=True)):
            if kept is not None and token not in kept:
                raise InputError(
                    f"{rollout.example.id}: policy token {n}, id {token}, is not among the {len(kept)} ids that the sampler "
                    "says it was drawn from; the sampler's record is wrong: set sampler.record_kept: false"
                )
            sets.append([] if kept is None else list(kept))
    starts = itertools.accumulate(map(len, sets), initial=0)
    flat = [i for ids in sets for i in ids]
    ids, starts = (torch.tensor(x, dtype=torch.long, device=device) for x in (flat, list(starts)))
    of_view = {
        view: [r.sampled_by == view or r.reads_alike for r in rollouts for _ in range(r.policy_tokens)]
        for view in ("student", "teacher")
    }
    return KeptSets(ids, starts, {view: torch.tensor(x, dtype=torch.bool, device=device) for view, x in of_view.items()})
