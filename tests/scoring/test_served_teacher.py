"""A teacher on a server: the numbers are those of the same model here, requests are retried, and what is missing is refused."""

import json
import time

import pytest
import torch

from pidistill.errors import InputError
from pidistill.losses.token_weights import Chain, DisagreementDamping, EntropyMask, SkipFirst
from pidistill.objectives import OPD, OPDPPO, OPSDUCLA, RLSD, SDAR, SDFT, SDPO, PiDistill, SemiOPD
from pidistill.scoring.head import apply_head
from pidistill.scoring.head_numbers import ScorePlan
from pidistill.scoring.score import score
from pidistill.scoring.served_teacher import ServedTeacher, check_served
from pidistill.teachers import RoutedTeacher
from pidistill.types import Divergence, ListedTeacher, RolloutAdvantage, ScoreRequest
from tests.support.builders import VOCABULARY, batch_of, gradients, model, random_rollouts, relative_difference
from tests.support.served import Server, serving


def rollouts_and_batch(count: int = 4):
    rollouts = random_rollouts(count)
    return rollouts, batch_of(rollouts, [RolloutAdvantage(0.5 - n % 2) for n in range(count)])


OBJECTIVES = [OPD(), OPD(proximal_alpha=0.3), OPDPPO(), SDAR(gap_weight=1.0), RLSD(), SemiOPD("k2")]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["opd", "top_d", "opd_ppo", "sdar", "rlsd", "semi_opd"])
def test_a_step_with_the_served_teacher_is_that_with_the_same_model_here(objective):
    other, found = model(3), {}
    with serving(Server(other)) as url:
        for name, teacher in (("here", other), ("served", ServedTeacher(url, "big"))):
            scores, found[name] = one_step(objective, teacher)
            found[name] = scores.teacher_logprobs, found[name]
    torch.testing.assert_close(found["served"][0], found["here"][0], rtol=1e-5, atol=1e-5)
    assert relative_difference(found["served"][1], found["here"][1]) < 1e-5


def one_step(objective, teacher, chunk_tokens=None):
    module, (_, batch) = model(), rollouts_and_batch()
    loss = lambda b, s: objective.weighted_loss(b, s, 0).loss  # noqa: E731
    scores = score(module, batch, objective.score_request(0), teacher=teacher, loss=loss, chunk_tokens=chunk_tokens)
    loss(batch, scores).sum().backward()
    return scores, gradients(module)


DIVERGENCES = [
    OPD("kl_student_teacher", token_weight=DisagreementDamping()),
    SDFT(),
    OPSDUCLA("jsd", jsd_beta=0.3),
    SDPO(top_k=None),
]
FORMS = [(objective, "vllm") for objective in DIVERGENCES] + [(SDFT(), "sglang")]


