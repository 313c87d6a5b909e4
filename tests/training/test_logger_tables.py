"""Test that rollouts and evaluations reach metric loggers as tables, in the calls of each library's own interface."""

import json
import re
import time
import zipfile
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.training.metric_logging import CometLogger, MLFlowLogger, TensorBoardLogger, WandBLogger

from pidistill.distributed.run import Run
from pidistill.training.logger_tables import log_table, markdown_table
from pidistill.training.metrics_log import MetricsLog

ROWS = [
    {"example": "row 1", "view": "student", "reward": 0.5, "reward_parts": {"right": 0.5}, "text": "<b>|`x`\nend\x1b[0m"},
    {"example": "row 2", "view": "teacher", "reward": 1, "text": "fine"},
]
COLUMNS = ["example", "view", "reward", "reward_parts", "text"]
CELLS = [["row 1", "student", 0.5, "{'right': 0.5}", "<b>|`x`\nend\x1b[0m"], ["row 2", "teacher", 1, None, "fine"]]


def holding(kind, **held):
    """Return a logger of torchtune's class, made without its service: what it holds is given."""
    logger = kind.__new__(kind)
    logger.__dict__.update(held)
    return logger


def test_a_table_of_wandb_goes_to_its_run_with_the_step_of_its_numbers():
    wandb = MagicMock()
    log_table(holding(WandBLogger, _wandb=wandb), "rollouts", ROWS, 7)
    wandb.Table.assert_called_once_with(columns=COLUMNS, data=CELLS)
    wandb.log.assert_called_once_with({"rollouts": wandb.Table.return_value, "global_step": 7})


def test_a_table_of_tensorboard_is_a_text_of_its_step():
    writer = MagicMock()
    log_table(holding(TensorBoardLogger, _writer=writer), "rollouts", ROWS, 7)
    writer.add_text.assert_called_once_with("rollouts", markdown_table(COLUMNS, CELLS), 7)


def test_a_table_of_mlflow_is_a_file_per_step():
    mlflow = MagicMock()
    log_table(holding(MLFlowLogger, _mlflow=mlflow, _run_id="r1", rank=0), "rollouts", ROWS, 7)
    data = dict(zip(COLUMNS, map(list, zip(*CELLS, strict=True)), strict=True))
    mlflow.log_table.assert_called_once_with(data, artifact_file="rollouts/step_7.json", run_id="r1")


def test_a_table_of_comet_is_a_file_per_step():
    def log_table_of_comet(filename, tabular_data=None, headers=False, **format_kwargs): ...

    experiment = SimpleNamespace(log_table=create_autospec(log_table_of_comet), end=lambda: None)
    log_table(holding(CometLogger, experiment=experiment), "rollouts", ROWS, 7)
    experiment.log_table.assert_called_once_with("rollouts_step_7.csv", tabular_data=CELLS, headers=COLUMNS)


@pytest.mark.parametrize("kind, held", [(WandBLogger, {"_wandb": MagicMock(run=None)}), (TensorBoardLogger, {"_writer": None})])
def test_a_logger_of_another_rank_gets_no_table(kind, held):
    log_table(holding(kind, **held), "rollouts", ROWS, 7)
    if "_wandb" in held:
        assert not held["_wandb"].log.called


def test_a_logger_of_ones_own_gets_the_rows_and_one_without_the_method_none():
    own = MagicMock(spec=["log_table"])
    log_table(own, "rollouts", ROWS, 7)
    own.log_table.assert_called_once_with("rollouts", ROWS, 7)
    log_table(object(), "rollouts", ROWS, 7)
    log_table(own, "evaluation", [], 7)
    assert own.log_table.call_count == 1


def test_what_a_model_wrote_is_text_in_markdown():
    lines = markdown_table(COLUMNS, CELLS).split("\n")
    assert len(lines) == 2 + len(ROWS) and all(line.count("|") == 1 + len(COLUMNS) for line in lines)
    assert "<b>" not in lines[2] and "\x1b" not in lines[2]
    assert unescape(lines[2].split(" | ")[-1].removesuffix(" |")) == r"<b>|`x`<br>end\x1b[0m"


def written(tmp_path, component, **settings):
    """Write two rows and the texts of a step to a real logger."""
    logger = {"_component_": f"torchtune.training.metric_logging.{component}", **settings}
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "objective": {"beta": 0.25, "note": "<b>|"}, "metric_logger": logger})
    run = Run(torch.device("cpu"), torch.float32, 0, 1, 0, tmp_path)
    log = MetricsLog(cfg, run, first_step=0, last_step=9, title="test")
    log.write({"step": 3, "loss": 1.0, "kl_teacher_student_nats": 0.5, "eval_student_success": 0.25})
    log.texts(3, ROWS)
    log.close()


def test_tensorboard_has_config_numbers_rollouts_and_evaluation(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written(tmp_path, "TensorBoardLogger", log_dir=str(tmp_path / "log"), organize_logs=False)
    events = accumulator.EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert {"loss", "kl/teacher_student_nats", "eval/student_success"} <= set(events.Tags()["tensors"])
    shown = {}
    for name, step in (("config", 0), ("rollouts", 3), ("evaluation", 3)):
        (event,) = events.Tensors(f"{name}/text_summary")
        assert event.step == step
        shown[name] = unescape(event.tensor_proto.string_val[0].decode())
    assert "    objective:\n      beta: 0.25\n" in shown["config"] and all(
        line.startswith("    ") for line in shown["config"].splitlines()
    )
    assert "fine" in shown["rollouts"] and re.search(r"eval/student_success \| 0\.25", shown["evaluation"])
    assert "loss" not in shown["evaluation"]


def test_mlflow_has_config_numbers_and_tables(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; pip install mlflow")
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    written(tmp_path, "MLFlowLogger", experiment_name="test", tracking_uri=store)
    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["objective.beta"] == "0.25"
    assert run.data.metrics["kl/teacher_student_nats"] == 0.5 and run.data.metrics["eval/student_success"] == 0.25
    table = Path(mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/rollouts/step_3.json", tracking_uri=store))
    assert json.loads(table.read_text()) == {"columns": COLUMNS, "data": CELLS}


def test_wandb_offline_has_config_numbers_and_tables(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed; pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "WandBLogger", project="test", log_dir=str(tmp_path))
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wanted = (b"objective", b'"beta"', b"kl/teacher_student_nats", b"eval/student_success")
    for _ in range(100):  # the file belongs to a process of wandb's own, which may still write when the run is over
        content = record.read_bytes()
        if not (missing := [name for name in wanted if name not in content]):
            break
        time.sleep(0.1)
    assert missing == []
    (table,) = (json.loads(path.read_text()) for path in record.parent.glob("files/media/table/rollouts_*.table.json"))
    assert table["columns"] == COLUMNS and table["data"] == CELLS


def test_comet_offline_has_config_numbers_and_tables(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml", reason="comet-ml is not installed; pip install comet-ml")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "CometLogger", project="test", online=False, log_code=False)
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    wanted = (b"objective", b"kl/teacher_student_nats", b"eval/student_success", b"rollouts_step_3.csv")
    assert [name for name in wanted if name not in files["messages.json"]] == []
    assert any(b"example,view,reward" in content and b"row 2,teacher,1" in content for content in files.values())
