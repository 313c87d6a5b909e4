"""The tiny world: a three-turn tool task on which every method of the package runs on a CPU in minutes.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pidistill.data.dataset import ExampleDataset
from pidistill.envs.base import EnvStep
from pidistill.errors import InputError
from pidistill.tokenizers.word import WordTokenizer
from pidistill.types import Example, Message

Slot = Literal["d", "f", "a", "k"]
Split = Literal["train", "validation", "test"]
Style = Literal["actions", "cot", "short"]

OPTIONS = 6  # departments, formulas and carriers to choose from
FEATURES = 12  # items, classes and cities that a request can name
FORMULAS = ("+*-", "-++", "*-+", "+--", "*+-", "-*+")  # applied left to right, mod 10, to the price and the three digits
SLOTS: tuple[Slot, ...] = ("d", "f", "a", "k")  # department, formula, answer, carrier: the order inside the brackets
LEAK_WORD = "hint"
MAX_COMPLETION_TOKENS = 50
WORLD_SEED = 1234
SPLIT_SEED = 7

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
    """The word tokenizer of :data:`VOCAB`: 85 ids, one per word, no ids around messages other than `<bos>` and `end`."""
    return WordTokenizer(VOCAB, pad="<pad>", bos="<bos>", end="end", max_seq_len=max_seq_len)


# ------------------------------------------------------------------------------------------------ tasks and hidden world


def formula_steps(formula: int, price: int, digits: Sequence[int]) -> list[tuple[str, int, int]]:
    """(operation, digit, result) of each of the three operations of a formula, left to right, mod 10."""
    steps, value = [], price
    for operation, digit in zip(FORMULAS[formula], digits, strict=True):
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[operation] % 10
        steps.append((operation, digit, value))
    return steps


@dataclass(frozen=True)
class Task:
    """One request (item, class, city, digits), the price behind it and the right decisions.

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
        """What another formula would give on this task's numbers."""
        return formula_steps(formula, self.price, self.digits)[-1][2]

    @property
    def triple(self) -> tuple[int, int, int]:
        return (self.item, self.class_, self.city)


@dataclass(frozen=True)
class Prior:
    """What a base model believes of one feature value: three options, the true one first, and their probabilities."""

    options: tuple[int, int, int]
    weights: tuple[float, float, float]

    def draw(self, rng: random.Random) -> int:
        return rng.choices(self.options, self.weights)[0]


class World:
    """The hidden conventions item→department, class→formula, city→carrier, and the base model's beliefs about them.

    Each convention maps 12 feature values onto 6 options, two values each. ``priors[slot][feature]`` holds the true option
    with probability ``true_option_prob`` and two others with 55% and 45% of the rest: a base that reads the features, and is
    wrong about them. 0.1 makes success without privileged information too rare for RL; 0.2 is the easier base.

    The draws follow the order that the numbers in the README were obtained with; another order is another world.
    """

    def __init__(self, seed: int = WORLD_SEED, true_option_prob: float = 0.1) -> None:
        if not 0.0 <= true_option_prob <= 1.0:
            raise InputError(f"true_option_prob is {true_option_prob}; it is a probability, between 0 and 1")
        self.seed = seed
        rng = random.Random(seed)
        self.departments, self.formulas, self.carriers = (_balanced_mapping(rng) for _ in range(3))
        self.priors: dict[str, list[Prior]] = {
            slot: [_prior(rng, true_option, true_option_prob) for true_option in mapping]
            for slot, mapping in (("d", self.departments), ("f", self.formulas), ("k", self.carriers))
        }

    def draw_task(self, rng: random.Random) -> Task:
        """A uniformly random request with the decisions that the conventions prescribe."""
        item, class_, city, digits, price = _draw_request(rng)
        return Task(item, class_, city, digits, price, self.departments[item], self.formulas[class_], self.carriers[city])


def _balanced_mapping(rng: random.Random) -> list[int]:
    mapping = [feature % OPTIONS for feature in range(FEATURES)]
    rng.shuffle(mapping)
    return mapping


