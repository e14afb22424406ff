"""A small server on the loopback interface that speaks OpenAI's protocol for completions, with a scripted teacher.

It can refuse, answer nonsense, half an answer, slowly or not at all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.integration.streaming_server import running

Answer = tuple[str, str]
"""A text and its ``finish_reason``."""


@dataclass
class Server:
    """What the server says, and what it was asked.

    Attributes:
        teach: returns the answer to a prompt (its last user message in a chat) and a seed.
        faults: what happens to the next requests instead of an answer, each used once; ``None`` answers.
        on_request: called with the number of requests so far, before each answer.
        asked: path, headers and payload of each request.
    """

    teach: Callable[[str, int], Answer]
    faults: list[str | None] = field(default_factory=list)
    on_request: Callable[[int], object] = lambda number: None
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(teach: Callable[[str, int], Answer]) -> Iterator[Server]:
    """Run a server until the end of the block."""
    state = Server(teach)
    server = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with running(server):
        yield state


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *args: Any) -> None:
        """Say nothing of clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        with state.lock:
            state.asked.append((self.path, dict(self.headers), payload))
            fault = state.faults.pop(0) if state.faults else None
            number = len(state.asked)
        state.on_request(number)
        answer = json.dumps(self._answer(payload)).encode()
        if fault is None:
            self._send(200, answer)
        else:
            getattr(self, f"_{fault}")(answer)

    def _answer(self, payload: dict[str, Any]) -> dict[str, Any]:
        is_chat = self.path.endswith("/chat/completions")
        prompt = payload["messages"][-1]["content"] if is_chat else payload["prompt"]
        text, reason = self.state.teach(prompt, payload["seed"])
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        return {"choices": [{**said, "index": 0, "finish_reason": reason}], "usage": usage}

    def _error(self, answer: bytes) -> None:
        self._send(500, b'{"error": {"message": "out of memory"}}')

    def _busy(self, answer: bytes) -> None:
        self._send(429, b"", {"Retry-After": "0"})

    def _refuse(self, answer: bytes) -> None:
        self._send(400, b'{"error": {"message": "top_k must be positive"}}')

    def _unauthorized(self, answer: bytes) -> None:
        self._send(401, b'{"error": "no key"}')

    def _long(self, answer: bytes) -> None:
        self._send(400, b'{"error": {"message": "This model\'s maximum context length is 16 tokens."}}')

    def _long_500(self, answer: bytes) -> None:
        self._send(500, b'{"error": {"message": "Context size has been exceeded."}}')

    def _redirect(self, answer: bytes) -> None:
        self._send(302, b"", {"Location": f"{self.state.url}/elsewhere"})

    def _nonsense(self, answer: bytes) -> None:
        self._send(200, b"<html>It works!</html>")

    def _empty_choices(self, answer: bytes) -> None:
        self._send(200, b'{"choices": []}')

    def _half(self, answer: bytes) -> None:
        self._send(200, answer[: len(answer) // 2], {"Content-Length": str(len(answer))})
        self.close_connection = True

    def _hang_up(self, answer: bytes) -> None:
        self.close_connection = True

    def _slow(self, answer: bytes) -> None:
        """Send a byte now and then, so that each arrives in time but the answer does not."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        try:
            for byte in answer:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
