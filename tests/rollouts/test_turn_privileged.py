"""Privileged information that comes with an answer of the environment: the teacher alone reads it, at its place."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.data import RecipeData
from pidistill.data.demonstrations import _under_control, recorded_completion
from pidistill.data.load import gives_privileged, told_later
from pidistill.distributed.run import Run
from pidistill.envs import EnvStep, ProcessEnvironment, RoutedEnvironment, StatePrivileged
from pidistill.envs.base import EnvironmentOutputError, check_step
from pidistill.errors import InputError
from pidistill.jsonl import TRAINING_ROLLOUTS, read_jsonl
from pidistill.losses.sampling_kl import SamplingKL
from pidistill.objectives import GRPO, OPSD, OPSDUCLA, SDPO, PiDistill
from pidistill.privileged import PrivilegedPrompt
from pidistill.rollouts.selections import recorded
from pidistill.scoring.packer import _sizes, micro_batch_lengths
from pidistill.scoring.score import score
from pidistill.scoring.stored_teacher import rollout_key
from pidistill.testing import tiny_model
from pidistill.training.metrics import rollout_means, rollout_sums
from pidistill.training.rollout_log import RolloutLog
from pidistill.types import PromptPair, RolloutAdvantage, ScoreRequest
from tests.support.builders import batch_of
from tests.support.episodes import LetterTokenizer, Script, collect, tool

SHOWN = PrivilegedPrompt(template="!{privileged}")


@dataclass
class Shop:
    """Hold what an agent of the little tool environment has bought."""

    bought: str = ""


class Till:
    """A tool environment: each turn's letters are bought, and the tool answers with their number; `q` ends it."""

    def reset(self, example):
        return Shop()

    def step(self, state, turn, *, truncated):
        state.bought += turn["content"]
        done = turn["content"].endswith("q")
        return EnvStep([] if done else [tool(str(len(state.bought)))], float(done), done)


def next_to_buy(state: Shop) -> str | None:
    """Know what to buy next, but not after `bb`, which matches no state of the reference."""
    return None if state.bought.endswith("bb") else f"buy {len(state.bought)}x"


ENVIRONMENT = StatePrivileged(Till(), next_to_buy)


def play(text="ab.bb.c.q.", view="student", privileged=SHOWN, environment=ENVIRONMENT, **more):
    (rollout,) = collect(Script(text, **more), environment, names="a", view=view, privileged=privileged).rollouts
    return rollout


def read_by(rollout, view: str) -> str:
    return LetterTokenizer().decode(rollout.sequence(view)[0]).replace("\x01", ".")


# ------------------------------------------------------------------------------------------- what each view reads


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_the_teacher_reads_each_turns_information_at_its_place_and_the_student_reads_what_it_reads_without(view):
    plain, rollout = play(privileged=None), play(view=view)
    assert read_by(plain, "student") == read_by(rollout, "student") == "aab.:2>bb.:4>c.:5>q."
    assert rollout.completion == plain.completion and rollout.policy_mask == plain.policy_mask
    assert read_by(plain, "teacher") == "Paab.:2>bb.:4>c.:5>q."
    assert read_by(rollout, "teacher") == "Paab.:2\n\n!buy 2x>bb.:4>c.:5\n\n!buy 5x>q."
    assert rollout.reward == plain.reward and [m["content"] for m in rollout.turns] == [m["content"] for m in plain.turns]
    assert [m["content"] for m in rollout.turns] == ["ab", "2", "bb", "4", "c", "5", "q"]  # what traces and logs are made of
    written = [i for i, own in zip(rollout.completion, rollout.policy_mask, strict=True) if own]
    for ids, places in map(rollout.sequence, ("student", "teacher")):
        assert [ids[place] for place in places] == written
    known = [not math.isnan(x) for x in rollout.sampled_logprobs]
    assert known == rollout.policy_mask


