"""A run that is killed or stopped, wherever it is, is resumed to the same weights, best adapter and history."""

from __future__ import annotations

import random
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.crash_points import Moment, Subject, run_forked, write_recipe

NUM_QUICK_OF_A_WAY = 3


def _complaints(subject: Subject, moments: list[Moment]) -> list[str]:
    found = ((moment, subject.try_moment(moment)) for moment in moments)
    return [f"{moment}: {complaint}" for moment, complaint in found if complaint]


def test_some_moments(tmp_path: Path) -> None:
    subject = Subject(write_recipe(tmp_path), tmp_path)
    # Among them the hardest: the last step is on the disk, and what marks a stage as finished is not.
    last = [
        moment
        for moment in subject.moments
        if moment.way in ("killed", "cut") and moment.what.endswith("/.final.safetensors.partial")
    ]
    by_way = {way: [one for one in subject.moments if one.way == way] for way in ("killed", "cut", "stopped")}
    chosen = [last[0], *(one for same in by_way.values() for one in random.Random(0).sample(same, NUM_QUICK_OF_A_WAY))]
    assert not _complaints(subject, chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "part"),
    [
        # Parts are enough here: neighbours differ little. `python -m tests.robustness.crash_points` tries all.
        ({}, slice(0, None, 5)),
        ({"quantization": "nf4", "optim": "paged_adamw_8bit", "scored": "no"}, slice(1, None, 9)),
    ],
    ids=["fp32", "nf4, paged"],
)
def test_many_moments(options: dict[str, Any], part: slice, tmp_path: Path) -> None:
    if "quantization" in options:
        pytest.importorskip("bitsandbytes")
    subject = Subject(write_recipe(tmp_path, **options), tmp_path)
    assert len(subject.moments) > 100
    assert not _complaints(subject, [*subject.moments, *subject.random_moments(10, seed=0)][part])


def test_a_child_ends_there_and_says_why_whatever_limits_it_has() -> None:
    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        raise ValueError("x" * 200_000)

    status, said = run_forked(fail)
    assert status == 1
    assert said.endswith(f"ValueError: {'x' * 200_000}\n")
