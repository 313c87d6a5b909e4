"""Test which samples of a model are kept, read back as supervised training sees them."""

import json
from pathlib import Path

import pytest
import torch

from pidistill.data import build_prompts, chat_dataset, demonstration
from pidistill.distributed.run import Run
from pidistill.envs.base import EnvStep
from pidistill.envs.tiny_world import TinyWorldEnvironment, tiny_world_dataset, tiny_world_tokenizer
from pidistill.envs.tiny_world.world import expert_decisions, trace
from pidistill.errors import InputError
from pidistill.jsonl import write_jsonl
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.rollouts import CollectResult, Sample, collect_rollouts
from pidistill.rollouts.selections import AfterTurns, Cut, Interventions, Rewriter, Selection, Successes, Trace, trace_row
from pidistill.types import Example

TOKENIZER = tiny_world_tokenizer()
PROMPT = PrivilegedPrompt(template="{privileged}", placement="system_end", leak_phrases=["hint"])
EXAMPLES = list(tiny_world_dataset("train", max_rows=3))


def assistant(content):
    return {"role": "assistant", "content": content}


def right_turns(example):
    """The words of the expert's three turns."""
    task = example.data["task"]
    return [message["content"] for message in trace(task, expert_decisions(task), "actions")[::2]]


class Says:
    """A sampler that says the turns it is given, one list per row, and remembers what it was asked."""

    temperature, top_p, top_k = 1.0, None, None

    def __init__(self, *rows, max_new_tokens=50):
        self.rows, self.max_new_tokens, self.calls = rows, max_new_tokens, []

    def sample(self, model, prompts, *, on_turn_end, seeds, max_new_tokens=None, **kwargs):
        limit = max_new_tokens or self.max_new_tokens
        self.calls.append({"prompts": [list(p) for p in prompts], "seeds": list(seeds), "limit": limit})
        return [self._row(row, turns, limit, on_turn_end) for row, turns in enumerate(self.rows)]

    def _row(self, row, turns, limit, on_turn_end):
        sample = Sample([], [], [], "done")
        for turn in turns:
            ids = TOKENIZER.encode_turn([], assistant(turn))[: limit - len(sample.tokens)]
            _extend(sample, ids, True)
            if ids[-1] not in TOKENIZER.stop_ids:
                sample.stop_reason = "length"
                return sample
            forced = on_turn_end(row, ids)
            if forced is None:
                return sample
            _extend(sample, forced, False)
        raise AssertionError("the script is too short")


def _extend(sample, ids, sampled):
    sample.tokens += ids
    sample.policy_mask += [sampled] * len(ids)
    sample.logprobs += [-1.0 if sampled else float("nan")] * len(ids)


def pairs(examples):
    return [PROMPT.encode(example, TOKENIZER) for example in examples]


def sampled(rows, examples=EXAMPLES, group_size=1, view="teacher", environment=None, **kwargs):
    """Rollouts that say ``rows``, one list of turns each."""
    sampler = Says(*rows, **kwargs)
    environment = environment or TinyWorldEnvironment()
    seeds = range(len(rows))
    return collect_rollouts(
        None, sampler, TOKENIZER, environment, examples, pairs(examples), view=view, group_size=group_size, seeds=list(seeds)
    ).rollouts


def refuse(cuts):
    raise AssertionError("a selection of successes rewrites nothing")


def rewriter(sampler, environment=None, max_seq_len=96):
    def collect(**arguments):
        return collect_rollouts(None, sampler, TOKENIZER, AfterTurns(environment or TinyWorldEnvironment()), **arguments)

    class OneRank(Run):
        def max(self, value):
            return value

    run = OneRank(torch.device("cpu"), torch.float32, 0, 1, 0, Path())
    return Rewriter(collect, TOKENIZER, PROMPT, run, sampler.max_new_tokens, max_seq_len)


# ------------------------------------------------------------------------------------------------ successes


def test_successes_are_the_whole_rollouts_with_enough_reward():
    wrong = ["act"]
    rows = [
        right_turns(EXAMPLES[0]),
        wrong,
        wrong,
        right_turns(EXAMPLES[1]),
        right_turns(EXAMPLES[2]),
        right_turns(EXAMPLES[2]),
    ]
    rollouts = sampled(rows, group_size=2)
    selected = Successes().select(rollouts, ["hint"], refuse, 0)
    kept = [rollout for rollout in rollouts if rollout.reward >= 1.0]
    assert [trace.completion for trace in selected.traces] == [rollout.turns for rollout in kept] and len(kept) == 4
    assert [trace.group for trace in selected.traces] == [0, 1, 2, 2] and selected.rollouts == []
    assert all(trace.provenance == {"sampled_by": "teacher"} for trace in selected.traces)
    assert len(Successes(threshold=0.0).select(rollouts, [], refuse, 0).traces) == 6
    assert [t.group for t in Successes(max_per_prompt=1).select(rollouts, [], refuse, 0).traces] == [0, 1, 2]
    assert Successes(threshold=1.5).select(rollouts, [], refuse, 0).traces == []


