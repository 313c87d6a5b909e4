"""Hold one recorded episode of an agent, and the episodes of one task."""

from dataclasses import dataclass
from typing import Any

from pidistill.chat.calls import ToolCall
from pidistill.types import Message


@dataclass(frozen=True)
class AgentTrace:
    """Hold one recorded episode."""

    id: str  # names the row
    task: str  # what is the same in all traces of one task
    prompt: list[Message]  # the messages up to the first assistant turn after the first user message
    turns: list[Message]  # from there to the last assistant turn; what follows it answers nothing
    reward: float | None  # None where the row has none; `success` says whether it reaches the threshold
    tools: list[dict[str, Any]] | None  # the row's own tool schemas
    actions: list[ToolCall] | None  # the task's reference actions; None where the row has none
    success: bool
    no_call_read: str | None = None  # says that no trace of the source has a call that is read, so that a replay compares none

    @property
    def steps(self) -> int:
        return sum(turn["role"] == "assistant" for turn in self.turns)


@dataclass(frozen=True)
class TraceTask:
    """Hold the traces of one task.

    ``source`` is the successful one with the fewest assistant turns (ties: the first); None where none succeeded. ``shown``
    gives the prompt: the source, else the first trace.
    """

    task: str
    traces: list[AgentTrace]

    @property
    def source(self) -> AgentTrace | None:
        return min((trace for trace in self.traces if trace.success), key=lambda trace: trace.steps, default=None)

    @property
    def shown(self) -> AgentTrace:
        return self.source or self.traces[0]

    @property
    def actions(self) -> list[ToolCall] | None:
        return next((trace.actions for trace in self.traces if trace.actions is not None), None)
