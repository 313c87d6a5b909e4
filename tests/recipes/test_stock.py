"""Test torchtune's own recipe on our dataset builders, as the README shows for GPU users; its single-device one runs on CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from pidistill.config import build
from pidistill.data import stock_sft_dataset
from pidistill.envs.tiny_world import tiny_world_tokenizer
from pidistill.errors import InputError
from pidistill.tokenizers import HFChatTokenizer
from tests.support.tiny_tokenizers import qwen_folder

ROOT = Path(__file__).parents[2]
DATASET = {"_component_": "pidistill.envs.tiny_world.tiny_world_dataset", "split": "train", "completion": "cot"}


def test_labels_are_the_assistant_tokens():
    row = stock_sft_dataset(tiny_world_tokenizer(), DATASET)[0]
    tokenizer = tiny_world_tokenizer()
    learned = [t for t, label in zip(row["tokens"], row["labels"], strict=True) if label != CROSS_ENTROPY_IGNORE_IDX]
    assert [label for label in row["labels"] if label != CROSS_ENTROPY_IGNORE_IDX] == learned
    text = tokenizer.decode(learned).split()
    assert text.count("end") == 3
    assert text.count("act") == 3
    assert "obs" not in text
    assert "req" not in text


def test_tools_that_the_template_does_not_show_are_refused_as_recipes_do(tmp_path):
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    tokenizer = HFChatTokenizer(str(qwen_folder(tmp_path / "model")), chat_template=plain, max_seq_len=256)
    row = {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
        "tools": [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    node = {"_component_": "pidistill.data.chat_dataset", "source": f"{tmp_path}/rows.jsonl", "privileged_key": None}
    node["completion"] = "after_last_user"
    with pytest.raises(InputError, match="leaves out the tool 'add'"):
        stock_sft_dataset(tokenizer, node)[0]


def test_the_stock_recipe_trains_on_it(tmp_path):
    tiny = OmegaConf.load(ROOT / "configs/tiny/base.yaml")
    node = OmegaConf.to_container(tiny.checkpointer, resolve=True) | {"checkpoint_dir": str(tmp_path / "init")}
    build(node, output_dir=str(tmp_path / "unused"))
    stock = {
        "output_dir": str(tmp_path), "device": "cpu", "dtype": "fp32", "seed": 0, "epochs": 1, "max_steps_per_epoch": 2,
        "batch_size": 4, "gradient_accumulation_steps": 1, "shuffle": True, "compile": False, "clip_grad_norm": None,
        "enable_activation_checkpointing": False, "optimizer_in_bwd": False, "resume_from_checkpoint": False,
        "log_every_n_steps": 1, "log_peak_memory_stats": False,
        "model": tiny.model, "tokenizer": tiny.tokenizer,
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tmp_path / "init"),
            "checkpoint_files": ["model.safetensors"], "model_type": "LLAMA3", "output_dir": str(tmp_path / "out"),
        },
        "dataset": {"_component_": "pidistill.data.stock_sft_dataset", "dataset": DATASET},
        "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(tmp_path / "log")},
    }  # fmt: skip
    OmegaConf.save(OmegaConf.create(stock), tmp_path / "stock.yaml")
    tune = Path(sys.executable).with_name("tune")
    command = [str(tune), "run", "full_finetune_single_device", "--config", str(tmp_path / "stock.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [
        float(line.split("loss:")[1].split()[0])
        for f in (tmp_path / "log").glob("*.txt")
        for line in f.open()
        if "loss:" in line
    ]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
