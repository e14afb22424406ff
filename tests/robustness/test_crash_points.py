"""A run that is killed or stopped, wherever it is, is resumed to the same weights, best adapter and history."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.crash_points import Moment, Subject, write_recipe

NUM_QUICK = 6


def _complaints(subject: Subject, moments: list[Moment]) -> list[str]:
    found = ((moment, subject.try_moment(moment)) for moment in moments)
    return [f"{moment}: {complaint}" for moment, complaint in found if complaint]


def test_some_moments(tmp_path: Path) -> None:
    subject = Subject(write_recipe(tmp_path), tmp_path)
    # The hardest: the last step is on the disk, and what marks a stage as finished is not.
    ends = [moment for moment in subject.moments if moment.what.endswith("/.final.safetensors.partial")]
    draw = random.Random(0)
    chosen = [ends[0], *draw.sample(subject.moments, NUM_QUICK - 2)]
    chosen.append(draw.choice([moment for moment in subject.moments if moment.way == "stopped"]))
    assert not _complaints(subject, chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"reset_optimizer": False},
        {"quantization": "nf4", "optim": "paged_adamw_8bit", "scored": "no"},
    ],
    ids=["fp32", "nf4, paged"],
)
def test_every_moment(options: dict[str, Any], tmp_path: Path) -> None:
    if "quantization" in options:
        pytest.importorskip("bitsandbytes")
    subject = Subject(write_recipe(tmp_path, **options), tmp_path)
    assert len(subject.moments) > 100
    assert not _complaints(subject, [*subject.moments, *subject.random_moments(10, seed=0)])
