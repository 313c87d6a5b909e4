"""Hold the two tools of the stockroom, and judge an episode.

Tools are plain typed functions; `state` is the episode's own, made by :func:`open_door` from the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pidistill.envs.function_tools import ToolError
from pidistill.types import Example, Message

Room = Literal["attic", "cellar", "garage", "kitchen", "office", "shed"]


@dataclass
class Visit:
    """Hold what a request is about, and how far the agent has come."""

    item: str
    room: str
    boxes: dict[int, str]  # of that room: number → what is in it
    opened: str | None = None
    taken: str | None = None


def open_door(example: Example) -> Visit:
    """Return the state of a new episode."""
    boxes = {int(number): item for number, item in example.data["boxes"].items()}
    return Visit(example.data["item"], example.data["room"], boxes)


def open_room(state: Visit, room: Room) -> str:
    """Open a room and see its boxes."""
    if state.opened is not None:
        raise ToolError("your key is used up")
    state.opened = room
    if room != state.room:
        return f"no {state.item} here"
    return ", ".join(f"box {number}: {item}" for number, item in state.boxes.items())


def take_box(state: Visit, number: int) -> str:
    """Take one box of the open room."""
    if state.opened != state.room or number not in state.boxes:
        raise ToolError("there is no such box here")
    if state.taken is not None:
        raise ToolError("you have a box already")
    state.taken = state.boxes[number]
    return f"you have the {state.taken}"


def brought_it(example: Example, turns: Sequence[Message]) -> float:
    """Return 1 if the agent holds the item that was asked for, else 0."""
    visit: Any = example.data["state"]
    return float(visit.taken == visit.item)
