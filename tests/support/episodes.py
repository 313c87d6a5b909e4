"""Play episodes between a scripted sampler and small environments, without a model."""

import math
from concurrent.futures import Future

from pidistill.envs.base import EnvStep
from pidistill.rollouts import Sample, collect_rollouts
from pidistill.types import Example, PromptPair

STOP = 1


class LetterTokenizer:
    """One id per character, `stop` after each turn; an observation is `:text>`."""

    vocab_size = 128
    pad_id = 0
    stop_ids = frozenset({STOP})
    max_seq_len = None

    def __init__(self):
        self.histories = []

    def encode_prompt(self, messages, tools=None):
        return [ord(c) for message in messages for c in message["content"]] + [ord(">")]

    def encode_turn(self, history, turn, tools=None):
        return [*(ord(c) for c in turn["content"]), STOP]

    def encode_observations(self, history, observations, tools=None):
        self.histories.append(([message["content"] for message in history], [m["content"] for m in observations], tools))
        return [ord(c) for message in observations for c in f":{message['content']}"] + [ord(">")]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def parse_turn(self, ids, tools=None):
        return assistant(self.decode([i for i in ids if i != STOP]))

    def default_system(self, tools=None):
        return None


class Script:
    """A sampler that says what it is told to: one string per row, `.` for the stop id; its log-probs count down."""

    temperature, top_p, top_k = 1.0, None, None

    def __init__(self, *rows: str, max_new_tokens: int = 1000, limit_name: str = "length"):
        self.rows = rows
        self.limit_name = limit_name
        self.max_new_tokens = max_new_tokens
        self.calls = []

    def sample(self, model, prompts, *, on_turn_end, max_new_tokens=None, **kwargs):
        self.calls.append({"prompts": [list(p) for p in prompts], "max_new_tokens": max_new_tokens, **kwargs})
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return [self._row(row, text, limit, on_turn_end) for row, text in enumerate(self.rows)]

    def _row(self, row, text, limit, on_turn_end):
        sample, start = Sample([], [], [], self.limit_name), 0
        for character in text:
            sample.tokens.append(STOP if character == "." else ord(character))
            sample.policy_mask.append(True)
            sample.logprobs.append(-float(len(sample.tokens)))
            if character == ".":
                forced = on_turn_end(row, sample.tokens[start:])
                forced = forced.result() if isinstance(forced, Future) else forced
                if forced is None:
                    sample.stop_reason = "done"
                    return sample
                if len(sample.tokens) + len(forced) >= limit:
                    return sample
                sample.tokens += forced
                sample.policy_mask += [False] * len(forced)
                sample.logprobs += [math.nan] * len(forced)
                start = len(sample.tokens)
            if len(sample.tokens) == limit:
                return sample
        raise AssertionError("the script is too short")


class Counting:
    """Answers `1`, `2`, ...; a turn `q` ends the episode. Rewards are 1 per turn plus 10 at the end."""

    def __init__(self):
        self.steps = []

    def reset(self, example):
        return {"id": example.id, "turns": 0}

    def step(self, state, turn, *, truncated):
        self.steps.append((state["id"], turn["content"], truncated))
        state["turns"] += 1
        done = turn["content"].endswith("q")
        reward = 11.0 if done else 1.0
        return EnvStep([] if done else [tool(str(state["turns"]))], reward, done, {"turn": 1.0, "end": reward - 1.0})


def assistant(content):
    return {"role": "assistant", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def example(name):
    return Example(id=f"row {name}", messages=[{"role": "user", "content": name}], tools=[{"name": "t"}])


def pair(name):
    return PromptPair(student=[ord(name)], teacher=[ord("P"), ord(name)], has_privileged=True)


def collect(sampler, environment, names="ab", *, tokenizer=None, model=None, view="student", group_size=1, **kwargs):
    return collect_rollouts(
        model,
        sampler,
        tokenizer or LetterTokenizer(),
        environment,
        [example(name) for name in names],
        [pair(name) for name in names],
        view=view,
        group_size=group_size,
        seeds=list(range(len(names) * group_size)),
        **kwargs,
    )
