"""Sample in a second process, which has its own sampler, environment and model; it reads the weights from shared memory.

The process is started once. It builds its parts from the run's config, as a recipe does, so that none of them needs to be
sent: environments, rewards and vLLM's engine live there alone. The training process writes weights into memory that both
share and sends rows; rollouts come back. One call is answered at a time.
"""

import math
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models.adapters import adapter_modules
from pidistill.models.empty import empty_model
from pidistill.models.protocol import Decoder
from pidistill.rollouts import CollectResult
from pidistill.tokenizers import as_chat_tokenizer
from pidistill.training.collector import build_collector
from pidistill.training.interrupts import FailedBetweenUpdates
from pidistill.training.load import load_model
from pidistill.training.start import seed_global_streams
from pidistill.training.training_state import random_state, set_random_state

# Not fork: neither CUDA nor the threads of a process that has trained survive it.
START_METHOD = "spawn"
_ALIGNMENT = 64  # bytes, as torch aligns its own tensors: how a product rounds can depend on it
_SECONDS_TO_END = 5.0
_GPUS = "CUDA_VISIBLE_DEVICES"


class SamplerEnded(FailedBetweenUpdates):
    """Say that the process that samples has ended, most often because it was killed; the training's own state is whole."""


class SideProcess:
    """Hold the training process's end: the shared weights, and calls that wait for their answer."""

    def __init__(self, cfg: DictConfig, run: Run, device: torch.device) -> None:
        with training.set_default_dtype(run.forward_dtype):
            layout = {name: (tensor.shape, tensor.dtype) for name, tensor in empty_model(cfg.model).state_dict().items()}
        context = multiprocessing.get_context(START_METHOD)
        memory = context.RawArray("B", _ALIGNMENT + sum(map(_aligned_bytes, layout.values())))
        self._weights, self._adapters = _views(memory, layout), True
        here, there = context.Pipe()
        device, variables = _as_first_gpu(device)
        alone = Run(device, run.dtype, 0, 1, run.seed, run.output_dir, compute_dtype=run.compute_dtype)
        arguments = (here, there, cfg, alone, memory, layout, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, name="pidistill rollouts")
        with _environment(variables):
            self._process.start()
        there.close()
        self._connection = here
        Finalize(self, _end, args=(self._process, here), exitpriority=10)  # before multiprocessing waits for its children
        self._answer()  # everything is built, or the reason why it is not

    @torch.no_grad()
    def load(self, model: Decoder) -> None:
        """Write the weights that ``model`` has now, for the calls that follow; none may be under way."""
        state = model.state_dict()
        for name, view in self._weights.items():
            tensor = state[name].detach()
            view.copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        self._adapters = not all(module.disabled for _, module in adapter_modules(model))

    def collect(self, **arguments: Any) -> CollectResult:
        """Play episodes with the weights of the last :meth:`load`; see :func:`pidistill.rollouts.collect_rollouts`.

        Rollouts hold the examples and prompts that were given, not copies of them.
        """
        result = self._call("collect", adapters=self._adapters, **arguments)
        rows = zip(arguments["examples"], arguments["prompts"], strict=True)
        given = dict(zip(arguments["groups"], rows, strict=True))
        for rollout in result.rollouts:
            rollout.example, rollout.prompts = given[rollout.group]
        return result

    def random_state(self) -> dict[str, Any]:
        """Return the random streams that an environment or a reward draws from there, as they are after the last answer."""
        return pickle.loads(self._random_state)

    def set_random_state(self, state: dict[str, Any]) -> None:
        self._call("set_random_state", state=pickle.dumps(state))

    def _call(self, name: str, **arguments: Any) -> Any:
        with suppress(OSError):  # it has ended, which the answer says
            self._connection.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            # A program that an environment started may hold the connection open after the process has ended.
            while not self._connection.poll(_SECONDS_TO_END):
                if not self._process.is_alive() and not self._connection.poll():
                    raise EOFError
            value, error, is_input_error, random_streams = self._connection.recv()
        except (EOFError, OSError) as broken:
            self._process.join(_SECONDS_TO_END)
            raise SamplerEnded(
                f"the process that samples beside the training ended with exit status {self._process.exitcode} (-9: killed, "
                "most often because memory ran out); see its output above, and lower prompts_per_round or "
                "sampler.max_batch_size, or set rollout_lag=0"
            ) from broken
        if error is not None:
            raise InputError(error) if is_input_error else RuntimeError(f"in the process that samples:\n{error}")
        self._random_state = random_streams
        return value


