"""The options shared by ``python -m benchmarks`` and ``rim-peft bench``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="benchmarks to run (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cpu: sizes for two cores; cuda: real sizes on one GPU (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="smallest sizes, two rounds: does everything run?")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--save", metavar="FILE", help="also write the JSON document to a file")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead, print the five largest costs of a training step and of an answer",
    )
