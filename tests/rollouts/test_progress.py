"""Test the progress of a round: what it counts, where it shows it, and where it shows nothing."""

import re

import pytest
import torch.distributed as dist

from pidistill.rollouts import TorchtuneSampler, progress
from pidistill.testing import tiny_model
from tests.support.episodes import Counting, Script, collect


@pytest.fixture
def at_once(monkeypatch):
    """Everything is shown without a wait."""
    for name in ("_FIRST_AFTER_S", "_REFRESH_S", "_LINE_EVERY_S"):
        monkeypatch.setattr(progress, name, 0.0)


@pytest.fixture
def lines(at_once, monkeypatch):
    """The lines of the log."""
    found = []
    monkeypatch.setattr(progress.log, "info", found.append)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    return found


def sample_two_turns(rows=3):
    """Sample rows of two turns of one token, with an observation of one token between them."""
    answers = {}

    def answer(row, ids):
        answers[row] = answers.get(row, 0) + 1
        return [3] if answers[row] == 1 else None

    stops = frozenset(range(40))
    sampler = TorchtuneSampler(max_new_tokens=9)
    prompts, seeds = [[1, 2]] * rows, range(rows)
    return sampler.sample(tiny_model(40), prompts, group_size=1, seeds=seeds, stop_ids=stops, pad_id=0, on_turn_end=answer)


def test_tokens_that_were_sampled_and_rows_that_ended_are_counted(lines):
    with progress.sampling_progress(3, "sampling"):
        samples = sample_two_turns()
    sampled = sum(sum(sample.policy_mask) for sample in samples)
    assert sampled == 6 < sum(len(sample.tokens) for sample in samples)
    assert re.fullmatch(r"sampling: 3 of 3 rows, 6 tokens, [\d,]+ tokens/s", lines[-1])
    counts = [int(re.search(r"(\d+) tokens,", line)[1]) for line in lines]
    assert counts == sorted(counts) and counts[0] < 6


def test_a_round_has_the_progress_of_all_its_rows(lines):
    class Counted(Script):
        def sample(self, *arguments, **settings):
            samples = super().sample(*arguments, **settings)
            progress.count(tokens=7, rows=1)
            return samples

    collect(Counted("q.", "q."), Counting(), "ab", view="teacher", temperature=0.0)
    assert lines[0].startswith("sampling, teacher view, greedy: 1 of 2 rows, 7 tokens, ")
    progress.count(tokens=1)
    assert len(lines) == 1, "counted after the round"


def test_a_terminal_gets_one_line_that_goes(at_once, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.sampling_progress(2, "sampling"):
        progress.count(tokens=1200, rows=1)
    shown = capsys.readouterr().err
    assert "1/2" in shown and "1,200 tokens" in shown and "\n" not in shown


@pytest.mark.parametrize("why", ["other process", "switched off", "no row", "short"])
def test_no_progress_is_shown_by_other_processes_where_switched_off_or_for_short_rounds(why, lines, monkeypatch, capsys):
    if why == "other process":
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
    if why == "switched off":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    if why == "short":
        monkeypatch.setattr(progress, "_LINE_EVERY_S", 30.0)
    with progress.sampling_progress(0 if why == "no row" else 2, "sampling"):
        progress.count(tokens=5, rows=1)
    assert not lines and not capsys.readouterr().err
