"""Test what a sweep says of its progress, and how its pictures name the settings."""

import pytest

from pidistill.commands.sweep.cells import grid_cells, read_sweep
from pidistill.commands.sweep.groups import Group, name_differences
from pidistill.commands.sweep.results import append_result
from pidistill.commands.sweep.search import count_finished, progress_line


def groups(*settings, titles=("OPSD",)):
    rows = [[{"title": title}] for title in titles * len(settings)]
    return [Group("long", row[0]["title"], own, row, 0) for own, row in zip(settings, rows, strict=False)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"objective.beta": "1", "optimizer.lr": "2"}, {"objective.beta": "3", "optimizer.lr": "2"}], ["beta=1", "beta=3"]),
        ([{"a.lr": "1", "b.lr": "1"}, {"a.lr": "2", "b.lr": "3"}], ["a.lr=1 b.lr=1", "a.lr=2 b.lr=3"]),
        ([{"beta": "1"}], ["OPSD"]),
        ([{}, {"beta": "1"}], ["OPSD", "beta=1"]),
    ],
)
def test_a_picture_names_what_differs(settings, expected):
    assert [group.title for group in name_differences(groups(*settings))] == expected


def test_arms_keep_their_titles_beside_the_settings_that_differ():
    found = name_differences(groups({"x.beta": "1"}, {"x.beta": "2"}, titles=("OPSD", "SDFT")))
    assert [group.title for group in found] == ["OPSD beta=1", "SDFT beta=2"]


def test_the_line_after_a_cell_counts_all_workers_and_says_the_time_left(tmp_path):
    sweep = read_sweep("tiny/opsd", ["seed=0..4"], output_dir=tmp_path)
    cells = grid_cells(sweep)
    assert count_finished(sweep) == 0 and progress_line(sweep, 0, 5.0) == "0 of 5 cells finished"
    for cell, status in zip(cells[:3], ("ok", "failed", "ok"), strict=True):
        append_result(tmp_path, {"cell": cell.id, "arm": cell.arm.name, "status": status})
    assert progress_line(sweep, 0, 20.0) == "2 of 5 cells finished, about 0:00:30 left"
    assert progress_line(sweep, 1, 20.0) == "2 of 5 cells finished, about 0:01:00 left"
    for cell in cells:
        append_result(tmp_path, {"cell": cell.id, "arm": cell.arm.name, "status": "ok"})
    assert progress_line(sweep, 0, 9.0) == "5 of 5 cells finished"
