"""Test privileged information found in the round: which sibling, which text, and what becomes of the two prompts."""

import math
import threading
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pidistill.data import demonstration
from pidistill.distributed.run import Run
from pidistill.envs.tiny_world import SiblingCalls, VerifierFeedback, tiny_world_dataset
from pidistill.errors import InputError
from pidistill.objectives import SDPO
from pidistill.privileged import PrivilegedPrompt
from pidistill.privileged.hindsight import Hindsight, SiblingToolCalls, ToolFeedback, Transcript, add_hindsight
from pidistill.tokenizers import HFChatTokenizer
from pidistill.training.compatibility import check_hindsight
from pidistill.types import Example, Message, Rollout
from tests.support.newer_templates import SMOLLM3
from tests.support.siblings import ONE, PRIVILEGED, ROWS, TOKENIZER, rollout
from tests.support.tiny_tokenizers import QWEN_ADDED, QWEN_SPECIAL, model_folder, qwen_folder

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(example: Example, turns: list[Message]) -> str | None:
    return f"{turns[0]['content']}" if turns else None


def answered(example: Example, turns: list[Message]) -> str | None:
    return f"about {turns[0]['content']}" if turns[0]["content"] != "silent" else None


# ---------------------------------------------------------------------------------------- which text


def brute_force(hindsight: Hindsight, rollouts: list[Rollout], i: int) -> str | None:
    """Walk on from i around its group until a sibling succeeded; feedback as the options say."""
    sibling = None
    n = len(rollouts)
    if hindsight.sibling is not None:
        for step in range(1, n):
            other = rollouts[(i + step) % n]
            if other.group == rollouts[i].group and other.reward >= hindsight.success_threshold:
                sibling = other.turns[0]["content"]
                break
    feedback = None
    if hindsight.feedback is not None and (sibling is None or hindsight.feedback_with_sibling):
        word = rollouts[i].turns[0]["content"]
        feedback = None if word == "silent" else f"about {word}"
    found = [text for text in (sibling, feedback) if text is not None]
    return "\n\n".join(found) if found else None


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), max_size=9),
    st.sampled_from([(said, None), (None, answered), (said, answered)]),
    st.booleans(),
    st.sampled_from([0.5, 1.0]),
)
def test_texts_equal_the_walk_around_the_group(case, writers, both, threshold):
    hindsight = Hindsight(*writers, feedback_with_sibling=both, success_threshold=threshold)
    rollouts = [rollout("silent" if silent else f"word{i}", g, reward) for i, (g, reward, silent) in enumerate(case)]
    assert hindsight.texts(rollouts) == [brute_force(hindsight, rollouts, i) for i in range(len(rollouts))]


def test_no_rollout_is_its_own_sibling():
    alone = [rollout("a", 0, 1.0), rollout("b", 0, 0.0), rollout("c", 1, 1.0)]
    assert Hindsight(said).texts(alone) == [None, "a", None]
    both = [rollout("a", 0, 1.0), rollout("b", 0, 1.0)]
    assert Hindsight(said).texts(both) == ["b", "a"]


def test_a_sibling_writer_that_says_nothing_leaves_the_feedback():
    mute = Hindsight(lambda example, turns: None, answered)
    assert mute.texts([rollout("a", 0, 1.0), rollout("b", 0, 1.0)]) == ["about a", "about b"]


def test_hindsight_that_would_show_nothing_is_refused():
    with pytest.raises(InputError, match="hindsight.sibling and hindsight.feedback are both null"):
        Hindsight(None, None)


def test_a_transcript_says_who_said_what():
    turns = [{"role": "assistant", "content": "look up"}, {"role": "tool", "content": "obs 5"}]
    assert Transcript()(ROWS[0], turns) == "assistant: look up\ntool: obs 5"


LOOKED = {"function": {"name": "look", "arguments": {"city": "SEA"}}}
BOOKED = {"function": {"name": "book", "arguments": '{"flight": "F1"}'}}
TOOL_TURNS = [
    {"role": "assistant", "content": "I look.", "tool_calls": [LOOKED]},
    {"role": "tool", "name": "look", "content": "F1"},
    {"role": "assistant", "tool_calls": [BOOKED]},
    {"role": "tool", "name": "book", "content": "Error: no seat"},
    {"role": "assistant", "content": "Sorry."},
]


