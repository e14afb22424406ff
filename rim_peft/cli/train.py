"""``rim-peft train``: train an adapter from a recipe."""

from __future__ import annotations

import argparse
import shlex

from rim_peft.cli.console import path


def more_help() -> str:
    """Return additional text for ``--help``: the keys of a recipe."""
    from rim_peft.recipe.options import options_text

    return (
        "keys of a recipe, with their defaults:\n"
        f"{options_text()}\n\n"
        "adapter also takes LoRA's options (PEFT's LoraConfig); grounding and refinement also take those of TRL's\n"
        "SFTConfig. On the command line, null removes a value or a stage. Paths are relative to the working directory."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", type=path, help="recipe file (YAML)")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replace a value of the recipe, such as data.path=FOLDER"
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print the adapter's folder and accuracy."""
    from rim_peft.cli.console import quiet_model_loading, results_only, resumable, say
    from rim_peft.recipe import load_recipe
    from rim_peft.run import train
    from rim_peft.training.distributed import MainProcessFailed, is_main, num_processes

    recipe = load_recipe(args.recipe, args.overrides)
    command = ["rim-peft", "train", args.recipe, *args.overrides]
    quiet_model_loading()
    again = shlex.join([*(part for part in command if part != "resume=true"), "resume=true"])
    how = "with" if num_processes() == 1 else "through the launcher with"
    try:
        with resumable(f"resume {how}: {again}" if is_main() else None), results_only():
            trained = train(recipe, command=command)
    except MainProcessFailed:  # it prints its own error
        return 1
    if not is_main():
        return 0
    say(f"adapter: {recipe.output_dir}")
    validation = trained.metrics["validation"]
    if validation is not None:
        print(
            f"accuracy: {validation['accuracy']:.3f} ± {validation['standard_error']:.3f} "
            f"({validation['num_rows']} validation rows, answer rule {validation['answer_rule']})"
        )
    return 0
