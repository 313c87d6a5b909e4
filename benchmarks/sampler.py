"""Tokens per second of our sampler, torchtune's `generate` and transformers' `generate`, on the same weights, in one run.

    python benchmarks/sampler.py                            # 15.7M parameters, V = 8,192: equal and long-tailed lengths
    python benchmarks/sampler.py --vocabulary 151936 --layers 2 --prompts 4    # a large vocabulary
    python benchmarks/sampler.py --ranks 2                  # ours, sharded with FSDP2 against unsharded, as many processes
    python benchmarks/sampler.py --observation 100          # ours, two turns with an observation between them
    python benchmarks/sampler.py --shared 448 --prompt-tokens 512 --group-size 1 --new-tokens 48    # prompts that begin alike
    python benchmarks/sampler.py --device cuda --dtype bf16 --shape qwen3-4b

Prompts are random ids, all of one length, so that no contender has padding to pay for. Sampling is at temperature 1 over the
whole vocabulary. "equal": nothing stops a row, every row has the full length. "long-tailed": the head is nearly flat, and a
share of the vocabulary counts as stop ids, so that every step of every row stops with about the same probability, whoever
samples: lengths are geometric, cut at the limit, with a mean of a third of it. Only tokens up to a row's first stop id count
as useful. Each contender draws its own tokens; the mean lengths are printed.

The floor is 2 FLOPs per parameter that is multiplied, for each prompt token read once per group (with --shared, once for all
prompts) and each useful token (attention not counted), at the rate of a large matmul on this machine.
"""

import argparse
import contextlib
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from measure import by_turns, matmul_flops_per_s, median_ratio, print_table
from torch import nn
from torchtune import training
from torchtune.generation import generate
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules.common_utils import delete_kv_caches, local_kv_cache

from pidistill.rollouts import TorchtuneSampler, decoding

SHAPES = {
    "tiny": {"num_layers": 8, "embed_dim": 384, "num_heads": 6, "num_kv_heads": 2, "intermediate_dim": 1024},
    "qwen3-4b": {"num_layers": 36, "embed_dim": 2560, "num_heads": 20, "num_kv_heads": 4, "intermediate_dim": 9728},
}  # Qwen3-4B has 32 heads of 128; torchtune's qwen2 derives the head size from the width


@dataclass(frozen=True)
class Case:
    """What is sampled: ``stop_ids`` empty for equal lengths."""

    prompts: list[list[int]]
    group_size: int
    new_tokens: int
    stop_ids: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.group_size

    def repeated(self, device: torch.device) -> torch.Tensor:
        """[rows, P] what samplers without groups are given."""
        return torch.tensor(self.prompts, device=device).repeat_interleave(self.group_size, dim=0)


class Counted:
    """A contender that adds up its useful tokens."""

    def __init__(self, run):
        self._run, self.tokens, self.calls = run, 0, 0

    def __call__(self) -> None:
        self.tokens += self._run()
        self.calls += 1


