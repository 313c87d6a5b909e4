"""Test recipes that sample with vLLM, from the command line: `make test-vllm`."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from pidistill.rollouts import VLLMSampler
from tests.recipes.conftest import make_base
from tests.support.lora import LORA
from tests.support.runs import EVALUATION, MODEL, metrics, save_config, shell, small_config, tune_command

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm` runs these"),
]

WIDE = MODEL | {"model.embed_dim": 128}  # heads of 32: vLLM's attention on CPU has no smaller ones
SAMPLER = {"_component_": "pidistill.rollouts.VLLMSampler", "kv_cache_gib": 0.05, "enforce_eager": True, "max_new_tokens": 16}
LARGE_STEPS = {"optimizer__lr": 0.02, "lr_scheduler": None, "max_steps": 3}
FROZEN = {"_component_": "pidistill.teachers.FrozenTeacher"}


class NeverUpdated(VLLMSampler):
    """Hands the engine the weights of its first call only."""

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        samples = super().sample(*args, **kwargs)
        self._engine.load = lambda weights: None
        return samples


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("wide_base"), WIDE)


def config(method: str, base: Path, folder: Path, sampler: str = SAMPLER["_component_"], **changes: Any) -> DictConfig:
    sampler = SAMPLER | {"model_dir": "${checkpointer.checkpoint_dir}", "_component_": sampler}
    wide = {key.replace(".", "__"): value for key, value in WIDE.items()}
    return small_config(method, base, folder / "run", sampler=sampler, **(wide | LARGE_STEPS | changes))


def tune(recipe: str, cfg: DictConfig, folder: Path, processes: int = 1):
    path = save_config(cfg, folder / "config.yaml")
    command = tune_command("run", "--nproc_per_node", str(processes), f"recipes/{recipe}.py", "--config", str(path))
    return shell(command, timeout_s=300)


RUNS = {
    "opsd": ("opsd", "opsd_distributed", 1, EVALUATION | {"eval_every_steps": 1}),
    "pi_distill": ("pi_distill", "pi_distill_distributed", 1, {}),
    "lora": ("opsd", "opsd_distributed", 1, LORA | {"optimizer__lr": 0.05}),
    "frozen teacher samples": ("pi_distill", "pi_distill_distributed", 1, {"objective__alpha": 0.0, "teacher": FROZEN}),
    "two ranks": ("opsd", "opsd_distributed", 2, {"environment_threads": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_has_the_trainers_weights_in_every_round(name, wide_base, tmp_path):
    method, recipe, processes, changes = RUNS[name]
    done = tune(recipe, config(method, wide_base, tmp_path, **changes), tmp_path, processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampler_mismatch_max_nats"] < 1e-3 for row in rows), rows
    assert all(row["grad_norm"] > 0 for row in rows), "the weights have not moved"
    if "eval_dataset" in changes:
        evaluations = [row for row in metrics(tmp_path / "run") if "eval_student_success_greedy" in row]
        assert len(evaluations) == 4 and all(math.isfinite(row["eval_student_success"]) for row in evaluations)


def test_rounds_that_are_sampled_ahead_have_the_weights_that_were_handed_over(wide_base, tmp_path):
    """Only the first step moves the weights: round 1 is sampled before it, round 2 with what trains on it."""
    one_step = {"_component_": "torchtune.training.get_cosine_schedule_with_warmup", "num_warmup_steps": 0}
    one_step["num_training_steps"] = 1
    cfg = config("pi_distill", wide_base, tmp_path, rollout_lag=1, lr_scheduler=one_step)
    done = tune("pi_distill_distributed", cfg, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert rows[0]["sampler_mismatch_max_nats"] < 1e-3
    assert rows[1]["rollout_lag_max_nats"] > 0.01
    assert rows[2]["rollout_lag_max_nats"] < 1e-3


def test_with_the_kept_sets_recorded_the_ratio_is_1_at_the_first_update_under_top_p_and_top_k(wide_base, tmp_path):
    """Without the record the ratio is the mass that was kept, and the mask is refused."""
    changes = {"sampler__top_p": 0.8, "sampler__top_k": 20, "sampler__record_kept": True, "max_sampler_mismatch_nats": 1e-4}
    changes |= {"optimizer__lr": 1e-3}  # with large steps one id is soon all that is left of a distribution
    mask = {"_component_": "pidistill.scoring.mismatch.MismatchMask", "low": 0.999, "high": 1.001}
    done = tune("opsd_distributed", config("opsd", wide_base, tmp_path, mismatch_mask=mask, **changes), tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sampler_mismatch_max_nats"] < 1e-4 and row["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert row["masked_tokens"] == 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("method", ["opsd", "pi_distill"])
def test_without_the_weight_update_the_run_stops_on_the_limit(method, wide_base, tmp_path):
    cfg = config(method, wide_base, tmp_path, "tests.recipes.test_vllm_runs.NeverUpdated")
    done = tune(f"{method}_distributed", cfg, tmp_path)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "nats per token away from the trainer's" in said and "above max_sampler_mismatch_nats=0.1" in said
    rows = metrics(tmp_path / "run")
    assert rows and rows[0]["sampler_mismatch_max_nats"] < 1e-3, "the first round's weights are those that sampled"


def test_the_evaluation_samples_with_it_too(wide_base, tmp_path):
    cfg = small_config("evaluate", wide_base, tmp_path / "run", **{key.replace(".", "__"): v for key, v in WIDE.items()})
    OmegaConf.update(cfg, "sampler", SAMPLER | {"model_dir": "${checkpointer.checkpoint_dir}"}, merge=False)
    OmegaConf.update(cfg, "dataset.max_rows", 3, force_add=True)
    done = tune("evaluate_distributed", cfg, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "run" / "results.json").is_file()
