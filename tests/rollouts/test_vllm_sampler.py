"""Test the vLLM sampler without vLLM: its request loop on a scripted engine, the weights it hands over, its refusals.

tests/rollouts/test_vllm_engine.py holds the same sampler to the trainer's own numbers, with vLLM.
"""

import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules.peft import disable_adapter

from pidistill.config import build
from pidistill.distributed.shards import shard_in_place
from pidistill.errors import InputError
from pidistill.models.hf_format import from_hf
from pidistill.rollouts import VLLMSampler, vllm_engine, vllm_sampler
from pidistill.rollouts.vllm_engine import Settings, Turn, kept_ids
from pidistill.testing import TINY_SIZES, perturb_weights

VOCABULARY = 50
STOP = 7
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": TINY_SIZES["embed_dim"],
    "num_attention_heads": TINY_SIZES["num_heads"],
    "num_key_value_heads": TINY_SIZES["num_kv_heads"],
    "tie_word_embeddings": False,
}


class ScriptedEngine:
    """Turns of a length that (ids, seed) decide; one token of each per step."""

    def __init__(self, _, device, **settings) -> None:
        self.device = device
        self.settings, self.begun, self.loaded, self.running, self.steps, self.rested = settings, [], [], {}, 0, 0
        self.nan_after: int | None = None

    def load(self, weights) -> None:
        self.loaded.append({name: tensor.clone() for name, tensor in weights.items()})

    def rest(self) -> None:
        self.rested += 1

    def begin(self, row: int, ids: Sequence[int], seed: int, max_tokens: int, settings: Settings) -> None:
        assert row not in self.running
        self.begun.append((row, list(ids), seed, max_tokens, settings))
        draw = random.Random(f"{ids} {seed}")
        turn = [*(draw.randrange(10, VOCABULARY) for _ in range(draw.randrange(6))), STOP][:max_tokens]
        self.running[row] = (turn, self.steps + len(turn))

    def step(self) -> list[Turn]:
        self.steps += 1
        ended = [row for row, (_, at) in self.running.items() if at <= self.steps]
        logprob = math.nan if self.nan_after is not None and self.steps > self.nan_after else -0.5
        return [Turn(row, turn, [logprob] * len(turn)) for row in ended for turn, _ in [self.running.pop(row)]]

    def abort(self) -> None:
        self.running.clear()


