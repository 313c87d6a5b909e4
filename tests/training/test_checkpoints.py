"""Test checkpoints: whole or absent, loadable by transformers, and enough to continue exactly."""

import copy
import gc
import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models.from_scratch import from_scratch
from pidistill.teachers import EMATeacher, LiveTeacher
from pidistill.testing import TINY_SIZES, tiny_hf_checkpoint, tiny_model
from pidistill.training import checkpoints, disk, publish, training_state
from pidistill.training.checkpoints import STATE_FILE, Checkpoints, step_folder
from pidistill.training.load import load_model
from pidistill.training.update import Updates
from tests.support.builders import CPU

VOCABULARY = 40
TOKENS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "qwen2": ("QWEN2", "torchtune.models.qwen2.qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("QWEN2", "torchtune.models.qwen2.qwen2", {"tie_word_embeddings": True}),
    "llama": ("LLAMA3", "torchtune.models.llama3.llama3", {}),
}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """torchtune's checkpointer calls gc.collect(), which looks through all of torch's modules each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def process_group():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


class Training:
    """What a recipe holds when it saves: a model that trains, its optimizer and schedule, a teacher."""

    def __init__(self, folder: Path, hub: Path, family: str = "llama", method="m", must_match=None, **changes) -> None:
        model_type, builder, arguments = FAMILIES[family]
        self.cfg = OmegaConf.create(
            {
                "model": {"_component_": builder, "vocab_size": VOCABULARY, **TINY_SIZES, **arguments},
                "checkpointer": {
                    "_component_": "torchtune.training.FullModelHFCheckpointer",
                    "checkpoint_dir": str(hub),
                    "checkpoint_files": ["model.safetensors"],
                    "model_type": model_type,
                    "output_dir": str(folder),
                },
                "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
                "lr_scheduler": {
                    "_component_": "pidistill.training.lr_schedules.get_linear_warmup_schedule",
                    "num_warmup_steps": 50,
                },
                **changes,
            }
        )
        folder.mkdir(exist_ok=True)
        run = Run(CPU, torch.float32, 0, 1, 0, folder)
        self.checkpoints = Checkpoints(self.cfg, run, method, must_match)
        self.model = load_model(self.cfg, run, self.cfg.model, self.checkpoints.load_weights(), trained=True)
        self.teacher = EMATeacher(0.2)
        first = build(self.cfg.checkpointer, output_dir=str(folder)).load_checkpoint()["model"]
        self.teacher.attach(lambda: load_model(self.cfg, run, self.cfg.model, first, trained=False))
        self.updates = Updates(self.cfg, run, self.model)

    def train(self, steps: int, seed: int = 0) -> None:
        for step in range(steps):
            targets = TOKENS.roll(seed + step, 0)
            logits = self.model(TOKENS)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            self.updates.step(loss.item(), 9, lambda path: None, step)
            self.teacher.update(self.model)

    def save(self, step: int) -> None:
        self.checkpoints.save(step, step, self.model, self.updates, self.teacher)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder with its initial checkpoint)"""
    name, _, tied = request.param.partition(" ")
    folder = tiny_hf_checkpoint(tmp_path_factory.mktemp(name), name, tied=bool(tied), vocab_size=VOCABULARY)
    (folder / "tokenizer.json").write_text("{}")
    return request.param, folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny_hf_checkpoint(tmp_path_factory.mktemp("hub"), "llama", vocab_size=VOCABULARY)


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_training_goes_on_exactly_from_a_checkpoint(family, tmp_path):
    name, hub = family
    whole = Training(tmp_path / "run", hub, name)
    whole.train(3)
    whole.save(3)
    whole.train(2, seed=1)
    resumed = Training(tmp_path / "run", hub, name, resume_from_checkpoint=True)
    assert resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher) == {"step": 3, "round": 3}
    assert not same(resumed.model, whole.model)
    resumed.train(2, seed=1)
    assert same(resumed.model, whole.model)
    assert same(resumed.teacher.module, whole.teacher.module)
    assert resumed.updates.scheduler.state_dict() == whole.updates.scheduler.state_dict()


