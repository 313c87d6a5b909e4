"""Kill runs at random moments and around saves: each resumes to what the run that was never killed leaves, to the bit."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.forks import Fork, forking_server
from tests.support.runs import (
    EMA,
    EVALUATION,
    MODEL,
    RECIPES,
    assert_same_tensors,
    metrics,
    quick_setup,
    save_config,
    small_config,
    training_state,
    weights,
)
from tests.support.tiny_base import make_base

ROUNDS = {"max_steps": 8, "save_every_steps": 2, "eval_every_steps": 4, **EVALUATION}
METHODS = {
    "opsd": ROUNDS | {"teacher": EMA, "environment__noise": 0.5, "rollout_log_steps": 2},
    "pi_distill": ROUNDS | {"updates_per_round": 2, "minibatch_rollouts": 3},
    "sft": ROUNDS,
}
KILLS, SIGTERMS = 25, 10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    with quick_setup():
        return make_base(tmp_path_factory.mktemp("base"), MODEL)


class Trial:
    """Starts runs in processes of their own, ends them, resumes them, and compares them with whole ones."""

    def __init__(self, server, base: Path, place: Path) -> None:
        self._server, self._base, self._place = server, base, place
        self._whole: dict[str, tuple[Path, float]] = {}
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    def start(self, method: str, folder: Path) -> Fork:
        folder.mkdir(parents=True, exist_ok=True)
        cfg = small_config(method, self._base, folder / "run", **METHODS[method], resume_from_checkpoint="auto")
        words = ["--config", str(save_config(cfg, folder / "config.yaml"))]
        return Fork(self._server, RECIPES[method], words, folder / "log")

    def whole(self, method: str) -> tuple[Path, float]:
        """Return the folder of a run that nothing ended, and the seconds that it took."""
        if method not in self._whole:
            folder, begin = self._place / f"whole_{method}", time.monotonic()
            assert self.start(method, folder).wait() == 0, (folder / "log").read_text()[-3000:]
            self._whole[method] = folder / "run", time.monotonic() - begin
        return self._whole[method]

    def resume(self, name: str, method: str, folder: Path) -> None:
        """Resume a run, and note whether it ends as the whole one did."""
        if self.start(method, folder).wait() != 0:
            self.faults.append(f"{name}: {(folder / 'log').read_text()[-600:]}")
            return
        run, whole = folder / "run", self.whole(method)[0]
        try:
            assert metrics(run) == metrics(whole), "metrics.jsonl"
            assert_same_tensors(weights(run), weights(whole), "weights")
            assert_same_tensors(training_state(run), training_state(whole), "state")
        except AssertionError as error:
            self.faults.append(f"{name}: {str(error)[:300]}")
        else:
            self.outcomes["bit-equal"] += 1


def wait_for(condition: Callable[[], bool], fork: Fork, until: float) -> None:
    while not condition() and time.monotonic() < until and Path(f"/proc/{fork.pid}").exists():
        time.sleep(0.0005)


@pytest.mark.trials
def test_every_kill_resumes_bit_equal(base, tmp_path):
    with forking_server() as server:
        trial, draw = Trial(server, base, tmp_path), random.Random(0)
        for number in range(3 * KILLS):
            method = list(METHODS)[number % 3]
            seconds, folder = trial.whole(method)[1], tmp_path / f"kill_{number}"
            fork = trial.start(method, folder)
            if number % 5 < 3:
                where = "random moment"
                time.sleep(draw.uniform(0.05, 0.9) * seconds)
            else:
                where, run, saves = "around a save", folder / "run", draw.randint(1, 3)
                for save in range(saves):
                    wait_for((run / f"step_{2 * save}").exists if save else lambda: True, fork, time.monotonic() + 60)
                    wait_for((run / ".writing").exists, fork, time.monotonic() + 60)
                time.sleep(draw.uniform(0, 0.05))
            fork.send(signal.SIGKILL)
            if fork.wait() != -signal.SIGKILL:  # the run was over before
                continue
            trial.outcomes[f"killed at {where}"] += 1
            trial.resume(f"{method} killed at {where}", method, folder)
            if trial.outcomes["bit-equal"] + len(trial.faults) == KILLS:
                break
        print(f"\nkills: {dict(trial.outcomes)}, faults {len(trial.faults)}")
    assert not trial.faults, trial.faults
    assert trial.outcomes["bit-equal"] == KILLS


@pytest.mark.trials
def test_sigterm_loses_no_step(base, tmp_path):
    with forking_server() as server:
        trial, draw = Trial(server, base, tmp_path), random.Random(1)
        for number in range(SIGTERMS):
            method = list(METHODS)[number % 3]
            seconds, folder = trial.whole(method)[1], tmp_path / f"term_{number}"
            fork = trial.start(method, folder)
            time.sleep(draw.uniform(0.1, 1.0) * seconds)
            fork.send(signal.SIGTERM)
            text = "" if fork.wait() == 0 else f"exit status {fork.wait()}; "
            text += "traceback; " if "Traceback" in fork.log.read_text() else ""
            run = folder / "run"
            rows = metrics(run) if (run / "metrics.jsonl").is_file() else []
            done = max((row["step"] for row in rows if "loss" in row), default=0)
            saved = training_state(run)["step"] if (run / "latest").exists() else 0
            text += f"step {done} was done and step {saved} is saved" if saved != done else ""
            if text:
                trial.faults.append(f"{method}: {text}")
            trial.outcomes["before training" if done == 0 else "in training" if done < 8 else "at the end"] += 1
            trial.resume(f"{method} after SIGTERM", method, folder)
        print(f"\nSIGTERM: {SIGTERMS} tried, {dict(trial.outcomes)}, faults {len(trial.faults)}")
    assert not trial.faults, trial.faults
