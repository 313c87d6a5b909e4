"""Refuse environments that answer turns where the teacher's own chat template would write the answer in another way.

Both views of a rollout share the ids of its observations, except where only the teacher is shown a text. A template that writes
an answer in another way (Qwen3 without thinking opens every turn with an empty thought) would therefore hold in the teacher's
prompt and in no later turn.
"""

from collections.abc import Sequence

from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.tokenizers.prefix import common_prefix_length
from pidistill.types import Example, Message


def find_turn_difference(
    privileged: PrivilegedPrompt,
    tokenizer: ChatTokenizer,
    example: Example,
    history: Sequence[Message],
    observations: Sequence[Message],
) -> InputError | None:
    """Return the error for observations that both templates write, each with other ids; None where the ids are equal."""
    teacher = privileged.teachers_tokenizer(tokenizer)
    if teacher is tokenizer:
        return None
    ours, theirs = (one.encode_observations(history, observations, example.tools) for one in (tokenizer, teacher))
    if ours == theirs:
        return None
    first = max(0, common_prefix_length(ours, theirs) - 3)
    shown = [tokenizer.decode(ids[first : first + 16]) for ids in (theirs, ours)]
    key = _keys(privileged)
    return InputError(
        f"{example.id}: the teacher's own chat template ({key}) writes the environment's answer to a turn as {shown[0]!r}, the "
        f"student's as {shown[1]!r}, and both views must share these tokens; remove {key}, or set max_turns=1"
    )


def check_turn_templates(privileged: PrivilegedPrompt, tokenizer: ChatTokenizer, example: Example) -> None:
    """Refuse a teacher's chat template that writes a user's answer to a turn of ``example`` in another way."""
    history, answers = [*example.messages, {"role": "assistant", "content": "a"}], [{"role": "user", "content": "b"}]
    try:
        tokenizer.encode_observations(history, answers, example.tools)
    except InputError:
        return  # the student's template takes no such answer; what the environment answers is compared when it comes
    try:
        error = find_turn_difference(privileged, tokenizer, example, history, answers)
    except InputError as cause:
        key = _keys(privileged)
        raise InputError(
            f"{example.id}: the teacher's own chat template ({key}) takes no answer of the environment to a turn ({cause}); "
            f"remove {key}, or set max_turns=1"
        ) from cause
    if error is not None:
        raise error


def _keys(privileged: PrivilegedPrompt) -> str:
    """Return the keys that give the teacher a chat template of its own."""
    own = {
        "privileged.teacher_template_kwargs": privileged.teacher_template_kwargs,
        "teacher_tokenizer": privileged.teacher_tokenizer,
    }
    return " and ".join(key for key, value in own.items() if value)
