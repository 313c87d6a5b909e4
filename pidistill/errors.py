"""The one exception for wrong input: its message is a sentence that says what to change."""

import reprlib
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Wrong config, data or checkpoint. Recipes print the message alone, without a traceback, and exit with status 2."""


# ------------------------------------------------------------------------------------------- code of a user


class StopRequest(BaseException):
    """Mark an exception that a signal raised: it ends the run, whatever code is being executed when it comes."""


def attempt(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Call the code of a user and return (its answer, None), or (None, what it raised).

    Everything that it raises is caught, also SystemExit and KeyboardInterrupt; a signal (:class:`StopRequest`) is not.
    """
    try:
        return call(), None
    except StopRequest:
        raise
    except BaseException as error:
        return None, error


def bounded_repr(value: object, limit: int = 80) -> str:
    """Return ``repr(value)``, cut after ``limit`` characters. It does not fail where the value's own ``repr`` raises."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = limit
    text, error = attempt(lambda: short.repr(value))
    text = f"<{type(value).__name__} whose repr raises>" if error is not None else text
    return text if len(text) <= limit else f"{text[:limit]}..."


def bounded_traceback(error: BaseException, limit: int = 4000) -> str:
    """Return the traceback of an exception; the middle of one of more than ``limit`` characters is left out."""
    text, failure = attempt(lambda: "".join(traceback.format_exception(error)))
    text = f"<traceback of {type(error).__name__} that cannot be shown>" if failure is not None else text.rstrip()
    if len(text) <= limit:
        return text
    return f"{text[: limit // 4]}\n... {len(text) - limit} characters are left out ...\n{text[-(limit - limit // 4) :]}"
