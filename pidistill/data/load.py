"""From a recipe's config to its prompts, looked at before any weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from tokenizers import Tokenizer

from pidistill.config import build
from pidistill.data.prompts import Prompts, build_prompts
from pidistill.errors import InputError
from pidistill.models.empty import empty_model
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import ChatTokenizer, as_chat_tokenizer
from pidistill.training.keys import setting
from pidistill.types import Example, PromptPair


@dataclass(frozen=True)
class RecipeData:
    """Training and evaluation rows of a recipe, with what it needs to know about them.

    Attributes:
        dropped: training rows left out, by reason.
        eval_dropped: evaluation rows left out, by reason.
        rows_without_pi: training rows without privileged information, kept or not.
        leak_phrases: what counts as giving the privileged information away.
        success_threshold: the reward from which a rollout counts as a success.
        max_seq_len: the smaller of the tokenizer's and the model's limit, in tokens.
    """

    tokenizer: ChatTokenizer
    prompts: list[tuple[Example, PromptPair]]
    eval_prompts: list[tuple[Example, PromptPair]]
    dropped: dict[str, int]
    eval_dropped: dict[str, int]
    rows_without_pi: int
    leak_phrases: Sequence[str]
    success_threshold: float
    max_seq_len: int


def load_prompts(cfg: DictConfig, *, no_pi: str, samples: bool = True) -> RecipeData:
    """Build tokenizer, datasets and prompts of `dataset` and `eval_dataset`.

    ``samples``: completions of the training rows are sampled, so that a prompt must leave room for `sampler.max_new_tokens`.

    Raises:
        InputError: whatever is wrong with rows, lengths or vocabularies; nothing large has been loaded by then.
    """
    tokenizer = as_chat_tokenizer(build(cfg.tokenizer))
    max_seq_len = check_models(cfg, tokenizer)
    privileged = build(cfg.privileged) if cfg.get("privileged") else PrivilegedPrompt()
    room = int(cfg.sampler.max_new_tokens) if cfg.get("sampler") else 0
    limits = {"on_overflow": cfg.get("on_overflow"), "max_seq_len": max_seq_len}
    train = build_prompts(
        build(cfg.dataset), tokenizer, privileged, no_pi=no_pi, max_new_tokens=room if samples else 0, **limits
    )
    evaluation = Prompts([], {}, 0)
    if cfg.get("eval_dataset"):
        evaluation = build_prompts(build(cfg.eval_dataset), tokenizer, privileged, no_pi="rl", max_new_tokens=room, **limits)
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
    )


def check_models(cfg: DictConfig, tokenizer: ChatTokenizer) -> int:
    """The length limit; refused if the tokenizer has ids that a model lacks, or the teacher another tokenizer."""
    vocabulary, max_seq_len = _inspect(cfg.model)
    if tokenizer.vocab_size > vocabulary:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids but the model's vocabulary is {vocabulary:,}; they are of "
            "different families: check `tokenizer` and `model`"
        )
    limit = min(max_seq_len, tokenizer.max_seq_len or max_seq_len)
    if cfg.get("teacher_model"):
        _check_teacher(cfg, tokenizer, limit)
    _check_same_tokenizer(cfg, tokenizer)
    return limit


def _check_teacher(cfg: DictConfig, tokenizer: ChatTokenizer, limit: int) -> None:
    """Rows that only pad one side's output are cropped by the scorer; ids of the tokenizer cannot be."""
    teacher_vocabulary, teacher_max = _inspect(cfg.teacher_model)
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
    """A divergence compares id with id: refused where `teacher_tokenizer`, or the teacher's tokenizer.json, gives others."""
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
    """(vocabulary, max_seq_len) of a model, built without weights."""
    model = empty_model(node)
    return model.tok_embeddings.num_embeddings, model.max_seq_len
