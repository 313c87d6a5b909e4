"""A teacher on a server: the numbers are those of the same model here, requests are retried, and what is missing is refused."""

import json

import pytest
import torch

from pidistill.errors import InputError
from pidistill.objectives import OPD, OPDPPO, OPSDUCLA, RLSD, SDAR, SemiOPD
from pidistill.scoring.score import score
from pidistill.scoring.served_teacher import ServedTeacher, check_served
from pidistill.types import RolloutAdvantage
from tests.support.builders import batch_of, gradients, model, random_rollouts, relative_difference
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
            module, (_, batch) = model(), rollouts_and_batch()
            loss = lambda b, s: objective.weighted_loss(b, s, 0).loss  # noqa: E731
            scores = score(module, batch, objective.score_request(0), teacher=teacher, loss=loss)
            loss(batch, scores).sum().backward()
            found[name] = scores.teacher_logprobs, gradients(module)
    torch.testing.assert_close(found["served"][0], found["here"][0], rtol=1e-5, atol=1e-5)
    assert relative_difference(found["served"][1], found["here"][1]) < 1e-5


def test_ids_go_out_as_they_are_and_a_rollout_is_asked_for_once(monkeypatch):
    server = Server(model(3))
    monkeypatch.setenv("KEY_OF_TEST", "secret")
    rollouts, _ = rollouts_and_batch()
    with serving(server) as url:
        teacher = ServedTeacher(url, "big", key_env="KEY_OF_TEST", threads=2)
        first = teacher.logprobs(rollouts)
        assert teacher.logprobs(rollouts[::-1]) == first[::-1]
    asked = sorted(body["prompt"] for body in server.bodies)
    assert asked == sorted(r.prompts.teacher + r.completion for r in rollouts)
    assert {body["model"] for body in server.bodies} == {"big"} and {h["Authorization"] for h in server.headers} == {
        "Bearer secret"
    }
    assert [len(x) for x in first] == [r.policy_tokens for r in rollouts]


def test_faults_are_retried_and_then_told_in_one_sentence():
    faults = [(503, b""), (200, b"no json"), (429, b"")]
    rollouts, _ = rollouts_and_batch(1)
    with serving(Server(model(3), faults)) as url:
        assert ServedTeacher(url, "big", backoff_s=0.0).logprobs(rollouts)
    rollouts, _ = rollouts_and_batch(1)
    told = r"server at .* gave status 429 for row 0 \(3 tries\); check teacher\.base_url"
    with serving(Server(model(3), faults)) as url, pytest.raises(InputError, match=told):
        ServedTeacher(url, "big", backoff_s=0.0, retries=2).logprobs(rollouts)
    told = r"gave status 404 for row 0 \(1 tries\)"
    with serving(Server(model(3), [(404, b"")])) as url, pytest.raises(InputError, match=told):
        ServedTeacher(url, "big", backoff_s=0.0).logprobs(rollouts)
    with pytest.raises(InputError, match=r"gave ConnectionRefusedError for row 0 \(2 tries\)"):
        ServedTeacher(url, "big", backoff_s=0.0, retries=1).logprobs(rollouts)


def test_answers_that_lack_a_token_or_all_log_probs_are_refused():
    rollouts, _ = rollouts_and_batch(1)
    length = len(rollouts[0].prompts.teacher + rollouts[0].completion)
    without = json.dumps({"choices": [{"text": ""}]}).encode()
    other = json.dumps({"choices": [{"prompt_logprobs": [None] + [{"49999": {"logprob": -1.0}}] * (length - 1)}]}).encode()
    for content, match in ((without, "gave no prompt_logprobs for its"), (other, r"has no log-prob for id \d+ at place \d+")):
        with serving(Server(model(3), [(200, content)])) as url, pytest.raises(InputError, match=match):
            ServedTeacher(url, "big").logprobs(rollouts)


def test_what_needs_more_than_the_sampled_tokens_is_refused():
    teacher = ServedTeacher("http://localhost:1/v1", "big")
    with pytest.raises(InputError, match="the log-probs of the sampled tokens and nothing else"):
        check_served(teacher, OPSDUCLA(), 1.0, "OPSDUCLA")
    with pytest.raises(InputError, match=r"sampler\.temperature=0\.7 compares the student at another"):
        check_served(teacher, OPD(), 0.7, "OPD")
    check_served(teacher, OPD(), 1.0, "OPD")
    for settings, match in (
        ({"base_url": "localhost"}, r"teacher\.base_url must look like"),
        ({"threads": 0}, r"teacher\.threads=0 must be at least 1"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
    ):
        with pytest.raises(InputError, match=match):
            ServedTeacher(**{"base_url": "http://localhost:1/v1", "model": "big"} | settings)
