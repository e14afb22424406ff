"""The app on tiny models: what its actions give, against the functions that they are made of; its page in Gradio."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rim_peft.app import Playground, Session, serve
from rim_peft.app.page import Events
from rim_peft.cli.main import main
from rim_peft.data.chats import Chat
from rim_peft.inference import BlockAnswerer, answer_questions, read_blocks
from rim_peft.inference.swapping import answer_with_swapped_blocks
from rim_peft.inspection import Options
from rim_peft.run import Run
from tests.conftest import build_base, build_rim, build_tokenizer

QUESTION, DONOR = "Ann has 3 apples?", "Bob has 7 plates?"
SETTINGS: dict[str, Any] = {"max_new_tokens": 6}
SYSTEM = {"role": "system", "content": "brief"}
EVIL = "<img src=x onerror=document.title='run'> ${document.title='run'} {{value}} \u202e"


def play(*questions: Any, **options: Any) -> Playground:
    run = Run(build_rim(num_blocks=3), build_tokenizer(**options))
    return Playground(run, name="demo", questions=questions, options=Options(chain_tokens=5), **SETTINGS)


def test_a_question_alone_gets_the_adapters_answer() -> None:
    playground, session = play(), Session()
    model, tokenizer = build_rim(num_blocks=3), build_tokenizer()
    for num_blocks in (3, 1):
        turn = playground.ask(session, QUESTION, num_blocks=num_blocks)
        (expected,) = answer_questions(model, tokenizer, [QUESTION], num_blocks=num_blocks, **SETTINGS)
        assert (turn.answer, turn.num_blocks, turn.text) == (expected, num_blocks, QUESTION)
        assert turn.ms > 0
        (readouts,) = read_blocks(model, tokenizer, [QUESTION], num_blocks=num_blocks, **SETTINGS)
        assert [readout.text for readout in playground.read(turn)] == [readout.text for readout in readouts]
        assert readouts[-1].text == turn.answer
    assert len(session.turns) == 2


def test_turns_continue_the_dialogue_with_any_number_of_blocks() -> None:
    playground, session = play(), Session()
    answerer = BlockAnswerer(build_rim(num_blocks=3), build_tokenizer(), **SETTINGS)
    first = playground.ask(session, QUESTION, num_blocks=3)
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.answer}]
    kept = []
    for text, num_blocks in (("And then?", 3), ("Why?", 3), ("How?", 2)):
        turn = playground.ask(session, text, num_blocks=num_blocks, continues=True)
        said.append({"role": "user", "content": text})
        other = BlockAnswerer(answerer.model, answerer.tokenizer, num_blocks=num_blocks, **SETTINGS)
        assert turn.answer == next(other.answer([said]))
        assert list(turn.question) == said
        assert playground.read(turn)[-1].text == turn.answer
        said.append({"role": "assistant", "content": turn.answer})
        assert session.conversation is not None
        kept.append(session.conversation.num_kept)
    assert kept[1] > 0 == kept[0] == kept[2]  # other blocks begin with an empty cache
    alone = playground.ask(session, DONOR, num_blocks=3)
    assert alone.question == DONOR
    assert [message["content"] for message in session.messages] == [DONOR, alone.answer]


def test_an_example_brings_the_messages_before_it() -> None:
    chat = Chat([SYSTEM, {"role": "user", "content": QUESTION}], chat_template_kwargs={"brief": True})
    playground, session = play(chat, QUESTION), Session()
    assert playground.is_chat
    begun, text = playground.start(session, 0)
    assert (list(begun.begun), begun.begun.chat_template_kwargs, text) == ([SYSTEM], {"brief": True}, QUESTION)
    turn = playground.ask(begun, text, num_blocks=3, continues=True)
    assert list(turn.question) == list(chat)
    assert isinstance(turn.question, Chat)
    assert turn.question.chat_template_kwargs == {"brief": True}
    assert playground.start(session, 1) == (session, QUESTION)
    assert not play(QUESTION).is_chat
    assert not play(chat, chat_template=None).can_continue


def test_blocks_are_swapped_with_a_question_of_as_many_tokens() -> None:
    playground, session = play("much longer than the others", DONOR), Session()
    turn = playground.ask(session, QUESTION, num_blocks=3)
    model, tokenizer = build_rim(num_blocks=3), build_tokenizer()
    (expected,) = answer_with_swapped_blocks(model, tokenizer, [QUESTION], [DONOR], **SETTINGS)
    for other in ("", DONOR):
        found = playground.swap(turn, other)
        assert (found.text, found.donor) == (expected, DONOR)
    with pytest.raises(ValueError, match=r"donor: must be .* has 18 tokens as well, .* got prompts of 6 tokens\."):
        playground.swap(turn, "short")
    with pytest.raises(ValueError, match="got no other question"):
        play().swap(turn)
    asked = playground.ask(session, DONOR, num_blocks=3, continues=True)
    assert playground.swap(asked, "X" * len(DONOR)).donor == [
        *asked.question[:-1],
        {"role": "user", "content": "X" * 17},
    ]


def test_the_base_writes_alone() -> None:
    playground, session = play(), Session()
    turn = playground.ask(session, QUESTION, num_blocks=3)
    chain = playground.write_chain(turn)
    assert chain.num_tokens <= 5
    assert chain.ms > 0 < chain.adapter_ms
    assert playground.ask(session, QUESTION, num_blocks=3).answer == turn.answer  # the adapter is back


def test_events_give_the_panels_and_errors_in_their_place() -> None:
    events, session = Events(play(DONOR)), Session()
    first, last = events.ask(session, QUESTION, 3.0, False)
    assert first[0] is session
    assert first[4] == ""
    assert last[4].count("<tr>") == 3
    assert [message["role"] for message in last[1]] == ["user", "assistant"]
    assert (last[2], last[5:]) == ("", ("", ""))
    ((_, chat, text, problem, *rest),) = events.ask(session, " ", 3, False)
    assert (len(chat), text, rest) == (2, " ", ["", "", ""])
    assert "question: must not be empty" in problem
    assert "times as long" in events.write_chain(session) or "for" in events.write_chain(session)
    assert "The other question" in events.swap(session, "")
    assert "Write one with as many tokens" in events.swap(session, "x")
    assert "must be asked first" in events.swap(Session(), "")
    assert events.choose(session, 0)[0::2] == (session, DONOR)
    emptied, *panels = events.clear()
    assert emptied.turns == []
    assert panels == [[], "", "", "", "", ""]


def test_an_adapter_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="adapter: must answer after memory blocks"):
        Playground(Run(build_rim(num_blocks=0), build_tokenizer()))


def test_rows_that_cannot_be_read_give_no_examples(caplog: pytest.LogCaptureFixture) -> None:
    assert Playground(Run(build_rim(), build_tokenizer())).questions == []
    assert "no examples are shown: task: must be given" in caplog.text


def test_without_gradio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(tmp_path)]) == 1  # before the adapter is looked for
    assert capsys.readouterr().err == (
        "rim-peft: error: ImportError: the app needs Gradio: pip install 'rim-peft[app]'\n"
    )
    with pytest.raises(SystemExit):
        main(["app", str(tmp_path), "--port", "70000"])
    assert "--port: must be at most 65535, got 70000" in capsys.readouterr().err


def test_a_port_in_use_is_refused() -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port: must be free .* got port {port} on 127.0.0.1. .* another port"):
            serve(play(), port=port)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_at_once_while_it_answers(tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("gradio")
    client_module = pytest.importorskip("gradio_client")
    build_base(max_position_embeddings=40_000).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    build_rim(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-m", "rim_peft", "app", str(tmp_path / "adapter"), "--chain-tokens", "30000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interruption
    ) as app:
        try:
            assert app.stdout is not None
            client = client_module.Client(app.stdout.readline().split()[0], verbose=False, analytics_enabled=False)
            client.predict(QUESTION, 2, False, api_name="/ask")
            chain = client.submit(api_name="/write_chain")
            time.sleep(2)
            assert not chain.done()
            app.send_signal(number)
            _, errors = app.communicate(timeout=4)  # a server waits five seconds for its threads
        finally:
            app.kill()
    assert app.returncode == 128 + number
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] in ("rim-peft: interrupted", "rim-peft: terminated")


def _heed_interruption() -> None:
    """Undo that a shell starts what is in the background deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_served_page_answers_and_allows_no_other_host() -> None:
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    client_module = pytest.importorskip("gradio_client")
    page = serve(play(DONOR, EVIL))
    try:
        assert page.local_url.startswith("http://127.0.0.1:")
        assert not page.analytics_enabled
        assert page.share_url is None
        response = httpx.get(page.local_url)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        sent = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("a.txt", b"more than a byte")})
        assert sent.status_code == 413
        client = client_module.Client(page.local_url, verbose=False, analytics_enabled=False)
        for question in (QUESTION, EVIL):
            chat, text, time, readouts, chain, swapped = client.predict(question, 3, False, api_name="/ask")
            assert (text, chain, swapped) == ("", "", "")
            assert "after 3 blocks" in time
            assert readouts.count("<tr>") == 3
        assert len(chat) == 4  # both turns: the server keeps the chat
        assert "limit of tokens" in client.predict(api_name="/write_chain")
        assert "Write one with as many tokens" in client.predict("x", api_name="/swap")
        assert client.predict(api_name="/clear")[0] == []
    finally:
        page.close()
