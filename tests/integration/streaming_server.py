"""A small server that streams completions as vLLM does, with known delays, and can fail in known ways.

As a program it takes the place of vLLM's Python: ``streaming_server.py MOST_REQUESTS ... --port PORT ...`` ends by
itself, with code 7, after that many requests.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Streams:
    """How the server answers, and what it was asked.

    Attributes:
        first: seconds before the first token.
        gap: seconds between two tokens.
        num_memory: tokens that it appends to a prompt, unless a request wants no blocks.
        faults: what happens to the next requests instead of an answer, each used once; ``None`` answers.
        piece: bytes of a part of the body, so that parts end anywhere; 0 for a part for each event.
        most_requests: requests after which the process ends; 0 for no end.
    """

    first: float = 0.0
    gap: float = 0.0
    num_memory: int = 0
    faults: list[str | None] = field(default_factory=list)
    piece: int = 0
    most_requests: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    num_at_once: int = 0
    most_at_once: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def listen(streams: Streams, port: int = 0) -> ThreadingHTTPServer:
    server = _Listener(("127.0.0.1", port), type("Handler", (_Handler,), {"streams": streams}))
    streams.port = server.server_address[1]
    return server


@contextmanager
def stream(**options: Any) -> Iterator[Streams]:
    """Run a server until the end of the block."""
    streams = Streams(**options)
    server = listen(streams)
    with running(server):
        yield streams


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """Serve until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Listener(ThreadingHTTPServer):  # its own, since this file is also run by its path, without the package
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        """Say nothing of clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    streams: Streams

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, b'{"version": "9.9"}')

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        streams = self.streams
        with streams.lock:
            streams.asked.append(asked)
            fault = streams.faults.pop(0) if streams.faults else None
            streams.num_at_once += 1
            streams.most_at_once = max(streams.most_at_once, streams.num_at_once)
            if streams.most_requests and len(streams.asked) > streams.most_requests:
                os._exit(7)
        try:
            getattr(self, f"_{fault or 'answer'}")(asked)
        finally:
            with streams.lock:
                streams.num_at_once -= 1
        self.close_connection = True

    def _answer(self, asked: dict[str, Any]) -> None:
        self._begin(chunked=True)
        for number in range(asked["max_tokens"]):
            time.sleep(self.streams.gap if number else self.streams.first)
            self._event({"choices": [{"index": 0, "text": "a"}], "usage": None})
        self._event({"choices": [], "usage": self._usage(asked)})
        self._part(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _usage(self, asked: dict[str, Any]) -> dict[str, int]:
        wants_none = asked.get("vllm_xargs", {}).get("num_blocks") == 0
        num_prompt = len(asked["prompt"]) + (0 if wants_none else self.streams.num_memory)
        return {"prompt_tokens": num_prompt, "completion_tokens": asked["max_tokens"]}

    def _to_the_end(self, asked: dict[str, Any]) -> None:
        """Answer without chunks: the body ends with the connection."""
        self._begin(chunked=False)
        usage = json.dumps({"choices": [], "usage": self._usage(asked)})
        self.wfile.write(f'data: {{"choices": [{{}}]}}\n\ndata: {usage}\n\ndata: [DONE]\n\n'.encode())

    def _refuse(self, asked: dict[str, Any]) -> None:
        self._send(500, b'{"error": {"message": "out of memory"}}')

    def _fail(self, asked: dict[str, Any]) -> None:
        """Report an error within the stream, as vLLM does."""
        self._begin(chunked=True)
        self._event({"choices": [{"index": 0, "text": "a"}]})
        self._event({"error": {"message": "engine died", "code": 500}})
        self._part(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _break(self, asked: dict[str, Any]) -> None:
        self._begin(chunked=False)
        self.wfile.write(b'data: {"choices": [{}]}\n\n')

    def _hang_up(self, asked: dict[str, Any]) -> None:
        pass

    def _sleep(self, asked: dict[str, Any]) -> None:
        time.sleep(3)

    def _nonsense(self, asked: dict[str, Any]) -> None:
        self._begin(chunked=False)
        self.wfile.write(b"data: <html>\n\ndata: [DONE]\n\n")

    def _begin(self, *, chunked: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self._part(f"data: {json.dumps(event)}\n\n".encode())

    def _part(self, text: bytes) -> None:
        size = self.streams.piece or len(text)
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    listen(Streams(first=0.01, num_memory=8, most_requests=int(sys.argv[1])), port).serve_forever(poll_interval=0.05)
