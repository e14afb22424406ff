"""``rim-peft bench``: run the benchmarks, which are part of a clone and are not installed with the package."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import rim_peft

_CLONE = Path(rim_peft.__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m benchmarks``."""
    if not (_CLONE / "benchmarks" / "registry.py").is_file():
        parser.error(
            f"the benchmarks are part of a clone of the repository, and there are none beside {_CLONE / 'rim_peft'}. "
            "Clone it and install it with pip install -e ."
        )
    if str(_CLONE) not in sys.path:
        sys.path.insert(0, str(_CLONE))  # in front: packages named benchmarks get installed by accident
    import_module("benchmarks.options").add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks."""
    return int(import_module("benchmarks.__main__").run(args, command=["rim-peft", *sys.argv[1:]]))
