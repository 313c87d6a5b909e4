"""Find leak phrases in what an assistant says, and words that it shares with the privileged information."""

import re
from collections.abc import Sequence

from pidistill.chat.messages import messages_text, privileged_text, reasoning_of
from pidistill.types import Message, Rollout


def assistant_text(turns: Sequence[Message]) -> str:
    """Return what the policy wrote, reasoning and tool calls included."""
    return "\n\n".join(filter(None, [turn_text(turn) for turn in turns if turn["role"] == "assistant"]))


def turn_text(turn: Message) -> str:
    """Return all text of a turn: reasoning that stands in a field of its own, content and tool calls."""
    return "\n\n".join(filter(None, [reasoning_of(turn), messages_text([turn])]))


def says_leak_phrase(rollout: Rollout, phrases: Sequence[str]) -> bool:
    """Return True if an assistant turn says one of the phrases as whole words, whatever the case."""
    return count_phrases(assistant_text(rollout.turns), phrases) > 0


def privileged_overlap(rollout: Rollout, n: int = 4) -> tuple[int, int]:
    """Return (word n-grams of the student's text that stand in the privileged text, all its n-grams)."""
    privileged = rollout.example.privileged
    if privileged is None:
        return 0, 0
    known, said = set(_ngrams(privileged_text(privileged), n)), _ngrams(assistant_text(rollout.turns), n)
    return sum(gram in known for gram in said), len(said)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


# Thai to Khmer, kana, CJK and Hangul: writing without spaces between words, or with particles joined to them.
_JOINED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
LETTER = rf"[^\W{_JOINED}]"
"""The pattern of a letter or digit that a word ends with: none of a script that joins its words."""


def whole_words(phrase: str) -> str:
    """Return the pattern of ``phrase`` as whole words; next to a script that joins its words, any place counts."""
    starts_joined, ends_joined = (re.match(rf"[{_JOINED}]", edge) for edge in (phrase[:1], phrase[-1:]))
    return ("" if starts_joined else rf"(?<!{LETTER})") + re.escape(phrase) + ("" if ends_joined else rf"(?!{LETTER})")


def count_phrases(text: str, phrases: Sequence[str]) -> int:
    """Count how often ``text`` says any of the phrases as whole words, whatever the case; phrases inside others count."""
    return sum(len(re.findall(whole_words(phrase), text, re.IGNORECASE)) for phrase in phrases)