def test_transformers_loads_a_checkpoint_and_gives_its_logits(family, tmp_path):
    from transformers import AutoModelForCausalLM

    name, hub = family
    training = Training(tmp_path / "run", hub, name)
    training.train(3)
    training.save(3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "latest", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32)
    with torch.no_grad():
        expected = training.model.eval()(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (before(TOKENS).logits - expected).abs().max() > 0.1, "training must have moved what is compared"


def test_a_checkpoint_holds_what_came_with_the_initial_one(family, tmp_path):
    name, hub = family
    training = Training(tmp_path / "run", hub, name)
    training.save(1)
    found = {path.name for path in step_folder(tmp_path / "run", 1).iterdir()}
    assert {"config.json", "tokenizer.json", STATE_FILE, "model-00001-of-00001.safetensors"} <= found
    assert json.loads((tmp_path / "run" / "latest" / "config.json").read_text()) == json.loads(
        (hub / "config.json").read_text()
    )
    resumed = Training(tmp_path / "run", hub, name, resume_from_checkpoint=True)
    resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher)
    resumed.save(2)
    assert {path.name for path in step_folder(tmp_path / "run", 2).iterdir()} == found
    assert not (tmp_path / "run" / ".writing").exists()


def test_latest_is_the_newest_and_older_ones_stay(hub, tmp_path):
    training = Training(tmp_path / "run", hub)
    for step in (2, 4):
        training.train(1)
        training.save(step)
    assert (tmp_path / "run" / "latest").resolve() == step_folder(tmp_path / "run", 4)
    first, second = (load_file(step_folder(tmp_path / "run", s) / "model-00001-of-00001.safetensors") for s in (2, 4))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    training.train(1)
    training.save(4)  # again, as a run does that starts over
    third = load_file(tmp_path / "run" / "latest" / "model-00001-of-00001.safetensors")
    assert not torch.equal(second["lm_head.weight"], third["lm_head.weight"])


def test_random_streams_go_on_where_they_were(hub, tmp_path):
    training = Training(tmp_path / "run", hub)
    training.save(1)

    def draws():
        return torch.rand(2).tolist(), np.random.rand(2).tolist()

    np.random.seed(11)
    torch.manual_seed(11)
    training.save(1)
    expected = draws()
    torch.manual_seed(0)
    np.random.seed(0)
    resumed = Training(tmp_path / "run", hub, resume_from_checkpoint=True)
    resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher)
    assert draws() == expected


def test_pythons_random_stream_goes_on_too():
    """Apart from training: the type checker of the tests draws from this stream."""
    random.seed(3)
    random.gauss(0, 1)
    file = io.BytesIO()
    torch.save(training_state.random_state(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    version, internal, gauss = saved["python"]
    expected = random.Random()
    expected.setstate((version, tuple(internal), gauss))
    random.seed(4)
    training_state.set_random_state(saved)
    assert gauss is not None
    assert [random.gauss(0, 1), random.random()] == [expected.gauss(0, 1), expected.random()]


def test_other_world_sizes_resume_with_a_warning_about_random_streams(hub, tmp_path, monkeypatch):
    training = Training(tmp_path / "run", hub)
    training.save(1)
    state = torch.load(tmp_path / "run" / "latest" / STATE_FILE, weights_only=True)
    torch.save(state | {"rng": state["rng"] * 2}, tmp_path / "run" / "latest" / STATE_FILE)
    said = []
    monkeypatch.setattr(checkpoints, "log", type("Log", (), {"warning": staticmethod(said.append)}))
    resumed = Training(tmp_path / "run", hub, resume_from_checkpoint=True)
    resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher)
    assert said == ["2 ranks wrote the checkpoint, this run has 1"]


def test_skipped_steps_are_counted_on(hub, tmp_path):
    training = Training(tmp_path / "run", hub)
    training.updates.nonfinite_steps, training.updates.nonfinite_in_a_row, training.updates.empty_steps = 5, 2, 3
    training.save(1)
    resumed = Training(tmp_path / "run", hub, resume_from_checkpoint=True)
    resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher)
    found = resumed.updates
    assert (found.nonfinite_steps, found.nonfinite_in_a_row, found.empty_steps) == (5, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "other"}, "was trained with m, this config says other"),
        (
            {"must_match": {"group_size": 4}},
            "was trained with group_size=8, this run has 4; the order of the data would differ",
        ),
    ],
)
def test_another_methods_checkpoint_is_refused(changes, message, hub, tmp_path):
    Training(tmp_path / "run", hub, must_match={"group_size": 8}).save(1)
    with pytest.raises(InputError, match=message):
        Training(tmp_path / "run", hub, **{"must_match": {"group_size": 8}} | changes, resume_from_checkpoint=True)


