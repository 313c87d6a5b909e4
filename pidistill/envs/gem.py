"""Play games and reasoning tasks of GEM (the extra `gem`; arXiv 2510.01051) as episodes of this package.

    gem.make(env_id).reset(seed)   the row's user message, once, when the dataset is made
    assistant turn                 → step(text) → observation as a user message, reward, end where terminated or truncated

GEM's environments draw from Python's and numpy's global streams; here each episode has streams of its own.
"""

import hashlib
import importlib
import inspect
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pidistill.chat.tool_calls import visible_text
from pidistill.data.dataset import ExampleDataset
from pidistill.envs.base import EnvStep
from pidistill.envs.extras import load_extra
from pidistill.envs.reasoning_gym import check_task
from pidistill.envs.streams import RandomStreams
from pidistill.errors import InputError, check_choice, check_count
from pidistill.types import Example, Message

HIDDEN: dict[str, Callable[[Any], str]] = {
    "GuessTheNumber": lambda env: f"The target number is {env.game_number}.",
    "Mastermind": lambda env: f"The secret code is {' '.join(map(str, env.game_code))}.",
    "Sudoku": lambda env: f"The solved grid is:\n{_as_text(env.full_grid)}",
    "Wordle": lambda env: f"The secret word is {env.secret_word}.",
    "Hangman": lambda env: f"The secret word is {env.secret_word}.",
}
"""Game → what a seeded reset has decided and does not show: the privileged information."""

_CHECKED_ROWS = 2  # made twice, to see whether the seed decides everything


@dataclass
class GEMEpisode:
    """Hold a GEM environment after its reset, and its random streams."""

    env: Any
    streams: RandomStreams


@dataclass(frozen=True)
class SavedStart:
    """Hold a pickled :class:`GEMEpisode` of this run. Bytes in a row could come from a file, and unpickling them runs code."""

    pickled: bytes


@dataclass(frozen=True)
class GEMEnvironment:
    """Play the rows of :func:`gem_dataset`; rewards are GEM's, each in [-0.1, 1] for its games.

    One call at a time per process, since the random streams are the process's: a call that hangs keeps them, and every later
    one is late too. For games that are slow or may hang, wrap it in :class:`pidistill.envs.ProcessEnvironment`.
    """

    def reset(self, example: Example) -> GEMEpisode:
        start = example.data.get("gem_start")
        if not isinstance(start, SavedStart):
            raise InputError(f"{example.id} holds no GEM episode; GEMEnvironment plays the rows of pidistill.envs.gem_dataset")
        return pickle.loads(start.pickled)

    def step(self, state: GEMEpisode, turn: Message, *, truncated: bool) -> EnvStep:
        text = visible_text(turn)
        with state.streams.in_use():
            observation, reward, terminated, out_of_time, info = state.env.step(text)
        done = bool(terminated or out_of_time)
        return EnvStep([] if done else [_user(observation, info)], reward, done)


def gem_dataset(
    env_id: str,
    n: int,
    seed: int = 0,
    privileged: Literal["hidden", "none"] = "hidden",
    privileged_attribute: str | None = None,
    completion: Literal["random_actions"] | None = None,
    system_prompt: str | None = None,
    options: Mapping[str, Any] | None = None,
    allow_evaluated_answers: bool = False,
) -> ExampleDataset:
    """Return ``n`` seeded starts of one of GEM's games (`game:...`) or reasoning tasks (`rg:...`).

    The rows depend only on the arguments. Small games have few different starts (GuessTheNumber-v0-easy has ten), so that two
    seeds share most of them.

    Args:
        env_id: as `gem.print_envs()` lists them, e.g. "game:GuessTheNumber-v0-easy".
        privileged: "hidden" is what :data:`HIDDEN` tells of the game, the answer of a reasoning task, and nothing where the
            player sees everything (2048, Sokoban); "none" is none.
        privileged_attribute: in its place, an attribute of the game's object after the reset, as text.
        completion: "random_actions": an episode of GEM's own random actions as the demonstration, for a base that knows the
            form of an answer and nothing else.
        system_prompt: a system message before the game's own text.
        options: arguments of the environment that replace its own, e.g. {max_turns: 6}.
        allow_evaluated_answers: see :data:`pidistill.envs.reasoning_gym.EVALUATED`.
    """
    check_count("dataset.n", n)
    check_choice("dataset.privileged", privileged, ("hidden", "none"))
    check_choice("dataset.completion", completion, (None, "random_actions"))
    options = dict(options or {})
    _check(env_id, options, allow_evaluated_answers)
    rows = []
    for row in range(n):
        start = _Start(env_id, _row_seed(env_id, seed, row), options)
        if row < _CHECKED_ROWS and start.message != _Start(env_id, start.seed, start.options).message:
            raise InputError(
                f"dataset.env_id={env_id} starts differently at the same seed, so that ranks and resumed runs would disagree; "
                "choose another environment"
            )
        told = None if privileged == "none" else start.hidden(privileged_attribute)
        given = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        rows.append(
            Example(
                id=f"{env_id} seed {seed} row {row}",
                messages=[*given, start.message],
                privileged=told,
                data={"env_id": env_id, "seed": start.seed, "gem_start": SavedStart(start.pickled)},
                completion=start.random_actions() if completion else None,
            )
        )
    return ExampleDataset(rows)


