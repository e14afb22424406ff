"""``rim-peft export``: turn an adapter into a model that runs without this package, and check it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rim_peft.cli.console import add_adapter_argument, add_source_arguments, not_negative, path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_adapter_argument(parser)
    parser.add_argument(
        "--output-dir", metavar="DIR", type=path, required=True, help="folder to write to, new or empty"
    )
    parser.add_argument(
        "--format",
        choices=["merged", "peft-lora", "embedding-lora"],
        default="merged",
        help="one plain model (merged); a base with memory rows and a plain LoRA adapter, for engines with many "
        "adapters, where further adapters of the same base are added to the same DIR (peft-lora); or a plain LoRA "
        "adapter for the base as it is (embedding-lora) (default: %(default)s)",
    )
    parser.add_argument(
        "--spare-ids",
        metavar="ID,ID,ID",
        type=token_ids,
        help="for embedding-lora: three token ids that no text uses (default: found by their names, then checked)",
    )
    parser.add_argument(
        "--num-blocks", type=positive, metavar="K", help="blocks after a prompt (default: the adapter's)"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="type of the weights (default: the base's)",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest weights file (default: %(default)s)"
    )
    parser.add_argument(
        "--append-to",
        choices=["auto", "prompt", "chat", "none"],
        default="auto",
        help="what the tokenizer appends blocks to: texts and, with a chat template, chats (auto), only one of them, "
        "or nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-tied",
        action="store_true",
        help="keep a head that shares the embedding's matrix: a smaller file, but engines must honour suppress_tokens, "
        "or may write memory tokens",
    )
    _add_check_arguments(parser)
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the check."""
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=path,
        help="questions to check the export on, at least 32, one per line or as JSON lines with a field question "
        "(default: the first 64 test rows of the training's task)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="maximum tokens of a checked answer (default: the recipe's)",
    )
    parser.add_argument(
        "--max-differing",
        type=not_negative,
        metavar="N",
        default=0,
        help="how many prompts may give other tokens than the adapter (default: %(default)s)",
    )
    parser.add_argument(
        "--task",
        help="task whose rows it is checked on, as for evaluate (default: the training's, if it is one of "
        "docs/tasks.md)",
    )


def token_ids(text: str) -> tuple[int, ...]:
    """Read token ids with commas between them."""
    return tuple(not_negative(part.strip()) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Export, check, and print the result."""
    from rim_peft.cli.console import quiet_model_loading, results_only, say
    from rim_peft.cli.generate import read_questions
    from rim_peft.escaping import json_text
    from rim_peft.export.card import describe
    from rim_peft.export.folder import ExportOptions
    from rim_peft.run import export

    options = ExportOptions(
        num_blocks=args.num_blocks,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        append_to=args.append_to,
        keep_tied=args.keep_tied,
        max_differing=args.max_differing,
        spare_ids=args.spare_ids,
    )
    questions = None
    if args.prompts is not None:
        with Path(args.prompts).open("rb") as lines:
            questions = read_questions(lines, args.prompts)
    quiet_model_loading()
    with results_only():
        result = export(
            args.adapter,
            Path(args.output_dir),
            form=args.format,
            options=options,
            questions=questions,
            max_new_tokens=args.max_new_tokens,
            task_name=args.task,
            base=args.base,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
    if args.json:
        print(json_text({"out": args.output_dir, "format": args.format, **result.to_dict()}, indent=2))
        return 0
    say(f"export: {args.output_dir}")
    print(f"checked in plain transformers: {describe(result)}")
    return 0
