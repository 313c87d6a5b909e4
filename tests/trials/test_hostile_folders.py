"""Use model and adapter folders that somebody made to do harm: nothing is executed, and nothing is written outside the run.

A case changes a copy of a good folder; the folder is then checked, its tokenizer and weights are loaded, a checkpoint of a run
is saved beside its files, and the run is resumed, as the recipes do. What a case could touch outside is watched byte by byte.
"""

import json
import os
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pidistill.config import build
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.models import adapter_dir
from pidistill.teachers import LiveTeacher
from pidistill.testing import TINY_SIZES
from pidistill.training.checkpoint_source import check_checkpoint_fits, check_checkpoint_folder
from pidistill.training.checkpoints import Checkpoints
from pidistill.training.load import load_model
from pidistill.training.update import Updates
from tests.support.builders import CPU
from tests.support.tiny_qwen import VOCABULARY, qwen_checkpoint

MODEL = {"_component_": "torchtune.models.qwen2.qwen2", "vocab_size": VOCABULARY, "tie_word_embeddings": True, **TINY_SIZES}
LORA = MODEL | {
    "_component_": "torchtune.models.qwen2.lora_qwen2", "lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4,
}  # fmt: skip
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"
SECONDS = 60

Change = Callable[[Path, Path], None]  # the model folder, and the place outside


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


# ------------------------------------------------------------------------------------------------- changes


def edit_json(name: str, **values: object) -> Change:
    def change(folder: Path, outside: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(found | values))

    return change


def write(name: str, content: str | bytes) -> Change:
    """Write a file; `OUTSIDE` in its text stands for the folder outside."""

    def change(folder: Path, outside: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        data = content if isinstance(content, bytes) else content.replace("OUTSIDE", str(outside)).encode()
        path.write_bytes(data)

    return change


def sharded(file_name: object) -> Change:
    """Give the folder an index that names ``file_name`` for every tensor; `OUTSIDE` as above."""

    def change(folder: Path, outside: Path) -> None:
        name = file_name.replace("OUTSIDE", str(outside)) if isinstance(file_name, str) else file_name
        weights = load_file(folder / SHARD)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        (folder / SHARD).unlink()

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(target.replace("OUTSIDE", str(outside)))

    return change


def moved_outside(name: str) -> Change:
    """Put a file of the folder outside, and a link to it in its place."""

    def change(folder: Path, outside: Path) -> None:
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)

    return change


def pickled(name: str, *, torch_file: bool = True, keep: bool = True) -> Change:
    def change(folder: Path, outside: Path) -> None:
        attack = {"model.embed_tokens.weight": Touch(outside / "executed")}
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        torch.save(attack, path) if torch_file else path.write_bytes(pickle.dumps(attack))
        if not keep:
            (folder / SHARD).unlink(missing_ok=path.name != SHARD)

    return change


def code(folder: Path, outside: Path) -> None:
    """Add what `trust_remote_code` would import."""
    source = f"import pathlib\npathlib.Path({str(outside / 'executed')!r}).touch()\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(source)
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    edit_json("config.json", auto_map=auto_map, trust_remote_code=True)(folder, outside)
    edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})(folder, outside)


def template(text: str) -> Change:
    return lambda folder, outside: edit_json("tokenizer_config.json", chat_template=text.replace("OUTSIDE", str(outside)))(
        folder, outside
    )


def header(content: bytes, length: int | None = None) -> Change:
    """Write a safetensors file with this header, whose length may be a lie."""
    size = len(content) if length is None else length
    return lambda folder, outside: (folder / SHARD).write_bytes(size.to_bytes(8, "little") + content)


