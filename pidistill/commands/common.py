"""What the `pidistill` commands share: overrides anywhere on the line, and wrong input said in one sentence."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

from pidistill.errors import InputError


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """``argv`` with its `key=value` and `~key` words in ``overrides``, wherever they stand.

    argparse alone would give those behind `--seeds 0 1` to the seeds.
    """
    overrides = [word for word in argv if ("=" in word and not word.startswith("-")) or word.startswith("~")]
    arguments = parser.parse_args([word for word in argv if word not in overrides])
    arguments.overrides += overrides
    return arguments


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """An InputError is printed as one sentence and ends the command with status 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
