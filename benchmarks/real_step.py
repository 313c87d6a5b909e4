"""A whole training step of a real model in fp32 and in mixed precision: seconds by phase, tokens per second, peak memory.

    python benchmarks/real_step.py                                    # random weights of that shape
    python benchmarks/real_step.py --weights /tmp/Qwen2.5-0.5B-Instruct
    python benchmarks/real_step.py --own-seconds --methods opsd --prompts 2 --group 2 --new-tokens 32
    python benchmarks/real_step.py --model qwen3-4b --precisions mixed --prompts 8 --new-tokens 512     # on a GPU

The recipes themselves run `configs/qwen2_5/0.5B_<method>.yaml` with smaller rounds, each precision in a process of its own.
The precisions take turns, and speed-ups are medians over turns of tokens per second, since texts differ in length. The second
of two steps counts. The *floor* of a step is the multiplications that the first step made, per sampled token, at the rate of a
large matmul in the dtype that the run multiplies in, measured in the same process. *MFU* is the update's multiplications, what
activation checkpointing repeats included, at the published peak of the GPU in dense bf16.
"""

import argparse
import importlib
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import GIB, in_own_process, matmul_flops_per_s, print_table
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from torchtune import training

import pidistill.distributed.run as timing
from pidistill.components import resolve
from pidistill.models.hf_format import to_hf
from pidistill.tokenizers.byte import byte_tokenizer_folder

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"pi_distill": "pi_distill", "opsd": "opsd", "sdft": "opsd"}
PRECISIONS = {"fp32": {"dtype": "fp32", "compute_dtype": None}, "mixed": {"dtype": "fp32", "compute_dtype": "bf16"}}
NAMES = ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim")
COMMON = {"max_seq_len": 2048, "rope_base": 1e6, "norm_eps": 1e-6, "tie_word_embeddings": True}
BUILDERS = {"qwen2": "torchtune.models.qwen2.qwen2", "qwen3": "pidistill.models.qwen3"}
MODELS = {  # name: (family, sizes)
    "qwen2.5-0.5b": ("qwen2", dict(zip(NAMES, (24, 14, 2, 896, 4864), strict=True))),
    "qwen3-1.7b": ("qwen3", dict(zip(NAMES, (28, 16, 8, 2048, 6144), strict=True)) | {"head_dim": 128}),
    "qwen3-4b": ("qwen3", dict(zip(NAMES, (36, 32, 8, 2560, 9728), strict=True)) | {"head_dim": 128}),
}
# Published FLOP/s of dense bf16 products, by a word of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def model_node(name: str, layers: int | None, vocabulary: int) -> dict[str, Any]:
    """Return the component that builds a model of this shape, with fewer layers if so many are asked for."""
    family, sizes = MODELS[name]
    changed = {"num_layers": layers} if layers else {}
    return {"_component_": BUILDERS[family], "vocab_size": vocabulary} | sizes | COMMON | changed


