"""Test a recorded episode as an environment: who makes its calls gets its answers; who does not is told so, or it ends."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.data import chat_dataset, trace_dataset
from pidistill.data.load import check_references
from pidistill.envs import Environment, ReplayEnvironment
from pidistill.envs.replay import MISMATCH_ERROR, recorded_steps
from pidistill.errors import InputError
from pidistill.privileged.trace_task import AgentTrace
from pidistill.types import Example

DATA = os.environ.get("PIDISTILL_TEST_DATA")
REAL = Path(DATA or ".") / "tau_bench_airline_gpt4o.jsonl"
needs_data = pytest.mark.skipif(not REAL.is_file(), reason="PIDISTILL_TEST_DATA names no folder with the τ-bench traces")

USER = {"role": "user", "content": "Book me a flight."}


def calling(*calls: tuple[str, dict]) -> dict:
    made = [{"id": f"c{i}", "function": {"name": name, "arguments": given}} for i, (name, given) in enumerate(calls)]
    return {"role": "assistant", "content": "", "tool_calls": made}


def tagged(name: str, given: dict, tag: str = "action") -> dict:
    return {"role": "assistant", "content": f"So.\n<{tag}>{json.dumps({'name': name, 'arguments': given})}</{tag}>"}


def saying(text: str) -> dict:
    return {"role": "assistant", "content": text}


TURNS = [
    calling(("look", {"city": "SEA", "day": 3})),
    {"role": "tool", "name": "look", "content": "F1"},
    saying("Shall I book F1?"),
    {"role": "user", "content": "yes"},
    calling(("think", {"thought": "now"}), ("book", {"flight": "F1"})),
    {"role": "tool", "name": "think", "content": ""},
    {"role": "tool", "name": "book", "content": "ok"},
    saying("Done."),
]
STEPS = recorded_steps(TURNS)


def example(turns=TURNS, reward: float | None = 1.0) -> Example:
    return Example("row", [USER], data={"trace": AgentTrace("row", "t", [USER], turns, reward, None, None, True)})


def play(environment: ReplayEnvironment, turns: list[dict], row: Example | None = None):
    """(observations, rewards, parts' sum, done) of the turns up to the end of the episode."""
    state = environment.reset(row or example())
    observations, rewards, followed = [], [], 0.0
    for turn in turns:
        step = environment.step(state, turn, truncated=False)
        observations.append(step.observations)
        rewards.append(step.reward)
        followed += step.reward_parts["followed"]
        if step.done:
            return observations, rewards, pytest.approx(followed), True
    return observations, rewards, pytest.approx(followed), False


def test_the_recorded_turns_get_the_recorded_answers_and_the_traces_reward():
    for reward in (1.0, 0.0, 0.25):
        played = play(ReplayEnvironment(), [turn for turn, _ in STEPS], example(reward=reward))
        assert played == ([answers for _, answers in STEPS[:-1]] + [[]], [0.0, 0.0, 0.0, reward], 1.0, True)
    assert isinstance(ReplayEnvironment(), Environment)


def test_calls_are_compared_in_any_form_and_words_are_not_compared():
    both = calling(("think", {"thought": "now"}), ("book", {"flight": "F1"}))
    turns = [tagged("look", {"day": 3, "city": "SEA"}), saying("?"), both, saying("Bye")]
    assert play(ReplayEnvironment(), turns)[1:] == ([0.0, 0.0, 0.0, 1.0], 1.0, True)
    turns[0] = tagged("look", {"day": 3, "city": "SEA"}, tag="tool_call")
    assert play(ReplayEnvironment(), turns)[3]


@pytest.mark.parametrize(
    "turn",
    [
        calling(("look", {"city": "LAX", "day": 3})),
        calling(("look", {"city": "SEA"})),
        calling(("book", {"city": "SEA", "day": 3})),
        calling(("look", {"city": "SEA", "day": 3}), ("look", {"city": "SEA", "day": 3})),
        saying("I look in SEA on day 3."),
        saying('<action>{"name": "look", "arguments": </action>'),
        saying('<think><action>{"name": "look", "arguments": {"city": "SEA", "day": 3}}</action></think>Looking.'),
    ],
    ids=["value", "argument", "tool", "twice", "text", "unreadable", "thought"],
)
def test_another_call_ends_the_episode_or_gets_the_error(turn):
    assert play(ReplayEnvironment(mismatch_reward=-0.5), [turn]) == ([[]], [-0.5], 0.0, True)
    patient = ReplayEnvironment(on_mismatch="error", max_errors=2)
    (told, answered), rewards, followed, done = play(patient, [turn, STEPS[0][0]])
    assert answered == STEPS[0][1] and rewards == [0.0, 0.0] and followed == 0.25 and not done
    calls = turn.get("tool_calls") or []
    assert [m["role"] for m in told] == (["tool"] * len(calls) or ["user"])
    assert {m["content"] for m in told} == {MISMATCH_ERROR} and [m.get("tool_call_id") for m in told] == (
        [call["id"] for call in calls] or [None]
    )
    assert play(patient, [turn, turn, turn])[1:] == ([0.0, 0.0, 0.0], 0.0, True)


def test_a_call_that_cannot_be_read_is_answered_with_the_reason():
    turn = tagged("look", {"city": "SEA", "day": 3}) | {"tool_call_error": "not valid JSON"}
    assert play(ReplayEnvironment(mismatch_reward=-0.5), [turn]) == ([[]], [-0.5], 0.0, True)
    told = play(ReplayEnvironment(on_mismatch="error"), [turn])[0]
    assert told == [[{"role": "tool", "content": "Error: not valid JSON"}]]


def test_a_call_where_the_agent_only_spoke_is_a_mismatch():
    assert play(ReplayEnvironment(), [STEPS[0][0], STEPS[0][0]])[1:] == ([0.0, 0.0], 0.25, True)


XML_CALL = "<tool_call>\n<function=book>\n<parameter=seats>\n2\n</parameter>\n</function>\n</tool_call>"
BOOK = {"name": "book", "parameters": {"type": "object", "properties": {"seats": {"type": "integer"}}}}


def test_a_recorded_call_as_xml_or_as_python_writes_it_is_compared_as_a_call():
    for text in (XML_CALL, "<tool_call>{'arguments': {'seats': 2}, 'name': 'book'}</tool_call>"):
        row = replace(example([saying(text), {"role": "tool", "content": "ok"}, saying("Done.")]), tools=[BOOK])
        for turn, reward in ((calling(("book", {"seats": 2})), 1.0), (saying("hello"), 0.0), (saying(text), 1.0)):
            environment = ReplayEnvironment()
            state = environment.reset(row)
            step = environment.step(state, turn, truncated=False)
            step = step if step.done else environment.step(state, saying("bye"), truncated=False)
            assert (step.done, step.reward) == (True, reward)


@pytest.mark.parametrize("text", ["<tool_call>book(2)</tool_call>", '<action>{"name": "book", "arguments": {'])
def test_a_recorded_call_that_cannot_be_read_is_not_matched_by_a_turn_without_it(text):
    environment, row = ReplayEnvironment(), example([saying(text)])
    for turn, reward in ((saying("hello"), 0.0), (saying(text), 1.0)):
        assert environment.step(environment.reset(row), turn, truncated=False).reward == reward


def test_arguments_of_free_tools_are_not_compared():
    turns = [STEPS[0][0], saying("?"), calling(("think", {"thought": "other"}), ("book", {"flight": "F1"})), saying("Bye")]
    assert play(ReplayEnvironment(), turns)[1] == [0.0, 0.0, 0.0]
    assert play(ReplayEnvironment(free_arguments=["think"]), turns)[1] == [0.0, 0.0, 0.0, 1.0]


def test_an_episode_that_a_limit_ends_has_the_reward_of_a_mismatch():
    environment = ReplayEnvironment(on_mismatch="error", max_errors=5, mismatch_reward=-1.0)
    state = environment.reset(example())
    environment.step(state, TURNS[0], truncated=False)
    assert environment.unfinished(state).reward == -1.0 and ReplayEnvironment().unfinished(state).reward == 0.0


UNION = {"type": ["integer", "number", "string"]}


@pytest.mark.parametrize(
    ("schema", "recorded", "made", "matches"),
    [
        (UNION, "5", 5, True),
        (UNION, 5, "5", True),
        (UNION, "5.5", 5.5, True),
        (UNION, "five", "five", True),
        (UNION, "007", 7, False),
        (UNION, "6", 5, False),
        ({"type": "integer"}, 5, "5", False),
        ({"type": "string"}, "5", 5, False),
        (None, "5", 5, False),
    ],
)
def test_a_text_is_the_number_that_xml_calls_read_it_as_where_the_schema_permits_both(schema, recorded, made, matches):
    turns = [calling(("pay", {"amount": recorded})), {"role": "tool", "name": "pay", "content": "ok"}, saying("Paid.")]
    parameters = {"type": "object", "properties": {} if schema is None else {"amount": schema}}
    tools = [{"type": "function", "function": {"name": "pay", "parameters": parameters}}]
    row = replace(example(turns), tools=tools)
    _, rewards, _, done = play(ReplayEnvironment(), [calling(("pay", {"amount": made})), saying("Done.")], row)
    assert done and rewards == ([0.0, 1.0] if matches else [0.0])


def test_a_turn_cut_short_never_matches():
    environment = ReplayEnvironment(on_mismatch="error")
    state = environment.reset(example())
    step = environment.step(state, STEPS[0][0], truncated=True)
    assert step.done and step.reward == 0.0


@settings(deadline=None)
@given(st.lists(st.sampled_from(["call", "say"]), min_size=1, max_size=6), st.lists(st.booleans(), max_size=6))
def test_the_reward_is_the_traces_exactly_if_every_turn_matches(kinds, right):
    turns = []
    for i, kind in enumerate(kinds):
        turns += [calling(("f", {"i": i})) if kind == "call" else saying(f"{i}"), {"role": "user", "content": f"answer {i}"}]
    turns.pop()
    said = [
        turn if ok else calling(("g", {}))
        for turn, ok in zip(turns[::2], [*right, *[True] * len(kinds)][: len(kinds)], strict=True)
    ]
    _, rewards, followed, done = play(ReplayEnvironment(), said, example(turns, reward=0.7))
    matched = next((i for i, (a, b) in enumerate(zip(said, turns[::2], strict=True)) if a is not b), len(kinds))
    assert done and sum(rewards) == (0.7 if matched == len(kinds) else 0.0) and followed == matched / len(kinds)


def test_rows_that_cannot_be_replayed_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [USER]}) + "\n")
    (row,) = chat_dataset(str(tmp_path / "rows.jsonl"), privileged_key=None)
    with pytest.raises(InputError, match="row 0 has no recorded episode to replay; set dataset._component_"):
        ReplayEnvironment().reset(row)
    with pytest.raises(InputError, match="has no reward, which the episode would get; write a number in the row"):
        ReplayEnvironment().reset(example(reward=None))
    for settings_, said in (({"on_mismatch": "stop"}, "on_mismatch=stop is unknown"), ({"max_errors": 0}, "max_errors=0 must")):
        with pytest.raises(InputError, match=said):
            ReplayEnvironment(**settings_)


