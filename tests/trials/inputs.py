"""Make wrong inputs for all commands and recipes: from the table of keys, the components' signatures, files and folders."""

import dataclasses
import functools
import importlib
import inspect
import json
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from pidistill.components import resolve
from pidistill.config import COMPONENT
from pidistill.training import keys
from tests.support.runs import RECIPES, TINY, small_config

CONFIGS = {"opsd": "opsd", "pi_distill": "pi_distill", "sft": "sft", "evaluate": "evaluate", "sample": "rft_sample"}
ENOUGH = {
    "max_steps": 1, "sampler.max_new_tokens": 8, "dataset.max_rows": 6, "micro_batch_tokens": 400, "eval_every_steps": None,
}  # fmt: skip
HUGE = 10**12

TEXT, NOT_A_NUMBER, INFINITE, LIST, MAP, UNICODE, COLON = "fast", ".nan", ".inf", "[1,2]", "{a: 1}", "größe→", "a: b"


@dataclasses.dataclass(frozen=True)
class Input:
    """One command line; ``wrong`` is False where the input may as well be right, and then it must end well or be refused."""

    kind: str
    words: tuple[str, ...]
    wrong: bool = True

    def __str__(self) -> str:
        return " ".join(self.words)


class Inputs:
    """The inputs, and the files below ``folder`` that they name; ``base`` is a checkpoint of the tiny world."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        for recipe in CONFIGS:
            self.write(f"{recipe}.yaml", self.text(recipe))
        (folder / "a_file").write_text("text")
        (folder / "an_empty_folder").mkdir()

    def config(self, recipe: str) -> DictConfig:
        """Return a config of a recipe that ends in about a second."""
        name = CONFIGS[recipe]
        if recipe == "sample":
            cfg = OmegaConf.load(TINY / f"{name}.yaml")
            small = {"samples_per_prompt": 1, "model.num_layers": 1, "model.embed_dim": 32, "model.intermediate_dim": 64}
            small |= {"checkpointer.checkpoint_dir": str(self.base), "checkpointer.checkpoint_files": ["model.safetensors"]}
        else:
            cfg, small = small_config(name, self.base, self.folder / f"run_{recipe}"), {}
        small |= {
            "output_dir": str(self.folder / f"run_{recipe}"),  # what trains nothing refuses the folder of a training run
            "environment._component_": "pidistill.envs.tiny_world.TinyWorldEnvironment",
        }
        if "resume_from_checkpoint" in keys.keys_of(recipe):
            small["resume_from_checkpoint"] = "start_over"
        for key, value in (ENOUGH | small).items():
            if key.partition(".")[0] in keys.keys_of(recipe):
                OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        return cfg

    def text(self, recipe: str, cfg: DictConfig | None = None) -> str:
        """Return a config as the text of a file that says which recipe it is for."""
        return f"# pidistill run {recipe}_distributed --config {recipe}.yaml\n{OmegaConf.to_yaml(cfg or self.config(recipe))}"

    def write(self, name: str, text: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return str(path)

    def run(self, kind: str, recipe: str, *overrides: str, wrong: bool = True, config: str | None = None) -> Input:
        words = ("run", f"{recipe}_distributed", "--config", config or str(self.folder / f"{recipe}.yaml"), *overrides)
        return Input(kind, words, wrong)

    @functools.cached_property
    def every(self) -> list[Input]:
        """Return all inputs, each once; files that they name are made when this is first asked."""
        found = [
            *self.top_level_keys(), *self.component_arguments(), *self.components(), *self.command_lines(),
            *self.config_files(),
            *self.folders(), *self.checkpoints(), *self.rows(),
        ]  # fmt: skip
        return list(dict.fromkeys(found))

    # --------------------------------------------------------------------------------------- keys of the table

    def top_level_keys(self) -> Iterator[Input]:
        for number, key in enumerate(keys.TABLE.values()):
            recipe = key.recipes[number % len(key.recipes)]
            required = key.name in _required(recipe)
            for value, wrong in _top_level_values(key, required):
                yield self.run(f"key: {_value_kind(value)}", recipe, f"{key.name}={value}", wrong=wrong)
            yield self.run("key: misspelt", recipe, f"{key.name}x={1}")

    # --------------------------------------------------------------------------------------- arguments of components

    def component_arguments(self) -> Iterator[Input]:
        seen = set()
        for recipe in CONFIGS:
            for path, node in _component_nodes(self.config(recipe)):
                if node[COMPONENT] not in seen:
                    seen.add(node[COMPONENT])
                    yield from self._arguments(recipe, path, node)

    def _arguments(self, recipe: str, path: str, node: DictConfig) -> Iterator[Input]:
        component = resolve(node[COMPONENT])
        hints = typing.get_type_hints(component.__init__ if isinstance(component, type) else component)
        for name, parameter in inspect.signature(component).parameters.items():
            hint = hints.get(name)
            types = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else {hint}
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not types & {int, float, str, bool}:
                continue
            given = name in node or parameter.default is not parameter.empty
            for value, wrong in _argument_values(name, types) if given else ():
                yield self.run(f"argument: {_value_kind(value)}", recipe, f"{path}.{name}={value}", wrong=wrong)
        yield self.run("argument: unknown", recipe, f"{path}.nosuch=1")

    def components(self) -> Iterator[Input]:
        """Yield component paths that lead nowhere, or to a module that fails, for every component of every config."""
        self.write("broken_syntax.py", "def f(:\n")
        self.write("broken_name.py", "x = undefined_name\n")
        self.write("broken_exit.py", "import sys\nsys.exit(3)\n")
        self.write("broken_import.py", "import a_package_that_is_not_there\n")
        self.write("own_parts.py", "class Raises:\n    def __init__(self):\n        raise KeyError('inside')\nVALUE = 3\n")
        paths = ("nosuch.Thing", "pidistill.NoSuch", "broken_syntax.f", "broken_name.x", "broken_exit.x", "broken_import.x",
                 "own_parts.missing", "own_parts.Raises", "own_parts.VALUE", "größe.Ding", "..", "3", "[1]")  # fmt: skip
        for number, (recipe, path) in enumerate((r, p) for r in CONFIGS for p, _ in _component_nodes(self.config(r))):
            for at in range(4):
                yield self.run("component: path", recipe, f"{path}._component_={paths[(4 * number + at) % len(paths)]}")
            yield self.run("component: absent", recipe, config=self._without_component(recipe, path))
        for logger in ("WandBLogger", "CometLogger", "TensorBoardLogger"):
            name = f"metric_logger._component_=torchtune.training.metric_logging.{logger}"
            yield self.run("component: package", "sft", name, "metric_logger.log_dir=logs", wrong=logger != "TensorBoardLogger")

    def _without_component(self, recipe: str, path: str) -> str:
        cfg = self.config(recipe)
        node = OmegaConf.select(cfg, path)
        del node[COMPONENT]
        return self.write(f"absent/{recipe}.{path}.yaml", self.text(recipe, cfg))

    # --------------------------------------------------------------------------------------- words

    def command_lines(self) -> Iterator[Input]:
        opsd, sft = str(self.folder / "opsd.yaml"), str(self.folder / "sft.yaml")
        lines = [
            ("nosuch",), ("run",), ("run", "nosuch", "--config", opsd), ("run", "opsd_distributed"),
            ("run", "opsd_distributed", "--config"), ("run", "opsd_distributed", "--config", "nosuch"),
            ("run", "--nproc_per_node", "many", "opsd_distributed", "--config", opsd),
            ("run", "--nproc_per_node", "0", "opsd_distributed", "--config", opsd),
            ("run", "--nnodes", "a:b", "opsd_distributed", "--config", opsd),
            ("run", "--nosuch", "1", "opsd_distributed", "--config", opsd),
            ("run", "a_file", "--config", opsd), ("run", "an_empty_folder", "--config", opsd),
            ("run", "opsd_distributed", "--config", opsd, "lr"), ("run", "opsd_distributed", "--config", opsd, "=3"),
            ("run", "opsd_distributed", "--config", opsd, "a=b=c"), ("run", "opsd_distributed", "--config", opsd, "~nosuch"),
            ("run", "opsd_distributed", "--config", opsd, "~model._component_"),
            ("run", "opsd_distributed", "--config", opsd, "--lr", "3"), ("run", "opsd_distributed", "--config", opsd, "-x"),
            ("run", "opsd_distributed", "--config", opsd, "seed=${nowhere}"),
            ("run", "opsd_distributed", "--config", opsd, "seed=${seed}"),
            ("run", "opsd_distributed", "--config", opsd, "seed=${oc.env:NO_SUCH_VARIABLE}"),
            ("run", "opsd_distributed", "--config", opsd, "seed=[1"), ("run", "opsd_distributed", "--config", opsd,
            "a.b.c=1"),
            ("run", "opsd_distributed", "--config", opsd, "privileged.template=Hint: {privileged}"),
            ("run", "opsd_distributed", "--config", opsd, "privileged.template=no placeholder"),
            ("run", "opsd_distributed", "--config", sft), ("run", "sft_distributed", "--config", opsd),
            ("run", "evaluate_distributed", "--config", opsd), ("run", "pi_distill_distributed", "--config", opsd),
            ("ls", "extra"), ("cp",), ("cp", "nosuch", "x.py"), ("cp", "tiny/opsd"), ("cp", "tiny/opsd", "a_file"),
            ("cp", "tiny/opsd", "/proc/x.yaml"), ("cp", "tiny/opsd", "nosuch_folder/x.yaml"), ("cat",), ("cat", "nosuch"),
            ("validate",), ("validate", "nosuch"), ("validate", "--config"), ("validate", "a_file"),
            ("validate", opsd, "objective.beta=-1"), ("validate", opsd, "groupsize=1"), ("validate", opsd,
            "dataset.max_rows=0"),
            ("download",), ("download", "--nosuch"),
            ("keys", "nosuchword"), ("keys", "a", "b"), ("keys", "--nosuch"),
            ("prepare",), ("prepare", "nosuch"), ("prepare", "gsm8k"), ("demo", "--seeds", "x"), ("demo", "--arms", "nosuch"),
            ("demo", "--max-steps", "many"), ("demo", "--nosuch"),
            ("sweep",), ("sweep", "nosuch"), ("sweep", opsd, "lr"), ("sweep", opsd, "seed=x"), ("sweep", opsd, "--workers",
            "0"),
            ("sweep", opsd, "output_dir=x"), ("sweep", opsd, "objective.beta=3..1", "--dry-run"), ("sweep", "--report",
            "nosuch"),
            ("sweep", opsd, "objective.beta=0.1,fast", "--output-dir", str(self.folder / "sweep")),
            ("sweep", opsd, "--search", "grid", "objective.beta=0.0..1.0", "--dry-run"), ("sweep", opsd, "--search",
            "nosuch"),
            ("sweep", "a_file"), ("sweep", opsd, "--trials", "x"), ("sweep", opsd, "group_size=0,1", "--output-dir",
            "sweep2"),
            ("sweep", "--report", "a_file"), ("sweep", opsd, "seed=0", "--output-dir", "a_file"),
        ]  # fmt: skip
        for command in ("plan", "preview"):
            lines += [
                (command,), (command, "nosuch"), (command, "a_file"), (command, "an_empty_folder"), (command, opsd,
                "--nosuch"),
                (command, opsd, "--rows", "x"), (command, opsd, "--rows", "-1"), (command, opsd, "groupsize=1"),
                (command, opsd, "objective.beta=fast"), (command, opsd, "model._component_=nosuch.x"),
                (command, opsd, "dataset.split=nosuch"), (command, opsd, "tokenizer.max_seq_len=-3"), (command, opsd,
                "seed=[1"),
                (command, opsd, "dataset._component_=own_parts.Raises"), (command, opsd, "~dataset"), (command, opsd, "lr"),
            ]  # fmt: skip
        lines += [
            ("plan", opsd, "--ranks", "0"), ("plan", opsd, "--ranks", "x"), ("plan", opsd, "--device", "nosuch"),
            ("plan", opsd, "--memory-gib", "x"), ("plan", opsd, "--memory-gib", "nan"), ("plan", opsd, "--prompt-tokens",
            "-5"),
            ("plan", opsd, "--completion-tokens", "-1"), ("plan", opsd, "--privileged-tokens", "-1", "--prompt-tokens", "3"),
            ("plan", opsd, "dtype=fp12"), ("plan", str(self.folder / "evaluate.yaml")), ("preview", opsd, "--scan", "0"),
            ("plan", opsd, "tensor_parallel_dim=2"), ("preview", opsd, "tokenizer.max_seq_len=9"),
        ]  # fmt: skip
        yield from (Input("command line", words) for words in lines)

    # --------------------------------------------------------------------------------------- files and folders

    def config_files(self) -> Iterator[Input]:
        good = self.text("sft")
        files = {
            "empty": "", "list": "- 1\n- 2\n", "text": "just words", "number": "3", "bracket": f"{good}x: [1\n",
            "tab": f"{good}\tx: 1\n",
            "indent": f"{good}  x: 1\n", "twice": f"{good}seed: 1\n", "binary": bytes(range(256)),
            "latin1": f"{good}a: ü".encode("latin-1"),
            "tag": f"{good}x: !!python/object:os.system {{}}\n", "anchor": f"{good}x: *nowhere\n",
            "config_key": f"{good}config: 1\n",
            "number_key": f"{good}3: 4\n", "null_key": f"{good}null: 4\n", "interpolation": f"{good}x: ${{nowhere}}\n",
            "self": f"{good}x: ${{x}}\n", "circle": f"{good}x: ${{y}}\ny: ${{x}}\n", "open": f"{good}x: ${{\n",
            "missing": f"{good}x: ???\n",
            "resolver": f"{good}x: ${{nosuch:1}}\n", "environment": f"{good}x: ${{oc.env:NO_SUCH_VARIABLE}}\n",
            "quote": f'{good}x: "a\n',
            "unread": f"{good}x: 1\n", "documents": f"{good}---\nx: 1\n", "control": f"{good}x: \x1b[31m\n",
        }  # fmt: skip
        for name, text in files.items():
            path = self.write(f"files/{name}.yaml", text)
            yield self.run("config file", "sft", config=path)
            yield Input("config file", ("preview", path))
            yield Input("config file", ("validate", path))

    def folders(self) -> Iterator[Input]:
        (self.folder / "dangling").symlink_to("nowhere")
        for recipe in CONFIGS:
            for path in ("/proc/run", "a_file", "a_file/run", "/dev/null", "/sys/x", "x" * 300, "'\"a\\0b\"'"):
                yield self.run("output folder", recipe, f"output_dir={path}")
            for folder in ("nosuch", "a_file", "an_empty_folder", "dangling"):
                yield self.run("model folder", recipe, f"checkpointer.checkpoint_dir={folder}")
                yield self.run("model folder", recipe, f"adapter_dir={folder}")
            yield self.run("model folder", recipe, "checkpointer.checkpoint_files=[nosuch.safetensors]")
            yield self.run("model folder", recipe, "checkpointer.checkpoint_files=[]")
            yield self.run("model folder", recipe, "checkpointer.model_type=NOSUCH")
        for recipe in ("opsd", "pi_distill", "sft"):
            for value in ("true", "auto"):
                words = (f"output_dir={self.folder}/an_empty_folder", f"resume_from_checkpoint={value}")
                yield self.run("resume", recipe, *words, wrong=value == "true")

    def checkpoints(self) -> Iterator[Input]:
        """Yield copies of the base's folder with one fault each."""
        weights = load_file(self.base / "model.safetensors")
        raw, config = (self.base / "model.safetensors").read_bytes(), json.loads((self.base / "config.json").read_text())
        first = next(iter(weights))

        def tensors(changed: dict[str, torch.Tensor]) -> Any:
            return lambda folder: save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

        def text(name: str, content: str | bytes) -> Any:
            return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

        faults = {
            "cut": text("model.safetensors", raw[: len(raw) // 2]), "garbage": text("model.safetensors", b"garbage" * 100),
            "no_bytes": text("model.safetensors", b""), "absent": lambda folder: (folder / "model.safetensors").unlink(),
            "folder": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
            "no_config": lambda folder: (folder / "config.json").unlink(), "config_text": text("config.json", "text"),
            "config_list": text("config.json", "[]"), "config_null": text("config.json", "null"),
            "config_empty": text("config.json", ""),
            "config_binary": text("config.json", bytes(range(256))),
            "fewer": tensors({k: v for k, v in weights.items() if k != first}),
            "shape": tensors(weights | {first: weights[first][:, :4].clone()}),
            "none": tensors({}), "renamed": tensors({f"x.{k}": v for k, v in weights.items()}),
            **{f"config_{key}": text("config.json", json.dumps(config | {key: value}))
               for key, value in {"vocab_size": 7, "hidden_size": "wide", "num_hidden_layers": -1,
               "num_attention_heads": None}.items()},
        }  # fmt: skip
        for number, (name, spoil) in enumerate(faults.items()):
            folder = self.folder / "checkpoints" / name
            shutil.copytree(self.base, folder)
            spoil(folder)
            for recipe in (list(CONFIGS)[number % 5], list(CONFIGS)[(number + 2) % 5]):
                yield self.run("checkpoint", recipe, f"checkpointer.checkpoint_dir={folder}")

    # --------------------------------------------------------------------------------------- rows

    def rows(self) -> Iterator[Input]:
        ask = {"role": "user", "content": "req i1 c2 g3 1 2 3 go"}
        act = {"role": "assistant", "content": "act"}
        row = {"messages": [ask], "privileged_messages": "[ d2 f0 ? k3 ]"}
        messages = {
            "empty": [], "null": None, "number": 3, "text": "hello", "numbers": [1, 2], "lists": [["user", "x"]],
            "no_role": [{"content": "req"}],
            "no_content": [{"role": "user"}], "role": [{"role": "robot", "content": "req"}], "null_role": [{"role": None,
            "content": "req"}],
            "content_number": [{"role": "user", "content": 3}], "content_map": [{"role": "user", "content": {"a": 1}}],
            "word": [{"role": "user", "content": "nosuchword"}], "unicode": [{"role": "user", "content": "größe\u202e"}],
            "control": [{"role": "user", "content": "\x1b[31mreq"}], "surrogate": [{"role": "user", "content": "\ud800"}],
            "long": [{"role": "user", "content": "req " * 500}], "assistant_last": [ask, act],
        }  # fmt: skip
        for name, value in messages.items():
            for recipe in ("opsd", "sample"):
                yield self._dataset(recipe, name, "".join(json.dumps(r) + "\n" for r in (row, row, row | {"messages": value})))
            yield Input("row", ("preview", self._dataset_config("opsd", name)))
        texts = {
            "nothing": "", "blank": "\n\n", "cut": '{"messages": [\n', "words": "just words\n",
            "array_of_numbers": "[1, 2, 3]\n",
            "binary": bytes(range(256)), "latin1": json.dumps(row).replace("go", "gö").encode("latin-1"), "null": "null\n",
            "empty_row": "{}\n",
            "other_column": json.dumps({"prompt": [ask], "privileged_messages": "x"}) + "\n",
            "no_privileged": json.dumps({"messages": [ask]}) + "\n", "nan": '{"messages": NaN}\n',
        }  # fmt: skip
        for name, text in texts.items():
            yield self._dataset("opsd", name, text)
            yield self._dataset("pi_distill", name, text)
        for source in ("nosuch.jsonl", "a_file", "an_empty_folder", "nosuch/name", "rows.xyz", "https://127.0.0.1:9/x.jsonl"):
            words = ("dataset={_component_: pidistill.data.chat_dataset, source: " + source + "}",)
            cfg = self.config("opsd")
            cfg.dataset = {COMPONENT: "pidistill.data.chat_dataset", "source": source}
            yield self.run("row", "opsd", config=self.write(f"sources/{len(source)}.yaml", self.text("opsd", cfg)))
            yield self.run("row", "opsd", *words)

    def _dataset_config(self, recipe: str, name: str) -> str:
        cfg = self.config(recipe)
        cfg.dataset = {COMPONENT: "pidistill.data.chat_dataset", "source": str(self.folder / f"rows/{name}.jsonl")}
        return self.write(f"rows/{recipe}.{name}.yaml", self.text(recipe, cfg))

    def _dataset(self, recipe: str, name: str, text: str | bytes) -> Input:
        self.write(f"rows/{name}.jsonl", text)
        return self.run("row", recipe, config=self._dataset_config(recipe, name))


# ------------------------------------------------------------------------------------------------ values


def _required(recipe: str) -> tuple[str, ...]:
    return importlib.import_module(f"recipes.{recipe}_distributed").REQUIRED


def _component_nodes(node: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    for key, value in node.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            inner = f"{path}.{key}" if path else str(key)
            if COMPONENT in value:
                yield inner, value
            yield from _component_nodes(value, inner)


def _top_level_values(key: keys.Key, required: bool) -> Iterator[tuple[str, bool]]:
    """Yield (value as typed, whether it is surely wrong) for a key of the table."""
    yield "null", required
    if key.kind == keys.FLAG:
        yield from ((value, True) for value in (TEXT, "3", NOT_A_NUMBER, LIST, MAP, UNICODE, COLON))
    elif key.kind in (keys.WHOLE, keys.NUMBER):
        yield from ((value, True) for value in (TEXT, NOT_A_NUMBER, LIST, MAP, UNICODE, COLON, "true", "2.5x"))
        yield INFINITE, not key.infinite
        yield "-3", key.least is not None or key.above is not None
        if key.kind == keys.WHOLE:
            yield "2.5", True
        if key.name != "max_steps":  # a run of so many steps is right, and does not end
            yield str(HUGE), False
    elif key.kind == keys.TEXT:
        yield from ((value, True) for value in ("3", NOT_A_NUMBER, LIST, MAP, COLON, "true"))
        yield UNICODE, key.name != "output_dir" and key.name != "fallback_checkpoint_dir"
    else:
        yield from ((value, True) for value in (TEXT, "3", NOT_A_NUMBER, LIST, UNICODE, "true"))
        yield COLON, key.kind != keys.MAPPING


# Arguments for which a negative number means nothing.
_NOT_NEGATIVE = ("max_", "num_", "n", "_size", "temperature", "lr", "rate", "top_p", "top_k", "dim", "eps", "threshold_tokens")


def _argument_values(name: str, types: set[Any]) -> Iterator[tuple[str, bool]]:
    numeric = types & {int, float}
    if str not in types:
        yield from ((value, True) for value in (TEXT, UNICODE, COLON) if numeric or types & {bool})
    yield from ((value, True) for value in (MAP, LIST) if type(None) not in types or numeric)
    if numeric:
        yield from ((value, True) for value in (NOT_A_NUMBER,))
        yield (
            "-3",
            (int in types and name.startswith(("max_", "num_"))) or name in ("lr", "temperature", "weight_decay", "vocab_size"),
        )
        yield "null", False
        yield "true", True
        if not name.startswith(("num_", "embed", "intermediate", "vocab", "n", "max_seq_len")):  # so large a model is right
            yield str(HUGE), False
    elif str in types:
        yield from ((value, True) for value in ("3", "true"))


def _value_kind(value: str) -> str:
    kinds = {"null": "null", NOT_A_NUMBER: "NaN", INFINITE: "infinity", "-3": "negative", str(HUGE): "huge", LIST: "list",
    MAP: "mapping",
             UNICODE: "unicode", COLON: "colon"}  # fmt: skip
    return kinds.get(value, "wrong type")


assert set(CONFIGS.values()) <= set(RECIPES)
