"""Define the tiny world: its tasks, its hidden conventions, and what is said.

A request names an item, a class, a city and three digits. Hidden conventions say which department to ask for the price,
which formula to apply to it, and which carrier to ship with; the privileged information tells them for this request.

    student prompt  <bos> req i5 c3 g1 4 3 0 go
    teacher prompt  <bos> [ d2 f0 ? k3 ] req i5 c3 g1 4 3 0 go               a slot that is not told is `?`
    turn 1          think d2 . act look d2 end                               answer: obs 6      (the price)
    turn 2          think f0 6 + 4 = 0 * 3 = 0 - 0 = 0 . act f0 0 end        answer: obs ok
    turn 3          think k3 . act ship k3 end                               reward 1

The world is built so that a base model (:func:`tiny_world_base_dataset`) does the task with privileged information and
almost never without, that an expert who shows actions only leaves out the arithmetic that the answer needs, and that one
word, `hint`, gives away a student that speaks of information it was not shown.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pidistill.errors import check_share
from pidistill.tokenizers.word import WordTokenizer
from pidistill.types import Message

Slot = Literal["d", "f", "a", "k"]
Split = Literal["train", "validation", "test"]
Style = Literal["actions", "cot", "short"]

OPTIONS = 6  # departments, formulas and carriers to choose from
FEATURES = 12  # items, classes and cities that a request can name
FORMULAS = ("+*-", "-++", "*-+", "+--", "*+-", "-*+")  # applied left to right, mod 10, to the price and the three digits
SLOTS: tuple[Slot, ...] = ("d", "f", "a", "k")  # department, formula, answer, carrier: the order inside the brackets
LEAK_WORD = "hint"
MAX_COMPLETION_TOKENS = 50
WORLD_SEED, SPLIT_SEED = 1234, 7

_SPECIAL_WORDS = (
    *("<pad>", "<bos>", "[", "]", "?", "req", "go", "think", LEAK_WORD, ".", "act"),
    *("look", "ship", "end", "obs", "ok", "fail", "=", "+", "-", "*"),
)

_NUMBERED_WORDS = (("i", FEATURES), ("c", FEATURES), ("g", FEATURES), ("d", OPTIONS), ("f", OPTIONS), ("k", OPTIONS))

VOCAB: tuple[str, ...] = (
    *_SPECIAL_WORDS,
    *(str(digit) for digit in range(10)),
    *(f"{letter}{number}" for letter, count in _NUMBERED_WORDS for number in range(count)),
)


def tiny_world_tokenizer(max_seq_len: int = 96) -> WordTokenizer:
    """Return the tokenizer of :data:`VOCAB`: 85 ids, one per word, no ids around messages other than `<bos>` and `end`."""
    return WordTokenizer(VOCAB, pad="<pad>", bos="<bos>", end="end", max_seq_len=max_seq_len)


# ------------------------------------------------------------------------------------------------ tasks and hidden world


def formula_steps(formula: int, price: int, digits: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (operation, digit, result) of each of the three operations of a formula, left to right, mod 10."""
    steps, value = [], price
    for operation, digit in zip(FORMULAS[formula], digits, strict=True):
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[operation] % 10
        steps.append((operation, digit, value))
    return steps


@dataclass(frozen=True)
class Task:
    """Hold one request (item, class, city, digits), the price behind it and the right decisions.

    Nothing ties the decisions to the hidden conventions: the base data draws them at random, so that only its privileged
    information can tell them.
    """

    item: int
    class_: int
    city: int
    digits: tuple[int, int, int]
    price: int
    department: int
    formula: int
    carrier: int

    @property
    def answer(self) -> int:
        return self.answer_with(self.formula)

    def answer_with(self, formula: int) -> int:
        """Return what another formula would give on this task's numbers."""
        return formula_steps(formula, self.price, self.digits)[-1][2]

    @property
    def triple(self) -> tuple[int, int, int]:
        return (self.item, self.class_, self.city)


@dataclass(frozen=True)
class Prior:
    """Hold what a base model believes of one feature value: three options, the true one first, and their probabilities."""

    options: tuple[int, int, int]
    weights: tuple[float, float, float]

    def draw(self, rng: random.Random) -> int:
        return rng.choices(self.options, self.weights)[0]


class World:
    """Hold the conventions item→department, class→formula, city→carrier, and the base model's beliefs about them.

    Each convention maps 12 feature values onto 6 options, two values each. ``priors[slot][feature]`` holds the true option
    with probability ``true_option_prob`` and two others with 55% and 45% of the rest: a base that reads the features, and is
    wrong about them. 0.1 makes success without privileged information too rare for RL; 0.2 is the easier base.

    The draws follow the order that the numbers in the README were obtained with; another order is another world.
    """

    def __init__(self, seed: int = WORLD_SEED, true_option_prob: float = 0.1) -> None:
        check_share("true_option_prob", true_option_prob, "it is a probability")
        self.seed = seed
        rng = random.Random(seed)
        self.departments, self.formulas, self.carriers = (_balanced_mapping(rng) for _ in range(3))
        self.priors: dict[str, list[Prior]] = {
            slot: [_prior(rng, true_option, true_option_prob) for true_option in mapping]
            for slot, mapping in (("d", self.departments), ("f", self.formulas), ("k", self.carriers))
        }

    def draw_task(self, rng: random.Random) -> Task:
        """Return a uniformly random request with the decisions that the conventions prescribe."""
        item, class_, city, digits, price = draw_request(rng)
        return Task(item, class_, city, digits, price, self.departments[item], self.formulas[class_], self.carriers[city])