def test_a_transcript_holds_tool_calls_and_results():
    assert Transcript()(ROWS[0], TOOL_TURNS).split("\n") == [
        "assistant: I look.",
        'look({"city": "SEA"})',
        "tool look: F1",
        'assistant: book({"flight": "F1"})',
        "tool book: Error: no seat",
        "assistant: Sorry.",
    ]


def test_a_siblings_text_holds_its_tool_calls_and_what_the_tools_answered():
    calls, feedback = SiblingToolCalls(), ToolFeedback()
    assert calls(ROWS[0], TOOL_TURNS) == calls.header + '\n1. look({"city": "SEA"})\n2. book({"flight": "F1"})'
    assert SiblingToolCalls(header="", omit_tools=["book"])(ROWS[0], TOOL_TURNS) == '1. look({"city": "SEA"})'
    assert calls(ROWS[0], TOOL_TURNS[-1:]) is None
    assert feedback(ROWS[0], TOOL_TURNS) == feedback.header + '\nbook({"flight": "F1"})\n-> Error: no seat'
    every = ToolFeedback(contains=(), header="")(ROWS[0], TOOL_TURNS)
    assert every == 'look({"city": "SEA"})\n-> F1\nbook({"flight": "F1"})\n-> Error: no seat'
    assert feedback(ROWS[0], TOOL_TURNS[:2]) is None
    wrong = {"role": "assistant", "content": "<think>Hm.</think>\n<tool_call>{", "tool_call_error": "not JSON"}
    told = ToolFeedback(header="")(ROWS[0], [wrong, {"role": "tool", "content": "Error: not JSON"}])
    assert told == "<tool_call>{\n-> Error: not JSON", "what was thought is nobody's to see"
    with pytest.raises(InputError, match="contains is the text 'error'"):
        ToolFeedback(contains="error")


@pytest.mark.parametrize("writer", [Transcript(), SiblingToolCalls()])
def test_episodes_with_tools_reach_the_teachers_prompt_and_not_the_students(writer, tmp_path):
    """A group of tool episodes: the one that failed is shown its successful sibling, calls included."""
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path)))
    row = Example("row", [{"role": "user", "content": "Book me a flight."}])

    def episode(turns: list[Message], reward: float) -> Rollout:
        done = demonstration(replace(row, completion=turns), PRIVILEGED.build(row, tokenizer).pair, tokenizer)
        return replace(done, example=row, reward=reward, sampled_logprobs=[0.0] * len(done.completion))

    group = [episode(TOOL_TURNS, 1.0), episode([{"role": "assistant", "content": "Cannot."}], 0.0)]
    counts = add_hindsight(Hindsight(writer, ToolFeedback()), group, PRIVILEGED, tokenizer, ONE, 2048)
    assert counts["_with_pi"] == 2.0
    succeeded, failed = group
    assert 'book({"flight": "F1"})' in tokenizer.decode(failed.prompts.teacher)
    assert "Error: no seat" in succeeded.example.privileged, "no sibling succeeded: what its own tools said"
    for one in group:
        assert "F1" not in tokenizer.decode(one.prompts.student)
        assert one.prompts.student == tokenizer.encode_prompt(row.messages)


def test_feedback_from_several_threads_is_the_same_and_comes_at_once():
    barrier = threading.Barrier(3, timeout=10)

    def slow(example: Example, turns: list[Message]) -> str:
        barrier.wait()  # three must be here at the same time
        return f"about {turns[0]['content']}"

    rollouts = [rollout(f"w{i}", i, 0.0) for i in range(6)]
    assert Hindsight(None, slow, feedback_threads=3).texts(rollouts) == Hindsight(None, answered).texts(rollouts)
    with pytest.raises(InputError, match="feedback_threads=0 must"):
        Hindsight(None, slow, feedback_threads=0)


# ---------------------------------------------------------------------------------------- the prompts


@dataclass(frozen=True)
class SlotOf:
    """A tiny-world block that names the sibling's first word."""

    def __call__(self, example: Example, turns: list[Message]) -> str:
        return f"[ ? {turns[0]['content']} ? ? ]"


def words(n: int) -> list[str]:
    """Words that the tiny world's tokenizer has, so that different texts are different ids."""
    found = [TOKENIZER.decode([i]) for i in range(20, TOKENIZER.vocab_size)]
    return found[:n]


def round_of(rewards: dict[int, list[float]]) -> list[Rollout]:
    names = iter(words(sum(map(len, rewards.values()))))
    return [rollout(next(names), group, reward) for group, own in rewards.items() for reward in own]


