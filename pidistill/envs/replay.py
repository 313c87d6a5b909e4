"""Replay recorded episodes: as long as the agent makes the recorded calls, it gets the recorded answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pidistill.chat.calls import ACTION_TAGS, ToolCall, calls_and_unreadable
from pidistill.chat.xml_calls import as_xml_reads
from pidistill.envs.base import EnvStep
from pidistill.envs.function_tools import call_tools
from pidistill.errors import InputError, check_choice, check_count
from pidistill.types import Example, Message, Tools

if TYPE_CHECKING:
    from pidistill.privileged.trace_task import AgentTrace

MISMATCH_ERROR = "Error: this call is not part of the recorded episode, so there is no result for it. Try another one."


@dataclass
class ReplayState:
    """Hold where an episode stands: ``steps`` are the recorded assistant turns with what answered each of them."""

    steps: list[tuple[Message, list[Message]]]
    reward: float
    tools: Tools = None  # that the row shows
    at: int = 0
    errors: int = 0


@dataclass(frozen=True)
class ReplayEnvironment:
    """Follow ``example.data["trace"]`` of :func:`pidistill.data.trace_dataset`; refuse traces of a source without any call.

    A turn matches the recorded one if it makes the same calls: the same tools, in the same order, with equal arguments; the
    text "5" is the number 5 where the tool's schema permits both, since XML calls cannot tell them apart. Where the recorded
    turn makes none, any turn without a call matches, whatever it says: the recorded reply follows, which may not fit it. A
    recorded call that cannot be read matches only the same text between the same tags. An episode that matches to the last
    recorded turn gets the trace's reward; every other one ``mismatch_reward``. So a success means "did what the agent of the
    trace did", not "did what the user wanted": another way to a right end counts as a mismatch. For that, use the benchmark
    itself as an environment.

    ``reward/followed`` in the metrics is the share of recorded turns that an episode matched; it is no part of the reward.

    Attributes:
        action_tags: where a turn without ``tool_calls`` holds its calls; see :mod:`pidistill.chat.calls`.
        free_arguments: tools whose arguments are not compared, e.g. free text: ``[think]``.
        on_mismatch: "end" ends the episode; "error" answers with an error that says so (or why a call cannot be read), and the
            same recorded turn is waited for, until ``max_errors`` errors have been given.
        mismatch_reward: reward of an episode that left the trace.
    """

    action_tags: Sequence[str] = ACTION_TAGS
    free_arguments: Sequence[str] = ()
    on_mismatch: str = "end"
    max_errors: int = 3
    mismatch_reward: float = 0.0

    def __post_init__(self) -> None:
        check_choice("environment.on_mismatch", self.on_mismatch, ("end", "error"))
        check_count("environment.max_errors", self.max_errors)

    def reset(self, example: Example) -> ReplayState:
        trace, reward = self.check_reference(example)
        return ReplayState(recorded_steps(trace.turns), reward, example.tools)

    def check_reference(self, example: Example) -> tuple["AgentTrace", float]:
        """Return the recorded episode and its reward; refuse an example that lacks one of them."""
        trace: AgentTrace | None = example.data.get("trace")
        if trace is None:
            raise InputError(
                f"{example.id} has no recorded episode to replay; set dataset._component_=pidistill.data.trace_dataset"
            )
        if trace.reward is None:
            raise InputError(
                f"{trace.id} has no reward, which the episode would get; write a number in the row, leave the row out, or set "
                "dataset.reward_key where it is null"
            )
        if trace.no_call_read is not None:
            raise InputError(f"a replay would reward any text: {trace.no_call_read}")
        return trace, trace.reward

    def step(self, state: ReplayState, turn: Message, *, truncated: bool) -> EnvStep:
        recorded, answers = state.steps[state.at]
        if truncated or not self._matches(turn, recorded, state.tools):
            return self._mismatch(state, turn, truncated)
        state.at += 1
        done = state.at == len(state.steps)
        followed = {"followed": 1 / len(state.steps)}
        return EnvStep([] if done else answers, state.reward if done else 0.0, done, followed)

    def unfinished(self, state: ReplayState) -> EnvStep:
        """Give an episode that a limit ended before the last recorded turn what every other one gets that left the trace."""
        return EnvStep([], self.mismatch_reward, done=True)

    def _matches(self, turn: Message, recorded: Message, tools: Tools) -> bool:
        if turn.get("tool_call_error"):  # the tokenizer found a call that cannot be read
            return False
        return self._compared(turn, tools) == self._compared(recorded, tools)

    def _compared(self, turn: Message, tools: Tools) -> list[ToolCall | str]:
        return [self._without_form(call, tools) for call in calls_and_unreadable(turn, self.action_tags, tools)]

    def _without_form(self, call: ToolCall | str, tools: Tools) -> ToolCall | str:
        if isinstance(call, str):
            return call
        if call.name in self.free_arguments:
            return ToolCall(call.name, None)
        is_object = isinstance(call.arguments, Mapping)
        return ToolCall(call.name, as_xml_reads(call.name, call.arguments, tools)) if is_object else call

    def _mismatch(self, state: ReplayState, turn: Message, truncated: bool) -> EnvStep:
        state.errors += 1
        if truncated or self.on_mismatch == "end" or state.errors > self.max_errors:
            return EnvStep([], self.mismatch_reward, True, {"followed": 0.0})
        if turn.get("tool_call_error"):
            return EnvStep(call_tools(turn, {}), 0.0, False, {"followed": 0.0})
        calls = turn.get("tool_calls") or []
        if not calls:
            return EnvStep([{"role": "user", "content": MISMATCH_ERROR}], 0.0, False, {"followed": 0.0})
        return EnvStep([_error_for(call) for call in calls], 0.0, False, {"followed": 0.0})


def recorded_steps(turns: Sequence[Message]) -> list[tuple[Message, list[Message]]]:
    """Return each assistant turn with the messages up to the next one."""
    steps: list[tuple[Message, list[Message]]] = []
    for message in turns:
        if message["role"] == "assistant":
            steps.append((message, []))
        else:
            steps[-1][1].append(message)
    return steps


def _error_for(call: dict) -> Message:
    name = call.get("function", call).get("name", "")
    found = {"role": "tool", "name": name, "content": MISMATCH_ERROR}
    return found | {"tool_call_id": call["id"]} if "id" in call else found
