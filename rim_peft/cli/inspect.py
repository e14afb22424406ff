"""``rim-peft inspect``: show what a model held after each block, in the terminal, as a page or as JSON."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_peft.cli.console import (
    add_adapter_argument,
    add_answer_arguments,
    add_chain_arguments,
    add_source_arguments,
    complain,
    load_run_of,
    not_negative,
    path,
    positive,
    say,
)
from rim_peft.cli.generate import _as_utf8
from rim_peft.escaping import json_text

if TYPE_CHECKING:
    from rim_peft.inspection import Inspection

_ENDINGS = (".html", ".svg", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_adapter_argument(parser)
    parser.add_argument(
        "questions",
        metavar="QUESTION",
        nargs="+",
        help="one question or several: texts, or JSON objects with messages, as rim-peft generate reads them",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=_output,
        action="append",
        default=[],
        help="write a page (FILE.html), a picture of one question (FILE.svg) or the document (FILE.json); repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the document instead of its short form")
    parser.add_argument(
        "--donor",
        metavar="QUESTION",
        action="append",
        default=[],
        help="a question whose blocks may be swapped in; its prompt must have as many tokens (default: the others)",
    )
    add_answer_arguments(parser)
    parser.add_argument("--num-best", type=positive, metavar="N", default=3, help="next best tokens (%(default)s)")
    parser.add_argument(
        "--seed", type=not_negative, metavar="N", default=0, help="seed for shuffling blocks (%(default)s)"
    )
    parser.add_argument("--no-chain", action="store_true", help="do not let the base write its reasoning out")
    add_chain_arguments(parser)
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the inspection, and write its files."""
    from rim_peft.inspection import Options, inspect_questions, render_text

    for file in args.out:
        if file.endswith(".svg") and len(args.questions) > 1:
            raise ValueError(
                f"--out: {file} must show one question, got {len(args.questions)}. Ask one, or write a page."
            )
    inspection = inspect_questions(
        load_run_of(args),
        [_read_question(question) for question in args.questions],
        name=args.adapter,
        donors=[_read_question(question) for question in args.donor],
        num_blocks=args.num_blocks,
        max_new_tokens=args.max_new_tokens,
        probe=_find_probe(Path(args.adapter)),
        options=Options(
            num_best=args.num_best,
            seed=args.seed,
            chain_tokens=0 if args.no_chain else args.chain_tokens,
            chain_template=args.chain_template,
        ),
    )
    for file in args.out:
        _write(file, inspection)
    say(json_text(inspection.to_dict()) if args.json else render_text(inspection))
    return 0


def _output(text: str) -> str:
    if not path(text).endswith(_ENDINGS):
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(_ENDINGS)}, got {text[:200]!r}")
    return path(text)


def _read_question(argument: str) -> Any:
    """Return a text, or the question of a JSON object: an adapter that was trained on chats must be asked with one."""
    from rim_peft.data.questions import read_asked

    text = _as_utf8(argument)
    if re.match(r'\s*\{\s*"', text) is None:  # "{1, 2} has how many subsets?" is a text
        return text
    (asked,) = read_asked([text.encode()])
    if asked.problem is not None:
        raise ValueError(f"question: {asked.problem}.")
    return asked.question


def _find_probe(folder: Path) -> Any:
    """Return the probe that lies beside an adapter, or None."""
    from rim_peft.evaluation.probe import METADATA_FILE, Probe

    return Probe.load(folder) if (folder / METADATA_FILE).is_file() else None


def _write(file: str, inspection: Inspection) -> None:
    from rim_peft.inspection import render_page, render_picture
    from rim_peft.training.files import write_text

    if file.endswith(".html"):
        text = render_page(inspection)
    elif file.endswith(".svg"):
        text = render_picture(inspection, inspection.questions[0])
    else:
        text = f"{json_text(inspection.to_dict(), indent=1)}\n"
    write_text(Path(file), text)
    complain(f"rim-peft: wrote {file}")
