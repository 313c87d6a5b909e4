"""Decoders of transformers from their config.json: what is built, what is planned, and what is refused before weights load."""

import importlib.util
import json

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

import transformers

from pidistill.commands.plan.shape import model_shape
from pidistill.errors import InputError
from pidistill.models import HFCheckpointer, from_folder, hf_decoder
from pidistill.models.empty import empty_model
from pidistill.models.fits import check_fits
from pidistill.models.hf_checks import check_forward
from pidistill.models.protocol import Decoder, carried_state, has_own_names
from pidistill.testing import tiny_model
from pidistill.training.load import _keep_buffers
from tests.support.hf_families import FAMILIES, HYBRIDS, ROPE, SIZES, decoder_of, make_config, reference_model

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def folder_of(config, tmp_path, **changes):
    config.save_pretrained(tmp_path)
    if changes:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(tmp_path)


def node(folder, **more):
    return {"_component_": "pidistill.models.from_folder", "path": folder, **more}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_built_without_weights_and_planned(name, tmp_path):
    folder = folder_of(make_config(name), tmp_path)
    model = empty_model(node(folder, backend="transformers"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert isinstance(model, Decoder) and has_own_names(model) and bool(carried_state(model)) == (name in HYBRIDS)
    shape = model_shape(model)
    assert shape.layers == 4 and shape.heads == 4 and shape.vocabulary == 50 and min(shape.saved_bytes, shape.maps) > 0


@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("Starcoder2Config", {"residual_dropout": 0.3, "embedding_dropout": 0.3, "sliding_window": None}),
        ("SeedOssConfig", {"residual_dropout": 0.3, "head_dim": 16}),
        ("MixtralConfig", {"router_jitter_noise": 0.3, "sliding_window": None}),
        ("BioGptConfig", {"layerdrop": 0.5, "hidden_dropout_prob": 0.3}),
        ("PhimoeConfig", {"input_jitter_noise": 0.3, "num_local_experts": 4, "sliding_window": None}),
    ],
)
def test_what_a_family_draws_in_training_changes_no_training_forward(kind, noise, tmp_path):
    rotations = {} if kind == "BioGptConfig" else {"rope_parameters": dict(ROPE)}
    config = getattr(transformers, kind)(**SIZES, **rotations, **noise)
    torch.manual_seed(0)
    model = from_folder(folder_of(config, tmp_path))
    tokens = torch.arange(12)[None]
    trained = model.train()(tokens)
    assert model.training
    torch.testing.assert_close(trained, model(tokens), rtol=0, atol=0)
    torch.testing.assert_close(trained, model.eval()(tokens), rtol=0, atol=0)


