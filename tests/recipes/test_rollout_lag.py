"""Test `rollout_lag: 1`: equal to a plain simulation to the bit, exact resume, what it refuses and how it ends."""

import copy
import json
import multiprocessing
import os
import signal
import subprocess
import time
from concurrent.futures import wait
from pathlib import Path
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.data import epoch_order, load_prompts
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.teachers import LiveTeacher
from pidistill.training import side_process
from pidistill.training.checkpoints import STATE_FILE
from pidistill.training.compatibility import build_objective
from pidistill.training.round_sampler import check_lag, rollout_device
from tests.support import runs
from tests.support.forks import Fork, shared_server
from tests.support.lora import LORA
from tests.support.runs import (
    EMA,
    RECIPES,
    assert_same_tensors,
    metrics,
    multiplies_with_amx,
    run,
    save_config,
    small_config,
    stop_after_row,
    training_state,
    wait_for_row_after_checkpoint,
    weights,
)

STEEP = {"optimizer__lr": 0.03, "lr_scheduler": None}  # one step moves the weights far enough to be told apart
LAG = {"rollout_lag": 1, "max_steps": 6, **STEEP}
EVALUATION = {"eval_dataset": runs.EVALUATION["eval_dataset"] | {"max_rows": 1}, "eval_every_steps": 2, "rollout_log_steps": 3}
WEIGHED = {"importance_weights": {"_component_": "pidistill.scoring.mismatch.TruncatedImportanceWeights"}}
OFF = {"_component_": "pidistill.teachers.AdapterOffTeacher"}
CASES = {
    "two updates a round": ("pi_distill", {"updates_per_round": 2, "minibatch_rollouts": 3, **EVALUATION}),
    "weighed, EMA teacher": ("opsd", {"teacher": EMA, **WEIGHED}),
    "hints for failed groups": ("guide_grpo", {}),
    "adapters off while sampling": ("pi_distill", {"objective__alpha": 0.0, "teacher": OFF, **LORA}),
}


@pytest.fixture(autouse=True, scope="module")
def quick_start():
    """Fork the second process, which saves its imports; a recipe that runs in a process of its own starts it as users do."""
    with mock.patch.object(side_process, "START_METHOD", "fork"):
        yield


def simulate(recipe) -> None:
    """Sample round n, in this process and when it is needed, with the weights before the updates of round n − 1."""
    before, copied = [], copy.deepcopy(recipe._model)

    def take(round_, model, sample, teacher=lambda step: LiveTeacher()):
        before.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        recipe._rounds.lagged = round_ > 0
        copied.load_state_dict(before[max(0, round_ - 1)])
        with teacher(recipe._round_sizes.first_step(round_)).sampling_weights(copied) as sampling:
            return sample(sampling, round_)

    recipe._rounds.next = take


SLOW = pytest.mark.slow(reason="two other cases guard the order of rounds, one in each recipe")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=SLOW if case[:3] in ("wei", "ada") else ()) for case in CASES],
)
def test_a_run_that_overlaps_equals_one_that_samples_when_it_needs_to(case, tiny_base, tmp_path):
    method, changes = CASES[case]
    settings = LAG | changes
    run(method, small_config(method, tiny_base, tmp_path / "overlapped", **settings))
    run(method, small_config(method, tiny_base, tmp_path / "simulated", **settings | {"rollout_lag": 0}), simulate)
    run(method, small_config(method, tiny_base, tmp_path / "without", **settings | {"rollout_lag": 0}))
    overlapped, simulated = metrics(tmp_path / "overlapped"), metrics(tmp_path / "simulated")
    assert overlapped == simulated
    assert_same_tensors(weights(tmp_path / "overlapped"), weights(tmp_path / "simulated"))
    rows = [row for row in overlapped if "loss" in row]
    lagging = [row for row in rows if "rollout_lag_mean_nats" in row]
    assert rows[0]["sampler_mismatch_mean_nats"] < 1e-5 and "sampler_mismatch_mean_nats" not in rows[-1]
    assert len(lagging) == 6 // settings.get("updates_per_round", 1) - 1
    if "adapters" not in case:  # the base, which samples there, never changes
        assert min(row["rollout_lag_mean_nats"] for row in lagging) > 1e-3
        assert overlapped != metrics(tmp_path / "without")


