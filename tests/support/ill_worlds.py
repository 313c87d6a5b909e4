"""Play environments that raise, hang or answer nonsense in the episodes that they are told, and 64 episodes with a model."""

import functools
import math
import sys

import numpy as np
import torch

from pidistill.envs import EnvStep
from pidistill.rollouts import DROP_REASONS, TorchtuneSampler, collect_rollouts
from pidistill.testing import tiny_model
from pidistill.types import Example, PromptPair
from tests.support.episodes import LetterTokenizer, assistant, tool

RESET, FIRST, SECOND = "reset", 1, 2


class Odd:
    def __float__(self):
        raise ValueError("no number")


def raw(observations, reward, done, parts=None):
    """An EnvStep past the type checker, which under pytest refuses what an environment's own code may well give."""
    step = EnvStep([], 0.0, True)
    step.observations, step.reward, step.done, step.reward_parts = observations, reward, done, parts or {}
    return step


OUTPUTS = {
    "None": (None, "gave None, not an EnvStep"),
    "dict": ({"reward": 1.0}, "gave {'reward': 1.0} (dict), not an EnvStep"),
    "tuple": (([], 1.0, True), "(tuple), not an EnvStep"),
    "text": (raw("obs 5", 0.0, False), "observations is 'obs 5' (str), not a list"),
    "no message": (raw(["obs 5"], 0.0, False), "observations[0] is a str, not a message"),
    "role": (raw([{"role": "robot", "content": "x"}], 0.0, False), "unknown role 'robot'"),
    "assistant": (raw([assistant("x")], 0.0, False), "has the role assistant"),
    "no content": (raw([{"role": "tool"}], 0.0, False), "has no 'content'"),
    "number as content": (raw([tool(5)], 0.0, False), "'content' of type int"),
    "surrogate": (raw([tool("\ud800")], 0.0, False), "holds what is no text"),
    "None as reward": (raw([], None, True), "reward is None, not a number"),
    "text as reward": (raw([], "1.0", True), "reward is '1.0' (str), not a number"),
    "vector as reward": (raw([], np.ones(2), True), "(ndarray), not a number"),
    "tensors as reward": (raw([], torch.ones(2), True), "(Tensor), not a number"),
    "odd reward": (raw([], Odd(), True), "(Odd), not a number"),
    "done": (raw([], 0.0, "no"), "done is 'no' (str), not True or False"),
    "vector as done": (raw([], 0.0, np.array([True, False])), "(ndarray), not True or False"),
    "None as done": (raw([], 0.0, None), "done is None"),
    "list of parts": (raw([], 0.0, True, [1.0]), "reward_parts is [1.0] (list)"),
    "part": (raw([], 0.0, True, {"style": "high"}), "reward_parts['style'] is 'high' (str), not a number"),
}


class Ill:
    """Two observations, then the end; `faults` as above, and everything that hangs does so until `release`."""

    def __init__(self, faults, release):
        self.faults, self.release = faults, release

    def reset(self, example):
        state = {"row": int(example.id), "turn": 0, "said": []}
        self.fail(state, RESET)
        return state

    def step(self, state, turn, *, truncated):
        state["turn"] += 1
        state["said"].append(turn["content"])
        ill = self.fail(state, state["turn"])
        if ill is not None:
            return ill
        reward = sum(map(len, state["said"])) / 7
        return EnvStep([] if state["turn"] == 3 else [tool(f"{state['row']}")], reward, state["turn"] == 3, {"words": reward})

    def fail(self, state, when):
        where, what = self.faults.get(state["row"], (None, None))
        if where != when:
            return None
        if what == "raise":
            raise RuntimeError("ill")
        if what == "exit":
            sys.exit(1)
        if what == "hang":
            self.release.wait()
            return EnvStep([tool("too late")], 99.0, False)
        return EnvStep([], math.nan, True) if what == "nan" else OUTPUTS[what][0]


def play(environment, **settings):
    tokenizer = LetterTokenizer()
    tokenizer.stop_ids = frozenset(range(1, 60))
    tokenizer.parse_turn = lambda ids, tools: assistant(tokenizer.decode(ids))
    examples = [Example(id=str(row), messages=[{"role": "user", "content": "ab"}]) for row in range(64)]
    pairs = [PromptPair([97, 60 + row], [80, 97, 60 + row], has_privileged=True) for row in range(64)]
    sampler = TorchtuneSampler(max_new_tokens=30)
    seeds = list(range(64))
    return collect_rollouts(
        tiny_model(128), sampler, tokenizer, environment, examples, pairs, view="student", group_size=1, seeds=seeds, **settings
    )


def numbers(rollout):
    return (rollout.completion, rollout.policy_mask, rollout.turns, rollout.reward, rollout.reward_parts, rollout.stop_reason,
            rollout.turn_rewards, rollout.turn_policy_tokens, [x for x in rollout.sampled_logprobs if x == x])  # fmt: skip


@functools.cache
def healthy_numbers() -> dict:
    """Return the numbers of each of the 64 episodes where none is ill."""
    result = play(Ill({}, None))
    assert result.dropped == dict.fromkeys(DROP_REASONS, 0) and len(result.rollouts) == 64
    return {int(rollout.example.id): numbers(rollout) for rollout in result.rollouts}
