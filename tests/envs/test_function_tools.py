"""Test functions as tools: their schemas, and that every mistake of a model is answered with a sentence."""

import asyncio
import functools
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import pytest

from pidistill.data.dataset import ExampleDataset
from pidistill.envs import Environment, EnvStep, RoutedEnvironment, StatePrivileged
from pidistill.envs.function_tools import FunctionToolEnvironment, ToolError, call_tools, tool, tools_by_name, with_tools
from pidistill.envs.tool_world import tool_world_dataset
from pidistill.errors import InputError
from pidistill.privileged import PrivilegedPrompt
from pidistill.rewards import Constraints
from pidistill.rewards.base import RewardWithParts
from pidistill.rollouts.selections import AfterTurns
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Example
from tests.support.tiny_tokenizers import qwen_folder


def add(state: list, amount: int, note: str | None = None, tags: list[str] | None = None, unit: Literal["kg", "g"] = "g"):
    """Add to the pile.

    More is said here.

    Args:
        amount: how much,
            in units.
        unit: of the amount.

    Returns:
        the pile.
    """
    if amount < 0:
        raise ToolError("nothing can be taken away")
    state.append(amount)
    return {"pile": sum(state), "note": note}


def ratio(a: float, b: float) -> str:
    """a / b."""
    return str(a / b)


TOOLS = tools_by_name([add, ratio])


def says(text="", *calls):
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": text} | ({"tool_calls": made} if made else {})


def test_the_schema_of_a_function_comes_from_its_signature_and_docstring():
    schema = tool(add).schema["function"]
    assert schema["name"] == "add" and schema["description"] == "Add to the pile. More is said here."
    properties = schema["parameters"]["properties"]
    assert properties["amount"] == {"type": "integer", "description": "how much, in units."}
    assert properties["note"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert properties["tags"]["anyOf"][0] == {"type": "array", "items": {"type": "string"}}
    assert properties["unit"] == {"type": "string", "enum": ["kg", "g"], "description": "of the amount."}
    assert schema["parameters"]["required"] == ["amount"] and "state" not in properties


def test_functions_that_have_no_schema_are_refused():
    def untyped(a):
        pass

    def odd(a: set):
        pass

    async def later(a: int) -> str:
        return "a"

    async def pieces(a: int):
        yield "a"

    for function, said in (
        (untyped, "parameter a without a type"),
        (odd, "parameter a of the tool odd has the type"),
        (later, "the tool later is an async function or a generator, and nothing here awaits or reads its answer; write"),
        (pieces, "the tool pieces is an async function"),
    ):
        with pytest.raises(InputError, match=said):
            tool(function)
    with pytest.raises(InputError, match="two tools have one name"):
        tools_by_name([add, add])


def test_calls_are_carried_out_in_order():
    pile = []
    first, second, third = call_tools(
        says("", ("add", {"amount": 2}), ("add", {"amount": 3}), ("ratio", {"a": 1, "b": 4})), TOOLS, pile
    )
    assert json.loads(first["content"]) == {"pile": 2, "note": None} and json.loads(second["content"])["pile"] == 5
    assert third == {"role": "tool", "name": "ratio", "content": "0.25"} and pile == [2, 3]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("sub", {}, "there is no tool sub; the tools are add, ratio"),
        ("add", {}, "add lacks amount; its arguments are amount, note, tags, unit"),
        ("add", {"amount": 1, "colour": 2}, "add does not know colour"),
        ("add", {"amount": 1, "state": []}, "add does not know state"),
        ("add", {"amount": "1"}, 'amount is "1", but must be {"type": "integer"}'),
        ("add", {"amount": True}, "amount is true"),
        ("add", {"amount": 1.0}, "amount is 1.0"),
        ("add", {"amount": 1, "unit": "t"}, "unit is"),
        ("add", {"amount": 1, "tags": ["a", 1]}, "tags is"),
        ("add", [1], "must be an object with amount"),
        ("add", {"amount": -1}, "nothing can be taken away"),
        ("ratio", {"a": 1, "b": 0}, "ZeroDivisionError"),
    ],
)
def test_a_wrong_call_is_answered_with_a_sentence(name, arguments, said):
    pile = []
    (answer,) = call_tools(says("", (name, arguments)), TOOLS, pile)
    assert answer["role"] == "tool" and answer["content"].startswith("Error: ") and said in answer["content"] and pile == []


def test_a_call_that_cannot_be_read_is_answered_with_the_reason():
    (answer,) = call_tools(says("x") | {"tool_call_error": "no name"}, TOOLS)
    assert answer == {"role": "tool", "content": "Error: no name"}
    assert call_tools(says("just text"), TOOLS) == []


def test_the_id_of_a_call_is_in_its_answer():
    turn = says("", ("ratio", {"a": 1, "b": 2}))
    turn["tool_calls"][0]["id"] = "c1"
    assert call_tools(turn, TOOLS)[0]["tool_call_id"] == "c1"


