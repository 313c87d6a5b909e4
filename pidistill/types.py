"""Define every noun of the package, with its shapes, units and alignment.

    row ─► Example ─► PromptPair ─► Rollout ─► Batch ─► Scores

Letters used in shapes: B rollouts in a batch, R rows and L columns of what the model reads, N policy tokens of a batch (of all
its rollouts, in order), T tokens of one completion, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pidistill.errors import InputError

Message = dict[str, Any]  # OpenAI chat format: {"role": ..., "content": ..., "tool_calls"?, "tool_call_id"?, "name"?}
Tools = Sequence[Mapping[str, Any]] | None  # tool schemas, as chat templates take them
ViewName = Literal["student", "teacher"]


@dataclass(frozen=True)
class Example:
    """Hold one row of a dataset, before any tokenizer has seen it."""

    id: str  # names the row in errors and logs, such as "train.jsonl row 17"
    messages: list[Message]  # what the student answers, without privileged information; ends before an assistant turn
    privileged: str | list[Message] | None = None  # the privileged information; None where the row has none
    completion: list[Message] | None = None  # a demonstration: assistant turns, and what stands between them
    reference: Any = None  # what the reward compares with, such as the final answer
    tools: list[dict[str, Any]] | None = None  # tool schemas for the chat template
    data: Mapping[str, Any] = field(default_factory=dict)  # everything else of the row; an environment finds its task here


@dataclass(frozen=True)
class PromptPair:
    """Hold the two prompts of one example as token ids, each ending where the assistant turn begins.

    ``student`` is, id for id, the prompt that inference builds. Without privileged information both are the same list.
    """

    student: list[int]
    teacher: list[int]
    has_privileged: bool

    def of(self, view: ViewName) -> list[int]:
        return self.student if view == "student" else self.teacher


class RolloutKey:
    """Be the weak key of what is kept about a rollout: it is removed when the last copy of the rollout is gone."""


@dataclass
class Rollout:
    """Hold one completion with everything that belongs to it: it cannot be scored under another row's privileged information.

    The last three lists have one value per policy token, where they are computed.
    """

    example: Example
    prompts: PromptPair
    completion: list[int]  # [T] the sampled ids and, between turns, the observation ids; the same ids in both views
    policy_mask: list[bool]  # [T] True on tokens that the policy produced (end-of-turn included), False on observations
    # [T] fp32 nats, log μ of each token under the distribution it was drawn from (temperature, top-k and top-p included); NaN
    # on observations. None for a demonstration, which nobody sampled.
    sampled_logprobs: list[float] | None
    sampled_by: ViewName  # the view whose prompt the sampler saw
    group: int  # rollouts with the same group number answer the same example in the same round
    # "done" (the environment ended the episode), "length" (token limit), "turn_length" (a turn's own limit), "max_turns";
    # "curriculum" (the turns that `turn_curriculum` allows at this step): no reward.
    stop_reason: str
    turns: list[Message]  # the messages of the episode: assistant turns and observations
    # The environment's rewards and `reward_shaping`; None where it gives none. A rollout whose reward failed is dropped.
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)  # each part of the reward under its own name, for the log
    turn_rewards: list[float] = field(default_factory=list)  # the reward of each assistant turn; sums to `reward`
    turn_policy_tokens: list[int] = field(default_factory=list)  # policy tokens of each assistant turn
    behaviour_values: list[float] | None = None  # from the objective's `behaviour_values`, with the weights that sampled
    task_reward: float | None = None  # the environment's reward only, by which success is judged; `reward` if not given
    trainer_logprobs: list[float] | None = None  # the trainer's own, under the weights that sampled
    importance_weights: list[float] | None = None  # min(π/μ, cap); see `scoring/mismatch.py`
    kept: list[Sequence[int] | None] | None = None  # ids that top-k and top-p left per policy token, None for all of them
    loss_weights: list[float] | None = None  # constants that multiply each policy token's whole loss, 0 where a mask stands
    keep: bool = True  # False: out of every loss term and of the token count; the reward stays in the group's mean
    balance: float = 1.0  # multiplies the rollout's loss in the present step, beside `loss_weights`
    # Where the teacher reads privileged information with an observation: `completion[first:last]` reads as `ids` to it.
    teacher_reads: list[tuple[int, int, list[int]]] = field(default_factory=list)
    teacher_reads_left_out: int = 0  # such texts for which the teacher's view had no room
    key: "RolloutKey" = field(default_factory=lambda: RolloutKey(), repr=False, compare=False)  # the same in a changed copy

    def __post_init__(self) -> None:
        self.task_reward = self.reward if self.task_reward is None else self.task_reward

    @property
    def policy_tokens(self) -> int:
        return sum(self.policy_mask)

    @property
    def reads_alike(self) -> bool:
        """Return whether both views read the same ids."""
        return self.prompts.student == self.prompts.teacher and not self.teacher_reads

    def sequence(self, view: ViewName) -> tuple[list[int], list[int]]:
        """Return the ids that a view reads, the prompt first, and where each policy token stands among them."""
        ids, done, end = list(self.prompts.of(view)), 0, len(self.completion)
        places: list[int] = []
        for first, last, shown in [*(self.teacher_reads if view == "teacher" else ()), (end, end, [])]:
            places += [len(ids) + t - done for t in range(done, first) if self.policy_mask[t]]
            ids += self.completion[done:first] + shown
            done = last
        return ids, places

    def tokens_with_privileged(self) -> list[bool]:
        """Return, per policy token, whether its prompt or the observation right before its turn has privileged information."""
        answers = {last for _, last, _ in self.teacher_reads}
        found: list[bool] = []
        told = self.prompts.has_privileged
        for t, is_policy in enumerate(self.policy_mask):
            told = self.prompts.has_privileged or t in answers or (told and is_policy)
            found += [told] * is_policy
        return found


@dataclass(frozen=True)
class RolloutAdvantage:
    """Hold the advantage of one rollout, computed once per round before its first gradient step."""

    advantage: float  # the advantage from the reward only, the same for every policy token
    kl: list[float] | None = None  # [policy tokens] what `kl_mode` adds for the view that sampled; None where it adds nothing
    keep: bool = True  # False drops the rollout from every loss term and from the token count
    tokens: list[float] | None = None  # [policy tokens] used instead of `advantage` where each turn has its own; else None
    snis_weight: float | None = None  # self-normalised importance weight × the group's size; None where none was asked for


@runtime_checkable
class AncestorMask(Protocol):
    """Say which tokens of a packed row each token sees, as :class:`pidistill.scoring.tree_attention.TreeMask` does."""

    def dense(self) -> Bool[Tensor, "L L"]:
        """Return [query, key], True where the query sees the key."""
        ...


@dataclass
class ModelInput:
    """Hold what a model reads for one or more views of a batch, and where each policy token is predicted.

    The hidden state at (rows[n], columns[n]) predicts policy token n; in a tree several tokens may share one.
    """

    tokens: Int[Tensor, "R L"]  # one packed row (a tree), or a row per rollout and view with padding on the right
    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    positions: Int[Tensor, "R L"] | None = None  # distance from the beginning of the sequence; None where that is the column
    mask: AncestorMask | None = None  # which columns each token of a packed row sees; None is causal
    depth: int = 0  # tokens of the longest sequence, which the model must be able to read
    real: Bool[Tensor, "R L"] | None = None  # False at padding; None where there is none


@runtime_checkable
class BatchInputs(Protocol):
    """Give the rollouts of a batch as model inputs, as :class:`pidistill.scoring.batch.ModelInputs` does."""

    rollouts: Sequence[Rollout]

    def of(self, *names: ViewName) -> ModelInput:
        """Return the views ``names`` as one input: the policy tokens of the first view, then those of the second."""
        ...

    def only(self, chosen: Sequence[int]) -> "BatchInputs":
        """Return the inputs of some of the rollouts, by their place in ``rollouts``."""
        ...


@dataclass(frozen=True)
class KeptSets:
    """Hold the ids that each policy token was drawn from, token after token; a token without ids had the whole vocabulary.

    Attributes:
        ids: [M]. starts: [N + 1] the ids of token n are ``ids[starts[n] : starts[n + 1]]``.
        of_view: view → [N], whether the ids are those of its distribution: it sampled, or reads what the one that did reads.
    """

    ids: Int[Tensor, " M"]
    starts: Int[Tensor, " _"]
    of_view: dict[str, Bool[Tensor, " N"]]

    def rows(self, first: int, last: int, view: str) -> Int[Tensor, "n K"]:
        """Return the ids of tokens ``first`` to ``last`` − 1, -1 behind the last one of a row.

        A token of the other view alone has no ids: what that view's distribution lost says nothing of this one's.
        """
        counts = self.starts[first + 1 : last + 1] - self.starts[first:last]
        longest = int(counts.max()) if len(counts) else 0
        inside = torch.arange(longest, device=counts.device) < counts[:, None]
        rows = self.ids.new_full(inside.shape, -1)
        rows[inside] = self.ids[int(self.starts[first]) : int(self.starts[last])]
        return rows.masked_fill(~self.of_view[view][first:last, None], -1)


@dataclass(frozen=True)
class ListedTeacher:
    """Hold what is known of a teacher whose distribution is elsewhere: the log-probs of some ids per policy token.

    Attributes:
        ids: [N, K] the token's own id first; -1 where a row lists fewer. logprobs: [N, K] nats, over its whole vocabulary.
    """

    ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]


@dataclass
class Batch:
    """Hold rollouts side by side. Everything the objectives see is flat over the N policy tokens of the batch."""

    views: BatchInputs  # the rollouts as model inputs; `views.of("student")` is a `ModelInput`
    targets: Int[Tensor, " N"]  # the policy tokens
    rollout_index: Int[Tensor, " N"]  # which rollout of the batch (0..B-1) the token belongs to
    token_index: Int[Tensor, " N"]  # index of the token among its rollout's policy tokens
    # fp32 nats, log μ: the denominator of the ratios. None for demonstrations. With importance weights, the trainer's own
    # log-probs under the weights that sampled.
    ratio_logprobs: Float[Tensor, " N"] | None
    rewards: Float[Tensor, " N"] | None  # the environment's, without `reward_shaping`; None for demonstrations
    advantages: Float[Tensor, " N"] | None  # from the reward alone; None for demonstrations
    kl_advantages: Float[Tensor, " N"] | None  # what `kl_mode` adds for the view that sampled; None where it adds nothing
    snis_weights: Float[Tensor, " N"] | None  # the rollout's self-normalised importance weight; None where none was asked for
    has_privileged: Bool[Tensor, " N"]  # True where the rollout's example has privileged information
    importance_weights: Float[Tensor, " N"] | None = None  # factors of the policy-gradient loss; None where that is off
    loss_weights: Float[Tensor, " N"] | None = None  # constants that multiply the token's whole loss; None where that is 1
    turn_index: Int[Tensor, " N"] | None = None  # which assistant turn of its rollout the token belongs to, from 0
    # Factor with which all turns count alike: (tokens of the rollout) / (its turns × tokens of the turn).
    turn_balance: Float[Tensor, " N"] | None = None
    rollout_tokens: Float[Tensor, " N"] | None = None  # how many policy tokens the token's rollout has
    kept: "KeptSets | None" = None  # the ids that each token was drawn from, where the sampler cut its distribution

    def slice(self, part: slice) -> "Batch":
        """Return the policy tokens of ``part`` as objectives see them; views stay whole, and rollouts keep their numbers."""
        parts: dict[str, Any] = {name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)


@dataclass(frozen=True)
class Divergence:
    """Name a full-vocabulary divergence that an objective asks the scorer for."""

    name: str  # `kl_teacher_student`, `kl_student_teacher` or `jsd` (generalised, see `divergences`); with `fn` any other name
    grad: Literal["student", "teacher", "both", "none"] = "student"  # the side that gradient reaches; the other is constant
    beta: float | None = None  # weight of the teacher in the mixture; only for `jsd`
    entry_clip: float | None = None  # upper bound of each vocabulary entry's term before the sum; only for the two KLs
    top_k: int | None = None  # the divergence after merging all but the student's K most probable tokens into one tail bucket
    # A divergence of one's own: from the log-probs of the teacher and of the student, [C, V] each and in fp32, one number per
    # token, [C], in nats. The head calls it for C tokens at a time and differentiates it by autograd.
    fn: Callable[[Float[Tensor, "C V"], Float[Tensor, "C V"]], Float[Tensor, " C"]] | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Say what an objective wants to know about a batch, and which sides gradient may reach."""

    student_grad: bool
    teacher_grad: bool
    views: tuple[ViewName, ...] = ("student", "teacher")  # to be computed; RL without privileged information needs only one
    divergences: tuple[Divergence, ...] = ()
    entropy: bool = True  # also the (detached) entropies of the views