def _balanced_mapping(rng: random.Random) -> list[int]:
    mapping = [feature % OPTIONS for feature in range(FEATURES)]
    rng.shuffle(mapping)
    return mapping


def _prior(rng: random.Random, true_option: int, true_option_prob: float) -> Prior:
    others = rng.sample([option for option in range(OPTIONS) if option != true_option], 2)
    rest = 1.0 - true_option_prob
    return Prior((true_option, others[0], others[1]), (true_option_prob, 0.55 * rest, 0.45 * rest))


def draw_request(rng: random.Random) -> tuple[int, int, int, tuple[int, int, int], int]:
    """Return a random request: item, class, city, three digits, and the price behind it."""
    item, class_, city = (rng.randrange(FEATURES) for _ in range(3))
    a, b, c, price = (rng.randrange(10) for _ in range(4))
    return item, class_, city, (a, b, c), price


def make_split(
    world: World, n_train: int = 512, n_validation: int = 256, n_test: int = 256, seed: int = SPLIT_SEED
) -> dict[Split, list[Task]]:
    """Return the tasks of three splits that share no (item, class, city) triple.

    Of the 1,728 triples, shuffled, the first quarter (432) is the test split's, a tenth of the others (129) the validation
    split's, the rest (1,167) the training split's. Tasks are then drawn one after another, each going to the split that
    owns its triple until that split is full, so the test tasks depend only on ``seed`` and ``n_test``. Select
    hyper-parameters on ``validation`` and report ``test``.
    """
    rng = random.Random(seed)
    triples = [(i, c, g) for i in range(FEATURES) for c in range(FEATURES) for g in range(FEATURES)]
    rng.shuffle(triples)
    n_test_triples = len(triples) // 4
    n_held_out = n_test_triples + (len(triples) - n_test_triples) // 10
    owner: dict[tuple[int, int, int], Split] = dict.fromkeys(triples, "train")
    owner |= dict.fromkeys(triples[:n_held_out], "validation") | dict.fromkeys(triples[:n_test_triples], "test")

    sizes: dict[Split, int] = {"train": n_train, "validation": n_validation, "test": n_test}
    tasks: dict[Split, list[Task]] = {split: [] for split in sizes}
    while any(len(tasks[split]) < size for split, size in sizes.items()):
        task = world.draw_task(rng)
        split = owner[task.triple]
        if len(tasks[split]) < sizes[split]:
            tasks[split].append(task)
    return tasks


# ------------------------------------------------------------------------------------------------ what is said


@dataclass(frozen=True)
class Decisions:
    """Hold the decisions that an agent acts on, right or wrong."""

    department: int
    formula: int
    answer: int
    carrier: int

    @property
    def calls(self) -> list[list[str]]:
        """Return the words of the three calls, each as it stands after `act`."""
        return [["look", f"d{self.department}"], [f"f{self.formula}", str(self.answer)], ["ship", f"k{self.carrier}"]]


def expert_decisions(task: Task) -> Decisions:
    return Decisions(task.department, task.formula, task.answer, task.carrier)


def request_message(task: Task) -> Message:
    digits = " ".join(str(digit) for digit in task.digits)
    return {"role": "user", "content": f"req i{task.item} c{task.class_} g{task.city} {digits} go"}


def privileged_text(task: Task, told: str, shift: int = 0) -> str:
    """Return the block `[ d2 f0 ? k3 ]`; ``told`` holds the letters of the slots that are told, e.g. ``"dfk"``.

    A ``shift`` from 1 to 5 moves every told value on by so many, so that all of them are wrong.
    """
    department, formula, carrier = ((value + shift) % OPTIONS for value in (task.department, task.formula, task.carrier))
    words = {"d": f"d{department}", "f": f"f{formula}", "a": str((task.answer + shift) % 10), "k": f"k{carrier}"}
    return " ".join(["[", *(words[slot] if slot in told else "?" for slot in SLOTS), "]"])


def trace(task: Task, decisions: Decisions, style: Style = "cot", leak: bool = False) -> list[Message]:
    """Return the five messages of an episode that acts on ``decisions``: three turns, and two answers that find them right.

    ``style``: "cot" thinks before each call and computes the answer; "short" thinks but does not compute; "actions" shows
    the calls only, as frontier traces do. ``leak`` says the leak word at the start of every thought. The word `end` is
    not part of a turn's content: the tokenizer adds it.
    """
    work = [str(task.price)] if style == "cot" else []
    for operation, digit, result in formula_steps(decisions.formula, task.price, task.digits) if style == "cot" else []:
        work += [operation, str(digit), "=", str(result)]
    thoughts = [[f"d{decisions.department}"], [f"f{decisions.formula}", *work], [f"k{decisions.carrier}"]]
    turns = []
    for thought, call in zip(thoughts, decisions.calls, strict=True):
        thinking = [] if style == "actions" else ["think", *([LEAK_WORD] if leak else []), *thought, "."]
        turns.append({"role": "assistant", "content": " ".join([*thinking, "act", *call])})
    return [turns[0], tool_message(f"obs {task.price}"), turns[1], tool_message("obs ok"), turns[2]]


def tool_message(content: str) -> Message:
    return {"role": "tool", "content": content}