def _prior(rng: random.Random, true_option: int, true_option_prob: float) -> Prior:
    others = rng.sample([option for option in range(OPTIONS) if option != true_option], 2)
    rest = 1.0 - true_option_prob
    return Prior((true_option, others[0], others[1]), (true_option_prob, 0.55 * rest, 0.45 * rest))


def _draw_request(rng: random.Random) -> tuple[int, int, int, tuple[int, int, int], int]:
    item, class_, city = (rng.randrange(FEATURES) for _ in range(3))
    a, b, c, price = (rng.randrange(10) for _ in range(4))
    return item, class_, city, (a, b, c), price


def make_split(
    world: World, n_train: int = 512, n_validation: int = 256, n_test: int = 256, seed: int = SPLIT_SEED
) -> dict[Split, list[Task]]:
    """Tasks of three splits that share no (item, class, city) triple.

    Of the 1,728 triples, shuffled, the first quarter (432) is the test split's, a tenth of the others (129) the validation
    split's, the rest (1,167) the training split's. Tasks are then drawn one after another, each going to the split that
    owns its triple until that split is full, so the test tasks depend on ``seed`` and ``n_test`` alone. Select
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
class Plan:
    """The decisions that an agent acts on, right or wrong."""

    department: int
    formula: int
    answer: int
    carrier: int

    @property
    def calls(self) -> list[list[str]]:
        """The words of the three calls, each as it stands after `act`."""
        return [
            ["look", f"d{self.department}"],
            [f"f{self.formula}", str(self.answer)],
            ["ship", f"k{self.carrier}"],
        ]


def expert_plan(task: Task) -> Plan:
    return Plan(task.department, task.formula, task.answer, task.carrier)


def request_message(task: Task) -> Message:
    digits = " ".join(str(digit) for digit in task.digits)
    return {"role": "user", "content": f"req i{task.item} c{task.class_} g{task.city} {digits} go"}


def privileged_text(task: Task, told: str) -> str:
    """The block `[ d2 f0 ? k3 ]`; ``told`` holds the letters of the slots that are told, e.g. ``"dfk"``."""
    words = {"d": f"d{task.department}", "f": f"f{task.formula}", "a": str(task.answer), "k": f"k{task.carrier}"}
    return " ".join(["[", *(words[slot] if slot in told else "?" for slot in SLOTS), "]"])


def trace(task: Task, plan: Plan, style: Style = "cot", leak: bool = False) -> list[Message]:
    """The five messages of an episode that acts on ``plan``: three assistant turns, two answers of a trusting environment.

    ``style``: "cot" thinks before each call and computes the answer; "short" thinks but does not compute; "actions" shows
    the calls only, as frontier traces do. ``leak`` says the leak word at the start of every thought. The word `end` is
    not part of a turn's content: the tokenizer adds it.
    """
    work = [str(task.price)] if style == "cot" else []
    for operation, digit, result in formula_steps(plan.formula, task.price, task.digits) if style == "cot" else []:
        work += [operation, str(digit), "=", str(result)]
    thoughts = [[f"d{plan.department}"], [f"f{plan.formula}", *work], [f"k{plan.carrier}"]]
    turns = []
    for thought, call in zip(thoughts, plan.calls, strict=True):
        thinking = [] if style == "actions" else ["think", *([LEAK_WORD] if leak else []), *thought, "."]
        turns.append({"role": "assistant", "content": " ".join([*thinking, "act", *call])})
    return [turns[0], _tool(f"obs {task.price}"), turns[1], _tool("obs ok"), turns[2]]


def _tool(content: str) -> Message:
    return {"role": "tool", "content": content}


# ------------------------------------------------------------------------------------------------ environment


@dataclass
class TinyWorldState:
    """One episode: how many calls were right (given ones included) and how many were tried again.

    ``failed_slot``: with ``feedback``, the slot that the last call got wrong; None after a right one.
    """

    example_id: str
    task: Task
    right_calls: int = 0
    retries: int = 0
    done: bool = False
    failed_slot: Slot | None = None


@dataclass(frozen=True)
class TinyWorldEnvironment:
    """Checks the call after the last `act` of each turn; the first wrong one that cannot be tried again ends the episode.

    An example with ``data["given_calls"]`` starts after that many right calls, which stand in its messages and earn nothing.

    Attributes:
        process_reward: 1/3 for every right call instead of 1 for the third.
        feedback: verifier feedback. The answer to a wrong call is then `fail` (no longer part of the context: the episode is
            over), and ``state.failed_slot`` names what was wrong; :func:`feedback_privileged` turns it into privileged
            information for the next attempt.
        retries: execution feedback (RLEF, arXiv 2410.02089): so many times per episode a wrong call is answered with `fail`,
            which here is part of the context, and may be made again. The reward stays the same.
    """

    process_reward: bool = False
    feedback: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise InputError(f"environment.retries is {self.retries}; give how many wrong calls per episode may be repeated")

    def reset(self, example: Example) -> TinyWorldState:
        task = example.data.get("task")
        if not isinstance(task, Task):
            raise InputError(
                f"{example.id}: data['task'] is {task!r}, not a tiny-world Task; "
                "use a dataset of pidistill.envs.tiny_world with this environment (key `dataset`)"
            )
        return TinyWorldState(example.id, task, right_calls=example.data.get("given_calls", 0))

    def step(self, state: TinyWorldState, turn: Message, *, truncated: bool) -> EnvStep:
        """Reward of a right call, else 0 and `fail` or the end; a truncated turn fails even if its call is complete."""
        if state.done:
            raise InputError(f"{state.example_id}: the episode ended after {state.right_calls} right calls; reset first")
        wrong = wrong_slot(state.task, state.right_calls, turn)
        if wrong is not None or truncated:
            state.done = truncated or state.retries == self.retries
            state.retries += not state.done
            state.failed_slot = wrong if self.feedback else None
            told = [_tool("fail")] if self.feedback or not state.done else []
            return EnvStep(told, 0.0, state.done, reward_parts=self._parts(0.0))
        state.failed_slot = None
        observation = [_tool(f"obs {state.task.price}"), _tool("obs ok"), None][state.right_calls]
        state.right_calls += 1
        state.done = observation is None
        reward = 1 / 3 if self.process_reward else float(state.done)
        return EnvStep([] if observation is None else [observation], reward, state.done, self._parts(reward))

    def _parts(self, reward: float) -> dict[str, float]:
        return {"right_calls_frac" if self.process_reward else "success": reward}


def wrong_slot(task: Task, turn_index: int, turn: Message) -> Slot | None:
    """The slot that the turn's call gets wrong; None if the call is right. No call at all is the turn's slot wrong."""
    expected = expert_plan(task).calls[turn_index]
    call = call_words(turn)
    if call == expected:
        return None
    if turn_index == 1:
        return "a" if call[:1] == expected[:1] else "f"
    return "d" if turn_index == 0 else "k"


def call_words(turn: Message) -> list[str]:
    """The words after the last `act` of an assistant turn; none without one."""
    words = str(turn.get("content") or "").split()
    return words[_last_index(words, "act") + 1 :] if "act" in words else []


def _last_index(words: Sequence[str], word: str) -> int:
    return len(words) - 1 - words[::-1].index(word)


def feedback_privileged(example: Example, turns: Sequence[Message]) -> str | None:
    """Privileged information from a verifier: the block with only the slot that the last call of the episode got wrong.

    `[ ? f0 ? ? ]` where the second call named another formula. None where the last call was right: a success (after
    retries, if the environment grants them), or an episode whose turns were all right. A turn cut off by the token limit has no
    call, so that its slot counts as wrong.
    """
    environment = TinyWorldEnvironment(feedback=True, retries=len(turns))
    state = environment.reset(example)
    for turn in turns:
        if turn["role"] == "assistant" and not state.done:
            environment.step(state, turn, truncated=False)
    return None if state.failed_slot is None else privileged_text(state.task, state.failed_slot)


# ------------------------------------------------------------------------------------------------ datasets


def tiny_world_dataset(
    split: Split,
    privileged: str = "dfk",
    max_rows: int | None = None,
    completion: Literal["actions", "cot"] | None = None,
    world_seed: int = WORLD_SEED,
    prefix_turns: Sequence[int] = (0,),
) -> ExampleDataset:
    """Tasks of the world with privileged information and, if asked for, expert demonstrations.

    Solution-prefix exploration (POPE, arXiv 2601.18779): ``prefix_turns`` other than 0 put the first turns of the expert's
    solution into the prompt, and the episode starts behind them, where a policy that could not find them can earn a reward.
    The paper appends a part of an oracle solution and an instruction to continue from it, and trains on such prompts mixed
    with unguided ones; oracle tokens are never targets. Here the prefix is the expert's calls with the environment's answers,
    and nothing instructs: the tiny world has no words for it, and a conversation under way asks for its next turn by itself.

    Args:
        split: "train" (512 tasks), "validation" (256, to select on) or "test" (256, to report); see :func:`make_split`.
        privileged: letters of the slots that are told (d department, f formula, a answer, k carrier): "dfak" all calls with
            the answer, "dfk" all calls, "f" the formula's name, "" a block of four `?`; or "none" for no block.
        max_rows: only the first tasks of the split.
        completion: the expert's trace as ``Example.completion``: "actions" or "cot" (full chain of thought).
        world_seed: another seed is a world with other conventions and, drawn by the same rules, other tasks.
        prefix_turns: each task becomes one row per entry, with so many of the expert's turns (0, 1 or 2) as given
            conversation at the end of ``messages``; ``completion`` is then the rest of the trace. [0, 1, 2] is a third of
            the rows each; an entry may be repeated to give it more weight.
    """
    if split not in ("train", "validation", "test"):
        raise InputError(f"dataset.split is {split!r}; the tiny world has train, validation and test")
    if privileged != "none" and (set(privileged) - set(SLOTS) or len(set(privileged)) < len(privileged)):
        raise InputError(f"dataset.privileged is {privileged!r}; give letters of 'dfak', each at most once, or 'none'")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"dataset.max_rows is {max_rows}; give at least 1, or null for all rows")
    if not prefix_turns or not set(prefix_turns) <= {0, 1, 2}:
        raise InputError(f"dataset.prefix_turns is {list(prefix_turns)}; give some of 0, 1 and 2, e.g. [0, 1, 2]")
    tasks = make_split(World(world_seed))[split][:max_rows]
    examples = [_example(f"tiny_world {split} row {row}", task, privileged, completion) for row, task in enumerate(tasks)]
    return ExampleDataset([_after_turns(example, given) for example in examples for given in prefix_turns])


def _example(row_id: str, task: Task, privileged: str, completion: Literal["actions", "cot"] | None) -> Example:
    return Example(
        id=row_id,
        messages=[request_message(task)],
        privileged=None if privileged == "none" else privileged_text(task, privileged),
        completion=None if completion is None else trace(task, expert_plan(task), completion),
        data={"task": task},
    )


def _after_turns(example: Example, given: int) -> Example:
    """The example with the expert's first ``given`` turns, and what the environment answers, already said."""
    if given == 0:
        return example
    task = example.data["task"]
    return replace(
        example,
        id=f"{example.id} after {given} turn{'s' * (given > 1)}",
        messages=[*example.messages, *trace(task, expert_plan(task), "actions")[: 2 * given]],
        completion=None if example.completion is None else example.completion[2 * given :],
        data={**example.data, "given_calls": given},
    )


