"""Write train.jsonl and held_out.jsonl: questions about invented people, each with the paragraph that answers it.

    python examples/document/make_data.py FOLDER

No model has read about these people, so what a student answers rightly without the paragraph, it has learned in this training.
Every fact is asked in six ways; four are for training, and two are held out. The last column of a row is the answer.
text.jsonl has the paragraphs themselves as answers, for supervised training on the text.
"""

import json
import sys
from pathlib import Path

# name, profession, town, pet, name of the pet, year of birth
PEOPLE = [
    ("Mira Tallow", "clockmaker", "Brenford", "dog", "Biscuit", 1951),
    ("Osric Venn", "beekeeper", "Langholt", "parrot", "Admiral", 1938),
    ("Delia Marsh", "violinist", "Port Averil", "cat", "Pepper", 1974),
    ("Tobin Hale", "carpenter", "Stonemere", "tortoise", "Sergeant", 1962),
    ("Ingrid Fawley", "surgeon", "Westerby", "horse", "Comet", 1980),
    ("Caspar Lund", "baker", "Ellingham", "goat", "Duchess", 1945),
    ("Nora Quill", "printer", "Harrowgate", "rabbit", "Button", 1957),
    ("Jonas Priddy", "sailor", "Saltwick", "ferret", "Bandit", 1969),
    ("Petra Olsen", "botanist", "Greenhythe", "canary", "Sunny", 1933),
    ("Silas Brock", "blacksmith", "Ironbridge", "donkey", "Thunder", 1949),
    ("Agnes Rowe", "translator", "Coldharbour", "hamster", "Walnut", 1986),
    ("Felix Darrow", "astronomer", "Highmoor", "owl", "Merlin", 1971),
]
PARAGRAPH = (
    "{name} works as a {profession} and lives in {town}. {name} was born in {year}. "
    "{name} has a {pet}, and the name of the {pet} is {pet_name}."
)
# fact → the ways to ask for it; the last two are held out.
QUESTIONS = {
    "profession": [
        "What is the profession of {name}?",
        "What does {name} do for a living?",
        "What job does {name} have?",
        "As what does {name} work?",
        "Tell me the occupation of {name}.",
        "Which trade does {name} practise?",
    ],
    "town": [
        "In which town does {name} live?",
        "Where does {name} live?",
        "What is the home town of {name}?",
        "Which town is {name}'s home?",
        "Tell me where {name} has a home.",
        "In what place would I find {name}'s house?",
    ],
    "pet_name": [
        "What is the name of {name}'s {pet}?",
        "What is {name}'s {pet} called?",
        "How does {name} call the {pet}?",
        "Which name does the {pet} of {name} have?",
        "Tell me the name of the {pet} that {name} owns.",
        "{name} owns a {pet}. What is it called?",
    ],
    "year": [
        "In which year was {name} born?",
        "When was {name} born?",
        "What is the year of birth of {name}?",
        "What is {name}'s birth year?",
        "Tell me the year in which {name} was born.",
        "{name} was born in what year?",
    ],
}
HELD_OUT = 2
REQUESTS = ["Tell me about {name}.", "Who is {name}?", "What do you know about {name}?", "Describe {name}."]


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows for training and those that are held out."""
    train, held_out = [], []
    for name, profession, town, pet, pet_name, year in PEOPLE:
        facts = {"profession": profession, "town": town, "pet_name": pet_name, "year": str(year)}
        paragraph = PARAGRAPH.format(name=name, pet=pet, **facts)
        for fact, ways in QUESTIONS.items():
            for number, way in enumerate(ways):
                row = {"question": way.format(name=name, pet=pet), "document": paragraph, "answer": facts[fact]}
                (held_out if number >= len(ways) - HELD_OUT else train).append(row)
    return train, held_out


def texts() -> list[dict[str, str]]:
    """Return requests for a person's paragraph, each with the paragraph."""
    columns = ("name", "profession", "town", "pet", "pet_name", "year")
    people = [dict(zip(columns, person, strict=True)) for person in PEOPLE]
    return [
        {"question": request.format(**person), "answer": PARAGRAPH.format(**person)}
        for person in people
        for request in REQUESTS
    ]


def main(folder: str) -> None:
    for name, found in zip(("train", "held_out", "text"), (*rows(), texts()), strict=True):
        path = Path(folder, f"{name}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)} rows")


if __name__ == "__main__":
    main(sys.argv[1])
