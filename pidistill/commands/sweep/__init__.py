"""Run sweeps by config alone: every cell is a plain `pidistill run` with overrides, several workers may share a folder.

values.py    what `key=0..2` and the like mean on the command line
check.py     refuses a wrong cell before the first one starts
cells.py     what is run: arms, swept values, seeds, stages, and when two runs are the same run
execute.py   runs one stage, one evaluation, one cell; a lock and a record per folder
search.py    grid, random and TPE search over cells with Optuna; claims, resuming, several workers
results.py   the numbers of a cell, the table over cells
pictures.py  learning curves, success, KL against success, heat map
command.py   the `pidistill sweep` command
"""

from pidistill.envs.extras import load_extra

for library in ("optuna", "matplotlib"):
    load_extra(library, "sweep")
