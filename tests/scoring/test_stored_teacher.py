"""A teacher's numbers on disk: the loss and gradient of the teacher in memory, and never another teacher's numbers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pidistill.errors import InputError
from pidistill.objectives import OPSDUCLA, SemiOPD
from pidistill.scoring.score import score
from pidistill.scoring.stored_teacher import StoredTeacher, hash_of_weights, identity_of
from pidistill.teachers import FrozenTeacher, RoutedTeacher
from pidistill.types import PromptPair
from tests.support.builders import batch_of, gradients, model, random_rollouts


def frozen() -> FrozenTeacher:
    teacher = FrozenTeacher()
    teacher.attach(lambda: model(7))
    return teacher


def stored(folder, load=lambda: model(7), **identity) -> StoredTeacher:
    teacher = StoredTeacher(str(folder), add=identity.pop("add", True))
    teacher.identify(identity)
    teacher.attach(load)
    return teacher


def never() -> None:
    raise AssertionError("the teacher's weights were loaded although every number is on disk")


def step(module, rollouts, teacher, objective, temperature=1.0, packing="tree"):
    """Return the loss per token, the scores and the gradient of the loss's sum."""
    module.zero_grad()
    batch = batch_of(rollouts, objective.advantages(rollouts, 0), packing=packing)
    loss = lambda b, s: objective.weighted_loss(b, s, 0).loss  # noqa: E731
    scores = score(module, batch, objective.score_request(0), teacher=teacher, loss=loss, temperature=temperature)
    per_token = loss(batch, scores)
    per_token.sum().backward()
    return per_token.detach(), scores, gradients(module)


@pytest.mark.parametrize("objective", [SemiOPD(), SemiOPD("kl_teacher_student"), OPSDUCLA()], ids=["k2", "kl", "jsd"])
@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_numbers_from_disk_give_the_loss_and_the_gradient_of_the_teacher_in_memory_to_the_bit(tmp_path, objective, packing):
    rollouts, module = random_rollouts(6), model()
    step(module, rollouts, stored(tmp_path), objective, packing=packing)
    for temperature in (1.0, 0.7):  # hidden states serve any temperature
        loss, scores, gradient = step(module, rollouts, frozen(), objective, temperature, packing)
        again, read, other = step(module, rollouts, stored(tmp_path, never, add=False), objective, temperature, packing)
        assert torch.equal(loss, again) and torch.equal(scores.teacher_entropy, read.teacher_entropy)
        assert gradient.keys() == other.keys() and all(torch.equal(gradient[k], other[k]) for k in gradient)
    assert loss.abs().max() > 0.01


def test_a_rollout_in_another_micro_batch_and_another_group_is_found_and_an_empty_batch_reads_nothing(tmp_path):
    rollouts, module, objective = random_rollouts(6), model(), OPSDUCLA()
    step(module, rollouts[:4], stored(tmp_path), objective)
    step(module, rollouts[4:], stored(tmp_path), objective)
    chosen = [replace(rollouts[i], group=9) for i in (5, 0, 3)]
    loss, _, gradient = step(module, chosen, frozen(), objective)
    again, _, other = step(module, chosen, stored(tmp_path, never), objective)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(gradient[k], other[k], rtol=1e-4, atol=1e-6) for k in gradient)
    assert len(step(module, [], stored(tmp_path, never), objective)[0]) == 0
    assert len(list(tmp_path.glob("rows-*"))) == 2 and not list(tmp_path.glob(".*"))


def test_other_tokens_are_another_rollout_which_is_scored_or_refused(tmp_path):
    (rollout,), module, objective = random_rollouts(1), model(), OPSDUCLA()
    step(module, [rollout], stored(tmp_path), objective)
    teacher_prompt = rollout.prompts.teacher
    others = {
        "template": replace(rollout, prompts=PromptPair(rollout.prompts.student, [*teacher_prompt, 3], True)),
        "completion": replace(rollout, completion=[*rollout.completion[:-1], rollout.completion[-1] % 40 + 1]),
        "policy tokens": replace(rollout, policy_mask=[False, *rollout.policy_mask[1:]]),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match=r"row 0: .* has no numbers of the teacher for these ids; .*teacher\.add: true"):
            step(module, [other], stored(tmp_path, never, add=False), objective)
        loads = []
        loss, _, _ = step(module, [other], stored(tmp_path, lambda loads=loads: loads.append(1) or model(7)), objective)
        assert loads == [1], name
        assert torch.equal(loss, step(module, [other], frozen(), objective)[0])
    # The student's prompt is not what the teacher reads.
    same = replace(rollout, prompts=PromptPair([*rollout.prompts.student, 4], teacher_prompt, True))
    step(module, [same], stored(tmp_path, never, add=False), objective)


