"""Try faults of environments, rewards and judges through the real collector: each costs its own episode, and is counted."""

import contextlib
import dataclasses
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pidistill.distributed.run import Run
from pidistill.envs import ProcessEnvironment
from pidistill.errors import StopRequest
from pidistill.privileged import PrivilegedPrompt
from pidistill.privileged.hindsight import Hindsight, add_hindsight
from pidistill.types import PromptPair, Rollout
from tests.support.episodes import LetterTokenizer, Script, collect, example
from tests.support.runs import MODEL, metrics, quick_setup, run, small_config
from tests.support.tiny_base import make_base
from tests.trials import world_faults as faults
from tests.trials.world_faults import FAULTS, FaultyShaping, FaultyText, FaultyWorld

COSTS = "costs one episode and is counted"
HARMLESS = "harmless: all episodes are kept"
ENDED = "ended the run"
HUNG = "hung"
OTHER = "other episodes were lost, or nothing was counted"
LIMIT_S = 20.0


class Hung(StopRequest):
    """Ends a case that takes too long."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def end(signum, frame):
        raise Hung

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


class Refusing(LetterTokenizer):
    """Refuses some observations, as a chat template may."""

    def encode_observations(self, history, observations, tools=None):
        if observations and observations[0]["content"] == "refuse":
            raise ValueError("the template does not know this")
        if observations and observations[0]["content"] == "exit":
            raise SystemExit(4)
        return super().encode_observations(history, observations, tools)


@dataclasses.dataclass
class Case:
    """A fault in one place; ``play`` returns (rollouts that are left of rows a to c, how many were counted as dropped)."""

    place: str
    fault: str
    play: Callable[[], tuple[list[str], int]]
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.fault}"

    def outcome(self) -> str:
        try:
            with time_limit(LIMIT_S):
                kept, dropped = self.play()
        except Hung:
            return HUNG
        except BaseException as error:
            return f"{ENDED} ({type(error).__name__})"
        if kept == ["row a", "row c"] and dropped == 1:
            return COSTS
        return HARMLESS if kept == ["row a", "row b", "row c"] and dropped == 0 else OTHER


def play(environment, **settings) -> tuple[list[str], int]:
    script = Script("x.q.", "x.q.", "x.q.", max_new_tokens=100)
    result = collect(script, environment, "abc", tokenizer=Refusing(), **settings)
    return [rollout.example.id for rollout in result.rollouts], sum(result.dropped.values())


def play_hindsight(which: str, fault: str) -> tuple[list[str], int]:
    """Ask for hindsight about three rollouts; a rollout without it stands for a lost episode."""
    tokenizer = LetterTokenizer()
    both = {"sibling": None, "feedback": None} | {which: FaultyText(fault)}
    hindsight = Hindsight(**both)
    rollouts = []
    for name in "abc":
        row = dataclasses.replace(example(name), tools=None)
        pair, turns = PromptPair(tokenizer.encode_prompt(row.messages), [1], False), [{"role": "assistant", "content": "x"}]
        for reward in (0.0, 1.0) if which == "sibling" else (0.0,):
            rollouts.append(Rollout(row, pair, [65], [True], [-1.0], "student", ord(name), "done", turns, reward))
    run = Run(torch.device("cpu"), torch.float32, rank=0, world_size=1, seed=0, output_dir=Path("unused"))
    counts = add_hindsight(hindsight, rollouts, PrivilegedPrompt(), tokenizer, run, 10**6)
    kept = [r.example.id for r in rollouts if r.reward == 0.0 and r.prompts.has_privileged]
    return kept, int(counts.get("hindsight_failures", 0))


def named(prefix: str) -> list[str]:
    return [name for name in FAULTS if name.startswith(prefix)]


def cases_in_this_process() -> list[Case]:
    cases = []

    def add(place: str, names: list[str], make: Callable[[str], Callable[[], tuple[list[str], int]]]) -> None:
        harmless = {f"step gives {name}" for name in faults.HARMLESS_STEPS}
        cases.extend(Case(place, name, make(name), name in harmless) for name in names)

    numbers = [*named("returns "), "returns a coroutine", "returns a part that is NaN"]
    numbers = [name for name in dict.fromkeys(numbers) if "too many" not in name and "a list with" not in name]
    in_reset = [name for name in named("raises ") if name != "raises InputError"]  # which says that no row can be played
    add("reset", in_reset, lambda name: lambda: play(FaultyWorld("reset", name)))
    add("first step", [*named("raises "), *named("step gives ")], lambda name: lambda: play(FaultyWorld("step", name)))
    add("last step", [*named("raises "), *named("reward is ")], lambda name: lambda: play(FaultyWorld("end", name)))
    add("reward", [*named("raises "), *numbers], lambda name: lambda: play(faults.reward_environment(name)))
    checks = [*named("raises "), *(name for name in numbers if "part" not in name)]  # of a check the number alone is used
    add("check of Constraints", checks, lambda name: lambda: play(faults.constraints_environment(name)))
    shaping = [*named("raises "), "returns None", "returns NaN", "returns text", "returns too many numbers"]
    add("reward_shaping", [*shaping, "returns a list with NaN"],
        lambda name: lambda: play(FaultyWorld("none", name), shaping=[FaultyShaping(name)]))  # fmt: skip
    for which in ("feedback", "sibling"):
        add(which, [*named("raises "), *named("writes ")], lambda name, which=which: lambda: play_hindsight(which, name))
    limited, in_step = {"environment_timeout_s": 0.3}, [*named("raises "), "hangs"]
    add("with a time limit, reset", [*in_reset, "hangs"], lambda name: lambda: play(FaultyWorld("reset", name), **limited))
    add("with a time limit, step", in_step, lambda name: lambda: play(FaultyWorld("step", name), **limited))
    threads = limited | {"environment_threads": 2}
    add("in threads, reset", ["raises KeyboardInterrupt", "raises SystemExit", "hangs"],
        lambda name: lambda: play(FaultyWorld("reset", name), **threads))  # fmt: skip
    return cases


def cases_in_worker_processes() -> list[Case]:
    def make(place: str, name: str, timeout_s: float) -> Callable[[], tuple[list[str], int]]:
        return lambda: play(ProcessEnvironment(FaultyWorld(place, name), workers=1, timeout_s=timeout_s))

    cases = []
    for place in ("reset", "step"):
        quick = [name for name in named("raises ") if (place, name) != ("reset", "raises InputError")]
        cases += [Case(f"process, {place}", name, make(place, name, 30.0)) for name in quick]
        # Long enough for a worker that is merely slow; what hangs waits for all of it.
        cases += [Case(f"process, {place}", name, make(place, name, 3.0)) for name in named("ends with ")]
    cases += [Case("process, reset", name, make("reset", name, 30.0)) for name in named("state is ")]
    return cases


def check(cases: list[Case]) -> None:
    """Play the cases, print the figures, and refuse a fault that ends the run, hangs, or is not counted."""
    start = time.monotonic()
    outcomes = [(case, case.outcome()) for case in cases]
    print_figures(outcomes, time.monotonic() - start)
    failed = [f"{case}: {outcome}" for case, outcome in outcomes if outcome != (HARMLESS if case.harmless else COSTS)]
    assert not failed, "\n".join(failed)


def print_figures(outcomes: list[tuple[Case, str]], seconds: float) -> None:
    names = (COSTS, HARMLESS, ENDED, HUNG, OTHER)
    print(f"\n{'place':26} {'tried':>6} " + " ".join(f"{name.split(':')[0][:22]:>22}" for name in names))
    for place in [*dict.fromkeys(case.place for case, _ in outcomes), "all"]:
        found = Counter(outcome.split(" (")[0] for case, outcome in outcomes if place in (case.place, "all"))
        print(f"{place:26} {found.total():6} " + " ".join(f"{found[name]:22}" for name in names))
    print(f"{len(outcomes)} cases, {len({case.fault for case, _ in outcomes})} kinds, {seconds:.0f} s", flush=True)


def test_there_are_at_least_94_kinds_of_faults():
    cases = [*cases_in_this_process(), *cases_in_worker_processes()]
    assert len({case.fault for case in cases}) >= 94
    assert len({str(case) for case in cases}) == len(cases)


def test_a_fault_in_this_process_costs_its_own_episode_and_is_counted():
    check(cases_in_this_process())


@pytest.mark.trials
def test_a_fault_in_a_worker_process_costs_its_own_episode_and_is_counted():
    check(cases_in_worker_processes())


def places_of_a_run() -> list[list[str]]:
    """Return (place, fault) of the faults that a real recipe meets, one after the other."""
    in_reset = [["reset", name] for name in named("raises ") if name != "raises InputError"]
    in_step = [["step", name] for name in (*named("raises "), *named("step gives "), *named("reward is "))]
    harmless = {f"step gives {name}" for name in faults.HARMLESS_STEPS}
    return [[place, name] for place, name in (*in_reset, *in_step) if name not in harmless]


def run_with_faults(base: Path, folder: Path, max_steps: int) -> None:
    """Train with π-Distill while every third episode has another fault; each of them is counted, and the run goes on."""
    world = {"_component_": "tests.trials.world_faults.EveryThird", "faults": places_of_a_run()}
    sizes = {"prompts_per_round": 4, "group_size": 3, "minibatch_rollouts": None, "updates_per_round": 1}
    recipe = run("pi_distill", small_config("pi_distill", base, folder, environment=world, max_steps=max_steps, **sizes))
    rows = [row for row in metrics(folder) if "rollouts" in row]
    dropped = [sum(count for key, count in row.items() if key.startswith("dropped/")) for row in rows]
    print(f"\n{max_steps} steps of a real recipe: {sum(dropped):g} of {12 * max_steps} episodes were lost and counted")
    assert [row["step"] for row in rows] == list(range(1, max_steps + 1)) and dropped == [4] * max_steps
    assert all(torch.isfinite(parameter).all() for parameter in recipe._model.parameters())


@pytest.fixture
def base(tmp_path):
    yield make_base(tmp_path / "base", MODEL)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.trials
def test_a_real_recipe_meets_all_faults_and_goes_on(base, tmp_path):
    with quick_setup():
        run_with_faults(base, tmp_path / "run", max_steps=-(-len(places_of_a_run()) // 4))


def test_a_real_recipe_meets_some_faults_and_goes_on(base, tmp_path):
    with quick_setup():
        run_with_faults(base, tmp_path / "run", max_steps=3)


def test_some_faults_in_worker_processes_cost_their_own_episode():
    chosen = {"raises KeyboardInterrupt", "raises repr and text raise BaseException", "ends with os._exit", "state is a lock"}
    cases = [case for case in cases_in_worker_processes() if case.fault in chosen and case.place == "process, reset"]
    assert len(cases) == len(chosen)
    check(cases)