def one_tensor(shape: list[int], size: int) -> bytes:
    return json.dumps({"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()


def pipe(folder: Path, outside: Path) -> None:
    os.mkfifo(folder / "notes.txt")


def set_user_id(folder: Path, outside: Path) -> None:
    (folder / "notes.txt").write_text("notes")
    (folder / "notes.txt").chmod(0o4755)


def linked_folder(folder: Path, outside: Path) -> None:
    (outside / "private").mkdir()
    (outside / "private" / "key.txt").write_text("secret")
    (folder / "more").symlink_to(outside / "private")


def escapes_in_a_name(folder: Path, outside: Path) -> None:
    (folder / "\x1b[2J\x1b]0;owned\x07\nnotes.txt").write_text("notes")


def wrong_tensor(name: str, tensor: torch.Tensor) -> Change:
    def change(folder: Path, outside: Path) -> None:
        save_file(load_file(folder / SHARD) | {name: tensor}, folder / SHARD, metadata={"format": "pt"})

    return change


DEEP = "[" * 200_000
FOLDERS: dict[str, Change] = {
    "weight_map: absolute path": sharded("OUTSIDE/victim.safetensors"),
    "weight_map: parent folder": sharded("../outside/victim.safetensors"),
    "weight_map: subfolder": sharded("more/model.safetensors"),
    "weight_map: .": sharded("."),
    "weight_map: null": sharded(None),
    "weight_map: list": sharded(["model.safetensors"]),
    "weight_map: backslash": sharded("..\\victim.safetensors"),
    "weight_map: NUL": sharded("a\0b"),
    "weight_map: config.json": sharded("config.json"),
    "weight_map: no object": lambda f, o: (sharded("x")(f, o), write(INDEX, '{"weight_map": ["a"]}')(f, o)),
    "index: deep": lambda f, o: (sharded("x")(f, o), write(INDEX, DEEP)(f, o)),
    "index: list": lambda f, o: (sharded("x")(f, o), write(INDEX, "[]")(f, o)),
    "weights: link to a file outside": moved_outside(SHARD),
    "weights: link to a device": link(SHARD, "/dev/zero"),
    "weights: a pickle": pickled(SHARD, torch_file=False),
    "weights: a torch file": pickled(SHARD),
    "weights: a .bin pickle alone": pickled("pytorch_model.bin", keep=False),
    "weights: a .bin pickle beside": pickled("pytorch_model.bin"),
    "weights: header of 2^62 bytes": header(b"{}", 1 << 62),
    "weights: deep header": header(DEEP.encode()),
    "weights: tensor beyond the file": header(one_tensor([99999999], 399999996)),
    "weights: a shape that overflows": header(one_tensor([1 << 32] * 3, 0)),
    "weights: a tensor named like a path": wrong_tensor("../../model.norm.weight", torch.zeros(2)),
    "weights: quantised": wrong_tensor("model.layers.0.self_attn.q_proj.weight", torch.zeros(2, 2, dtype=torch.int8)),
    "state: pickle": pickled("training_state.pt"),
    "adapter: pickle beside": pickled("adapter/adapter_model.bin"),
    "code: auto_map and modules": code,
    "config: deep": write("config.json", DEEP),
    "config: not UTF-8": write("config.json", b"\xff\xfe\x00"),
    "config: a list": write("config.json", "[1]"),
    "config: link to a private file": link("config.json", "OUTSIDE/secret.txt"),
    "config: link to itself": link("config.json", "config.json"),
    "config: huge width": edit_json("config.json", hidden_size=10**18),
    "config: no heads": edit_json("config.json", num_attention_heads=0),
    "config: heads as text": edit_json("config.json", num_attention_heads="4"),
    "config: negative width": edit_json("config.json", intermediate_size=-1),
    "config: width NaN": edit_json("config.json", hidden_size=float("nan")),
    "config: width as list": edit_json("config.json", hidden_size=[64]),
    "config: width absent": edit_json("config.json", hidden_size=None),
    "config: rotations as list": edit_json("config.json", rope_parameters=[1]),
    "config: rotation base as text": edit_json("config.json", rope_parameters={"rope_theta": "__import__('os')"}),
    "config: llama3 rotations without factors": edit_json("config.json", rope_parameters={"rope_type": "llama3"}),
    "config: model_type a path": edit_json("config.json", model_type="../../evil"),
    "config: architectures a number": edit_json("config.json", architectures=7),
    "config: dtype a path": edit_json("config.json", dtype="../../evil", torch_dtype="os.system"),
    "template: os.system": template("{{ cycler.__init__.__globals__.os.system('touch OUTSIDE/executed') }}"),
    "template: subclasses": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: includes a file": template("{% include 'OUTSIDE/secret.txt' %}"),
    "template: changes the messages": template("{% set _ = messages.append(1) %}"),
    "template: no template": template("{% for %}"),
    "template: a list of templates": edit_json("tokenizer_config.json", chat_template=[{"name": "../../x", "template": "x"}]),
    "template: a list of numbers": edit_json("tokenizer_config.json", chat_template=[1]),
    "tokenizer: broken": write("tokenizer.json", "{"),
    "tokenizer: of another kind": write("tokenizer.json", '{"version": "1.0", "model": {"type": "Evil"}}'),
    "tokenizer: link outside": moved_outside("tokenizer.json"),
    "tokenizer_config: a list": write("tokenizer_config.json", "[1]"),
    "tokenizer_config: deep": write("tokenizer_config.json", DEEP),
    "tokenizer_config: token an object": edit_json("tokenizer_config.json", eos_token={"content": ["x"]}),
    "special_tokens_map: a list": write("special_tokens_map.json", "[1]"),
    "generation_config: stop tokens as text": edit_json("generation_config.json", eos_token_id="../../x"),
    "generation_config: stop token beyond": edit_json("generation_config.json", eos_token_id=[10**12, -5]),
    "generation_config: nested stop tokens": edit_json("generation_config.json", eos_token_id=[[1]]),
    "file: link to a private file": link("notes.txt", "OUTSIDE/secret.txt"),
    "file: link to nothing": link("notes.txt", "OUTSIDE/gone"),
    "file: link to itself": link("notes.txt", "notes.txt"),
    "file: link to a device": link("notes.txt", "/dev/zero"),
    "file: a pipe": pipe,
    "file: set-user-id": set_user_id,
    "file: escapes in its name": escapes_in_a_name,
    "folder: link outside": linked_folder,
    "folder: link to its parent": link("loop", ".."),
    "folder: in the place of the index": lambda f, o: (f / INDEX).mkdir(),
    "folder: in the place of the state": lambda f, o: (f / "training_state.pt").mkdir(),
}  # fmt: skip


def adapter_edit(**values: object) -> Change:
    return edit_json("adapter_config.json", **values)


def adapter_tensor(name: str, tensor: torch.Tensor) -> Change:
    def change(folder: Path, outside: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})

    return change


A_LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTERS: dict[str, Change] = {
    "adapter config: deep": write("adapter_config.json", DEEP),
    "adapter config: a list": write("adapter_config.json", "[]"),
    "adapter config: rank as text": adapter_edit(r="2"),
    "adapter config: rank 0": adapter_edit(r=0),
    "adapter config: rank infinite": adapter_edit(r=float("inf")),
    "adapter config: alpha null": adapter_edit(lora_alpha=None),
    "adapter config: pattern that takes days": adapter_edit(rank_pattern={"([a-z._0-9]+)+!": 2}),
    "adapter config: pattern of many stars": adapter_edit(alpha_pattern={".*.*.*.*.*.*.*.*.*.*!": 2}),
    "adapter config: pattern as list": adapter_edit(rank_pattern=[2]),
    "adapter config: broken pattern": adapter_edit(rank_pattern={"*": 2}),
    "adapter config: base outside": adapter_edit(base_model_name_or_path="../../../etc"),
    "adapter config: code": adapter_edit(auto_mapping={"parent_library": "os"}, peft_type="EVIL"),
    "adapter weights: a pickle": pickled("adapter_model.safetensors", torch_file=False),
    "adapter weights: a name like a path": adapter_tensor("../../x", torch.zeros(2)),
    "adapter weights: no matrix": adapter_tensor(A_LAYER, torch.zeros(2)),
    "adapter weights: no number of dimensions": adapter_tensor(A_LAYER, torch.tensor(1.0)),
    "adapter weights: layer 10^9": adapter_tensor(A_LAYER.replace("layers.0", "layers.1000000000"), torch.zeros(2, 64)),
    "adapter weights: link outside": moved_outside("adapter_model.safetensors"),
}


# ------------------------------------------------------------------------------------------------- one case


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Make a model folder and, beside it, the folder of an adapter for it."""
    place = tmp_path_factory.mktemp("good")
    texts = ["a conversation of the assistant with a user about the weather"] * 3
    folder = qwen_checkpoint(place / "model", texts, max_position_embeddings=TINY_SIZES["max_seq_len"])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    cfg = config(folder, LORA)
    run = Run(CPU, torch.float32, 0, 1, 0, place / "run")
    (place / "run").mkdir()
    points = Checkpoints(cfg, run, "m")
    model = load_model(cfg, run, cfg.model, points.load_weights(), trained=True)
    points.save(1, 1, model, Updates(cfg, run, model), LiveTeacher())
    shutil.copytree(place / "run" / "step_1" / "adapter", place / "adapter")
    dist.destroy_process_group()
    return place


def config(folder: Path, model: dict, **more: object):
    return OmegaConf.create(
        {
            "model": model,
            "checkpointer": {"_component_": "pidistill.models.HFCheckpointer", "checkpoint_dir": str(folder)},
            "tokenizer": {"_component_": "pidistill.tokenizers.HFChatTokenizer", "path": str(folder)},
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1},
            **more,
        }
    )


def use(cfg, run_folder: Path) -> None:
    """Do with the folder what a recipe does: check it, encode, load, save, resume, save."""
    check_checkpoint_folder(cfg, "checkpointer")
    check_checkpoint_fits(cfg, "checkpointer")
    adapter_dir.check_adapter_dir(cfg)
    tokenizer = build(cfg.tokenizer)
    tokenizer.encode_prompt([{"role": "user", "content": "hello"}])
    run_folder.mkdir()
    run = Run(CPU, torch.float32, 0, 1, 0, run_folder)
    for step in (1, 2):
        cfg.resume_from_checkpoint = step > 1
        points = Checkpoints(cfg, run, "m")
        model = load_model(cfg, run, cfg.model, points.load_weights(), trained=True)
        updates = Updates(cfg, run, model)
        points.restore(model, updates, LiveTeacher())
        points.save(step, step, model, updates, LiveTeacher())


class Trial:
    """Uses hostile copies of good folders, and keeps what happened."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.good, self.folder = good, folder
        self.outcomes: dict[str, str] = {}

    def try_case(self, name: str, change: Change, kind: str) -> None:
        place = self.folder / str(len(self.outcomes))
        copies = {name: shutil.copytree(self.good / name, place / name, symlinks=True) for name in ("model", "adapter")}
        outside = place / "outside"
        outside.mkdir()
        (outside / "secret.txt").write_text("secret of another user")
        shutil.copy(self.good / "model" / SHARD, outside / "victim.safetensors")
        change(copies[kind], outside)
        before = picture(place)
        more = {"adapter_dir": str(copies["adapter"])} if kind == "adapter" else {}
        outcome = self.outcome(config(copies["model"], LORA if more else MODEL, **more), place / "run")
        if (outside / "executed").exists():
            outcome = "executed"
        elif picture(place) != before:
            outcome = "wrote outside"
        elif leaked := [p for p in files_of(place / "run") if b"secret" in p.read_bytes()]:
            outcome = f"copied a private file: {leaked[0].name}"
        elif any(p.stat().st_mode & 0o7000 for p in files_of(place / "run")):
            outcome = "kept a set-user-id bit"
        elif "secret of" in outcome:
            outcome = f"showed a private file: {outcome}"
        self.outcomes[name] = outcome

    def outcome(self, cfg, run_folder: Path) -> str:
        def too_long(*_: object) -> None:
            raise TimeoutError

        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            use(cfg, run_folder)
        except InputError as error:
            return f"sentence: {error}" if "\n" not in str(error) else f"several lines: {error}"
        except TimeoutError:
            return f"hang: {SECONDS} s"
        except Exception as error:
            return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            signal.alarm(0)
        return "accepted"

    def check(self) -> None:
        counts = Counter(outcome.partition(":")[0] for outcome in self.outcomes.values())
        print(f"\nhostile folders: {len(self.outcomes)} cases, executed {counts['executed']}, {dict(counts)}")
        bad = {name: outcome for name, outcome in self.outcomes.items() if not outcome.startswith(("sentence", "accepted"))}
        for name, outcome in bad.items():
            print(f"  {name} -> {outcome}")
        print("  accepted:", ", ".join(name for name, outcome in self.outcomes.items() if outcome == "accepted"))
        for name, outcome in self.outcomes.items():
            print(f"    {name}: {outcome[:200]}")
        assert not bad, bad


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()] if folder.is_dir() else []