class Says:
    """An environment that answers each row's first turns with these ids and ends the row after the next."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.turns = answers, Counter()

    def __call__(self, row: int, ids: list[int]) -> list[int] | None:
        self.turns[row] += 1
        return self.answers[self.turns[row] - 1] if self.turns[row] <= len(self.answers) else None


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def make(folder, monkeypatch):
    """VLLMSampler with a scripted engine."""
    monkeypatch.setattr(vllm_sampler, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm_sampler, "VLLMEngine", ScriptedEngine)
    return lambda **settings: VLLMSampler(**{"max_new_tokens": 30, "model_dir": str(folder)} | settings)


@pytest.fixture(scope="module")
def model():
    return tiny(qwen2)


def tiny(builder, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder(vocab_size=VOCABULARY, tie_word_embeddings=False, **TINY_SIZES, **settings)
        perturb_weights(model)
    return model


PROMPTS = [[1, 2, 3], [4, 5]]


def sample(sampler, model, on_turn_end=lambda row, ids: None, **changes):
    arguments = {"group_size": 2, "seeds": [3, 4, 5, 6], "stop_ids": frozenset({STOP}), "pad_id": 0}
    return sampler.sample(model, PROMPTS, on_turn_end=on_turn_end, **(arguments | changes))


# ------------------------------------------------------------------------------------------- the loop


def test_a_turn_continues_from_everything_so_far_with_what_is_left_of_the_limit(make, model):
    sampler, talk = make(temperature=0.7, top_k=5), Says([[11, 12], [13]])
    samples = sample(sampler, model, talk)
    engine = sampler._engine
    assert len(samples) == 4 and len(engine.begun) > 8
    for row, one in enumerate(samples):
        turns = [begun[1:] for begun in engine.begun if begun[0] == row]
        whole = PROMPTS[row // 2] + one.tokens
        for ids, _, max_tokens, settings in turns:
            assert ids == whole[: len(ids)], "ids were changed on the way"
            assert max_tokens == 30 - (len(ids) - len(PROMPTS[row // 2]))
            assert settings == Settings(0.7, 5, None, (STOP,))
        assert len({seed for _, seed, _, _ in turns}) == len(turns), "turns of one row would repeat the same draws"
        assert [math.isnan(x) for x in one.logprobs] == [not policy for policy in one.policy_mask]
        sampled = [token for token, policy in zip(one.tokens, one.policy_mask, strict=True) if policy]
        assert one.stop_reason == "done" and one.tokens[-1] == STOP and sampled.count(STOP) == 3
        forced = [token for token, policy in zip(one.tokens, one.policy_mask, strict=True) if not policy]
        assert forced == [11, 12, 13]


def test_the_same_seeds_give_the_same_rows_whatever_else_is_sampled(make, model):
    samples = sample(make(), model, Says([[11, 12]]))
    again = sample(make(), model, Says([[11, 12]]))
    assert [one.tokens for one in samples] == [one.tokens for one in again]
    alone = make().sample(
        model,
        PROMPTS[1:],
        group_size=1,
        seeds=[6],
        stop_ids=frozenset({STOP}),
        pad_id=0,
        on_turn_end=Says([[11, 12]]),
    )
    assert alone[0].tokens == samples[3].tokens
    assert len({tuple(one.tokens) for one in samples}) == 4, "every row has a stream of its own"


def test_the_limit_counts_sampled_and_forced_tokens(make, model):
    long = [9] * 10
    samples = sample(make(max_new_tokens=14), model, lambda row, ids: long)
    assert {one.stop_reason for one in samples} == {"length"}
    assert all(len(one.tokens) <= 14 for one in samples)
    assert any(not policy for one in samples for policy in one.policy_mask)
    tight = sample(make(max_new_tokens=3), model, lambda row, ids: long)
    assert all(all(one.policy_mask) and len(one.tokens) <= 3 for one in tight), "no room for an answer: not begun"


def test_a_turn_that_reaches_its_own_limit_ends_the_row(make, model):
    sampler = make(max_new_tokens=30, max_turn_tokens=3)
    samples = sample(sampler, model, lambda row, ids: [9])
    cut = [one for one in samples if one.stop_reason == "turn_length"]
    assert cut and all(one.policy_mask[-3:] == [True] * 3 and STOP not in one.tokens[-3:] for one in cut)
    assert all(max_tokens <= 3 for _, _, _, max_tokens, _ in sampler._engine.begun)


def test_rows_go_on_while_one_waits(make, model):
    sampler, waiting = make(), Future()
    others = []

    def on_turn_end(row, ids):
        if row == 0 and not waiting.done():
            return waiting
        others.append(row)
        if len(others) == 3:
            waiting.set_result([11])
        return None

    samples = sample(sampler, model, on_turn_end)
    assert others[:3] != [0, 0, 0] and set(others[:3]) == {1, 2, 3}, "a row that waits held up the others"
    assert 11 in samples[0].tokens and samples[0].stop_reason == "done"


def test_an_error_of_the_environment_leaves_no_request_behind(make, model):
    sampler = make()

    def fail(row, ids):
        raise ValueError("the environment broke")

    with pytest.raises(ValueError, match="the environment broke"):
        sample(sampler, model, fail)
    assert sampler._engine.running == {} and sampler._engine.rested == 1
    assert all(one.stop_reason == "done" for one in sample(sampler, model))


def test_greedy_is_a_point_mass(make, model):
    samples = sample(make(), model, temperature=0.0)
    assert {x for one in samples for x in one.logprobs} == {0.0}


def test_logits_that_are_not_finite_are_refused(make, model):
    sampler = make()
    sample(sampler, model)
    sampler._engine.nan_after = sampler._engine.steps
    with pytest.raises(InputError, match=r"logits are not finite .*lower optimizer.lr"):
        sample(sampler, model)


# ------------------------------------------------------------------------------------------- weights


def test_every_call_hands_over_the_weights_as_they_are(make):
    sampler, model = make(), tiny(qwen2)
    sample(sampler, model)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # through .data no counter of torch's moves
        model.layers[0].attn.q_proj.weight.data += 1.0
    sample(sampler, model)
    other = tiny(qwen2)
    other.load_state_dict(first)
    sample(sampler, other)
    loaded = [from_hf(weights, CONFIG) for weights in sampler._engine.loaded]
    for weights, expected in zip(loaded, [first, model.state_dict(), first], strict=True):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_adapters_are_merged_and_left_out_where_they_are_switched_off(make):
    model = tiny(lora_qwen2, lora_attn_modules=["q_proj", "v_proj"], lora_rank=2, lora_alpha=6.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    sampler, layer = make(), model.layers[1].attn.q_proj
    sample(sampler, model)
    with disable_adapter(model):
        sample(sampler, model)
    on, off = (from_hf(weights, CONFIG) for weights in sampler._engine.loaded)
    name = "layers.1.attn.q_proj.weight"
    merged = layer.weight + 3.0 * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(on[name], merged.detach())
    assert torch.equal(off[name], layer.weight.detach())
    assert on.keys() == off.keys() and not any("lora" in key for key in on)


def test_the_engine_gets_the_models_dtype_device_and_length(make, model):
    sampler = make(kv_cache_gib=0.5, max_batch_size=3)
    sample(sampler, model.to(torch.bfloat16))
    model.to(torch.float32)
    settings = sampler._engine.settings
    assert (settings["dtype"], settings["max_model_len"], settings["max_num_seqs"]) == ("bfloat16", 256, 3)
    assert settings["kv_cache_memory_bytes"] == 2**29 and sampler._engine.device == torch.device("cpu")


def test_the_engine_is_on_the_device_that_computes_while_the_weights_wait_on_the_cpu(make, monkeypatch):
    """As with `fsdp_cpu_offload`; a mesh of CUDA devices without its backend stands for a GPU's."""
    model = tiny(qwen2)
    weight = model.tok_embeddings.weight.detach()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cuda", [0], _init_backend=False)
        shard = shard_in_place(weight, mesh, [Shard(0)], weight.shape, weight.stride())
        model.tok_embeddings.weight = torch.nn.Parameter(shard)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert make()._start(model).device == torch.device("cuda", 0)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- vLLM's engine, without vLLM


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_request_has_a_seed(temperature, monkeypatch):
    """vLLM on a GPU draws one from numpy's global stream, which the recipe's own parts draw from, where a request has none."""
    modules = {"vllm": {"SamplingParams": SimpleNamespace}, "vllm.inputs": {}, "vllm.inputs.engine": {"tokens_input": list}}
    modules["vllm.sampling_params"] = {"RequestOutputKind": SimpleNamespace(FINAL_ONLY="final")}
    for name, attributes in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**attributes))
    asked = []
    engine = object.__new__(vllm_engine.VLLMEngine)
    vars(engine).update(_begun=0, _rows={}, _vocabulary=VOCABULARY)
    engine._engine = SimpleNamespace(add_request=lambda name, ids, params: asked.append((ids, params.seed)))
    engine.begin(3, [1, 2], 17, 5, Settings(temperature, None, None, (STOP,)))
    assert asked == [([1, 2], 17)] and engine._rows == {"0": 3}


