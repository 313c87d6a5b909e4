"""Test that a teacher with the student's weights gives the student's numbers on rollouts without privileged information."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torchtune.models.llama3 import lora_llama3

from pidistill.models.adapters import train_adapters_only
from pidistill.scoring.equal_views import have_equal_weights
from pidistill.scoring.score import score
from pidistill.teachers import AdapterOffTeacher, EMATeacher, FrozenTeacher, LiveTeacher, MixturePart, TrustRegionTeacher
from pidistill.testing import TINY_SIZES
from pidistill.types import Divergence, ScoreRequest
from tests.support.builders import VOCABULARY, batch_of, gradients, model, random_rollouts
from tests.support.own_divergences import renyi

DIVERGENCES = tuple(
    Divergence(name, "student", **options)
    for name, options in (
        ("kl_teacher_student", {}),
        ("kl_student_teacher", {"top_k": 5}),
        ("jsd", {"beta": 0.3}),
    )
)
REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, divergences=DIVERGENCES)
TEACHERS = {"live": LiveTeacher, "frozen": FrozenTeacher, "ema": EMATeacher, "trust region": lambda: TrustRegionTeacher(0.3)}


def mixed_rollouts():
    """Rollouts of which every second one has privileged information, so that no forward has the shape of another one."""
    with_pi, without = random_rollouts(4, seed=1), random_rollouts(4, seed=2, with_pi=False)
    return [rollout for pair in zip(with_pi, without, strict=True) for rollout in pair]


def attached(teacher, module):
    teacher.attach(lambda: copy.deepcopy(module))
    return teacher


def train_on_rows_without_pi(module, rollouts, packing, teacher):
    """Return the divergences on rollouts with and without privileged information; the latter's have gone backward."""
    batch = batch_of(rollouts, packing=packing)
    scores = score(module, batch, REQUEST, teacher=teacher)
    values = torch.stack([scores.divergences[d] for d in DIVERGENCES])
    values[:, ~batch.has_privileged].sum().backward()
    return values[:, batch.has_privileged], values[:, ~batch.has_privileged]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_a_teacher_with_the_students_weights_gives_exact_zeros_in_a_mixed_batch(teacher, packing):
    module = model()
    teacher = attached(TEACHERS[teacher](), module)
    with_pi, without = train_on_rows_without_pi(module, mixed_rollouts(), packing, teacher)
    assert without.numel() > 0 and torch.equal(without, torch.zeros_like(without))
    assert all(not grad.any() for grad in gradients(module).values())
    assert (with_pi > 1e-6).all()


def kl_and_entropy(teacher, student):
    """A function that still has a gradient where both sides are equal: not a divergence, and nothing to be rounded away."""
    return (teacher.exp() * (teacher - student)).sum(-1) + 0.1 * (student.exp() * student).sum(-1)


@pytest.mark.parametrize(("function", "zero"), [(renyi, True), (kl_and_entropy, False)])
def test_a_divergence_of_ones_own_has_no_gradient_of_rounding_noise(function, zero):
    own = Divergence("own", "student", fn=function)
    module, rollouts = model(), random_rollouts(4, with_pi=False)
    request = ScoreRequest(student_grad=True, teacher_grad=False, divergences=(own,))
    scores = score(module, batch_of(rollouts), request, teacher=attached(FrozenTeacher(), module))
    scores.divergences[own].sum().backward()
    assert all(not grad.any() for grad in gradients(module).values()) == zero


@pytest.mark.parametrize("teacher", ["frozen", "ema", "trust region"])
def test_a_teacher_with_other_weights_is_scored_by_its_own(teacher):
    module, rollouts = model(), mixed_rollouts()
    teacher = attached(TEACHERS[teacher](), module)
    with torch.no_grad():
        module.output.weight[7] += 0.1
    _, without = train_on_rows_without_pi(module, rollouts, "tree", teacher)
    assert (without > 1e-7).any() and any(grad.any() for grad in gradients(module).values())


def test_an_ema_teacher_counts_as_equal_again_once_it_has_all_of_the_new_weights():
    module = model()
    teacher = attached(EMATeacher(1.0), module)
    with torch.no_grad():
        module.output.weight[7] += 0.1
    assert have_equal_weights(teacher.mixture(module), module) == [False]
    teacher.update(module)
    assert have_equal_weights(teacher.mixture(module), module) == [True]


@pytest.mark.parametrize("moved", [False, True])
def test_adapters_that_do_nothing_yet_give_exact_zeros_against_the_model_without_them(moved):
    torch.manual_seed(0)
    module = lora_llama3(
        lora_attn_modules=["q_proj", "v_proj"], lora_rank=4, lora_alpha=8.0, vocab_size=VOCABULARY, **TINY_SIZES
    )
    train_adapters_only(module)
    if moved:
        with torch.no_grad():
            module.layers[0].attn.q_proj.lora_b.weight += 0.1
    _, without = train_on_rows_without_pi(module, mixed_rollouts(), "tree", AdapterOffTeacher())
    assert bool(without.any()) == moved
    assert any(grad.any() for grad in gradients(module).values()) == moved


def test_dora_adapters_and_models_of_other_sizes_count_as_different():
    module = model()
    assert have_equal_weights([MixturePart(1.0, model(num_layers=1)), MixturePart(1.0, model(1))], module) == [False, False]
    dora = lora_llama3(
        lora_attn_modules=["q_proj"], lora_rank=4, lora_alpha=8.0, use_dora=True, vocab_size=VOCABULARY, **TINY_SIZES
    )
    assert have_equal_weights([MixturePart(1.0, dora, adapters=False)], dora) == [False]


def test_a_rank_with_other_shards_makes_all_ranks_count_the_weights_as_different(monkeypatch):
    """A rank whose own shards are equal learns from the others that the weights are not."""
    module = model()
    answers = SimpleNamespace(asked=[])
    monkeypatch.setattr("pidistill.scoring.equal_views.on_all_ranks", lambda yes, device: answers.asked.append(yes) or False)
    assert have_equal_weights([MixturePart(1.0, copy.deepcopy(module))], module) == [False]
    assert answers.asked == [True]
