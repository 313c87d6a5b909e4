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
    box: int
    opened: str | None = None
    taken: bool = False


def open_door(example: Example) -> Visit:
    """Return the state of a new episode."""
    return Visit(example.data["item"], example.data["room"], example.data["box"])


def open_room(state: Visit, room: Room) -> str:
    """Open a room and look for the thing."""
    if state.opened is not None:
        raise ToolError("your key is used up")
    state.opened = room
    if room != state.room:
        return f"no {state.item} here"
    return f"the {state.item} is in box {state.box}"


def take_box(state: Visit, number: int) -> str:
    """Take one box of the open room."""
    if state.opened != state.room or number != state.box:
        raise ToolError("there is no such box here")
    state.taken = True
    return f"you have the {state.item}"


def brought_it(example: Example, turns: Sequence[Message]) -> float:
    """Return 1 if the agent holds the item that was asked for, else 0."""
    visit: Any = example.data["state"]
    return float(visit.taken)
