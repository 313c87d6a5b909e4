"""Play procedural tasks of Reasoning Gym (the extra `reasoning-gym`; arXiv 2505.24760): a question, an answer, a verifier.

row        create_dataset(task, seed, size)[i]: question → user message, answer → privileged information
reward     the task's score_answer(what stands in <answer></answer>, entry), in [0, 1]
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pidistill.chat.tool_calls import visible_text
from pidistill.data.dataset import ExampleDataset
from pidistill.data.sources import get
from pidistill.envs.base import EnvStep
from pidistill.envs.extras import load_extra
from pidistill.errors import InputError, check_choice, check_count
from pidistill.types import Example, Message

EXTRA = "reasoning-gym"

EVALUATED = frozenset(
    {
        "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
        "simple_integration", "spiral_matrix", "string_insertion",
    }
)  # fmt: skip
"""Tasks whose verifier (version 0.1.23) hands what the model wrote to Python's `eval` or to sympy's parser, which evaluates it.

What a model writes is then run as a program, with the rights of the training process. They are refused unless
``allow_evaluated_answers`` is set: set it only where that process may be trusted to the model, in a container, say.
"""

INSTRUCTIONS = {
    "tags": "{question}\n\nGive the final answer within <answer></answer> tags.",
    "text": "{question}",
}


@dataclass(frozen=True)
class ReasoningGymEnvironment:
    """Judge one answer by the task's own verifier: 1 is right; some tasks give a part of 1 for an answer that is near."""

    def reset(self, example: Example) -> Example:
        if "reasoning_gym" not in example.data:
            raise InputError(
                f"{example.id} holds no entry of Reasoning Gym; ReasoningGymEnvironment judges the rows of "
                "pidistill.envs.reasoning_gym_dataset"
            )
        return example

    def step(self, state: Example, turn: Message, *, truncated: bool) -> EnvStep:
        row = state.data["reasoning_gym"]
        text = visible_text(turn)
        answer = text if row["answer_format"] == "text" else _last_answer(text)
        score = _task(row["task"], row["config"]).score_answer(answer=answer, entry=row["entry"])
        return EnvStep([], score, done=True)


def reasoning_gym_dataset(
    task: str,
    n: int,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    privileged: str = "answer",
    answer_format: Literal["tags", "text"] = "tags",
    system_prompt: str | None = None,
    allow_evaluated_answers: bool = False,
) -> ExampleDataset:
    """Return ``n`` entries of a task, which depend only on the arguments; two seeds share none (probability 1 − n / 2**30).

    The completion is the answer in the form that is asked for.

    Args:
        task: as `reasoning_gym.factory.DATASETS` lists them, e.g. "leg_counting".
        config: arguments of the task's own config, e.g. {min_animals: 2}.
        privileged: "answer"; another part of the entry, as a dotted path such as "metadata.solution"; or "none".
        answer_format: "tags" asks for and reads ``<answer></answer>``, "text" takes the whole turn.
        allow_evaluated_answers: see :data:`EVALUATED`.
    """
    check_count("dataset.n", n)
    check_choice("dataset.answer_format", answer_format, INSTRUCTIONS)
    check_task(task, allow_evaluated_answers)
    config_text = json.dumps(dict(config or {}), sort_keys=True)
    entries = _task(task, config_text, size=n, seed=_base_seed(task, seed))
    given = {"task": task, "config": config_text, "answer_format": answer_format}
    return ExampleDataset(
        [
            Example(
                id=f"{task} seed {seed} row {row}",
                messages=_messages(entries[row], answer_format, system_prompt),
                privileged=_privileged(entries[row], privileged, f"{task} row {row}"),
                completion=_completion(entries[row], answer_format),
                reference=entries[row]["answer"],
                data={"reasoning_gym": given | {"entry": entries[row]}},
            )
            for row in range(n)
        ]
    )


def check_task(task: str, allow_evaluated_answers: bool) -> None:
    known = load_extra("reasoning_gym.factory", EXTRA).DATASETS
    if task not in known:
        raise InputError(f"Reasoning Gym has no task {task!r}; it has {', '.join(sorted(known))}")
    if task in EVALUATED and not allow_evaluated_answers:
        raise InputError(
            f"the verifier of {task} evaluates what the model writes as a program; choose another task, or set "
            "dataset.allow_evaluated_answers: true where the process may be trusted to the model"
        )


@functools.lru_cache(maxsize=64)
def _task(task: str, config: str, size: int = 1, seed: int = 0) -> Any:
    try:
        return load_extra("reasoning_gym", EXTRA).create_dataset(task, size=size, seed=seed, **json.loads(config))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{task} does not take dataset.config {config} ({error}); see its config class") from error


def _base_seed(task: str, seed: int) -> int:
    """Return the number that a row's index is added to for its seed: plain seeds 0 and 1 would share all rows but one.

    31 bits: some tasks seed numpy, which takes no number of 2**32 or above.
    """
    return int.from_bytes(hashlib.blake2b(f"{task},{seed}".encode(), digest_size=4).digest(), "big") >> 1


def _messages(entry: Mapping[str, Any], answer_format: str, system_prompt: str | None) -> list[Message]:
    given = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    content = INSTRUCTIONS[answer_format].replace("{question}", entry["question"])
    return [*given, {"role": "user", "content": content}]


def _privileged(entry: Mapping[str, Any], path: str, where: str) -> str | None:
    if path == "none":
        return None
    value = get(entry, path)
    if path == "answer":
        return None if value is None else f"The answer is {value}."
    if value is None:
        known = ", ".join(f"metadata.{key}" for key in entry["metadata"])
        raise InputError(f"{where} has no {path}, which dataset.privileged names; it has answer, {known}; or none")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _completion(entry: Mapping[str, Any], answer_format: str) -> list[Message] | None:
    if entry["answer"] is None:
        return None
    answer = entry["answer"] if answer_format == "text" else f"<answer>{entry['answer']}</answer>"
    return [{"role": "assistant", "content": answer}]


def _last_answer(text: str) -> str | None:
    return load_extra("reasoning_gym.utils", EXTRA).extract_answer(text)
