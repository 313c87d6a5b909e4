"""Hold what layers carry from token to token (linear attention, convolutions), in the place of transformers' cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@runtime_checkable
class ReadRows(Protocol):
    """Say which rows a forward reads: the sampler's step."""

    slots: Int[Tensor, " n"]  # [n] the slot of each row of the forward
    # Where prompts are read, (slots, rows of the forward): which rows' states go where. None afterwards.
    copies: tuple[Int[Tensor, " R"], Int[Tensor, " R"]] | None


class States:
    """Stand for transformers' cache in the layers that carry a state: a row per slot, of those of one forward.

    Layers of attention ask it nothing but to pass keys and values through.
    """

    is_sliding = is_linear = is_dummy = ()
    is_compileable = False

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int], Float[Tensor, "slots ..."]] = {}
        self._given: dict[tuple[str, int, int], Tensor] = {}
        self._room = 0
        self._step: ReadRows | None = None

    def reserve(self, slots: int) -> None:
        self._room = max(slots, self._room)

    @contextmanager
    def of(self, step: ReadRows) -> Iterator[None]:
        """Serve as the states of the rows of one forward; prompts start from empty states.

        At its end, keep what layers have written into the states that they were given (one-token updates).
        """
        self._step, self._given = step, {}
        yield
        for key, state in self._given.items():
            self._put(key, state)

    def rearrange(self, order: Int[Tensor, " m"]) -> None:
        for kept in self._kept.values():
            kept[: len(order)] = kept[order]

    def _get(self, *key: Any) -> Tensor:
        return self._kept[key][self._step.slots]

    def _give(self, *key: Any) -> Tensor | None:
        if self._step.copies is not None:
            return None
        self._given[key] = self._get(*key)
        return self._given[key]

    def _put(self, key: tuple[str, int, int], new: Tensor) -> None:
        kept = self._kept.get(key)
        if kept is None or len(kept) < self._room:
            grown = new.new_zeros(self._room, *new.shape[1:])
            if kept is not None:
                grown[: len(kept)] = kept
            kept = self._kept[key] = grown
        if self._step.copies is None:
            kept[self._step.slots] = new
        else:
            slots, rows = self._step.copies
            kept[slots] = new[rows]

    # ------------------------------------------------------------------------------------------ what layers call

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._give("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._give("recurrent", layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        key, fresh = ("conv", layer_idx, state_idx), self._step.copies is not None
        whole = conv_states if fresh else torch.cat([self._get(*key), conv_states], -1)
        self._given.pop(key, None)
        padded = F.pad(whole, (max(0, conv_kernel_size - whole.shape[-1]), 0))
        self._put(key, padded[..., -conv_kernel_size:])
        return padded if fresh else whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._given.pop(("recurrent", layer_idx, state_idx), None)
        self._put(("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return self._step.copies is None

    def is_recording_past(self, *_: Any) -> bool:
        return False

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0
