"""Compute learning rates that change with the optimiser step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def get_linear_warmup_schedule(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """Return the schedule lr · min(1, (step+1)/num_warmup_steps).

    The first step already moves the weights, unlike that of torchtune's cosine, which starts at 0.
    """
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, num_warmup_steps)), last_epoch)


def get_cosine_schedule_with_warmup_and_floor(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, floor_frac: float = 0.05, last_epoch: int = -1
) -> LambdaLR:
    """Return the linear warm-up as above, times a half cosine from 1 to ``floor_frac`` over ``num_training_steps``."""

    def factor(step: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / num_training_steps)))
        return min(1.0, (step + 1) / max(1, num_warmup_steps)) * ((1 - floor_frac) * cosine + floor_frac)

    return LambdaLR(optimizer, factor, last_epoch)
