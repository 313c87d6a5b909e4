"""Test adapters in PEFT's format: peft makes the recipe's model of a folder, and the reverse; a wrong folder is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.models.llama3 import llama3
from torchtune.models.qwen2 import qwen2
from torchtune.modules.peft import get_adapter_params

from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models import HFCheckpointer, adapter_dir, peft_format, qwen3
from pidistill.models.adapters import _dora_forward, merged
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, tiny_hf_checkpoint
from pidistill.training.load import load_model
from tests.support.builders import CPU

VOCABULARY = 40
TOKENS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
EVERYWHERE = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": True,
    "lora_rank": 4,
    "lora_alpha": 6.0,
}
# family: (tiny_hf_checkpoint's arguments, plain builder)
FAMILIES = {
    "llama": ({"family": "llama"}, llama3),
    "qwen2": ({"family": "qwen2"}, qwen2),
    "qwen3": ({"family": "qwen3"}, qwen3),
    "qwen2 tied": ({"family": "qwen2", "tied": True}, qwen2),
}


class Base:
    """A random base in Hugging Face's format, its weights under torchtune's names, and models that hold them."""

    def __init__(self, folder: Path, family: str) -> None:
        made, self._plain = FAMILIES[family]
        self.folder, self.family = tiny_hf_checkpoint(folder / "base", vocab_size=VOCABULARY, **made), family
        self.sizes = TINY_SIZES | {"vocab_size": VOCABULARY}
        if made["family"] != "llama":
            self.sizes["tie_word_embeddings"] = made.get("tied", False)
        if made["family"] == "qwen3":
            self.sizes["head_dim"] = QWEN3_HEAD_DIM
        loader = HFCheckpointer(str(self.folder), output_dir=str(folder / "unused"))
        self.weights = loader.load_checkpoint()["model"]
        self.config = adapter_dir.base_config(str(self.folder))

    def plain(self, weights=None):
        model = self._plain(**self.sizes)
        model.load_state_dict(self.weights if weights is None else weights)
        return model

    def adapted(self, **changes):
        """With adapters everywhere that have been trained, as far as a test is concerned."""
        arguments = EVERYWHERE | {"apply_lora_to_output": self.family != "qwen2 tied"} | changes
        cfg = config_with(self, self.folder, **arguments)
        model = load_model(cfg, Run(CPU, torch.float32, 0, 1, 0, self.folder), cfg.model, self.weights, trained=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in get_adapter_params(model).values():
                parameter.mul_(torch.rand(parameter.shape, generator=generator).add(0.5))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        return model


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return Base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("llama"), "llama")


def saved(base, folder, **changes):
    model = base.adapted(**changes)
    peft_format.write(folder, model, model.state_dict(), base.config, str(base.folder))
    return model


def config_with(base, folder, **model):
    """A recipe's config of ``base`` and the adapter in ``folder``, as far as adapters read it."""
    family = base.family.split()[0]
    place = {"llama": "torchtune.models.llama3", "qwen2": "torchtune.models.qwen2", "qwen3": "pidistill.models"}[family]
    name = f"{place}.{'lora_' if model else ''}{'llama3' if family == 'llama' else family}"
    node = {"_component_": name, **base.sizes, **model}
    return OmegaConf.create({"adapter_dir": str(folder), "model": node, "checkpointer": {"checkpoint_dir": str(base.folder)}})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_makes_the_same_model_of_the_folder(base, dora, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="the test extra has peft")
    from transformers import AutoModelForCausalLM

    # It refuses to run beside a torchao below 0.16, which torchtune needs, even where it has no use for torchao.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    model = saved(base, tmp_path, use_dora=dora)
    original = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    before = original(TOKENS).logits
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(original, tmp_path)(TOKENS).logits
        ours = model(TOKENS)
    assert (ours - before).abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, dora)
    assert config["base_model_name_or_path"] == str(base.folder)
    assert ("lm_head" in config["target_modules"]) == (base.family != "qwen2 tied")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_make_the_live_model(base, dora):
    model = base.adapted(use_dora=dora)
    weights = merged(model, model.state_dict())
    assert weights.keys() == base.weights.keys()
    torch.testing.assert_close(base.plain(weights)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_several_ranks_and_alphas_are_merged_saved_and_read(llama, tmp_path):
    model, other = llama.adapted(), llama.adapted(lora_rank=2, lora_alpha=10.0)
    model.layers[1] = copy.deepcopy(other.layers[1])
    plain = llama.plain(merged(model, model.state_dict()))
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    peft_format.write(tmp_path, model, model.state_dict(), llama.config, "base")
    read = peft_format.read(tmp_path, llama.config)
    assert read.alphas["layers.0.mlp.w1"] == 6.0 and read.rank("layers.0.mlp.w1") == 4
    assert read.alphas["layers.1.mlp.w1"] == 10.0 and read.rank("layers.1.mlp.w1") == 2
    adapter_dir.check_fits(read, model)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_that_was_written_is_read_to_the_bit(base, dora, tmp_path):
    model = saved(base, tmp_path, use_dora=dora)
    read = peft_format.read(tmp_path, base.config)
    own = get_adapter_params(model)
    assert read.tensors.keys() == own.keys() and read.dora == dora
    for name, parameter in own.items():
        assert torch.equal(read.tensors[name], parameter), name


def test_a_model_with_adapters_takes_it_and_a_plain_one_is_merged(base, tmp_path):
    model = saved(base, tmp_path, use_dora=True)
    changes = EVERYWHERE | {"apply_lora_to_output": base.family != "qwen2 tied", "use_dora": True}
    adapted, plain = config_with(base, tmp_path, **changes), config_with(base, tmp_path)
    for cfg in (adapted, plain):
        adapter_dir.check_adapter_dir(cfg)
    beside = adapter_dir.with_adapter_dir(adapted, adapted.model, base.weights)
    assert beside.keys() == model.state_dict().keys()
    inside = base.plain(adapter_dir.with_adapter_dir(plain, plain.model, base.weights))
    torch.testing.assert_close(inside(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    cfg = OmegaConf.create({"model": {}})
    assert adapter_dir.with_adapter_dir(cfg, cfg.model, base.weights) is base.weights


def test_an_adapter_is_not_put_on_weights_that_have_it_already(llama, tmp_path):
    """A run's own checkpoint and its adapter/: the adapter would count twice. Trained beside that checkpoint, it fits."""
    merged_folder = tmp_path / "step_2"
    model = saved(llama, merged_folder / "adapter")
    (merged_folder / "config.json").write_text(json.dumps(llama.config))
    cfg = config_with(llama, merged_folder / "adapter", **EVERYWHERE)
    adapter_dir.check_adapter_dir(cfg)
    cfg.checkpointer.checkpoint_dir = str(merged_folder)
    with pytest.raises(InputError, match=r"step_2 holds weights that have an adapter of .*base in them.*remove adapter_dir"):
        adapter_dir.check_adapter_dir(cfg)
    peft_format.write(tmp_path / "next", model, model.state_dict(), llama.config, str(merged_folder))
    cfg.adapter_dir = str(tmp_path / "next")
    adapter_dir.check_adapter_dir(cfg)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", '{"peft_type": "LORA", "r": 4', r"adapter_config.json"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 4}', r"adapter_config.json has no lora_alpha.*check adapter_dir"),
        ("adapter_model.safetensors", "version https://git-lfs", r"23 bytes\) is not a whole safetensors file.*fetch it again"),
    ],
)
def test_a_broken_folder_is_refused(name, content, message, llama, tmp_path):
    saved(llama, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        peft_format.read(tmp_path, llama.config)


def test_a_bias_is_not_scaled_by_doras_magnitude(tmp_path):
    """With the magnitude doubled the output doubles but for the bias."""
    base = Base(tmp_path, "qwen2")
    layer = base.adapted(use_dora=True).layers[0].attn.q_proj
    x = torch.randn(5, TINY_SIZES["embed_dim"], generator=torch.Generator().manual_seed(2))
    once = layer(x) - layer.bias
    with torch.no_grad():
        layer.magnitude.mul_(2.0)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * once)
    layer.disabled = True
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_the_bias_free_forward_is_torchtunes_where_there_is_no_bias(llama):
    """Values and gradients of the forward that stands in for torchtune's, on a layer where that one is right."""
    layer = llama.adapted(use_dora=True).layers[0].mlp.w1
    layer.requires_grad_(True)
    x = torch.randn(5, TINY_SIZES["embed_dim"], generator=torch.Generator().manual_seed(2))
    theirs = layer(x)
    gradients = torch.autograd.grad(theirs.square().sum(), [layer.magnitude, layer.lora_a.weight, layer.lora_b.weight])
    layer.register_parameter("bias", torch.nn.Parameter(torch.zeros(layer.out_dim)))
    ours = _dora_forward(layer, x)
    torch.testing.assert_close(ours, theirs)
    again = torch.autograd.grad(ours.square().sum(), [layer.magnitude, layer.lora_a.weight, layer.lora_b.weight])
    torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"has lora_rank=4 on .*q_proj and `model` 8; set model.lora_rank=4"),
        ({"lora_alpha": 16.0}, r"has lora_alpha=6 on .* and `model` 16; set model.lora_alpha=6"),
        ({"use_dora": True}, r"has use_dora=False on .* and `model` True; set model.use_dora=False"),
        (
            {"lora_attn_modules": ["q_proj"]},
            r"adapts 15 layers \(down_proj, .*\) and `model` 9 \(.*\); set model.lora_attn_modules and model",
        ),
        (
            {"apply_lora_to_output": False},
            r"adapts 15 layers .* an adapter of the output head is not trained here: set a `model` without adapters",
        ),
        ({"embed_dim": 32}, r"of another base: it adapts .*k_proj of 32x64, and `model` has 16x32"),
        ({"num_layers": 1}, r"of another base: it adapts model.layers.1.* `model` has no such weight"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_key_to_change(llama, changes, message, tmp_path):
    saved(llama, tmp_path)
    cfg = config_with(llama, tmp_path, **(EVERYWHERE | changes))
    with pytest.raises(InputError, match=message):
        adapter_dir.check_adapter_dir(cfg)


def without_a_tensor(folder):
    tensors = load_file(folder / peft_format.WEIGHTS)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, folder / peft_format.WEIGHTS)


