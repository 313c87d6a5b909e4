"""Make privileged information of a judge's critique: a text that another model, or any function, writes about an episode.

`hindsight.feedback` takes any callable (example, turns) → text or None. :class:`Judge` makes one of a callable prompt → text,
such as :class:`ChatEndpoint`, and adds what an answer over the network needs: answers are kept on disk under a hash of the
question, and a failure is counted and gives None, so that the rollout has no critique. No other text takes its place.
"""

import contextlib
import functools
import hashlib
import http.client
import json
import logging
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pidistill.chat.messages import transcript_text
from pidistill.chat.templates import check_template
from pidistill.errors import InputError, attempt, bounded_repr
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
RETRIED = (408, 429, 500, 502, 503, 504)


class JudgeError(Exception):
    """Say that the judge gave no usable answer; the message holds no secrets."""


def usable_text(value: Any) -> str:
    """Return a critique without spaces around it.

    Raises:
        JudgeError: it is no text, empty, longer than :data:`MAX_ANSWER_BYTES`, or holds half of a surrogate pair, which no
            tokenizer takes.
    """
    if not isinstance(value, str):
        raise JudgeError(f"the judge's answer is a {type(value).__name__}, not a text")
    if len(value) > MAX_ANSWER_BYTES:
        raise JudgeError(f"the judge's answer has {len(value):,} characters, more than {MAX_ANSWER_BYTES:,}")
    if not value.strip():
        raise JudgeError("the judge's answer is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise JudgeError("the judge's answer holds half of a surrogate pair, which is no character") from None
    return value.strip()


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
        except (ValueError, KeyError, TypeError, OSError, RecursionError, JudgeError):  # no file, or a damaged one
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
        base_url: up to and including the version, e.g. ``http://localhost:8000/v1``.
        model: its name there.
        key_env: the environment variable that holds the key; null where the server needs none. The key is read when a question
            is asked, and is in no config, log, error or cache file.
        temperature, max_tokens: of the answer.
        timeout_s: for one try, from connecting to the last byte.
        retries: further tries after a time-out, a connection error, a damaged answer or status 408, 429 or 5xx.
        backoff_s: pause before the first retry; doubled before each further one.
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
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise InputError(
                f"ask.base_url must look like http://localhost:8000/v1 (scheme {parts.scheme!r}); keys go into ask.key_env"
            )
        if self.timeout_s <= 0 or self.retries < 0 or self.backoff_s < 0 or self.max_tokens < 1:
            raise InputError(
                f"ask.timeout_s={self.timeout_s} and ask.max_tokens={self.max_tokens} must be above 0, ask.retries="
                f"{self.retries} and ask.backoff_s={self.backoff_s} at least 0"
            )
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise InputError(f"the environment variable {self.key_env} (ask.key_env) is not set; set it, or ask.key_env: null")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what an answer depends on, beside the prompt."""
        return {name: getattr(self, name) for name in ("base_url", "model", "temperature", "max_tokens")}

    def __call__(self, prompt: str) -> str:
        for retry in range(self.retries + 1):
            try:
                return self._try(prompt)
            except _Retry as error:
                if retry == self.retries:
                    raise JudgeError(f"{error} ({retry + 1} tries)") from None
            time.sleep(self.backoff_s * 2**retry)
        raise AssertionError("unreachable")

    def _try(self, prompt: str) -> str:
        body = self._request_body(prompt)
        request = urllib.request.Request(f"{self.base_url.rstrip('/')}/chat/completions", body, self._headers(), method="POST")
        try:
            return _content(Exchange(request, self.timeout_s).answer())
        except urllib.error.HTTPError as error:
            error.close()
            status = f"the judge answered with status {error.code}"
            raise (_Retry if error.code in RETRIED else JudgeError)(status) from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", error)
            raise _Retry(f"the judge cannot be reached ({type(reason).__name__})") from None

    def _request_body(self, prompt: str) -> bytes:
        messages = [{"role": "user", "content": prompt}]
        settings = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return json.dumps({"messages": messages, **settings}).encode()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key_env is None:
            return headers
        return headers | {"Authorization": f"Bearer {os.environ[self.key_env]}"}


class _Retry(Exception):
    """Say that another try may succeed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: urllib would send the key to whatever host it names."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Exchange:
    """Make one request and read its answer, in a thread of its own, so that the time limit holds for all of it.

    urllib's own limit is for one packet: a server that sends a byte of a header now and then would never reach it. When the
    time is over, the connection is shut down, which ends the thread too.
    """

    def __init__(self, request: urllib.request.Request, timeout_s: float, most_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._request, self._timeout_s, self._most_bytes = request, timeout_s, most_bytes
        self._sockets: list[socket.socket] = []
        self._is_over = False

    def answer(self) -> bytes:
        """Return the body; raises what the request raised, or TimeoutError."""
        outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        threading.Thread(target=lambda: outcome.put(self._attempt()), name="judge (answer)", daemon=True).start()
        try:
            result = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            self._shut_down()
            raise TimeoutError from None
        if isinstance(result, Exception):
            raise result
        return result

    def _attempt(self) -> bytes | Exception:
        opener = urllib.request.build_opener(_NoRedirect, _Handler(self))
        try:
            with opener.open(self._request, timeout=self._timeout_s) as answer:
                return self._read(answer)
        except Exception as error:
            return error

    def _read(self, answer: Any) -> bytes:
        parts, size = [], 0
        while part := answer.read1(65_536):
            parts.append(part)
            size += len(part)
            if self._is_over:
                raise TimeoutError
            if size > self._most_bytes:
                raise JudgeError(f"the judge's answer is longer than {self._most_bytes:,} bytes")
        return b"".join(parts)

    def opened(self, connection: socket.socket) -> None:
        """Note a connection of the request."""
        self._sockets.append(connection)
        if self._is_over:
            self._shut_down()

    def _shut_down(self) -> None:
        self._is_over = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Open connections that the exchange knows."""

    def __init__(self, exchange: Exchange) -> None:
        urllib.request.HTTPHandler.__init__(self)
        urllib.request.HTTPSHandler.__init__(self)
        self._exchange = exchange

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(self._connect, http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(self._connect, http.client.HTTPSConnection), request, context=self._context)

    def _connect(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        connect = connection.connect

        def connect_and_note() -> None:
            connect()
            self._exchange.opened(connection.sock)

        connection.connect = connect_and_note
        return connection


def _content(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Retry("the judge's answer is not a chat completion") from None
    try:
        return usable_text(text)
    except JudgeError as error:
        raise _Retry(str(error)) from None
