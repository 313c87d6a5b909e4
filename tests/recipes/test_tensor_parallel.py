"""Test ranks that share a model's matrices: rollouts, numbers and weights are those of one process with whole matrices."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch.distributed import ProcessGroup

from pidistill.data import epoch_order
from pidistill.distributed.tensor_parallel import check_tensor_parallel
from pidistill.errors import InputError
from pidistill.models import HFCheckpointer
from pidistill.rollouts import CollectResult
from pidistill.rollouts import collect as collect_module
from pidistill.testing import TINY_SIZES
from pidistill.training.start import check_run
from recipes.opsd_distributed import KEYS, REQUIRED
from tests.support.episodes import Script, collect, pair
from tests.support.forks import TIMEOUT_S, launch_several
from tests.support.hub_models import MODELS, hub_folder
from tests.support.runs import (
    EMA,
    EVALUATION,
    RECIPES,
    ROWS,
    assert_close_rows,
    assert_same_tensors,
    back_to_checkpoint,
    metrics,
    run,
    sample_config,
    save_config,
    shell,
    small_config,
    training_state,
    tune_command,
    weights,
)
from tests.support.worlds import recorded

# Without Adam, which would hide a wrong length of the gradient; and clipped, which needs the length over all shards.
SGD = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, "clip_grad_norm": 0.05}
MAIN = {
    "max_steps": 4, "prompts_per_round": 3, "updates_per_round": 2, "minibatch_rollouts": 6, "micro_batch_tokens": 200,
    "save_every_steps": 2, "eval_every_steps": 2, "rollout_log_steps": 2, **EVALUATION,
}  # fmt: skip
JUDGE = {"sibling": None, "feedback": {"_component_": "tests.support.worlds.FeedbackOfRank"}}
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "main": ("pi_distill", MAIN),
    # The environment draws from a random stream of its process: two that were asked would answer differently.
    "qwen3": ("opsd", {"max_steps": 2, "teacher": EMA, "environment__noise": 0.5, "packing": "padded", **SGD}),
}
SLOW = {
    "average": ("opsd", {"max_steps": 3, "teacher": EMA, **SGD}),
    "trust_region": ("opsd", {"max_steps": 2, "teacher": {"_component_": "pidistill.teachers.TrustRegionTeacher"}}),
    "remembered": ("opsd", {"max_steps": 2, "objective__kl_mode": "reward_k1", "teacher": {
        "_component_": "pidistill.teachers.FrozenTeacher", "cache_gib": 0.01,
    }}),
    "qwen3, tied": ("opsd", {"max_steps": 2, "packing": "padded", **SGD}),
    "qwen2, tied": ("opsd", {"max_steps": 2, **SGD}),
    "one_group": ("opsd", {"prompts_per_round": 1, "teacher": EMA, "fsdp_reshard_after_forward": False, "max_steps": 3}),
    "checkpointing": ("rl", {"enable_activation_checkpointing": True, "max_steps": 2, **SGD}),
    "embedding": ("rl", {"custom_sharded_layers": ["tok_embeddings"], "max_steps": 2}),
    "foreach": ("rl", {"max_steps": 3, "optimizer__foreach": True}),
    "judge": ("sdpo", {"hindsight": {"_component_": "pidistill.privileged.Hindsight", **JUDGE}, "max_steps": 2}),
    "threads": ("rl", {"prompts_per_round": 3, "max_steps": 2, "environment_threads": 3, "environment__wait_s": 0.01}),
    "poisoned": ("rl", {"max_steps": 3, "objective": {
        "_component_": "tests.support.worlds.PoisonedGRPO", "steps": [1], "report_teacher_kl": True,
    }}),
    "supervised": ("sft", {"max_steps": 3, "eval_every_steps": 2, **EVALUATION, **SGD}),
    "evaluate": ("evaluate", {"dataset__max_rows": 3, "eval_samples": 2}),
    "interventions": ("int_sample", {}),
}  # fmt: skip
UNTRAINED = ("evaluate", "interventions")


def scenario(name: str, base: Path, folder: Path, **more: Any) -> tuple[str, DictConfig]:
    method, changes = (SCENARIOS | SLOW)[name]
    changes = changes | {"environment__record": str(folder / "episodes")} | more
    if name == "interventions":
        return method, sample_config(method, base, folder, **changes)
    cfg = small_config(method, base, folder, **changes)
    if name in MODELS:
        *_, builder, arguments = MODELS[name]
        sizes = TINY_SIZES | {"vocab_size": cfg.model.vocab_size, "max_seq_len": cfg.model.max_seq_len} | arguments
        cfg.model = {"_component_": f"{builder.__module__}.{builder.__name__}", **sizes}
        hub = hub_folder(name, folder.with_name(f"{folder.name} hub"), vocab_size=cfg.model.vocab_size)
        component = f"{HFCheckpointer.__module__}.{HFCheckpointer.__name__}"
        cfg.checkpointer = {"_component_": component, "checkpoint_dir": str(hub), "output_dir": str(folder)}
    return method, cfg


@pytest.fixture(scope="module")
def two(tiny_base, tmp_path_factory) -> Path:
    """What two processes with half of each matrix left; `resumed` is `main` cut in two."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    runs = {name: scenario(name, tiny_base, folder / name, tensor_parallel_dim=2) for name in SCENARIOS}
    for name, more in {"begun": {"max_steps": 2}, "resumed": {"resume_from_checkpoint": True}}.items():
        runs[name] = scenario("main", tiny_base, folder / "resumed", tensor_parallel_dim=2, **more)
    launch_several(folder, runs)
    return folder