def test_a_teacher_without_its_state_is_refused(hub, tmp_path):
    training = Training(tmp_path / "run", hub)
    training.checkpoints.save(1, 1, training.model, training.updates, LiveTeacher())
    resumed = Training(tmp_path / "run", hub, resume_from_checkpoint=True)
    with pytest.raises(InputError, match="lacks a state of `teacher` and this config needs it"):
        resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher)


def test_the_state_of_another_kind_of_teacher_is_refused(hub, tmp_path):
    training = Training(tmp_path / "run", hub)
    snapshot = copy.copy(training.teacher)
    snapshot.state_dict = lambda: training.teacher.state_dict() | {"steps": torch.tensor(3)}
    training.checkpoints.save(1, 1, training.model, training.updates, snapshot)
    resumed = Training(tmp_path / "run", hub, resume_from_checkpoint=True)
    with pytest.raises(InputError, match="has the state of another kind of `teacher`"):
        resumed.checkpoints.restore(resumed.model, resumed.updates, resumed.teacher)


@pytest.mark.parametrize(("every", "saved"), [(None, []), (0, []), (1, [2, 5, 6]), (3, [5, 6]), (4, [5]), (7, [])])
def test_a_round_that_passes_a_multiple_saves_at_its_end(every, saved, hub, tmp_path):
    points = Training(tmp_path / "run", hub, save_every_steps=every).checkpoints
    assert [now for before, now in ((0, 2), (2, 5), (5, 6)) if points.due(before, now)] == saved


# ------------------------------------------------------------------------------------------- saved work is kept


def resumed(hub, folder, **changes):
    training = Training(folder, hub, resume_from_checkpoint=True, **changes)
    training.progress = training.checkpoints.restore(training.model, training.updates, training.teacher)
    return training


@pytest.fixture
def three_steps(hub, tmp_path):
    training = Training(tmp_path / "run", hub)
    for step in (2, 4, 10):
        training.train(1)
        training.save(step)
    return tmp_path / "run"


@pytest.mark.parametrize("latest", ["missing", "dangling"])
def test_without_its_link_a_run_resumes_from_the_newest_step(latest, hub, three_steps):
    (three_steps / "latest").unlink()
    if latest == "dangling":
        (three_steps / "latest").symlink_to("step_99")
    assert resumed(hub, three_steps).progress["step"] == 10
    assert {path.name for path in three_steps.glob("step_*")} == {"step_2", "step_4", "step_10"}


def test_a_missing_link_does_not_start_a_run_over_that_began_here(hub, three_steps):
    (three_steps / "latest").unlink()
    (three_steps / ".began").touch()
    assert resumed(hub, three_steps).progress["step"] == 10


def test_a_dangling_link_without_any_step_is_refused(hub, three_steps):
    for step in (2, 4, 10):
        shutil.rmtree(three_steps / f"step_{step}")
    (three_steps / ".began").touch()
    with pytest.raises(
        InputError, match=r"holds no training_state.pt, nor does any step_N .*resume_from_checkpoint=start_over"
    ):
        resumed(hub, three_steps)


@pytest.mark.parametrize("step_is_there", [True, False])
def test_latest_may_be_a_plain_folder(step_is_there, hub, three_steps):
    (three_steps / "latest").unlink()
    copy = shutil.copytree if step_is_there else shutil.move
    copy(three_steps / "step_10", three_steps / "latest")
    training = resumed(hub, three_steps)
    assert training.progress["step"] == 10
    training.save(11)
    assert (three_steps / "latest").is_symlink() and (three_steps / "latest").resolve().name == "step_11"
    assert (three_steps / "step_10" / STATE_FILE).is_file()
    assert (three_steps / "latest_copy_1").exists() == step_is_there


@pytest.mark.parametrize("damage", ["cut short", "empty", "other bytes", "not a training state"])
def test_a_damaged_state_is_one_sentence_that_names_the_step_before(damage, hub, three_steps):
    path = three_steps / "step_10" / STATE_FILE
    whole = path.read_bytes()
    if damage == "not a training state":
        torch.save({"step": 10}, path)
    else:
        path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "other bytes": b"x" * 999}[damage])
    with pytest.raises(InputError, match=r"training_state.pt in .*step_10 is cut short or damaged .*resumes from step_4$"):
        resumed(hub, three_steps)
    shutil.move(three_steps / "step_10", three_steps / "aside")  # what the sentence says
    assert resumed(hub, three_steps).progress["step"] == 4


