"""A whole step of SDFT, ours against TRL's `SDFTTrainer`, on the same checkpoint, prompts and distribution of lengths.

    python benchmarks/opsd_step.py             # 15M-parameter body, V = 8,192, 4 prompts x 8, both kinds of lengths
    python benchmarks/opsd_step.py --lengths long-tailed --privileged 1024
    python benchmarks/opsd_step.py --vocabulary 151936 --prompts 2 --group 4 --micro-batch 4
    python benchmarks/opsd_step.py --weights SmolLM2-135M-Instruct --prompts 2 --group 4 --new-tokens 48
    python benchmarks/opsd_step.py --shape qwen2.5-0.5b --bf16      # TRL with bf16=True, ours with compute_dtype: bf16

A step is what a user of either waits for: sample the student, score both views, kl(teacher||student) over the full vocabulary
without the first 3 tokens, backward, clip, AdamW, move the EMA teacher. Ours is `recipes/opsd_distributed.py` itself, from a
config; TRL's is `trainer.train()`. They take turns in one process: ours runs where TRL's callbacks say that its step has ended.

Alike: the files (random Qwen2-shaped weights, tied embeddings, made on the spot, or those of `--weights`), prompt ids in both
views (checked), rollouts per step, tokens that one forward may hold, fp32, threads, fused AdamW, learning rate, clipping,
teacher. Completions are drawn with other random numbers, so lengths agree in distribution only: where they differ, time per
completion token is the fair figure. CPU seconds stand beside wall seconds: other work on the machine stretches them less.

    equal        the stop token's logit is so low that every row runs to --new-tokens
    long-tailed  the stop token has the same probability everywhere (geometric lengths), with a mean of a third of --new-tokens

Both are put into the weights, so nothing is asked of either sampler: see `small_qwen.write_model` and `write_pretrained`.

Left as each does it: TRL averages over a sequence, then over sequences; ours over all tokens of the step. Ours also computes
entropies, kl(student||teacher), rewards and metrics, and writes them, which TRL is told to leave out (no logging, no saving).
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from measure import GIB, PeakMemory, in_own_process, matmul_flops_per_s, median_ratio, print_table
from omegaconf import DictConfig, OmegaConf
from small_qwen import SHAPES, files, max_seq_len, sizes_of

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE, CLIP, EMA_RATE, SKIPPED = 1e-6, 1.0, 0.05, 3
PHASES = ("rollout", "score", "update")


@dataclass
class Step:
    """One optimiser step: wall seconds of the whole and by phase, CPU seconds, and completion tokens sampled."""

    seconds: float
    cpu_seconds: float
    tokens: float
    phases: dict[str, float]


# ---------------------------------------------------------------------------------------------- ours


def our_config(folder: Path, arguments: argparse.Namespace) -> DictConfig:
    """configs/tiny/sdft.yaml with this benchmark's model, data and sizes, and without evaluation and checkpoints."""
    cfg = OmegaConf.load(ROOT / "configs" / "tiny" / "sdft.yaml")
    if arguments.weights:
        cfg.model = {"_component_": "pidistill.models.from_folder", "path": str(folder / "model")}
        cfg.checkpointer = {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder / "model")}
    else:
        cfg.model = {"_component_": "torchtune.models.qwen2.qwen2", **sizes_of(arguments)}
        cfg.model |= {"max_seq_len": max_seq_len(arguments), "rope_base": 10_000, "norm_eps": 1e-5, "tie_word_embeddings": True}
        cfg.checkpointer |= {
            "checkpoint_dir": str(folder / "model"),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "QWEN2",
        }
    cfg.tokenizer = {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder / "model")}
    cfg.tokenizer.max_seq_len = max_seq_len(arguments)
    cfg.dataset = {"_component_": "pidistill.data.qa_dataset", "source": str(folder / "rows.jsonl")}
    cfg.dataset.privileged_key = "privileged"
    cfg.eval_dataset = None
    cfg.environment = {"_component_": "pidistill.envs.SingleTurn", "reward": {"_component_": "pidistill.rewards.ExactMatch"}}
    cfg.privileged.update({"template": "{privileged}", "placement": "user_end"})
    cfg.sampler.max_new_tokens = arguments.new_tokens
    cfg.objective.skip_first_tokens = SKIPPED
    cfg.teacher.rate = EMA_RATE
    cfg.optimizer = {"_component_": "torch.optim.AdamW", "lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True}
    del cfg.lr_scheduler
    cfg |= {"prompts_per_round": arguments.prompts, "group_size": arguments.group, "clip_grad_norm": CLIP}
    cfg |= {
        "micro_batch_tokens": arguments.micro_batch * max_seq_len(arguments),
        "threads": arguments.threads,
        "output_dir": str(folder / f"ours_{os.getpid()}"),
    }
    if arguments.bf16:
        cfg.compute_dtype = "bf16"
    cfg |= {"rollout_log_steps": 0, "save_every_steps": None, "max_steps": 1_000_000}
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(arguments.ours))


