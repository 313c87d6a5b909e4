"""Test templates with the structure of published ones: prompts are transformers' ids, in both views and every placement."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from pidistill.errors import InputError
from pidistill.privileged.prompt import PLACEMENTS, PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Example
from tests.support.chat_templates import ALTERNATING, LLAMA31, LLAMA32, ONE_SYSTEM, QWEN3
from tests.support.tiny_tokenizers import llama_folder, qwen_folder, r1_folder


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content, "name": "look_up"}


def call(*queries, content=""):
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": {"query": query}}} for query in queries]
    return {"role": "assistant", "content": content, "tool_calls": calls}


PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"How to {name}", "parameters": PARAMETERS}}
    for name in ("look_up", "write")
]
THOUGHT = "<think>\nhm, hm\n</think>\n\n"
CONVERSATIONS = {
    "question": ([user("How many clips?")], None),
    "system": ([system(" Be brief. "), user("How many clips?")], None),
    "finished turns with reasoning": ([user("a"), assistant(THOUGHT + "b"), user("c"), assistant("d"), user("e")], None),
    "reasoning in a field": ([user("a"), call("b") | {"reasoning": "hm, hm"}, tool("c")], TOOLS),
    "tools": ([user("Who?")], TOOLS),
    "tools, system": ([system("Be brief."), user("Who?")], TOOLS),
    "a call and its result": ([system("s"), user("Who?"), call("Mia"), tool('{"name": "Mia"}')], TOOLS),
    "steps": ([user("Who?"), call("a"), tool("Mia"), call("b", content=THOUGHT + "and"), tool("Li")], TOOLS),
    "steps, then a question": ([user("Who?"), call("a"), tool("Mia"), assistant(THOUGHT + "Mia."), user("And?")], TOOLS),
    "two results": ([user("Who?"), call("a", "b"), tool("Mia"), tool("Li")], TOOLS),
    "a result as user text": ([user("q"), assistant(THOUGHT + "b"), user("<tool_response>r</tool_response>")], None),
}
# name → (folder, the config's template_kwargs)
FAMILIES = {
    "qwen2.5": (qwen_folder, {}),
    "qwen3": (lambda path: qwen_folder(path, QWEN3), {}),
    "qwen3, thinking": (lambda path: qwen_folder(path, QWEN3), {"enable_thinking": True}),
    "qwen3, no thinking": (lambda path: qwen_folder(path, QWEN3), {"enable_thinking": False}),
    "llama3.1": (llama_folder, {}),
    "llama3.1, tools in the system turn": (llama_folder, {"tools_in_user_message": False, "date_string": "01 Jan 2025"}),
    "llama3.1, own tools": (llama_folder, {"builtin_tools": ["look_up", "code_interpreter"]}),
    "llama3.2": (lambda path: llama_folder(path, LLAMA32), {"date_string": "26 Jul 2024"}),
    "r1-distill": (r1_folder, {}),
}


def is_refused(family, name):
    return family.startswith("llama") and name == "two results"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family → (tokenizer of ours, transformers' prompt ids of messages and tools)."""
    found = {}

    def make(family):
        if family not in found:
            folder, kwargs = FAMILIES[family]
            folder = folder(tmp_path_factory.mktemp("family"))
            hf = PreTrainedTokenizerFast.from_pretrained(folder)

            def reference(messages, tools, hf=hf, kwargs=kwargs):
                return hf.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False, **kwargs)

            found[family] = (HFChatTokenizer(str(folder), template_kwargs=kwargs), reference)
        return found[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_views_in_every_placement_are_transformers_ids(made, family, name):
    tokenizer, reference = made(family)
    messages, tools = CONVERSATIONS[name]
    if is_refused(family, name):
        with pytest.raises(InputError, match=r"roles user, assistant, tool, tool \(One tool call at a time, please!\)"):
            tokenizer.encode_prompt(messages, tools)
        return
    expected = reference(messages, tools)
    assert tokenizer.encode_prompt(messages, tools) == expected and len(expected) > 8
    example = Example(id="row 0", messages=messages, tools=tools, privileged="Zebra-4711")
    if family == "r1-distill" and tools:
        with pytest.raises(InputError, match=r"row 0: the chat template leaves out the tool 'look_up'; set tokenizer\."):
            PrivilegedPrompt().build(example, tokenizer)
        return
    for placement in PLACEMENTS:
        views = PrivilegedPrompt(placement=placement).build(example, tokenizer)
        assert views.pair.student == expected == reference(views.student_messages, tools), placement
        assert views.pair.teacher == reference(views.teacher_messages, tools), placement
        assert "Zebra-4711" in tokenizer.decode(views.pair.teacher)
        assert "Zebra-4711" not in tokenizer.decode(views.pair.student)


def test_the_conversations_reach_what_the_templates_distinguish(made):
    """The imitations do have the structure: each of these strings stands in a prompt of the matrix above, or in none."""

    def prompt(family, name):
        tokenizer, _ = made(family)
        return tokenizer.decode(tokenizer.encode_prompt(*CONVERSATIONS[name]))

    assert "hm, hm" in prompt("qwen3", "steps")  # kept while tools answer
    assert "hm, hm" in prompt("qwen3", "reasoning in a field")
    assert "hm, hm" not in prompt("qwen3", "steps, then a question")
    assert "hm, hm" in prompt("qwen3", "a result as user text")
    assert prompt("qwen3, no thinking", "steps").endswith("<think>\n\n</think>\n\n")
    assert prompt("qwen3, thinking", "steps") == prompt("qwen3", "steps")
    assert "Today: 26 Jul 2024" in prompt("llama3.1", "question")
    assert "Today: 01 Jan 2025" in prompt("llama3.1, tools in the system turn", "question")
    assert "user<|end_header_id|>\n\nAnswer with a call of one" in prompt("llama3.1", "tools, system")
    assert "These functions are there" in prompt("llama3.1, tools in the system turn", "tools, system")
    assert '"parameters": {"query": "Mia"}}<|eot_id|>' in prompt("llama3.1", "a call and its result")
    assert '<|python_tag|>look_up.call(query="Mia")<|eom_id|>' in prompt("llama3.1, own tools", "a call and its result")
    assert r'"{\"name\": \"Mia\"}"<|eot_id|>' in prompt("llama3.1", "a call and its result")
    assert prompt("r1-distill", "system").startswith("<|begin|> Be brief. <|User|>")
    assert prompt("r1-distill", "question").endswith("<|Assistant|><think>\n")
    assert "hm" not in prompt("r1-distill", "finished turns with reasoning")
    assert prompt("r1-distill", "steps").endswith("Li<|outputs_end|>")  # the model goes on without a header


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "r1-distill"])
@pytest.mark.parametrize("name", ["question", "tools", "tools, system"])
def test_an_episode_of_tools_grows_without_a_change_of_what_stands(made, family, name):
    """Prompt ++ turn ++ results ++ turn; for templates that leave nothing out, the same as one whole prompt."""
    tokenizer, reference = made(family)
    messages, tools = CONVERSATIONS[name]
    tools = tools or TOOLS
    turn, results = call("Mia"), [tool("Mia is here")]
    prompt = tokenizer.encode_prompt(messages, tools)
    ids = prompt + tokenizer.encode_turn(messages, turn, tools)
    assert ids[-1] in tokenizer.stop_ids
    ids += tokenizer.encode_observations([*messages, turn], results, tools)
    assert tokenizer.decode(ids).startswith(tokenizer.decode(prompt))
    whole = reference([*messages, turn, *results], tools)
    if family in ("qwen3", "qwen3, thinking", "qwen3, no thinking"):  # a sampled turn keeps the thought that it began with
        assert tokenizer.decode(ids).replace("<think>\n\n</think>\n\n", "") == tokenizer.decode(whole).replace(
            "<think>\n\n</think>\n\n", ""
        )
    else:
        assert ids == whole


