"""List what a sweep runs: arms × bases × swept values × seeds.

A cell is a chain of stages, a stage is one run of a config with overrides.

Nothing here starts anything. A stage's folder name is made of its config and its overrides, so that two arms with the same
first stage share one run of it.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pidistill.commands.places import folders, has_key, load_config, recipe_of
from pidistill.commands.sweep.values import Axis, grid_values, parse_overrides, split_top_level, whole_number
from pidistill.components import closest
from pidistill.errors import InputError, bounded_repr, one_line

# What a sweep file may say, and of which type each value is; null stands for an absent one.
SWEEP_KEYS = {"output_dir": str, "seeds": list, "base": str | list, "overrides": dict, "evaluate": str}
SWEEP_KEYS |= {"evaluate_overrides": dict, "select": str, "arms": dict, "controls": dict}
ARM_KEYS = {"title": object, "config": str, "overrides": dict, "stages": list, "evaluate_overrides": dict}
STAGE_KEYS = {"name": str, "config": str, "overrides": dict}
CONTROL_KEYS = {"arms": list, "values": dict}
TYPES = {str: "a text", list: "a list", dict: "a mapping", str | list: "a text or a list"}
SELECT = "eval_student_success"
CHECKPOINT_KEY = "checkpointer.checkpoint_dir"
# Where and how fast a run runs, not what it gives: typed, they hold for the evaluation too, and make no other cell.
OF_THE_MACHINE = ("device", "threads")
Overrides = Mapping[str, str]


@dataclass(frozen=True)
class Stage:
    """Describe one run. ``{name}`` in an override's value is the folder of the earlier stage of that name."""

    name: str
    config: str
    overrides: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """Describe a row of the comparison. Without stages it is the base checkpoint itself, which is only evaluated.

    A sweep over several bases has the arm once per ``base``; ``base_name`` tells these apart, and is None for one base.
    """

    name: str
    title: str
    stages: tuple[Stage, ...]
    evaluate_overrides: Overrides = field(default_factory=dict)
    base: str | None = None
    base_name: str | None = None


@dataclass(frozen=True)
class Cell:
    """Hold an arm with its overrides from the command line (already in the stages') and one seed."""

    arm: Arm
    settings: Overrides
    seed: int | None

    @property
    def id(self) -> str:
        values = [f"{key}={value}" for key, value in sorted(self.settings.items())]
        own = {"base": self.arm.base_name, "seed": self.seed}
        return ",".join([self.arm.name, *values, *(f"{key}={value}" for key, value in own.items() if value is not None)])


@dataclass(frozen=True)
class Sweep:
    """Hold all that a worker needs to know; ``seeds`` is (None,) where the config's own seed is kept."""

    output_dir: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int | None, ...]
    axes: Mapping[str, Axis]
    fixed: Overrides  # typed with one value, without those of the machine
    machine: Overrides  # typed with one value, `OF_THE_MACHINE`
    evaluate: str | None
    evaluate_overrides: Overrides
    select: str
    order: tuple[str, ...] = ()  # order of the tables: every arm, chosen or not


# ------------------------------------------------------------------------------------------- from words or a file to a sweep


def is_sweep_file(name: str) -> bool:
    return "," not in name and "arms" in load_config(name)


def sweep_of_configs(names: Sequence[str]) -> dict[str, Any]:
    """Return the content of a sweep file with one arm per config."""
    arms = {Path(name).with_suffix("").as_posix().removeprefix("configs/"): {"config": name} for name in names}
    return {"arms": arms, "output_dir": str(Path("runs/sweeps") / "+".join(Path(name).stem for name in names))}


