"""Look for the reference anywhere in an answer, as whole words."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pidistill.chat.phrases import LETTER, whole_words
from pidistill.errors import InputError, bounded_repr
from pidistill.rewards.base import last_answer, reference_text
from pidistill.types import Example, Message

# A number with its sign, thousands and decimals: `7` is not said by "7.5", "17,000" or "-7".
_NUMBER = r"(?:(?<![\w)])[-−])?(?>\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|(?<![\w.)])\.\d+)"
_BEFORE, _AFTER = f"(?<!{LETTER})", f"(?!{LETTER})"
_UNSIGNED = r"(?<![^\w)][-−])(?<!\A[-−])"  # "-$5" does not say "$5"; "$3-$5" does


@dataclass(frozen=True)
class Contains:
    """Return 1.0 where the last assistant turn contains ``example.reference`` as whole words, else 0.0.

    Reasoning within ``<think>`` is no part of the answer. A number in the reference counts where the answer has that number
    whole, in whatever way it is written: "7" is said by "7.0" and not by "7.5", "17,000" or "-7", and "$5" not by "$5,000".
    Numbers of a name are compared as they are written, so that "v1.10" is not said by "v1.1", nor 192.168.0.1 by 192.168.0.10.
    Scripts without spaces between words have no whole words.

    An answer that lists many candidates passes too. ``unwanted_key`` names the texts that such a list would have; else keep
    ``sampler.max_new_tokens`` short, or add a length penalty.

    Attributes:
        casefold: upper and lower case are the same.
        unwanted_key: column of the row with a text, or a list of texts: an answer that says one of them gets 0.0. Where this is
            None, and in a row that has none there, nothing is unwanted.
    """

    casefold: bool = True
    unwanted_key: str | None = None

    def check_reference(self, example: Example) -> None:
        """Refuse an example that no answer or every answer satisfies."""
        wanted = reference_text(example).strip()
        if not wanted:
            raise InputError(f"{example.id}: the reference is empty, and every answer contains it; check dataset.answer_key")
        for text in self._unwanted(example):
            if self._says(wanted, text):
                raise InputError(
                    f"{example.id}: an answer that contains the reference {bounded_repr(wanted)} contains the unwanted "
                    f"{bounded_repr(text)} too, so that no answer is right; check the column {self.unwanted_key!r}"
                )

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        answer = last_answer(turns)
        said = self._says(answer, reference_text(example).strip())
        return float(said and not any(self._says(answer, text) for text in self._unwanted(example)))

    def _says(self, text: str, wanted: str) -> bool:
        text, wanted = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", wanted)
        pieces = re.split(f"({_NUMBER})", wanted)  # text and numbers in turn; text at both ends, which may be empty
        found = _find(pieces, text, re.IGNORECASE if self.casefold else 0)
        forms = [_written if _is_of_a_name(pieces, n) else _normal for n in range(1, len(pieces), 2)]
        values = _in_forms(forms, pieces[1::2])
        return any(_in_forms(forms, numbers) == values for numbers in {match.groups() for match in found})

    def _unwanted(self, example: Example) -> list[str]:
        """Return the texts that make an answer wrong."""
        if self.unwanted_key is None:
            return []
        if self.unwanted_key not in example.data:
            columns = ", ".join(map(str, example.data)) or "no further columns"
            raise InputError(
                f"{example.id} has no column {self.unwanted_key!r}, which the reward's unwanted_key names; it has {columns}; "
                "a row in which nothing is unwanted holds null or an empty list there"
            )
        found = example.data[self.unwanted_key]
        listed = list(found) if isinstance(found, list | tuple) else [] if found is None else [found]
        texts = [str(text).strip() if isinstance(text, str | int) else "" for text in listed]
        if not all(texts):
            raise InputError(
                f"{example.id}: the column {self.unwanted_key!r} holds {bounded_repr(found)}; give a text, a whole number, or "
                "a list of these"
            )
        return texts


def _find(pieces: Sequence[str], text: str, flags: int) -> Iterator[re.Match[str]]:
    """Return where ``text`` has the pieces as whole words, with any whole number in the place of each number, as groups."""
    first, last = pieces[0], pieces[-1]
    before = whole_words(first).removesuffix(_AFTER).removesuffix(re.escape(first)) if first else _BEFORE
    after = whole_words(last).removeprefix(_BEFORE).removeprefix(re.escape(last)) if last else _AFTER
    middle = "".join(f"({_NUMBER})" if n % 2 else re.escape(piece) for n, piece in enumerate(pieces))
    pattern = re.compile(before + (_UNSIGNED if re.fullmatch(r"[$€£¥]\s?", first) else "") + middle + after, flags)
    if first:
        return pattern.finditer(text)
    starts = (number.start() for number in re.finditer(_NUMBER, text))  # never within a number
    return filter(None, (pattern.match(text, start) for start in starts))


_CURRENCY = re.compile(rf"(?<!{LETTER})(?:Rs|[A-Z]{{3}})\Z")  # as in Rs500 and USD5.50


def _is_of_a_name(pieces: Sequence[str], n: int) -> bool:
    """Return whether the number ``pieces[n]`` belongs to a name, as in v1.10, 3.10rc1 and 192.168.0.1; a unit is no name."""
    before, after = pieces[n - 1], pieces[n + 1]
    is_in_chain = (before == "." and n > 1) or (after == "." and n + 2 < len(pieces))
    is_before_letters = re.fullmatch(f"{LETTER}+", after) is not None and n + 2 < len(pieces)  # and a number behind them
    is_behind_letters = re.search(rf"{LETTER}\Z", before) is not None and not _CURRENCY.search(before)
    return is_in_chain or is_before_letters or is_behind_letters


def _in_forms(forms: Sequence[Callable[[str], str]], numbers: Sequence[str]) -> list[str]:
    return [form(number) for form, number in zip(forms, numbers, strict=True)]


def _written(number: str) -> str:
    """Return a number as it is written, with one kind of minus and without the commas of thousands."""
    return number.replace("−", "-").replace(",", "")


def _normal(number: str) -> str:
    """Return a number in the one way of writing that all ways of its value share; leading zeros, as of a code, stay."""
    number = _written(number)
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return re.sub(r"^(-?)(?=\.)", r"\g<1>0", number)
