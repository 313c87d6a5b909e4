"""Read JSON objects, read and write files of one object per line, and replace a file whole."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pidistill.errors import InputError

TRAINING_ROLLOUTS = "training_rollouts.jsonl"  # written by pidistill.training.rollout_log, read by `pidistill report`


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

    A last line without its newline is one that a kill cut off; it is left out.
    """
    return [json.loads(line) for line in whole_lines(path)]


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
    """Read the lines that end with a newline and are not empty, none where there is no file."""
    if not path.is_file():
        return []
    # Not splitlines(): a text may hold characters such as U+2028, which that takes for line ends.
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append one line per row."""
    # A model can write half of a surrogate pair, which UTF-8 cannot hold; JSON writes it as an escape with a backslash.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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
