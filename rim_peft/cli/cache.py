"""``rim-peft cache``: show or delete the tokenised tables on this machine."""

from __future__ import annotations

import argparse
import json
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--clear", action="store_true", help="delete all tables that no process uses")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def more_help() -> str:
    """Return additional text for ``--help``: when tables are deleted."""
    from rim_peft.data.cache import DAYS, GIGABYTES

    return (
        "Training keeps each table's token ids, so that the next run with the same rows starts at once. Tables unused\n"
        "for 30 days are deleted, and the oldest ones while all exceed 5 GB together, but none that is in use.\n"
        f"The environment variables {DAYS} and {GIGABYTES} change these limits."
    )


def run(args: argparse.Namespace) -> int:
    """Show or delete the tables."""
    from rim_peft.data.cache import cache_folder, clear, limits, list_tables

    days, gigabytes = limits()
    cleared = clear() if args.clear else None
    tables = list_tables()
    num_bytes = sum(table.num_bytes for table in tables)
    document = {"folder": str(cache_folder()), "num_tables": len(tables), "num_bytes": num_bytes}
    if cleared is not None:
        document["num_deleted"] = cleared[0]
    if args.json:
        print(json.dumps({**document, "days": days, "gigabytes": gigabytes}, indent=2))
        return 0
    if cleared is not None:
        print(f"deleted: {cleared[0]} tables" + (f" ({cleared[1]} are in use)" if cleared[1] else ""))
    print(f"{cache_folder()}: {len(tables)} tables, {num_bytes / 1e6:.1f} MB")
    if tables:
        unused = (time.time() - tables[0].used) / 86400
        print(f"longest unused: {max(0, unused):.0f} days")
    print(f"deleted automatically: unused for {days:g} days, or the oldest over {gigabytes:g} GB")
    return 0
