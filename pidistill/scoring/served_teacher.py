"""A teacher on a server: token ids go out, log-probs of the completion's tokens and of the likeliest ids come back.

The server gives prompt log-probs, as vLLM's `/v1/completions` does with `prompt_logprobs`. Sampled tokens' log-probs serve OPD
and Semi-OPD in their sampled forms, OPD as PPO, SDAR, RLSD. With ``top_k`` the server also lists the k likeliest ids of each
place, for divergences between those ids and one tail. Each rank asks for its own rollouts, several at once, and asks for a
rollout once: its numbers are kept as long as it lives.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from pidistill.chat.endpoint import Endpoint, EndpointError, Unusable
from pidistill.errors import InputError, bounded_repr, check_choice, check_count
from pidistill.losses.token_weights import Chain, EntropyMask, TokenWeight
from pidistill.models.protocol import Decoder
from pidistill.objectives.base import BOTH_KLS, Objective
from pidistill.objectives.routed import RoutedObjective
from pidistill.teachers import MixturePart, RoutedTeacher, Teacher
from pidistill.types import ListedTeacher, Rollout, RolloutKey, ScoreRequest, Scores

MAX_ANSWER_BYTES = 64_000_000
BYTES_OF_AN_ENTRY = 500  # {"1234": {"logprob": -1.234, "rank": 1, "decoded_token": "word"}}, with room for long tokens
MOST_BEYOND = 0.5  # rows that pad a vocabulary have hardly any probability; a model with other ids has it anywhere

NOTHING_ELSE = (
    "a ServedTeacher without top_k gives the log-probs of the sampled tokens and nothing else of its distribution; set "
    "teacher.top_k for divergences over its likeliest ids and a tail, an objective that needs no more (OPD with divergence: "
    "sampled, OPDPPO, SDAR, RLSD, SemiOPD with form: k2), or another teacher"
)

NO_WEIGHTS = (
    "a ServedTeacher's weights are on a server: they are not trained, do not sample and are no part of a RoutedTeacher; set "
    "another teacher, or an objective that takes its numbers alone"
)


class ServedTeacher(Teacher):
    """Score the teacher's view with a model that a server holds; it must have the student's tokenizer.

    Args:
        base_url, key_env, timeout_s, retries, backoff_s: as in :class:`pidistill.chat.endpoint.Endpoint`.
        model: the name under which the server knows the model.
        top_k: how many of its likeliest ids the server lists per token, beside the sampled one; null asks for no more than that
            one. Divergences are then between those ids and one tail bucket: at most the full ones, and nearer to them with
            more ids. vLLM lists up to `--max-logprobs`, 20 unless it is told otherwise.
        server: "vllm", or "sglang" for SGLang's `/generate` (written from its documentation, never run against one).
        threads: requests that are under way at once.
    """

    own_weights = False
    can_sample = False

    def __init__(
        self,
        base_url: str,
        model: str,
        top_k: int | None = None,
        server: str = "vllm",
        key_env: str | None = None,
        threads: int = 8,
        timeout_s: float = 120.0,
        retries: int = 3,
        backoff_s: float = 1.0,
    ) -> None:
        check_choice("teacher.server", server, _SERVERS)
        check_count("teacher.threads", threads)
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise InputError(f"teacher.top_k={top_k} must be a whole number of at least 1, or null for sampled tokens alone")
        self._server = _SERVERS[server]
        self._endpoint = Endpoint("teacher", self._server.root(base_url.rstrip("/")), key_env, timeout_s, retries, backoff_s)
        self.model, self.top_k, self.threads = model, top_k, threads
        self._known: WeakKeyDictionary[RolloutKey, ListedTeacher] = WeakKeyDictionary()

    def mixture(self, model: Decoder) -> list[MixturePart]:
        raise InputError(NO_WEIGHTS)

    def listed(self, rollouts: Sequence[Rollout]) -> list[ListedTeacher]:
        """Return what the teacher's view says of each policy token of each rollout; the first id is the token's own."""
        asked = [rollout for rollout in rollouts if rollout.key not in self._known]
        if asked:
            with ThreadPoolExecutor(self.threads) as threads:
                for rollout, numbers in zip(asked, threads.map(self._ask, asked), strict=True):
                    self._known[rollout.key] = numbers
        return [self._known[rollout.key] for rollout in rollouts]

    def check_server(self) -> None:
        """Ask for the log-probs of two ids, so that what is wrong with the server shows before any model is loaded."""
        _read_place(self._prompt_logprobs([1, 1], "a first question")[1], 1, self.top_k, "a first question, place 1")

    def _ask(self, rollout: Rollout) -> ListedTeacher:
        where, (ids, places) = rollout.example.id, rollout.sequence("teacher")
        given = self._prompt_logprobs(ids, where)
        rows = [_read_place(given[place], ids[place], self.top_k, f"{where}, place {place}") for place in places]
        return self.as_tensors(rows)

    def as_tensors(self, rows: list[dict[int, float]]) -> ListedTeacher:
        """Return one row of ids and log-probs per token, as wide as the longest that the server may list."""
        ids = torch.full((len(rows), 1 + (self.top_k or 0)), -1, dtype=torch.int32)
        logprobs = torch.full(ids.shape, -math.inf)
        for n, row in enumerate(rows):
            ids[n, : len(row)], logprobs[n, : len(row)] = torch.tensor(list(row)), torch.tensor(list(row.values()))
        return ListedTeacher(ids, logprobs)

    def _prompt_logprobs(self, ids: list[int], where: str) -> list[Any]:
        path, body = self._server.question(self.model, ids, self.top_k or 0)
        most = MAX_ANSWER_BYTES + BYTES_OF_AN_ENTRY * len(ids) * (1 + (self.top_k or 0))

        def read(answer: Any) -> list[Any]:
            entries = self._server.entries(answer)
            if not isinstance(entries, list) or len(entries) != len(ids):
                raise Unusable(f"no prompt_logprobs for its {len(ids)} tokens", again=False)
            return entries

        try:
            return self._endpoint.ask(path, body, read, most)
        except EndpointError as error:
            raise InputError(
                f"the teacher's server at {self._endpoint.base_url} gave {error} for {where}; "
                f"{self._hint(str(error), len(ids))}check teacher.base_url, teacher.model and that the server gives prompt "
                "log-probs, or raise teacher.timeout_s and teacher.retries"
            ) from None

    def _hint(self, told: str, tokens: int) -> str:
        """Return what a status means here; vLLM without a tokenizer does not survive an id that it does not have."""
        if "status 401" in told or "status 403" in told:
            return "teacher.key_env names no key that it takes; "
        if "status 400" not in told and "status 500" not in told:
            return ""
        lists = "" if self.top_k is None else f" and list teacher.top_k={self.top_k} ids (vLLM: --max-logprobs, 20 by default)"
        return f"it must have the student's ids, read {tokens} tokens{lists}; "


class _Vllm:
    """Ask vLLM's OpenAI-compatible server."""

    @staticmethod
    def root(base_url: str) -> str:
        return base_url

    @staticmethod
    def question(model: str, ids: list[int], top_k: int) -> tuple[str, dict[str, Any]]:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        return "/completions", body

    @staticmethod
    def entries(answer: Any) -> Any:
        """Return, per place, {id: {"logprob": …}}; None at the first."""
        return answer["choices"][0].get("prompt_logprobs")