def read_sweep(
    config: str,
    words: Sequence[str] = (),
    *,
    output_dir: Path | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    base: str | Sequence[str] | None = None,
    evaluate: str | None = None,
    select: str | None = None,
) -> Sweep:
    """Read a config, several with commas between, or a sweep file; arguments win over what the file says."""
    fixed, axes, swept_seeds = parse_overrides(words)
    names = split_top_level(config)
    if is_sweep_file(config):
        content = OmegaConf.to_container(load_config(config), resolve=False)
    else:
        content = sweep_of_configs(names)
    _check_keys(content, SWEEP_KEYS, f"sweep file {config}", ["arms"])
    all_seeds = seeds or swept_seeds or content.get("seeds")
    select = select or content.get("select") or SELECT
    evaluate = evaluate or content.get("evaluate")
    made = _arms_of_bases(content, _list_bases(base or content.get("base")), bool(evaluate))
    output_dir = output_dir or Path(content.get("output_dir") or Path("runs/sweeps") / Path(config).stem)
    _check_folder("output_dir", str(output_dir))
    return Sweep(
        output_dir=output_dir,
        arms=tuple(_chosen(made, arms)),
        seeds=tuple(whole_number("seeds", seed) for seed in all_seeds) if all_seeds else (None,),
        axes=axes,
        fixed={key: value for key, value in fixed.items() if key not in OF_THE_MACHINE},
        machine={key: value for key, value in fixed.items() if key in OF_THE_MACHINE},
        evaluate=evaluate,
        evaluate_overrides=_texts(content.get("evaluate_overrides")),
        select=select,
        order=tuple(dict.fromkeys(arm.name for arm in made)),
    )


def _list_bases(base: str | Sequence[str] | None) -> list[str | None]:
    bases = [base] if base is None or isinstance(base, str) else [str(one) for one in base]
    if not bases or len(set(bases)) < len(bases):
        raise InputError(f"base={bases} is empty or names a checkpoint twice; name one checkpoint, or several that differ")
    for one in filter(None, bases):
        _check_folder("base", one)
    return bases


def _check_folder(key: str, folder: str) -> None:
    """Refuse a folder that a run, whose command line is read as YAML, would read as another value."""
    try:
        read = None if "=" in folder else OmegaConf.from_dotlist([f"folder={folder}/runs"]).folder
    except (yaml.YAMLError, OmegaConfBaseException):
        read = None
    if read != f"{folder}/runs":
        raise InputError(
            f"{key}={folder} cannot be handed to the runs, whose command line reads `=`, ` #`, `: ` and brackets otherwise; "
            "name a folder without them"
        )


def _arms_of_bases(content: Mapping[str, Any], bases: Sequence[str | None], with_base: bool) -> list[Arm]:
    """Return the arms with their controls, and before them the base itself where it can be evaluated; each once per base."""
    found = []
    for base in bases:
        own = [Arm("base", "base", ())] if base and with_base else []
        own += _controls(_arms(content, base), content.get("controls"))
        found.append([replace(arm, base=base, base_name=base if len(bases) > 1 else None) for arm in own])
    return [arm for same in zip(*found, strict=True) for arm in same]


def _arms(content: Mapping[str, Any], base: str | None) -> list[Arm]:
    arms = []
    for name, node in content["arms"].items():
        node = {} if node is None else node
        _check_keys(node, ARM_KEYS, f"arm {name}")
        rows = node.get("stages") or [{"name": name, "config": node.get("config"), "overrides": node.get("overrides")}]
        stages = [_stage(row, name, _texts(content.get("overrides"))) for row in rows]
        arms.append(Arm(name, node.get("title") or name, tuple(stages), _texts(node.get("evaluate_overrides"))))
    return [_fill_base(_start_from_base(arm, base) if base else arm, base) for arm in arms]


def _start_from_base(arm: Arm, base: str) -> Arm:
    """Let the first stage start from the base, and every later one whose config starts where the first one's does."""
    own = [_own_checkpoint(stage.config) for stage in arm.stages]
    stages = [
        replace(stage, overrides={CHECKPOINT_KEY: "{base}", **stage.overrides})
        if CHECKPOINT_KEY not in stage.overrides and start == own[0] != base
        else stage
        for stage, start in zip(arm.stages, own, strict=True)
    ]
    return replace(arm, stages=tuple(stages))


def _stage(row: Mapping[str, Any], arm: str, common: Overrides) -> Stage:
    _check_keys(row, STAGE_KEYS, f"a stage of arm {arm}")
    for key in ("name", "config"):
        if not row.get(key):
            raise InputError(f"arm {arm}: a stage needs `{key}`")
    own = _texts(row.get("overrides"))
    common = {key: value for key, value in common.items() if key not in own and has_key(row["config"], key)}
    return Stage(row["name"], row["config"], common | own)


def _own_checkpoint(config: str) -> Any:
    return OmegaConf.to_container(load_config(config), resolve=False).get("checkpointer", {}).get("checkpoint_dir")