@pytest.fixture(scope="module")
def four(tiny_base, one, tmp_path_factory) -> Path:
    """What two groups of two processes left; `resumed` continues `main`, and `taken_over` a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("tensor_and_data_parallel")
    launch_several(folder, {n: scenario(n, tiny_base, folder / n, tensor_parallel_dim=2) for n in ("main", *SLOW)}, 4)
    back_to_checkpoint(folder / "main", folder / "resumed", "step_2")
    back_to_checkpoint(one("main"), folder / "taken_over", "step_2")
    again = {"tensor_parallel_dim": 2, "resume_from_checkpoint": True}
    launch_several(folder, {n: scenario("main", tiny_base, folder / n, **again) for n in ("resumed", "taken_over")}, 4)
    return folder


@pytest.fixture(scope="module")
def one(tiny_base, tmp_path_factory):
    """name → the folder of the same scenario in this one process, packed in the other way."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            other = {"tree": "padded", "padded": "tree"}[(SCENARIOS | SLOW)[name][1].get("packing", "tree")]
            run(*scenario(name, tiny_base, folders[name], **({} if name in UNTRAINED else {"packing": other})))
        return folders[name]

    return folder


def assert_same_training(ours: Path, theirs: Path, rank_files: list[str]) -> None:
    assert recorded(ours / "episodes") == recorded(theirs / "episodes")
    if recorded(theirs / "episodes"):
        assert sorted(path.name for path in (ours / "episodes").iterdir()) == rank_files, "others asked the environment too"
    assert_close_rows(metrics(ours), metrics(theirs))
    initial = Path(OmegaConf.load(theirs / "config.yaml").checkpointer.checkpoint_dir)
    first, second, before = weights(ours), weights(theirs), load_file(initial / "model.safetensors")
    assert first.keys() == second.keys()
    for key in first:
        moved, off = (second[key] - before[key]).abs().max(), (first[key] - second[key]).abs().max()
        assert moved > 0, f"{key} did not train"
        assert off <= 1e-4 * second[key].abs().max() and off <= 0.01 * moved, f"{key} moved by {moved:.1e} and is {off:.1e} off"


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_halves_train_as_one_whole(name, one, two):
    assert_same_training(two / name, one(name), ["0.jsonl"])


def test_two_halves_resume_to_the_bit(two):
    assert_same_run(two / "resumed", two / "main")


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second)
    assert_same_tensors(weights(first), weights(second))
    assert_same_tensors(training_state(first), training_state(second))
    assert (first / "rollouts.jsonl").read_text() == (second / "rollouts.jsonl").read_text()


def test_a_checkpoint_of_two_halves_has_whole_states_and_resumes_on_one_process(one, two, tiny_base, tmp_path):
    shapes = [
        {name: tensor.shape for name, tensor in state.items()}
        for folder in (two / "main", one("main"))
        for state in training_state(folder)["optimizer"]["state"].values()
    ]
    half = len(shapes) // 2
    assert shapes[:half] == shapes[half:] and half > 5
    back_to_checkpoint(two / "main", tmp_path / "run", "step_2")
    run(*scenario("main", tiny_base, tmp_path / "run", resume_from_checkpoint=True))
    assert_close_rows(metrics(tmp_path / "run"), metrics(two / "main"))


# ------------------------------------------------------------------------------------------- with data parallelism


@pytest.mark.slow(reason="two processes that share matrices are in the default run")
@pytest.mark.parametrize("name", ["main", *(name for name in SLOW if name not in UNTRAINED)])
def test_two_groups_of_two_train_as_one_process(name, one, four):
    alone = name == "one_group"  # the second data-parallel rank has no rollout
    assert_same_training(four / name, one(name), ["0.jsonl"] if alone else ["0.jsonl", "2.jsonl"])


@pytest.mark.slow(reason="two processes that share matrices are in the default run")
def test_two_groups_of_two_resume_to_the_bit(four):
    assert_same_run(four / "resumed", four / "main")


@pytest.mark.slow(reason="two processes that share matrices are in the default run")
def test_a_checkpoint_of_one_process_resumes_on_two_groups_of_two(one, four):
    """Padded there, trees here: a largest difference of log-probs, itself all rounding, is left out."""
    ours, theirs = (
        [{key: value for key, value in row.items() if key != "sampler_mismatch_max_nats"} for row in metrics(folder)]
        for folder in (four / "taken_over", one("main"))
    )
    assert_close_rows(ours, theirs)


