"""A server as a teacher: what it is sent, and everything that it may answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rim_peft.chains.options import ChainOptions
from rim_peft.chains.server import Endpoint, ServerError, ServerTeacher
from rim_peft.chains.teachers import Draft, Request
from rim_peft.data.chats import Chat
from rim_peft.data.examples import Templates
from tests.integration.openai_server import Server, serve


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(lambda prompt, seed: (f"{prompt.strip()} {seed}", "stop")) as running:
        yield running


def make(server: Server, *, stops: tuple[str, ...] = (), key: str | None = None, **patience: Any) -> ServerTeacher:
    endpoint = Endpoint(
        server.url, key, **{"timeout_seconds": 5.0, "retries": 2, "first_wait_seconds": 0.01, **patience}
    )
    return ServerTeacher(endpoint, "tiny", Templates(prompt="Q: {question}\n"), ChainOptions(seed=3), stops=stops)


def write(teacher: ServerTeacher, questions: list[Any]) -> dict[int, Draft]:
    requests = [Request(question, seed) for seed, question in enumerate(questions)]
    return dict(teacher.write(requests, lambda: False))


def test_what_is_sent_and_read(server: Server) -> None:
    drafts = write(make(server, stops=("\nQ:",), key="secret"), ["a", "b"])
    assert drafts == {0: Draft("Q: a 0", 3, 2), 1: Draft("Q: b 1", 3, 2)}
    path, headers, payload = next(asked for asked in server.asked if asked[2]["seed"] == 0)
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert payload == {
        "model": "tiny",
        "prompt": "Q: a\n",
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 256,
        "seed": 0,
        "stop": ["\nQ:"],
    }
    chat = [{"role": "user", "content": "c"}]
    assert write(make(server), [chat])[0].text == "c 0"
    assert server.asked[-1][0] == "/v1/chat/completions"
    assert server.asked[-1][2]["messages"] == chat
    assert "stop" not in server.asked[-1][2]
    assert "Authorization" not in server.asked[-1][1]


def test_tools_and_variables_of_a_row_are_sent(server: Server) -> None:
    beside: dict[str, Any] = {"tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": False}}
    chat = Chat([{"role": "user", "content": "c"}], **beside)
    write(make(server), [chat])
    sent = server.asked[-1][2]
    assert {name: sent[name] for name in ("messages", *beside)} == {"messages": list(chat), **beside}


def test_cut_and_stopped_answers(server: Server) -> None:
    server.teach = lambda prompt, seed: ("a\nQ: b", "length" if seed else "stop")
    drafts = write(make(server, stops=("\nQ:",)), ["?", "?"])
    assert [(drafts[index].text, drafts[index].is_cut) for index in (0, 1)] == [("a", False), ("a", True)]


@pytest.mark.parametrize("fault", ["error", "busy", "nonsense", "empty_choices", "half", "hang_up"])
def test_what_passes_is_asked_again(server: Server, fault: str) -> None:
    server.faults = [fault, fault]
    assert write(make(server), ["a"])[0].text == "Q: a 0"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", r"HTTP 500 \(out of memory\) after 3 attempts"),
        ("busy", r"HTTP 429 \(Too Many Requests\) after 3 attempts"),
        ("nonsense", r"an answer without choices: '<html>It works!</html>' after 3 attempts"),
        ("half", r"after 3 attempts\. Start or correct the server"),
        ("hang_up", r"after 3 attempts\. Start or correct the server"),
    ],
)
def test_what_does_not_pass_is_one_error_and_the_others_are_kept(server: Server, fault: str, message: str) -> None:
    server.faults = [None, fault, fault, fault]
    drafts = make(server).write([Request("a", 0), Request("b", 1)], lambda: False)
    assert next(drafts)[1].text.startswith("Q: ")
    with pytest.raises(ServerError, match=rf"^url: {server.url} must answer.*{message}"):
        next(drafts)
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuse", r"HTTP 400 \(top_k must be positive\)\. Correct the options"),
        ("unauthorized", r"HTTP 401 \(no key\)\. Set OPENAI_API_KEY"),
        ("redirect", r"HTTP 302"),
    ],
)
def test_refusals_are_not_repeated_nor_redirects_followed(server: Server, fault: str, message: str) -> None:
    server.faults = [fault]
    with pytest.raises(ServerError, match=message):
        write(make(server, key="secret"), ["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("fault", ["long", "long_500"])
def test_a_prompt_that_is_too_long_is_a_draft_with_a_problem(server: Server, fault: str) -> None:
    server.faults = [fault]
    assert write(make(server), ["a"])[0] == Draft("", problem="too long")


def test_a_slow_answer_times_out_though_each_byte_is_in_time(server: Server) -> None:
    server.faults = ["slow"]
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer within 0\.3 seconds after 1 attempt\. "):
        write(make(server, timeout_seconds=0.3, retries=0), ["a"])
    assert time.monotonic() - started < 3


def test_a_server_that_is_away(server: Server) -> None:
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ServerError, match=r"url: http://127\.0\.0\.1:9/v1 must answer.*refused"):
        write(make(server), ["a"])


def test_a_stopped_run_does_not_wait_for_answers(server: Server) -> None:
    server.faults = ["slow"]
    started = time.monotonic()
    assert list(make(server, timeout_seconds=60).write([Request("a", 0)], lambda: True)) == []
    assert time.monotonic() - started < 3


def test_separate_reasoning_goes_back_between_its_tags(server: Server) -> None:
    teacher = make(server)
    body = b'{"choices": [{"message": {"content": "#### 4", "reasoning_content": "2+2=4"}, "finish_reason": "stop"}]}'
    assert teacher._read(body) == Draft("<think>\n2+2=4\n</think>\n#### 4")
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}], "usage": null}'
    assert teacher._read(body) == Draft("", is_cut=True)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://", "http://me:secret@x/v1", "http://x/v1?key=secret", "http://x:y/"]
)
def test_addresses_are_checked_and_passwords_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url: must be an address such as") as caught:
        Endpoint(url)
    assert "me:secret" not in str(caught.value)
