"""State what this package asks of a model, so that a decoder of another kind is one file.

torchtune's ``TransformerDecoder`` has all of it. :class:`pidistill.models.hf_decoder.HFDecoder` puts any causal language model
of transformers behind it. The scorer, the sampler, the teachers, the planner and the checkpoints use nothing else:

    what                        how it is asked for
    hidden states → logits      ``model(tokens, mask=…, input_pos=…)`` returns ``model.unembed(h)``, h the last layer's states;
                                the scorer and the sampler put a function of their own in the place of ``unembed``
    the head                    ``model.norm(h)``, then :func:`head_module`'s weight, then :func:`logit_cap`
    sizes                       ``model.max_seq_len``, ``model.tok_embeddings.num_embeddings``
    layers                      ``model.layers``: sharded, checkpointed and compiled one by one
    packed trees                a TreeMask as ``mask``, unless it has a :func:`carried_state`
    caches of the sampler       :func:`takes_layer_masks`, else the attention modules of torchtune
    names of the weights        :func:`has_own_names`

The last three are known of torchtune's modules. A decoder of another kind has the attributes of :class:`OwnKind`.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pidistill.errors import InputError


@runtime_checkable
class Decoder(Protocol):
    """Describe a decoder.

    Attributes:
        max_seq_len: the longest position; the scorer sets it while it reads packed rows, which are longer than their paths.
        tok_embeddings: the embedding; its ``num_embeddings`` is the vocabulary.
        layers: the layers in their order, each a module that is called once per forward.
        norm: what is applied to the last layer's states that reach the head.
        output: the module of the head's weight, or one with the tied embedding as ``tied_module``.
    """

    max_seq_len: int
    tok_embeddings: Any
    layers: Any
    norm: Any
    output: Any

    def unembed(self, h: Tensor) -> Tensor:
        """Return the logits [B, L, V] of the states [B, L, H] behind the last layer."""
        ...

    def __call__(self, tokens: Tensor, *, mask: Any = None, input_pos: Tensor | None = None) -> Tensor:
        """Return ``unembed`` of the states of ids [B, L]: right-padded rows without a mask, one packed row with a TreeMask."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class OwnKind(Protocol):
    """List what a decoder has that is not built from torchtune's modules."""

    # True: its layers ask the objects of `layer_masks`, which the `mask` of a forward makes: that of a packed tree, and that of
    # the sampler's caches.
    takes_layer_masks: bool
    own_names: bool  # True: its weights have the names that the folder's library gives them, and are saved under these
    logit_cap: float | None  # c where logits are c·tanh(x / c); None where they are the head's products
    carried_state: str | None  # what goes from token to token beside attention, in words; None where nothing does
    attention_sizes: tuple[int, int, int]  # heads, key heads and width of a head, for the planner
    experts: tuple[int, int] | None  # how many experts a token goes through, and how many there are; None without experts
    # The weighted auxiliary loss of the experts' router over the last forward; None where that had no gradient, or no weight.
    router_loss: Tensor | None
    # Its weight. Where it is positive, a forward takes ``real``: True at tokens, False at padding, None without padding.
    router_loss_weight: float


def head_module(model: Decoder) -> nn.Module:
    """Return the module that owns the head's weight: the output layer, or the embedding it is tied to.

    Raises:
        InputError: it is not a plain linear layer or embedding, or it has a bias.
    """
    head = getattr(model.output, "tied_module", model.output)
    if not isinstance(head, nn.Linear | nn.Embedding):
        raise InputError(
            f"cannot score with an output layer of type {type(head).__name__}; use a plain or tied linear head (a LoRA model "
            "with apply_lora_to_output=False)"
        )
    if getattr(head, "bias", None) is not None:
        raise InputError("cannot score with an output layer that has a bias; choose a `model` whose output has none")
    return head


def logit_cap(model: Decoder) -> float | None:
    """Return c of a model whose logits are c·tanh(x / c); None for one whose logits are the head's products."""
    return getattr(model, "logit_cap", None)


def has_own_names(model: nn.Module) -> bool:
    """Return whether the weights have transformers' names; those of all other decoders have torchtune's."""
    return getattr(model, "own_names", False)


def takes_layer_masks(model: nn.Module) -> bool:
    """Return whether a forward asks its ``mask`` for one object per kind of layer; torchtune's layers are hooked instead."""
    return getattr(model, "takes_layer_masks", False)


def carried_state(model: nn.Module) -> str | None:
    """Return what goes from token to token beside attention, in words, so that the model takes only padded rows; or None."""
    return getattr(model, "carried_state", None)


def balances_router(model: nn.Module) -> bool:
    """Return whether a forward of the model also computes the auxiliary loss, for which it is told where padding stands."""
    return getattr(model, "router_loss_weight", 0.0) > 0


def router_loss(model: nn.Module) -> Tensor | None:
    """Return the weighted auxiliary loss over the tokens of the last forward; None where there is none."""
    return getattr(model, "router_loss", None)
