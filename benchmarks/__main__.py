"""``python -m benchmarks``: run benchmarks and print their rows."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import add_arguments, read_serving
from rim_peft_command import quiet_bitsandbytes

if TYPE_CHECKING:
    from benchmarks.registry import Benchmark, Settings
    from benchmarks.report import Row

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare two ways of doing the same thing, and each with its bound. These are not tests.",
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return run(args, command=["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    except ValueError as error:
        parser.error(str(error))


def run(args: argparse.Namespace, *, command: Sequence[str]) -> int:
    """Run what the arguments ask for; results go to stdout, progress to stderr.

    Returns:
        0; 1 if a benchmark failed; 130 if interrupted, after printing the finished rows.

    Raises:
        ValueError: a name is unknown, or there is no GPU.
    """
    _quiet()
    from benchmarks.registry import Settings, all_benchmarks

    known = all_benchmarks()
    if args.list:
        print("\n".join(f"{name:14} {benchmark.summary}" for name, benchmark in known.items()))
        return 0
    if unknown := [name for name in args.names if name not in known]:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(args.names or known)]
    settings = Settings(device=args.device, quick=args.quick, serving=read_serving(args))
    _check_device(args.device)
    if args.profile:
        from benchmarks.profile import find_costs

        with contextlib.redirect_stdout(sys.stderr):
            text = find_costs(settings)
        print(text)
        return 0
    return _run_and_print(chosen, settings, args, command)


def _run_and_print(
    chosen: Sequence[Benchmark], settings: Settings, args: argparse.Namespace, command: Sequence[str]
) -> int:
    from benchmarks.report import to_document, to_table

    rows: list[Row] = []
    started = time.perf_counter()
    code = 0
    try:
        with contextlib.redirect_stdout(sys.stderr):  # for output of libraries
            for benchmark in chosen:
                code = max(code, _collect(benchmark, settings, rows))
    except KeyboardInterrupt:
        print("interrupted; these are finished:", file=sys.stderr)
        code = INTERRUPTED
    document = to_document(
        rows,
        command=command,
        device=settings.device,
        is_complete=code == 0,
        seconds=time.perf_counter() - started,
    )
    text = json.dumps(document, indent=2, ensure_ascii=False)
    if settings.quick:
        print("a quick run: its sizes show that everything runs, and nothing about speed", file=sys.stderr)
    print(text if args.json else to_table(rows))
    if args.save:
        Path(args.save).write_text(f"{text}\n", encoding="utf-8")
    return code


def _collect(benchmark: Benchmark, settings: Settings, rows: list[Row]) -> int:
    """Add a benchmark's rows; a failure ends this benchmark and sets the exit code, but does not stop the others."""
    from benchmarks.registry import BenchmarkError

    started = time.perf_counter()
    print(f"{benchmark.name}: {benchmark.summary}", file=sys.stderr, flush=True)
    try:
        rows.extend(benchmark.run(settings))
    except BenchmarkError as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        print(f"{benchmark.name}: failed", file=sys.stderr)
        return 1
    print(f"    {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return 0


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda needs a GPU that torch can use, and finds none. Use cpu.")


def _quiet() -> None:
    """Silence the libraries' notices, which are about models to keep."""
    warnings.simplefilter("ignore")
    quiet_bitsandbytes()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
