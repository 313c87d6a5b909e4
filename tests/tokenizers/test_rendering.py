"""Test the check that token ids say what messages say: what it finds, what it refuses, and what it costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer
from pidistill.tokenizers.rendering import (
    Part,
    _encode_one_by_one,
    _turns_with_answers,
    check_written,
    encode_completion,
    find_missing,
)
from pidistill.types import Example
from tests.support.chat_templates import QWEN3
from tests.support.tiny_tokenizers import llama_folder, qwen_folder, r1_folder, spaced_folder, torchtune_llama3

PLAIN = (  # knows no tools and no reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMA = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "A table for two?"}
REASONED = {"role": "assistant", "reasoning_content": "Two and three make 5.", "content": "5"}


def call(content="", **arguments):
    function = {"name": "book", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def tool(content):
    return {"role": "tool", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendering")
    return {
        "plain": HFChatTokenizer(str(qwen_folder(folder / "plain", PLAIN))),
        "action": HFChatTokenizer(str(folder / "plain"), tool_format="action"),
        "qwen": HFChatTokenizer(str(qwen_folder(folder / "qwen"))),
        "qwen3": HFChatTokenizer(str(qwen_folder(folder / "qwen3", QWEN3))),
        "llama": HFChatTokenizer(str(llama_folder(folder / "llama"))),
    }


def learned(tokenizer, *completion, tools=None):
    pieces = encode_completion(tokenizer, [USER], completion, tools, "row 3")
    return [tokenizer.decode(piece.ids) for piece in pieces if piece.turn is not None]


# ------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("name", ["plain", "qwen", "qwen3"])
def test_white_space_alone_need_not_be_written(tokenizers, name):
    [said] = learned(tokenizers[name], assistant("<think>\n\n</think>\n\nHello"))
    assert said.endswith("Hello<|im_end|>")
    turns = [assistant("\n\n", tool_calls=call()["tool_calls"]), tool("\n"), assistant("Done.")]
    if name != "plain":
        assert learned(tokenizers[name], *turns, tools=[SCHEMA])[-1].endswith("Done.<|im_end|>")


@pytest.mark.parametrize(
    ("name", "turn", "said"),
    [
        ("plain", call(seats=2, hour=19), r"the name of the call 'book'; set tokenizer.tool_format: action"),
        ("plain", call("book", seats=19), r"the name of the call 'book'; set tokenizer.tool_format: action"),
        ("plain", REASONED, r"the reasoning .* 'Two and three make 5.'; write the reasoning into the content between <think>"),
        ("qwen", REASONED, r"the reasoning of the assistant message"),
        ("llama", call("Let me look.", seats=2), r"content of the assistant message 'Let me look.'; set .*tool_format: action"),
    ],
)
def test_a_part_that_the_template_leaves_out_refuses_the_row_with_the_key_that_helps(tokenizers, name, turn, said):
    with pytest.raises(InputError, match=rf"row 3: turn 1: the chat template leaves out .*{said}"):
        learned(tokenizers[name], turn)


@pytest.mark.parametrize("value", [[{"type": "text", "text": "Two and two."}], {"content": "Two and two."}])
@pytest.mark.parametrize("key", ["reasoning", "reasoning_details", "thinking_blocks"])
def test_reasoning_of_a_message_that_was_not_checked_is_not_lost_without_a_word(tmp_path, key, value):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, QWEN3)))
    with pytest.raises(InputError, match="leaves out the reasoning of the assistant message"):
        learned(tokenizer, assistant("4", **{key: value}))


def test_an_answer_is_not_found_inside_the_reasoning(tmp_path):
    """The template writes the reasoning in place of the content."""
    template = PLAIN.replace("m.content", "(m.reasoning_content or m.content)")
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, template)))
    assert learned(tokenizer, assistant("5")) == ["5<|im_end|>"]
    with pytest.raises(InputError, match="leaves out the content of the assistant message '5'"):
        learned(tokenizer, REASONED)


def test_a_result_that_the_template_leaves_out_is_refused(tmp_path):
    template = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, template)))
    with pytest.raises(InputError, match="row 3: before turn 2: .*the content of the tool message 'booked'"):
        learned(tokenizer, assistant("I book."), tool("booked"), assistant("Done."))


def test_torchtune_writes_no_reasoning(tmp_path):
    from pidistill.tokenizers import as_chat_tokenizer

    with pytest.raises(InputError, match="leaves out the reasoning"):
        learned(as_chat_tokenizer(torchtune_llama3(tmp_path)), REASONED)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama", "action"])
def test_what_a_template_writes_is_found_however_it_is_escaped(tokenizers, name):
    values = {"text": 'a "b"\n{c} é <|im_end|>', "n": 2, "x": 1e-7, "yes": True, "no": None, "deep": [{"k": ["v", 2]}], "e": ""}
    assert all("book" in text for text in learned(tokenizers[name], call(**values), tool("r"), call(n=2), tools=[SCHEMA]))
    for content in ("  two\n\nlines ", "control <|im_end|> inside", "ﬁ e\u0301 漢字 🙂"):
        assert learned(tokenizers[name], assistant(content))


def test_reasoning_is_found_in_a_field_and_in_the_text(tokenizers):
    for turn in (REASONED, assistant("<think>\nTwo and three make 5.\n</think>\n\n5")):
        (text,) = learned(tokenizers["qwen3"], turn)
        assert "Two and three make 5." in text and text.endswith("5<|im_end|>")


@given(st.lists(st.text(alphabet="ab1", min_size=1, max_size=3), max_size=6), st.data())
def test_parts_between_marks_are_found_and_one_more_is_not(texts, data):
    parts = [Part(str(i), (text,), "") for i, text in enumerate(texts)]
    written = "".join(f"<{text}>" for text in data.draw(st.permutations(texts)))
    assert find_missing(written, parts) is None
    assert find_missing(written, [*parts, Part("more", ("c",), "")]).name == "more"
    assert find_missing(written, [*parts, *parts, Part("x", ("z",), "")]) is not None


# ------------------------------------------------------------------------------------------- tools in prompts


def test_tools_that_the_template_does_not_show_are_refused_with_the_key(tokenizers):
    asked = {"role": "user", "content": "Please book a table."}  # the tool's name in a message does not count
    row = Example(id="row 7", messages=[asked], tools=[SCHEMA], privileged="at 7")
    with pytest.raises(
        InputError, match=r"row 7: the chat template leaves out the tool 'book'; set tokenizer.tool_format: action"
    ):
        PrivilegedPrompt().build(row, tokenizers["plain"])
    for name in ("qwen", "llama", "action"):
        views = PrivilegedPrompt().build(row, tokenizers[name])
        assert "book" in tokenizers[name].decode(views.pair.student).replace("Please book", "")


def test_a_prompt_keeps_the_calls_of_earlier_turns(tokenizers):
    row = Example(id="row 7", messages=[USER, call(seats=2), tool("booked"), USER])
    with pytest.raises(InputError, match=r"row 7: the chat template leaves out the name of the call 'book'"):
        PrivilegedPrompt().build(row, tokenizers["plain"])
    assert PrivilegedPrompt().build(row, tokenizers["qwen"]).pair.student


# ------------------------------------------------------------------------------------------- turns in a row, and the cost


@pytest.mark.parametrize(("name", "header"), [("qwen", "<|im_start|>assistant\n"), ("llama", "assistant<|end_header_id|>\n\n")])
def test_two_assistant_messages_in_a_row_have_the_templates_header_between(tokenizers, name, header):
    tokenizer = tokenizers[name]
    pieces = encode_completion(tokenizer, [USER], [assistant("Let me see."), assistant("It is 5.")], None, "row 3")
    text = tokenizer.decode([i for piece in pieces for i in piece.ids])
    whole = tokenizer._template.render([USER, assistant("Let me see."), assistant("It is 5.")], None, False)
    assert text.rstrip() in whole and tokenizer.decode(pieces[1].ids).endswith(header) and pieces[1].turn is None


CONVERSATIONS = {
    "tools": ([call(seats=2), tool('{"a": 1}'), call(seats=3), tool("<|im_start|>assistant\n"), assistant("Done.")], [SCHEMA]),
    "users": ([assistant("a "), USER, assistant("\n<|im_end|> b"), USER, assistant("c")], None),
    "reasoning": ([assistant("<think>\nr\n</think>\n\na"), tool("x"), assistant("<think>\ns\n</think>\n\nb")], None),
    "two in a row": ([assistant("a"), assistant("b")], None),
    "one": ([assistant("a")], None),
}


def test_two_assistant_messages_that_the_template_does_not_take_are_refused(tokenizers):
    with pytest.raises(InputError, match=r"row 3: turns 1 and 2 are two assistant messages in a row.*join them into one"):
        learned(tokenizers["qwen3"], assistant("a"), assistant("b"))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama", "action"])
def test_one_rendering_gives_the_ids_of_one_rendering_per_turn(tokenizers, name, conversation):
    completion, tools = CONVERSATIONS[conversation]
    if (name, conversation) == ("qwen3", "two in a row"):
        assert tokenizers[name].encode_at_once([USER], completion, tools) is None
        return
    slow = _encode_one_by_one(tokenizers[name], [USER], list(_turns_with_answers(completion)), tools)
    fast = tokenizers[name].encode_at_once([USER], completion, tools)
    assert fast in (None, slow)
    if name != "qwen3" and conversation != "two in a row":
        assert fast is not None


def test_a_template_that_rewrites_turns_is_rendered_turn_by_turn(tokenizers):
    completion = [assistant("a"), USER, assistant("b")]  # Qwen3 gives the last turn an empty reasoning, and no other
    assert tokenizers["qwen3"].encode_at_once([USER], completion) is None
    assert all("<think>" in text for text in learned(tokenizers["qwen3"], *completion))


def test_the_cost_of_a_long_conversation_is_linear(tokenizers, monkeypatch):
    """Counted in rendered messages, so that a slow machine does not matter."""
    tokenizer, rendered = tokenizers["qwen"], []
    render = tokenizer._template.render
    monkeypatch.setattr(
        tokenizer._template, "render", lambda messages, *rest: rendered.append(len(messages)) or render(messages, *rest)
    )
    counts = []
    for calls in (20, 40):
        rendered.clear()
        completion = [message for i in range(calls) for message in (call(seats=i), tool(f"booked {i}"))]
        learned(tokenizer, *completion, assistant("Done."), tools=[SCHEMA])
        counts.append(sum(rendered))
    assert counts[1] < 2.2 * counts[0]


# ---------------------------------------------------------------------------------------------- observations


HISTORY = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "hm"}]


def test_an_observation_of_a_role_that_the_template_does_not_write_is_refused(tmp_path):
    """R1's template puts system texts in front of everything, where an episode that goes on has no place for them."""
    tokenizer = HFChatTokenizer(str(r1_folder(tmp_path)))
    assert tokenizer.encode_observations(HISTORY, [{"role": "user", "content": "TIME LEFT: 3"}])
    with pytest.raises(InputError, match="leaves out the content of the system message 'TIME LEFT: 3'"):
        tokenizer.encode_observations(HISTORY, [{"role": "system", "content": "TIME LEFT: 3"}])


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_what_decoding_loses_is_no_fault_of_the_template(scheme, tmp_path):
    tokenizer = HFChatTokenizer(str(spaced_folder(tmp_path, scheme)))
    for said in ("loss: ▁▂▃", "snake▁case", "½ ﬁ", "a\xa0b", "<|im_end|> and <s>"):
        assert tokenizer.encode_observations(HISTORY, [{"role": "user", "content": said}])


@pytest.mark.parametrize("said", [("12", "121"), ("OK", "OKO"), ("ab", "aba"), ("5", "5"), ("", " ")])
def test_texts_that_overlap_have_places_of_their_own(said):
    messages = [{"role": "tool", "content": text} for text in said]
    check_written(" ".join(said), messages, None)
    if said[0].strip():
        with pytest.raises(InputError, match="leaves out"):
            check_written(max(said, key=len), messages, None)
