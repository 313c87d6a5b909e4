"""Read the JSON inside tool calls; a call that cannot be read gets a sentence."""

import json
import math
from typing import Any


class MalformedCall(Exception):
    """Say what is wrong with a call, as a sentence for the model that wrote it."""


def function_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call as messages hold it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read_json(text: str) -> Any:
    """Return what JSON text says.

    Raises:
        MalformedCall: the text is not JSON, holds a number beyond what a float can hold, or half of a surrogate pair, which is
            no text that a tokenizer takes.
    """
    try:
        # json.loads takes NaN, which is not JSON, and reads 1e999 as an infinity. Endless nesting raises RecursionError, an
        # endless number ValueError.
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MalformedCall(f"the tool call is not valid JSON ({error}): {text.strip()[:80]}") from error
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:20]} is too large a number")
    return value
