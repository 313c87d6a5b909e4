"""Look for the reference anywhere in an answer, as whole words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pidistill.chat.phrases import LETTER, whole_words
from pidistill.errors import InputError, bounded_repr
from pidistill.rewards.base import last_answer, reference_text
from pidistill.types import Example, Message

# A number with its sign, thousands and decimals: `7` is not said by "7.5", "17,000" or "-7".
_NUMBER = r"(?:(?<![\w)])[-−])?(?>\d+(?:,\d{3}(?!\d))*(?:\.\d+)?)"


@dataclass(frozen=True)
class Contains:
    """Return 1.0 where the last assistant turn contains ``example.reference`` as whole words, else 0.0.

    Reasoning within ``<think>`` is no part of the answer. A reference that is a number counts where the answer has that number
    whole: "7" is not said by "7.5", "17,000" or "-7". Scripts without spaces between words have no whole words.

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
        if re.fullmatch(_NUMBER, wanted):
            said = (found[0].replace("−", "-") for found in re.finditer(_NUMBER, text) if _is_alone(found))
            return wanted.replace("−", "-") in said
        return re.search(whole_words(wanted), text, re.IGNORECASE if self.casefold else 0) is not None

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


def _is_alone(found: re.Match[str]) -> bool:
    """Return whether a number is no part of a word: "v1.5" and "7th" have none."""
    around = found.string[max(0, found.start() - 1) : found.start()] + found.string[found.end() : found.end() + 1]
    return not re.search(LETTER, around)