class _SGLang:
    """Ask SGLang's own `/generate`: its OpenAI-compatible answers name tokens by their texts, which are not unique."""

    @staticmethod
    def root(base_url: str) -> str:
        return base_url.removesuffix("/v1")

    @staticmethod
    def question(model: str, ids: list[int], top_k: int) -> tuple[str, dict[str, Any]]:
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top_k}
        return "/generate", {"input_ids": ids, "sampling_params": sampling, **logprobs}

    @staticmethod
    def entries(answer: Any) -> Any:
        """Return, per place, {id: log-prob}, from its triples (log-prob, id, text)."""
        own = answer["meta_info"]["input_token_logprobs"]
        top = answer["meta_info"].get("input_top_logprobs") or [None] * len(own)
        return [
            {str(id_): logprob for logprob, id_, _ in [*(listed or []), token]} for token, listed in zip(own, top, strict=True)
        ]


_SERVERS = {"vllm": _Vllm, "sglang": _SGLang}


def _read_place(entry: Any, token: int, top_k: int | None, where: str) -> dict[int, float]:
    """Return the log-probs that the server lists at a place, at most ``top_k`` beside the token's own, which comes first."""
    listed = entry if isinstance(entry, dict) else {}
    row = {token: _logprob_of(listed, str(token), where)}
    for key in listed if top_k is not None else ():
        row[_id_of(key, where)] = _logprob_of(listed, key, where)
    if top_k is not None and not top_k <= len(row) <= top_k + 1:
        raise InputError(
            f"{where}: the teacher's server lists {len(row)} ids with the token's own where teacher.top_k={top_k} were asked "
            "for; lower it to what its vocabulary has, or check teacher.server"
        )
    if (total := math.fsum(map(math.exp, row.values()))) > 1.001:
        raise InputError(
            f"{where}: the probabilities that the teacher's server lists add up to {total:.4g}, which no distribution does; "
            "its log-probs must be of the whole vocabulary, at temperature 1: check how it was started"
        )
    return row


