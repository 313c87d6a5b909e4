"""Give the config and tables to the metric loggers of torchtune, whose own interface takes only numbers."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pidistill.errors import escape_controls

Row = dict[str, Any]


def log_config(logger: Any, cfg: DictConfig) -> None:
    """Give the config to the logger; TensorBoard gets it as a text, because torchtune's class writes it to a file alone."""
    if hasattr(logger, "log_config"):
        logger.log_config(cfg)
    if (writer := getattr(logger, "_writer", None)) is not None:
        lines = OmegaConf.to_yaml(cfg).splitlines()
        writer.add_text("config", "\n".join(f"    {escape_controls(line)}" for line in lines), 0)  # a block of code


def log_table(logger: Any, name: str, rows: Sequence[Row], step: int) -> None:
    """Give the rows to what the logger holds: W&B's run, TensorBoard's writer, MLflow's module, Comet's experiment.

    A logger of one's own gets them by its method ``log_table(name, rows, step)``, if it has one; others get none.
    """
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    if hasattr(logger, "log_table"):
        logger.log_table(name, rows, step)
    elif (wandb := getattr(logger, "_wandb", None)) is not None:
        if wandb.run:
            wandb.log({name: wandb.Table(columns=columns, data=cells), "global_step": step})
    elif (writer := getattr(logger, "_writer", None)) is not None:
        writer.add_text(name, markdown_table(columns, cells), step)
    elif (mlflow := getattr(logger, "_mlflow", None)) is not None:
        if mlflow.active_run():
            data = {key: [row[i] for row in cells] for i, key in enumerate(columns)}
            mlflow.log_table(data, artifact_file=f"{name}/step_{step}.json", run_id=logger._run_id)
    elif (experiment := getattr(logger, "experiment", None)) is not None:
        experiment.log_table(f"{name}_step_{step}.csv", tabular_data=cells, headers=columns)


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """Return a table in which what a model wrote is text: neither HTML nor a new cell or row."""
    lines = [[_escaped(cell) for cell in columns], ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> Any:
    """Return numbers as they are, and everything else as text: a column of such a table has one type."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return value if isinstance(value, str) else str(value)


def _escaped(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    text = "".join(f"&#{ord(letter)};" if letter in "&<>|`*_[]\\" else letter for letter in value)
    return "<br>".join(escape_controls(line) for line in text.split("\n"))
