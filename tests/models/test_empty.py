"""Test that the model without weights, which all checks of a start look at, is built once."""

import torch
from omegaconf import OmegaConf

from pidistill.models import empty
from pidistill.models.empty import empty_model, shared_empty_model
from pidistill.models.modules import attention_modules
from pidistill.testing import TINY_SIZES

NODE = {"_component_": "torchtune.models.llama3.llama3", "vocab_size": 40, **TINY_SIZES}


def test_the_same_config_gives_the_same_model_and_another_config_another_one():
    model = shared_empty_model(OmegaConf.create(NODE))
    assert shared_empty_model(dict(NODE)) is model
    assert shared_empty_model(NODE | {"vocab_size": 41}) is not model
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_is_filled_later_is_not_the_shared_one():
    assert empty_model(OmegaConf.create(NODE)) is not shared_empty_model(NODE)


def test_another_dtype_is_another_model():
    model = shared_empty_model(NODE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = shared_empty_model(NODE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (model.output.weight.dtype, other.output.weight.dtype) == (torch.float32, torch.bfloat16)


def test_every_attention_module_is_found_in_the_order_of_the_layers():
    model = empty.shared_empty_model(NODE)
    assert attention_modules(model) == [layer.attn for layer in model.layers]