def _id_of(key: Any, where: str) -> int:
    if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
        raise InputError(
            f"{where}: the teacher's server lists {bounded_repr(key, 40)} where an id belongs; check teacher.server"
        )
    return int(key)


def _logprob_of(listed: dict[str, Any], key: str, where: str) -> float:
    number = listed.get(key)
    value = number.get("logprob") if isinstance(number, dict) else number
    if type(value) not in (int, float) or math.isnan(value) or value > 1e-3:
        raise InputError(
            f"{where}: the teacher's server has no log-prob for id {key}; its model has another tokenizer than the student, or "
            "it does not list the prompt's own tokens"
        )
    return float(value)


def check_served(teacher: Teacher, objective: Objective, temperature: float, method: str) -> None:
    """Refuse a served teacher where more than it gives, or another temperature, is asked of it."""
    if isinstance(teacher, RoutedTeacher) and any(isinstance(one, ServedTeacher) for one in teacher.teachers.values()):
        raise InputError(NO_WEIGHTS)
    if not isinstance(teacher, ServedTeacher):
        return
    request, behaviour = objective.score_request(0), objective.behaviour_request()
    before = () if behaviour is None else behaviour.divergences
    other = before or any(divergence not in BOTH_KLS for divergence in request.divergences)
    if request.teacher_grad:
        raise InputError(NO_WEIGHTS)
    if teacher.top_k is None and other:
        raise InputError(NOTHING_ELSE)
    if own := next((d for d in (*request.divergences, *before) if d.top_k is not None), None):
        raise InputError(
            f"objective.top_k={own.top_k} is over the ids that the student finds likeliest, and a server lists its own; set "
            f"objective.top_k: null, teacher.top_k={teacher.top_k} says how many"
        )
    parts = objective.objectives.values() if isinstance(objective, RoutedObjective) else [objective]
    if any(_reads_teacher_entropy(getattr(part, "token_weight", None)) for part in parts):
        raise InputError(
            "objective.token_weight reads the teacher's entropy, which a ServedTeacher does not give: its tail may hold any; "
            "set token_weight.view: student, or another teacher"
        )
    if temperature != 1.0:
        raise InputError(
            f"a ServedTeacher's log-probs are at temperature 1, and sampler.temperature={temperature} compares the student at "
            f"another in {method}; set sampler.temperature: 1, or another teacher"
        )


def _reads_teacher_entropy(weight: TokenWeight | None) -> bool:
    if isinstance(weight, Chain):
        return any(map(_reads_teacher_entropy, weight.steps))
    return isinstance(weight, EntropyMask) and weight.view == "teacher"


def without_served(request: ScoreRequest, teacher: ServedTeacher) -> ScoreRequest:
    """Return what is still computed here: the student's numbers, and divergences to what the teacher lists, if it does."""
    divergences = () if teacher.top_k is None else request.divergences
    return replace(request, views=("student",), divergences=divergences)


def with_served(scores: Scores, numbers: Float[Tensor, " N"]) -> Scores:
    return replace(scores, teacher_logprobs=numbers)


def listed_of(teacher: ServedTeacher, rollouts: Sequence[Rollout], device: torch.device, vocabulary: int) -> ListedTeacher:
    """Return what the teacher says of a batch's policy tokens; ``vocabulary`` is the number of the student's ids."""
    parts = [teacher.as_tensors([]), *teacher.listed(rollouts)]
    ids, logprobs = (torch.cat([getattr(part, name) for part in parts]).to(device) for name in ("ids", "logprobs"))
    beyond = logprobs.exp().masked_fill(ids < vocabulary, 0.0).sum(-1)
    if len(beyond) and (most := beyond.max().item()) > MOST_BEYOND:
        raise InputError(
            f"the teacher's server gives {most:.3g} of a token's probability to ids that the student's {vocabulary} do not "
            "have; its model has another tokenizer: set teacher.base_url and teacher.model to one with the student's"
        )
    return ListedTeacher(ids.long(), logprobs)
