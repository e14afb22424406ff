"""``rim-peft compare``: compare methods, from training to one report."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rim_peft.cli.console import path

KIND = "compare"


def more_help() -> str:
    """Return additional text for ``--help``: the keys of a comparison's recipe."""
    from rim_peft.comparison.sections import list_options
    from rim_peft.recipe.options import as_text

    return f"keys of a comparison's recipe, with their defaults:\n{as_text(list_options())}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        type=path,
        help="recipe file of the comparison (YAML); with --report, the folder that it wrote to",
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replace a value of the recipe, such as seeds=[0]"
    )
    parser.add_argument(
        "--parallel",
        action="store_true",
        help="let several processes with this option share the work, each on a different run",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="list the runs: finished, missing, or made with other values (differs)",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write tables, plots and page again from the folder's results.json alone, without its runs",
    )


def run(args: argparse.Namespace) -> int:
    """Make the missing runs, and print the report's tables."""
    return run_kind(args, kind=KIND)


def run_kind(args: argparse.Namespace, *, kind: str) -> int:
    """Run ``compare`` or ``ablate``."""
    from rim_peft.cli.console import quiet_model_loading, results_only, resumable, say
    from rim_peft.comparison.reading import load_comparison
    from rim_peft.comparison.report import render_markdown, rewrite_report
    from rim_peft.comparison.runner import list_runs, run_comparison

    if args.report:
        if args.overrides or args.plan or args.parallel:
            raise ValueError("--report: must be given a folder alone, since it runs nothing. Leave out the rest.")
        say(render_markdown(rewrite_report(Path(args.recipe))))
        return 0
    comparison = load_comparison(args.recipe, args.overrides)
    if comparison.kind != kind:
        raise ValueError(
            f"{args.recipe}: is for rim-peft {comparison.kind}, since it has {'a' if comparison.grid else 'no'} grid."
        )
    if args.plan:
        say(list_runs(comparison))
        return 0
    command = ["rim-peft", kind, args.recipe, *args.overrides, *(["--parallel"] if args.parallel else [])]
    quiet_model_loading()
    with resumable(f"rerun the command to resume: {shlex.join(command)}"), results_only():
        results = run_comparison(comparison, command=command, parallel=args.parallel)
    say(render_markdown(results))
    return 0
