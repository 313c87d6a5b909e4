"""Make rollouts of a dataset's own completions, without sampling: supervised fine-tuning trains on them."""

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from omegaconf import DictConfig
from torchtune.utils import log_rank_zero

from pidistill.chat.calls import has_malformed_call
from pidistill.chat.messages import message_text
from pidistill.data.load import RecipeData
from pidistill.errors import InputError, bounded_repr
from pidistill.tokenizers import ChatTokenizer
from pidistill.tokenizers.rendering import Piece, encode_completion
from pidistill.types import Example, Message, PromptPair, Rollout

_log = logging.getLogger(__name__)


class TooLong(InputError):
    """Mark a row that is too long, which `on_overflow: drop` may leave out."""


def build_demonstrations(
    prompts: Sequence[tuple[Example, PromptPair]], tokenizer: ChatTokenizer, *, max_seq_len: int, on_overflow: str | None
) -> tuple[list[Rollout], int]:
    """Return all rows as demonstrations, and how many were left out as too long (``on_overflow`` "drop"; else an error)."""
    rollouts, dropped = [], 0
    for example, pair in prompts:
        try:
            rollouts.append(demonstration(example, pair, tokenizer, max_seq_len=max_seq_len))
        except TooLong:
            if on_overflow != "drop":
                raise
            dropped += 1
    if not rollouts:
        raise InputError(f"all {dropped} demonstrations are longer than max_seq_len {max_seq_len:,}; raise it")
    if dropped:
        log_rank_zero(_log, f"{len(rollouts):,} demonstrations fit into max_seq_len {max_seq_len:,}; {dropped:,} are left out")
    _warn_about_earlier_turns(rollouts, tokenizer)
    _warn_about_malformed_calls(rollouts, tokenizer)
    return rollouts, dropped


def earlier_turns_differ(rollout: Rollout, tokenizer: ChatTokenizer) -> bool:
    """Return whether a server would show the turns before the last one in another form than the demonstration holds them.

    A demonstration grows as a sampled episode does: every turn stays as it was learned. A server renders the conversation
    again for the last turn, and some templates then write earlier turns differently (Qwen3 without its empty thoughts).
    """
    turns = [i for i, message in enumerate(rollout.turns) if message["role"] == "assistant"]
    if len(turns) < 2:
        return False
    example = rollout.example
    served = tokenizer.encode_prompt([*example.messages, *rollout.turns[: turns[-1]]], example.tools)
    held = rollout.prompts.student + rollout.completion
    return served != held[: len(served)]


def _warn_about_earlier_turns(rollouts: Sequence[Rollout], tokenizer: ChatTokenizer) -> None:
    differ = [rollout.example.id for rollout in rollouts if earlier_turns_differ(rollout, tokenizer)]
    if differ:
        told = (
            f"{len(differ)} of {len(rollouts)} demonstrations hold turns before the last one in another form than a server "
            f"shows (first: {differ[0]}): the chat template rewrites them once the conversation continues; to train on what is "
            "served, make one row of each turn, with the turns before it in the prompt"
        )
        log_rank_zero(_log, told, level=logging.WARNING)


def _warn_about_malformed_calls(rollouts: Sequence[Rollout], tokenizer: ChatTokenizer | None) -> None:
    found = [(rollout.example.id, error) for rollout in rollouts if (error := _learned_error(rollout, tokenizer)) is not None]
    if found:
        told = (
            f"{len(found)} of {len(rollouts)} demonstrations teach a malformed call, as written (first: {found[0][0]}), where "
            f'{found[0][1]}: the model learns to write such calls; correct them, give these turns "weight": 0, or leave the '
            "rows out"
        )
        log_rank_zero(_log, told, level=logging.WARNING)


def _learned_error(rollout: Rollout, tokenizer: ChatTokenizer | None) -> str | None:
    """Return what is wrong with a call that is learned, also as the tokenizer, if any, reads it; None where nothing is.

    The tokenizer reads no row without tools: what looks like a call there may be a text about calls.
    """
    if any(map(_calls_without_object, rollout.turns)):
        return "its arguments are no JSON object"
    if tokenizer is None or not rollout.example.tools:
        return None
    errors = (turn.get("tool_call_error") for turn in _read_learned_turns(rollout, tokenizer))
    return next((" ".join(error.split())[:200] for error in errors if error), None)


