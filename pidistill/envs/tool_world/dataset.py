"""Make the rows of the tool world, and write episodes as text."""

import random
from collections.abc import Sequence
from dataclasses import replace

from pidistill.chat.messages import messages_text
from pidistill.data.dataset import ExampleDataset
from pidistill.envs.tool_world.customer import Customer
from pidistill.envs.tool_world.environment import ToolWorldEnvironment
from pidistill.envs.tool_world.policy import POLICY
from pidistill.envs.tool_world.tasks import LEVELS, SHARES, ToolTask, draw_tasks, expert_calls
from pidistill.envs.tool_world.tools import TOOLS
from pidistill.envs.tool_world.wishes import Call, Move
from pidistill.errors import InputError, check_choice, check_count, check_share
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.types import Example, Message

PRIVILEGED = ("calls", "names", "instruction", "none")
SCHEMAS = [tool.schema for tool in TOOLS.values()]


def tool_world_dataset(
    split: str,
    n: int = 100,
    privileged: str = "calls",
    levels: Sequence[int] = LEVELS,
    completion: bool = False,
    world_seed: int = 0,
) -> ExampleDataset:
    """Return tasks of a customer service agent: the policy and the customer's first message, with the tools' schemas.

    Args:
        split: "train", "validation" (to select on) or "test" (to report); no user, and so no task, is in two of them.
        n: rows; the first rows of more are the same.
        privileged: what the teacher sees: "calls" (the expert's calls with their arguments), "names" (only which tools),
            "instruction" (what the customer wants and knows, hidden from the student) or "none".
        levels: how many wishes a customer has, 1 to 4; rows take them in turn. Level 1 has nothing that must be denied.
        completion: the expert's episode as ``Example.completion``, played against the environment.
        world_seed: another seed is another shop with other users, products and orders.
    """
    check_choice("dataset.split", split, SHARES)
    check_choice("dataset.privileged", privileged, PRIVILEGED)
    if not levels or not set(levels) <= set(LEVELS):
        raise InputError(f"dataset.levels is {list(levels)}; give some of 1, 2, 3 and 4")
    check_count("dataset.n", n)
    tasks = draw_tasks(split, n, world_seed, tuple(levels))
    return ExampleDataset([_example(task, row, privileged, completion) for row, task in enumerate(tasks)])


def tool_world_base_dataset(
    n: int,
    privileged: str = "calls",
    shown_frac: float = 0.5,
    levels: Sequence[int] = LEVELS,
    world_seed: int = 0,
    seed: int = 0,
) -> ExampleDataset:
    """Return demonstrations on training tasks; a share of the rows has the privileged information in its messages.

    What makes a model from nothing that does the task better with privileged information than without: supervised training
    needs no teacher view. The information stands where :class:`~pidistill.privileged.PrivilegedPrompt` puts it by default.

    Args:
        n: rows, each of its own task.
        privileged: as in :func:`tool_world_dataset`.
        shown_frac: probability of a row to show it.
        seed: which rows do.
    """
    check_share("dataset.shown_frac", shown_frac, "it is a probability")
    rng, prompt = random.Random(seed), PrivilegedPrompt()
    rows = []
    for example in tool_world_dataset("train", n, privileged, levels, completion=True, world_seed=world_seed):
        shown = example.privileged is not None and rng.random() < shown_frac
        messages = prompt.teacher_messages(example, example.messages) if shown else example.messages
        rows.append(replace(example, messages=messages, privileged=None))
    return ExampleDataset(rows)


def _example(task: ToolTask, row: int, privileged: str, completion: bool) -> Example:
    opening = Customer(task.identity, task.wishes).opening
    return Example(
        id=f"tool_world {task.split} row {row}",
        messages=[{"role": "system", "content": POLICY}, {"role": "user", "content": opening}],
        privileged=privileged_text(task, privileged),
        completion=play_expert(task) if completion else None,
        tools=SCHEMAS,
        data={"task": task},
    )


def privileged_text(task: ToolTask, kind: str) -> str | None:
    if kind == "none":
        return None
    if kind == "instruction":
        return f"What the customer knows and wants:\n{task.instruction}"
    calls = expert_calls(task, arguments=kind == "calls")
    return f"The calls that solve this task{', in order' if kind == 'calls' else ' by their names, in order'}:\n{calls}"


def expert_turn(move: Move) -> Message:
    if isinstance(move, Call):
        function = {"name": move.name, "arguments": dict(move.arguments)}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return {"role": "assistant", "content": move.text}


def play_expert(task: ToolTask) -> list[Message]:
    """Return the expert's episode: its turns, and what shop and customer answered. A RuntimeError means a broken world."""
    environment = ToolWorldEnvironment()
    state = environment.reset(Example("expert", [], data={"task": task}))
    turns: list[Message] = []
    reward = 0.0
    for move in task.moves:
        turns.append(expert_turn(move))
        step = environment.step(state, turns[-1], truncated=False)
        turns += step.observations
        reward += step.reward
        refused = [said["content"] for said in step.observations if said["content"].startswith("Error:")]
        if refused:
            raise RuntimeError(f"the expert's {move} is refused ({refused[0]}) on {task.instruction}")
    if not state.done or reward != 1.0:
        raise RuntimeError(f"the expert ends with reward {reward} (done: {state.done}) on {task.instruction}")
    return turns


def render_episode(messages: Sequence[Message]) -> str:
    """Return a conversation as plain text: one paragraph per message, tool calls as they are called."""
    names = {"assistant": "agent", "user": "customer", "tool": "tool", "system": "policy"}
    return "\n".join(f"{names[message['role']]:>8}: {messages_text([message])}" for message in messages)
