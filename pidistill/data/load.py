"""Load the prompts of a recipe's config, and check them before any weights are loaded."""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer
from torchtune.utils import get_logger, log_rank_zero

from pidistill.components import resolve
from pidistill.config import COMPONENT, FUNCTION_KEYS, FUNCTIONS_KEYS, build
from pidistill.data.prompts import Prompts, build_prompts
from pidistill.data.routes import route_of
from pidistill.errors import InputError
from pidistill.models.empty import shared_empty_model
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.privileged.turn_templates import check_turn_templates
from pidistill.tokenizers import ChatTokenizer, as_chat_tokenizer
from pidistill.training.keys import setting
from pidistill.types import Example, PromptPair

_log = get_logger("INFO")


@dataclass(frozen=True)
class RecipeData:
    """Hold training and evaluation rows of a recipe, with what it needs to know about them."""

    tokenizer: ChatTokenizer
    prompts: list[tuple[Example, PromptPair]]
    eval_prompts: list[tuple[Example, PromptPair]]
    dropped: dict[str, int]  # training rows left out, by reason
    eval_dropped: dict[str, int]  # evaluation rows left out, by reason
    rows_without_pi: int  # training rows without privileged information, kept or not
    leak_phrases: Sequence[str]  # what counts as giving the privileged information away
    success_threshold: float  # the reward from which a rollout counts as a success
    max_seq_len: int  # the smaller of the tokenizer's and the model's limit, in tokens
    privileged: PrivilegedPrompt = field(default_factory=PrivilegedPrompt)  # with the teacher's own tokenizer, if it has one
    sampled_len: int | None = None  # tokens of the longest row that the sampler takes; None for ``max_seq_len``


def load_prompts(cfg: DictConfig, *, no_pi: str, samples: bool = True, judged: bool = True) -> RecipeData:
    """Build tokenizer, datasets and prompts of `dataset` and `eval_dataset`.

    ``samples``: completions of the training rows are sampled, so that a prompt must leave room for `sampler.max_new_tokens`.
    ``judged``: the environment's rewards judge these completions, so that they must be able to judge every row.
    """
    tokenizer = as_chat_tokenizer(build(cfg.tokenizer))
    max_seq_len = check_models(cfg, tokenizer)
    privileged = load_privileged(cfg, tokenizer)
    room = int(cfg.sampler.max_new_tokens) if cfg.get("sampler") else 0
    limits = {"on_overflow": cfg.get("on_overflow"), "max_seq_len": max_seq_len}
    sampler_limit = find_sampler_limit(cfg) if room else None
    dataset = build(cfg.dataset)
    train = build_prompts(dataset, tokenizer, privileged, no_pi=no_pi, max_new_tokens=room if samples else 0, **limits)
    train = _keep_sampled(train, sampler_limit if samples else None, cfg, privileged)
    _say_what_is_left_out("dataset", dataset, train)
    if _answers_turns(cfg):
        check_turn_templates(privileged, tokenizer, train.prompts[0][0])
    _warn_of_repeated_rows(cfg, len(train.prompts))
    _say_who_sampled([example for example, _ in train.prompts], privileged.control)
    if samples and judged:
        check_references(cfg.get("environment"), [example for example, _ in train.prompts])
    evaluation = Prompts([], {}, 0)
    if cfg.get("eval_dataset"):
        dataset = build(cfg.eval_dataset)
        evaluation = build_prompts(dataset, tokenizer, privileged, no_pi="rl", max_new_tokens=room, **limits)
        evaluation = _keep_sampled(evaluation, sampler_limit, cfg, privileged)
        _say_what_is_left_out("eval_dataset", dataset, evaluation)
        if said := trained_rows_sentence(train.prompts, evaluation.prompts):
            log_rank_zero(_log, said, level=logging.WARNING)
        check_references(cfg.get("environment"), [example for example, _ in evaluation.prompts])
    return RecipeData(
        tokenizer=tokenizer,
        prompts=train.prompts,
        eval_prompts=evaluation.prompts,
        dropped=train.dropped,
        eval_dropped=evaluation.dropped,
        rows_without_pi=train.rows_without_pi,
        leak_phrases=list(privileged.leak_phrases),
        success_threshold=float(setting(cfg, "eval_success_threshold")),
        max_seq_len=max_seq_len,
        privileged=privileged,
        sampled_len=None if sampler_limit is None else min(max_seq_len, sampler_limit[0]),
    )


