"""Select traces for supervised fine-tuning that a model makes itself: which samples are kept, and in what form.

| selection | a row's completion | source |
| --- | --- | --- |
| Successes | a whole rollout that succeeded | RFT, arXiv 2308.01825; sampled with privileged information: RFT with PI |
| All | every rollout, with what a fixed-sample method needs of it | Semi-OPD, arXiv 2610.11291 |
| Interventions | the right turns of a rollout that failed, and the failing turn rewritten | InT, arXiv 2601.14209 |

A row's messages are the example's own, without privileged information, whatever the view that sampled: training on the rows
teaches the student to do without it.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from pidistill.chat.phrases import assistant_text, count_phrases
from pidistill.distributed.run import Run
from pidistill.envs.base import Environment, EnvStep, judge_unfinished
from pidistill.errors import InputError, check_count
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.rollouts import CollectResult, rollout_seed
from pidistill.tokenizers import ChatTokenizer
from pidistill.types import Example, Message, Rollout

# Streams of their own, so that no training round and no evaluation draws the same numbers.
SAMPLING_STREAM = -2
REWRITING_STREAM = -3


@dataclass(frozen=True)
class Trace:
    """Hold a demonstration: the answer to the example's messages."""

    example: Example
    completion: list[Message]  # assistant turns and the observations between them; ends with an assistant turn
    reward: float  # what the environment gave for it
    group: int  # the prompt's index, which orders the traces
    provenance: dict[str, Any] = field(default_factory=dict)  # where it comes from, for the reader of the file
    sampled: dict[str, list] | None = None  # ids and log-probs as they were drawn; see `recorded`


@dataclass
class Selected:
    """Hold the traces that are kept, and the further rollouts that it took, some of them lost."""

    traces: list[Trace]
    rollouts: list[Rollout] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Hold a rollout up to a turn: ``turns`` are said, the next one is to be sampled again, from ``seed``."""

    rollout: Rollout
    turns: list[Message]
    seed: int


Rewrite = Callable[[Sequence[Cut]], CollectResult]


@runtime_checkable
class Selection(Protocol):
    """Choose traces. With a sharded model every rank calls ``rewrite`` equally often: :meth:`select` is called on all alike."""

    def select(self, rollouts: Sequence[Rollout], leak_phrases: Sequence[str], rewrite: Rewrite, seed: int) -> Selected:
        """Choose among all rollouts of some prompts; a prompt's rollouts are never split between two calls.

        Args:
            leak_phrases: what gives the privileged information away.
            rewrite: samples one turn per cut, the model seeing the privileged information; the rollouts that it returns are
                that turn alone, with the cut's position as ``group``.
            seed: the run's.
        """


@dataclass(frozen=True)
class Successes:
    """Keep whole rollouts with at least ``threshold`` reward (rejection sampling).

        D = { (x, y) : y ~ π(·|x, I), R(y) ≥ threshold },  then  max Σ_D log π(y|x)

    The paper samples without privileged information and keeps distinct right solutions; sampled in the teacher view, the
    rows show an agent that knows, and training without the information distils it. A rollout that the token limit cut
    short is never kept.

    Attributes:
        threshold: reward of a success.
        drop_leaks: leave out rollouts that say a leak phrase, which a student would learn to say.
        max_per_prompt: at most so many traces of one prompt, the first ones; null keeps all, so that easy prompts weigh more.
    """

    threshold: float = 1.0
    drop_leaks: bool = False
    max_per_prompt: int | None = None

    def __post_init__(self) -> None:
        check_count("selection.max_per_prompt", self.max_per_prompt, null="all")

    def select(self, rollouts: Sequence[Rollout], leak_phrases: Sequence[str], rewrite: Rewrite, seed: int) -> Selected:
        whole = [r for r in rollouts if r.task_reward >= self.threshold and r.stop_reason not in ("length", "turn_length")]
        traces = [Trace(r.example, r.turns, r.reward, r.group, {"sampled_by": r.sampled_by}) for r in whole]
        return Selected(_filtered(traces, leak_phrases if self.drop_leaks else (), self.max_per_prompt))


@dataclass(frozen=True)
class All:
    """Keep every rollout, whatever its reward, with what the sampler drew: its ids and their log-probs.

    For objectives that learn from fixed samples (:class:`pidistill.objectives.SemiOPD`): the column ``sampled`` holds the ids,
    which tokens the policy wrote, and log μ of each of these, so that nothing is tokenized again.
    """

    def select(self, rollouts: Sequence[Rollout], leak_phrases: Sequence[str], rewrite: Rewrite, seed: int) -> Selected:
        return Selected(
            [Trace(r.example, r.turns, r.reward, r.group, {"sampled_by": r.sampled_by}, recorded(r)) for r in rollouts]
        )


def recorded(rollout: Rollout) -> dict[str, list]:
    """Return the ids of a rollout's completion, its policy mask as 0 and 1, and log μ of each policy token."""
    pairs = zip(rollout.sampled_logprobs, rollout.policy_mask, strict=True)
    reads = {"teacher_reads": [list(read) for read in rollout.teacher_reads]} if rollout.teacher_reads else {}
    return {
        "ids": rollout.completion,
        "policy": [int(own) for own in rollout.policy_mask],
        "logprobs": [x for x, own in pairs if own],
    } | reads


