"""Run a vLLM engine in the training process: the same device, weights handed over in memory, stepped by hand.

vLLM is imported when the engine starts and not before. What it does to the process that hosts it (random state, torch's
threads, environment variables, the CUDA stream) is undone.
"""

import importlib.util
import math
import os
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pidistill.errors import InputError, one_line

# Read by vLLM when it is imported. In process: a child would get copies of the weights. It reports usage over the network
# unless told not to, and warns at every reload of a rotary buffer that no checkpoint holds.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_ENVIRONMENT_DEFAULTS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# vLLM writes these for child processes, and the recipes' own children would inherit them.
_KEPT_VARIABLES = ("LOCAL_WORLD_SIZE", "LD_PRELOAD")


# Ids that are listed beyond top_k: vLLM on CPU keeps those that tie with the last one, and in bf16 logits tie often.
TIES = 64


@dataclass(frozen=True)
class Turn:
    """Hold what one request sampled."""

    row: int  # the number that `begin` was given
    ids: list[int]  # ends with the stop id, unless the limit came first
    logprobs: list[float]  # nats of each id under the distribution it was drawn from
    # The ids that were left to draw each one from, None for the whole vocabulary; None where nobody asked.
    kept: list[list[int] | None] | None = None


@dataclass(frozen=True)
class Settings:
    """Hold how the requests of one call sample."""

    temperature: float
    top_k: int | None
    top_p: float | None
    stop_ids: tuple[int, ...]
    kept: bool = False  # also list the ids that top_k and top_p left; needs a top_k


@runtime_checkable
class Engine(Protocol):
    """Sample single turns, many at once."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Sample with these weights (Hugging Face's names, whole tensors) from now on."""

    def rest(self) -> None:
        """Release what a call's rows have used, once they are done."""

    def begin(self, row: int, ids: Sequence[int], seed: int, max_tokens: int, settings: Settings) -> None:
        """Sample after ``ids`` until a stop id or ``max_tokens``."""

    def step(self) -> list[Turn]:
        """Advance every turn that was begun by a token or more; return those that ended."""

    def abort(self) -> None:
        """Forget the turns that have not ended."""


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "pidistill.rollouts.VLLMSampler needs vLLM, which is not installed; pip install 'pidistill[vllm]', or set "
            "sampler._component_=pidistill.rollouts.TorchtuneSampler"
        )


class VLLMEngine:
    """Run one rank's engine; see :class:`pidistill.rollouts.vllm_sampler.VLLMSampler` for the settings.

    With several ranks all of them start theirs at the same time: vLLM makes process groups, in which every rank takes part.
    """

    def __init__(self, model_dir: Path, device: torch.device, *, sleep: bool, **settings: Any) -> None:
        require_vllm()
        os.environ.update(_ENVIRONMENT)
        for name, value in _ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        check_gpu(device)
        self._streams = Streams(device)
        with _process_kept(device), self._streams.of_engine(), _own_class(model_dir):
            from vllm import LLM
            from vllm.platforms import current_platform

            _check_device(current_platform.device_type, device, sleep)
            try:
                self._llm = LLM(
                    model=str(model_dir),
                    skip_tokenizer_init=True,
                    hf_overrides=_text_alone,
                    load_format="dummy",  # the weights that sample come from the live model, before every call
                    logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
                    generation_config="vllm",  # no defaults from the model's folder
                    enable_prefix_caching=True,
                    enable_sleep_mode=sleep,
                    disable_log_stats=True,
                    distributed_executor_backend="external_launcher" if _several_processes() else "uni",
                    **settings,
                )
            except Exception as error:  # what vLLM cannot do is an error of any kind: an assertion, an absent key or package
                detail = one_line(error, 400)
                raise InputError(
                    f"vLLM did not start on {model_dir} ({detail}); check sampler.model_dir, sampler.gpu_memory_utilization, "
                    "sampler.kv_cache_gib and sampler.max_model_len"
                ) from error
        self._engine = self._llm.llm_engine
        _shut_down_quietly(self._engine.engine_core)
        self._vocabulary = self._llm.model_config.get_vocab_size()
        self._sleep, self._asleep = sleep, False
        self._rows: dict[str, int] = {}
        self._begun = 0

    def load(self, weights: Mapping[str, Tensor]) -> None:
        with self._streams.of_engine():
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
            self._llm.apply_model(_repack)
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            if not self._llm.reset_prefix_cache():  # keys and values of the old weights
                raise RuntimeError("vLLM kept its prefix cache, whose keys and values are of the weights before")

    def rest(self) -> None:
        if self._sleep:
            with self._streams.of_engine():
                self._llm.sleep(level=2)
            self._asleep = True

    def begin(self, row: int, ids: Sequence[int], seed: int, max_tokens: int, settings: Settings) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        greedy = settings.temperature == 0
        params = SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k or 0,
            top_p=1.0 if settings.top_p is None else settings.top_p,
            max_tokens=max_tokens,
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=True,  # the model's own end of text, where the tokenizer's stop ids lack it
            seed=seed,  # also where nothing is drawn: for a request without one, vLLM on a GPU draws from numpy's global stream
            # Only of the sampled token, or of all that may be left: what is cut off has -inf.
            logprobs=min((settings.top_k or 0) + TIES, self._vocabulary) if settings.kept and not greedy else 0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = str(self._begun)
        self._begun += 1
        self._engine.add_request(name, tokens_input(list(ids)), params)
        self._rows[name] = row
        self._lists_kept = settings.kept and not greedy

    def step(self) -> list[Turn]:
        # vLLM on CPU draws from torch's global stream too, and leaves those draws unused where a request has a seed.
        with torch.random.fork_rng(devices=[]), self._streams.of_engine():
            outputs = self._engine.step()
        return [self._turn(output) for output in outputs if output.finished]

    def abort(self) -> None:
        if self._rows:
            with self._streams.of_engine():
                self._engine.abort_request(list(self._rows))
            self._rows.clear()

    def _turn(self, output: Any) -> Turn:
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        logprobs = [of_id[token].logprob for of_id, token in zip(completion.logprobs, ids, strict=True)]
        finite = all(map(math.isfinite, logprobs))  # if not, the sampler refuses the turn
        listed = completion.logprobs if self._lists_kept and finite else None
        kept = None if listed is None else [kept_ids(of_id, self._vocabulary) for of_id in listed]
        return Turn(self._rows.pop(output.request_id), ids, logprobs, kept)


