"""Make small models as the Hub holds the families that people train, each with the builder that takes its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.training import MODEL_KEY

from pidistill.models import HFCheckpointer, qwen3
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, tiny_hf_checkpoint

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": float(TINY_SIZES["rope_base"]),
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name → (family, tied, config.json's other values, builder, its other arguments)
MODELS: dict[str, tuple[str, bool, dict[str, Any], Any, dict[str, Any]]] = {
    "qwen2": ("qwen2", False, {}, qwen2, {"tie_word_embeddings": False}),
    "qwen2, tied": ("qwen2", True, {}, qwen2, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", False, {}, qwen3, {"head_dim": QWEN3_HEAD_DIM}),
    "qwen3, tied": ("qwen3", True, {}, qwen3, {"head_dim": QWEN3_HEAD_DIM, "tie_word_embeddings": True}),
    "llama3": ("llama", False, {}, llama3, {}),
    "llama3.1": ("llama", False, {"rope_parameters": LLAMA31_ROPE, "max_position_embeddings": 131_072}, llama3_1, {}),
    "llama3.2, tied": ("llama", True, {}, llama3_2, {}),
    # Qwen2 with a head of its own, a short rotation base and another epsilon.
    "r1-distill-qwen": ("qwen2", False, {"rms_norm_eps": 1e-6}, qwen2, {"norm_eps": 1e-6}),
}
VOCABULARY = 128


def hub_folder(name: str, folder: Path, **more: Any) -> Path:
    family, tied, config, *_ = MODELS[name]
    return tiny_hf_checkpoint(folder, family, tied=tied, **({"vocab_size": VOCABULARY} | config | more))


def empty(name: str, **more: Any) -> nn.Module:
    *_, builder, arguments = MODELS[name]
    return builder(**(TINY_SIZES | {"vocab_size": VOCABULARY} | arguments | more))


def loaded(name: str, folder: Path, **more: Any) -> nn.Module:
    """The folder's weights in the builder's model; strict."""
    model = empty(name, **more)
    checkpointer = HFCheckpointer(checkpoint_dir=str(folder), output_dir=str(folder.parent / f".{folder.name}_out"))
    model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])
    return model.eval()


def reference(folder: Path) -> nn.Module:
    """What transformers makes of the folder, in fp32; a warning of missing or left over weights is an error."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: nn.Module, theirs: nn.Module, vocabulary: int = VOCABULARY, atol: float = 1e-4) -> None:
    tokens = torch.randint(vocabulary, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5, "logits this close to each other would agree under wrong weights too"
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=atol)
