"""Make rows into examples: conversations, questions with answers, GSM8K.

Every builder reads a .jsonl, .json, .csv or .parquet file, a glob, a folder or a Hub dataset, as
:func:`pidistill.data.sources.load_rows` says, and takes keys as dotted paths. Errors count rows from 0.
"""

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune.utils import log_rank_zero

from pidistill.chat.messages import check_messages, last_user_index, messages_from_text, privileged_text, with_system
from pidistill.chat.templates import check_template
from pidistill.data.dataset import ExampleDataset, convert_rows
from pidistill.data.sources import get, load_rows, require_value
from pidistill.errors import InputError, bounded_repr, check_choice
from pidistill.privileged.controls import WRONG_KEY
from pidistill.types import Example, Message

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------- conversations


def chat_dataset(
    source: str,
    messages_key: str = "messages",
    privileged_key: str | None = "privileged_messages",
    completion: str | None = None,
    completion_key: str | None = None,
    reference_key: str | None = None,
    tools_key: str | None = "tools",
    system_key: str | None = "system",
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    max_rows: int | None = None,
    config_name: str | None = None,
    made_by: str | None = None,
) -> ExampleDataset:
    """Read rows that hold a conversation, and privileged information as text or messages.

    Args:
        messages_key: the conversation that the student answers; a text is one user message.
        privileged_key: a column of texts or lists of messages; null where there is none. A row without a value has no
            privileged information; a column that no row has is an error.
        completion: what part of the conversation is the demonstration: null (none: conversations end before an assistant
            turn), ``after_last_user`` (the last answer, with its tool calls and results) or ``from_first_assistant`` (every
            assistant turn, with what stands between: agent traces).
        completion_key: the demonstration in a column of its own (``prompt`` / ``completion`` rows); a text is one
            assistant message. A row with null or a blank text has none.
        reference_key: what the reward compares with.
        tools_key: tool schemas, as a list or as JSON text; OpenAI's older column `functions` is read where `tools` is absent.
        system_key: a column with the system text of the conversation. This column and `tools` are read where rows have one;
            null ignores it.
        made_by: the command that writes the file ``source``; the error names it where the file does not exist yet.
    """
    _check_made(source, made_by)
    rows = load_rows(source, split, data_files, max_rows, config_name)
    keys = {"messages_key": messages_key, "privileged_key": privileged_key, "completion_key": completion_key}
    rows.require_all(**keys, reference_key=reference_key, tools_key=None if tools_key == "tools" else tools_key)
    check_choice("dataset.completion", completion, COMPLETIONS)
    if completion and completion_key:
        raise InputError(
            f"dataset.completion ({completion}) and dataset.completion_key ({completion_key}) exclude each other; remove one"
        )

    def convert(where: str, row: Mapping[str, Any]) -> Example:
        conversation = _conversation(_require_text(row, messages_key, where, "messages_key"), where, messages_key, "user")
        if system_key is not None:
            conversation = with_system(conversation, get(row, system_key), where, system_key)
        messages, demonstration = _split_conversation(conversation, completion, f"{where}: {messages_key}", _LAST_ANSWER)
        if completion_key is not None:
            demonstration = _demonstration(get(row, completion_key), where, completion_key)
        return Example(
            id=where,
            messages=messages,
            privileged=_privileged(row, privileged_key, where),
            completion=demonstration,
            reference=get(row, reference_key) if reference_key else None,
            tools=row_tools(row, tools_key, where),
            data=_with_wrong(row, where),
        )

    examples = convert_rows(rows, convert)
    if tools_key is not None:
        _warn_of_calls_without_tools(examples, tools_key)
    return ExampleDataset(_warn_of_null_words(examples, privileged_key))


def _require_text(row: Mapping[str, Any], key: str, where: str, option: str) -> Any:
    """Return what :func:`require_value` does, and refuse a blank text as it refuses a null."""
    value = get(row, key)
    return require_value({} if isinstance(value, str) and not value.strip() else row, key, where, option)


def _warn_of_null_words(examples: list[Example], key: str | None) -> list[Example]:
    """Return the examples; warn once of privileged information that is a word which stands for no value in other programs."""
    words = [(example.id, example.privileged) for example in examples if example.privileged in _NULL_WORDS]
    if words:
        log_rank_zero(
            _log,
            f"{len(words):,} of {len(examples):,} rows have a word for no value as privileged information, the first is "
            f"{words[0][0]} ({key}: {words[0][1]!r}), and the teacher is shown the word; write null, or an empty cell, where a "
            "row has none",
            level=logging.WARNING,
        )
    return examples


