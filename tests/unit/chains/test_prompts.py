"""What a teacher is asked."""

from __future__ import annotations

from typing import Any

import pytest

from rim_peft.chains.prompts import Prompts
from rim_peft.data.chats import Chat
from rim_peft.data.examples import Example
from rim_peft.tasks.rows import OwnRows

ASKED = Example("What is {2} + 2, {answer}?", "4")
SHOWN = Example("1 + 1, doubled?", "4", ("1+1=2", "2*2=4"))


def make(split: str = "lines", answer_from: str = "after:####", **options: Any) -> Prompts:
    return Prompts(OwnRows(split_steps=split, answer_from=answer_from), **options)


def write(prompts: Prompts, example: Example, **options: Any) -> str:
    question = prompts.ask(example, **options)
    assert isinstance(question, str)
    return prompts.templates.prompt.format(question=question)


def test_examples_come_before_the_question_in_the_same_template() -> None:
    prompts = make(template="Solve {x}.\nQ: {question}\nA:\n", examples=[SHOWN])
    assert write(prompts, ASKED) == (
        "Solve {x}.\nQ: 1 + 1, doubled?\nA:\n1+1=2\n2*2=4\n#### 4\n\nSolve {x}.\nQ: What is {2} + 2, {answer}?\nA:\n"
    )
    assert prompts.stops == ("\nQ:",)
    assert make(template="{question}\n").stops == ()


def test_a_hint_shows_the_answer_and_leaves_braces_alone() -> None:
    assert write(make(template="{question}|"), ASKED, hinted=True) == (
        "What is {2} + 2, {answer}?\n(Hint: the answer is 4.)|"
    )
    prompts = make(template="{question}|", hint="[{answer}] {question}")
    assert write(prompts, ASKED, hinted=True) == "[4] What is {2} + 2, {answer}?|"


def test_chats_have_examples_as_turns_and_keep_their_system_message() -> None:
    prompts = make(template="Q: {question}", examples=[SHOWN], is_chat=True)
    turns = [("user", "Q: 1 + 1, doubled?"), ("assistant", "1+1=2\n2*2=4\n#### 4")]
    messages: Any = prompts.ask(Example("2 + 2?", "4"))
    assert [(m["role"], m["content"]) for m in messages] == [*turns, ("user", "Q: 2 + 2?")]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    messages = prompts.ask(Example(chat, "4"), hinted=True)
    hinted = ("user", "Q: 2 + 2?\n(Hint: the answer is 4.)")
    assert [(m["role"], m["content"]) for m in messages] == [("system", "Be brief."), *turns, hinted]
    assert prompts.stops == ()
    own = prompts.ask(Example(Chat(chat, chat_template_kwargs={"a": 1}), "4"), hinted=True)
    assert isinstance(own, Chat)
    assert (list(own), own.chat_template_kwargs) == (list(messages), {"a": 1})
    with pytest.raises(ValueError, match=r"^chat: must be given"):
        make().ask(Example(chat, "4"))


@pytest.mark.parametrize("answer_from", ["after:####", "after:Answer:", "boxed", "last-number"])
@pytest.mark.parametrize("split", ["lines", "sentences", "equations", "numbered", r"regex:\n+", "regex:\n\n"])
def test_examples_are_written_so_that_they_read_back(split: str, answer_from: str) -> None:
    steps = ("We add.", "We double.") if split == "sentences" else SHOWN.steps
    prompts = make(split, answer_from, examples=[Example("?", "4", steps)])
    chain = prompts.ask(Example("?", "4")) and write(prompts, Example("?", "4")).partition("Reasoning:\n")[2]
    assert prompts.reader.read_text(chain.partition("\n\nQuestion:")[0]) == ("4", list(steps or ()))


@pytest.mark.parametrize(
    ("options", "example", "message"),
    [
        ({}, Example("?", "4"), "examples: row 0: must have steps, got none"),
        ({}, Example("?", "4", ("a\nb",)), "examples: row 0: must be a chain that split_steps 'lines'"),
        ({"answer_from": "last-number"}, Example("?", "four", ("a",)), "examples: row 0: must be a chain"),
        ({}, Example([{"role": "user", "content": "?"}], "4", ("a",)), "examples: row 0: question: must be a text"),
    ],
)
def test_examples_that_do_not_fit_are_refused(options: dict[str, str], example: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options, examples=[example])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Q:"}, r"^template: must hold \{question\} once, got it 0 times in 'Q:'"),
        ({"template": "{question}{question}"}, r"^template: must hold \{question\} once, got it 2 times"),
        ({"hint": "{question}"}, r"^hint_template: must hold \{answer\} once, got it 0 times"),
    ],
)
def test_templates_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_default_templates_ask_for_the_form_that_is_read() -> None:
    assert "numbered list" in make("numbered").text
    assert "#### ANSWER" in make().text
    assert r"\boxed{ANSWER}" in make(answer_from="boxed").text
    assert "ANSWER" not in make(examples=[SHOWN]).text
