"""Build a row of a dataset as the model will see it, and say what a run does with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from pidistill.commands.preview.marks import Difference, Span, difference, privileged_spans
from pidistill.config import build
from pidistill.data import ExampleDataset, demonstration
from pidistill.data.demonstrations import RECORDED, TooLong, row_completion
from pidistill.data.load import check_models, load_privileged, reference_checks, told_later
from pidistill.data.prompts import row_overflow
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt, PromptViews
from pidistill.tokenizers import ChatTokenizer, as_chat_tokenizer
from pidistill.tokenizers.chat_template import TemplateRefusal
from pidistill.tokenizers.rendering import TextLeftOut
from pidistill.training.compatibility import build_objective
from pidistill.training.start import seed_global_streams
from pidistill.types import Example, Rollout

# Kinds of refused rows.
LEFT_OUT = "text left out by the chat template"
REFUSED_BY_TEMPLATE = "refused by the chat template"
TOO_LONG = "too long"
NOT_LEARNED = "nothing to learn"
NO_REFERENCE = "reference that the reward cannot judge"


@dataclass(frozen=True)
class Source:
    """Hold what a recipe builds its prompts of and with."""

    examples: Sequence[Example]  # every row, after the privileged information's control
    dataset_dropped: dict[str, int]  # rows that the dataset's builder left out, by reason
    tokenizer: ChatTokenizer
    privileged: PrivilegedPrompt
    max_seq_len: int  # the smaller of the tokenizer's and the model's limit, in tokens
    room: int  # tokens that a prompt must leave for a completion; 0 where completions come with the rows
    no_pi: str  # what happens to rows without privileged information
    on_overflow: str  # what happens to rows that are too long
    demonstration_overflow: str | None  # what happens to demonstrations that are too long; None where the recipe reads none
    # Checks of a row's reference by the rewards of the environment.
    reference_checks: Sequence[Callable[[Example], None]] = ()
    takes_completions: bool = False  # the rows' own completions stand in place of samples, so that each row needs one
    recorded: bool = False  # these are the ids that were sampled, which every row holds


def source_of(cfg: DictConfig, supervised: bool = False, part: str = "dataset") -> Source:
    """Return tokenizer, rows and limits of a config, checked as the recipe does; no weights are read.

    Args:
        part: `dataset`, or `eval_dataset`, whose rows are sampled in every recipe and need no privileged information.
    """
    tokenizer = as_chat_tokenizer(build(cfg.tokenizer))
    max_seq_len = check_models(cfg, tokenizer)
    privileged = load_privileged(cfg, tokenizer)
    seed_global_streams(int(cfg.get("seed") or 0))  # a dataset that shuffles itself is the run's
    dataset = build(cfg[part])
    samples = not supervised or part == "eval_dataset"
    learned = part == "dataset" and (supervised or cfg.get("sft_weight"))
    takes_completions = part == "dataset" and _on_policy_frac(cfg) < 1.0
    examples = privileged.apply_control(list(dataset), tokenizer)
    return Source(
        examples=examples,
        dataset_dropped=dict(dataset.dropped) if isinstance(dataset, ExampleDataset) else {},
        tokenizer=tokenizer,
        privileged=privileged,
        max_seq_len=max_seq_len,
        room=int(cfg.sampler.max_new_tokens) if samples and cfg.get("sampler") else 0,
        no_pi=_no_pi(cfg) if part == "dataset" else "rl",
        on_overflow=cfg.get("on_overflow") or privileged.on_overflow,
        demonstration_overflow=(cfg.get("on_overflow") or "error") if learned else None,
        reference_checks=reference_checks(cfg.get("environment")) if samples and _is_judged(cfg, part) else (),
        takes_completions=takes_completions,
        recorded=takes_completions and all(RECORDED in example.data for example in examples),
    )


def _is_judged(cfg: DictConfig, part: str) -> bool:
    """Return whether rewards judge the rows: GKD with `lmbda: 0` samples nothing but its evaluation."""
    return part != "dataset" or _on_policy_frac(cfg) > 0.0


def _on_policy_frac(cfg: DictConfig) -> float:
    """Return the share of the rows that are answered by the policy; the others by the dataset's own completion."""
    return build_objective(cfg).on_policy_frac if cfg.get("objective") else 1.0


