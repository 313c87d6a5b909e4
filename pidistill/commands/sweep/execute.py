"""Run a stage, an evaluation, a cell. A folder's lock is held by its worker and by the run; its record says how it ended.

The locks are `flock`s: the system frees them when their holders die, so that a killed worker's cell is free at once and a slow
one's never is. Like SQLite's locks they need a shared file system that supports locks.
"""

import contextlib
import fcntl
import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pidistill.commands.places import folders
from pidistill.commands.sweep.cells import (
    CHECKPOINT_KEY,
    Cell,
    StageRun,
    Sweep,
    evaluate_overrides,
    evaluation_of,
    fingerprint,
    run_command,
    safe_name,
    short_hash,
    stage_runs,
)
from pidistill.commands.sweep.results import best_step, evaluation_numbers, run_numbers, total
from pidistill.errors import InputError, escape_controls
from pidistill.jsonl import replace_file

RECORD = "sweep.json"
# How often what was started is looked at. The system may hand a signal to any thread of this process, of which a call that
# waits in the main thread learns nothing.
LOOKS_EVERY_S = 0.1


def print_line(text: str) -> None:
    """Print a line at once, so that those of several workers do not mix."""
    print(escape_controls(text), flush=True)


# ------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def locked(output_dir: Path, name: str) -> Iterator[int]:
    """Hold the sweep's lock ``name`` after waiting for it; yield its file descriptor."""
    descriptor = try_lock(output_dir, name, wait=True)
    with descriptor:
        yield descriptor.fileno()


def try_lock(output_dir: Path, name: str, *, wait: bool = False) -> Any:
    """Return the open lock file, or None where another process holds it; closing it frees the lock."""
    folder = output_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / safe_name(name)).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


# ------------------------------------------------------------------------------------------- one process


def execute(command: Sequence[str], log: Path, lock: int) -> int:
    """Run `pidistill ...` with its output in ``log``; return its exit status. It holds the lock even if this worker dies.

    Where this worker is told to end, the run is told too, and may save before it does.
    """
    with log.open("w") as file:
        program = [sys.executable, "-m", "pidistill.commands.main", *command[1:]]
        run = subprocess.Popen(program, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,))
    try:
        while run.poll() is None:
            time.sleep(LOOKS_EVERY_S)
        return run.returncode
    except BaseException:  # SystemExit of a signal, and KeyboardInterrupt
        run.terminate()
        run.wait()
        raise


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise SystemExit(143) within, so that it also ends what was started from here."""
    if threading.current_thread() is not threading.main_thread():  # signal handlers belong to the main thread
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_error(log: Path) -> str:
    """Return the recipe's own sentence, or the last exception, or the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\n\r]", text) if line.strip()]  # a progress bar ends in a carriage return
    for pattern in (r"error: ", r"(\[rank\d+\]:\s*)?(?!.*ChildFailedError)[\w.]*(Error|Exception)\b"):
        found = [line for line in lines if re.match(pattern, line)]
        if found:
            return found[-1]
    return lines[-1] if lines else "no output"


def run_once(output_dir: Path, folder: Path, command: Sequence[str], mark: str) -> dict[str, Any]:
    """Run ``command`` in ``folder`` unless it already ended well there with the same fingerprint; returns its record."""
    with locked(output_dir, str(folder.relative_to(output_dir))) as lock:
        record = read_record(folder)
        if record.get("status") == "ok" and record["fingerprint"] == mark:
            return record
        if record.get("status") == "ok":
            print_line(f"{folder}: its config has changed since it ran; it is run again")
        _make_empty(folder, record)
        print_line(f"$ {shlex.join(command)}")
        record = {"status": "running", "fingerprint": mark, "command": shlex.join(command), "commit": commit()}
        write_record(folder, record)
        begin, before = time.perf_counter(), _children_cpu_s()
        code = execute(command, folder / "log.txt", lock)
        stopped = stopped_by_signal(folder / "log.txt")
        record |= {"status": "failed" if code or stopped else "ok", "exit_code": code}
        record |= {"wall_seconds": time.perf_counter() - begin, "cpu_seconds": _children_cpu_s() - before}
        if record["status"] == "failed":
            record["error"] = stopped or last_error(folder / "log.txt")
        write_record(folder, record)
        return record


def stopped_by_signal(log: Path) -> str | None:
    """Return the line in which a run says that a signal stopped it; None where none did.

    A training run that SIGTERM stops saves and ends with exit status 0, although steps are missing.
    """
    if not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if re.match(r"SIG(TERM|INT)( again)?: ", line)), None)


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    replace_file(folder / RECORD, json.dumps(record, indent=2).encode())


