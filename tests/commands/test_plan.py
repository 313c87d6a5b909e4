"""Test `pidistill plan`: what it prints, its status, and that each change it offers gives the number it says."""

import json
import sys
from pathlib import Path

import pytest
from torchtune import _recipe_registry as recipe_registry

from pidistill.commands import main as _cli
from pidistill.commands.plan.command import main
from pidistill.commands.plan.devices import GIB
from pidistill.commands.plan.lengths import rows_of
from pidistill.commands.plan.reading import read
from pidistill.data import load_prompts
from tests.support.configs import CONFIGS, REAL, load, name_of, ranks_of

# test_configs.py plans the configs of real models.
TRAINING = {name_of(path): ranks_of(path) for path in CONFIGS if path not in REAL and "optimizer" in load(path)}
GIVEN = ("--device", "a100", "--prompt-tokens", "150", "--privileged-tokens", "200", "--completion-tokens", "300")
OPSD = ("qwen2_5/0.5B_opsd", *GIVEN)
TEACHERS = "pidistill.teachers"


def run(capsys, *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out = capsys.readouterr()
    return ended.value.code, out.out + out.err


def numbers(capsys, *words: str) -> dict:
    return json.loads(run(capsys, *words, "--json")[1])


def test_a_folder_that_is_not_there_is_named_with_its_key(capsys, tmp_path):
    folder = f"{tmp_path}/absent"
    for words in (("--device", "h100"), GIVEN):
        status, out = run(capsys, "smollm2/opsd", f"checkpointer.checkpoint_dir={folder}", *words)
        assert status == 2 and out.count("\n") == 1
        assert f"error: model.path {folder} has no config.json" in out and "checkpointer.checkpoint_dir" in out


def test_there_are_training_configs():
    assert len(TRAINING) >= 20


@pytest.mark.parametrize("name", TRAINING)
def test_every_training_config_of_a_small_world_can_be_planned(capsys, name):
    result = numbers(capsys, name, *GIVEN, "--ranks", str(TRAINING[name]))
    assert result["fits"] and result["changes"] == []
    assert set(result["seconds"]) == {"rollout", "teacher", "forward", "head", "backward", "optimizer"}
    assert result["seconds"]["forward"] > 0 and result["seconds"]["backward"] > 0
    assert (result["seconds"]["rollout"] > 0) == ("rollout" in result["memory"])


@pytest.mark.parametrize("name", ["tiny/pi_distill", "tiny/sft"])
def test_lengths_are_those_of_the_rows_that_the_recipe_trains_on(name):
    cfg = read(name, [])
    rows = rows_of(cfg, count=50)
    prompts = [pair for _, pair in load_prompts(cfg, no_pi="rl", samples="batch_size" not in cfg).prompts[:50]]
    assert rows.longest.student == max(len(pair.student) for pair in prompts)
    assert rows.longest.teacher == max(len(pair.teacher) for pair in prompts)
    assert rows.mean.teacher == round(sum(len(pair.teacher) for pair in prompts) / 50)
    assert rows.mean.shared < rows.mean.student or prompts[0].student == prompts[0].teacher
    assert rows.longest.completion == 50 or "batch_size" in cfg


def test_a_run_that_fits_is_printed_with_its_tables(capsys):
    status, text = run(capsys, "tiny/pi_distill", "--device", "a100", "--rows", "20")
    assert status == 0
    assert all(
        word in text for word in ("optimizer states", "keys and values", "the first 20 rows", "the tree feeds", "fits: peak")
    )
    assert "the most it may be" in text


def test_a_run_that_does_not_fit_ends_with_1_and_with_what_would(capsys):
    status, text = run(capsys, *OPSD, "--memory-gib", "8")
    assert status == 1
    assert "does not fit: peak" in text and "dtype=bf16" in text and "model.lora_attn_modules=[q_proj,v_proj]" in text


def test_each_change_gives_the_peak_that_it_promises(capsys):
    memory = ("--memory-gib", "8")
    result = numbers(capsys, *OPSD, *memory)
    assert len(result["changes"]) >= 4
    for offered in result["changes"]:
        words = offered["change"].split()
        changed = numbers(capsys, *OPSD, *memory, *words)
        assert changed["peak_bytes"] == offered["peak_bytes"] < result["peak_bytes"]
        assert changed["fits"] == offered["fits"]
    assert any(offered["fits"] for offered in result["changes"])


def test_where_no_single_change_is_enough_they_are_combined(capsys):
    result = numbers(capsys, *OPSD, "--memory-gib", "4.5")
    assert sum(offered["fits"] for offered in result["changes"]) == 1
    assert len(result["changes"][-1]["change"].split()) > 1 and result["changes"][-1]["fits"]


def test_a_builder_without_sizes_of_its_own_has_adapters_offered_too(capsys):
    result = numbers(capsys, "tiny/opsd", *GIVEN, "--memory-gib", "0.1")
    assert any("lora_llama3 " in offered["change"] for offered in result["changes"])


def test_replicas_are_known_and_one_replica_over_all_machines_is_offered(capsys):
    replicas = (*OPSD, "--ranks", "4", "--memory-gib", "9", "data_parallel_replicate_dim=4")
    planned = numbers(capsys, *replicas)
    promised = {one["change"]: one["peak_bytes"] for one in planned["changes"]}["data_parallel_replicate_dim=1"]
    assert promised == numbers(capsys, *replicas, "data_parallel_replicate_dim=1")["peak_bytes"] < planned["peak_bytes"]
    code, said = run(capsys, *OPSD, "--ranks", "3", "data_parallel_replicate_dim=2")
    assert code == 2 and "does not divide the 3 processes" in said


def test_a_second_copy_of_the_weights_is_seen_and_an_adapter_off_teacher_offered(capsys):
    lora = (
        "model._component_=torchtune.models.qwen2_5.lora_qwen2_5_0_5b",
        "model.lora_attn_modules=[q_proj]",
    )
    frozen = "teacher._component_=pidistill.teachers.FrozenTeacher"
    live, copy = numbers(capsys, *OPSD, *lora), numbers(capsys, *OPSD, *lora, frozen, "--memory-gib", "1")
    assert copy["peak_bytes"] - live["peak_bytes"] == pytest.approx(494e6 * 2, rel=0.02)  # in bf16
    assert any("AdapterOffTeacher" in offered["change"] for offered in copy["changes"])


def test_each_of_several_teachers_is_counted_with_its_own_weights(capsys):
    copy = numbers(capsys, *OPSD, "teacher._component_=pidistill.teachers.FrozenTeacher")
    routed = ("teacher._component_=pidistill.teachers.RoutedTeacher", "teacher.key=domain")
    kinds = {"math": "FrozenTeacher", "code": "LiveTeacher", "chat": "EMATeacher"}
    named = [f"teacher.teachers.{name}._component_=pidistill.teachers.{kind}" for name, kind in kinds.items()]
    two = numbers(capsys, *OPSD, *routed, *named[:2])
    assert two["peak_bytes"] == pytest.approx(copy["peak_bytes"], rel=1e-6)
    assert two["seconds"]["teacher"] == pytest.approx(copy["seconds"]["teacher"], rel=0.01)  # each reads its half of the rows
    larger = numbers(capsys, *OPSD, *routed, *named[:2], "teacher_models.math._component_=torchtune.models.qwen2_5.qwen2_5_3b")
    assert larger["peak_bytes"] - two["peak_bytes"] > (3.08e9 - 494e6) * 2 * 0.98  # in bf16
    assert larger["seconds"]["teacher"] > 2 * two["seconds"]["teacher"]
    three = numbers(capsys, *OPSD, *routed, *named)
    assert three["peak_bytes"] - two["peak_bytes"] == pytest.approx(494e6 * (2 + 2), rel=0.02)  # the average is in fp32


def test_a_teacher_on_a_server_has_no_weights_and_no_forward_here(capsys):
    served = ("teacher._component_=pidistill.scoring.served_teacher.ServedTeacher", "teacher.model=big")
    here = numbers(capsys, *OPSD, "teacher._component_=pidistill.teachers.FrozenTeacher")
    there = numbers(capsys, *OPSD, *served, "teacher.base_url=http://localhost:1/v1")
    assert here["seconds"]["teacher"] > 0.0 == there["seconds"]["teacher"]
    assert here["peak_bytes"] - there["peak_bytes"] >= 494e6 * 2 * 0.98


def test_a_model_whose_positions_are_scaled_has_their_table_counted(capsys):
    """Llama 3's table exists on real devices only: 131,072 positions of 32 pairs in fp32."""
    llama = numbers(capsys, "llama3_2/1B_opsd", *GIVEN)
    weights = 1_235_814_400 * 4
    assert llama["memory"]["update"]["weights"] == weights + 131_072 * 64 * 4


def test_8_bits_halve_twice_what_adam_keeps_and_4_bits_what_is_frozen(capsys):
    full, small, none = (
        numbers(capsys, *OPSD, *words)["memory"]["optimizer"]["optimizer states"]
        for words in (
            (),
            ("optimizer._component_=torchao.optim.AdamW8bit",),
            ("optimizer._component_=pidistill.training.optimizers.cpu_offload",),
        )
    )
    assert small == pytest.approx(full / 4, rel=0.05) and none == 0
    lora = ("model._component_=torchtune.models.qwen2_5.lora_qwen2_5_0_5b", "model.apply_lora_to_mlp=True")
    lora += ("model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",)
    whole, quantized = (numbers(capsys, *OPSD, *lora, f"model.quantize_base={on}") for on in (False, True))
    saved = whole["memory"]["optimizer"]["weights"] - quantized["memory"]["optimizer"]["weights"]
    # Of 24 layers' matrices, 358M elements, each 16 bits become 4 bits, and a byte for 64 of them.
    assert saved == pytest.approx(357.9e6 * (2 - 0.5 - 1 / 64), rel=0.01)
    assert quantized["memory"]["update"]["4-bit weight made whole"] == 4864 * 896 * 14
    assert whole["memory"]["update"]["4-bit weight made whole"] == 0


def test_overrides_are_those_of_a_run(capsys):
    base = numbers(capsys, *OPSD)
    cheaper = numbers(capsys, *OPSD, "micro_batch_tokens=1024", "optimizer=torch.optim.SGD", "~optimizer.betas")
    assert cheaper["memory"]["update"]["activations"] < base["memory"]["update"]["activations"]
    assert base["memory"]["optimizer"]["optimizer states"] > 0 == cheaper["memory"]["optimizer"]["optimizer states"]
    assert numbers(capsys, *OPSD, "eval_dataset=null")["peak_bytes"] == base["peak_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny/evaluate",), "trains nothing"),
        (("tiny/opsd", "micro_batch_token=5"), "did you mean micro_batch_tokens?"),
        (("tiny/opsd", "packing=trees"), "packing=trees is unknown; choose tree or padded"),
        (("tiny/nothing",), "error: config tiny/nothing is neither a file nor a bundled config"),
        (("tiny/opsd", "group_size=0"), "group_size=0"),
        (("tiny/opsd", "group_size=1=2"), "key=value"),
        (("tiny/opsd", "dtype=int3"), "dtype=int3"),
        (("tiny/opsd", "--ranks", "0"), "--ranks 0"),
        (("tiny/opsd", "tensor_parallel_dim=2"), "plan with tensor_parallel_dim=1"),
        (("qwen2_5/0.5B_opsd", "--device", "h100"), "give --prompt-tokens"),
        (("qwen2_5/0.5B_sft", "--device", "h100", "--prompt-tokens", "9"), "--completion-tokens"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, words, said):
    status, text = run(capsys, *words)
    assert status == 2 and said in text
    assert text.startswith("error: ") and text.count("\n") == 1