class Ours:
    """The recipe, a step at a time."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        sys.path.insert(0, str(ROOT))  # `recipes` of this project, not torchtune's
        from recipes.opsd_distributed import OPSDRecipe

        cfg = our_config(folder, arguments)
        self._recipe = OPSDRecipe(cfg)
        self._recipe.setup(cfg)
        self._recipe.save_checkpoint = lambda: None  # `train` ends with one, and is called once per step here
        self._metrics = Path(cfg.output_dir) / "metrics.jsonl"

    def prompts(self) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        return {(tuple(pair.student), tuple(pair.teacher)) for _, pair in self._recipe._data.prompts}

    def step(self) -> Step:
        self._recipe._max_steps = self._recipe._step + 1
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self._recipe.train()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        row = json.loads(self._metrics.read_text().splitlines()[-1])
        return Step(seconds, cpu_seconds, row["policy_tokens"], {phase: row[f"time_{phase}_s"] for phase in PHASES})


# ---------------------------------------------------------------------------------------------- TRL's


@dataclass
class Clock:
    """Seconds by phase and tokens of TRL's current step, from the outside: its methods are timed, not changed."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    begin: float = 0.0
    cpu_begin: float = 0.0

    def timed(self, phase: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin
            if phase == "rollout":
                self.tokens += int(result["raw_completion_lengths"].sum())
            return result

        return wrapper

    def start(self) -> None:
        self.seconds, self.tokens = {}, 0
        self.begin, self.cpu_begin = time.perf_counter(), time.process_time()

    def stop(self) -> Step:
        """What is neither rollout nor score is the update: backward, clip, AdamW, EMA, and the trainer's own loop."""
        whole = time.perf_counter() - self.begin
        cpu_seconds = time.process_time() - self.cpu_begin
        return Step(whole, cpu_seconds, self.tokens, self.seconds | {"update": whole - sum(self.seconds.values())})


def trl_trainer(folder: Path, arguments: argparse.Namespace, steps: int) -> Any:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    data = [{"prompt": [{"role": "user", "content": row["question"]}], "privileged_context": row["privileged"]} for row in rows]
    config = SDFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.prompts * arguments.group // arguments.micro_batch,
        num_generations=arguments.group,
        max_prompt_length=None,
        max_completion_length=arguments.new_tokens,
        distillation_mode="full_logits",
        distillation_alpha=0.0,  # kl(teacher||student)
        num_loss_tokens_to_skip=SKIPPED,
        teacher_model_kind="ema",
        teacher_update_rate=EMA_RATE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        bf16=arguments.bf16,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = str(folder / "model")
    # transformers 5 makes a byte-level tokenizer of every folder whose model is a Qwen2, unless told which class it is.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, padding_side="left")
    return SDFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def trl_prompts(trainer: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = list(trainer.train_dataset)
    student = [row["prompt"] for row in rows]
    teacher = trainer.teacher_context_builder.select_generation_prompts(student, [row["privileged_context"] for row in rows])
    views = (trainer._tokenize_prompts(prompts) for prompts in (student, teacher))
    return {(tuple(s), tuple(t)) for s, t in zip(*views, strict=True)}


def train_trl(trainer: Any, after_step: Callable[[Step], None]) -> None:
    """TRL's whole training; ``after_step`` is called with each step's times, and its own time is nobody's."""
    from transformers import PrinterCallback, TrainerCallback

    clock = Clock()
    trainer._prepare_training_batch = clock.timed("rollout", trainer._prepare_training_batch)
    trainer.compute_loss = clock.timed("score", trainer.compute_loss)

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after_step(clock.stop())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns())  # the last one: the teacher's average is part of the step
    trainer.train()


# ---------------------------------------------------------------------------------------------- the comparison


def by_turns(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Step]]:
    """Steps of both, TRL ours TRL ours …, after one turn that is not counted."""
    trainer, ours = trl_trainer(folder, arguments, arguments.turns + 1), Ours(folder, arguments)
    if ours.prompts() != trl_prompts(trainer):
        raise RuntimeError("the two sides' prompt ids differ")
    steps: dict[str, list[Step]] = {"TRL": [], "pidistill": []}

    def turn(theirs: Step) -> None:
        steps["TRL"].append(theirs)
        steps["pidistill"].append(ours.step())

    train_trl(trainer, turn)
    return {name: taken[1:] for name, taken in steps.items()}


def peak_bytes(folder: Path, arguments: argparse.Namespace) -> int:
    """Two steps of one side in this process: its peak above the loaded model and teacher."""
    if arguments.case == "pidistill":
        ours = Ours(folder, arguments)
        with PeakMemory() as peak:
            ours.step()
            ours.step()
    else:
        trainer = trl_trainer(folder, arguments, 2)
        with PeakMemory() as peak:
            train_trl(trainer, lambda step: None)
    return peak.bytes