def with_a_tensor(folder):
    tensors = load_file(folder / peft_format.WEIGHTS)
    save_file(tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}, folder / peft_format.WEIGHTS)


def with_config(**changes):
    def change(folder):
        path = folder / peft_format.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight; the file is incomplete"),
        (with_a_tensor, "has a tensor .*lora_embedding_A, and adapters are read for"),
        (with_config(r=3), "says rank 3 for .* and its tensors have 4"),
        (with_config(use_rslora=True), "has use_rslora=True, and only plain LoRA and DoRA can be read"),
        (with_config(peft_type="IA3"), "has peft_type=IA3"),
        (with_config(init_lora_weights="pissa_niter_4"), "has init_lora_weights=pissa_niter_4"),
        (lambda folder: (folder / peft_format.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    ],
)
def test_a_damaged_or_other_adapter_is_refused(llama, damage, message, tmp_path):
    saved(llama, tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        adapter_dir.check_adapter_dir(config_with(llama, tmp_path, **EVERYWHERE))


def test_an_adapter_of_an_unknown_family_is_not_guessed(llama, tmp_path):
    saved(llama, tmp_path)
    with pytest.raises(InputError, match="adapters are read for llama, .* has model_type 'gemma'"):
        peft_format.read(tmp_path, llama.config | {"model_type": "gemma"})
