"""Test replicas of a sharded model (`data_parallel_replicate_dim`), as on several machines: they train as one process does."""

import functools
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from pidistill.distributed.tensor_parallel import check_replicas
from pidistill.errors import InputError
from tests.support.forks import TIMEOUT_S, launch_several
from tests.support.lora import LORA
from tests.support.runs import (
    EMA,
    EVALUATION,
    RECIPES,
    ROOT,
    assert_close_rows,
    assert_same_tensors,
    back_to_checkpoint,
    environment,
    metrics,
    run,
    save_config,
    small_config,
    training_state,
    tune_command,
    weights,
)

# Without Adam, which would hide a wrong length of the gradient; and clipped, which needs the length over all shards.
SGD = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, "clip_grad_norm": 0.05}
MIXED = {"compute_dtype": "bf16"}
FROZEN = {"_component_": "pidistill.teachers.FrozenTeacher"}
SCENARIOS = {
    "average": ("opsd", {"max_steps": 4, "save_every_steps": 2, "teacher": EMA, **SGD}),
    "mixed": ("sft", {"max_steps": 2, **MIXED, **SGD}),
}
SLOW = {
    "main": ("pi_distill", {"max_steps": 4, "prompts_per_round": 3, "updates_per_round": 2, "minibatch_rollouts": 6,
                            "save_every_steps": 2, "eval_every_steps": 2, **EVALUATION}),
    "frozen": ("opsd", {"max_steps": 3, "teacher": FROZEN, **SGD}),
    "one_group": ("opsd", {"max_steps": 3, "prompts_per_round": 1, "teacher": EMA, "fsdp_reshard_after_forward": False, **SGD}),
    "shared": ("opsd", {"max_steps": 3, "teacher": EMA, "tensor_parallel_dim": 2, **SGD}),
    "shared_mixed": ("sft", {"max_steps": 2, "tensor_parallel_dim": 2, **MIXED, **SGD}),
    "lora": ("opsd", LORA | {"max_steps": 3, "teacher": EMA}),
    "average_mixed": ("opsd", {"max_steps": 4, "save_every_steps": 2, "teacher": EMA, **MIXED}),
}  # fmt: skip
TWO_GROUPS = {"data_parallel_replicate_dim": 2}


def config(name, base, folder, **more):
    method, changes = (SCENARIOS | SLOW)[name]
    return method, small_config(method, base, folder, **(changes | more))


