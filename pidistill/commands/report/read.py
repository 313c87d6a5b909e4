"""Read what the folder of a run holds: metrics, config, alarms, evaluations, texts and training rollouts."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pidistill.errors import InputError
from pidistill.jsonl import EVALUATED, TRAINING_ROLLOUTS, whole_lines

ADAPTER = "adapter"  # folder of a checkpoint, with the adapter of its weights
Row = dict[str, Any]


@dataclass
class RunData:
    """Hold everything that a report shows of one run; what its folder lacks is empty.

    Attributes:
        metrics: {name: one number or None per row of metrics.jsonl}; ``step`` among them.
        alarms: (step, name, sentence) in order.
        config: {dotted key: value}.
        evaluations: {view: numbers} of `evaluate_distributed`; a view of another checkpoint than the latest is named with it.
        weights: {view: the folder of the weights that answered}, of those views of which it is known.
        texts, rollouts: rows of rollouts.jsonl and of training_rollouts.jsonl.
    """

    name: str
    folder: Path
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    alarms: list[tuple[float, str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Row] = field(default_factory=dict)
    weights: dict[str, Path] = field(default_factory=dict)
    texts: list[Row] = field(default_factory=list)
    rollouts: list[Row] = field(default_factory=list)

    def last(self, name: str, until: float | None = None) -> float | None:
        """Return the last number of a metric, up to the step ``until``; None where there is none."""
        values = self.metrics.get(name, [])
        if until is not None:
            steps = self.metrics.get("step", [])
            values = [value for value, step in zip(values, steps, strict=False) if step is not None and step <= until]
        return next((value for value in reversed(values) if value is not None), None)

    def first(self, name: str) -> float | None:
        return next((value for value in self.metrics.get(name, []) if value is not None), None)

    def add_evaluation(self, views: Mapping[str, Row], weights: Path | None, place: str) -> None:
        """Add what an evaluation found; ``place``, its folder's name, tells its views from those of another evaluation.

        Args:
            weights: as :func:`read_weights` returns it.
        """
        folder, latest = self.folder.resolve(), self.folder / "latest"
        if weights is None or (weights == folder / "latest" and not (latest.is_dir() and not latest.is_symlink())):
            weights, suffix = None, f", {place}, step not recorded"
        elif weights.parent != folder:
            suffix = f", {weights.parent.name}/{weights.name}"
        else:
            suffix = "" if weights == latest.resolve() else f", {weights.name}"
        for view, row in views.items():
            name = f"{view}{suffix}" if f"{view}{suffix}" not in self.evaluations else f"{view}{suffix}, {place}"
            self.evaluations[name] = row
            if weights is not None:
                self.weights[name] = weights


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs, evaluations and sweeps; a sweep stands for the last stages of its cells.

    Raises:
        InputError: a folder is missing or holds none of the three.
    """
    runs: list[RunData] = []
    for folder in folders:
        if (folder / "results.jsonl").is_file():
            runs += _cells(folder)
        elif any((folder / name).is_file() for name in ("metrics.jsonl", "results.json", ".began")):
            runs.append(read_run(folder, str(folder)))
        else:
            raise InputError(
                f"{folder} holds no metrics.jsonl (a run), results.json (an evaluation) or results.jsonl (a sweep); "
                "check the name of the folder"
            )
    return _with_own_evaluations(runs)


def read_metrics(folder: Path, name: str) -> RunData:
    """Read the config, metrics and alarms of a run, which may be about to write its first row.

    Raises:
        InputError: the folder holds neither metrics.jsonl nor config.yaml.
    """
    if not any((folder / file).is_file() for file in ("metrics.jsonl", "config.yaml")):
        raise InputError(f"{folder} holds no metrics.jsonl and no config.yaml of a run; check the name of the folder")
    run = RunData(name, folder, config=read_config(folder))
    rows = read_rows(folder / "metrics.jsonl")
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    run.metrics = {key: [row[key] if _is_number(row.get(key)) else None for row in rows] for key in keys}
    run.alarms = [
        (row["step"], str(name), str(text))
        for row in rows
        if isinstance(row.get("alarms"), dict) and _is_number(row.get("step"))
        for name, text in row["alarms"].items()
    ]
    return run