def floor_flops(arguments: argparse.Namespace, tokens: float) -> float:
    """Multiply-adds × 2 that no arrangement avoids: each prompt read once per group and view, each completion token once more
    for sampling and once per view, the head for completion tokens only; backward twice the forward; attention left out.
    """
    sizes = sizes_of(arguments)
    hidden, kv = sizes["embed_dim"], sizes["embed_dim"] * sizes["num_kv_heads"] // sizes["num_heads"]
    body = sizes["num_layers"] * hidden * (2 * hidden + 2 * kv + 3 * sizes["intermediate_dim"])
    head = arguments.vocabulary * hidden
    student, teacher = (arguments.prompts * n for n in (arguments.question, arguments.question + arguments.privileged))
    sampling = body * (student + tokens) + head * tokens
    scoring = 3 * (body * (student + tokens) + head * tokens) + body * (teacher + tokens) + head * tokens
    return 2.0 * (sampling + scoring)


def row_of(name: str, steps: list[Step], peak: int | None, arguments: argparse.Namespace, rate: float) -> list[str]:
    seconds, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    floor = sum(floor_flops(arguments, step.tokens) for step in steps) / rate
    return [
        arguments.lengths,
        name,
        f"{tokens / len(steps) / (arguments.prompts * arguments.group):.1f}",
        f"{statistics.median(step.seconds for step in steps):.2f}",
        f"{1e3 * seconds / tokens:.2f}",
        *(f"{sum(step.phases[phase] for step in steps) / seconds:.0%}" for phase in PHASES),
        f"{floor / seconds:.0%}",
        f"{peak / GIB:.2f}" if peak is not None else "",
    ]


def compare(arguments: argparse.Namespace, rate: float) -> tuple[list[list[str]], str]:
    """Two rows of the table, and the sentence with the ratios."""
    with files(arguments) as folder:
        command = [*sys.argv[1:], "--lengths", arguments.lengths, "--files", str(folder), "--case"]
        # Before this process holds both sides, beside which a third would need the memory of a larger machine.
        sides = ("TRL", "pidistill") if arguments.memory else ()
        peaks = {name: in_own_process(__file__, [*command, name])["bytes"] for name in sides}
        steps = by_turns(folder, arguments)
    rows = [row_of(name, taken, peaks.get(name), arguments, rate) for name, taken in steps.items()]
    theirs, ours = steps["TRL"], steps["pidistill"]

    def times(value: Callable[[Step], float]) -> str:
        return f"{median_ratio([value(step) for step in theirs], [value(step) for step in ours]):.2f}x"

    return rows, (
        f"{arguments.lengths}: pidistill is {times(lambda s: s.seconds)} as fast per step, "
        f"{times(lambda s: s.seconds / s.tokens)} per completion token (CPU seconds: {times(lambda s: s.cpu_seconds)}, "
        f"{times(lambda s: s.cpu_seconds / s.tokens)}), medians of {arguments.turns} turns"
        + (f"; peak memory {peaks['pidistill'] / peaks['TRL']:.2f}x TRL's" if peaks else "")
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=("equal", "long-tailed", "both"), default="both")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the model; its weights are random")
    parser.add_argument("--weights", default=None, help="a folder of the Hub with tied embeddings, in place of random weights")
    parser.add_argument("--vocabulary", type=int, default=None, help="default: that of --shape")
    parser.add_argument("--bf16", action="store_true", help="fp32 weights multiplied in bf16, on both sides")
    parser.add_argument("--prompts", type=int, default=4, help="per optimiser step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=None,
        help="rollouts in a forward of TRL's; ours holds as many tokens; default: all of the step",
    )
    parser.add_argument("--question", type=int, default=128, help="tokens both views see")
    parser.add_argument("--privileged", type=int, default=256, help="tokens only the teacher sees")
    parser.add_argument("--new-tokens", type=int, default=128, help="limit of a completion")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="changes to our config, e.g. packing=padded")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory of each side")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.vocabulary = sizes_of(arguments)["vocab_size"]
    arguments.micro_batch = arguments.micro_batch or arguments.prompts * arguments.group
    if arguments.prompts * arguments.group % arguments.micro_batch:
        parser.error(f"--micro-batch {arguments.micro_batch} does not divide {arguments.prompts} x {arguments.group} rollouts")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps({"bytes": peak_bytes(arguments.files, arguments)}))
        return
    rate = matmul_flops_per_s(torch.device("cpu"), torch.bfloat16 if arguments.bf16 else torch.float32)
    rows, sentences = [], []
    for lengths in ("equal", "long-tailed") if arguments.lengths == "both" else (arguments.lengths,):
        more, sentence = compare(argparse.Namespace(**vars(arguments) | {"lengths": lengths}), rate)
        rows, sentences = rows + more, [*sentences, sentence]
    products = "bf16" if arguments.bf16 else "fp32"
    title = (
        f"One SDFT step: {arguments.prompts} prompts x {arguments.group}, question {arguments.question}, privileged "
        f"{arguments.privileged}, up to {arguments.new_tokens} new, V={arguments.vocabulary}, {products} products, "
        f"{arguments.threads} thread(s), matmul {rate / 1e9:.0f} GFLOP/s"
    )
    columns = ["lengths", "", "tokens/rollout", "s/step", "ms/token", *PHASES, "floor/time", "peak GiB"]
    print_table(title, columns, rows)
    print("\n".join(sentences))


if __name__ == "__main__":
    main()
