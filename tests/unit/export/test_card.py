"""The README of an export: what the Hub reads of it, and what a reader is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rim_peft.data.examples import Templates
from rim_peft.export.checking import CheckResult
from rim_peft.export.record import ExportRecord, render_card
from rim_peft.export.tokens import MemoryTokens
from rim_peft.export.weights import Prompts

RESULT = CheckResult(32, 32, 0, 32, 0)


def render(*, base: str | None = None, num_blocks: int = 2) -> str:
    names, ids = (["<b>", "<m>", "</b>"], [7, 8, 9]) if num_blocks else ([], [])
    record = ExportRecord(
        memory=MemoryTokens(names, ids, num_blocks, block_size=1),
        places={"prompt": True, "chat": False},
        source="outputs/run",
        base=base,
        dequantized_from=None,
        dtype="float32",
        head_is_tied=False,
    )
    return render_card(Path("served"), record, Prompts(["1 + 1?"], Templates(), max_new_tokens=4), RESULT)


@pytest.mark.parametrize(
    ("base", "linked"),
    [("owner/name", "owner/name"), ("/a/base/that/was/moved", None), ("../base", None), (None, None)],
)
def test_a_base_is_linked_where_the_hub_can_have_it(base: str | None, linked: str | None) -> None:
    card = render(base=base)
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == linked
    assert "that/was/moved" not in card


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_blocks_are_explained_where_there_are_some(num_blocks: int) -> None:
    card = render(num_blocks=num_blocks)
    assert ("* **Memory tokens** are `<b>`, `<m>`, `</b>` (ids 7, 8, 9)" in card) is bool(num_blocks)
    assert ("write them after the prompt: `<b><m></b><b><m></b>`" in card) is bool(num_blocks)
    assert ("without memory blocks" in card) is not bool(num_blocks)
    assert "latent-reasoning" in card or not num_blocks
    assert "None" not in card
