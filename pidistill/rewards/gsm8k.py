"""Judge the final answers of grade-school mathematics: read them as numbers, and compare the numbers.

An answer is text of a model. It may be megabytes long, or such that a general parser needs days for it (nested braces, powers
of powers, `1E+999999`). So nothing is parsed or evaluated here: an answer of more than :data:`MAX_ANSWER_CHARS` is none, and a
shorter one is a number where regular expressions without nested repetition find one of a few written forms.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pidistill.errors import InputError, bounded_repr, check_choice
from pidistill.rewards.base import RewardWithParts, last_answer, reference_text
from pidistill.types import Example, Message

MAX_ANSWER_CHARS = 256  # of a final answer, with its unit and its markup
MAX_DIGITS = 64
MAX_MARKERS = 64  # `\boxed` or `####` of a text that are looked at, from the last one back
TOLERANCE = Fraction(1, 10**6)  # 0.333333 is a third

_FORMATS = ("any", "boxed", "hashes", "last_number")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SCALES = _words("""
    hundred hundreds thousand thousands million millions billion billions trillion trillions quadrillion lakh lakhs crore crores
    dozen dozens k mil mn bn tn percent half halves third thirds quarter quarters tenth tenths fourths fifths sixths sevenths
    eighths ninths elevenths twelfths hundredths thousandths squared cubed times plus minus divided over or not to
""")
_ORDINALS = _words("fourth fifth sixth seventh eighth ninth eleventh twelfth hundredth thousandth")
_NUMBERS = _words("""
    one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety
