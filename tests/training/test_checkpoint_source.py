"""Test that an incomplete checkpoint folder is refused in one sentence that says what to run or to change."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.errors import InputError
from pidistill.testing import tiny_hf_checkpoint
from pidistill.training.checkpoint_source import check_checkpoint_folder
from pidistill.training.load import build_checkpointer


def folder_config(folder, files, component="torchtune.training.FullModelHFCheckpointer"):
    node = {"_component_": component, "checkpoint_dir": str(folder), "checkpoint_files": files}
    return OmegaConf.create({"checkpointer": node})


def test_a_checkpoint_folder_is_looked_at_before_it_is_loaded(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        InputError, match=r"has no config.json \(it holds model.safetensors\); check checkpointer.checkpoint_dir"
    ):
        check_checkpoint_folder(folder_config(tmp_path, ["model.safetensors"]), "checkpointer")
    (tmp_path / "config.json").touch()
    check_checkpoint_folder(folder_config(tmp_path, ["model.safetensors"]), "checkpointer")
    with pytest.raises(InputError, match="has no model-2.safetensors"):
        check_checkpoint_folder(folder_config(tmp_path, ["model.safetensors", "model-2.safetensors"]), "checkpointer")
    with pytest.raises(InputError, match="does not exist; check checkpointer.checkpoint_dir"):
        check_checkpoint_folder(folder_config(tmp_path / "gone", []), "checkpointer")
    runs = tmp_path / "runs" / "tiny"
    with pytest.raises(InputError, match="tiny/base/latest does not exist; run `make base`"):
        check_checkpoint_folder(folder_config(runs / "base" / "latest", []), "checkpointer")
    with pytest.raises(InputError, match="does not exist; it is what configs/tiny/sft.yaml leaves: run that first"):
        check_checkpoint_folder(folder_config(runs / "sft" / "latest", []), "checkpointer")
    with pytest.raises(InputError, match="does not exist; it is what configs/gem/base.yaml leaves: run that first"):
        check_checkpoint_folder(folder_config(tmp_path / "runs" / "gem" / "base" / "latest", []), "checkpointer")
    check_checkpoint_folder(
        OmegaConf.create({"checkpointer": {"_component_": "x", "checkpoint_dir": "made later"}}), "checkpointer"
    )
    check_checkpoint_folder(OmegaConf.create({}), "teacher_checkpointer")
    with pytest.raises(InputError, match="latest does not exist; check checkpointer.checkpoint_dir"):  # no config of ours
        check_checkpoint_folder(folder_config(tmp_path / "runs" / "mine" / "base" / "latest", []), "checkpointer")


def test_a_checkpoint_behind_a_link_that_moves_is_read_from_one_folder(tmp_path):
    """A run that trains beside an evaluation moves its `latest`."""
    for name, seed in (("step_1", 0), ("step_2", 1)):
        tiny_hf_checkpoint(tmp_path / name, seed=seed)
    link = tmp_path / "latest"
    link.symlink_to("step_1")
    node = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(link), "output_dir": str(tmp_path / "out")}
    model = {"_component_": "pidistill.models.from_folder", "path": str(tmp_path / "step_1")}
    checkpointer = build_checkpointer(node, model)
    link.unlink()
    link.symlink_to("step_2")
    loaded = checkpointer.load_checkpoint()["model"]
    first, second = (
        build_checkpointer(node | {"checkpoint_dir": str(tmp_path / name)}, model).load_checkpoint()["model"]
        for name in ("step_1", "step_2")
    )
    assert all(torch.equal(loaded[name], first[name]) for name in first)
    assert any(not torch.equal(loaded[name], second[name]) for name in second)


CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = [f"{path.parent.name}/base" for path in sorted(CONFIGS.glob("*/base.yaml")) if path.parent.name != "tiny"]


def test_stages_of_several_environments_are_found():
    assert len(STAGES) >= 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_not_run_is_named(stage, tmp_path):
    with pytest.raises(InputError, match=f"it is what configs/{stage}.yaml leaves: run that first"):
        check_checkpoint_folder(folder_config(tmp_path / "runs" / stage / "latest", []), "checkpointer")
