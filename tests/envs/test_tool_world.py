"""Test the tool world: the expert solves every task, nobody does so by chance, and rules that no tool checks decide."""

import pickle
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pidistill.envs import Environment
from pidistill.envs.function_tools import ToolError
from pidistill.envs.tool_world import ToolWorldEnvironment, play_expert, render_episode, tool_world_dataset
from pidistill.envs.tool_world.customer import STOP, Customer, said_all
from pidistill.envs.tool_world.dataset import expert_turn
from pidistill.envs.tool_world.kinds import HARD, PLAIN
from pidistill.envs.tool_world.shop import Shop, shop_image
from pidistill.envs.tool_world.tasks import draw_tasks, split_users
from pidistill.envs.tool_world.tools import CHANGING, TOOLS, calculate
from pidistill.envs.tool_world.wishes import Call, Say, Wish
from pidistill.errors import InputError
from pidistill.types import Example

SIZES = {"train": 120, "validation": 40, "test": 80}
ENVIRONMENT = ToolWorldEnvironment()


@pytest.fixture(scope="module")
def tasks():
    return {split: draw_tasks(split, n) for split, n in SIZES.items()}


@pytest.fixture(scope="module")
def every_task(tasks):
    return [task for split in tasks.values() for task in split]


@pytest.fixture(scope="module")
def experts_turns(every_task):
    """The turns of the expert in every task; playing raises unless the reward is 1 at its last turn."""
    return [play_expert(task) for task in every_task]


def begin(task):
    return ENVIRONMENT.reset(Example("row", [], data={"task": task}))


def play(task, moves):
    """(reward, parts, whether the episode ended) of an agent's moves; those after the end are not made."""
    state, step = begin(task), None
    for move in moves:
        step = ENVIRONMENT.step(state, expert_turn(move), truncated=False)
        if step.done:
            break
    return step.reward, step.reward_parts, step.done


def of_kind(tasks, kind):
    """A task with such a wish, and the wish."""
    return next((task, wish) for task in tasks for wish in task.wishes if wish.kind == kind)


# ------------------------------------------------------------------------------------------- who gets the reward


def test_the_expert_solves_every_task(every_task, experts_turns):
    assert all(turns[-1]["role"] == "assistant" for turns in experts_turns)
    drawn = {wish.kind for task in every_task for wish in task.wishes}
    assert drawn == {kind.__name__ for kind in (*PLAIN, *HARD)} | {"need_a_human"}, "a kind that no task has"


def test_no_call_of_the_expert_is_refused(every_task, experts_turns):
    """The reward alone would not tell: an expert that fails to identify the customer knows its id all the same."""
    for task, turns in zip(every_task, experts_turns, strict=True):
        assert not [turn for turn in turns if turn["role"] == "tool" and turn["content"].startswith("Error")]
        assert turns[turns.index(expert_turn(task.calls[0])) + 1]["content"] == task.user_id
    moved = [task for task in every_task if any(call.name == "modify_user_address" for call in task.calls)]
    assert any(task.calls[0].name == "find_user_by_name_zip" for task in moved), "where it was refused once"


def test_an_agent_that_does_nothing_solves_no_task(every_task):
    """Though for some tasks nothing is to be changed: there, something must be said."""
    silent = [Say("Hello.")] * 3
    hasty = [Say("Is there anything else?")] * 4
    for row, task in enumerate(every_task):
        reward, _, done = play(task, hasty if row % 2 else silent)
        assert done and reward == 0.0, task.instruction
    unchanged = sum(not task.writes for task in every_task) / len(every_task)
    assert 0.1 < unchanged < 0.2
    assert all(task.outputs for task in every_task if not task.writes)


def random_move(rng, shop):
    if rng.random() < 0.3:
        return Say(
            rng.choice(["Is there anything else?", "Your email?", "Do you confirm?", "It is done.", "I cannot do that.", "12"])
        )
    one = rng.choice(list(TOOLS.values()))
    tables = {"user_id": "users", "order_id": "orders", "payment_id": "payments", "product_id": "products", "email": "users"}
    arguments = {}
    for name, schema in one.parameters["properties"].items():
        if name in tables:
            arguments[name] = rng.choice(shop.rows(f"SELECT {name} FROM {tables[name]}"))[name]
        elif schema["type"] == "array":
            arguments[name] = [rng.choice(shop.rows("SELECT variant_id FROM variants"))["variant_id"]]
        else:
            arguments[name] = rng.choice(schema.get("enum", ["1 + 1"]))
    return Call(one.name, arguments)


