"""Make privileged information of a judge's critique: a text that another model, or any function, writes about an episode.

`hindsight.feedback` takes any callable (example, turns) → text or None. :class:`Judge` makes one of a callable prompt → text,
such as :class:`ChatEndpoint`, and adds what an answer over the network needs: answers are kept on disk under a hash of the
question, and a failure is counted and gives None, so that the rollout has no critique. No other text takes its place.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pidistill.chat.endpoint import Endpoint, Unusable
from pidistill.chat.messages import transcript_text
from pidistill.chat.reasoning import END_THINK, begins_with_think
from pidistill.chat.templates import check_template
from pidistill.chat.tool_calls import visible_text
from pidistill.errors import InputError, attempt, bounded_repr, check_count
from pidistill.jsonl import replace_file
from pidistill.types import Example, Message

_log = logging.getLogger(__name__)

CRITIQUE_TEMPLATE = """\
An assistant with tools worked on a task. Say in at most five sentences what it did wrong, at which step, and what it should \
have done there; if it did nothing wrong, say what made it right. Address the assistant, and write nothing else.

<task>
{task}
</task>
<attempt>
{attempt}
</attempt>"""

MAX_ANSWER_BYTES = 1_000_000
MAX_REASON_CHARS = 300
MAX_REASONS = 20  # reasons that are logged, so that a judge with another reason each time does not fill the log


def usable_text(value: Any) -> str:
    """Return a critique without the judge's reasoning before it and without spaces around it.

    Raises:
        Unusable: it is no text, empty, reasoning that is never closed, longer than :data:`MAX_ANSWER_BYTES`, or holds half of
            a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise Unusable(f"an answer that is a {type(value).__name__}, not a text")
    if len(value) > MAX_ANSWER_BYTES:
        raise Unusable(f"an answer with {len(value):,} characters, more than {MAX_ANSWER_BYTES:,}")
    if begins_with_think(value) and END_THINK not in value:
        raise Unusable("an answer that is reasoning without an end; raise ask.max_tokens", again=False)
    value = visible_text({"role": "assistant", "content": value})
    if not value:
        raise Unusable("an answer that is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("an answer that holds half of a surrogate pair, which is no character") from None
    return value


@dataclass
class Judge:
    """Write the critique of an episode, (example, turns) → text, or None where the judge failed; for `hindsight.feedback`.

    Attributes:
        ask: prompt → text; whatever it raises is a failure. Its ``settings``, if it has any, are part of the cache's key.
        template: ``{task}`` stands for the example's messages, ``{attempt}`` for the turns.
        cache_dir: a folder with one JSON file per answer, kept between runs; null asks every time. Failures are not kept.
        failures: rollouts without a critique so far; reported as ``hindsight_judge_failures``.
    """

    ask: Callable[[str], str]
    template: str = CRITIQUE_TEMPLATE
    cache_dir: str | None = None
    failures: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _said: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        check_template(self.template, "feedback.template", ("attempt",), ("task",))
        if not callable(self.ask):
            raise InputError(f"feedback.ask is {self.ask!r}; give a component that maps a prompt to a text")

    def __call__(self, example: Example, turns: Sequence[Message]) -> str | None:
        prompt = self.template.format(task=transcript_text(example.messages), attempt=transcript_text(turns))
        known = self._cached(prompt)
        if known is not None:
            return known
        text, error = attempt(lambda: usable_text(self.ask(prompt)))
        if error is not None:  # a judge that cannot be reached must not end a run of hours
            with self._lock:
                self.failures += 1
            sentence = "the judge gave no critique of a rollout of %s (%s); it has none"
            self._warn_once(bounded_repr(error, MAX_REASON_CHARS), sentence, example.id)
            return None
        try:
            self._keep(prompt, text)
        except OSError as error:
            sentence = "critiques cannot be kept in feedback.cache_dir %s (%s)"
            self._warn_once(bounded_repr(error, MAX_REASON_CHARS), sentence, self.cache_dir)
        return text

    def _warn_once(self, reason: str, sentence: str, what: Any) -> None:
        """Log a sentence once per reason: a judge that is down fails for every rollout of every round."""
        with self._lock:
            new = reason not in self._said and len(self._said) < MAX_REASONS
            if new:
                self._said.add(reason)
        if new:
            _log.warning(sentence, what, reason)

    # ------------------------------------------------------------------------------------------- cache

    def _file(self, prompt: str) -> Path | None:
        if self.cache_dir is None:
            return None
        content = json.dumps([getattr(self.ask, "settings", None), prompt], ensure_ascii=False, sort_keys=True)
        # A model can write half of a surrogate pair into its turns.
        digest = hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()
        return Path(self.cache_dir) / f"{digest}.json"

    def _cached(self, prompt: str) -> str | None:
        file = self._file(prompt)
        if file is None:
            return None
        try:
            return usable_text(json.loads(file.read_text(encoding="utf-8"))["text"])
        except (ValueError, KeyError, TypeError, OSError, RecursionError, Unusable):  # no file, or a damaged one
            return None

    def _keep(self, prompt: str, text: str) -> None:
        file = self._file(prompt)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"text": text, "settings": getattr(self.ask, "settings", None)}
        replace_file(file, json.dumps(row, ensure_ascii=False).encode())  # several ranks and runs may share the folder


@dataclass(frozen=True)
class ChatEndpoint:
    """Ask one question of a server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, ...

    Attributes:
        base_url, key_env, timeout_s, retries, backoff_s: as in :class:`pidistill.chat.endpoint.Endpoint`; the key is in no
            config, log, error or cache file.
        model: its name there.
        temperature, max_tokens: of the answer, reasoning included; an answer that they cut short is a failure.
    """

    base_url: str
    model: str
    key_env: str | None = None
    temperature: float = 0.0
    max_tokens: int = 300
    timeout_s: float = 60.0
    retries: int = 2
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        self._endpoint()  # checks the settings
        check_count("ask.max_tokens", self.max_tokens)

    def _endpoint(self) -> Endpoint:
        return Endpoint("ask", self.base_url, self.key_env, self.timeout_s, self.retries, self.backoff_s)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what an answer depends on, beside the prompt."""
        return {name: getattr(self, name) for name in ("base_url", "model", "temperature", "max_tokens")}

    def __call__(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return self._endpoint().ask("/chat/completions", body, _content, MAX_ANSWER_BYTES)


def _content(answer: Any) -> str:
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "length":
        raise Unusable("an answer that ask.max_tokens cut short; raise it", again=False)
    return usable_text(choice["message"]["content"])
