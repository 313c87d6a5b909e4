"""How far the weights of a pretrained model move in 50 steps of AdamW: fp32, mixed precision, and bf16 throughout.

    python benchmarks/displacement.py SmolLM2-135M-Instruct            # a folder of the Hub
    python benchmarks/displacement.py SmolLM2-135M-Instruct --layers 6     # its first ones, for less memory and time
    python benchmarks/displacement.py SmolLM2-135M-Instruct --keep runs/moved     # takes up an interrupted run

Every precision takes the same steps on the same texts (the mean -log S of their tokens) from the same weights. The cosine and
the length are of the whole displacement against fp32's; *unmoved* is the share of the weights that ended where they began.
The package's own loading, sharding on a mesh of one and scoring head are used; the weights are the folder's rounded to bf16,
which every precision can hold.
"""

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from measure import print_table
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune import training

from pidistill.distributed.run import Run
from pidistill.models import HFCheckpointer
from pidistill.scoring.batch import make_batch
from pidistill.scoring.score import score, student_nll
from pidistill.tokenizers import HFChatTokenizer
from pidistill.training.load import load_model
from pidistill.training.optimizers import clip_gradients
from pidistill.types import Batch, Example, PromptPair, Rollout, ScoreRequest

PRECISIONS = {"fp32": (torch.float32, None), "mixed": (torch.float32, torch.bfloat16), "bf16": (torch.bfloat16, None)}
REQUEST = ScoreRequest(student_grad=True, teacher_grad=False, views=("student",), entropy=False)
# One of them is trained on in each step.
TEXTS = (
    "A baker sells 48 loaves in the morning and half as many in the afternoon, so that she sells 72 loaves on that day.",
    "The river rises in the mountains, crosses three countries, and reaches the sea after more than a thousand kilometres.",
    "To find the area of a triangle, multiply the length of its base by its height and divide the product by two.",
    "Water boils at a lower temperature on a high mountain, because the pressure of the air is smaller there.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="config.json, tokenizer and weights of a model")
    parser.add_argument("--layers", type=int, help="of the model, from the first on; default: all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--tokens", type=int, default=24, help="of a text that are trained on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the displacements; those that it has of these sizes are taken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    name = Path(arguments.folder).name + (f", {arguments.layers} layers" if arguments.layers else "")
    sizes = f"{name.replace(', ', '-').replace(' ', '')}-{arguments.steps}-{arguments.lr:g}-{arguments.tokens}"
    with tempfile.TemporaryDirectory() as folder:
        if arguments.layers:
            arguments.folder = str(first_layers(Path(arguments.folder), Path(folder), arguments.layers))
        batches = [batch_of(text, arguments, device) for text in TEXTS]
        place = arguments.keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        moved = {precision: place / f"{sizes}-{precision}.safetensors" for precision in PRECISIONS}
        for precision, path in moved.items():
            if not path.exists():
                save_displacement(path, arguments, precision, batches, device)
        rows = [row_of(precision, moved[precision], moved["fp32"]) for precision in PRECISIONS]
    dist.destroy_process_group()
    title = f"{name}: {arguments.steps} steps of AdamW, lr {arguments.lr:g}"
    print_table(title, ("", "cosine with fp32", "length / fp32's", "unmoved"), rows)


def first_layers(source: Path, target: Path, count: int) -> Path:
    """Write the folder of a model that has the first layers of another one."""
    for path in [*source.glob("*.json"), *source.glob("*.jinja")]:
        shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": count}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    weights = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    layer = re.compile(r"model\.layers\.(\d+)\.")
    kept = {name: t for name, t in weights.items() if not (found := layer.match(name)) or int(found[1]) < count}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def batch_of(text: str, arguments: argparse.Namespace, device: torch.device) -> Batch:
    tokenizer = HFChatTokenizer(arguments.folder, max_seq_len=1024)
    asked, turn = [{"role": "user", "content": "Go on."}], {"role": "assistant", "content": text}
    prompt = tokenizer.encode_prompt(asked)
    ids = tokenizer.encode_turn(asked, turn)[: arguments.tokens]
    rollout = Rollout(
        example=Example(text[:20], asked),
        prompts=PromptPair(prompt, prompt, has_privileged=False),
        completion=ids,
        policy_mask=[True] * len(ids),
        sampled_logprobs=None,
        sampled_by="student",
        group=0,
        stop_reason="done",
        turns=[turn],
    )
    return make_batch([rollout], None, pad_id=tokenizer.pad_id, device=device)


def save_displacement(path: Path, arguments: argparse.Namespace, name: str, batches: list[Batch], device: torch.device) -> None:
    """Write by how much each weight has moved after the steps, in fp32; where it began stands in a file meanwhile."""
    begun, unfinished = path.with_suffix(".begun"), path.with_suffix(".moved")
    model = load(arguments.folder, name, device)
    save_file(weights(model), begun)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.0)
    begin = time.process_time()
    for step in range(arguments.steps):
        batch = batches[step % len(batches)]
        student_nll(batch, score(model, batch, REQUEST, loss=student_nll)).mean().backward()
        norm = clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent = time.process_time() - begin
        print(f"{name}: step {step + 1}, gradient norm {norm:.3f}, {spent:.0f} CPU seconds", file=sys.stderr, flush=True)
    after = weights(model)
    del model, optimizer
    with safe_open(begun, "pt") as before:
        moved = {key: tensor.sub_(before.get_tensor(key)) for key, tensor in after.items()}
    begun.unlink()
    save_file(moved, unfinished)
    unfinished.replace(path)


def load(folder: str, name: str, device: torch.device) -> nn.Module:
    dtype, compute_dtype = PRECISIONS[name]
    run = Run(device, dtype, 0, 1, 0, Path("unused"), None, compute_dtype)
    with tempfile.TemporaryDirectory() as unused:
        state = HFCheckpointer(checkpoint_dir=folder, output_dir=unused).load_checkpoint()[training.MODEL_KEY]
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    node = OmegaConf.create({"_component_": "pidistill.models.from_folder", "path": folder})
    return load_model(OmegaConf.create({}), run, node, state, trained=True)


def weights(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters()}
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in found.items()}
    return {name: p.float().cpu().clone() for name, p in whole.items()}


def row_of(name: str, ours: Path, exact: Path) -> list[str]:
    """Return the table's row; sums in float64, matrix by matrix."""
    cross, own, theirs, unmoved, count = 0.0, 0.0, 0.0, 0, 0
    with safe_open(ours, "pt") as found, safe_open(exact, "pt") as expected:
        for key in found.keys():  # noqa: SIM118
            a, b = found.get_tensor(key).double().flatten(), expected.get_tensor(key).double().flatten()
            cross, own, theirs = cross + float(a @ b), own + float(a @ a), theirs + float(b @ b)
            unmoved, count = unmoved + int((a == 0).sum()), count + a.numel()
    return [name, f"{cross / math.sqrt(own * theirs):.4f}", f"{math.sqrt(own / theirs):.4f}", f"{unmoved / count:.1%}"]


if __name__ == "__main__":
    main()
