"""Show what each kind of privileged information would be on a file of agent traces, before any training.

    python -m pidistill.commands.trace_report TRACES [--tokenizer FOLDER] [--tool-format action] [--show TASK] \
        [argument=value ...]

prints, per kind, how many tasks have privileged information and how long it is; with ``--show``, both views of one task.
Arguments are those of pidistill.data.trace_dataset: messages_key=traj actions_key=info.task.actions omit_tools=[think].
"""

import argparse
import inspect
import statistics
from collections.abc import Sequence
from typing import Any

import yaml
from torchtune import utils

from pidistill.annotations import accepts, demanded
from pidistill.chat.messages import transcript_text
from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.components import closest, hints_of
from pidistill.config import COMPONENT
from pidistill.data.agent_traces import read_traces, trace_dataset
from pidistill.data.dataset import ExampleDataset
from pidistill.data.demonstrations import demonstration
from pidistill.errors import InputError, escape_controls, one_line
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.privileged.trace_kinds import CALL_KINDS, KINDS
from pidistill.tokenizers import ChatTokenizer, HFChatTokenizer
from pidistill.types import Example, PromptPair

log = utils.get_logger("INFO")
Numbers = dict[str, Any]
READING = tuple(inspect.signature(read_traces).parameters)
ARGUMENTS = inspect.signature(trace_dataset).parameters.keys() - {"source", "kind"}


def kind_table(
    source: str,
    tokenizer: ChatTokenizer | None = None,
    privileged: PrivilegedPrompt | None = None,
    kinds: Sequence[str] | None = None,
    **arguments: Any,
) -> list[Numbers]:
    """Return one row per kind: tasks, tasks with privileged information, and its length over the tasks that have it.

    A kind that is refused has no row, and the reason is logged.

    Lengths are characters of the text alone, and, with a tokenizer, tokens that it adds to the prompt, block included.

    Args:
        kinds: by default all that the arguments allow (`hints` needs the file, `gold_actions` the key).
        arguments: of :func:`pidistill.data.trace_dataset`.
    """
    if kinds is None:
        without = {"hints" if not arguments.get("hints") else "", "gold_actions" if not arguments.get("actions_key") else ""}
        kinds = [kind for kind in KINDS if kind not in without]
    hints = arguments.pop("hints", None)
    rows: list[Numbers] = []
    for kind in kinds:
        try:
            dataset = trace_dataset(source, kind, hints=hints if kind == "hints" else None, **arguments)
        except InputError as error:  # such as a kind made of calls, of traces whose calls are not read
            if kind not in CALL_KINDS or (kind == kinds[-1] and not rows):
                raise
            log.warning(f"kind {kind} is left out: {error}")
            continue
        rows.append({"kind": kind} | kind_lengths(dataset, tokenizer, privileged or PrivilegedPrompt()))
    return rows


def kind_lengths(dataset: ExampleDataset, tokenizer: ChatTokenizer | None, privileged: PrivilegedPrompt) -> Numbers:
    """Return the number of tasks, of tasks with privileged information, and the lengths of that information."""
    shown = [example for example in dataset if example.privileged]
    row = {"tasks": len(dataset), "with_pi": len(shown)} | _mean_and_max("chars", [len(e.privileged) for e in shown])
    if tokenizer is not None:
        row |= _mean_and_max("tokens", [privileged.build(e, tokenizer).privileged_tokens for e in shown])
    return row


def trace_lengths(dataset: ExampleDataset, tokenizer: ChatTokenizer) -> Numbers:
    """Return the tokens of the student's prompt and of the recorded turns: what the agent said and what answered it."""
    prompts = [len(tokenizer.encode_prompt(example.messages, example.tools)) for example in dataset]
    said, answered = [], []
    for example in (example for example in dataset if example.completion):
        rollout = demonstration(example, PromptPair([], [], has_privileged=False), tokenizer)
        said.append(rollout.policy_tokens)
        answered.append(len(rollout.completion) - rollout.policy_tokens)
    return (
        _mean_and_max("prompt_tokens", prompts)
        | _mean_and_max("policy_tokens", said)
        | _mean_and_max("observation_tokens", answered)
    )