def test_damaged_weights_are_one_sentence_that_names_the_step_before(hub, three_steps):
    path = three_steps / "step_10" / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"step_10 is cut short or damaged .*resumes from step_4$"):
        resumed(hub, three_steps)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "config.json"])
def test_a_file_that_is_missing_is_not_called_damaged(name, hub, three_steps):
    (three_steps / "step_10" / name).unlink()
    with pytest.raises(InputError, match=r"in .*step_10 is missing \(.*resumes from step_4$") as refused:
        resumed(hub, three_steps)
    assert "damaged" not in str(refused.value)


def test_a_state_of_a_later_format_is_refused(hub, three_steps):
    path = three_steps / "step_10" / STATE_FILE
    state = torch.load(path, weights_only=True)
    assert state["format"] == checkpoints.FORMAT
    torch.save(state | {"format": 99}, path)
    with pytest.raises(InputError, match="has format 99 and this version of pidistill reads up to 1"):
        resumed(hub, three_steps)


@pytest.mark.parametrize(("keep", "left"), [(None, {2, 4, 10}), (1, {10}), (2, {4, 10}), (9, {2, 4, 10})])
def test_keep_last_bounds_the_checkpoints(keep, left, hub, tmp_path):
    training = Training(tmp_path / "run", hub, keep_last=keep)
    (tmp_path / "run" / "step_notes").mkdir()
    for step in (2, 4, 10):
        training.save(step)
    assert {path.name for path in (tmp_path / "run").glob("step_*")} == {"step_notes"} | {f"step_{step}" for step in left}
    assert resumed(hub, tmp_path / "run").progress["step"] == 10


def test_keep_last_leaves_what_teachers_and_adapters_start_from(hub, tmp_path):
    steps = [tmp_path / "run" / f"step_{step}" for step in (1, 2)]
    training = Training(tmp_path / "run", hub, keep_last=1, teacher_checkpointers={"one": {"checkpoint_dir": str(steps[0])}})
    training.cfg.adapter_dir = str(steps[1] / "adapter")
    for step in (1, 2, 3, 4, 5):
        training.save(step)
    assert {path.name for path in (tmp_path / "run").glob("step_*")} == {"step_1", "step_2", "step_5"}


@pytest.mark.parametrize("component", ["torchtune.training.FullModelHFCheckpointer", "pidistill.models.HFCheckpointer"])
def test_keep_last_leaves_the_folder_that_a_resumed_run_copies_its_small_files_from(component, hub, tmp_path):
    small_files = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    source = shutil.copytree(hub, tmp_path / "hub")
    for name in small_files - {"config.json"}:
        (source / name).write_text("{}")
    node = {"checkpoint_dir": str(source), "checkpoint_files": ["model.safetensors"], "model_type": "LLAMA3"}
    changes = {"keep_last": 1, "checkpointer": {"_component_": component, **node}}
    Training(tmp_path / "run", source, **changes).save(1)
    for steps, left in (((2, 3), {"step_1", "step_3"}), ((4, 5), {"step_3", "step_5"})):
        training = resumed(source, tmp_path / "run", **changes)
        for step in steps:
            training.save(step)
        assert small_files <= {path.name for path in (tmp_path / "run" / "latest").iterdir()}
        assert {path.name for path in (tmp_path / "run").glob("step_*")} == left
    assert resumed(source, tmp_path / "run", **changes).progress["step"] == 5


