"""Make examples into prompt pairs, and treat those that are too long or without privileged information."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pidistill.data.dataset import ExampleDataset
from pidistill.errors import InputError, check_choice
from pidistill.privileged.prompt import PrivilegedPrompt, PromptViews
from pidistill.tokenizers.base import ChatTokenizer
from pidistill.types import Example, PromptPair

NO_PI = ("rl", "distill", "drop", "error")


@dataclass(frozen=True)
class Prompts:
    """Hold what a recipe trains on."""

    prompts: list[tuple[Example, PromptPair]]  # the rows that are kept, in the dataset's order
    dropped: dict[str, int]  # rows left out, by reason: the dataset's own, rows_without_pi, privileged_ and prompt_too_long
    rows_without_pi: int  # rows without privileged information, kept or not


def build_prompts(
    dataset: ExampleDataset | Sequence[Example],
    tokenizer: ChatTokenizer,
    privileged: PrivilegedPrompt,
    *,
    max_new_tokens: int,
    no_pi: str = "rl",
    on_overflow: str | None = None,
    max_seq_len: int | None = None,
) -> Prompts:
    """Build both prompts of every example, under ``privileged``'s control.

    Args:
        max_new_tokens: room that a completion needs; the longer prompt and it must fit into ``max_seq_len``.
        max_seq_len: in tokens; None takes ``tokenizer.max_seq_len``.
        no_pi: rows without privileged information are kept ("rl", "distill": the objective weighs them), left out and
            counted ("drop") or refused ("error").
        on_overflow: "error" or "drop" for rows that are too long; None takes ``privileged.on_overflow``.
    """
    on_overflow = on_overflow or privileged.on_overflow
    check_choice("no_pi", no_pi, NO_PI)
    check_choice("on_overflow", on_overflow, ("error", "drop"))
    max_seq_len = tokenizer.max_seq_len if max_seq_len is None else max_seq_len
    examples = privileged.apply_control(list(dataset), tokenizer)
    rows_without_pi = sum(not privileged.teaches(example) for example in examples)
    check_no_pi(examples, no_pi, privileged)
    dropped = Counter(getattr(dataset, "dropped", {}))
    prompts = []
    for example in examples:
        if no_pi == "drop" and not privileged.teaches(example):
            dropped["rows_without_pi"] += 1
            continue
        views = privileged.build(example, tokenizer)
        too_long = row_overflow(example, views, privileged, max_new_tokens, max_seq_len)
        if too_long is None:
            prompts.append((example, views.pair))
        elif on_overflow == "error":
            raise InputError(too_long[1])
        else:
            dropped[too_long[0]] += 1
    if not prompts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "the dataset is empty"
        raise InputError(f"none of the {len(examples)} rows is left ({reasons}); check the dataset and its limits")
    return Prompts(prompts, dict(dropped), rows_without_pi)


def check_no_pi(examples: Sequence[Example], no_pi: str, privileged: PrivilegedPrompt) -> None:
    """Refuse rows without privileged information where ``no_pi`` is error, or where drop would leave none."""
    without = next((example for example in examples if not privileged.teaches(example)), None)
    control = " (privileged.control: none takes it from every row)" if privileged.control == "none" else ""
    if no_pi == "error" and without is not None:
        raise InputError(
            f"{without.id} has no privileged information{control} and no_pi is error; fill the row, or set objective.no_pi=drop"
        )
    if no_pi == "drop" and examples and not any(map(privileged.teaches, examples)):
        advice = "set objective.no_pi=distill for this control arm" if control else "check the dataset's privileged key"
        raise InputError(
            f"none of the {len(examples)} rows has privileged information{control}, so no_pi: drop leaves nothing; {advice}"
        )


def row_overflow(
    example: Example, views: PromptViews, privileged: PrivilegedPrompt, max_new_tokens: int, max_seq_len: int | None
) -> tuple[str, str] | None:
    """Return (reason to count, sentence) of what is too long; None where everything fits."""
    if (sentence := privileged.overflow(example, views)) is not None:
        return "privileged_too_long", sentence
    sentence = prompt_overflow(example, views, max_new_tokens, max_seq_len)
    return None if sentence is None else ("prompt_too_long", sentence)


def prompt_overflow(example: Example, views: PromptViews, max_new_tokens: int, max_seq_len: int | None) -> str | None:
    """Return the sentence that says by how much the longer prompt and a completion are too long; None where they fit."""
    student, teacher = len(views.pair.student), len(views.pair.teacher)
    longer = max(student, teacher)
    if max_seq_len is None or longer + max_new_tokens <= max_seq_len:
        return None
    if views.pair.has_privileged:
        own = teacher - views.privileged_tokens
        prompt = f"teacher prompt (question {own:,} + privileged {views.privileged_tokens:,} tokens)"
    else:
        prompt = f"prompt ({longer:,} tokens)"
    return (
        f"example {example.id}: {prompt} plus completion {max_new_tokens:,} exceeds max_seq_len {max_seq_len:,} by "
        f"{longer + max_new_tokens - max_seq_len:,}; raise `tokenizer.max_seq_len`, lower `sampler.max_new_tokens` or set "
        "`privileged.on_overflow: drop`"
    )
