"""Test pretrained models, where they can be had: their folders are read as transformers reads them.

PIDISTILL_TEST_MODELS names a folder that holds SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct (or either).
"""

import os
from pathlib import Path

import pytest
import torch
from torchtune.training import MODEL_KEY

from pidistill.models import HFCheckpointer, from_folder
from pidistill.tokenizers import HFChatTokenizer
from pidistill.types import Message
from tests.support.hub_models import reference

MODELS = os.environ.get("PIDISTILL_TEST_MODELS")
NAMES = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct")
pytestmark = pytest.mark.skipif(not MODELS, reason="PIDISTILL_TEST_MODELS is not set: no pretrained models here")


@pytest.mark.parametrize("backend", ["torchtune", "transformers"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_a_pretrained_model_equal_those_of_transformers(name, backend, tmp_path):
    folder = Path(MODELS, name)
    if not folder.is_dir():
        pytest.skip(f"{MODELS} has no {name}")
    tokenizer = HFChatTokenizer(str(folder), max_seq_len=256)
    prompt = tokenizer.encode_prompt([Message(role="user", content="Name the capital of France, and say why it is known.")])
    tokens = torch.tensor([prompt])
    model = from_folder(str(folder), backend=backend).eval()
    own_names = backend == "transformers"
    checkpointer = HFCheckpointer(checkpoint_dir=str(folder), output_dir=str(tmp_path), own_names=own_names)
    model.load_state_dict({key: t.float() for key, t in checkpointer.load_checkpoint()[MODEL_KEY].items()})
    expected = reference(folder)(tokens).logits
    assert (model(tokens) - expected).abs().max() <= 1e-4 * expected.abs().max()
