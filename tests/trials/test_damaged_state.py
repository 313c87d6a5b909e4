"""Resume runs whose folder was damaged: every case ends in the right run or in one sentence, and no saved work is destroyed.

A case damages a copy of a stopped run's folder and resumes it. "Right" means: the run ends with the weights of the run that
was never stopped, to the bit. Saved work is every file of a checkpoint: its bytes are somewhere in the folder afterwards.
"""

import contextlib
import hashlib
import os
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pidistill.errors import InputError
from pidistill.training import run_folder
from pidistill.training.disk import is_disk_fault
from tests.support.runs import MODEL, assert_same_tensors, quick_setup, run, small_config, stop_after_row, weights
from tests.support.tiny_base import make_base

STATE = "training_state.pt"
SETTINGS = {"max_steps": 6, "save_every_steps": 2, "rollout_log_steps": 2}
EMA = {"_component_": "pidistill.teachers.EMATeacher", "rate": 0.3}
METHODS = {"opsd": SETTINGS | {"teacher": EMA}, "sft": {k: v for k, v in SETTINGS.items() if k != "rollout_log_steps"}}
STOPPED_AFTER = 5  # step_2 and step_4 are saved

Damage = Callable[[Path], None]


# ------------------------------------------------------------------------------------------------- damages to one file


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_the_second_half(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x40
    path.write_bytes(content)


def other_bytes(path: Path) -> None:
    path.write_bytes(b"\xff\xfe<html>404 not found</html>" * 20)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = (
    cut, empty, zero, zero_the_second_half, flip_a_byte, other_bytes, remove, replace_by_a_folder,
    link_to_nothing, link_to_itself,
)  # fmt: skip


def take_the_file_of_the_other_step(path: Path) -> None:
    shutil.copy(path.parent.parent / "step_2" / path.name, path)


# ------------------------------------------------------------------------------------------------- damages to the folder


def remove_tree(name: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / name)


def relink(target: str) -> Damage:
    def change(folder: Path) -> None:
        (folder / "latest").unlink()
        (folder / "latest").symlink_to(target)

    return change


def latest_is_a_file(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").write_text("step_4")


def latest_is_an_empty_folder(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").mkdir()


def latest_is_a_copy(folder: Path) -> None:
    (folder / "latest").unlink()
    shutil.copytree(folder / "step_4", folder / "latest")


def latest_leads_to_a_copy_outside(folder: Path) -> None:
    shutil.copytree(folder / "step_4", folder.parent / "outside")
    relink(str(folder.parent / "outside"))(folder)


def swap_the_steps(folder: Path) -> None:
    (folder / "step_2").rename(folder / "aside")
    (folder / "step_4").rename(folder / "step_2")
    (folder / "aside").rename(folder / "step_4")


def step_is_a_link_to_another_disk(folder: Path) -> None:
    shutil.move(folder / "step_4", folder.parent / "disk")
    (folder / "step_4").symlink_to(folder.parent / "disk")


def step_is_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "step_4")
    (folder / "step_4").write_text("")


def next_step_is_a_file(folder: Path) -> None:
    (folder / "step_6").write_text("notes")


def next_step_is_a_folder_of_notes(folder: Path) -> None:
    (folder / "step_6").mkdir()
    (folder / "step_6" / "notes.txt").write_text("notes")


def rest_of_a_killed_save(folder: Path) -> None:
    shutil.copytree(folder / "step_4", folder / ".writing" / "epoch_0")


def writing_is_a_file(folder: Path) -> None:
    (folder / ".writing").write_text("")


def writing_leads_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("precious")
    (folder / ".writing").symlink_to(outside)


def lock_is_a_folder(folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").mkdir()


def lock_is_a_link_to_a_file(folder: Path) -> None:
    (folder.parent / "precious.txt").write_text("precious")
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").symlink_to(folder.parent / "precious.txt")


def metrics_lead_outside(folder: Path) -> None:
    (folder.parent / "precious.txt").write_text((folder / "metrics.jsonl").read_text())
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(folder.parent / "precious.txt")


def config_leads_outside(folder: Path) -> None:
    (folder.parent / "precious.txt").write_text("precious: true\n")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(folder.parent / "precious.txt")


def edit_state(**changes: object) -> Damage:
    """Change entries of training_state.pt; ``...`` removes one."""

    def change(folder: Path) -> None:
        path = folder / "step_4" / STATE
        state = torch.load(path, weights_only=True) | changes
        torch.save({key: value for key, value in state.items() if value is not ...}, path)

    return change


def pickle_in_the_state(folder: Path) -> None:
    torch.save({"step": Touch(folder.parent / "executed")}, folder / "step_4" / STATE)


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        (path,) = (folder / "step_4").glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def drop_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def add_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(2, 2)


def reshape_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def change_one_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][-1, -1] += 1e-3


def nan_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] = float("nan")


def lines(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(b"".join(change((folder / name).read_bytes().splitlines(keepends=True))))

    return damage


FOLDER_DAMAGES: dict[str, Damage] = {
    "latest removed": lambda folder: (folder / "latest").unlink(),
    "latest to nothing": relink("step_99"),
    "latest to itself": relink("latest"),
    "latest to the older step": relink("step_2"),
    "latest to the run's folder": relink("."),
    "latest to /": relink("/"),
    "latest is a file": latest_is_a_file,
    "latest is an empty folder": latest_is_an_empty_folder,
    "latest is a copy": latest_is_a_copy,
    "latest leads to a copy outside": latest_leads_to_a_copy_outside,
    "newest step removed": remove_tree("step_4"),
    "older step removed": remove_tree("step_2"),
    "steps swapped": swap_the_steps,
    "step is a link to another disk": step_is_a_link_to_another_disk,
    "step is a file": step_is_a_file,
    "next step is a file": next_step_is_a_file,
    "next step is a folder of notes": next_step_is_a_folder_of_notes,
    "rest of a killed save": rest_of_a_killed_save,
    ".writing is a file": writing_is_a_file,
    ".writing leads outside": writing_leads_outside,
    ".lock is a folder": lock_is_a_folder,
    ".lock is a link to a file": lock_is_a_link_to_a_file,
    "metrics lead outside": metrics_lead_outside,
    "config.yaml leads outside": config_leads_outside,
    "state of another step": edit_state(step=2),
    "state of a step as text": edit_state(step="four"),
    "state of a negative step": edit_state(step=-4),
    "state without its optimizer": edit_state(optimizer=...),
    "state with an empty optimizer": edit_state(optimizer={}),
    "state without its round": edit_state(round=...),
    "state with a round of text": edit_state(round="two"),
    "state without random state": edit_state(rng=...),
    "state with random state of no rank": edit_state(rng=[]),
    "state with random state of another kind": edit_state(rng=[{"torch": 1}]),
    "state without its scheduler": edit_state(scheduler=...),
    "state with a scheduler of another kind": edit_state(scheduler=[1]),
    "state without its teacher": edit_state(teacher=...),
    "state with must_match as text": edit_state(must_match="seed"),
    "state with another method": edit_state(method="other"),
    "state with a format of text": edit_state(format="new"),
    "state of a later format": edit_state(format=99),
    "state without skipped steps": edit_state(skipped_steps=...),
    "state is a list": lambda folder: torch.save([1, 2], folder / "step_4" / STATE),
    "state is a pickle that executes": pickle_in_the_state,
    "weights lack a tensor": edit_weights(drop_a_tensor),
    "weights have one more tensor": edit_weights(add_a_tensor),
    "weights have another shape": edit_weights(reshape_a_tensor),
    "one weight changed": edit_weights(change_one_weight),
    "one weight is NaN": edit_weights(nan_weight),
    "metrics: last line cut": lines("metrics.jsonl", lambda rows: [*rows[:-1], rows[-1][:9]]),
    "metrics: a line of zeros": lines("metrics.jsonl", lambda rows: [rows[0], bytes(60) + b"\n", *rows[1:]]),
    "metrics: a line without a step": lines("metrics.jsonl", lambda rows: [*rows, b'{"loss": 1}\n']),
    "metrics: a number for a line": lines("metrics.jsonl", lambda rows: [b"7\n", *rows]),
    "metrics: deep nesting": lines("metrics.jsonl", lambda rows: [b"[" * 100_000 + b"\n", *rows]),
    "metrics: alarms of another kind": lines("metrics.jsonl", lambda rows: [b'{"step": 1, "loss": "x", "alarms": 3}\n', *rows]),
    "metrics: step as text": lines("metrics.jsonl", lambda rows: [b'{"step": "1"}\n', *rows]),
    "metrics: step is NaN": lines("metrics.jsonl", lambda rows: [b'{"step": NaN, "loss": 1}\n', *rows]),
    "rollouts: cut": lines("rollouts.jsonl", lambda rows: [*rows[:-1], rows[-1][:9]]),
}  # fmt: skip
FILES = (STATE, "*.safetensors", "config.json", "model.safetensors.index.json")
RUN_FILES = ("metrics.jsonl", "rollouts.jsonl", "config.yaml")


def damages() -> dict[str, Damage]:
    """Name every case, and give what it does to the folder of a run."""

    def in_step(pattern: str, damage: Damage) -> Damage:
        return lambda folder: damage(next((folder / "step_4").glob(pattern)))

    found = dict(FOLDER_DAMAGES)
    for damage in DAMAGES:
        name = damage.__name__.replace("_", " ")
        found |= {f"{pattern}: {name}": in_step(pattern, damage) for pattern in FILES}
        found |= {f"{file}: {name}": (lambda folder, d=damage, f=file: d(folder / f)) for file in RUN_FILES}
    other = take_the_file_of_the_other_step
    found |= {f"{pattern}: {other.__name__.replace('_', ' ')}": in_step(pattern, other) for pattern in FILES[:2]}
    return found


# ------------------------------------------------------------------------------------------------- one case


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_setup():
        yield


@pytest.fixture(autouse=True)
def no_group_left():
    threads = torch.get_num_threads()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), MODEL)