@pytest.fixture(scope="module")
def one(tiny_base, tmp_path_factory):
    """name → the folder of the same scenario in this one process."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp(name)
        run(*config(name, tiny_base, path, **({"tensor_parallel_dim": 1} if name.startswith("shared") else {})))
        return path

    return folder


@pytest.fixture(scope="module")
def two(tiny_base, tmp_path_factory) -> Path:
    """Return what two processes left that each hold a replica; `resumed` is `average` from its first checkpoint."""
    folder = tmp_path_factory.mktemp("replicas")
    runs = {name: config(name, tiny_base, folder / name, **TWO_GROUPS) for name in SCENARIOS}
    runs["resumed"] = config("average", tiny_base, folder / "resumed", **TWO_GROUPS, max_steps=2)
    runs["again"] = config("average", tiny_base, folder / "resumed", **TWO_GROUPS, resume_from_checkpoint=True)
    launch_several(folder / "several", runs)
    return folder


def assert_same_training(ours: Path, theirs: Path, exact: bool) -> None:
    """Rounding to bf16 before gradients are added up over ranks leaves only their directions closely alike."""
    first, second = metrics(ours), metrics(theirs)
    if not exact:
        for key in ("loss", "grad_norm"):
            assert first[0][key] == pytest.approx(second[0][key], rel=0.02), key
        return
    assert_close_rows(first, second)
    initial = Path(OmegaConf.load(theirs / "config.yaml").checkpointer.checkpoint_dir)
    after, expected, before = weights(ours), weights(theirs), load_file(initial / "model.safetensors")
    assert after.keys() == expected.keys()
    moved = {key: (expected[key] - before[key]).abs().max() for key in expected}
    assert sum(bool(far > 0) for far in moved.values()) >= 5
    for key, far in moved.items():
        torch.testing.assert_close(after[key], expected[key], rtol=0, atol=float(0.01 * far + 1e-7), msg=key)


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second)
    assert_same_tensors(weights(first), weights(second))
    assert_same_tensors(training_state(first), training_state(second))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_replicas_train_as_one_process(name, one, two):
    assert_same_training(two / name, one(name), exact="mixed" not in name)


def test_two_replicas_resume_to_the_bit(two):
    assert_same_run(two / "resumed", two / "average")


# ------------------------------------------------------------------------------------------- one exchange per step

EXPERT_TERM = {"sft_weight": 0.5, "sft_batch_size": 4, "dataset__completion": "actions"}


@pytest.mark.parametrize(
    ("method", "changes"), [("sft", {}), ("opsd", {}), ("opsd", EXPERT_TERM), ("pi_distill", {}), ("pi_distill", EXPERT_TERM)]
)
def test_every_step_of_a_recipe_ends_with_the_one_exchange(method, changes, tiny_base, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(FSDPModule, "set_requires_all_reduce", lambda self, exchanged: order.append(exchanged))

    def watch(recipe):
        take = recipe._updates.step
        recipe._updates.step = lambda *args, **kwargs: (order.append("step"), take(*args, **kwargs))[1]

    settings = {"max_steps": 2, "micro_batch_tokens": 60, "compute_dtype": "bf16"} | changes
    run(method, small_config(method, tiny_base, tmp_path, **settings), watch)
    assert order.count(False) > 2, "steps of several micro-batches"
    assert order.count(True) == order.count("step") == 2
    assert all(order[at + 1] == "step" for at, entry in enumerate(order) if entry is True)


# ------------------------------------------------------------------------------------------- two launchers


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launch_machines(
    arguments: list[str], folders: Sequence[Path] = (ROOT, ROOT), launcher: Sequence[str] = tuple(tune_command("run"))
) -> list[subprocess.CompletedProcess]:
    """Two launchers of two processes each, as on two machines; they meet on the loopback interface."""
    common = ["--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--local_addr", "127.0.0.1"]
    command = [*launcher, *common, "--rdzv_endpoint", f"127.0.0.1:{free_port()}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(PYTHONPATH=str(ROOT))}
    started = [subprocess.Popen(command, cwd=folder, **pipes) for folder in folders]
    done = []
    for process in started:
        out, err = process.communicate(timeout=TIMEOUT_S)
        done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    return done


@pytest.fixture(scope="module")
def machines(tiny_base, tmp_path_factory) -> Path:
    """Run two machines of two processes, each machine with a replica that its processes share; return what they left."""
    folder = tmp_path_factory.mktemp("machines")
    runs = {name: config(name, tiny_base, folder / name, **TWO_GROUPS) for name in SCENARIOS | SLOW}
    launch_runs(folder / "first", runs)
    for name in ("main", "average_mixed"):
        back_to_checkpoint(folder / name, folder / f"{name} resumed", "step_2")
    again = {**TWO_GROUPS, "resume_from_checkpoint": True}
    names = ("main", "average_mixed")
    launch_runs(folder / "second", {name: config(name, tiny_base, folder / f"{name} resumed", **again) for name in names})
    return folder


def launch_runs(folder: Path, runs: dict) -> None:
    folder.mkdir()
    listed = {name: [method, str(save_config(cfg, folder / f"{name}.yaml"))] for name, (method, cfg) in runs.items()}
    file = save_config(OmegaConf.create({"runs": listed}), folder / "all.yaml")
    done = launch_machines(["tests/support/several.py", "--config", str(file)])
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stderr[-3000:] for one in done)


@pytest.mark.slow(reason="two replicas on one machine are in the default run")
@pytest.mark.parametrize("name", SCENARIOS | SLOW)
def test_two_machines_of_two_processes_train_as_one_process(name, one, machines):
    assert_same_training(machines / name, one(name), exact="mixed" not in name)


@pytest.mark.slow(reason="two replicas on one machine are in the default run")
@pytest.mark.parametrize("name", ["main", "average_mixed"])
def test_two_machines_resume_to_the_bit(name, machines):
    assert_same_run(machines / f"{name} resumed", machines / name)


@pytest.mark.slow(reason="two replicas on one machine are in the default run")
def test_a_checkpoint_of_two_machines_resumes_on_one_process(machines, one, tiny_base, tmp_path):
    back_to_checkpoint(machines / "main", tmp_path / "run", "step_2")
    run(*config("main", tiny_base, tmp_path / "run", resume_from_checkpoint=True))
    assert_close_rows(metrics(tmp_path / "run"), metrics(one("main")))


@pytest.mark.slow(reason="two replicas on one machine are in the default run")
def test_replicas_whose_shards_are_on_the_cpu_train_as_those_on_the_device():
    """Processes of a CPU stand in for GPUs."""
    done = launch_machines(["tests/support/offloaded_replicas.py"], launcher=TORCHRUN)
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stderr[-3000:] for one in done)


def refused_on_both(cfg: DictConfig, folder: Path) -> list[str]:
    """Launch two machines that stand in folders of their own; return the last line of each."""
    file = save_config(cfg, folder / "config.yaml")
    arguments = [str(ROOT / "recipes" / f"{RECIPES['sft']}.py"), "--config", str(file)]
    done = launch_machines(arguments, (folder / "first", folder / "second"), TORCHRUN)
    assert all(one_machine.returncode != 0 for one_machine in done)
    return [one_machine.stderr.strip().splitlines()[-1] for one_machine in done]


@pytest.fixture
def own_folders(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.slow(reason="two replicas on one machine are in the default run")
def test_machines_with_output_folders_of_their_own_are_refused_in_one_sentence(tiny_base, own_folders):
    """The folder's name is relative, so that each machine has one of that name."""
    said = refused_on_both(config("mixed", tiny_base, Path("run"))[1], own_folders)
    assert all(line.startswith("error: output_dir=run of process ") and "all machines share" in line for line in said), said
    assert not list(own_folders.glob("*/run/.start_*")) and not list(own_folders.glob("*/run/metrics.jsonl"))


