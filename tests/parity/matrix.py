"""The matrix: which behaviour is tried on which base, format and configuration, and what comes of it.

    python -m tests.parity.matrix          # the table, to the terminal and to docs/supported.md
    python -m tests.parity.matrix --run    # first tries every cell, some minutes; fails if one departs

The page is made from what this file says, and the tests check that every cell does what it says.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import transformers

from tests.parity import adapters, files, merging, running
from tests.parity.page import PAGE, render
from tests.parity.refusals import REFUSALS
from tests.parity.subject import BASES, CONFIGS, FORMATS, Case, Subject

Behaviour = Callable[[Subject], None]

BEHAVIOURS: tuple[Behaviour, ...] = (
    *files.BEHAVIOURS,
    *adapters.BEHAVIOURS,
    *merging.BEHAVIOURS,
    *running.BEHAVIOURS,
)

_CONFIG_BASES = ("llama-untied", "gpt2-tied", "gemma3-tied")
CORE = (
    Case("llama-untied"),
    Case("gpt2-tied"),
    Case("gemma3-tied"),
    Case("llama-untied", "nf4"),
    Case("llama-untied", "fp32", "memory only"),
    Case("llama-untied", "fp32", "insertion layer"),
)
"""Cells that every change is tested on; the others are slow tests."""

TAKES_SECONDS = {running.compiled: ("llama-untied", "gpt2-tied", "gemma3-tied")}
"""Behaviours that are slow everywhere, and the bases on which they are tried, in float32 and plain."""


@dataclass(frozen=True)
class Departure:
    """A behaviour that RiM does not have in some cells.

    Attributes:
        behaviour: which.
        configs: in which configurations.
        error: how its error begins, as a pattern.
        is_stocks: whether stock LoRA fails in the same cells, and how: another pattern.
        instead: what to do.
    """

    behaviour: Behaviour
    configs: tuple[str, ...]
    error: str
    is_stocks: str | None
    instead: str


_DORA_MIXED = "Cannot pass `adapter_names` when DoRA is enabled"

DEPARTURES = (
    Departure(adapters.mix_in_a_pass, ("DoRA",), _DORA_MIXED, _DORA_MIXED, "a batch for each adapter"),
    Departure(adapters.mix_in_generate, ("DoRA",), _DORA_MIXED, _DORA_MIXED, "a batch for each adapter"),
    Departure(
        adapters.combine,
        ("DoRA",),
        "use_dora: must be False for all combined adapters",
        "cosine of logits",  # it drops the magnitudes: another model, without an error
        "merge one adapter into the base",
    ),
    Departure(
        files.swap_an_adapter,
        ("memory only",),
        "r: must be at least 1 to swap adapters in place",
        None,
        "`load_adapter`, then `set_adapter`",
    ),
    Departure(
        adapters.patterns,
        ("memory only",),
        "r: must be at least 1 with rank_pattern",
        None,
        "there is no LoRA: set `r`",
    ),
    Departure(
        adapters.scale,
        ("memory only",),
        "scaling is only supported for models with `LoraLayer`s",
        None,
        "there is no LoRA",
    ),
    Departure(
        running.embeddings_in_place_of_ids,
        ("insertion layer", "bidirectional"),
        "input_ids: must be given with",
        None,
        "`input_ids`, which tell where blocks lie",
    ),
)


STOCKS_OWN: tuple[tuple[Behaviour, str, str], ...] = (
    (files.load_by_transformers, "DoRA", "the magnitudes are not loaded, without an error"),
    (files.load_onto_a_transformers_model, "DoRA", "the same"),
    (running.run_a_pipeline, "DoRA", "the same, with the adapter's folder"),
    (files.swap_an_adapter, "DoRA", "KeyError"),
    (adapters.combine, "rsLoRA", "the adapter is stronger by the root of its rank, without an error"),
)
"""Behaviours and configurations in which stock LoRA fails and RiM does not, and how stock LoRA fails."""


def cells() -> Iterator[Case]:
    """All combinations that are tried: every base in every format, and every configuration on some bases."""
    for base in BASES:
        for format_name in FORMATS:
            yield Case(base, format_name)
    for config in list(CONFIGS)[1:]:
        for base in _CONFIG_BASES:
            yield Case(base, "fp32", config)
        yield Case("llama-untied", "nf4", config)


def pairs() -> Iterator[tuple[Behaviour, Case]]:
    """All behaviours with the cells in which they are tried."""
    for case in cells():
        for behaviour in BEHAVIOURS:
            bases = TAKES_SECONDS.get(behaviour)
            if bases is None or (case.base in bases and case.format == "fp32" and case.config == "plain"):
                yield behaviour, case


def departure(behaviour: Behaviour, case: Case) -> Departure | None:
    """What is said of a behaviour in a cell; None if it works."""
    return next((one for one in DEPARTURES if one.behaviour is behaviour and case.config in one.configs), None)


def check(behaviour: Behaviour, case: Case, folder: Path) -> Departure | None:
    """Check that a behaviour is in a cell what this file says, and return what that is.

    Raises:
        AssertionError: it departs, or does not depart as it should.
    """
    expected = departure(behaviour, case)
    if expected is None:
        behaviour(Subject(case, folder))
        return None
    _check_fails(behaviour, case, folder, expected.error)
    if expected.is_stocks is not None:
        _check_fails(behaviour, replace(case, is_stock=True), folder, expected.is_stocks)
    return expected


def _check_fails(behaviour: Behaviour, case: Case, folder: Path, pattern: str) -> None:
    message = "it works"
    try:
        behaviour(Subject(case, folder))
    except Exception as error:
        message = str(error).strip("'")
    assert re.match(pattern, message), f"{case}: must fail with {pattern!r}, got {message}"


def page() -> str:
    """The text of docs/supported.md."""
    return render(list(pairs()), departure, DEPARTURES, REFUSALS, STOCKS_OWN)


def _run_all() -> int:
    """Check every cell, print those that fail, and return their number."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    num_failed = 0
    for behaviour, case in pairs():
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(behaviour, case, Path(folder))
            except Exception as error:
                num_failed += 1
                print(f"{behaviour.__name__} {case}: {type(error).__name__}: {error}", flush=True)
    return num_failed


def main() -> int:
    """Write the page, after trying all cells if asked to."""
    parser = argparse.ArgumentParser(description="What RiM does of what stock LoRA does.")
    parser.add_argument("--run", action="store_true", help="try every cell first; some minutes")
    if parser.parse_args().run and (num_failed := _run_all()):
        print(f"{num_failed} cells are not as this file has them: the page is left as it was.", file=sys.stderr)
        return 1
    text = page()
    PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