@dataclass(frozen=True)
class Interventions:
    """Keep a failing rollout up to its first error, with a right turn in the error's place (intervention training, InT).

        y ~ π(·|x) fails at turn k;  y'_k ~ π(·|x, I, y_<k);  D = { (x, y_<k ++ y'_k) : y'_k is accepted }

    In the paper the model compares its trace with a reference solution, names the first wrong step and proposes a one-step
    fix; then SFT on the prefix with the fix, then RL. Here the environment's verifier names the failing turn, the one at
    which it ended the episode (the tiny world has no text for a judge), and the model, shown the privileged information,
    rewrites that turn. A fix is kept if the environment accepts it: the episode continues, or ends with ``threshold`` or more.
    An environment that continues after a wrong turn (``TinyWorldEnvironment.retries``) accepts everything: use another one.

    A rollout that the token limit or `max_turns` ended has no refused turn and gives no trace.

    Attributes:
        threshold: reward of a success; rollouts that reach it need no fix.
        drop_leaks, max_per_prompt: as in :class:`Successes`.
    """

    threshold: float = 1.0
    drop_leaks: bool = False
    max_per_prompt: int | None = None

    def __post_init__(self) -> None:
        check_count("selection.max_per_prompt", self.max_per_prompt, null="all")

    def select(self, rollouts: Sequence[Rollout], leak_phrases: Sequence[str], rewrite: Rewrite, seed: int) -> Selected:
        cuts = self._cuts(rollouts, seed)
        fixes = rewrite(cuts)
        traces = [self._trace(cuts[fix.group], fix) for fix in fixes.rollouts if self._accepted(cuts[fix.group], fix)]
        kept = _filtered(traces, leak_phrases if self.drop_leaks else (), self.max_per_prompt)
        return Selected(kept, fixes.rollouts, fixes.dropped)

    def _cuts(self, rollouts: Sequence[Rollout], seed: int) -> list[Cut]:
        members: Counter[int] = Counter()
        cuts = []
        for rollout in rollouts:
            if rollout.task_reward < self.threshold and rollout.stop_reason == "done":
                own = rollout_seed(seed, REWRITING_STREAM, rollout.group, members[rollout.group])
                cuts.append(Cut(rollout, rollout.turns[:-1], own))
            members[rollout.group] += 1
        return cuts

    def _reward(self, cut: Cut, fix: Rollout) -> float:
        return sum(cut.rollout.turn_rewards[:-1]) + fix.reward

    def _accepted(self, cut: Cut, fix: Rollout) -> bool:
        return fix.stop_reason == "max_turns" or (fix.stop_reason == "done" and self._reward(cut, fix) >= self.threshold)

    def _trace(self, cut: Cut, fix: Rollout) -> Trace:
        told = {"sampled_by": cut.rollout.sampled_by, "rewritten_by": fix.sampled_by}
        told["rewritten_turn"] = len(cut.rollout.turn_rewards) - 1
        return Trace(cut.rollout.example, [*cut.turns, *fix.turns], self._reward(cut, fix), cut.rollout.group, told)