def _read_learned_turns(rollout: Rollout, tokenizer: ChatTokenizer) -> Iterator[Message]:
    """Yield what the tokenizer reads in the ids of each learned turn, as it reads a sampled one."""
    read_after = getattr(tokenizer, "parse_turn_after", None)
    places = iter([place for place, is_learned in enumerate(rollout.policy_mask) if is_learned])
    for count in filter(None, rollout.turn_policy_tokens):
        turn = list(itertools.islice(places, count))
        ids, tools = [rollout.completion[place] for place in turn], rollout.example.tools
        before = [*rollout.prompts.student, *rollout.completion[: turn[0]]]
        yield read_after(before, ids, tools) if read_after else tokenizer.parse_turn(ids, tools)


def _calls_without_object(message: Message) -> bool:
    """Return whether a message that is learned calls a tool with arguments that are not an object."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0 and has_malformed_call(message)


def sft_demonstrations(cfg: DictConfig, data: RecipeData) -> list[Rollout]:
    """Return what `sft_weight` trains on beside the rollouts: the dataset's own completions; none where it is 0."""
    if not cfg.get("sft_weight"):
        return []
    limits = {"max_seq_len": data.max_seq_len, "on_overflow": cfg.get("on_overflow")}
    return build_demonstrations(data.prompts, data.tokenizer, **limits)[0]


def row_completions(data: RecipeData, temperature: float = 1.0) -> list[Rollout]:
    """Return the completion of every row, in the rows' order, in place of samples; both views must fit the length limit.

    Each row has one, so `on_overflow` leaves none of them out. ``temperature``: that of the run, which recorded log-probs must
    have to be comparable.
    """
    settings = {"max_seq_len": data.max_seq_len, "temperature": temperature, "control": data.privileged.control}
    settings["recorded"] = all(RECORDED in example.data for example, _ in data.prompts)
    rollouts = [row_completion(example, pair, data.tokenizer, **settings) for example, pair in data.prompts]
    _warn_about_earlier_turns(rollouts, data.tokenizer)
    _warn_about_malformed_calls(rollouts, None if settings["recorded"] else data.tokenizer)  # a sample may go wrong
    return rollouts


def row_completion(
    example: Example,
    pair: PromptPair,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    recorded: bool,
    temperature: float = 1.0,
    control: str | None = None,
) -> Rollout:
    """Return the completion of one row as :func:`row_completions` does; ``recorded`` takes the ids that were sampled.

    Raises:
        TooLong: a view does not fit into ``max_seq_len`` with the completion.
        InputError: the row has no completion to learn from, or its record is not whole.
    """
    rollout = demonstration(example, pair, tokenizer)
    if recorded:
        _check_recorded_text(rollout, tokenizer)
        rollout = _under_control(recorded_completion(rollout, tokenizer.vocab_size, temperature), control)
    for view in ("student", "teacher"):
        length = len(rollout.sequence(view)[0])
        if length > max_seq_len:
            raise TooLong(
                f"{example.id}: {view} prompt plus the dataset's completion have {length:,} tokens, more than max_seq_len "
                f"{max_seq_len:,}; raise tokenizer.max_seq_len and the model's, or leave the row out"
            )
    return rollout


RECORDED = "sampled"
"""The field of a row that holds the ids and log-probs with which its completion was sampled."""


def _check_recorded_text(rollout: Rollout, tokenizer: ChatTokenizer) -> None:
    """Refuse recorded ids that say, with this tokenizer, nothing of what the row's completion says."""
    record = rollout.example.data[RECORDED]
    ids = list(record["ids"]) if isinstance(record, Mapping) and "ids" in record else []
    texts = [message_text(turn) for turn in rollout.turns if turn["role"] == "assistant"]
    said = [piece.strip() for text in texts for piece in re.split("</?think>", text) if piece.strip()]  # the prompt may open it
    if not said or not all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids):
        return  # nothing to compare, or refused below
    decoded = tokenizer.decode(ids)
    if not any(text in decoded for text in said):
        raise InputError(
            f"{rollout.example.id}: the ids of its `{RECORDED}` say {bounded_repr(decoded, 60)} where its completion says "
            f"{bounded_repr(said[0], 60)}; it was sampled with another tokenizer: set that one, or sample it again"
        )


