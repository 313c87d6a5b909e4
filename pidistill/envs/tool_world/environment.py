"""Answer the turns of the tool world: calls go to the shop, everything else to the customer.

    reward = 1 if the shop is, in the end, as the expert leaves it, and the agent has told the customer what it must, else 0

as in τ-bench (arXiv 2406.12045). An agent that recites the numbers from 1 to 800 would otherwise have answered every question,
so at most :data:`MOST_NUMBERS` different numbers count per wish (the expert's longest turn has four). An episode ends when the
customer leaves or is handed over to a human. One that is cut off, by the token limit or by `max_turns`, gets 0.
"""

from dataclasses import dataclass, field

from pidistill.chat.tool_calls import visible_text
from pidistill.envs.base import EnvStep
from pidistill.envs.function_tools import call_tools
from pidistill.envs.tool_world.customer import STOP, Customer, numbers_said, said_all
from pidistill.envs.tool_world.shop import Shop, shop_image
from pidistill.envs.tool_world.tasks import ToolTask
from pidistill.envs.tool_world.tools import TOOLS
from pidistill.errors import InputError
from pidistill.types import Example, Message

MOST_NUMBERS = 20


@dataclass
class ToolWorldState:
    """Hold one episode: its own copy of the shop, its customer, and what the agent has told the customer so far."""

    example_id: str
    task: ToolTask
    shop: Shop
    customer: Customer
    said: list[str] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True)
class ToolWorldEnvironment:
    """Play the tool world; every episode has a database of its own, which may be used from one thread after another.

    Text beside a call is not shown to the customer. ``reward/database`` and ``reward/outputs`` say which half was right.
    """

    def reset(self, example: Example) -> ToolWorldState:
        task = example.data.get("task")
        if not isinstance(task, ToolTask):
            raise InputError(
                f"{example.id}: data['task'] is {type(task).__name__}, not a ToolTask of the tool world; use "
                "pidistill.envs.tool_world.tool_world_dataset with this environment (key `dataset`)"
            )
        return ToolWorldState(example.id, task, Shop(shop_image(task.world_seed)), Customer(task.identity, task.wishes))

    def step(self, state: ToolWorldState, turn: Message, *, truncated: bool) -> EnvStep:
        if state.done:
            raise InputError(f"{state.example_id}: the episode has ended; reset first")
        state.done = truncated
        if truncated:
            return EnvStep([], 0.0, True, {"database": 0.0, "outputs": 0.0})
        answers = call_tools(turn, TOOLS, state.shop)
        if answers:
            state.done = state.shop.one("SELECT 1 FROM transfers") is not None
            return self._end(state) if state.done else _going_on(answers)
        text = visible_text(turn)
        state.said.append(text)
        answer = state.customer.answer(text)
        state.done = answer.endswith(STOP)
        return self._end(state) if state.done else _going_on([{"role": "user", "content": answer}])

    def _end(self, state: ToolWorldState) -> EnvStep:
        database = float(state.shop.fingerprint() == state.task.final_fingerprint)
        outputs = float(self._told(state))
        return EnvStep([], database * outputs, True, {"database": database, "outputs": outputs})

    def _told(self, state: ToolWorldState) -> bool:
        said, needed = "\n".join(state.said), state.task.outputs
        return said_all(said, needed) and not (needed and len(numbers_said(said)) > MOST_NUMBERS * len(state.task.wishes))


def _going_on(observations: list[Message]) -> EnvStep:
    return EnvStep(observations, 0.0, False, {"database": 0.0, "outputs": 0.0})
