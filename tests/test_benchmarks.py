"""Test that each benchmark runs at a small size and prints its table, and that its help names the documented options."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
SHARED = ("measure", "small_qwen")
BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED)
SMALL = {  # name → (options, what its table says)
    "update_phase.py": (
        "--question 6 --privileged 5 --completion 4 --group 2 --vocabulary 8192 --turns 1 --no-memory",
        "speed-up",
    ),
    "scorer.py": (
        "--tokens 16 --hidden 16 --vocabulary 512 --turns 1 --no-memory --contenders pidistill --work jsd_student jsd_both",
        "time ÷ ours",
    ),
    "sampler.py": (
        "--layers 1 --vocabulary 512 --prompts 2 --group-size 2 --prompt-tokens 8 --new-tokens 8 --cases equal --no-torchtune",
        "equal",
    ),
    "real_step.py": (
        "--methods sdft --prompts 1 --group 2 --new-tokens 4 --layers 1 --vocabulary 512 --device cpu",
        "speed-up",
    ),
}


def run_script(name: str, arguments: str, monkeypatch) -> None:
    if dist.is_initialized():  # a benchmark of another test in this process
        dist.destroy_process_group()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow(reason="the default run checks its options, and trains in both precisions"))
        if n == "real_step.py"
        else n
        for n in SMALL
    ],
)
def test_a_small_run_prints_its_table(name, monkeypatch, capsys):
    arguments, said = SMALL[name]
    run_script(name, arguments, monkeypatch)
    assert said in capsys.readouterr().out


def test_our_half_of_the_sdft_step_trains_on_the_tokens_it_counts(monkeypatch):
    """TRL's half needs TRL."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sizes = "--question 6 --privileged 5 --new-tokens 4 --prompts 2 --group 2 --vocabulary 64 --lengths equal"
    monkeypatch.setattr(sys, "argv", ["opsd_step.py", *sizes.split()])
    module = importlib.import_module("opsd_step")
    arguments = module.parse()
    with module.files(arguments) as folder:
        ours = module.Ours(folder, arguments)
        prompts, step = ours.prompts(), ours.step()
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(prompts) == len(rows) == 2 and all(len(teacher) > len(student) for student, teacher in prompts)
    assert step.tokens == 2 * 2 * 4, "every row runs to the limit"
    assert step.seconds > 0 and set(step.phases) == set(module.PHASES)


def test_weights_move_alike_in_fp32_and_mixed_precision_and_hardly_in_bf16(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("real_step")
    module.write_random_weights(tmp_path, module.model_node("qwen2.5-0.5b", 1, 512), "qwen2")
    run_script("displacement.py", f"{tmp_path} --steps 3 --tokens 4 --device cpu", monkeypatch)
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if row and row[0] in ("fp32", "mixed", "bf16")}
    assert found["fp32"][:2] == ["1.0000", "1.0000"]
    assert float(found["mixed"][0]) > 0.99 and abs(float(found["mixed"][1]) - 1) < 0.02
    assert float(found["bf16"][2].rstrip("%")) > 50 > float(found["mixed"][2].rstrip("%"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_that_the_documents_give_exists(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(name, "--help", monkeypatch)
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "README.md")]
    commands = [line for text in texts for line in text.splitlines() if re.search(rf"python benchmarks/{name}", line)]
    assert commands, f"no document shows how to run {name}"
    for command in commands:
        used = re.findall(r"--[a-z][\w-]*", command.partition(name)[2].partition("  #")[0])
        assert set(used) <= known, command


def test_both_backends_of_a_small_folder_print_their_tables(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    from tests.support.hf_families import reference_model

    reference_model("qwen3", vocab_size=10_000).save_pretrained(tmp_path)
    run_script("backends.py", f"{tmp_path} --prompt 9 --privileged 5 --completion 4 --turns 1", monkeypatch)
    printed = capsys.readouterr().out
    assert "ratio" in printed and "transformers" in printed


def test_a_point_of_the_growth_of_costs_has_its_seconds_per_token_and_its_memory(monkeypatch, capsys):
    run_script("cost_growth.py", "--point 1:2:512 --turns 1", monkeypatch)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ms_per_token"] > 0 and 0 <= found["gib"] < 4