def _row_seed(env_id: str, seed: int, row: int) -> int:
    """Return a seed of 32 bits, as numpy's global stream takes it."""
    return int.from_bytes(hashlib.blake2b(f"{env_id},{seed},{row}".encode(), digest_size=4).digest(), "big")


def _check(env_id: str, options: Mapping[str, Any], allow_evaluated_answers: bool) -> None:
    load_extra("gem", "gem")
    registry = importlib.import_module("gem.envs.registration").ENV_REGISTRY
    if env_id not in registry:
        raise InputError(f"dataset.env_id is {env_id!r}, which gem does not have; `gem.print_envs()` lists what it has")
    family, _, task = env_id.partition(":")
    if family not in ("game", "rg"):
        raise InputError(
            f"dataset.env_id is {env_id!r}; of GEM's environments the games (game:) and reasoning tasks (rg:) are supported, "
            "not those that take rows from the Hub or run programs"
        )
    if family == "rg":
        check_task(task, allow_evaluated_answers)
    module, _, name = registry[env_id].entry_point.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    for key in options:  # its own constructors take any key and drop what they do not know
        if key not in known:
            raise InputError(f"dataset.options has {key!r}, which {env_id} does not take; it takes {', '.join(known)}")


class _Start:
    """Hold a seeded reset: what the player sees, what it does not see, and the episode to be played from there."""

    def __init__(self, env_id: str, seed: int, options: Mapping[str, Any]) -> None:
        self.env_id, self.seed, self.options = env_id, seed, options
        streams = RandomStreams(seed)
        try:
            with streams.in_use():
                env = importlib.import_module("gem").make(env_id, **options)
                observation, info = env.reset(seed=seed)
            self.pickled = pickle.dumps(GEMEpisode(env, streams))
        except Exception as error:
            told = f"{env_id} cannot be started with {dict(options)} ({_first_words(error)}){_hint(error)}"
            raise InputError(told) from error
        self.message, self._env = _user(observation, info), env

    def hidden(self, attribute: str | None) -> str | None:
        if attribute is not None:
            if not hasattr(self._env, attribute):
                known = ", ".join(sorted(vars(self._env)))
                raise InputError(f"dataset.privileged_attribute is {attribute!r}, and {self.env_id} has {known}")
            return _as_text(getattr(self._env, attribute))
        if self.env_id.startswith("rg:"):
            answer = self._env.data["answer"]
            return None if answer is None else f"The answer is {answer}."
        game = re.match(r"game:(\w+?)-v", self.env_id)
        return HIDDEN[game[1]](self._env) if game and game[1] in HIDDEN else None

    def random_actions(self) -> list[Message]:
        """Play an episode of `sample_random_action`, which most games have, and return its messages."""
        episode, environment, turns = pickle.loads(self.pickled), GEMEnvironment(), []
        streams = RandomStreams(self.seed ^ 1)  # not the episode's, whose draws decide what these turns are answered
        while True:
            try:
                with streams.in_use():
                    turns.append({"role": "assistant", "content": episode.env.sample_random_action()})
            except NotImplementedError as error:
                raise InputError(f"{self.env_id} has no random actions; remove dataset.completion") from error
            step = environment.step(episode, turns[-1], truncated=False)
            if step.done:
                return turns
            turns += step.observations


def _user(observation: str, info: Mapping[str, Any]) -> Message:
    """Return an observation as GEM shows it: the text, and what the environment asks for next."""
    suffix = info.get("suffix")
    return {"role": "user", "content": f"{observation.rstrip()}\n{suffix}" if suffix else observation}


def _as_text(value: Any) -> str:
    """Return a grid as rows of words, and anything else as Python prints it."""
    if isinstance(value, list | tuple) and value and all(isinstance(row, list | tuple) for row in value):
        return "\n".join(" ".join(map(str, row)) for row in value)
    return str(value)


def _first_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).replace('*', ' ').split())[:120]}"


def _hint(error: Exception) -> str:
    if isinstance(error, LookupError) and "nltk" in str(error):
        return "; it needs NLTK's word list: run `python -m nltk.downloader words` once"
    if "pickle" in str(error):
        return "; its state cannot be copied as bytes: of a reasoning task use pidistill.envs.reasoning_gym_dataset"
    return "; check dataset.env_id and dataset.options"