def find_sampler_limit(cfg: DictConfig) -> tuple[int, str] | None:
    """Return the tokens of the longest row that the sampler itself takes, and what sets them; None where it has no limit.

    A sampler that has one says so by a static method ``find_length_limit(settings, model)``; the model has no weights.
    """
    name = cfg.sampler.get(COMPONENT)
    find = getattr(resolve(name), "find_length_limit", None) if name else None
    return None if find is None else find(cfg.sampler, shared_empty_model(cfg.model))


def _keep_sampled(found: Prompts, limit: tuple[int, str] | None, cfg: DictConfig, privileged: PrivilegedPrompt) -> Prompts:
    """Return the rows that fit into the sampler's own limit; the others are counted, or refused, as `on_overflow` says."""
    if limit is None:
        return found
    room = int(cfg.sampler.max_new_tokens)
    kept = [(row, pair) for row, pair in found.prompts if max(len(pair.student), len(pair.teacher)) + room <= limit[0]]
    too_long = len(found.prompts) - len(kept)
    if too_long and ((cfg.get("on_overflow") or privileged.on_overflow) == "error" or not kept):
        row, pair = max(found.prompts, key=lambda one: max(len(one[1].student), len(one[1].teacher)))
        longest = max(len(pair.student), len(pair.teacher))
        raise InputError(
            f"example {row.id}: the prompt ({longest:,} tokens) plus sampler.max_new_tokens {room:,} exceeds the {limit[0]:,} "
            f"tokens of {limit[1]} by {longest + room - limit[0]:,}, the most of {too_long:,} such rows among "
            f"{len(found.prompts):,}; raise that limit if it is a key, lower sampler.max_new_tokens or set `on_overflow: drop`"
        )
    dropped = Counter(found.dropped) + Counter({"prompt_too_long": too_long})
    return replace(found, prompts=kept, dropped=dict(dropped) if too_long else found.dropped)


def _say_what_is_left_out(part: str, rows: Iterable[Example], found: Prompts) -> None:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.dropped.items() if count)
    if reasons:
        first = _first_left_out(rows, [example.id for example, _ in found.prompts])
        said = f"`{part}` gives {len(found.prompts):,} rows; left out are: {reasons}"
        log_rank_zero(_log, said + (f"; the first is {first}" if first else ""))


def _first_left_out(rows: Iterable[Example], kept: Sequence[str]) -> str | None:
    """Return the id of the first row that is not among the ``kept`` ones, which have the order of the rows.

    None where all are kept: the dataset's builder left out rows of its source, and says only how many.
    """
    ids = iter(kept)
    return next((row.id for row in rows if row.id != next(ids, None)), None)


def _warn_of_repeated_rows(cfg: DictConfig, rows: int) -> None:
    """Warn where a round has more prompts than there are rows: a row's groups are then several, each with its own mean."""
    prompts = cfg.get("prompts_per_round")
    if prompts is not None and prompts > rows:
        log_rank_zero(
            _log,
            f"prompts_per_round={prompts} is more than the {rows:,} rows of `dataset`, so that every round has several groups "
            f"of the same row; set prompts_per_round={rows} and raise group_size, or add rows",
            level=logging.WARNING,
        )


def trained_rows_sentence(
    train: Iterable[tuple[Example, PromptPair]], evaluation: Sequence[tuple[Example, PromptPair]]
) -> str | None:
    """Return the warning about evaluation rows that are training rows, with how many there are; None without any.

    Rows count as the same where student prompt, reference and task are equal. The task is what the row's data hold as a
    dataclass, and all of the data where there is no reference.
    """
    asked = [_row_hash(example, pair) for example, pair in evaluation]
    trained = set(asked) & {_row_hash(example, pair) for example, pair in train}
    if not trained:
        return None
    return (
        f"{sum(one in trained for one in asked):,} of {len(asked):,} evaluation rows are training rows (the same prompt and "
        "reference), so that their success says nothing about other rows; choose another eval_dataset.split or source (a file "
        "is its whole split, whatever its name; a part of it is `train[90%:]`)"
    )


def _row_hash(example: Example, pair: PromptPair) -> int:
    tasks = [(key, part) for key, part in sorted(example.data.items()) if example.reference is None or is_dataclass(part)]
    return hash((tuple(pair.student), repr(example.reference), repr(tasks)))


