"""Hold the table of all top-level config keys: type, bounds, default, meaning, and the recipes that read them.

The checks of a config, the defaults in the code (:func:`setting`), `docs/keys.md` and `pidistill keys` are made from it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from pidistill.errors import InputError

ROUNDS = ("pi_distill", "opsd")
TRAINING = (*ROUNDS, "sft")
EVALUATING = (*TRAINING, "evaluate")
EVERY = (*EVALUATING, "sample")

WHOLE, NUMBER, FLAG, TEXT = "whole number", "number", "true or false", "text"
COMPONENT, COMPONENTS, TEXTS, MAPPING = "component", "list of components", "list of texts", "mapping"
_ROWS = 2**20


@dataclass(frozen=True)
class Key:
    """Describe one config key; ``null`` says what an absent or null value means where ``default`` cannot."""

    name: str
    kind: str
    meaning: str
    recipes: tuple[str, ...]
    default: Any = None
    least: int | None = None
    above: int | None = None  # a bound that the value must exceed
    most: int | None = None  # far above what a machine can hold; a larger value would hang the run or crash it
    null: str = ""
    choices: tuple[str, ...] = ()
    infinite: bool = False  # infinity is a sensible value

    @property
    def bounds(self) -> str:
        """Return what a value must be, as a message or the page says it."""
        if self.choices:
            return " or ".join((*(("true", "false") if self.kind == FLAG else ()), *self.choices))
        kind = f"{self.kind} of seconds" if self.kind == NUMBER and self.name.endswith("_s") else self.kind
        if self.most is not None:
            return f"{kind} of at least {self.least} and at most {self.most:,}"
        if self.least is not None:
            return f"{kind} of at least {self.least}" if self.kind == WHOLE else f"{kind}, at least {self.least}"
        return kind if self.above is None else f"{kind} above {self.above}"

    @property
    def shown_default(self) -> str:
        if self.default is None:
            return self.null or "–"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


DTYPES = ("fp32", "bf16")
TABLE: Mapping[str, Key] = {
    key.name: key
    for key in (
        # the run
        Key("output_dir", TEXT, "folder of the run: metrics, checkpoints, rollouts", EVERY),
        Key("seed", WHOLE, "seed of the data order, of sampling and of new weights", EVERY, 0, least=0, most=2**63 - 1),
        Key("device", TEXT, "device of every process: cuda, cpu", EVERY, null="cuda where there is one, else cpu"),
        Key("dtype", TEXT, "type of the weights, their gradients and the optimizer's states", EVERY, "fp32", choices=DTYPES),
        Key("compute_dtype", TEXT, "type that weights are multiplied in; bf16 beside dtype fp32: mixed precision", EVERY,
            null="that of `dtype`", choices=DTYPES),
        Key("threads", WHOLE, "CPU threads of each process", EVERY, least=1, most=1024,
            null="OMP_NUM_THREADS of a single process, else an equal share of the cores"),
        Key(
            "collective_timeout_minutes", WHOLE, "minutes that a process waits for the others, such as for the slowest one's "
            "sampling, before the run ends", EVERY, 60, least=1, most=_ROWS,
        ),
        # the model
        Key("model", COMPONENT, "builder of the model that is trained, sampled or evaluated", EVERY),
        Key("tokenizer", COMPONENT, "tokenizer with its chat template and `max_seq_len`", EVERY),
        Key("checkpointer", COMPONENT, "reader and writer of the weights; the recipe passes it `output_dir`", EVERY),
        Key(
            "fallback_checkpoint_dir", TEXT, "folder to start from where `checkpointer.checkpoint_dir` does not exist", EVERY,
            null="no other folder",
        ),
        Key("adapter_dir", TEXT, "folder of a PEFT adapter to start from or to evaluate", EVERY, null="no adapter"),
        Key("tensor_parallel_dim", WHOLE, "neighbouring processes that share each model's matrices", EVERY, 1, least=1),
        Key(
            "data_parallel_replicate_dim", WHOLE, "groups of neighbouring processes that each hold the whole model; the number "
            "of machines, so that these exchange gradients only", EVERY, 1, least=1,
        ),
        Key("fsdp_reshard_after_forward", FLAG, "frees the gathered weights after each forward", EVERY, True),
        Key("fsdp_cpu_offload", FLAG, "keeps weights, gradients and optimizer state in host memory", EVERY, False),
        Key("custom_sharded_layers", TEXTS, "names of layers that are sharded by themselves", EVERY, null="none"),
        # the data and the rollouts
        Key("dataset", COMPONENT, "rows to train on, to sample from or to evaluate", EVERY),
        Key("environment", COMPONENT, "what answers the model's turns and gives the reward, if any", EVERY),
        Key("privileged", COMPONENT, "where the privileged information stands in the teacher's prompt", EVERY),
        Key("sampler", COMPONENT, "sampler with its temperature and `max_new_tokens`", EVERY),
        Key("max_turns", WHOLE, "turns of the model after which an episode ends", EVERY, least=1, null="no limit"),
        Key(
            "environment_threads", WHOLE, "episodes that talk to the environment at once", EVERY,
            least=1, most=1024, null="one, in the sampler's own thread",
        ),
        Key("environment_timeout_s", NUMBER, "seconds that one `reset` or `step` may take", EVERY, above=0, null="no limit"),
        Key(
            "max_observation_chars", WHOLE, "characters of an environment's answer to one turn; a longer one costs its episode",
            EVERY, 200_000, least=1,
        ),
        Key(
            "on_overflow", TEXT, "what happens to rows that do not fit into `max_seq_len`", EVERY,
            null="`privileged.on_overflow`", choices=("error", "drop"),
        ),
        Key(
            "overlong", TEXT, "rollouts that a token limit cut off: train on them; mask: out of the loss; drop: out of the "
            "token count too. Their rewards stay in the group's mean", ROUNDS, "train", choices=("train", "mask", "drop"),
        ),
        Key("reward_shaping", COMPONENTS, "parts that are added to an episode's reward", EVALUATING, null="none"),
        # training
        Key("max_steps", WHOLE, "optimizer steps of the whole run", TRAINING, least=1),
        Key("batch_size", WHOLE, "demonstrations of one step, over all processes", ("sft",), least=1, most=_ROWS),
        Key("optimizer", COMPONENT, "optimizer with its learning rate", TRAINING),
        Key("lr_scheduler", COMPONENT, "schedule of the learning rate", TRAINING, null="a constant rate"),
        Key("clip_grad_norm", NUMBER, "largest norm of a step's gradient", TRAINING, above=0, null="no clipping"),
        Key(
            "max_nonfinite_steps", WHOLE, "steps in a row with a loss or gradient that is not finite before the run stops",
            TRAINING, 3, least=1,
        ),
        Key(
            "packing", TEXT, "tree: text that a group shares is held once; padded: rows side by side", TRAINING, "tree",
            choices=("tree", "padded"),
        ),
        Key("micro_batch_tokens", WHOLE, "tokens of one forward of each process; fewer: less memory", TRAINING, 8192, least=1),
        Key(
            "score_chunk_tokens", WHOLE, "tokens whose logits exist at once; fewer need less memory", TRAINING,
            least=1, null="sized to the vocabulary",
        ),
        Key("enable_activation_checkpointing", FLAG, "computes activations twice to hold fewer of them", TRAINING, False),
        Key(
            "enable_activation_offloading", FLAG, "keeps activations in host memory; CUDA only, with "
            "`enable_activation_checkpointing`", TRAINING, False,
        ),
        Key("compile", FLAG, "compiles the model's layers", TRAINING, False),
        Key("save_every_steps", WHOLE, "steps between two checkpoints", TRAINING, least=0, null="one at the end"),
        Key("keep_last", WHOLE, "checkpoints to keep; older ones are removed", TRAINING, least=1, null="all of them"),
        Key(
            "resume_from_checkpoint", FLAG, "true resumes the run in `output_dir`; auto resumes it or starts; start_over moves "
            "its files aside and starts", TRAINING, False, choices=("auto", "start_over"),
        ),
        Key("metric_logger", COMPONENT, "a torchtune metric logger beside `metrics.jsonl`", TRAINING, null="none"),
        # evaluation
        Key("eval_dataset", COMPONENT, "rows of the evaluation during training", TRAINING, null="no evaluation"),
        Key("eval_every_steps", WHOLE, "steps between two evaluations", TRAINING, least=0, null="first and last only"),
        Key("eval_samples", WHOLE, "sampled rollouts of each evaluated prompt", EVALUATING, 1, least=1, most=_ROWS),
        Key("eval_success_threshold", NUMBER, "reward from which a rollout counts as a success", EVERY, 1.0),
        Key("views", TEXTS, "what is sampled: student greedy, student, student + PI greedy, student + PI", ("evaluate",),
            null="all but student + PI greedy"),
        Key(
            "eval_cluster_key", TEXT, "column of the rows, such as the fact they ask for: rows with the same value in it are "
            "resampled together for intervals", ("evaluate",), null="each row by itself",
        ),
        Key(
            "eval_kind_key", TEXT, "column of the rows, such as the kind of fact or the level: `success/<value>` shows the "
            "success of the rows with each of its values", ("evaluate",), null="all rows together",
        ),
        Key("domains", MAPPING, "other rows to evaluate, each under its name", ("evaluate",), null="none"),
        # the on-policy methods
        Key("objective", COMPONENT, "the method: its loss, its weights, its advantage", ROUNDS),
        Key("prompts_per_round", WHOLE, "prompts of one round, over all processes", ROUNDS, least=1, most=_ROWS),
        Key("group_size", WHOLE, "rollouts of each prompt", ROUNDS, least=1, most=_ROWS),
        Key("updates_per_round", WHOLE, "optimizer steps of each round; more are further from on-policy", ROUNDS, 1, least=1),
        Key("minibatch_rollouts", WHOLE, "rollouts of one optimizer step", ROUNDS, least=1, null="the whole round"),
        Key(
            "rollout_lag", WHOLE, "1: each round is sampled in a second process while the one before it trains, with the "
            "weights before that one's updates", ROUNDS, 0, least=0, most=1,
        ),
        Key("rollout_device", TEXT, "device of that process, such as cuda:1", ROUNDS, null="`device`"),
        Key(
            "teacher", COMPONENT, "the weights that score as the teacher; pi_distill requires it", ROUNDS,
            null="the trained weights",
        ),
        Key("teacher_model", COMPONENT, "builder of a teacher of its own", ROUNDS, null="`model`"),
        Key("teacher_checkpointer", COMPONENT, "reader of the teacher's weights", ROUNDS, null="`checkpointer`"),
        Key("teacher_models", MAPPING, "name → builder, of the teachers of a RoutedTeacher", ROUNDS, null="`model` for all"),
        Key("teacher_checkpointers", MAPPING, "name → reader of that teacher's weights", ROUNDS, null="`checkpointer` for all"),
        Key(
            "teacher_tokenizer", COMPONENT, "tokenizer whose chat template renders the teacher's view; its ids must be the "
            "student's", (*ROUNDS, "evaluate", "sample"), null="`tokenizer`",
        ),
        Key(
            "refill", MAPPING, "samples other prompts in place of groups whose rewards are all equal, in at most `max_batches` "
            "further batches", ("opsd",), null="none",
        ),
        Key(
            "turn_curriculum", MAPPING, "most assistant turns of a training episode: `start`, and one more `every` so many "
            "steps", ROUNDS, null="`max_turns` from the first step",
        ),
        Key("hindsight", COMPONENT, "privileged information that a round's own rollouts reveal", ("opsd",), null="none"),
        Key("sft_weight", NUMBER, "weight of the mean −log S of the dataset's completions", ROUNDS, 0.0, least=0),
        Key("sft_batch_size", WHOLE, "demonstrations of that term in one step", ROUNDS, 64, least=1, most=_ROWS),
        Key(
            "max_sampler_mismatch_nats", NUMBER, "difference of sampler and trainer log-probs that stops a run", ROUNDS,
            above=0, null="0.1, beside what top-p or top-k explains", infinite=True,
        ),
        Key("importance_weights", COMPONENT, "correction for a sampler that is not the trained policy", ROUNDS, null="none"),
        Key("mismatch_mask", COMPONENT, "tokens or rollouts left out where sampler and trainer differ", ROUNDS, null="none"),
        Key("rollout_log_steps", WHOLE, "steps between two logs of sampled texts; 0: none", ROUNDS, 0, least=0),
        Key("rollout_log_samples", WHOLE, "prompts whose texts are logged", ROUNDS, 2, least=1),
        Key("rollout_log_max_new_tokens", WHOLE, "most tokens of a logged text", ROUNDS, least=1, null="the sampler's"),
        Key("rollout_log_max_chars", WHOLE, "most characters of a logged text", ROUNDS, 2000, least=1),
        Key(
            "rollout_log_total", WHOLE, "training rollouts that are kept with the numbers of every token, spread over the run",
            ROUNDS, 512, least=0, most=_ROWS,
        ),
        Key("rollout_log_max_tokens", WHOLE, "most policy tokens of such a rollout that are kept", ROUNDS, 1024, least=1),
        # sampling
        Key(
            "view", TEXT, "teacher: with the privileged information; student: without it", ("sample",),
            choices=("teacher", "student"),
        ),
        Key("samples_per_prompt", WHOLE, "rollouts of each prompt", ("sample",), least=1, most=_ROWS),
        Key("prompts_per_batch", WHOLE, "prompts that are sampled together, over all processes", ("sample",), 64, least=1),
        Key("selection", COMPONENT, "which rollouts become rows of traces.jsonl", ("sample",)),
    )
}  # fmt: skip


def keys_of(recipe: str) -> frozenset[str]:
    """Return the keys that a bundled recipe reads; ``recipe`` is its name without `_distributed`."""
    return frozenset(key.name for key in TABLE.values() if recipe in key.recipes)


# Keys that mean the same in every recipe, in every one that trains, and in the on-policy ones.
EVALUATION_KEYS = frozenset(key.name for key in TABLE.values() if key.recipes == EVERY) | {"eval_samples"}
COMMON_KEYS = keys_of("sft") - {"batch_size"}
ROUND_KEYS = (keys_of("pi_distill") & keys_of("opsd")) - COMMON_KEYS
# Whole numbers, and the least that each may be; null leaves the default.
LEAST = {key.name: key.least for key in TABLE.values() if key.kind == WHOLE}


def setting(cfg: DictConfig, name: str) -> Any:
    """Return the value of a key of the table: its default where the config has none or null."""
    value = cfg.get(name)
    return TABLE[name].default if value is None else value


def check_values(cfg: DictConfig) -> None:
    """Refuse a top-level value of the wrong type or outside its bounds."""
    for key in TABLE.values():
        value = cfg.get(key.name)
        if value is not None and not _allowed(key, value):
            raise InputError(f"{key.name}={_shown(value)} {_demand(key)}")


def _allowed(key: Key, value: Any) -> bool:
    if key.choices:
        return value in key.choices or (key.kind == FLAG and isinstance(value, bool))
    if key.kind in (WHOLE, NUMBER):
        numeric = type(value) is int or (key.kind == NUMBER and type(value) is float)
        return numeric and _within(key, value)
    if key.kind in (COMPONENT, COMPONENTS):
        parts = value if key.kind == COMPONENTS and isinstance(value, ListConfig) else [value]
        return all(isinstance(part, DictConfig) and "_component_" in part for part in parts)
    if key.kind == TEXTS:
        return isinstance(value, ListConfig) and all(isinstance(part, str) for part in value)
    return isinstance(value, {TEXT: str, FLAG: bool, MAPPING: DictConfig}[key.kind])


def _within(key: Key, value: float) -> bool:
    if math.isnan(value) or (math.isinf(value) and not key.infinite):
        return False
    above_least = (key.least is None or value >= key.least) and (key.above is None or value > key.above)
    return above_least and (key.most is None or value <= key.most)


def _demand(key: Key) -> str:
    if key.choices:
        return f"is unknown; choose {key.bounds}"
    if key.kind == COMPONENTS:
        return f"is not a list of components; write `- _component_: dotted.path` under {key.name}"
    if key.kind == COMPONENT:
        return f"is not a component; write {key.name}._component_=dotted.path and {key.name}.argument=value"
    if key.kind in (TEXT, FLAG):
        return f"must be {key.bounds}"
    finite = "finite " if key.kind == NUMBER and key.least is None and key.above is None else ""
    return f"must be a {finite}{key.bounds}" + (f", or null for {key.null}" if key.null and key.kind == NUMBER else "")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------- the page

_RECIPES = {EVERY: "all", EVALUATING: "all but sample", TRAINING: "pi_distill, opsd, sft"}


def page() -> str:
    """Return `docs/keys.md`."""
    head = (
        "# Config keys\n\n"
        "Every top-level key, its type, its default, and the recipes that read it. The arguments of a component are described\n"
        "in its docstring. `pidistill keys [word]` prints the rows that contain a word, and `pidistill keys --markdown` makes\n"
        "this page.\n\n| key | type | default | recipes | meaning |\n| --- | --- | --- | --- | --- |\n"
    )
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows("`{}`"))


def rows(name_format: str = "{}", word: str = "") -> Iterator[tuple[str, ...]]:
    """Yield (key, type, default, recipes, meaning) of every key whose row contains ``word``."""
    for key in TABLE.values():
        recipes = _RECIPES.get(key.recipes, ", ".join(key.recipes))
        row = (name_format.format(key.name), key.bounds, key.shown_default, recipes, key.meaning)
        if word.lower() in " ".join(row).lower():
            yield row