class Trial:
    """Damages copies of one stopped run and resumes them."""

    def __init__(self, method: str, base: Path, folder: Path) -> None:
        self.method, self.base, self.folder = method, base, folder
        self.whole, self.stopped = folder / "whole", folder / "stopped"
        run(method, self.config(self.whole))
        run(method, self.config(self.stopped), stop_after_row(STOPPED_AFTER))
        self.expected = weights(self.whole)
        self.outcomes: dict[str, str] = {}
        self.destroyed: list[str] = []

    def config(self, folder: Path, **more: object):
        return small_config(self.method, self.base, folder, **METHODS[self.method], **more)

    def try_case(self, name: str, damage: Damage, around: Callable[[], contextlib.AbstractContextManager] | None = None) -> str:
        place = self.folder / "cases" / str(len(self.outcomes))
        place.mkdir(parents=True)
        copy = shutil.copytree(self.stopped, place / "run", symlinks=True)
        (copy / ".lock").unlink(missing_ok=True)
        damage(copy)
        before = saved_work(place)
        with around() if around else contextlib.nullcontext():
            outcome = self.resume(copy)
        if (place / "executed").exists():
            outcome = "executed"
        after = saved_work(place)
        lost = {before[one] for one in before.keys() - after.keys()}
        if outcome == "right":  # a step that was trained again to the same weights has its state again, which counts log lines
            lost -= {one for one in after.values() if one.endswith("training_state.pt")}
        if lost:
            self.destroyed.append(f"{name}: {', '.join(sorted(lost))}")
        self.outcomes[name] = outcome
        shutil.rmtree(place)
        return outcome

    def resume(self, copy: Path) -> str:
        try:
            run(self.method, self.config(copy, resume_from_checkpoint=True))
        except InputError as error:
            return f"sentence: {error}" if "\n" not in str(error) else f"several lines: {error}"
        except Exception as error:
            if is_disk_fault(error):  # `one_sentence_errors` says so
                return f"sentence: {error}"
            return f"traceback: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:
            assert_same_tensors(weights(copy), self.expected)
        except AssertionError:
            return "wrong: ended with other weights"
        return "right"

    def figures(self) -> str:
        counts = Counter(outcome.partition(":")[0] for outcome in self.outcomes.values())
        return f"damaged state, {self.method}: {len(self.outcomes)} cases, {dict(counts)}, destroyed {len(self.destroyed)}"

    def check(self) -> None:
        print(f"\n{self.figures()} {self.destroyed or ''}")
        bad = {name: outcome for name, outcome in self.outcomes.items() if not outcome.startswith(("right", "sentence"))}
        for name, outcome in (bad or {}).items():
            print(f"  {name} -> {outcome}")
        assert not self.destroyed, self.destroyed
        assert not bad, bad