def ids_of(text: str) -> list[int]:
    """What the text adds to a teacher's prompt."""
    views = PRIVILEGED.build(replace(ROWS[0], privileged=text), TOKENIZER)
    shared = [a == b for a, b in zip(views.pair.student, views.pair.teacher, strict=False)].index(False)
    return views.pair.teacher[shared : shared + views.privileged_tokens]


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def test_the_teacher_sees_the_siblings_text_and_the_student_what_it_saw():
    """SDPO: prompts change on the teacher's side alone; completions stay, id for id."""
    rollouts = round_of({0: [1.0, 0.0, 0.0], 1: [0.0, 0.0], 2: [0.0, 1.0]})
    before = [(list(r.prompts.student), list(r.completion), list(r.sampled_logprobs)) for r in rollouts]
    expected = Hindsight(SlotOf()).texts(rollouts)
    counts = add_hindsight(Hindsight(SlotOf()), rollouts, PRIVILEGED, TOKENIZER, ONE, 96)
    assert counts == {"_with_pi": 3.0, "hindsight_too_long": 0.0, "hindsight_failures": 0.0}
    assert [(r.prompts.student, r.completion, r.sampled_logprobs) for r in rollouts] == before
    assert [r.example.privileged for r in rollouts] == expected
    assert [r.prompts.has_privileged for r in rollouts] == [text is not None for text in expected]
    assert sum(r.prompts.has_privileged for r in rollouts) == 3
    for r, text in zip(rollouts, expected, strict=True):
        if text is None:
            assert r.prompts.teacher == r.prompts.student
        else:
            assert contains(r.prompts.teacher, ids_of(text)) and not contains(r.prompts.student, ids_of(text))


def test_hindsight_replaces_the_rows_own_information():
    told = next(iter(tiny_world_dataset(split="train", privileged="dfk", max_rows=1)))
    rollouts = [rollout("a", 0, 0.0, told), rollout("b", 0, 0.0, told)]
    assert rollouts[0].prompts.has_privileged
    add_hindsight(Hindsight(said), rollouts, PRIVILEGED, TOKENIZER, ONE, 96)
    assert not any(r.prompts.has_privileged or r.example.privileged for r in rollouts)


def test_the_control_none_shows_nothing():
    rollouts = round_of({0: [1.0, 1.0]})
    counts = add_hindsight(Hindsight(SlotOf()), rollouts, replace(PRIVILEGED, control="none"), TOKENIZER, ONE, 96)
    assert counts["_with_pi"] == 0.0
    assert all(r.prompts.teacher == r.prompts.student and r.example.privileged is None for r in rollouts)


SHUFFLED = replace(PRIVILEGED, control="shuffled")


def test_the_control_shuffled_shows_another_groups_text():
    rollouts = round_of({0: [1.0, 1.0], 1: [0.0, 1.0, 0.0], 2: [0.0, 0.0], 3: [1.0, 0.0]})
    texts = Hindsight(SlotOf()).texts(rollouts)
    add_hindsight(Hindsight(SlotOf()), rollouts, SHUFFLED, TOKENIZER, ONE, 96)
    by_group = {g: {t for t, r in zip(texts, rollouts, strict=True) if r.group == g and t} for g in range(4)}
    for r, own in zip(rollouts, texts, strict=True):
        shown = r.example.privileged
        assert (shown is None) == (own is None)
        if shown is not None:
            assert shown not in by_group[r.group]
            assert shown in set.union(*(by_group[g] for g in range(4) if g != r.group))
            assert contains(r.prompts.teacher, ids_of(shown))


def test_shuffled_never_hands_back_the_same_words_though_another_group_says_them():
    """Feedback has few words: `wrong slot f` of another group would be the rollout's own information."""
    same = lambda example, turns: turns[0]["content"]  # noqa: E731
    feedback = Hindsight(None, same)
    a, b = words(2)
    rollouts = [rollout(a, 0, 0.0), rollout(a, 1, 0.0), rollout(b, 2, 0.0)]
    add_hindsight(feedback, rollouts, SHUFFLED, TOKENIZER, ONE, 96)
    assert [r.example.privileged for r in rollouts] == [b, b, a]
    alike = [rollout(a, 0, 0.0), rollout(a, 1, 0.0)]
    counts = add_hindsight(feedback, alike, SHUFFLED, TOKENIZER, ONE, 96)
    assert [r.example.privileged for r in alike] == [None, None] and counts["_with_pi"] == 0.0