def both_views(example: Example, tokenizer: ChatTokenizer | None = None, privileged: PrivilegedPrompt | None = None) -> str:
    """Return the prompts of both views as text: with a tokenizer as the model reads them, else message by message."""
    privileged = privileged or PrivilegedPrompt()
    if tokenizer is not None:
        pair = privileged.build(example, tokenizer).pair
        texts = {"student": tokenizer.decode(pair.student), "teacher": tokenizer.decode(pair.teacher)}
    else:
        shown = privileged.teacher_messages(example, example.messages) if example.privileged else example.messages
        texts = {"student": transcript_text(example.messages), "teacher": transcript_text(shown)}
    return "\n".join(f"── {view} · {example.id}\n{text}" for view, text in texts.items())


def as_table(rows: Sequence[Numbers]) -> str:
    """Return a Markdown table; a row without a number has an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}" if isinstance(value, float) else str(value)


def _mean_and_max(name: str, values: Sequence[int]) -> Numbers:
    return {f"{name}_mean": float(statistics.mean(values)), f"{name}_max": float(max(values))} if values else {}


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m pidistill.commands.trace_report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", help="the traces: .json, .jsonl, .parquet")
    parser.add_argument("--tokenizer", help="a model's folder; without it, lengths are characters")
    parser.add_argument(
        "--tool-format", default="auto", help="as tokenizer.tool_format; action where the template has no tools"
    )
    parser.add_argument("--kind", default="calls", help="the kind that --show shows")
    parser.add_argument("--show", metavar="TASK", help="print both views of this task")
    parser.add_argument("arguments", nargs="*", metavar="argument=value", help="of pidistill.data.trace_dataset")
    return parser.parse_intermixed_args(argv)


def _report(options: argparse.Namespace) -> None:
    arguments = dict(_argument(text) for text in options.arguments)
    tokenizer = HFChatTokenizer(options.tokenizer, tool_format=options.tool_format) if options.tokenizer else None
    print(as_table(kind_table(options.source, tokenizer, **arguments)))
    rows = read_traces(options.source, **{key: value for key, value in arguments.items() if key in READING})
    traces = [trace for task in rows.tasks for trace in task.traces]
    solved = sum(task.source is not None for task in rows.tasks)
    print(
        f"\n{len(traces)} traces of {len(rows.tasks)} tasks, {sum(t.success for t in traces)} successful, {solved} tasks "
        f"solved; rows left out: {rows.unusable or 'none'}; calls that are no JSON: {rows.unreadable_calls}"
    )
    chosen = arguments | {"kind": options.kind}
    if options.kind != "hints":
        chosen.pop("hints", None)
    dataset = trace_dataset(options.source, **chosen)
    given = arguments.get("tools_file") or arguments.get("tools_key")
    tools = next((example.tools for example in dataset if example.tools), None) or []
    print(f"tools: {len(tools)}, {f'from {given}' if given else 'derived from the calls seen'}")
    if tokenizer is not None:
        print(as_table([trace_lengths(dataset, tokenizer)]))
    if options.show is not None:
        print(escape_controls(both_views(_of_task(dataset, options.show), tokenizer)))


def _argument(text: str) -> tuple[str, Any]:
    key, equals, written = text.partition("=")
    if not equals:
        raise InputError(f"{text!r} must be written as argument=value")
    hints = {name: hint for name, hint in hints_of(trace_dataset).items() if name in ARGUMENTS}
    if key not in hints:
        raise InputError(f"argument {key} is not read here{closest(key, hints)}")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError as error:
        raise InputError(f"{text} is not valid YAML ({one_line(error)}); quote the value") from error
    if not accepts(hints[key], value, COMPONENT):
        raise InputError(f"{text} must be {demanded(hints[key])}")
    return key, value


def _of_task(dataset: ExampleDataset, task: str) -> Example:
    found = next((example for example in dataset if example.data["task"] == task), None)
    if found is None:
        raise InputError(f"--show {task} is none of the tasks {', '.join(example.data['task'] for example in dataset)}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        _report(_parsed(argv))


if __name__ == "__main__":
    main()