def _filtered(traces: Sequence[Trace], leak_phrases: Sequence[str], max_per_prompt: int | None) -> list[Trace]:
    kept, count = [], Counter()
    for trace in traces:
        if count_phrases(assistant_text(trace.completion), leak_phrases):
            continue
        if max_per_prompt is None or count[trace.group] < max_per_prompt:
            kept.append(trace)
            count[trace.group] += 1
    return kept


# ---------------------------------------------------------------------------------------------- one turn again


@dataclass(frozen=True)
class AfterTurns:
    """Play ``environment`` from the middle of an episode: a reset plays the assistant turns in ``example.data["said"]`` first.

    The environment must answer the same turns as it did when they were sampled; their rewards are not counted again.
    """

    environment: Environment

    def reset(self, example: Example) -> Any:
        state = self.environment.reset(example.data["example"])
        for turn in example.data["said"]:
            if turn["role"] == "assistant" and self.environment.step(state, turn, truncated=False).done:
                raise InputError(
                    f"{example.id}: the environment ended a replayed episode earlier than the sampled one; rewriting a turn "
                    "needs an environment that answers the same turns in the same way: choose another `selection`"
                )
        return state

    def step(self, state: Any, turn: Message, *, truncated: bool) -> EnvStep:
        return self.environment.step(state, turn, truncated=truncated)

    def unfinished(self, state: Any) -> EnvStep:
        return judge_unfinished(self.environment, state)


@dataclass(frozen=True)
class Rewriter:
    """Sample one turn per cut, in the view with privileged information: the default :data:`Rewrite`.

    ``collect`` samples with the model, an :class:`AfterTurns` environment and ``max_turns=1``. The token limit is the
    sampler's, or what is left of ``max_seq_len`` behind the longest prompt on any rank.
    """

    collect: Callable[..., CollectResult]
    tokenizer: ChatTokenizer
    privileged: PrivilegedPrompt
    run: Run
    max_new_tokens: int
    max_seq_len: int

    def __call__(self, cuts: Sequence[Cut]) -> CollectResult:
        examples = [self._example(cut) for cut in cuts]
        # The rows have been through the control (`privileged.control`) already.
        prompts = [self.privileged.build(example, self.tokenizer).pair for example in examples]
        longest = self.run.max(max((len(pair.teacher) for pair in prompts), default=0))
        return self.collect(
            examples=examples,
            prompts=prompts,
            view="teacher",
            group_size=1,
            seeds=[cut.seed for cut in cuts],
            max_turns=1,
            max_new_tokens=max(1, min(self.max_new_tokens, self.max_seq_len - longest)),
        )

    def _example(self, cut: Cut) -> Example:
        example = cut.rollout.example
        data = {"example": example, "said": cut.turns}
        return replace(example, messages=[*example.messages, *cut.turns], completion=None, data=data)


# ---------------------------------------------------------------------------------------------- file


def trace_row(trace: Trace, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object that ``pidistill.data.chat_dataset(source, completion_key="completion", privileged_key=...)`` reads.

    Tool schemas (``tools_key="tools"``) and the arguments of tool calls are JSON text: a file of tables needs columns of one
    type, and every call has arguments of its own.
    """
    row = {
        "messages": [_flat(message) for message in trace.example.messages],
        "completion": [_flat(message) for message in trace.completion],
        "privileged": trace.example.privileged,
        "reward": trace.reward,
        "provenance": {"example": trace.example.id, **provenance, **trace.provenance},
    }
    if trace.sampled is not None:
        row["sampled"] = trace.sampled | {
            key: provenance[key] for key in ("temperature", "top_p", "top_k", "control") if key in provenance
        }
    return row if trace.example.tools is None else row | {"tools": json.dumps(trace.example.tools, ensure_ascii=False)}


def _flat(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_flat_call(call) for call in calls]} if calls else message


def _flat_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments", ""), str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function} if "function" in call else function
