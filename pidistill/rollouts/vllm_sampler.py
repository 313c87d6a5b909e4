"""Sample with vLLM: its engine runs in the training process and samples with the trained weights as they are now.

Token ids go in and token ids come out. A turn is a request; the next turn of a row is a request whose prompt is everything so
far, of which the prefix cache holds the keys and values. Rows whose turn ended continue while others still sample.
"""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pidistill.distributed.shards import forward_device
from pidistill.errors import InputError, check_share
from pidistill.models.adapters import adapter_modules, merged
from pidistill.models.hf_format import family, to_hf
from pidistill.models.hf_weights import to_stored
from pidistill.models.precision import compute_dtype_of
from pidistill.models.protocol import Decoder, carried_state, has_own_names
from pidistill.rollouts.base import OnTurnEnd, Sample
from pidistill.rollouts.collect import rollout_seed
from pidistill.rollouts.progress import count
from pidistill.rollouts.request import (
    Request,
    check_request,
    check_settings,
    check_truncation,
    collect_answers,
    end_turn,
    not_finite,
)
from pidistill.rollouts.vllm_engine import TIES, Engine, Settings, Turn, VLLMEngine, check_gpu, require_vllm


@dataclass(kw_only=True)
class VLLMSampler:
    """Sample with vLLM (extra `vllm`); see :class:`pidistill.rollouts.base.Sampler` for what `sample` promises.

    The engine starts at the first call, one per rank, on the device that trains. Every call first hands it the weights it is
    called with (LoRA adapters merged in): of a sharded model each rank gathers all of them, so it needs memory for the whole
    model once more while they are handed over, beside the engine's own copy. vLLM's kernels round otherwise than the trainer's,
    hence `sampler_mismatch_*` in :mod:`pidistill.training.metrics`, and the recipes' `max_sampler_mismatch_nats`.

    Attributes:
        max_new_tokens, temperature, top_k, top_p: as in :class:`pidistill.rollouts.TorchtuneSampler`; vLLM keeps no token that
            ties with the last of the top k.
        model_dir: folder with the model's config.json in Hugging Face's format: ``${checkpointer.checkpoint_dir}``. Weights are
            not read from it.
        dtype: of the engine's weights: "float32", "bfloat16" …; null is the `compute_dtype` of the trained model.
        gpu_memory_utilization: share of the device's memory (on CPU, of the host's) that the engine takes in all, the trainer
            needs the rest; more holds more rows at once.
        kv_cache_gib: memory for keys and values in its place, in GiB; null leaves it to gpu_memory_utilization.
        max_model_len: longest prompt + completion; null is the model's max_seq_len. Less needs less memory.
        max_batch_size: rows that are sampled at once, the others wait; null is vLLM's own choice.
        max_turn_tokens: as in :class:`pidistill.rollouts.TorchtuneSampler`.
        enforce_eager: no compilation and no CUDA graphs: starts sooner, samples slower.
        sleep: give the engine's memory back to the trainer between rollouts. GPU only.
        record_kept: as in :class:`pidistill.rollouts.TorchtuneSampler`; needs top_k, which bounds what vLLM lists per token.
    """

    max_new_tokens: int
    model_dir: str
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    dtype: str | None = None
    gpu_memory_utilization: float = 0.3
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    max_batch_size: int | None = None
    max_turn_tokens: int | None = None
    enforce_eager: bool = False
    sleep: bool = False
    record_kept: bool = False
    _engine: Engine | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.record_kept and self.top_p is not None and self.top_k is None:
            raise InputError(
                f"sampler.record_kept with sampler.top_p={self.top_p} needs sampler.top_k, which bounds how many ids vLLM "
                "lists per token; set top_k, or use pidistill.rollouts.TorchtuneSampler"
            )
        require_vllm()
        check_settings(self.temperature, self.max_new_tokens)
        counts = {"top_k": self.top_k, "max_model_len": self.max_model_len, "max_batch_size": self.max_batch_size}
        counts["max_turn_tokens"] = self.max_turn_tokens
        check_truncation(self.top_p, **counts)
        check_share("sampler.gpu_memory_utilization", self.gpu_memory_utilization, "a share of the device's memory", "(0, 1]")
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0.0:
            raise InputError(f"sampler.kv_cache_gib is {self.kv_cache_gib}; give GiB above 0, or null for vLLM's choice")
        self._config = _read_config(Path(self.model_dir))

    @staticmethod
    def find_length_limit(settings: Mapping[str, Any], model: Decoder) -> tuple[int, str] | None:
        """Return the most tokens of a prompt and its completion, and the key that sets them; None for the model's own."""
        most, what = settings.get("max_model_len"), "sampler.max_model_len (null for model.max_seq_len)"
        return None if most is None or most >= model.max_seq_len else (int(most), what)

    def sample(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        seeds: Sequence[int],
        stop_ids: frozenset[int],
        pad_id: int,
        on_turn_end: OnTurnEnd,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Sample]:
        """Sample ``group_size`` completions of every prompt with the weights that ``model`` has now.

        With a sharded model every rank must call this, with any number of prompts, none included: the weights are gathered at
        the start, after which each rank samples as long as it needs.

        The numbers a row draws depend on its seed and on where its turns begin, not on its batch. How vLLM rounds does depend
        on the batch: a draw within rounding error of the border between two tokens can give another token.
        """
        request = Request(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            on_turn_end=on_turn_end,
            vocab_size=model.tok_embeddings.num_embeddings,
            max_turn_tokens=self.max_turn_tokens,
        )
        check_request(model, prompts, group_size, seeds, request)
        self._check_length(max(map(len, prompts), default=0) + request.max_new_tokens)
        if self._engine is None:
            self.check_model(model, forward_device(model), compute_dtype_of(model))
            self._engine = self._start(model)
        # At every call: a stale copy would train silently on another policy's samples, and no counter of torch's sees every
        # way in which a weight can change.
        self._engine.load(self._stored_weights(model))
        rows = [_Row(r, list(prompts[r // group_size]), seed) for r, seed in enumerate(seeds)]
        if self._records_kept:
            for row in rows:
                row.sample.kept = []
        try:
            sample_rows(self._engine, rows, request)
        finally:
            self._engine.abort()
            self._engine.rest()
        return [row.sample for row in rows]

    def check_model(self, model: Decoder, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Refuse what vLLM 0.32 would compute in another way than ``model``, elsewhere, or not at all.

        The weights may be missing yet.
        """
        check_gpu(device)
        if not has_own_names(model):
            family(self._config)  # refuses what weights cannot be converted for
            return
        dtype = self._dtype(compute_dtype)
        if carried_state(model) and device.type == "cpu" and dtype != "bfloat16":
            raise InputError(
                f"vLLM on CPU computes {carried_state(model)} in bf16 alone, and sampler.dtype is {dtype}; set "
                "sampler.dtype=bfloat16, or sampler._component_=pidistill.rollouts.TorchtuneSampler"
            )
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        first, longest = rope.get("original_max_position_embeddings"), self.max_model_len or model.max_seq_len
        if rope.get("llama_4_scaling_beta") and first and longest > first:
            raise InputError(
                f"the model in {self.model_dir} scales its queries beyond {first:,} tokens (llama_4_scaling_beta), which vLLM "
                f"does not; set sampler.max_model_len={first}, or sampler._component_=pidistill.rollouts.TorchtuneSampler"
            )

    def _dtype(self, compute_dtype: torch.dtype) -> str:
        return self.dtype or str(compute_dtype).removeprefix("torch.")

    @property
    def _records_kept(self) -> bool:
        return self.record_kept and self.top_k is not None

    def _stored_weights(self, model: Decoder) -> dict[str, Tensor]:
        """Return the weights that ``model`` has now, under the names that its folder's files have."""
        weights = whole_weights(model)
        return to_stored(weights, Path(self.model_dir)) if has_own_names(model) else to_hf(weights, self._config)

    def _start(self, model: Decoder) -> Engine:
        settings: dict[str, Any] = {} if self.max_batch_size is None else {"max_num_seqs": self.max_batch_size}
        if self.kv_cache_gib is not None:
            settings["kv_cache_memory_bytes"] = int(self.kv_cache_gib * 2**30)
        if self._records_kept:
            settings["max_logprobs"] = self.top_k + TIES
        return VLLMEngine(
            Path(self.model_dir),
            forward_device(model),
            sleep=self.sleep,
            dtype=self._dtype(compute_dtype_of(model)),
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len or model.max_seq_len,
            enforce_eager=self.enforce_eager,
            **settings,
        )

    def _check_length(self, longest: int) -> None:
        if self.max_model_len is not None and longest > self.max_model_len:
            raise InputError(
                f"the longest prompt plus sampler.max_new_tokens is {longest} tokens, above sampler.max_model_len "
                f"{self.max_model_len} by {longest - self.max_model_len}; raise it, or leave it null for model.max_seq_len"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"sampler.model_dir={folder} has no config.json, which tells vLLM the model's shape; set it to "
            "${checkpointer.checkpoint_dir}"
        )
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- weights

# Activation checkpointing wraps layers, which shows in module names and not in the state dict's.
_CHECKPOINTED = "_checkpoint_wrapped_module."


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's full state dict under torchtune's names, adapters merged in, or left out while they are switched off.

    A collective where the model is sharded: every rank gathers every tensor, one after the other, in the dtype that the model
    computes in. Adapters keep their own until they are merged.
    """
    adapters, dtype = list(adapter_modules(model)), compute_dtype_of(model)
    ours = {f"{name}.{p}".replace(_CHECKPOINTED, "") for name, module in adapters for p in module.adapter_params()}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state = {name: tensor if name in ours else tensor.to(dtype) for name, tensor in state.items()}
    state = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    if adapters and all(module.disabled for _, module in adapters):
        return {name: tensor for name, tensor in state.items() if name not in ours}
    return merged(model, state)


# ---------------------------------------------------------------------------------------------- rows


@dataclass
class _Row:
    """Hold one completion while it is sampled."""

    index: int
    prompt: list[int]  # ids before the completion
    seed: int
    sample: Sample = field(default_factory=lambda: Sample([], [], [], ""))
    turn_start: int = 0  # where the current turn begins in `sample.tokens`
    answer: Future | None = None  # what is awaited from `on_turn_end`; None while nothing is
    sampling: bool = False  # the engine is at work on its turn

    def append(self, ids: Sequence[int], *, sampled: bool, logprobs: Sequence[float]) -> None:
        self.sample.tokens += ids
        self.sample.policy_mask += [sampled] * len(ids)
        self.sample.logprobs += logprobs


def sample_rows(engine: Engine, rows: list[_Row], request: Request) -> None:
    """Sample the rows to their ends."""
    kept = any(row.sample.kept is not None for row in rows)
    settings = Settings(request.temperature, request.top_k, request.top_p, tuple(sorted(request.stop_ids)), kept)
    by_index = {row.index: row for row in rows}
    while rows:
        collect_answers(rows, request)
        going_on = [row for row in rows if not row.sample.stop_reason]
        count(rows=len(rows) - len(going_on))
        rows = going_on
        for row in rows:
            if not row.sampling and row.answer is None:
                _begin_turn(engine, row, request, settings)
        if any(row.sampling for row in rows):
            for turn in engine.step():
                _take(turn, by_index[turn.row], request)


def _begin_turn(engine: Engine, row: _Row, request: Request, settings: Settings) -> None:
    done = len(row.sample.tokens)
    # Each turn draws from a stream of its own: one seed for all of them would repeat the first turn's draws.
    seed = rollout_seed(row.seed, done, 0, 0)
    limit = min(request.max_new_tokens - done, request.max_turn_tokens or request.max_new_tokens)
    engine.begin(row.index, row.prompt + row.sample.tokens, seed, limit, settings)
    row.sampling = True


def _take(turn: Turn, row: _Row, request: Request) -> None:
    """Append what a turn sampled, and ask what follows it."""
    row.sampling = False
    wrong = next((i for i, logprob in enumerate(turn.logprobs) if not math.isfinite(logprob)), None)
    if wrong is not None:
        raise not_finite(1, 1, row, len(row.sample.tokens) + wrong)
    # A greedy choice is a point mass, whatever the model's own log-prob.
    logprobs = [0.0] * len(turn.ids) if request.temperature == 0 else turn.logprobs
    row.append(turn.ids, sampled=True, logprobs=logprobs)
    if row.sample.kept is not None:
        row.sample.kept += [None] * len(turn.ids) if turn.kept is None else turn.kept
    count(tokens=len(turn.ids))
    if turn.ids and turn.ids[-1] in request.stop_ids:
        end_turn(row, request)
    elif len(row.sample.tokens) == request.max_new_tokens:
        row.sample.stop_reason = "length"
    elif len(turn.ids) == request.max_turn_tokens:
        row.sample.stop_reason = "turn_length"
    else:
        raise RuntimeError(f"vLLM ended row {row.index} after {len(turn.ids)} tokens, without a stop id and below the limit")
