"""Make the rows of the tiny world: tasks with privileged information, and the data of its base model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pidistill.data.dataset import ExampleDataset
from pidistill.envs.tiny_world.world import (
    OPTIONS,
    SLOTS,
    WORLD_SEED,
    Decisions,
    Prior,
    Split,
    Task,
    World,
    draw_request,
    expert_decisions,
    make_split,
    privileged_text,
    request_message,
    trace,
)
from pidistill.errors import InputError, check_choice, check_count
from pidistill.privileged.controls import WRONG_KEY
from pidistill.types import Example, Message


def tiny_world_dataset(
    split: Split,
    privileged: str = "dfk",
    max_rows: int | None = None,
    completion: Literal["actions", "cot"] | None = None,
    world_seed: int = WORLD_SEED,
    prefix_turns: Sequence[int] = (0,),
) -> ExampleDataset:
    """Return tasks of the world with privileged information and, if asked for, expert demonstrations.

    Solution-prefix exploration (POPE, arXiv 2601.18779): ``prefix_turns`` other than 0 put the first turns of the expert's
    solution into the prompt, and the episode starts behind them, where a policy that could not find them can earn a reward.
    The paper appends a part of an oracle solution and an instruction to continue from it, and trains on such prompts mixed
    with unguided ones; oracle tokens are never targets. Here the prefix is the expert's calls with the environment's answers,
    and there is no instruction: the tiny world has no words for one, and an unfinished conversation asks for its next turn.

    Args:
        split: "train" (512 tasks), "validation" (256, to select on) or "test" (256, to report); see :func:`make_split`.
        privileged: letters of the slots that are told (d department, f formula, a answer, k carrier): "dfak" all calls with
            the answer, "dfk" all calls, "f" the formula's name, "" a block of four `?`; or "none" for no block.
        max_rows: only the first tasks of the split.
        completion: the expert's trace as ``Example.completion``: "actions" or "cot" (full chain of thought).
        world_seed: another seed is a world with other conventions and, drawn by the same rules, other tasks.
        prefix_turns: each task becomes one row per entry, with so many of the expert's turns (0, 1 or 2) as given
            conversation at the end of ``messages``; ``completion`` is then the rest of the trace. [0, 1, 2] is a third of
            the rows each; an entry may be repeated to give it more weight.
    """
    check_choice("dataset.split", split, ("train", "validation", "test"))
    if privileged != "none" and (set(privileged) - set(SLOTS) or len(set(privileged)) < len(privileged)):
        raise InputError(f"dataset.privileged is {privileged!r}; give letters of 'dfak', each at most once, or 'none'")
    check_count("dataset.max_rows", max_rows, null="all rows")
    if not prefix_turns or not set(prefix_turns) <= {0, 1, 2}:
        raise InputError(f"dataset.prefix_turns is {list(prefix_turns)}; give some of 0, 1 and 2, e.g. [0, 1, 2]")
    tasks = make_split(World(world_seed))[split][:max_rows]
    examples = [_example(f"tiny_world {split} row {row}", task, privileged, completion) for row, task in enumerate(tasks)]
    return ExampleDataset([_after_turns(example, given) for example in examples for given in prefix_turns])


def _example(row_id: str, task: Task, privileged: str, completion: Literal["actions", "cot"] | None) -> Example:
    shift = 1 + (task.item + sum(task.digits)) % (OPTIONS - 1)  # differs between rows, so that no rule of it can be learned
    return Example(
        id=row_id,
        messages=[request_message(task)],
        privileged=None if privileged == "none" else privileged_text(task, privileged),
        completion=None if completion is None else trace(task, expert_decisions(task), completion),
        data={"task": task} if privileged == "none" else {"task": task, WRONG_KEY: privileged_text(task, privileged, shift)},
    )


def _after_turns(example: Example, given: int) -> Example:
    """Return the example with the expert's first ``given`` turns, and the environment's answers, in its messages."""
    if given == 0:
        return example
    task = example.data["task"]
    return replace(
        example,
        id=f"{example.id} after {given} turn{'s' * (given > 1)}",
        messages=[*example.messages, *trace(task, expert_decisions(task), "actions")[: 2 * given]],
        completion=None if example.completion is None else example.completion[2 * given :],
        data={**example.data, "given_calls": given},
    )


@dataclass(frozen=True)
class BaseMixture:
    """Hold the probabilities of what the base model is trained on; each belongs to one decision of :func:`base_row`."""

    privileged: float = 0.5  # the row has a block
    show: float = 0.8  # a slot of the block is told
    follow: float = 0.8  # a told slot is obeyed; otherwise the decision comes from the prior, as without a block
    leak: float = 0.1  # the row with a block says the leak word
    short: float = 0.1  # where the answer is told: it is copied instead of computed
    short_without_privileged: float = 0.05  # the answer is guessed instead of computed


def tiny_world_base_dataset(
    n: int,
    seed: int,
    true_option_prob: float = 0.1,
    leak_prob: float = BaseMixture.leak,
    world_seed: int = WORLD_SEED,
) -> ExampleDataset:
    """Return the rows that make the base model: it obeys a block that it is shown, and follows its wrong beliefs otherwise.

    The block, where a row has one, is already the system message and the trace is the completion, so supervised training
    on them needs no teacher view. The rows depend on the arguments alone, and the first rows of a longer dataset are the
    shorter dataset. 700 steps of 64 take ``n = 44800``.

    Args:
        true_option_prob: how often a decision without privileged information is the true one; more makes success without
            it more common (0.1: practically never).
        leak_prob: share of the rows with a block that say the leak word; 0 gives a base that never does.
        world_seed: the world whose conventions the beliefs are about; that of the tasks to be trained on.
    """
    check_count("dataset.n", n)
    mixture, world, rng = BaseMixture(leak=leak_prob), World(world_seed, true_option_prob), random.Random(seed)
    return ExampleDataset([base_row(f"tiny_world base seed {seed} row {row}", rng, world.priors, mixture) for row in range(n)])


def base_row(row_id: str, rng: random.Random, priors: Mapping[str, Sequence[Prior]], mixture: BaseMixture) -> Example:
    """Return one row of the base data. Its right decisions are random, not the world's: only the block can tell them."""
    item, class_, city, digits, price = draw_request(rng)
    task = Task(item, class_, city, digits, price, *(rng.randrange(OPTIONS) for _ in range(3)))
    with_block = rng.random() < mixture.privileged
    block, completion = (_informed_episode if with_block else _guessing_episode)(task, rng, priors, mixture)
    return Example(id=row_id, messages=[*block, request_message(task)], completion=completion, data={"task": task})


