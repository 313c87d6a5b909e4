"""Privileged information that exists only once a round is sampled: a sibling that succeeded, what the environment answered.

Each rollout's teacher prompt is written anew, from its own example with the information found for it; the student's prompt and
the completion stay, id for id. A rollout for which nothing is found has no privileged information, and is counted: SDPO trains
it on its reward; with the other self-distillation objectives it gets weight 0 and stays in the denominator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pidistill.errors import InputError
from pidistill.messages import message_text
from pidistill.privileged import PrivilegedPrompt
from pidistill.tokenizers import ChatTokenizer
from pidistill.training import Run
from pidistill.types import Example, Message, Rollout

TextOfTurns = Callable[[Example, Sequence[Message]], str | None]


def transcript(example: Example, turns: Sequence[Message]) -> str:
    """The turns as they were said, environment included."""
    return "\n".join(f"{turn['role']}: {message_text(turn)}" for turn in turns)


class Transcript:
    """:func:`transcript` as a component."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> str:
        return transcript(example, turns)


@dataclass(frozen=True)
class Hindsight:
    """What the teacher sees of a rollout's round (SDPO, arXiv 2601.20802).

    Attributes:
        sibling: writes a successful rollout of the same group, other than the rollout itself, for the teacher to see; None
            for no siblings. The next one in the group's order is taken.
        feedback: writes what the environment said about the rollout itself, None where it said nothing; None for no feedback.
        feedback_with_sibling: both, where both exist; else feedback only where no sibling succeeded.
        success_threshold: the reward from which a sibling counts as successful.
    """

    sibling: TextOfTurns | None
    feedback: TextOfTurns | None = None
    feedback_with_sibling: bool = False
    success_threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.sibling is None and self.feedback is None:
            raise InputError(
                "hindsight.sibling and hindsight.feedback are both null, so the teacher would see nothing; set one"
            )

    def texts(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """The privileged text of each rollout of whole groups; None where there is none."""
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(i)
        return [self._text(rollouts, i, groups[rollout.group]) for i, rollout in enumerate(rollouts)]

    def _text(self, rollouts: Sequence[Rollout], i: int, members: list[int]) -> str | None:
        own = rollouts[i]
        place = members.index(i)
        others = [rollouts[j] for j in members[place + 1 :] + members[:place]]
        succeeded = next((r for r in others if r.task_reward >= self.success_threshold), None)
        sibling = self.sibling(own.example, succeeded.turns) if self.sibling and succeeded else None
        feedback = (
            self.feedback(own.example, own.turns) if self.feedback and (self.feedback_with_sibling or not sibling) else None
        )
        return "\n\n".join(text for text in (sibling, feedback) if text) or None


def add_hindsight(
    hindsight: Hindsight,
    rollouts: Sequence[Rollout],
    privileged: PrivilegedPrompt,
    tokenizer: ChatTokenizer,
    run: Run,
    max_seq_len: int,
) -> dict[str, float]:
    """Write each rollout's teacher prompt anew, in place; returns counts over this rank's rollouts, to be summed.

    ``privileged`` says where the text goes, and its ``control`` applies: "none" shows nothing, "shuffled" the text of a
    rollout of another group. A text that does not fit into ``max_seq_len`` is left out and counted.
    """
    texts = hindsight.texts(rollouts)
    if privileged.control == "none":
        texts = [None] * len(rollouts)
    elif privileged.control == "shuffled":
        texts = _from_other_groups(rollouts, texts, run)
    too_long = 0
    for rollout, text in zip(rollouts, texts, strict=True):
        views = privileged.build(replace(rollout.example, privileged=text), tokenizer)
        fits = privileged.overflow(rollout.example, views) is None
        if not fits or len(views.pair.teacher) + len(rollout.completion) > max_seq_len:
            too_long += 1
            text, views = None, privileged.build(replace(rollout.example, privileged=None), tokenizer)
        rollout.example, rollout.prompts = replace(rollout.example, privileged=text), views.pair
    return {"_with_pi": float(sum(r.prompts.has_privileged for r in rollouts)), "hindsight_too_long": float(too_long)}


def _from_other_groups(rollouts: Sequence[Rollout], texts: Sequence[str | None], run: Run) -> list[str | None]:
    """To every rollout that has a text, the next other text of another group, in the order of groups over all ranks.

    Feedback has few words, and groups may share a text: a rollout for which no other one exists gets none.
    """
    mine = [(rollout.group, text) for rollout, text in zip(rollouts, texts, strict=True) if text is not None]
    everyone = sorted(run.gather(mine), key=lambda item: item[0])

    def other(group: int, own: str) -> str | None:
        in_turn = [item for item in everyone if item[0] > group] + [item for item in everyone if item[0] < group]
        return next((text for _, text in in_turn if text != own), None)

    return [None if text is None else other(rollout.group, text) for rollout, text in zip(rollouts, texts, strict=True)]
