"""Test that settings which bound memory or a log reach what they bound: their values change nothing else of a run."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pidistill.training import supervised
from tests.support.runs import recipe_module, run, small_config

CHUNK, CHARS = 7, 5


def chunks_seen_by(score: Callable[..., Any], seen: set[int | None]) -> Callable[..., Any]:
    def look(*args: Any, **settings: Any) -> Any:
        seen.add(settings.get("chunk_tokens"))
        return score(*args, **settings)

    return look


@pytest.mark.parametrize("name", ["opsd", "pi_distill", "sft"])
def test_every_forward_gets_score_chunk_tokens_and_logged_texts_have_at_most_rollout_log_max_chars(
    name, tiny_base, tmp_path, monkeypatch
):
    """`sft_weight` trains demonstrations beside the rollouts; `reward_k1` scores the round before its update."""
    changes: dict[str, Any] = {"score_chunk_tokens": CHUNK, "max_steps": 1}
    if name != "sft":
        changes |= {"objective__kl_mode": "reward_k1", "sft_weight": 0.5, "sft_batch_size": 2, "dataset__completion": "actions"}
        changes |= {"rollout_log_steps": 1, "rollout_log_max_chars": CHARS}
    rounds, demonstrations = set(), set()
    monkeypatch.setattr(recipe_module(name), "score", chunks_seen_by(recipe_module(name).score, rounds))
    monkeypatch.setattr(supervised, "score", chunks_seen_by(supervised.score, demonstrations))
    run(name, small_config(name, tiny_base, tmp_path, **changes))
    assert rounds == {CHUNK}
    if name != "sft":
        assert demonstrations == {CHUNK}
        texts = [json.loads(line)["text"] for line in (tmp_path / "rollouts.jsonl").open()]
        assert texts and {len(text) for text in texts} == {CHARS}