def kept_ids(of_id: Mapping[int, Any], vocabulary: int) -> list[int] | None:
    """Return the ids with a probability among those that were listed for one token; None where nothing was cut off.

    Raises:
        InputError: those listed are not all that were left.
    """
    kept = {token: math.exp(number.logprob) for token, number in of_id.items() if number.logprob > -math.inf}
    if len(kept) == vocabulary:
        return None
    if abs((total := math.fsum(kept.values())) - 1.0) > 1e-3:
        raise InputError(
            f"vLLM listed {len(kept)} ids that a token was drawn from, and they hold {total:.4g} of its probability, so that "
            f"more than {TIES} others tie with the last one of top_k; set sampler.dtype=float32, or sampler.record_kept=False"
        )
    return sorted(kept)


def check_gpu(device: torch.device) -> None:
    """Refuse a GPU that the engine of a lone process would not run on: vLLM takes the first one that the process sees.

    Of several processes each has the GPU of its number, which vLLM knows.
    """
    if device.type == "cuda" and device.index and not _several_processes():
        raise InputError(
            f"device={device} does not work with pidistill.rollouts.VLLMSampler, which samples on cuda:0 in a run of one "
            f"process; set device=cuda:0, and the environment variable CUDA_VISIBLE_DEVICES={device.index} to run on that GPU"
        )


def _several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _check_device(engine: str, model: torch.device, sleep: bool) -> None:
    if engine != model.type:
        raise InputError(
            f"the model is on {model.type} and the installed vLLM runs on {engine}; set device={engine}, or install vLLM's "
            f"build for {model.type}"
        )
    if sleep and engine == "cpu":
        raise InputError("sampler.sleep=True gives GPU memory back between rollouts, and vLLM on CPU cannot; set it to False")


def _repack(model: torch.nn.Module) -> None:
    """Pack again what vLLM on CPU multiplies with a packed copy of, which its reload forgets: a tied head, and experts."""
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and layer.w2_weight.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(layer)


def _shut_down_quietly(client: Any) -> None:
    """Shut vLLM down without its complaint that the recipe has destroyed the process groups; the rest of it is needed."""
    if client._finalizer.detach() is not None:
        weakref.finalize(client, _quietly, client.engine_core.shutdown)


def _quietly(shutdown: Callable[[], None]) -> None:
    with suppress(Exception):
        shutdown()


def _text_alone(config: Any) -> Any:
    """Return the config of the text model of a folder that also holds a part for images; only the text model is trained."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    if text is not config:
        text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    return text


@contextmanager
def _own_class(model_dir: Path) -> Iterator[None]:
    """Let vLLM make the modules of a family that it takes from transformers (OLMo 3, SmolLM3) from a class of its own.

    It changes the constructor and the call of that class for its compiler, and the trained model may be of the same class.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = type(AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True).get_text_config())
    kind = MODEL_MAPPING.get(config, None)
    if not isinstance(kind, type):
        yield
        return
    before = MODEL_MAPPING._extra_content.get(config)
    AutoModel.register(config, type(kind.__name__, (kind,), {"__module__": kind.__module__}), exist_ok=True)
    try:
        yield
    finally:
        MODEL_MAPPING._extra_content.pop(config)
        if before is not None:
            AutoModel.register(config, before)


class Streams:
    """Keep the trainer's CUDA stream and vLLM's apart; on a CPU there is nothing to do.

    vLLM may move the thread to a stream of its own, for good, and later expects to find it. The trainer's kernels would run
    there too, behind the back of what has noted its stream before (activation offloading).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._of_engine = device, None

    @contextmanager
    def of_engine(self) -> Iterator[None]:
        """Go to the stream that vLLM left last, and back to the trainer's; each waits for what the other has begun."""
        if self._device.type != "cuda":
            yield
            return
        before = torch.cuda.current_stream(self._device)
        if self._of_engine is not None:
            _go_to(self._of_engine, before)
        try:
            yield
        finally:
            self._of_engine = torch.cuda.current_stream(self._device)
            _go_to(before, self._of_engine)


def _go_to(stream: torch.cuda.Stream, present: torch.cuda.Stream) -> None:
    if stream != present:
        stream.wait_stream(present)
        torch.cuda.set_stream(stream)  # not by a `with`: vLLM notes what is set here


@contextmanager
def _process_kept(device: torch.device) -> Iterator[None]:
    """Restore random state, torch's threads and a few environment variables."""
    python, numpy, set_threads, threads = (
        random.getstate(),
        np.random.get_state(),
        torch.set_num_threads,
        torch.get_num_threads(),
    )
    variables = {name: os.environ.get(name) for name in _KEPT_VARIABLES}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_threads  # vLLM's CPU worker puts a function there that does nothing
        torch.set_num_threads(threads)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
