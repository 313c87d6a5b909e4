"""Test episodes between a scripted sampler and small environments; then once with a model."""

import inspect
import logging
import math
import threading
from decimal import Decimal

import numpy as np
import pytest
import torch

from pidistill.envs.base import EnvStep
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.envs.tiny_world.world import VOCAB
from pidistill.errors import InputError
from pidistill.rollouts import TorchtuneSampler, collect_rollouts, rollout_seed
from pidistill.rollouts.collect import DROP_REASONS
from pidistill.scoring.batch import make_batch
from pidistill.scoring.score import score
from pidistill.testing import tiny_model
from pidistill.tokenizers.rendering import TextLeftOut
from pidistill.training.keys import TABLE
from pidistill.types import PromptPair, ScoreRequest
from tests.support.episodes import STOP, Counting, LetterTokenizer, Script, assistant, collect, pair, tool

# ---------------------------------------------------------------------------------------------- one episode


def test_a_rollout_holds_the_episode():
    tokenizer, environment = LetterTokenizer(), Counting()
    result = collect(Script("x.yz.q."), environment, "a", tokenizer=tokenizer)
    (rollout,) = result.rollouts
    assert tokenizer.decode(rollout.completion) == "x\x01:1>yz\x01:2>q\x01"
    assert rollout.policy_mask == [c not in ":12>" for c in tokenizer.decode(rollout.completion)]
    assert [math.isnan(x) for x in rollout.sampled_logprobs] == [not m for m in rollout.policy_mask]
    assert rollout.turns == [assistant("x"), tool("1"), assistant("yz"), tool("2"), assistant("q")]
    assert environment.steps == [("row a", "x", False), ("row a", "yz", False), ("row a", "q", False)]
    assert (rollout.reward, rollout.reward_parts) == (13.0, {"turn": 3.0, "end": 10.0})
    assert (rollout.stop_reason, rollout.example.id, rollout.sampled_by) == ("done", "row a", "student")
    assert result.dropped == dict.fromkeys(DROP_REASONS, 0)


def test_observations_are_encoded_after_everything_said_so_far():
    tokenizer = LetterTokenizer()
    collect(Script("x.y.q."), Counting(), "a", tokenizer=tokenizer)
    assert tokenizer.histories == [
        (["a", "x"], ["1"], [{"name": "t"}]),
        (["a", "x", "1", "y"], ["2"], [{"name": "t"}]),
    ]


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_rows_belong_to_their_example_and_group(view):
    sampler = Script("q.", "xq.", "yq.", "zq.", "q.", "q.")
    result = collect(sampler, Counting(), "abc", view=view, group_size=2, groups=[7, 3, 5], temperature=0.5, max_new_tokens=9)
    assert [(r.example.id, r.group, r.prompts, r.sampled_by) for r in result.rollouts] == [
        (f"row {name}", group, pair(name), view) for name, group in (("a", 7), ("b", 3), ("c", 5)) for _ in range(2)
    ]
    assert [r.turns[0]["content"] for r in result.rollouts] == ["q", "xq", "yq", "zq", "q", "q"]
    (call,) = sampler.calls
    assert call == {
        "prompts": [pair(name).of(view) for name in "abc"],
        "group_size": 2,
        "seeds": [0, 1, 2, 3, 4, 5],
        "stop_ids": frozenset({STOP}),
        "pad_id": 0,
        "temperature": 0.5,
        "max_new_tokens": 9,
    }
    assert [r.group for r in collect(Script("q.", "q."), Counting()).rollouts] == [0, 1]


def assert_turns_add_up(rollout):
    """Each number belongs to its own turn: read off the mask, and off a second walk through the environment."""
    spans = "".join("#" if mask else " " for mask in rollout.policy_mask).split()
    said = [turn["content"] for turn in rollout.turns if turn["role"] == "assistant"]
    if rollout.stop_reason != "length":
        assert [len(span) for span in spans] == rollout.turn_policy_tokens
    assert sum(rollout.turn_policy_tokens) == rollout.policy_tokens
    assert sum(rollout.turn_rewards) == rollout.reward
    assert rollout.turn_rewards == [11.0 if text.endswith("q") else 1.0 for text in said]
    assert len(rollout.turn_rewards) == len(rollout.turn_policy_tokens) == len(said)


