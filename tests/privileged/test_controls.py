"""Each control shows the teacher something else in the place of a row's own information, and changes nothing besides."""

import json
from dataclasses import replace

import pytest

from pidistill.data import build_prompts, chat_dataset, gsm8k_dataset, qa_dataset
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.errors import InputError
from pidistill.jsonl import write_jsonl
from pidistill.privileged.controls import WRONG_KEY, show_wrong
from pidistill.privileged.prompt import CONTROLS, PLACEMENTS, PrivilegedPrompt
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Example
from tests.support.chat_templates import QWEN3
from tests.support.tiny_tokenizers import llama_folder, qwen_folder

BEFORE, BEHIND = "You may know: <", "> but say nothing."
TEMPLATE = f"{BEFORE}{{privileged}}{BEHIND}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    qwen3 = str(qwen_folder(tmp_path_factory.mktemp("qwen3"), QWEN3))
    return {
        "qwen3": HFChatTokenizer(qwen3, template_kwargs={"enable_thinking": False}),
        "llama3": HFChatTokenizer(str(llama_folder(tmp_path_factory.mktemp("llama")))),
    }


def examples(count: int = 6) -> list[Example]:
    return [
        Example(
            id=f"row {i}",
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Is {i // 2} plus {i} even?"}],
            privileged=None if i == 3 else f"It is {'so' * i} {i}, because {i} is what it is.",
            data={WRONG_KEY: f"It is {i + 1}."},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_students_ids_are_the_same_in_all_arms_and_the_teachers_differ_in_the_payload_alone(tokenizers, name, placement):
    tokenizer = tokenizers[name]
    privileged = PrivilegedPrompt(template=TEMPLATE, placement=placement)
    arms = {}
    for control in CONTROLS:
        if control != "template":
            shown = build_prompts(examples(), tokenizer, replace(privileged, control=control), max_new_tokens=1).prompts
            arms[control] = [(example.privileged, pair) for example, pair in shown]
    for control, rows in arms.items():
        for (own, pair), (own_text, own_pair) in zip(rows, arms[None], strict=True):
            assert pair.student == own_pair.student
            if own_text is None or control == "none":
                assert own is None and pair.teacher == pair.student and not pair.has_privileged
                continue
            assert pair.has_privileged
            expected, found = tokenizer.decode(own_pair.teacher), tokenizer.decode(pair.teacher)
            assert expected.replace(f"{BEFORE}{own_text}{BEHIND}", f"{BEFORE}{own}{BEHIND}") == found
            assert control is None or own != own_text


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_length_matched_has_exactly_as_many_tokens(tokenizers, name, placement):
    rows = examples()
    rows[0] = replace(
        rows[0], privileged=[{"role": "user", "content": "a hint in several words, as a message of its own " * 9}]
    )
    lengths = {}
    for control in (None, "length_matched"):
        privileged = PrivilegedPrompt(template=TEMPLATE, placement=placement, control=control)
        shown = build_prompts(rows, tokenizers[name], privileged, max_new_tokens=1).prompts
        lengths[control] = [len(pair.teacher) for _, pair in shown]
    assert lengths["length_matched"] == lengths[None]
    assert {character for example, _ in shown for character in example.privileged or ""} == {".", " "}


def test_a_filler_that_cannot_have_the_length_is_refused_with_the_key(tokenizers):
    privileged = PrivilegedPrompt(template=TEMPLATE, control="length_matched", filler="incomprehensibilities")
    tokens = len(tokenizers["llama3"].encode_prompt([{"role": "user", "content": " incomprehensibilities" * 2}]))
    assert tokens > 8
    with pytest.raises(InputError, match=r"row \d: no number of 'incomprehensibilities' .* set privileged\.filler to a word"):
        build_prompts(examples(), tokenizers["llama3"], privileged, max_new_tokens=1)
    with pytest.raises(InputError, match=r"privileged\.filler is 'a b'; give one word"):
        PrivilegedPrompt(filler="a b")


def test_other_problem_never_pairs_rows_of_one_prompt_and_depends_on_the_seed_and_the_rows_alone(tokenizers):
    rows = [
        replace(example, messages=examples()[i // 2].messages) for i, example in enumerate(examples(12))
    ]  # prompts in pairs
    shown = {}
    for seed in range(4):
        privileged = PrivilegedPrompt(control="other_problem", control_seed=seed)
        shown[seed] = [example.privileged for example in privileged.apply_control(rows, tokenizers["llama3"])]
        assert shown[seed] == [example.privileged for example in privileged.apply_control(rows, tokenizers["llama3"])]
        for row, text in zip(rows, shown[seed], strict=True):
            if row.privileged:
                problem, _, given = text.partition("\n\n")
                assert problem != row.messages[1]["content"]
                (giver,) = [r for r in rows if r.privileged == given]
                assert giver.messages[1]["content"] == problem
    assert len({tuple(texts) for texts in shown.values()}) == 4
    with pytest.raises(InputError, match=r"other_problem cannot pair .* 4 of the 4 .* have the same prompt"):
        same = [replace(row, messages=rows[0].messages) for row in examples(5) if row.privileged]
        PrivilegedPrompt(control="other_problem").apply_control(same, tokenizers["llama3"])


def test_wrong_needs_the_rows_key(tokenizers):
    rows = [replace(example, data={}) for example in examples()]
    with pytest.raises(
        InputError, match=r"row 0 has no privileged_wrong, the information .* that privileged\.control: wrong shows"
    ):
        build_prompts(rows, tokenizers["llama3"], PrivilegedPrompt(control="wrong"), max_new_tokens=1)


SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It is 5."}]
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is 5."}]


@pytest.mark.parametrize("make", [chat_dataset, qa_dataset])
@pytest.mark.parametrize("wrong", ["It is 5.", SHAREGPT, MESSAGES, json.dumps(MESSAGES)], ids=str)
def test_wrong_information_is_read_in_every_form_in_which_a_rows_own_is_read(tokenizers, tmp_path, make, wrong):
    row = {"messages": "2 + 2?", "question": "2 + 2?", "answer": "4", "privileged": "It is 4.", "privileged_wrong": wrong}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    own = make(str(tmp_path / "rows.jsonl"), privileged_key="privileged_wrong")[0].privileged
    rows = list(make(str(tmp_path / "rows.jsonl"), privileged_key="privileged"))
    (shown,) = PrivilegedPrompt(control="wrong").apply_control(rows, tokenizers["llama3"])
    assert shown.privileged == own == ("It is 5." if wrong == "It is 5." else MESSAGES)


@pytest.mark.parametrize("make", [chat_dataset, qa_dataset])
def test_wrong_information_that_is_no_text_and_no_messages_is_refused_with_its_value(tmp_path, make):
    row = {"messages": "2 + 2?", "question": "2 + 2?", "answer": "4", "privileged": "It is 4.", "privileged_wrong": 5}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    [example] = make(str(tmp_path / "rows.jsonl"), privileged_key="privileged")  # which no other control reads
    with pytest.raises(InputError, match=r"row 0: privileged_wrong is 5; privileged\.control: wrong shows one text"):
        show_wrong(example)


def test_the_tiny_worlds_wrong_information_is_wrong_in_every_slot_that_is_told():
    shifts = set()
    for example in tiny_world_dataset(split="train", privileged="dfk"):
        own, wrong = example.privileged.split(), example.data[WRONG_KEY].split()
        assert [word == "?" for word in own] == [word == "?" for word in wrong] and len(own) == len(wrong) == 6
        told = [(a, b) for a, b in zip(own[1:-1], wrong[1:-1], strict=True) if a != "?"]
        assert all(a != b and a[0] == b[0] for a, b in told)
        shifts |= {(int(b[1:]) - int(a[1:])) % 6 for a, b in told}
    assert shifts == {1, 2, 3, 4, 5}


def test_length_matched_and_other_problem_fit_the_tiny_worlds_words():
    rows, tokenizer = tiny_world_dataset(split="train", max_rows=8), tiny_world_tokenizer(max_seq_len=96)
    for control, tokens in (("length_matched", 6), ("other_problem", 14)):
        privileged = PrivilegedPrompt(template="{privileged}", control=control)
        for _, pair in build_prompts(rows, tokenizer, privileged, max_new_tokens=50).prompts:
            assert len(pair.teacher) - len(pair.student) == tokens


@pytest.mark.parametrize("kind", ["solution", "answer"])
def test_gsm8ks_wrong_information_has_another_number_of_the_same_form(kind, tmp_path):
    rows = [
        {"question": "How many?", "answer": f"Count to <<{n}={n}>>{n}.\n#### {n}"} for n in ("72", "9", "-1.5", "1,024", "0")
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for example in gsm8k_dataset(str(tmp_path / "rows.jsonl"), privileged=kind):
        start, _, own = example.privileged.rpartition("The final answer is ")
        wrong_start, _, wrong = example.data[WRONG_KEY].rpartition("The final answer is ")
        assert start == wrong_start and own == f"{example.reference}."
        assert float(wrong[:-1]) != float(own[:-1]) and len(wrong) == len(own)


def test_the_teachers_template_alone_is_a_control_that_teaches_the_rows_that_have_information(tokenizers):
    mode = PrivilegedPrompt(control="template", teacher_template_kwargs={"enable_thinking": True})
    tokenizer, rows = tokenizers["qwen3"], examples()
    built = build_prompts(rows, tokenizer, mode, max_new_tokens=1, no_pi="drop")
    assert built.dropped == {"rows_without_pi": 1} and built.rows_without_pi == 1 and len(built.prompts) == 5
    thinking = tokenizer.with_template_kwargs({"enable_thinking": True})
    for example, pair in built.prompts:
        assert pair.has_privileged
        assert pair.student == tokenizer.encode_prompt(example.messages)
        assert pair.teacher == thinking.encode_prompt(example.messages) != pair.student
    with pytest.raises(InputError, match=r"template gives the teacher no information but another chat template"):
        build_prompts(rows, tokenizer, PrivilegedPrompt(control="template"), max_new_tokens=1)