def read_run(folder: Path, name: str) -> RunData:
    """Read all of a folder; its evaluations are those in it and in the folders right below it, without `previous_N`."""
    known = any((folder / file).is_file() for file in ("metrics.jsonl", "config.yaml"))
    run = read_metrics(folder, name) if known else RunData(name, folder)
    run.evaluations = read_results(folder / "results.json")
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not re.fullmatch(r"previous_\d+", path.name)):
        run.add_evaluation(read_results(path / "results.json"), read_weights(path, read_config(path)), path.name)
    run.texts = [row for row in read_rows(folder / "rollouts.jsonl") if isinstance(row.get("text"), str)]
    run.rollouts = [row for row in read_rows(folder / TRAINING_ROLLOUTS) if isinstance(row.get("tokens"), list)]
    return run


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a log that may be being written: a line that is not a JSON object is left out."""
    found = (_parse(line) for line in whole_lines(path))
    return [row for row in found if isinstance(row, dict)]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_results(path: Path) -> dict[str, Row]:
    """Return {view: numbers} of an evaluation's results.json; nothing where there is none."""
    found = _parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return {view: row for view, row in found.items() if isinstance(row, dict)} if isinstance(found, dict) else {}


def read_weights(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the folder of the weights that an evaluation answered with; None where nothing names it.

    Without the evaluation's record the folder is the one that its config names: RUN/latest then stands for any step of the run.
    """
    path = folder / EVALUATED
    record = _parse(path.read_text(encoding="utf-8")) if path.is_file() else None
    recorded = record.get("weights") if isinstance(record, dict) else None
    named = recorded or config.get("adapter_dir") or config.get("checkpointer.checkpoint_dir")
    if not isinstance(named, str):
        return None
    found = folder / named if recorded else Path(named)
    found = found.parent if found.name == ADAPTER else found
    return found.resolve() if recorded else found.parent.resolve() / found.name


def read_config(folder: Path) -> dict[str, Any]:
    """Return {dotted key: value} of config.yaml; nothing where it is absent or broken."""
    try:
        return dict(_leaves(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)))
    except (OSError, ValueError, OmegaConfBaseException, YAMLError):
        return {}


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def config_difference(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Return {key: its value in each run} of the keys whose values are not the same in all; None is "not in the config"."""
    configs = [run.config for run in runs if run.config]
    keys = sorted({key for config in configs for key in config})
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len({json.dumps(value, default=str) for value in row}) > 1}


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """Return at most ``most`` of the rows, evenly spaced, in their order."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def _cells(folder: Path) -> Iterator[RunData]:
    """Yield the last stage of each cell of a sweep, named by its title, settings, base and seed, with held-out numbers."""
    last = {row["cell"]: row for row in read_rows(folder / "results.jsonl") if "cell" in row}
    for row in last.values():
        settings = ", ".join(f"{key}={value}" for key, value in (row.get("settings") or {}).items())
        seed = f"seed {row['seed']}" if row.get("seed") is not None else ""
        base = f"base {row['base']}" if row.get("base") else ""
        failed = "FAILED" if row.get("status") == "failed" else ""
        name = " · ".join(filter(None, [str(row.get("title") or row["cell"]), settings, base, seed, failed]))
        stages = [stage["folder"] for stage in row.get("stages") or [] if "folder" in stage]
        held_out = (row.get("last") or {}).get("folder")
        path = folder / (stages[-1] if stages else held_out or "")
        if (stages or held_out) and path.is_dir():
            run = read_run(path, name)
            run.evaluations |= read_results(folder / held_out / "results.json") if held_out else {}
            yield run


def _with_own_evaluations(runs: Iterable[RunData]) -> list[RunData]:
    """Give an evaluation's numbers to the run among ``runs`` whose checkpoint it evaluated; others stay by themselves."""
    runs = list(runs)
    alone = []
    for run in runs:
        weights = read_weights(run.folder, run.config)
        parents = weights.parents if weights else []
        owner = next((other for other in runs if other.metrics and other.folder.resolve() in parents), None)
        if run.metrics or owner is None or owner is run:
            alone.append(run)
        else:
            owner.add_evaluation(run.evaluations, weights, run.folder.name)
    return alone


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
