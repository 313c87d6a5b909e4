"""Test that a stop token which the chat template does not write at the end of a turn is reported once."""

import json
import logging
from pathlib import Path

import pytest

from pidistill.tokenizers import HFChatTokenizer
from tests.support.chat_templates import QWEN3
from tests.support.tiny_tokenizers import llama_folder, qwen_folder, r1_folder


def base_folder(path: Path, template: str | None = None) -> Path:
    """Qwen's base models: they stop at <|endoftext|>, and their template ends turns with <|im_end|>."""
    folder = qwen_folder(path) if template is None else qwen_folder(path, template)
    (folder / "generation_config.json").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    return folder


def warnings(caplog) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [sentence for sentence in said if "the end of a turn" in sentence]


def test_a_base_models_folder_is_said_once_with_the_token_to_set(tmp_path, caplog):
    folder = base_folder(tmp_path)
    for _ in range(2):
        HFChatTokenizer(str(folder))
    (said,) = warnings(caplog)
    assert said.startswith(f"{folder}: the model's files name <|endoftext|> as the end of a turn, and the chat template ends")
    assert (
        "with <|im_end|>: what this tokenizer's model samples may run past the end" in said
        and "set tokenizer.stop_tokens: ['<|im_end|>']" in said
    )


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_stop_tokens_that_the_config_names_are_meant(tmp_path, caplog, stop):
    tokenizer = HFChatTokenizer(str(base_folder(tmp_path)), stop_tokens=[stop])
    assert tokenizer.stop_warning is None and not warnings(caplog)


def test_a_template_that_ends_no_turn_is_said(tmp_path, caplog):
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    HFChatTokenizer(str(qwen_folder(tmp_path, plain)))
    assert "the chat template writes no control token after an assistant turn" in warnings(caplog)[0]


@pytest.mark.parametrize("make", [qwen_folder, llama_folder, r1_folder, lambda path: qwen_folder(path, QWEN3)])
def test_chat_models_give_no_warning_about_the_end_of_turns(tmp_path, caplog, make):
    assert HFChatTokenizer(str(make(tmp_path))).stop_warning is None and not warnings(caplog)
