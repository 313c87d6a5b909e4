"""Define divergences as a user would write them, reachable by dotted path from a config."""

import math

import torch


def renyi(teacher_logprobs, student_logprobs, alpha=0.5):
    """Return the Rényi divergence of order alpha of T from S."""
    return torch.logsumexp(alpha * teacher_logprobs + (1 - alpha) * student_logprobs, -1) / (alpha - 1)


def skew(teacher_logprobs, student_logprobs, share=0.1):
    """Return kl(T || share·T + (1−share)·S)."""
    mixture = torch.logaddexp(teacher_logprobs + math.log(share), student_logprobs + math.log(1 - share))
    return (teacher_logprobs.exp() * (teacher_logprobs - mixture)).sum(-1)


def mean_over_all(teacher_logprobs, student_logprobs):
    return (teacher_logprobs - student_logprobs).mean()


def with_three_arguments(teacher_logprobs, student_logprobs, mask):
    return (teacher_logprobs - student_logprobs).sum(-1)


def of_the_teacher_alone(teacher_logprobs, student_logprobs):
    return (teacher_logprobs.exp() * teacher_logprobs).sum(-1)


number = 3