def test_rewards_and_policy_tokens_are_counted_by_turn():
    rollouts = collect(Script("x.yz.q.", "q.", "x.yzzzz.q."), Counting(), "abc", max_turns=2).rollouts
    assert [r.turn_rewards for r in rollouts] == [[1.0, 1.0], [11.0], [1.0, 1.0]]
    assert [r.turn_policy_tokens for r in rollouts] == [[2, 3], [2], [2, 6]]  # the end of a turn is the turn's
    for rollout in rollouts:
        assert_turns_add_up(rollout)


def test_a_turn_cut_short_and_one_before_an_observation_that_does_not_fit_keep_their_rewards_and_tokens():
    (cut,) = collect(Script("x.yq...", max_new_tokens=7), Counting(), "a").rollouts
    assert (cut.turn_rewards, cut.turn_policy_tokens) == ([1.0, 11.0], [2, 2])
    (refused,) = collect(Script("x.y.z.", max_new_tokens=9), Counting(), "a").rollouts
    assert refused.stop_reason == "length" and (refused.turn_rewards, refused.turn_policy_tokens) == ([1.0, 1.0], [2, 2])
    assert_turns_add_up(cut)
    assert_turns_add_up(refused)


def test_an_episode_has_at_most_max_turns():
    tokenizer = LetterTokenizer()
    long, short = collect(Script("x.y.z.q.", "x.q."), Counting(), tokenizer=tokenizer, max_turns=2).rollouts
    assert long.turns == [assistant("x"), tool("1"), assistant("y")] and long.reward == 2.0
    assert tokenizer.decode(long.completion) == "x\x01:1>y\x01"
    assert (long.stop_reason, short.stop_reason) == ("max_turns", "done")  # the last turn allowed may end the episode


# ---------------------------------------------------------------------------------------------- the token limit


@pytest.mark.parametrize("limit", ["length", "turn_length"])
def test_a_turn_cut_short_is_stepped_as_truncated(limit):
    environment = Counting()
    (rollout,) = collect(Script("x.yq...", max_new_tokens=7, limit_name=limit), environment, "a").rollouts
    assert LetterTokenizer().decode(rollout.completion) == "x\x01:1>yq"
    assert environment.steps == [("row a", "x", False), ("row a", "yq", True)]
    assert rollout.turns == [assistant("x"), tool("1"), assistant("yq")]
    assert (rollout.stop_reason, rollout.reward) == (limit, 12.0)


def test_an_observation_that_does_not_fit_is_in_neither_tokens_nor_turns():
    environment = Counting()
    (rollout,) = collect(Script("x.y.z.", max_new_tokens=9), environment, "a").rollouts
    assert LetterTokenizer().decode(rollout.completion) == "x\x01:1>y\x01"
    assert rollout.turns == [assistant("x"), tool("1"), assistant("y")]
    assert [truncated for _, _, truncated in environment.steps] == [False, False]  # the turn was whole
    assert (rollout.stop_reason, rollout.reward) == ("length", 2.0)


class Judging(Counting):
    """Take back what the turns earned where a limit ends the episode."""

    def unfinished(self, state):
        self.steps.append((state["id"], "unfinished", state["turns"]))
        return EnvStep([tool("never shown")], -5.0, False, {"unfinished": -5.0})


@pytest.mark.parametrize(("limits", "stop"), [({"max_turns": 2}, "max_turns"), ({}, "length")])
def test_an_episode_that_a_limit_ends_after_a_whole_turn_may_be_judged(limits, stop):
    environment = Judging()
    long, short = collect(Script("x.y.z.", "q.", max_new_tokens=9), environment, **limits).rollouts
    assert [step for step in environment.steps if step[1] == "unfinished"] == [("row a", "unfinished", 2)]
    assert (long.stop_reason, long.reward, long.turn_rewards) == (stop, -3.0, [1.0, -4.0]), "it counts to the last turn"
    assert long.reward_parts == {"turn": 2.0, "end": 0.0, "unfinished": -5.0} and len(long.turn_policy_tokens) == 2
    assert long.turns == [assistant("x"), tool("1"), assistant("y")]
    assert (short.reward, short.stop_reason) == (11.0, "done")


