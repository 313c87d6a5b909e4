"""Read values on a sweep's command line: `key=value`, `key=a,b,c`, `key=0..2`, `key=log:1e-5..1e-2`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pidistill.errors import InputError


@dataclass(frozen=True)
class Choices:
    """Hold the values of one key, as they are typed."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Hold low..high, both included; ``whole`` for integers, ``log`` for log-uniform search."""

    low: float
    high: float
    whole: bool
    log: bool


Axis = Choices | Range


def split_top_level(text: str) -> list[str]:
    """Split at the commas that stand in no bracket: `0,{start: 1, end: 0},2` are three values."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def parse_axis(text: str) -> Axis:
    """Read `a,b,c`, `a..b` (whole numbers if both ends are: write 0.0..1.0 for a continuous range) or `log:a..b`."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    found = re.fullmatch(rf"(log:)?({number})\.\.({number})", text)
    if not found:
        return Choices(tuple(split_top_level(text)))
    whole = all(re.fullmatch(r"[-+]?\d+", end) for end in found.groups()[1:])
    low, high = float(found[2]), float(found[3])
    if low > high or (found[1] and low <= 0):
        raise InputError(f"range {text}: the low end must not exceed the high end, and must be above 0 after log:")
    return Range(low, high, whole, log=bool(found[1]))


def grid_values(key: str, axis: Axis) -> tuple[str, ...]:
    if isinstance(axis, Choices):
        return axis.values
    if axis.whole and not axis.log:
        return tuple(str(value) for value in range(int(axis.low), int(axis.high) + 1))
    raise InputError(
        f"{key}={axis.low:g}..{axis.high:g} is a continuous range, which has no grid; list values or set --search tpe"
    )


def parse_overrides(words: Sequence[str]) -> tuple[dict[str, str], dict[str, Axis], tuple[int, ...] | None]:
    """Return (fixed overrides, swept axes, seeds) of words; a key with one value is fixed, and `seed` is never swept."""
    fixed, axes, seeds = {}, {}, None
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(f"{word} is not an override; write key=value, key=v1,v2 or key=0..2")
        axis = parse_axis(text)
        if key == "seed":
            seeds = tuple(whole_number(key, value) for value in grid_values(key, axis))
        elif key == "output_dir":
            raise InputError("output_dir is made by the sweep, one folder per run; set --output-dir for all of them")
        elif isinstance(axis, Choices) and len(axis.values) == 1:
            fixed[key] = axis.values[0]
        else:
            axes[key] = axis
    return fixed, axes, seeds


def whole_number(key: str, text: Any) -> int:
    if not re.fullmatch(r"\d+", str(text)):
        raise InputError(f"{key}={text} must be a whole number of at least 0")
    return int(text)
