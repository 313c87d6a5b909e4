"""Test the structure of the repository: imports run one way, and what tests share lies in tests/support."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way_through_the_folders():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_test_module_imports_another():
    """Keep in tests/support what several test modules share; only a module that a worker process imports names itself."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(paths) > 100
    for path in paths:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imported = set(re.findall(r"^\s*(?:from|import) (tests\.[\w.]*\btest_\w+)", path.read_text(encoding="utf-8"), re.M))
        assert imported <= {own}, f"{path} imports {imported - {own}}"