@pytest.mark.parametrize(
    "count", [20, pytest.param(SIZES["test"], marks=pytest.mark.slow(reason="20 tasks are played in the default run"))]
)
def test_random_valid_calls_solve_next_to_nothing(count, tasks):
    rng, shop = random.Random(0), Shop(shop_image(0))
    rewards = [play(task, [random_move(rng, shop) for _ in range(20)])[0] for task in tasks["test"][:count]]
    assert sum(rewards) <= 1


def test_half_of_the_experts_episode_has_no_reward(tasks):
    """Writes without what must be said, and what must be said without the writes."""
    for task in [task for task in tasks["test"] if task.writes and task.outputs and not task.wishes[-1].ends][:10]:
        mute = [*task.writes, *[Say("Is there anything else?")] * task.level]
        assert play(task, mute)[:2] == (0.0, {"database": 1.0, "outputs": 0.0})
        idle = [move for move in task.moves if isinstance(move, Say)]
        assert play(task, idle)[:2] == (0.0, {"database": 0.0, "outputs": 1.0})


# ------------------------------------------------------------------------------------------- rules that no tool checks


def forbidden(task, wish, shop):
    """The call that the customer of a denied wish asks for, as a tool would take it."""
    order_id = next(
        (
            call.arguments["order_id"]
            for call in reversed(wish.moves)
            if isinstance(call, Call) and "order_id" in call.arguments
        ),
        None,
    )
    order = shop.one("SELECT * FROM orders WHERE order_id = ?", order_id)
    item = shop.one("SELECT variant_id FROM items WHERE order_id = ? ORDER BY position", order_id)["variant_id"]
    asked = re.search(r"\b(card|wallet|gift)_\d+", wish.says)
    if wish.kind.startswith("cancel"):
        return Call("cancel_order", {"order_id": order_id, "reason": "no longer needed"})
    if wish.kind.startswith("return"):
        payment_id = asked[0] if asked else order["payment_id"]
        return Call("return_items", {"order_id": order_id, "variant_ids": [item], "payment_id": payment_id})
    if wish.kind.startswith("change_payment"):
        return Call("modify_payment", {"order_id": order_id, "payment_id": asked[0]})
    name = re.search(r"for a ([\w ]+)\.", wish.says)[1]
    sql = "SELECT variant_id FROM variants JOIN products USING (product_id) WHERE name = ? AND available"
    new = shop.one(sql, name)["variant_id"]
    arguments = {"variant_ids": [item], "new_variant_ids": [new], "payment_id": order["payment_id"]}
    return Call("exchange_items", {"order_id": order_id} | arguments)


UNCHECKED = (
    *("cancel_for_another_reason", "return_too_late", "return_to_another_card", "change_payment_to_a_short_gift_card"),
    "exchange_for_another_product",
)


@pytest.mark.parametrize("kind", UNCHECKED)
def test_the_tools_allow_what_the_policy_forbids_and_the_reward_does_not(kind, every_task):
    task, wish = of_kind(every_task, kind)
    call = forbidden(task, wish, Shop(shop_image(0)))
    state = begin(task)
    step = ENVIRONMENT.step(state, expert_turn(call), truncated=False)
    assert not step.observations[0]["content"].startswith("Error"), step.observations
    reward, parts, _ = play(task, [call, *task.moves])
    assert (reward, parts["database"]) == (0.0, 0.0)


def test_somebody_elses_order_is_not_the_customers(every_task):
    shop = Shop(shop_image(0))
    for task in every_task:
        for wish in task.wishes:
            if wish.kind == "cancel_for_somebody_else":
                order = shop.one("SELECT user_id FROM orders WHERE order_id = ?", wish.moves[0].arguments["order_id"])
                assert order["user_id"] != task.user_id


def test_a_return_without_asking_is_not_what_the_customer_wanted(every_task):
    task, wish = of_kind(every_task, "return_item_if_enough")
    assert wish.declined and not any(call.name == "return_items" for call in wish.moves if isinstance(call, Call))
    call = forbidden(task, wish, Shop(shop_image(0)))
    assert play(task, [call, *task.moves])[1]["database"] == 0.0


def test_an_agent_that_recites_numbers_solves_no_task_that_asks_for_one(tasks):
    """Every question's answer is among them; the expert's own words, with as many numbers as it says, count."""
    questions = [task for task in tasks["test"] if not task.writes]
    recital = [Say(f"{' '.join(map(str, range(at, at + 100)))}. Do you confirm?") for at in range(1, 801, 100)]
    bye = [Say("Is there anything else?")] * 9
    assert questions and not any(play(task, recital + bye)[0] for task in questions)
    talkative = [Say(f"{' '.join(map(str, range(1, 15)))}. Do you confirm?")]
    assert all(play(task, [*task.moves[:2], *talkative, *task.moves[2:]])[0] == 1.0 for task in questions)