def test_a_setting_that_is_noise_in_training_alone_keeps_its_value(tmp_path):
    """PhiMoE's `router_jitter_noise` also says which experts share a token in evaluation."""
    config = transformers.PhimoeConfig(
        **SIZES, rope_parameters=dict(ROPE), router_jitter_noise=0.3, num_local_experts=4, sliding_window=None
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    ours = decoder_of(theirs).train()(tokens)
    torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_decoder_is_built_without_a_warning_about_gradients(tmp_path, recwarn):
    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        from_folder(folder_of(make_config("gemma2, caps"), tmp_path))
    finally:
        torch.set_warn_always(False)
    assert not [str(warning.message) for warning in recwarn if "requires_grad" in str(warning.message)]


def test_the_plan_of_both_backends_is_the_same(tmp_path):
    folder = folder_of(make_config("llama, tied (SmolLM2)"), tmp_path)
    ours, theirs = (model_shape(empty_model(node(folder, backend=backend))) for backend in ("torchtune", "transformers"))
    for key in ("parameters", "maps", "head", "tied", "heads", "kv_heads", "head_dim", "widest", "saved_bytes"):
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("name", ["llama, tied (SmolLM2)", "qwen3", "mistral, window", "gemma3", "qwen3_moe"])
def test_auto_takes_torchtunes_modules_where_they_compute_the_model(name, tmp_path):
    model = empty_model(node(folder_of(make_config(name), tmp_path)))
    assert has_own_names(model) == (name not in ("llama, tied (SmolLM2)", "qwen3"))


def test_torchtunes_decoder_satisfies_the_protocol():
    assert isinstance(tiny_model(50), Decoder) and not has_own_names(tiny_model(50))


REFUSED = {
    "encoder": (lambda: transformers.T5Config(d_model=32, num_layers=1, num_heads=2), {}, "an encoder with a decoder"),
    "quantised": (
        lambda: make_config("qwen3"),
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"quantised \(gptq.*unquantised model",
    ),
    "images": (
        lambda: transformers.Gemma3Config(
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "num_attention_heads": 2},
            vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        ),
        {},
        "takes images or sounds beside text",
    ),
    "no interface": (
        lambda: transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2),
        {"max_position_embeddings": 128},
        "does not take its attention and its masks from transformers' attention interface",
    ),
    "unknown": (lambda: make_config("qwen3"), {"model_type": "nobodys"}, "transformers cannot read .*config.json"),
    "dynamic rotations": (
        lambda: make_config("qwen3"),
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}},
        "change with the length of a batch beyond 64 tokens; set model.max_seq_len=64",
    ),
    "state lost between turns": (
        lambda: transformers.JambaConfig(**SMALL, intermediate_size=32, num_experts=2),
        {},
        "forget their state where they read several tokens at once",
    ),
    "time steps limited in rows alone": (
        lambda: make_config("bamba"),
        {"time_step_limit": [0.001, 10.0]},
        r"keep their time steps within \[\(0.001, 10.0\)\] where they read a row",
    ),
    "later tokens": (lambda: make_config("gemma3"), {"use_bidirectional_attention": True}, "lets a token see those after it"),
    "biased head": (
        lambda: transformers.PhiConfig(**SMALL, intermediate_size=32, bos_token_id=None, eos_token_id=None),
        {},
        "an output head with a bias",
    ),
    "a mask of its own": (
        lambda: transformers.DogeConfig(**SIZES, rope_parameters=dict(ROPE)),
        {},
        r"DogeForCausalLM of transformers does not take the masks and states .*no attribute 'dtype'\); choose another model",
    ),
    "a cache of its own": (
        lambda: transformers.MiniMaxConfig(
            **SIZES,
            rope_parameters=dict(ROPE),
            num_local_experts=4,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        {},
        r"MiniMaxForCausalLM of transformers does not take the masks and states .*cache of its own.*choose another model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_from_config_json(case, tmp_path):
    make, changes, sentence = REFUSED[case]
    folder = folder_of(make(), tmp_path, **changes)
    with pytest.raises(InputError, match=sentence):
        empty_model(node(folder))


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "qwen3_5, hybrid"])
def test_the_trial_of_a_models_code_changes_neither_the_model_nor_what_is_drawn(name, device, tmp_path, monkeypatch):
    folder, decoders = folder_of(make_config(name), tmp_path), []

    def checked(decoder, path):
        before, state = {n: (id(x), x._version) for n, x in decoder.state_dict(keep_vars=True).items()}, torch.get_rng_state()
        check_forward(decoder, path)
        assert {n: (id(x), x._version) for n, x in decoder.state_dict(keep_vars=True).items()} == before
        assert torch.equal(torch.get_rng_state(), state)
        decoders.append(decoder)

    monkeypatch.setattr(hf_decoder, "check_forward", checked)
    with torch.device(device):
        model = from_folder(folder, backend="transformers")
    assert decoders == [model] and len(model.layers) == 4
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_the_trial_of_a_models_code_reads_layers_until_each_kind_was_met(tmp_path, monkeypatch):
    calls, forward = [], transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer.forward

    def counted(self, *arguments, **more):
        calls.append(self)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer, "forward", counted)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    empty_model(node(folder_of(make_config("gemma3", num_hidden_layers=12, layer_types=kinds), tmp_path)))
    assert len(calls) == 3


@pytest.mark.parametrize("error", [IndexError, NotImplementedError])
def test_a_model_whose_code_needs_all_layers_or_more_than_the_meta_device_is_not_refused(error, tmp_path, monkeypatch):
    """torch raises NotImplementedError on the meta device, for example where code asks which elements are not zero."""
    body, tried = transformers.Qwen3Model.forward, []

    def failing(self, *arguments, **more):
        tried.append(len(self.layers))
        if error is NotImplementedError or len(self.layers) < self.config.num_hidden_layers:
            raise error("of a test")
        return body(self, *arguments, **more)

    monkeypatch.setattr(transformers.Qwen3Model, "forward", failing)
    model = empty_model(node(folder_of(make_config("qwen3"), tmp_path), backend="transformers"))
    assert len(model.layers) == 4 and tried == ([1] if error is NotImplementedError else [1, 4])