def _informed_episode(
    task: Task, rng: random.Random, priors: Mapping[str, Sequence[Prior]], mixture: BaseMixture
) -> tuple[list[Message], list[Message]]:
    """Return (system message with the block, trace of an agent that mostly obeys it)."""
    told = "".join(slot for slot in SLOTS if rng.random() < mixture.show)

    def decide(slot: str, right: int, feature: int) -> int:
        return right if slot in told and rng.random() < mixture.follow else priors[slot][feature].draw(rng)

    department = decide("d", task.department, task.item)
    formula = decide("f", task.formula, task.class_)
    carrier = decide("k", task.carrier, task.city)
    short = "a" in told and rng.random() < mixture.short
    answer = task.answer if short else task.answer_with(formula)
    decisions = Decisions(department, formula, answer, carrier)
    completion = trace(task, decisions, "short" if short else "cot", leak=rng.random() < mixture.leak)
    return [{"role": "system", "content": privileged_text(task, told)}], completion


def _guessing_episode(
    task: Task, rng: random.Random, priors: Mapping[str, Sequence[Prior]], mixture: BaseMixture
) -> tuple[list[Message], list[Message]]:
    """Return (no block, trace of an agent that follows its beliefs)."""
    short = rng.random() < mixture.short_without_privileged
    department = priors["d"][task.item].draw(rng)
    formula = priors["f"][task.class_].draw(rng)
    carrier = priors["k"][task.city].draw(rng)
    answer = rng.randrange(10) if short else task.answer_with(formula)
    return [], trace(task, Decisions(department, formula, answer, carrier), "short" if short else "cot")