def test_the_numbers_of_another_teacher_are_refused_before_anything_is_loaded(tmp_path):
    stored(tmp_path, dtype="fp32", weights=[{"a": "1"}])
    stored(tmp_path, never, dtype="fp32", weights=[{"a": "1"}])
    with pytest.raises(InputError, match=r"holds the numbers of another teacher: its dtype and its weights differ"):
        stored(tmp_path, never, dtype="bf16", weights=[{"a": "2"}])
    (tmp_path / "about.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"about\.json cannot be read .*; remove the folder"):
        stored(tmp_path, never, dtype="fp32")


def test_two_teachers_of_a_run_cannot_name_one_new_folder(tmp_path):
    parts = [StoredTeacher(str(tmp_path)) for _ in range(2)]
    for n, part in enumerate(parts):
        part.identify({"weights": [{"a": str(n)}]})
    parts[0].attach(lambda: model(7))
    with pytest.raises(InputError, match="holds the numbers of another teacher: its weights differ"):
        parts[1].attach(never)


def test_a_broken_file_of_rows_is_named(tmp_path):
    rollouts, module = random_rollouts(2), model()
    step(module, rollouts, stored(tmp_path), OPSDUCLA())
    (path,) = tmp_path.glob("rows-*")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"rows-.* cannot be read .*; remove the file, and its rows are scored again"):
        stored(tmp_path, never)


def test_the_identity_changes_with_the_weights_the_model_the_adapter_and_the_dtype(tmp_path):
    def identity(value=0.0, dtype="fp32", adapter=None, **model_node):
        save_file({"w": torch.full((300, 300), value)}, tmp_path / "model.safetensors")
        return identity_of({"_component_": "x", **model_node}, {"checkpoint_dir": str(tmp_path)}, dtype, adapter)

    plain = identity()
    assert plain == identity() == json.loads(json.dumps(plain))
    for other in (identity(1e-7), identity(dtype="bf16"), identity(layers=3), identity(adapter=str(tmp_path))):
        assert other != plain
    chosen = identity_of({"_component_": "x"}, {"checkpoint_dir": str(tmp_path), "checkpoint_files": ["b"]}, "fp32")
    assert chosen != identity_of({"_component_": "x"}, {"checkpoint_dir": str(tmp_path)}, "fp32")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # the same weights compute otherwise
    assert identity() != plain
    big = torch.zeros(3_000_000)
    save_file({"w": big}, tmp_path / "model.safetensors")
    before = hash_of_weights(tmp_path)
    save_file({"w": big + 1e-6}, tmp_path / "model.safetensors")
    assert hash_of_weights(tmp_path) != before


def test_one_of_several_teachers_may_be_on_disk(tmp_path):
    rollouts = random_rollouts(4)
    for n, rollout in enumerate(rollouts):
        rollout.example = replace(rollout.example, data={"domain": ("a", "b")[n % 2]})

    def routed(part, load=lambda: model(7)):
        teacher = RoutedTeacher("domain", {"a": part, "b": FrozenTeacher()})
        teacher.attach(lambda teacher, name: load() if name == "a" else model(8))
        return teacher

    module, objective = model(), OPSDUCLA()
    expected, _, gradient = step(module, rollouts, routed(FrozenTeacher()), objective)
    step(module, rollouts, routed(StoredTeacher(str(tmp_path))), objective)
    loss, _, other = step(module, rollouts, routed(StoredTeacher(str(tmp_path), add=False), never), objective)
    assert torch.equal(loss, expected) and all(torch.equal(gradient[k], other[k]) for k in gradient)