def _as_first_gpu(device: torch.device) -> tuple[torch.device, dict[str, str]]:
    """Return what the other process calls ``device``, and the environment variables that make it so.

    vLLM samples on the first GPU that its process sees. A later one is therefore the only one that the process sees.
    """
    if device.type != "cuda" or not device.index:
        return device, {}
    visible = [name.strip() for name in os.environ.get(_GPUS, "").split(",") if name.strip()]
    return torch.device("cuda", 0), {_GPUS: visible[device.index] if visible else str(device.index)}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a process that is started meanwhile: it may ask for its GPUs as soon as it imports a package."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _end(process: multiprocessing.process.BaseProcess, connection: Connection) -> None:
    """Let an idle process end by itself; kill one that is in the middle of a round."""
    with suppress(OSError):
        connection.send(None)
    connection.close()
    process.join(_SECONDS_TO_END)
    if process.is_alive():
        process.kill()
        process.join()


# ------------------------------------------------------------------------------------------------- shared weights

Layout = Mapping[str, tuple[torch.Size, torch.dtype]]


def _aligned_bytes(entry: tuple[torch.Size, torch.dtype]) -> int:
    shape, dtype = entry
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _views(memory: Any, layout: Layout) -> dict[str, Tensor]:
    """Return tensors in ``memory``; their offsets are the same in both processes, because pages are mapped whole."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    start, views = -flat.data_ptr() % _ALIGNMENT, {}
    for name, (shape, dtype) in layout.items():
        views[name] = flat[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        start += _aligned_bytes((shape, dtype))
    return views


# ------------------------------------------------------------------------------------------------- the other process


def _serve(theirs: Connection, ours: Connection, cfg: DictConfig, run: Run, memory: Any, layout: Layout, threads: int) -> None:
    """Answer calls until the training process says that it ends, or closes its end, also by being killed."""
    leave_stopping_to_the_training()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, of which Python warns after the run's last line if it is killed
    theirs.close()  # while a copy is open here, this process would not see that the training process has ended
    torch.set_num_threads(threads)
    try:
        player = _attempt(ours, lambda: _Player(cfg, run, _views(memory, layout)), silent=True)
        while (call := ours.recv()) is not None:
            name, arguments = call
            _attempt(ours, lambda name=name, arguments=arguments: getattr(player, name)(**arguments))
    except (EOFError, OSError):
        return


def leave_stopping_to_the_training() -> None:
    """Do nothing on SIGINT and SIGTERM: a signal to all processes ends no round, and the training process decides when to stop.

    With SIG_IGN programs that an environment starts would inherit it, and no `terminate` or `timeout` could end them.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: None)


def _attempt(connection: Connection, call: Callable[[], Any], silent: bool = False) -> Any:
    """Send (answer, None, False, random streams), or (None, what went wrong, whether it is a sentence for the user, None).

    The streams are bytes: torch sends a tensor as a file that the receiver opens, which takes both processes alive.
    """
    try:
        answer = call()
    except Exception as error:
        known = isinstance(error, InputError)
        connection.send((None, str(error) if known else traceback.format_exc(), known, None))
        return None
    connection.send((None if silent else answer, None, False, pickle.dumps(random_state())))
    return answer


class _Player:
    """Play episodes with a model whose weights are the shared ones."""

    def __init__(self, cfg: DictConfig, run: Run, weights: dict[str, Tensor]) -> None:
        seed_global_streams(run.seed)
        self._collect = build_collector(cfg, build(cfg.sampler), as_chat_tokenizer(build(cfg.tokenizer)))
        self._weights = weights
        self._model = load_model(cfg, run, cfg.model, weights, trained=False)
        state = self._model.state_dict()
        self._shares = all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items())

    def collect(self, adapters: bool, **arguments: Any) -> CollectResult:
        if not self._shares:  # on another device, or stored in another way
            self._model.load_state_dict(self._weights)
        has_adapters = next(adapter_modules(self._model), None) is not None
        with disable_adapter(self._model) if has_adapters and not adapters else nullcontext():
            result = self._collect(self._model, **arguments)
        for rollout in result.rollouts:  # the training process has these already
            vars(rollout).update(example=None, prompts=None)
        return result

    def set_random_state(self, state: bytes) -> None:
        set_random_state(pickle.loads(state))
