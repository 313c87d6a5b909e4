"""Make rollouts whose siblings' answers become privileged information."""

from pathlib import Path

import torch

from pidistill.distributed.run import Run
from pidistill.envs.tiny_world import tiny_world_dataset, tiny_world_tokenizer
from pidistill.privileged.prompt import PrivilegedPrompt
from pidistill.types import Example, Rollout

TOKENIZER = tiny_world_tokenizer(max_seq_len=96)


PRIVILEGED = PrivilegedPrompt(template="{privileged}", leak_phrases=())


ROWS = list(tiny_world_dataset(split="train", privileged="none", max_rows=8))


ONE = Run(torch.device("cpu"), torch.float32, rank=0, world_size=1, seed=0, output_dir=Path("unused"))


def rollout(word: str, group: int, reward: float, example: Example | None = None, tokens: int = 4) -> Rollout:
    example = example or ROWS[group]
    return Rollout(
        example=example,
        prompts=PRIVILEGED.build(example, TOKENIZER).pair,
        completion=[5] * tokens,
        policy_mask=[True] * tokens,
        sampled_logprobs=[-1.0] * tokens,
        sampled_by="student",
        group=group,
        stop_reason="done",
        turns=[{"role": "assistant", "content": word}],
        reward=reward,
    )
