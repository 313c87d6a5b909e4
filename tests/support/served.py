"""Serve the prompt log-probs of a small model over HTTP, as an OpenAI-compatible server does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Server:
    """Answers completions with prompt log-probs of a model, as vLLM does; ``faults`` are tried first, one per request.

    A fault is a status and a content, or a function that changes the entries of an answer.
    """

    def __init__(self, module, faults=()) -> None:
        self.module, self.faults, self.bodies, self.headers = module, list(faults), [], []
        self.lock = threading.Lock()

    def answer(self, body: dict, headers) -> tuple[int, bytes]:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, tuple):
                return fault
            prompt = body.get("prompt") or body["input_ids"]
            with torch.no_grad():
                logp = torch.log_softmax(self.module(torch.tensor([prompt]))[0].float(), -1)
        top = body.get("prompt_logprobs", body.get("top_logprobs_num"))
        places = [
            [(token, float(row[token])), *((int(i), float(row[i])) for i in row.topk(top).indices)]
            for token, row in zip(prompt[1:], logp, strict=False)
        ]
        if "input_ids" in body:
            own = [[logprob, token, None] for ((token, logprob), *_) in places]
            listed = [[[logprob, token, None] for token, logprob in rest] for _, *rest in places]
            meta = {"input_token_logprobs": [[None, prompt[0], None], *own]}
            meta |= {"input_top_logprobs": [None, *listed]} if top else {}
            return 200, json.dumps({"text": "", "meta_info": meta}).encode()
        entries = [None] + [{str(i): {"logprob": x, "rank": 1, "decoded_token": "?"} for i, x in place} for place in places]
        entries = entries if fault is None else fault(entries)
        return 200, json.dumps({"choices": [{"text": "", "prompt_logprobs": entries}]}).encode()


@contextmanager
def serving(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = server.answer(body, dict(self.headers))
            self.send_response(status if self.path == ("/generate" if "input_ids" in body else "/v1/completions") else 404)
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
