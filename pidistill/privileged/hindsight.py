"""Make privileged information of a sampled round: a sibling that succeeded, what the environment answered.

Each rollout's teacher prompt is written again, from its own example with the information found for it; the student's prompt and
the completion stay, id for id. A rollout for which nothing is found has no privileged information, and is counted. The
objective's `no_pi` says what becomes of it: by default SDPO, OPSD, SDAR and RLSD train it on its reward alone (`rl`), and with
PCSD, SDFT, OPSDUCLA and GKD it leaves the loss and the token count (`drop`).
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from pidistill.chat.calls import ACTION_TAGS, CALL_TEMPLATE, CallStyle
from pidistill.chat.messages import message_text, tool_call_text, transcript_text
from pidistill.chat.tool_calls import visible_text
from pidistill.distributed.run import Run
from pidistill.errors import InputError, attempt, bounded_repr, check_count
from pidistill.privileged.controls import problem_and_information
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import ChatTokenizer
from pidistill.types import Example, Message, Rollout

_log = logging.getLogger(__name__)

MAX_TEXT_CHARS = 200_000
_PLAIN_TEXT = "a a a a"
T = TypeVar("T")

TextOfTurns = Callable[[Example, Sequence[Message]], str | None]


class Transcript:
    """Write the turns as they were said, tool calls, results and other answers of the environment included."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> str:
        return transcript_text(turns)


@dataclass(frozen=True)
class SiblingToolCalls:
    """Write the tool calls that a sibling made, without its words and without results; None where it made none.

    Attributes:
        header: the line above them; "" for none.
        call_template, omit_tools, action_tags: see :class:`pidistill.chat.calls.CallStyle`.
    """

    header: str = "Tool calls of an attempt that solved this task, in order:"
    call_template: str = CALL_TEMPLATE
    omit_tools: Sequence[str] = ()
    action_tags: Sequence[str] = ACTION_TAGS

    def __call__(self, example: Example, turns: Sequence[Message]) -> str | None:
        style = CallStyle(self.call_template, self.omit_tools, self.action_tags)
        calls = style.calls(turns)
        return "\n".join(filter(None, [self.header, style.write(calls)])) if calls else None


@dataclass(frozen=True)
class ToolFeedback:
    """Write what tools answered in the rollout itself, each answer under the turn's calls; None where nothing is said.

    A call that could not be read is shown as it was written, without the reasoning before it.

    Attributes:
        contains: only answers with one of these texts, whatever the case; () for every answer.
        header: the line above them; "" for none.
    """

    contains: Sequence[str] = ("error",)
    header: str = "What the tools answered to your last attempt at this task:"

    def __post_init__(self) -> None:
        if isinstance(self.contains, str):
            raise InputError(f"hindsight.feedback.contains is the text {self.contains!r}; give a list of texts")

    def __call__(self, example: Example, turns: Sequence[Message]) -> str | None:
        lines, asked = [], ""
        for turn in turns:
            if turn["role"] == "assistant":
                asked = "\n".join(map(tool_call_text, turn.get("tool_calls") or [])) or visible_text(turn)
            elif turn["role"] == "tool" and self._tells(message_text(turn)):
                lines.append(f"{asked}\n-> {message_text(turn)}")
        return "\n".join(filter(None, [self.header, *lines])) if lines else None

    def _tells(self, answer: str) -> bool:
        return not self.contains or any(text.casefold() in answer.casefold() for text in self.contains)


