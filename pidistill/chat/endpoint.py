"""Ask a server for JSON over HTTP: a time limit for all of a try, further tries where another may succeed, and no redirect."""

import contextlib
import functools
import http.client
import json
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pidistill.errors import InputError

T = TypeVar("T")
RETRIED = (408, 429, 500, 502, 503, 504)


class Unusable(Exception):
    """Say why an answer cannot be used, and whether another try may give one that can."""

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


class EndpointError(Exception):
    """Say what the tries gave, each reason once, and how many tries there were. It holds no secrets."""


@dataclass(frozen=True)
class Endpoint:
    """Name a server and how it is asked.

    Attributes:
        config_key: the config's node with the other settings, for messages.
        base_url: up to and including the version, such as ``http://localhost:8000/v1``.
        key_env: the environment variable that holds the key; None where the server needs none. The key is read when a question
            is asked, and is in no log and no error.
        timeout_s: for one try, from connecting to the last byte.
        retries: further tries after a time-out, a connection error, an answer that cannot be used, or a status of
            :data:`RETRIED`.
        backoff_s: pause before the first retry; doubled before each further one.
    """

    config_key: str
    base_url: str
    key_env: str | None
    timeout_s: float
    retries: int
    backoff_s: float

    def __post_init__(self) -> None:
        key = self.config_key
        try:
            parts = urlsplit(self.base_url)
        except ValueError as error:
            raise InputError(f"{key}.base_url is no address ({error}); it must look like http://localhost:8000/v1") from error
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise InputError(
                f"{key}.base_url must look like http://localhost:8000/v1 (scheme {parts.scheme!r}); keys go into {key}.key_env"
            )
        if self.timeout_s <= 0 or self.retries < 0 or self.backoff_s < 0:
            raise InputError(
                f"{key}.timeout_s={self.timeout_s} must be above 0, {key}.retries={self.retries} and {key}.backoff_s="
                f"{self.backoff_s} at least 0"
            )
        self._headers()

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T], most_bytes: int) -> T:
        """Return ``read`` of the JSON that the server answers at ``base_url`` + ``path``; it may raise :class:`Unusable`.

        Raises:
            EndpointError: no try gave an answer that ``read`` takes.
        """
        reasons: list[str] = []
        url, data, headers = self.base_url.rstrip("/") + path, json.dumps(body).encode(), self._headers()
        for attempt in range(self.retries + 1):
            try:
                request = urllib.request.Request(url, data, headers, method="POST")
                return read(json.loads(_Exchange(request, self.timeout_s, most_bytes).answer()))
            except urllib.error.HTTPError as error:
                error.close()
                reason, again = f"status {error.code}", error.code in RETRIED
            except Unusable as error:
                reason, again = str(error), error.again
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                reason, again = type(getattr(error, "reason", error)).__name__, True
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                reason, again = "an answer that is no completion", True
            reasons += [reason] if reason not in reasons else []
            if not again or attempt == self.retries:
                break
            time.sleep(self.backoff_s * 2**attempt)
        raise EndpointError(f"{', then '.join(reasons)} ({attempt + 1} tries)")

    def _headers(self) -> dict[str, str]:
        """Return a request's headers; a missing key, or one that no header can hold, is an error that does not show it."""
        if self.key_env is None:
            return {"Content-Type": "application/json"}
        key, found = f"({self.config_key}.key_env)", os.environ.get(self.key_env)
        if not found:
            raise InputError(f"the environment variable {self.key_env} {key} is not set; set it, or {key[1:-1]}: null")
        if not (found.isascii() and found.isprintable()):
            raise InputError(
                f"the environment variable {self.key_env} {key} has a character that no header can hold, such as a line break "
                "at its end; set it again"
            )
        return {"Content-Type": "application/json", "Authorization": f"Bearer {found}"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: urllib would send the key to whatever host it names."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Exchange:
    """Make one request and read its answer, in a thread of its own, so that the time limit holds for all of it.

    urllib's own limit is for one packet: a server that sends a byte of a header now and then would never reach it. When the
    time is over, the connection is shut down, which ends the thread too.
    """

    def __init__(self, request: urllib.request.Request, timeout_s: float, most_bytes: int) -> None:
        self._request, self._timeout_s, self._most_bytes = request, timeout_s, most_bytes
        self._sockets: list[socket.socket] = []
        self._is_over = False

    def answer(self) -> bytes:
        """Return the body; raises what the request raised, or TimeoutError."""
        outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        threading.Thread(target=lambda: outcome.put(self._attempt()), name="endpoint (answer)", daemon=True).start()
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
                body = answer.read(self._most_bytes + 1)
        except Exception as error:
            return error
        return body if len(body) <= self._most_bytes else Unusable(f"more than {self._most_bytes:,} bytes", again=False)

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

    def __init__(self, exchange: _Exchange) -> None:
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