def test_a_sampler_in_the_teachers_view_is_given_the_information_and_its_log_probs_stay_with_their_tokens():
    plain, rollout = play(privileged=None, view="teacher"), play(view="teacher")
    shift, expected = 0, []
    extra = len("\n\n!buy 2x")
    for t, own in enumerate(plain.policy_mask):
        shift = extra * sum(t >= last for _, last, _ in rollout.teacher_reads)
        expected += [-(t + 1.0 + shift)] if own else []  # the script's log-probs count the tokens of its context
    assert [x for x in rollout.sampled_logprobs if not math.isnan(x)] == expected
    assert [x for x in play().sampled_logprobs if not math.isnan(x)] == [x for x in plain.sampled_logprobs if not math.isnan(x)]


def test_an_observation_without_room_takes_its_information_along_and_the_last_texts_go_where_the_view_is_too_long():
    cut = play("ab.bb.c.", max_new_tokens=5)
    assert read_by(cut, "teacher") == "Paab." and not cut.teacher_reads
    late = play("ab.bb.c.", max_new_tokens=15)
    assert read_by(late, "teacher") == "Paab.:2\n\n!buy 2x>bb.:4>c." and cut.stop_reason == late.stop_reason == "length"

    class Short(LetterTokenizer):
        max_seq_len = 37  # one text fits, two do not

    for limit in ({"tokenizer": Short()}, {"max_seq_len": 37}):  # the tokenizer's, or a model's that is shorter
        (rollout,) = collect(Script("ab.bb.c.q."), ENVIRONMENT, names="a", privileged=SHOWN, **limit).rollouts
        assert read_by(rollout, "teacher") == "Paab.:2\n\n!buy 2x>bb.:4>c.:5>q." and rollout.teacher_reads_left_out == 1
    means = rollout_means(rollout_sums([rollout], 1.0, ()))
    assert means["turn_privileged_mean"] == means["turn_privileged_too_long_mean"] == 1.0
    assert "turn_privileged_mean" not in rollout_means(rollout_sums([play(privileged=None)], 1.0, ()))


def test_controls_show_nothing_or_a_filler_of_as_many_tokens_and_others_are_refused():
    for control in ("none", "template"):
        assert not play(privileged=replace(SHOWN, control=control)).teacher_reads
    matched, own = play(privileged=replace(SHOWN, control="length_matched")), play()
    assert [len(ids) for *_, ids in matched.teacher_reads] == [len(ids) for *_, ids in own.teacher_reads]
    assert read_by(matched, "teacher") == "Paab.:2\n\n!. . ..>bb.:4>c.:5\n\n!. . ..>q."
    for control in ("shuffled", "wrong", "other_problem"):
        with pytest.raises(InputError, match=rf"row a: .*privileged\.control={control} pairs rows, not turns"):
            play(privileged=replace(SHOWN, control=control))


def test_an_environment_that_gives_information_is_known_before_anything_is_built():
    own = {"_component_": "pidistill.envs.StatePrivileged", "text": "math.pi", "environment": {}}
    routed = {"_component_": "pidistill.envs.RoutedEnvironment", "key": "domain", "environments": {"a": {}, "b": own}}
    for node in (own, routed, OmegaConf.create({"_component_": "pidistill.envs.ProcessEnvironment", "environment": routed})):
        assert gives_privileged(node) and told_later(OmegaConf.create({"environment": node}))
    assert not gives_privileged(None) and not gives_privileged({"_component_": "pidistill.envs.SingleTurn"})
    with pytest.raises(InputError, match=r"environment: .*privileged\.control=shuffled pairs rows, not turns"):
        replace(SHOWN, control="shuffled").check_turns("environment")


def test_what_an_environment_gives_is_a_text_or_nothing():
    assert check_step(EnvStep([], 0.0, False, privileged=" \n")).privileged is None
    for wrong in (5, "\ud800", "x" * 11):
        step = EnvStep([], 0.0, False)
        step.privileged = wrong
        with pytest.raises(EnvironmentOutputError, match="privileged"):
            check_step(step, max_observation_chars=10)
    with pytest.raises(InputError, match=r"environment\.text=math\.pi is no function"):
        StatePrivileged(Till(), "math.pi")


def test_a_function_of_the_state_is_refused_around_worker_processes_that_keep_it():
    process = ProcessEnvironment(Till())
    for environment in (process, RoutedEnvironment("kind", {"a": Till(), "b": process})):
        with pytest.raises(InputError, match=r"environment\.text would be given the pickled state of a ProcessEnvironment"):
            StatePrivileged(environment, next_to_buy)
    assert ProcessEnvironment(StatePrivileged(RoutedEnvironment("kind", {"a": Till()}), next_to_buy))


