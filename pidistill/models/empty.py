"""A model's shape without its weights."""

from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from pidistill.config import build
from pidistill.errors import InputError
from pidistill.models.nf4 import give_out_whole_weights


def empty_model(node: Any) -> TransformerDecoder:
    """A model's shape without its weights, on the meta device.

    Raises:
        InputError: model.quantize_base=True and torchao cannot store a matrix of the model in 4 bits.
    """
    try:
        with torch.device("meta"):
            model = build(node)
        give_out_whole_weights(model)
        return model
    except AssertionError as error:
        if not node.get("quantize_base", False):
            raise
        raise InputError(
            f"model.quantize_base=True cannot store this model in 4 bits ({' '.join(str(error).split())}): every matrix needs "
            "a multiple of 64*256 elements; set model.quantize_base=False"
        ) from error
