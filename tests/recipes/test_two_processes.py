"""Test that two processes sample and train as one does; uneven and empty shares of the work end, and so do failures."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from pidistill.data import epoch_order
from tests.support.forks import TIMEOUT_S, launch_several, run_tune
from tests.support.runs import (
    EMA,
    EVALUATION,
    RECIPES,
    ROWS,
    assert_close_rows,
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    save_config,
    shell,
    small_config,
    training_state,
    tune_command,
    weights,
)
from tests.support.worlds import recorded

# Three groups for two ranks; two updates per round; micro-batches that are empty on the rank with one group.
MAIN = {
    "max_steps": 6, "prompts_per_round": 3, "updates_per_round": 2, "minibatch_rollouts": 6, "micro_batch_tokens": 200,
    "save_every_steps": 2, "eval_every_steps": 4, "rollout_log_steps": 4, **EVALUATION,
}  # fmt: skip
DROPPED = [f"tiny_world train row {row}" for row in epoch_order(ROWS, 0, 0, 4)[1:2]]  # rank 1's in the first of two rounds
SCENARIOS = {
    # One group: a rank has no rollout at all. Its head, embedding and teacher stay gathered between forwards.
    "one_group": ("opsd", {"prompts_per_round": 1, "teacher": EMA, "fsdp_reshard_after_forward": False, "save_every_steps": 2}),
    "behaviour_values": ("opsd", {"prompts_per_round": 1, "objective__kl_mode": "reward_k1", "max_steps": 2}),
    "complete_kl": ("pi_distill", {"prompts_per_round": 3, "objective__kl_mode": "loss_rb_complete", "max_steps": 2}),
    "other_teacher": ("pi_distill", {"teacher": EMA, "max_steps": 3}),  # of the student half; the teacher half is live
    "checkpointing": ("rl", {"enable_activation_checkpointing": True, "max_steps": 2}),
    "supervised": ("sft", {"max_steps": 3, **EVALUATION, "eval_every_steps": 2}),
    "supervised_one_row": ("sft", {"max_steps": 3, "batch_size": 1}),
    "dropped": ("rl", {"prompts_per_round": 2, "max_steps": 2, "environment__fail": "raise", "environment__fail_on": DROPPED}),
    "late": ("rl", {"prompts_per_round": 2, "max_steps": 2, "environment__fail": "hang", "environment__fail_on": DROPPED,
                    "environment_threads": 3, "environment_timeout_s": 1.0}),
    # The loss is NaN on the one rank that has rollouts.
    "poisoned": ("rl", {"prompts_per_round": 1, "max_steps": 3, "objective": {
        "_component_": "tests.support.worlds.PoisonedGRPO", "steps": [1], "report_teacher_kl": True,
    }}),
    "evaluate": ("evaluate", {"dataset__max_rows": 3, "eval_samples": 2}),
}  # fmt: skip


def scenario_config(name: str, base: Path, output_dir: Path, **more):
    method, changes = ("pi_distill", MAIN) if name == "main" else SCENARIOS[name]
    changes = changes | {"environment__record": str(output_dir / "episodes")} | more
    return method, small_config(method, base, output_dir, **changes)


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return shell(tune_command("run", "--nproc_per_node", "2", *arguments), timeout_s=TIMEOUT_S)


@pytest.fixture(scope="session")
def two(tiny_base, tmp_path_factory) -> Path:
    """A folder with what two processes left of every scenario, and of `main` resumed from its first checkpoint."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "two_processes"
    with FileLock(root / "two_processes.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _, main = scenario_config("main", tiny_base, folder / "main")
            done = launch("recipes/pi_distill_distributed.py", "--config", str(save_config(main, folder / "main.yaml")))
            assert done.returncode == 0, done.stderr[-3000:]
            runs = {name: scenario_config(name, tiny_base, folder / name) for name in SCENARIOS}
            back_to_checkpoint(folder / "main", folder / "resumed", "step_2")
            resumed = scenario_config("main", tiny_base, folder / "resumed", resume_from_checkpoint=True)
            launch_several(folder / "several", runs | {"resumed": resumed})
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def one(tiny_base, tmp_path_factory):
    """name → the folder of the same scenario in this one process, as padded rows in other micro-batches."""
    folders = {}
    otherwise = {"packing": "padded", "micro_batch_tokens": 700}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            more = {} if name == "evaluate" else otherwise
            run(*scenario_config(name, tiny_base, folders[name], **more))
        return folders[name]

    return folder


@pytest.mark.parametrize("name", ["main", *SCENARIOS])
def test_two_processes_sample_and_report_what_one_does(name, one, two):
    assert recorded(one(name) / "episodes") == recorded(two / name / "episodes")
    if name.startswith("supervised"):
        assert metrics(one(name))
    else:
        assert recorded(one(name) / "episodes"), "no episode was recorded"
    if name != "evaluate":
        assert_close_rows(metrics(two / name), metrics(one(name)))


@pytest.mark.parametrize("name", ["main", *(name for name in SCENARIOS if name != "evaluate")])
def test_two_processes_end_with_the_weights_of_one(name, one, two, tiny_base):
    ours, theirs, before = weights(two / name), weights(one(name)), load_file(tiny_base / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    for key in ours:
        assert not torch.equal(theirs[key], before[key]), f"{key} did not train"
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_keep_the_same_moving_average(one, two):
    ours, theirs = (training_state(folder)["teacher"] for folder in (two / "one_group", one("one_group")))
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-6)


def test_groups_are_dealt_whole_to_the_ranks_in_turn(two):
    """What makes the comparisons above say something: two ranks with unequal work, and one without any."""
    order = epoch_order(ROWS, 0, 0, 3 * 3)  # 3 rounds of 3 prompts
    ranks = [played(two / "main" / "episodes" / f"{rank}.jsonl") for rank in (0, 1)]
    assert ranks == [{*order[0::3], *order[2::3]}, {*order[1::3]}]
    assert [path.name for path in (two / "one_group" / "episodes").iterdir()] == ["0.jsonl"]


def played(path: Path) -> set[int]:
    """The rows of the training split in a rank's record, those of the texts (the first two) left out."""
    examples = [json.loads(line)["example"] for line in path.read_text().splitlines()]
    return {int(example.rpartition(" ")[2]) for example in examples if " train " in example} - {0, 1}


@pytest.mark.parametrize(("name", "reason"), [("dropped", "reward_error"), ("late", "environment_timeout")])
def test_dropped_rollouts_are_counted_over_both_ranks(name, reason, two):
    rows = metrics(two / name)
    assert [row[f"dropped/{reason}"] for row in rows] == [3, 0]
    assert [round(row["policy_tokens"] / row["completion_tokens_mean"]) for row in rows] == [3, 6]


def test_evaluation_of_two_processes_is_that_of_one(one, two):
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (two / "evaluate", one("evaluate")))
    assert ours.keys() == theirs.keys() == {"student greedy", "student", "student + PI"}
    for view in ours:
        assert ours[view].keys() == theirs[view].keys()
        for key, value in ours[view].items():
            assert value == pytest.approx(theirs[view][key], rel=1e-9), (view, key)


