"""Test a judge's critique: a local server answers as real ones do, and as they should not."""

import contextlib
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pidistill.chat.endpoint import EndpointError, Unusable
from pidistill.distributed.run import Run
from pidistill.errors import InputError
from pidistill.privileged.hindsight import Hindsight, add_hindsight
from pidistill.privileged.judges import ChatEndpoint, Judge, _content
from pidistill.types import Example
from tests.support.siblings import ONE, PRIVILEGED, TOKENIZER, rollout

ROW = Example("row 7", [{"role": "user", "content": "Book me {a} flight."}])
TURNS = [{"role": "assistant", "tool_calls": [{"function": {"name": "book", "arguments": {"flight": "F1"}}}]}]
KEY = "sk-very-secret"


class Server:
    """Answers with what ``script`` says, one entry per request, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list = [(200, "You should have looked first.")]
        self.requests: list[tuple[str, dict, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                entry = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                outer.answer(self, *entry)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, handler, status, what, *more):
        if what == "hang":
            time.sleep(3)
            return
        if what == "drip":  # never silent for long, and never done
            handler.send_response(200)
            handler.end_headers()
            for _ in range(60):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
            return
        if what in ("drip a header", "drip the status", "endless body", "endless header"):
            send_without_end(handler, what)
            return
        raw = what if isinstance(what, bytes) else json.dumps({"choices": [{"message": {"content": what}}]}).encode()
        handler.send_response(status)
        for name, value in more:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)


def send_without_end(handler, what: str, seconds: float = 6.0) -> None:
    """Send bytes for a while, never silent for long: in place of the status line, within a header, or as a body."""
    start, byte, pause = {
        "drip a header": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a", 0.05),
        "drip the status": (b"HTTP/1.1 200 ", b"O", 0.05),
        "endless body": (b"HTTP/1.1 200 OK\r\n\r\n", b"a" * 100_000, 0.0),
        "endless header": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"a" * 1_000, 0.001),
    }[what]
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        handler.wfile.write(start)
        while time.monotonic() < end:
            handler.wfile.write(byte)
            time.sleep(pause)


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def endpoint(server: Server, **changes) -> ChatEndpoint:
    return ChatEndpoint(**{"base_url": server.url, "model": "judge", "backoff_s": 0.0, "timeout_s": 5.0} | changes)


# ------------------------------------------------------------------------------------------- questions and answers


def test_the_question_holds_the_task_and_the_calls_and_the_answer_is_the_critique(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = Judge(endpoint(server, key_env="JUDGE_KEY", temperature=0.5, max_tokens=77))
    assert judge(ROW, TURNS) == "You should have looked first." and judge.failures == 0
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.5, 77)
    (message,) = body["messages"]
    assert "Book me {a} flight." in message["content"] and 'book({"flight": "F1"})' in message["content"]


def test_without_key_env_no_key_is_sent(server):
    endpoint(server)("hi")
    assert "Authorization" not in server.requests[0][1]


def test_any_callable_is_a_judge():
    assert Judge(lambda prompt: f" {len(prompt)} ", template="{attempt}")(ROW, TURNS) == "33"


# ------------------------------------------------------------------------------------------- failures

BROKEN = {
    "status 500": (500, "no"),
    "status 429": (429, "no"),
    "no JSON": (200, b"<html>busy</html>"),
    "no choices": (200, b'{"error": "x"}'),
    "a list": (200, b"[]"),
    "empty": (200, "  "),
    "no text": (200, b'{"choices": [{"message": {"content": null}}]}'),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_failure_that_may_pass_is_tried_again_and_counted_if_it_stays(kind, server, caplog):
    server.script = [BROKEN[kind], BROKEN[kind], (200, "At last.")]
    judge = Judge(endpoint(server, retries=2))
    assert judge(ROW, TURNS) == "At last." and judge.failures == 0 and len(server.requests) == 3
    server.script = [BROKEN[kind]]
    with caplog.at_level(logging.WARNING):
        assert judge(ROW, TURNS) is None and judge(ROW, TURNS) is None
    assert judge.failures == 2 and len(server.requests) == 9
    (said,) = [record.getMessage() for record in caplog.records]
    assert "row 7" in said and "(3 tries)" in said


SLOW = ["hang", "drip", "drip a header", "drip the status", "endless body", "endless header"]


@pytest.mark.parametrize("kind", SLOW)
def test_a_slow_judge_is_given_up_after_the_time_limit(kind, server):
    server.script = [(200, kind)]
    judge = Judge(endpoint(server, timeout_s=0.2, retries=0))
    began = time.monotonic()
    assert judge(ROW, TURNS) is None and judge.failures == 1
    assert time.monotonic() - began < 2


def test_a_judge_that_is_given_up_leaves_no_thread_behind(server):
    before = {thread.name for thread in threading.enumerate()}
    server.script = [(200, "drip a header")]
    Judge(endpoint(server, timeout_s=0.2, retries=1))(ROW, TURNS)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        left = [thread for thread in threading.enumerate() if thread.name not in before and "(answer)" in thread.name]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(left)


HOSTILE = {
    "half a surrogate pair": b'{"choices": [{"message": {"content": "no \\ud83d"}}]}',
    "deep nesting": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\x00",
    "an object in place of text": b'{"choices": [{"message": {"content": {"a": 1}}}]}',
    "choices of another kind": b'{"choices": {"0": 1}}',
    "a number without end": b"1" * 900_000,
    "too many bytes": b'{"choices": [{"message": {"content": "' + b"a" * 1_000_001 + b'"}}]}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_answer_of_any_kind_costs_the_row_alone(kind, server, tmp_path):
    server.script = [(200, HOSTILE[kind])]
    judge = Judge(endpoint(server, retries=0), cache_dir=str(tmp_path))
    assert judge(ROW, TURNS) is None and judge.failures == 1 and not list(tmp_path.iterdir())


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError

    __repr__ = __str__


def fail_with(error: BaseException):
    def call(*_):
        raise error

    return call


@pytest.mark.parametrize("error", [ValueError("x" * 10**7), Unreadable(), SystemExit(3), UnicodeError("\ud83d")])
def test_a_judge_that_raises_costs_the_row_alone(error, caplog):
    judge = Judge(fail_with(error))
    assert judge(ROW, TURNS) is None and judge.failures == 1
    assert len(caplog.text) < 1_000


@pytest.mark.parametrize("answer", [None, 7, b"bytes", "\ud83d", "x" * 2_000_000, "  "])
def test_an_answer_that_is_no_usable_text_is_none(answer):
    judge = Judge(lambda prompt: answer)
    assert judge(ROW, TURNS) is None and judge.failures == 1


def test_a_turn_with_half_a_surrogate_pair_is_asked_about_and_kept(server, tmp_path):
    judge = Judge(endpoint(server), cache_dir=str(tmp_path))
    turns = [{"role": "assistant", "content": "no \ud83d"}]
    assert judge(ROW, turns) == judge(ROW, turns) == "You should have looked first." and len(server.requests) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_is_said_once(server, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    judge = Judge(endpoint(server), cache_dir=str(tmp_path / "file"))
    for _ in range(2):
        assert judge(ROW, TURNS) == "You should have looked first."
    assert judge.failures == 0 and len(server.requests) == 2
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        f"critiques cannot be kept in feedback.cache_dir {tmp_path / 'file'}"
    ]


@pytest.mark.parametrize("which", ["feedback", "sibling"])
@pytest.mark.parametrize("error", [ValueError("no"), Unreadable(), SystemExit(3), "\ud83d", 7])
def test_a_callable_that_fails_costs_its_rollout_the_information_and_is_counted(which, error, caplog):
    def write(example, turns):
        if turns[0]["content"] == "broken":
            if isinstance(error, BaseException):
                raise error
            return error
        return "obs"

    parts = {"sibling": None} | {which: write}
    rollouts = [rollout("fine", 0, 0.0), rollout("broken", 1, 0.0), rollout("broken", 2, 0.0)]
    if which == "sibling":  # each has a sibling that succeeded; that of the last two is broken
        rollouts = [rollout(said, group, reward) for group, said in enumerate(["fine", "broken"]) for reward in (0.0, 1.0)]
    counts = add_hindsight(Hindsight(**parts), rollouts, PRIVILEGED, TOKENIZER, ONE, 96)
    assert counts["_with_pi"] == 1.0 and counts["hindsight_failures"] == {"feedback": 2.0, "sibling": 1.0}[which]
    assert len([r for r in caplog.records if f"hindsight.{which} failed for" in r.getMessage()]) == 1


def test_a_refusal_is_not_tried_again(server):
    for status in (400, 401, 404):
        server.script, server.requests = [(status, "no")], []
        with pytest.raises(EndpointError, match=f"status {status}"):
            endpoint(server)("hi")
        assert len(server.requests) == 1


def test_a_redirect_does_not_send_the_key_to_another_server(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    other = Server()
    server.script = [(302, "moved", ("Location", f"{other.url}/chat/completions"))]
    assert Judge(endpoint(server, key_env="JUDGE_KEY"))(ROW, TURNS) is None
    assert len(server.requests) == 1 and not other.requests
    other.http.shutdown()
    other.http.server_close()


def test_a_judge_whose_server_is_gone_gives_no_feedback(server):
    server.http.server_close()
    assert Judge(endpoint(server, retries=0))(ROW, TURNS) is None


def test_the_key_is_nowhere_but_in_the_request(server, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    ask = endpoint(server, key_env="JUDGE_KEY", retries=0)
    judge = Judge(ask, cache_dir=str(tmp_path))
    with caplog.at_level(logging.DEBUG):
        judge(ROW, TURNS)
        server.script = [(500, KEY)]
        Judge(ask)(ROW, TURNS)
        server.script = [(401, KEY)]
        Judge(ask)(ROW, TURNS)
    kept = "".join(file.read_text() for file in tmp_path.iterdir())
    assert kept and KEY not in kept + caplog.text + repr(judge) + repr(ask)


# ------------------------------------------------------------------------------------------- cache


def test_answers_are_kept_by_content_and_failures_are_not(server, tmp_path):
    def ask(turns=TURNS, row=ROW, **changes):
        return Judge(endpoint(server, retries=0, **changes), cache_dir=str(tmp_path))(row, turns)

    server.script = [(500, "no"), (200, "First."), (200, "Second."), (200, "Third."), (200, "Fourth.")]
    assert ask() is None and ask() == "First." == ask(), "a failure is asked again, an answer is not"
    assert len(server.requests) == 2
    other = [{"role": "assistant", "content": "Cannot."}]
    assert ask(turns=other) == "Second." and ask(model="another") == "Third." and ask(temperature=1.0) == "Fourth."
    assert ask() == "First." and ask(timeout_s=3.0) == "First." and len(server.requests) == 5
    assert {file.suffix for file in tmp_path.iterdir()} == {".json"} and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"text": 3}', '{"text": ""}'])
def test_a_damaged_cache_file_is_written_anew(damage, server, tmp_path):
    judge = Judge(endpoint(server), cache_dir=str(tmp_path))
    judge(ROW, TURNS)
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    assert judge(ROW, TURNS) == "You should have looked first." and len(server.requests) == 2
    assert json.loads(file.read_text())["text"] == "You should have looked first."


# ------------------------------------------------------------------------------------------- as feedback


def test_a_rollout_whose_critique_failed_has_none_and_is_counted():
    def ask(prompt: str) -> str:
        if "broken" in prompt:
            raise OSError("down")
        return "obs"

    judge = Judge(ask, template="{attempt}")
    rollouts = [rollout("fine", 0, 0.0), rollout("broken", 1, 0.0), rollout("broken", 2, 0.0)]
    run: Run = ONE
    counts = add_hindsight(Hindsight(None, judge), rollouts, PRIVILEGED, TOKENIZER, run, 96)
    failures = {"hindsight_failures": 0.0, "hindsight_judge_failures": 2.0}
    assert counts == {"_with_pi": 1.0, "hindsight_too_long": 0.0} | failures
    assert [r.example.privileged for r in rollouts] == ["obs", None, None]
    assert [r.prompts.teacher == r.prompts.student for r in rollouts] == [False, True, True]
    again = add_hindsight(Hindsight(None, judge), rollouts[1:2], PRIVILEGED, TOKENIZER, run, 96)
    assert again["hindsight_judge_failures"] == 1.0, "of this round, not of all of them"


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_url": "file:///etc/passwd"}, "must look like http"),
        ({"base_url": "localhost:8000"}, "must look like http"),
        ({"base_url": "http://user:word@host/v1"}, "keys go into ask.key_env"),
        ({"timeout_s": 0}, "ask.timeout_s=0"),
        ({"retries": -1}, "ask.retries=-1"),
        ({"base_url": "http://[::1/v1"}, "ask.base_url is no address"),
        (
            {"key_env": "NO_SUCH_KEY"},
            "the environment variable NO_SUCH_KEY .ask.key_env. is not set; set it, or ask.key_env: null",
        ),
        ({"key_env": "BROKEN_KEY"}, "BROKEN_KEY .ask.key_env. has a character that no header can hold"),
    ],
)
def test_judge_settings_that_cannot_work_are_refused(changes, said, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("BROKEN_KEY", "secret word\n")
    with pytest.raises(InputError, match=said) as error:
        ChatEndpoint(**{"base_url": "http://localhost/v1", "model": "m"} | changes)
    assert "word" not in str(error.value)


def test_templates_that_show_the_judge_nothing_are_refused():
    for template in ("look at this", "{task}", "{attempt} {reward}"):
        with pytest.raises(InputError, match="feedback.template (lacks|has the unknown placeholder|is malformed)"):
            Judge(str, template=template)


def test_an_answer_that_the_limit_cut_and_reasoning_without_an_end_are_no_critique():
    def answered(text, reason="stop"):
        return {"choices": [{"finish_reason": reason, "message": {"content": text}}]}

    assert _content(answered("<think>It called a.</think>\n\nCall b first.")) == "Call b first."
    with pytest.raises(Unusable, match="ask.max_tokens cut short"):
        _content(answered("Call b fir", "length"))
    with pytest.raises(Unusable, match="reasoning without an end"):
        _content(answered("<think>It called a, and"))
    with pytest.raises(Unusable, match="empty"):
        _content(answered("<think>It called a.</think>"))
