"""Hold the one exception for wrong input, whose message is a sentence that says what to change, and how text is shown."""

import re

# Line feed and tab are shown as they are. Every other control character can move the cursor, change colours or window titles
# (C0, C1), or reorder what is read (the marks for bidirectional text); a lone surrogate cannot be printed at all.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Wrong config, data or checkpoint. Recipes print the message alone, without a traceback, and exit with status 2."""


def escape_controls(text: str) -> str:
    r"""Return ``text`` with its control characters written as ``\x1b``, for terminals, logs, reports and pictures."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)
