"""One folder with torchtune's modules and with transformers': how far their logits are from transformers', and their speed.

    python benchmarks/backends.py /tmp/models/SmolLM2-135M-Instruct

Logits are of two rows of random ids, in fp32. Work: a group of four completions with a prompt for each view, scored as a packed
tree, forward and backward, with a divergence each way; and sampling. Contenders take turns in one process, and time
is this process's own on one thread. Both hold the same tensors where their layouts are the same, and transformers' own model is
gone before the work: 0.5B parameters in fp32 need 6.5 GiB, 1 of it the mapped file.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from measure import by_turns, median_ratio, print_table

from pidistill.models import HFCheckpointer, to_hf
from pidistill.models.empty import empty_model
from pidistill.models.hf_folder import read_json
from pidistill.rollouts import TorchtuneSampler
from pidistill.scoring.batch import make_batch
from pidistill.scoring.score import score
from pidistill.types import Divergence, Example, PromptPair, Rollout, ScoreRequest

BACKENDS = ("torchtune", "transformers")
DIVERGENCES = (Divergence("kl_teacher_student", "teacher"), Divergence("kl_student_teacher", "student"))
REQUEST = ScoreRequest(student_grad=True, teacher_grad=True, divergences=DIVERGENCES)


def load(folder: str) -> dict[str, Any]:
    """Return the folder's model with the modules of each backend, in fp32."""
    weights = {name: w.float() for name, w in HFCheckpointer(folder, "/tmp/backends").load_checkpoint()["model"].items()}
    named = {"torchtune": weights, "transformers": to_hf(weights, read_json(Path(folder) / "config.json"))}
    models = {}
    for backend in BACKENDS:
        model = empty_model({"_component_": "pidistill.models.from_folder", "path": folder, "backend": backend})
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
        model.load_state_dict(named[backend], assign=True)
        models[backend] = model
    return models


def ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(100, 10_000, (count,), generator=generator).tolist()


def group(arguments: argparse.Namespace, generator: torch.Generator) -> list[Rollout]:
    student = ids(arguments.prompt, generator)
    pair = PromptPair(student, student[:8] + ids(arguments.privileged, generator) + student[8:], has_privileged=True)
    tokens = arguments.completion
    return [
        Rollout(
            example=Example(id="row", messages=[]),
            prompts=pair,
            completion=ids(tokens, generator),
            policy_mask=[True] * tokens,
            sampled_logprobs=[-1.0] * tokens,
            sampled_by="teacher",
            group=0,
            stop_reason="done",
            turns=[],
        )
        for _ in range(4)
    ]


def train(model: Any, rollouts: list[Rollout]) -> None:
    batch = make_batch(rollouts, None, pad_id=0, device=torch.device("cpu"))
    scores = score(model, batch, REQUEST)
    sum(value.sum() for value in scores.divergences.values()).backward()
    model.zero_grad()


def sample(model: Any, prompt: list[int], tokens: int) -> None:
    TorchtuneSampler(max_new_tokens=tokens).sample(
        model, [prompt], group_size=4, seeds=range(4), stop_ids=frozenset(), pad_id=0, on_turn_end=lambda row, turn: None
    )


@torch.no_grad()
def logit_errors(folder: str, models: dict[str, Any], rows: torch.Tensor) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(rows).logits
    largest = float(theirs.abs().max())
    return {name: float((model(rows) - theirs).abs().max()) / largest for name, model in models.items()} | {"largest": largest}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="model folder that both backends compute")
    parser.add_argument("--prompt", type=int, default=120, help="tokens of the student's prompt")
    parser.add_argument("--privileged", type=int, default=120, help="tokens of privileged information")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    models = load(arguments.folder)
    rollouts, cpu = group(arguments, generator), torch.device("cpu")
    errors = logit_errors(arguments.folder, models, torch.tensor([ids(64, generator) for _ in range(2)]))
    work = {
        "score": lambda model: train(model, rollouts),
        "sample": lambda model: sample(model, rollouts[0].prompts.student, arguments.completion),
    }
    seconds = {}
    for name, run in work.items():
        contenders = {backend: (lambda run=run, model=model: run(model)) for backend, model in models.items()}
        seconds[name] = by_turns(contenders, arguments.turns, cpu, clock=time.process_time)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if arguments.json:
        print(json.dumps({"logits": errors, "seconds": seconds, "peak_gib": peak_gib}))
        return
    print(f"peak of this process: {peak_gib:.1f} GiB")
    print_table(
        f"{Path(arguments.folder).name}: largest difference of a logit from transformers', over the largest logit",
        ["backend", "difference"],
        [[name, f"{errors[name]:.1e}"] for name in BACKENDS],
    )
    print_table(
        "Seconds of each turn; the ratio is transformers' over torchtune's, median of the turns",
        ["work", *BACKENDS, "ratio"],
        [
            [
                name,
                *(" ".join(f"{s:.2f}" for s in of[b]) for b in BACKENDS),
                f"{median_ratio(of['transformers'], of['torchtune']):.2f}",
            ]
            for name, of in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
