"""Test LoRA, and teachers that need no second copy or are another model: trained, saved, resumed, refused."""

import functools
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.modules.peft import get_adapter_params

from pidistill.data.load import _check_same_tokenizer
from pidistill.errors import InputError
from pidistill.testing import TINY_SIZES, tiny_hf_checkpoint
from pidistill.tokenizers import HFChatTokenizer
from tests.support.forks import launch_several
from tests.support.lora import ADAPTER_OFF, FROZEN, LORA, TRUST_REGION, lora_run, plain_model
from tests.support.runs import (
    EMA,
    ROOT,
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    small_config,
    training_state,
    weights,
)
from tests.support.tiny_qwen import qwen_checkpoint


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return lora_run(tiny_base, folder, save_every_steps=2), folder


def test_only_adapters_train_and_the_saved_checkpoint_is_the_merged_model(trained, tiny_base):
    recipe, folder = trained
    adapters = get_adapter_params(recipe._model)
    optimised = {id(p) for group in recipe._updates.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in adapters.values()} and len(adapters) > 5
    base = {name: p for name, p in recipe._model.named_parameters() if name not in adapters}
    assert not any(p.requires_grad for p in base.values())
    first = weights(tiny_base.parent, tiny_base.name)
    torch.testing.assert_close(base["layers.0.mlp.w1.weight"].detach(), first["model.layers.0.mlp.gate_proj.weight"])
    ours = weights(folder)
    assert ours.keys() == first.keys()
    assert not torch.equal(ours["model.layers.0.mlp.gate_proj.weight"], first["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(ours["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(plain_model(folder)(tokens), recipe._model(tokens), rtol=1e-4, atol=1e-4)
    assert all(row["kl_teacher_student_nats"] > 1e-4 for row in metrics(folder))


def test_adapters_off_are_a_frozen_teacher(trained, tiny_base, tmp_path):
    """The same run to rounding, with one copy of the weights instead of two."""
    _, folder = trained
    lora_run(tiny_base, tmp_path, teacher=FROZEN)
    for ours, theirs in zip(metrics(folder), metrics(tmp_path), strict=True):
        for key in ours.keys() - {"alarms"}:  # sentences, whose numbers may round differently
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (ours["step"], key)


@pytest.mark.parametrize("teacher", [ADAPTER_OFF, EMA, TRUST_REGION], ids=["adapter_off", "ema", "trust_region"])
def test_a_resumed_run_is_the_whole_run_to_the_bit(teacher, tiny_base, tmp_path):
    changes = {"teacher": teacher, "save_every_steps": 2}
    lora_run(tiny_base, tmp_path / "whole", **changes)
    back_to_checkpoint(tmp_path / "whole", tmp_path / "cut")
    lora_run(tiny_base, tmp_path / "cut", resume_from_checkpoint=True, **changes)
    whole, cut = (training_state(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole["adapters"]) > 5
    assert set(whole["teacher"]) == (set(whole["adapters"]) if teacher is EMA else set())
    for key in ("adapters", "optimizer", "teacher", "step"):
        assert_same_tensors(whole[key], cut[key], key)
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics(tmp_path / "whole")[-1] == metrics(tmp_path / "cut")[-1]


def test_a_checkpoint_with_adapters_goes_on_with_adapters_alone(trained, tiny_base, tmp_path):
    _, folder = trained
    with pytest.raises(InputError, match="does not fit the model built from `model`|was trained with LoRA adapters"):
        run("opsd", small_config("opsd", tiny_base, folder, resume_from_checkpoint=True))
    run("opsd", small_config("opsd", tiny_base, tmp_path, max_steps=1))
    with pytest.raises(InputError, match="was trained without LoRA adapters, unlike this config's; resume with the `model`"):
        lora_run(tiny_base, tmp_path, teacher=FROZEN, resume_from_checkpoint=True)


def test_adapters_are_not_put_beside_another_base(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    lora_run(base, tmp_path / "run", max_steps=1)
    tensors = load_file(base / "model.safetensors")
    save_file({key: 2 * value for key, value in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="other weights than the adapters in .* were trained beside; set it to the run's first"
    ):
        lora_run(base, tmp_path / "run", max_steps=2, resume_from_checkpoint=True)


def test_at_alpha_0_the_base_samples_and_is_the_behaviour_policy(tiny_base, tmp_path):
    """μ is what the adapter-off teacher scores, at every step: its ratio stays 1 while the student's moves away."""
    lora_run(tiny_base, tmp_path, "pi_distill", objective__alpha=0.0, max_steps=3)
    rows = metrics(tmp_path)
    assert [row["ratio_mean"] for row in rows] == pytest.approx([1.0] * 3, abs=1e-5)
    assert len({row["kl_teacher_student_nats"] for row in rows}) == 3


def test_two_processes_end_where_one_does(tiny_base, tmp_path):
    runs = {}
    for name, method, teacher in (
        ("off", "opsd", ADAPTER_OFF),
        ("half", "pi_distill", ADAPTER_OFF),
        ("region", "opsd", TRUST_REGION),
    ):
        config = functools.partial(small_config, method, tiny_base, teacher=teacher, max_steps=2, **LORA)
        run(method, config(tmp_path / "one" / name))
        runs[name] = (method, config(tmp_path / "two" / name))
    launch_several(tmp_path / "several", runs)
    for name in runs:
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_another_model_with_more_padded_rows_teaches(tiny_base, tmp_path):
    """Of another width, with 7 output rows more; `no_pi` then is distill, and the student's ratio stays 1 at first."""
    tiny_hf_checkpoint(tmp_path / "big", "llama", vocab_size=92)
    teacher_model = {"_component_": "torchtune.models.llama3.llama3", "vocab_size": 92, **TINY_SIZES}
    checkpointer = OmegaConf.to_container(small_config("opsd", tmp_path / "big", tmp_path).checkpointer)
    changes = {"teacher": FROZEN, "teacher_model": teacher_model, "teacher_checkpointer": checkpointer, "max_steps": 2}
    recipe = run("opsd", small_config("opsd", tiny_base, tmp_path / "run", **changes))
    assert recipe._teacher.module.tok_embeddings.num_embeddings == 92
    rows = metrics(tmp_path / "run")
    assert all(row["kl_teacher_student_nats"] > 0.01 for row in rows)
    assert rows[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-5)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("opsd", {"teacher": ADAPTER_OFF}, "without its LoRA adapters, and the model has none"),
        (
            "opsd",
            LORA | {"model__lora_dropout": 0.1},
            "score another policy than the one that sampled; set model.lora_dropout=0",
        ),
        (
            "opsd",
            LORA | {"teacher": ADAPTER_OFF, "teacher_checkpointer": {"_component_": "builtins.dict"}},
            "teacher_checkpointer is not read",
        ),
        (
            "pi_distill",
            {"teacher": TRUST_REGION, "objective__alpha": 0.0},
            "cannot sample, which PiDistill asks of the teacher",
        ),
        (
            "pi_distill",
            {"teacher": TRUST_REGION, "objective__alpha": {"start": 0.5, "end": 0.0, "steps": 2}},
            "keep objective.alpha above 0",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_refused_before_weights_are_loaded(
    method, changes, message, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "pidistill.training.checkpoints.Checkpoints.load_weights", lambda self: pytest.fail("weights were loaded")
    )
    with pytest.raises(InputError, match=message):
        run(method, small_config(method, tiny_base, tmp_path, **changes))


def other_teacher(tiny_base, tmp_path, **more):
    cfg = small_config("opsd", tiny_base, tmp_path)
    teacher = {"teacher": FROZEN, "teacher_checkpointer": OmegaConf.to_container(cfg.checkpointer)}
    return small_config("opsd", tiny_base, tmp_path, **(teacher | more))


def test_a_teacher_tokenizer_with_other_ids_is_refused(tiny_base, tmp_path):
    same = {"_component_": "pidistill.envs.tiny_world.tiny_world_tokenizer"}
    run("opsd", other_teacher(tiny_base, tmp_path, teacher_tokenizer=same, max_steps=1))
    other = {
        "_component_": "pidistill.tokenizers.WordTokenizer",
        "words": ["pad", "bos", "end"],
        "pad": "pad",
        "bos": "bos",
        "end": "end",
    }
    with pytest.raises(
        InputError, match="teacher_tokenizer is another tokenizer than the student's: .* ids differ, the first is"
    ):
        run("opsd", other_teacher(tiny_base, tmp_path, teacher_tokenizer=other, resume_from_checkpoint="start_over"))


def test_a_teacher_folder_with_another_tokenizer_json_is_refused(tiny_base, tmp_path):
    texts = {
        "ours": ["one two three four five"] * 3,
        "theirs": ["un deux trois quatre cinq"] * 3,
        "same": ["one two three four five"] * 3,
    }
    ours, theirs, same = (qwen_checkpoint(tmp_path / name, text) for name, text in texts.items())

    tokenizer = HFChatTokenizer(str(ours))

    def check(teacher):
        cfg = {"tokenizer": {"path": str(ours)}, "checkpointer": {"checkpoint_dir": str(ours)}}
        _check_same_tokenizer(OmegaConf.create(cfg | {"teacher_checkpointer": {"checkpoint_dir": str(teacher)}}), tokenizer)

    check(same)
    check(tmp_path)
    with pytest.raises(InputError, match="theirs/tokenizer.json is another tokenizer than the student's"):
        check(theirs)


def test_a_teacher_without_all_ids_of_the_tokenizer_is_refused(tiny_base, tmp_path):
    small = {
        "_component_": "torchtune.models.llama3.llama3",
        **OmegaConf.load(ROOT / "configs/tiny/opsd.yaml").model,
        "vocab_size": 80,
    }
    scratch = {"_component_": "pidistill.models.from_scratch", "checkpoint_dir": str(tmp_path / "scratch")}
    scratch |= {"model": {}, "hf_config": {}, "model_type": "LLAMA3"}
    with pytest.raises(InputError, match="the teacher's vocabulary is 80 and the student's tokenizer has 85 ids"):
        run("opsd", other_teacher(tiny_base, tmp_path, teacher_model=small, teacher_checkpointer=scratch))
