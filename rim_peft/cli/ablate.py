"""``rim-peft ablate``: change one value of a recipe at a time, from training to one report."""

from __future__ import annotations

import argparse

from rim_peft.cli import compare
from rim_peft.cli.compare import add_arguments, more_help

__all__ = ["add_arguments", "more_help", "run"]


def run(args: argparse.Namespace) -> int:
    """Make the missing runs, and print the report's tables."""
    return compare.run_kind(args, kind="ablate")