def _fill_base(arm: Arm, base: str | None) -> Arm:
    stages = []
    for stage in arm.stages:
        if base is None and any("{base}" in value for value in stage.overrides.values()):
            raise InputError(f"arm {arm.name} names {{base}}, but the sweep has no `base`; set it to a checkpoint's folder")
        stages.append(replace(stage, overrides={k: v.replace("{base}", base or "") for k, v in stage.overrides.items()}))
    return replace(arm, stages=tuple(stages))


def _controls(arms: list[Arm], controls: Mapping[str, Any] | None) -> list[Arm]:
    """Return the arms, each followed by its control arms: `pi_distill`, `pi_distill [none]`, `pi_distill [shuffled]`."""
    if not controls:
        return arms
    _check_keys(controls, CONTROL_KEYS, "controls", CONTROL_KEYS)
    known = {arm.name for arm in arms}
    for name in controls["arms"]:
        if name not in known:
            raise InputError(f"controls name the arm {name}, which the sweep lacks (it has {', '.join(sorted(known))})")
    made = []
    for arm in arms:
        made.append(arm)
        for name, overrides in controls["values"].items() if arm.name in controls["arms"] else ():
            _check_keys({name: overrides}, {name: dict}, "controls.values")
            control = replace(arm, name=f"{arm.name} [{name}]", title=f"{arm.title} [{name}]")
            made.append(with_overrides(control, _texts(overrides)))
    return made


def _chosen(arms: list[Arm], names: Sequence[str] | None) -> list[Arm]:
    if not names:
        return arms
    known = list(dict.fromkeys(arm.name for arm in arms))
    for name in names:
        if name not in known:
            raise InputError(f"arm {name} is not in the sweep{closest(name, known)}")
    return [arm for arm in arms if arm.name in names]


def as_text(value: Any) -> str:
    """Return a value of a sweep file as it is typed on a command line."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _texts(node: Mapping[str, Any] | None) -> dict[str, str]:
    return {str(key): as_text(value) for key, value in (node or {}).items()}


def _check_keys(node: Any, known: Mapping[str, Any], what: str, required: Iterable[str] = ()) -> None:
    if not isinstance(node, dict):
        raise InputError(f"{what} is {bounded_repr(node)}, and must be a mapping with {', '.join(known)}")
    for key, value in node.items():
        if key not in known:
            raise InputError(f"{what} has the key {key}, which nothing reads; known here: {', '.join(known)}")
        if value is not None and not isinstance(value, known[key]):
            raise InputError(f"{what}: {key} is {bounded_repr(value)}, and must be {TYPES[known[key]]}")
    for key in required:
        if not node.get(key):
            raise InputError(f"{what}: {key} is missing or empty; fill it")


# ------------------------------------------------------------------------------------------- from a sweep to cells


def with_overrides(arm: Arm, overrides: Overrides) -> Arm:
    """Give each override to the stages whose config has its first part; if none has, to all, and the recipe refuses it.

    What a stage takes from an earlier one (`dataset.source: "{sample}/traces.jsonl"`) stays.
    """
    stages, names = list(arm.stages), [stage.name for stage in arm.stages]
    for key, value in overrides.items():
        takes = [has_key(stage.config, key.split(".", 1)[0]) for stage in stages]
        for i, takes_it in enumerate(takes):
            earlier = any(f"{{{name}}}" in stages[i].overrides.get(key, "") for name in names[:i])
            if (takes_it or not any(takes)) and not earlier:
                stages[i] = replace(stages[i], overrides={**stages[i].overrides, key: value})
    return replace(arm, stages=tuple(stages))


def make_cell(sweep: Sweep, arm: Arm, settings: Overrides, seed: int | None) -> Cell:
    if not arm.stages:
        return Cell(arm, {}, None)
    seeds = {} if seed is None else {"seed": str(seed)}
    settings = {**sweep.fixed, **settings}  # both tell a cell from another one in the same folder
    return Cell(with_overrides(arm, {**settings, **seeds}), settings, seed)


def grid_cells(sweep: Sweep) -> list[Cell]:
    """Return arms × bases × the product of all swept values × seeds; seeds are innermost, a base itself comes once."""
    values = [[(key, value) for value in grid_values(key, axis)] for key, axis in sweep.axes.items()]
    cells: dict[str, Cell] = {}
    for arm, settings, seed in itertools.product(sweep.arms, itertools.product(*values), sweep.seeds):
        cell = make_cell(sweep, arm, dict(settings), seed)
        cells.setdefault(cell.id, cell)
    return list(cells.values())


def evaluate_overrides(sweep: Sweep, arm: Arm) -> dict[str, str]:
    """Return what a cell's evaluation runs with."""
    return {**sweep.machine, **evaluation_of(sweep, arm)}


