"""The README of an export: what the Hub reads of it, and what a reader is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rim_peft.data.examples import Templates
from rim_peft.export.card import render_adapter_card, render_card, render_modelfile
from rim_peft.export.checking import CheckResult
from rim_peft.export.folder import Prompts
from rim_peft.export.record import ExportRecord
from rim_peft.export.tokens import MemoryTokens

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


BOTH = {"prompt": True, "chat": True}
MEMORY = MemoryTokens(["<b>", "<m>", "</b>"], [7, 8, 9], num_blocks=2, block_size=1)


def test_ollama_asks_as_in_training() -> None:
    prompts = Prompts(["1 + 1?"], Templates(prompt="Q: {question}\n{{A}}:"), max_new_tokens=4)
    modelfile = render_modelfile(MEMORY, prompts, "<eos>")
    assert modelfile is not None
    assert 'TEMPLATE """Q: {{ .Prompt }}\n{A}:<b><m></b><b><m></b>"""\n' in modelfile
    assert 'PARAMETER stop "<eos>"' in modelfile
    assert render_modelfile(MEMORY, Prompts([[{"role": "user", "content": "?"}]], Templates(), 4), "<eos>") is None
    assert render_modelfile(MEMORY, Prompts(["?"], Templates(prompt='"{question}"'), 4), "<eos>") is None


@pytest.mark.parametrize(("knows_names", "told"), [(True, "<b><m></b><b><m></b>"), (False, "`block_ids`")])
def test_a_card_of_lora_on_the_unmodified_base(knows_names: bool, told: str) -> None:
    prompts = Prompts(["1 + 1?"], Templates(), max_new_tokens=4)
    card = render_adapter_card(
        "served", MEMORY, prompts, RESULT, places=BOTH, base="owner/name", knows_names=knows_names
    )
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "owner/name"
    assert "It fits `owner/name` as it is." in card
    assert told in card
    assert "extended base" in render_adapter_card("served", MEMORY, prompts, RESULT, places=BOTH)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (BOTH, "This folder's tokenizer appends them to texts and chats; elsewhere, and with the base's tokenizer,"),
        ({"prompt": True, "chat": False}, "appends them to texts; elsewhere, and with the base's tokenizer,"),
        ({"prompt": False, "chat": False}, "No tokenizer appends them:\n  write after each prompt: `<b><m></b>"),
    ],
    ids=str,
)
def test_a_card_says_to_what_the_tokenizer_appends_blocks(places: dict[str, bool], told: str) -> None:
    prompts = Prompts(["1 + 1?"], Templates(), max_new_tokens=4)
    assert told in render_adapter_card("served", MEMORY, prompts, RESULT, places=places)