def _check_made(source: str, made_by: str | None) -> None:
    if made_by is not None and not Path(source).exists():
        raise InputError(f"dataset.source {source} does not exist; it is written by the stage before: run `{made_by}` first")


_NULL_WORDS = ("nan", "NaN", "None", "NULL", "null", "N/A")  # as exports of tables write a cell without a value
COMPLETIONS = (None, "after_last_user", "from_first_assistant")


_LAST_ANSWER = "set dataset.completion: after_last_user to make it the demonstration"
_OTHER_COLUMN = "move it into a column of its own and set dataset.completion_key to that, or use pidistill.data.chat_dataset"


def _split_conversation(
    messages: list[Message], how: str | None, where: str, advice: str
) -> tuple[list[Message], list[Message] | None]:
    """Return (prompt, demonstration). Messages after the last assistant turn answer nothing and are left out of it.

    ``advice`` says what to do with an answer at the end of a prompt.
    """
    roles = [message["role"] for message in messages]
    if how is None:
        if roles[-1] == "assistant":
            raise InputError(f"{where} ends with an assistant message, but a prompt ends before one; {advice}")
        return messages, None
    if "assistant" not in roles:
        raise InputError(
            f"{where} has no assistant message, which dataset.completion: {how} needs; leave the row out, or set it to null"
        )
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if how == "from_first_assistant":
        first = roles.index("assistant")
    else:
        user = last_user_index(messages[:last])
        first = 0 if user is None else user + 1
    if first == 0 or roles[first] != "assistant":
        raise InputError(
            f"{where}: no assistant message follows the last user message directly (roles: {', '.join(roles)}); correct the "
            "order of the messages, or leave the row out"
        )
    return messages[:first], messages[first : last + 1]


def _conversation(value: Any, where: str, key: str, role: str) -> list[Message]:
    if isinstance(value, str):
        value = messages_from_text(value) or [{"role": role, "content": value}]
    return check_messages(value, where, key)


def _demonstration(value: Any, where: str, key: str) -> list[Message] | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    messages = _conversation(value, where, key, "assistant")
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: {key} must begin and end with an assistant message; move the others into the prompt")
    return messages


def _privileged(row: Mapping[str, Any], key: str | None, where: str) -> str | list[Message] | None:
    """Return the privileged information of a row; None where the row has null, an empty list or no text."""
    value = get(row, key) if key is not None else None
    if isinstance(value, str):
        value = messages_from_text(value) or (value if value.strip() else None)
    if value is None or value in ([], {}):
        return None
    if not isinstance(value, str) and not (isinstance(value, list) and isinstance(value[0], Mapping)):
        raise InputError(
            f"{where}: {key} is {bounded_repr(value)}; privileged information is one text or a list of messages like "
            "{'role': 'user', 'content': '...'}: write it so, or null where the row has none"
        )
    if isinstance(value, str):
        return value
    messages = check_messages(value, where, str(key))
    return messages if privileged_text(messages).strip() else None


def _with_wrong(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the row with the wrong information that it may bring in the form that :func:`_privileged` gives its own.

    What has no such form stays as it is: only the control that shows it has to refuse it.
    """
    try:
        return {**row, WRONG_KEY: _privileged(row, WRONG_KEY, where)} if WRONG_KEY in row else row
    except InputError:
        return row


def check_tools(value: Any, where: str, key: str) -> list[dict[str, Any]] | None:
    """Return tool schemas, given as a list or as JSON text; None where there are none."""
    if isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # also numbers and nesting without end
            raise InputError(
                f"{where}: {key} is text but not JSON ({error}); give a list of tool schemas, or set "
                "dataset.tools_key: null, which ignores the column"
            ) from error
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
        raise InputError(f"{where}: {key} is not a list of tool schemas; check dataset.tools_key, null ignores it")
    tools = [schema for tool in value or [] for schema in _declared(tool)]
    return [_tool_schema(tool, where, key) for tool in tools] or None


_GEMINI_KEYS = ("functionDeclarations", "function_declarations")
_GEMINI_TYPES = ("STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")
_PARAMETER_KEYS = (
    "parameters",
    "input_schema",
    "inputSchema",
    "parametersJsonSchema",
    "parameters_json_schema",
)  # the last two: Gemini


def _declared(tool: Mapping[str, Any]) -> list[Any]:
    """Return the functions that a tool of Gemini's form declares, with types in JSON Schema's lower case; else the tool."""
    declared = next((tool[key] for key in _GEMINI_KEYS if isinstance(tool.get(key), list)), None)
    return [tool] if declared is None else [_with_lower_types(one) for one in declared]


def _with_lower_types(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_lower_types(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {k: v.lower() if k == "type" and v in _GEMINI_TYPES else _with_lower_types(v) for k, v in value.items()}


def _tool_schema(tool: Any, where: str, key: str) -> dict[str, Any]:
    """Return a schema as OpenAI's chat API has it; one with ``function`` as it is. Refuse a tool without a name."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"{where}: {key} has a tool without a name ({bounded_repr(tool)}); give each a schema like {{'type': 'function', "
            "'function': {'name': ..., 'description': ..., 'parameters': ...}}, or leave the tool out"
        )
    if function is not tool:
        return dict(tool)
    parameters = next((tool[name] for name in _PARAMETER_KEYS if tool.get(name) is not None), None)
    told = {key: value for key, value in tool.items() if key not in ("type", "cache_control", *_PARAMETER_KEYS)} | {
        "parameters": parameters
    }
    return {"type": "function", "function": {key: value for key, value in told.items() if value is not None}}


