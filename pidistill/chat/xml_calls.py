"""Read the XML calls of Qwen3-Coder and Qwen3.5: names and arguments between tags, values as text.

    <function=book>
    <parameter=seats>
    2
    </parameter>
    </function>

The text does not say whether ``2`` is a number or a word, so the tool's schema decides: a parameter that may be a text only, or
that no schema names, is text. Values of other types are JSON, or Python's True, False and None, which some templates write.
What is of no permitted type stays text, and the tool answers that. A value ends at the first ``</parameter>``.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pidistill.chat.call_json import MalformedCall, function_call, read_json
from pidistill.types import Tools

_FUNCTION = re.compile(r"\s*<function=([^<>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>", re.DOTALL)
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def read_xml_call(text: str, tools: Tools) -> dict[str, Any]:
    """Return the call that stands between ``<tool_call>`` tags; ``tools`` give the types of its arguments."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        raise MalformedCall(f"the tool call is not <function=...> ... </function>: {text.strip()[:80]}")
    name, inside = function.groups()
    schemas = _parameter_schemas(name, tools)
    arguments: dict[str, Any] = {}
    for key, value in _parameters(name, inside):
        if key in arguments:
            raise MalformedCall(f"the call of {name} has the parameter {key} twice")
        arguments[key] = _typed(value, _types(schemas.get(key)))
    return function_call(name, arguments)


def as_xml_reads(name: str, arguments: Mapping[str, Any], tools: Tools) -> dict[str, Any]:
    """Return arguments with each text as :func:`read_xml_call` would read it, where the schema permits texts and other types.

    There XML cannot tell the text "5" from the number 5.
    """
    schemas, read = _parameter_schemas(name, tools), dict(arguments)
    for key, value in arguments.items():
        types = _types(schemas.get(key))
        if isinstance(value, str) and "string" in types:
            read[key] = _typed(value, types)
    return read


def _parameters(name: str, inside: str) -> Iterator[tuple[str, str]]:
    inside, at = inside.rstrip(), 0
    while at < len(inside):
        parameter = _PARAMETER.match(inside, at)
        if parameter is None:
            raise MalformedCall(
                f"the call of {name} is not a row of <parameter=...> ... </parameter>: {inside[at:].strip()[:80]}"
            )
        yield parameter[1], parameter[2].removeprefix("\n").removesuffix("\n")  # templates write values on lines of their own
        at = parameter.end()


def _parameter_schemas(name: str, tools: Tools) -> Mapping[str, Any]:
    functions = [tool.get("function", tool) for tool in tools or []]
    schema = next((function.get("parameters") for function in functions if function.get("name") == name), None)
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _types(schema: Any) -> frozenset[str]:
    """Return the JSON types that a schema permits; none where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type", [])
    found = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        found |= {name for choice in schema.get(key) or [] for name in _types(choice)}
    return frozenset(found | set(map(_type_of, schema.get("enum") or [])))


def _typed(text: str, types: frozenset[str]) -> Any:
    if not types - {"string"}:
        return text
    word = text.strip()
    try:
        value = _PYTHON_WORDS[word] if word in _PYTHON_WORDS else read_json(word)
    except MalformedCall:
        return text
    is_permitted = _type_of(value) in types or (_type_of(value) == "integer" and "number" in types)
    return value if is_permitted or "string" not in types else text


def _type_of(value: Any) -> str:
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "null")
