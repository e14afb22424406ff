"""``rim-peft check``: check recipes before they run, with all errors at once, without weights or a GPU."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rim_peft.cli.console import complain, path, positive, say
from rim_peft.escaping import json_text

if TYPE_CHECKING:
    from rim_peft.comparison.reading import CheckedRecipe
    from rim_peft.run.findings import RunFindings, StageFindings
    from rim_peft.run.rows import ShownRow

_OVERRIDE = re.compile(r"[\w.]+=")
_MOST_SHOWN = 300
"""Characters shown of each text of a row; --json has them all."""
_PARTS = {
    "MiB at the peak": "total",
    "  weights": "weights",
    "  adapter": "adapter",
    "  optimiser's state": "optimizer",
    "  gradients": "gradients",
    "  activations": "activations",
    "  logits": "logits",
    "MiB of logits at most": "most_logits",
}
"""Lines of the table, by label."""


def more_help() -> str:
    """Return additional text for ``--help``."""
    return (
        "Memory is that of tensors at the peak of a training step on the largest batch. A CUDA context (about half a\n"
        "GiB) and validation need additional memory."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "recipes",
        metavar="RECIPE | KEY=VALUE",
        nargs="+",
        type=lambda text: text if _OVERRIDE.match(text) else path(text),
        help="recipe files (YAML), including comparisons; KEY=VALUE replaces a value in each of them, as for train",
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        type=path,
        help="folder with config.json and tokenizer to use instead of the recipe's base",
    )
    parser.add_argument(
        "--row-tokens", metavar="N", type=positive, help="estimate memory with rows of N tokens instead of the longest"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        help="device of the training (default: a GPU if there is one or the recipe asks for one)",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the base's config and tokenizer, and the rows, from the Hub"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--schema",
        action=_Schema,
        nargs=0,
        help="print the JSON schema of recipes and comparisons, for editors, and exit",
    )


class _Schema(argparse.Action):
    """Prints the schema where it is given, without a recipe, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from rim_peft.comparison.reading import file_schema

        print(json_text(file_schema(), indent=2))
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Check every recipe and print the findings."""
    from rim_peft.cli.console import quiet_model_loading, results_only
    from rim_peft.comparison.reading import check_recipe
    from rim_peft.run.at_hand import AtHand
    from rim_peft.run.preflight import Preflight

    overrides = [text for text in args.recipes if _OVERRIDE.match(text)]
    paths = [text for text in args.recipes if text not in overrides]
    if not paths:
        raise ValueError("RECIPE: at least one file must be given, got only values.")
    quiet_model_loading()
    preflight = Preflight(AtHand(args.base, args.download), row_tokens=args.row_tokens, device=args.device)
    all_checked = []
    for recipe in paths:
        with results_only():
            checked = check_recipe(recipe, overrides, preflight)
        all_checked.append(checked)
        if not args.json:
            _print(checked)
    if args.json:
        print(json_text({"recipes": [checked.to_dict() for checked in all_checked]}, indent=2))
    return 0 if all(checked.is_ok for checked in all_checked) else 1


def _print(checked: CheckedRecipe) -> None:
    """Print results to stdout and errors to stderr."""
    for line in checked.errors:
        complain(line)
    if checked.errors:
        return
    is_partial = any(found.not_checked for found in checked.runs.values())
    state = "ok as far as it was checked" if is_partial else "ok"
    say(f"{checked.path}: {state if checked.is_ok else 'has errors'}")
    for name, found in checked.runs.items():
        for line in _run_lines(name, found):
            say(line)
        sys.stdout.flush()
        for error in found.errors:
            complain(f"{checked.path}: {f'methods.{name}: ' if name else ''}{error}")


def _run_lines(name: str, found: RunFindings) -> Iterator[str]:
    if name:
        yield f"  methods {name}"
    if found.architecture is not None:
        yield f"  base        {found.base or 'made from model.config'} ({found.architecture}, {found.attention})"
    if found.num_trainable is not None:
        yield f"  parameters  {found.num_trainable:,} trainable, {found.num_frozen:,} frozen"
    rows = [row for row in _rows(found.stages) if any(cell != "-" for cell in row[1:])]
    if rows:
        table = [["", *(stage.stage for stage in found.stages)], *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            yield f"  {'   '.join(cells).rstrip()}"
    if found.peak is not None:
        where = "a GPU" if found.device == "cuda" else "a CPU; for a GPU: --device cuda"
        yield f"  peak        {_mib(found.peak)} MiB on {where}"
    for number, shown in enumerate(found.first_rows, start=1):
        yield from _row_lines(number, shown, by_block=found.stages[0].stage in ("grounding", "refinement"))
    for text in found.notes:
        yield f"  note: {text}".replace("\n", "\n  ")
    for text in found.not_checked:
        yield f"  not checked: {text}"


def _row_lines(number: int, row: ShownRow, *, by_block: bool) -> Iterator[str]:
    """Yield the lines of a row; blocks in a row with the same readout share one."""
    texts = [(f"row {number}", "prompt", row.prompt)]
    texts += [("", f"in block {block}", text) for block, text in enumerate(row.in_place, start=1)]
    first = 1
    for text, group in groupby(row.readouts):
        last = first + len(list(group)) - 1
        which = f"{first}" if first == last else f"{first}-{last}"
        if text or not row.in_place:
            texts.append(("", f"{'block' if by_block or row.in_place else 'text'} {which}", text))
        first = last + 1
    for start, label, text in [*texts, ("", "answer", row.answer)]:
        yield f"  {start:<10}  {label:<10}  {json_text(_shortened(text))}"


def _shortened(text: str) -> str:
    """Return a text without the middle of a long one; its white space stays, since it is trained."""
    kept = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:kept]} ... {text[-kept:]}"


def _rows(stages: list[StageFindings]) -> Iterator[list[str]]:
    """Yield the lines of a run's table, with a column for each stage."""

    def line(label: str, cell: Any) -> list[str]:
        return [label, *("-" if (text := cell(stage)) is None else text for stage in stages)]

    yield line("rows", lambda stage: _count(stage.num_rows))
    yield line("bad rows", lambda stage: _count(stage.num_bad_rows or None))
    yield line(
        "tokens of a row, mean", lambda stage: None if stage.mean_tokens is None else f"{stage.mean_tokens:,.1f}"
    )
    yield line("tokens of a row, longest", lambda stage: _count(stage.longest_tokens))
    yield line("tokens of an epoch", lambda stage: _count(stage.tokens_per_epoch))
    yield line("steps on one device", lambda stage: _count(stage.num_steps))
    yield line("mixed precision", lambda stage: stage.memory and (stage.precision or "none"))
    yield line("optimiser", lambda stage: stage.memory and stage.optimizer)
    yield line("largest batch, samples", lambda stage: stage.batch and _count(stage.batch.samples))
    yield line("  rows x tokens", lambda stage: stage.batch and f"{stage.batch.rows} x {stage.batch.length:,}")
    yield line("  of stated rows", lambda stage: _count(stage.stated_tokens))
    for label, part in _PARTS.items():
        yield line(label, lambda stage, part=part: stage.memory and _mib(getattr(stage.memory, part)))


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _mib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**20:,.1f}"
