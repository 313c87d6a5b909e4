"""Look for the reference anywhere in an answer, as whole words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pidistill.chat.phrases import LETTER, whole_words
from pidistill.errors import InputError
from pidistill.rewards.base import last_answer, reference_text
from pidistill.types import Example, Message

# A number with its sign, thousands and decimals: `7` is not said by "7.5", "17,000" or "-7".
_NUMBER = r"(?:(?<![\w)])[-−])?(?>\d+(?:,\d{3}(?!\d))*(?:\.\d+)?)"


@dataclass(frozen=True)
class Contains:
    """Return 1.0 where the last assistant turn contains ``example.reference`` as whole words, else 0.0.

    Reasoning within ``<think>`` is no part of the answer. A reference that is a number counts where the answer has that number
    whole: "7" is not said by "7.5", "17,000" or "-7". Scripts without spaces between words have no whole words.

    An answer that lists many candidates passes too; keep ``sampler.max_new_tokens`` short, or add a length penalty.

    Attributes:
        casefold: upper and lower case are the same.
    """

    casefold: bool = True

    def check_reference(self, example: Example) -> None:
        """Refuse an example whose reference is empty: every answer would contain it."""
        if not reference_text(example).strip():
            raise InputError(f"{example.id}: the reference is empty, and every answer contains it; check dataset.answer_key")

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        text, wanted = last_answer(turns), reference_text(example).strip()
        if re.fullmatch(_NUMBER, wanted):
            said = (found[0].replace("−", "-") for found in re.finditer(_NUMBER, text) if _is_alone(found))
            return float(wanted.replace("−", "-") in said)
        flags = re.IGNORECASE if self.casefold else 0
        return float(re.search(whole_words(wanted), text, flags) is not None)


def _is_alone(found: re.Match[str]) -> bool:
    """Return whether a number is no part of a word: "v1.5" and "7th" have none."""
    around = found.string[max(0, found.start() - 1) : found.start()] + found.string[found.end() : found.end() + 1]
    return not re.search(LETTER, around)
