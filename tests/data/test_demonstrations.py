"""Test demonstrations: the ids that a policy would have sampled, masked like a rollout; rows that are too long."""

import logging
from dataclasses import replace

import pytest

from pidistill.data import RecipeData, build_demonstrations, demonstration
from pidistill.data.demonstrations import earlier_turns_differ, row_completions
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.errors import InputError
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Example, PromptPair
from tests.support.chat_templates import QWEN3
from tests.support.tiny_tokenizers import qwen_folder


def pair_of(example, tokenizer):
    prompt = tokenizer.encode_prompt(example.messages)
    return PromptPair(prompt, prompt, has_privileged=False)


def test_a_demonstration_is_the_conversation_with_observations_masked():
    tokenizer = tiny_world_tokenizer()
    for example in list(tiny_world_dataset("train", completion="cot"))[:5]:
        rollout = demonstration(example, pair_of(example, tokenizer), tokenizer)
        words = tokenizer.decode(rollout.completion).split()
        own = [w for w, m in zip(words, rollout.policy_mask, strict=True) if m]
        seen = [w for w, m in zip(words, rollout.policy_mask, strict=True) if not m]
        turns = [m["content"] for m in example.completion if m["role"] == "assistant"]
        assert own == " end ".join([*turns, ""]).split()
        assert seen == " ".join(m["content"] for m in example.completion if m["role"] == "tool").split()
        assert words[-1] == "end"  # the end of the last turn is trained


def test_a_demonstration_that_is_too_long_is_refused_or_dropped_and_counted(caplog):
    caplog.set_level(logging.INFO)
    tokenizer = tiny_world_tokenizer()
    examples = list(tiny_world_dataset("train", completion="cot"))[:4]
    examples[1:2] = [Example(id="short", messages=examples[1].messages, completion=[{"role": "assistant", "content": "go"}])]
    prompts = [(example, pair_of(example, tokenizer)) for example in examples]
    with pytest.raises(InputError, match=r"row 0: prompt \(9 tokens\) plus completion \(\d+\) exceeds max_seq_len 20 by \d+"):
        build_demonstrations(prompts, tokenizer, max_seq_len=20, on_overflow=None)
    kept, dropped = build_demonstrations(prompts, tokenizer, max_seq_len=20, on_overflow="drop")
    assert [rollout.example.id for rollout in kept] == ["short"]
    assert dropped == 3 and "1 demonstrations fit into max_seq_len 20; 3 are left out" in caplog.messages
    with pytest.raises(InputError, match="all 4 demonstrations are longer"):
        build_demonstrations(prompts, tokenizer, max_seq_len=5, on_overflow="drop")


def test_a_row_without_an_assistant_turn_is_refused():
    tokenizer = tiny_world_tokenizer()
    (example,) = list(tiny_world_dataset("train"))[:1]
    with pytest.raises(InputError, match="has no assistant turn"):
        demonstration(example, pair_of(example, tokenizer), tokenizer)


TWO_TURNS = [
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]


def rows_of_turns(tokenizer, *completions):
    examples = [
        Example(id=f"row {i}", messages=[{"role": "user", "content": "2+2?"}], completion=completion)
        for i, completion in enumerate(completions)
    ]
    return [(example, pair_of(example, tokenizer)) for example in examples]


def test_earlier_turns_in_another_form_than_a_server_shows_are_said_once_with_the_count(tmp_path, caplog):
    """Qwen3 writes an empty thought into the last turn only, so a demonstration of two turns holds one too many."""
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, QWEN3)))
    rows = rows_of_turns(tokenizer, TWO_TURNS[:1], TWO_TURNS, TWO_TURNS)
    rollouts, _ = build_demonstrations(rows, tokenizer, max_seq_len=600, on_overflow=None)
    assert [earlier_turns_differ(rollout, tokenizer) for rollout in rollouts] == [False, True, True]
    (said,) = [record.getMessage() for record in caplog.records if "demonstrations" in record.getMessage()]
    assert "2 of 3 demonstrations hold turns before the last one in another form than a server shows (first: row 1)" in said