def _make_empty(folder: Path, record: dict[str, Any]) -> None:
    """Empty a run's folder: a checkpoint that an earlier attempt left must not pass for one of this run's."""
    if folder.is_dir() and any(folder.iterdir()):
        if not record:
            raise InputError(f"{folder} holds files that no sweep wrote; move them away or set another --output-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def commit() -> str | None:
    """Return the checkout's commit, `-dirty` if it has changes; None outside a checkout of this project."""
    root = folders()[0].parent
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


# ------------------------------------------------------------------------------------------- one cell


def cell_fingerprint(sweep: Sweep, cell: Cell) -> str:
    """Return a hash of all that must be the same for a finished cell to count as finished."""
    marks = [run.fingerprint for run in stage_runs(sweep, cell)]
    if sweep.evaluate:
        marks.append(fingerprint(sweep.evaluate, evaluation_of(sweep, cell.arm), {}))
    return short_hash(json.dumps([marks, sweep.select, "" if marks[1:] or cell.arm.stages else cell.arm.base]))


def run_cell(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """Run a cell's stages and evaluations; return its row of results.jsonl, which also says why a cell failed."""
    row = {
        "cell": cell.id, "arm": cell.arm.name, "title": cell.arm.title, "base": cell.arm.base_name, "seed": cell.seed,
        "settings": dict(cell.settings),
        "config": cell.arm.stages[-1].config if cell.arm.stages else None,
        "overrides": dict(cell.arm.stages[-1].overrides) if cell.arm.stages else {},
        "select": sweep.select, "status": "ok", "stages": [], "commit": commit(),
    }  # fmt: skip
    try:
        row["fingerprint"] = cell_fingerprint(sweep, cell)
        _train(sweep, cell, row)
        _evaluate(sweep, cell, row)
    except InputError as error:
        row |= {"status": "failed", "error": str(error)}
    if row["status"] == "failed":
        print_line(f"FAILED {cell.id}: {row['error']}")
    return row


def _train(sweep: Sweep, cell: Cell, row: dict[str, Any]) -> None:
    for run in stage_runs(sweep, cell):
        record = run_once(sweep.output_dir, run.folder, run.command, run.fingerprint)
        stage = {"name": run.stage.name, "config": run.stage.config, "command": record["command"]}
        stage |= {"folder": str(run.folder.relative_to(sweep.output_dir)), "commit": record["commit"]}
        stage |= {key: record[key] for key in ("wall_seconds", "cpu_seconds")}
        stage |= run_numbers(run.folder)
        row["stages"].append(stage)
        if record["status"] != "ok":
            _fail(record, run.folder)
    for key in ("steps", "policy_tokens_trained", "wall_seconds", "cpu_seconds"):
        row[key] = total([stage.get(key) for stage in row["stages"]])
    sampling = [stage for stage in row["stages"] if stage["rounds"]]  # a stage that samples nothing has no rollouts to count
    for key in ("rollouts", "policy_tokens_sampled"):
        row[key] = total([stage.get(key) for stage in sampling])


def _fail(record: dict[str, Any], folder: Path) -> None:
    raise InputError(f"exit code {record['exit_code']}: {record['error']} (all of it in {folder}/log.txt)")


def _evaluate(sweep: Sweep, cell: Cell, row: dict[str, Any]) -> None:
    """Add `last` and `best` to a row: held-out numbers of the last saved checkpoint, and of the best one on validation."""
    if not cell.arm.stages:
        name = "base" if cell.arm.base_name is None else safe_name(f"base+{cell.arm.base_name}")
        folder = sweep.output_dir / "evaluate" / name
        row["last"] = evaluate_checkpoint(sweep, cell, Path(str(cell.arm.base)), folder, None)
        return
    run = list(stage_runs(sweep, cell))[-1]
    latest = run.folder / "latest"
    row["validation"], step = best_step(run.folder, sweep.select)
    row["kl_teacher_student_nats"] = row["stages"][-1]["kl_teacher_student_nats"]
    if not sweep.evaluate:
        return
    if not latest.exists():
        raise InputError(
            f"{run.folder} has no checkpoint `latest` to evaluate; check what the last stage of {cell.arm.name} saves"
        )
    row["last"] = _evaluate_run(sweep, cell, run, latest)
    best = run.folder / f"step_{step}"
    is_last = best.resolve() == latest.resolve()
    row["best"] = None if step is None else row["last"] if is_last else _evaluate_run(sweep, cell, run, best)


def _evaluate_run(sweep: Sweep, cell: Cell, run: StageRun, checkpoint: Path) -> dict[str, Any]:
    name = checkpoint.resolve().name
    own = evaluation_of(sweep, cell.arm)
    name += f"-{short_hash(json.dumps(own, sort_keys=True))}" if own else ""
    folder = sweep.output_dir / "evaluate" / run.folder.name / name
    return evaluate_checkpoint(sweep, cell, checkpoint, folder, run.fingerprint)


def evaluate_checkpoint(sweep: Sweep, cell: Cell, checkpoint: Path, folder: Path, mark: str | None) -> dict[str, Any]:
    assert sweep.evaluate is not None
    start = {CHECKPOINT_KEY: str(checkpoint)}
    command = run_command(sweep.evaluate, {"output_dir": str(folder), **start, **evaluate_overrides(sweep, cell.arm)})
    inputs = {"run": mark or str(checkpoint)}
    own = fingerprint(sweep.evaluate, start | evaluation_of(sweep, cell.arm), inputs)
    record = run_once(sweep.output_dir, folder, command, own)
    if record["status"] != "ok":
        _fail(record, folder)
    found = re.fullmatch(r"step_(\d+)", checkpoint.resolve().name)
    place = {"step": int(found[1]) if found else None, "folder": str(folder.relative_to(sweep.output_dir))}
    return place | evaluation_numbers(folder)
