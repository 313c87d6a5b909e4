"""Compare an answer with the reference, character by character."""

from collections.abc import Sequence
from dataclasses import dataclass

from pidistill.errors import InputError
from pidistill.rewards.base import last_answer, reference_text
from pidistill.types import Example, Message


@dataclass(frozen=True)
class ExactMatch:
    """Return 1.0 where the text of the last assistant turn equals ``example.reference``, else 0.0.

    Attributes:
        strip: whitespace around both does not count.
        casefold: upper and lower case are the same.
    """

    strip: bool = True
    casefold: bool = False

    def check_reference(self, example: Example) -> None:
        """Refuse an example without a reference, which no answer equals, or with a blank one, which an empty answer equals."""
        if not reference_text(example).strip():
            raise InputError(f"{example.id}: the reference is empty, and an empty answer equals it; check dataset.answer_key")

    def __call__(self, example: Example, turns: Sequence[Message]) -> float:
        texts = (reference_text(example), str(example.reference))  # of a table's 7.0 both "7" and "7.0"
        return float(self._normal(last_answer(turns)) in map(self._normal, texts))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.casefold else text
