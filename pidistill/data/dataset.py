"""What every dataset builder returns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pidistill.types import Example


@dataclass(frozen=True)
class ExampleDataset:
    """Examples in order, and how many rows of the source are not among them, by reason."""

    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)