@pytest.mark.parametrize(("objective", "server"), FORMS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_with_all_ids_listed_a_step_on_a_divergence_is_that_with_the_same_model_here(objective, server):
    other = model(3)
    here, expected = one_step(objective, other)
    with serving(Server(other)) as url:
        there, found = one_step(objective, ServedTeacher(url, "big", top_k=VOCABULARY, server=server), chunk_tokens=5)
    assert there.divergences.keys() == here.divergences.keys()
    for request, value in here.divergences.items():
        torch.testing.assert_close(there.divergences[request], value, rtol=1e-4, atol=1e-5)
    assert relative_difference(found, expected) < 1e-4 and there.teacher_entropy is None


def merged(request: Divergence, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The definition between two short distributions, in probabilities."""
    a, b = t.exp(), s.exp()
    if request.name == "jsd":
        m = request.beta * a + (1 - request.beta) * b
        return (request.beta * a * (a / m).log() + (1 - request.beta) * b * (b / m).log()).sum()
    first, last = (a, b) if request.name == "kl_teacher_student" else (b, a)
    return (first * (first / last).log()).sum()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("name", "beta"), [("kl_teacher_student", None), ("kl_student_teacher", None), ("jsd", 0.3)])
def test_the_heads_divergence_to_listed_ids_equals_the_dense_one_in_value_and_gradient(name, beta, temperature, chunk):
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width, top = 7, 11, 4, 3

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight, teacher = (
        normal(tokens, width),
        normal(vocabulary, width),
        torch.log_softmax(normal(tokens, vocabulary), -1),
    )
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    rows = [[int(y), *(i for i in t.topk(top).indices.tolist() if i != y)] for y, t in zip(targets, teacher, strict=True)]
    assert len({len(row) for row in rows}) == 2  # the sampled id is among the likeliest ones, or is not
    ids = torch.tensor([row + [-1] * (top + 1 - len(row)) for row in rows])
    listed = ListedTeacher(ids, teacher.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf))
    request = Divergence(name, beta=beta)
    asked = ScoreRequest(True, False, views=("student",), divergences=(request,), entropy=False)
    plan = ScorePlan(targets, asked, temperature, chunk, listed=listed)
    ours = plan.as_scores(apply_head(plan, {"student": hidden}, weight)).divergences[request]
    student = torch.log_softmax(hidden @ weight.T / temperature, -1)

    def short(logp, row):
        others = [v for v in range(vocabulary) if v not in row]
        return torch.cat([logp[row], logp[others].logsumexp(0, keepdim=True)])

    dense = torch.stack([merged(request, short(t, r), short(s, r)) for t, s, r in zip(teacher, student, rows, strict=True)])
    torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)
    factors = normal(tokens)
    expected = torch.autograd.grad((factors * dense).sum(), (hidden, weight))
    found = torch.autograd.grad((factors * ours).sum(), (hidden, weight))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-10)


def test_with_few_ids_listed_a_steps_divergence_is_below_the_full_one_and_rises_with_them():
    objective, other = SDFT(), model(3)
    module, (_, batch) = model(), rollouts_and_batch()

    def mean_of(teacher):
        with torch.no_grad():
            scores = score(module, batch, objective.score_request(0), teacher=teacher)
        return scores.divergences[objective.divergence].mean().item()

    with serving(Server(other)) as url:
        means = [mean_of(ServedTeacher(url, "big", top_k=top_k)) for top_k in (1, 4, 16, VOCABULARY)]
    assert means == sorted(means) and means[0] < 0.9 * means[-1]
    assert means[-1] == pytest.approx(mean_of(other), abs=1e-5)


def test_ids_that_the_student_lacks_are_taken_out_and_refused_where_they_hold_most_of_a_token():
    objective, wider = SDFT(), model(3, vocab_size=VOCABULARY + 14)
    here, expected = one_step(objective, wider)
    with serving(Server(wider)) as url:
        there, found = one_step(objective, ServedTeacher(url, "big", top_k=VOCABULARY + 14))
        torch.testing.assert_close(
            there.divergences[objective.divergence], here.divergences[objective.divergence], atol=1e-4, rtol=0
        )
        assert relative_difference(found, expected) < 1e-4
        with torch.no_grad():
            wider.output.weight[VOCABULARY:] *= 100.0
        with pytest.raises(InputError, match=rf"of a token's probability to ids that the student's {VOCABULARY} do not have"):
            one_step(objective, ServedTeacher(url, "big", top_k=4))


def test_a_rank_without_rollouts_asks_for_nothing_and_has_no_numbers():
    scores = score(
        model(), batch_of([]), OPD("jsd").score_request(0), teacher=ServedTeacher("http://localhost:1/v1", "big", top_k=4)
    )
    assert scores.teacher_logprobs.shape == (0,) and all(x.shape == (0,) for x in scores.divergences.values())


def test_ids_go_out_as_they_are_and_a_rollout_is_asked_for_once(monkeypatch):
    server = Server(model(3))
    monkeypatch.setenv("KEY_OF_TEST", "secret")
    rollouts, _ = rollouts_and_batch()
    with serving(server) as url:
        teacher = ServedTeacher(url, "big", key_env="KEY_OF_TEST", threads=2)
        first = teacher.listed(rollouts)
        assert all(a is b for a, b in zip(teacher.listed(rollouts[::-1]), first[::-1], strict=True))
    asked = sorted(body["prompt"] for body in server.bodies)
    assert asked == sorted(r.prompts.teacher + r.completion for r in rollouts)
    assert {body["model"] for body in server.bodies} == {"big"} and {h["Authorization"] for h in server.headers} == {
        "Bearer secret"
    }
    assert [x.ids.shape for x in first] == [(r.policy_tokens, 1) for r in rollouts]
    tokens = [t for r in rollouts for t, policy in zip(r.completion, r.policy_mask, strict=True) if policy]
    assert torch.cat([x.ids for x in first]).squeeze(-1).tolist() == tokens


def test_faults_are_retried_and_then_told_in_one_sentence():
    faults = [(503, b""), (200, b"no json"), (429, b"")]
    rollouts, _ = rollouts_and_batch(1)
    with serving(Server(model(3), faults)) as url:
        assert ServedTeacher(url, "big", backoff_s=0.0).listed(rollouts)
    rollouts, _ = rollouts_and_batch(1)
    told = (
        r"server at .* gave status 503, then an answer that is no completion, then status 429 \(3 tries\) for row 0; check teac"
    )
    with serving(Server(model(3), faults)) as url, pytest.raises(InputError, match=told):
        ServedTeacher(url, "big", backoff_s=0.0, retries=2).listed(rollouts)
    told = r"gave status 404 \(1 tries\) for row 0"
    with serving(Server(model(3), [(404, b"")])) as url, pytest.raises(InputError, match=told):
        ServedTeacher(url, "big", backoff_s=0.0).listed(rollouts)
    with pytest.raises(InputError, match=r"gave ConnectionRefusedError \(2 tries\) for row 0"):
        ServedTeacher(url, "big", backoff_s=0.0, retries=1).listed(rollouts)


def test_a_server_that_never_answers_ends_the_run_after_its_time_and_cancels_what_waits():
    rollouts, _ = rollouts_and_batch(12)
    server = Server(model(3), [lambda entries: time.sleep(2.0) or entries] * 24)
    with serving(server) as url:
        teacher = ServedTeacher(url, "big", threads=2, timeout_s=0.2, retries=1, backoff_s=0.0)
        with pytest.raises(InputError, match=r"gave TimeoutError \(2 tries\) for row 0"):
            teacher.listed(rollouts)
    assert len(server.bodies) <= 8  # of 24: two at once, and two more if they began before the first had failed


def test_answers_that_lack_a_token_or_all_log_probs_are_refused():
    rollouts, _ = rollouts_and_batch(1)
    length = len(rollouts[0].prompts.teacher + rollouts[0].completion)
    without = json.dumps({"choices": [{"text": ""}]}).encode()
    other = json.dumps({"choices": [{"prompt_logprobs": [None] + [{"49999": {"logprob": -1.0}}] * (length - 1)}]}).encode()
    for content, match in (
        (without, "gave no prompt_logprobs for its"),
        (other, r"place \d+: the teacher's server has no log-prob for id \d+"),
    ):
        with serving(Server(model(3), [(200, content)])) as url, pytest.raises(InputError, match=match):
            ServedTeacher(url, "big").listed(rollouts)


def change_place(change):
    """Change the entries of the last place, a dict from ids to their numbers."""

    def changed(entries):
        return [*entries[:-1], change(dict(entries[-1]))]

    return changed


FAULTS = {
    "null": (lambda e: {i: {"logprob": None} for i in e}, r"has no log-prob for id \d+; its model has another tokenizer"),
    "not a number": (lambda e: {i: {"logprob": float("nan")} for i in e}, r"has no log-prob for id"),
    "above 1": (lambda e: {i: {"logprob": 3.0} for i in e}, r"has no log-prob for id"),
    "too few": (lambda e: dict(list(e.items())[:2]), r"lists 2 ids .* where teacher\.top_k=4 were asked for"),
    "too many": (lambda e: e | {str(i): {"logprob": -20.0} for i in range(40)}, r"lists 4\d ids .* where teacher\.top_k=4"),
    "no ids": (lambda e: e | {"word": {"logprob": -9.0}}, r"lists 'word' where an id belongs"),
    "no distribution": (lambda e: {i: {"logprob": -0.1} for i in e}, r"add up to \d.*, which no distribution does"),
    "a list": (lambda e: [1, 2], r"has no log-prob for id"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_place_that_is_no_list_of_log_probs_is_one_sentence_with_its_row_and_place(name):
    change, told = FAULTS[name]
    rollouts, _ = rollouts_and_batch(1)
    with serving(Server(model(3), [change_place(change)])) as url, pytest.raises(InputError, match="row 0, place .*" + told):
        ServedTeacher(url, "big", top_k=4).listed(rollouts)


def test_a_wrong_length_and_a_list_that_the_server_refuses_are_told_with_the_key_to_change():
    rollouts, _ = rollouts_and_batch(1)
    for fault, told in (
        (lambda entries: entries[1:], r"gave no prompt_logprobs for its \d+ tokens"),
        ((400, b"{}"), r"gave status 400 .* list teacher\.top_k=8 ids \(vLLM: --max-logprobs, 20 by default\)"),
        ((401, b"{}"), r"gave status 401 .*teacher\.key_env names no key"),
    ):
        with serving(Server(model(3), [fault])) as url, pytest.raises(InputError, match=told):
            ServedTeacher(url, "big", top_k=8, retries=0).listed(rollouts)


def test_the_server_is_asked_once_before_any_model_is_loaded():
    with serving(Server(model(3))) as url:
        ServedTeacher(url, "big", top_k=4).check_server()
    with (
        serving(Server(model(3), [(404, b"")])) as url,
        pytest.raises(InputError, match="gave status 404 .* for a first question"),
    ):
        ServedTeacher(url, "big").check_server()


def test_what_a_served_teacher_does_not_give_is_refused():
    teacher, lists = ServedTeacher("http://localhost:1/v1", "big"), ServedTeacher("http://localhost:1/v1", "big", top_k=8)
    for one, objective, told in (
        (teacher, OPSDUCLA(), r"set teacher\.top_k for divergences over its likeliest ids and a tail"),
        (lists, PiDistill(alpha=0.5), "weights are on a server: they are not trained"),
        (RoutedTeacher("domain", {"a": lists}), OPD(), "are no part of a RoutedTeacher"),
        (lists, SDPO(top_k=20), r"objective\.top_k=20 is over the ids that the student finds likeliest"),
        (lists, OPD(token_weight=EntropyMask(view="teacher")), "reads the teacher's entropy"),
        (lists, OPD(token_weight=Chain([SkipFirst(1), EntropyMask(view="teacher")])), "reads the teacher's entropy"),
    ):
        with pytest.raises(InputError, match=told):
            check_served(one, objective, 1.0, type(objective).__name__)
    with pytest.raises(InputError, match=r"sampler\.temperature=0\.7 compares the student at another"):
        check_served(teacher, OPD(), 0.7, "OPD")
    check_served(teacher, OPD(token_weight=EntropyMask()), 1.0, "OPD")
    check_served(lists, OPSDUCLA(), 1.0, "OPSDUCLA")
    for settings, match in (
        ({"base_url": "localhost"}, r"teacher\.base_url must look like"),
        ({"threads": 0}, r"teacher\.threads=0 must be at least 1"),
        ({"top_k": 0}, r"teacher\.top_k=0 must be a whole number of at least 1"),
        ({"server": "tgi"}, r"teacher\.server=tgi is unknown; choose one of vllm, sglang"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
    ):
        with pytest.raises(InputError, match=match):
            ServedTeacher(**{"base_url": "http://localhost:1/v1", "model": "big"} | settings)
