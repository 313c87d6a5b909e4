"""Put any causal language model of transformers behind what this package asks of a decoder (extra ``transformers``).

transformers lets a library register an attention function and a mask function under a name. Ours do all the work: the mask
function hands every layer an object instead of a tensor (:mod:`pidistill.models.layer_masks`), and the attention function asks
it. So there is no list of families and no patch of a model's code; what a model must have is the attention interface.

The modules and their names are those of transformers, so that weights keep their names; a tied head is the embedding.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function
from transformers.utils import logging as transformers_logging

from pidistill.errors import InputError, one_line
from pidistill.models.config_json import check_plain_sizes
from pidistill.models.hf_checks import ATTENTION, check_forward, check_kind, check_rotations, check_states, own_masks_sentence
from pidistill.models.layer_masks import AttentionForm, LayerMask, PaddedMask, Rule
from pidistill.models.modules import replaced

NAME = "pidistill"
# What models hand to the attention function beside its own arguments, and changes nothing here: masks and positions in other
# forms, and settings of kernels. A window is in the rule.
_WITHOUT_EFFECT = {
    "sliding_window", "position_ids", "position_embeddings", "cache_position", "output_attentions", "use_cache", "is_causal",
    "output_hidden_states", "output_router_logits", "layer_idx", "logits_to_keep", "deterministic", "shared_kv_states",
}  # fmt: skip

_make_mask: ContextVar[Callable[[Rule], LayerMask] | None] = ContextVar("make_mask", default=None)


# ---------------------------------------------------------------------------------------------- what transformers calls


def _mask(*, mask_function: Callable = causal_mask_function, **_: Any) -> LayerMask:
    """Return what stands for a mask; called once per kind of layer and forward."""
    return _make_mask.get()(None if mask_function is causal_mask_function else mask_function)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LayerMask,
    scaling: float | None = None,
    dropout: float = 0.0,  # of the folder's config: what is scored is the policy that sampled, so there is none
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if not isinstance(attention_mask, LayerMask):
        raise InputError(own_masks_sentence(type(module).__name__))
    for name, given in others.items():
        if given is not None and name not in _WITHOUT_EFFECT:
            raise InputError(
                f"{type(module).__name__} of transformers hands {name} to its attention, which is not computed here; set "
                "`model` to another builder, or choose another model"
            )
    out = attention_mask.attend(module, query, key, value, AttentionForm(scaling, s_aux, softcap))
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


# ---------------------------------------------------------------------------------------------- the decoder


class HFDecoder(nn.Module):
    """Hold the layers and the head of a transformers model; see :mod:`pidistill.models.protocol`.

    Args:
        lm: a causal language model, on the meta device or not.
        max_seq_len: the longest position; None is the model's own.
        router_loss_weight: of the auxiliary loss of a mixture's router.
    """

    own_names = takes_layer_masks = True

    def __init__(self, lm: PreTrainedModel, max_seq_len: int | None = None, router_loss_weight: float = 0.0) -> None:
        super().__init__()
        self.router_loss_weight, self.router_loss = router_loss_weight, None
        self.config, self.causal_lm = lm.config, type(lm)
        text = lm.config.get_text_config()
        self.max_seq_len = max_seq_len or text.max_position_embeddings
        self._body_name, head = lm.base_model_prefix, lm.get_output_embeddings()
        setattr(self, self._body_name, lm.base_model)
        names = {id(module): name for name, module in lm.named_modules(remove_duplicate=False)}
        self._head_name = names[id(head)]
        if not is_tied(lm):
            setattr(self, self._head_name, head)
        self.logit_cap = getattr(text, "final_logit_softcapping", None)
        self._logit_scale = 1.0
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._logit_scale = _logit_scale(self, lm)
        self.train()

    def train(self, mode: bool = True) -> "HFDecoder":
        """Set the decoder's mode; the body stays in that of evaluation, so that what is scored is the policy that sampled.

        In training mode some families drop states or layers, add jitter, or draw experts. Setting their numbers to 0 would not
        do: PhiMoE's `router_jitter_noise` also says, in evaluation, how close two experts must be to share a token.
        """
        super().train(mode)
        self.body.eval()
        return self

    @property
    def body(self) -> PreTrainedModel:
        """Return the model up to its last norm."""
        return getattr(self, self._body_name)

    @property
    def tok_embeddings(self) -> nn.Embedding:
        return self.body.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.layers

    @property
    def output(self) -> nn.Module:
        return getattr(self, self._head_name, None) or self.tok_embeddings

    def norm(self, h: Tensor) -> Tensor:
        """Return what is multiplied with the head: transformers has applied the norm, and some models scale logits besides."""
        return h if self._logit_scale == 1.0 else h * self._logit_scale

    def unembed(self, h: Tensor) -> Tensor:
        logits = nn.functional.linear(self.norm(h), self.output.weight).float()
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    def forward(
        self, tokens: Tensor, *, mask: Any = None, input_pos: Tensor | None = None, real: Tensor | None = None
    ) -> Tensor:
        """Return ``unembed`` of the last states.

        Args:
            mask: None for right-padded rows, or what makes the masks (:class:`pidistill.models.layer_masks.MakesLayerMasks`).
                Its ``states``, where it has them, stand for transformers' cache in the layers that carry a state.
            real: [B, L] bool, False at padding, which the router's auxiliary loss leaves out; None where there is none.
        """
        if mask is None:
            make = lambda rule: PaddedMask(rule, tokens.shape[1], tokens.device)  # noqa: E731
        else:
            make = lambda rule: mask.layer_mask(rule, input_pos)  # noqa: E731
        states = getattr(mask, "states", None)
        balanced = self.router_loss_weight > 0 and torch.is_grad_enabled()
        with _masks_by(make):
            found = self.body(
                input_ids=tokens,
                # All True, not None: else transformers reads packed sequences out of the positions. It looks at the values.
                attention_mask=torch.ones(tokens.shape, dtype=torch.bool, device="cpu" if tokens.is_meta else tokens.device),
                position_ids=input_pos,
                use_cache=states is not None,
                **({} if states is None else {"cache": states}),
                **({"output_router_logits": True} if balanced else {}),
            )
        self.router_loss = self.router_loss_weight * self._balance(found.router_logits, real) if balanced else None
        return self.unembed(found.last_hidden_state)

    def _balance(self, router_logits: tuple[Tensor, ...], real: Tensor | None) -> Tensor:
        """Return the auxiliary loss of the model's own code over the tokens of the forward; padding does not count."""
        chosen, experts = self.experts
        return vars(sys.modules[self.causal_lm.__module__])["load_balancing_loss_func"](router_logits, experts, chosen, real)

    def rope_init(self) -> None:
        """Move what is computed from the config (rotations' frequencies, scales) to the default device."""
        device = torch.get_default_device()
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)

    # ------------------------------------------------------------------------------------------ its kind

    @property
    def carried_state(self) -> str | None:
        """Return what goes from token to token beside attention; such a state knows no branches, and no padding in between."""
        kinds = set(getattr(self.config.get_text_config(), "layer_types", None) or ()) - ATTENTION
        if not self.causal_lm._is_stateful and not kinds:
            return None
        return f"layers that carry a state from token to token ({', '.join(sorted(kinds)) or self.causal_lm.__name__})"

    @property
    def attention_sizes(self) -> tuple[int, int, int]:
        text = self.config.get_text_config()
        heads, kv_heads, width = (_widest(text, key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        return heads, kv_heads or heads, width or text.hidden_size // heads

    @property
    def experts(self) -> tuple[int, int] | None:
        """Return how many experts a token goes through, and how many there are; None without experts."""
        text = self.config.get_text_config()
        number = next(
            (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0
        )
        return (text.num_experts_per_tok, number) if number else None


@contextmanager
def _masks_by(make: Callable[[Rule], LayerMask]) -> Iterator[None]:
    """Let layers get one mask per rule from ``make``."""
    token = _make_mask.set(functools.cache(make))
    try:
        yield
    finally:
        _make_mask.reset(token)


def _widest(text: Any, key: str) -> int | None:
    """Return a setting, the largest where layers differ in it; None where it is absent."""
    layers = getattr(text, "per_layer_config", None)
    if layers:
        return max((value for layer in layers if (value := getattr(layer, key, None))), default=None)
    return getattr(text, key, None)


def is_tied(lm: PreTrainedModel) -> bool:
    """Return whether the head's weight is the embedding's."""
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


# ---------------------------------------------------------------------------------------------- building one


def build(path: str, max_seq_len: int | None = None, router_loss_weight: float = 0.0) -> HFDecoder:
    """Build the decoder of the folder ``path`` from nothing but its config.json; on the meta device where that is the default.

    Raises:
        InputError: transformers does not know the model, or it cannot be computed here.
    """
    config = read_config(path)
    device = torch.get_default_device()
    try:
        with quiet(), _parameters_on_meta(device.type == "meta"):
            lm = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME, dtype=torch.get_default_dtype(), trust_remote_code=False
            )
    except Exception as error:  # as in `read_config`
        raise InputError(
            f"transformers cannot build the model in {path} ({one_line(error, 300)}); choose another model"
        ) from error
    check_kind(lm, path)
    check_states(lm, path)
    check_rotations(config, path, max_seq_len)
    if router_loss_weight and "load_balancing_loss_func" not in vars(sys.modules[type(lm).__module__]):
        raise InputError(
            f"model.router_loss_weight={router_loss_weight} weighs the auxiliary loss of a mixture of experts, and "
            f"{type(lm).__name__} of transformers has none; remove model.router_loss_weight"
        )
    decoder = HFDecoder(lm, max_seq_len, router_loss_weight)
    if decoder.carried_state and "cache" not in inspect.signature(lm.base_model.forward).parameters:
        raise InputError(
            f"the model in {path} has {decoder.carried_state}, which transformers {transformers.__version__} keeps in another "
            "way than 5.24; run `pip install 'transformers>=5.24,<6'`"
        )
    check_forward(decoder, path)
    return decoder


def read_config(path: str | Path) -> Any:
    """Read config.json, but not its choice of kernels: a name such as ``org/repository`` there is code to download and run."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            config._attn_implementation, config._experts_implementation = "eager", None
    except Exception as error:  # a wrong value may fail anywhere in the code of a family, with any error
        raise InputError(
            f"transformers cannot read {Path(path) / 'config.json'} ({one_line(error, 300)}); "
            "copy or download the folder again, upgrade transformers, or choose another model"
        ) from error
    check_plain_sizes(config.get_text_config().to_dict(), Path(path))
    return config


@torch.no_grad()
def _logit_scale(decoder: HFDecoder, lm: PreTrainedModel) -> float:
    """Return s where the model's logits are cap(s · head @ h), found by giving its own forward a stub in place of the layers.

    Raises:
        InputError: its logits are another function of the last layer's states.
    """
    width = lm.get_output_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, width, generator=generator, device="cpu", dtype=torch.float32) for n in (4, 3))
    head = nn.Linear(width, 3, bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    products = h @ weight.T

    def logits(h: Tensor) -> Tensor:
        stub = _Stub(h[None], lm.base_model)
        with replaced(lm, decoder._body_name, stub), replaced(lm, decoder._head_name, head):
            return lm(input_ids=torch.zeros(1, len(h), dtype=torch.long, device="cpu"), use_cache=False).logits[0].float()

    try:
        small = logits(h * 1e-3)
        scale = float((small * products).sum() / (products * products).sum() / 1e-3)
        expected = products * scale
        if decoder.logit_cap is not None:
            expected = decoder.logit_cap * torch.tanh(expected / decoder.logit_cap)
        right = torch.allclose(logits(h), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError):
        right = False
    if not right:
        raise InputError(
            f"{type(lm).__name__} of transformers makes its logits in another way than by a linear head, a scale and a cap; "
            "choose another model"
        )
    return float(f"{scale:.6g}")  # configs hold such numbers; the rest is rounding


class _Stub(nn.Module):
    """Return fixed states in place of the layers, with the plain attributes of the model whose place it takes."""

    def __init__(self, states: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(body).items() if not name.startswith("_")})
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Any:
        return _StubOutput(self.states)


class _StubOutput:
    """Hold states; whatever else a model reads of its layers' output is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _parameters_on_meta(yes: bool) -> Iterator[None]:
    """Make parameters on the meta device and buffers, which come from the config, on the CPU; nothing is drawn."""
    if not yes:
        yield
        return
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        with torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars, and its hints about absent kernels, from the screen; errors are raised all the same."""
    logger, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    before = logger.level
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers_logging.enable_progress_bar()
