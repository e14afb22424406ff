"""``rim-peft generate``: answer questions from the command line or from stdin."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rim_peft.cli.console import (
    add_adapter_argument,
    add_answer_arguments,
    add_source_arguments,
    complain,
    load_run_of,
    positive,
)
from rim_peft.escaping import json_text, visible

if TYPE_CHECKING:
    from rim_peft.data.questions import Asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_adapter_argument(parser, or_export=True)
    parser.add_argument(
        "question",
        nargs="?",
        help="the question; without it, questions are read from stdin, one per line or as JSON lines with a field "
        "question or messages, and the answers are JSON lines",
    )
    add_answer_arguments(parser)
    parser.add_argument("--batch-size", type=positive, metavar="N", default=8, help="questions per batch (%(default)s)")
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON lines with question and answer")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the answers in the order of the questions."""
    if args.question is None and sys.stdin.isatty():
        args.usage_error("give a question, or questions on stdin")
    from rim_peft.data.questions import read_asked

    answerer = load_run_of(args).answerer(num_blocks=args.num_blocks, max_new_tokens=args.max_new_tokens)

    def answer(questions: Sequence[Any]) -> list[str]:
        return list(answerer.answer(questions, batch_size=args.batch_size))

    if args.question is not None:
        question = _as_utf8(args.question)
        (text,) = answer([question])
        print(_as_json(question, text) if args.json else _printed(text))
        return 0
    asked = read_asked(getattr(sys.stdin, "buffer", None) or (line.encode() for line in sys.stdin))
    num_unfit = 0
    while batch := list(islice(asked, args.batch_size)):
        answered = answer_fit(batch, answer)
        num_unfit += len(batch) - len(answered)
        for question, text in answered:
            print(_as_json(question, text))
        sys.stdout.flush()
    return 1 if num_unfit else 0


def _printed(answer: str) -> str:
    """Return an answer unchanged for a file or a pipe; for a terminal, control characters are made visible."""
    return visible(answer) if sys.stdout.isatty() else answer


def answer_fit(batch: Sequence[Asked], answer: Callable[[Sequence[Any]], list[str]]) -> list[tuple[Any, str]]:
    """Return the answerable questions of a batch with their answers; report the others on stderr."""
    from rim_peft.data.examples import QuestionError

    fit = []
    for asked in batch:
        if asked.problem is None:
            fit.append(asked)
        else:
            _report(asked.number, asked.problem)
    while fit:
        try:
            texts = answer([asked.question for asked in fit])
        except QuestionError as error:
            _report(fit.pop(error.index).number, error.reason)
            continue
        return [(asked.question, text) for asked, text in zip(fit, texts, strict=True)]
    return []


def _report(line: int, reason: str) -> None:
    complain(f"rim-peft: stdin line {line}: {reason.removesuffix('.')}. It is left unanswered.")


def _as_json(question: Any, answer: str) -> str:
    return json_text({"question": question, "answer": answer})


def _as_utf8(argument: str) -> str:
    """Return an argument decoded as UTF-8, whatever the locale that Python read it with."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def read_questions(lines: Iterable[bytes], source: str) -> list[Any]:
    """Return the question of each line that is not blank.

    Raises:
        ValueError: a line has no question; the message names the line.
    """
    from rim_peft.data.questions import read_asked

    found = []
    for asked in read_asked(lines):
        if asked.problem is not None:
            raise ValueError(f"{source} line {asked.number}: {asked.problem}.")
        found.append(asked.question)
    return found
