"""Test sampling from decoders of transformers: log-probs, independence of the batch, greedy decoding, several turns."""

import math
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

from pidistill.commands.plan.shape import model_shape
from pidistill.rollouts import TorchtuneSampler, decoding, hf_decoding
from tests.support.hf_families import FAMILIES, HYBRIDS, ROPE, STATEFUL, decoder_of, reference_model

torch.set_num_threads(1)
STOP_IDS = frozenset(range(40, 50))
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4], [20, 21, 22, 23, 24]]
GROUP = 2
TWICE = "diffllama, attends twice in a forward"


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    monkeypatch.setitem(FAMILIES, TWICE, ("DiffLlamaConfig", {"tie_word_embeddings": False, "rope_parameters": ROPE}))


def sample(model, prompts, group_size=GROUP, observations=True, **settings):
    turns = {}

    def on_turn_end(row, turn):
        turns[row] = turns.get(row, 0) + 1
        return [1 + (row + i) % 30 for i in range(2 + (row + turns[row]) % 3)] if observations and turns[row] < 3 else None

    return TorchtuneSampler(**({"max_new_tokens": 32} | settings)).sample(
        model,
        prompts,
        group_size=group_size,
        seeds=range(len(prompts) * group_size),
        stop_ids=STOP_IDS,
        pad_id=0,
        on_turn_end=on_turn_end,
    )


def generated(reference, prompt, length):
    return reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=sorted(STOP_IDS),
        pad_token_id=0,
    )[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name, shared",
    [*((name, False) for name in (*FAMILIES, *STATEFUL, TWICE)), *((name, True) for name in ("gemma3", *STATEFUL, TWICE))],
)
def test_samples_equal_a_plain_forward_of_transformers(name, shared, monkeypatch):
    """Rows of several lengths and turns; recorded log-probs, another batch size, and greedy decoding."""
    if shared:
        monkeypatch.setattr(decoding, "SAVED_BY_PREFIX", 1)
        monkeypatch.setattr(sys.modules[__name__], "PROMPTS", [[7, 9, 11, *prompt] for prompt in PROMPTS])
    reference = reference_model(name).eval()
    model = decoder_of(reference)
    samples = sample(model, PROMPTS)
    assert len({len(s.tokens) for s in samples}) > 1
    forced = 0
    for row, s in enumerate(samples):
        prompt = PROMPTS[row // GROUP]
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + s.tokens]), use_cache=False).logits[0].float()
        logps = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        for t, (token, drawn, logprob) in enumerate(zip(s.tokens, s.policy_mask, s.logprobs, strict=True)):
            forced += not drawn
            assert (
                math.isnan(logprob)
                if not drawn
                else abs(float(logps[t, token]) - logprob) < (5e-4 if name in HYBRIDS else 5e-5)
            )
    assert forced > 3
    others = sample(model, PROMPTS, max_batch_size=4)
    assert [s.tokens for s in samples] == [s.tokens for s in others]
    greedy = sample(model, PROMPTS[:2], group_size=1, observations=False, temperature=0.0, max_new_tokens=8)
    assert [s.tokens for s in greedy] == [generated(reference, prompt, 8) for prompt in PROMPTS[:2]]
    assert "unembed" not in vars(model)


@pytest.mark.parametrize(
    "name", ["gemma4", "qwen3_moe", "qwen3_5, hybrid", "falcon_h1, both in one layer", "lfm2, convolutions", TWICE]
)
def test_the_plan_counts_what_the_sampler_keeps(name, monkeypatch):
    contexts = []

    class Recorded(hf_decoding.HFContext):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            contexts.append(self)

    monkeypatch.setattr(hf_decoding, "HFContext", Recorded)
    sample(decoder_of(reference_model(name)), PROMPTS[:1], max_new_tokens=3)
    (context,) = contexts
    per_token = sum(part[0, :, 0].numel() for cache in context._cache_of.values() for part in (cache._k, cache._v))
    per_row = sum(kept[0].numel() for kept in (context.states._kept if context.states else {}).values())
    shape = model_shape(decoder_of(reference_model(name)))
    assert (shape.kv_bytes, shape.state_bytes) == (4 * per_token, 4 * per_row)
    assert bool(per_row) == (name in HYBRIDS)
