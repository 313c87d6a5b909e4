"""Build DeepSeek-R1-Distill-Qwen (arXiv 2501.12948): torchtune's Qwen2 in the sizes of Qwen2.5-Math, with its own head.

Sizes from config.json of deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B and -7B. Positions go up to 131,072 there; the tables here
end at 32,768, the longest answer that the models were evaluated with.
"""

from typing import Any

from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder

from pidistill.models.sized import sized, sized_lora


def _lora_qwen2(**arguments: Any) -> TransformerDecoder:
    model = lora_qwen2(**arguments)
    for layer in model.layers:  # torchtune gives every layer a table of its own: a gigabyte in all
        layer.attn.pos_embeddings = model.layers[0].attn.pos_embeddings
    return model


_COMMON = {"num_layers": 28, "max_seq_len": 32_768, "rope_base": 10_000.0, "norm_eps": 1e-6, "tie_word_embeddings": False}
_1_5B = {"vocab_size": 151_936, "num_heads": 12, "num_kv_heads": 2, "embed_dim": 1536, "intermediate_dim": 8960} | _COMMON
_7B = {"vocab_size": 152_064, "num_heads": 28, "num_kv_heads": 4, "embed_dim": 3584, "intermediate_dim": 18_944} | _COMMON

r1_distill_qwen_1_5b = sized("r1_distill_qwen_1_5b", qwen2, _1_5B)
r1_distill_qwen_7b = sized("r1_distill_qwen_7b", qwen2, _7B)

lora_r1_distill_qwen_1_5b = sized_lora("lora_r1_distill_qwen_1_5b", _lora_qwen2, _1_5B)
lora_r1_distill_qwen_7b = sized_lora("lora_r1_distill_qwen_7b", _lora_qwen2, _7B)
