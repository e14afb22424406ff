"""``make fuzz N=... SEED=...``: mutated inputs by the thousand, and a table of how they were answered.

A campaign is a module of this folder with ``cases(seed, folder)``, which yields cases without end, the same ones for
the same seed. Add its name to ``CAMPAIGNS``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from tests.robustness.judging import Case, Outcome, Verdict, judge

CAMPAIGNS = {"recipes": 1.0, "command_lines": 0.1, "rows": 2.0, "adapter_folders": 0.3}
"""By name, how many of its inputs are tried for each recipe: some take longer than others."""
SHOWN_WRONG = 20


def run_campaign(name: str, *, num_inputs: int, seed: int) -> Iterator[Outcome]:
    """Yield the outcomes of a campaign's first cases, as many as make up ``num_inputs``."""
    module = import_module(f"tests.robustness.{name}")
    with tempfile.TemporaryDirectory() as folder:
        cases: Iterator[Case] = module.cases(seed, Path(folder))
        tried = 0
        while tried < num_inputs:
            case = next(cases)
            tried += case.size
            yield judge(case)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run campaigns and print one row for each; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzz", description=main.__doc__)
    parser.add_argument("--num", type=int, default=1000, help="recipes; others in proportion (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    parser.add_argument("--only", nargs="*", choices=CAMPAIGNS, default=list(CAMPAIGNS), help="campaigns (all)")
    args = parser.parse_args(arguments)
    print(f"{'seed ' + str(args.seed):<16}{'tried':>10}{'right':>10}{'refused clearly':>18}{'wrong':>8}", flush=True)
    wrong: list[Outcome] = []
    for name in args.only:
        sizes: Counter[Verdict] = Counter()
        for outcome in run_campaign(name, num_inputs=round(args.num * CAMPAIGNS[name]), seed=args.seed):
            sizes[outcome.verdict] += outcome.case.size
            if outcome.verdict is Verdict.WRONG:
                wrong.append(outcome)
        print(
            f"{name:<16}{sum(sizes.values()):>10,}{sizes[Verdict.RIGHT]:>10,}{sizes[Verdict.REFUSED]:>18,}"
            f"{sizes[Verdict.WRONG]:>8,}",
            flush=True,
        )
    for outcome in wrong[:SHOWN_WRONG]:
        print(f"{outcome.case.name}: {outcome.detail}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
