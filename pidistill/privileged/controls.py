"""Show the teacher something else than a row's own information: control arms that say how much of a gain is content.

    control          what stands in the place of the row's information         what a gain over it cannot come from
    none             nothing                                                   any text at all
    template         nothing; the teacher's own chat template stays            the text, as against its mode (thinking on)
    shuffled         another row's information                                 having *some* information
    other_problem    another row's problem with its information                seeing *some* worked problem (2608.09228)
    wrong            information of the same form, with a wrong value          the form
    length_matched   a filler of as many tokens                                a longer prompt

The student's prompt is the same, id for id, in all of them.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pidistill.chat.messages import messages_text, privileged_text
from pidistill.errors import InputError, bounded_repr
from pidistill.types import Example

CONTROLS = (None, "none", "template", "shuffled", "other_problem", "wrong", "length_matched")
OF_ALL_ROWS = ("shuffled", "other_problem")

WRONG_KEY = "privileged_wrong"
"""Where a row has the information that `privileged.control: wrong` shows: a column, or a field that its builder made."""


def shuffle_privileged(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the examples with every privileged information moved to another row, and to none that has the same one."""
    givers = pair_rows(examples, [repr(example.privileged) for example in examples], seed, "shuffled")
    return [
        replace(example, privileged=examples[givers[i]].privileged) if i in givers else example
        for i, example in enumerate(examples)
    ]


def show_other_problems(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the examples with another row's problem and information in place of their own; never one with their prompt."""
    givers = pair_rows(examples, [repr(example.messages) for example in examples], seed, "other_problem")
    return [
        replace(example, privileged=problem_and_information(examples[givers[i]])) if i in givers else example
        for i, example in enumerate(examples)
    ]


def problem_and_information(example: Example) -> str:
    """Return the words of the example's problem, its system text left out, and below them its privileged information."""
    problem = messages_text([message for message in example.messages if message["role"] != "system"])
    return f"{problem}\n\n{privileged_text(example.privileged)}"


def pair_rows(examples: Sequence[Example], keys: Sequence[str], seed: int, control: str) -> dict[int, int]:
    """Return, for each row that has privileged information, the row that gives it another one, of another key.

    Rows are sorted into groups of equal keys, groups and members in random order, and everything moves on by the size of the
    largest group. The result depends only on the examples and ``seed``.
    """
    rows = [i for i, example in enumerate(examples) if example.privileged]
    if not rows:
        return {}
    rng = random.Random(seed)
    rng.shuffle(rows)
    own = {i: keys[i] for i in rows}
    largest = max(Counter(own.values()).values())
    if 2 * largest > len(rows):
        same = "one" if control == "shuffled" else "prompt"
        raise InputError(
            f"privileged.control: {control} cannot pair the rows: {largest} of the {len(rows)} with privileged information "
            f"have the same {same}, so some row would keep its own; use more varied rows or privileged.control: none"
        )
    first_seen = {key: position for position, key in reversed(list(enumerate(own.values())))}
    rows.sort(key=lambda i: first_seen[own[i]])  # stable: members stay in random order
    return dict(zip(rows, rows[largest:] + rows[:largest], strict=True))


def show_wrong(example: Example) -> Example:
    """Return the example with the wrong information that its row brings."""
    wrong = example.data.get(WRONG_KEY)
    if not wrong:
        raise InputError(
            f"{example.id} has no {WRONG_KEY}, the information of the same form with a wrong value that privileged.control: "
            f"wrong shows to the teacher; give the rows a column {WRONG_KEY}, or choose another privileged.control"
        )
    if not isinstance(wrong, str) and not (isinstance(wrong, list) and all(isinstance(message, Mapping) for message in wrong)):
        raise InputError(
            f"{example.id}: {WRONG_KEY} is {bounded_repr(wrong)}; privileged.control: wrong shows one text or a list of "
            "messages, as privileged information is: write it so"
        )
    return replace(example, privileged=wrong)


def match_length(example: Example, filler: str, prompt_tokens: Callable[[Example], int]) -> Example:
    """Return the example with ``filler`` repeated in place of its information, for a teacher's prompt of as many tokens.

    Args:
        prompt_tokens: counts the tokens of an example's teacher prompt.
    """
    target, one = prompt_tokens(example), prompt_tokens(_filled(example, filler, 1))
    per_word = (prompt_tokens(_filled(example, filler, 33)) - one) / 32
    words = 1 + int((target - one) / max(per_word, 1.0))
    counts = range(words + 1, max(0, words - 3), -1)
    # Where a word with its space is two tokens, words without one make the rest.
    for count, extra in [(count, extra) for extra in range(4) for count in counts]:
        shown = _filled(example, filler, count, extra)
        if prompt_tokens(shown) == target:
            return shown
    raise InputError(
        f"{example.id}: no number of {filler!r} in place of the privileged information makes a teacher's prompt of {target:,} "
        "tokens, which privileged.control: length_matched needs; set privileged.filler to a word that is one token wherever it "
        "stands"
    )


def _filled(example: Example, filler: str, words: int, extra: int = 0) -> Example:
    return replace(example, privileged=" ".join([filler] * words) + filler * extra)
