"""`pidistill keys [word]`: print the config keys with type, default, recipes and meaning, or the rows that contain a word."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.errors import InputError
from pidistill.training.keys import page, rows

COLUMNS = ("key", "type", "default", "recipes", "meaning")
TABLE_WIDTH = 120  # columns below which the cells of a table would be broken inside of words


def main(argv: list[str]) -> None:
    parser = Parser(prog="pidistill keys", description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="print only the rows that contain this word")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/keys.md")
    arguments = parser.parse_args(argv)
    with exit_on_input_error():
        if arguments.markdown:
            print(page(), end="")
        else:
            show(arguments.word)


def show(word: str) -> None:
    """Print the rows that contain ``word``: as a table in a wide terminal, as blocks in a narrow one and in a pipe."""
    found = list(rows(word=word))
    if not found:
        raise InputError(f"no row of the config keys contains {word!r}; `pidistill keys` prints all of them")
    console = Console()
    if not console.is_terminal or console.width < TABLE_WIDTH:
        print("\n".join(block(row, console.width) for row in found))
        return
    table = Table(Column("key", no_wrap=True), *COLUMNS[1:])  # a key is for copying, so that other columns give way to it
    for row in found:
        table.add_row(*map(escape, row))
    console.print(table)


def block(row: Sequence[str], width: int) -> str:
    """Return a row of the keys as `key (type, default; recipes)` with the meaning below, wrapped between words."""
    key, kind, default, recipes, meaning = row
    lines = textwrap.wrap(
        f"{key} ({kind}, {default}; {recipes})",
        width,
        subsequent_indent="        ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines += textwrap.wrap(
        meaning, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)