@dataclass(frozen=True)
class BaseMixture:
    """What the base model is trained on, as probabilities; each belongs to one decision of :func:`base_row`."""

    privileged: float = 0.5  # the row has a block
    show: float = 0.8  # a slot of the block is told
    follow: float = 0.8  # a told slot is obeyed; otherwise the decision comes from the prior, as without a block
    leak: float = 0.1  # the row with a block says the leak word
    short: float = 0.1  # where the answer is told: it is copied instead of computed
    short_without_privileged: float = 0.05  # the answer is guessed instead of computed


def tiny_world_base_dataset(
    n: int,
    seed: int,
    true_option_prob: float = 0.1,
    leak_prob: float = BaseMixture.leak,
    world_seed: int = WORLD_SEED,
) -> ExampleDataset:
    """The rows that make the base model: it obeys a block it is shown and follows its wrong beliefs otherwise.

    The block, where a row has one, is already the system message and the trace is the completion, so supervised training
    on them needs no teacher view. The rows depend on the arguments alone, and the first rows of a longer dataset are the
    shorter dataset. 700 steps of 64 take ``n = 44800``.

    Args:
        true_option_prob: how often a decision without privileged information is the true one; more makes success without
            it more common (0.1: practically never).
        leak_prob: share of the rows with a block that say the leak word; 0 gives a base that never does.
        world_seed: the world whose conventions the beliefs are about; that of the tasks to be trained on.
    """
    if n < 1:
        raise InputError(f"dataset.n is {n}; give at least 1 row")
    mixture, world, rng = BaseMixture(leak=leak_prob), World(world_seed, true_option_prob), random.Random(seed)
    return ExampleDataset([base_row(f"tiny_world base seed {seed} row {row}", rng, world.priors, mixture) for row in range(n)])