def test_a_turn_after_a_prompt_that_opened_the_reasoning(made):
    """R1: the prompt ends with <think>, and the template drops the thought from a finished turn; a model would sample both."""
    tokenizer, _ = made("r1-distill")
    question = [user("How many?")]
    turn = tokenizer.encode_turn(question, assistant("<think>\nhm <|end|>\n</think>\n\nIt is 72."))
    assert tokenizer.decode(turn) == "hm <|end|>\n</think>\n\nIt is 72.<|end|>"
    assert turn[-1] in tokenizer.stop_ids and not set(turn[:-1]) & tokenizer.stop_ids
    with pytest.raises(InputError, match=r"begin the turn with what the prompt opens \(<think>\)"):
        tokenizer.encode_turn(question, assistant("It is 72."))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_parts_are_their_text(made, family):
    """Qwen3's template leaves a list out without a word, and Llama's writes brackets and quotes."""
    tokenizer, reference = made(family)
    parts = [user([{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}])]
    assert tokenizer.encode_prompt(parts) == reference([user("How many?")], None)


# ------------------------------------------------------------------------------------------- what a template does not take


def refusal(tokenizer, messages, **privileged):
    with pytest.raises(InputError) as error:
        PrivilegedPrompt(**privileged).build(Example(id="row 3", messages=messages, privileged="Zebra"), tokenizer)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    return str(error.value)


