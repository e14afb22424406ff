"""Conversations of several turns in the task ``rows``, and what their chat template gets beside the messages."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.chats import CHAT_COLUMNS, Chat
from rim_peft.data.examples import ROW_ERROR, Example, RowError, read_example
from rim_peft.data.sources import CONVERSATION, hold_out
from rim_peft.data.tokenization import tokenize_example
from rim_peft.run.rows import fingerprint
from rim_peft.tasks import get_task
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows


def turn(role: str, content: str, **parts: str) -> dict[str, str]:
    return {"role": role, "content": content, **parts}


SYSTEM = turn("system", "Be brief.")
CONVERSATION_ROW = [
    SYSTEM,
    turn("user", "1 + 1?"),
    turn("assistant", "<think>\n1+1=2\n</think>\n\n2"),
    turn("user", "And 1 more?"),
    turn("assistant", "3", reasoning_content="2+1=3"),
]
PLAIN_ROW = [turn("user", "Hi"), turn("assistant", "Hello")]


def read(*rows: dict[str, Any], folder: Path, split: str = "test", streaming: bool = False, **options: Any) -> Any:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return get_task("rows", **options).load(split, path=str(folder), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_turn_of_the_assistant_is_a_row(tmp_path: Path, streaming: bool) -> None:
    rows = [{"messages": CONVERSATION_ROW}, {"messages": PLAIN_ROW}]
    table = read(*rows, folder=tmp_path, streaming=streaming, turns="all", split_steps="lines")
    found = [read_example(row) for row in table]
    earlier = [SYSTEM, CONVERSATION_ROW[1], turn("assistant", "2"), CONVERSATION_ROW[3]]
    assert found == [
        Example(earlier[:2], answer="2", steps=("1+1=2",)),
        Example(earlier, answer="3", steps=("2+1=3",)),
        Example(PLAIN_ROW[:1], answer="Hello"),
    ]
    tokenizer = build_tokenizer()
    if not streaming:  # tokenised as the plain conversations so far
        ids = [row["prompt_ids"] for row in prepare_rows(table, tokenizer, needs_steps=False)]
        assert ids == [tokenize_example(example, tokenizer)["prompt_ids"] for example in found]
        texts = tokenizer.batch_decode(ids)
        assert texts[1].startswith(texts[0])


def test_by_default_the_last_turn_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rim_peft"):
        (row,) = read({"messages": CONVERSATION_ROW}, folder=tmp_path, split_steps="lines")
    assert (row["answer"], row["steps"], len(row["question"])) == ("3", ["2+1=3"], 4)
    assert "1 of the first 1 conversations have several turns of the assistant: only the last is ans" in caplog.text
    assert "data.options.turns=all" in caplog.text


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_text_is_not_question_and_answer_at_once(turns: str, tmp_path: Path) -> None:
    (row,) = read({"messages": json.dumps(PLAIN_ROW)}, folder=tmp_path, turns=turns)
    assert "question: messages is the answer too, so it must be a list of chat messages, got the text" in row[ROW_ERROR]
    columns = {"question": "text", "answer": "text"}
    (row,) = read({"text": "1 + 1?\n#### 2"}, folder=tmp_path, columns=columns, answer_from="after:####", turns=turns)
    assert "question: text is the answer too" in row[ROW_ERROR]


def test_a_prompts_earlier_turns_are_not_answered(tmp_path: Path) -> None:
    """TRL trains on completions only."""
    row = {"prompt": CONVERSATION_ROW[:4], "completion": [turn("assistant", "3")]}
    (found,) = read(row, folder=tmp_path, turns="all")
    assert (found["answer"], len(found["question"])) == ("3", 4)


def test_nested_conversations_are_found(tmp_path: Path) -> None:
    columns = {"question": "data.turns", "answer": "data.turns"}
    row = {"data": {"turns": [*PLAIN_ROW, *PLAIN_ROW]}}
    found = read(row, folder=tmp_path, turns="all", columns=columns)
    assert [len(row["question"]) for row in found] == [1, 3]


def test_a_bad_turn_leaves_the_others(tmp_path: Path) -> None:
    twice = [*PLAIN_ROW, turn("assistant", "Hello again")]
    open_end = [*PLAIN_ROW, turn("user", "And?")]
    rows = [{"messages": PLAIN_ROW}, {"messages": twice}, {"messages": open_end}, {"messages": PLAIN_ROW[:1]}]
    found = list(read(*rows, folder=tmp_path, turns="all"))
    assert [row["answer"] for row in found] == ["Hello", "Hello", None, "Hello", None, None]
    errors = [row[ROW_ERROR] for row in found if row[ROW_ERROR]]
    assert errors[0].startswith(
        "test.jsonl line 2 turn 2: answer: must be one message of the assistant after the quest"
    )
    assert errors[0].endswith("since answers of several messages are not read, got assistant, assistant")
    assert errors[1].startswith(
        "test.jsonl line 3 turn 2: answer: must be one message of the assistant after the question, got"
    )
    assert errors[2].startswith(
        "test.jsonl line 4: answer: must be one message of the assistant after the question, but"
    )
    with pytest.raises(RowError, match="after the question, but the conversation has none"):
        get_task("rows").read_row({"messages": PLAIN_ROW[:1]})


def test_steps_beside_the_messages_are_those_of_the_last_turn(tmp_path: Path) -> None:
    row = {"messages": [*CONVERSATION_ROW[:4], turn("assistant", "3")], "steps": ["2+1=3"]}
    plain = {"messages": PLAIN_ROW, "steps": ["greet"]}
    found = list(read(row, plain, folder=tmp_path, turns="all", split_steps="lines"))
    assert [(row["answer"], row["steps"]) for row in found] == [
        ("2", ["1+1=2"]),  # its own
        ("3", ["2+1=3"]),
        ("Hello", ["greet"]),
    ]
    stepwise = {"messages": [*PLAIN_ROW, *PLAIN_ROW], "completions": ["a", "b"], "labels": [True, True]}
    found = list(read(stepwise, folder=tmp_path, turns="all"))
    assert [row["steps"] for row in found] == [None, ["a", "b"]]
    nested = {"messages": [{**message, "say": ["x"]} for message in [*PLAIN_ROW, *PLAIN_ROW]]}
    found = list(read(nested, folder=tmp_path, turns="all", columns={"steps": "messages.-1.say"}))
    assert [row["steps"] for row in found] == [["x"], ["x"]]


@pytest.mark.parametrize(("turns", "is_warned"), [("last", True), ("all", False)])
def test_turns_in_rows_of_their_own_are_noticed(
    turns: str, is_warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [{"question": row["messages"][:end], "answer": "b"} for row in conversations(3) for end in (1, 3)]
    alone = {"question": [turn("user", "0?"), turn("assistant", "other"), turn("user", "Why?")], "answer": "b"}
    others = [{"question": "a text", "answer": "b"}, {"question": None, "answer": "b"}]
    read(*parts, alone, *others, folder=tmp_path, turns=turns)
    said = "4 of the first 9 rows continue the conversation of another row"
    assert (said in caplog.text) is is_warned
    caplog.clear()
    read(*[{"messages": row["messages"]} for row in conversations(3)], folder=tmp_path, turns=turns)
    assert "continue the conversation" not in caplog.text


def test_a_greeting_answers_nothing(tmp_path: Path) -> None:
    hello = turn("assistant", "Welcome!")
    rows = [{"messages": [hello, *row["messages"]]} for row in conversations(40)]
    table = read(*rows, folder=tmp_path, split="train", turns="all")
    assert {len(row["question"]) for row in table} == {2, 4}
    assert not any(table[ROW_ERROR])
    train, held_out = hold_out(table, 5)  # each conversation is one, though all begin with the same greeting
    assert len(held_out) == 10
    asked = [{row["question"][1]["content"] for row in part} for part in (train, held_out)]
    assert not asked[0] & asked[1]
    (row,) = read({"messages": [hello]}, folder=tmp_path, turns="all")
    assert "after the question, but the conversation has none" in row[ROW_ERROR]


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [turn("user", f"{n}?"), turn("assistant", "a"), turn("user", "Why?"), turn("assistant", f"b{n}")]}
        for n in range(count)
    ]


def openings(rows: Any) -> set[str]:
    return {row["question"][0]["content"] for row in rows}


def test_a_conversations_turns_stay_in_one_split(tmp_path: Path) -> None:
    table = read(*conversations(60), folder=tmp_path, split="train", turns="all")
    assert all(name in table.column_names for name in (CONVERSATION, *CHAT_COLUMNS))
    carved = get_task("rows", turns="all").load("validation", path=str(tmp_path))
    assert len(carved) > 0
    assert len(carved) + len(table) == 120
    train, held_out = hold_out(table, 10)
    for first, second in ((table, carved), (train, held_out)):
        assert not openings(first) & openings(second)
        assert all(
            len([row for row in part if row["question"][0]["content"] == text]) == 2
            for part in (first, second)
            for text in sorted(openings(part))[:3]
        )


def test_rows_of_single_turns_are_split_as_before(tmp_path: Path) -> None:
    rows = [{"messages": row["messages"][:2]} for row in conversations(40)]
    parts = []
    for turns in ("last", "all"):
        table = read(*rows, folder=tmp_path, split="train", turns=turns)
        parts.append([openings(part) for part in hold_out(table, 5)])
    assert parts[0] == parts[1]
    assert [len(part) for part in parts[0]] == [33, 5]


def test_variables_and_tools_of_rows_reach_their_chats(tmp_path: Path) -> None:
    beside = {"chat_template_kwargs": {"enable_thinking": False}, "tools": [{"name": "add"}]}
    table = read(
        {"messages": CONVERSATION_ROW, **beside},
        {"messages": PLAIN_ROW},
        folder=tmp_path,
        turns="all",
        split_steps="lines",
    )
    chats = [read_example(row).question for row in table]
    assert [isinstance(chat, Chat) for chat in chats] == [True, True, False]
    assert all(
        (chat.tools, chat.chat_template_kwargs) == tuple(beside[n] for n in ("tools", "chat_template_kwargs"))
        for chat in chats[:2]
        if isinstance(chat, Chat)
    )
    (row,) = read({"messages": PLAIN_ROW, "chat_template_kwargs": [1]}, folder=tmp_path)
    assert "chat_template_kwargs: must be a mapping" in row[ROW_ERROR]


def test_chats_without_them_keep_their_fingerprint(tmp_path: Path) -> None:
    table = read({"messages": PLAIN_ROW}, folder=tmp_path)
    plain = {"question": PLAIN_ROW[:1], "steps": None, "answer": "Hello", ROW_ERROR: None}
    assert fingerprint(table) == fingerprint([plain])
    more = read({"messages": PLAIN_ROW, "chat_template_kwargs": {"x": 1}}, folder=tmp_path)
    assert fingerprint(more) != fingerprint(table)


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match="turns: must be one of 'last', 'all' in task 'rows', got 'first'"):
        get_task("rows", turns="first")


def test_earlier_turns_are_their_answers_alone(tmp_path: Path) -> None:
    turns = [
        turn("assistant", "Welcome! #### 0"),  # a greeting is no answer
        turn("user", "2 + 2?"),
        turn("assistant", "2+2=4\n#### 4"),
        turn("user", "Thanks!"),
        turn("assistant", "You are welcome."),  # without the marker: as it is
        turn("user", "Doubled?"),
        turn("assistant", "<think>cut off"),
        turn("user", "Well?"),
        turn("assistant", "4*2=8\n#### 8"),
    ]
    said = ["Welcome! #### 0", "2 + 2?", "4", "Thanks!", "You are welcome.", "Doubled?", "<think>cut off", "Well?"]
    options = {"answer_from": "after:####", "split_steps": "lines"}
    asked = [
        read({"messages": turns}, folder=tmp_path, **options)[0]["question"],
        read({"messages": turns}, folder=tmp_path, turns="all", **options)[3]["question"],
        read({"prompt": turns[:-1], "completion": turns[-1:]}, folder=tmp_path, **options)[0]["question"],
    ]
    assert [[message["content"] for message in question] for question in asked] == [said] * 3
    taken = {"question": turns[:-1], "steps": ["4*2=8"], "answer": "8"}  # this package's own form, as it is
    assert [message["content"] for message in read(taken, folder=tmp_path)[0]["question"]] == [
        message["content"] for message in turns[:-1]
    ]


@pytest.mark.parametrize(("mark", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("training", False, None)])
def test_turns_that_are_not_to_be_trained_on_are_only_history(mark: str, no: Any, yes: Any, tmp_path: Path) -> None:
    first, second, third = (
        [turn("user", f"{n}?"), {**turn("assistant", f"{n}!"), mark: value}]
        for n, value in enumerate((no, yes, no), start=1)
    )
    rows = [{"messages": messages} for messages in (first + second, second + third, first + third, second)]
    found = read(*rows, folder=tmp_path, turns="all")
    assert found["answer"][:] == ["2!", "2!", None, "2!"]
    assert [len(question) for question in found["question"] if question] == [3, 1, 1]
    assert f"line 3: answer.{mark}: is {no!r}, so this turn is not trained on" in found[ROW_ERROR][2]
    found = read(*rows, folder=tmp_path)
    assert found["answer"][:] == ["2!", None, None, "2!"]
    assert "set data.options.turns=all" in found[ROW_ERROR][1]
    (found,) = read({"prompt": first[:1], "completion": first[1:]}, folder=tmp_path)
    assert f"answer.{mark}: is {no!r}" in found[ROW_ERROR]


@pytest.mark.parametrize("part", [{"weight": 0.5}, {"train": "no"}, {"train_detail": [{"train": False}]}])
def test_marks_that_cannot_be_followed_are_refused(part: dict[str, Any], tmp_path: Path) -> None:
    marked = [PLAIN_ROW[0], {**PLAIN_ROW[1], **part}]
    first, second = read({"messages": [*marked, *PLAIN_ROW]}, folder=tmp_path, turns="all")
    assert f"turn 1: answer.{next(iter(part))}: must be" in first[ROW_ERROR]
    assert (second["answer"], second[ROW_ERROR]) == ("Hello", None)
    (row,) = read({"messages": [{**PLAIN_ROW[0], **part}, PLAIN_ROW[1]]}, folder=tmp_path)  # the user's is no answer
    assert row["answer"] == "Hello"
