"""Run sweeps from configs only: every cell is a plain `pidistill run` with overrides, several workers may share a folder.

Enters: configs or a sweep file, and values of keys. Leaves: results.jsonl, results.md and pictures. Read command.py first, then
cells.py (what is run), search.py (who runs it) and execute.py (how).
"""

import os

from pidistill.envs.extras import load_extra

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's kernel names a backend that its own environment alone has
for library in ("optuna", "matplotlib"):
    load_extra(library, "sweep")