def test_leaks_are_left_out_if_asked_and_do_not_count_against_the_limit():
    clean, leaking = right_turns(EXAMPLES[0]), right_turns(EXAMPLES[0])
    leaking[1] = f"think hint {leaking[1]}"
    rollouts = sampled([leaking, clean, clean], EXAMPLES[:1], group_size=3)
    assert len(Successes().select(rollouts, ["hint"], refuse, 0).traces) == 3
    assert len(Successes(drop_leaks=True).select(rollouts, ["hint"], refuse, 0).traces) == 2
    (kept,) = Successes(drop_leaks=True, max_per_prompt=1).select(rollouts, ["hint"], refuse, 0).traces
    assert kept.completion == rollouts[1].turns


def test_a_rollout_that_was_cut_short_is_no_trace():
    class Lenient(TinyWorldEnvironment):
        def step(self, state, turn, *, truncated):
            return EnvStep([], 1.0, True)

    rollouts = sampled([["act look d1"]], EXAMPLES[:1], environment=Lenient(), max_new_tokens=2)
    assert (rollouts[0].stop_reason, rollouts[0].reward) == ("length", 1.0)
    assert Successes().select(rollouts, [], refuse, 0).traces == []


@pytest.mark.parametrize("selection", [Successes, Interventions])
def test_limits_that_keep_nothing_are_refused(selection):
    assert isinstance(selection(), Selection)
    with pytest.raises(InputError, match=r"selection\.max_per_prompt=0 must"):
        selection(max_per_prompt=0)


# ------------------------------------------------------------------------------------------------ interventions


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_intervention_is_the_right_turns_and_the_failing_one_rewritten(failing):
    (example,) = EXAMPLES[:1]
    right = right_turns(example)
    rollouts = sampled([[*right[:failing], "think . act"]], [example], view="student")
    sampler = Says([right[failing]])
    selected = Interventions().select(rollouts, [], rewriter(sampler), 0)
    (made,) = selected.traces
    expert = trace(example.data["task"], expert_decisions(example.data["task"]), "actions")
    assert made.completion == expert[: 2 * failing + 1] and made.example is example
    assert made.reward == float(failing == 2)
    assert made.provenance == {"sampled_by": "student", "rewritten_by": "teacher", "rewritten_turn": failing}
    # The model saw the privileged information and its own right turns, and no more.
    block = {"role": "system", "content": example.privileged}
    assert sampler.calls[0]["prompts"] == [TOKENIZER.encode_prompt([block, *example.messages, *expert[: 2 * failing]])]
    (fix,) = selected.rollouts
    assert fix.turns == [assistant(right[failing])] and fix.policy_tokens == len(right[failing].split()) + 1


def test_only_rollouts_that_failed_are_rewritten_and_only_right_turns_are_kept():
    right = right_turns(EXAMPLES[0])
    rows = [right, ["act"], [right[0], "act"], [right[0], "act"], ["think " * 60]]
    rollouts = sampled(rows, EXAMPLES[:1], group_size=5, view="student")
    assert [r.stop_reason for r in rollouts] == ["done"] * 4 + ["length"]
    sampler = Says([right[0]], ["act look"], [f"hint {right[1]}"])
    selected = Interventions().select(rollouts, ["hint"], rewriter(sampler), 7)
    assert [made.completion[-1]["content"] for made in selected.traces] == [right[0], f"hint {right[1]}"]
    assert len(selected.rollouts) == 3, "refused fixes were sampled too"
    (seeds,) = [call["seeds"] for call in sampler.calls]
    assert len(set(seeds)) == 3
    kept = Interventions(drop_leaks=True).select(rollouts, ["hint"], rewriter(Says(*sampler.rows)), 7).traces
    assert [made.completion[-1]["content"] for made in kept] == [right[0]]
    again = Says(*sampler.rows)
    Interventions().select(rollouts, [], rewriter(again), 7)
    other = Says(*sampler.rows)
    Interventions().select(rollouts, [], rewriter(other), 8)
    assert again.calls[0]["seeds"] == seeds != other.calls[0]["seeds"]


def test_a_rank_without_failures_still_calls_the_model():
    sampler = Says()
    assert Interventions().select([], [], rewriter(sampler), 0).traces == [] and len(sampler.calls) == 1


