"""Check what goes wrong on several machines: a file that one of them lacks, and an output folder that they do not share.

The first process writes checkpoints and metrics, and all of them read the checkpoint that a run resumes from. So the output
folder must be on a file system that all machines share; the initial checkpoint, the data and the config may be copies of each.
"""

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from omegaconf.errors import InterpolationResolutionError

from pidistill.distributed.run import Run
from pidistill.errors import InputError, one_line


@contextmanager
def same_refusal_on_all_machines() -> Iterator[None]:
    """End all processes where one of them refuses its input, also where torchrun launched several machines.

    The others would wait for the refused process until a timeout: torchrun ends only the processes of its own machine.

    Raises:
        InputError: another process was refused, with its sentence.
    """
    failure: Exception | None = None
    try:
        yield
    except (InputError, InterpolationResolutionError, OSError) as error:
        failure = error
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        sentences = _of_all_processes("" if failure is None else one_line(failure))
        if failure is None and any(sentences):
            raise InputError(next(filter(None, sentences)))
    if failure is not None:
        raise failure


def _of_all_processes(sentence: str) -> list[str]:
    """Return the sentences of all processes, which may not have joined in a process group yet."""
    if dist.is_initialized():
        sentences = [""] * dist.get_world_size()
        dist.all_gather_object(sentences, sentence)
        return sentences
    store, rank, processes = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("pidistill checks", store)
    store.set(str(rank), sentence)
    return [store.get(str(other)).decode() for other in range(processes)]


def check_same_folder(run: Run) -> None:
    """Refuse processes whose output folder has the same name on disks of their own.

    Raises:
        InputError: a process does not see the file that the first one has just written.
    """
    if run.processes == 1:
        return
    mark = run.output_dir / run.from_main(lambda: _mark(run))
    host = socket.gethostname()
    seen = [None] * run.processes
    dist.all_gather_object(seen, (host, mark.exists()))
    if run.is_main:
        mark.unlink(missing_ok=True)
    blind = [(rank, where) for rank, (where, found) in enumerate(seen) if not found]
    if blind:
        rank, where = blind[0]
        raise InputError(
            f"output_dir={run.output_dir} of process {rank} on {where} is not the folder of process 0 on {seen[0][0]}; set "
            "output_dir to a folder on a file system that all machines share, by its absolute path"
        )


def _mark(run: Run) -> str:
    """Write an empty file that no other run can have written, and return its name."""
    mark = run.output_dir / f".start_{secrets.token_hex(8)}"
    mark.touch()
    return mark.name