def test_the_control_wrong_shows_a_sibling_that_failed_where_one_succeeded():
    rollouts = round_of({0: [1.0, 0.0, 0.0], 1: [0.0, 0.0], 2: [1.0, 1.0]})
    right = Hindsight(SlotOf()).texts(rollouts)
    add_hindsight(Hindsight(SlotOf()), rollouts, replace(PRIVILEGED, control="wrong"), TOKENIZER, ONE, 96)
    failed = {SlotOf()(r.example, r.turns) for r in rollouts if r.group == 0 and r.reward == 0.0}
    shown = [r.example.privileged for r in rollouts]
    assert [text is not None for text in right] == [False, True, True, False, False, True, True]
    assert shown[0] is None and shown[3:] == [None] * 4  # no success to show, no sibling, or none that failed
    assert set(shown[1:3]) <= failed and all(r.reward == 0.0 for r in rollouts[1:3])
    cfg = OmegaConf.create({"privileged": {"control": "wrong"}, "hindsight": {"sibling": {"_component_": "x"}}})
    check_hindsight(cfg, SDPO(), "SDPO")
    cfg.hindsight.sibling = None
    with pytest.raises(InputError, match="hindsight.sibling is null; there is no wrong feedback"):
        check_hindsight(cfg, SDPO(), "SDPO")


def test_the_control_other_problem_shows_another_groups_problem_with_its_text():
    rollouts = round_of({0: [1.0, 1.0], 1: [1.0, 1.0]})
    for r in rollouts:
        r.example = replace(r.example, messages=[{"role": "user", "content": f"req {words(9)[5 + r.group]} go"}])
    texts = Hindsight(SlotOf()).texts(rollouts)
    add_hindsight(Hindsight(SlotOf()), rollouts, replace(PRIVILEGED, control="other_problem"), TOKENIZER, ONE, 96)
    for r in rollouts:
        problem, text = r.example.privileged.split("\n\n")
        assert problem == f"req {words(9)[5 + 1 - r.group]} go"
        assert text in {t for t, other in zip(texts, rollouts, strict=True) if other.group != r.group}


def test_the_control_length_matched_keeps_the_length_of_every_teachers_prompt():
    own, filled = round_of({0: [1.0, 1.0], 1: [0.0, 1.0]}), round_of({0: [1.0, 1.0], 1: [0.0, 1.0]})
    add_hindsight(Hindsight(SlotOf()), own, PRIVILEGED, TOKENIZER, ONE, 96)
    add_hindsight(Hindsight(SlotOf()), filled, replace(PRIVILEGED, control="length_matched"), TOKENIZER, ONE, 96)
    assert [len(r.prompts.teacher) for r in filled] == [len(r.prompts.teacher) for r in own]
    assert [r.prompts.has_privileged for r in filled] == [r.prompts.has_privileged for r in own]
    assert {word for r in filled for word in (r.example.privileged or "").split()} == {"."}


def test_shuffled_needs_another_group():
    rollouts = round_of({0: [1.0, 1.0]})
    assert add_hindsight(Hindsight(SlotOf()), rollouts, SHUFFLED, TOKENIZER, ONE, 96)["_with_pi"] == 0.0


@dataclass(frozen=True)
class RankOfTwo(Run):
    """A rank that already knows what the other one would send."""

    others: tuple = ()

    def gather(self, items: list) -> list:
        return [*items, *self.others] if self.rank == 0 else [*self.others, *items]


def test_shuffled_texts_do_not_depend_on_which_rank_holds_the_group():
    whole = round_of({0: [1.0, 1.0], 1: [0.0, 1.0], 2: [1.0, 1.0], 3: [0.0, 1.0]})
    texts = Hindsight(SlotOf()).texts(whole)
    items = [(r.group, text, text) for r, text in zip(whole, texts, strict=True) if text is not None]
    shares = [[replace(r) for r in whole if r.group % 2 == rank] for rank in (0, 1)]
    for rank, share in enumerate(shares):
        others = tuple(item for item in items if item[0] % 2 != rank)
        run = RankOfTwo(ONE.device, ONE.dtype, rank, 2, 0, ONE.output_dir, others=others)
        add_hindsight(Hindsight(SlotOf()), share, SHUFFLED, TOKENIZER, run, 96)
    add_hindsight(Hindsight(SlotOf()), whole, SHUFFLED, TOKENIZER, ONE, 96)
    for rank, share in enumerate(shares):
        assert [r.prompts for r in share] == [r.prompts for r in whole if r.group % 2 == rank]


