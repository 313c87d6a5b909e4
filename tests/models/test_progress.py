"""Test the line of progress while weights are loaded and saved, and that the log's lines stay whole beside a bar."""

import functools
import io
import logging
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from tqdm.auto import tqdm

from pidistill.distributed.run import Run
from pidistill.models import progress
from pidistill.training.load import _fill
from pidistill.training.metrics_log import keep_lines_whole


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream, rank=0) -> str:
    monkeypatch.setattr(progress, "_FIRST_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    if rank:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
    assert list(progress.show_weights(["a", "b"], "loading weights", "file")) == ["a", "b"]
    return stream.getvalue()


def test_a_terminal_of_the_first_process_sees_how_many_are_done(monkeypatch):
    assert "loading weights" in shown(monkeypatch, Terminal()) and "2" in shown(monkeypatch, Terminal())


def test_a_log_file_and_other_processes_get_no_line(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""
    assert shown(monkeypatch, Terminal(), rank=1) == ""


def test_loads_that_end_at_once_show_nothing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    list(progress.show_weights(["a"], "loading weights", "file"))
    assert stream.getvalue() == ""


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_first_of_several_processes_sees_how_many_weights_are_placed(monkeypatch, tmp_path, one_process):
    """Filled as several processes fill a model, from the first one's weights, though the others are not there."""
    given = {f"{i}.{name}": torch.randn(shape) for i in range(3) for name, shape in (("weight", (4, 4)), ("bias", (4,)))}
    with torch.device("meta"):
        model = fully_shard(nn.Sequential(*(nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(3))))
    monkeypatch.setattr(progress, "_FIRST_AFTER_S", 0.0)
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0))
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    _fill(model, Run(torch.device("cpu"), torch.float32, 0, 2, 0, tmp_path), given, cpu_offload=False)
    assert all(f"{placed}/6" in stream.getvalue() for placed in range(7)) and "placing weights" in stream.getvalue()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.full_tensor(), given[name].bfloat16())


def written_beside_a_bar(monkeypatch, stream) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    log = logging.Logger("own")
    log.addHandler(logging.StreamHandler(stream))
    bar = tqdm(total=9, desc="test", file=stream)
    log.addFilter(keep_lines_whole(bar))
    bar.refresh()
    log.warning("an alarm")
    bar.close()
    return stream.getvalue()


def test_a_line_of_the_log_starts_at_the_left_of_a_cleared_line_of_the_terminal(monkeypatch):
    before = written_beside_a_bar(monkeypatch, Terminal()).split("an alarm")[0]
    assert "test" in before and before.rsplit("\r", 2)[1].strip() == "" and before.endswith("\r")


def test_a_line_of_the_log_is_a_line_of_a_file(monkeypatch):
    text = written_beside_a_bar(monkeypatch, io.StringIO())
    assert "\nan alarm\n" in text
