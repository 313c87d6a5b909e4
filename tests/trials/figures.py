"""Count how the tries of a trial ended, and print it."""

from collections import Counter
from collections.abc import Iterable

OUTCOMES = ("refused with one sentence", "accepted", "traceback", "hang", "crash", "other")


def figures(title: str, tries: Iterable[tuple[str, str]]) -> str:
    """Return a table with a row per kind and one for all; ``tries`` are (kind, outcome)."""
    counts: dict[str, Counter[str]] = {}
    for kind, outcome in tries:
        counts.setdefault(kind, Counter())[outcome] += 1
    outcomes = [*OUTCOMES, *sorted({name for count in counts.values() for name in count} - set(OUTCOMES))]
    shown = [name for name in outcomes if any(count[name] for count in counts.values())]
    total = sum(counts.values(), Counter())
    rows = [("kind", "tried", *shown)]
    rows += [
        (kind, str(count.total()), *(str(count[name]) for name in shown)) for kind, count in (*counts.items(), ("all", total))
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"── {title}", *lines])


def print_figures(title: str, tries: Iterable[tuple[str, str]]) -> None:
    print(f"\n{figures(title, tries)}", flush=True)