@pytest.mark.slow(reason="two processes that share matrices are in the default run")
def test_evaluation_and_sampling_of_two_groups_of_two_are_those_of_one(one, four):
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (four / "evaluate", one("evaluate")))
    assert ours.keys() == theirs.keys() == {"student greedy", "student", "student + PI"}
    for view in ours:
        assert ours[view].keys() == theirs[view].keys()
        for key in ours[view]:
            assert ours[view][key] == pytest.approx(theirs[view][key], rel=1e-9), (view, key)
    ours, theirs = ((folder / "traces.jsonl").read_text() for folder in (four / "interventions", one("interventions")))
    assert ours == theirs != ""


@pytest.mark.slow(reason="two processes that share matrices are in the default run")
def test_a_batch_that_is_not_finite_is_written_once_per_group(four):
    assert sorted(path.name for path in (four / "poisoned").glob("nonfinite*")) == [
        "nonfinite_step_2_rank_0.jsonl",
        "nonfinite_step_2_rank_1.jsonl",
    ]


class NeverAsked:
    def reset(self, example):
        raise AssertionError("the environment was asked by a rank that follows")

    step = reset


def test_a_rank_that_follows_samples_along_and_takes_the_result_of_the_first(monkeypatch):
    """With the same arguments as the first one, which the gathering of its parameters and its forwards depend on."""
    ranks, firsts, sampler = Mock(spec=ProcessGroup), CollectResult([], {"reward_error": 7}, 0), Script("x.")
    ranks.rank.return_value = 1
    monkeypatch.setattr(collect_module, "tensor_parallel_group", lambda model: ranks)
    monkeypatch.setattr(collect_module, "from_first", lambda group, *own: firsts if group is ranks and not own else own)
    assert collect(sampler, NeverAsked(), "a") is firsts
    (call,) = sampler.calls
    assert call["seeds"] == [0] and call["prompts"] == [pair("a").student]


@pytest.mark.slow(reason="two processes that share matrices are in the default run")
def test_an_error_of_the_one_that_asks_the_environment_is_said_once_and_ends_both(tiny_base, tmp_path):
    refused = f"tiny_world train row {epoch_order(ROWS, 0, 0, 1)[0]}"
    fail = {"environment__fail": "refuse", "environment__fail_on": [refused], "tensor_parallel_dim": 2}
    config = save_config(small_config("opsd", tiny_base, tmp_path / "run", **fail), tmp_path / "config.yaml")
    arguments = ("--nproc_per_node", "2", f"recipes/{RECIPES['opsd']}.py", "--config", str(config))
    done = shell(tune_command("run", *arguments), timeout_s=TIMEOUT_S)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {refused} is refused by the environment") == 1, done.stderr[-2000:]


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({"tensor_parallel_dim": 3}, 4, "tensor_parallel_dim=3 does not divide the 4 processes of this run into groups of 3"),
        ({"model__num_kv_heads": 1}, 2, "equal share of model.num_kv_heads=1"),
        ({"model__num_heads": 2, "model__num_kv_heads": 2, "tensor_parallel_dim": 4}, 4, "equal share of model.num_heads=2"),
        ({"model__intermediate_dim": 65}, 2, "equal share of model.intermediate_dim=65"),
        ({"teacher_model": {"_component_": "torchtune.models.gemma2.gemma2_2b"}}, 2, "this teacher_model has Gemma2Attention"),
        ({"compile": True}, 2, "compile=True does not work with tensor_parallel_dim=2"),
        ({"enable_activation_offloading": True}, 2, "enable_activation_offloading=True does not work"),
        ({"optimizer__fused": True}, 2, "optimizer.fused=True does not work"),
        ({"optimizer___component_": "torchao.optim.AdamW8bit"}, 2, "optimizer._component_=torchao.optim.AdamW8bit does not"),
        ({"sampler": {"_component_": "pidistill.rollouts.VLLMSampler"}}, 2, "set sampler._component_=pidistill.rollouts.Torch"),
        (
            {"model___component_": "torchtune.models.llama3.lora_llama3", "model__lora_attn_modules": ["q_proj"]}
            | {"model__lora_rank": 4, "model__lora_alpha": 8.0},
            2,
            "model has LoRA adapters, which tensor_parallel_dim=2 does not shard",
        ),
    ],
)
def test_what_does_not_work_is_refused_in_one_sentence(changes, processes, said, tmp_path):
    cfg = small_config("opsd", tmp_path, tmp_path, **({"tensor_parallel_dim": 2} | changes))
    with pytest.raises(InputError, match=said.replace(".", r"\.")) as refusal:
        check_tensor_parallel(cfg, processes)
    assert "\n" not in str(refusal.value)


def test_a_run_says_so_before_anything_is_loaded(tiny_base, tmp_path):
    with pytest.raises(InputError, match="tensor_parallel_dim=2 does not divide the 1 processes of this run"):
        run("opsd", small_config("opsd", tiny_base, tmp_path / "run", tensor_parallel_dim=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", True])
def test_a_dimension_that_is_no_number_of_ranks_is_refused(value, tmp_path):
    with pytest.raises(InputError, match=rf"tensor_parallel_dim={value} must be a whole number of at least 1"):
        check_run(small_config("opsd", tmp_path, tmp_path, tensor_parallel_dim=value), KEYS, REQUIRED)
