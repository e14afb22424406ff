"""What the page shows is escaped, and says what was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rim_peft.app import Session, Turn
from rim_peft.app.view import label, show_chain, show_chat, show_problem, show_readouts, show_swap, show_time
from rim_peft.data.chats import Chat
from rim_peft.inference import Readout
from rim_peft.inspection.document import Alternative, Chain

EVIL = "<img src=x onerror=alert(1)>\x1b[31m\u202e\"'&"
CHAIN = Chain("p", "so 7", "7", 40, True, True, 2400.0, 80.0, 2)
SWAP = Alternative("swapped", "", "q?", "blue", "blue", "blue", 0.5, True, False)
TURN = Turn("q?", 2, "7", 84.4, True)


def chat(turn: Turn) -> Session:
    session = Session(Chat([{"role": "system", "content": turn.text}]))
    session.turns.append(turn)
    return session


def readout(block: int, text: str, *log_probs: float) -> Readout:
    return Readout(block, text, [1] * len(log_probs), list(log_probs), torch.zeros(2))


@pytest.mark.parametrize(
    "show",
    [
        lambda: str(show_chat(chat(replace(TURN, question=EVIL, answer=EVIL)))),
        lambda: show_readouts([readout(1, EVIL, -0.1)]),
        lambda: show_chain(replace(CHAIN, text=EVIL, answer=EVIL, agrees=False)),
        lambda: show_swap(replace(SWAP, text=EVIL, donor=EVIL, donor_answer=EVIL, answer=EVIL)),
        lambda: show_problem(ValueError(EVIL)),
    ],
)
def test_texts_are_escaped(show: Callable[[], str]) -> None:
    found = show()
    assert "&lt;img src=x onerror=alert(1)&gt;" in found
    assert not {"<img", "\x1b", "\u202e"} & {part for part in ("<img", "\x1b", "\u202e") if part in found}


def test_a_row_a_block() -> None:
    found = show_readouts([readout(1, "red", -0.1, -0.2), readout(2, "", -3.0), readout(3, "red", 0.0)])
    rows = found.split("<tr>")[1:]
    assert [f">{text}<" in row for text, row in zip(("red", "(nothing)", "red"), rows, strict=True)] == [True] * 3
    for chance, row in zip((math.exp(-0.3), math.exp(-3), 1.0), rows, strict=True):
        assert f'value="{chance:.3f}"' in row
    assert "74 %" in rows[0]
    assert ['class="kept"' in row for row in rows] == [True, False, True]


def test_times_stand_beside_each_other() -> None:
    assert "84 ms</span> after 2 blocks" in show_time(TURN)
    assert "limit of tokens" in show_time(replace(TURN, is_complete=False))
    found = show_chain(CHAIN)
    assert "2.4 s</span> for 40 tokens, 30 times as long" in found
    assert "80 ms for 2 tokens after its blocks" in found
    assert "The same answer." in found
    found = show_chain(replace(CHAIN, ms=90.0, agrees=False, answer=None, is_complete=False))
    assert "times" not in found
    assert "Its answer: none that can be read. It reached the limit" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the other question's answer: it comes from the blocks"),
        ({"agrees": True}, "The answer stays"),
        ({"answer": "red"}, "changes, but is not the other question's"),
        ({"answer": None, "donor_answer": None}, "changes, but is not"),
        ({"donor": [{"role": "user", "content": "in a chat"}]}, "in a chat"),
    ],
)
def test_a_swap_says_where_the_answer_comes_from(change: dict[str, object], message: str) -> None:
    assert message in show_swap(replace(SWAP, **change))


def test_a_chat_is_shown_with_what_was_before() -> None:
    shown = show_chat(chat(replace(TURN, answer="")))
    assert [message["role"] for message in shown] == ["system", "user", "assistant"]
    assert shown[-1]["content"] == "(nothing)"
    assert show_chat(chat(replace(TURN, is_complete=False)))[-1]["content"] == "7 …"
    assert label("a\n  b \x07") == "a b \\x07"