def picture(place: Path) -> dict[str, object]:
    """Return what stands below a folder, the run's own folder left out: names, links, sizes and bytes."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if name.split("/")[0] == "run":
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = path.is_dir()
    return found


@pytest.mark.trials
def test_no_hostile_folder_executes_or_writes_outside_and_each_refusal_is_one_sentence(good, tmp_path):
    trying = Trial(good, tmp_path)
    for kind, cases in (("model", FOLDERS), ("adapter", ADAPTERS)):
        for name, change in cases.items():
            trying.try_case(name, change, kind)
    assert len(trying.outcomes) >= 30
    trying.check()


def test_one_hostile_folder_of_each_kind_does_no_harm(good, tmp_path):
    trying = Trial(good, tmp_path)
    for name in (
        "weight_map: absolute path", "weights: a torch file", "state: pickle", "code: auto_map and modules",
        "config: heads as text", "template: os.system", "file: link to a private file", "file: a pipe",
    ):  # fmt: skip
        trying.try_case(name, FOLDERS[name], "model")
    trying.try_case("adapter config: pattern that takes days", ADAPTERS["adapter config: pattern that takes days"], "adapter")
    trying.check()
    accepted = [name for name, outcome in trying.outcomes.items() if outcome == "accepted"]
    assert accepted == ["state: pickle", "code: auto_map and modules", "file: link to a private file"]


def test_a_good_folder_and_a_good_adapter_are_accepted(good, tmp_path):
    for kind in ("model", "adapter"):
        trying = Trial(good, tmp_path / kind)
        trying.try_case("unchanged", lambda folder, outside: None, kind)
        assert trying.outcomes == {"unchanged": "accepted"}
