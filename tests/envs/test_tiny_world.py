"""Test the laws of the tiny world, each beside a slow and obvious version."""

import itertools
import random
import re
import time
from collections import Counter

import pytest

from pidistill.chat.phrases import says_leak_phrase
from pidistill.envs.tiny_world import (
    TinyWorldEnvironment,
    tiny_world_base_dataset,
    tiny_world_dataset,
    tiny_world_tokenizer,
)
from pidistill.envs.tiny_world.environment import feedback_privileged, wrong_slot
from pidistill.envs.tiny_world.world import (
    FORMULAS,
    LEAK_WORD,
    MAX_COMPLETION_TOKENS,
    VOCAB,
    Decisions,
    Task,
    World,
    expert_decisions,
    formula_steps,
    make_split,
    privileged_text,
    request_message,
    trace,
)
from pidistill.errors import InputError
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.rewards import count_phrases
from pidistill.types import Example, PromptPair, Rollout

TASK = Task(item=5, class_=3, city=1, digits=(4, 3, 0), price=6, department=2, formula=0, carrier=3)  # the documented one
EXAMPLE = Example(id="documented", messages=[request_message(TASK)], data={"task": TASK})
SLOW_FORMULAS = [
    lambda p, a, b, c: (p + a) * b - c,
    lambda p, a, b, c: p - a + b + c,
    lambda p, a, b, c: p * a - b + c,
    lambda p, a, b, c: p + a - b - c,
    lambda p, a, b, c: p * a + b - c,
    lambda p, a, b, c: (p - a) * b + c,
]


def ids_of(words):
    return [VOCAB.index(word) for word in words.split()]


def assistant(content):
    return {"role": "assistant", "content": content}


def play(turns, environment=None, example=EXAMPLE, truncated=False):
    """(state, steps) of an episode in which the agent says ``turns`` one after another until the environment is done."""
    environment = environment or TinyWorldEnvironment()
    state, steps = environment.reset(example), []
    for turn in turns:
        steps.append(environment.step(state, assistant(turn), truncated=truncated))
        if steps[-1].done:
            break
    return state, steps


def assert_share(hits, total, expected):
    """``hits`` of ``total`` is within five standard deviations of a binomial with probability ``expected``."""
    assert abs(hits / total - expected) <= 5 * (expected * (1 - expected) / total) ** 0.5, f"{hits}/{total}, not {expected}"


# ------------------------------------------------------------------------------------------------ words and prompts


def test_vocabulary_has_the_documented_85_words_in_order():
    numbered = [f"{letter}{n}" for letter, count in zip("icgdfk", (12, 12, 12, 6, 6, 6), strict=True) for n in range(count)]
    assert " ".join(VOCAB[:21]) == "<pad> <bos> [ ] ? req go think hint . act look ship end obs ok fail = + - *"
    assert list(VOCAB[21:]) == list("0123456789") + numbered
    assert len(numbered) == 36 + 18 and len(VOCAB) == len(set(VOCAB)) == 85
    tokenizer = tiny_world_tokenizer()
    assert tokenizer.vocab_size == 85 and tokenizer.max_seq_len == 96 and tiny_world_tokenizer(40).max_seq_len == 40
    assert tokenizer.pad_id == VOCAB.index("<pad>") and tokenizer.stop_ids == {VOCAB.index("end")}


def test_prompts_of_both_views_are_the_documented_ids():
    tokenizer = tiny_world_tokenizer()
    told = Example(id="told", messages=EXAMPLE.messages, privileged=privileged_text(TASK, "dfk"), data={"task": TASK})
    pair = PrivilegedPrompt(template="{privileged}", placement="system_end").encode(told, tokenizer)
    assert pair.student == ids_of("<bos> req i5 c3 g1 4 3 0 go") and len(pair.student) == 9
    assert pair.teacher == ids_of("<bos> [ d2 f0 ? k3 ] req i5 c3 g1 4 3 0 go") and len(pair.teacher) == 15
    assert pair.has_privileged


