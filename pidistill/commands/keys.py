"""`pidistill keys [word]`: print the config keys with type, default, recipes and meaning, or the rows that contain a word."""

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.errors import InputError
from pidistill.training.keys import page, rows

COLUMNS = ("key", "type", "default", "recipes", "meaning")


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
    """Print the rows that contain ``word`` as a table."""
    found = list(rows(word=word))
    if not found:
        raise InputError(f"no row of the config keys contains {word!r}; `pidistill keys` prints all of them")
    table = Table(Column("key", no_wrap=True), *COLUMNS[1:])  # a key is for copying, so that other columns give way to it
    for row in found:
        table.add_row(*map(escape, row))
    Console().print(table)