def base_row(row_id: str, rng: random.Random, priors: Mapping[str, Sequence[Prior]], mixture: BaseMixture) -> Example:
    """One row of the base data. Its right decisions are random, not the world's: only the block can tell them."""
    item, class_, city, digits, price = _draw_request(rng)
    task = Task(item, class_, city, digits, price, *(rng.randrange(OPTIONS) for _ in range(3)))
    with_block = rng.random() < mixture.privileged
    block, completion = (_informed_episode if with_block else _guessing_episode)(task, rng, priors, mixture)
    return Example(id=row_id, messages=[*block, request_message(task)], completion=completion, data={"task": task})


def _informed_episode(
    task: Task, rng: random.Random, priors: Mapping[str, Sequence[Prior]], mixture: BaseMixture
) -> tuple[list[Message], list[Message]]:
    """(system message with the block, trace of an agent that mostly obeys it)"""
    told = "".join(slot for slot in SLOTS if rng.random() < mixture.show)

    def decide(slot: str, right: int, feature: int) -> int:
        return right if slot in told and rng.random() < mixture.follow else priors[slot][feature].draw(rng)

    department = decide("d", task.department, task.item)
    formula = decide("f", task.formula, task.class_)
    carrier = decide("k", task.carrier, task.city)
    short = "a" in told and rng.random() < mixture.short
    answer = task.answer if short else task.answer_with(formula)
    plan = Plan(department, formula, answer, carrier)
    completion = trace(task, plan, "short" if short else "cot", leak=rng.random() < mixture.leak)
    return [{"role": "system", "content": privileged_text(task, told)}], completion


