"""A server that speaks OpenAI's protocol as a teacher, such as vLLM or llama.cpp."""

from __future__ import annotations

import http.client
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, ClassVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, build_opener
from urllib.request import Request as HTTPRequest

from rim_peft.chains.options import ChainOptions
from rim_peft.chains.teachers import Draft, Request, cut_at
from rim_peft.data.chats import as_chat
from rim_peft.data.examples import Templates
from rim_peft.values import cut, shown

_MOST_BYTES = 1 << 26
_LONGEST_WAIT = 60.0
_AGAIN = (408, 409, 425, 429)
"""Statuses, besides those of 500 and more, after which the same request may succeed."""

_TOO_LONG = re.compile(r"context.{0,16}(length|size|window)", re.IGNORECASE | re.DOTALL)
"""What servers say of a prompt without room: vLLM with status 400, llama.cpp with 400 or 500."""

_HERE = ("localhost", "127.0.0.1", "::1")


class ServerError(ConnectionError):
    """A server cannot be used; the message says why and what to do."""


class _PassingError(Exception):
    """An attempt failed, but another one may succeed; ``wait`` is how many seconds the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and how patient to be with it.

    Attributes:
        url: its address up to ``/v1``.
        key: the API key, sent as a bearer token; never written anywhere.
        timeout_seconds: how long an answer may take.
        retries: attempts after the first.
        first_wait_seconds: time before the second attempt; it doubles with each further one.

    Raises:
        ValueError: the URL is not one of a server.
    """

    url: str
    key: str | None = None
    timeout_seconds: float = 300.0
    retries: int = 4
    first_wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_plain = not (parts.username or parts.password or parts.query or parts.fragment) and parts.port != 0
            is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and self.url.isprintable()
        except ValueError:
            is_server = is_plain = False
        if not is_server or not is_plain:
            raise ValueError(
                f"url: must be an address such as http://localhost:8000/v1, without name, password or query, got "
                f"{shown(re.sub('//[^/]*@', '//...@', self.url))}. An API key belongs into OPENAI_API_KEY."
            )


class _NoRedirects(HTTPRedirectHandler):
    """Refuses redirects, which could carry the key to another server."""

    def redirect_request(self, *unused: Any) -> None:
        """Follow none."""
        return