def _no_pi(cfg: DictConfig) -> str:
    """Return what happens to rows without privileged information, which may come with the rollouts."""
    if not cfg.get("objective") or told_later(cfg):
        return "rl"
    return build_objective(cfg).no_pi


# ------------------------------------------------------------------------------------------- one row


@dataclass(frozen=True)
class PreviewRow:
    """Hold one row as the model will see it."""

    example: Example
    views: PromptViews
    privileged_spans: list[Span] | None  # characters of the decoded teacher prompt; None where the template changes the text
    difference: Difference
    demonstration: Rollout | None  # the dataset's completion as ids
    no_demonstration: str | None  # why there is none though the row has a completion
    dropped: str | None  # the reason why the row is not trained on


def row_of(example: Example, source: Source) -> PreviewRow:
    views = source.privileged.build(example, source.tokenizer)
    given, why_not = None, None
    if example.completion:
        try:
            given = demonstration(example, views.pair, source.tokenizer)
        except InputError as error:
            why_not = str(error)
    too_long = row_overflow(example, views, source.privileged, source.room, source.max_seq_len)
    without = source.no_pi == "drop" and not source.privileged.teaches(example)
    return PreviewRow(
        example=example,
        views=views,
        privileged_spans=privileged_spans(example, views, source.privileged, source.tokenizer),
        difference=difference(views.pair.student, views.pair.teacher),
        demonstration=given,
        no_demonstration=why_not,
        dropped="rows_without_pi" if without else too_long and too_long[0],
    )


# ------------------------------------------------------------------------------------------- what a run does with it


@dataclass(frozen=True)
class Verdict:
    """Say what a run does with a row: it takes it, leaves it out, or stops."""

    reason: str | None = None  # why it does not take the row
    refused: str | None = None  # the sentence with which it stops
    demonstration: Rollout | None = None  # what is learned of the row, where the recipe reads it

    @property
    def left_out(self) -> bool:
        return self.reason is not None and self.refused is None


def judge_row(example: Example, views: PromptViews, source: Source) -> Verdict:
    """Check lengths, the rewards' reference and the demonstration of a row, in a run's order."""
    too_long = row_overflow(example, views, source.privileged, source.room, source.max_seq_len)
    if too_long is not None:
        return _too_long(*too_long, source.on_overflow)
    for check in source.reference_checks:
        try:
            check(example)
        except InputError as error:
            return Verdict(NO_REFERENCE, str(error))
    try:
        return Verdict(demonstration=_learned(example, views, source))
    except TooLong as error:
        on_overflow = "error" if source.takes_completions else source.demonstration_overflow
        return _too_long("demonstration_too_long", str(error), on_overflow)
    except InputError as error:
        return Verdict(kind_of(error, NOT_LEARNED), str(error))


def _learned(example: Example, views: PromptViews, source: Source) -> Rollout | None:
    """Return what is learned of the row's own completion; None where the recipe reads none."""
    if source.takes_completions:
        settings = {"recorded": source.recorded, "control": source.privileged.control}
        return row_completion(example, views.pair, source.tokenizer, max_seq_len=source.max_seq_len, **settings)
    if source.demonstration_overflow is None:
        return None
    return demonstration(example, views.pair, source.tokenizer, max_seq_len=source.max_seq_len)


def _too_long(reason: str, sentence: str, on_overflow: str) -> Verdict:
    return Verdict(TOO_LONG, sentence) if on_overflow == "error" else Verdict(reason)


def kind_of(error: BaseException, otherwise: str) -> str:
    """Return the kind of a refusal, looking at what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TextLeftOut):
            return LEFT_OUT
        if isinstance(cause, TemplateRefusal):
            return REFUSED_BY_TEMPLATE
        cause = cause.__cause__
    return otherwise