def test_a_base_row_with_a_block_has_the_prompt_of_the_teacher_view():
    tokenizer = tiny_world_tokenizer()
    row = next(row for row in tiny_world_base_dataset(20, seed=0) if row.messages[0]["role"] == "system")
    told = Example(id="told", messages=row.messages[1:], privileged=row.messages[0]["content"])
    pair = PrivilegedPrompt(template="{privileged}", placement="system_end").encode(told, tokenizer)
    assert tokenizer.encode_prompt(row.messages) == pair.teacher


def test_expert_traces_are_the_documented_words():
    tokenizer = tiny_world_tokenizer()
    documented = {
        "cot": "think d2 . act look d2 end obs 6 think f0 6 + 4 = 0 * 3 = 0 - 0 = 0 . act f0 0 end obs ok "
        "think k3 . act ship k3 end",
        "short": "think d2 . act look d2 end obs 6 think f0 . act f0 0 end obs ok think k3 . act ship k3 end",
        "actions": "act look d2 end obs 6 act f0 0 end obs ok act ship k3 end",
    }
    for style, words in documented.items():
        history, ids = list(EXAMPLE.messages), []
        for message in trace(TASK, expert_decisions(TASK), style):
            encode = tokenizer.encode_turn if message["role"] == "assistant" else None
            ids += encode(history, message) if encode else tokenizer.encode_observations(history, [message])
            history.append(message)
        assert ids == ids_of(words), style
        assert len(ids) <= MAX_COMPLETION_TOKENS
    leaking = [turn["content"] for turn in trace(TASK, expert_decisions(TASK), leak=True) if turn["role"] == "assistant"]
    assert all(content.startswith(f"think {LEAK_WORD} ") for content in leaking)


@pytest.mark.parametrize(
    ("told", "block"),
    [
        ("dfak", "[ d2 f0 0 k3 ]"),
        ("dfk", "[ d2 f0 ? k3 ]"),
        ("f", "[ ? f0 ? ? ]"),
        ("", "[ ? ? ? ? ]"),
        ("kd", "[ d2 ? ? k3 ]"),
    ],
)
def test_privileged_block_tells_the_named_slots(told, block):
    assert privileged_text(TASK, told) == block


# ------------------------------------------------------------------------------------------------ world, formulas, splits


def test_formulas_equal_their_written_out_expressions():
    assert len(FORMULAS) == len(SLOW_FORMULAS)
    for number, slow in enumerate(SLOW_FORMULAS):
        for price, a, b, c in itertools.product(range(10), range(0, 10, 3), range(1, 10, 2), range(10)):
            # mod 10 after every operation equals mod 10 at the end: + - * are well defined on residues
            assert formula_steps(number, price, (a, b, c))[-1][2] == slow(price, a, b, c) % 10, (number, price, a, b, c)


def test_conventions_are_balanced_and_priors_hold_the_true_option_at_the_given_probability():
    world = World(true_option_prob=0.2)
    for slot, mapping in (("d", world.departments), ("f", world.formulas), ("k", world.carriers)):
        assert Counter(mapping) == dict.fromkeys(range(6), 2)
        for true_option, prior in zip(mapping, world.priors[slot], strict=True):
            assert prior.options[0] == true_option and len(set(prior.options)) == 3
            assert prior.weights == pytest.approx((0.2, 0.44, 0.36))
    assert World().departments == World().departments
    documented = ("232450534011", "022313415450", "302544513120")  # the world that published numbers belong to
    assert tuple("".join(map(str, m)) for m in (World().departments, World().formulas, World().carriers)) == documented
    assert World(seed=1).departments != World(seed=2).departments
    with pytest.raises(InputError, match=r"true_option_prob=1\.5 must lie in \[0, 1\]"):
        World(true_option_prob=1.5)


def test_splits_share_no_triple_and_have_the_documented_sizes():
    split = make_split(World())
    assert {name: len(tasks) for name, tasks in split.items()} == {"train": 512, "validation": 256, "test": 256}
    triples = {name: {(task.item, task.class_, task.city) for task in tasks} for name, tasks in split.items()}
    for one, other in itertools.combinations(triples.values(), 2):
        assert one.isdisjoint(other)
    world = World()
    for task in itertools.chain(*split.values()):
        decisions = (world.departments[task.item], world.formulas[task.class_], world.carriers[task.city])
        assert (task.department, task.formula, task.carrier) == decisions


