"""``rim-peft evaluate``: an adapter's accuracy on a task, or its effect on plain text."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rim_peft.cli.console import add_adapter_argument, add_answer_arguments, add_source_arguments, path, positive

if TYPE_CHECKING:
    from rim_peft.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_adapter_argument(parser, or_export=True)
    parser.add_argument(
        "--task",
        help="a task of docs/tasks.md, or package.module:ClassName, whose module is imported (default: the training's, "
        "if it is one of docs/tasks.md)",
    )
    parser.add_argument(
        "--task-options",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="options of the task that differ from the training's, such as distractors=2",
    )
    parser.add_argument("--split", help="split to judge (default: test)")
    parser.add_argument(
        "--data-path",
        metavar="PATH",
        type=path,
        help="file, folder or Hub id of the rows (default: as in the training)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="judge the first N rows")
    add_answer_arguments(parser)
    parser.add_argument("--by-block", action="store_true", help="judge the readout of every block too")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="questions per batch (default: the recipe's)")
    parser.add_argument(
        "--on-bad-rows",
        choices=["error", "drop"],
        help="what to do with unreadable rows: stop, or skip them (default: error)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=path,
        nargs="+",
        help="measure the loss of plain text instead, under the base and under the adapter with and without blocks",
    )
    parser.add_argument(
        "--window-tokens",
        type=positive,
        metavar="N",
        help="tokens per window of text, of which the second half is predicted (default: 192)",
    )
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the result."""
    from rim_peft.cli.console import load_run_of, results_only, say
    from rim_peft.escaping import json_text
    from rim_peft.recipe.syntax import read_override

    _check_together(args)
    args.task_options = dict(map(read_override, args.task_options))
    with results_only():
        run = load_run_of(args)
        result = _measure_text(run, args) if args.text is not None else _judge(run, args)
    table = _text_table if args.text is not None else _table
    say(json_text(result, indent=2) if args.json else table(result))
    return 0


def _judge(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    from rim_peft.run import evaluate

    return evaluate(
        run,
        args.task,
        task_options=args.task_options,
        split=args.split or "test",
        path=args.data_path,
        limit=args.limit,
        num_blocks=args.num_blocks,
        by_block=args.by_block,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        on_bad_rows=args.on_bad_rows or "error",
        progress=True,
    )


def _measure_text(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    from rim_peft.run import evaluate_text

    given = {"window_tokens": args.window_tokens, "batch_size": args.batch_size, "num_blocks": args.num_blocks}
    options = {name: value for name, value in given.items() if value is not None}
    return evaluate_text(run, args.text, progress=True, **options)


def _check_together(args: argparse.Namespace) -> None:
    """Refuse row options together with a text and vice versa, and unreadable texts, before a model is loaded."""
    if args.text is None:
        if args.window_tokens is not None:
            raise ValueError("window_tokens: must be given with --text, whose windows it sets (--window-tokens).")
        return
    from rim_peft.run.scoring import read_text

    options = ("task", "task_options", "split", "data_path", "limit", "by_block", "max_new_tokens", "on_bad_rows")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
    if given:
        raise ValueError(f"text: must be given without {', '.join(given)}, which apply to a task's rows (--text).")
    for file in args.text:
        read_text(file)


def _text_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['num_windows']} windows of plain text: {result['predicted_tokens']} tokens after "
        f"{result['context_tokens']}, loss in nats per token",
        f"{'':24} loss  above the base  std. err.",
    ]
    labels = {
        "base": "base",
        "without_blocks": "adapter, no blocks",
        "with_blocks": f"adapter, {result['num_blocks']} blocks",
    }
    for name, label in labels.items():
        if (found := result[name]) is not None:
            lines.append(f"{label:22} {found['loss']:6.3f}  {found['change']:14.3f}  {found['standard_error']:9.3f}")
    return "\n".join(lines)


def _table(result: dict[str, Any]) -> str:
    options = "".join(f", {key}={json.dumps(value)}" for key, value in result["task_options"].items())
    rows = f"{result['task']} {result['split']}{options}"
    lines = [
        f"{rows}, {result['num_blocks']} blocks, answer rule {result['answer_rule']}",
        f"{'':12} accuracy  std. err.   rows",
        _line("last block", result),
    ]
    lines.extend(_line(f"  {length} steps", score) for length, score in result["by_length"].items())
    for number, block in enumerate(result["by_block"], start=1):
        lines.append(_line(f"block {number}", block["all"]))
    if result["num_cut"]:
        cut = f"{result['num_cut']} of {result['num_rows']} answers"
        lines.append(f"{cut} were cut before they ended: raise --max-new-tokens.")
    return "\n".join(lines)


def _line(label: str, score: dict[str, Any]) -> str:
    return f"{label:12} {score['accuracy']:8.3f}  {score['standard_error']:9.3f}  {score['num_rows']:5}"
