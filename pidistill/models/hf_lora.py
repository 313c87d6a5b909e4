"""Put LoRA and DoRA adapters on a decoder of transformers, with the keys and the modules of torchtune's ``lora_`` builders."""

from collections.abc import Iterator, Sequence

from torch import nn

from pidistill.errors import InputError
from pidistill.models.decoder import Lora
from pidistill.models.hf_decoder import HFDecoder

# torchtune's name → what families of transformers call the same layer
_ALIASES = {"output_proj": ("o_proj", "out_proj", "dense")}
_ATTENTION, _MLP = ("attn", "attention"), ("mlp", "feed_forward", "ffn")


def adapt(decoder: HFDecoder, adapters: Lora) -> None:
    """Replace linear layers of attention, and of the feed-forward parts with ``adapters.mlp``, by adapted ones.

    ``adapters.modules`` are torchtune's names or the model's own (phi-3's qkv_proj). Experts and routers are not adapted.

    Raises:
        InputError: a name is none of the model's.
    """
    wanted = {name: {name, *_ALIASES.get(name, ())} for name in adapters.modules}
    places = [place for layer in decoder.layers for place in _linears(layer, _ATTENTION)]
    names = {name for _, name, _ in places}
    for name, own in wanted.items():
        if not own & names:
            raise InputError(
                f"model.lora_attn_modules has {name}, and the attention of this model has {', '.join(sorted(names))}; choose "
                "one or more of these"
            )
    chosen = [place for place in places if any(place[1] in own for own in wanted.values())]
    if adapters.mlp:
        chosen += [place for layer in decoder.layers for place in _linears(layer, _MLP)]
    for owner, name, linear in chosen:
        setattr(owner, name, _adapted(linear, adapters))


def _linears(layer: nn.Module, parts: Sequence[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield (owner, name, linear layer) of those inside a module that one of ``parts`` names."""
    for path, module in list(layer.named_modules()):
        above, _, name = path.rpartition(".")
        if type(module) is nn.Linear and any(part in above for part in parts) and not name.endswith(("gate", "router")):
            yield layer.get_submodule(above), name, module


def _adapted(linear: nn.Linear, adapters: Lora) -> nn.Module:
    made = adapters.linear(linear.in_features, linear.out_features, adapted=True, bias=linear.bias is not None)
    if not adapters.quantize_base:
        made.weight = linear.weight
    if linear.bias is not None:
        made.bias = linear.bias
    return made