def test_test_split_is_the_first_quarter_of_the_shuffled_triples():
    """Train and validation sizes, and the validation split's existence, leave the reported tasks as they were."""
    rng, world = random.Random(7), World()
    triples = list(itertools.product(range(12), repeat=3))
    rng.shuffle(triples)
    held_out, slow = set(triples[:432]), []
    while len(slow) < 256:
        task = world.draw_task(rng)
        if task.triple in held_out:
            slow.append(task)
    assert make_split(world)["test"] == slow == make_split(world, n_train=5, n_validation=0)["test"]


# ------------------------------------------------------------------------------------------------ environment


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("style", ["actions", "cot"])
def test_expert_gets_reward_one_on_every_task_through_the_tokenizer(split, style):
    tokenizer, environment = tiny_world_tokenizer(), TinyWorldEnvironment()
    examples = tiny_world_dataset(split, completion=style)
    assert len(examples) in (256, 512)
    for example in examples:
        state, history, rewards, observed = environment.reset(example), list(example.messages), [], []
        for turn in [message for message in example.completion if message["role"] == "assistant"]:
            said = tokenizer.parse_turn(tokenizer.encode_turn(history, turn))
            step = environment.step(state, said, truncated=False)
            history += [said, *step.observations]
            observed += step.observations
            rewards.append(step.reward)
        assert rewards == [0.0, 0.0, 1.0] and step.done, example.id
        assert observed == [message for message in example.completion if message["role"] == "tool"], example.id


def test_agents_that_act_at_random_or_by_the_priors_almost_never_succeed():
    rng, world = random.Random(0), World()
    examples = list(tiny_world_dataset("test", "none"))
    babbled = [[" ".join(rng.choices(VOCAB, k=rng.randrange(1, 9))) for _ in range(3)] for _ in range(4 * len(examples))]
    assert sum(play(turns, example=example)[1][-1].reward for turns, example in zip(babbled, examples * 4, strict=True)) == 0

    successes = 0.0
    for example in examples * 40:  # an agent that calculates without fault and acts on the base model's beliefs
        task = example.data["task"]
        formula = world.priors["f"][task.class_].draw(rng)
        department, carrier = world.priors["d"][task.item].draw(rng), world.priors["k"][task.city].draw(rng)
        decisions = Decisions(department, formula, task.answer_with(formula), carrier)
        turns = [message["content"] for message in trace(task, decisions) if message["role"] == "assistant"]
        successes += play(turns, example=example)[1][-1].reward
    assert_share(successes, 40 * len(examples), 0.1**3)


@pytest.mark.parametrize(
    ("turns", "slot"),
    [
        (["act look d1"], "d"),
        (["look d2"], "d"),  # no act
        ([""], "d"),
        (["act"], "d"),
        (["act look d2 d2"], "d"),
        (["act look d2 act look d1"], "d"),  # the last act counts
        (["act look d2", "act f1 0"], "f"),
        (["act look d2", "act look d2"], "f"),
        (["act look d2", "think f0 6 ."], "f"),
        (["act look d2", "act f0 3"], "a"),
        (["act look d2", "act f0"], "a"),
        (["act look d2", "act f0 0", "act ship k2"], "k"),
    ],
)
def test_a_wrong_call_ends_the_episode_without_reward_and_feedback_names_the_slot(turns, slot):
    state, steps = play(turns)
    assert [step.done for step in steps] == [False] * (len(turns) - 1) + [True]
    assert [step.reward for step in steps] == [0.0] * len(turns)
    assert steps[-1].observations == [] and state.failed_slot is None, "feedback is off by default"

    state, steps = play(turns, TinyWorldEnvironment(feedback=True))
    assert state.failed_slot == slot and wrong_slot(TASK, len(turns) - 1, assistant(turns[-1])) == slot
    assert steps[-1].observations == [{"role": "tool", "content": "fail"}] and steps[-1].done
    told = {"d": "[ d2 ? ? ? ]", "f": "[ ? f0 ? ? ]", "a": "[ ? ? 0 ? ]", "k": "[ ? ? ? k3 ]"}[slot]
    episode = [assistant(turns[0]), *([{"role": "tool", "content": "obs 6"}, *map(assistant, turns[1:])] if turns[1:] else [])]
    assert feedback_privileged(EXAMPLE, episode) == told