def test_a_tools_own_fault_is_logged_once(caplog):
    def broken(a: int) -> str:
        """Breaks."""
        raise RuntimeError("inside")

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            call_tools(says("", ("broken", {"a": 1})), tools_by_name([broken]))
    assert caplog.text.count("the tool broken raised") == 1


# ------------------------------------------------------------------------------------------- the environment


def begin_pile(example):
    return [int(example.reference)]


def pile_is_ten(example, turns):
    return float(sum(example.data["state"]) == 10 and turns[-1]["content"] == "done")


SCHEMAS = [tool(add).schema, tool(ratio).schema]


def environment():
    return FunctionToolEnvironment(
        ["tests.envs.test_function_tools.add", "tests.envs.test_function_tools.ratio"],
        pile_is_ten,
        begin="tests.envs.test_function_tools.begin_pile",
    )


def example(start):
    return Example(id=f"row {start}", messages=[{"role": "user", "content": "ten"}], reference=str(start), tools=SCHEMAS)


def play(env, start):
    state = env.reset(example(start))
    first = env.step(state, says("", ("add", {"amount": 10 - start})), truncated=False)
    return first, env.step(state, says("done"), truncated=False), state


def test_an_episode_carries_out_calls_and_ends_with_the_reward():
    first, last, state = play(environment(), 4)
    assert isinstance(environment(), Environment)
    assert not first.done and json.loads(first.observations[0]["content"])["pile"] == 10
    assert last.done and last.reward == 1.0 and [turn["role"] for turn in state.turns] == ["assistant", "tool", "assistant"]
    with pytest.raises(InputError, match="has ended"):
        environment().step(state, says("more"), truncated=False)


def test_a_row_that_shows_no_tools_is_refused_with_the_component_that_shows_them():
    with pytest.raises(InputError, match=r"row 4 shows no tools to the model, .* add, ratio; .*with_tools"):
        environment().reset(replace(example(4), tools=None))


def test_the_parts_of_a_reward_are_in_the_step():
    reward = Constraints({"ten": pile_is_ten, "nested": Constraints({"a": pile_is_ten, "no": lambda example, turns: 0.0})})
    env = replace(environment(), reward=reward)
    _, last, _ = play(env, 4)
    assert last == EnvStep([], 0.75, True, {"ten": 1.0, "nested": 0.5})


def test_without_a_reward_every_step_has_none():
    env = replace(environment(), reward=None)
    state = env.reset(example(0))
    steps = [
        env.step(state, says("", ("add", {"amount": 10})), truncated=False),
        env.step(state, says("done"), truncated=False),
    ]
    assert [(step.reward, step.done) for step in steps] == [(None, False), (None, True)]


def test_a_turn_that_was_cut_is_judged_and_calls_nothing():
    env = environment()
    state = env.reset(example(0))
    step = env.step(state, says("", ("add", {"amount": 10})), truncated=True)
    assert step.done and step.reward == 0.0 and state.state == [0]


def test_episodes_in_threads_have_states_of_their_own():
    env = environment()
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda start: play(env, start)[1].reward, list(range(10)) * 20))
    assert results == [1.0] * 200


# ------------------------------------------------------------------------------------------- what belongs to one episode


def order(state: dict) -> str:
    """Order one."""
    state["orders"].append("one")
    return "ok"


def one_order(example, turns):
    return float(len(example.data["state"]["orders"]) == 1)


def test_a_state_that_is_part_of_the_row_belongs_to_one_episode():
    env = FunctionToolEnvironment([order], one_order, begin=lambda example: example.data["shop"])
    shown = replace(example(1), tools=[tool(order).schema], data={"shop": {"orders": []}})
    rewards = []
    for _ in range(3):
        state = env.reset(shown)
        env.step(state, says("", ("order", {})), truncated=False)
        rewards.append(env.step(state, says("done"), truncated=False).reward)
    assert rewards == [1.0, 1.0, 1.0] and shown.data == {"shop": {"orders": []}}


def test_what_cannot_be_copied_is_shared_and_the_other_columns_are_not():
    lock, shop = threading.Lock(), {"orders": []}
    env = FunctionToolEnvironment([order], one_order, begin=lambda example: example.data)
    state = env.reset(replace(example(1), data={"lock": lock, "shop": shop})).state
    assert state["lock"] is lock and state["shop"] == shop and state["shop"] is not shop


def test_without_begin_the_reward_reads_a_rows_own_column_state():
    seen = []
    for begin in (None, lambda example: "of the tools"):
        env = FunctionToolEnvironment([ratio], lambda example, turns: seen.append(example.data["state"]) or 0.0, begin=begin)
        for data in ({"state": "Texas"}, {}):
            env.step(env.reset(replace(example(1), data=data)), says("done"), truncated=False)
    assert seen == ["Texas", None, "of the tools", "of the tools"]


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


async def fetch(a: int) -> str:
    """Fetch."""
    return "x"


def pages(a: int):
    """Give pages."""
    yield "x"


def lazy(a: int) -> str:
    """Give what nobody has awaited."""
    return pages(a)


