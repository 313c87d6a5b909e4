"""Make examples of recorded agent episodes (chat logs with tool calls): what a stronger agent did is privileged information.

    rows ─► traces, grouped by task ─► per task the successful trace with the fewest assistant turns ─► Example

An example's messages are what an agent sees when the task begins: the system prompt and the first user message. What the
teacher sees of the successful trace is its *kind* (:mod:`pidistill.privileged.trace_kinds`). The trace itself is the example's
completion, and the environment :class:`pidistill.envs.ReplayEnvironment` finds it in ``example.data["trace"]``.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtune.utils import log_rank_zero

from pidistill.chat.calls import (
    ACTION_TAGS,
    CALL_TEMPLATE,
    XML_TAG,
    CallStyle,
    ToolCall,
    as_call,
    calls_and_unreadable,
    has_malformed_call,
    unreadable_calls,
)
from pidistill.chat.messages import RECORDED_ARGUMENT_KEYS, check_messages, last_user_index, message_text, with_system
from pidistill.data.builders import check_tools, row_tools
from pidistill.data.dataset import ExampleDataset, convert_rows
from pidistill.data.sources import get, load_rows, require_value
from pidistill.errors import InputError, bounded_repr, check_choice
from pidistill.privileged.trace_kinds import CALL_KINDS, NO_CALL, TraceText
from pidistill.privileged.trace_task import AgentTrace, TraceTask
from pidistill.types import Example, Message

_log = logging.getLogger(__name__)
NOT_CHOSEN, NO_ANSWER, UNSOLVED = "other_trace_of_task", "no_assistant_turn", "task_without_success"


@dataclass(frozen=True)
class TraceRows:
    """Hold all tasks of a source, in the order of their first row."""

    tasks: list[TraceTask]
    unusable: dict[str, int]  # rows left out, by reason
    unreadable_calls: int  # calls between tags that cannot be read; they are text to us
    tools: list[dict[str, Any]] | None  # of traces without own ones: derived from their OpenAI-style calls; see `derived_tools`


def trace_dataset(
    source: str,
    kind: str = "calls",
    messages_key: str = "messages",
    task_key: str | None = "task_id",
    reward_key: str | None = "reward",
    success_threshold: float = 1.0,
    actions_key: str | None = None,
    tools_key: str | None = "tools",
    system_key: str | None = "system",
    tools_file: str | None = None,
    derive_tools: bool = True,
    call_template: str = CALL_TEMPLATE,
    header: str | None = None,
    omit_tools: Sequence[str] = (),
    action_tags: Sequence[str] = ACTION_TAGS,
    prefix_calls: int | None = None,
    prefix_frac: float = 0.5,
    hints: str | None = None,
    unsolved: str = "keep",
    first_task: int = 0,
    max_tasks: int | None = None,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    config_name: str | None = None,
) -> ExampleDataset:
    """Make one example per task of recorded agent episodes.

    A task without a successful trace has no privileged information: the objective's `no_pi` says what becomes of it (plain RL
    by default, which needs an environment in which it can be solved: a replay of a failure has no reward). Rows
    that no example is made of are counted: ``other_trace_of_task``, ``no_assistant_turn``.

    Args:
        source: .json (a list) or .jsonl with one episode per row, or what :func:`pidistill.data.sources.load_rows` reads.
        kind: what the teacher sees; see the table in :mod:`pidistill.privileged.trace_kinds`.
        messages_key: the chat log. Leading messages with ``is_demo: true`` (SWE-agent's demonstrations) are of the prompt.
        task_key: what tells tasks apart; null where every row is a task of its own.
        reward_key: null where every trace counts as successful.
        success_threshold: reward of a successful trace.
        actions_key: the task's reference actions, ``[{"name", "kwargs" | "arguments"}]``, for ``kind: gold_actions``.
        tools_key: tool schemas in the rows; the column `tools`, or OpenAI's older `functions`, is read where rows have one, and
            null ignores it. ``tools_file``: schemas in a JSON file, as a list, in place of the rows'. Rows with neither get,
            with ``derive_tools``, schemas that are derived from the calls seen in the traces of all such rows: names, arguments
            and JSON types, no descriptions, and no tool that none of them calls. Calls between tags give none: there the system
            prompt says it.
        system_key: a column with the system text of the episode, read where rows have one; null ignores it.
        call_template, omit_tools, action_tags: see :class:`pidistill.chat.calls.CallStyle`.
        header: the line above the information; null is the kind's own, "" is none.
        prefix_calls, prefix_frac: how much ``kind: solution_prefix`` shows: so many calls, or that share, rounded up.
        hints: file that ``recipes/sample_distributed.py`` wrote with :class:`~pidistill.rollouts.hints.Hints`, for
            ``kind: hints``.
        unsolved: tasks without a successful trace: "keep" (no privileged information, no completion) or "drop", counted as
            ``task_without_success``: what supervised training, which needs completions, asks for.
        first_task, max_tasks: which tasks, in the order of the source: training and evaluation rows of one file.
    """
    style = CallStyle(call_template, omit_tools, action_tags)
    how = TraceText(kind, style, header, prefix_calls, prefix_frac, hints)
    rows = read_traces(
        source,
        messages_key=messages_key,
        task_key=task_key,
        reward_key=reward_key,
        success_threshold=success_threshold,
        actions_key=actions_key,
        tools_key=tools_key,
        system_key=system_key,
        action_tags=action_tags,
        split=split,
        data_files=data_files,
        config_name=config_name,
    )
    tasks = _range(rows.tasks, first_task, max_tasks)
    if kind == "gold_actions" and all(task.actions is None for task in tasks):
        raise InputError(f"dataset.kind is gold_actions, and no row of {source} has reference actions; set dataset.actions_key")
    how.check_tasks([task.task for task in rows.tasks])
    common = _tools_of_file(tools_file) if tools_file else None
    chosen = _choose(tasks, unsolved)
    if not chosen:
        raise InputError(
            f"none of the {len(tasks)} tasks of {source} has a trace with {reward_key} ≥ {success_threshold}; lower "
            "dataset.success_threshold, or set dataset.unsolved: keep"
        )
    used = [task.source for task in chosen if task.source is not None]
    _warn_of_malformed_calls(source, used, action_tags)
    _warn_of_unreadable_calls(source, used, action_tags)
    no_call_read = _check_calls_are_read(source, kind, used, rows, action_tags)
    derived = rows.tools if derive_tools else None
    examples = [_example(task, how, common, derived, no_call_read) for task in chosen]
    return ExampleDataset(examples, _count_dropped(tasks, chosen) | rows.unusable)


def _choose(tasks: Sequence[TraceTask], unsolved: str) -> list[TraceTask]:
    check_choice("dataset.unsolved", unsolved, ("keep", "drop"))
    return [task for task in tasks if task.source is not None or unsolved == "keep"]


def _count_dropped(tasks: Sequence[TraceTask], chosen: Sequence[TraceTask]) -> dict[str, int]:
    """Return how many traces no example is made of, by reason."""
    other = sum(len(task.traces) - 1 for task in chosen)
    unsolved = sum(len(task.traces) for task in tasks) - other - len(chosen)
    return {reason: count for reason, count in ((NOT_CHOSEN, other), (UNSOLVED, unsolved)) if count}


def _example(
    task: TraceTask,
    how: TraceText,
    common: list[dict[str, Any]] | None,
    derived: list[dict[str, Any]] | None,
    no_call_read: str | None,
) -> Example:
    """Return the example of a task, with the ``common`` tools, else those of its row, else the ``derived`` ones."""
    shown = replace(task.shown, no_call_read=no_call_read)
    tools = next((tools for tools in (common, shown.tools, derived) if tools is not None), None)
    return Example(
        id=shown.id,
        messages=shown.prompt,
        privileged=how.write(task, tools),
        completion=shown.turns if shown.success else None,
        tools=tools,
        data={"task": task.task, "trace": shown},
    )


def _range(tasks: list[TraceTask], first: int, count: int | None) -> list[TraceTask]:
    if first < 0 or (count is not None and count < 1) or first >= len(tasks):
        raise InputError(
            f"dataset.first_task={first} and dataset.max_tasks={count} leave none of the {len(tasks)} tasks; tasks count from 0"
        )
    return tasks[first:] if count is None else tasks[first : first + count]


# ------------------------------------------------------------------------------------------- rows


def read_traces(
    source: str,
    messages_key: str = "messages",
    task_key: str | None = "task_id",
    reward_key: str | None = "reward",
    success_threshold: float = 1.0,
    actions_key: str | None = None,
    tools_key: str | None = "tools",
    system_key: str | None = "system",
    action_tags: Sequence[str] = ACTION_TAGS,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    config_name: str | None = None,
) -> TraceRows:
    """Read the traces of ``source`` by task; arguments as in :func:`trace_dataset`."""
    rows = load_rows(source, split, data_files, None, config_name)
    named = {"messages_key": messages_key, "task_key": task_key, "reward_key": reward_key, "actions_key": actions_key}
    rows.require_all(**named, tools_key=None if tools_key == "tools" else tools_key)
    keys = named | {"tools_key": tools_key, "system_key": system_key}
    read = functools.partial(_read_trace, keys=keys, success_threshold=success_threshold)
    found = convert_rows(rows, read)
    traces = [trace for trace in found if trace is not None]
    if not traces:
        raise InputError(f"no row of {source} has an assistant turn after a user message; check dataset.messages_key")
    tasks: dict[str, list[AgentTrace]] = {}
    for trace in traces:
        tasks.setdefault(trace.task, []).append(trace)
    _warn_of_scale(source, traces, success_threshold)
    _warn_of_merged_tasks(source, tasks, task_key)
    said = [turn for trace in traces for turn in _assistant_turns(trace)]
    untold = [turn for trace in traces if trace.tools is None for turn in _assistant_turns(trace)]
    seen = [call for turn in untold for call in map(as_call, turn.get("tool_calls") or []) if call is not None]
    without = len(found) - len(traces)
    return TraceRows(
        tasks=[TraceTask(*item) for item in tasks.items()],
        unusable={NO_ANSWER: without} if without else {},
        unreadable_calls=sum(unreadable_calls(turn, action_tags) for turn in said),
        tools=derived_tools(seen),
    )


def _warn_of_scale(source: str, traces: Sequence[AgentTrace], threshold: float) -> None:
    """Warn where successes have several rewards far above the threshold, as percentages have above 1.0."""
    rewards = [trace.reward for trace in traces if trace.success and trace.reward is not None]
    least, most = min(rewards, default=0.0), max(rewards, default=0.0)
    if 0 < threshold <= 1 and most >= 2 and least < most:
        log_rank_zero(
            _log,
            f"{source}: {len(rewards)} of {len(traces)} traces count as successes, with rewards from {least:g} to {most:g}; "
            f"if these are percentages or points, set dataset.success_threshold (now {threshold:g}) to that of a success",
            level=logging.WARNING,
        )


def _warn_of_merged_tasks(source: str, tasks: Mapping[str, Sequence[AgentTrace]], task_key: str | None) -> None:
    """Warn of ids that several tasks seem to share: the last user texts of their traces' prompts differ."""
    merged = [task for task, traces in tasks.items() if len({_question(trace) for trace in traces}) > 1]
    if merged:
        log_rank_zero(
            _log,
            f"{source}: {len(merged)} of the {len(tasks)} values of {task_key} have prompts with several last user "
            f"messages (first: {merged[0]}), and one trace is chosen for all; where these are several tasks, and not one in "
            "several words, set dataset.task_key to a column that tells them apart, or to null (a task per row)",
            level=logging.WARNING,
        )


def _question(trace: AgentTrace) -> str:
    user = last_user_index(trace.prompt)
    return "" if user is None else message_text(trace.prompt[user]).strip()


def _warn_of_malformed_calls(source: str, traces: Sequence[AgentTrace], action_tags: Sequence[str]) -> None:
    found = [trace.id for trace in traces if any(has_malformed_call(turn, action_tags) for turn in _assistant_turns(trace))]
    if found:
        log_rank_zero(
            _log,
            f"{source}: {len(found)} of the {len(traces)} successful traces that are used have a call whose arguments are no "
            f"JSON object (first: {found[0]}); it is shown, learned and replayed as written: correct it, or leave the row out",
            level=logging.WARNING,
        )


def _warn_of_unreadable_calls(source: str, traces: Sequence[AgentTrace], action_tags: Sequence[str]) -> None:
    found = [
        (trace.id, call)
        for trace in traces
        for turn in _assistant_turns(trace)
        for call in calls_and_unreadable(turn, action_tags)
        if isinstance(call, str)
    ]
    if found:
        log_rank_zero(
            _log,
            f"{source}: {len(dict(found))} of the {len(traces)} successful traces that are used have a call between tags that "
            f"cannot be read (first: {found[0][0]}: {bounded_repr(found[0][1])}); it is in no privileged information, and no "
            "turn without it follows it in a replay: correct it, leave the row out, or set dataset.action_tags to other tags "
            "where these hold ordinary text",
            level=logging.WARNING,
        )


def _check_calls_are_read(
    source: str, kind: str, used: Sequence[AgentTrace], rows: TraceRows, action_tags: Sequence[str]
) -> str | None:
    """Return a sentence where no trace of the source has a call, or a text between tags; refuse a kind that is made of calls.

    Their calls then stand in a form that is unknown here. Some traces without calls are usual (the agent was right to refuse)
    and are warned of.
    """
    found = [trace for trace in used if not _calls_somewhere(trace, action_tags)]
    if not found:
        return None
    begin = message_text(_assistant_turns(found[0])[0])[:60]
    begins = f"(first: {found[0].id}, whose first turn begins {bounded_repr(begin, 200)})"
    forms = ["`tool_calls`", *([f"calls between the tags {', '.join(action_tags)}"] if action_tags else [])]
    forms += ["<function=…>…</function>"] if XML_TAG in action_tags else []
    advice = f"write the calls in a form that is read ({'; '.join(forms)}), or name other tags in dataset.action_tags"
    said = f"{source}: {len(found)} of the {len(used)} successful traces that are used have no call that is read {begins}"
    traces = (trace for task in rows.tasks for trace in task.traces)
    if len(found) < len(used) or any(_calls_somewhere(trace, action_tags) for trace in traces):
        effect = f"kind {kind} says {NO_CALL!r} of them, and " if kind in CALL_KINDS else ""
        level = logging.WARNING if kind in CALL_KINDS else logging.INFO
        log_rank_zero(_log, f"{said}; {effect}a replay of them follows any text; if they do call tools, {advice}", level=level)
        return None
    if kind in CALL_KINDS:
        raise InputError(f"{said}, so that kind {kind} says {NO_CALL!r} of each; {advice}, or set dataset.kind: full")
    return f"{said}; {advice}"


def _calls_somewhere(trace: AgentTrace, action_tags: Sequence[str]) -> bool:
    """Return whether a turn of the trace has a call, readable or not."""
    return any(calls_and_unreadable(turn, action_tags) for turn in _assistant_turns(trace))


def _assistant_turns(trace: AgentTrace) -> list[Message]:
    return [turn for turn in trace.turns if turn["role"] == "assistant"]


def _read_trace(
    where: str, row: Mapping[str, Any], keys: Mapping[str, str | None], success_threshold: float
) -> AgentTrace | None:
    """Return the episode of a row; None where no assistant turn follows a user message."""
    messages_key, task_key = str(keys["messages_key"]), keys["task_key"]
    reward_key, tools_key, actions_key = keys["reward_key"], keys["tools_key"], keys["actions_key"]
    messages = check_messages(require_value(row, messages_key, where, "messages_key"), where, messages_key)
    if keys["system_key"] is not None:
        messages = with_system(messages, get(row, keys["system_key"]), where, keys["system_key"])
    prompt, turns = _split([{"content": "", **message} for message in messages])  # templates read it in bare calls too
    if not turns:
        return None
    reward = _number(get(row, reward_key), where, reward_key) if reward_key else None
    return AgentTrace(
        id=where,
        task=where if task_key is None else str(require_value(row, task_key, where, "task_key")),
        prompt=prompt,
        turns=turns,
        reward=reward,
        tools=row_tools(row, tools_key, where),
        actions=_actions(get(row, actions_key), where, actions_key) if actions_key else None,
        success=reward_key is None or (reward is not None and reward >= success_threshold),
    )


def _split(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return (prompt, episode); leading messages with ``is_demo`` are a demonstration, before which no episode begins."""
    roles = [message["role"] for message in messages]
    is_leading = [message["role"] == "system" or message.get("is_demo") is True for message in messages]
    begin = is_leading.index(False) if False in is_leading else len(roles)
    user = roles.index("user", begin) if "user" in roles[begin:] else len(roles)
    if "assistant" not in roles[user:]:
        return messages, []
    first = roles.index("assistant", user)
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return messages[:first], messages[first : last + 1]


def _number(value: Any, where: str, key: str | None) -> float | None:
    if value is None:
        return None
    try:  # of a CSV file, numbers are text
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{where}: {key} is {bounded_repr(value)}, not a number; set dataset.reward_key to a column of numbers, or to null "
            "where every trace counts as a success"
        )
    return number


def _actions(value: Any, where: str, key: str | None) -> list[ToolCall] | None:
    if value is None:
        return None
    calls = [as_call(item) for item in value] if isinstance(value, list) else [None]
    if None in calls:
        wrong = f", the first that is none is {bounded_repr(value[calls.index(None)])}" if isinstance(value, list) else ""
        raise InputError(
            f"{where}: {key} is no list of actions like {{'name': ..., 'kwargs': ...}}{wrong}; correct it (arguments are read "
            f"under {', '.join(RECORDED_ARGUMENT_KEYS)}), or set dataset.actions_key"
        )
    return calls


# ------------------------------------------------------------------------------------------- tool schemas


def derived_tools(calls: Sequence[ToolCall]) -> list[dict[str, Any]] | None:
    """Return schemas of the tools that are called, in the order of first calls; an argument of every call is required."""
    arguments: dict[str, list[Mapping[str, Any]]] = {}
    for call in calls:
        arguments.setdefault(call.name, []).append(call.arguments if isinstance(call.arguments, Mapping) else {})
    return [_schema(name, given) for name, given in arguments.items()] or None


def _schema(name: str, calls: list[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    for call in calls:
        for key, value in call.items():
            values.setdefault(key, []).append(value)
    properties = {key: {"type": _json_type(given)} for key, given in values.items()}
    required = [key for key, given in values.items() if len(given) == len(calls)]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _json_type(values: Sequence[Any]) -> str | list[str]:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    types = sorted({names.get(type(value), "null") for value in values})
    if types == ["integer", "number"]:
        return "number"
    return types[0] if len(types) == 1 else types


def _tools_of_file(path: str) -> list[dict[str, Any]] | None:
    if not Path(path).is_file():
        raise InputError(f"dataset.tools_file {path} does not exist; relative paths start at the working directory")
    return check_tools(Path(path).read_text(encoding="utf-8"), path, "tools_file")
