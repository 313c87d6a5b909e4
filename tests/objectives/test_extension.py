"""Test that a divergence and an objective of one's own work without a change of the package."""

import re

import pytest
import torch

from pidistill.errors import InputError
from pidistill.losses.divergences import check_divergence
from pidistill.objectives import OPD, OPSDUCLA, SDFT, SDPO
from pidistill.objectives.base import Objective
from pidistill.scoring.head import apply_head
from pidistill.scoring.head_numbers import ScorePlan
from pidistill.scoring.score import score
from pidistill.types import Divergence, ScoreRequest, TokenLoss, check_per_token
from tests.support import own_divergences
from tests.support.builders import batch_of, model, random_rollouts

PATH = "tests.support.own_divergences"


def renyi_of_one_token(t, s):
    """Return −2·log Σ_v √(t_v·s_v), entry by entry, from two [V] probability vectors."""
    return -2 * torch.log(sum(torch.sqrt(a * b) for a, b in zip(t, s, strict=True)))


def skew_of_one_token(t, s):
    return sum(a * torch.log(a / (0.1 * a + 0.9 * b)) for a, b in zip(t, s, strict=True))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(("name", "oracle"), [("renyi", renyi_of_one_token), ("skew", skew_of_one_token)])
def test_own_divergence_has_the_value_and_gradient_of_a_loop_in_float64(name, oracle, one_pass):
    torch.manual_seed(0)
    weight, student, teacher = (torch.randn(n, 6, dtype=torch.float64).requires_grad_() for n in (23, 11, 11))
    leaves, weights = (weight, student, teacher), torch.linspace(0.5, 2.0, 11).double()
    request = Divergence(name, "both", fn=getattr(own_divergences, name))
    loss = lambda part, scores: weights[part] * scores.divergences[request]  # noqa: E731
    plan = ScorePlan(torch.arange(11), ScoreRequest(True, True, divergences=(request,)), 0.7, 4, loss if one_pass else None)
    scores = plan.as_scores(apply_head(plan, {"student": student, "teacher": teacher}, weight))
    t, s = (torch.softmax(h @ weight.T / 0.7, -1) for h in (teacher, student))
    expected = torch.stack([oracle(a, b) for a, b in zip(t, s, strict=True)])
    torch.testing.assert_close(scores.divergences[request], expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((weights * scores.divergences[request]).sum(), leaves)
    for own, true in zip(ours, torch.autograd.grad((weights * expected).sum(), leaves), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [OPD, OPSDUCLA, SDFT, SDPO])
def test_every_objective_with_a_divergence_takes_a_dotted_path(method):
    request = method(divergence=f"{PATH}.renyi").divergence
    assert (request.name, request.fn, request.grad) == ("renyi", own_divergences.renyi, "student")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean_over_all", r"divergence mean_over_all: .*shape \[\] .*shape \[2\]"),
        ("with_three_arguments", r"with_three_arguments raised TypeError .*mask"),
        ("of_the_teacher_alone", "no gradient to the student"),
        ("number", "is not a function"),
        ("nothing", r"own_divergences.nothing cannot be found"),
    ],
)
def test_a_function_that_is_no_divergence_is_refused_when_the_objective_is_built(name, message):
    with pytest.raises(InputError, match=message):
        OPSDUCLA(divergence=f"{PATH}.{name}")


def test_own_divergence_with_a_name_of_the_package_is_refused():
    with pytest.raises(InputError, match="needs a name of its own"):
        check_divergence(Divergence("jsd", beta=0.5, fn=own_divergences.renyi))


class WithoutRequest(Objective):
    def token_loss(self, batch, scores, step):
        return TokenLoss(-scores.student_logprobs, {})


class WithoutLoss(Objective):
    def __init__(self, size):
        self.size = size

    def score_request(self, step):
        return ScoreRequest(True, False, views=("student",))


@pytest.mark.parametrize(("build", "name"), [(WithoutRequest, "score_request"), (lambda: WithoutLoss(3), "token_loss")])
def test_an_objective_without_a_method_is_refused_at_construction_with_its_name(build, name):
    with pytest.raises(InputError, match=rf"objective Without\w+ has no method {name};"):
        build()


class Shaped(WithoutLoss):
    def token_loss(self, batch, scores, step):
        return TokenLoss(self.size(-scores.student_logprobs), {})


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (lambda x: x.mean(), "[]"),
        (lambda x: x.mean()[None], "[1]"),
        (lambda x: x[:, None], "[4, 1]"),
        (lambda x: x[:-1], "[3]"),
    ],
)
def test_a_token_loss_that_is_not_one_number_per_token_is_refused(size, shape):
    objective, batch = Shaped(size), batch_of(random_rollouts(4))
    with pytest.raises(InputError, match=re.escape(f"a loss of shape {shape} where one number")):
        score(model(0), batch, objective.score_request(0), chunk_tokens=4, loss=objective.per_token_loss(0))


def test_a_number_as_token_loss_is_refused():
    with pytest.raises(InputError, match="a loss of float where one number per policy token"):
        check_per_token(0.5)
