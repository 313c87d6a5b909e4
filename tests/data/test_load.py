"""Test what a run says about the rows that it does not take."""

import json
import logging

from omegaconf import OmegaConf

from pidistill.data import load_prompts
from pidistill.testing import TINY_SIZES
from tests.support.tiny_tokenizers import qwen_folder


def test_rows_that_are_left_out_are_said_by_reason_and_part(tmp_path, caplog):
    rows = [{"question": question, "answer": "4", "hint": hint} for question, hint in
            [("q", "h"), ("q", None), ("q", ""), ("q " * 400, "h")]]  # fmt: skip
    for name, some in (("train", rows), ("eval", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    folder = qwen_folder(tmp_path / "model")
    dataset = {"_component_": "pidistill.data.qa_dataset", "privileged_key": "hint", "completion_key": "answer"}
    cfg = OmegaConf.create({
        "model": {"_component_": "torchtune.models.llama3.llama3", **TINY_SIZES, "vocab_size": 700, "max_seq_len": 400},
        "tokenizer": {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder)},
        "checkpointer": {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder)},
        "dataset": dataset | {"source": str(tmp_path / "train.jsonl")},
        "eval_dataset": dataset | {"source": str(tmp_path / "eval.jsonl")},
        "on_overflow": "drop",
    })  # fmt: skip
    caplog.set_level(logging.INFO)
    load_prompts(cfg, no_pi="drop")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["`dataset` gives 1 rows; left out are: rows_without_pi 2, prompt_too_long 1"]
    caplog.clear()
    cfg.eval_dataset.source = cfg.dataset.source
    load_prompts(cfg, no_pi="rl")
    assert [record.getMessage() for record in caplog.records] == [
        "`dataset` gives 3 rows; left out are: prompt_too_long 1",
        "`eval_dataset` gives 3 rows; left out are: prompt_too_long 1",
    ]
    cfg.on_overflow, cfg.dataset.max_rows, cfg.eval_dataset.max_rows = None, 2, 2
    caplog.clear()
    load_prompts(cfg, no_pi="rl")
    assert caplog.records == []