def test_a_verdict_on_an_unfinished_episode_that_fails_costs_it():
    class Broken(Counting):
        def unfinished(self, state):
            raise ZeroDivisionError

    result = collect(Script("x.y.", "q."), Broken(), max_turns=1)
    assert [r.example.id for r in result.rollouts] == ["row b"] and result.dropped["reward_error"] == 1


# ---------------------------------------------------------------------------------------------- what templates write


class Answers(Counting):
    """Answer the first turn with the message that is given."""

    def __init__(self, message):
        super().__init__()
        self.message = message

    def step(self, state, turn, *, truncated):
        done = turn["content"] == "q"
        return EnvStep([] if done else [self.message], 1.0, done)


def test_an_observation_that_the_tokenizer_refuses_costs_its_episode(caplog):
    class Forgetful(LetterTokenizer):
        def encode_observations(self, history, observations, tools=None):
            raise TextLeftOut("the chat template leaves out the content of the system message '7'")

    result = collect(Script("x.q.", "q."), Answers({"role": "system", "content": "7"}), tokenizer=Forgetful())
    assert [r.example.id for r in result.rollouts] == ["row b"] and result.dropped["environment_output"] == 1
    assert "leaves out the content of the system message '7'" in caplog.text


@pytest.mark.parametrize("extra", [np.arange(3), {1, 2}, Decimal(1), threading.Lock()], ids=lambda value: type(value).__name__)
def test_what_is_no_plain_data_is_left_out_of_an_observation(extra):
    (rollout,) = collect(Script("x.q."), Answers(tool("7") | {"raw": extra, "kept": [1, None]}), "a").rollouts
    assert rollout.turns[1] == tool("7") | {"kept": [1, None]}


@pytest.mark.parametrize("attribute", [False, [1], 5])
def test_an_attribute_that_is_no_method_judges_nothing(attribute):
    class Odd(Counting):
        unfinished = attribute

    class Remote:
        def __init__(self):
            self.world = Counting()

        def __getattr__(self, name):
            return getattr(self.world, name, lambda *arguments: None)

        def reset(self, example):
            return self.world.reset(example)

        def step(self, state, turn, *, truncated):
            return self.world.step(state, turn, truncated=truncated)

    for environment in (Odd(), Remote()):
        (rollout,) = collect(Script("x.y."), environment, "a", max_turns=1).rollouts
        assert (rollout.stop_reason, rollout.reward) == ("max_turns", 1.0)


# ---------------------------------------------------------------------------------------------- rewards that fail