def row_tools(row: Mapping[str, Any], key: str | None, where: str) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row; None where ``key`` is null. The older `functions` are read where `tools` is absent."""
    if key is None:
        return None
    if key != "tools" or get(row, key) is not None or not _is_schema_list(row.get("functions")):
        return check_tools(get(row, key), where, key)
    return check_tools(row["functions"], where, "functions")


def _is_schema_list(value: Any) -> bool:
    """Return whether a value is a list of tool schemas, or JSON text of one; another column may have the same name."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and isinstance(item.get("name"), str) and item.keys() & {"description", *_PARAMETER_KEYS}
        for item in value
    )


def _warn_of_calls_without_tools(examples: Sequence[Example], key: str) -> None:
    """Warn once of rows whose messages call tools that no schema shows to the model."""
    found = [row.id for row in examples if row.tools is None and any(m.get("tool_calls") for m in _shown_messages(row))]
    if found:
        log_rank_zero(
            _log,
            f"{len(found):,} of {len(examples):,} rows have tool calls and no tool schemas in {key!r} (first: {found[0]}), so "
            "that these do not show the model the tools that it calls; set dataset.tools_key to the column with the schemas, "
            "or to null where the system text or with_tools shows the tools",
            level=logging.WARNING,
        )


def _shown_messages(example: Example) -> list[Message]:
    return [*example.messages, *(example.completion or [])]


# ------------------------------------------------------------------------------------------- questions and answers


def qa_dataset(
    source: str,
    question_key: str = "question",
    answer_key: str | None = "answer",
    privileged_key: str | None = "extra_info.privileged_context",
    completion_key: str | None = None,
    system_prompt: str | None = None,
    question_template: str = "{question}",
    tools_key: str | None = "tools",
    system_key: str | None = "system",
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    max_rows: int | None = None,
    config_name: str | None = None,
    made_by: str | None = None,
) -> ExampleDataset:
    """Read rows with a question, an answer to compare with, and privileged information.

    verl's layout is ``question_key: prompt`` (messages, taken as they are) and ``answer_key: reward_model.ground_truth``.

    Args:
        question_key: a text, put into ``question_template``, or a list of messages.
        answer_key: what the reward compares with; null where rewards need nothing.
        privileged_key: as in :func:`chat_dataset`.
        completion_key: a demonstration, as text or messages.
        system_prompt: system message for rows that bring none.
        question_template: the user message; ``{question}`` stands for the question.
        tools_key, system_key: as in :func:`chat_dataset`.
        made_by: as in :func:`chat_dataset`.
    """
    _check_made(source, made_by)
    check_template(question_template, "dataset.question_template", ("question",))
    rows = load_rows(source, split, data_files, max_rows, config_name)
    keys = {"question_key": question_key, "privileged_key": privileged_key}
    rows.require_all(**keys, answer_key=answer_key, completion_key=completion_key)
    rows.require_all(tools_key=None if tools_key == "tools" else tools_key)

    def convert(where: str, row: Mapping[str, Any]) -> Example:
        return Example(
            id=where,
            messages=_question(row, where, question_key, question_template, system_prompt, system_key),
            privileged=_privileged(row, privileged_key, where),
            completion=_demonstration(get(row, completion_key), where, completion_key) if completion_key else None,
            reference=require_value(row, answer_key, where, "answer_key") if answer_key else None,
            tools=row_tools(row, tools_key, where),
            data=_with_wrong(row, where),
        )

    return ExampleDataset(_warn_of_null_words(convert_rows(rows, convert), privileged_key))


