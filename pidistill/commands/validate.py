"""`pidistill validate`: check a config and its rows as `pidistill preview` does, and print one line.

pidistill validate tiny/opsd
pidistill validate my_config.yaml group_size=4 --scan 100000

Overrides are those of `pidistill run`. A config is code: its components are imported, and its tokenizer, privileged prompt,
objective, teacher, sampler and dataset are built, and checked together. No weights are read. torchtune's own configs are
checked as torchtune does. Ends with status 0, or with 2 if the config is wrong or a run would refuse one of the rows.
"""

import argparse
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pidistill.commands.common import config_parser, exit_on_input_error, parse_with_overrides
from pidistill.commands.places import recipe_of
from pidistill.commands.preview.command import read
from pidistill.commands.preview.rows import Source, judge_row, source_of
from pidistill.commands.preview.scan import Scan, scan
from pidistill.components import resolve
from pidistill.config import build
from pidistill.data.load import trained_rows_sentence
from pidistill.errors import InputError
from pidistill.models.empty import model_nodes
from pidistill.scoring.packer import check_models
from pidistill.scoring.served_teacher import ServedTeacher
from pidistill.teachers import LiveTeacher
from pidistill.training.checkpoint_source import check_checkpoint_fits
from pidistill.training.compatibility import RECIPE_OF_VIEW, build_objective, check_method
from pidistill.training.update import check_updates
from pidistill.types import Example, PromptPair, ViewName


def parser() -> argparse.ArgumentParser:
    made = config_parser("validate", __doc__, nargs="?")
    made.add_argument("--config", dest="named", metavar="CONFIG", help="the config, as torchtune's command takes it")
    made.add_argument("--scan", type=int, default=1000, help="rows that are looked at")
    return made


def main(argv: list[str]) -> None:
    arguments = parse_with_overrides(parser(), argv)
    with exit_on_input_error():
        name = arguments.named or arguments.config
        if name is None or arguments.scan < 1:
            raise InputError("name a config, and at least 1 in --scan; `pidistill validate --help` shows both")
        print(validate(name, arguments.overrides, arguments.scan))


def validate(config: str, overrides: list[str], count: int) -> str:
    """Return the line that says what was checked; refuse what a run would, in the config and its first ``count`` rows."""
    cfg, supervised = read(config, overrides)
    source = source_of(cfg, supervised)
    if not source.examples:
        raise InputError("the dataset has no rows; check `dataset`")
    for key in ("checkpointer", "teacher_checkpointer"):  # the headers of its files; on the machine that trains alone, maybe
        if Path(str((cfg.get(key) or {}).get("checkpoint_dir") or "-")).is_dir():
            check_checkpoint_fits(cfg, key)
    if cfg.get("optimizer") and all(Path(node.get("path") or ".").is_dir() for node in model_nodes(cfg).values()):
        check_models(cfg)
        check_updates(cfg)
    _check_method(cfg, _view_of(config))
    _check_environment(cfg)
    seen = _scan_rows(source, count, "dataset")
    told = [_told(source, count, seen)]
    if cfg.get("eval_dataset"):
        held_out = source_of(cfg, supervised, "eval_dataset")
        evaluated = _scan_rows(held_out, count, "eval_dataset")
        told.append("of eval_dataset " + _told(held_out, count, evaluated))
        if said := trained_rows_sentence(_pairs(seen), _pairs(evaluated)):
            told.append(f"but {said}")
    return f"{config} is right: {'; '.join(told)}"


def _scan_rows(source: Source, count: int, part: str) -> Scan:
    """Return what the first ``count`` rows of a dataset are like; refuse a row that a run would refuse."""
    seen = scan(source, count)
    if stops := seen.stops(source, part):
        raise InputError(stops)
    return seen


def _told(source: Source, count: int, seen: Scan) -> str:
    """Return what was checked of a dataset."""
    left_out = ", ".join(f"{reason} {number:,}" for reason, number in seen.dropped.items() if number)
    if left_out and (first := _first_left_out(source, count)):
        left_out += f"; the first is {first}"
    return f"{seen.scanned:,} of {seen.total:,} rows were checked{f', dropped: {left_out}' if left_out else ''}"


