"""Test the line of progress while weights are loaded and saved, and that the log's lines stay whole beside a bar."""

import io
import logging
import sys

import torch.distributed as dist
from tqdm.auto import tqdm

from pidistill.models import progress
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