def test_texts_are_logged_once(one, two):
    ours, theirs = ((folder / "rollouts.jsonl").read_text() for folder in (two / "main", one("main")))
    assert ours == theirs


def test_a_checkpoint_of_two_resumes_on_two_to_the_bit(two):
    assert metrics(two / "resumed") == metrics(two / "main")
    assert_same_tensors(weights(two / "resumed"), weights(two / "main"))
    assert_same_tensors(training_state(two / "resumed"), training_state(two / "main"))


def test_a_checkpoint_of_two_resumes_on_one_with_the_same_numbers(two, tiny_base, tmp_path):
    back_to_checkpoint(two / "main", tmp_path / "run", "step_2")
    run(*scenario_config("main", tiny_base, tmp_path / "run", resume_from_checkpoint=True))
    assert_close_rows(metrics(tmp_path / "run"), metrics(two / "main"))


def test_a_loss_that_is_nan_on_one_rank_is_skipped_by_both(two):
    assert [row["nonfinite_steps"] for row in metrics(two / "poisoned")] == [0, 1, 1]
    assert sorted(path.name for path in (two / "poisoned").glob("nonfinite*")) == [
        "nonfinite_step_2_rank_0.jsonl",
        "nonfinite_step_2_rank_1.jsonl",
    ]


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.slow(reason="test_cli.py has such an error under `tune run` with two processes")
def test_an_error_that_both_ranks_meet_is_said_once_and_ends_both(tiny_base, tmp_path):
    config = save_config(small_config("opsd", tiny_base, tmp_path / "run", objective__clip_low=1.5), tmp_path / "config.yaml")
    begin = time.monotonic()
    done = launch(f"recipes/{RECIPES['opsd']}.py", "--config", str(config))
    assert done.returncode != 0
    assert time.monotonic() - begin < 120
    assert done.stderr.count("error: objective.clip_low=1.5 must lie in [0, 1)") == 1, done.stderr[-2000:]


def test_an_error_that_one_rank_meets_is_said_and_ends_both(tiny_base, tmp_path):
    """Rank 1 plays the second group of the first round; its environment refuses that row while rank 0 waits for it."""
    refused = f"tiny_world train row {epoch_order(ROWS, 0, 0, 2)[1]}"
    fail = {"environment__fail": "refuse", "environment__fail_on": [refused]}
    config = save_config(small_config("opsd", tiny_base, tmp_path / "run", **fail), tmp_path / "config.yaml")
    status, printed = run_tune(["run", "--nproc_per_node", "2", f"recipes/{RECIPES['opsd']}.py", "--config", str(config)])
    assert status != 0
    assert printed.count(f"error: {refused} is refused by the environment") == 1, printed[-2000:]


def test_a_round_without_rewards_on_both_ranks_saves_the_steps_before_it(tiny_base, tmp_path):
    rows = [f"tiny_world train row {row}" for row in epoch_order(ROWS, 0, 2, 2)]  # the second round's
    failing = {"environment__fail": "nan", "environment__fail_on": rows}
    config = save_config(small_config("opsd", tiny_base, tmp_path / "run", **failing), tmp_path / "config.yaml")
    status, printed = run_tune(["run", "--nproc_per_node", "2", f"recipes/{RECIPES['opsd']}.py", "--config", str(config)])
    assert status != 0
    assert printed.count("; step 1 is saved: set resume_from_checkpoint=true to continue") == 1, printed[-2000:]
    assert training_state(tmp_path / "run")["step"] == 1