def test_the_rewritten_turn_gets_what_is_left_of_the_context():
    example = EXAMPLES[0]
    right = right_turns(example)
    rollouts = sampled([[*right[:2], "act"]], [example], view="student")
    for max_seq_len, limit in ((96, 50), (40, 40 - 27), (28, 1)):
        sampler = Says([right[2]])
        Interventions().select(rollouts, [], rewriter(sampler, max_seq_len=max_seq_len), 0)
        assert len(sampler.calls[0]["prompts"][0]) == 27 and sampler.calls[0]["limit"] == limit


def test_an_environment_that_answers_the_same_turns_differently_is_refused():
    class Moody(TinyWorldEnvironment):
        def step(self, state, turn, *, truncated):
            return EnvStep([], 0.0, done=True)

    right = right_turns(EXAMPLES[0])
    rollouts = sampled([[right[0], "act"]], EXAMPLES[:1], view="student")
    with pytest.raises(InputError, match="ended a replayed episode earlier than the sampled one"):
        Interventions().select(rollouts, [], rewriter(Says([right[1]]), Moody()), 0)


def test_a_fix_whose_reward_failed_is_dropped_and_counted():
    rollouts = sampled([["act"]], EXAMPLES[:1], view="student")
    selected = Interventions().select(rollouts, [], lambda cuts: CollectResult([], {"reward_error": len(cuts)}, 0), 0)
    assert (selected.traces, selected.dropped) == ([], {"reward_error": 1})


def test_cutting_a_rollout_for_an_intervention_leaves_the_rollout_unchanged():
    rollouts = sampled([["act"]], EXAMPLES[:1])
    seen: list[Cut] = []
    Interventions().select(rollouts, [], lambda cuts: seen.extend(cuts) or CollectResult([], {}, 0), 0)
    assert [cut.turns for cut in seen] == [[]] and len(rollouts[0].turns) == 1


# ------------------------------------------------------------------------------------------------ the file


def test_rows_come_back_as_the_ids_that_were_sampled_without_the_privileged_information(tmp_path):
    rollouts = sampled([right_turns(example) for example in EXAMPLES])
    traces = Successes().select(rollouts, [], refuse, 0).traces
    write_jsonl(tmp_path / "traces.jsonl", [trace_row(made, {"seed": 3}) for made in traces])
    rows = chat_dataset(str(tmp_path / "traces.jsonl"), privileged_key="privileged", completion_key="completion")
    prompts = build_prompts(rows, TOKENIZER, PROMPT, max_new_tokens=0).prompts
    for rollout, (example, pair) in zip(rollouts, prompts, strict=True):
        back = demonstration(example, pair, TOKENIZER)
        assert (back.completion, back.policy_mask) == (rollout.completion, rollout.policy_mask)
        assert back.turn_policy_tokens == rollout.turn_policy_tokens
        assert (pair.student, pair.teacher) == (rollout.prompts.student, rollout.prompts.teacher)
        assert TOKENIZER.encode_prompt(example.messages) == pair.student, "the messages are without the block"
        assert example.data["reward"] == 1.0
        assert example.data["provenance"] == {"example": rollout.example.id, "seed": 3, "sampled_by": "teacher"}


def test_tools_and_the_arguments_of_calls_survive_whatever_other_rows_have(tmp_path):
    def call(arguments):
        return [{"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    given = [{"x": 1}, {"y": [None, {"z": "é"}]}, "not json"]
    made = [
        Trace(
            Example(f"row {i}", [{"role": "user", "content": "q"}], tools=tools),
            [{"role": "assistant", "tool_calls": call(arguments)}, {"role": "tool", "content": "r"}, assistant("a")],
            1.0,
            i,
        )
        for i, arguments in enumerate(given)
    ]
    write_jsonl(tmp_path / "t.jsonl", [trace_row(one, {}) for one in made])
    settings = {"privileged_key": None, "completion_key": "completion", "tools_key": "tools"}
    for one, back in zip(made, chat_dataset(str(tmp_path / "t.jsonl"), **settings), strict=True):
        assert back.completion == one.completion and back.tools == tools and back.messages == one.example.messages
        assert back.privileged is None


def test_a_missing_file_names_the_stage_that_writes_it(tmp_path):
    source = str(tmp_path / "traces.jsonl")
    with pytest.raises(InputError, match=r"traces.jsonl does not exist; .* run `tune run stage one` first"):
        chat_dataset(source, made_by="tune run stage one")
    (tmp_path / "traces.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}]}) + "\n")
    assert len(chat_dataset(source, privileged_key=None, made_by="tune run stage one")) == 1
