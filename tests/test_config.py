"""Test configs: nested components are built; what nothing reads, finds or gives is named before anything runs."""

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pidistill.components import MOVED, resolve
from pidistill.config import build, check_command_line, check_config, read_yaml
from pidistill.errors import InputError


@dataclass
class Box:
    """A component with an argument of every kind."""

    first: Any
    second: int = 2
    inner: Any = None


def anything(first, **rest):
    return first, rest


BOX, ANYTHING = "tests.test_config.Box", "tests.test_config.anything"


def node(**arguments):
    return {"_component_": BOX, **arguments}


# ------------------------------------------------------------------------------------------- build


def test_nested_components_are_built_inside_out():
    cfg = OmegaConf.create(
        {"seven": 7, "box": node(first=node(first="${seven}"), inner=[node(first=1), {"plain": node(first=2)}])}
    )
    assert build(cfg.box) == Box(Box(7), inner=[Box(1), {"plain": Box(2)}])


def test_what_is_no_component_comes_back_as_plain_containers():
    cfg = OmegaConf.create({"a": {"b": [1, 2, None], "c": "${a.b}"}})
    built = build(cfg.a)
    assert built == {"b": [1, 2, None], "c": [1, 2, None]}
    assert type(built) is dict and type(built["b"]) is list


def test_arguments_of_the_call_are_added_and_win():
    assert build(node(first=1, second=3), second=4) == Box(1, 4)
    assert build({"_component_": BOX, "second": 3}, "positional") == Box("positional", 3)
    assert build({"_component_": ANYTHING, "x": 1}, 0, y=2) == (0, {"x": 1, "y": 2})


def test_a_config_is_not_changed_by_building_from_it():
    cfg = OmegaConf.create({"box": node(first=node(first=1))})
    before = OmegaConf.to_yaml(cfg)
    build(cfg.box, second=9)
    assert OmegaConf.to_yaml(cfg) == before


def test_a_component_that_raises_is_refused_with_the_reason_and_its_place():
    with pytest.raises(InputError, match=r"tests.test_config.Fails cannot be built from size \(KeyError: 'inside', at .* line"):
        build({"_component_": "tests.test_config.Fails", "size": 1})


