"""Join rows of several kinds in one run, and find what a key of each row names: its teacher, its objective, its environment."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from pidistill.data.dataset import ExampleDataset, convert_rows
from pidistill.errors import InputError, bounded_repr
from pidistill.types import Example


def joined_dataset(parts: Mapping[str, Iterable[Example]], key: str = "domain") -> ExampleDataset:
    """Return the rows of all datasets, one after another; each has the name of its own as ``data[key]``, and in its id."""
    examples, dropped = [], Counter()
    for name, part in parts.items():
        named = ((f"{name}: {row.id}", row) for row in part)
        examples += convert_rows(named, partial(_with_route, key=key, name=str(name)))
        dropped.update(getattr(part, "dropped", {}))
    return ExampleDataset(examples, dict(dropped))


def _with_route(where: str, row: Example, key: str, name: str) -> Example:
    """Return the row with ``data[key] = name``; a field of the row with another value is refused, not overwritten."""
    own = row.data.get(key)
    if own is not None and own != name:
        raise InputError(
            f"{where} has a field {key} of its own ({bounded_repr(own)}), which dataset.key={key} would overwrite with the "
            f"name of its part, {name!r}; set dataset.key, and the key of what is routed by it (environment, objective or "
            "teacher), to a name that no row has"
        )
    return replace(row, id=where, data={**row.data, key: name})


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