""")
_UNITS_FIRST = frozenset(("times", "percent", "quarters"))  # right behind the number these are what is counted
_SHORT_UNITS = frozenset("ghlmsL")  # "M" is a million


@dataclass(frozen=True)
class GSM8KReward:
    """Return 1.0 where the final answer of the last assistant turn is the number in ``example.reference``, else 0.0.

    An answer counts with its unit, a currency sign, bold or code marks. A calculation (``70+2``) and a number that a word
    scales (``72 million``, ``3 fifths``) do not count. Two successes are logged beside the reward, whatever ``format`` is, so
    that a wrong answer and a right one that is written in another way can be told apart:

        reward/success_strict        the answer stands where ``format`` says; with "last_number", where "any" says
        reward/success_last_number   the last number of the text is right, wherever it stands ("flexible extraction"); a
                                     fraction is one number, and the power of a unit (``km^2``) is none. A dash and a space
                                     before the number are a minus only behind one of ``= { ( [ $ : #``

    Attributes:
        format: where the final answer stands: "boxed" (in the last ``\\boxed{}`` that is not empty), "hashes" (after the last
            ``####`` with a digit on its line, to the end of the line; or on the line below a bare ``####``), "any" (boxed, else
            hashes) or "last_number" (the last number of the text). An answer anywhere else counts as none.
    """

    format: str = "any"

    def __post_init__(self) -> None:
        check_choice("reward.format", self.format, _FORMATS)

    def check_reference(self, example: Example) -> Fraction:
        """Return the reference as a number; refuse an example whose reference is none: no answer would ever be right."""
        gold = read_number(reference_text(example))
        if gold is None:
            raise InputError(
                f"{example.id}: the reference {bounded_repr(example.reference)} is not a number; use another reward, or check "
                "the dataset's answer_key"
            )
        return gold

    def __call__(self, example: Example, turns: Sequence[Message]) -> RewardWithParts:
        gold = self.check_reference(example)
        text = last_answer(turns)
        answers = {
            "success_strict": final_answer(text, "any" if self.format == "last_number" else self.format),
            "success_last_number": final_answer(text, "last_number"),
        }
        parts = {name: float(answer is not None and _is_equal(read_number(answer), gold)) for name, answer in answers.items()}
        return RewardWithParts(parts["success_last_number" if self.format == "last_number" else "success_strict"], parts)


def _is_equal(number: Fraction | None, gold: Fraction) -> bool:
    return number is not None and abs(number - gold) < TOLERANCE


# ------------------------------------------------------------------------------------------- where an answer stands


def final_answer(text: str, format: str = "any") -> str | None:
    """Return the final answer of a text, as it is written there; None where it has none, or one that is too long."""
    if format == "last_number":
        return _last_number(text)
    boxed = _last_boxed(text) if format != "hashes" else None
    return boxed if boxed is not None or format == "boxed" else _last_behind_hashes(text)


def _last_boxed(text: str) -> str | None:
    found = (behind.lstrip() for behind in _behind_markers(text, "\\boxed"))
    braces = next((rest for rest in found if rest.startswith("{") and not _EMPTY_BRACES.match(rest)), "")
    rest, depth = braces[: MAX_ANSWER_CHARS + 2], 0
    for end, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:end].strip()
    return None  # cut off before the closing brace, or too long


_EMPTY_BRACES = re.compile(r"\{\s*(?:\}|\Z)")


_HEADING = re.compile(r"[0-9]+[.)]\s+\S")  # of a numbered part, as in "#### 2. Add them up"


def _last_behind_hashes(text: str) -> str | None:
    for behind in _behind_markers(text, "####"):
        line = behind.partition("\n")[0].strip()
        if re.search("[0-9]", line) and not _HEADING.match(line):
            return line if len(line) <= MAX_ANSWER_CHARS else None
        below = (behind.strip().splitlines() or [""])[0].strip()
        if not line and read_number(below) is not None:
            return below
    return None


def _behind_markers(text: str, marker: str) -> Iterator[str]:
    """Yield the text that follows each marker, from the last one back, cut behind what an answer could fill."""
    end = len(text)
    for _ in range(MAX_MARKERS):
        end = text.rfind(marker, 0, end)
        if end < 0:
            return
        start = end + len(marker)
        yield text[start : start + 2 * MAX_ANSWER_CHARS]


def _last_number(text: str) -> str | None:
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    start = max(0, end - 4 * MAX_DIGITS)
    window = _UNIT_POWER.sub("", text[start : end + 1]).replace("{,}", ",").replace("\\!", "")
    end = max(window.rfind(digit) for digit in "0123456789") + 1
    closed = window[: end + window.startswith("}", end)]  # with the last brace of \frac{1}{2}
    found = _LAST_FRACTION.search(closed) or _LAST_NUMBER.search(window[:end])
    if found is None or (start > 0 and found.start() == 0):  # the number begins before the window
        return None
    return found[0].strip()


# ------------------------------------------------------------------------------------------- what a number is

_UNSIGNED = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_FRACTION = r"\\[dt]?frac\s?(?:\{\s?([-+−]?[0-9]+)\s?\}\s?\{\s?([-+−]?[0-9]+)\s?\}|([0-9])\s?([0-9]))|([0-9]+)\s?/\s?([0-9]+)"
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[-+]?[0-9]{1,2})|\s?(?:\\times|\\cdot|×)\s?10\s?\^\s?(?P<power>[-+−]?[0-9]|\{\s?[-+−]?[0-9]{1,2}\s?\}))"
)
_MIXED = rf"(?:(?P<whole>[0-9]+)(?:\s|(?=\\)))?(?P<fraction>{_FRACTION})"
_WRITTEN = re.compile(
    rf"(?P<sign>[-+−]?)\s?(?:(?P<number>{_UNSIGNED}){_POWER_OF_TEN}?|{_MIXED})\s?%?"
    r"(?P<unit>\s?(?:/\s?|\()?[A-Za-z]+(?:[ /-][A-Za-z]+){0,3}\)?)?\s?\.?",
    re.ASCII,
)
_SPACED_THOUSANDS = re.compile(r"[-+−]?\s?[1-9][0-9]{0,2}(?: [0-9]{3})+(?:\.[0-9]+)?\s?\.?")
# A dash and a space before a number are a minus behind these signs alone; elsewhere they begin an item, or part two texts.
_SIGN_AND_CURRENCY = r"(?:(?<![\w.)}\]])[-−]|(?<=[={(\[$:#])[ \t]*[-−]\s)?[$€£¥]?"
_LAST_NUMBER = re.compile(rf"{_SIGN_AND_CURRENCY}(?:{_UNSIGNED})\Z", re.ASCII)
_LAST_FRACTION = re.compile(rf"{_SIGN_AND_CURRENCY}(?<![\w.,/]){_MIXED}\Z", re.ASCII)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\}?\s?\^\{?[23](?![0-9])\}?")


def read_number(answer: str) -> Fraction | None:
    """Return the number that an answer writes, alone or followed by a unit; None where anything could change its value.

    The thousands may be separated by spaces where nothing follows the number (1 000), and a power of ten may stand behind it
    (1.2e3). A unit is one to four words. Words that scale the number ("million", "fifths", "M"), operators and further numbers
    are no unit; "times", "percent" and "quarters" are one right behind the number.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    plain = _without_markup(answer)
    found = _WRITTEN.fullmatch(plain.replace(" ", "") if _SPACED_THOUSANDS.fullmatch(plain) else plain)
    if found is None:
        return None
    if not _is_unit(re.findall(r"[A-Za-z]+", found["unit"] or "")):
        return None
    texts = (found["number"] or "", found["whole"] or "0", *re.findall(r"[0-9]+", found["fraction"] or ""))
    if any(len(text) > MAX_DIGITS for text in texts):
        return None
    value = _decimal(found) if found["number"] else _fraction(found)
    return -value if value is not None and found["sign"] in ("-", "−") else value


def _is_unit(words: Sequence[str]) -> bool:
    """Return whether words behind a number leave its value as it is; none of them do."""
    plain = [word.lower() for word in words]
    if plain and plain[0] in _UNITS_FIRST and plain[:2] != ["quarters", "of"]:
        words, plain = words[1:], plain[1:]
    if any(word in _SCALES for word in plain) or any(len(word) == 1 and word not in _SHORT_UNITS for word in words):
        return False
    if "and" in plain and (plain[0] == "and" or _NUMBERS.intersection(plain)):  # "5 feet and two inches"
        return False
    return not any(word in _ORDINALS and plain[n + 1 : n + 2] in ([], ["of"]) for n, word in enumerate(plain))


def _decimal(found: re.Match[str]) -> Fraction:
    power = (found["e"] or found["power"] or "0").strip("{} ").replace("−", "-")
    return Fraction(found["number"].replace(",", "")) * Fraction(10) ** int(power)


def _fraction(found: re.Match[str]) -> Fraction | None:
    """Return the value of a fraction with what stands before it: 5 1/2 is 5.5."""
    above, below = (int(digits.replace("−", "-")) for digits in found.groups()[_FIRST_OF_FRACTION:][:6] if digits)
    if below == 0 or (found["whole"] and (above < 0 or below < 0)):
        return None
    return int(found["whole"] or 0) + Fraction(above, below)


_FIRST_OF_FRACTION = _WRITTEN.groupindex["fraction"]
_DEGREES = re.compile(r"(?:°|\^\{?\\circ\}?)\s?(?:[CFK](?![A-Za-z])|\\(?:text|mathrm)\s?\{\s?[CFK]\s?\})?")
_STARS = re.compile(r"\*{1,3}+(?!\s?[0-9(.])|(?<![0-9)*])(?<![0-9)]\s)\*{1,3}+")  # of bold and italic, not those of 6*2


def _without_markup(answer: str) -> str:
    """Return the answer without the marks of LaTeX and Markdown that do not change a number."""
    plain = _DEGREES.sub(" degrees ", answer)
    plain = re.sub(r"\\\$|[`_$€£¥]|\\[!,;:]|\\[()\[\]]|\\(?:left|right|approx|displaystyle)(?![A-Za-z])", "", plain)
    plain = _STARS.sub("", plain)
    plain = plain.replace("{,}", ",").replace("\\%", "%").replace("\\ ", " ").replace("~", " ")
    plain = re.sub(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s?\{([^{}]*)\}", r" \1 ", plain)
    plain = re.sub(r"(?<=[A-Za-z])\s?(?:\^\{?[23]\}?|[²³])(?![0-9])", "", plain)  # squares and cubes of units
    plain = re.sub(r"\b(sq|cu|fl)\.", r"\1 ", plain, flags=re.IGNORECASE)
    plain = " ".join(plain.split())
    while len(plain) > 1 and plain[0] + plain[-1] in ("{}", "()"):
        plain = plain[1:-1].strip()
    return re.sub(r"^[A-Za-z]\s?=\s?", "", plain)