def test_a_needless_hand_over_ends_the_episode_without_reward(tasks):
    task = next(task for task in tasks["test"] if not task.wishes[-1].ends)
    moves = [*task.moves[:-1], Call("transfer_to_human", {"user_id": task.user_id, "topic": "invoice"})]
    reward, parts, done = play(task, moves)
    assert done and (reward, parts["database"]) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------- tasks and rows


def test_tasks_depend_on_their_arguments_alone(tasks):
    shop_image.cache_clear()
    split_users.cache_clear()
    again = draw_tasks("test", 30)
    assert again == tasks["test"][:30]
    assert draw_tasks("test", 5, world_seed=1) != again[:5]
    assert [task.level for task in again[:8]] == [1, 2, 3, 4] * 2
    assert {task.level for task in draw_tasks("test", 4, levels=(2,))} == {2}


def test_splits_share_no_user_and_no_task(tasks):
    users = [set(split_users(0)[split]) for split in SIZES]
    assert sum(map(len, users)) == len(set.union(*users)) == 200
    for split, members in zip(SIZES, users, strict=True):
        assert {task.user_id for task in tasks[split]} <= members
    instructions = [task.instruction for split in tasks.values() for task in split]
    assert len(set(instructions)) == len(instructions)


def test_level_one_denies_nothing_and_the_others_do(every_task):
    denied = Counter(task.level for task in every_task if any(wish.denied for wish in task.wishes))
    assert denied[1] == 0 and all(denied[level] > 5 for level in (2, 3, 4))
    assert all(len(task.wishes) == task.level for task in every_task)


def test_rows_hold_the_privileged_information_for_the_teacher_alone():
    rows = {kind: tool_world_dataset("train", 6, kind)[5] for kind in ("calls", "names", "instruction", "none")}
    task = rows["calls"].data["task"]
    assert all(row.messages == rows["none"].messages and row.id == "tool_world train row 5" for row in rows.values())
    assert [tool["function"]["name"] for tool in rows["none"].tools] == list(TOOLS) and len(TOOLS) == 15
    assert rows["none"].privileged is None and rows["none"].completion is None
    lines = rows["calls"].privileged.splitlines()[1:]
    assert len(lines) == len(task.calls) and all(f"{call.name}(" in line for call, line in zip(task.calls, lines, strict=True))
    assert rows["names"].privileged.splitlines()[1:] == [call.name for call in task.calls]
    assert (
        all(wish.says in rows["instruction"].privileged for wish in task.wishes)
        and task.identity in rows["instruction"].privileged
    )
    assert task.wishes[1].says not in rows["none"].messages[1]["content"]


def test_a_demonstration_is_the_experts_episode():
    row = tool_world_dataset("train", 1, completion=True)[0]
    calls = [turn["tool_calls"][0]["function"]["name"] for turn in row.completion if turn.get("tool_calls")]
    assert calls == [call.name for call in row.data["task"].calls]
    shown = render_episode([*row.messages, *row.completion])
    assert "policy: You are the service agent" in shown and "agent: find_user_by_" in shown and "tool: " in shown


