"""List the families whose configs take the model from its folder: a tiny checkpoint of each, and the sizes of headers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.hf_families import make_config, reference_model
from tests.support.newer_templates import GEMMA3, OLMO3, QWEN3_2507, QWEN35, SMOLLM2, newer_folder

METHODS = ("pi_distill", "opsd", "sdft", "evaluate")
VOCABULARY = 640


@dataclass(frozen=True)
class FolderFamily:
    """Holds what tests need to run the configs of a family.

    Attributes:
        model: the name of its tiny model in hf_families.py.
        template: its chat template, from newer_templates.py.
        published: size → config.json's values of the published model, for the memory that headers state.
    """

    model: str
    template: str
    published: Mapping[str, Mapping[str, Any]]


def _sizes(
    layers: int, width: int, feed_forward: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


def _hybrid(layers: int, value_heads: int) -> dict[str, Any]:
    """Return what Qwen3.5's config.json says of its layers: three with linear attention, then one with full attention."""
    return {
        "head_dim": 256,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
        },
    }


def _windows(layers: int, windowed: int, width: int) -> dict[str, Any]:
    """Return the layers of a model in which one of full attention follows each run of ``windowed`` ones."""
    kinds = ["full_attention" if i % (windowed + 1) == windowed else "sliding_attention" for i in range(layers)]
    return {"sliding_window": width, "layer_types": kinds}


FOLDER_FAMILIES = {
    "smollm2": FolderFamily(
        "llama, tied (SmolLM2)",
        SMOLLM2,
        {
            "135M": _sizes(30, 576, 1536, 9, 3, 49_152),
            "360M": _sizes(32, 960, 2560, 15, 5, 49_152),
            "1.7B": _sizes(24, 2048, 8192, 32, 32, 49_152),
        },
    ),
    "qwen3_5": FolderFamily(
        "qwen3_5, hybrid",
        QWEN35,
        {
            "0.8B": _sizes(24, 1024, 3584, 8, 2, 248_320, **_hybrid(24, value_heads=16)),
            "2B": _sizes(24, 2048, 6144, 8, 2, 248_320, **_hybrid(24, value_heads=16)),
        },
    ),
    "qwen3_moe": FolderFamily(
        "qwen3_moe",
        QWEN3_2507,
        {
            "30B-A3B": _sizes(
                48, 2048, 6144, 32, 4, 151_936, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
            )
        },
    ),
    "gemma3": FolderFamily(
        "gemma3",
        GEMMA3,
        {
            "270M": _sizes(18, 640, 2048, 4, 1, 262_144, head_dim=256, **_windows(18, 5, 512)),
            "1B": _sizes(26, 1152, 6912, 4, 1, 262_144, head_dim=256, **_windows(26, 5, 512)),
        },
    ),
    "olmo3": FolderFamily("olmo3, window", OLMO3, {"7B": _sizes(32, 4096, 11_008, 32, 32, 100_278, **_windows(32, 3, 4096))}),
}


def tiny_folder(family: str, folder: Path) -> Path:
    """Write a tiny random model of the family as the Hub would hold it, with a tokenizer whose template has its structure."""
    reference_model(FOLDER_FAMILIES[family].model, vocab_size=VOCABULARY, max_position_embeddings=1024).save_pretrained(folder)
    return newer_folder(folder, FOLDER_FAMILIES[family].template)


def config_folder(family: str, size: str | None, folder: Path) -> Path:
    """Write the config.json of the published size, or of the tiny model for None, and nothing else."""
    found = FOLDER_FAMILIES[family]
    changes = found.published[size] | {"max_position_embeddings": 8192} if size else {}
    config = make_config(found.model, **changes)
    config.architectures = ["ForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return folder