def test_the_trainers_stream_and_the_engines_are_kept_apart(monkeypatch):
    """vLLM moves the thread to a stream of its own, also where it fails, and finds that one at its next call."""
    ours, theirs = (mock.MagicMock(spec=torch.cuda.Stream) for _ in range(2))
    now = [ours]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    streams = vllm_engine.Streams(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="no engine"), streams.of_engine():
        assert now == [ours]
        now[0] = theirs
        raise ValueError("no engine")
    assert now == [ours]
    ours.wait_stream.assert_called_once_with(theirs)
    with streams.of_engine():
        assert now == [theirs]
        theirs.wait_stream.assert_called_once_with(ours)
    assert now == [ours] and ours.wait_stream.call_count == 2


def test_an_engine_on_a_cpu_touches_no_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: pytest.fail("CUDA was asked"))
    with vllm_engine.Streams(torch.device("cpu")).of_engine():
        pass


# ------------------------------------------------------------------------------------------- refusals


def test_the_ids_that_were_left_are_recorded_per_sampled_token_and_only_where_asked_for(make, model, monkeypatch):
    step = ScriptedEngine.step

    def with_kept(engine):
        return [replace(turn, kept=[[token, 0] for token in turn.ids]) for turn in step(engine)]

    sampler = make(top_k=5, record_kept=True)
    monkeypatch.setattr(ScriptedEngine, "step", with_kept)
    for one in sample(sampler, model, Says([[11, 12], [13]])):
        policy = [token for token, sampled in zip(one.tokens, one.policy_mask, strict=True) if sampled]
        assert len(policy) < len(one.tokens) and one.kept == [[token, 0] for token in policy]
    assert all(begun[-1].kept for begun in sampler._engine.begun)
    assert sampler._engine.settings["max_logprobs"] >= 5
    assert all(one.kept is None for one in sample(make(top_k=5), model))
    monkeypatch.setattr(ScriptedEngine, "step", step)  # greedy: a point mass, of which nobody lists ids
    assert all(set(one.kept) == {None} for one in sample(sampler, model, temperature=0.0))


