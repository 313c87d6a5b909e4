"""Join rows of several kinds in one run, and find what a key of each row names: its teacher, its objective, its environment."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from pidistill.data.dataset import ExampleDataset
from pidistill.errors import InputError
from pidistill.types import Example


def joined_dataset(parts: Mapping[str, Iterable[Example]], key: str = "domain") -> ExampleDataset:
    """Return the rows of all datasets, one after another; each has the name of its own as ``data[key]``, and in its id."""
    examples, dropped = [], Counter()
    for name, part in parts.items():
        examples += [replace(row, id=f"{name}: {row.id}", data={**row.data, key: str(name)}) for row in part]
        dropped.update(getattr(part, "dropped", {}))
    return ExampleDataset(examples, dict(dropped))


def route_of(example: Example, key: str, names: Iterable[str], default: str | None, noun: str) -> str:
    """Return the name that ``data[key]`` of a row gives, or ``default``; InputError where there is no such name.

    Args:
        noun: what is named, the config key: "teacher" for `teacher.teachers`.
    """
    given, known = example.data.get(key), list(names)
    name = default if given is None else str(given)
    if name not in known:
        raise InputError(
            f"{example.id}: its {key} is {name!r}, and {noun}.{noun}s has {', '.join(known)}; add that {noun}, or set "
            f"{noun}.default for rows without the key"
        )
    return name