def build(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = SHAPES[arguments.shape] | ({"num_layers": arguments.layers} if arguments.layers else {})
    length = arguments.prompt_tokens + arguments.new_tokens + (arguments.observation or 0) + 8
    with torch.device(arguments.device), training.set_default_dtype(arguments.torch_dtype):
        model = qwen2(vocab_size=arguments.vocabulary, max_seq_len=length, tie_word_embeddings=True, **sizes)
    nn.init.normal_(model.tok_embeddings.weight, std=0.02)  # a nearly flat head
    return model.eval()


def as_transformers(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    """The same weights in transformers' Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = SHAPES[arguments.shape]
    config = Qwen2Config(
        vocab_size=arguments.vocabulary,
        hidden_size=sizes["embed_dim"],
        intermediate_size=sizes["intermediate_dim"],
        num_hidden_layers=len(model.layers),
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        rms_norm_eps=model.norm.eps,
        tie_word_embeddings=True,
        max_position_embeddings=model.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    with torch.device(arguments.device), training.set_default_dtype(arguments.torch_dtype):
        peer = Qwen2ForCausalLM(config)
    dim = sizes["embed_dim"]
    state = qwen2_tune_to_hf(
        model.state_dict(), num_heads=sizes["num_heads"], num_kv_heads=sizes["num_kv_heads"], dim=dim, tie_word_embeddings=True
    )
    peer.load_state_dict(state, strict=False)
    tokens = torch.arange(16, device=arguments.device)[None]
    with torch.no_grad():
        error = (peer.eval()(tokens).logits.float() - model(tokens)).abs().max().item()
    if error > (1e-3 if arguments.torch_dtype is torch.float32 else 0.5):
        raise RuntimeError(f"the two models differ by {error:.2g} in their logits: the peer's configuration is not ours")
    return peer


# ---------------------------------------------------------------------------------------------- contenders


def ours(model: nn.Module, case: Case, observation: int = 0, **settings) -> int:
    turns = dict.fromkeys(range(case.rows), 0)

    def on_turn_end(row: int, turn: list[int]) -> list[int] | None:
        turns[row] += 1
        return [len(case.stop_ids)] * observation if observation and turns[row] == 1 else None

    samples = TorchtuneSampler(max_new_tokens=case.new_tokens + observation, **settings).sample(
        model,
        case.prompts,
        group_size=case.group_size,
        seeds=range(case.rows),
        stop_ids=frozenset(case.stop_ids),
        pad_id=0,
        on_turn_end=on_turn_end,
    )
    return sum(sum(sample.policy_mask) for sample in samples)


def ours_reading_whole(model: nn.Module, case: Case) -> int:
    """Ours, without reading what all prompts begin with only once."""
    with mock.patch.object(decoding, "SAVED_BY_PREFIX", math.inf):
        return ours(model, case)


def torchtune_generate(model: nn.Module, case: Case) -> int:
    tokens = case.repeated(next(model.parameters()).device)
    cache = local_kv_cache(
        model,
        batch_size=case.rows,
        device=tokens.device,
        dtype=next(model.parameters()).dtype,
        decoder_max_seq_len=tokens.shape[1] + case.new_tokens,
    )
    with cache:
        out, _ = generate(
            model, tokens, max_generated_tokens=case.new_tokens, pad_id=-1, stop_tokens=list(case.stop_ids) or None
        )
    delete_kv_caches(model) if model.caches_are_setup() else None
    return useful(out[:, tokens.shape[1] :], case.stop_ids)


def transformers_generate(peer: nn.Module, case: Case) -> int:
    tokens = case.repeated(peer.device)
    with torch.no_grad():
        out = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=case.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            eos_token_id=list(case.stop_ids) or None,
            pad_token_id=0,
        )
    return useful(out[:, tokens.shape[1] :], case.stop_ids)


def useful(completions: torch.Tensor, stop_ids: tuple[int, ...]) -> int:
    """Tokens up to and with each row's first stop id."""
    stops = torch.isin(completions, torch.tensor(stop_ids, device=completions.device, dtype=completions.dtype))
    return int((stops.cumsum(1) - stops.long() == 0).sum())


# ---------------------------------------------------------------------------------------------- what is compared


def make_case(arguments: argparse.Namespace, long_tailed: bool, new_tokens: int | None = None) -> Case:
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.prompts, arguments.prompt_tokens)
    # A geometric length with stop probability p, cut at n, has mean (1 − (1−p)^n) / p: 0.32 n for p = 3 / n.
    n_stops = round(3 * arguments.vocabulary / arguments.new_tokens) if long_tailed else 0
    prompts = torch.randint(n_stops, arguments.vocabulary, shape, generator=generator)
    prompts[:, : arguments.shared] = prompts[0, : arguments.shared]
    return Case(prompts.tolist(), arguments.group_size, new_tokens or arguments.new_tokens, tuple(range(n_stops)))


def floor_s(model: nn.Module, case: Case, tokens: float, rate: float) -> float:
    """Seconds of the matmuls alone: layers for every token, the head where a token is sampled."""
    layers = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2)
    head = model.tok_embeddings.weight.numel()
    repeated = (len(case.prompts) - 1) * decoding.shared_beginning(case.prompts)
    read = sum(map(len, case.prompts)) - repeated + tokens - case.rows
    return 2 * (layers * read + head * tokens) / rate


