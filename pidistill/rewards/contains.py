"""Look for the reference anywhere in an answer, as whole words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pidistill.errors import InputError
from pidistill.rewards.base import last_answer, reference_text
from pidistill.types import Example, Message


@dataclass(frozen=True)
class Contains:
    """Return 1.0 where the last assistant turn contains ``example.reference`` as whole words, else 0.0.

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
        flags = re.IGNORECASE if self.casefold else 0
        return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, flags) is not None)
