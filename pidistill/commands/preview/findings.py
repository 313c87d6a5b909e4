"""Find what is probably not meant: privileged information in the student's view, and leak phrases in the prompts."""

import re
from collections.abc import Callable, Sequence

from pidistill.chat.messages import message_text, privileged_text
from pidistill.chat.phrases import count_phrases, whole_words
from pidistill.commands.preview.rows import Source
from pidistill.commands.preview.scan import Scan
from pidistill.types import Example


def findings(source: Source, scan: Scan) -> list[str]:
    """Return one sentence for each kind of finding, with how many of the scanned rows it concerns and the first of them."""
    students = [source.tokenizer.decode(view.pair.student) for view in scan.views]
    rows = list(zip(scan.examples, students, strict=True))
    found = [
        getattr(source.tokenizer, "stop_warning", None),
        _about(scan, rows, _in_students_view, "the student's prompt holds the privileged information as it stands"),
        *_leak_phrases(source, scan, rows),
    ]
    return [sentence for sentence in found if sentence]


def _leak_phrases(source: Source, scan: Scan, rows: Sequence[tuple[Example, str]]) -> list[str | None]:
    result = []
    for phrase in source.privileged.leak_phrases:
        in_information = f"the privileged information itself says the leak phrase {phrase!r}, which an answer may then repeat"
        in_prompt = f"the student's prompt says the leak phrase {phrase!r}, which an answer may repeat without any leak"
        result.append(_about(scan, rows, lambda e, _, p=phrase: count_phrases(private_text(e), [p]) > 0, in_information))
        result.append(_about(scan, rows, lambda _, text, p=phrase: count_phrases(text, [p]) > 0, in_prompt))
    return result


def _about(
    scan: Scan, rows: Sequence[tuple[Example, str]], concerned: Callable[[Example, str], bool], sentence: str
) -> str | None:
    ids = [example.id for example, student in rows if concerned(example, student)]
    return f"{len(ids)} of {scan.scanned} rows: {sentence} (first: {ids[0]})" if ids else None


def private_text(example: Example) -> str:
    return privileged_text(example.privileged)


def _in_students_view(example: Example, student: str) -> bool:
    """Return whether the prompt says the whole text, or that of one privileged message, as whole words.

    White space counts as one space.
    """
    given = example.privileged
    texts = [given] if isinstance(given, str) else [message_text(message) for message in given or []]
    prompt = " ".join(student.split())
    return any(_says(prompt, " ".join(text.split())) for text in texts)


def _says(text: str, words: str) -> bool:
    return bool(words) and re.search(whole_words(words), text) is not None
