"""How long the package and its command take to start, each in a fresh process, and what they print besides their own.

The seconds more than the other way are judged, not the ratio: they are what a user waits for.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.measure import Way, spread
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, below

_COMMANDS = (["--version"], ["--help"], ["trian"])
"""Commands that must answer at once; the last is mistyped."""

_SCRIPT = "import sys; from rim_peft_command import main; sys.exit(main())"
"""What the installed script ``rim-peft`` runs."""


@benchmark("startup", "import rim_peft against import peft, and the command's quick answers against a bare python")
def run(settings: Settings) -> Iterator[Row]:
    """Start processes in turn."""
    settings.tell("imports")
    yield _row(settings, "import rim_peft", ["-c", "import rim_peft"], "import peft", ["-c", "import peft"], most=0.3)
    for arguments in _COMMANDS:
        name = f"rim-peft {arguments[0]}"
        settings.tell(name)
        yield _row(settings, name, ["-c", _SCRIPT, *arguments], "python -c pass", ["-c", "pass"], most=0.5)


def _row(settings: Settings, name: str, ours: Sequence[str], other: str, theirs: Sequence[str], *, most: float) -> Row:
    samples = settings.time({name: _started(ours), other: _started(theirs)})
    more = [first - second for first, second in zip(samples[name], samples[other], strict=True)]
    printed = [line for line in _start(ours).stderr.splitlines() if line.strip()]
    return Row(
        benchmark="startup",
        case={"process": name},
        ways=(Measured.milliseconds(name, samples[name]), Measured.milliseconds(other, samples[other])),
        figure=spread(more),
        figure_name="seconds more",
        bound=0.0,
        bound_text="nothing to load",
        target=below(most, f"below {most:g} s"),
        num_rounds=len(more),
        note=f"lines on stderr: {len(printed)}" + (f", the first: {printed[0]}" if printed else ""),
    )


def _started(arguments: Sequence[str]) -> Way:
    return lambda: _start(arguments)


def _start(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
