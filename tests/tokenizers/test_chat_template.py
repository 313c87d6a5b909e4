"""Test templates with the structure of published ones: prompts are transformers' ids, in both views and every placement."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from pidistill.errors import InputError
from pidistill.privileged.prompt import PLACEMENTS, PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Example
from tests.support.chat_templates import ALTERNATING, LLAMA31, LLAMA32, ONE_SYSTEM, QWEN3
from tests.support.newer_templates import GEMMA3, HARMONY, MINISTRAL3, OLMO3, QWEN3_CODER, QWEN35, SMOLLM3, newer_folder
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
    "smollm3": (partial(newer_folder, template=SMOLLM3), {}),
    "smollm3, no thinking": (partial(newer_folder, template=SMOLLM3), {"enable_thinking": False}),
    "qwen3.5": (partial(newer_folder, template=QWEN35), {}),
    "qwen3.5, no thinking": (partial(newer_folder, template=QWEN35), {"enable_thinking": False}),
    "qwen3-coder": (partial(newer_folder, template=QWEN3_CODER), {}),
    "gemma3": (partial(newer_folder, template=GEMMA3), {}),
    "gpt-oss": (partial(newer_folder, template=HARMONY), {"reasoning_effort": "low"}),
    "olmo3": (partial(newer_folder, template=OLMO3), {}),
    "ministral3": (partial(newer_folder, template=MINISTRAL3), {}),
}
WITH_RESULTS = {"reasoning in a field", "a call and its result", "steps", "steps, then a question", "two results"}


def refusal_of(family, name):
    """Return what the template itself says against the conversation, as transformers does; None where it takes it."""
    if family.startswith("llama") and name == "two results":
        return r"roles user, assistant, tool, tool \(One tool call at a time, please!\)"
    if family == "gemma3" and name in WITH_RESULTS:
        return r"assistant, tool.* \(Roles must take turns: user, assistant, user, ...\)"
    return None


def left_out(family, name):
    """Return what the template leaves out of the conversation without a word, which ends the building of prompts."""
    if family in ("r1-distill", "gemma3") and CONVERSATIONS[name][1]:
        return "the tool 'look_up'"
    if family.startswith("smollm3") and name in WITH_RESULTS - {"reasoning in a field", "steps, then a question"}:
        return "(the tool 'look_up'|an argument of the call)"
    if family.startswith("gpt-oss") and name == "two results":
        return "an argument of the call of look_up, 'b'"
    return None


def takes(family, placement):
    """Return whether the family's template takes the placement: some want user and assistant to take turns."""
    return placement in ("system_end", "user_end") or family not in ("gemma3", "ministral3")


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
    if refused := refusal_of(family, name):
        with pytest.raises(TemplateError):
            reference(messages, tools)
        with pytest.raises(InputError, match=refused):
            tokenizer.encode_prompt(messages, tools)
        return
    expected = reference(messages, tools)
    assert tokenizer.encode_prompt(messages, tools) == expected and len(expected) > 4
    example = Example(id="row 0", messages=messages, tools=tools, privileged="Zebra-4711")
    if missing := left_out(family, name):
        with pytest.raises(InputError, match=rf"row 0: the chat template leaves out {missing}.*; set tokenizer\."):
            PrivilegedPrompt().build(example, tokenizer)
        return
    for placement in PLACEMENTS:
        if not takes(family, placement):
            with pytest.raises(InputError, match=rf"does not take privileged.placement: {placement}.* set .*=system_end or"):
                PrivilegedPrompt(placement=placement).build(example, tokenizer)
            continue
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
    assert "Mode: /no_think" in prompt("smollm3, no thinking", "question")
    assert "{'type': 'function'" in prompt("smollm3", "tools")
    assert prompt("smollm3, no thinking", "question").endswith("<think>\n\n</think>\n")
    assert prompt("qwen3.5", "question").endswith("<|im_start|>assistant\n<think>\n")
    assert prompt("qwen3.5, no thinking", "question").endswith("<think>\n\n</think>\n\n")
    assert "<function=look_up>\n<parameter=query>\nMia\n</parameter>" in prompt("qwen3-coder", "a call and its result")
    assert "<start_of_turn>user\n Be brief. \n\nHow many clips?<end_of_turn>" in prompt("gemma3", "system")
    thought = "<|channel|>analysis<|message|>hm, hm<|end|><|start|>assistant to=functions.look_up<|channel|>commentary"
    assert thought in prompt("gpt-oss", "reasoning in a field")
    assert "Reasoning: low" in prompt("gpt-oss", "question")
    assert 'look_up(query="Mia")</function_calls><|im_end|>' in prompt("olmo3", "a call and its result")
    assert prompt("ministral3", "question").endswith("[INST]How many clips?[/INST]")


EMPTY_THOUGHT = ("<think>\n\n</think>\n\n", "")
REWRITTEN = {
    "qwen3": EMPTY_THOUGHT,
    "qwen3.5": EMPTY_THOUGHT,
    "olmo3": ("</function_calls><|endoftext|>", "</function_calls><|im_end|>"),
}
WITHOUT_CALLS = ("r1-distill", "gemma3", "smollm3", "smollm3, no thinking")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_CALLS])
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
    rewritten = REWRITTEN.get(family.partition(",")[0])  # a sampled turn keeps its thought and its stop token
    if rewritten:
        assert tokenizer.decode(ids).replace(*rewritten) == tokenizer.decode(whole).replace(*rewritten)
    else:
        assert ids == whole


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "r1-distill"])
def test_a_second_question_follows_a_turn_with_what_the_template_writes_there(made, family):
    """The context after the sampled turn is the whole rendering's, whatever token the template ends earlier turns with."""
    tokenizer, reference = made(family)
    history, turn, more = [user("How many?")], assistant("It is 72."), [user("And tomorrow?")]
    turn_ids = tokenizer.encode_turn(history, turn)
    assert turn_ids[-1] in tokenizer.stop_ids and not set(turn_ids[:-1]) & tokenizer.stop_ids
    said = tokenizer.parse_turn(turn_ids)["content"]
    assert said.removeprefix("\n</think>\n\n").removeprefix("<think>\n\n</think>\n\n") == "It is 72."
    added = tokenizer.encode_observations([*history, turn], more)
    whole = reference([*history, turn, *more], None)
    assert whole[-len(added) :] == added and len(added) > 8
    grown = [*tokenizer.encode_prompt(history), *turn_ids, *added]
    assert (grown == whole) == (tokenizer.history_rewrites() is None)


def test_a_turn_continues_a_prompt_that_opened_the_reasoning(made):
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


MODELS = os.environ.get("PIDISTILL_TEST_MODELS")


@pytest.mark.skipif(not MODELS, reason="PIDISTILL_TEST_MODELS is not set: no pretrained models here")
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"])
def test_a_published_tokenizer_gives_transformers_ids(name):
    folder = Path(MODELS, name)
    if not folder.is_dir():
        pytest.skip(f"{MODELS} has no {name}")
    hf = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = HFChatTokenizer(str(folder))
    for messages, tools in CONVERSATIONS.values():
        if name.startswith("SmolLM2") and tools:
            continue  # its template knows no tools
        ids = tokenizer.encode_prompt(messages, tools)
        assert ids == hf.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        turn_ids = tokenizer.encode_turn(messages, assistant("It is 72."), tools)
        assert tokenizer.decode(turn_ids) == "It is 72.<|im_end|>" and turn_ids[-1] in tokenizer.stop_ids
    stored = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(stored if isinstance(stored, list) else [stored]) <= tokenizer.stop_ids


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
