"""Find the lengths of prompts and completions in tokens: of a dataset's first rows, or as given on the command line."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from pidistill.commands.places import learns_demonstrations
from pidistill.config import build
from pidistill.data import demonstration
from pidistill.data.load import load_privileged
from pidistill.errors import InputError
from pidistill.tokenizers import as_chat_tokenizer
from pidistill.tokenizers.prefix import common_prefix_length


@dataclass(frozen=True)
class Lengths:
    """Hold the tokens of the prompts and of the longest completion; ``shared``: those with which both prompts begin."""

    student: int
    teacher: int
    shared: int
    completion: int


@dataclass(frozen=True)
class RowLengths:
    """Hold two lengths: ``mean`` decides the time, ``longest`` the memory; ``source`` says where they come from."""

    mean: Lengths
    longest: Lengths
    source: str


def rows_of(cfg: DictConfig, count: int) -> RowLengths:
    """Return the lengths of the first ``count`` rows, from the config's own tokenizer, dataset and privileged prompt."""
    tokenizer = as_chat_tokenizer(build(cfg.tokenizer))
    privileged = load_privileged(cfg, tokenizer)
    dataset = build(cfg.dataset)
    examples = privileged.apply_control([dataset[i] for i in range(min(count, len(dataset)))], tokenizer)
    views = [privileged.build(example, tokenizer) for example in examples]
    if not views:
        raise InputError("the dataset has no rows; check `dataset`, or give --prompt-tokens and --privileged-tokens")
    limit = None if learns_demonstrations(cfg) else cfg.sampler.max_new_tokens
    lengths = [
        Lengths(
            len(view.pair.student),
            len(view.pair.teacher),
            common_prefix_length(view.pair.student, view.pair.teacher),
            limit or len(demonstration(example, view.pair, tokenizer).completion),
        )
        for example, view in zip(examples, views, strict=True)
    ]
    said = "sampler.max_new_tokens for every completion, the most it may be" if limit else "the demonstrations' completions"
    return RowLengths(_each(statistics.fmean, lengths), _each(max, lengths), f"the first {len(lengths)} rows, and {said}")


def _each(statistic: Callable[[list[int]], float], lengths: Sequence[Lengths]) -> Lengths:
    """Return a statistic of each field, in whole tokens; what both views share is no longer than either."""
    columns = [round(statistic(list(column))) for column in zip(*map(dataclasses.astuple, lengths), strict=True)]
    student, teacher, shared, completion = columns
    return Lengths(student, teacher, min(shared, student, teacher), max(completion, 1))


def given_rows(cfg: DictConfig, prompt: int, privileged: int, completion: int | None) -> RowLengths:
    """Return lengths from the command line; nothing is shared where privileged information stands before the question."""
    said = "the lengths given"
    if completion is None:
        if learns_demonstrations(cfg):
            raise InputError("a supervised run samples nothing, so its completions have no limit; give --completion-tokens")
        completion, said = int(cfg.sampler.max_new_tokens), "the lengths given, and sampler.max_new_tokens for completions"
    at_end = (cfg.get("privileged") or {}).get("placement") in ("user_end", "after_user")
    lengths = Lengths(prompt, prompt + privileged, prompt if at_end or not privileged else 0, completion)
    return RowLengths(lengths, lengths, said)
