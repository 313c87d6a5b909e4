"""Test the vLLM sampler against the trainer's own numbers, with vLLM on CPU: `make test-vllm`."""

import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchtune.models.qwen2 import qwen2

from pidistill.errors import InputError
from pidistill.models import qwen3
from pidistill.rollouts import TorchtuneSampler, VLLMSampler
from pidistill.rollouts.distribution import sampling_logprobs
from pidistill.rollouts.vllm_engine import TIES
from pidistill.scoring.score import score
from pidistill.testing import QWEN3_HEAD_DIM, TINY_SIZES, perturb_weights
from pidistill.types import Example, PromptPair, Rollout, ScoreRequest
from tests.support.builders import batch_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm` runs these"),
]

VOCABULARY = 128
STOPS = frozenset(range(2, 11))
SIZES = TINY_SIZES | {"embed_dim": 128}  # heads of 32: vLLM's attention on CPU has no smaller ones
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": SIZES["embed_dim"],
    "intermediate_size": SIZES["intermediate_dim"],
    "num_hidden_layers": SIZES["num_layers"],
    "num_attention_heads": SIZES["num_heads"],
    "num_key_value_heads": SIZES["num_kv_heads"],
    "max_position_embeddings": SIZES["max_seq_len"],
    "rms_norm_eps": SIZES["norm_eps"],
    "rope_theta": float(SIZES["rope_base"]),
    "tie_word_embeddings": False,
}
PROMPTS = [[11, 12, 13], [14, 15, 16, 17, 18], [19], [30, 31]]
TOLERANCE_NATS = 1e-4


def random_model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = qwen2(vocab_size=VOCABULARY, tie_word_embeddings=False, **SIZES)
        perturb_weights(model)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model(0)


@pytest.fixture(scope="module")
def process_before():
    return process_state()


def process_state():
    # Python's random state is left out: the type checker of the tests draws from it.
    variables = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    return torch.get_rng_state(), np.random.get_state()[1], torch.set_num_threads, torch.get_num_threads(), variables


@pytest.fixture(scope="module")
def sampler(tmp_path_factory, process_before):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    yield vllm_sampler(folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def vllm_sampler(folder: Path, **settings) -> VLLMSampler:
    defaults = {"max_new_tokens": 24, "model_dir": str(folder), "kv_cache_gib": 0.05, "enforce_eager": True}
    return VLLMSampler(**(defaults | settings))


def two_turns(answered: set[int], row: int, ids: list[int]) -> list[int] | None:
    assert ids[-1] in STOPS
    if row in answered:
        return None
    answered.add(row)
    return [20, 21, 22][: 1 + row % 3]


def sample(sampler, model, prompts=PROMPTS, on_turn_end=None, **changes):
    settings = {"group_size": 2, "seeds": list(range(2 * len(prompts))), "stop_ids": STOPS, "pad_id": 0} | changes
    return sampler.sample(model, prompts, on_turn_end=on_turn_end or partial(two_turns, set()), **settings)


@torch.no_grad()
def errors(samples, model, temperature=1.0, top_k=None, top_p=None) -> list[float]:
    """Nats between what was recorded and the distribution of a full forward of the trainer's model, token by token."""
    found = []
    for row, one in enumerate(samples):
        prompt = PROMPTS[row // 2]
        logits = model(torch.tensor([prompt + one.tokens]))[0].float()
        logprobs = sampling_logprobs(logits, temperature, top_k, top_p)
        for i, (token, policy, logprob) in enumerate(zip(one.tokens, one.policy_mask, one.logprobs, strict=True)):
            if policy:
                found.append(abs(logprobs[len(prompt) + i - 1, token].item() - logprob))
    return found


def largest_error(samples, model, *truncation, **settings) -> float:
    return max(errors(samples, model, *truncation, **settings))


def mean_error(samples, model) -> float:
    found = errors(samples, model)
    return sum(found) / len(found)


def test_the_engine_leaves_the_process_as_it_was(sampler, model, process_before):
    sample(sampler, model)
    after = process_state()
    assert torch.equal(process_before[0], after[0]) and np.array_equal(process_before[1], after[1])
    assert process_before[2:] == after[2:]


@pytest.mark.parametrize(
    "truncation", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.7}, {"temperature": 1.4, "top_k": 20, "top_p": 0.9}]
)
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(truncation, sampler, model, monkeypatch):
    for name, value in truncation.items():
        monkeypatch.setattr(sampler, name, value)
    samples = sample(sampler, model)
    assert largest_error(samples, model, **truncation) < TOLERANCE_NATS
    if "top_k" in truncation or "top_p" in truncation:
        whole = truncation.get("temperature", 1.0)
        assert largest_error(samples, model, whole) > 0.05, "the truncation does not show in these log-probs"
    assert sum(map(len, (one.tokens for one in samples))) > 60
    assert any(one.tokens[-1] in STOPS for one in samples), "no row ended by itself, its stop id with a log-prob"


@pytest.fixture(scope="module")
def recording(sampler, model):
    """The same engine, now with a record of what top-k and top-p left; it takes as many log-probs as are asked of it."""
    sample(sampler, model)
    recording = vllm_sampler(Path(sampler.model_dir), top_k=20, top_p=0.8, record_kept=True)
    recording._engine = sampler._engine
    sampler._engine._llm.model_config.max_logprobs = 20 + TIES
    return recording


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": None}, {"top_k": 6, "top_p": 0.95}])
def test_a_fresh_sample_has_ratio_1_under_top_p_and_top_k_where_they_are_recorded(settings, recording, model, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setattr(recording, name, value)
    samples = sample(recording, model)
    temperature, sizes = recording.temperature, []
    for row, one in enumerate(samples):
        prompt = PROMPTS[row // 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one.tokens]))[0].float()
        left = sampling_logprobs(logits, temperature, recording.top_k, recording.top_p) > -torch.inf
        places = [len(prompt) + i - 1 for i, policy in enumerate(one.policy_mask) if policy]
        assert one.kept == [left[place].nonzero()[:, 0].tolist() for place in places]
        sizes += [len(kept) for kept in one.kept]
    assert sum(sizes) > 2 * len(sizes) and max(sizes) <= recording.top_k
    assert (min(sizes) < max(sizes)) == (recording.top_p is not None)
    rollouts = [
        Rollout(
            Example(f"row {n}", []), PromptPair(PROMPTS[n // 2], PROMPTS[n // 2], False), one.tokens, one.policy_mask,
            one.logprobs, "student", n // 2, one.stop_reason, [], reward=0.0, kept=one.kept,
        )
        for n, one in enumerate(samples)
    ]  # fmt: skip
    batch = batch_of(rollouts)
    request = ScoreRequest(False, False, views=("student",), entropy=False)
    with torch.no_grad():
        scores = score(model, batch, request, temperature=temperature)
    assert (scores.policy_logprobs("student") - batch.ratio_logprobs).abs().max() < TOLERANCE_NATS
    assert (scores.student_logprobs - batch.ratio_logprobs).abs().max() > 0.05  # without replay it is the kept mass


def test_ids_that_tie_with_the_last_of_top_k_are_recorded_too(recording, model, monkeypatch):
    """A head of all zeros: every id is as likely as every other, and each of them may be drawn."""
    flat = random_model(0)
    with torch.no_grad():
        flat.output.weight.zero_()
    monkeypatch.setattr(recording, "top_p", None)
    with pytest.raises(InputError, match=rf"vLLM listed {20 + TIES} ids .* more than {TIES} others tie"):
        sample(recording, flat)
    with torch.no_grad():
        flat.output.weight.copy_(model.output.weight)
        flat.output.weight[-10:] = flat.output.weight[-1]  # ten ids in a tie
    for one in sample(recording, flat):
        assert all(not {118, 127} & set(kept) or set(range(118, 128)) <= set(kept) for kept in one.kept)
    assert largest_error(sample(recording, model), model, top_k=20) < TOLERANCE_NATS


def test_tokens_follow_the_distribution(sampler, model):
    prompt = PROMPTS[:1]
    samples = sample(sampler, model, prompt, lambda row, ids: None, group_size=3000, seeds=list(range(3000)), max_new_tokens=1)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in samples]), minlength=VOCABULARY) / len(samples)
    with torch.no_grad():
        probs = model(torch.tensor(prompt))[0, -1].softmax(0)
    expected = (probs * (1 - probs) / len(samples)).sqrt().sum() * (2 / torch.pi) ** 0.5
    assert (counts - probs).abs().sum() < 1.5 * expected


def test_the_samples_follow_new_weights_and_would_not_without_the_update(sampler, model, monkeypatch):
    moved = random_model(0)
    sample(sampler, moved)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    samples = sample(sampler, moved)
    assert largest_error(samples, moved) < TOLERANCE_NATS
    assert largest_error(samples, model) > 0.1
    assert largest_error(sample(sampler, model), model) < TOLERANCE_NATS, "back to the first weights, as a teacher's are"
    monkeypatch.setattr(sampler._engine, "load", lambda weights: None)
    assert largest_error(sample(sampler, moved), moved) > 0.1, "a skipped update must show"


def test_turns_continue_after_forced_observations(sampler, model):
    samples = sample(sampler, model)
    two = [one for one in samples if not all(one.policy_mask)]
    assert len(two) >= 3
    for row, one in enumerate(samples):
        forced = [token for token, policy in zip(one.tokens, one.policy_mask, strict=True) if not policy]
        assert forced in ([], [20, 21, 22][: 1 + row % 3])
    assert largest_error(samples, model) < TOLERANCE_NATS


def test_answers_that_come_later_change_nothing(sampler, model):
    plain = sample(sampler, model)
    with ThreadPoolExecutor(3) as threads:
        later = sample(sampler, model, on_turn_end=partial(threads.submit, partial(two_turns, set())))
    assert [one.tokens for one in plain] == [one.tokens for one in later]


def test_rows_are_reproducible_and_differ_within_a_group(sampler, model):
    first, again = sample(sampler, model), sample(sampler, model)
    assert [(one.tokens, one.stop_reason) for one in first] == [(one.tokens, one.stop_reason) for one in again]
    assert all(a.tokens != b.tokens for a, b in zip(first[::2], first[1::2], strict=True))
    alone = sample(sampler, model, PROMPTS[1:2], lambda row, ids: None, seeds=[2, 3])
    whole = sample(sampler, model, on_turn_end=lambda row, ids: None)
    assert [one.tokens for one in alone] == [one.tokens for one in whole[2:4]], "a row depends on what shares its batch"


def test_greedy_is_our_own_samplers(sampler, model):
    own = TorchtuneSampler(max_new_tokens=24)
    theirs, ours = sample(sampler, model, temperature=0.0), sample(own, model, temperature=0.0)
    for a, b in zip(theirs, ours, strict=True):
        assert (a.tokens, a.policy_mask, a.stop_reason) == (b.tokens, b.policy_mask, b.stop_reason)
    assert [x for one in theirs for x in one.logprobs if x == x] == [x for one in ours for x in one.logprobs if x == x]


def test_a_failing_environment_leaves_the_engine_usable(sampler, model):
    def fail(row, ids):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        sample(sampler, model, on_turn_end=fail)
    assert largest_error(sample(sampler, model), model) < TOLERANCE_NATS


def test_no_prompts_give_no_samples(sampler, model):
    assert sample(sampler, model, []) == []


def test_what_vllm_refuses_is_one_sentence(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 8}))  # heads of 16
    narrow = qwen2(vocab_size=VOCABULARY, tie_word_embeddings=False, **(SIZES | {"num_heads": 8}))
    with pytest.raises(InputError, match=r"vLLM did not start on .*check sampler.model_dir"):
        sample(vllm_sampler(tmp_path, kv_cache_gib=1e6), narrow)
    with pytest.raises(InputError, match=r"sampler.sleep=True gives GPU memory back .* cannot"):
        sample(vllm_sampler(tmp_path, sleep=True), narrow)


# Last: the end of a second engine takes the process groups of the first one along.
OWN_NAMES = (
    "llama, tied (SmolLM2)",
    "qwen3",
    "olmo3, window",  # vLLM takes its modules, and those of SmolLM3, from transformers
    "smollm3, layers without rotations",
    "gemma3",
    "qwen3_moe",  # of its experts vLLM on CPU keeps packed copies
    "phi3",
)


def own_names_folder(name: str, folder: Path) -> Path:
    """Write a tiny model with heads of 32, as the Hub would hold it."""
    from tests.support.hf_families import reference_model

    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.15, "hidden_size": 128, "head_dim": 32}
    reference_model(name, **sizes).save_pretrained(folder)
    return folder


def draw_weights(model: nn.Module, draw: torch.Generator, std: float = 0.15) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=draw) + (parameter.ndim == 1))


def assert_samples_follow(model: nn.Module, folder: Path) -> None:
    """Sample, change all weights, and sample again."""
    sampler, draw = vllm_sampler(folder), torch.Generator().manual_seed(1)
    draw_weights(model, draw)
    before = logits_of(model)
    first = sample(sampler, model)
    assert torch.equal(logits_of(model), before), "vLLM's start changed the trained model"
    assert largest_error(first, model) < TOLERANCE_NATS
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    assert largest_error(first, model) > 0.1
    assert largest_error(sample(sampler, model), model) < TOLERANCE_NATS


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(40, 60)[None])


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_decoder_of_transformers_hands_over_its_weights_under_their_own_names(name, tmp_path):
    """The model is built again once vLLM runs, as a teacher is."""
    from pidistill.models import from_folder

    folder = own_names_folder(name, tmp_path)
    model = from_folder(str(folder), backend="transformers").eval()
    assert_samples_follow(model, folder)
    again = from_folder(str(folder), backend="transformers").eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(again), logits_of(model))


def test_adapters_of_a_decoder_of_transformers_are_merged(tmp_path):
    from pidistill.models import from_folder

    folder = own_names_folder("llama, tied (SmolLM2)", tmp_path)
    adapters = {"lora_attn_modules": ["q_proj", "output_proj"]}
    assert_samples_follow(from_folder(str(folder), backend="transformers", **adapters).eval(), folder)


def test_the_text_model_of_a_folder_with_images_is_sampled_in_bf16(tmp_path):
    """Qwen3.5, whose layers vLLM on CPU computes in bf16 alone, against the trainer in fp32."""
    transformers = pytest.importorskip("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip(f"transformers {transformers.__version__} keeps Qwen3.5's states in another way than 5.24")
    from pidistill.models import from_folder
    from tests.support.hf_families import make_config

    linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # vLLM's kernel on CPU has no heads of 16 or 32
    text = make_config("qwen3_5, hybrid", vocab_size=VOCABULARY, hidden_size=128, head_dim=64, **linear)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128}
    config = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=True)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model, draw = from_folder(str(tmp_path)).eval(), torch.Generator().manual_seed(1)
    draw_weights(model, draw, std=0.05)
    sampler = vllm_sampler(tmp_path, dtype="bfloat16")
    first = sample(sampler, model)
    assert mean_error(first, model) < 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    assert mean_error(first, model) > 0.5
    assert mean_error(sample(sampler, model), model) < 0.1


def test_a_tied_head_follows_new_weights_too(tmp_path):
    """Qwen3 as its small sizes are: the embedding is the head, of which vLLM on CPU keeps a packed copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tied = qwen3(vocab_size=VOCABULARY, head_dim=QWEN3_HEAD_DIM, tie_word_embeddings=True, **TINY_SIZES).eval()
        perturb_weights(tied)
        for parameter in tied.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.15)
    named = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
    sizes = {"hidden_size": TINY_SIZES["embed_dim"], "head_dim": QWEN3_HEAD_DIM}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | named | sizes))
    sampler = vllm_sampler(tmp_path)
    assert largest_error(sample(sampler, tied), tied) < TOLERANCE_NATS
    with torch.no_grad():
        tied.tok_embeddings.weight.mul_(1.5)
    assert largest_error(sample(sampler, tied), tied) < TOLERANCE_NATS