def not_a_type(a: "Nothing") -> str:  # noqa: F821
    """Have an annotation without a type."""


def test_what_gives_no_text_is_no_tool():
    for function in (fetch, pages):
        with pytest.raises(InputError, match="is an async function or a generator"):
            tool(function)
    for function in (lazy, wrapped(fetch), wrapped(pages)):  # a decorator may await what it wraps: the call shows it
        with pytest.raises(InputError, match=f"the tool {function.__name__} is an async function or a generator"):
            call_tools(says("", (function.__name__, {"a": 1})), tools_by_name([function]))
    with pytest.raises(InputError, match="is no function with a name"):
        tool(functools.partial(ratio, 1.0))
    with pytest.raises(InputError, match="the tool not_a_type has an annotation that names no type: name 'Nothing'"):
        tool(not_a_type)
    with pytest.raises(InputError, match=r"environment.begin=.*fetch.* is an async function"):
        FunctionToolEnvironment([ratio], begin=wrapped(fetch)).reset(example(1))


def test_a_tool_may_run_what_it_wraps():
    @functools.wraps(fetch)
    def awaited(a):
        return asyncio.run(fetch(a))

    @functools.wraps(pages)
    def joined(a):
        return "".join(pages(a))

    tools = tools_by_name([awaited, joined])
    assert [call_tools(says("", (name, {"a": 1})), tools)[0]["content"] for name in tools] == ["x", "x"]


def test_a_docstring_may_name_types_and_indent_as_it_likes():
    def search(query: str, k: int = 5) -> str:
        """Search.

        Args:
          query (str): words
            to look for.
          k (int, optional): how many; see
            also: the manual.
        """

    def one_line(query: str) -> str:
        """Search.

        Args:
            query:
                words to look for.

        Returns: all of them.
        """

    properties = tool(search).parameters["properties"]
    assert properties["query"]["description"] == "words to look for."
    assert properties["k"]["description"] == "how many; see also: the manual."
    assert tool(one_line).parameters["properties"]["query"]["description"] == "words to look for."


# ------------------------------------------------------------------------------------------- episodes that a limit ends


def test_an_episode_without_an_answer_is_judged_where_the_environment_is_told_to():
    def wrong(example, turns):
        return RewardWithParts(-0.5, {"wrong": -1.0, "turns": 0.25 * len(turns)})

    env = FunctionToolEnvironment([ratio], wrong)
    state = env.reset(example(1))
    env.step(state, says("", ("ratio", {"a": 1.0, "b": 2.0})), truncated=False)
    assert env.unfinished(state).reward == 0.0
    judging = replace(env, judge_unfinished=True)
    told = judging.unfinished(state)
    assert (told.reward, told.reward_parts) == (-0.5, {"wrong": -1.0, "turns": 0.5})
    for around, of in (
        (RoutedEnvironment("kind", {"a": judging}, default="a"), lambda state: ("a", state)),
        (StatePrivileged(judging, lambda state: None), lambda state: state),
        (AfterTurns(judging), lambda state: state),
    ):
        assert around.unfinished(of(state)).reward == -0.5


def test_a_dataset_shows_the_schemas():
    rows = with_tools(ExampleDataset([example(1)], dropped={"x": 2}), ["tests.envs.test_function_tools.ratio"])
    assert rows[0].tools == [tool(ratio).schema] and rows.dropped == {"x": 2}
    with pytest.raises(InputError, match="functions is empty"):
        FunctionToolEnvironment([], pile_is_ten)


WITHOUT_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("world", ["functions", "tool world"])
def test_tools_that_the_template_does_not_show_are_refused_before_sampling_unless_written_as_text(world, tmp_path):
    plain = qwen_folder(tmp_path / "model", WITHOUT_TOOLS)
    functions = with_tools(ExampleDataset([example(1)]), [add])
    (row,) = functions if world == "functions" else tool_world_dataset("train", n=1)
    with pytest.raises(InputError, match=r"the chat template leaves out the tool '\w+'; set tokenizer.tool_format: action"):
        PrivilegedPrompt().build(row, HFChatTokenizer(str(plain)))
    tokenizer = HFChatTokenizer(str(plain), tool_format="action")
    shown = tokenizer.decode(PrivilegedPrompt().build(row, tokenizer).pair.student)
    assert all(schema["function"]["name"] in shown for schema in row.tools)


def test_a_tools_exception_whose_text_raises_or_is_long_is_answered_in_bounds():
    class Silent(Exception):
        def __str__(self):
            raise ValueError("no text")

        __repr__ = __str__

    def silent(a: int) -> str:
        """Raise what cannot be shown."""
        raise Silent

    def long(a: int) -> str:
        """Raise a long text."""
        raise RuntimeError("x" * 1_000_000)

    tools = tools_by_name([silent, long])
    (first,), (second,) = (call_tools(says("", (name, {"a": 1})), tools) for name in ("silent", "long"))
    assert first["content"] == "Error: Silent" and len(second["content"]) < 1100