def test_in_mixed_precision_weights_arrive_as_the_sampler_has_them_without_a_lag(tiny_base, tmp_path):
    """With a rate of 0 the weights never change, and a lag changes nothing."""
    settings = LAG | {"max_steps": 3, "optimizer__lr": 0.0, "compute_dtype": "bf16", "enable_activation_checkpointing": True}
    for lag in (0, 1):
        run("opsd", small_config("opsd", tiny_base, tmp_path / str(lag), **settings | {"rollout_lag": lag}))
    lagging = [
        {name.replace("rollout_lag", "sampler_mismatch"): x for name, x in row.items()} for row in metrics(tmp_path / "1")
    ]
    if multiplies_with_amx():  # the sampler's log-probs differ by about 1e-4 nats there
        for ours, theirs in zip(lagging, metrics(tmp_path / "0"), strict=True):
            assert ours == pytest.approx(theirs, rel=0.02, abs=2e-3)
    else:
        assert lagging == metrics(tmp_path / "0")
    assert 0.0 < lagging[-1]["sampler_mismatch_mean_nats"] < 0.05  # bf16 rounds, so that the comparison says something


# ------------------------------------------------------------------------------------------- resume

# Rewards with noise from a random stream of the process that plays the episodes, which a checkpoint therefore holds.
SAVED = LAG | EVALUATION | {"max_steps": 7, "save_every_steps": 2, "environment__noise": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("pi_distill", small_config("pi_distill", tiny_base, folder, **SAVED))
    return folder


def state_of(folder):
    """The training state, without Python's random streams: the type checker of the tests draws from them."""
    state = training_state(folder)
    del state["rounds"]["rng"]["python"]
    return state


def assert_resumes_as(folder, base, whole):
    run("pi_distill", small_config("pi_distill", base, folder, **SAVED, resume_from_checkpoint=True))
    assert metrics(folder) == metrics(whole)
    assert_same_tensors(weights(folder), weights(whole))
    assert_same_tensors(state_of(folder), state_of(whole))
    assert (folder / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


def test_a_stopped_run_trains_on_the_round_that_its_checkpoint_holds(tiny_base, tmp_path, uninterrupted):
    run("pi_distill", small_config("pi_distill", tiny_base, tmp_path, **SAVED), stop_after_row(5))
    state = torch.load(tmp_path / "latest" / STATE_FILE, weights_only=True)
    assert state["step"] == 4 and len(json.loads(state["rounds"]["ahead"])["rollouts"]) == 6
    assert_resumes_as(tmp_path, tiny_base, uninterrupted)


def test_a_killed_process_takes_the_one_that_samples_along_and_resumes_exactly(tiny_base, tmp_path, uninterrupted):
    slow = SAVED | {"environment__wait_s": 0.03}
    config = save_config(small_config("pi_distill", tiny_base, tmp_path / "run", **slow), tmp_path / "config.yaml")
    process = Fork(shared_server(), RECIPES["pi_distill"], ["--config", str(config)], tmp_path / "log")
    try:
        wait_for_row_after_checkpoint(tmp_path / "run")
        others = children(process.pid)  # that of `multiprocessing`'s resources is one, too
    finally:
        process.send(signal.SIGKILL)
        status = process.wait()
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert training_state(tmp_path / "run")["step"] < 7, "the run was over before it was killed"
    assert others
    for other in others:
        assert_ends(other)
    assert_resumes_as(tmp_path / "run", tiny_base, uninterrupted)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_ends(pid: int, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # empty: a zombie
        assert time.monotonic() < deadline, "the process that samples outlives the run"
        time.sleep(0.05)


def after_row(step: int, *actions):
    """Do something to the recipe right after it wrote the metrics of ``step``."""

    def prepare(recipe):
        write = recipe._log.write

        def write_and_act(row, **more):
            write(row, **more)
            if row["step"] == step and "loss" in row:
                for action in actions:
                    action(recipe)

        recipe._log.write = write_and_act

    return prepare


def ask_to_stop(recipe) -> None:
    recipe._checkpoints.due = lambda before, now: True  # as a signal does
    recipe._checkpoints._stop = signal.SIGTERM


def test_a_signal_saves_the_round_under_way(tiny_base, tmp_path, uninterrupted):
    with pytest.raises(SystemExit):
        run("pi_distill", small_config("pi_distill", tiny_base, tmp_path, **SAVED), after_row(3, ask_to_stop))
    assert training_state(tmp_path)["step"] == 3
    assert_resumes_as(tmp_path, tiny_base, uninterrupted)


def test_the_last_round_is_the_last_one_that_is_sampled(tiny_base, tmp_path):
    settings = LAG | {"max_steps": 3, "environment__record": str(tmp_path / "episodes")}
    run("pi_distill", small_config("pi_distill", tiny_base, tmp_path / "run", **settings))
    episodes = map(json.loads, (tmp_path / "episodes" / "0.jsonl").read_text().splitlines())
    assert len({episode["example"] for episode in episodes}) == 3 * 2
    assert training_state(tmp_path / "run")["rounds"]["ahead"] is None


# ------------------------------------------------------------------------------------------- errors


def test_a_process_that_is_killed_ends_the_run_with_a_sentence(tiny_base, tmp_path):
    def kill(recipe):
        os.kill(recipe._rounds._side._process.pid, signal.SIGKILL)

    with pytest.raises(InputError, match=r"the process that samples beside the training ended with exit status -9"):
        run("pi_distill", small_config("pi_distill", tiny_base, tmp_path, **LAG), kill)


def kill_the_idle_sampler(recipe) -> None:
    if recipe._rounds._ahead is not None:
        wait([recipe._rounds._ahead])
    os.kill(recipe._rounds._side._process.pid, signal.SIGKILL)
    recipe._rounds._side._process.join()


@pytest.mark.parametrize("method, asks, step", [("opsd", {}, 4), ("pi_distill", EVALUATION, 3)])
def test_what_was_trained_is_saved_where_the_sampler_was_killed_while_it_waited(method, asks, step, tiny_base, tmp_path):
    """The run learns of it when it needs the fifth round, as the fourth is there, or texts after the third step."""
    settings, folder = LAG | asks, tmp_path / "killed"
    run(method, small_config(method, tiny_base, tmp_path / "whole", **settings))
    sentence = rf"ended with exit status -9 .*; step {step} is saved: set resume_from_checkpoint=true to continue"
    with pytest.raises(InputError, match=sentence):
        run(method, small_config(method, tiny_base, folder, **settings), after_row(3, kill_the_idle_sampler))
    assert training_state(folder)["step"] == step
    trained = [row for row in metrics(folder) if "loss" in row]
    assert trained == [row for row in metrics(tmp_path / "whole") if "loss" in row][:step]
    run(method, small_config(method, tiny_base, folder, **settings, resume_from_checkpoint=True))
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_save_asks_nothing_of_a_sampler_that_was_killed(tiny_base, tmp_path, uninterrupted):
    cfg = small_config("pi_distill", tiny_base, tmp_path, **SAVED)
    with pytest.raises(SystemExit):
        run("pi_distill", cfg, after_row(5, kill_the_idle_sampler, ask_to_stop))
    assert training_state(tmp_path)["step"] == 5
    assert_resumes_as(tmp_path, tiny_base, uninterrupted)


def test_a_sampler_that_was_killed_is_noticed_while_a_program_that_it_started_runs_on(tmp_path, monkeypatch):
    """Such a program may have inherited the connection, which then stays open."""

    def serve(there, ours, *_):
        os.set_inheritable(ours.fileno(), True)
        with subprocess.Popen(["sleep", "60"], close_fds=False) as program:
            ours.send((None, None, False, program.pid))
            time.sleep(60)

    monkeypatch.setattr(side_process, "_serve", serve)
    monkeypatch.setattr(side_process, "_SECONDS_TO_END", 0.1)
    cfg = small_config("opsd", tmp_path, tmp_path)
    side = side_process.SideProcess(cfg, one_process(tmp_path), torch.device("cpu"))
    os.kill(side._process.pid, signal.SIGKILL)
    try:
        with pytest.raises(InputError, match=r"ended with exit status -9"):
            side.collect(examples=[], prompts=[], groups=[])
    finally:
        os.kill(side._random_state, signal.SIGKILL)


def test_an_error_of_the_environment_is_said_by_the_run(tiny_base, tmp_path):
    refused = {"environment__fail": "refuse", "environment__fail_on": [f"tiny_world train row {row}" for row in range(5000)]}
    with pytest.raises(InputError, match=r"is refused by the environment"):
        run("pi_distill", small_config("pi_distill", tiny_base, tmp_path, **LAG | refused))


def test_an_error_of_the_round_ahead_costs_no_update_before_it(tiny_base, tmp_path):
    """As without a lag: the checkpoint is written, and the run ends where the round is needed."""
    cfg = small_config("pi_distill", tiny_base, tmp_path, **LAG, save_every_steps=1)
    rows = epoch_order(len(load_prompts(cfg, no_pi="rl").prompts), cfg.seed, 2 * cfg.prompts_per_round, cfg.prompts_per_round)
    refused = {"fail": "refuse", "fail_on": [f"tiny_world train row {row}" for row in rows]}
    OmegaConf.update(cfg, "environment", refused)
    with pytest.raises(InputError, match=r"is refused by the environment"):
        run("pi_distill", cfg)
    assert training_state(tmp_path)["step"] == 2
    OmegaConf.update(cfg, "environment", {"fail": None, "fail_on": []})
    cfg.resume_from_checkpoint = True
    run("pi_distill", cfg)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_round_without_rewards_is_sampled_again_and_not_the_one_behind_it(tiny_base, tmp_path):
    cfg = small_config("pi_distill", tiny_base, tmp_path, **LAG)
    rows = epoch_order(len(load_prompts(cfg, no_pi="rl").prompts), cfg.seed, 2 * cfg.prompts_per_round, cfg.prompts_per_round)
    OmegaConf.update(cfg, "environment", {"fail": "nan", "fail_on": [f"tiny_world train row {row}" for row in rows]})
    with pytest.raises(InputError, match=r"no rollout of the round has a reward .*; step 2 is saved"):
        run("pi_distill", cfg)
    state = training_state(tmp_path)
    assert (state["step"], state["round"], state["rounds"]["ahead"]) == (2, 2, None)


def test_what_an_environment_starts_can_be_ended_by_a_signal(tmp_path):
    """The process that samples ignores SIGTERM, and its children do not inherit that."""

    def child():
        side_process.leave_stopping_to_the_training()
        os.kill(os.getpid(), signal.SIGTERM)
        with subprocess.Popen(["sleep", "60"]) as sleeping:
            sleeping.terminate()
            (tmp_path / "status").write_text(str(sleeping.wait()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == 0 and (tmp_path / "status").read_text() == str(-signal.SIGTERM)


def test_parts_that_the_process_cannot_build_are_refused_before_weights_are_loaded(tiny_base, tmp_path):
    missing = {"checkpointer__checkpoint_dir": str(tiny_base), "environment__unknown": 1}
    with pytest.raises(InputError, match="unknown"):
        run("pi_distill", small_config("pi_distill", tiny_base, tmp_path, **LAG | missing))


ROUTED = {"_component_": "pidistill.objectives.RoutedObjective", "key": "domain"}
GRPO, OPSD, PI_DISTILL = ({"_component_": f"pidistill.objectives.{name}"} for name in ("GRPO", "OPSD", "PiDistill"))
REFUSED = {
    "sampled kl": (
        "pi_distill",
        {"objective__kl_mode": "loss_k2"},
        r"objective.kl_mode=loss_k2 needs samples of the present weights",
    ),
    "sampled kl of the student": ("opsd", {"objective__kl_mode": "loss_k2"}, r"objective.kl_mode=loss_k2 needs samples"),
    "ratio to the teacher": (
        "pi_distill",
        {"objective__student_term": "ppo", "objective__ratio_denominator": "live_teacher"},
        r"objective.ratio_denominator=live_teacher uses others; set it to behaviour, or add importance_weights",
    ),
    "sampled kl of one of several": (
        "opsd",
        {"objective": ROUTED | {"objectives": {"a": GRPO, "b": OPSD | {"kl_mode": "loss_k2"}}}},
        r"objective.objectives.b.kl_mode=loss_k2 needs samples of the present weights",
    ),
    "ratio of one of several": (
        "pi_distill",
        {"objective": ROUTED | {"objectives": {"a": PI_DISTILL, "b": PI_DISTILL | {"ratio_denominator": "live_teacher"}}}},
        r"objective.objectives.b.ratio_denominator=live_teacher uses others",
    ),
    "4-bit base": ("pi_distill", {"model__quantize_base": True}, r"model.quantize_base=True stores them in 4 bits"),
    "fixed completions": ("semi_opd", {}, r"trains on the dataset's completions"),
    "device without a lag": (
        "opsd",
        {"rollout_lag": 0, "rollout_device": "cpu"},
        r"rollout_device=cpu is read with rollout_lag=1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_lag_is_refused_with_the_key_to_change(case, tiny_base, tmp_path):
    method, changes, sentence = REFUSED[case]
    cfg = small_config(method, tiny_base, tmp_path, **LAG | changes)
    with pytest.raises(InputError, match=sentence):
        check_lag(cfg, one_process(tmp_path), build_objective(cfg))


@pytest.mark.parametrize("name, sentence", [("gpu", "must be cpu, cuda or cuda:N"), ("cuda:x", "must be"), ("cuda:99", "sees")])
def test_a_device_that_is_not_there_is_refused(name, sentence, tmp_path):
    with pytest.raises(InputError, match=rf"rollout_device={name} .*{sentence}"):
        rollout_device(OmegaConf.create({"rollout_device": name}), one_process(tmp_path))


def test_the_device_of_the_second_process_is_by_default_that_of_the_training(tmp_path):
    assert rollout_device(OmegaConf.create({}), one_process(tmp_path)) == torch.device("cpu")
    assert rollout_device(OmegaConf.create({"rollout_device": "cpu"}), one_process(tmp_path)) == torch.device("cpu")


@pytest.mark.parametrize(
    "device, visible, expected",
    [
        ("cuda:1", None, ("cuda:0", "1")),
        ("cuda:1", "4,7", ("cuda:0", "7")),
        ("cuda:2", "GPU-a, GPU-b, GPU-c", ("cuda:0", "GPU-c")),
        ("cuda:0", "4,7", ("cuda:0", "4,7")),
        ("cuda:0", None, ("cuda:0", None)),
        ("cpu", "4,7", ("cpu", "4,7")),
    ],
)
def test_the_second_process_sees_its_gpu_as_the_first_one(device, visible, expected, tiny_base, tmp_path, monkeypatch):
    """vLLM samples on the first one. The variable is there before the process starts, and the training's own is as before."""
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen, connection = [], mock.MagicMock()
    connection.recv.return_value = (None, None, False, b"")
    context = mock.MagicMock(Pipe=lambda: (connection, mock.MagicMock()), RawArray=multiprocessing.RawArray)
    context.Process = lambda target, args, name: mock.MagicMock(
        is_alive=lambda: False, start=lambda: seen.append((str(args[3].device), os.environ.get("CUDA_VISIBLE_DEVICES")))
    )
    monkeypatch.setattr(side_process.multiprocessing, "get_context", lambda method: context)
    side_process.SideProcess(small_config("opsd", tiny_base, tmp_path, **LAG), one_process(tmp_path), torch.device(device))
    assert seen == [expected]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def one_process(folder: Path, processes: int = 1) -> Run:
    return Run(torch.device("cpu"), torch.float32, 0, processes, 0, folder)


def test_several_processes_are_refused(tiny_base, tmp_path):
    cfg = small_config("opsd", tiny_base, tmp_path, **LAG)
    with pytest.raises(InputError, match=r"rollout_lag=1 samples beside one training process, but this run has 2"):
        check_lag(cfg, one_process(tmp_path, processes=2), build_objective(cfg))


def test_a_ratio_to_the_teacher_is_accepted_where_importance_weights_correct_the_lag(tiny_base, tmp_path):
    changes = REFUSED["ratio to the teacher"][1]
    cfg = small_config("pi_distill", tiny_base, tmp_path, **LAG | changes | WEIGHED)
    check_lag(cfg, one_process(tmp_path), build_objective(cfg))
