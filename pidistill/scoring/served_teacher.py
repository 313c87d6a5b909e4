"""A teacher on a server: token ids go out, the log-probs of the completion's tokens come back.

The server is OpenAI-compatible and gives prompt log-probs, as vLLM's `/v1/completions` does with `prompt_logprobs`. Only the
sampled tokens' log-probs come back, so that the objectives are those that need no more of a teacher: OPD and Semi-OPD in their
sampled forms, OPD as PPO, SDAR, RLSD. Each rank asks for its own rollouts, several at once, and asks for a rollout once: its
numbers are kept as long as it lives.
"""

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.errors import InputError
from pidistill.models.protocol import Decoder
from pidistill.objectives.base import BOTH_KLS, Objective
from pidistill.privileged.judges import RETRIED, Exchange, JudgeError
from pidistill.scoring.batch import policy_positions
from pidistill.teachers import MixturePart, Teacher
from pidistill.types import Rollout, RolloutKey, ScoreRequest, Scores

MAX_ANSWER_BYTES = 64_000_000

NOTHING_ELSE = (
    "a ServedTeacher gives the log-probs of the sampled tokens and nothing else of its distribution; set an objective that "
    "needs no more (OPD with divergence: sampled, OPDPPO, SDAR, RLSD, SemiOPD with form: k2), or another teacher"
)


class ServedTeacher(Teacher):
    """Score the teacher's view with a model that a server holds; it must have the student's tokenizer.

    Args:
        base_url: of the server, e.g. ``http://localhost:8000/v1``.
        model: the name under which the server knows the model.
        key_env: the environment variable that holds the server's key; None for none.
        threads: requests that are under way at once.
        timeout_s: seconds for one request, all of it.
        retries, backoff_s: further tries of a request that failed, after backoff_s, twice that, …
    """

    own_weights = False
    can_sample = False

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str | None = None,
        threads: int = 8,
        timeout_s: float = 120.0,
        retries: int = 3,
        backoff_s: float = 1.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")) or "@" in base_url:
            raise InputError("teacher.base_url must look like http://localhost:8000/v1; a key goes into teacher.key_env")
        if threads < 1 or timeout_s <= 0 or retries < 0 or backoff_s < 0:
            raise InputError(
                f"teacher.threads={threads} must be at least 1, teacher.timeout_s={timeout_s} above 0, teacher.retries="
                f"{retries} and teacher.backoff_s={backoff_s} at least 0"
            )
        if key_env is not None and not os.environ.get(key_env):
            raise InputError(
                f"the environment variable {key_env} (teacher.key_env) is not set; set it, or teacher.key_env: null"
            )
        self.base_url, self.model, self.key_env = base_url.rstrip("/"), model, key_env
        self.threads, self.timeout_s, self.retries, self.backoff_s = threads, timeout_s, retries, backoff_s
        self._known: WeakKeyDictionary[RolloutKey, list[float]] = WeakKeyDictionary()

    def mixture(self, model: Decoder) -> list[MixturePart]:
        raise InputError(NOTHING_ELSE)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Return the log-prob of each policy token of each rollout in the teacher's view, in nats."""
        asked = [rollout for rollout in rollouts if rollout.key not in self._known]
        if asked:
            with ThreadPoolExecutor(self.threads) as threads:
                for rollout, numbers in zip(asked, threads.map(self._ask, asked), strict=True):
                    self._known[rollout.key] = numbers
        return [self._known[rollout.key] for rollout in rollouts]

    def _ask(self, rollout: Rollout) -> list[float]:
        prompt = rollout.prompts.teacher
        ids = prompt + rollout.completion
        given = self._prompt_logprobs(ids, rollout.example.id)
        places = [len(prompt) + t for t in policy_positions(rollout)]
        return [_logprob_of(given, place, ids[place], rollout.example.id) for place in places]

    def _prompt_logprobs(self, ids: list[int], where: str) -> list[Any]:
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        url = f"{self.base_url}/completions"
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
            try:
                answer = json.loads(Exchange(request, self.timeout_s, MAX_ANSWER_BYTES).answer())
                given = answer["choices"][0].get("prompt_logprobs")
            except urllib.error.HTTPError as error:
                error.close()
                reason, again = f"status {error.code}", error.code in RETRIED
            except (OSError, http.client.HTTPException, JudgeError) as error:  # URLError and time-outs are OSErrors
                reason, again = type(getattr(error, "reason", error)).__name__, True
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                reason, again = "an answer that is no completion", True
            else:
                if isinstance(given, list) and len(given) == len(ids):
                    return given
                reason, again = f"no prompt_logprobs for its {len(ids)} tokens", False
            if not again or attempt == self.retries:
                break
            time.sleep(self.backoff_s * 2**attempt)
        raise InputError(
            f"the teacher's server at {self.base_url} gave {reason} for {where} ({attempt + 1} tries); check teacher.base_url, "
            "teacher.model and that the server gives prompt log-probs, or raise teacher.timeout_s and teacher.retries"
        )


def _logprob_of(given: list[Any], place: int, token: int, where: str) -> float:
    """Return the log-prob of ``token`` from the server's entry {id: {"logprob": …}} of its place."""
    entry = given[place]
    number = (entry or {}).get(str(token)) if isinstance(entry, dict) or entry is None else None
    value = number.get("logprob") if isinstance(number, dict) else number
    if type(value) not in (int, float) or math.isnan(value) or value > 1e-3:
        raise InputError(
            f"{where}: the teacher's server has no log-prob for id {token} at place {place}; its model has another tokenizer "
            "than the student, or it does not list the prompt's own tokens"
        )
    return float(value)


def check_served(teacher: Teacher, objective: Objective, temperature: float, method: str) -> None:
    """Refuse a served teacher where more than the sampled tokens' log-probs, or another temperature, is asked of it."""
    if not isinstance(teacher, ServedTeacher):
        return
    request, behaviour = objective.score_request(0), objective.behaviour_request()
    if behaviour is not None and behaviour.divergences:
        raise InputError(NOTHING_ELSE)
    if request.teacher_grad or any(divergence not in BOTH_KLS for divergence in request.divergences):
        raise InputError(NOTHING_ELSE)
    if temperature != 1.0:
        raise InputError(
            f"a ServedTeacher's log-probs are at temperature 1, and sampler.temperature={temperature} compares the student at "
            f"another in {method}; set sampler.temperature: 1, or another teacher"
        )


def without_served(request: ScoreRequest) -> ScoreRequest:
    """Return what is still computed here: the student's numbers; divergences for the log need the teacher's distribution."""
    return replace(request, views=("student",), divergences=())


def with_served(scores: Scores, numbers: Float[Tensor, " N"]) -> Scores:
    return replace(scores, teacher_logprobs=numbers)


def served_logprobs(teacher: ServedTeacher, rollouts: Sequence[Rollout], device: torch.device) -> Float[Tensor, " N"]:
    flat = [x for numbers in teacher.logprobs(rollouts) for x in numbers]
    return torch.tensor(flat, dtype=torch.float32, device=device)
