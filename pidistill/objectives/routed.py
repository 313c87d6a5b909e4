"""Train each row by the method that its key names: several objectives in one run, for several environments.

    J = Σ_d J_d on the rows of d,  over one denominator, the policy tokens of the whole step

The gradient of a step is the sum of those of the methods on their own rows; no method sees another's rows, advantages or
groups. They share the flow of the recipe: the view that samples, the teacher, the sampler and the optimiser. What is looked at
once for a whole batch (views, divergences) is the union of what they ask for, and each gets its numbers with the gradient that
it asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pidistill.data.routes import route_of
from pidistill.errors import InputError
from pidistill.losses.token_weights import weight_metrics
from pidistill.objectives.base import Objective
from pidistill.types import (
    Batch,
    Example,
    PerTokenLoss,
    Rollout,
    RolloutAdvantage,
    ScoreRequest,
    Scores,
    TokenLoss,
    ViewName,
)


class RoutedObjective(Objective):
    """Let a key of each row name its objective.

    Args:
        key: where a row says it, a key of ``Example.data``.
        objectives: name → objective; all must sample from the same view.
        default: the name for rows without the key; None refuses such a row. A row with an unknown name is always refused.
    """

    def __init__(self, key: str, objectives: Mapping[str, Objective], default: str | None = None) -> None:
        self.objectives = {str(name): objective for name, objective in objectives.items()}
        self.key, self.default = key, None if default is None else str(default)
        if not self.objectives or (self.default is not None and self.default not in self.objectives):
            known = ", ".join(self.objectives) or "none"
            raise InputError(f"objective.default={default} must be null or one of objective.objectives ({known})")
        if named := [name for name in self.objectives if "/" in name]:
            raise InputError(f"objective.objectives has the name {named[0]!r}; the / divides metrics from names: leave it out")
        parts = self.objectives.values()
        self._alike("sampling_view", {objective.sampling_view() for objective in parts})
        for name, objective in self.objectives.items():
            if objective.guides_failed_groups or objective.on_policy_frac < 1.0:
                raise InputError(
                    f"objective.objectives.{name}: {type(objective).__name__} changes which rows are sampled, for all of them; "
                    "run it alone"
                )
        # Which setting of which part needs samples of the present weights, or ratios to others than those that sampled.
        needs = [f"objectives.{n}.{o.needs_present_samples}" for n, o in self.objectives.items() if o.needs_present_samples]
        self.needs_present_samples = next(iter(needs), "")
        denominators = [getattr(objective, "ratio_denominator", "behaviour") for objective in parts]
        self.ratio_denominator = next((name for name in denominators if name != "behaviour"), "behaviour")
        self._asks = [objective for objective in parts if objective.behaviour_request() is not None]
        if len(self._asks) > 1:
            names = " and ".join(type(objective).__name__ for objective in self._asks)
            raise InputError(f"{names} each need a number of their own before the update, and a run has one; run one alone")
        self.uses_teacher = any(objective.uses_teacher for objective in parts)
        self.takes_importance_weights = any(objective.takes_importance_weights for objective in parts)
        policies = {objective.no_pi for objective in parts}
        self.no_pi = policies.pop() if len(policies) == 1 else "rl"  # else each drops its own in `advantages`

    def _alike(self, what: str, values: set) -> Any:
        if len(values) > 1:
            told = ", ".join(f"{name}: {type(objective).__name__}" for name, objective in self.objectives.items())
            raise InputError(f"objective.objectives ({told}) differ in {what} ({', '.join(map(str, values))}); run them apart")
        return next(iter(values))

    def name_of(self, example: Example) -> str:
        """Return the name of the objective that trains ``example``; InputError where there is none."""
        return route_of(example, self.key, self.objectives, self.default, "objective")

    def check_rows(self, examples: Iterable[Example], *, told_later: bool = False) -> None:
        """Refuse a row that has no objective, or no privileged information where its objective's `no_pi` is error.

        ``told_later``: hindsight brings the information with the rollouts, so that rows need none.
        """
        for example in examples:
            name = self.name_of(example)
            if self.objectives[name].no_pi == "error" and example.privileged is None and not told_later:
                raise InputError(
                    f"{example.id} has no privileged information and objective.objectives.{name}.no_pi is error; fill the row, "
                    "or set that no_pi to drop, rl or distill, as its objective allows"
                )

    def check_steps(self, steps: int) -> None:
        """Refuse schedules that make the parts differ in a later step in what all rows of a step share."""
        for step in range(steps):
            self.samples_from_teacher_weights(step)
            self.score_request(step)

    # ------------------------------------------------------------------------------------------------ the round

    def sampling_view(self) -> ViewName:
        return next(iter(self.objectives.values())).sampling_view()

    def samples_from_teacher_weights(self, step: int) -> bool:
        return self._alike("whose weights sample", {o.samples_from_teacher_weights(step) for o in self.objectives.values()})

    def behaviour_request(self) -> ScoreRequest | None:
        return self._asks[0].behaviour_request() if self._asks else None

    def behaviour_values(self, scores: Scores) -> Float[Tensor, " N"]:
        return self._asks[0].behaviour_values(scores)

    def advantages(self, rollouts: Sequence[Rollout], step: int) -> list[RolloutAdvantage]:
        """Return those that each objective gives its own rows."""
        found: dict[int, RolloutAdvantage] = {}
        names = [self.name_of(rollout.example) for rollout in rollouts]
        for name, objective in self.objectives.items():  # each on all ranks, in one order: some exchange numbers
            places = [i for i, own in enumerate(names) if own == name]
            found |= dict(zip(places, objective.advantages([rollouts[i] for i in places], step), strict=True))
        return [found[i] for i in range(len(rollouts))]

    # ------------------------------------------------------------------------------------------------ the update

    def coefficients(self, step: int) -> dict[str, float]:
        parts = self.objectives.items()
        return {f"{key}/{name}": value for name, part in parts for key, value in part.coefficients(step).items()}

    def score_request(self, step: int) -> ScoreRequest:
        asked = [objective.score_request(step) for objective in self.objectives.values()]
        return ScoreRequest(
            student_grad=any(request.student_grad for request in asked),
            # With gradient the teacher's view is that of the trained model, whatever `teacher` is.
            teacher_grad=self._alike("whether the teacher's view is trained", {request.teacher_grad for request in asked}),
            views=tuple(view for view in ("student", "teacher") if any(view in request.views for request in asked)),
            divergences=tuple(dict.fromkeys(divergence for request in asked for divergence in request.divergences)),
            entropy=any(request.entropy for request in asked),
        )

    def token_loss(self, batch: Batch, scores: Scores, step: int) -> TokenLoss:
        names = [self.name_of(rollout.example) for rollout in batch.views.rollouts]
        loss, metrics = 0.0 * first_number(scores), {}  # with the graph of a batch without rows
        for name, objective in self.objectives.items():
            of_rollouts = torch.tensor([own == name for own in names], dtype=torch.bool, device=batch.targets.device)
            own = of_rollouts[batch.rollout_index]
            if not bool(own.any()):
                continue
            numbers = only(own, batch, scores, objective.score_request(step))
            answer = objective.token_loss(*numbers, step)
            extra = weight_metrics(getattr(objective, "token_weight", None), *numbers)
            loss = loss.masked_fill(own, 0.0).index_add(0, own.nonzero()[:, 0], answer.loss.to(loss.dtype))
            for metric, values in {"loss": answer.loss.detach(), **answer.metrics, **extra}.items():
                column = torch.zeros_like(loss.detach())
                metrics[f"{metric}/{name}"] = column.masked_scatter(own, values.detach().to(loss.dtype))
                metrics[f"_{metric}/{name}_tokens"] = own.to(loss.dtype)  # what the mean is taken over
        return TokenLoss(loss, metrics)

    def per_token_loss(self, step: int) -> PerTokenLoss | None:
        if any(objective.per_token_loss(step) is None for objective in self.objectives.values()):
            return None
        return super().per_token_loss(step)


def first_number(scores: Scores) -> Float[Tensor, " N"]:
    """Return log-probs of a view that was looked at, 0 in the place of −inf."""
    numbers = scores.teacher_logprobs if scores.student_logprobs is None else scores.student_logprobs
    return numbers.masked_fill(~numbers.isfinite(), 0.0)


def only(own: Bool[Tensor, " N"], batch: Batch, scores: Scores, request: ScoreRequest) -> tuple[Batch, Scores]:
    """Return the numbers of some tokens, with gradient to the sides that ``request`` names alone."""
    chosen = replace(batch, **{name: value[own] for name, value in vars(batch).items() if isinstance(value, Tensor)})
    numbers: dict[str, Any] = {}
    for field in fields(scores):
        value = getattr(scores, field.name)
        if isinstance(value, Tensor) and value.ndim == 1:
            side = field.name.partition("_")[0]
            constant = not {"student": request.student_grad, "teacher": request.teacher_grad}.get(side, False)
            numbers[field.name] = value[own].detach() if constant else value[own]
    divergences = {name: value[own] for name, value in scores.divergences.items() if name in request.divergences}
    return chosen, replace(scores, divergences=divergences, **numbers)