def listed(**probabilities: float) -> dict[int, SimpleNamespace]:
    return {int(name[1:]): SimpleNamespace(logprob=math.log(p) if p else -math.inf) for name, p in probabilities.items()}


def test_kept_ids_are_those_with_a_probability_all_of_them_or_an_error():
    assert kept_ids(listed(_7=0.5, _3=0.5, _1=0.0), 100) == [3, 7]
    assert kept_ids(listed(_0=0.5, _1=0.3, _2=0.2), 3) is None
    with pytest.raises(InputError, match=r"listed 2 ids .* hold 0\.8 of its probability, so that more than 64 others tie"):
        kept_ids(listed(_7=0.5, _3=0.3), 100)


def test_without_vllm_one_sentence_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    node = {"_component_": "pidistill.rollouts.VLLMSampler", "max_new_tokens": 3, "model_dir": str(folder)}
    with pytest.raises(InputError, match=r"vLLM, which is not installed; pip install 'pidistill\[vllm\]', or set "):
        build(node)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "sampler.temperature is -1.0"),
        ({"top_p": 0.0}, "sampler.top_p=0.0"),
        ({"max_model_len": 0}, "sampler.max_model_len=0 must"),
        ({"gpu_memory_utilization": 1.5}, "sampler.gpu_memory_utilization=1.5"),
        ({"kv_cache_gib": 0.0}, "sampler.kv_cache_gib is 0.0"),
        ({"model_dir": "nowhere"}, r"sampler.model_dir=nowhere has no config.json.*\{checkpointer.checkpoint_dir\}"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, make):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_a_gpu_that_the_engine_of_one_process_would_not_run_on_is_refused_before_weights_are_loaded(make, model, monkeypatch):
    sampler, sentence = make(), r"device=cuda:1 .* samples on cuda:0 .*; set device=cuda:0, and .* CUDA_VISIBLE_DEVICES=1 "
    with pytest.raises(InputError, match=sentence):
        sampler.check_model(model, torch.device("cuda:1"), torch.float32)
    for device in ("cuda", "cuda:0", "cpu"):
        sampler.check_model(model, torch.device(device), torch.float32)
    monkeypatch.setattr(vllm_engine, "_several_processes", lambda: True)
    sampler.check_model(model, torch.device("cuda:1"), torch.float32)


def test_a_family_without_a_conversion_is_refused_before_the_engine_starts(make, folder, model):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(InputError, match="model_type 'mamba'"):
        sample(make(), model)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"max_model_len": 20}, {}, "is 33 tokens, above sampler.max_model_len 20 by 13"),
        ({}, {"seeds": [1, 2]}, "2 prompts x group_size 2 need as many seeds, not 2"),
        ({}, {"max_new_tokens": 255}, "exceeds the model's max_seq_len 256 by 2"),
    ],
)
def test_wrong_requests_are_refused_before_the_engine_starts(settings, changes, message, make, model):
    sampler = make(**settings)
    with pytest.raises(InputError, match=message):
        sample(sampler, model, **changes)
    assert sampler._engine is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_5, hybrid", {}, r"linear_attention.* in bf16 alone, and sampler.dtype is float32; set sampler.dtype=bfloat16"),
        ("ministral3", {"max_model_len": 17}, "scales its queries beyond 16 tokens .*; set sampler.max_model_len=16"),
    ],
)
def test_what_vllm_computes_otherwise_is_refused_before_weights_are_loaded(name, settings, message, make, tmp_path):
    """The model stands on the meta device, as in the checks of a recipe's start; and the setting of the sentence helps."""
    from pidistill.models.empty import empty_model
    from tests.support.hf_families import make_config

    transformers = pytest.importorskip("transformers")
    if name.startswith("qwen3_5") and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip(f"transformers {transformers.__version__} keeps Qwen3.5's states in another way than 5.24")
    make_config(name).save_pretrained(tmp_path)
    node = {"_component_": "pidistill.models.from_folder", "path": str(tmp_path), "backend": "transformers"}
    model, cpu = empty_model(node), torch.device("cpu")
    with pytest.raises(InputError, match=message):
        make(**settings).check_model(model, cpu, torch.float32)
    key, _, value = re.search(r"set sampler\.(\w+)(=)(\w+)", message).groups()
    make(**settings | {key: int(value) if value.isdigit() else value}).check_model(model, cpu, torch.float32)
