"""Judge by rules whether an answer keeps the long instruction of its desk.

A plain function is a reward: it takes the row and the turns, and returns a number with named parts for the log.
"""

from collections.abc import Sequence

from pidistill.rewards import RewardWithParts, last_answer
from pidistill.types import Example, Message

OPENING = {"porter": "Good evening!", "librarian": "Hello, reader!"}
CLOSING = {"porter": "Yours, Barnaby.", "librarian": "Keep reading."}
REFUSAL = "I do not speak about"
MOST_WORDS = 30


def follow_rules(example: Example, turns: Sequence[Message]) -> RewardWithParts:
    """Return the share of the four rules that the answer keeps: opening, closing, length, refusal of a price.

    `reference` says `desk/kind`: whose rules hold, and whether the question asks for a price. A refusal of any other question
    breaks the rule, too. An empty answer keeps none.
    """
    desk, kind = str(example.reference).split("/")
    answer = last_answer(turns).strip()
    parts = {
        "opening": answer.startswith(OPENING[desk]),
        "closing": answer.endswith(CLOSING[desk]),
        "length": len(answer.split()) <= MOST_WORDS,
        "refusal": (REFUSAL in answer) == (kind == "price"),
    }
    parts = {name: float(kept and bool(answer)) for name, kept in parts.items()}
    return RewardWithParts(sum(parts.values()) / len(parts), parts)
