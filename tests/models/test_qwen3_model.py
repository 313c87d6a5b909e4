"""Test Qwen3 from torchtune's modules: published sizes, the place of the norms, adapters. Logits: test_hf_checkpointer.py."""

import warnings

import pytest
import torch
from torchtune import training
from torchtune.modules import MultiHeadAttention
from torchtune.modules.peft import get_adapter_params

import pidistill.models as models
from pidistill.commands.plan.shape import model_shape
from pidistill.errors import InputError
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, perturb_weights

# Billions of parameters, a tied head counted once.
PUBLISHED = {
    "qwen3_0_6b": 0.596,
    "qwen3_1_7b": 1.721,
    "qwen3_4b": 4.022,
    "qwen3_8b": 8.191,
    "qwen3_14b": 14.768,
    "qwen3_32b": 32.762,
    "r1_distill_qwen_1_5b": 1.777,
    "r1_distill_qwen_7b": 7.616,
}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 2, "lora_alpha": 4.0}
SIZES = TINY_SIZES | {"vocab_size": 50, "head_dim": QWEN3_HEAD_DIM}


def on_meta(name, **arguments):
    with torch.device("meta"):
        return getattr(models, name)(**arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones_with_and_without_adapters(name):
    model, adapted = on_meta(name), on_meta(f"lora_{name}", **LORA, apply_lora_to_mlp=True)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], abs=5e-4)
    adapters = get_adapter_params(adapted)
    assert len(adapters) == 2 * 5 * len(model.layers)
    rest = {key: p.shape for key, p in adapted.named_parameters() if key not in adapters}
    assert rest == {key: p.shape for key, p in model.named_parameters()}
    # One table of rotations for all layers; a gigabyte otherwise.
    assert sum(b.numel() * b.element_size() for b in adapted.buffers()) < 50e6


def test_siblings_of_a_size_differ_by_arguments():
    model = on_meta("qwen3_4b", rope_base=5_000_000, max_seq_len=1024)
    assert model.max_seq_len == 1024 and model.layers[0].attn.pos_embeddings.base == 5_000_000
    assert on_meta("qwen3_4b").layers[0].attn.pos_embeddings.base == 1_000_000


@torch.no_grad()
def test_norms_stand_before_the_rotation_where_torchtunes_stand_after():
    torch.manual_seed(0)
    model, tokens = models.qwen3(**SIZES), torch.arange(12)[None]

    def with_stock_attention():
        for layer in model.layers:
            layer.attn.__class__ = MultiHeadAttention
        logits = model(tokens)
        for layer in model.layers:
            layer.attn.__class__ = type(models.qwen3(**SIZES).layers[0].attn)
        return logits

    torch.testing.assert_close(model(tokens), with_stock_attention(), rtol=1e-4, atol=1e-5)  # weights of one hide it
    perturb_weights(model)
    assert (model(tokens) - with_stock_attention()).abs().max() > 0.01


def test_adapters_reach_every_layer_that_is_named_and_start_as_nothing():
    torch.manual_seed(0)
    every = ["q_proj", "k_proj", "v_proj", "output_proj"]
    lora = LORA | {"lora_attn_modules": every, "apply_lora_to_mlp": True, "apply_lora_to_output": True}
    for dora in (False, True):
        adapted, plain = models.lora_qwen3(**SIZES, **lora, use_dora=dora), models.qwen3(**SIZES)
        adapters = get_adapter_params(adapted)
        assert len(adapters) == (2 + dora) * (7 * TINY_SIZES["num_layers"] + 1)
        plain.load_state_dict({k: t for k, t in adapted.state_dict().items() if k not in adapters})
        if not dora:  # a DoRA layer's magnitude is set as weights are loaded
            torch.testing.assert_close(adapted(torch.arange(9)[None]), plain(torch.arange(9)[None]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_attn_modules": []}, "lora_attn_modules is empty; choose one or more of q_proj"),
        ({"lora_attn_modules": ["q_proj", "o_proj"]}, "lora_attn_modules has o_proj; choose"),
        ({"tie_word_embeddings": True, "apply_lora_to_output": True}, "set model.apply_lora_to_output=False"),
    ],
)
def test_adapters_that_the_model_cannot_have_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        models.lora_qwen3(**SIZES | LORA | changes)


def test_the_plan_reads_the_head_width_of_the_model_not_of_the_quotient():
    shape = model_shape(on_meta("qwen3_0_6b"))
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.width) == (16, 8, 128, 1024)
    assert shape.kv_bytes == 2 * 28 * 8 * 128 * 4
    assert shape.tied and shape.parameters == 596_049_920


def test_the_plan_of_a_bf16_model_gives_no_warning():
    """torch gives a warning of its C++ code once per process, unless it is asked for all of them."""
    always = torch.is_warn_always_enabled()
    try:
        torch.set_warn_always(True)
        with warnings.catch_warnings(), training.set_default_dtype(torch.bfloat16):
            warnings.simplefilter("error")
            model_shape(on_meta("qwen3", **SIZES))
    finally:
        torch.set_warn_always(always)
