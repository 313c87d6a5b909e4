"""Find a model's own Jinja chat template among its files, and render messages with it.

Templates come with downloaded models, so they run in jinja2's immutable sandbox, with the helpers that transformers gives
them and no others, and within the limits of :mod:`pidistill.tokenizers.template_limits`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols

from pidistill.chat.messages import message_text, reasoning_of
from pidistill.errors import InputError
from pidistill.tokenizers.template_limits import LimitedEnvironment, TemplateLimitError
from pidistill.types import Message, Tools


class TemplateRefusal(InputError):
    """Say that the chat template refuses the conversation."""


class ChatTemplate:
    """Render messages to the text that the model's prompts are made of.

    Args:
        templates: by name; "tool_use" is taken where tools are given, "default" otherwise.
        variables: what the template sees besides the messages: special tokens and the config's ``template_kwargs``.
    """

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, Any]) -> None:
        self._variables = dict(variables)
        self._environment = _environment()
        try:
            with self._environment.limited():
                self._templates = {name: self._environment.from_string(text) for name, text in templates.items()}
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); mend the file, or set "
                "tokenizer.chat_template to another one"
            ) from error
        except (TemplateLimitError, RecursionError, MemoryError) as error:
            raise _limit_error(error) from error

    def render(self, messages: Sequence[Message], tools: Tools, generation_prompt: bool) -> str:
        """Return the conversation as text."""
        template = self._templates.get("tool_use" if tools else "default") or self._templates["default"]
        messages = [_as_templates_read(message) for message in messages]
        tools = list(tools) if tools else None
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            with self._environment.limited():
                return template.render(**(self._variables | given))
        except (TemplateLimitError, RecursionError, MemoryError) as error:
            raise _limit_error(error) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise _refusal(error, messages, tools) from error


def _limit_error(error: BaseException) -> InputError:
    reason = "it calls itself without end" if isinstance(error, RecursionError) else str(error) or "it needs too much memory"
    return InputError(
        f"the chat template does not come to an end ({reason}); mend the file, or set tokenizer.chat_template to another one"
    )


def _refusal(error: Exception, messages: Sequence[Message], tools: Tools) -> TemplateRefusal:
    """Return the error with the template's own words, what the conversation was, and what may be changed."""
    roles = ", ".join(message["role"] for message in messages)
    calls = max((len(message.get("tool_calls") or []) for message in messages), default=0)
    has = [f"{calls} tool calls in one turn" if calls > 1 else "a tool call" if calls else "", "tool schemas" if tools else ""]
    also = " and ".join(filter(None, has))
    advice = "change the roles of the dataset's messages, or set tokenizer.chat_template to a template that takes them"
    if also:
        advice = (
            f"it has {also}: change these or the roles in the dataset, set tokenizer.tool_format: action, which writes tools "
            "and calls as text, or set tokenizer.chat_template to a template that takes them"
        )
    return TemplateRefusal(f"the chat template refuses a conversation of the roles {roles} ({error}); {advice}")


def _as_templates_read(message: Message) -> Message:
    """Return the message in the one form that all templates know. Except for the text parts, transformers does the same.

    Older templates write a null out as the word None; a missing key is what they expect. Reasoning has had several names. A
    list of text parts is written out as a list by some templates, and left out by others (Qwen3's).
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = reasoning_of(message)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if isinstance(message.get("content"), list):
        message["content"] = message_text(message)
    return message


def find_templates(folder: Path, config: Mapping[str, Any], chosen: str | None) -> dict[str, str]:
    """Return the model's templates by name, "default" among them.

    ``chosen``: None for the model's own; a path to a Jinja file, the template's text, or the name of one of the model's.
    """
    if chosen is not None and "{" in chosen:
        return {"default": chosen}
    if chosen is not None and Path(chosen).is_file():
        return {"default": Path(chosen).read_text(encoding="utf-8")}
    own = _own_templates(folder, config)
    if chosen is not None:
        if chosen not in own:
            known = ", ".join(sorted(own)) or "none"
            raise InputError(f"tokenizer.chat_template {chosen!r} is no file and not a template of {folder} (it has: {known})")
        return {"default": own[chosen]}
    if "default" not in own:
        known = f"only templates named {', '.join(sorted(own))}" if own else "no chat template"
        raise InputError(
            f"{folder} has {known}; set tokenizer.chat_template to a template's name or file, such as the "
            "chat_template.jinja of the model's instruct version"
        )
    return own


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    stored = config.get("chat_template") or {}
    templates = {"default": stored} if isinstance(stored, str) else {}
    if isinstance(stored, list):
        for entry in stored:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
                raise InputError(
                    f"chat_template in {folder}/tokenizer_config.json has an entry {str(entry)[:60]!r} without a name and a "
                    "template; set tokenizer.chat_template to a Jinja file"
                )
        templates = {entry["name"]: entry["template"] for entry in stored}
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return templates | {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """Read ``{% generation %}``, which marks assistant text for transformers' loss masks, as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