def test_code_in_a_folder_is_not_run(tmp_path):
    folder = folder_of(make_config("gemma3"), tmp_path, auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    empty_model(node(folder))
    unknown = folder_of(make_config("gemma3"), tmp_path, model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(InputError, match="transformers cannot read"):
        empty_model(node(unknown))
    assert not (tmp_path / "ran").exists()


WRONG = {
    "hidden_size": ["wide", -1, 0],
    "num_hidden_layers": [0, 10**7],
    "num_attention_heads": [0, -2],
    "vocab_size": [0, 10**30],
    "layer_types": [["full_attention"] * 3],
    "query_pre_attn_scalar": [0],
    "rope_parameters": [7],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_in_config_json_is_refused_in_one_sentence(key, tmp_path):
    for value in WRONG[key]:
        folder = folder_of(make_config("gemma3"), tmp_path, **{key: value})
        with pytest.raises(InputError, match=r"config\.json|cannot build the model in"):
            empty_model(node(folder))


@pytest.mark.parametrize("kernel", ["flash_attention_2", "nobody/code"])
def test_a_kernel_that_config_json_names_is_not_loaded(kernel, tmp_path, monkeypatch):
    """transformers downloads and imports a kernel of such a name where the package kernels is installed."""
    reference = reference_model("gemma3")
    reference.save_pretrained(tmp_path / "one")
    folder = folder_of(reference.config, tmp_path / "one", attn_implementation=kernel, experts_implementation=kernel)
    asked = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *names, **_: asked.append(names))
    weights = HFCheckpointer(folder, str(tmp_path / "out"))
    loaded = weights.load_checkpoint()["model"]
    weights.save_checkpoint({"model": loaded}, epoch=0)
    empty_model(node(folder))
    assert not asked
    saved = json.loads((tmp_path / "out" / "epoch_0" / "config.json").read_text())
    assert not any("implementation" in name for name in saved)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    folder, find = folder_of(make_config("gemma3"), tmp_path), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name, *more))
    with pytest.raises(
        InputError, match=r"model_type 'gemma3_text', and transformers.*pip install 'pidistill\[transformers\]'"
    ):
        from_folder(folder)
    with pytest.raises(InputError, match="model.backend=nothing is unknown; choose one of auto"):
        from_folder(folder, backend="nothing")


def test_logits_that_are_no_function_of_the_head_are_refused(monkeypatch, tmp_path):
    forward = transformers.Qwen3ForCausalLM.forward

    def squared(self, *arguments, **more):
        output = forward(self, *arguments, **more)
        output.logits = output.logits**2
        return output

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", squared)
    with pytest.raises(InputError, match="in another way than by a linear head, a scale and a cap"):
        empty_model(node(folder_of(make_config("qwen3"), tmp_path), backend="transformers"))


def test_a_transformers_that_hands_states_over_otherwise_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.Qwen3_5TextModel, "forward", lambda self, input_ids=None, past_key_values=None: None)
    monkeypatch.setattr("pidistill.models.hf_decoder._logit_scale", lambda *_: 1.0)
    with pytest.raises(
        InputError, match=r"carry a state .* in another way than 5.24; run `pip install 'transformers>=5.24,<6'`"
    ):
        empty_model(node(folder_of(make_config("qwen3_5, hybrid"), tmp_path)))


def test_adapters_take_the_models_own_names(tmp_path):
    folder = folder_of(make_config("phi3"), tmp_path)
    model = empty_model(node(folder, lora_attn_modules=["qkv_proj", "output_proj"], apply_lora_to_mlp=True))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "adapter_params")}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with pytest.raises(InputError, match="has q_proj, and the attention of this model has o_proj, qkv_proj"):
        empty_model(node(folder, lora_attn_modules=["q_proj"]))
    with pytest.raises(InputError, match="tied"):
        empty_model(node(folder, lora_attn_modules=["qkv_proj"], apply_lora_to_output=True))


@pytest.mark.parametrize("backend", ["torchtune", "transformers"])
def test_an_auxiliary_loss_of_no_experts_is_refused(backend, tmp_path):
    with pytest.raises(InputError, match=r"remove model\.router_loss_weight"):
        empty_model(node(folder_of(make_config("qwen3"), tmp_path), backend=backend, router_loss_weight=0.1))


