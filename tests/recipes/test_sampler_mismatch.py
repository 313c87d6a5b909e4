"""Test whole runs with a sampler that is not the trained policy: measured, stopped, corrected."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from pidistill.errors import InputError
from pidistill.rollouts import Sample, TorchtuneSampler
from tests.support.runs import metrics, run, small_config

MISMATCH = [f"sampler_mismatch_{name}_nats" for name in ("k3", "mean", "max")]
WEIGHTS = {"importance_weights": {"_component_": "pidistill.scoring.mismatch.TruncatedImportanceWeights", "cap": 2.0}}
OBJECTIVES = "pidistill.objectives"
FROZEN = {"teacher": {"_component_": "pidistill.teachers.FrozenTeacher"}}
METHODS = {  # where each method's samples come from
    "opsd": {},
    "guide_grpo": {"prompts_per_round": 4, "environment___component_": "tests.recipes.test_methods.PickyEnvironment"},
    "pi_distill": {"objective__student_term": "ppo"},
    "pi_distill from a frozen teacher": {"objective__alpha": 0.0, "objective__student_term": "ppo", **FROZEN},
}


def routed_between(**parts: dict) -> dict:
    """A RoutedObjective of GRPO, which trains all rows of the tiny world, and of ``parts``."""
    grpo = {"a": {"_component_": f"{OBJECTIVES}.GRPO"}}
    return {"_component_": f"{OBJECTIVES}.RoutedObjective", "key": "kind", "default": "a", "objectives": grpo | parts}


@dataclass(kw_only=True)
class UnderstatingSampler(TorchtuneSampler):
    """Samples from the model and reports log-probs that are ``gap`` nats too low, as an engine of another policy would."""

    gap: float = 0.0

    def sample(self, *args: Any, **kwargs: Any) -> list[Sample]:
        samples = super().sample(*args, **kwargs)
        for sample in samples:
            sample.logprobs = [x - self.gap for x in sample.logprobs]
        return samples


@dataclass(kw_only=True)
class StaleSampler(TorchtuneSampler):
    """Samples from the weights of its first call for ever."""

    first: Any = field(default=None, init=False)

    def sample(self, model: Any, *args: Any, **kwargs: Any) -> list[Sample]:
        now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.first = self.first or now
        model.load_state_dict(self.first)
        samples = super().sample(model, *args, **kwargs)
        model.load_state_dict(now)
        return samples


def sampler(name: str, **settings: Any) -> dict[str, Any]:
    path = f"tests.recipes.test_sampler_mismatch.{name}"
    return {"sampler": {"_component_": path, "max_new_tokens": 16, **settings}}


def rows_of(method: str, tiny_base, folder, **changes: Any) -> list[dict[str, Any]]:
    config = small_config(method.split(" ")[0], tiny_base, folder, **changes)
    run(method.split(" ")[0], config)
    return [row for row in metrics(folder) if "loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_our_own_sampler_agrees_in_every_round_and_so_do_its_weights(method, tiny_base, tmp_path):
    """Large steps, so that numbers taken under moved weights, or in the other view, would show."""
    rounds = {"updates_per_round": 2, "optimizer__lr": 0.05, **METHODS[method]}
    rows = rows_of(method, tiny_base, tmp_path, **WEIGHTS, **rounds)
    assert len(rows) == 4
    for number, row in enumerate(rows):
        assert (number % 2 == 0) == all(key in row for key in MISMATCH), "measured at a round's first update, and only there"
        assert row.get("sampler_mismatch_max_nats", 0.0) < 1e-4 and row.get("sampler_mismatch_k3_nats", 0.0) >= 0
        assert row["importance_weight_mean"] == pytest.approx(1.0, abs=1e-4)
        assert row["importance_truncated_frac"] == 0
    ratio = "student_ratio_mean" if "student_ratio_mean" in rows[0] else "ratio_mean"
    assert abs(rows[1][ratio] - rows[0][ratio]) > 1e-3, "the weights have not moved, so nothing was tested"
    if method == "guide_grpo":
        assert sum(row["guided_groups"] for row in rows) > 0


@pytest.mark.parametrize("method", ["opsd", "pi_distill"])
def test_a_sampler_of_other_weights_stops_the_run(method, tiny_base, tmp_path):
    with pytest.raises(InputError, match=r"nats per token away .* above max_sampler_mismatch_nats=0.1"):
        rows_of(method, tiny_base, tmp_path, optimizer__lr=0.05, lr_scheduler=None, **sampler("StaleSampler"))
    assert len(metrics(tmp_path)) >= 1, "at the first round the weights are those that sampled"


def test_the_stop_comes_before_the_step_and_the_key_moves_it(tiny_base, tmp_path):
    wrong = sampler("UnderstatingSampler", gap=0.3)
    with pytest.raises(InputError, match="are 0.3 nats per token away"):
        rows_of("rl", tiny_base, tmp_path / "stopped", **wrong)
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
    rows = rows_of("rl", tiny_base, tmp_path / "borne", max_sampler_mismatch_nats=0.5, **wrong)
    assert rows[0]["sampler_mismatch_mean_nats"] == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize(("level", "cap"), [("token", 2.0), ("token", 1.2), ("sequence", 1e6)])
def test_weights_scale_the_gradient_and_the_ratio_is_the_trainers(level, cap, tiny_base, tmp_path):
    """μ = π/1.5 for every token: w = 1.5, or 1.5 to the number of tokens, and ρ = π/π_old = 1 all the same."""
    wrong = sampler("UnderstatingSampler", gap=math.log(1.5)) | {"max_sampler_mismatch_nats": 1, "max_steps": 1}
    right = sampler("UnderstatingSampler", gap=0.0) | {"max_steps": 1}
    weights = {"importance_weights": WEIGHTS["importance_weights"] | {"level": level, "cap": cap}}
    (honest,) = rows_of("rl", tiny_base, tmp_path / "honest", clip_grad_norm=None, **right)
    (weighed,) = rows_of("rl", tiny_base, tmp_path / "weighed", clip_grad_norm=None, **wrong, **weights)
    (ignored,) = rows_of("rl", tiny_base, tmp_path / "ignored", clip_grad_norm=None, **wrong)
    assert weighed["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert ignored["ratio_mean"] == pytest.approx(1.5, abs=1e-3), "the default leaves the ratio at π/μ"
    if level == "token":
        assert weighed["importance_weight_mean"] == pytest.approx(min(1.5, cap), abs=1e-4)
        assert weighed["importance_truncated_frac"] == float(cap < 1.5)
        assert weighed["grad_norm"] == pytest.approx(min(1.5, cap) * honest["grad_norm"], rel=1e-3)
    else:
        assert weighed["importance_weight_mean"] > 5


def test_truncated_sampling_is_measured_and_stays_within_the_limit(tiny_base, tmp_path):
    """With top-k, π/μ of a sampled token is the mass that top-k kept: below 1, and never cut."""
    rows = rows_of("rl", tiny_base, tmp_path, sampler__top_k=5, max_steps=1, **WEIGHTS)
    assert rows[0]["sampler_mismatch_mean_nats"] > 0.1 and rows[0]["sampler_mismatch_rollout_max_nats"] < 1e-4
    assert 0 < rows[0]["importance_weight_mean"] < 1 and rows[0]["importance_truncated_frac"] == 0
    assert rows[0]["importance_weight_mean"] == pytest.approx(math.exp(-rows[0]["sampler_mismatch_mean_nats"]), abs=0.1)


def test_a_sampler_of_other_weights_stops_the_run_under_top_p_too(tiny_base, tmp_path):
    stale = sampler("StaleSampler", top_p=0.95)
    with pytest.raises(InputError, match=r"nats per token away .* beyond what top_p explains"):
        rows_of("rl", tiny_base, tmp_path, optimizer__lr=0.05, lr_scheduler=None, **stale)
    assert len(metrics(tmp_path)) >= 1, "at the first round the weights are those that sampled"


@dataclass(kw_only=True)
class OneBadSampler(TorchtuneSampler):
    """Reports log-probs of the first rollout that are 5 nats too low, and true ones of the others."""

    def sample(self, *args: Any, **kwargs: Any) -> list[Sample]:
        samples = super().sample(*args, **kwargs)
        samples[0].logprobs = [x - 5.0 for x in samples[0].logprobs]
        return samples


def test_one_bad_rollout_gives_an_alarm_with_its_numbers(tiny_base, tmp_path):
    rounds = {"prompts_per_round": 2, "group_size": 6, "max_steps": 1, "max_sampler_mismatch_nats": 1.0}
    (row,) = rows_of("rl", tiny_base, tmp_path, **rounds, **sampler("OneBadSampler"))
    assert row["sampler_mismatch_mean_nats"] < 1.0
    assert "one rollout are 5 nats per token away" in row["alarms"]["bad_rollout"]


def test_a_top_p_below_the_clip_is_refused_without_a_correction(tiny_base, tmp_path):
    with pytest.raises(InputError, match=r"top_p=0.5 is below objective.clip_low=0.8: .* set importance_weights, or raise"):
        rows_of("rl", tiny_base, tmp_path / "refused", sampler__top_p=0.5)
    with pytest.raises(InputError, match=r"top_p=0.5 is below objective.clip_low=0.8: .* update; raise sampler.top_p"):
        rows_of("sdpo", tiny_base, tmp_path / "sdpo", sampler__top_p=0.5)
    replay = {"sampler__top_p": 0.5, "sampler__record_kept": True}
    with pytest.raises(
        InputError, match=r"top_p=0.5 is below objective.clip_low=0.8: where the student agrees with the teacher"
    ):
        rows_of("pi_distill", tiny_base, tmp_path / "replayed", objective__student_term="ppo", **replay)
    (row,) = rows_of("rl", tiny_base, tmp_path / "corrected", sampler__top_p=0.5, max_steps=1, **WEIGHTS)
    assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-4) and row["clip_frac"] == 0
    rows_of("opsd_ucla", tiny_base, tmp_path / "no clip", sampler__top_p=0.5, max_steps=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"updates_per_round": 2}, r"with updates_per_round=2 the later updates .* change it, or set updates_per_round=1"),
        ({"sampler__top_p": 0.9}, r"the whole distribution, and sampler.top_p=0.9 cuts it; change"),
        ({"sampler__top_k": 3, "sampler__record_kept": True}, r"the whole distribution, and sampler.top_k=3 cuts it; change"),
    ],
)
@pytest.mark.parametrize("routed", [False, True])
def test_loss_k2_is_refused_where_samples_are_not_of_the_present_weights_whole_distribution(
    changes, sentence, routed, tiny_base, tmp_path
):
    key, k2 = "objective.kl_mode=loss_k2 needs samples of ", {"_component_": f"{OBJECTIVES}.OPSD", "kl_mode": "loss_k2"}
    if routed:
        key, k2 = key.replace("objective.", "objective.objectives.b."), routed_between(b=k2)
    with pytest.raises(InputError, match=key + ".*" + sentence):
        rows_of("opsd", tiny_base, tmp_path, objective=k2, **changes)


def test_importance_weights_beside_a_part_that_is_sdpo_are_refused(tiny_base, tmp_path):
    sdpo = {"_component_": f"{OBJECTIVES}.SDPO", "top_k": 10, "clip_low": 0.3}
    with pytest.raises(InputError, match=r"objective.objectives.b is SDPO, which .* remove importance_weights, or set another"):
        rows_of("opsd", tiny_base, tmp_path, objective=routed_between(b=sdpo), **WEIGHTS)


def test_importance_weights_say_what_they_cannot_correct(tiny_base, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("pidistill.training.compatibility.log.warning", said.append)
    rows_of("rl", tiny_base, tmp_path / "cut", sampler__top_p=0.9, max_steps=1, **WEIGHTS)
    assert sum("sampler.top_p=0.9 never samples the tokens that it cuts off" in text for text in said) == 1
    said.clear()
    rows_of("rl", tiny_base, tmp_path / "whole", max_steps=1, **WEIGHTS)
    assert not any("never samples" in text for text in said)


def test_groups_of_one_are_refused_where_only_the_reward_teaches_and_said_elsewhere(tiny_base, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("pidistill.training.compatibility.log.warning", said.append)
    with pytest.raises(InputError, match="group_size=1 leaves the advantage of GRPO nothing to compare"):
        rows_of("rl", tiny_base, tmp_path / "rl", group_size=1)
    rows_of("opsd", tiny_base, tmp_path / "opsd", group_size=1, max_steps=1)
    assert sum("group_size=1 leaves the advantage of OPSD" in text for text in said) == 1
    said.clear()
    rows_of("sdft", tiny_base, tmp_path / "sdft", group_size=1, max_steps=1)
    assert not any("group_size=1" in text for text in said)


def test_weights_for_a_method_without_a_policy_gradient_are_refused(tiny_base, tmp_path):
    with pytest.raises(InputError, match="OPSDUCLA as configured has no policy-gradient loss"):
        rows_of("opsd_ucla", tiny_base, tmp_path, **WEIGHTS)