class ServerTeacher:
    """A model on a server, asked for a batch of chains at the same time."""

    needs_whole_batches: ClassVar[bool] = False

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        templates: Templates,
        options: ChainOptions,
        *,
        stops: Collection[str] = (),
    ) -> None:
        self._endpoint, self._model, self._templates = endpoint, model, templates
        self._options, self._stops = options, list(stops)
        self._gave_up = threading.Event()
        is_here = urlsplit(endpoint.url).hostname in _HERE
        self._opener: OpenerDirector = build_opener(_NoRedirects, *([ProxyHandler({})] if is_here else []))

    def write(self, requests: Sequence[Request], is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Draft]]:
        """Ask for all drafts at the same time, and yield each as it arrives.

        Raises:
            ServerError: a request failed for good; all others that succeed are yielded first.
        """
        results: queue.Queue[tuple[int, Draft | Exception]] = queue.Queue()
        for index, request in enumerate(requests):
            # Daemons, so that a stopped run does not wait for slow answers.
            threading.Thread(target=self._answer, args=(index, request, results), daemon=True).start()
        failure: Exception | None = None
        num_left = len(requests)
        while num_left:
            try:
                index, found = results.get(timeout=0.1)
            except queue.Empty:
                if is_stopped():
                    return
                continue
            num_left -= 1
            if isinstance(found, Draft):
                yield index, found
            elif failure is None:
                failure = found
                self._gave_up.set()
        if failure is not None:
            raise failure

    def _answer(self, index: int, request: Request, results: queue.Queue[tuple[int, Draft | Exception]]) -> None:
        try:
            results.put((index, self._ask(request)))
        except Exception as error:  # handed to the main thread, which raises it
            results.put((index, error))

    def _ask(self, request: Request) -> Draft:
        path, payload = self._payload(request)
        wait = self._endpoint.first_wait_seconds
        for attempt in range(1, self._endpoint.retries + 2):
            try:
                return self._read(self._post(path, payload))
            except _PassingError as error:
                reason, asked = str(error), error.wait
            is_last = attempt == self._endpoint.retries + 1
            if is_last or self._gave_up.wait(min(max(wait, asked or 0.0), _LONGEST_WAIT)):
                break
            wait *= 2
        attempts = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        raise self._error(
            f"must answer as OpenAI's protocol says, got {reason} after {attempts}",
            "Start or correct the server, or allow more time (--timeout)",
        )

    def _error(self, problem: str, remedy: str) -> ServerError:
        return ServerError(
            f"url: {self._endpoint.url} {problem}. {remedy}; then run the same command again: all chains that were "
            "written are kept."
        )

    def _payload(self, request: Request) -> tuple[str, dict[str, Any]]:
        options = self._options
        payload: dict[str, Any] = {
            "model": self._model,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
            "seed": request.seed,
            **({"stop": self._stops} if self._stops else {}),
        }
        if isinstance(request.question, str):
            return "/completions", {**payload, "prompt": self._templates.prompt.format(question=request.question)}
        chat = as_chat(request.question)
        beside = {"tools": chat.tools, "chat_template_kwargs": chat.chat_template_kwargs}
        payload.update({name: value for name, value in beside.items() if value})
        return "/chat/completions", {**payload, "messages": list(chat)}

    def _post(self, path: str, payload: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._endpoint.key:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        address = self._endpoint.url.rstrip("/") + path
        request = HTTPRequest(address, json.dumps(payload).encode(), headers, method="POST")  # noqa: S310 - checked
        timeout = self._endpoint.timeout_seconds
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return _read_until(response, deadline)
        except HTTPError as error:
            with error:
                return self._refused(error, error.headers)
        except TimeoutError:
            raise _PassingError(f"no answer within {timeout:g} seconds") from None
        except URLError as error:
            reason = f"no answer within {timeout:g} seconds" if isinstance(error.reason, TimeoutError) else error.reason
            raise _PassingError(cut(str(reason))) from None
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(cut(f"{type(error).__name__}: {error}")) from None

    def _refused(self, error: HTTPError, headers: Message) -> bytes:
        """Raise for a status that is an error; an answer is returned for a prompt that is too long."""
        try:
            text = error.read(1 << 16).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        reason = f"HTTP {error.code} ({_message_of(text) or error.reason})"
        if error.code in (400, 413, 422, 500) and _TOO_LONG.search(text):
            return b'{"too_long": true}'
        if error.code in _AGAIN or error.code >= 500:
            after = headers.get("Retry-After", "") or ""
            raise _PassingError(reason, float(after) if after.isdecimal() else None)
        remedies = {401: "Set OPENAI_API_KEY", 403: "Set OPENAI_API_KEY", 404: "Correct --url, --teacher or --chat"}
        raise self._error(f"refuses the request, {reason}", remedies.get(error.code, "Correct the options"))

    def _read(self, body: bytes) -> Draft:
        """Read an answer.

        Raises:
            _PassingError: it is not one of the protocol.
        """
        try:
            answer: Any = json.loads(body)
            if answer.get("too_long") is True:
                return Draft("", problem="too long")
            choice = answer["choices"][0]
            text = _text_of(choice)
            usage = answer.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _PassingError(f"an answer without choices: {shown(body[:200].decode(errors='replace'))}") from None
        return Draft(cut_at(text, self._stops), counts[0], counts[1], is_cut=choice.get("finish_reason") == "length")


def _text_of(choice: Any) -> str:
    """Return the text of a choice; reasoning that a chat server has separated goes back between its tags."""
    if "message" not in choice:
        parts = [choice["text"]]
    else:
        message = choice["message"]
        parts = [message.get("content") or ""]
        if reasoning := message.get("reasoning_content") or message.get("reasoning"):
            parts = ["<think>\n", reasoning, "\n</think>\n", *parts]
    if not all(isinstance(part, str) for part in parts):
        raise TypeError
    return "".join(parts)


def _message_of(text: str) -> str:
    """Return the message in the body of an error."""
    try:
        found: Any = json.loads(text)
        error = found.get("error", found)
        return cut(str(error["message"] if isinstance(error, dict) else error), most=200)
    except (ValueError, LookupError, AttributeError, RecursionError):
        return cut(text, most=200)


def _read_until(response: Any, deadline: float) -> bytes:
    """Read a whole body, at most until a deadline: the socket's timeout only limits each part."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _MOST_BYTES:
            raise _PassingError(f"an answer of more than {_MOST_BYTES:,} bytes")
    return b"".join(parts)
