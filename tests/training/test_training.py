"""Test the common part of all recipes: steps, skips, schedules, shares of the work, one sentence per error."""

import json
import math
import random
import re
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from pidistill.distributed.run import Run, Timer
from pidistill.errors import InputError
from pidistill.jsonl import write_jsonl
from pidistill.objectives.schedule import LinearSchedule, as_schedule
from pidistill.testing import TINY_SIZES, tiny_model
from pidistill.training.interrupts import FailedBetweenUpdates, between_updates
from pidistill.training.keys import LEAST
from pidistill.training.load import load_model
from pidistill.training.lr_schedules import get_cosine_schedule_with_warmup_and_floor, get_linear_warmup_schedule
from pidistill.training.rounds import RoundSizes, check_rewards, dump_rollouts
from pidistill.training.start import _default_threads, cleanup, one_sentence_errors, start
from pidistill.training.update import Updates, crossed
from pidistill.types import RolloutAdvantage
from tests.support.builders import CPU, VOCABULARY, random_rollouts

ALONE = Run(CPU, torch.float32, 0, 1, 0, Path("unused"))


# ------------------------------------------------------------------------------------------- one optimiser step


def updates(folder: Path, weights, **changes) -> Updates:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    cfg = OmegaConf.create({"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}, **changes})
    return Updates(cfg, Run(CPU, torch.float32, 0, 1, 0, folder), model)


def give_gradient(updates: Updates, gradient) -> None:
    updates.model.weight.grad = torch.tensor([gradient])


def weights_of(updates: Updates) -> list[float]:
    return updates.model.weight.tolist()[0]


def no_dump(path):
    pytest.fail(f"a finite step dumped its batch to {path}")


@pytest.mark.parametrize("clip", [None, 2.5, 100.0])
def test_a_step_clips_the_gradient_to_the_norm_and_moves_against_it(clip, tmp_path):
    update = updates(tmp_path, [1.0, 2.0, 3.0], clip_grad_norm=clip)
    gradient = [3.0, 0.0, 4.0]
    give_gradient(update, gradient)
    result = update.step(0.5, 7, no_dump, 1)
    scale = min(1.0, (clip or math.inf) / 5.0)
    expected = [w - 0.1 * scale * g for w, g in zip([1.0, 2.0, 3.0], gradient, strict=True)]
    assert weights_of(update) == pytest.approx(expected, rel=1e-5)
    assert result.applied and result.grad_norm == pytest.approx(5.0) and result.lr == 0.1
    assert update.model.weight.grad is None
    assert (update.nonfinite_steps, update.empty_steps) == (0, 0)


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_a_step_that_is_not_finite_moves_nothing_is_counted_and_dumped(loss, gradient, tmp_path):
    update = updates(tmp_path, [1.0, 2.0, 3.0])
    give_gradient(update, [gradient, 0.0, 0.0])
    dumped = []
    assert not update.step(loss, 7, dumped.append, 12).applied
    assert weights_of(update) == [1.0, 2.0, 3.0]
    assert update.model.weight.grad is None, "the poisoned gradient would be in the next step"
    assert dumped == [tmp_path / "nonfinite_step_12_rank_0.jsonl"]
    give_gradient(update, [1.0, 0.0, 0.0])
    assert update.step(1.0, 7, no_dump, 13).applied
    assert weights_of(update) == pytest.approx([0.9, 2.0, 3.0])
    assert update.nonfinite_steps == 1


def test_a_step_without_tokens_moves_nothing_not_even_by_momentum_or_decay(tmp_path):
    decaying = {"_component_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.5}
    update = updates(tmp_path, [1.0, 2.0, 3.0], optimizer=decaying)
    give_gradient(update, [1.0, 1.0, 1.0])
    update.step(1.0, 7, no_dump, 1)
    before = weights_of(update)
    give_gradient(update, [0.0, 0.0, 0.0])
    assert not update.step(0.0, 0, no_dump, 2).applied
    assert weights_of(update) == before
    assert (update.empty_steps, update.nonfinite_steps) == (1, 0)


def test_only_steps_in_a_row_end_a_run(tmp_path):
    update = updates(tmp_path, [1.0, 2.0, 3.0], max_nonfinite_steps=2)

    def step(loss, number):
        give_gradient(update, [1.0, 0.0, 0.0])
        update.step(loss, 7, lambda path: None, number)

    for number, loss in enumerate([math.nan, 1.0, math.nan, 1.0, math.nan], start=1):
        step(loss, number)
    with pytest.raises(InputError, match=r"2 steps in a row .* \(last: loss inf, gradient norm 1.0\); lower optimizer.lr"):
        step(math.inf, 6)
    assert update.nonfinite_steps == 4


def test_the_logged_learning_rate_is_the_one_the_step_used(tmp_path):
    warmup = {"_component_": "pidistill.training.lr_schedules.get_linear_warmup_schedule", "num_warmup_steps": 4}
    update = updates(tmp_path, [0.0, 0.0, 0.0], lr_scheduler=warmup)
    moved = 0.0
    for number, factor in enumerate([0.25, 0.5, 0.75, 1.0, 1.0], start=1):
        give_gradient(update, [-1.0, 0.0, 0.0])
        assert update.step(1.0, 7, no_dump, number).lr == pytest.approx(0.1 * factor)
        moved += 0.1 * factor
        assert weights_of(update)[0] == pytest.approx(moved)


# ------------------------------------------------------------------------------------------- schedules


def factors(schedule, steps, **arguments):
    """Learning rate over the optimizer's own, at each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = schedule(optimizer, **arguments)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"] / 0.2)
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
def test_warmup_reaches_the_full_rate_at_its_last_step_and_never_stands_still(warmup):
    expected = [min(1.0, (step + 1) / max(1, warmup)) for step in range(8)]
    assert factors(get_linear_warmup_schedule, 8, num_warmup_steps=warmup) == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (3, 0.1), (5, 1.0)])
def test_cosine_falls_from_one_to_its_floor_and_stays(warmup, floor):
    arguments = {"num_warmup_steps": warmup, "num_training_steps": 10, "floor_frac": floor}
    found = factors(get_cosine_schedule_with_warmup_and_floor, 14, **arguments)
    expected = []
    for step in range(14):
        cosine = (1 + math.cos(math.pi * min(step, 10) / 10)) / 2
        expected.append((floor + (1 - floor) * cosine) * min(1.0, (step + 1) / max(1, warmup)))
    assert found == pytest.approx(expected)
    assert found[10:] == pytest.approx([floor] * 4)
    assert all(a >= b - 1e-12 for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(1, 50), st.integers(0, 100))
def test_a_linear_schedule_is_a_line_between_its_ends(begin, end, steps, step):
    expected = begin + (end - begin) * (step / steps if step < steps else 1.0)
    assert LinearSchedule(begin, end, steps)(step) == pytest.approx(expected, abs=1e-12)


def test_a_number_is_a_constant_schedule():
    schedule = as_schedule("beta", 0.25, low=0.0, high=1.0)
    assert [schedule(step) for step in (0, 1, 1000)] == [0.25] * 3


@pytest.mark.parametrize(
    "bad", [1.5, -0.1, {"start": 0, "end": 2, "steps": 3}, {"start": 0, "end": 1}, {"start": 0, "end": 1, "steps": 0}]
)
def test_a_schedule_outside_its_range_is_refused(bad):
    with pytest.raises(InputError, match=r"objective.alpha=.*(is outside \[0.0, 1.0\]|is not a schedule)"):
        as_schedule("alpha", bad, low=0.0, high=1.0)


# ------------------------------------------------------------------------------------------- shares of the work


@given(st.integers(0, 30) | st.none(), st.integers(0, 60), st.integers(0, 20))
def test_crossed_says_whether_a_multiple_lies_between(every, before, steps):
    slow = bool(every) and any(step % every == 0 for step in range(before + 1, before + steps + 1))
    assert crossed(every, before, before + steps) is slow


@given(st.integers(0, 20), st.integers(1, 7))
def test_shares_are_a_partition_in_turn(items, world_size):
    runs = [Run(CPU, torch.float32, rank, world_size, 0, Path("unused")) for rank in range(world_size)]
    shares = [run.share(range(items)) for run in runs]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [share[0] for share in shares if share] == list(range(min(items, world_size)))


def test_alone_every_sum_is_its_own():
    assert ALONE.sum(3) == 3.0 and ALONE.max(4) == 4
    assert ALONE.sums({"a": 1.5}) == {"a": 1.5} and ALONE.gather([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("prompts", "group", "updates", "minibatch"), [(4, 3, 1, None), (4, 3, 2, 6), (4, 3, 4, 3), (4, 2, 3, 6)]
)
def test_minibatches_use_every_group_whole_and_in_turn(prompts, group, updates, minibatch):
    cfg = {"prompts_per_round": prompts, "group_size": group, "updates_per_round": updates, "minibatch_rollouts": minibatch}
    sizes = RoundSizes(OmegaConf.create(cfg))
    pairs = [(rollout, RolloutAdvantage(0.0)) for rollout in random_rollouts(prompts * group, group_size=group)]
    cut = list(sizes.minibatches(pairs))
    assert len(cut) == updates and all(len(chunk) == (minibatch or prompts * group) for chunk in cut)
    groups = [[rollout.group for rollout, _ in chunk] for chunk in cut]
    assert all(chunk.count(number) == group for chunk in groups for number in chunk)
    uses = [sum(number in chunk for chunk in groups) for number in range(prompts)]
    assert min(uses) >= 1 and max(uses) - min(uses) <= 1


def test_dropped_rollouts_leave_their_minibatch_smaller():
    sizes = RoundSizes(
        OmegaConf.create({"prompts_per_round": 2, "group_size": 3, "updates_per_round": 2, "minibatch_rollouts": 3})
    )
    pairs = [(rollout, RolloutAdvantage(0.0)) for rollout in random_rollouts(6, group_size=3)]
    assert [len(chunk) for chunk in sizes.minibatches(pairs[1:])] == [2, 3]
    assert [len(chunk) for chunk in sizes.minibatches([])] == [0, 0]


@pytest.mark.parametrize(
    "max_steps, updates, said",
    [
        (1000, 3, "max_steps=1000 ends inside a round of updates_per_round=3, .* be extended; 999 or 1002 can"),
        (1, 3, "3 can"),
        (999, 3, None),
    ],
)
def test_a_run_that_ends_inside_a_round_is_warned_of_at_its_start(max_steps, updates, said, caplog):
    RoundSizes(
        OmegaConf.create({"prompts_per_round": 2, "group_size": 3, "updates_per_round": updates, "max_steps": max_steps})
    )
    assert len(caplog.messages) == (said is not None) and all(re.search(said, line) for line in caplog.messages)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_between_updates_is_marked_unless_one_of_several_processes_met_it_alone(processes):
    with pytest.raises(InputError, match="down") as caught, between_updates(processes):
        raise InputError("down")
    assert isinstance(caught.value, FailedBetweenUpdates) == (processes == 1)
    with pytest.raises(FailedBetweenUpdates), between_updates(processes):
        check_rewards(0, {})


def test_time_is_counted_by_phase_and_taken_once():
    timer = Timer(CPU)
    with timer.phase("a"), timer.phase("b"):
        pass
    with timer.phase("a"):
        pass
    seconds = timer.take()
    assert seconds.keys() == {"a", "b"} and all(value > 0 for value in seconds.values())
    assert timer.take() == {}


def test_a_dump_holds_what_a_step_was_trained_on(tmp_path):
    rollouts = random_rollouts(3)
    dump_rollouts(rollouts, tmp_path / "dump.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    for row, rollout in zip(rows, rollouts, strict=True):
        assert row["example"] == rollout.example.id and row["completion"] == rollout.completion
        assert row["teacher_prompt"] == rollout.prompts.teacher and row["reward"] == rollout.reward
        assert [x is None for x in row["sampled_logprobs"]] == [not keep for keep in rollout.policy_mask]


def test_json_lines_hold_any_text(tmp_path):
    rows = [{"text": "half \ud83d, line\u2028separator"}, {"text": "\U0001f600\n"}]
    write_jsonl(tmp_path / "a.jsonl", rows[:1])
    write_jsonl(tmp_path / "a.jsonl", rows[1:])
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_bytes().split(b"\n")[:-1]] == rows


# ------------------------------------------------------------------------------------------- start and end


@pytest.fixture
def no_process_group():
    assert not dist.is_initialized()
    threads, states = torch.get_num_threads(), (torch.get_rng_state(), random.getstate(), np.random.get_state())
    yield
    cleanup()
    assert not dist.is_initialized()
    torch.set_num_threads(threads)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def test_start_sets_threads_seeds_and_folder_and_keeps_the_config(tmp_path, no_process_group):
    cfg = OmegaConf.create({"output_dir": str(tmp_path / "a" / "b"), "seed": 5, "device": "cpu", "threads": 1, "dtype": "bf16"})
    draws = []
    for _ in range(2):
        run = start(cfg, frozenset(cfg), ("output_dir",))
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert draws[0] == draws[1]
    assert (run.rank, run.world_size, run.seed, run.dtype, run.device) == (0, 1, 5, torch.bfloat16, CPU)
    assert torch.get_num_threads() == 1 and dist.get_world_size() == 1
    assert OmegaConf.load(tmp_path / "a" / "b" / "config.yaml") == cfg


@pytest.mark.parametrize(
    "asked, ranks, threads",
    [
        ("1", "1", 1),
        ("3", "1", 3),
        ("1", "2", 2),
        (None, "1", 4),
        ("", "1", 4),
        ("0", "1", 4),
        ("many", "1", 4),
        (None, "8", 1),
    ],
)
def test_one_process_takes_the_threads_of_the_environment_and_several_share_the_cores(monkeypatch, asked, ranks, threads):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert _default_threads() == threads


@pytest.mark.parametrize("minutes", [None, 7])
def test_every_process_group_waits_as_long_as_the_config_says(minutes, tmp_path, no_process_group, monkeypatch):
    """Set the limit of a mesh's groups too, which have torch's own otherwise."""
    begin, groups = dist.init_process_group, []
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: (begin(*a, **k), groups.append(dist.new_group([0]))))
    key = {} if minutes is None else {"collective_timeout_minutes": minutes}
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "device": "cpu", **key})
    start(cfg, frozenset(cfg), ())
    limits = [group._get_backend(CPU).options._timeout for group in (dist.group.WORLD, *groups)]
    assert limits == 2 * [timedelta(minutes=minutes or 60)]


def test_a_component_that_is_nulled_by_its_name_is_absent(tmp_path, no_process_group):
    """`eval_dataset=null` on torchtune's command line leaves the other keys of the node."""
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "device": "cpu", "dataset": {"_component_": None, "split": "train"}})
    start(cfg, frozenset(cfg), ())
    assert cfg.dataset is None


@pytest.mark.parametrize("key", LEAST)
def test_numbers_are_whole_and_not_too_small(key, tmp_path):
    for value in (LEAST[key] - 1, 1.5, "many", True):
        cfg = OmegaConf.create({"output_dir": str(tmp_path), key: value})
        with pytest.raises(InputError, match=f"{key}={value} must be a whole number of at least {LEAST[key]}"):
            start(cfg, frozenset(cfg), ())


def failing_with(error):
    def recipe_main(cfg):
        if error is not None:
            raise error
        return cfg.answer

    return one_sentence_errors(recipe_main)


CFG = OmegaConf.create({"answer": 7})


def test_errors_of_the_input_are_one_sentence_and_others_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as status:
        failing_with(InputError("row 3 is wrong"))(CFG)
    assert status.value.code == 2 and capsys.readouterr().err == "error: row 3 is wrong\n"
    with pytest.raises(ValueError, match="a bug"):
        failing_with(ValueError("a bug"))(CFG)
    assert failing_with(None)(CFG) == 7


def test_an_error_before_the_process_group_is_said_by_the_first_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as status:
        failing_with(InputError("wrong key"))(CFG)
    assert status.value.code == 2 and capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------- models


NODE = OmegaConf.create({"_component_": "torchtune.models.llama3.llama3", "vocab_size": VOCABULARY, **TINY_SIZES})


def loaded(trained=True, dtype=torch.float32, weights=None, **settings):
    weights = tiny_model(VOCABULARY).state_dict() if weights is None else weights
    return load_model(OmegaConf.create(settings), Run(CPU, dtype, 0, 1, 0, Path("unused")), NODE, weights, trained=trained)


def test_a_loaded_model_is_the_checkpoints():
    tokens = torch.arange(10)[None]
    expected = tiny_model(VOCABULARY).eval()(tokens)
    for settings in ({}, {"enable_activation_checkpointing": True}):
        torch.testing.assert_close(loaded(**settings).eval()(tokens), expected, rtol=0, atol=0)
    assert loaded().training and not loaded(trained=False).training
    assert {p.dtype for p in loaded(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(how):
    weights = dict(tiny_model(VOCABULARY).state_dict())
    if how == "missing":
        del weights["norm.scale"]
    elif how == "extra":
        weights["layers.9.norm"] = torch.zeros(2)
    else:
        weights["norm.scale"] = torch.zeros(2)
    with pytest.raises(InputError, match=r"the checkpoint does not fit the model built from `model` \(.*(norm)"):
        loaded(weights=weights)
