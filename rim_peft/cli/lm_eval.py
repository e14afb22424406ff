"""``rim-peft lm-eval``: evaluate an adapter on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import argparse
from typing import Any

from rim_peft.cli.console import add_adapter_argument, add_source_arguments, not_negative, path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; those with an underscore are the harness's own, with their meaning there."""
    parser.usage = f"{parser.prog} ADAPTER --tasks TASK [TASK ...] [OPTION ...]"  # only an option ends a list
    add_adapter_argument(parser)
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="TASK", help="tasks, groups or tags by name, or files of tasks"
    )
    parser.add_argument(
        "--num-blocks",
        type=not_negative,
        metavar="K",
        help="blocks between context and continuation (default: the adapter's); 0 for the model without blocks",
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--include_path",
        metavar="FOLDER",
        type=path,
        help="folder with tasks besides the harness's own; the files of a task can run code (!function)",
    )
    parser.add_argument("--num_fewshot", type=not_negative, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=float, metavar="N", help="the first N questions, or a share below 1")
    parser.add_argument(
        "--batch_size", default="1", metavar="N", help="questions per batch, or auto (default: %(default)s)"
    )
    parser.add_argument("--max_batch_size", type=positive, metavar="N", help="maximum that auto tries")
    parser.add_argument(
        "--gen_kwargs", nargs="+", metavar="KEY=VALUE", help="how answers are generated, such as max_gen_toks=32"
    )
    parser.add_argument(
        "--apply_chat_template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="write questions as chats with the tokenizer's template, with the examples as earlier turns",
    )
    parser.add_argument("--system_instruction", metavar="TEXT", help="text before every question")
    parser.add_argument("--seed", type=not_negative, metavar="N", help="seed of sampling and of the choice of examples")
    parser.add_argument("--output_path", metavar="PATH", type=path, help="folder or .json file for the results")
    parser.add_argument("--log_samples", action="store_true", help="also write every request and answer there")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run tasks that execute what the model writes"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the harness's table."""
    from rim_peft.cli.console import quiet_model_loading, results_only, say
    from rim_peft.run.harness import make_table, run_harness

    quiet_model_loading()
    with results_only():
        results = run_harness(
            args.adapter,
            [name for names in args.tasks for name in names.split(",")],
            num_blocks=args.num_blocks,
            base=args.base,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            include_path=args.include_path,
            output_path=args.output_path,
            log_samples=args.log_samples,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            max_batch_size=args.max_batch_size,
            gen_kwargs=",".join(args.gen_kwargs) if args.gen_kwargs else None,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=bool(args.apply_chat_template),
            system_instruction=args.system_instruction,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            **_seeds(args.seed),
        )
    say(f"{args.adapter}, {results['config']['rim_num_blocks']} blocks")
    say(make_table(results))
    if results.get("groups"):
        say(make_table(results, "groups"))
    return 0


def _seeds(seed: int | None) -> dict[str, Any]:
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return {} if seed is None else dict.fromkeys(names, seed)