def _guessing_episode(
    task: Task, rng: random.Random, priors: Mapping[str, Sequence[Prior]], mixture: BaseMixture
) -> tuple[list[Message], list[Message]]:
    """(no block, trace of an agent that follows its beliefs)"""
    short = rng.random() < mixture.short_without_privileged
    department = priors["d"][task.item].draw(rng)
    formula = priors["f"][task.class_].draw(rng)
    carrier = priors["k"][task.city].draw(rng)
    answer = rng.randrange(10) if short else task.answer_with(formula)
    return [], trace(task, Plan(department, formula, answer, carrier), "short" if short else "cot")


# ------------------------------------------------------------------------------------------------ hindsight


@dataclass(frozen=True)
class SiblingCalls:
    """Privileged information from a successful episode: the block with what its calls named (``hindsight.sibling``).

    Attributes:
        told: letters of the slots that are told, as in :func:`tiny_world_dataset`.
    """

    told: str = "dfk"

    def __call__(self, example: Example, turns: Sequence[Message]) -> str:
        words = {}
        said = [call_words(turn) for turn in turns if turn["role"] == "assistant"]
        for first, second in (call for call in said if len(call) == 2):  # where calls may be made again, some are malformed
            words |= {"look": {"d": second}, "ship": {"k": second}}.get(first, {"f": first, "a": second})
        return " ".join(["[", *(words[slot] if slot in self.told and slot in words else "?" for slot in SLOTS), "]"])


class VerifierFeedback:
    """:func:`feedback_privileged` as a component (``hindsight.feedback``)."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> str | None:
        return feedback_privileged(example, turns)
