"""Test which folders a sweep hands to its runs: those that their command line reads as they are written."""

from pathlib import Path

import pytest

from pidistill.commands.plan.reading import merged
from pidistill.commands.sweep.cells import grid_cells, read_sweep, stage_runs
from pidistill.errors import InputError


@pytest.mark.parametrize("folder", ["/tmp/my runs/ü {a}", "runs/sweeps/opsd", "2026-11-30", "1", "a:b,c'd\"[e]", "~"])
def test_a_folder_arrives_at_the_runs_as_it_is_written(folder):
    sweep = read_sweep("tiny/opsd", output_dir=Path(folder))
    (run,) = stage_runs(sweep, grid_cells(sweep)[0])
    words = run.command[run.command.index("--config") + 2 :]
    assert merged("tiny/opsd", words).output_dir == str(run.folder)


@pytest.mark.parametrize("folder", ["/tmp/my runs #2/x", "/tmp/runs: new", "/tmp/lr=1", "{a}", "[a", "/tmp/${HOME}"])
def test_a_folder_that_the_runs_would_read_as_another_is_refused(folder):
    with pytest.raises(InputError, match=r"^output_dir=.* cannot be handed to the runs, .* name a folder without them$"):
        read_sweep("tiny/opsd", output_dir=Path(folder))
    with pytest.raises(InputError, match=r"^base=.* cannot be handed to the runs"):
        read_sweep("tiny/opsd", base=folder)