class Failing(Counting):
    """Row `b` fails in the way it is told to; the others are as before."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def reset(self, example):
        if example.id == "row b" and self.how == "reset":
            raise ConnectionError("no server")
        return super().reset(example)

    def step(self, state, turn, *, truncated):
        step = super().step(state, turn, truncated=truncated)
        if state["id"] != "row b" or self.how == "reset":
            return step
        if self.how == "raises":
            raise ZeroDivisionError("nothing to divide")
        values = {"nan": math.nan, "inf": -math.inf, "word": "high"}
        if self.how == "part":
            return EnvStep(step.observations, 0.0, step.done, {"style": math.nan})
        step.reward = values[self.how]
        return step


@pytest.mark.parametrize(
    ("how", "reason", "told"),
    [
        ("raises", "reward_error", "ZeroDivisionError('nothing to divide')"),
        ("reset", "reward_error", "ConnectionError('no server')"),
        ("word", "environment_output", "reward is 'high' (str), not a number"),
        ("nan", "reward_not_finite", "nan"),
        ("inf", "reward_not_finite", "-inf"),
        ("part", "reward_not_finite", "{'style': nan}"),
    ],
)
@pytest.mark.parametrize("cut_short", [False, True])
def test_a_rollout_without_a_reward_is_dropped_counted_and_logged(how, reason, told, cut_short, caplog):
    sampler = Script("q.", "x.q.", "x.q.", "q.") if not cut_short else Script("q.", "xx", "xx", "q.", max_new_tokens=2)
    with caplog.at_level(logging.WARNING):
        result = collect(sampler, Failing(how), "abbc", group_size=1)
    assert [(r.example.id, r.reward) for r in result.rollouts] == [("row a", 11.0), ("row c", 11.0)]
    assert result.dropped == dict.fromkeys(DROP_REASONS, 0) | {reason: 2}
    assert result.sampled_tokens == 8  # two of each row: a failed one costs what it sampled
    (record,) = caplog.records
    assert all(part in record.getMessage() for part in ("2 rollouts", reason, "row b", told))
    assert ("Traceback" in record.getMessage()) == (reason == "reward_error")  # that of the user's own code


BESIDE_THE_TEXT = 2 + len("roletoolcontent")  # the list and the message count as one character each, and names as texts


@pytest.mark.parametrize(("most", "kept"), [(3, True), (2, False)])
def test_an_observation_longer_than_the_bound_costs_its_episode(most, kept, caplog):
    class Answers(Counting):
        def step(self, state, turn, *, truncated):
            done = turn["content"] == "q"
            return EnvStep([] if done else [tool("abc")], 1.0, done)

    result = collect(Script("x.q.", "q."), Answers(), max_observation_chars=BESIDE_THE_TEXT + most)
    assert [r.example.id for r in result.rollouts] == (["row a", "row b"] if kept else ["row b"])
    assert result.dropped["environment_output"] == (0 if kept else 1)
    assert kept or "raise that key" in caplog.text


def test_the_key_of_the_bound_has_the_default_of_the_function():
    default = inspect.signature(collect_rollouts).parameters["max_observation_chars"].default
    assert default == TABLE["max_observation_chars"].default


def test_an_environment_that_does_not_fit_the_dataset_stops_the_run():
    class Picky(Counting):
        def reset(self, example):
            raise InputError(f"{example.id} has no task; use another dataset")

    with pytest.raises(InputError, match="row a has no task"):
        collect(Script("q."), Picky(), "a")


# ---------------------------------------------------------------------------------------------- arguments and seeds


def test_a_rank_without_examples_still_calls_the_sampler():
    sampler = Script()
    result = collect(sampler, Counting(), "")
    assert (result.rollouts, result.dropped, len(sampler.calls)) == ([], dict.fromkeys(DROP_REASONS, 0), 1)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"groups": [0]}, "1 group numbers"), ({"max_turns": 0}, "max_turns=0 must be at least 1")]
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        collect(Script("q.", "q."), Counting(), **kwargs)


def test_rollout_seeds_differ_in_the_bits_that_torch_uses():
    keys = [(s, t, i, m) for s in range(3) for t in (-1, 0, 1, 11) for i in range(30) for m in range(12)]
    seeds = [rollout_seed(*key) for key in keys]
    assert seeds == [rollout_seed(*key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    draws = {torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds[:200]}
    assert len(draws) == 200


# ---------------------------------------------------------------------------------------------- with a model


def test_completions_are_the_turns_and_observations_in_order():
    """What is trained is what was sampled, and encoding the rollout's messages again gives the same ids."""
    tokenizer, model = LetterTokenizer(), tiny_model(128)

    class EndsOnThirdTurn(Counting):
        def step(self, state, turn, *, truncated):
            super().step(state, turn, truncated=truncated)
            return EnvStep([tool(f"{state['turns']}{turn['content'][:2]}")], 1.0, state["turns"] == 3, {})

    tokenizer.stop_ids = frozenset(range(1, 60))
    tokenizer.parse_turn = lambda ids, tools: assistant(tokenizer.decode(ids))
    result = collect(
        TorchtuneSampler(max_new_tokens=40, max_batch_size=3),
        EndsOnThirdTurn(),
        "abc",
        tokenizer=tokenizer,
        model=model,
        group_size=4,
    )
    assert {r.stop_reason for r in result.rollouts} >= {"done"}
    for rollout in result.rollouts:
        ids, mask, history = [], [], list(rollout.example.messages)
        for turn in rollout.turns:
            said = turn["role"] == "assistant"
            new = [ord(c) for c in turn["content"]] if said else tokenizer.encode_observations(history, [turn])
            ids, mask, history = ids + new, mask + [said] * len(new), [*history, turn]
        assert rollout.completion == ids and rollout.policy_mask == mask
        assert rollout.turns[-1]["role"] == "assistant"
        assert rollout.reward == sum(turn["role"] == "assistant" for turn in rollout.turns)
        assert rollout.turn_rewards == [1.0] * int(rollout.reward)
        assert rollout.turn_policy_tokens == [len(turn["content"]) for turn in rollout.turns if turn["role"] == "assistant"]