def test_a_device_that_is_not_here_has_to_be_named(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, text = run(capsys, "qwen2_5/0.5B_opsd", "--prompt-tokens", "9")
    assert status == 2 and "--device h100" in text


def test_this_machine_is_measured_and_its_ranks_share_its_memory(capsys):
    one, two = (numbers(capsys, "tiny/opsd", "--prompt-tokens", "9", "--ranks", ranks)["device"] for ranks in "12")
    assert one["kind"] == "cpu" and one["flops_per_s"] > 1e8 and one["bytes_per_s"] > 1e8 and 1e-6 < one["layer_s"] < 1
    assert one["memory_bytes"] == 2 * two["memory_bytes"] > GIB


def test_the_command_is_reached_from_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(recipe_registry, "_ALL_RECIPES", [])
    monkeypatch.setattr(sys, "argv", ["pidistill", "plan", str(Path("configs/tiny/opsd.yaml").resolve()), *GIVEN])
    with pytest.raises(SystemExit) as ended:
        _cli.main()
    assert ended.value.code == 0 and "Share of a round's time" in capsys.readouterr().out


def test_one_process_that_offloads_keeps_what_it_does_not_train_on_the_device(capsys):
    words = ("fsdp_cpu_offload=true", f"teacher._component_={TEACHERS}.FrozenTeacher", *GIVEN)
    memory = numbers(capsys, "qwen3/8B_opsd_lora", "fsdp_cpu_offload=true", *GIVEN)["memory"]["update"]
    assert 15 * GIB < memory["weights"] < 16 * GIB  # the frozen base in bf16, without its adapters
    memory = numbers(capsys, "qwen3/8B_opsd", *words)["memory"]["update"]
    assert memory["weights"] < 0.1 * GIB < 15 * GIB < memory["teacher weights"] < 16 * GIB


@pytest.mark.parametrize(("dtype", "bytes_of_both"), [("fp32", 4), ("bf16", 6)])
def test_a_moving_average_in_fp32_is_the_teachers_weights_themselves(capsys, dtype, bytes_of_both):
    words = ("qwen2_5/0.5B_opsd", f"dtype={dtype}", "compute_dtype=null", f"teacher._component_={TEACHERS}.EMATeacher")
    memory = numbers(capsys, *words, *GIVEN)["memory"]["update"]
    both = memory["teacher weights"] + memory["moving average"]
    itemsize = {"fp32": 4, "bf16": 2}[dtype]
    assert both == pytest.approx(memory["teacher weights"] / itemsize * bytes_of_both)