@pytest.mark.slow(reason="two replicas on one machine are in the default run")
def test_a_checkpoint_that_one_machine_lacks_is_refused_on_both(tiny_base, own_folders):
    (own_folders / "first" / "base").symlink_to(tiny_base)
    cfg = config("mixed", tiny_base, own_folders / "run", checkpointer__checkpoint_dir="base")[1]
    said = refused_on_both(cfg, own_folders)
    assert said == ["error: checkpoint folder base does not exist; check checkpointer.checkpoint_dir"] * 2
    assert not list((own_folders / "run").glob("*"))


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "processes", "shares", "said"),
    [
        ({"data_parallel_replicate_dim": 3}, 4, 1, "data_parallel_replicate_dim=3 does not divide the 4 processes of this run"),
        ({"data_parallel_replicate_dim": 2}, 2, 2, "into 2 equal groups, each of 2 processes that share matrices"),
        ({"data_parallel_replicate_dim": 2, "model": {"quantize_base": True}}, 4, 1, "model.quantize_base=True does not work"),
    ],
)
def test_replicas_that_do_not_divide_the_processes_are_refused_in_one_sentence(changes, processes, shares, said):
    with pytest.raises(InputError, match=said.replace(".", r"\.")) as refusal:
        check_replicas(OmegaConf.create(changes), processes, shares)
    assert "\n" not in str(refusal.value)


def test_replicas_that_divide_the_processes_are_accepted():
    assert check_replicas(OmegaConf.create(TWO_GROUPS), 8, 2) == 2
    assert check_replicas(OmegaConf.create({}), 3, 1) == 1