@dataclass
class Scores:
    """Hold per-token numbers of one batch, in nats.

    Log-probs are of the sampled token, at the sampling temperature, over the whole vocabulary. ``student_kept_mass`` and
    ``teacher_kept_mass`` are the log of the mass that top-k and top-p left, where the sampler recorded what that was.
    """

    student_logprobs: Float[Tensor, " N"] | None
    teacher_logprobs: Float[Tensor, " N"] | None
    divergences: dict[Divergence, Float[Tensor, " N"]]
    student_entropy: Float[Tensor, " N"] | None
    teacher_entropy: Float[Tensor, " N"] | None
    student_kept_mass: Float[Tensor, " N"] | None = None
    teacher_kept_mass: Float[Tensor, " N"] | None = None
    # The weighted auxiliary loss of a mixture of experts over this forward's tokens: the recipes add it to every policy token's
    # loss, so that
    # micro-batches count by their policy tokens. 0.0 where `model` gives it no weight.
    router_loss: Float[Tensor, ""] | float = 0.0

    def policy_logprobs(self, view: ViewName) -> Float[Tensor, " N"]:
        """Return the log-probs of the distribution that a sampler with these weights draws from: what ratios are made of.

        That is log S(y) − log Σ_{v kept} S(v), with gradient through both; log S(y) where nothing was cut or recorded, or where
        the other view sampled.
        """
        logprobs, mass = getattr(self, f"{view}_logprobs"), getattr(self, f"{view}_kept_mass")
        return logprobs if mass is None else logprobs - mass


@dataclass
class TokenLoss:
    """Hold an objective's answer: a loss per policy token (nats, not reduced) and detached per-token values to log as means."""

    loss: Tensor  # [N], checked below in one sentence
    metrics: dict[str, Float[Tensor, " N"]]

    def __post_init__(self) -> None:
        check_per_token(self.loss)


def check_per_token(loss: object, tokens: int | None = None) -> None:
    """Refuse a loss that is not one number per policy token, ``tokens`` of them where that is known."""
    if not isinstance(loss, Tensor) or loss.ndim != 1 or (tokens is not None and len(loss) != tokens):
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        wanted = "one number per policy token" if tokens is None else f"one number for each of the {tokens} policy tokens"
        raise InputError(
            f"the objective's token_loss gave a loss of {got} where {wanted} is needed; remove its .mean() or .sum(), the "
            "recipe averages over all policy tokens of the step"
        )


PerTokenLoss = Callable[[Batch, Scores], Float[Tensor, " N"]]  # of any slice of a batch
