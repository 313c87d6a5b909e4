"""Models that torchtune lacks, and checkpoints in Hugging Face's format."""

from pidistill.models.from_folder import from_folder
from pidistill.models.from_scratch import from_scratch
from pidistill.models.hf_checkpointer import HFCheckpointer
from pidistill.models.hf_format import from_hf, to_hf
from pidistill.models.qwen3_model import (
    lora_qwen3,
    lora_qwen3_0_6b,
    lora_qwen3_1_7b,
    lora_qwen3_4b,
    lora_qwen3_8b,
    lora_qwen3_14b,
    lora_qwen3_32b,
    qwen3,
    qwen3_0_6b,
    qwen3_1_7b,
    qwen3_4b,
    qwen3_8b,
    qwen3_14b,
    qwen3_32b,
)
from pidistill.models.r1_distill import (
    lora_r1_distill_qwen_1_5b,
    lora_r1_distill_qwen_7b,
    r1_distill_qwen_1_5b,
    r1_distill_qwen_7b,
)

__all__ = [
    "HFCheckpointer",
    "from_folder",
    "from_hf",
    "from_scratch",
    "lora_qwen3",
    "lora_qwen3_0_6b",
    "lora_qwen3_1_7b",
    "lora_qwen3_4b",
    "lora_qwen3_8b",
    "lora_qwen3_14b",
    "lora_qwen3_32b",
    "lora_r1_distill_qwen_1_5b",
    "lora_r1_distill_qwen_7b",
    "qwen3",
    "qwen3_0_6b",
    "qwen3_1_7b",
    "qwen3_4b",
    "qwen3_8b",
    "qwen3_14b",
    "qwen3_32b",
    "r1_distill_qwen_1_5b",
    "r1_distill_qwen_7b",
    "to_hf",
]