def test_words_before_the_last_act_do_not_matter():
    _, steps = play(["act look d1 think . act look d2", "f0 act f0 0", "hint act act ship k3"])
    assert [step.reward for step in steps] == [0.0, 0.0, 1.0]
    assert steps[0].observations == [{"role": "tool", "content": "obs 6"}]
    assert steps[1].observations == [{"role": "tool", "content": "obs ok"}] and steps[2].observations == []


def test_truncated_turn_ends_the_episode_without_reward_even_after_a_right_call():
    right = ["act look d2", "act f0 0", "act ship k3"]
    state, steps = play(right[:1], TinyWorldEnvironment(process_reward=True), truncated=True)
    assert steps[-1].done and steps[-1].reward == 0.0 and state.right_calls == 0
    environment = TinyWorldEnvironment()
    state = environment.reset(EXAMPLE)
    for turn in right[:2]:
        environment.step(state, assistant(turn), truncated=False)
    last = environment.step(state, assistant(right[2]), truncated=True)
    assert last.done and last.reward == 0.0 and last.reward_parts == {"success": 0.0}


def test_process_reward_is_a_third_per_right_call_and_sums_to_one():
    environment, right = TinyWorldEnvironment(process_reward=True), ["act look d2", "act f0 0", "act ship k3"]
    for n_right in range(4):
        _, steps = play([*right[:n_right], "act"][:3], environment)
        rewards = [step.reward for step in steps]
        assert sum(rewards) == pytest.approx(n_right / 3) and rewards[:n_right] == [1 / 3] * n_right
        assert [step.reward_parts for step in steps] == [{"right_calls_frac": reward} for reward in rewards]
    assert sum(step.reward for step in play(right, environment)[1]) == 1.0  # exactly: success can be told by equality


def test_feedback_privileged_is_none_without_a_wrong_call():
    success = trace(TASK, expert_decisions(TASK))
    assert feedback_privileged(EXAMPLE, success) is None
    assert feedback_privileged(EXAMPLE, success[:2]) is None


def test_one_environment_serves_interleaved_episodes_and_refuses_what_it_cannot_play():
    environment = TinyWorldEnvironment()
    one, two = environment.reset(EXAMPLE), environment.reset(EXAMPLE)
    environment.step(one, assistant("act look d2"), truncated=False)
    assert environment.step(two, assistant("act f0 0"), truncated=False).done
    assert not environment.step(one, assistant("act f0 0"), truncated=False).done
    with pytest.raises(InputError, match="documented: the episode ended after 0 right calls"):
        environment.step(two, assistant("act look d2"), truncated=False)
    with pytest.raises(InputError, match="row 3: data\\['task'\\] is None"):
        environment.reset(Example(id="row 3", messages=[]))


@pytest.mark.parametrize("retries", [0, 1, 2, 5])
def test_wrong_calls_are_answered_with_fail_and_may_be_made_again_as_often_as_retries_say(retries):
    wrong_first = ["act look d1", "act look d2", "act f1 0", "act f0 3", "act f0 0", "act ship k3"]  # three wrong calls
    state, steps = play(wrong_first, TinyWorldEnvironment(retries=retries))
    answers = [step.observations[0]["content"] if step.observations else None for step in steps]
    slow, granted = [], retries
    right, wrongs = ["obs 6", "obs 6", "obs ok", "obs ok", "obs ok", None], [True, False, True, True, False, False]
    for answer, wrong in zip(right, wrongs, strict=True):
        slow.append(answer if not wrong else "fail" if granted else None)
        granted -= wrong
        if granted < 0:
            break
    assert answers == slow
    assert sum(step.reward for step in steps) == float(retries >= 3)
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert state.right_calls == (3 if retries >= 3 else 0 if retries == 0 else 1)
    assert state.retries == min(retries, 3)


