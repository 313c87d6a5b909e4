"""Every noun of the package, with its shapes, units and alignment.

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
ViewName = Literal["student", "teacher"]


@dataclass(frozen=True)
class Example:
    """Hold one row of a dataset, before any tokenizer has seen it.

    Attributes:
        id: names the row in errors and logs, e.g. ``"train.jsonl row 17"``.
        messages: the conversation that the student answers, without privileged information; ends before an assistant turn.
        privileged: the privileged information: a text, or messages; None where the row has none.
        completion: a demonstration (assistant turns, and the tool or environment messages between them), if the row has one.
        reference: what the reward compares with, e.g. the final answer.
        tools: tool schemas for the chat template.
        data: everything else of the row; an environment finds its task here.
    """

    id: str
    messages: list[Message]
    privileged: str | list[Message] | None = None
    completion: list[Message] | None = None
    reference: Any = None
    tools: list[dict[str, Any]] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


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
    """Identify a rollout weakly: what is kept under the key goes when the last copy of the rollout does."""


@dataclass
class Rollout:
    """Hold one completion with everything that belongs to it: it cannot be scored under another row's privileged information.

    Attributes:
        completion: [T] the sampled ids and, between turns, the observation ids; the same ids in both views.
        policy_mask: [T] True on tokens that the policy produced (end-of-turn included), False on observations.
        sampled_logprobs: [T] fp32 nats, log μ of each token under the distribution it was drawn from (temperature, top-k and
            top-p included); NaN on observations. None for a demonstration, which nobody sampled.
        sampled_by: the view whose prompt the sampler saw.
        group: rollouts with the same group number answer the same example in the same round.
        stop_reason: "done" (the environment ended the episode), "length" (token limit), "turn_length" (a turn's own limit),
            "max_turns", "curriculum" (the turns that `turn_curriculum` allows at this step: no reward).
        turns: the messages of the episode: assistant turns and observations.
        reward: sum of the environment's rewards and of `reward_shaping`; None when the reward raised or was not finite (such a
            rollout is dropped).
        reward_parts: each part of the reward under its own name, for the log.
        turn_rewards: the reward of each assistant turn; sums to ``reward``.
        turn_policy_tokens: policy tokens of each assistant turn.
        key: what stays the same when a rollout is copied with other fields; see :class:`pidistill.teachers.HiddenMemory`.
        behaviour_values: one value per policy token, filled when the objective asks for it: a number under the weights that
            sampled, as :meth:`Objective.behaviour_values` makes it.
        task_reward: the environment's alone, on which success is judged; ``reward`` where it is not given.
        trainer_logprobs, importance_weights: one value per policy token, with `importance_weights` in the config: the trainer's
            own log-probs under the weights that sampled, and min(π/μ, cap); see :mod:`pidistill.scoring.mismatch`.
        kept: one set of ids per policy token: those that top-k and top-p left when it was drawn, None for the whole vocabulary;
            None where the sampler records none.
        keep: False leaves the rollout out of every loss term and of the token count; its reward stays in the group's mean.
        balance: multiplies the rollout's loss in the present step, beside ``loss_weights``.
        loss_weights: one constant per policy token, which multiplies its whole loss: 0 where a mask leaves it out; None is 1.
    """

    example: Example
    prompts: PromptPair
    completion: list[int]
    policy_mask: list[bool]
    sampled_logprobs: list[float] | None
    sampled_by: ViewName
    group: int
    stop_reason: str
    turns: list[Message]
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] = field(default_factory=list)
    turn_policy_tokens: list[int] = field(default_factory=list)
    behaviour_values: list[float] | None = None
    task_reward: float | None = None
    trainer_logprobs: list[float] | None = None
    importance_weights: list[float] | None = None
    kept: list[Sequence[int] | None] | None = None
    loss_weights: list[float] | None = None
    keep: bool = True
    balance: float = 1.0
    key: "RolloutKey" = field(default_factory=lambda: RolloutKey(), repr=False, compare=False)

    def __post_init__(self) -> None:
        self.task_reward = self.reward if self.task_reward is None else self.task_reward

    @property
    def policy_tokens(self) -> int:
        return sum(self.policy_mask)


@dataclass(frozen=True)
class RolloutAdvantage:
    """Hold what a round says of one rollout before any gradient step.

    Attributes:
        advantage: the advantage from the reward alone, the same for every policy token.
        tokens: [policy tokens] in its place, where turns have advantages of their own; None elsewhere.
        snis_weight: the rollout's self-normalised importance weight × the group's size; None where none was asked for.
        kl: [policy tokens] what the objective's `kl_mode` adds for the view that sampled; None where it adds nothing.
        keep: False drops the rollout from every loss term and from the token count.
    """

    advantage: float
    kl: list[float] | None = None
    keep: bool = True
    tokens: list[float] | None = None
    snis_weight: float | None = None


@runtime_checkable
class AncestorMask(Protocol):
    """Say which tokens of a packed row each token sees, as :class:`pidistill.scoring.tree_attention.TreeMask` does."""

    def dense(self) -> Bool[Tensor, "L L"]:
        """Return [query, key], True where the query sees the key."""
        ...


@dataclass
class ModelInput:
    """Hold what a model reads for one or more views of a batch, and where each policy token is predicted.

    Attributes:
        tokens: [R, L] prompts + completions: one packed row (a tree), or a row per rollout and view with padding on the right.
        rows, columns: [N] the hidden state at (row, column) predicts policy token n; in a tree several tokens may share one.
        positions: [R, L] distance from the beginning of the sequence; None where that is the column.
        mask: which columns each token of a packed row sees; None is causal.
        depth: tokens of the longest sequence, which the model must be able to read.
    """

    tokens: Int[Tensor, "R L"]
    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    positions: Int[Tensor, "R L"] | None = None
    mask: AncestorMask | None = None
    depth: int = 0


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
    """Hold the ids that each policy token was drawn from, token after token; none stands for the whole vocabulary.

    Attributes:
        ids: [M]. starts: [N + 1] the ids of token n are ``ids[starts[n] : starts[n + 1]]``.
    """

    ids: Int[Tensor, " M"]
    starts: Int[Tensor, " _"]

    def rows(self, first: int, last: int) -> Int[Tensor, "n K"]:
        """Return the ids of tokens ``first`` to ``last`` − 1, -1 behind the last one of a row."""
        counts = self.starts[first + 1 : last + 1] - self.starts[first:last]
        longest = int(counts.max()) if len(counts) else 0
        inside = torch.arange(longest, device=counts.device) < counts[:, None]
        rows = self.ids.new_full(inside.shape, -1)
        rows[inside] = self.ids[int(self.starts[first]) : int(self.starts[last])]
        return rows


@dataclass
class Batch:
    """Hold rollouts side by side. Everything the objectives see is flat over the N policy tokens of the batch.

    Attributes:
        views: the rollouts as model inputs; ``views.of("student")`` is a :class:`ModelInput`.
        targets: [N] the policy tokens.
        rollout_index: [N] which rollout of the batch (0..B-1) the token belongs to.
        token_index: [N] index of the token among its rollout's policy tokens.
        ratio_logprobs: [N] fp32 nats, log μ: the denominator of the ratios. None for demonstrations. With importance weights,
            the trainer's own log-probs under the weights that sampled.
        kept: the ids that each token was drawn from, where the sampler cut its distribution and recorded them.
        loss_weights: [N] fp32, what the whole loss of the token is multiplied with; None where that is 1 everywhere.
        importance_weights: [N] fp32, what the policy-gradient loss of the token is multiplied with; None where that is off.
        rewards: [N] fp32, the environment's reward of the rollout, without `reward_shaping`; None for demonstrations.
        advantages: [N] fp32, from the reward alone; None for demonstrations.
        kl_advantages: [N] fp32, what the objective's `kl_mode` adds for the view that sampled; None where it adds nothing.
        snis_weights: [N] fp32, the rollout's self-normalised importance weight; None where none was asked for.
        turn_index: [N] which assistant turn of its rollout the token belongs to, from 0.
        turn_balance: [N] fp32, what makes turns count alike: (tokens of the rollout) / (its turns × tokens of the turn).
        has_privileged: [N] True where the rollout's example has privileged information.
    """

    views: BatchInputs
    targets: Int[Tensor, " N"]
    rollout_index: Int[Tensor, " N"]
    token_index: Int[Tensor, " N"]
    ratio_logprobs: Float[Tensor, " N"] | None
    rewards: Float[Tensor, " N"] | None
    advantages: Float[Tensor, " N"] | None
    kl_advantages: Float[Tensor, " N"] | None
    snis_weights: Float[Tensor, " N"] | None
    has_privileged: Bool[Tensor, " N"]
    importance_weights: Float[Tensor, " N"] | None = None
    loss_weights: Float[Tensor, " N"] | None = None
    turn_index: Int[Tensor, " N"] | None = None
    turn_balance: Float[Tensor, " N"] | None = None
    kept: "KeptSets | None" = None

    def slice(self, part: slice) -> "Batch":
        """Return the policy tokens of ``part`` as objectives see them; views stay whole, and rollouts keep their numbers."""
        return replace(self, **{name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class Divergence:
    """Name a full-vocabulary divergence that an objective asks the scorer for.

    Attributes:
        name: ``kl_teacher_student``, ``kl_student_teacher`` or ``jsd`` (generalised, see :mod:`pidistill.losses.divergences`);
            with ``fn`` any other name.
        grad: the side that gradient reaches; the other side's log-probs are constants.
        beta: weight of the teacher in the mixture; only for ``jsd``.
        entry_clip: upper bound of each vocabulary entry's term before the sum; only for the two KLs.
        top_k: the divergence after merging all but the student's K most probable tokens into one tail bucket.
        fn: a divergence of one's own: from the log-probs of the teacher and of the student, [C, V] each and in fp32, one number
            per token, [C], in nats. The head calls it for C tokens at a time and differentiates it by autograd.
    """

    name: str
    grad: Literal["student", "teacher", "both", "none"] = "student"
    beta: float | None = None
    entry_clip: float | None = None
    top_k: int | None = None
    fn: Callable[[Float[Tensor, "C V"], Float[Tensor, "C V"]], Float[Tensor, " C"]] | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Say what an objective wants to know about a batch, and which sides gradient may reach.

    ``views`` lists the views that must be computed at all; RL without privileged information needs only the student.
    ``entropy`` adds the (detached) entropies of the views.
    """

    student_grad: bool
    teacher_grad: bool
    views: tuple[ViewName, ...] = ("student", "teacher")
    divergences: tuple[Divergence, ...] = ()
    entropy: bool = True


@dataclass
class Scores:
    """Hold per-token numbers of one batch, in nats; None is "not computed".

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

    def policy_logprobs(self, view: ViewName) -> Float[Tensor, " N"]:
        """Return the log-probs of the distribution that a sampler with these weights draws from: what ratios are made of.

        That is log S(y) − log Σ_{v kept} S(v), with gradient through both; log S(y) where nothing was cut or recorded.
        """
        logprobs, mass = getattr(self, f"{view}_logprobs"), getattr(self, f"{view}_kept_mass")
        return logprobs if mass is None else logprobs - mass


@dataclass
class TokenLoss:
    """Hold an objective's answer: a loss per policy token (nats, not reduced) and detached per-token values to log as means.

    Raises:
        InputError: a loss that is not one number per policy token, such as a mean over them.
    """

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