def test_a_trace_whose_reward_is_null_is_refused_before_the_environment_plays(tmp_path):
    rows = [{"task_id": i, "reward": reward, "messages": [USER, *TURNS]} for i, reward in enumerate([1.0, None, 0.0])]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    solved, unknown, failed = trace_dataset(str(tmp_path / "traces.jsonl"))
    node = {"_component_": "pidistill.envs.ReplayEnvironment"}
    check_references(node, [solved, failed])
    with pytest.raises(InputError, match=r"traces\.jsonl row 1 has no reward, .* set dataset\.reward_key where it is null"):
        check_references(node, [solved, unknown, failed])
    routed = {"key": "task", "environments": {"0": node, "1": node, "2": {"_component_": "pidistill.envs.SingleTurn"}}}
    with pytest.raises(InputError, match=r"traces\.jsonl row 1 has no reward"):
        check_references(routed, [failed, unknown])


def test_a_source_without_any_call_that_is_read_is_refused_as_any_text_would_follow_it(tmp_path):
    turns = [saying("```bash\nls\n```"), {"role": "user", "content": "a.py"}, saying("Done.")]
    rows = [{"task_id": i, "reward": 1.0, "messages": [USER, *turns]} for i in range(2)]
    source, node = tmp_path / "traces.jsonl", {"_component_": "pidistill.envs.ReplayEnvironment"}

    def write(*all_rows):
        source.write_text("".join(json.dumps(row) + "\n" for row in all_rows))
        return list(trace_dataset(str(source), "full"))

    said = r"a replay would reward any text: .*: 2 of the 2 .* no call that is read \(first: traces.jsonl row 0, .*'```bash"
    with pytest.raises(InputError, match=said):
        check_references(node, write(*rows))
    check_references(node, write(*rows, {"task_id": 2, "reward": 0.0, "messages": [USER, *TURNS]}))


def test_xml_calls_without_tags_around_them_are_compared(tmp_path):
    bare = saying("So.\n<function=bash>\n<parameter=command>\nls\n</parameter>\n</function>")
    turns = [bare, {"role": "user", "content": "a.py"}, saying("Done.")]
    (tmp_path / "traces.jsonl").write_text(json.dumps({"task_id": 0, "reward": 1.0, "messages": [USER, *turns]}))
    (row,) = trace_dataset(str(tmp_path / "traces.jsonl"))
    assert play(ReplayEnvironment(), [saying("I like turtles."), saying("Still.")], row)[1:] == ([0.0], 0.0, True)
    assert play(ReplayEnvironment(), [calling(("bash", {"command": "ls"})), saying("Bye.")], row)[1] == [0.0, 1.0]


@needs_data
def test_every_real_trace_can_be_followed_to_its_reward():
    rows = trace_dataset(str(REAL), "none")
    assert len(rows) == 30
    for row in rows:
        trace = row.data["trace"]
        steps = recorded_steps(trace.turns)
        observations, rewards, followed, done = play(ReplayEnvironment(), [turn for turn, _ in steps], row)
        assert done and sum(rewards) == trace.reward and followed == 1.0 and len(observations) == trace.steps