def saved_work(place: Path) -> dict[str, str]:
    """Return the files of all checkpoints below a folder, and of what stands beside the run's folder: names by hash."""
    files = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    kept = [path for path in files if path.parent.name != "run" or path.parent.parent != place]
    kept = [path for path in kept if path.name not in ("executed", ".writing")]
    return {hashlib.sha256(path.read_bytes()).hexdigest(): str(path.relative_to(place)) for path in kept}


@pytest.fixture(scope="module")
def trial(base, tmp_path_factory) -> Iterator[Callable[[str], Trial]]:
    yield lambda method: Trial(method, base, tmp_path_factory.mktemp(method))


@pytest.fixture(autouse=True)
def own_locks(monkeypatch):
    monkeypatch.setattr(run_folder, "_locks", {})


# ------------------------------------------------------------------------------------------------- the trials


@pytest.mark.trials
@pytest.mark.parametrize("method", METHODS)
def test_every_damage_ends_in_the_right_run_or_in_one_sentence(method, trial):
    trying = trial(method)
    for name, damage in damages().items():
        if "rollouts" in name and method == "sft":
            continue
        trying.try_case(name, damage)
    assert len(trying.outcomes) >= 77
    trying.check()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Refuse to write beyond ``size`` bytes of a file, as a disk does that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_full_disk(trying: Trial, sizes: tuple[int, ...]) -> None:
    """Resume with each limit, then without one: the first is one sentence, the second the right run."""
    for size in sizes:
        copy = shutil.copytree(trying.stopped, trying.folder / f"full_{size}" / "run", symlinks=True)
        (copy / ".lock").unlink()
        before = saved_work(copy.parent)
        with largest_file(size):
            trying.outcomes[f"files of at most {size:,} bytes"] = trying.resume(copy)
        assert not before.keys() - saved_work(copy.parent).keys(), size
        run_folder._locks.clear()
        trying.outcomes[f"files of at most {size:,} bytes, then space"] = trying.resume(copy)


