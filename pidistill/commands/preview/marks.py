"""Find where the privileged information stands in a decoded prompt, and where the ids of the two views differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pidistill.chat.messages import message_text
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt, PromptViews
from pidistill.tokenizers import ChatTokenizer
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.types import Example, Message

Span = tuple[int, int]  # [start, end)


@dataclass(frozen=True)
class Difference:
    """Hold where two prompts differ: the range of each between their common beginning and their common end."""

    student: Span
    teacher: Span


def difference(student: Sequence, teacher: Sequence) -> Difference:
    """Return where two prompts differ: empty ranges where both are the same."""
    start = common_prefix_length(student, teacher)
    end = common_prefix_length(student[start:][::-1], teacher[start:][::-1])
    return Difference((start, len(student) - end), (start, len(teacher) - end))


def privileged_spans(
    example: Example, views: PromptViews, privileged: PrivilegedPrompt, tokenizer: ChatTokenizer
) -> list[Span] | None:
    """Return where, in characters of the teacher's decoded prompt, the privileged block or messages' contents stand.

    Found by building the prompt once more with a word of its own in their place. None where that does not lead back to the
    prompt: the chat template changes the text that it is given.
    """
    if not views.pair.has_privileged:
        return []
    text = tokenizer.decode(views.pair.teacher)
    pieces, stand_ins, messages = _stand_ins(example, views, privileged, text)
    try:
        other = tokenizer.decode(privileged.teachers_tokenizer(tokenizer).encode_prompt(messages, example.tools))
    except InputError:  # a tokenizer that knows its own words only
        return _only_addition(pieces, text, tokenizer.decode(views.pair.student))
    spans, made = [], ""
    for piece, word in zip(pieces, stand_ins, strict=True):
        before, found, other = other.partition(word)
        if not found:
            return None
        made += before
        spans.append((len(made), len(made) + len(piece)))
        made += piece
    return spans if made + other == text else None


def _stand_ins(
    example: Example, views: PromptViews, privileged: PrivilegedPrompt, text: str
) -> tuple[list[str], list[str], list[Message]]:
    """Return (texts that only the teacher sees, a word for each, the teacher's messages with the words instead)."""
    words = _unused_words(text)
    if isinstance(example.privileged, list) and privileged.placement in ("before_user", "after_user"):
        given = [message for message in example.privileged if message_text(message)]
        stand_ins = dict(zip(map(id, given), words, strict=False))
        marked = [{**m, "content": stand_ins[id(m)]} if id(m) in stand_ins else m for m in example.privileged]
        messages = privileged.teacher_messages(replace(example, privileged=marked), views.student_messages)
        return [message_text(message) for message in given], list(stand_ins.values()), messages
    word = next(words)
    messages = replace(privileged, template="{privileged}").teacher_messages(
        replace(example, privileged=word), views.student_messages
    )
    return [privileged.block(example)], [word], messages


def _unused_words(text: str) -> Iterator[str]:
    return (word for word in (f"MARK{number}" for number in range(10**6, 10**9)) if word not in text)


def _only_addition(pieces: Sequence[str], teacher: str, student: str) -> list[Span] | None:
    """Return the one place of the one text without which the teacher's words are the student's."""
    if len(pieces) != 1:
        return None
    at = teacher.find(pieces[0])
    while at >= 0:
        end = at + len(pieces[0])
        if (teacher[:at] + " " + teacher[end:]).split() == student.split():
            return [(at, end)]
        at = teacher.find(pieces[0], at + 1)
    return None


def policy_spans(completion: Sequence[int], policy_mask: Sequence[bool], tokenizer: ChatTokenizer) -> list[Span]:
    """Return character ranges of the decoded completion that the policy produces."""
    edges = [i for i in range(1, len(completion)) if policy_mask[i] != policy_mask[i - 1]]
    spans = []
    for start, end in zip([0, *edges], [*edges, len(completion)], strict=True):
        if end > start and policy_mask[start]:
            spans.append((len(tokenizer.decode(completion[:start])), len(tokenizer.decode(completion[:end]))))
    return spans


def message_changes(student: Sequence[Message], teacher: Sequence[Message]) -> list[str]:
    """Return what the teacher's messages have more, in words; none where both are the same."""
    places = difference([*map(repr, student)], [*map(repr, teacher)])
    ours, theirs = student[slice(*places.student)], range(*places.teacher)
    longer = len(ours) == len(theirs)
    return [f"message {i} ({teacher[i]['role']}) {'is longer' if longer else 'is added'}" for i in theirs]
