"""Load on a server with OpenAI's protocol: clients that each send a request once their last one is answered.

All clients are tasks of one event loop, by the standard library alone. Answers are streams, so that the first token is
seen when it comes. A request is its own connection, to the loopback interface.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
_SHOWN = 200


@dataclass(frozen=True)
class Answered:
    """One answer: seconds to its first token and to its end, tokens of the prompt with its blocks, tokens written."""

    first: float
    end: float
    num_prompt: int
    num_written: int


@dataclass
class Load:
    """What a load took.

    Attributes:
        answers: complete answers, in the order in which they ended.
        errors: how many requests failed, by reason.
        seconds: from the first request to the end of the last one.
        busy: share of that time in which the clients computed; near 1 they are slower than the server.
    """

    answers: list[Answered] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    busy: float = 0.0


class _FailedError(Exception):
    """A request without a complete answer."""


def send_load(port: int, requests: Sequence[dict[str, Any]], *, num_clients: int, most_seconds: float) -> Load:
    """Send requests, at most ``num_clients`` at a time, and return what came back.

    Args:
        port: of a server on the loopback interface.
        requests: bodies of ``/v1/completions``, with ``stream`` and ``stream_options.include_usage``.
        num_clients: clients, which begin at the same time.
        most_seconds: what is not answered by then counts as an error.
    """
    return asyncio.run(_send_load(port, iter(requests), num_clients, most_seconds))


async def _send_load(port: int, left: Iterator[dict[str, Any]], num_clients: int, most_seconds: float) -> Load:
    load = Load()
    started, computed = time.perf_counter(), time.thread_time()

    async def work() -> None:
        for request in left:
            time_left = started + most_seconds - time.perf_counter()
            try:
                load.answers.append(await asyncio.wait_for(_ask(port, request), max(0.0, time_left)))
            except asyncio.TimeoutError:
                load.errors[f"no answer within {most_seconds:g} s of the load"] += 1
            except (_FailedError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
                name = "" if isinstance(error, _FailedError) else f"{type(error).__name__}: "
                load.errors[f"{name}{error}"[:_SHOWN]] += 1

    await asyncio.gather(*(work() for _ in range(num_clients)))
    load.seconds = time.perf_counter() - started
    load.busy = (time.thread_time() - computed) / load.seconds
    return load


async def _ask(port: int, request: dict[str, Any]) -> Answered:
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        status, headers = await _read_head(reader)
        pieces = _pieces(reader, headers)
        if status != 200:
            text = b"".join([piece async for piece in pieces]).decode(errors="replace")
            raise _FailedError(f"HTTP {status}: {text}")
        return await _read_stream(pieces, started)
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line = (await reader.readline()).decode("latin-1")
    if not line.startswith("HTTP/1."):
        raise _FailedError("the connection was closed before an answer")
    headers = {}
    while header := (await reader.readline()).decode("latin-1").strip():
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip().lower()
    return int(line.split()[1]), headers


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Yield the parts of a body as they come."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(2**16):
            yield piece


async def _read_stream(pieces: AsyncIterator[bytes], started: float) -> Answered:
    """Read server-sent events, of which only the last is parsed: the others' time would be taken from the clients."""
    first, last = None, b""
    async for data in _events(pieces):
        if data == b"[DONE]":
            end = time.perf_counter() - started
            event = json.loads(last or b"{}")
            if not event.get("usage"):
                raise _FailedError(f"the stream ended without its usage: {json.dumps(event)}")
            num_prompt, num_written = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
            return Answered(end if first is None else first, end, num_prompt, num_written)
        first = time.perf_counter() - started if first is None else first
        last = data
    raise _FailedError("the stream broke off")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5), percentile([4.0, 1.0, 3.0, 2.0], 0.95)
    (2.0, 4.0)
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def describe_errors(errors: Counter[str]) -> str:
    """Return how many errors there were, with the most frequent reasons.

    >>> describe_errors(Counter({"HTTP 500": 2, "the stream broke off": 1})), describe_errors(Counter())
    ('3 (2 × HTTP 500; 1 × the stream broke off)', 'none')
    """
    shown = [f"{number} × {reason}" for reason, number in errors.most_common(3)]
    return f"{errors.total()} ({'; '.join(shown)})" if errors else "none"
