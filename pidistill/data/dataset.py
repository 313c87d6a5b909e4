"""Hold what every dataset builder returns, and turn rows into examples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from pidistill.errors import InputError
from pidistill.types import Example

Row = TypeVar("Row")
Made = TypeVar("Made")

_REFUSED: ContextVar[list[InputError] | None] = ContextVar("refused", default=None)


@contextmanager
def collect_refused_rows() -> Iterator[list[InputError]]:
    """Collect the errors of refused rows inside the block, in the list that it yields; the rows are left out of the dataset."""
    refused: list[InputError] = []
    token = _REFUSED.set(refused)
    try:
        yield refused
    finally:
        _REFUSED.reset(token)


def convert_rows(rows: Iterable[tuple[str, Row]], convert: Callable[[str, Row], Made]) -> list[Made]:
    """Return ``convert(id, row)`` of every row; within :func:`collect_refused_rows`, without the rows that it refuses."""
    refused, made = _REFUSED.get(), []
    for where, row in rows:
        try:
            made.append(convert(where, row))
        except InputError as error:
            if refused is None:
                raise
            refused.append(error)
    return made


@dataclass(frozen=True)
class ExampleDataset:
    """Hold examples in order, and how many rows of the source are not among them, by reason."""

    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)