@pytest.mark.parametrize("limit", ["sequence", "privileged"])
def test_what_does_not_fit_is_left_out_and_counted(limit):
    rollouts = round_of({0: [1.0, 0.0], 1: [1.0, 0.0]})
    rollouts[3].completion *= 10
    rollouts[3].policy_mask *= 10
    rollouts[3].sampled_logprobs = [math.nan] * len(rollouts[3].completion)
    length = len(rollouts[0].prompts.student) + len(ids_of(f"[ ? {words(1)[0]} ? ? ]")) + 4
    privileged, max_seq_len = (
        (PRIVILEGED, length) if limit == "sequence" else (replace(PRIVILEGED, max_privileged_length=1), 96)
    )
    counts = add_hindsight(Hindsight(SlotOf()), rollouts, privileged, TOKENIZER, ONE, max_seq_len)
    assert counts == (
        {"_with_pi": 1.0, "hindsight_too_long": 1.0, "hindsight_failures": 0.0}
        if limit == "sequence"
        else {"_with_pi": 0.0, "hindsight_too_long": 2.0, "hindsight_failures": 0.0}
    )
    for r in rollouts:
        assert r.prompts.has_privileged == (r.example.privileged is not None) == (r.prompts.teacher != r.prompts.student)


# ---------------------------------------------------------------------------------------- the tiny world's writers


def two_answers(tokenizer, right: str) -> list[Rollout]:
    row = Example("row 3", [{"role": "user", "content": "q"}])
    pair, rollouts = PrivilegedPrompt().encode(row, tokenizer), []
    for text, reward in ((right, 1.0), ("no", 0.0)):
        turn = {"role": "assistant", "content": text}
        ids = tokenizer.encode_turn(row.messages, turn)
        rollouts.append(Rollout(row, pair, ids, [True] * len(ids), [-1.0] * len(ids), "student", 0, "done", [turn], reward))
    return rollouts


@pytest.mark.parametrize("control", [None, "length_matched"])
def test_a_text_that_the_chat_template_refuses_costs_its_own_rollout_the_information_and_is_counted(control, tmp_path, caplog):
    folder = model_folder(tmp_path, SMOLLM3, QWEN_SPECIAL, QWEN_ADDED, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer, privileged = HFChatTokenizer(str(folder)), PrivilegedPrompt(control=control)
    for right, failures in (("42", 0.0), ("say /no_think: 42", 1.0)):
        rollouts = two_answers(tokenizer, right)
        plain = rollouts[1].prompts
        counts = add_hindsight(Hindsight(Transcript()), rollouts, privileged, tokenizer, ONE, max_seq_len=4000)
        assert (counts["hindsight_failures"], counts["_with_pi"]) == (failures, 1.0 - failures)
        assert counts["hindsight_too_long"] == 0.0
        assert (rollouts[1].prompts.teacher == plain.teacher) == (rollouts[1].example.privileged is None) == bool(failures)
    assert "the text for row 3 cannot be shown" in caplog.text


def test_a_placement_that_the_chat_template_never_takes_ends_the_run(tmp_path):
    folder = model_folder(tmp_path, NO_SYSTEM, QWEN_SPECIAL, QWEN_ADDED, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer = HFChatTokenizer(str(folder))
    rollouts = two_answers(tokenizer, "42")
    with pytest.raises(InputError, match=r"row 3: the chat template does not take privileged\.placement: system_end"):
        add_hindsight(Hindsight(Transcript()), rollouts, PrivilegedPrompt(), tokenizer, ONE, max_seq_len=4000)


def test_the_tiny_worlds_sibling_names_its_calls_as_the_dataset_would():
    """A successful trace, told by its calls, is the row's own privileged block."""
    told = list(tiny_world_dataset(split="train", privileged="dfk", completion="actions", max_rows=4))
    for example in told:
        assert SiblingCalls()(example, example.completion) == example.privileged
    every = list(tiny_world_dataset(split="train", privileged="dfak", completion="cot", max_rows=4))
    for example in every:
        assert SiblingCalls("dfak")(example, example.completion) == example.privileged


def test_the_tiny_worlds_feedback_is_silent_on_success():
    for example in tiny_world_dataset(split="train", privileged="none", completion="actions", max_rows=4):
        assert VerifierFeedback()(example, example.completion) is None