class Refusing(LetterTokenizer):
    """Take no observation that says what is bought after two letters."""

    def encode_observations(self, history, observations, tools=None):
        if "2x" in observations[-1]["content"]:
            raise InputError("the chat template leaves out 2x")
        return super().encode_observations(history, observations, tools)


def test_a_text_that_the_tokenizer_refuses_costs_its_own_episode():
    script = Script("ab.bb.c.q.", "a.q.")
    result = collect(script, ENVIRONMENT, names="ab", privileged=SHOWN, tokenizer=Refusing())
    assert [rollout.example.id for rollout in result.rollouts] == ["row b"]
    assert result.dropped["environment_output"] == 1


# ------------------------------------------------------------------------------------------- what is scored


def equal_prompts(rollout):
    return replace(rollout, prompts=PromptPair(rollout.prompts.student, rollout.prompts.student, False))


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_the_scorer_reads_what_the_views_read_and_both_are_equal_to_the_bit_before_the_first_text(packing):
    module = tiny_model(128).double()
    rollouts = [equal_prompts(play()), play("a.q."), equal_prompts(play(privileged=None))]
    scores = score(module, batch_of(rollouts, packing=packing), ScoreRequest(True, False))
    for view, numbers in (("student", scores.student_logprobs), ("teacher", scores.teacher_logprobs)):
        expected = []
        for rollout in rollouts:
            ids, places = rollout.sequence(view)
            logp = torch.log_softmax(module(torch.tensor([ids]))[0], -1)
            expected += [logp[place - 1, ids[place]] for place in places]
        torch.testing.assert_close(numbers.float(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    first, rest, last = slice(0, 3), slice(3, 7), slice(-rollouts[2].policy_tokens, None)
    assert torch.equal(scores.student_logprobs[first], scores.teacher_logprobs[first])
    assert torch.equal(scores.student_logprobs[last], scores.teacher_logprobs[last])
    assert (scores.student_logprobs[rest] != scores.teacher_logprobs[rest]).all()


def test_turns_without_information_of_their_own_are_not_distilled_where_the_row_has_none():
    module, rollout = tiny_model(128), equal_prompts(play())
    batch = batch_of([rollout])
    told = [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2  # ab. | bb. after a text | c. after none | q. after a text
    assert batch.has_privileged.tolist() == told and batch.turn_index.tolist() == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 2
    assert batch_of([play()]).has_privileged.all()  # the prompt has it
    objective = OPSDUCLA(no_pi="drop")
    loss = objective.token_loss(batch, score(module, batch, objective.score_request(0)), 0).loss
    assert (loss.detach() != 0).tolist() == told


@pytest.mark.parametrize(
    ("objective", "without_kl"),
    [
        (OPSD(beta=0.3), GRPO()),
        (PiDistill(alpha=1.0, beta=0.3), PiDistill(alpha=1.0, beta=0.0)),
        (PiDistill(alpha=0.0, beta=0.3), PiDistill(alpha=0.0, beta=0.0)),
    ],
    ids=["opsd", "teacher half", "student half"],
)
def test_beside_a_reward_turns_without_information_keep_their_policy_gradient_and_nothing_else(objective, without_kl):
    batch = batch_of([equal_prompts(play())], [RolloutAdvantage(0.7)])
    scores = score(tiny_model(128), batch, objective.score_request(0))
    both, alone = (o.token_loss(batch, scores, 0).loss for o in (objective, without_kl))
    assert (both != alone).tolist() == batch.has_privileged.tolist()
    assert (scores.student_logprobs != scores.teacher_logprobs)[~batch.has_privileged].any(), "the KL of some of them is not 0"


def test_a_kl_in_the_reward_and_sdpos_choice_of_rollouts_see_the_turns_and_not_the_row_alone():
    told = [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    rollouts = [equal_prompts(play()), equal_prompts(play(privileged=None)), play(privileged=None)]
    for n, rollout in enumerate(rollouts):
        rollout.behaviour_values, rollout.reward = [float(i + 1) for i in range(10)], float(n)
    kl = SamplingKL("student", "reward_rb")
    added = [values[0] for values in kl.advantages(rollouts, 0.1, "group_mean", "rl")]
    first, last = sum(i + 1 for i, own in enumerate(told) if own), 55
    gap = 0.1 * (first - last) / 2  # the one without any information is not compared
    assert added == pytest.approx([-gap, 0.0, gap], abs=1e-5)
    to_go = SamplingKL("student", "loss_rb_complete").advantages(rollouts, 0.1, "group_mean", "rl")
    assert any(to_go[0]) and not any(to_go[1]) and any(to_go[2])
    assert [a.keep for a in SDPO(no_pi="drop").advantages(rollouts, 0)] == [True, False, True]
    with pytest.raises(InputError, match="1 of the round's 3 rollouts have no privileged information"):
        SDPO(no_pi="error").advantages(rollouts, 0)


def test_packing_counts_the_longer_view_and_a_teachers_number_on_disk_belongs_to_what_it_read():
    rollout, plain = equal_prompts(play()), equal_prompts(play(privileged=None))
    (size,), (other,) = (_sizes([r], ("student", "teacher")) for r in (rollout, plain))
    extra = 2 * len("\n\n!buy 2x")
    assert other.completion_tokens == len(plain.completion) - 1
    assert size.completion_tokens == 2 * other.completion_tokens + extra and size.longest == other.longest + extra
    assert micro_batch_lengths([size, size], "padded", 2 * size.longest) == [1, 1]
    assert rollout_key(rollout) != rollout_key(plain)


def test_the_rollout_log_holds_what_the_teacher_reads_at_each_turn_it_logs(tmp_path):
    data = RecipeData(LetterTokenizer(), [], [], {}, {}, 0, (), 1.0, 100)
    run, module = Run(torch.device("cpu"), torch.float32, 0, 1, 0, tmp_path), tiny_model(128)
    both = [{"at": 3, "text": ":2\n\n!buy 2x>"}, {"at": 14, "text": ":5\n\n!buy 5x>"}]
    expected = {play: both, functools.partial(play, privileged=None): None}
    for most, cases in ((100, expected), (5, {play: both[:1]})):  # five policy tokens: the log ends before the third turn
        cfg = OmegaConf.create({"rollout_log_total": 8, "rollout_log_max_tokens": most})
        for make_rollout, reads in cases.items():
            log, batch = RolloutLog(cfg, run, data, last_step=1), batch_of([make_rollout()])
            log.look(batch, score(module, batch, ScoreRequest(False, False)), 1)
            log.write(1, 0)
            row = read_jsonl(tmp_path / TRAINING_ROLLOUTS)[-1]
            assert row.get("teacher_reads") == reads and row["privileged"] is None
            for read in reads or []:
                assert row["tokens"][read["at"]] == ":" and not row["policy"][read["at"]] and row["policy"][read["at"] - 1]


def test_a_recorded_rollout_keeps_what_the_teacher_read():
    rollout = equal_prompts(play())
    record = recorded(rollout)
    row = replace(rollout.example, data={"sampled": record})
    fresh = replace(rollout, example=row, completion=[9], policy_mask=[True], teacher_reads=[])
    assert recorded_completion(fresh, 128).sequence("teacher") == rollout.sequence("teacher")
    for control, kept in ((None, True), ("none", False), ("template", False)):
        read = _under_control(recorded_completion(fresh, 128), control)
        assert read.sequence("teacher") == (rollout if kept else replace(rollout, teacher_reads=[])).sequence("teacher")
    record["control"] = "length_matched"
    assert _under_control(recorded_completion(fresh, 128), "length_matched").teacher_reads
    for control in (None, "shuffled"):
        with pytest.raises(InputError, match=rf"row a: .* of a run with privileged\.control=length_matched, .*={control}"):
            _under_control(recorded_completion(fresh, 128), control)
    record["teacher_reads"][0][0] = 0
    with pytest.raises(InputError, match="row a: its `sampled` has teacher_reads that are not observations of it"):
        recorded_completion(fresh, 128)