def test_no_warning_is_given_where_a_server_shows_the_same_turns(tmp_path, caplog):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path)))
    build_demonstrations(rows_of_turns(tokenizer, TWO_TURNS), tokenizer, max_seq_len=600, on_overflow=None)
    assert not caplog.records


def call_with(arguments, **fields):
    call = {"type": "function", "id": "0", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


def test_a_demonstration_whose_call_has_no_object_as_arguments_is_said_unless_the_turn_is_not_learned(tmp_path, caplog):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path)))
    end = [{"role": "tool", "content": "ok", "tool_call_id": "0"}, {"role": "assistant", "content": "Done."}]
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = rows_of_turns(tokenizer, [call_with({"a": 1})], [call_with('{"a": ')], [call_with("x", weight=0), *end], [bare])
    build_demonstrations(rows, tokenizer, max_seq_len=600, on_overflow=None)
    (said,) = [record.getMessage() for record in caplog.records if "no JSON object" in record.getMessage()]
    assert said.startswith("1 of 4 demonstrations") and "(first: row 1)" in said and '"weight": 0' in said


def test_a_demonstration_whose_call_the_tokenizer_itself_refuses_is_said_unless_the_turn_is_not_learned(tmp_path, caplog):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path)))
    texts = ("{'name': 'f', 'arguments': {'a': True}}", '{"name": "f", "arguments": {"a": true}}')
    python, right = ({"role": "assistant", "content": f"<tool_call>\n{text}\n</tool_call>"} for text in texts)
    end = [{"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."}]
    rows = rows_of_turns(tokenizer, [right, *end], [python | {"weight": 0}, *end], [right, end[0], python], [python, *end])
    tools = [{"type": "function", "function": {"name": "f"}}]
    shown = [(replace(example, tools=tools), pair) for example, pair in rows]
    build_demonstrations(rows, tokenizer, max_seq_len=600, on_overflow=None)
    assert not caplog.records, "without tools, the text may speak of calls"
    build_demonstrations(shown, tokenizer, max_seq_len=600, on_overflow=None)
    (said,) = [message for message in caplog.messages if "call" in message]
    assert said.startswith("2 of 4 demonstrations teach a malformed call, as written (first: row 2)")
    assert "the tool call is not valid JSON" in said


def test_recorded_ids_that_say_another_text_than_the_rows_completion_are_of_another_tokenizer():
    tokenizer = tiny_world_tokenizer(max_seq_len=96)
    messages, said = [{"role": "user", "content": "i1 g1"}], [{"role": "assistant", "content": "g1 i2"}]
    example = Example("row 0", messages, completion=said)
    prompt = tokenizer.encode_prompt(messages)
    own = demonstration(example, PromptPair(prompt, prompt, False), tokenizer)

    def read(ids):
        record = {"ids": ids, "policy": [1] * len(ids), "logprobs": [-1.0] * len(ids)}
        pair = (replace(example, data={"sampled": record}), PromptPair(prompt, prompt, False))
        return row_completions(RecipeData(tokenizer, [pair], [], {}, {}, 0, (), 1.0, 96))[0].completion

    for ids in (own.completion, own.completion[:-1]):  # a rollout that was cut off has no end of turn
        assert read(ids) == ids
    with pytest.raises(InputError, match=r"row 0: the ids of its `sampled` say '.*' where its completion says 'g1 i2'; it was"):
        read([i - 1 for i in own.completion])


def test_a_completion_in_place_of_a_sample_that_does_not_fit_in_a_view_is_refused_without_a_key_that_is_not_read():
    tokenizer = tiny_world_tokenizer(max_seq_len=96)
    example = Example("row 0", [{"role": "user", "content": "i1 g1"}], completion=[{"role": "assistant", "content": "g1 i2"}])
    prompt = tokenizer.encode_prompt(example.messages)
    for student, teacher, view in ((prompt * 4, prompt, "student"), (prompt, prompt * 4, "teacher")):
        data = RecipeData(tokenizer, [(example, PromptPair(student, teacher, True))], [], {}, {}, 0, (), 1.0, 10)
        with pytest.raises(InputError, match=rf"row 0: {view} prompt plus .* tokens, more than max_seq_len 10; ") as said:
            row_completions(data)
        assert "on_overflow" not in str(said.value) and "leave the row out" in str(said.value)
