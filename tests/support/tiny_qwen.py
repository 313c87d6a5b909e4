"""Make real configs small: a random model in the Hub's format; recipes run with it, in a fork or in this process."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.config._parse import TuneRecipeArgumentParser
from torchtune.config._utils import _merge_yaml_and_cli_args
from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX

from pidistill.testing import TINY_SIZES
from tests.support.chat_templates import QWEN25
from tests.support.forks import run_recipe
from tests.support.hub_models import MODELS, hub_folder
from tests.support.tiny_tokenizers import QWEN_ADDED, QWEN_SPECIAL

ROOT = Path(__file__).parents[2]
VOCABULARY = 2048


def qwen_checkpoint(folder: Path, texts: Iterable[str], name: str = "qwen2, tied", **more: Any) -> Path:
    """A folder as on the Hub: the weights of ``name`` in hub_models.py, tokenizer.json trained on ``texts``, the configs."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # The embedding has a few rows more than the tokenizer has ids, as Qwen's has.
    size = VOCABULARY - 20 - len(QWEN_SPECIAL) - len(QWEN_ADDED)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=byte_level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ADDED])

    hub_folder(name, folder, vocab_size=VOCABULARY, tokenizer=tokenizer, **more)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": QWEN25}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named))
    stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "pad_token_id": stops[1]}))
    return folder


def small_model(checkpoint: Path, output_dir: Path) -> list[str]:
    """What every recipe needs to be told to run a configs/qwen2_5 file on CPU with :func:`qwen_checkpoint`'s model."""
    sizes = [f"model.{name}={value}" for name, value in (TINY_SIZES | {"max_seq_len": 1024}).items()]
    return [
        f"output_dir={output_dir}",
        "device=cpu",
        "dtype=fp32",
        "compute_dtype=null",
        "threads=1",
        "model._component_=torchtune.models.qwen2.qwen2",
        f"model.vocab_size={VOCABULARY}",
        "model.tie_word_embeddings=True",
        *sizes,
        f"checkpointer.checkpoint_dir={checkpoint}",
        "tokenizer.max_seq_len=1024",
        "sampler.max_new_tokens=32",
    ]


def use_model(cfg: DictConfig, name: str, lora: dict[str, Any] | None = None) -> None:
    """Replace a config's model and checkpointer by those of ``name`` in tests.support.hub_models, as an edit would."""
    *_, builder, arguments = MODELS[name]
    component = f"{builder.__module__}.{'lora_' if lora else ''}{builder.__name__}"
    sizes = TINY_SIZES | {"max_seq_len": 1024, "vocab_size": VOCABULARY} | arguments | (lora or {})
    cfg.model = {"_component_": component, **sizes}
    cfg.checkpointer = {
        "_component_": "pidistill.models.HFCheckpointer",
        "checkpoint_dir": cfg.checkpointer.checkpoint_dir,
    }


# ------------------------------------------------------------------------------------------- running


def run_config(recipe: str, config: str, overrides: list[str]) -> str:
    """Run recipes/<recipe>.py with configs/<config>.yaml and ``overrides`` in a process of its own; return what it printed."""
    return run_recipe(recipe, ["--config", str(ROOT / "configs" / f"{config}.yaml"), *overrides])


def load_config(config: str, overrides: list[str]) -> DictConfig:
    """The config that `tune run` would hand to the recipe."""
    parser = TuneRecipeArgumentParser()
    arguments = parser.parse_known_args(["--config", str(ROOT / "configs" / f"{config}.yaml"), *overrides])
    return _merge_yaml_and_cli_args(*arguments)


def set_up(recipe: str, cfg: DictConfig) -> Any:
    """The recipe's object after setup, in this process; call pidistill.training.start.cleanup in the end."""
    class_name = {
        "pi_distill_distributed": "PiDistillRecipe",
        "opsd_distributed": "OPSDRecipe",
        "sft_distributed": "SFTRecipe",
    }[recipe]
    made = getattr(importlib.import_module(f"recipes.{recipe}"), class_name)(cfg)
    made.setup(cfg)
    return made


def read_metrics(output_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "alarms"} for row in rows]  # sentences, which health.py tests