def test_the_episode_of_the_docs_is_the_one_that_its_code_prints(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    (shown,), (code,) = (re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for kind in ("text", "python"))
    exec(compile(code, "docs/tools.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines())
    assert all(line.startswith(start.removesuffix(" ...")) for line, start in zip(printed, shown.splitlines(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "dev"}, "dataset.split=dev is unknown"),
        ({"privileged": "all"}, "dataset.privileged=all is unknown"),
        ({"levels": (5,)}, "dataset.levels is"),
        ({"n": 0}, "dataset.n=0 must"),
    ],
)
def test_rows_that_cannot_be_made_are_refused(arguments, said):
    with pytest.raises(InputError, match=re.escape(said)):
        tool_world_dataset(**{"split": "train"} | arguments)


# ------------------------------------------------------------------------------------------- the environment


def test_the_tool_world_plays_its_own_rows(tasks):
    assert isinstance(ENVIRONMENT, Environment)
    with pytest.raises(InputError, match="not a ToolTask of the tool world"):
        ENVIRONMENT.reset(Example("row 1", [], data={}))
    state = begin(tasks["test"][0])
    step = ENVIRONMENT.step(state, {"role": "assistant", "content": "cut of"}, truncated=True)
    assert step.done and step.reward == 0.0
    with pytest.raises(InputError, match="has ended"):
        ENVIRONMENT.step(state, {"role": "assistant", "content": "more"}, truncated=False)


def test_calls_go_to_the_shop_and_text_to_the_customer(tasks):
    state = begin(tasks["test"][0])
    hidden = {"role": "assistant", "content": "<think>\nIs there anything else?\n</think>\n\nYour email?"}
    step = ENVIRONMENT.step(state, hidden, truncated=False)
    assert step.observations == [{"role": "user", "content": state.task.identity}] and state.said == ["Your email?"]
    both = expert_turn(Call("list_products", {})) | {"content": "Is there anything else?"}
    step = ENVIRONMENT.step(state, both, truncated=False)
    assert step.observations[0]["role"] == "tool" and state.said == ["Your email?"]
    step = ENVIRONMENT.step(state, {"role": "assistant", "content": "{", "tool_call_error": "not valid JSON"}, truncated=False)
    assert step.observations == [{"role": "tool", "content": "Error: not valid JSON"}]


def test_episodes_in_threads_have_databases_of_their_own(tasks):
    """Turn by turn, each turn in whatever thread is free, as the collector does."""
    chosen = tasks["test"][:8]
    states = [begin(task) for task in chosen]
    rewards = [0.0] * len(chosen)

    def turn(row, move):
        rewards[row] += ENVIRONMENT.step(states[row], expert_turn(move), truncated=False).reward

    with ThreadPoolExecutor(4) as threads:
        for number in range(max(len(task.moves) for task in chosen)):
            due = [(row, task.moves[number]) for row, task in enumerate(chosen) if number < len(task.moves)]
            list(threads.map(lambda pair: turn(*pair), due))
    assert rewards == [1.0] * len(chosen)


def test_a_state_can_be_pickled_between_any_two_turns(tasks):
    """As worker processes do (`ProcessEnvironment`): the copy goes on, and what it changes the original does not have."""
    task = next(task for task in tasks["test"] if len(task.writes) > 1)
    state, reward = begin(task), 0.0
    untouched = state.shop.fingerprint()
    for move in task.moves:
        before, state = state, pickle.loads(pickle.dumps(state))
        reward += ENVIRONMENT.step(state, expert_turn(move), truncated=False).reward
        assert before.shop.fingerprint() == untouched or move not in task.writes[:1]
    assert reward == 1.0 and state.done and not before.done


# ------------------------------------------------------------------------------------------- tools


def test_a_refused_call_changes_nothing():
    shop = Shop(shop_image(0))
    before = shop.fingerprint()
    shipped = shop.one("SELECT * FROM orders WHERE status = 'shipped'")
    pending = shop.one("SELECT * FROM orders WHERE status = 'pending'")
    item = shop.one("SELECT variant_id FROM items WHERE order_id = ?", pending["order_id"])["variant_id"]
    gone = shop.one("SELECT variant_id FROM variants WHERE NOT available")["variant_id"]
    other = shop.one("SELECT payment_id FROM payments WHERE user_id != ?", pending["user_id"])["payment_id"]
    home = {"street": "1 Oak Street", "city": "Dale", "zip": "13100"}
    swap = {"order_id": pending["order_id"], "variant_ids": [item], "payment_id": pending["payment_id"]}
    refused = [
        ("cancel_order", {"order_id": shipped["order_id"], "reason": "no longer needed"}, "is shipped, not pending"),
        ("cancel_order", {"order_id": pending["order_id"], "reason": "found cheaper"}, "reason is"),
        ("cancel_order", {"order_id": "O1'; DROP TABLE orders; --", "reason": "no longer needed"}, "no order"),
        ("modify_order_items", swap | {"new_variant_ids": [gone]}, "out of stock"),
        ("modify_order_items", swap | {"new_variant_ids": [item]}, "the item itself"),
        ("modify_order_items", swap | {"new_variant_ids": []}, "do not match"),
        ("modify_order_items", swap | {"variant_ids": [gone], "new_variant_ids": [item]}, "has no item"),
        ("modify_payment", {"order_id": pending["order_id"], "payment_id": other}, "is no payment method of"),
        ("modify_payment", {"order_id": pending["order_id"], "payment_id": pending["payment_id"]}, "already"),
        ("return_items", swap, "is pending, not delivered"),
        ("modify_user_address", {"user_id": "nobody"} | home, "no user nobody"),
        ("transfer_to_human", {"user_id": "nobody", "topic": "invoice"}, "no user nobody"),
    ]
    for name, arguments, said in refused:
        with pytest.raises(ToolError, match=re.escape(said)):
            TOOLS[name].call(arguments, shop)
        assert shop.fingerprint() == before, name


def test_payments_and_refunds_reach_the_right_account():
    shop = Shop(shop_image(0))
    sql = "SELECT order_id, p.payment_id AS gift, balance FROM orders JOIN payments AS p USING (user_id) WHERE "
    row = shop.one(sql + "status = 'pending' AND kind = 'gift_card'")
    total = TOOLS["get_order"].function(shop, row["order_id"])["total"]

    def balance():
        return shop.one("SELECT balance FROM payments WHERE payment_id = ?", row["gift"])["balance"]

    TOOLS["modify_payment"].call({"order_id": row["order_id"], "payment_id": row["gift"]}, shop)
    assert balance() == row["balance"] - total
    TOOLS["cancel_order"].call({"order_id": row["order_id"], "reason": "no longer needed"}, shop)
    assert balance() == row["balance"]
    booked = shop.rows(
        "SELECT payment_id, sum(amount) AS amount FROM ledger WHERE order_id = ? GROUP BY payment_id", row["order_id"]
    )
    assert {one["amount"] for one in booked} == {0}


def test_fingerprints_change_with_any_content_and_not_with_its_order(every_task):
    one, other = Shop(shop_image(0)), Shop(shop_image(0))
    for shop, amounts in ((one, (1, 2)), (other, (2, 1))):
        for amount in amounts:
            shop.change("INSERT INTO ledger VALUES ('O1', 'card_1', ?)", amount)
    assert one.fingerprint() == other.fingerprint() != Shop(shop_image(0)).fingerprint()
    start = Shop(shop_image(0)).fingerprint()
    assert all((task.final_fingerprint == start) == (not task.writes) for task in every_task[:60])
    assert {call.name for task in every_task for call in task.writes} == {function.__name__ for function in CHANGING}


@pytest.mark.parametrize(("expression", "value"), [("(12 + 30) * 2", "84"), ("-3 + 10/4", "-0.5"), ("1/3", "0.33")])
def test_an_arithmetic_expression_is_calculated(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression", ["2**9", "__import__('os')", "1/0", "9e999", "a", "", "(" * 199, "1" * 201, "True", "[1]"]
)
def test_an_expression_that_is_not_arithmetic_is_refused(expression):
    with pytest.raises(ToolError):
        calculate(expression)


# ------------------------------------------------------------------------------------------- the customer


def customer(*wishes):
    return Customer("My email address is a@b.c.", wishes)


def wish(says="I want to cancel O1.", **fields):
    return Wish("cancel", says, (), {"order": "It is O1.", "reason": "I no longer need it."}, **fields)


def test_the_customer_answers_what_it_is_asked():
    one = customer(wish(), wish("Second."))
    assert one.answer("How can I help you?") == "I am not sure what you mean. I want to cancel O1."
    assert one.answer("Could you give me your email address?") == "My email address is a@b.c."
    assert one.answer("Which order, and for what reason?") == "It is O1. I no longer need it."
    assert one.answer("Thank you, a@b.c is your email. I would cancel O1 and refund 5. Do you confirm?") == "Yes, please."
    assert one.answer("Order O1 has been cancelled.") == "Thank you. Second."
    assert one.answer("I am sorry, I can't do that.") == f"I see. That is all. {STOP}"


def test_a_denied_customer_takes_no_offer():
    one = customer(wish(denied=True), wish("Second."))
    assert one.answer("I cannot cancel it. Would you like me to transfer you?") == "I see. Second."


def test_a_customer_that_declines_continues_with_the_next_wish():
    one = customer(wish(declined=True, confirms="No.", outputs=("15",)), wish("Second."))
    assert one.answer("I would refund 15 dollars. Shall I?") == "No. Second."
    assert (
        customer(wish(declined=True, confirms="No.", outputs=("15",))).answer("It would be 15.") == f"No. That is all. {STOP}"
    )


def test_the_customer_ends_the_talk_after_six_turns_that_do_not_help():
    one = customer(wish())
    answers = [one.answer(text) for text in ("Hm.", "Well.", "Your email?", "Hm.", "Well.", "So.")]
    assert [STOP in answer for answer in answers] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("text", "said"),
    [("It is 1,200 dollars.", True), ("$1200.00", True), ("1200", True), ("12000", False), ("V1200", False), ("1200.5", False)],
)
def test_numbers_count_as_said_where_they_stand_by_themselves(text, said):
    assert said_all(text, ("1200",)) is said
