"""Count the work of one round on one rank: its lengths and groups, the forwards over them, their training, and their tokens.

All rollouts have the same lengths here. The packer itself (:mod:`pidistill.scoring.packer`) cuts them into micro-batches.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pidistill.commands.plan.shape import ModelShape
from pidistill.scoring.packer import RolloutSize, micro_batch_lengths
from pidistill.scoring.tree_attention import FLEX_BLOCK
from pidistill.types import ViewName


@dataclass(frozen=True)
class Workload:
    """Describe one round on one rank; lengths in tokens."""

    student: int  # the student's prompt
    teacher: int  # the teacher's prompt
    shared: int  # the text that both prompts begin with
    completion: int  # the completion of every rollout
    group_size: int
    groups: int  # groups that are sampled in a round
    trained_groups: int  # groups in one of the round's `updates`
    updates: int = 1
    views: tuple[ViewName, ...] = ("student", "teacher")  # the views that the update looks at
    sampled_view: ViewName = "student"
    packing: Literal["tree", "padded"] = "tree"
    micro_batch_tokens: int = 8192  # tokens of one forward, in both packings
    sampler_rows: int | None = None  # rows that are sampled at once; None is all
    chunk_tokens: int | None = None  # tokens whose logits exist at once; None is the scorer's own choice

    def prompt(self, view: ViewName) -> int:
        return self.student if view == "student" else self.teacher


@dataclass(frozen=True)
class Pass:
    """Describe one forward over the rollouts of each micro-batch."""

    model: ModelShape  # the model that computes it
    views: tuple[ViewName, ...]  # the views that it computes together
    gradient: tuple[ViewName, ...] = ()  # those of them that gradient flows back from; empty under `no_grad`
    share: float = 1.0  # the part of the rollouts that it reads; a micro-batch may hold only those


@dataclass(frozen=True)
class Setup:
    """Describe how a round is trained."""

    model: ModelShape  # the model that is trained
    update: tuple[Pass, ...]  # passes of every micro-batch of an update
    behaviour: tuple[Pass, ...] = ()  # passes over the round, before its first update
    teacher_bytes: float = 0.0  # weights beside the trained ones
    average_elements: int = 0  # elements of an fp32 moving average
    state_bytes: float = 8.0  # optimizer states per trained element
    # Trained weights, their gradients and states are in fp32, and FSDP2 makes copies in the model's dtype of them.
    mixed: bool = False
    ranks: int = 1  # processes among which FSDP2 shards; one rank shards nothing
    replicas: int = 1  # groups of ranks that each hold all shards
    reshard: bool = True  # FSDP2 frees gathered weights after a forward
    cpu_offload: bool = False
    checkpointing: bool = False  # activations of a layer are computed again in the backward
    device: Literal["cpu", "cuda"] = "cuda"
    samples_beside: bool = False  # a second process samples on the same device, while this one trains (`rollout_lag`)

    @property
    def shards(self) -> int:
        return self.ranks // self.replicas

    @property
    def trained_item_bytes(self) -> int:
        """Return the bytes of an element of a trained weight and of its gradient."""
        return 4 if self.mixed else self.model.item_bytes

    @property
    def stored_bytes(self) -> float:
        """Return the bytes of the trained model's weights, over all ranks."""
        return self.model.weights_bytes + self.model.trained * (self.trained_item_bytes - self.model.item_bytes)

    @property
    def trained_pass(self) -> Pass:
        return next(one for one in self.update if one.gradient)

    @property
    def constant_passes(self) -> tuple[Pass, ...]:
        return tuple(one for one in self.update if not one.gradient)


@dataclass(frozen=True)
class Tokens:
    """Count what a pass over some groups feeds to the model, in all its forwards and in the largest of them (`_at_once`)."""

    fed: int  # tokens, padding included
    pairs: int  # pairs of a query and a key that it sees
    policy: int  # hidden states that reach the head, all views together
    micro_batches: int
    fed_at_once: int
    pairs_at_once: int
    policy_at_once: int


def count_tokens(work: Workload, views: tuple[ViewName, ...], groups: int) -> Tokens:
    """Count the tokens of a pass that reads ``views``, in micro-batches cut by the tokens of all the views of ``work``."""
    group, rollout = _shares(work, views)
    parts = micro_batches(work, groups)
    fed = [touched * group.tokens + n * rollout.tokens for n, touched in parts]
    pairs = [touched * group.pairs + n * rollout.pairs for n, touched in parts]
    if work.packing == "tree":  # blocks of queries and keys are computed whole
        pairs = [own + FLEX_BLOCK * tokens for own, tokens in zip(pairs, fed, strict=True)]
    policy = [n * len(views) * work.completion for n, _ in parts]
    return Tokens(sum(fed), sum(pairs), sum(policy), len(parts), max(fed), max(pairs), max(policy))


@dataclass(frozen=True)
class _Share:
    tokens: int
    pairs: int


def _shares(work: Workload, views: tuple[ViewName, ...]) -> tuple[_Share, _Share]:
    """Return what a group adds to a micro-batch, and what a rollout adds; a completion's last token is not fed."""
    if work.packing == "padded":  # a row per rollout and view, all as long as the longest
        length = max(work.prompt(view) for view in views) + work.completion - 1
        return _Share(0, 0), _Share(len(views) * length, len(views) * path_pairs(0, length))
    return tuple(
        _Share(sum(n for _, n in branches), sum(path_pairs(start, n) for start, n in branches))
        for branches in (_trunk(work, views), _leaf(work, views))
    )


@lru_cache(maxsize=256)
def micro_batches(work: Workload, groups: int) -> tuple[tuple[int, int], ...]:
    """Return (rollouts, groups that they belong to) of each micro-batch, as the packer cuts them."""
    sizes = [_size(work, group) for group in range(groups) for _ in range(work.group_size)]
    parts, first = [], 0
    for n in micro_batch_lengths(sizes, work.packing, max(1, work.micro_batch_tokens)):
        parts.append((n, len({size.prompts for size in sizes[first : first + n]})))
        first += n
    return tuple(parts)


def _size(work: Workload, group: int) -> RolloutSize:
    """Return what a rollout of this group adds to a forward over all the views of ``work``."""
    trunk, leaf = (sum(n for _, n in branches) for branches in (_trunk(work, work.views), _leaf(work, work.views)))
    longest = max(work.prompt(view) for view in work.views) + work.completion - 1
    return RolloutSize(group, trunk, leaf, len(work.views), longest)


Branch = tuple[int, int]  # (position of its first token, tokens)


def _trunk(work: Workload, views: tuple[ViewName, ...]) -> list[Branch]:
    if len(views) == 1:
        return [(0, work.prompt(views[0]))]
    return [(0, work.shared), *((work.shared, work.prompt(view) - work.shared) for view in views)]


def _leaf(work: Workload, views: tuple[ViewName, ...]) -> list[Branch]:
    """Count one completion under each view; views with the same prompt are one path."""
    same = len(views) == 2 and work.shared == work.student == work.teacher
    return [(work.prompt(view), work.completion - 1) for view in views[: 1 if same else None]]


def path_pairs(start: int, tokens: int) -> int:
    """Count the pairs of tokens that attend: each sees the whole path above it, and itself."""
    return start * tokens + tokens * (tokens + 1) // 2