def write_random_weights(folder: Path, node: dict[str, Any], family: str) -> None:
    """Write a checkpoint of a model's shape whose tokenizer reads bytes."""
    torch.manual_seed(0)
    names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "embed_dim": "hidden_size"}
    names |= {"intermediate_dim": "intermediate_size", "max_seq_len": "max_position_embeddings", "rope_base": "rope_theta"}
    names |= {"num_layers": "num_hidden_layers", "norm_eps": "rms_norm_eps"}
    config = {names.get(key, key): value for key, value in node.items() if key != "_component_"}
    config |= {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    with training.set_default_dtype(torch.bfloat16):
        model = resolve(node["_component_"])(**{key: value for key, value in node.items() if key != "_component_"})
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    byte_tokenizer_folder(folder)
    weights = {name: tensor.contiguous() for name, tensor in to_hf(model.state_dict(), config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def write_questions(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            a, b, c = (draw.randrange(2, 90) for _ in range(3))
            question = f"A shop sells {a} red and {b} blue pens a day, for {c} days. How many pens does it sell in all?"
            steps = f"Each day it sells {a} + {b} = {a + b} pens. In {c} days that is {a + b} * {c} = {(a + b) * c} pens."
            file.write(json.dumps({"question": question, "answer": f"{steps}\n#### {(a + b) * c}"}) + "\n")


def config_of(arguments: argparse.Namespace, method: str, precision: str, folder: Path) -> DictConfig:
    cfg = OmegaConf.load(ROOT / "configs" / "qwen2_5" / f"0.5B_{method}.yaml")
    write_questions(folder / "questions.jsonl", 64)
    group = 1 if method == "sdft" else arguments.group
    changes: dict[str, Any] = PRECISIONS[precision] | {
        "output_dir": str(folder / "run"),
        "device": arguments.device,
        "threads": arguments.threads,
        "max_steps": 2,
        "checkpointer.checkpoint_dir": arguments.weights,
        "dataset.source": str(folder / "questions.jsonl"),
        "dataset.split": "train",
        "eval_dataset": None,
        "rollout_log_steps": 0,
        "sampler.max_new_tokens": arguments.new_tokens,
        "prompts_per_round": arguments.prompts * arguments.group // group,
        "group_size": group,
        "updates_per_round": 1,
        "minibatch_rollouts": None,
        "max_sampler_mismatch_nats": None,
        "enable_activation_checkpointing": arguments.checkpointing,
    }
    cfg.model = model_node(arguments.model, arguments.layers, arguments.vocabulary)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def run_case(arguments: argparse.Namespace, method: str, precision: str) -> dict[str, float]:
    """Run two steps of the recipe and return the numbers of the second."""
    if arguments.own_seconds:
        timing.time = SimpleNamespace(perf_counter=time.process_time)
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"recipes.{RECIPES[method]}_distributed")
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(arguments, method, precision, Path(folder))
        recipe = getattr(module, "PiDistillRecipe" if method == "pi_distill" else "OPSDRecipe")(cfg)
        recipe.setup(cfg)
        recipe.save_checkpoint = recipe.evaluate = lambda: None
        fed, flops = count_fed_tokens(recipe), count_flops_of_first_step(recipe)
        recipe.train()
        first, second = (json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        recipe.cleanup()
    device = torch.device(arguments.device)
    clock = time.process_time if arguments.own_seconds else time.perf_counter
    rates = {d: matmul_flops_per_s(device, getattr(torch, d), clock=clock) for d in ("float32", "bfloat16")}
    seconds = sum(value for key, value in second.items() if key.startswith("time_") and key.endswith("_s"))
    used = rates["float32" if precision == "fp32" else "bfloat16"]
    cuda = device.type == "cuda"
    return {
        "rollout_s": second["time_rollout_s"],
        "update_s": second["time_score_s"] + second["time_update_s"],
        "seconds": seconds,
        "sampled": second["sampled_tokens"],
        "fed": fed[-1],
        "floor": sum(flops) / first["sampled_tokens"] * second["sampled_tokens"] / used / seconds,
        "update_flops_per_s": flops[1] / fed[0] * fed[-1] / max(second["time_score_s"] + second["time_update_s"], 1e-9),
        "gib": (torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / GIB,
        "fp32_rate": rates["float32"],
        "bf16_rate": rates["bfloat16"],
        "mismatch": second.get("sampler_mismatch_mean_nats", 0.0),
    }


def count_fed_tokens(recipe: Any) -> list[int]:
    """Return a list that gets, per step, the tokens which the trained model is fed in it."""
    make, update, fed = recipe._packer.batch, recipe.update, []

    def batch(chunk: Any) -> Any:
        made = make(chunk)
        fed[-1:] = [fed[-1] + made.views.of("student", "teacher").tokens.numel()] if fed else []
        return made

    def counted(*arguments: Any) -> None:
        fed.append(0)
        update(*arguments)

    recipe._packer.batch, recipe.update = batch, counted
    return fed


def count_flops_of_first_step(recipe: Any) -> list[int]:
    """Return a list that gets the multiplications and additions of the first round, then those of its update."""
    sample, update, counter, flops = recipe.sample_round, recipe.update, FlopCounterMode(display=False), []

    def first_sample() -> Any:
        if flops:
            return sample()
        with counter:
            return sample()

    def first_update(*arguments: Any) -> None:
        if flops:
            return update(*arguments)
        sampled = counter.get_total_flops()
        with counter:
            update(*arguments)
        flops.extend([sampled, counter.get_total_flops()])

    recipe.sample_round, recipe.update = first_sample, first_update
    return flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b")
    parser.add_argument("--weights", default=None, help="a folder of that model; without it, random weights of its shape")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=None, help="default: the model's own")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--checkpointing", action="store_true", help="enable_activation_checkpointing, as the configs have it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--own-seconds", action="store_true", help="one thread's CPU seconds, for a machine that others use")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own_seconds:
        arguments.threads = 1
    if arguments.case:
        print(json.dumps(run_case(arguments, *arguments.case.split(":"))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.weights is None:
            arguments.weights = folder
            node = model_node(arguments.model, arguments.layers, arguments.vocabulary)
            write_random_weights(Path(folder), node, MODELS[arguments.model][0])
        rows, rates, peak = [], [], peak_flops_per_s(arguments.device)
        for method in arguments.methods:
            cases = [(turn, precision) for turn in range(arguments.turns) for precision in arguments.precisions]
            found = {case: in_own_process(__file__, [*options(arguments), f"--case={method}:{case[1]}"]) for case in cases}
            rates += [(one["fp32_rate"], one["bf16_rate"]) for one in found.values()]
            rows += [row_of(method, precision, found, peak) for precision in arguments.precisions]
    fp32, bf16 = (statistics.median(column) / 1e9 for column in zip(*rates, strict=True))
    columns = ("method", "precision", "step s", "rollout s", "update s", "sampled/s", "fed/s", "of floor", "MFU", "GiB",
               "|Δ| nats", "speed-up: step", "rollout", "update")  # fmt: skip
    sizes = f"{arguments.prompts} × {arguments.group} completions of at most {arguments.new_tokens} tokens"
    print_table(f"{sizes}; matmul: fp32 {fp32:.0f}, bf16 {bf16:.0f} GFLOP/s", columns, rows)


def options(arguments: argparse.Namespace) -> list[str]:
    """Return the same sizes for a process of its own."""
    names = ("model", "weights", "prompts", "group", "new_tokens", "layers", "vocabulary", "device", "threads")
    given = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names if getattr(arguments, name) is not None]
    return given + ["--own-seconds"] * arguments.own_seconds + ["--checkpointing"] * arguments.checkpointing


def peak_flops_per_s(device: str) -> float | None:
    """Return the published peak of a GPU; None for another one, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((peak for word, peak in PEAKS.items() if word in name), None)


def row_of(method: str, precision: str, found: dict[tuple[int, str], dict[str, float]], peak: float | None) -> list[str]:
    """Return the table's row; speed-ups are against fp32, where it was measured too."""
    turns = sorted({turn for turn, _ in found})

    def median(key: str) -> float:
        return statistics.median(found[turn, precision][key] for turn in turns)

    def rate(one: dict[str, float], tokens: str, seconds: str) -> float:
        return one[tokens] / max(one[seconds], 1e-9)

    measured = (("sampled", "seconds"), ("sampled", "rollout_s"), ("fed", "update_s"))
    base = "fp32" if (turns[0], "fp32") in found else precision
    of_turns = [[found[turn, precision] for turn in turns], [found[turn, base] for turn in turns]]
    speed_ups = [
        statistics.median(rate(ours, *kind) / rate(theirs, *kind) for ours, theirs in zip(*of_turns, strict=True))
        for kind in measured
    ]
    rates = [statistics.median(rate(one, *kind) for one in of_turns[0]) for kind in measured]
    return [
        method, precision, *(f"{median(key):.1f}" for key in ("seconds", "rollout_s", "update_s")),
        f"{rates[1]:.1f}", f"{rates[2]:.1f}", f"{median('floor'):.0%}",
        f"{median('update_flops_per_s') / peak:.0%}" if peak else "–", f"{median('gib'):.2f}", f"{median('mismatch'):.4f}",
        *(f"{speed_up:.2f}×" for speed_up in speed_ups),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
