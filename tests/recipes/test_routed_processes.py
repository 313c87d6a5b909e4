"""Two processes that train with two teachers take the step of two runs with one teacher each, added."""

import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tests.support.forks import launch_several
from tests.support.runs import assert_close_rows, metrics, run, small_config, weights


def other_weights(base, folder, seed: int):
    """Copy the base with noise on its weights."""
    shutil.copytree(base, folder)
    generator, path = torch.Generator().manual_seed(seed), folder / "model.safetensors"
    noisy = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in load_file(path).items()}
    save_file(noisy, path, metadata={"format": "pt"})
    return folder


def config(base, teachers: dict, folder):
    """One step of plain SGD on rows without privileged information, from which a live teacher gives no gradient at all.

    ``teachers``: the number of calls that a row begins with → the folder of its frozen teacher, None for a live one.
    """
    kinds = {name: "LiveTeacher" if own is None else "FrozenTeacher" for name, own in teachers.items()}
    teacher = {
        "_component_": "pidistill.teachers.RoutedTeacher",
        "key": "given_calls",
        "default": "0",
        "teachers": {name: {"_component_": f"pidistill.teachers.{kind}"} for name, kind in kinds.items()},
    }
    cfg = small_config(
        "opsd_ucla", base, folder, teacher=teacher, max_steps=1, prompts_per_round=3, privileged__control="none",
        objective__no_pi="distill", dataset__prefix_turns=[0, 1], dataset__max_rows=2, lr_scheduler=None, clip_grad_norm=None,
        optimizer={"_component_": "torch.optim.SGD", "lr": 1.0},
    )  # fmt: skip
    node = OmegaConf.to_container(cfg.checkpointer)
    cfg.teacher_checkpointers = {name: node | {"checkpoint_dir": str(own)} for name, own in teachers.items() if own is not None}
    return cfg


@pytest.mark.slow(reason="test_routed_teachers.py adds the gradients in one process")
def test_two_processes_with_two_teachers_add_up_the_steps_of_two_runs_with_one(tiny_base, tmp_path):
    math, code = (other_weights(tiny_base, tmp_path / f"teacher {seed}", seed) for seed in (1, 2))
    both = {"0": math, "1": code}
    launch_several(tmp_path / "log", {"two": ("opsd_ucla", config(tiny_base, both, tmp_path / "two"))})
    for name, teachers in {"both": both, "math": {"0": math, "1": None}, "code": {"0": None, "1": code}}.items():
        run("opsd_ucla", config(tiny_base, teachers, tmp_path / name))
    assert_close_rows(metrics(tmp_path / "two"), metrics(tmp_path / "both"))
    before = load_file(tiny_base / "model.safetensors")
    two, first, second = ({k: w - before[k] for k, w in weights(tmp_path / name).items()} for name in ("two", "math", "code"))
    for part in (first, second):  # each teacher alone moves the weights, and by far more than the tolerance below
        assert max(float(step.abs().max()) for step in part.values()) > 1e-3
    for key, step in two.items():
        torch.testing.assert_close(
            step, first[key] + second[key], rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
