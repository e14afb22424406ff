"""What a teacher is asked: a template, examples before the question, and the answer as a hint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from rim_peft.data.chats import Chat
from rim_peft.data.examples import Example, Question, RowError, Templates
from rim_peft.tasks.rows import OwnRows
from rim_peft.tasks.steps import MARKER

HINT = "{question}\n(Hint: the answer is {answer}.)"
"""Default form of a question whose answer is shown."""

_FORMS = {
    "lines": "one short step per line",
    "sentences": "one short sentence per step",
    "equations": "one equation per line, such as 3 * 4 = 12",
    "numbered": "as a numbered list of short steps",
}


@dataclass(frozen=True)
class Prompts:
    r"""Questions as a teacher is asked them.

    >>> reader = OwnRows(split_steps="lines", answer_from="after:####")
    >>> prompts = Prompts(reader, template="Q: {question}\n", examples=[Example("1+1?", "2", ("1+1=2",))])
    >>> prompts.templates.prompt.format(question=prompts.ask(Example("2+2?", "4")))
    'Q: 1+1?\n1+1=2\n#### 2\n\nQ: 2+2?\n'

    Attributes:
        reader: reads a chain's steps and answer.
        template: the text of one question, with ``{question}``; None for :attr:`default_template`.
        hint: the question's text once the answer is shown, with ``{question}`` and ``{answer}``.
        examples: questions with chains that come before every question.
        is_chat: whether prompts are chat messages.

    Raises:
        ValueError: a template lacks a placeholder or has it twice, or an example's chain cannot be written in a form
            that the reader reads back.
    """

    reader: OwnRows
    template: str | None = None
    hint: str = HINT
    examples: Sequence[Example] = ()
    is_chat: bool = False

    def __post_init__(self) -> None:
        if self.template is not None:
            _check_placeholders("template", self.template, ("question",))
        _check_placeholders("hint_template", self.hint, ("question", "answer"))
        _ = self._chains  # writes all examples once, which checks them

    @property
    def text(self) -> str:
        """The template that is used."""
        return self.default_template if self.template is None else self.template

    @property
    def default_template(self) -> str:
        """A template for the form that the reader reads; with examples or without."""
        if self.examples:
            return "{question}" if self.is_chat else "Question: {question}\nReasoning:\n"
        form = _FORMS.get(self.reader.split_steps or "", "step by step")
        asked = f"Reason step by step, {form}. {_ending(self.reader.answer_from or '')}"
        return f"{{question}}\n\n{asked}" if self.is_chat else f"Question: {{question}}\n{asked}\nReasoning:\n"

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a chain ends: where the teacher starts the next question by itself."""
        start = self.text.partition("{question}")[0].rpartition("\n")[2].strip()
        return (f"\n{start}",) if start and not self.is_chat else ()

    @cached_property
    def templates(self) -> Templates:
        """The whole prompt of a question that is a text: examples and template."""
        written = zip(self.examples, self._chains, strict=True)
        shown = [f"{self._fill(example.question)}{chain}\n\n" for example, chain in written] if not self.is_chat else []
        before, _, after = self.text.partition("{question}")
        return Templates(prompt=f"{_escape(''.join(shown) + before)}{{question}}{_escape(after)}")

    def ask(self, example: Example, *, hinted: bool = False) -> Question:
        """Return a question for :attr:`templates`, or all messages of a chat.

        Raises:
            ValueError: it is a chat, but prompts are texts.
        """
        if isinstance(example.question, str):
            question = self._hinted(example.question, example) if hinted else example.question
            return [*self._turns, _message("user", self._fill(question))] if self.is_chat else question
        if not self.is_chat:
            raise ValueError("chat: must be given for questions of chat messages. Ask with --chat.")
        *before, last = example.question
        content = self._hinted(last["content"], example) if hinted else last["content"]
        system = before[:1] if before and before[0]["role"] == "system" else []
        messages = [*system, *self._turns, *before[len(system) :], _message("user", self._fill(content))]
        return example.question.with_messages(messages) if isinstance(example.question, Chat) else messages

    def _hinted(self, question: str, example: Example) -> str:
        return _replace(self.hint, {"question": question, "answer": example.answer})

    def _fill(self, question: Question) -> str:
        return _replace(self.text, {"question": str(question)})

    @cached_property
    def _turns(self) -> list[dict[str, str]]:
        return [
            message
            for example, chain in zip(self.examples, self._chains, strict=True)
            for message in (_message("user", self._fill(example.question)), _message("assistant", chain))
        ]

    @cached_property
    def _chains(self) -> list[str]:
        return [self._write_chain(index, example) for index, example in enumerate(self.examples)]

    def _write_chain(self, index: int, example: Example) -> str:
        """Write an example's chain as the teacher should write its own."""
        if not isinstance(example.question, str):
            raise ValueError(f"examples: row {index}: question: must be a text, got chat messages. Use another row.")
        if not example.steps:
            raise ValueError(
                f"examples: row {index}: must have steps, got none. Give rows with question, steps, answer."
            )
        closing = _closing(example.answer, self.reader.answer_from or "")
        between = ("\n", "\n\n", f"\n{len(example.steps) + 1}. ")
        for body, gap in product(_bodies(example.steps, self.reader.split_steps or ""), between):
            text = f"{body}{gap}{closing}"
            try:
                answer, steps = self.reader.read_text(text)
            except RowError:
                continue
            if (answer, tuple(steps or ())) == (example.answer, example.steps):
                return text
        raise ValueError(
            f"examples: row {index}: must be a chain that split_steps {self.reader.split_steps!r} and answer_from "
            f"{self.reader.answer_from!r} read back, got steps {list(example.steps)!r} and answer {example.answer!r}. "
            "Use another row, or write the examples into the template."
        )


def _bodies(steps: Sequence[str], how: str) -> list[str]:
    """Return forms in which steps could be written for a way to cut them."""
    if how == "numbered":
        return ["\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))]
    if how == "sentences":
        return [" ".join(steps), "\n\n".join(steps)]
    return [
        "\n".join(steps),
        "\n\n".join(steps),
        *(["\n".join(f"<<{s}>>" for s in steps)] if how == "equations" else ()),
    ]


def _closing(answer: str, how: str) -> str:
    if how == "boxed":
        return f"\\boxed{{{answer}}}"
    return answer if how == "last-number" else f"{how.removeprefix(MARKER)} {answer}"


def _ending(how: str) -> str:
    """Return the request for the answer's form."""
    if how == "last-number":
        return "End with a last line that is only the final answer."
    return f"Then write the final answer on a last line as {_closing('ANSWER', how)}"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _replace(template: str, values: Mapping[str, str]) -> str:
    """Fill in placeholders; all other braces stay as they are, in the values too."""
    return re.sub("|".join(rf"\{{({name})\}}" for name in values), lambda found: values[found[0][1:-1]], template)


def _check_placeholders(name: str, template: str, placeholders: Sequence[str]) -> None:
    for placeholder in placeholders:
        if (count := template.count(f"{{{placeholder}}}")) != 1:
            raise ValueError(f"{name}: must hold {{{placeholder}}} once, got it {count} times in {template[:200]!r}.")