def test_another_folder_than_the_models_is_refused(tmp_path):
    reference_model("gemma3").save_pretrained(tmp_path / "one")
    reference_model("gemma3", hidden_size=32).save_pretrained(tmp_path / "other")
    model = empty_model(node(str(tmp_path / "one")))
    checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(tmp_path / "one")}
    check_fits(model, checkpointer, "from_folder", "checkpointer")
    with pytest.raises(InputError, match=r"hidden_size=32.*hidden_size=64; set model.path"):
        check_fits(model, checkpointer | {"checkpoint_dir": str(tmp_path / "other")}, "from_folder", "checkpointer")
    torchtunes = checkpointer | {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_files": []}
    with pytest.raises(InputError, match=r"set checkpointer\._component_=pidistill\.models\.HFCheckpointer"):
        check_fits(model, torchtunes, "from_folder", "checkpointer")


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    reference_model("gemma3").save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        HFCheckpointer(str(tmp_path / "one"), str(tmp_path / "out")).load_checkpoint()
    checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(tmp_path / "one")}
    with pytest.raises(InputError, match=r"has no tensor model.layers.1.mlp.up_proj.weight"):
        check_fits(empty_model(node(str(tmp_path / "one"))), checkpointer, "from_folder", "checkpointer")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Glm4MoeConfig", {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                           "moe_intermediate_size": 32, "first_k_dense_replace": 3}),
        ("GPTNeoXConfig", {"tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_a_folder_with_other_names_for_a_few_weights_fits(kind, more, tmp_path):
    """Experts of the last layer one by one; Pythia's head is `embed_out`."""
    config = getattr(transformers, kind)(**SIZES, rope_parameters=dict(ROPE), **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(tmp_path)}
    check_fits(empty_model(node(str(tmp_path))), checkpointer, "from_folder", "checkpointer")


def test_the_text_model_of_a_folder_with_images_is_taken_and_saved(tmp_path):
    """Qwen3.5's folders on the Hub are of this kind: the text model's config and weights are one level down."""
    config = transformers.Qwen3_5Config(
        text_config=make_config("qwen3_5, hybrid").to_dict(),
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
        tie_word_embeddings=True,
    )
    both = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    both.save_pretrained(tmp_path / "both")
    model = empty_model(node(str(tmp_path / "both")))
    checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(tmp_path / "both")}
    check_fits(model, checkpointer, "from_folder", "checkpointer")
    weights = HFCheckpointer(str(tmp_path / "both"), str(tmp_path / "out"))
    loaded = weights.load_checkpoint()["model"]
    assert loaded.keys() == model.state_dict().keys()
    weights.save_checkpoint({"model": loaded}, epoch=0)
    check_fits(model, checkpointer | {"checkpoint_dir": str(tmp_path / "out" / "epoch_0")}, "from_folder", "checkpointer")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "epoch_0").eval()
    ids = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(saved(ids).logits, both(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    reference_model("qwen3_5, hybrid", hidden_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"hidden_size=32.*hidden_size=64; set model.path"):
        check_fits(model, checkpointer | {"checkpoint_dir": str(tmp_path / "other")}, "from_folder", "checkpointer")


def test_quantised_weights_of_the_folder_are_refused_whatever_the_models_folder_says(tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("one", "said", "unsaid"):
        reference_model("gemma3").save_pretrained(tmp_path / name)
    model = empty_model(node(str(tmp_path / "one")))
    folder_of(make_config("gemma3"), tmp_path / "said", quantization_config={"quant_method": "gptq", "bits": 4})
    path = tmp_path / "unsaid" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})
    for name, kind in (("said", "gptq"), ("unsaid", r"up_proj\.weight is of type F8_E4M3")):
        checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(tmp_path / name)}
        with pytest.raises(InputError, match=rf"quantised \(.*{kind}.* to the unquantised model"):
            check_fits(model, checkpointer, "from_folder", "checkpointer")


def test_files_that_transformers_would_not_read_are_refused(tmp_path):
    reference_model("gemma3").save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "other.safetensors").write_bytes((tmp_path / "one" / "model.safetensors").read_bytes())
    HFCheckpointer(str(tmp_path / "one"), str(tmp_path / "out"), checkpoint_files=["model.safetensors"])
    with pytest.raises(InputError, match=r"lists other\.safetensors.*remove checkpointer\.checkpoint_files"):
        HFCheckpointer(str(tmp_path / "one"), str(tmp_path / "out"), checkpoint_files=["other.safetensors"])


def test_buffers_from_the_config_are_those_of_transformers(tmp_path):
    """Frequencies and scales are in no checkpoint; they are made with the model, which has no weights yet."""
    reference = reference_model("gemma3")
    model = empty_model(node(folder_of(reference.config, tmp_path)))
    model.rope_init()
    ours = dict(model.named_buffers())
    assert ours and ours.keys() == dict(reference.named_buffers()).keys()
    for name, buffer in reference.named_buffers():
        assert torch.equal(ours[name], buffer), name


def test_a_scale_that_is_a_buffer_is_not_trained_after_torchtunes_loader(tmp_path):
    """torchtune's loader for several processes makes a parameter of every tensor, and Gemma 4 keeps a scale per layer."""
    model = decoder_of(reference_model("gemma4"))
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    trained = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: torch.nn.Parameter(t) for name, t in model.state_dict().items()}, assign=True)
    assert len(buffers) == 4 and set(buffers) <= dict(model.named_parameters()).keys()
    _keep_buffers(model, buffers, torch.device("cpu"))
    assert [name for name, _ in model.named_parameters()] == trained
    assert set(buffers) <= model.state_dict().keys() and not dict(model.named_buffers())[buffers[0]].requires_grad
