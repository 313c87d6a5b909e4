"""Test that lm-evaluation-harness takes a saved folder by the documented command, on a task file of this folder, offline."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.tiny_qwen import qwen_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "running.md"
COMMAND = re.findall(r"^lm_eval .+$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[0]
TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_the_documented_command_names_a_saved_folder_and_its_tasks():
    words = shlex.split(COMMAND)
    assert words[words.index("--model") + 1] == "hf" and "--tasks" in words
    assert words[words.index("--model_args") + 1] == "pretrained=shared/pi_distill"


@pytest.mark.slow
def test_the_documented_command_evaluates_a_saved_folder(tmp_path):
    if find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'pidistill[lm-eval]'")
    rows = [{"question": "the sky", "choices": ["blue", "green"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    qwen_checkpoint(tmp_path / "shared" / "pi_distill", ["Question: the sky blue green"])
    words = shlex.split(COMMAND)
    words[words.index("--tasks") + 1] = "colours"
    words += ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "results.json")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = tmp_path.glob("results*.json")
    # The same question has either answer in turn: whatever the model prefers is right for two of four rows.
    assert json.loads(found.read_text())["results"]["colours"]["acc,none"] == 0.5
