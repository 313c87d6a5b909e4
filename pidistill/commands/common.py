"""Parse what the `pidistill` commands share: overrides anywhere on the line, and wrong input said in one sentence."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from pidistill.errors import InputError, escape_controls


class Parser(argparse.ArgumentParser):
    """Parse a command's words; say what is wrong with them in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{self.prog}: {' '.join(message.split())}; {self.prog} --help shows what it takes")


def config_parser(command: str, description: str, config: str = "a bundled config, or a path", **how: str) -> Parser:
    """Return the parser of ``pidistill command`` with a config and overrides as its first words."""
    made = Parser(prog=f"pidistill {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", help=config, **how)
    made.add_argument("overrides", nargs="*", metavar="key=value")
    return made


def refuse(sentence: str) -> NoReturn:
    """Print one sentence and end the command with status 2."""
    print(f"error: {escape_controls(' '.join(sentence.split()))}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return ``argv`` with its `key=value` and `~key` words in ``overrides``, wherever they stand.

    argparse alone would give those behind `--seeds 0 1` to the seeds.
    """
    overrides = [word for word in argv if ("=" in word and not word.startswith("-")) or word.startswith("~")]
    arguments = parser.parse_args([word for word in argv if word not in overrides])
    arguments.overrides += overrides
    return arguments


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an InputError as one sentence and exit with status 2; exit quietly where the reader of a pipe has left."""
    try:
        yield
    except InputError as error:
        refuse(str(error))
    except BrokenPipeError:  # `pidistill keys | head`; the interpreter would fail again on flushing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