def _say_who_sampled(examples: Sequence[Example], control: str | None) -> None:
    """Log which view of which checkpoint sampled the rows that `sample_distributed` wrote, and warn of another control."""
    told = [row.data["provenance"] for row in examples if isinstance(row.data.get("provenance"), Mapping)]
    sources = Counter(tuple(str(mark.get(key)) for key in ("sampled_by", "checkpoint", "control")) for mark in told)
    for (view, checkpoint, own), count in sources.items():
        said = f"{count} of {len(examples)} rows of `dataset` were sampled by the {view} view of {checkpoint}"
        other = own != str(control)
        if other:
            said += (
                f" with privileged.control={'null' if own == 'None' else own}, and this run has {control or 'null'}: what is "
                "learned is that arm's; sample the rows again, or set privileged.control to the same"
            )
        log_rank_zero(_log, said, level=logging.WARNING if other else logging.INFO)


def check_references(environment: Any, examples: Iterable[Example]) -> None:
    """Refuse an example whose reference the environment's rewards cannot judge; see :data:`pidistill.rewards.base.Reward`.

    Only the rewards of the config node ``environment`` are built, not the environment, which may start processes.
    """
    checks = reference_checks(environment)
    for example in examples:
        for check in checks:
            check(example)


def gives_privileged(environment: Any) -> bool:
    """Return whether a config node names, at any depth, an environment that gives privileged information with its answers."""
    return _some_component(environment, lambda component, _: bool(getattr(component, "gives_privileged", False)))


def gives_no_reward(environment: Any) -> bool:
    """Return whether a config node names, at any depth, an environment without a reward.

    That is one whose argument `reward` is null, typed or by its default, or one of the user's own that says
    ``gives_reward = False``.
    """

    def lacks(component: Any, node: Mapping[str, Any]) -> bool:
        parameter = inspect.signature(component).parameters.get("reward")
        given = node.get("reward", None if parameter is None or parameter.default is parameter.empty else parameter.default)
        return getattr(component, "gives_reward", True) is False or (parameter is not None and given is None)

    return _some_component(environment, lacks)


def _some_component(node: Any, test: Callable[[Any, Mapping[str, Any]], bool]) -> bool:
    """Return whether ``test`` holds for a component, and its own node, at any depth of a config node; rewards are left out."""
    node = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    if isinstance(node, list):
        return any(_some_component(part, test) for part in node)
    if not isinstance(node, Mapping):
        return False
    if node.get(COMPONENT) and test(resolve(node[COMPONENT]), node):
        return True
    return any(_some_component(part, test) for key, part in node.items() if key != "reward")


def _answers_turns(cfg: DictConfig) -> bool:
    """Return whether the config shows that episodes have several turns; False where only the environment itself knows."""
    turns = cfg.get("max_turns")
    return turns != 1 and (turns is not None or gives_privileged(cfg.get("environment")))


def told_later(cfg: DictConfig) -> bool:
    """Return whether the teacher's information comes with the rollouts, so that rows need none of their own."""
    return bool(cfg.get("hindsight")) or gives_privileged(cfg.get("environment"))


def reference_checks(environment: Any) -> list[Callable[[Example], None]]:
    """Return the ``check_reference`` of every reward and environment that a config node names, at any depth."""
    node = OmegaConf.to_container(environment, resolve=True) if isinstance(environment, DictConfig) else environment
    if isinstance(node, list):
        return [check for value in node for check in reference_checks(value)]
    if not isinstance(node, Mapping):
        return []
    if COMPONENT in node and hasattr(resolve(node[COMPONENT]), "check_reference"):
        return [build(node).check_reference]
    if {"key", "environments"} <= set(node):
        return [partial(_check_routed, node, {str(n): reference_checks(part) for n, part in node["environments"].items()})]
    return [check for key, value in node.items() for check in reference_checks(_as_component(key, value))]


def _as_component(key: str, value: Any) -> Any:
    """Return the node of a reward, or of checks, that a config names by its dotted path alone."""
    if key in FUNCTION_KEYS and isinstance(value, str):
        return {COMPONENT: value}
    if key in FUNCTIONS_KEYS and isinstance(value, Mapping):
        return {name: {COMPONENT: part} if isinstance(part, str) else part for name, part in value.items()}
    return value


def _check_routed(node: Mapping[str, Any], checks: Mapping[str, Sequence[Callable]], example: Example) -> None:
    """Ask the rewards of the environment that plays a row in a RoutedEnvironment, and refuse a row that none plays."""
    default = None if node.get("default") is None else str(node["default"])
    for check in checks[route_of(example, node["key"], checks, default, "environment")]:
        check(example)


