"""``rim-peft validate``: all that is wrong with recipes, before anything is downloaded or trained."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="recipe files (YAML)")


def run(args: argparse.Namespace) -> int:
    """Check every recipe and print what is wrong with which."""
    from rim_peft.recipe import RecipeError, load_recipe

    code = 0
    for path in args.recipes:
        try:
            load_recipe(path)
        except (RecipeError, OSError) as error:
            print(error if isinstance(error, RecipeError) else f"{path}: {error.strerror}", file=sys.stderr)
            code = 1
        else:
            print(f"{path}: ok")
    return code
