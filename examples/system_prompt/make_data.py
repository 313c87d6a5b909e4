"""Write three files of questions to two service desks, each with the long instruction of its desk.

    python examples/system_prompt/make_data.py [FOLDER]    # runs/system_prompt without one

`messages` is what the model sees at inference: one short sentence about who it is, and the question. `privileged_messages` is
the long instruction: the rules of the desk and example dialogues. There are two desks, so that the control arm `shuffled` can
give a row the other desk's instruction. The questions of held_out.jsonl ask about other things than those of train.jsonl, in
other words; those of validation.jsonl, for the curves while training, about still others.
"""

import json
import random
import sys
from pathlib import Path

RULES = 'Every answer begins with "{opening}", has one short sentence, tells no price, and ends with "{closing}"'
# who it is · the rules · example dialogues, of which one shows the refusal
DESKS = {
    "porter": {
        "short": "You are the night porter of the Harbour Inn.",
        "rules": RULES.format(opening="Good evening!", closing="Yours, Barnaby."),
        "dialogues": [
            ("Where is the lift?", "Good evening! The lift is beside the front desk. Yours, Barnaby."),
            ("How much is a taxi?", "Good evening! I do not speak about prices. Yours, Barnaby."),
            ("Do you have a garden?", "Good evening! Yes, there is a small garden behind the house. Yours, Barnaby."),
            ("When does the bar close?", "Good evening! The bar closes at midnight. Yours, Barnaby."),
        ],
    },
    "librarian": {
        "short": "You are the librarian of Oakfield Library.",
        "rules": RULES.format(opening="Hello, reader!", closing="Keep reading."),
        "dialogues": [
            ("Where are the maps?", "Hello, reader! The maps are on the second floor. Keep reading."),
            ("How much is a library card?", "Hello, reader! I do not speak about prices. Keep reading."),
            ("Do you have a quiet room?", "Hello, reader! Yes, the quiet room is behind the stairs. Keep reading."),
            ("When does the library close?", "Hello, reader! The library closes at six. Keep reading."),
        ],
    },
}
THINGS = {
    "train": {
        "porter": "the breakfast room, the car park, the sauna, the laundry, the roof terrace, the billiard room",
        "librarian": "the copying machine, the lecture hall, the music room, the archive, the coffee corner, the study room",
    },
    "validation": {
        "porter": "the tea room, the ice machine, the conference room",
        "librarian": "the picture books, the printer, the writing class",
    },
    "held_out": {
        "porter": "the swimming pool, the reading room, the bicycle shed, the boat house, the dance hall, the gym",
        "librarian": "the newspaper room, the film collection, the sewing class, the scanner, the chess club, the book sale",
    },
}
# kind of question → the ways to ask; the last two of each kind are held out
QUESTIONS = {
    "neutral": [
        "Where is {thing}?",
        "When does {thing} open?",
        "Can you tell me something about {thing}?",
        "Is {thing} open today?",
        "May I use {thing} with a friend?",
        "How do I find {thing}?",
    ],
    "price": [
        "How much does {thing} cost?",
        "What is the price for {thing}?",
        "What must I pay for {thing}?",
        "Do you know what {thing} costs?",
        "Tell me the price of {thing}, please.",
    ],
}
HELD_OUT = 2


def rows(split: str) -> list[dict]:
    """Return the rows of a split: train, validation or held_out."""
    found = []
    for desk, text in DESKS.items():
        instruction = [{"role": "system", "content": text["rules"]}]
        for question, answer in text["dialogues"]:
            instruction += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for thing in THINGS[split][desk].split(", "):
            for kind, ways in QUESTIONS.items():
                for way in ways[:-HELD_OUT] if split == "train" else ways[-HELD_OUT:]:
                    asked = {"role": "user", "content": way.format(thing=thing)}
                    row = {"messages": [{"role": "system", "content": text["short"]}, asked]}
                    found.append(row | {"privileged_messages": instruction, "reference": f"{desk}/{kind}"})
    random.Random(0).shuffle(found)  # so that the first rows are of both desks
    return found


def main(folder: str) -> None:
    for split in THINGS:
        path = Path(folder, f"{split}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        found = rows(split)
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)} rows")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/system_prompt")