def _question(
    row: Mapping[str, Any],
    where: str,
    key: str,
    template: str = "{question}",
    system_prompt: str | None = None,
    system_key: str | None = None,
) -> list[Message]:
    value = _require_text(row, key, where, "question_key")
    if isinstance(value, str):
        value = messages_from_text(value) or value
    if isinstance(value, str):
        messages = [{"role": "user", "content": template.format(question=value)}]
    else:
        messages, _ = _split_conversation(check_messages(value, where, key), None, f"{where}: {key}", _OTHER_COLUMN)
    if system_key is not None:
        messages = with_system(messages, get(row, system_key), where, system_key)
    has_system = messages[0]["role"] == "system"
    return messages if has_system or system_prompt is None else [{"role": "system", "content": system_prompt}, *messages]


# ------------------------------------------------------------------------------------------- GSM8K

GSM8K_INSTRUCTIONS = {
    "boxed": "Reason step by step, then put the final answer, a number, within \\boxed{}.",
    "hashes": "Reason step by step, then give the final answer, a number, after #### on the last line.",
}


def gsm8k_dataset(
    source: str = "openai/gsm8k",
    privileged: str = "solution",
    answer_format: str = "boxed",
    system_prompt: str | None = None,
    split: str = "train",
    data_files: str | Sequence[str] | None = None,
    max_rows: int | None = None,
    config_name: str | None = None,
) -> ExampleDataset:
    """Read GSM8K as published (2110.14168): ``question``, and ``answer`` with the worked solution and a last line ``#### N``.

    The reference is N without thousands separators; the completion is the worked solution in the format that the
    instruction asks for, without the calculator annotations ``<<48/2=24>>``.

    Args:
        source: a file with those columns, or the Hub name (with ``config_name: main``).
        privileged: "solution" (the worked solution with its answer), "answer" (the final answer only) or "none".
        answer_format: "boxed" asks for ``\\boxed{N}``, "hashes" for ``#### N``; see :data:`GSM8K_INSTRUCTIONS`.
    """
    check_choice("dataset.privileged", privileged, ("solution", "answer", "none"))
    check_choice("dataset.answer_format", answer_format, GSM8K_INSTRUCTIONS)
    if source == "openai/gsm8k" and config_name is None:
        config_name = "main"
    rows = load_rows(source, split, data_files, max_rows, config_name)
    for key in ("question", "answer"):
        if all(get(row, key) is None for _, row in rows):
            raise InputError(f"{rows.name} has no column {key!r}: it is not GSM8K as published; use pidistill.data.qa_dataset")
    settings = {"privileged": privileged, "answer_format": answer_format, "system_prompt": system_prompt}
    return ExampleDataset(convert_rows(rows, functools.partial(_gsm8k_example, **settings)))


def _gsm8k_example(
    where: str, row: Mapping[str, Any], privileged: str, answer_format: str, system_prompt: str | None
) -> Example:
    solution, answer = split_gsm8k_answer(str(row["answer"]), where)
    final = f"\\boxed{{{answer}}}" if answer_format == "boxed" else f"#### {answer}"
    worked = f"{solution}\n{final}" if answer_format == "hashes" else f"{solution}\nThe final answer is {final}."
    given = {"solution": f"{solution}\nThe final answer is {answer}.", "answer": f"The final answer is {answer}."}
    told = privileged != "none"
    template = "{question}\n\n" + GSM8K_INSTRUCTIONS[answer_format].replace("{", "{{").replace("}", "}}")
    return Example(
        id=where,
        messages=_question(row, where, "question", template, system_prompt),
        privileged=given.get(privileged),
        completion=[{"role": "assistant", "content": worked}],
        reference=answer,
        data={**row, WRONG_KEY: given[privileged].removesuffix(f"{answer}.") + f"{_wrong_number(answer)}."} if told else row,
    )


def _wrong_number(answer: str) -> str:
    """Return another number of as many digits where there is one: the first digit counted up, 9 becoming 1."""
    at = next(i for i, character in enumerate(answer) if character.isdigit())
    return f"{answer[:at]}{int(answer[at]) % 9 + 1}{answer[at + 1 :]}"


def split_gsm8k_answer(answer: str, where: str) -> tuple[str, str]:
    """Return (worked solution without calculator annotations, final answer without thousands separators) of an ``answer``."""
    solution, mark, final = answer.rpartition("####")
    final = final.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", final):
        raise InputError(
            f"{where}: answer does not end with '#### N' ({answer[-40:]!r}), so it is not a row of GSM8K; use qa_dataset"
        )
    return re.sub(r"<<[^<>]*>>", "", solution).strip(), final
