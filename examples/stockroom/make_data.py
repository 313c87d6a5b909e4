"""Write train.jsonl, validation.jsonl and held_out.jsonl: requests to a stockroom, with an expert's calls.

    python examples/stockroom/make_data.py [FOLDER]    # runs/stockroom without one

Which room an item is in follows from nothing that the student reads: it is a habit of this house, and the expert's calls show
it. The number of the box is another in every row, and is read from what `open_room` answers. Held-out requests ask for the
same items in other words.
"""

import json
import random
import sys
from pathlib import Path

ROOMS = ("attic", "cellar", "garage", "kitchen", "office", "shed")
THINGS = (
    "copper kettle, blue lantern, wool blanket, brass bell, paint roller, chess clock, garden hose, silver tray, "
    "camping stove, fishing net, sewing kit, wall map, bread basket, snow shovel, violin case, hand drill, "
    "picnic rug, oil lamp, tea set, bicycle pump, rope ladder, water jug, picture frame, tool belt"
)
ITEMS = THINGS.split(", ")
WAYS = {
    "train": (
        "Please bring me the {item}.",
        "I need the {item}.",
        "Can you get the {item}?",
        "Where is the {item}? I want it.",
    ),
    "held_out": (
        "Would you fetch the {item} for me?",
        "Somebody asks for the {item}.",
        "The {item}, please!",
        "Get me our {item}.",
    ),
    "validation": ("Do we have the {item} somewhere?",),
}
SYSTEM = "You fetch things from a stockroom. Open the one room where the thing is: your key opens one. Then take its box."
# episodes that every prompt begins with
SHOWN = (
    ("umbrella", "attic", 54, "Please bring me the umbrella."),
    ("paper bag", "shed", 31, "Do you have the paper bag?"),
    ("hammer", "cellar", 76, "I want the hammer."),
)


def rooms() -> dict[str, str]:
    """Return the room of each item: four items in each, at random."""
    places = list(ROOMS) * (len(ITEMS) // len(ROOMS))
    random.Random("rooms").shuffle(places)
    return dict(zip(ITEMS, places, strict=True))


def call(name: str, **arguments: str | int) -> dict:
    """Return a call as chat templates take it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def episode(item: str, room: str, number: int) -> list[dict]:
    """Return what agent and tools say until the item is there."""
    return [
        {"role": "assistant", "content": "", "tool_calls": [call("open_room", room=room)]},
        {"role": "tool", "content": f"the {item} is in box {number}"},
        {"role": "assistant", "content": "", "tool_calls": [call("take_box", number=number)]},
        {"role": "tool", "content": f"you have the {item}"},
        {"role": "assistant", "content": f"Here is the {item}."},
    ]


def demonstrations() -> list[dict]:
    """Return the episodes that every prompt begins with: a model of 135M parameters needs them to write a call at all."""
    messages = []
    for item, room, number, request in SHOWN:
        messages += [{"role": "user", "content": request}, *episode(item, room, number)]
    return messages


def row(item: str, way: str, room: str, rng: random.Random) -> dict:
    """Return a request, and the expert's episode: as privileged information, and as a demonstration for supervised training."""
    number = rng.randrange(10, 100)
    asked = [{"role": "user", "content": way.format(item=item)}]
    return {
        "messages": [{"role": "system", "content": SYSTEM}, *demonstrations(), *asked],
        "privileged_messages": [*asked, *episode(item, room, number)],
        "completion": episode(item, room, number),
        "item": item,
        "room": room,
        "box": number,
    }


def rows(split: str) -> list[dict]:
    """Return the rows of a split: train, validation or held_out."""
    rng = random.Random(split)
    made = [row(item, way, room, rng) for item, room in rooms().items() for way in WAYS[split]]
    rng.shuffle(made)  # so that the first rows are of many items
    return made


def main(folder: str = "runs/stockroom") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split in WAYS:
        lines = [json.dumps(one) + "\n" for one in rows(split)]
        (Path(folder) / f"{split}.jsonl").write_text("".join(lines))
        print(f"{folder}/{split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
