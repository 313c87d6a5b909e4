"""List what a teacher may see of a successful agent trace: the kinds of privileged information, in one registry.

| kind | text | tasks without it |
| --- | --- | --- |
| calls | the tool calls with their arguments, in order; no reasoning, no results (π-Distill, arXiv 2602.04942) | no success |
| call_names | the names of the same calls | no success |
| solution_prefix | the first `prefix_calls` of them, or `prefix_frac` of them, rounded up | no success |
| full | everything said from the first assistant turn on: text, calls, results, the user's replies | no success |
| hints | what the trained model wrote about the trace: see :mod:`pidistill.rollouts.hints` | no hint in the file |
| gold_actions | the task's reference actions, whether or not a trace succeeded | no list in the rows |
| none | nothing: the control, and the RL baseline | all |

A success without any call (the agent was right to refuse) and an empty list of reference actions are information too, and are
written as `(no tool call)`. A success of whose calls none can be read is refused, and so is a source of whose traces none has a
call, for a kind that is made of calls: they stand in a form that is unknown here. Each kind has a header, the line above the
text, and leak phrases, which a completion that gives the information away would say.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pidistill.chat.calls import CallStyle, ToolCall, unreadable_calls
from pidistill.chat.messages import transcript_text
from pidistill.errors import InputError, check_choice, check_count, check_share
from pidistill.privileged.hint_file import read_hints
from pidistill.privileged.prompt import DEFAULT_LEAK_PHRASES
from pidistill.privileged.trace_task import TraceTask
from pidistill.types import Tools

NO_CALL = "(no tool call)"
CALL_KINDS = ("calls", "call_names", "solution_prefix")  # what is made of the calls of a trace

_CALL_PHRASES = (
    "provided actions",
    "provided calls",
    "provided tool calls",
    "given actions",
    "given tool calls",
    "reference actions",
    "list of actions",
    "list of tool calls",
    "actions above",
    "calls above",
    "successful agent",
)


@dataclass(frozen=True)
class TraceText:
    """Say how the information of one kind is written; its fields are arguments of :func:`pidistill.data.trace_dataset`."""

    kind: str
    style: CallStyle = field(default_factory=CallStyle)
    header: str | None = None
    prefix_calls: int | None = None
    prefix_frac: float = 0.5
    hints: str | None = None
    _hints: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_choice("dataset.kind", self.kind, KINDS)
        check_count("dataset.prefix_calls", self.prefix_calls, null="the share prefix_frac")
        check_share("dataset.prefix_frac", self.prefix_frac, "the share of the calls shown", "(0, 1]")
        if (self.kind == "hints") != (self.hints is not None):
            raise InputError(
                f"dataset.kind is {self.kind} and dataset.hints {self.hints}; set dataset.hints with kind: hints, and "
                "remove it with any other kind"
            )
        if self.hints is not None:
            self._hints.update(read_hints(self.hints))

    def write(self, task: TraceTask, tools: Tools = None) -> str | None:
        """Return the privileged text of a task; None where it has none. ``tools`` type the arguments of XML calls."""
        kind = KINDS[self.kind]
        text = kind.write(self, task, tools)
        header = kind.header if self.header is None else self.header
        return None if not text else f"{header}\n{text}" if header else text

    def check_tasks(self, tasks: Sequence[str]) -> None:
        if self.hints is not None and not self._hints.keys() & set(tasks):
            raise InputError(f"dataset.hints {self.hints} has hints for none of the tasks; it belongs to another source")

    def hint(self, task: str) -> str | None:
        return self._hints.get(task)


@dataclass(frozen=True)
class Kind:
    """Describe one kind of privileged information: how it is written, the line above it, what would give it away."""

    write: Callable[[TraceText, TraceTask, Tools], str | None]
    header: str = ""
    leak_phrases: tuple[str, ...] = ()


def _source_calls(how: TraceText, task: TraceTask, tools: Tools) -> list[ToolCall] | None:
    if task.source is None:
        return None
    calls, tags = how.style.calls(task.source.turns, tools), how.style.action_tags
    said = [turn for turn in task.source.turns if turn["role"] == "assistant"]
    unreadable = 0 if calls else sum(unreadable_calls(turn, tags) for turn in said)
    if unreadable:
        raise InputError(
            f"{task.source.id}: none of its {unreadable} calls between the tags {', '.join(tags)} can be read, so that its "
            "privileged information would say that no tool was called; correct the row or leave it out, or set "
            "dataset.action_tags to other tags where these hold ordinary text"
        )
    return calls


def _written(style: CallStyle, calls: Sequence[ToolCall] | None) -> str | None:
    return None if calls is None else style.write(calls) or NO_CALL


def _calls(how: TraceText, task: TraceTask, tools: Tools) -> str | None:
    return _written(how.style, _source_calls(how, task, tools))


def _call_names(how: TraceText, task: TraceTask, tools: Tools) -> str | None:
    return _written(replace(how.style, template="{number}. {name}"), _source_calls(how, task, tools))


def _solution_prefix(how: TraceText, task: TraceTask, tools: Tools) -> str | None:
    calls = _source_calls(how, task, tools)
    if calls is None:
        return None
    return _written(how.style, calls[: how.prefix_calls or math.ceil(how.prefix_frac * len(calls))])


def _full(how: TraceText, task: TraceTask, tools: Tools) -> str | None:
    return transcript_text(task.source.turns) if task.source is not None else None


def _hint(how: TraceText, task: TraceTask, tools: Tools) -> str | None:
    return how.hint(task.task)


def _gold_actions(how: TraceText, task: TraceTask, tools: Tools) -> str | None:
    actions = task.actions
    return None if actions is None else _written(how.style, [a for a in actions if a.name not in how.style.omit_tools])


def _none(how: TraceText, task: TraceTask, tools: Tools) -> None:
    return None


KINDS: dict[str, Kind] = {
    "calls": Kind(_calls, "Tool calls of an agent that solved this task, in order:", _CALL_PHRASES),
    "call_names": Kind(_call_names, "Tools that an agent called to solve this task, in order:", _CALL_PHRASES),
    "solution_prefix": Kind(_solution_prefix, "The first tool calls of an agent that solved this task:", _CALL_PHRASES),
    "full": Kind(
        _full,
        "How an agent solved this task:",
        (*_CALL_PHRASES, "previous conversation", "conversation above", "transcript", "example conversation"),
    ),
    "hints": Kind(_hint, "How to solve this task:", ("provided hint", "given hint", "hint says", "the summary")),
    "gold_actions": Kind(_gold_actions, "Actions that solve this task, in order:", _CALL_PHRASES),
    "none": Kind(_none),
}


def trace_leak_phrases(kind: str, extra: Sequence[str] = ()) -> list[str]:
    """Return the general leak phrases, the kind's and ``extra``; for `privileged.leak_phrases`."""
    check_choice("privileged.leak_phrases.kind", kind, KINDS)
    return [*DEFAULT_LEAK_PHRASES, *KINDS[kind].leak_phrases, *extra]