def compare(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    model = build(arguments)
    peer = as_transformers(model, arguments)
    rate = matmul_flops_per_s(device, arguments.torch_dtype, clock=arguments.clock)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {len(model.layers)} layers, V={arguments.vocabulary}, {arguments.dtype}")
    print(f"{arguments.device}, {torch.get_num_threads()} threads, large matmul at {rate / 1e9:.0f} GFLOP/s")
    for name in arguments.cases:
        case = make_case(arguments, long_tailed=name == "long-tailed")
        contenders = {
            "pidistill": Counted(partial(ours, model, case)),
            "transformers generate": Counted(partial(transformers_generate, peer, case)),
        }
        if arguments.shared:
            contenders["pidistill, each prompt read whole"] = Counted(partial(ours_reading_whole, model, case))
        if not arguments.no_torchtune:
            contenders["torchtune generate"] = Counted(partial(torchtune_generate, model, case))
        # A warm-up turn of each would take longer than what it evens out.
        short = make_case(arguments, long_tailed=False, new_tokens=2)
        ours(model, short), transformers_generate(peer, short)
        seconds = by_turns(contenders, arguments.turns, device, warm_up=False, clock=arguments.clock)
        report(name, case, model, contenders, seconds, rate)


def report(name, case, model, contenders, seconds, rate) -> None:
    per_token = {}
    rows = []
    for contender, counted in contenders.items():
        tokens = counted.tokens / counted.calls
        per_token[contender] = [s / tokens for s in seconds[contender]]
        total = sum(seconds[contender]) / len(seconds[contender])
        floor = floor_s(model, case, tokens, rate)
        ratio = median_ratio(per_token[contender], per_token["pidistill"])
        rows.append((contender, f"{tokens / case.rows:.1f}", f"{tokens / total:,.0f}", f"{ratio:.2f}", f"{floor / total:.0%}"))
    title = f"{name} lengths: {len(case.prompts)} prompts x {case.group_size}, up to {case.new_tokens} new tokens"
    print_table(title, ("sampler", "mean length", "useful tokens/s", "pidistill is faster by", "of the floor"), rows)


def observations(arguments: argparse.Namespace) -> None:
    """What one observation of many tokens costs, against rows that read none: the same rows, sampled tokens counted."""
    model, device = build(arguments), torch.device(arguments.device)
    single = make_case(arguments, long_tailed=True)
    contenders = {"one turn": Counted(partial(ours, model, single))}
    for n in (1, arguments.observation):
        contenders[f"two turns, {n} tokens between them"] = Counted(partial(ours, model, single, n))
    seconds = by_turns(contenders, arguments.turns, device, clock=arguments.clock)
    rows = []
    for name, counted in contenders.items():
        tokens, total = counted.tokens / counted.calls, sum(seconds[name]) / len(seconds[name])
        rows.append((name, f"{tokens:,.0f}", f"{total:.2f}", f"{tokens / total:,.0f}"))
    print_table("two turns", ("case", "sampled tokens", "seconds", "sampled tokens/s"), rows)


# ---------------------------------------------------------------------------------------------- sharded


def sharded(arguments: argparse.Namespace) -> None:
    """Per-process rate with FSDP2 sharding over the rate of as many processes that hold the whole model each."""
    torch.multiprocessing.spawn(_rank, args=(arguments,), nprocs=arguments.ranks)


def _rank(rank: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads or 1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=arguments.ranks)
    model, split = build(arguments), build(arguments)
    conditions = [lambda name, module: training.get_shard_conditions(name, module, names_to_match=[])]
    training.shard_model(split, conditions, cpu_offload=False, reshard_after_forward=True)
    case = make_case(arguments, long_tailed=True)

    def together(model: nn.Module) -> int:  # a rank that has the machine to itself would be faster
        torch.distributed.barrier()
        return ours(model, case)

    contenders = {"unsharded": Counted(partial(together, model)), "FSDP2": Counted(partial(together, split))}
    seconds = by_turns(contenders, arguments.turns, torch.device(arguments.device))  # waits for the other rank count
    if rank == 0:
        rows = []
        for name, counted in contenders.items():
            tokens, total = counted.tokens / counted.calls, sum(seconds[name]) / len(seconds[name])
            ratio = median_ratio(seconds["unsharded"], seconds[name])
            rows.append((name, f"{tokens / total:,.0f}", f"{ratio:.2f}"))
        print_table(f"{arguments.ranks} processes", ("model", "tokens/s of one process", "of the unsharded rate"), rows)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # gloo's thread must end before the interpreter does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with, of their --prompt-tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--cases", nargs="+", choices=("equal", "long-tailed"), default=["equal", "long-tailed"])
    parser.add_argument("--turns", type=int, default=1, help="measured turns of each contender")
    parser.add_argument("--threads", type=int, help="1 also counts the process's own seconds, for a CPU that others use too")
    parser.add_argument("--no-torchtune", action="store_true")
    parser.add_argument("--ranks", type=int, help="compare sharded with unsharded in this many processes instead")
    parser.add_argument("--observation", type=int, help="compare two turns with one instead; tokens between them")
    arguments = parser.parse_args()
    arguments.torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    arguments.clock = time.process_time if arguments.threads == 1 and arguments.device == "cpu" else time.perf_counter
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with contextlib.suppress(KeyboardInterrupt):
        (sharded if arguments.ranks else observations if arguments.observation else compare)(arguments)


if __name__ == "__main__":
    main()
