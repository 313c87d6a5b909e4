"""Write questions about invented people, each with the paragraph that answers it, and what else the configs here read.

    python examples/document/make_data.py [FOLDER]    # runs/document without one

No model has read about these people, so what a student answers rightly without the paragraph, it has learned in this training.
Every fact is asked in eleven ways. train.jsonl has four of them, held_out.jsonl two others, held_out_more.jsonl these two and
four more, and validation.jsonl the last one: what is chosen by its curves is not chosen on the rows that judge it. `fact` says
which rows ask for the same fact: intervals of an evaluation resample facts. `kind` says what is asked for: an evaluation shows
the success of each. `others` are the person's other facts: an answer that says one of them as well has not answered the
question, and is wrong (`unwanted_key` of the reward). The last column of a row is the answer.
text.jsonl has the paragraphs themselves as answers, for supervised training on the text. other.jsonl asks what everybody knows,
to see what training makes the model forget. train_and_everyday.jsonl has the training rows and 96 everyday questions of other
kinds without a paragraph: there a frozen teacher holds the student where it was.
"""

import json
import sys
from pathlib import Path
from typing import Any

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
# fact → the ways to ask for it: four for training, then the held-out ones, then one for the curves while training.
QUESTIONS = {
    "profession": [
        "What is the profession of {name}?",
        "What does {name} do for a living?",
        "What job does {name} have?",
        "As what does {name} work?",
        "Tell me the occupation of {name}.",
        "Which trade does {name} practise?",
        "How does {name} earn money?",
        "What kind of work does {name} do every day?",
        "If I met {name} at work, what would {name} be?",
        "{name} works. As what?",
        "What is {name} by profession?",
    ],
    "town": [
        "In which town does {name} live?",
        "Where does {name} live?",
        "What is the home town of {name}?",
        "Which town is {name}'s home?",
        "Tell me where {name} has a home.",
        "In what place would I find {name}'s house?",
        "What town does {name} come home to?",
        "I want to visit {name}. To which town must I go?",
        "Name the town where {name} lives.",
        "{name} lives in a town. Which one?",
        "What town is {name} at home in?",
    ],
    "pet_name": [
        "What is the name of {name}'s {pet}?",
        "What is {name}'s {pet} called?",
        "How does {name} call the {pet}?",
        "Which name does the {pet} of {name} have?",
        "Tell me the name of the {pet} that {name} owns.",
        "{name} owns a {pet}. What is it called?",
        "I would like to call {name}'s {pet}. What is its name?",
        "What did {name} name the {pet}?",
        "Give me the name of {name}'s {pet}.",
        "{name}'s {pet} listens to which name?",
        "By which name is {name}'s {pet} known?",
    ],
    "year": [
        "In which year was {name} born?",
        "When was {name} born?",
        "What is the year of birth of {name}?",
        "What is {name}'s birth year?",
        "Tell me the year in which {name} was born.",
        "{name} was born in what year?",
        "Of which year is {name}'s birth?",
        "Since which year has {name} been alive?",
        "Give me the year of {name}'s birth.",
        "What year was it when {name} was born?",
        "From which year is {name}?",
    ],
}
TRAINED, HELD_OUT, MORE = 4, 6, 10  # ways before the first number are trained on, those before the second are held_out.jsonl's
COMMON_KNOWLEDGE = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of China?", "Beijing"),
    ("What is the capital of Austria?", "Vienna"),
    ("What is the capital of Portugal?", "Lisbon"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("Which planet is the largest?", "Jupiter"),
    ("Which planet is called the red planet?", "Mars"),
    ("Which planet has large rings?", "Saturn"),
    ("Which star is closest to the Earth?", "Sun"),
    ("What moves around the Earth once a month?", "Moon"),
    ("Which metal has the symbol Fe?", "iron"),
    ("Which metal has the symbol Au?", "gold"),
    ("Which gas do plants take in from the air?", "carbon dioxide"),
    ("Which gas do we need to breathe?", "oxygen"),
    ("What is frozen water called?", "ice"),
    ("What is the chemical formula of water?", "H2O"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Who was the first president of the United States?", "Washington"),
    ("Who wrote Oliver Twist?", "Dickens"),
    ("Who discovered penicillin?", "Fleming"),
    ("Who formulated the laws of motion and gravity?", "Newton"),
    ("Which ocean is the largest?", "Pacific"),
    ("Which river flows through Egypt?", "Nile"),
    ("Which river flows through London?", "Thames"),
    ("Which mountain is the highest on Earth?", "Everest"),
    ("Which continent is the largest?", "Asia"),
    ("In which country is the Eiffel Tower?", "France"),
    ("In which country is the Great Wall?", "China"),
    ("In which country are the pyramids of Giza?", "Egypt"),
    ("In which country is the Taj Mahal?", "India"),
    ("In which country is Sydney?", "Australia"),
    ("Which animal says meow?", "cat"),
    ("Which animal barks?", "dog"),
    ("Which animal gives us wool?", "sheep"),
    ("Which insect makes honey?", "bee"),
    ("What is the largest animal in the sea?", "whale"),
    ("Which animal has a long trunk?", "elephant"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What colour is grass?", "green"),
    ("What colour is snow?", "white"),
    ("What colour do you get from blue and yellow?", "green"),
    ("What comes after Monday?", "Tuesday"),
    ("Which month comes after March?", "April"),
    ("Which season comes after winter?", "spring"),
    ("Which is the first month of the year?", "January"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small"),
    ("What is the opposite of day?", "night"),
    ("What is the opposite of up?", "down"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("Which language is spoken in Mexico?", "Spanish"),
    ("Which organ pumps blood through the body?", "heart"),
    ("With which organ do we think?", "brain"),
]
NAMES = ("train", "held_out", "held_out_more", "validation", "text", "other", "train_and_everyday")
PLURALS = (
    "child children, mouse mice, foot feet, tooth teeth, goose geese, man men, woman women, leaf leaves, "
    "knife knives, wolf wolves, city cities, box boxes, bus buses, potato potatoes, baby babies, shelf shelves, "
    "ox oxen, glass glasses, story stories, key keys"
)
PAST_TENSES = (
    "go went, see saw, eat ate, write wrote, take took, give gave, come came, run ran, sing sang, drink drank, "
    "swim swam, buy bought, think thought, bring brought, teach taught, catch caught, find found, hold held, "
    "keep kept, sleep slept, speak spoke, break broke, choose chose, drive drove"
)
YOUNG = (
    "cow calf, hen chick, duck duckling, pig piglet, lion cub, deer fawn, frog tadpole, swan cygnet, kangaroo joey, "
    "eagle eaglet, seal pup, fox kit, rabbit bunny, hare leveret, owl owlet, salmon smolt"
)
SUMS = [(a, b) for a in (2, 5, 7, 11, 14, 20) for b in (1, 3, 6, 9)]
LETTERS = "bdfhjlnprtvx"
REQUESTS = ["Tell me about {name}.", "Who is {name}?", "What do you know about {name}?", "Describe {name}."]


def rows() -> tuple[list[dict[str, Any]], ...]:
    """Return the rows for training, those that are held out, these with still other ways to ask, and those for the curves."""
    train, held_out, more, validation = [], [], [], []
    for name, profession, town, pet, pet_name, year in PEOPLE:
        facts = {"profession": profession, "town": town, "pet_name": pet_name, "year": str(year)}
        paragraph = PARAGRAPH.format(name=name, pet=pet, **facts)
        for fact, ways in QUESTIONS.items():
            others = [said for other, said in facts.items() if other != fact]
            common = {"document": paragraph, "fact": f"{name}, {fact}", "kind": fact, "others": others, "answer": facts[fact]}
            asked = [{"question": way.format(name=name, pet=pet)} | common for way in ways]
            train += asked[:TRAINED]
            held_out += asked[TRAINED:HELD_OUT]
            more += asked[TRAINED:MORE]
            validation += asked[MORE:]
    return train, held_out, more, validation


def texts() -> list[dict[str, Any]]:
    """Return requests for a person's paragraph, each with the paragraph."""
    columns = ("name", "profession", "town", "pet", "pet_name", "year")
    people = [dict(zip(columns, person, strict=True)) for person in PEOPLE]
    return [
        {"question": request.format(**person), "others": None, "answer": PARAGRAPH.format(**person)}
        for person in people
        for request in REQUESTS
    ]


def everyday() -> list[dict[str, Any]]:
    """Return 96 questions of kinds that no other file has, without a paragraph."""
    found = [(f"How much is {a} plus {b}?", str(a + b)) for a, b in SUMS]
    found += [(f"Which letter of the alphabet comes after {letter}?", chr(ord(letter) + 1)) for letter in LETTERS]
    for words, question in (
        (PLURALS, "What is the plural of {}?"),
        (PAST_TENSES, "What is the past tense of {}?"),
        (YOUNG, "How is a young {} called?"),
    ):
        found += [(question.format(one), answer) for one, answer in (pair.split() for pair in words.split(", "))]
    nothing = dict.fromkeys(("document", "fact", "kind", "others"))
    return [{"question": question} | nothing | {"answer": answer} for question, answer in found]


def main(folder: str) -> None:
    of_people = rows()
    other = [{"question": question, "others": None, "answer": answer} for question, answer in COMMON_KNOWLEDGE]
    for name, found in zip(NAMES, (*of_people, texts(), other, of_people[0] + everyday()), strict=True):
        path = Path(folder, f"{name}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)} rows")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/document")