def load_privileged(cfg: DictConfig, tokenizer: ChatTokenizer) -> PrivilegedPrompt:
    """Return the `privileged` of a config, with the tokenizer that `teacher_tokenizer` names for the teacher's view."""
    privileged = build(cfg.privileged) if cfg.get("privileged") else PrivilegedPrompt()
    if privileged.teacher_tokenizer is not None:
        raise InputError("privileged.teacher_tokenizer is not a key of a config; set the top-level key teacher_tokenizer")
    if cfg.get("teacher_tokenizer"):
        privileged = replace(privileged, teacher_tokenizer=as_chat_tokenizer(build(cfg.teacher_tokenizer)))
    privileged.teachers_tokenizer(tokenizer)  # a teacher_template_kwargs that the tokenizer cannot take
    return privileged


def check_models(cfg: DictConfig, tokenizer: ChatTokenizer) -> int:
    """Return the length limit; refuse a tokenizer with ids that a model lacks, and a teacher with another tokenizer."""
    vocabulary, max_seq_len = _inspect(cfg.model)
    if tokenizer.vocab_size > vocabulary:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids but the model's vocabulary has {vocabulary:,}; they belong to "
            "different families: check `tokenizer` and `model`"
        )
    limit = min(max_seq_len, tokenizer.max_seq_len or max_seq_len)
    for teacher in [cfg.get("teacher_model"), *(cfg.get("teacher_models") or {}).values()]:
        if teacher:
            _check_teacher(teacher, tokenizer, limit)
    _check_same_tokenizer(cfg, tokenizer)
    return limit


def _check_teacher(teacher: DictConfig, tokenizer: ChatTokenizer, limit: int) -> None:
    """Refuse a teacher that lacks ids or positions of the student's; outputs that are only padded are cropped by the scorer."""
    teacher_vocabulary, teacher_max = _inspect(teacher)
    if tokenizer.vocab_size > teacher_vocabulary:
        raise InputError(
            f"the teacher's vocabulary is {teacher_vocabulary:,} and the student's tokenizer has {tokenizer.vocab_size:,} ids; "
            "choose a `teacher_model` with the student's tokenizer"
        )
    if teacher_max < limit:
        raise InputError(
            f"the teacher takes {teacher_max:,} tokens and rows may have {limit:,}; lower tokenizer.max_seq_len, or raise "
            "teacher_model.max_seq_len"
        )


def _check_same_tokenizer(cfg: DictConfig, tokenizer: ChatTokenizer) -> None:
    """Refuse a `teacher_tokenizer`, or a teacher's tokenizer.json, with other ids: a divergence compares id with id."""
    if cfg.get("teacher_tokenizer"):
        teacher = as_chat_tokenizer(build(cfg.teacher_tokenizer))
        # What each id says is the one thing that every tokenizer tells.
        ours, theirs = ({i: t.decode([i]) for i in range(t.vocab_size)} for t in (tokenizer, teacher))
        _compare_vocabularies(ours, theirs, "teacher_tokenizer")
    theirs = _tokenizer_file(cfg.get("teacher_checkpointer"), "checkpoint_dir")
    ours = _tokenizer_file(cfg.tokenizer, "path") or _tokenizer_file(cfg.checkpointer, "checkpoint_dir")
    if theirs and ours and theirs.resolve() != ours.resolve():
        vocabularies = [Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in (ours, theirs)]
        _compare_vocabularies(*({i: token for token, i in v.items()} for v in vocabularies), str(theirs))


def _tokenizer_file(node: DictConfig | None, key: str) -> Path | None:
    path = Path(str((node or {}).get(key) or "")) / "tokenizer.json"
    return path if (node or {}).get(key) and path.is_file() else None


def _compare_vocabularies(ours: Mapping[int, str], theirs: Mapping[int, str], where: str) -> None:
    other = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if other:
        first = other[0]
        raise InputError(
            f"{where} is another tokenizer than the student's: {len(other):,} ids differ, the first is {first} "
            f"({theirs.get(first)!r} there, {ours.get(first)!r} here); a divergence compares id with id, so choose a teacher "
            "with the student's tokenizer"
        )


def _inspect(node: DictConfig) -> tuple[int, int]:
    """Return (vocabulary, max_seq_len) of a model, built without weights."""
    model = shared_empty_model(node)
    return model.tok_embeddings.num_embeddings, model.max_seq_len
