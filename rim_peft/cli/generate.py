"""``rim-peft generate``: answers to questions, from the command line or from stdin."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rim_peft.cli.console import add_source_arguments, path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=path,
        help="output folder of a training or an export, or an adapter's folder or Hub id",
    )
    parser.add_argument(
        "question",
        nargs="?",
        help="the question; without it, questions are read from stdin, one a line or as JSON lines with a field "
        "question, and the answers are JSON lines",
    )
    parser.add_argument("--blocks", type=positive, metavar="K", help="blocks after a prompt (default: the adapter's)")
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="tokens of an answer (default: the recipe's)"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", default=8, help="questions at a time (%(default)s)")
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON lines with question and answer")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print the answers, in the questions' order."""
    if args.question is None and sys.stdin.isatty():
        args.usage_error("give a question, or questions on stdin")
    from rim_peft.cli.console import quiet_model_loading
    from rim_peft.inference import answer_questions
    from rim_peft.recipe import EvaluationOptions
    from rim_peft.run import load_run

    quiet_model_loading()
    loaded = load_run(args.adapter, base=args.base, revision=args.revision, trust_remote_code=args.trust_remote_code)
    ask = loaded.answering.get("answer", answer_questions)
    options = loaded.recipe.evaluation if loaded.recipe is not None else EvaluationOptions()
    questions = iter([args.question]) if args.question is not None else read_questions(sys.stdin)
    while batch := list(islice(questions, args.batch_size)):
        answers = ask(
            loaded.model,
            loaded.tokenizer,
            batch,
            templates=loaded.templates,
            num_blocks=args.blocks,
            max_new_tokens=args.max_new_tokens or options.max_new_tokens,
            batch_size=args.batch_size,
        )
        for question, answer in zip(batch, answers, strict=True):
            as_json = args.json or args.question is None
            print(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) if as_json else answer)
        sys.stdout.flush()
    return 0


def read_questions(lines: Iterable[str], source: str = "stdin") -> Iterator[Any]:
    """Yield the question of each line that is not blank: its text, or the field ``question`` of a JSON object.

    >>> list(read_questions(["1 + 1?", "", '{"question": "2 + 2?", "id": 7}']))
    ['1 + 1?', '2 + 2?']

    Raises:
        ValueError: a line begins like a JSON object and is none, or has no question; names the line.
    """
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not text.startswith("{"):
            yield text
            continue
        try:
            yield json.loads(text)["question"]
        except ValueError as error:
            raise ValueError(f"{source} line {number}: not valid JSON: {error}. One JSON object a line.") from None
        except KeyError:
            raise ValueError(f"{source} line {number}: must have a field question, got {text[:60]!r}.") from None
