"""Count rollouts and tokens of a round, at the rows' mean lengths: what is sampled, trained on, and fed to the model."""

from collections.abc import Mapping

from omegaconf import DictConfig

from pidistill.commands.plan.lengths import RowLengths
from pidistill.commands.plan.reading import workload_of
from pidistill.commands.plan.workload import count_tokens
from pidistill.training.evaluation import VIEWS, chosen_views
from pidistill.training.keys import setting


def budget(
    cfg: DictConfig, rows: RowLengths, kept: int, policy_tokens: float | None = None, *, supervised: bool
) -> dict[str, float]:
    """Return numbers by their name, over all ranks.

    A completion counts as long as it may be (`sampler.max_new_tokens`); a demonstration as long as the rows' mean.

    Args:
        kept: rows of the dataset that are trained on or sampled.
        policy_tokens: of a demonstration, on average; None where the recipe reads none.
    """
    if cfg.get("objective"):
        return _of_a_round(cfg, rows, kept)
    if supervised:
        return _of_a_batch(cfg, rows, kept, policy_tokens or 0.0)
    return _of_samples(cfg, rows, kept)


def _of_a_round(cfg: DictConfig, rows: RowLengths, kept: int) -> dict[str, float]:
    work = workload_of(cfg, rows.mean, ranks=1)
    rollouts, trained = work.groups * work.group_size, work.trained_groups * work.group_size
    fed = count_tokens(work, work.views, work.trained_groups)
    return {
        "prompts of a round": work.groups,
        "rollouts of a round": rollouts,
        "prompt tokens of a round": work.groups * work.prompt(work.sampled_view),
        "policy tokens of a round, at most": rollouts * work.completion,
        "optimizer steps of a round": work.updates,
        "rollouts of a step": trained,
        "policy tokens of a step, at most": trained * work.completion,
        "tokens fed in a step, at most": fed.fed,
        "micro-batches of a step, at most": fed.micro_batches,
        "rounds of an epoch": kept / work.groups,
        "epochs of the run": cfg.max_steps / work.updates * work.groups / max(kept, 1),
    }


def _of_a_batch(cfg: DictConfig, rows: RowLengths, kept: int, policy_tokens: float) -> dict[str, float]:
    work = workload_of(cfg, rows.mean, ranks=1)
    fed = count_tokens(work, work.views, work.trained_groups)
    return {
        "demonstrations of a step": cfg.batch_size,
        "policy tokens of a step": round(cfg.batch_size * policy_tokens),
        "tokens fed in a step": fed.fed,
        "micro-batches of a step": fed.micro_batches,
        "steps of an epoch": kept / cfg.batch_size,
        "epochs of the run": cfg.max_steps * cfg.batch_size / max(kept, 1),
    }


def _of_samples(cfg: DictConfig, rows: RowLengths, kept: int) -> dict[str, float]:
    if "samples_per_prompt" in cfg:
        rollouts = kept * cfg.samples_per_prompt
    else:
        with_pi = rows.mean.teacher != rows.mean.student
        views = [VIEWS[name] for name in chosen_views(cfg)]
        samples = (
            1 if temperature == 0.0 else setting(cfg, "eval_samples")
            for view, temperature in views
            if view == "student" or with_pi
        )
        rollouts = kept * sum(samples)
    return {
        "prompts": kept,
        "rollouts, without those of domains" if cfg.get("domains") else "rollouts": rollouts,
        "policy tokens, at most": rollouts * rows.mean.completion,
    }


def in_words(numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return (name, number as it is shown)."""
    return [(name, f"{value:,}" if isinstance(value, int) else f"{value:,.2f}") for name, value in numbers.items()]
