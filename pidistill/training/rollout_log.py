"""Write training_rollouts.jsonl: a changing sample of the rollouts that a run learns from, with the numbers of every token.

`pidistill report` shows them. The sample is drawn by a hash of seed, step and rollout, so that it is the same after a resume,
no random number of the training is used, and nothing is computed that the step does not compute anyway. Rank 0 writes rollouts
of its own share.

| key | meaning |
| --- | --- |
| step, round | as in metrics.jsonl |
| example, group, sampled_by, stop_reason | of the rollout |
| reward, task_reward, reward_parts, turn_rewards | absent where no environment judged it, as a demonstration |
| success, leak | whether the task's reward reaches `eval_success_threshold`; whether an assistant turn says a leak phrase |
| student_prompt, teacher_prompt, privileged | texts; privileged is null where the row has none |
| turns | role of each message of the episode, its tool's name, and its tool calls |
| teacher_reads | [{at, text}]: what the teacher reads instead of the observation that begins at token `at`; may be absent |
| policy_tokens | of the whole rollout; the lists below hold fewer where `rollout_log_max_tokens` cut them |
| tokens, policy | text of each token of the completion, and whether the policy produced it |
| values | {name: one number per policy token}, nats: log-probs, divergences, entropies; and advantage |
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from pidistill.chat.messages import privileged_text, tool_call_text
from pidistill.chat.phrases import says_leak_phrase
from pidistill.data import RecipeData
from pidistill.distributed.run import Run
from pidistill.jsonl import TRAINING_ROLLOUTS, write_jsonl
from pidistill.training.keys import setting
from pidistill.types import Batch, Message, Rollout, Scores

MOST_PER_STEP = 8  # a step of a short run must not wait for its log

PROMPT_CHARS = 20_000

LONGEST_CHARACTER = 8  # tokens that one character may take

Values = dict[str, list[float | None]]


class RolloutLog:
    """Keep the numbers of a step's sampled rollouts while it is computed, and write them when it is over.

    Config keys: `rollout_log_total` rollouts are spread evenly over `max_steps`; `rollout_log_max_tokens` bounds each.
    """

    def __init__(self, cfg: DictConfig, run: Run, data: RecipeData, *, last_step: int) -> None:
        total = setting(cfg, "rollout_log_total") if run.is_main else 0
        self._path, self._seed, self._data = run.output_dir / TRAINING_ROLLOUTS, run.seed, data
        self._per_step = min(MOST_PER_STEP, total / max(1, last_step))
        self._max_tokens = setting(cfg, "rollout_log_max_tokens")
        self._kept: list[tuple[int, Rollout, Values]] = []
        self._decode = functools.lru_cache(maxsize=2**16)(lambda ids: data.tokenizer.decode(list(ids)))

    def look(self, batch: Batch, scores: Scores, step: int) -> None:
        """Keep what ``step`` is to log of a micro-batch: over all of them, the rollouts whose hashes are smallest."""
        wanted = math.floor(step * self._per_step + 1e-9) - math.floor((step - 1) * self._per_step + 1e-9)
        rollouts = batch.views.rollouts
        found = sorted((self._priority(step, rollout), i) for i, rollout in enumerate(rollouts))[:wanted] if wanted else []
        if not found:
            return
        names, table = columns_of(batch, scores)
        ends = list(itertools.accumulate((rollout.policy_tokens for rollout in rollouts), initial=0))
        for priority, i in found:
            values = table[:, ends[i] : min(ends[i + 1], ends[i] + self._max_tokens)].tolist()
            self._kept.append((priority, rollouts[i], dict(zip(names, map(_rounded, values), strict=True))))
        self._kept = sorted(self._kept, key=lambda entry: entry[0])[:wanted]

    def write(self, step: int, round_: int | None) -> None:
        """Append the kept rollouts, and forget them."""
        if self._kept:
            write_jsonl(self._path, [{"step": step, "round": round_} | self._row(r, values) for _, r, values in self._kept])
            self._kept = []

    def _priority(self, step: int, rollout: Rollout) -> int:
        return zlib.crc32(f"{self._seed} {step} {rollout.group} {rollout.example.id} {rollout.completion}".encode())

    def _row(self, rollout: Rollout, values: Values) -> dict[str, Any]:
        policy = _cut_mask(rollout.policy_mask, self._max_tokens)
        if rollout.sampled_logprobs is not None:
            sampled = [x for x, own in zip(rollout.sampled_logprobs, policy, strict=False) if own]
            values = {"sampled_logprobs": _rounded(sampled), **values}
        privileged = rollout.example.privileged
        row = {
            "example": rollout.example.id,
            "group": rollout.group,
            "sampled_by": rollout.sampled_by,
            "stop_reason": rollout.stop_reason,
            "leak": says_leak_phrase(rollout, self._data.leak_phrases),
            "student_prompt": _cut(self._decode(tuple(rollout.prompts.student))),
            "teacher_prompt": _cut(self._decode(tuple(rollout.prompts.teacher))),
            "privileged": None if privileged is None else privileged_text(privileged),
            "turns": [_outline(turn) for turn in rollout.turns],
            "policy_tokens": rollout.policy_tokens,
            "tokens": token_texts(self._decode, rollout.completion[: len(policy)]),
            "policy": [int(own) for own in policy],
            "values": values,
        }
        if rollout.task_reward is not None:
            row |= {name: getattr(rollout, name) for name in ("reward", "task_reward", "reward_parts", "turn_rewards")}
            row["success"] = rollout.task_reward >= self._data.success_threshold
        reads = [(first, ids) for first, _, ids in rollout.teacher_reads if first < len(policy)]
        if reads:
            row["teacher_reads"] = [{"at": first, "text": _cut(self._decode(tuple(ids)))} for first, ids in reads]
        return row


def columns_of(batch: Batch, scores: Scores) -> tuple[list[str], Float[Tensor, "K N"]]:
    """Return names and values of everything that the step knows of each policy token, on the CPU."""
    columns = {"student_logprobs": scores.student_logprobs, "teacher_logprobs": scores.teacher_logprobs}
    for divergence, value in scores.divergences.items():
        columns.setdefault(divergence.name, value)
    columns |= {"student_entropy": scores.student_entropy, "teacher_entropy": scores.teacher_entropy}
    columns["advantage"] = None if batch.rewards is None else batch.advantages
    known = {name: value.detach().float() for name, value in columns.items() if value is not None}
    table = torch.stack([*known.values()]) if known else torch.empty(0, len(batch.targets))
    return list(known), table.cpu()


def token_texts(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """Return the text of each id where it stands: joined they are the decoded text.

    A character that several tokens make stands at the last of them, and the others are empty. What is decoded at once is a few
    ids, never the whole text again for every id.
    """
    texts, start, done = [], 0, 0
    for i in range(len(ids)):
        before, now = decode(tuple(ids[start:done])) if done > start else "", decode(tuple(ids[start : i + 1]))
        if now.endswith("\ufffd") and i + 1 - done < LONGEST_CHARACTER and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, i + 1
    return texts


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(value, 4) + 0.0 if math.isfinite(value) else None for value in values]  # never -0.0


def _cut_mask(mask: list[bool], most: int) -> list[bool]:
    """Return the mask up to its policy token number ``most``."""
    counts = itertools.accumulate(mask)
    return [own for own, count in zip(mask, counts, strict=True) if count <= most]


def _cut(text: str) -> str:
    half = PROMPT_CHARS // 2
    return text if len(text) <= PROMPT_CHARS else f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def _outline(turn: Message) -> dict[str, Any]:
    """Return who speaks in a message and which tools it calls; its text stands in the tokens."""
    calls = [tool_call_text(call) for call in turn.get("tool_calls") or []]
    return {"role": turn["role"], **({"name": turn["name"]} if turn.get("name") else {}), **({"calls": calls} if calls else {})}