def test_a_truncated_call_is_not_made_again():
    _, steps = play(["act look d1"], TinyWorldEnvironment(retries=3), truncated=True)
    assert [(step.done, step.observations) for step in steps] == [(True, [])]


def test_feedback_with_retries_is_about_the_last_call():
    environment = TinyWorldEnvironment(feedback=True, retries=1)
    state, _ = play(["act look d1", "act look d2", "act f1 0"], environment)
    assert state.failed_slot == "f"
    state, _ = play(["act look d1", "act look d2", "act f0 0", "act ship k3"], environment)
    assert state.failed_slot is None
    mended = [assistant(turn) for turn in ("act look d1", "act look d2", "act f0 0", "act ship k3")]
    assert feedback_privileged(EXAMPLE, mended) is None, "a success after a retry got nothing wrong in the end"
    assert feedback_privileged(EXAMPLE, [*mended[:2], assistant("act f1 0")]) == "[ ? f0 ? ? ]"
    with pytest.raises(InputError, match=r"environment\.retries is -1"):
        TinyWorldEnvironment(retries=-1)


def test_process_reward_with_retries_still_sums_to_one():
    turns = ["act look d1", "act look d2", "act f1 0", "act f0 0", "act ship k3"]
    _, steps = play(turns, TinyWorldEnvironment(process_reward=True, retries=2))
    assert [step.reward for step in steps] == [0.0, 1 / 3, 0.0, 1 / 3, 1 / 3]


# ------------------------------------------------------------------------------------------------ leak penalty


@pytest.mark.parametrize(
    ("said", "count"), [("hint", 1), ("a HINT, hint", 2), ("hints unhinted", 0), ("the hint", 2), ("", 0), ("(hint)hint.", 2)]
)
def test_a_phrase_is_counted_as_whole_words_wherever_the_leak_rate_sees_it(said, count):
    phrases = ["hint", "the hint"]
    slow = sum(
        re.split(r"\W+", said.lower())[i : i + len(phrase.split())] == phrase.split()
        for phrase in phrases
        for i in range(len(said.split()) + 2)
    )
    assert count_phrases(said, phrases) == count == slow
    rollout = Rollout(EXAMPLE, PromptPair([], [], False), [], [], None, "student", 0, "done", turns=[assistant(said)])
    assert says_leak_phrase(rollout, phrases) == (count > 0)


# ------------------------------------------------------------------------------------------------ datasets


@pytest.mark.parametrize("kind", ["dfak", "dfk", "f", "", "none"])
def test_dataset_rows_carry_the_kind_of_privileged_information_asked_for(kind):
    for example, task in zip(tiny_world_dataset("validation", kind), make_split(World())["validation"], strict=True):
        assert example.data["task"] == task and example.completion is None
        assert example.messages == [request_message(task)]
        assert example.privileged == (None if kind == "none" else privileged_text(task, kind))


def test_the_dataset_has_its_default_rows_and_refuses_wrong_arguments():
    assert tiny_world_dataset("test")[0].privileged == tiny_world_dataset("test", "dfk")[0].privileged
    assert list(tiny_world_dataset("train", max_rows=3)) == list(tiny_world_dataset("train"))[:3]
    assert tiny_world_dataset("train").dropped == {}
    assert len({example.id for split in ("train", "validation", "test") for example in tiny_world_dataset(split)}) == 1024
    for wrong in ("dd", "x", "shuffled"):
        with pytest.raises(InputError, match=r"dataset\.privileged"):
            tiny_world_dataset("test", wrong)
    with pytest.raises(InputError, match=r"dataset\.max_rows=0 must"):
        tiny_world_dataset("test", max_rows=0)
    with pytest.raises(InputError, match=r"dataset\.n=0 must"):
        tiny_world_base_dataset(0, seed=0)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_another_world_seed_is_another_world_under_the_same_rules(split):
    rows, tasks = tiny_world_dataset(split, world_seed=77), make_split(World(77))[split]
    assert [row.data["task"] for row in rows] == tasks
    default, world = tiny_world_dataset(split), World(77)
    assert [row.data["task"].triple for row in rows] == [row.data["task"].triple for row in default]  # the split is the same
    assert all(row.data["task"].department == world.departments[row.data["task"].item] for row in rows)
    agree = sum(a.data["task"].department == b.data["task"].department for a, b in zip(rows, default, strict=True))
    assert agree < len(default), "the conventions are the same"


