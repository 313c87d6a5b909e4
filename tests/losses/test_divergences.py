"""Test the laws of the divergences, each beside the loop over the vocabulary that it must equal."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pidistill.errors import InputError
from pidistill.losses.divergences import (
    LEAST_TAIL,
    divergence,
    entropy,
    generalised_jsd,
    kl,
    kl_topk_with_tail,
    listed_divergence,
    listed_with_tail,
    with_tail,
)
from pidistill.types import Divergence
from tests.support import oracles

INF = float("inf")


def logits(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def logp(seed: int, *shape: int, **kwargs) -> torch.Tensor:
    return torch.log_softmax(logits(seed, *shape, **kwargs), -1)


pairs = st.tuples(st.integers(0, 2**31), st.integers(2, 60), st.floats(0.01, 30.0))  # seed, vocabulary, scale


def pair(case: tuple[int, int, float], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    seed, vocabulary, scale = case
    both = logp(seed, 2, 4, vocabulary, scale=scale, dtype=dtype)
    return both[0], both[1]


# ------------------------------------------------------------------------------------------------ values and gradients

REQUESTS = [("kl_teacher_student", None), ("kl_student_teacher", None), *[("jsd", b) for b in (0.0, 0.1, 0.5, 0.9, 1.0)]]


@pytest.mark.parametrize("grad", ["student", "teacher", "both", "none"])
@pytest.mark.parametrize(("name", "beta"), REQUESTS)
def test_value_and_gradient_equal_the_loop_and_stop_where_the_request_says(name, beta, grad):
    def oracle(t, s):
        if name == "jsd":
            return oracles.jsd(t, s, beta)
        return oracles.kl(t, s) if name == "kl_teacher_student" else oracles.kl(s, t)

    sides = [logits(side, 2, 3, 5).requires_grad_() for side in (1, 2)]  # teacher, student
    value = divergence(Divergence(name, grad=grad, beta=beta), *(torch.log_softmax(x, -1) for x in sides))
    expected = torch.stack([oracle(t, s) for t, s in zip(*(x.flatten(0, 1) for x in sides), strict=True)]).view(2, 3)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)

    named = {"both": ("teacher", "student"), "none": ()}.get(grad, (grad,))
    assert value.requires_grad == bool(named)
    weights = logits(3, 2, 3)  # unequal, so that a token that takes another's gradient shows
    true = torch.autograd.grad((weights * expected).sum(), sides)
    got = torch.autograd.grad((weights * value).sum(), sides, allow_unused=True) if named else (None, None)
    for side, own, oracle_gradient in zip(("teacher", "student"), got, true, strict=True):
        if side in named:
            torch.testing.assert_close(own, oracle_gradient, rtol=1e-10, atol=1e-12)
        else:
            assert own is None


def test_gradients_with_respect_to_raw_log_probs_equal_finite_differences():
    inputs = (logits(1, 3, 4).requires_grad_(), logits(2, 3, 4).requires_grad_())
    ids = torch.tensor([[0, 3], [1, 2], [2, 0]])
    for function in (
        kl,
        lambda p, q: kl(p, q, entry_clip=0.3),
        lambda p, q: generalised_jsd(p, q, 0.3),
        lambda p, q: entropy(p),
        lambda p, q: kl_topk_with_tail(p, q, ids),
    ):
        assert torch.autograd.gradcheck(function, inputs)


def test_entropy_equals_the_loop():
    x = logits(1, 6, 5)
    expected = torch.stack([oracles.entropy(row) for row in x])
    torch.testing.assert_close(entropy(torch.log_softmax(x, -1)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy(torch.full((1, 8), -math.log(8.0))), torch.tensor([math.log(8.0)]))


def test_only_kl_teacher_student_without_a_clip_lifts_a_token_that_the_student_never_says():
    teacher = torch.tensor([[0.0, 0.0, 9.0]], dtype=torch.float64).log_softmax(-1)  # sure of the last token
    raw = torch.tensor([[5.0, 4.0, -9.0]], dtype=torch.float64, requires_grad=True)  # gives it a millionth

    def lift(value) -> float:
        (gradient,) = torch.autograd.grad(value(raw.log_softmax(-1)).sum(), raw)
        return -float(gradient[0, 2])

    assert lift(lambda s: kl(teacher, s)) == pytest.approx(float(teacher.exp()[0, 2]), abs=1e-6)  # q - p, and p is near 0
    others = [lambda s: kl(s, teacher), lambda s: kl(teacher, s, entry_clip=0.05)]
    others += [lambda s, beta=beta: generalised_jsd(teacher, s, beta) for beta in (0.1, 0.5, 0.9)]
    assert all(abs(lift(value)) < 2e-5 for value in others)


def test_entry_clip_bounds_each_entry_before_the_sum_and_stops_its_gradient():
    p, q = logp(1, 4, 6, scale=2.0), logp(2, 4, 6, scale=2.0)
    terms = p.exp() * (p - q)
    assert (terms > 0.05).any() and (terms < 0).any()
    expected = torch.stack([sum(torch.minimum(term, torch.tensor(0.05)) for term in row) for row in terms])
    q = q.requires_grad_()
    value = kl(p, q, entry_clip=0.05)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    torch.testing.assert_close(gradient, q.exp() + torch.where(terms > 0.05, 0.0, -p.exp()))
    torch.testing.assert_close(kl(p, q, entry_clip=1e9), kl(p, q))


# ------------------------------------------------------------------------------------------------ zero probabilities


def forbid(x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return x.index_fill(-1, torch.tensor(ids, dtype=torch.long), -INF)


@pytest.mark.parametrize(
    "function", [kl, lambda t, s: generalised_jsd(t, s, 0.3), lambda t, s: entropy(t), lambda t, s: kl_topk_with_tail(t, s, 2)]
)
def test_tokens_impossible_in_both_are_as_if_absent(function):
    allowed, forbidden = [0, 2, 3], [1, 4]
    full = [logits(seed, 3, 5).requires_grad_() for seed in (1, 2)]
    value = function(*(torch.log_softmax(forbid(x, forbidden), -1) for x in full))
    expected = function(*(torch.log_softmax(x[:, allowed], -1) for x in full))
    torch.testing.assert_close(value, expected)
    got = torch.autograd.grad(value.sum(), full, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(expected.sum(), full, allow_unused=True, materialize_grads=True)
    for own, oracle_gradient in zip(got, want, strict=True):
        torch.testing.assert_close(own, oracle_gradient)
        assert (own[:, forbidden] == 0).all()


def test_a_token_impossible_under_p_adds_nothing_and_one_impossible_under_q_alone_is_infinite():
    p, q = logits(1, 1, 4).requires_grad_(), logits(2, 1, 4).requires_grad_()
    value = kl(torch.log_softmax(forbid(p, [1]), -1), torch.log_softmax(q, -1))
    gradients = torch.autograd.grad(value.sum(), (p, q))
    assert value.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert gradients[0][0, 1] == 0 and gradients[1][0, 1] > 0  # q should lose that token
    assert kl(torch.log_softmax(p, -1), torch.log_softmax(forbid(q, [1]), -1)).item() == INF


def test_a_probability_that_underflows_times_an_infinite_log_ratio_is_0():
    p = torch.tensor([[0.0, -200.0]]).requires_grad_()  # fp32: exp(−200) is 0
    q = torch.tensor([[0.0, -INF]])
    value = kl(p, q)
    assert value.item() == 0.0
    assert torch.autograd.grad(value.sum(), p)[0].isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_of_disjoint_distributions_is_its_upper_bound_with_finite_gradient(beta):
    t, s = (logits(seed, 2, 4).requires_grad_() for seed in (1, 2))
    value = generalised_jsd(torch.log_softmax(forbid(t, [0, 1]), -1), torch.log_softmax(forbid(s, [2, 3]), -1), beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    torch.testing.assert_close(value, torch.full_like(value, bound))
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (t, s)))


# ------------------------------------------------------------------------------------------------ invariants


@settings(deadline=None)
@given(pairs)
def test_kl_is_never_below_zero_beyond_rounding(case):
    assert kl(*pair(case)).min() >= -1e-12
    assert kl(*pair(case, torch.float32)).min() >= -1e-5
    p, _ = pair(case, torch.float32)
    assert (kl(p, p) == 0).all()


@settings(deadline=None)
@given(pairs, st.floats(0.001, 0.999))
def test_jsd_is_bounded_and_symmetric_under_exchange(case, beta):
    t, s = pair(case)
    value = generalised_jsd(t, s, beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert value.min() >= -1e-12 and value.max() <= bound + 1e-12 and bound <= math.log(2) + 1e-12
    torch.testing.assert_close(value, generalised_jsd(s, t, 1 - beta), rtol=1e-9, atol=1e-12)


@given(pairs)
def test_jsd_endpoints_are_defined_as_the_two_kls(case):
    t, s = pair(case)
    assert torch.equal(generalised_jsd(t, s, 0.0), kl(t, s))
    assert torch.equal(generalised_jsd(t, s, 1.0), kl(s, t))


def test_jsd_near_an_endpoint_is_beta_times_the_kl_not_the_kl():
    t, s = pair((0, 10, 1.0))
    for beta in (1e-4, 1e-5):
        torch.testing.assert_close(generalised_jsd(t, s, beta) / beta, kl(t, s), rtol=100 * beta, atol=0)
        torch.testing.assert_close(generalised_jsd(t, s, 1 - beta) / beta, kl(s, t), rtol=100 * beta, atol=0)


def test_fp32_agrees_with_fp64_at_a_language_model_vocabulary():
    x, y = logits(1, 4, 50_000, scale=3.0), logits(2, 4, 50_000, scale=3.0)
    for function in (kl, lambda t, s: generalised_jsd(t, s, 0.5), lambda t, s: entropy(t)):
        exact = function(torch.log_softmax(x, -1), torch.log_softmax(y, -1))
        single = function(torch.log_softmax(x.float(), -1), torch.log_softmax(y.float(), -1))
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_kl_that_rounds_below_zero_keeps_its_gradient():
    x = logits(1, 2000, 50, dtype=torch.float32)
    p = torch.log_softmax(x, -1)
    y = (x + 1e-4 * logits(2, 2000, 50, dtype=torch.float32)).requires_grad_()
    value = kl(p, torch.log_softmax(y, -1))
    negative = value < 0
    assert negative.any()
    (gradient,) = torch.autograd.grad(value.sum(), y)
    expected = torch.softmax(y.detach().double(), -1) - p.double().exp()
    torch.testing.assert_close(gradient[negative].double(), expected[negative], rtol=0.02, atol=1e-7)
    assert (gradient[negative].abs().amax(-1) > 1e-6).all()


def test_temperature_divides_the_logits_and_no_factor_follows():
    # For large T, KL → (1/T²)·½·Var over the uniform distribution of the logit difference; a T² factor would cancel the 1/T².
    x, y = logits(1, 4, 6), logits(2, 4, 6)
    limit = 0.5 * (x - y).var(-1, correction=0)
    for temperature in (1e3, 1e4):
        value = kl(torch.log_softmax(x / temperature, -1), torch.log_softmax(y / temperature, -1))
        torch.testing.assert_close(value * temperature**2, limit, rtol=20 / temperature, atol=1e-6)


# ------------------------------------------------------------------------------------------------ top-k with tail


def test_topk_with_tail_equals_the_merged_loop_with_gradient():
    x, y = logits(1, 4, 6).requires_grad_(), logits(2, 4, 6).requires_grad_()
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(row))[:3] for row in range(4)])
    value = kl_topk_with_tail(torch.log_softmax(x, -1), torch.log_softmax(y, -1), ids)
    expected = torch.stack([oracles.kl_topk_with_tail(*row) for row in zip(x, y, ids.tolist(), strict=True)])
    torch.testing.assert_close(value, expected)
    for own, oracle_gradient in zip(
        torch.autograd.grad(value.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True
    ):
        torch.testing.assert_close(own, oracle_gradient)


@settings(deadline=None)
@given(pairs, st.integers(1, 60))
def test_topk_with_tail_grows_with_k_up_to_the_full_kl(case, k):
    p, q = pair(case)
    vocabulary = p.shape[-1]
    k = min(k, vocabulary)
    merged = kl_topk_with_tail(p, q, k)
    assert (merged <= kl(p, q) + 1e-9).all() and merged.min() >= -1e-12
    if k > 1:
        assert (kl_topk_with_tail(p, q, k - 1) <= merged + 1e-9).all()
    torch.testing.assert_close(kl_topk_with_tail(p, q, vocabulary), kl(p, q), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("forbidden", [[], [1, 4]])
def test_with_no_mass_in_the_tail_value_and_gradient_are_those_of_the_full_kl(forbidden):
    sides = [logits(seed, 3, 5).requires_grad_() for seed in (1, 2)]
    p, q = (torch.log_softmax(forbid(x, forbidden), -1) for x in sides)
    merged, full = kl_topk_with_tail(p, q, 5 - len(forbidden)), kl(p, q)
    torch.testing.assert_close(merged, full)
    gradients = (torch.autograd.grad(value.sum(), sides, retain_graph=True) for value in (merged, full))
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected)


def test_an_integer_takes_the_most_probable_tokens_of_p():
    p, q = pair((0, 8, 2.0))
    assert torch.equal(kl_topk_with_tail(p, q, 3), kl_topk_with_tail(p, q, p.topk(3).indices))
    assert not torch.allclose(kl_topk_with_tail(p, q, 3), kl_topk_with_tail(p, q, q.topk(3).indices))


def test_with_tail_is_a_distribution_and_exact_for_a_tiny_tail():
    p = logp(0, 5, 9, scale=4.0)
    torch.testing.assert_close(with_tail(p, p.topk(3).indices).exp().sum(-1), torch.ones(5, dtype=torch.float64))
    assert (with_tail(p, p.topk(9).indices)[:, -1] == -INF).all()
    x = torch.tensor([[0.0, 0.0, -60.0, -70.0]])  # fp32: 1 − (top two) is 0
    tail = with_tail(torch.log_softmax(x, -1), torch.tensor([[0, 1]]))[0, -1]
    exact = torch.log_softmax(x.double(), -1)[0, 2:].logsumexp(0)
    torch.testing.assert_close(tail.double(), exact, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals_say_what_is_wrong():
    p = logp(0, 2, 4)
    with pytest.raises(ValueError, match=r"bfloat16.*fp32"):
        kl(p.bfloat16(), p.bfloat16())
    with pytest.raises(ValueError, match=r"beta=1.5 must lie in \[0, 1\]: the weight of the teacher"):
        generalised_jsd(p, p, 1.5)
    with pytest.raises(ValueError, match=r"vocabulary size 4, not 5"):
        kl_topk_with_tail(p, p, 5)
    with pytest.raises(ValueError, match=r"jsd needs a beta"):
        divergence(Divergence("jsd", grad="student"), p, p)
    with pytest.raises(ValueError, match=r"no other divergence takes one"):
        divergence(Divergence("kl_teacher_student", grad="student", beta=0.5), p, p)
    with pytest.raises(ValueError, match=r"grad=left"):
        object.__setattr__(request := Divergence("jsd", grad="both", beta=0.5), "grad", "left")
        divergence(request, p, p)


# ------------------------------------------------------------------------------------------------ top-k and entry clip


def merged(p: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[K+1] probabilities of ``ids`` and of all the others together."""
    rest = [v for v in range(len(p)) if v not in ids]
    return torch.stack([*(p[v] for v in ids), sum((p[v] for v in rest), torch.zeros((), dtype=p.dtype))])


