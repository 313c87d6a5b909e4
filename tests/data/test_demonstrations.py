"""Demonstrations: the ids a policy would have sampled, masked like a rollout; rows that are too long."""

import pytest

from pidistill.data import build_demonstrations, demonstration
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.errors import InputError
from pidistill.types import Example, PromptPair


def pair_of(example, tokenizer):
    prompt = tokenizer.encode_prompt(example.messages)
    return PromptPair(prompt, prompt, has_privileged=False)


def test_it_is_the_conversation_with_observations_masked():
    tokenizer = tiny_world_tokenizer()
    for example in list(tiny_world_dataset("train", completion="cot"))[:5]:
        rollout = demonstration(example, pair_of(example, tokenizer), tokenizer)
        words = tokenizer.decode(rollout.completion).split()
        own = [w for w, m in zip(words, rollout.policy_mask, strict=True) if m]
        seen = [w for w, m in zip(words, rollout.policy_mask, strict=True) if not m]
        turns = [m["content"] for m in example.completion if m["role"] == "assistant"]
        assert own == " end ".join([*turns, ""]).split()
        assert seen == " ".join(m["content"] for m in example.completion if m["role"] == "tool").split()
        assert words[-1] == "end"  # the end of the last turn is trained


def test_too_long_is_refused_or_dropped_and_counted():
    tokenizer = tiny_world_tokenizer()
    examples = list(tiny_world_dataset("train", completion="cot"))[:4]
    examples[1:2] = [Example(id="short", messages=examples[1].messages, completion=[{"role": "assistant", "content": "go"}])]
    prompts = [(example, pair_of(example, tokenizer)) for example in examples]
    with pytest.raises(InputError, match=r"row 0: prompt \(9 tokens\) plus completion \(\d+\) exceeds max_seq_len 20 by \d+"):
        build_demonstrations(prompts, tokenizer, max_seq_len=20, on_overflow=None)
    kept, dropped = build_demonstrations(prompts, tokenizer, max_seq_len=20, on_overflow="drop")
    assert [rollout.example.id for rollout in kept] == ["short"]
    assert dropped == 3
    with pytest.raises(InputError, match="all 4 demonstrations are longer"):
        build_demonstrations(prompts, tokenizer, max_seq_len=5, on_overflow="drop")


def test_a_row_without_an_assistant_turn_is_refused():
    tokenizer = tiny_world_tokenizer()
    (example,) = list(tiny_world_dataset("train"))[:1]
    with pytest.raises(InputError, match="has no assistant turn"):
        demonstration(example, pair_of(example, tokenizer), tokenizer)