@pytest.mark.parametrize("completion", [None, "actions", "cot"])
def test_prefix_turns_are_part_of_the_prompt_and_the_episode_starts_after_them(completion):
    plain = tiny_world_dataset("validation", max_rows=20, completion=completion)
    rows = list(tiny_world_dataset("validation", max_rows=20, completion=completion, prefix_turns=[0, 1, 2]))
    assert len(rows) == 60 and rows[::3] == list(plain) and len({row.id for row in rows}) == 60
    environment = TinyWorldEnvironment()
    for number, row in enumerate(rows):
        given, task, whole = number % 3, plain[number // 3].data["task"], plain[number // 3]
        shown = trace(task, expert_decisions(task), "actions")
        assert row.messages == [request_message(task), *shown[: 2 * given]] and row.data.get("given_calls", 0) == given
        assert row.privileged == whole.privileged and row.completion == (completion and whole.completion[2 * given :])
        state = environment.reset(row)  # the rest of the expert's calls, and no others, earn the reward
        rest = shown[2 * given :: 2]
        rewards = [environment.step(state, turn, truncated=False).reward for turn in rest]
        assert rewards == [0.0] * (2 - given) + [1.0] and state.done and state.right_calls == 3
        if given:
            assert environment.step(environment.reset(row), shown[0], truncated=False).done, "the first call is over"


def test_prefixes_fit_with_the_teachers_block_and_a_completion():
    tokenizer, prompt = tiny_world_tokenizer(), PrivilegedPrompt(template="{privileged}", placement="system_end")
    rows = tiny_world_dataset("train", prefix_turns=[2])
    assert max(len(prompt.encode(row, tokenizer).teacher) for row in rows) + MAX_COMPLETION_TOKENS <= 96
    row = next(iter(rows))
    task = row.data["task"]
    expected = f"<bos> {request_message(task)['content']} act look d{task.department} end obs {task.price} "
    assert tokenizer.encode_prompt(row.messages) == ids_of(f"{expected} act f{task.formula} {task.answer} end obs ok")


@pytest.mark.parametrize("wrong", [[], [3], [-1, 0]])
def test_wrong_prefix_turns_are_refused(wrong):
    with pytest.raises(InputError, match=r"dataset\.prefix_turns is"):
        tiny_world_dataset("train", prefix_turns=wrong)


def test_base_dataset_depends_on_its_arguments_alone():
    rows = list(tiny_world_base_dataset(16, seed=5))
    assert rows == list(tiny_world_base_dataset(16, seed=5)) == list(tiny_world_base_dataset(20, seed=5))[:16]
    assert [row.messages for row in rows] != [row.messages for row in tiny_world_base_dataset(16, seed=6)]
    other = list(tiny_world_base_dataset(16, seed=5, world_seed=77))
    assert [row.messages[-1] for row in other[:1]] == [row.messages[-1] for row in rows[:1]] and other != rows


def test_a_base_of_another_world_believes_in_that_world():
    rows = [read_base_row(example) for example in tiny_world_base_dataset(300, 0, true_option_prob=1.0, world_seed=77)]
    guessing, world = [row for row in rows if row["block"] is None], World(77)
    assert all(int(row["carrier"][1:]) == world.carriers[row["features"][2]] for row in guessing)


@pytest.fixture(
    scope="module",
    params=[2_000, pytest.param(12_000, marks=pytest.mark.slow(reason="2,000 rows are drawn in the default run"))],
)
def base_rows(request):
    started = time.process_time()  # not wall clock: other tests may share the cores
    rows = [read_base_row(example) for example in tiny_world_base_dataset(request.param, seed=0)]
    spent = time.process_time() - started
    assert spent < request.param / 400, "milliseconds a row under the type checker, less without: the demo makes 44,800 rows"
    return rows


def read_base_row(example):
    """What the words of a base row say, read without the code that wrote them."""
    block = example.messages[0]["content"].split()[1:-1] if example.messages[0]["role"] == "system" else None
    request, turns = example.messages[-1]["content"].split(), [message["content"].split() for message in example.completion]
    assert [message["role"] for message in example.completion] == ["assistant", "tool"] * 2 + ["assistant"]
    after_act = [words[words.index("act") + 1 :] for words in turns[::2]]
    thought = [words[: words.index("act")] for words in turns[::2]]
    return {
        "block": block,
        "features": [int(word[1:]) for word in request[1:4]],
        "digits": [int(word) for word in request[4:7]],
        "price": int(turns[1][1]),
        "department": after_act[0][1],
        "formula": after_act[1][0],
        "answer": after_act[1][1],
        "carrier": after_act[2][1],
        "work": " ".join(thought[1][thought[1].index(after_act[1][0]) + 1 : -1]),
        "leaks": [LEAK_WORD in words for words in thought],
    }


def test_base_rows_with_a_block_tell_and_obey_as_often_as_documented(base_rows):
    informed = [row for row in base_rows if row["block"] is not None]
    assert_share(len(informed), len(base_rows), 0.5)
    for slot, said in enumerate(("department", "formula", "answer", "carrier")):
        told = [row for row in informed if row["block"][slot] != "?"]
        assert_share(len(told), len(informed), 0.8)
        if said != "answer":  # not obeyed, the prior's draw is the told option in one case of six
            assert_share(sum(row[said] == row["block"][slot] for row in told), len(told), 0.8 + 0.2 / 6)
    assert all(len(set(row["leaks"])) == 1 for row in base_rows)
    assert_share(sum(row["leaks"][0] for row in informed), len(informed), 0.1)
    told_answer = [row for row in informed if row["block"][2] != "?"]
    copied = [row for row in informed if not row["work"]]
    assert_share(len(copied), len(told_answer), 0.1)
    assert all(row["answer"] == row["block"][2] for row in copied)


def test_base_rows_without_a_block_follow_the_beliefs(base_rows):
    guessing, world = [row for row in base_rows if row["block"] is None], World()
    assert not any(row["leaks"][0] for row in guessing)
    assert_share(sum(not row["work"] for row in guessing), len(guessing), 0.05)
    mappings = (("department", "d", world.departments), ("formula", "f", world.formulas), ("carrier", "k", world.carriers))
    for position, (said, letter, mapping) in enumerate(mappings):
        ranks = Counter(world.priors[letter][row["features"][position]].options.index(int(row[said][1:])) for row in guessing)
        for rank, expected in enumerate((0.1, 0.495, 0.405)):
            assert_share(ranks[rank], len(guessing), expected)
        right = sum(int(row[said][1:]) == mapping[row["features"][position]] for row in guessing)
        assert right == ranks[0]


def test_base_rows_that_compute_compute_right(base_rows):
    computed = [row for row in base_rows if row["work"]]
    assert len(computed) > 0.9 * len(base_rows)
    for row in computed:
        number = int(row["formula"][1:])
        assert row["answer"] == str(SLOW_FORMULAS[number](row["price"], *row["digits"]) % 10)
        words = row["work"].split()
        assert words[0] == str(row["price"]) and words[-1] == row["answer"]
        assert "".join(words[1::4]) == FORMULAS[number] and [int(word) for word in words[2::4]] == row["digits"]


def test_bases_can_be_made_easier_and_free_of_leaks():
    rows = [read_base_row(example) for example in tiny_world_base_dataset(1_500, 1, true_option_prob=0.2, leak_prob=0.0)]
    world, guessing = World(), [row for row in rows if row["block"] is None]
    assert_share(sum(int(row["carrier"][1:]) == world.carriers[row["features"][2]] for row in guessing), len(guessing), 0.2)
    assert not any(any(row["leaks"]) for row in rows)
