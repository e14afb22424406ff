"""The card beside a checkpoint of a trainer that is used on its own; a recipe's run writes a fuller one."""

from __future__ import annotations

from pathlib import Path

from rim_peft.tuner.card import CARD_FILE, TAGS, CardText, Usage, render_card


def write_card(folder: Path, *, name: str | None, stage: str, base: str) -> None:
    """Write ``README.md``.

    Args:
        folder: the checkpoints' folder; made if need be.
        name: what to call the adapter; the folder's name if None.
        stage: the trainer's class.
        base: name of the base, to load the adapter on; empty if it has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card = CardText(f"An adapter trained by `rim_peft.{stage}`.", Usage(base), metadata={"tags": [*TAGS, "trl"]})
    (folder / CARD_FILE).write_text(render_card(name or folder.name, card), encoding="utf-8")
