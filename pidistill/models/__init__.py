"""Build models that torchtune lacks, and read and write their weights in Hugging Face's format.

In: a model folder (config.json, safetensors files), the builder that the config names, a PEFT adapter.
Out: torchtune decoders and state dicts in torchtune's names; folders that transformers and PEFT load.

Read hf_checkpointer.py first: how a folder is loaded and saved. hf_folder.py and config_json.py read what a folder holds, and
trust none of it; fits.py compares it with the model; hf_format.py and peft_format.py convert weights and adapters, and
adapter_dir.py puts an adapter onto a base. from_folder.py and decoder.py build a model from its config.json; adapters.py,
nf4.py, precision.py and offloading.py change how a model computes; empty.py gives the model without weights that every check
looks at.
"""

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
