"""``rim-peft push``: upload a trained adapter to the Hub."""

from __future__ import annotations

import argparse

from rim_peft.cli.console import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", type=path, help="output folder of a training, or an adapter's folder"
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="target on the Hub, as owner/name; created if missing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to; created if missing (default: main)")
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--license", metavar="ID", help="the adapter's licence, by its id on the Hub, such as mit")
    parser.add_argument("--base", metavar="ID", help="the base's id on the Hub, if the base was a copy in a folder")
    parser.add_argument(
        "--space",
        metavar="OWNER/NAME",
        help="also make a Space that shows the adapter, or replace its app.py, requirements.txt and README.md",
    )


def run(args: argparse.Namespace) -> int:
    """Upload, and print the addresses."""
    from rim_peft.app.space import check_id, push_space
    from rim_peft.cli.console import say
    from rim_peft.run.sharing import push

    if args.space is not None:  # before anything is uploaded
        check_id("space", args.space)
        check_id("repo_id", args.repo_id)

    address = push(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        message=args.message,
        license=args.license,
        base=args.base,
    )
    say(f"uploaded: {address}")
    if args.space is not None:
        say(f"space: {push_space(args.space, args.repo_id, revision=args.revision, private=args.private)}")
    return 0