def _first_left_out(source: Source, count: int) -> str | None:
    """Return the id of the first row that a run leaves out; None where the dataset's builder alone left rows out."""

    def left_out(example: Example) -> bool:
        if source.no_pi == "drop" and not source.privileged.teaches(example):
            return True
        return judge_row(example, source.privileged.build(example, source.tokenizer), source).left_out

    return next((example.id for example in source.examples[:count] if left_out(example)), None)


def _pairs(seen: Scan) -> list[tuple[Example, PromptPair]]:
    return [(example, views.pair) for example, views in zip(seen.examples, seen.views, strict=True)]


def _view_of(config: str) -> ViewName | None:
    """Return the view that the bundled recipe of a config samples; None where its first line names another recipe."""
    try:
        recipe = recipe_of(config)
    except InputError:
        return None
    return next((view for view, name in RECIPE_OF_VIEW.items() if name == recipe), None)


def _check_method(cfg: DictConfig, view: ViewName | None) -> None:
    """Build teacher and sampler, and refuse what a run would: by themselves, and together with the objective.

    vLLM and a teacher's server may be on the machine that trains alone; where they are missing, so is this check.
    """
    name = cfg.sampler._component_ if cfg.get("sampler") else ""
    there = name and (not name.endswith(".VLLMSampler") or importlib.util.find_spec("vllm"))
    sampler = build(cfg.sampler) if there else None
    if not cfg.get("objective"):
        return
    if not cfg.get("device"):  # the machine that trains may have what this one lacks
        cfg.device = "cuda"
    objective, teacher = build_objective(cfg), build(cfg.teacher) if cfg.get("teacher") else LiveTeacher()
    if sampler is not None and not isinstance(teacher, ServedTeacher):
        check_method(cfg, objective, sampler, teacher, view or objective.sampling_view())


def _check_environment(cfg: DictConfig) -> None:
    """Refuse environments without the methods of one."""
    nodes = OmegaConf.to_container(cfg, resolve=True)
    for path, name in _environments("environment", nodes.get("environment")):
        made = resolve(name)
        if inspect.isclass(made) and not hasattr(made, "__getattr__"):
            _check_methods(path, name, made)


def _environments(path: str, node: Any) -> Iterator[tuple[str, str]]:
    """Yield (path, component) of a config node of an environment and of those that this package's own wrap or choose among."""
    if not isinstance(node, dict) or not isinstance(node.get("_component_"), str):
        return
    yield path, node["_component_"]
    if not node["_component_"].startswith("pidistill."):
        return
    yield from _environments(f"{path}.environment", node.get("environment"))
    among = node.get("environments")
    for name, part in among.items() if isinstance(among, dict) else ():
        yield from _environments(f"{path}.environments.{name}", part)


def _check_methods(path: str, name: str, environment: type) -> None:
    makes_itself = type(environment).__call__ is not type.__call__ or environment.__new__ is not object.__new__
    makes_itself = makes_itself or environment.__init__ is not object.__init__  # methods may be set there
    for method, shape, arguments, flags in (
        ("reset", "reset(self, example)", (None, None), {}),
        ("step", "step(self, state, turn, *, truncated)", (None, None, None), {"truncated": False}),
    ):
        function = inspect.getattr_static(environment, method, None)
        wrong = f"has no method {method}" if function is None and not makes_itself else None
        if inspect.isfunction(function):
            try:
                inspect.signature(function).bind(*arguments, **flags)
            except TypeError as error:
                wrong = f"has a method {method} that cannot be called as it is ({error})"
            if inspect.iscoroutinefunction(function):
                wrong = f"has the async method {method}, which gives no answer when it is called"
        if wrong:
            raise InputError(f"{path}: {name} {wrong}; define {shape}, as docs/environments.md says")
