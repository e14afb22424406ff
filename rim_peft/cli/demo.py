"""``rim-peft demo``: the built-in example, from training to a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rim_peft.cli.console import not_negative, path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--base",
        choices=("tiny", "smollm2"),
        default="tiny",
        help="tiny: train on the built-in base (default); smollm2: show the built-in adapter for SmolLM2-135M, which "
        "is fetched",
    )
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        type=path,
        default="outputs/demo",
        help="where the adapter goes; a finished one is shown again, a stopped one is resumed (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=not_negative,
        default=0,
        help="seed of the training; for smollm2, of the questions (default: %(default)s)",
    )
    parser.add_argument(
        "--num-rows",
        type=positive,
        metavar="N",
        help="test questions for each number of steps (default: 250; for smollm2, 50)",
    )
    parser.add_argument(
        "--baseline", action="store_true", help="train and judge the answer-only LoRA instead; prints JSON"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON document")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="replace a value of the demo's recipe (rim_peft/demo/recipe.yaml)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, judge and print."""
    from rim_peft.cli.console import quiet_model_loading, results_only
    from rim_peft.demo import showcase
    from rim_peft.training.curriculum import Interrupted

    quiet_model_loading()
    folder = Path(args.output_dir)
    if args.base == "smollm2":
        return _show_shipped(args)
    args.num_rows = args.num_rows or 250
    if args.baseline:
        with results_only():
            accuracy = showcase.judge_answer_only(
                seed=args.seed,
                num_rows=args.num_rows,
                folder=folder.with_name(f"{folder.name}-answer-only"),
                overrides=args.overrides,
            )
        print(json.dumps(accuracy, indent=2))
        return 0
    try:
        return _show(args, folder)
    except Interrupted:
        print("rim-peft: stopped; rerun the command to resume", file=sys.stderr)
        raise


def _show_shipped(args: argparse.Namespace) -> int:
    from rim_peft.cli.console import results_only
    from rim_peft.demo.shipped import show_shipped

    if args.baseline or args.overrides:
        given = "--baseline" if args.baseline else args.overrides[0]
        raise ValueError(f"base: must be tiny to train anything, got smollm2 and {given}. Omit one of them.")
    with results_only():
        shown = show_shipped(num_rows=args.num_rows or 50, seed=args.seed, as_json=args.json)
    print(shown)
    return 0


def _show(args: argparse.Namespace, folder: Path) -> int:
    from rim_peft.cli.console import results_only
    from rim_peft.demo import showcase

    with results_only():
        command = ["rim-peft", "demo", f"--output-dir={folder}", f"--seed={args.seed}", *args.overrides]
        trained = showcase.train_demo(folder, seed=args.seed, overrides=args.overrides, command=command)
        judged = showcase.judge(trained, num_rows=args.num_rows)
        times = showcase.time_answers(trained)
    if args.json:
        print(json.dumps({**judged, "latency": times}, indent=2))
        return 0
    print(showcase.show_demo(judged, times, showcase.stored_figures(), num_rows=args.num_rows))
    print(showcase.render_questions(trained))
    print(f'\nThe adapter is in {folder}. Ask it something: rim-peft generate {folder} "{_sample_question()}"')
    return 0


def _sample_question() -> str:
    return "Tom boils Kim's brew. Kim salts Pam's brew. Pam's brew is red. What colour is Tom's brew?"
