"""Hold the exception for wrong input, whose message is a sentence that says what to change, checks, and how text is shown."""

import logging
import re
import reprlib
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

# Line feed and tab are shown as they are. Every other control character can move the cursor, change colours or window titles
# (C0, C1), or reorder what is read (the marks for bidirectional text); a lone surrogate cannot be printed at all.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Refuse a wrong config, data or checkpoint. Recipes print the message alone, without a traceback, and exit with 2."""


def check_choice(key: str, value: object, choices: Iterable[object], because: str = "") -> None:
    """Refuse a value of the config key ``key`` that is none of ``choices``; ``because`` says why there are no others."""
    # `in` alone would take 0 for False.
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        names = ", ".join("null" if choice is None else str(choice) for choice in choices)
        raise InputError(f"{key}={value} is unknown{f' ({because})' if because else ''}; choose one of {names}")


def check_count(key: str, value: int | None, null: str = "") -> None:
    """Refuse a value of the config key ``key`` that is below 1; ``null`` says what null stands for, where it is a value."""
    if value is not None and value < 1:
        raise InputError(f"{key}={value} must be at least 1{f', or null for {null}' if null else ''}")


def check_share(key: str, value: float, meaning: str, interval: str = "[0, 1]") -> None:
    """Refuse a value of the config key ``key`` outside ``interval``, whose round brackets leave an end out."""
    excluded = {"(": (0.0,), "[": ()}[interval[0]] + {")": (1.0,), "]": ()}[interval[-1]]
    if not 0.0 <= value <= 1.0 or value in excluded:  # also where it is NaN
        raise InputError(f"{key}={value} must lie in {interval}: {meaning}")


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return what an exception says, in one line of at most ``limit`` characters; its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def escape_controls(text: str) -> str:
    r"""Return ``text`` with its control characters written as ``\x1b``, for terminals, logs, reports and pictures."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class _EscapeControls(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escape_controls(record.getMessage()), None
        return True


def escape_logs(*loggers: logging.Logger) -> None:
    """Let the handlers of ``loggers``, of the root and Python's last resort escape control characters (not in tracebacks)."""
    handlers = [handler for logger in (logging.getLogger(), *loggers) for handler in logger.handlers]
    for handler in [*handlers, logging.lastResort]:
        if handler is not None and not any(isinstance(one, _EscapeControls) for one in handler.filters):
            handler.addFilter(_EscapeControls())


# ------------------------------------------------------------------------------------------- code of a user


class StopRequest(BaseException):
    """Mark an exception that a signal raised: it ends the run, also where the code of a user is being executed."""


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
    text, _ = attempt(lambda: short.repr(value))
    text = f"<{type(value).__name__} whose repr raises>" if text is None else text
    return text if len(text) <= limit else f"{text[:limit]}..."


def bounded_traceback(error: BaseException, limit: int = 4000) -> str:
    """Return the traceback of an exception; the middle of one of more than ``limit`` characters is left out."""
    text, _ = attempt(lambda: "".join(traceback.format_exception(error)))
    text = f"<traceback of {type(error).__name__} that cannot be shown>" if text is None else text.rstrip()
    if len(text) <= limit:
        return text
    return f"{text[: limit // 4]}\n... {len(text) - limit} characters are left out ...\n{text[-(limit - limit // 4) :]}"