def recorded_completion(rollout: Rollout, vocab_size: int, temperature: float = 1.0) -> Rollout:
    """Return the rollout with the ids that were sampled in place of those of its text, and their recorded log-probs.

    The log-probs become ``trainer_logprobs``: those of the weights that sampled, with which ratios are made. Where they are of
    another temperature, or of what top_p or top_k left, no ratio to them is right, and they are left out.

    Raises:
        InputError: the row's record is not whole, or of another tokenizer.
    """
    record, where = rollout.example.data[RECORDED], rollout.example.id
    if not isinstance(record, Mapping) or not {"ids", "policy", "logprobs"} <= set(record):
        raise InputError(f"{where}: its `{RECORDED}` must have ids, policy and logprobs; write it with selections.All")
    ids, policy, logprobs = list(record["ids"]), [bool(own) for own in record["policy"]], list(record["logprobs"])
    if len(ids) != len(policy) or len(logprobs) != sum(policy) or not logprobs:
        raise InputError(
            f"{where}: its `{RECORDED}` has {len(ids)} ids, {len(policy)} marks and {len(logprobs)} log-probs for "
            f"{sum(policy)} policy tokens; they do not belong together"
        )
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids) or not all(x <= 1e-6 for x in logprobs):
        raise InputError(
            f"{where}: its `{RECORDED}` has ids outside the tokenizer's {vocab_size:,}, or log-probs above 0; it was "
            "sampled with another tokenizer"
        )
    turns = [len(list(run)) for own, run in itertools.groupby(policy) if own]  # observations stand between turns
    reads = _recorded_reads(record.get("teacher_reads") or [], policy, vocab_size, where)
    rollout = replace(rollout, completion=ids, policy_mask=policy, turn_policy_tokens=turns, teacher_reads=reads)
    whole = record.get("top_k") is None and record.get("top_p") in (None, 1.0)
    if not whole or record.get("temperature", temperature) != temperature:
        return rollout
    weights = [1.0] * len(logprobs)
    return replace(rollout, trainer_logprobs=[float(x) for x in logprobs], importance_weights=weights)


def _under_control(rollout: Rollout, control: str | None) -> Rollout:
    """Return the rollout with what the control lets the teacher read of its turns' privileged information."""
    recorded = rollout.example.data[RECORDED].get("control")
    if not rollout.teacher_reads or control == recorded:
        return rollout
    if control in ("none", "template"):
        return replace(rollout, teacher_reads=[])
    raise InputError(
        f"{rollout.example.id}: its `{RECORDED}` has teacher_reads of a run with privileged.control={recorded}, which "
        f"privileged.control={control} cannot replace; sample it again with this control, or set {recorded} or none"
    )


def _recorded_reads(given: list, policy: list[bool], vocab_size: int, where: str) -> list[tuple[int, int, list[int]]]:
    """Return what the teacher read with the observations, after a check that these are observations, in order."""
    reads = [(first, last, list(ids)) for first, last, ids in given]
    places = [place for first, last, _ in reads for place in (first, last)]
    whole = all(type(place) is int and 0 <= place <= len(policy) for place in places) and places == sorted(places)
    if not whole or any(any(policy[first:last]) or not all(0 <= i < vocab_size for i in ids) for first, last, ids in reads):
        raise InputError(f"{where}: its `{RECORDED}` has teacher_reads that are not observations of it; sample it again")
    return reads


def demonstration(
    example: Example, prompts: PromptPair, tokenizer: ChatTokenizer, *, max_seq_len: int | None = None
) -> Rollout:
    """Return the ids that a policy would have sampled to say ``example.completion``.

    Messages between its turns are observations, and turns with ``weight: 0`` are shown and not learned, as observations are.
    Refuses an example of which nothing is learned, and with :class:`TooLong` one that exceeds ``max_seq_len``.
    """
    if not any(message["role"] == "assistant" for message in example.completion or []):
        raise InputError(f"{example.id} has no assistant turn to learn from; check the dataset's completion key")
    pieces = encode_completion(tokenizer, example.messages, example.completion, example.tools, example.id)
    turns = [piece for piece in pieces if piece.turn is not None]
    if not any(map(_is_learned, turns)):
        raise InputError(f"{example.id}: every assistant turn has weight 0, so nothing is learned; remove the row or the key")
    completion = [token for piece in pieces for token in piece.ids]
    policy_mask = [_is_learned(piece) for piece in pieces for _ in piece.ids]
    length = len(prompts.student) + len(completion)
    if max_seq_len is not None and length > max_seq_len:
        raise TooLong(
            f"{example.id}: prompt ({len(prompts.student):,} tokens) plus completion ({len(completion):,}) exceeds max_seq_len "
            f"{max_seq_len:,} by {length - max_seq_len:,}; raise tokenizer.max_seq_len and the model's, or set "
            "`on_overflow: drop`"
        )
    return Rollout(
        example=example,
        prompts=prompts,
        completion=completion,
        policy_mask=policy_mask,
        sampled_logprobs=None,
        sampled_by="student",
        group=0,
        stop_reason="done",
        turns=list(example.completion),
        turn_policy_tokens=[len(piece.ids) if _is_learned(piece) else 0 for piece in turns],
    )


def _is_learned(piece: Piece) -> bool:
    """Return whether the piece is an assistant turn that its row does not exclude from learning (``weight: 0``)."""
    return piece.turn is not None and piece.turn.get("weight", 1) != 0