def test_everything_is_on_the_disk_before_the_link_moves(hub, tmp_path, monkeypatch):
    training = Training(tmp_path / "run", hub)
    events = []
    sync, replace = disk.sync, checkpoints.os.replace
    for module in (disk, publish):
        monkeypatch.setattr(module, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(checkpoints.os, "replace", lambda a, b: (events.append(f"move {Path(b).name}"), replace(a, b)))
    training.save(1)
    files = {path.name for path in (tmp_path / "run" / "step_1").iterdir()}
    assert STATE_FILE in files
    assert files <= set(events[: events.index("move step_1")])
    assert "run" in events[events.index("move step_1") : events.index("move latest")]


def test_saved_files_have_the_modes_of_the_umask_and_leave_out_links_that_lead_outside(hub, tmp_path):
    source, secret = shutil.copytree(hub, tmp_path / "hub"), tmp_path / "secret.txt"
    secret.write_text("secret")
    (source / "notes.txt").symlink_to(secret)
    (source / "inside.json").write_text("{}")
    (source / "alias.json").symlink_to("inside.json")
    (source / "inside.json").chmod(0o400)
    training = Training(tmp_path / "run", source)
    old = os.umask(0o027)
    try:
        training.save(1)
    finally:
        os.umask(old)
    saved = tmp_path / "run" / "step_1"
    assert not (saved / "notes.txt").exists()
    assert (saved / "alias.json").read_text() == "{}"
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o640}
    assert saved.stat().st_mode & 0o777 == 0o750


def test_links_into_the_hubs_cache_are_copied(tmp_path, hub):
    source = tmp_path / "models--x" / "snapshots" / "abc"
    shutil.copytree(hub, source)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (blobs / "1234").write_text("{}")
    (source / "tokenizer.json").symlink_to("../../blobs/1234")
    training = Training(tmp_path / "run", source)
    training.save(1)
    assert (tmp_path / "run" / "step_1" / "tokenizer.json").read_text() == "{}"


# ------------------------------------------------------------------------------------------- changed settings


def test_an_unchanged_lr_is_the_same_to_the_bit_and_a_changed_one_takes_effect(hub, tmp_path):
    whole = Training(tmp_path / "run", hub)
    whole.train(3)
    whole.save(3)
    same = resumed(hub, tmp_path / "run")
    assert same.updates.optimizer.param_groups[0]["lr"] == whole.updates.optimizer.param_groups[0]["lr"] > 0
    changed = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.001, "weight_decay": 0.5}}
    other = resumed(hub, tmp_path / "run", **changed)
    group = other.updates.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(whole.updates.optimizer.param_groups[0]["lr"] / 10)
    assert group["weight_decay"] == 0.5
    whole.train(1)
    other.train(1)
    after, expected = other.updates.optimizer.param_groups[0]["lr"], whole.updates.optimizer.param_groups[0]["lr"] / 10
    assert after == pytest.approx(expected)  # the schedule goes on from the new rate


def test_a_changed_lr_without_a_schedule_takes_effect(hub, tmp_path):
    Training(tmp_path / "run", hub, lr_scheduler=None).save(1)
    changed = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003}}
    assert resumed(hub, tmp_path / "run", lr_scheduler=None, **changed).updates.optimizer.param_groups[0]["lr"] == 0.003


def test_an_optimizer_without_states_resumes(hub, tmp_path):
    plain = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.01}}
    whole = Training(tmp_path / "run", hub, **plain)
    whole.train(2)
    whole.save(2)
    again = resumed(hub, tmp_path / "run", **plain)
    assert again.updates.optimizer.param_groups[0]["lr"] == whole.updates.optimizer.param_groups[0]["lr"]
    for training in (whole, again):
        training.train(1)
    assert same(whole.model, again.model)


