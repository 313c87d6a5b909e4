"""Pack rollouts as a model reads them: one packed tree, or right-padded rows; and say how many go through it at once.

A group of G completions shares its prompt, the two views of a rollout share the text before the privileged information, and all
prompts of a dataset often begin alike. ``packing: tree`` lays each shared stretch down once:

    system, question ─┬─ completion 1                    student view
                      ├─ …
                      └─ privileged ─┬─ completion 1     teacher view
                                     └─ …

Positions count along the path from the root, and a token sees its ancestors only (:mod:`pidistill.scoring.tree_attention`), so
every number is what the padded rows of ``packing: padded`` give, up to rounding. The last token of a sequence predicts nothing
and is not read.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig
from torchtune import utils

from pidistill.distributed.run import Run
from pidistill.models.empty import model_nodes, shared_empty_model
from pidistill.models.protocol import carried_state, head_module
from pidistill.scoring.batch import BOTH, make_batch, make_tree
from pidistill.scoring.tree_attention import check_trees
from pidistill.training.keys import setting
from pidistill.types import Batch, Rollout, RolloutAdvantage, ViewName

log = utils.get_logger("INFO")

Item = TypeVar("Item")


def packing_of(cfg: DictConfig) -> str:
    """Return the `packing` of a run: padded rows, whatever the config says, where a model carries a state along its tokens."""
    states = (carried_state(shared_empty_model(node)) for node in model_nodes(cfg).values())
    return "padded" if any(states) else setting(cfg, "packing")


def check_models(cfg: DictConfig) -> None:
    """Refuse a model whose head cannot be scored, or that cannot read packed trees where rows are packed; reads no weights."""
    packing = packing_of(cfg)
    for node in model_nodes(cfg).values():
        head_module(shared_empty_model(node))
        if packing == "tree":
            check_trees(shared_empty_model(node))


class Packer:
    """Cut rollouts into micro-batches by tokens and make batches of them.

    Config keys: ``packing`` (``tree`` | ``padded``) and ``micro_batch_tokens``, the tokens of one forward per rank, counted as
    the model reads them: shared stretches once in a tree, padding included in padded rows. Memory grows with it, the result
    stays the same. A single rollout beyond it goes alone.
    """

    def __init__(self, cfg: DictConfig, run: Run, pad_id: int) -> None:
        self.packing: str = packing_of(cfg)
        self.budget: int = setting(cfg, "micro_batch_tokens")
        check_models(cfg)
        for key, node in model_nodes(cfg).items():
            model = shared_empty_model(node)
            if self.packing == "padded" and setting(cfg, "packing") == "tree" and carried_state(model) and run.is_main:
                log.warning(f"`{key}` has {carried_state(model)}, which packed trees cannot follow; rows are padded instead")
        self._run, self._pad_id = run, pad_id

    def batch(self, items: Sequence[Rollout] | Sequence[tuple[Rollout, RolloutAdvantage]]) -> Batch:
        rollouts = [rollout_of(item) for item in items]
        demonstrations = len(items) > 0 and isinstance(items[0], Rollout)  # an empty batch has every field, empty
        advantages = None if demonstrations else [advantage for _, advantage in items]
        return make_batch(rollouts, advantages, pad_id=self._pad_id, device=self._run.device, packing=self.packing)

    def micro_batches(self, items: Sequence[Item], views: tuple[ViewName, ...] = BOTH) -> Iterator[list[Item]]:
        """Yield equally many lists on every rank (empty ones where it has too little), at least one, so that collectives match.

        A rank that could do with fewer spreads its rollouts evenly over as many.
        """
        sizes = _sizes([rollout_of(item) for item in items], views)
        first = 0
        for length in micro_batch_lengths(sizes, self.packing, self.budget, self._run.max):
            yield list(items[first : first + length])
            first += length

    def balanced(
        self, items: list[tuple[Rollout, RolloutAdvantage]], views: tuple[ViewName, ...] = BOTH
    ) -> list[tuple[Rollout, RolloutAdvantage]]:
        """Move whole groups between ranks where one has a tenth more tokens than the mean: the others would wait for it.

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
        for tokens, group, _ in sorted(groups, reverse=True):  # the largest first, to the rank that has least
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
class RolloutSize:
    """Say what a rollout adds to a forward: a row per view, or its completion once per view, and its prompts if new."""

    prompts: int  # which prompts, as a number
    prompt_tokens: int
    completion_tokens: int
    rows: int
    longest: int


def micro_batch_lengths(
    sizes: Sequence[RolloutSize], packing: str, budget: int, most_of_ranks: Callable[[int], int] = int
) -> list[int]:
    """Return how many consecutive rollouts each micro-batch takes: as few lists as ``budget`` allows, spread evenly.

    Args:
        packing: ``tree`` or ``padded``.
        budget: tokens of one forward.
        most_of_ranks: takes the number of lists that this rank needs, and returns the largest number of all ranks. A rank
            whose rollouts are too few for so many lists ends with empty ones.
    """
    most = max(1, most_of_ranks(len(_cut(sizes, packing, budget))))
    if most == 1:
        return [len(sizes)]
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more lists
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(sizes, packing, middle)) <= most else (middle + 1, high)
    lengths = _cut(sizes, packing, high)
    return lengths + [0] * (most - len(lengths))


def _cut(sizes: Sequence[RolloutSize], packing: str, budget: int) -> list[int]:
    """Return the lengths of consecutive lists: a new one begins where the next rollout would not fit."""
    lengths: list[int] = []
    load = _Load(packing)
    for size in sizes:
        if not lengths or load.tokens_with(size) > budget:
            load = _Load(packing)
            lengths.append(0)
        load.add(size)
        lengths[-1] += 1
    return lengths


def _sizes(rollouts: Sequence[Rollout], views: tuple[ViewName, ...]) -> list[RolloutSize]:
    """Return what each rollout adds.

    Further sharing (text that two groups or two completions begin with) is left out: the true tree is smaller.
    """
    numbers: dict[Any, int] = {}
    tree_tokens: list[int] = []
    sizes = []
    for rollout in rollouts:
        prompts = [rollout.prompts.of(view) for view in views]
        key = tuple(map(tuple, prompts))
        if key not in numbers:
            numbers[key] = len(tree_tokens)
            tree_tokens.append(len(make_tree(prompts).tokens))
        number = numbers[key]
        read = {tuple(ids): len(ids) - len(p) for ids, p in ((rollout.sequence(v)[0], rollout.prompts.of(v)) for v in views)}
        completions = sum(length - 1 for length in read.values())
        sizes.append(RolloutSize(number, tree_tokens[number], completions, len(views), max(map(len, read)) - 1))
    return sizes


class _Load:
    """Count the tokens of the micro-batch so far."""

    def __init__(self, packing: str) -> None:
        self._padded = packing == "padded"
        self._rows = self._longest = self._tokens = 0
        self._prompts: set[int] = set()

    def tokens_with(self, size: RolloutSize) -> int:
        if self._padded:
            return (self._rows + size.rows) * max(self._longest, size.longest)
        return self._tokens + size.completion_tokens + (0 if size.prompts in self._prompts else size.prompt_tokens)

    def add(self, size: RolloutSize) -> None:
        self._tokens = self.tokens_with(size)
        self._rows += size.rows
        self._longest = max(self._longest, size.longest)
        self._prompts.add(size.prompts)