@dataclass(frozen=True)
class Hindsight:
    """Choose what the teacher sees of a rollout's round (SDPO, arXiv 2601.20802).

    Attributes:
        sibling: writes a successful rollout of the same group, other than the rollout itself, for the teacher to see; None
            for no siblings. The next one in the group's order is taken.
        feedback: writes what the environment said about the rollout itself, None where it said nothing; None for no feedback.
        feedback_with_sibling: both, where both exist; else feedback only where no sibling succeeded.
        success_threshold: the reward from which a sibling counts as successful.
        feedback_threads: so many rollouts get their feedback at once, for a judge that answers over a network
            (:mod:`pidistill.privileged.judges`); None asks one after the other.
        errors: one text for each time that ``sibling`` or ``feedback`` raised, or wrote what is no text. It costs the rollout
            its privileged information and nothing else.
    """

    sibling: TextOfTurns | None
    feedback: TextOfTurns | None = None
    feedback_with_sibling: bool = False
    success_threshold: float = 1.0
    feedback_threads: int | None = None
    errors: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("hindsight.feedback_threads", self.feedback_threads, null="none")
        if self.sibling is None and self.feedback is None:
            raise InputError(
                "hindsight.sibling and hindsight.feedback are both null, so the teacher would see nothing; set one"
            )

    def texts(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """Return the privileged text of each rollout of whole groups; None where there is none."""
        siblings = self._siblings(rollouts, succeeded=True)
        asked = [i for i, text in enumerate(siblings) if self.feedback and (self.feedback_with_sibling or not text)]
        feedback = dict(zip(asked, self._feedback([rollouts[i] for i in asked]), strict=True))
        pairs = [(text, feedback.get(i)) for i, text in enumerate(siblings)]
        return ["\n\n".join(text for text in pair if text) or None for pair in pairs]

    def wrong_texts(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """Return a sibling that failed for each rollout that has one that succeeded; there is no wrong feedback."""
        pairs = zip(self._siblings(rollouts, succeeded=True), self._siblings(rollouts, succeeded=False), strict=True)
        return [wrong if right else None for right, wrong in pairs]

    def _siblings(self, rollouts: Sequence[Rollout], succeeded: bool) -> list[str | None]:
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(i)
        return [self._sibling(rollouts, i, groups[rollout.group], succeeded) for i, rollout in enumerate(rollouts)]

    def _sibling(self, rollouts: Sequence[Rollout], i: int, members: list[int], succeeded: bool) -> str | None:
        if self.sibling is None:
            return None
        place = members.index(i)
        others = [rollouts[j] for j in members[place + 1 :] + members[:place]]
        shown = next((r for r in others if (r.task_reward >= self.success_threshold) == succeeded), None)
        return self._ask("sibling", rollouts[i].example, shown.turns) if shown else None

    def _feedback(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        with ThreadPoolExecutor(self.feedback_threads) if self.feedback_threads else nullcontext() as threads:
            each = threads.map if threads else map
            return list(each(partial(self._ask, "feedback"), [r.example for r in rollouts], [r.turns for r in rollouts]))

    def _ask(self, name: str, example: Example, turns: Sequence[Message]) -> str | None:
        """Return what ``sibling`` or ``feedback`` writes; None where it fails, which ``errors`` then tells."""
        text, error = attempt(lambda: _check_text(getattr(self, name)(example, turns)))
        if error is not None:
            self.errors.append(f"hindsight.{name} failed for {example.id}: {bounded_repr(error, 500)}")
        return text


def _check_text(text: object) -> str | None:
    if text is not None and not isinstance(text, str):
        raise TypeError(f"it wrote {bounded_repr(text)}, not a text or None")
    if text is not None and len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"it wrote {len(text)} characters, more than {MAX_TEXT_CHARS}")
    if text is not None:
        text.encode()  # half a surrogate pair: no tokenizer takes it
    return text


def add_hindsight(
    hindsight: Hindsight,
    rollouts: Sequence[Rollout],
    privileged: PrivilegedPrompt,
    tokenizer: ChatTokenizer,
    run: Run,
    max_seq_len: int,
) -> dict[str, float]:
    """Write each rollout's teacher prompt again, in place; return counts over this rank's rollouts, to be summed.

    ``privileged`` says where the text goes, and its ``control`` applies: another group's text stands for another row's, and a
    sibling that failed is the wrong one. A text that does not fit into ``max_seq_len`` is left out and counted, and so is one
    that the chat template refuses where it takes another one.
    """
    failures, errors = getattr(hindsight.feedback, "failures", None), len(hindsight.errors)  # a judge counts its own failures
    find = hindsight.wrong_texts if privileged.control == "wrong" else hindsight.texts
    texts = run.once(lambda: find(rollouts))  # a judge may answer twice in two ways
    texts = _controlled(hindsight, privileged, rollouts, texts, tokenizer, run)
    too_long, build = 0, partial(privileged.build, tokenizer=tokenizer)
    for rollout, text in zip(rollouts, texts, strict=True):
        views = _write(build, replace(rollout.example, privileged=text), hindsight.errors)
        fits = views is not None and privileged.overflow(rollout.example, views) is None
        if not fits or len(replace(rollout, prompts=views.pair).sequence("teacher")[0]) > max_seq_len:
            too_long += views is not None
            text, views = None, build(replace(rollout.example, privileged=None))
        rollout.example, rollout.prompts = replace(rollout.example, privileged=text), views.pair
    counts = {
        "_with_pi": float(sum(r.prompts.has_privileged for r in rollouts)),
        "hindsight_too_long": float(too_long),
        "hindsight_failures": float(len(hindsight.errors) - errors),
    }
    if counts["hindsight_failures"]:
        _log.warning(
            "hindsight could not write the text of %d rollouts; the first: %s",
            len(hindsight.errors) - errors,
            hindsight.errors[errors],
        )
    if failures is not None:
        counts["hindsight_judge_failures"] = float(hindsight.feedback.failures - failures)
    return counts


def _write(make: Callable[[Example], T], row: Example, errors: list[str]) -> T | None:
    """Return what ``make`` makes of a row with its text; None, with an entry in ``errors``, where it refuses this text alone.

    Where it refuses a plain word in its place too, the config is wrong, and the error is raised.
    """
    try:
        return make(row)
    except InputError as error:
        make(replace(row, privileged=_PLAIN_TEXT if row.privileged else None))
        errors.append(f"the text for {row.id} cannot be shown: {bounded_repr(error, 500)}")
        return None


def _controlled(
    hindsight: Hindsight,
    privileged: PrivilegedPrompt,
    rollouts: Sequence[Rollout],
    texts: list[str | None],
    tokenizer: ChatTokenizer,
    run: Run,
) -> list[str | None]:
    """Return what the control shows in place of the texts that were found."""
    examples = [replace(rollout.example, privileged=text) for rollout, text in zip(rollouts, texts, strict=True)]
    if privileged.control == "shuffled":
        return _from_other_groups(rollouts, texts, texts, run)
    if privileged.control == "other_problem":
        shown = [problem_and_information(example) if example.privileged else None for example in examples]
        return _from_other_groups(rollouts, shown, [repr(example.messages) for example in examples], run)
    if privileged.control in (None, "wrong"):
        return texts
    control = partial(privileged.control_row, tokenizer=tokenizer)
    shown = [_write(control, example, hindsight.errors) if example.privileged else None for example in examples]
    return [None if example is None else example.privileged for example in shown]


def _from_other_groups(
    rollouts: Sequence[Rollout], texts: Sequence[str | None], keys: Sequence[str | None], run: Run
) -> list[str | None]:
    """Give every rollout that has a text the next one of another group and another key, in the order of groups over all ranks.

    Feedback has few words, and groups may share a text: a rollout for which no other one exists gets none.
    """
    mine = [(rollout.group, key, text) for rollout, key, text in zip(rollouts, keys, texts, strict=True) if text is not None]
    everyone = sorted(run.gather(mine), key=lambda item: item[0])

    def other(group: int, own: str | None) -> str | None:
        in_turn = [item for item in everyone if item[0] > group] + [item for item in everyone if item[0] < group]
        return next((text for _, key, text in in_turn if key != own), None)

    shown = zip(rollouts, keys, texts, strict=True)
    return [None if text is None else other(rollout.group, key) for rollout, key, text in shown]
