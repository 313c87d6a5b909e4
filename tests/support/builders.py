"""Make small rollouts, batches and models that several test files use."""

import math
import random
from collections.abc import Sequence

import torch

from pidistill.scoring.batch import make_batch
from pidistill.testing import tiny_model
from pidistill.types import Batch, Example, PromptPair, Rollout, RolloutAdvantage

VOCABULARY = 50
PAD = 0
CPU = torch.device("cpu")


def random_rollouts(
    count: int, seed: int = 0, *, group_size: int = 2, with_pi: bool = True, turns: int = 2, extra_teacher: int = 3
) -> list[Rollout]:
    """Ragged rollouts of several turns; the teacher's prompt is longer by a few tokens of privileged information."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rollouts = []
    for i in range(count):
        student = ids(length(2, 6))
        teacher = ids(length(1, 1 + extra_teacher)) + student if with_pi else student
        completion, mask = [], []
        for turn in range(turns):
            n = length(1, 5)
            completion += ids(n)
            mask += [True] * n
            if turn + 1 < turns:
                n = length(1, 4)
                completion += ids(n)
                mask += [False] * n
        logprobs = [-float(torch.rand(1, generator=generator)) * 3 if m else math.nan for m in mask]
        rollouts.append(
            Rollout(
                example=Example(id=f"row {i}", messages=[], privileged="pi" if with_pi else None),
                prompts=PromptPair(student, teacher, has_privileged=with_pi),
                completion=completion,
                policy_mask=mask,
                sampled_logprobs=logprobs,
                sampled_by="teacher",
                group=i // group_size,
                stop_reason="done",
                turns=[],
                reward=float(torch.rand(1, generator=generator)),
            )
        )
    return rollouts


def batch_of(rollouts: Sequence[Rollout], advantages: Sequence[RolloutAdvantage] | None = None, **kwargs) -> Batch:
    return make_batch(rollouts, advantages, pad_id=kwargs.pop("pad_id", PAD), device=CPU, **kwargs)


def model(seed: int = 0, **overrides):
    return tiny_model(overrides.pop("vocab_size", VOCABULARY), seed=seed, **overrides)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, all tensors together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k] - b[k]).double().pow(2).sum()) for k in a)
    return math.sqrt(difference / sum(float(b[k].double().pow(2).sum()) for k in b))


def forest(seed: int) -> list[Rollout]:
    """Ragged groups of a few prompts: with and without PI before, inside or after the question, forks after any turn."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(low, high))]

    system, rollouts = ids(0, 4), []
    for group in range(draw.randint(1, 4)):
        before, after, pi = ids(1, 5), ids(0, 4), ids(0, 9)
        student = system + before + after
        teacher = [pi + student, system + before + pi + after, student + pi][draw.randrange(3)]
        pairs = PromptPair(student, teacher, has_privileged=bool(pi))
        written: list[list[tuple[int, bool]]] = []
        for _ in range(draw.randint(1, 5)):
            # Some completions go on from a point inside an earlier one.
            base = draw.choice(written)[: draw.randint(0, 12)] if written and draw.random() < 0.5 else []
            turns = [(token, policy) for policy in (True, False, True) for token in ids(1, 5)]
            written.append(base + turns)
            completion, policy = map(list, zip(*written[-1], strict=True))
            rollouts.append(
                Rollout(
                    example=Example(id=f"row {group}", messages=[]),
                    prompts=pairs,
                    completion=completion,
                    policy_mask=policy,
                    sampled_logprobs=[-1.0] * len(policy),
                    sampled_by="student",
                    group=group,
                    stop_reason="done",
                    turns=[],
                    reward=0.0,
                )
            )
    return rollouts
