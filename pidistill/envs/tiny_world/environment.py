"""Answer the turns of the tiny world, and write what the teacher sees after an episode."""

from collections.abc import Sequence
from dataclasses import dataclass

from pidistill.envs.base import EnvStep
from pidistill.envs.tiny_world.world import SLOTS, Slot, Task, expert_decisions, privileged_text, tool_message
from pidistill.errors import InputError
from pidistill.types import Example, Message


@dataclass
class TinyWorldState:
    """Hold one episode."""

    example_id: str
    task: Task
    right_calls: int = 0  # given ones included
    retries: int = 0  # calls that were tried again
    done: bool = False
    failed_slot: Slot | None = None  # with `feedback`, what the last call got wrong; None after a right one


@dataclass(frozen=True)
class TinyWorldEnvironment:
    """Check the call after the last `act` of each turn; the first wrong one that cannot be tried again ends the episode.

    An example with ``data["given_calls"]`` starts after that many right calls, which stand in its messages and earn nothing.

    Attributes:
        process_reward: 1/3 for every right call instead of 1 for the third.
        feedback: verifier feedback. The answer to a wrong call is then `fail` (no longer part of the context: the episode is
            over), and ``state.failed_slot`` names what was wrong; :func:`feedback_privileged` turns it into privileged
            information for the next attempt.
        retries: execution feedback (RLEF, arXiv 2410.02089): so many times per episode a wrong call is answered with `fail`,
            which here is part of the context, and may be made again. The reward stays the same.
    """

    process_reward: bool = False
    feedback: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise InputError(f"environment.retries is {self.retries}; give how many wrong calls per episode may be repeated")

    def reset(self, example: Example) -> TinyWorldState:
        task = example.data.get("task")
        if not isinstance(task, Task):
            raise InputError(
                f"{example.id}: data['task'] is {task!r}, not a tiny-world Task; "
                "use a dataset of pidistill.envs.tiny_world with this environment (key `dataset`)"
            )
        return TinyWorldState(example.id, task, right_calls=example.data.get("given_calls", 0))

    def step(self, state: TinyWorldState, turn: Message, *, truncated: bool) -> EnvStep:
        """Return the reward of a right call, else 0 and `fail` or the end; a truncated turn fails, even with a whole call."""
        if state.done:
            raise InputError(f"{state.example_id}: the episode ended after {state.right_calls} right calls; reset first")
        wrong = wrong_slot(state.task, state.right_calls, turn)
        if wrong is not None or truncated:
            state.done = truncated or state.retries == self.retries
            state.retries += not state.done
            state.failed_slot = wrong if self.feedback else None
            told = [tool_message("fail")] if self.feedback or not state.done else []
            return EnvStep(told, 0.0, state.done, reward_parts=self._parts(0.0))
        state.failed_slot = None
        observation = [tool_message(f"obs {state.task.price}"), tool_message("obs ok"), None][state.right_calls]
        state.right_calls += 1
        state.done = observation is None
        reward = 1 / 3 if self.process_reward else float(state.done)
        return EnvStep([] if observation is None else [observation], reward, state.done, self._parts(reward))

    def _parts(self, reward: float) -> dict[str, float]:
        return {"right_calls_frac" if self.process_reward else "success": reward}


def wrong_slot(task: Task, turn_index: int, turn: Message) -> Slot | None:
    """Return the slot that the turn's call gets wrong, None if the call is right. Without a call the turn's slot is wrong."""
    expected = expert_decisions(task).calls[turn_index]
    call = call_words(turn)
    if call == expected:
        return None
    if turn_index == 1:
        return "a" if call[:1] == expected[:1] else "f"
    return "d" if turn_index == 0 else "k"


def call_words(turn: Message) -> list[str]:
    """Return the words after the last `act` of an assistant turn; none without one."""
    words = str(turn.get("content") or "").split()
    return words[_last_index(words, "act") + 1 :] if "act" in words else []


def _last_index(words: Sequence[str], word: str) -> int:
    return len(words) - 1 - words[::-1].index(word)


def feedback_privileged(example: Example, turns: Sequence[Message]) -> str | None:
    """Return a verifier's privileged information: the block with only the slot that the episode's last call got wrong.

    `[ ? f0 ? ? ]` where the second call named another formula. None where the last call was right: a success (after
    retries, if the environment grants them), or an episode whose turns were all right. A turn cut off by the token limit has no
    call, so that its slot counts as wrong.
    """
    environment = TinyWorldEnvironment(feedback=True, retries=len(turns))
    state = environment.reset(example)
    for turn in turns:
        if turn["role"] == "assistant" and not state.done:
            environment.step(state, turn, truncated=False)
    return None if state.failed_slot is None else privileged_text(state.task, state.failed_slot)


# ------------------------------------------------------------------------------------------------ hindsight


@dataclass(frozen=True)
class SiblingCalls:
    """Write a successful episode's privileged information: the block with what its calls named (``hindsight.sibling``).

    Attributes:
        told: letters of the slots that are told, as in :func:`tiny_world_dataset`.
    """

    told: str = "dfk"

    def __call__(self, example: Example, turns: Sequence[Message]) -> str:
        words = {}
        said = [call_words(turn) for turn in turns if turn["role"] == "assistant"]
        for first, second in (call for call in said if len(call) == 2):  # where calls may be made again, some are malformed
            words |= {"look": {"d": second}, "ship": {"k": second}}.get(first, {"f": first, "a": second})
        return " ".join(["[", *(words[slot] if slot in self.told and slot in words else "?" for slot in SLOTS), "]"])


class VerifierFeedback:
    """Call :func:`feedback_privileged`, as a component (``hindsight.feedback``)."""

    def __call__(self, example: Example, turns: Sequence[Message]) -> str | None:
        return feedback_privileged(example, turns)
