"""Semi-OPD: what each form is on fixed samples, and that recorded ids and log-probs are used as they were drawn."""

import json

import pytest
import torch

from pidistill.data.demonstrations import recorded_completion
from pidistill.errors import InputError
from pidistill.objectives import SemiOPD
from pidistill.rollouts.selections import All, trace_row
from pidistill.types import Example, PromptPair, Rollout, Scores
from tests.support.builders import batch_of, random_rollouts
from tests.support.oracles import MarkovChain


def fixed_samples(chain: MarkovChain, W: torch.Tensor, S0: torch.Tensor):
    """Every sequence of the chain, its probability under S₀, and scores at W."""
    sequences = chain.sequences()
    rollouts = [
        Rollout(Example("chain", []), PromptPair([0], [0, 0], True), list(y), [True] * len(y), None, "student", 0, "done", [])
        for y in sequences
    ]
    batch = batch_of(rollouts)
    previous = torch.tensor([p for y in sequences for p in chain.previous(y)])
    s0 = torch.log_softmax(S0, -1)
    batch.ratio_logprobs = s0[previous, batch.targets]
    probability = torch.stack([sum(s0[p, t] for p, t in zip(chain.previous(y), y, strict=True)).exp() for y in sequences])
    student = torch.log_softmax(W, -1)[previous, batch.targets]
    teacher = torch.log_softmax(chain.W + chain.P, -1)[previous, batch.targets]
    return batch, probability[batch.rollout_index], Scores(student, teacher, {}, None, None)


def expected_gradient(chain: MarkovChain, form: str, W: torch.Tensor, S0: torch.Tensor) -> torch.Tensor:
    leaf = W.clone().requires_grad_()
    batch, probability, scores = fixed_samples(chain, leaf, S0)
    loss = SemiOPD(form).token_loss(batch, scores, 0).loss
    return torch.autograd.grad((probability * loss).sum(), leaf)[0]


@pytest.mark.parametrize("seed", range(3))
def test_k2_is_the_published_update_and_importance_is_the_kl_at_the_prefixes_of_the_initial_student(seed):
    chain = MarkovChain.seeded(seed, sampler="student")
    moved = chain.W + 0.5 * torch.randn(chain.W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leaf = moved.clone().requires_grad_()
    _, probability, scores = fixed_samples(chain, leaf, chain.W)
    published = -((scores.teacher_logprobs - scores.student_logprobs).detach() * scores.student_logprobs)
    (expected,) = torch.autograd.grad((probability * published).sum(), leaf)
    ours = expected_gradient(chain, "k2", moved, chain.W)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)

    def kl_at_prefixes(W):
        student, teacher = torch.log_softmax(W, -1), torch.log_softmax(chain.W + chain.P, -1)
        per_prefix = (student.exp() * (student - teacher)).sum(-1)
        prefix = dict.fromkeys(range(len(W)), 0.0)
        for y in chain.sequences():
            weight = chain.logprob("student", chain.W, y).exp()
            for p in chain.previous(y):
                prefix[p] = prefix[p] + weight
        return sum(weight * per_prefix[p] for p, weight in prefix.items())

    truth = chain_gradient(kl_at_prefixes, moved)
    torch.testing.assert_close(expected_gradient(chain, "importance", moved, chain.W), truth, atol=1e-10, rtol=1e-9)
    assert (ours - truth).norm() > 0.02 * truth.norm()  # k2 is another gradient once the student has moved
    at_start = chain_gradient(kl_at_prefixes, chain.W)
    torch.testing.assert_close(expected_gradient(chain, "k2", chain.W, chain.W), at_start, atol=1e-10, rtol=1e-9)


def chain_gradient(function, W: torch.Tensor) -> torch.Tensor:
    leaf = W.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def test_where_student_and_teacher_agree_nothing_is_left_and_rows_that_do_not_count_have_no_gradient():
    rollouts = random_rollouts(4)
    batch = batch_of(rollouts)
    batch.has_privileged[:5] = False
    student = (-torch.rand(len(batch.targets))).requires_grad_()
    agree = Scores(student, student.detach().clone(), {}, None, None)
    assert not SemiOPD().token_loss(batch, agree, 0).loss.any()
    loss = SemiOPD(no_pi="drop").token_loss(batch, Scores(student, -torch.rand(len(student)), {}, None, None), 0).loss
    loss.sum().backward()
    assert not student.grad[:5].any() and (student.grad[5:] != 0).all()
    batch.ratio_logprobs = None
    with pytest.raises(InputError, match=r"form=importance needs the log-probs .*selections\.All, or set form: k2"):
        SemiOPD("importance").token_loss(batch, agree, 0)


# ------------------------------------------------------------------------------------------- recorded samples


def test_what_was_sampled_is_written_and_read_again_as_it_was():
    (rollout,) = random_rollouts(1)
    (trace,) = All().select([rollout], (), lambda cuts: None, 0).traces
    row = json.loads(json.dumps(trace_row(trace, {})))
    rollout.example = Example("row 0", [], data=row)
    fresh = Rollout(rollout.example, rollout.prompts, [9], [True], None, "student", 0, "done", [])
    read = recorded_completion(fresh, vocab_size=50)
    assert read.completion == rollout.completion and read.policy_mask == rollout.policy_mask
    expected = [x for x, own in zip(rollout.sampled_logprobs, rollout.policy_mask, strict=True) if own]
    assert read.trainer_logprobs == expected and read.sampled_logprobs is None
    torch.testing.assert_close(batch_of([read]).ratio_logprobs, torch.tensor(expected))
    for change, match in (
        ({"logprobs": row["sampled"]["logprobs"][1:]}, "they do not belong together"),
        ({"ids": [77, *row["sampled"]["ids"][1:]]}, "ids outside the tokenizer's 50"),
        ({"logprobs": [1.0, *row["sampled"]["logprobs"][1:]]}, "log-probs above 0"),
    ):
        fresh.example = Example("row 0", [], data=row | {"sampled": row["sampled"] | change})
        with pytest.raises(InputError, match=match):
            recorded_completion(fresh, vocab_size=50)


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}])
def test_log_probs_of_another_distribution_than_the_runs_make_no_ratio(settings):
    (rollout,) = random_rollouts(1)
    (trace,) = All().select([rollout], (), lambda cuts: None, 0).traces
    for told, usable in (({"temperature": 1.0, "top_p": None, "top_k": None}, True), ({"temperature": 1.0} | settings, False)):
        row = json.loads(json.dumps(trace_row(trace, told)))
        fresh = Rollout(Example("row", [], data=row), rollout.prompts, [9], [True], None, "student", 0, "done", [])
        read = recorded_completion(fresh, vocab_size=50, temperature=1.0)
        assert read.completion == rollout.completion and (batch_of([read]).ratio_logprobs is not None) == usable


def test_turns_of_a_recorded_completion_are_the_stretches_that_the_policy_wrote():
    record = {"ids": [1, 2, 3, 4, 5, 6], "policy": [1, 1, 0, 0, 1, 0], "logprobs": [-1.0, -1.0, -1.0]}
    fresh = Rollout(
        Example("row", [], data={"sampled": record}), PromptPair([0], [0], True), [9], [True], None, "student", 0, "done", []
    )
    batch = batch_of([recorded_completion(fresh, vocab_size=50)])
    assert batch.turn_index.tolist() == [0, 0, 1] and batch.turn_balance.tolist() == [0.75, 0.75, 1.5]