def test_a_template_without_a_system_role_names_the_placement_that_works(tmp_path):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, ALTERNATING)))
    assert refusal(tokenizer, [user("a")], placement="system_end") == (
        "row 3: the chat template does not take privileged.placement: system_end (System role not supported); set "
        "privileged.placement=user_end"
    )
    assert refusal(tokenizer, [user("a")], placement="before_user").endswith(
        "before_user, role: user (Roles must alternate user/assistant/user/assistant/...); set privileged.placement=user_end"
    )
    assert (
        PrivilegedPrompt(placement="user_end")
        .build(Example(id="row", messages=[user("a")], privileged="b"), tokenizer)
        .pair.has_privileged
    )
    said = refusal(tokenizer, [system("s"), user("a")], placement="user_end")  # the row's own message
    assert said.startswith("row 3: the chat template refuses a conversation of the roles system, user (System role not")
    assert "tokenizer.chat_template" in said and "placement" not in said


def test_a_template_with_one_system_message_names_the_role_and_the_placements_that_work(tmp_path):
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path, ONE_SYSTEM)))
    row = [system("s"), user("a")]
    assert refusal(tokenizer, row, placement="before_user", role="system") == (
        "row 3: the chat template does not take privileged.placement: before_user, role: system (Only the first message may be "
        "of the system); set privileged.role=user or privileged.placement=system_end or privileged.placement=user_end"
    )
    assert "Only the first" in refusal(tokenizer, [system("s"), system("t"), user("a")])  # whatever the placement


def test_a_system_text_that_would_vanish_from_the_teachers_view_is_refused(made):
    """R1's template keeps the last one alone: the teacher would not see the instructions that the student sees."""
    tokenizer, _ = made("r1-distill")
    said = refusal(tokenizer, [system("Be brief."), user("a")], placement="before_user", role="system")
    assert "(the chat template leaves out the content of the system message 'Be brief.'); set privileged.role=user or " in said
    twice = Example(id="row 3", messages=[system("Be brief."), system("Be kind."), user("a")])
    with pytest.raises(InputError, match=r"row 3: the chat template leaves out the content of the system message 'Be brief.'"):
        PrivilegedPrompt().build(twice, tokenizer)


def test_a_folder_without_a_template_says_where_one_is(tmp_path):
    folder = qwen_folder(tmp_path, None)
    with pytest.raises(InputError, match=r"has no chat template; set tokenizer.chat_template to .*instruct version"):
        HFChatTokenizer(str(folder))


def test_a_date_that_is_not_set_is_todays_in_llama32_alone(tmp_path):
    """The one thing that makes prompts differ from day to day; `template_kwargs` fixes it."""
    for template, fixed in ((LLAMA31, True), (LLAMA32, False)):
        tokenizer = HFChatTokenizer(str(llama_folder(tmp_path / str(fixed), template)))
        assert ("Today: 26 Jul 2024" in tokenizer.decode(tokenizer.encode_prompt([user("a")]))) is fixed
    assert json.loads((tmp_path / "False" / "tokenizer_config.json").read_text())["chat_template"] == LLAMA32