def evaluation_of(sweep: Sweep, arm: Arm) -> dict[str, str]:
    """Return what tells one evaluation from another: where it runs does not."""
    return {**sweep.evaluate_overrides, **arm.evaluate_overrides}


@dataclass(frozen=True)
class StageRun:
    """Hold a stage of a cell: its folder (inside `OUTPUT/runs`), its command, and the hash of all that decides its result."""

    stage: Stage
    folder: Path
    command: list[str]
    fingerprint: str


def stage_runs(sweep: Sweep, cell: Cell) -> Iterator[StageRun]:
    """Return the stages of a cell in order, the folders of earlier ones filled into the overrides of later ones."""
    earlier: dict[str, StageRun] = {}
    for stage in cell.arm.stages:
        names = {name: run.folder.name for name, run in earlier.items()}
        paths = {name: str(run.folder) for name, run in earlier.items()}
        used = {name: run.fingerprint for name, run in earlier.items() if _uses(stage, name)}
        folder = sweep.output_dir / "runs" / run_name(stage.config, fill(stage.overrides, names))
        overrides = {"output_dir": str(folder), **fill(stage.overrides, paths), **sweep.machine}
        earlier[stage.name] = StageRun(stage, folder, run_command(stage.config, overrides), stage_fingerprint(stage, used))
        yield earlier[stage.name]


def run_command(config: str, overrides: Overrides) -> list[str]:
    """Return `pidistill run ...`, as it can be pasted after :func:`shlex.join`."""
    words = [f"{key}={value}" for key, value in overrides.items()]
    return ["pidistill", "run", "--nproc_per_node", "1", recipe_of(config), "--config", config, *words]


def stage_fingerprint(stage: Stage, inputs: Mapping[str, str]) -> str:
    """Return the run's fingerprint, wherever the output folder is: an earlier stage counts by its name and ``inputs``."""
    own = {key: re.sub(r"\{(\w+)\}", r"\1", value) for key, value in stage.overrides.items()}
    return fingerprint(stage.config, own, inputs)


def _uses(stage: Stage, name: str) -> bool:
    return any(f"{{{name}}}" in value for value in stage.overrides.values())


def fill(overrides: Overrides, places: Mapping[str, str]) -> dict[str, str]:
    result = dict(overrides)
    for name, place in places.items():
        result = {key: value.replace(f"{{{name}}}", place) for key, value in result.items()}
    return result


def run_name(config: str, overrides: Overrides) -> str:
    """Return `tiny-rl+objective.beta_1+seed_0`; with a hash where characters or length do not suit a folder.

    No `=`: torchtune's command line splits an override at every one of them, and a folder is the value of some.
    """
    bundled = (folders()[1] / f"{config}.yaml").is_file() and not Path(config).is_file()
    name = config.replace("/", "-") if bundled else f"{Path(config).stem}-{short_hash(str(config))[:6]}"
    text = "+".join([name, *(f"{key}_{value}" for key, value in sorted(overrides.items()))])
    return safe_name(text)


def safe_name(text: str) -> str:
    safe = re.sub(r"[^\w.+-]+", "-", text)
    return safe if safe == text and len(text) <= 100 else f"{safe[:80]}-{short_hash(text)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(config: str, overrides: Overrides, inputs: Mapping[str, str]) -> str:
    """Return a hash of the config's content with its overrides, without its output folder, and of the runs it starts from."""
    try:
        merged = OmegaConf.merge(load_config(config), OmegaConf.from_dotlist([f"{k}={v}" for k, v in overrides.items()]))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"config {config} does not take {shlex.join(overrides)} ({one_line(error)})") from error
    content = OmegaConf.to_container(merged, resolve=False)
    content.pop("output_dir", None)
    return short_hash(json.dumps([recipe_of(config), content, dict(inputs)], sort_keys=True, default=str))
