"""Make builders of one published size, with the arguments of torchtune's (``qwen2_5_7b_base`` and its ``lora_`` sibling)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchtune.modules import TransformerDecoder

Builder = Callable[..., TransformerDecoder]


def sized(name: str, builder: Builder, sizes: Mapping[str, Any]) -> Builder:
    """Return ``builder`` with ``sizes`` filled in."""

    def build(max_seq_len: int | None = None, rope_base: float | None = None) -> TransformerDecoder:
        return builder(**_with(sizes, max_seq_len, rope_base))

    return _named(build, name, sizes)


def sized_lora(name: str, builder: Builder, sizes: Mapping[str, Any]) -> Builder:
    """Do the same for a ``lora_`` builder, with torchtune's names and defaults."""

    def build(
        lora_attn_modules: Sequence[str],
        apply_lora_to_mlp: bool = False,
        apply_lora_to_output: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        quantize_base: bool = False,
        max_seq_len: int | None = None,
        rope_base: float | None = None,
    ) -> TransformerDecoder:
        return builder(
            lora_attn_modules=list(lora_attn_modules),
            apply_lora_to_mlp=apply_lora_to_mlp,
            apply_lora_to_output=apply_lora_to_output,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
            quantize_base=quantize_base,
            **_with(sizes, max_seq_len, rope_base),
        )

    return _named(build, name, sizes)


def _with(sizes: Mapping[str, Any], max_seq_len: int | None, rope_base: float | None) -> dict[str, Any]:
    changes = {"max_seq_len": max_seq_len, "rope_base": rope_base}
    return {**sizes, **{key: value for key, value in changes.items() if value is not None}}


def _named(build: Builder, name: str, sizes: Mapping[str, Any]) -> Builder:
    build.__name__ = build.__qualname__ = name
    facts = ", ".join(f"{key}={value}" for key, value in sizes.items())
    build.__doc__ = (
        f"{facts}.\n\n    ``max_seq_len`` sets the longest position that the model has a rotation for; ``rope_base`` is for a "
        "sibling of the model whose config.json has another rope_theta.\n    "
    )
    return build
