"""`pidistill watch`: show the numbers of a run in the terminal while it is being written, or serve its report.

pidistill watch runs/tiny/pi_distill
pidistill watch runs/tiny/pi_distill --once
pidistill watch runs/tiny/pi_distill --serve

Without `--serve` the terminal shows the progress with the time left, the last numbers with their course, and the alarms, until
the run is complete or Ctrl-C. With it the page of `pidistill report` is served on this machine only and loads itself
again when the run has written more.
"""

import argparse
import http.server
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pidistill.commands.common import Parser, exit_on_input_error
from pidistill.commands.report.command import render
from pidistill.commands.report.read import RunData, read_metrics, read_runs
from pidistill.errors import InputError, escape_controls
from pidistill.jsonl import TRAINING_ROLLOUTS

SHOWN = (
    "reward_mean", "success_frac", "eval_student_success_greedy", "eval_student_success", "eval_teacher_success",
    "eval_privileged_gain", "kl_teacher_student_nats", "kl_student_teacher_nats", "entropy_nats", "leak_frac", "loss",
    "grad_norm", "clip_frac", "ratio_mean", "sampler_mismatch_mean_nats", "completion_tokens_mean", "truncated_frac",
    "zero_advantage_frac", "tokens_per_s", "time_rollout_s", "time_score_s", "time_update_s",
)  # fmt: skip
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # characters of a curve
RECENT = 10  # steps whose seconds tell the time left
FILES = ("metrics.jsonl", "rollouts.jsonl", TRAINING_ROLLOUTS, "config.yaml", "results.jsonl", "results.json", "*/results.json")
LOOPBACK = "127.0.0.1"


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="pidistill watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    made.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks")
    made.add_argument("--once", action="store_true", help="show the present state and end")
    made.add_argument("--serve", type=int, nargs="?", const=0, metavar="PORT", help="serve the report on this machine only")
    return made


def main(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    with exit_on_input_error():
        if arguments.every <= 0:
            raise InputError(f"--every={arguments.every:g} must be above 0 seconds")
        if arguments.serve is not None:
            serve(arguments.run, arguments.serve)
        else:
            watch(arguments.run, arguments.every, arguments.once)


def watch(folder: Path, every: float, once: bool) -> None:
    """Show the run until it is complete."""
    console = Console()
    run = read_metrics(folder, str(folder))
    if once:
        console.print(view(run))
        return
    try:
        with Live(view(run), console=console, auto_refresh=False, screen=False) as live:
            while not complete(run):
                time.sleep(every)
                run = read_metrics(folder, str(folder))
                live.update(view(run), refresh=True)
    except KeyboardInterrupt:
        return


def last_step(run: RunData) -> int | None:
    """Return the step at which the run ends, where its config says one."""
    value = run.config.get("max_steps")
    return value if isinstance(value, int) and value > 0 else None


def complete(run: RunData) -> bool:
    end = last_step(run)
    return end is not None and (run.last("step") or 0) >= end


def seconds_left(run: RunData) -> float | None:
    """Estimate the time to the end from the seconds of the last steps, without evaluations; None where it is not known."""
    phases = [_known(run, f"time_{phase}_s")[-RECENT:] for phase in ("rollout", "score", "update")]
    seconds = sum(sum(values) / len(values) for values in phases if values)
    end, now = last_step(run), run.last("step")
    return None if not seconds or end is None or now is None else max(0.0, end - now) * seconds


def _known(run: RunData, name: str) -> list[float]:
    return [value for value in run.metrics.get(name, []) if value is not None]


def view(run: RunData) -> RenderableType:
    """Return what the terminal shows of a run."""
    now, end, left = run.last("step") or 0, last_step(run), seconds_left(run)
    done = "complete" if complete(run) else f"about {timedelta(seconds=round(left))} left" if left else ""
    head = Text(f"{escape_controls(run.name)} · step {now:g}" + (f" of {end}" if end else "") + (f" · {done}" if done else ""))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("now", justify="right")
    table.add_column("start", justify="right")
    table.add_column("course")
    for name in SHOWN:
        values = _known(run, name)
        if values:
            table.add_row(name, f"{values[-1]:.4g}", f"{values[0]:.4g}", Text(curve(values), style="cyan"))
    alarms = [Text(f"{name}: {text}", style="yellow") for _, name, text in run.alarms] or [Text("no alarm", style="green")]
    share = min(1.0, now / end) if end else 0.0
    bar = Text("━" * round(60 * share), style="cyan") + Text("─" * (60 - round(60 * share)), style="dim")
    return Group(head, bar, table if table.row_count else Text("no step yet"), Panel(Group(*alarms), title="alarms"))


def curve(values: Sequence[float], width: int = WIDTH) -> str:
    """Return a line of bars from the smallest value to the largest: means over equal stretches of the run."""
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    if high - low <= 1e-5 * max(abs(low), abs(high)):  # rounding is no course
        return BARS[0] * count
    return "".join(BARS[round((len(BARS) - 1) * (mean - low) / (high - low))] for mean in means)


# ------------------------------------------------------------------------------------------- the served page


def version_of(folder: Path) -> str:
    """Return a text that changes when a file of the run or of the sweep does, or of an evaluation in it."""
    stats = [path.stat() for name in FILES for path in sorted(folder.glob(name)) if path.is_file()]
    return "-".join(f"{stat.st_mtime_ns}.{stat.st_size}" for stat in stats)


def make_server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of the report of ``folder`` on the loopback address; port 0 takes a free one."""
    read_runs([folder])
    made: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answer / with the page and /version with the text that the page compares."""

        def do_GET(self) -> None:
            # A page of another site whose name leads here would send that name.
            if self.headers.get("Host", "").partition(":")[0] not in (LOOPBACK, "localhost"):
                self.send_error(403)
            elif self.path == "/version":
                self.answer(version_of(folder).encode(), "text/plain")
            elif self.path == "/":
                self.answer(self.page(), "text/html; charset=utf-8")
            else:
                self.send_error(404)

        def page(self) -> bytes:
            version = version_of(folder)
            if version not in made:
                made.clear()
                made[version] = render(read_runs([folder]), live=version).encode()
            return made[version]

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Leave the terminal alone."""

    try:
        return http.server.ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"--serve={port} cannot be used ({error}); name another port, or none for a free one") from error


def serve(folder: Path, port: int) -> None:
    """Serve the report until Ctrl-C."""
    with make_server(folder, port) as server:
        print(f"http://{LOOPBACK}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
