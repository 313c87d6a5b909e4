"""Write the log of a run: metrics.jsonl, texts and rollouts, the metric logger, the progress bar and the alarms."""

import contextlib
import json
import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from tqdm.auto import tqdm

from pidistill.config import build
from pidistill.data import RecipeData
from pidistill.distributed.run import Run
from pidistill.errors import escape_controls, one_line
from pidistill.jsonl import TRAINING_ROLLOUTS, replace_file, write_jsonl
from pidistill.training.health import Health
from pidistill.training.logger_tables import log_config, log_table
from pidistill.training.rollout_log import RolloutLog
from pidistill.training.run_folder import public_config
from pidistill.types import Batch, Scores

log = utils.get_logger("INFO")


class MetricsLog:
    """Write metrics.jsonl, to the configured torchtune metric logger and to the progress bar, on rank 0.

    On resume, rows after the checkpoint's step are cut off: they are about to be written again. A fresh run starts empty files.
    """

    def __init__(
        self, cfg: DictConfig, run: Run, *, first_step: int, last_step: int, title: str, data: RecipeData | None = None
    ) -> None:
        """``data``: the rows whose rollouts are looked at; None where a run has none."""
        self._active = run.is_main
        self._rollouts = None if data is None else RolloutLog(cfg, run, data, last_step=last_step)
        self._step = first_step
        self.path = run.output_dir / "metrics.jsonl"
        self._health = Health(cfg)
        if not self._active:
            return
        for row in _keep_rows_until(self.path, first_step):
            self._health.replay(row)  # the start of the run is what later rows are measured from, also after a resume
        for name in ("rollouts.jsonl", TRAINING_ROLLOUTS):
            _keep_rows_until(self.path.with_name(name), first_step)
        self._warned = False
        self._logger = build(cfg.metric_logger) if cfg.get("metric_logger") else None
        log_config(self._logger, shared_config(cfg))
        self._bar = tqdm(total=last_step, initial=first_step, desc=title, unit="step", mininterval=0.5)
        self._clear = keep_lines_whole(self._bar)
        log.addFilter(self._clear)

    def write(self, row: dict[str, Any], shown: Sequence[str] = ()) -> None:
        """Append one row, without numbers that are not finite; ``shown`` names those that the progress bar carries."""
        row = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        if not self._active:
            return
        if alarms := self._health.look(row):
            row["alarms"] = alarms
        write_jsonl(self.path, [row])
        self._step = row["step"]
        if self._rollouts is not None:
            self._rollouts.write(row["step"], row.get("round"))
        if self._logger is not None:
            numbers = {grouped(key): value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
            evaluated = [{"metric": name, "value": value} for name, value in numbers.items() if name.startswith("eval/")]
            with self._going_on():
                self._logger.log_dict(numbers, step=row["step"])
                log_table(self._logger, "evaluation", evaluated, row["step"])
        self._bar.n = row["step"]
        self._bar.set_postfix({key: f"{row[key]:.3g}" for key in shown if key in row}, refresh=False)
        self._bar.refresh()

    def look(self, batch: Batch, scores: Scores) -> None:
        """Look at a micro-batch of the step that is being computed; a sample of its rollouts is written with its row."""
        if self._rollouts is not None:
            self._rollouts.look(batch, scores, self._step + 1)

    def texts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append what student and teacher wrote to rollouts.jsonl, and show it."""
        if not self._active:
            return
        write_jsonl(self.path.with_name("rollouts.jsonl"), [{"step": step} | row for row in rows])
        if self._logger is not None:
            with self._going_on():
                log_table(self._logger, "rollouts", rows, step)
        for row in rows:
            reward = "no reward" if row["reward"] is None else f"reward {row['reward']:g}"
            shown = f"── step {step} · {row['example']} · {row['view']} · {reward}\n{row['text']}"
            self._bar.write(escape_controls(shown))

    def close(self) -> None:
        if self._active:
            log.removeFilter(self._clear)
            self._bar.close()
            if self._logger is not None:
                with self._going_on():
                    self._logger.close()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Warn once of a logger that fails, such as one whose server is down: its rows are in files of the run too."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                log.warning(
                    f"metric_logger {type(self._logger).__name__} failed ({type(error).__name__}: {one_line(error, 160)}); the "
                    f"run continues, and {self.path} has every row, also those that the logger misses from here on"
                )
            self._warned = True


def keep_lines_whole(bar: tqdm) -> Callable[[logging.LogRecord], bool]:
    """Return a filter of the log that takes the bar off the line which a record is about to be written on.

    The bar comes back at its next refresh. In a file, which nothing can be taken off, the record starts a line of its own.
    """
    weak = weakref.ref(bar)

    def clear(record: logging.LogRecord) -> bool:
        if (shown := weak()) is not None and not shown.disable:
            if sys.stderr.isatty():
                shown.clear()
            else:
                shown.fp.write("\n")
        return True

    return clear


GROUPS = ("eval", "kl", "time", "sampler_mismatch", "rollout_lag")


def grouped(name: str) -> str:
    """Return the name of a metric for a logger, which makes one panel of all names with the same beginning before `/`."""
    group = next((group for group in GROUPS if name.startswith(f"{group}_")), None)
    return name if group is None else f"{group}/{name.removeprefix(f'{group}_')}"


def shared_config(cfg: DictConfig) -> DictConfig:
    """Return the config for a logger, which resolves it: what comes from the environment, such as a key, stays as written."""

    def escaped(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: escaped(value) for key, value in node.items()}
        if isinstance(node, list):
            return [escaped(value) for value in node]
        return node.replace("${", "\\${") if isinstance(node, str) else node

    return OmegaConf.create(escaped(public_config(cfg)))


def _keep_rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut off the rows after ``step`` and what is no row; return those that stay. Step 0 is a fresh run: none stays."""
    if not path.is_file():
        return []
    # By bytes, not splitlines(): texts hold characters such as U+2028, and a damaged line need not be UTF-8.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()] if step > 0 else []
    rows = [_read_row(line) for line in lines]
    if broken := sum(row is None for row in rows[:-1]):  # half of a last line is what a kill leaves, and needs no warning
        log.warning(f"{broken} lines of {path} are damaged and left out; the run resumes without them")
    kept = [(line, row) for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    replace_file(path, b"".join(line + b"\n" for line, _ in kept))
    return [row for _, row in kept]


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line that has a step; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int | float) and math.isfinite(step) else None
