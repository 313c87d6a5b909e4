"""Serve the prompt log-probs of a small model over HTTP, as an OpenAI-compatible server does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Server:
    """Answers completions with prompt log-probs of a model, as vLLM does; ``faults`` are tried first, one per request."""

    def __init__(self, module, faults=()) -> None:
        self.module, self.faults, self.bodies, self.headers = module, list(faults), [], []
        self.lock = threading.Lock()

    def answer(self, body: dict, headers) -> tuple[int, bytes]:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            if self.faults:
                return self.faults.pop(0)
            ids = torch.tensor([body["prompt"]])
            with torch.no_grad():
                logp = torch.log_softmax(self.module(ids)[0].float(), -1)
        entries = [None]
        for place, token in enumerate(body["prompt"][1:]):
            value = float(logp[place, token])
            entries.append({str(token): {"logprob": value, "rank": 1, "decoded_token": "?"}})
        return 200, json.dumps({"choices": [{"text": "", "prompt_logprobs": entries}]}).encode()


@contextmanager
def serving(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = server.answer(body, dict(self.headers))
            self.send_response(status if self.path == "/v1/completions" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments) -> None:
            return None

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