class Fails:
    def __init__(self, size):
        raise KeyError("inside")


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n b: 2", "is not valid YAML .*line"),
        ("a: 1\na: 2\n", "is not valid YAML .*duplicate key a"),
        (b"a: \xff\xfe", "is not valid YAML .*utf-8"),
        ("- 1", "is not a mapping"),
        ("3: 4", "is not a mapping"),
        ("config: 3", "has the key config"),
        ("x: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"config {path} {expected}"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "a run needs --config"),
        (["--config"], "a run needs --config"),
        (["--config", "nosuch.yaml"], "config nosuch.yaml cannot be read .*No such file"),
        (["--config", "."], r"config \. cannot be read"),
        (["--config", "good.yaml", "--lr", "3"], "--lr is not an option of a recipe"),
        (["--config", "good.yaml", "lr"], "does not take lr .*key=value"),
        (["--config", "good.yaml", "a=[1"], r"does not take a=\[1"),
        (["--config", "good.yaml", "~b"], "does not take ~b"),
        (["--config", "good.yaml", "~d"], "~d cannot remove a component from the command line; write d=null"),
        (["--config", "good.yaml", "~d.e"], "write d.e=null in its place"),
        (["--config", "good.yaml", "a=${a}"], r"does not take a=\$\{a\}"),
        (["--config=good.yaml", "a=${nowhere}"], r"does not take a=\$\{nowhere\}"),
        (["--config", "good.yaml", "c={x: 1}"], "does not take c={x: 1}"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("a: 1\nc: [1]\nd: {_component_: x.y, e: {_component_: x.z}}\n")
    with pytest.raises(InputError, match=expected):
        check_command_line(words)


def test_a_right_command_line_and_a_question_for_help_pass(tmp_path):
    (tmp_path / "good.yaml").write_text("a: 1\nb: ${a}\n")
    check_command_line(["--config", str(tmp_path / "good.yaml"), "a=2", "~b"])
    check_command_line(["--help"])


# ------------------------------------------------------------------------------------------- resolve


def test_a_module_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def reward(example, turns):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    assert resolve("my_own_rewards.reward")(None, None) == 1.0
    assert sys.path[-1] == str(tmp_path), "behind everything else: it must not shadow an installed package"


@pytest.mark.parametrize("path", ["nowhere.Thing", "pidistill.Nothing", "", ".relative.Thing", "torch..optim"])
def test_a_path_that_leads_nowhere_is_named(path):
    with pytest.raises(InputError, match=r"component .* cannot be found \(.*check the dotted path"):
        resolve(path)


def test_a_name_that_a_module_lacks_is_said_with_the_file_and_the_closest_name(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def is_brief(example, turns):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    reason = re.escape(f"({tmp_path}/rewards_of_mine.py has no is_breif; did you mean is_brief?); check the dotted path")
    with pytest.raises(InputError, match=rf"component rewards_of_mine\.is_breif cannot be found {reason}"):
        resolve("rewards_of_mine.is_breif")


def test_a_package_whose_module_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "__init__.py").write_text("")
    (tmp_path / "package_of_mine" / "parts.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for path in ("package_of_mine.parts", "package_of_mine.parts.Thing"):
        with pytest.raises(InputError, match=rf"component {path} cannot be found \(.*zero"):
            resolve(path)


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"broken_module.Thing cannot be found \(No module named 'a_module_that_is_not_there'\)"
    ):
        resolve("broken_module.Thing")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(:\n", "invalid syntax"),
        ("x = undefined\n", "undefined"),
        ("import sys\nsys.exit(3)\n", "3"),
        ("1 / 0\n", "zero"),
    ],
)
def test_a_module_that_fails_while_it_is_imported_is_refused(code, reason, tmp_path, monkeypatch):
    name = f"fails_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"component {name}.x cannot be found \(.*{reason}"):
        resolve(f"{name}.x")


# ------------------------------------------------------------------------------------------- check_config


def check(known=("box", "optimizer", "lr_scheduler", "checkpointer"), required=(), **cfg):
    check_config(OmegaConf.create(cfg), known, required)


def test_a_right_config_passes():
    check(box=node(first=None, second=3, inner=node(first=2)), required=["box"])
    check(box={"_component_": ANYTHING, "first": 1, "unknown": 2})
    check(box=[1, 2], optimizer=None)


def test_a_key_that_nothing_reads_is_refused_with_the_closest_one():
    with pytest.raises(InputError, match="config key bocks is not read by this recipe; did you mean box"):
        check(bocks=1)
    with pytest.raises(InputError, match="zzzz is not read .*; known here: box, checkpointer, lr_scheduler, optimizer"):
        check(zzzz=1)


def test_a_key_that_others_interpolate_is_read_by_them():
    check(size=4, box=node(first="${size}"))
    check(sizes={"a": 4}, box=node(first="${sizes.a}"))
    with pytest.raises(InputError, match="config key size is not read"):
        check(size=4, box=node(first="${box.second}"))


@pytest.mark.parametrize("missing", [{}, {"box": None}])
def test_a_required_key_must_have_a_value(missing):
    with pytest.raises(InputError, match="config key box is missing"):
        check(required=["box"], **missing)


def test_an_argument_that_a_component_does_not_have_is_refused_at_every_depth():
    with pytest.raises(InputError, match=r"box.secund is not an argument of tests.test_config.Box; did you mean second\?"):
        check(box=node(first=1, secund=2))
    with pytest.raises(InputError, match=r"box.inner.frist is not an argument .*; did you mean first\?"):
        check(box=node(first=1, inner={"_component_": BOX, "frist": 2}))
    with pytest.raises(InputError, match=r"box.inner\[1\].frist is not an argument .*; did you mean first\?"):
        check(box=node(first=1, inner=[{}, {"_component_": BOX, "frist": 2}]))


class Bare:
    """A component without arguments."""


def test_an_argument_of_a_component_that_takes_none_is_refused():
    with pytest.raises(InputError, match=r"box\.first is not an argument of tests.test_config.Bare; it takes none$"):
        check_config(OmegaConf.create({"box": {"_component_": "tests.test_config.Bare", "first": 1}}), {"box"})


def test_a_null_reward_is_taken_out_where_the_component_takes_none():
    bare, some = {"_component_": "tests.test_config.Bare", "reward": None}, "pidistill.envs.SingleTurn"
    cfg = OmegaConf.create({"box": node(first=bare), "list": [bare], "kept": {"_component_": some, "reward": None}, "no": None})
    check_config(cfg, set(cfg))
    assert "reward" not in cfg.box.first and "reward" not in cfg.list[0] and "reward" in cfg.kept
    assert isinstance(build(cfg.box).first, Bare)
    for other in ({"first": None}, {"reward": 1}):
        with pytest.raises(InputError, match="is not an argument of tests.test_config.Bare"):
            check_config(OmegaConf.create({"box": {"_component_": "tests.test_config.Bare", **other}}), {"box"})


def test_an_argument_that_a_component_needs_must_be_there():
    with pytest.raises(InputError, match="config key box.first is missing; tests.test_config.Box needs it"):
        check(box=node(second=1))
    with pytest.raises(InputError, match="config key box.inner.first is missing"):
        check(box=node(first=1, inner=node()))
    with pytest.raises(InputError, match="config key box.first is missing; tests.test_config.anything needs it"):
        check(box={"_component_": ANYTHING, "x": 1})


def test_arguments_that_recipes_add_need_not_be_there():
    check(optimizer={"_component_": "torch.optim.SGD", "lr": 0.1})
    check(optimizer={"_component_": BOX})  # its first argument is given by position
    check(lr_scheduler={"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 3})
    with pytest.raises(InputError, match="config key lr_scheduler.step_size is missing"):
        check(lr_scheduler={"_component_": "torch.optim.lr_scheduler.StepLR"})
    folder = {"checkpoint_dir": "a", "checkpoint_files": ["b"], "model_type": "LLAMA3"}
    check(checkpointer={"_component_": "torchtune.training.FullModelHFCheckpointer", **folder})
    with pytest.raises(InputError, match="config key box.output_dir is missing"):
        check(box={"_component_": "torchtune.training.FullModelHFCheckpointer", **folder})


def test_a_component_without_a_signature_is_let_through():
    check(box={"_component_": "builtins.dict", "a": 1})


@pytest.mark.parametrize("path", [{"_component_": BOX, "first": 1}, 3, ["a"]])
def test_a_component_that_is_no_path_is_refused(path):
    with pytest.raises(InputError, match="config key box._component_ is .*, not a dotted path; .* write box=dotted.path"):
        check(box={"_component_": path})


def test_what_passes_the_check_can_be_built():
    """The check and the call agree on which arguments a component takes."""
    cfg = OmegaConf.create({"optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.95]}})
    check(**cfg)
    optimizer = build(cfg.optimizer, [torch.nn.Parameter(torch.zeros(2))])
    assert optimizer.param_groups[0]["lr"] == 0.1


@dataclass
class Bounded:
    """A component with numbers of all kinds."""

    limit: float = math.inf
    rate: float = 0.1
    count: int | None = None
    word: int | str = 1


def test_text_or_null_in_place_of_a_number_is_refused():
    bounded = "tests.test_config.Bounded"
    check(box={"_component_": bounded, "rate": 1, "count": None, "word": "all"})
    check(box={"_component_": bounded, "rate": "${box.count}", "count": 3})
    with pytest.raises(InputError, match="box.rate=fast must be a number"):
        check(box={"_component_": bounded, "rate": "fast"})
    with pytest.raises(InputError, match="box.rate=null must be a number"):
        check(box=[{"_component_": bounded, "rate": None}][0])


def test_a_sentence_about_an_interpolated_value_does_not_show_it(monkeypatch):
    """The value may be a secret of the environment."""
    monkeypatch.setenv("A_SECRET", "hidden")
    with pytest.raises(InputError) as refused:
        check(box={"_component_": "tests.test_config.Bounded", "rate": "${oc.env:A_SECRET}"})
    assert "box.rate=${oc.env:A_SECRET} must be a number" in str(refused.value) and "hidden" not in str(refused.value)


def texts(template: str = "", names: list[str] | None = None, flag: bool = False, num_layers: int = 1):
    """A component with arguments that are no numbers."""


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("template", {"Hint": None}, "must be text; on the command line, quote text that holds a colon: 'box.template="),
        ("template", 3, "box.template=3 must be text"),
        ("names", "one", "must be a list or null"),
        ("names", [1], "must be a list or null"),
        ("flag", 1, "must be true or false"),
        ("num_layers", True, "must be a whole number"),
        ("num_layers", 2.0, "must be a whole number"),
        ("num_layers", 0, "num_layers=0 must be at least 1"),
    ],
)
def test_a_value_of_another_type_than_the_annotation_is_refused(argument, value, expected):
    check(box={"_component_": "tests.test_config.texts", "names": None, "template": "a"})
    with pytest.raises(InputError, match=re.escape(expected)):
        check(box={"_component_": "tests.test_config.texts", argument: value})


@pytest.mark.parametrize("path", ["math.pi", "tests.test_config.BOX"])
def test_a_path_to_what_cannot_be_called_is_refused(path):
    with pytest.raises(InputError, match=f"box._component_={path} is not a function or a class"):
        check(box={"_component_": path})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_at_every_depth(value):
    for path, box in {
        "box.first": node(first=value),
        r"box.first\[1\]": node(first=[0.0, value]),
        "box.inner.first": node(first=1, inner=node(first=value)),
        "box.first.start": node(first={"start": value}),
    }.items():
        with pytest.raises(InputError, match=f"config key {path} is {value}; set it to a finite number"):
            check(box=box)


def test_infinity_is_accepted_where_it_is_the_argument_s_default():
    check(box={"_component_": "tests.test_config.Bounded", "limit": math.inf})
    for wrong in (math.nan, -math.inf):
        with pytest.raises(InputError, match="config key box.limit is"):
            check(box={"_component_": "tests.test_config.Bounded", "limit": wrong})


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_component_that_has_moved_is_refused_with_its_new_path_which_exists(old):
    new = MOVED[old]
    assert resolve(new) is not None
    with pytest.raises(InputError, match=rf"component {re.escape(old)}\b.* has moved; write {re.escape(new)}"):
        resolve(old if old.rpartition(".")[2] in ("from_scratch", "byte_tokenizer") else f"{old}.anything")
