"""Read JSON objects, read and write files of one object per line, and replace a file whole."""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pidistill.errors import InputError

TRAINING_ROLLOUTS = "training_rollouts.jsonl"  # written by pidistill.training.rollout_log, read by `pidistill report`
EVALUATED = "checkpoint.json"  # which weights an evaluation answered with; written by its recipe, read by report and export


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """Return the object in a JSON file; the error says what is wrong with the file, and then the ``advice``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not a JSON object; {advice}")
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the whole rows of a file that :func:`write_jsonl` wrote, none where there is no file.

    A line that a kill or a full disk cut off is left out: the last one, which has no newline, and, with a warning, any other.
    """
    rows = []
    for line in whole_lines(path):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            _warn_of_line(path, line[:40])
    return rows


@functools.cache  # a file is read several times
def _warn_of_line(path: Path, begin: str) -> None:
    logging.getLogger(__name__).warning(
        f"{path}: the line that begins with {begin!r} is not JSON and is left out; a kill or a full disk probably cut it off"
    )


def parse_jsonl(text: str) -> list[tuple[int, Any]]:
    """Return (line number from 1, value) of every line that is not blank; a ValueError names a line that is not JSON."""
    rows = []
    # Not splitlines(): a text may hold characters such as U+2028, which that takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not valid JSON: {error.msg} at character {error.colno}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not valid JSON: {error}") from error
    return rows


def whole_lines(path: Path) -> list[str]:
    """Read the lines that end with a newline and are not empty, none where there is no file.

    A line may have been cut off inside a character.
    """
    if not path.is_file():
        return []
    # Not splitlines(): a text may hold characters such as U+2028, which that takes for line ends.
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if line]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append one line per row; end a line that a kill or a full disk cut off before."""
    # A model can write half of a surrogate pair, which UTF-8 cannot hold; JSON writes it as an escape with a backslash.
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        file.write(lines if file.read(1) in (b"", b"\n") else b"\n" + lines)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. A link at its place is replaced, not followed."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found