def dense(request: Divergence, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """One token's divergence from two [V] logit vectors, entry by entry; top-k is the student's."""
    t, s = torch.softmax(t, -1), torch.softmax(s, -1)
    if request.top_k is not None:
        ids = sorted(range(len(s)), key=lambda v: -s[v].item())[: request.top_k]
        t, s = merged(t, ids), merged(s, ids)
    total = 0.0
    for a, b in zip(t, s, strict=True):
        if request.name == "jsd":
            m = request.beta * a + (1 - request.beta) * b
            total = total + request.beta * a * torch.log(a / m) + (1 - request.beta) * b * torch.log(b / m)
            continue
        p, q = (a, b) if request.name == "kl_teacher_student" else (b, a)
        term = p * torch.log(p / q)
        cut = request.entry_clip is not None and term.item() > request.entry_clip
        total = total + (torch.full_like(term, request.entry_clip) if cut else term)
    return total


OPTIONS = [
    Divergence("kl_teacher_student", "both", entry_clip=0.05),
    Divergence("kl_student_teacher", "both", entry_clip=0.02),
    Divergence("kl_teacher_student", "both", top_k=3),
    Divergence("kl_student_teacher", "both", top_k=1),
    Divergence("jsd", "both", beta=0.4, top_k=4),
    Divergence("kl_teacher_student", "both", entry_clip=0.1, top_k=3),
]


@pytest.mark.parametrize("request_", OPTIONS, ids=str)
def test_options_equal_the_loop_in_value_and_gradient(request_):
    sides = [logits(side, 6, 9, scale=1.5).requires_grad_() for side in (1, 2)]  # teacher, student
    value = divergence(request_, *(torch.log_softmax(x, -1) for x in sides))
    expected = torch.stack([dense(request_, t, s) for t, s in zip(*sides, strict=True)])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    full = divergence(Divergence(request_.name, "both", beta=request_.beta), *(torch.log_softmax(x, -1) for x in sides))
    assert not torch.allclose(value, full), "the option changed nothing"
    weights = logits(3, 6)
    for own, true in zip(
        torch.autograd.grad((weights * value).sum(), sides), torch.autograd.grad((weights * expected).sum(), sides), strict=True
    ):
        torch.testing.assert_close(own, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grad", ["student", "teacher"])
def test_options_leave_the_other_side_without_gradient(grad):
    for request in OPTIONS:
        sides = [logits(side, 2, 9).requires_grad_() for side in (1, 2)]
        value = divergence(Divergence(**(vars(request) | {"grad": grad})), *(torch.log_softmax(x, -1) for x in sides))
        own, other = sides if grad == "teacher" else sides[::-1]
        got = torch.autograd.grad(value.sum(), (own, other), allow_unused=True)
        assert got[0].abs().sum() > 0 and got[1] is None


def test_top_k_of_the_whole_vocabulary_is_the_full_divergence():
    t, s = logp(1, 4, 7), logp(2, 4, 7)
    for name, beta in (("kl_teacher_student", None), ("kl_student_teacher", None), ("jsd", 0.3)):
        full, top = (divergence(Divergence(name, "none", beta=beta, top_k=k), t, s) for k in (None, 7))
        torch.testing.assert_close(top, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "jsd", "beta": 0.5, "entry_clip": 0.1}, "entry_clip=0.1 bounds the terms of a KL"),
        ({"name": "kl_teacher_student", "entry_clip": 0.0}, "entry_clip=0.0 must be above 0"),
        ({"name": "kl_teacher_student", "entry_clip": math.nan}, "entry_clip=nan must be above 0"),
        ({"name": "kl_teacher_student", "top_k": 0}, "top_k=0 must be at least 1"),
        ({"name": "kl_teacher_student", "top_k": 8}, "top_k=8 is more than the vocabulary's 7 ids"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        divergence(Divergence(grad="student", **options), logp(1, 2, 7), logp(2, 2, 7))


# ------------------------------------------------------------------------------------------------ equal sides

EQUAL = [Divergence(name, "both", beta=beta) for name, beta in REQUESTS] + OPTIONS


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("request_", EQUAL, ids=str)
def test_equal_sides_have_value_0_and_a_gradient_of_exactly_0(request_, scale):
    """fp32, up to rows of one certain token: AdamW turns any rounding noise into steps of full size."""
    sides = [logits(0, 20, 50, scale=scale, dtype=torch.float32).requires_grad_() for _ in range(2)]
    value = divergence(request_, *(torch.log_softmax(x, -1) for x in sides))
    assert value.tolist() == [0.0] * 20
    assert not any(gradient.any() for gradient in torch.autograd.grad(value.sum(), sides))


# ------------------------------------------------------------------------------------------------ a teacher's listed ids

THREE = [Divergence("kl_teacher_student"), Divergence("kl_student_teacher"), Divergence("jsd", beta=0.3)]


def merged_oracle(request: Divergence, t: torch.Tensor, s: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The divergence of one token, bucket by bucket, from probabilities [V]; the ids that are not listed are one bucket."""
    buckets = [[i] for i in ids] + [[v for v in range(len(s)) if v not in ids]]
    total = s.new_zeros(())
    for bucket in buckets:
        if not bucket:
            continue
        a, b = sum(t[v] for v in bucket), sum(s[v] for v in bucket)
        if request.name == "jsd":
            m = request.beta * a + (1 - request.beta) * b
            total = total + request.beta * a * (a / m).log() + (1 - request.beta) * b * (b / m).log()
        else:
            first, last = (a, b) if request.name == "kl_teacher_student" else (b, a)
            total = total + first * (first / last).log()
    return total


@pytest.mark.parametrize("request_", THREE, ids=lambda request: request.name)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_divergence_to_listed_ids_is_the_merged_one_and_with_all_ids_the_full_one(request_, k):
    x, t = logits(1, 4, 6).requires_grad_(), torch.log_softmax(logits(2, 4, 6), -1)
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(row))[:k] for row in range(4)])
    value = listed_divergence(request_, ids, t.gather(-1, ids), torch.log_softmax(x, -1))
    rows = zip(t.exp(), torch.softmax(x, -1), ids.tolist(), strict=True)
    expected = torch.stack([merged_oracle(request_, *row) for row in rows])
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    gradient, wanted = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (value, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    full = divergence(request_, t, torch.log_softmax(x, -1))
    if k == 6:
        torch.testing.assert_close(value, full, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(full.sum(), x)[0], gradient, rtol=1e-10, atol=1e-12)
    else:
        assert (value < full - 1e-5).all()
    constant = listed_divergence(replace(request_, grad="none"), ids, t.gather(-1, ids), torch.log_softmax(x, -1))
    assert torch.equal(constant, value) and not constant.requires_grad


@settings(deadline=None)
@given(pairs, st.integers(1, 60), st.sampled_from(THREE))
def test_a_divergence_to_listed_ids_is_at_most_the_full_one_and_grows_with_them(case, k, request_):
    t, s = pair(case)
    k, full = min(k, t.shape[-1]), divergence(request_, t, s)
    listed = [t.topk(n) for n in (k, max(1, k - 1))]
    more, fewer = (listed_divergence(request_, x.indices, x.values, s) for x in listed)
    # A tail that rounding, if there were any, would hide counts as LEAST_TAIL, unless there is none.
    seen, seen_of_fewer = (
        (1.0 - x.values.exp().sum(-1) > 2 * LEAST_TAIL) | (x.indices.shape[-1] == t.shape[-1]) for x in listed
    )
    assert (more <= full + 1e-3).all() and (more <= full + 1e-9)[seen].all()
    assert (fewer <= more + 1e-9)[seen & seen_of_fewer].all()


def test_rows_that_list_fewer_ids_and_ids_that_the_student_lacks_are_merged_or_taken_out():
    t, s = torch.log_softmax(logits(1, 2, 8), -1), torch.log_softmax(logits(2, 2, 6), -1)
    ids = torch.tensor([[2, 0, -1, -1], [5, 1, 7, 6]])
    value = listed_divergence(THREE[0], ids, t.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf), s)
    first = merged_oracle(THREE[0], torch.cat([t[0, :5].exp(), t[0, 5:].exp().sum(0, keepdim=True)]), s[0].exp(), [2, 0])
    kept = t[1, :6].exp()
    last = merged_oracle(THREE[0], kept / kept.sum(), s[1].exp(), [5, 1])
    torch.testing.assert_close(value, torch.stack([first, last]), rtol=1e-10, atol=1e-12)


def test_a_tail_that_rounding_hides_is_small_and_no_tail_is_left_where_all_ids_are_listed():
    logp = torch.log_softmax(torch.tensor([[30.0, 0.0, 0.0, 0.0]], dtype=torch.float64), -1).float()
    ids = torch.tensor([[0, 1]])
    tail = listed_with_tail(logp.gather(-1, ids), ids, 4)[0, -1].exp()
    assert tail == pytest.approx(LEAST_TAIL, rel=1e-3)
    all_ids = torch.tensor([[0, 1, 2, 3]])
    assert listed_with_tail(logp, all_ids, 4)[0, -1] == -torch.inf
    student = torch.zeros(1, 4).log_softmax(-1).requires_grad_()
    for request in THREE:
        value = listed_divergence(request, ids, logp.gather(-1, ids), student)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()
