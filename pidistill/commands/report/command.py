"""`pidistill report`: write runs as one HTML file that needs no network.

pidistill report runs/tiny/pi_distill
pidistill report runs/tiny/pi_distill runs/tiny/rl --output compare.html
pidistill report runs/demo

A folder is a run, an evaluation (it joins the run whose checkpoint it evaluated) or a sweep. The page shows health, evaluations
with intervals, the configuration and its difference between runs, and a reader of the training rollouts in which every token
is coloured by what teacher and student think of it.
"""

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.commands.report.encode import encode_rollouts
from pidistill.commands.report.read import RunData, config_difference, read_runs, spread
from pidistill.errors import InputError, escape_controls
from pidistill.jsonl import replace_file

PAGE = Path(__file__).parent / "page"
MOST_TEXTS = 400


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="pidistill report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, an evaluation or a sweep")
    made.add_argument("--output", type=Path, help="default: report.html in the folder, or here for several")
    made.add_argument("--rollouts", type=int, default=2000, help="most rollouts of the page, over all runs")
    return made


def main(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    with exit_on_input_error():
        print(write_report(arguments.runs, arguments.output, arguments.rollouts))


def write_report(folders: list[Path], output: Path | None = None, most_rollouts: int = 2000) -> Path:
    """Write the report of ``folders`` and return its path."""
    if output is None:
        output = (folders[0] if len(folders) == 1 else Path()) / "report.html"
    page = render(read_runs(folders), most_rollouts)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and not output.is_file():  # a pipe or a device, such as /dev/stdout
            output.write_text(page, encoding="utf-8")
        else:
            replace_file(output.resolve(), page.encode())  # a link is followed
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}); name another file with --output") from error
    return output


def render(runs: list[RunData], most_rollouts: int = 2000, live: str | None = None) -> str:
    """Return the page; one with a version in ``live`` asks its server for a newer one."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {name.replace(".", "_"): (PAGE / name).read_text(encoding="utf-8") for name in PARTS}
    data, blob = page_data(runs, most_rollouts, live)
    made = f"pidistill {version('pidistill')}, {time.strftime('%Y-%m-%d %H:%M')}"
    return environment.get_template("report.html.jinja").render(
        title=escape_controls(title), made=made, data=json_of(data), blob=blob, **parts
    )


PARTS = ("uplot.min.js", "uplot.min.css", "report.js", "report.css")


def json_of(data: Any) -> str:
    """Return JSON that can stand in a script element: ASCII, and no character that HTML reads."""
    text = json.dumps(_finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(runs: list[RunData], most_rollouts: int, live: str | None) -> tuple[dict[str, Any], str]:
    """Return what the script of the page shows, and the long text of the rollouts' numbers."""
    each = max(1, most_rollouts // max(1, sum(bool(run.rollouts) for run in runs)))
    rollouts = [(i, row) for i, run in enumerate(runs) for row in spread(run.rollouts, each)][:most_rollouts]
    texts = [{"run": i} | _text_row(row) for i, run in enumerate(runs) for row in spread(run.texts, MOST_TEXTS)]
    difference = config_difference(runs) if len(runs) > 1 else {}
    encoded, blob = encode_rollouts(rollouts)
    data = {
        "runs": [_run(run) for run in runs],
        "difference": {key: [_shown(value) for value in values] for key, values in difference.items()},
        "rollouts": encoded,
        "logged": sum(len(run.rollouts) for run in runs),
        "texts": texts,
        "live": live,
    }
    return data, blob


def _run(run: RunData) -> dict[str, Any]:
    return {
        "name": escape_controls(run.name),
        "folder": escape_controls(str(run.folder)),
        "metrics": {escape_controls(name): values for name, values in run.metrics.items()},
        "alarms": [[step, escape_controls(name), escape_controls(text)] for step, name, text in run.alarms],
        "config": {escape_controls(key): _shown(value) for key, value in run.config.items()},
        "evaluations": {escape_controls(view): row for view, row in run.evaluations.items()},
    }


def _finite(node: Any) -> Any:
    """Return the data with None for numbers that JSON cannot say."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _shown(value: Any) -> str | None:
    return None if value is None else escape_controls(value if isinstance(value, str) else json.dumps(value, default=str))


def _text_row(row: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "row", "view", "reward", "stop_reason")
    kept = {name: row[name] for name in names if isinstance(row.get(name), int | float | str)}
    return kept | {name: escape_controls(str(row[name])) for name in ("example", "text", "prompt") if row.get(name) is not None}
