"""Checkpoints: whole or absent, loadable by transformers, and enough to go on exactly."""

import gc
import io
import json
import random
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
from pidistill.training import checkpoints
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
    torch.save(checkpoints._random_state(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    version, internal, gauss = saved["python"]
    expected = random.Random()
    expected.setstate((version, tuple(internal), gauss))
    random.seed(4)
    checkpoints._set_random_state(saved)
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


@pytest.mark.parametrize(("every", "saved"), [(None, []), (0, []), (1, [2, 5, 6]), (3, [5, 6]), (4, [5]), (7, [])])
def test_a_round_that_passes_a_multiple_saves_at_its_end(every, saved, hub, tmp_path):
    points = Training(tmp_path / "run", hub, save_every_steps=every).checkpoints
    assert [now for before, now in ((0, 2), (2, 5), (5, 6)) if points.due(before, now)] == saved


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


def test_random_weights_are_a_checkpoint_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(VOCABULARY)
    model.load_state_dict(scratch(tmp_path / "a"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-5)