@pytest.mark.trials
@pytest.mark.parametrize("method", METHODS)
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_resumes_once_there_is_space(method, trial):
    trying = trial(method)
    check_full_disk(trying, (0, 100, 1_000, 5_000, 20_000, 50_000, 80_000, 120_000, 200_000))
    trying.check()


@pytest.mark.trials
def test_a_full_file_system_is_one_sentence_and_the_run_resumes_once_there_is_space(trial, tmp_path):
    trying = trial("opsd")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        copy = shutil.copytree(trying.stopped, tmp_path / "run", symlinks=True)
        before = saved_work(tmp_path)
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - 65_536)
        trying.outcomes["64 KiB left"] = trying.resume(copy)
        assert not before.keys() - saved_work(tmp_path).keys()
        filler.unlink()
        run_folder._locks.clear()
        trying.outcomes["64 KiB left, then space"] = trying.resume(copy)
    finally:
        run_folder._locks.clear()
        subprocess.run(["umount", str(tmp_path)], check=False)
    trying.check()
    assert trying.outcomes["64 KiB left"].startswith("sentence")


def test_one_damage_of_each_kind_ends_in_the_right_run_or_in_one_sentence(trial):
    trying = trial("sft")
    for name in (
        "latest removed", "next step is a folder of notes", ".lock is a link to a file", "state of another step",
        "state is a pickle that executes", "one weight changed", f"{STATE}: flip a byte", "config.json: cut",
        "config.yaml: zero",
        "*.safetensors: take the file of the other step",
    ):  # fmt: skip
        trying.try_case(name, damages()[name])
    check_full_disk(trying, (20_000,))
    trying.check()
    assert trying.outcomes["files of at most 20,000 bytes"].startswith("sentence")