def test_slow_environments_and_the_sampler_work_at_the_same_time():
    """An answer to `a` comes only after `b`'s last turn: in one thread it would never come. The rollouts are the same."""
    tokenizer, model = LetterTokenizer(), tiny_model(128)
    tokenizer.stop_ids = frozenset(range(1, 60))
    tokenizer.parse_turn = lambda ids, tools: assistant(tokenizer.decode(ids))
    b_ended = threading.Event()

    class Patient(Counting):
        def __init__(self, waits: bool):
            super().__init__()
            self.waits = waits

        def step(self, state, turn, *, truncated):
            answer = super().step(state, turn, truncated=truncated)
            if self.waits and state["id"] == "row a" and not b_ended.wait(timeout=30):
                raise TimeoutError("b did not end while a waited")
            answer.done = state["turns"] == 3
            if state["id"] == "row b" and (answer.done or truncated):
                b_ended.set()
            return answer

    def play(waits, threads):
        sampler = TorchtuneSampler(max_new_tokens=60)
        return collect(sampler, Patient(waits), tokenizer=tokenizer, model=model, environment_threads=threads).rollouts

    expected, rollouts = play(False, None), play(True, 2)
    assert len(expected) == 2 and max(len(rollout.turn_rewards) for rollout in expected) > 1
    for one, other in zip(expected, rollouts, strict=True):
        assert (one.completion, one.policy_mask, one.turns, one.reward) == (
            other.completion,
            other.policy_mask,
            other.turns,
            other.reward,
        )


def test_an_environment_that_fails_in_a_thread_is_counted_too(caplog):
    class Fails(Counting):
        def step(self, state, turn, *, truncated):
            if state["id"] == "row a":
                raise ConnectionError("no sandbox")
            return super().step(state, turn, truncated=truncated)

    tokenizer = LetterTokenizer()
    tokenizer.stop_ids = frozenset(range(1, 60))
    sampler = TorchtuneSampler(max_new_tokens=8)
    result = collect(sampler, Fails(), tokenizer=tokenizer, model=tiny_model(128), environment_threads=2)
    assert result.dropped == dict.fromkeys(DROP_REASONS, 0) | {"reward_error": 1}
    assert [rollout.example.id for rollout in result.rollouts] == ["row b"]
    assert "no sandbox" in caplog.text


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_the_scorer_agrees_with_the_sampler(view):
    """Before the first optimiser step the ratio of the view that sampled is 1, with several turns and with both prompts."""
    model, tokenizer, environment = tiny_model(len(VOCAB), seed=3), tiny_world_tokenizer(), TrustingWorld()
    examples = list(tiny_world_dataset("train", max_rows=6))
    pairs = [
        PromptPair(
            student=tokenizer.encode_prompt(row.messages),
            teacher=tokenizer.encode_prompt([{"role": "system", "content": row.privileged}, *row.messages]),
            has_privileged=True,
        )
        for row in examples
    ]
    result = collect_rollouts(
        model,
        TorchtuneSampler(temperature=0.75, max_new_tokens=60),
        tokenizer,
        environment,
        examples,
        pairs,
        view=view,
        group_size=4,
        seeds=[rollout_seed(0, 0, i, m) for i in range(6) for m in range(4)],
    )
    assert max(len(rollout.turns) for rollout in result.rollouts) == 3
    batch = make_batch(result.rollouts, None, pad_id=tokenizer.pad_id, device=torch.device("cpu"))
    scores = score(model, batch, ScoreRequest(student_grad=False, teacher_grad=False), temperature=0.75)
    own, other = scores.student_logprobs, scores.teacher_logprobs
    own, other = (own, other) if view == "student" else (other, own)
    torch.testing.assert_close((own - batch.ratio_logprobs).exp(), torch.ones_like(own), atol=1e-5, rtol=0)
    assert ((other - batch.ratio_logprobs).abs() > 1e-3).any()


class TrustingWorld:
    """Answers the first turn of a tiny-world episode with a price, whatever the turn says."""

    def reset(self, example):
        return []

    def step(self, state, turn, *, truncated):
        state.append(turn)
        done = len(state) == 2 or truncated
        return EnvStep([] if done else [tool("obs 6")], 0.0, done)
