"""Put privileged information into prompts: messages in, messages out.

The student view of a row is the row's own messages. The teacher view is the same messages with the privileged information
put into them before any template is rendered, so that they are the only difference between the two:

    placement      where                                          what a text becomes           what messages become
    system_end     end of the system message (made if missing)    the template's block          the block, with their text
    user_end       end of the last user message                   the template's block          the block, with their text
    before_user    before the last user message                   one message with the block    these messages, as they are
    after_user     right after the last user message              one message with the block    these messages, as they are

Where a chat template gives a row without a system message a default system text, that text is written out in the teacher's
view: a system message that carries the privileged information would otherwise replace it.

The teacher's prompt is rendered with the teacher's own template where there is one: `teacher_tokenizer` of the config, or
``teacher_template_kwargs`` (Qwen3's ``enable_thinking``, for example). Both tokenizers have the same ids, and the ids of the
completion are the same in both views.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pidistill.chat.messages import last_user_index, privileged_text, with_text
from pidistill.chat.templates import check_template
from pidistill.errors import InputError, check_choice
from pidistill.privileged.controls import (
    CONTROLS,
    OF_ALL_ROWS,
    match_length,
    show_other_problems,
    show_wrong,
    shuffle_privileged,
)
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.tokenizers.rendering import check_written
from pidistill.types import Example, Message, PromptPair

DEFAULT_TEMPLATE = """\
<privileged_information>
{privileged}
</privileged_information>
Only you can see the information above. Use it to get this task right, but never mention, quote or refer to it: think in the \
open, step by step, so that every step follows from the rest of the conversation and stands without it."""

DEFAULT_LEAK_PHRASES = (
    "privileged",
    "reference solution",
    "reference answer",
    "provided solution",
    "provided answer",
    "given solution",
    "given answer",
    "information above",
    "the hint",
)

PLACEMENTS = ("system_end", "user_end", "before_user", "after_user")


@dataclass(frozen=True)
class PromptViews:
    """Hold both views of one example, as messages and as ids."""

    student_messages: list[Message]
    teacher_messages: list[Message]
    pair: PromptPair
    privileged_tokens: int  # what the privileged information, with the block around it, adds to the teacher's prompt


@dataclass(frozen=True)
class PrivilegedPrompt:
    """Say how privileged information enters the teacher's prompt.

    Attributes:
        template: the block around it; ``{privileged}`` stands for the information, other braces are doubled (``{{``).
        placement: ``system_end``, ``user_end``, ``before_user`` or ``after_user``; see the table above.
        role: role of the message that ``before_user`` and ``after_user`` make of a text: "user" or "system".
        control: None for the row's own information; else what stands in its place, see :mod:`pidistill.privileged.controls`.
            Published studies find that useless information helps too, so that every result needs a control.
        control_seed: which rows "shuffled" and "other_problem" pair.
        filler: the word that "length_matched" repeats; one token, wherever it stands.
        max_privileged_length: more tokens than this (block included) is an overflow; None for no limit.
        on_overflow: "error" refuses a row whose privileged information or prompt is too long, "drop" leaves it out and counts
            it. Nothing is ever cut.
        leak_phrases: what a completion that gives the information away would say; counted in completions, case ignored.
        teacher_template_kwargs: variables of the chat template in the teacher's view, beside those of the tokenizer's own
            ``template_kwargs``, e.g. ``{"enable_thinking": True}`` where the student answers without thinking.
        teacher_tokenizer: renders the teacher's view, with ids that are the student's; None for the student's tokenizer. A
            config sets the top-level key `teacher_tokenizer`; see :func:`load_privileged`.
    """

    template: str = DEFAULT_TEMPLATE
    placement: str = "system_end"
    role: str = "user"
    control: str | None = None
    control_seed: int = 0
    filler: str = "."
    max_privileged_length: int | None = None
    on_overflow: str = "error"
    leak_phrases: Sequence[str] = DEFAULT_LEAK_PHRASES
    teacher_template_kwargs: Mapping[str, Any] | None = None
    teacher_tokenizer: ChatTokenizer | None = None

    def __post_init__(self) -> None:
        check_choice("privileged.placement", self.placement, PLACEMENTS)
        check_choice("privileged.role", self.role, ("user", "system"))
        check_choice("privileged.control", self.control, CONTROLS)
        check_choice("privileged.on_overflow", self.on_overflow, ("error", "drop"))
        check_template(self.template, "privileged.template", ("privileged",))
        if not self.filler or self.filler.split() != [self.filler]:
            raise InputError(f"privileged.filler is {self.filler!r}; give one word, without spaces")
        if self.max_privileged_length is not None and self.max_privileged_length < 1:
            raise InputError(
                f"privileged.max_privileged_length is {self.max_privileged_length}; give at least 1, or null for no limit; "
                "to show the teacher nothing, set privileged.control: none"
            )

    # ------------------------------------------------------------------------------------------- one example

    def encode(self, example: Example, tokenizer: ChatTokenizer) -> PromptPair:
        """Return the two prompts of one example, under this control; an overflow is an error."""
        if self.control in OF_ALL_ROWS:
            raise InputError(
                f"privileged.control: {self.control} pairs rows, so it needs them all; use pidistill.data.build_prompts"
            )
        views = self.build(self.apply_control([example], tokenizer)[0], tokenizer)
        overflow = self.overflow(example, views)
        if overflow:
            raise InputError(overflow)
        return views.pair

    def teachers_tokenizer(self, tokenizer: ChatTokenizer) -> ChatTokenizer:
        """Return what renders the teacher's view: ``tokenizer`` itself, or the teacher's own."""
        teacher = self.teacher_tokenizer or tokenizer
        if not self.teacher_template_kwargs:
            return teacher
        if not hasattr(teacher, "with_template_kwargs"):
            raise InputError(
                f"privileged.teacher_template_kwargs is set, and {type(teacher).__name__} has no chat template with variables; "
                "remove it, or use pidistill.tokenizers.HFChatTokenizer"
            )
        return teacher.with_template_kwargs(self.teacher_template_kwargs)

    def build(self, example: Example, tokenizer: ChatTokenizer) -> PromptViews:
        """Return both views with the example's own privileged information, whatever ``control`` says."""
        ids = _encode_view(example.messages, example, tokenizer)
        teacher = self.teachers_tokenizer(tokenizer)
        plain = ids if teacher is tokenizer else _encode_view(example.messages, example, teacher, "the teacher's view: ")
        if not example.privileged:
            pair = PromptPair(ids, plain, has_privileged=self.teaches(example))
            return PromptViews(example.messages, example.messages, pair, 0)
        messages = with_default_system(example, teacher)
        if messages is not example.messages and teacher.encode_prompt(messages, example.tools) != plain:
            raise InputError(
                f"{example.id}: the chat template's default system text, written out, gives another prompt than the template "
                "itself; give every row a system message"
            )
        shown = self.teacher_messages(example, messages)
        try:
            teacher_ids = self._encode_shown(shown, example, teacher)
        except InputError as error:
            raise InputError(self._refused(example, messages, teacher, error)) from error
        pair = PromptPair(ids, teacher_ids, has_privileged=True)
        return PromptViews(messages, shown, pair, len(teacher_ids) - len(plain))

    def _refused(self, example: Example, student: list[Message], tokenizer: ChatTokenizer, error: InputError) -> str:
        """Return the sentence for a teacher's view that the tokenizer does not take, with what it would take."""
        others = [replace(self, role="user"), *(replace(self, placement=placement) for placement in PLACEMENTS)]
        works = [other for other in others if other != self and other._is_taken(example, student, tokenizer)]
        if not works:
            return f"{example.id}: {error}"
        advice = [
            f"privileged.placement={other.placement}" if other.placement != self.placement else f"privileged.role={other.role}"
            for other in works
        ]
        role = f", role: {self.role}" if self.placement in ("before_user", "after_user") else ""
        used = f"privileged.placement: {self.placement}{role}"
        reason = " ".join(str(error.__cause__ or error).partition("; ")[0].split())
        return f"{example.id}: the chat template does not take {used} ({reason}); set {' or '.join(advice)}"

    def _is_taken(self, example: Example, student: list[Message], tokenizer: ChatTokenizer) -> bool:
        try:
            self._encode_shown(self.teacher_messages(example, student), example, tokenizer)
        except InputError:
            return False
        return True

    def _encode_shown(self, messages: list[Message], example: Example, tokenizer: ChatTokenizer) -> list[int]:
        """Return the ids of the teacher's prompt; refuse one that leaves out reasoning of privileged messages, too."""
        ids = _encode_whole(messages, example, tokenizer)
        if self.placement in ("before_user", "after_user"):
            check_written(tokenizer.decode(ids), self._extra_messages(example), None, reasoning=True)
        return ids

    def teacher_messages(self, example: Example, messages: list[Message]) -> list[Message]:
        """Return ``messages`` with the example's privileged information in its place."""
        if self.placement == "system_end":
            has_system = messages and messages[0]["role"] == "system"
            head = messages[0] if has_system else {"role": "system", "content": ""}
            return [with_text(head, self.block(example)), *messages[1 if has_system else 0 :]]
        user = last_user_index(messages)
        if user is None:
            raise InputError(
                f"{example.id} has no user message, which privileged.placement: {self.placement} needs; "
                "set privileged.placement: system_end"
            )
        if self.placement == "user_end":
            return [*messages[:user], with_text(messages[user], self.block(example)), *messages[user + 1 :]]
        at = user if self.placement == "before_user" else user + 1
        return [*messages[:at], *self._extra_messages(example), *messages[at:]]

    def overflow(self, example: Example, views: PromptViews) -> str | None:
        """Return the sentence that says by how much the privileged information is too long; None where it fits."""
        limit = self.max_privileged_length
        if limit is None or views.privileged_tokens <= limit:
            return None
        return (
            f"{example.id}: privileged information of {views.privileged_tokens:,} tokens (its block included) exceeds "
            f"privileged.max_privileged_length {limit:,} by {views.privileged_tokens - limit:,}; raise it, shorten what the "
            "dataset gives, or set `privileged.on_overflow: drop`"
        )

    def block(self, example: Example) -> str:
        """Return the template with the example's privileged information in it, as text."""
        return self.template.format(privileged=privileged_text(example.privileged))

    def _extra_messages(self, example: Example) -> list[Message]:
        if isinstance(example.privileged, str):
            return [{"role": self.role, "content": self.block(example)}]
        extra = list(example.privileged or [])
        if self.placement == "after_user" and extra[-1]["role"] == "assistant":
            raise InputError(
                f"{example.id}: the privileged messages end with an assistant turn, and the one to be sampled would follow it; "
                "set privileged.placement: before_user, or system_end or user_end to give them as text"
            )
        return extra

    def show_at_turn(self, example: Example, encode: Callable[[str], list[int]]) -> list[int] | None:
        """Return the ids of an observation with the information of its turn at the end; None where the control shows nothing.

        Args:
            example: the row with the turn's information as its own.
            encode: returns the ids of the observation with a text at its end.
        """
        if self.control in ("none", "template"):
            return None
        self.check_turns(example.id)
        if self.control == "length_matched":
            example = match_length(example, self.filler, lambda shown: len(encode(self.block(shown))))
        return encode(self.block(example))

    def check_turns(self, where: str) -> None:
        """Refuse a control that cannot take the place of what an environment gives with its answers."""
        if self.control in ("wrong", *OF_ALL_ROWS):
            raise InputError(
                f"{where}: the environment gives privileged information with its answers, and privileged.control="
                f"{self.control} pairs rows, not turns; set privileged.control to none or length_matched"
            )

    # ------------------------------------------------------------------------------------------- a whole dataset

    def apply_control(self, examples: Sequence[Example], tokenizer: ChatTokenizer) -> list[Example]:
        """Return the examples with what the control shows the teacher in place of their own privileged information.

        Args:
            tokenizer: counts the tokens that "length_matched" matches; only that and "template" need it.
        """
        if self.control is None:
            return list(examples)
        if self.control == "shuffled":
            return shuffle_privileged(examples, self.control_seed)
        if self.control == "other_problem":
            return show_other_problems(examples, self.control_seed)
        if self.control == "template" and self.teachers_tokenizer(tokenizer) is tokenizer:
            raise InputError(
                "privileged.control: template gives the teacher no information but another chat template than the student's, "
                "and the config sets none; set privileged.teacher_template_kwargs or teacher_tokenizer, or privileged.control: "
                "none"
            )
        return [self.control_row(example, tokenizer) if example.privileged else example for example in examples]

    def control_row(self, example: Example, tokenizer: ChatTokenizer) -> Example:
        """Return an example that has privileged information under a control that looks at no other row."""
        if self.control == "wrong":
            return show_wrong(example)
        if self.control == "length_matched":
            return match_length(example, self.filler, lambda shown: len(self.build(shown, tokenizer).pair.teacher))
        return replace(example, privileged="" if self.control == "template" else None)

    def teaches(self, example: Example) -> bool:
        """Return whether the teacher's view differs from the student's by what it is shown, or by its template alone."""
        return bool(example.privileged) or (self.control == "template" and example.privileged is not None)


def _encode_view(messages: list[Message], example: Example, tokenizer: ChatTokenizer, view: str = "") -> list[int]:
    """Return the checked ids of a view; the sentence names the example where the template refuses it."""
    try:
        return _encode_whole(messages, example, tokenizer)
    except InputError as error:
        raise InputError(f"{example.id}: {view}{error}") from error


def _encode_whole(messages: list[Message], example: Example, tokenizer: ChatTokenizer) -> list[int]:
    """Return the ids of a prompt; raises InputError where the template leaves out a message or a tool."""
    ids = tokenizer.encode_prompt(messages, example.tools)
    check_written(tokenizer.decode(ids), messages, None, tools=example.tools)
    return ids


def with_default_system(example: Example, tokenizer: ChatTokenizer) -> list[Message]:
    """Return the example's messages with the template's default system text written out; the same list where there is none."""
    if not example.messages or example.messages[0]["role"] == "system":
        return example.messages
    default = tokenizer.default_system(example.tools)
    return example.messages if default is None else [{"role": "system", "content": default}, *example.messages]