STEP_LR = {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 2}
ONE_CYCLE_LR = {"_component_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": 5}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.01}}, "states of AdamW, which SGD cannot take"),
        (
            {},
            {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01, "amsgrad": True}},
            "optimizer.amsgrad=True needs other states than the checkpoint holds",
        ),
        ({}, {"lr_scheduler": STEP_LR}, "holds the state of LambdaLR and lr_scheduler builds StepLR"),
        (
            {"lr_scheduler": STEP_LR},
            {"lr_scheduler": STEP_LR, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.1}},
            r"changed optimizer.lr cannot reach StepLR.*\(optimizer.lr 0.01 -> 0.1\)",
        ),
        (
            {"lr_scheduler": STEP_LR},
            {"lr_scheduler": STEP_LR | {"step_size": 4}},
            r"changed lr_scheduler.step_size cannot reach StepLR.*\(2 -> 4\).*pidistill.training.lr_schedules",
        ),
        (
            {"lr_scheduler": ONE_CYCLE_LR},
            {"lr_scheduler": ONE_CYCLE_LR | {"pct_start": 0.9}},
            "changed lr_scheduler.schedule_phases cannot reach OneCycleLR",
        ),
        ({"max_steps": 1}, {"max_steps": 0}, "is at step 1, and max_steps=0 counts the whole run; set it above 1"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(before, after, message, hub, tmp_path):
    first = Training(tmp_path / "run", hub, **before)
    first.train(1)
    first.save(1)
    with pytest.raises(InputError, match=message):
        resumed(hub, tmp_path / "run", **after)


@pytest.mark.parametrize(
    "schedule",
    [
        STEP_LR,
        ONE_CYCLE_LR,
        {"_component_": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "T_0": 2, "T_mult": 2},
        {"_component_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1, 3]},
        {"_component_": "torch.optim.lr_scheduler.CyclicLR", "base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": False},
    ],
    ids=lambda schedule: schedule["_component_"].rpartition(".")[2],
)
def test_a_schedule_that_did_not_change_resumes_inside_its_curve(schedule, hub, tmp_path):
    first = Training(tmp_path / "run", hub, lr_scheduler=schedule)
    first.train(3)
    first.save(3)
    again = resumed(hub, tmp_path / "run", lr_scheduler=schedule)
    assert again.updates.scheduler.get_last_lr() == first.updates.scheduler.get_last_lr()


def test_a_finished_run_says_so_on_resume(hub, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoints.log, "info", said.append)
    for steps, finished in ((2, True), (3, False)):
        folder = tmp_path / str(steps)
        first = Training(folder, hub, max_steps=2)
        first.save(2)
        resumed(hub, folder, max_steps=steps)
        assert any("the run is finished" in line for line in said) == finished
        said.clear()


# ------------------------------------------------------------------------------------------- random weights

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "num_hidden_layers": TINY_SIZES["num_layers"],
    "num_attention_heads": TINY_SIZES["num_heads"],
    "num_key_value_heads": TINY_SIZES["num_kv_heads"],
    "hidden_size": TINY_SIZES["embed_dim"],
    "intermediate_size": TINY_SIZES["intermediate_dim"],
    "max_position_embeddings": TINY_SIZES["max_seq_len"],
    "rope_theta": TINY_SIZES["rope_base"],
    "rms_norm_eps": TINY_SIZES["norm_eps"],
    "tie_word_embeddings": False,
}


def scratch(folder: Path, seed: int = 0):
    made = from_scratch(str(folder), str(folder.parent / "out"), tiny_model(VOCABULARY), HF_CONFIG, "LLAMA3", seed=seed)
    return made.load_checkpoint()["model"]


def test_random_weights_are_seeded_and_of_the_stated_size(tmp_path):
    first, again, other = scratch(tmp_path / "a"), scratch(tmp_path / "b"), scratch(tmp_path / "c", seed=1)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 2:
            assert not torch.equal(weight, other[name])
            stated = 0.05 if name.startswith("tok_embeddings") else 0.02
            assert weight.std().item() == pytest.approx(stated, rel=0.1), name


def test_weights_that_are_there_are_kept(tmp_path):
    first = scratch(tmp_path / "a")
    assert all(torch.equal(weight, first[name]) for name, weight in scratch(tmp_path / "a", seed=9).items())


def test_a_checkpoint_that_a_run_saved_is_read_by_the_files_of_its_index(tmp_path):
    """torchtune saves model-00001-of-00001.safetensors, whatever the first checkpoint's file was called."""
    first = scratch(tmp_path / "a")
    saver = from_scratch(str(tmp_path / "a"), str(tmp_path / "out"), tiny_model(VOCABULARY), HF_CONFIG, "LLAMA3")
    saver.load_checkpoint()
    saver.save_checkpoint({"model": {name: 2 * weight for name, weight in first.items()}}, epoch=0)
    saved = tmp_path / "step_1"
    (tmp_path / "out" / "epoch_0").rename(saved)
    assert not (saved / "model.safetensors").exists()
    assert all(torch.equal(weight, 2 * first[name]) for name, weight in scratch(saved).items())


@pytest.mark.parametrize("name", ["latest", "step_7"])
def test_no_random_weights_are_written_where_a_checkpoint_of_a_run_should_be(name, tmp_path):
    with pytest.raises(InputError, match=rf"checkpoint folder .*{name} is named like the checkpoint of a run .*train first"):
        scratch(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_random_weights_are_a_checkpoint_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(VOCABULARY)
    model.load_state_dict(scratch(tmp_path / "a"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-5)
