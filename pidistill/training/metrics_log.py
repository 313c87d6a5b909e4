"""The log of a run: metrics.jsonl, rollouts.jsonl, the metric logger, the progress bar and the collapse alarm."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import utils
from tqdm.auto import tqdm

from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.jsonl import whole_lines, write_jsonl

log = utils.get_logger("INFO")


class MetricsLog:
    """metrics.jsonl, the configured torchtune metric logger and the progress bar, on rank 0.

    On resume, rows after the checkpoint's step are cut off: they are about to be written again. A fresh run starts empty files.
    """

    def __init__(self, cfg: DictConfig, run: Run, *, first_step: int, last_step: int, title: str) -> None:
        self._active = run.is_main
        self.path = run.output_dir / "metrics.jsonl"
        self._alarm = CollapseAlarm()
        if not self._active:
            return
        for row in _keep_rows_until(self.path, first_step):
            self._alarm.look(row)  # where the run started is where it is measured from, also after a resume
        _keep_rows_until(self.path.with_name("rollouts.jsonl"), first_step)
        self._logger = build(cfg.metric_logger) if cfg.get("metric_logger") else None
        self._bar = tqdm(total=last_step, initial=first_step, desc=title, unit="step", mininterval=0.5)

    def write(self, row: dict[str, Any], shown: Sequence[str] = ()) -> None:
        """Append one row, without numbers that are not finite; ``shown`` names those that the progress bar carries."""
        row = {key: value for key, value in row.items() if not isinstance(value, float) or _is_finite(value)}
        if not self._active:
            return
        self._alarm.look(row)
        write_jsonl(self.path, [row])
        if self._logger is not None:
            numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
            self._logger.log_dict(numbers, step=row["step"])
        self._bar.n = row["step"]
        self._bar.set_postfix({key: f"{row[key]:.3g}" for key in shown if key in row}, refresh=False)
        self._bar.refresh()

    def texts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append what student and teacher wrote to rollouts.jsonl, and show it."""
        if not self._active:
            return
        write_jsonl(self.path.with_name("rollouts.jsonl"), [{"step": step} | row for row in rows])
        for row in rows:
            self._bar.write(f"── step {step} · {row['example']} · {row['view']} · reward {row['reward']:g}\n{row['text']}")

    def close(self) -> None:
        if self._active:
            self._bar.close()
            if self._logger is not None:
                self._logger.close()


class CollapseAlarm:
    """Warns, once each, when a run looks lost: the entropy gone, or the KL gone while the reward has not risen."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._said: set[str] = set()

    def look(self, row: dict[str, Any]) -> None:
        for key in ("kl_teacher_student_nats", "reward_mean"):
            if key in row:
                self._first.setdefault(key, row[key])
        if row.get("entropy_nats", 1.0) < 1e-3:
            self._say(
                "entropy", f"step {row['step']}: entropy is {row['entropy_nats']:.1e} nats per token; the policy is frozen"
            )
        start = self._first.get("kl_teacher_student_nats")
        if (
            start
            and row.get("kl_teacher_student_nats", start) < 0.02 * start
            and row.get("reward_mean", 1.0) <= self._first.get("reward_mean", 0.0)
        ):
            self._say("kl", f"step {row['step']}: kl(teacher||student) fell below 2% of its start and the reward has not risen")

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(f"collapse alarm: {text}")


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _keep_rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut off the rows after ``step``; returns those that stay. Step 0 is a fresh run: none stays."""
    if not path.is_file():
        return []
    lines = whole_lines(path)
    rows = [json.loads(line) for line in lines] if step > 0 else []
    kept = [row["step"] <= step for row in rows]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line, keep in zip(lines, kept, strict=False) if keep), encoding="utf-8")
    temporary.replace(path)
    return [row for row, keep in zip(rows, kept, strict=True) if keep]
