"""Training examples: their form, and how they become token ids."""

from rim_peft.data.examples import BadRowsError, Example, RowError, Templates

__all__ = ["BadRowsError", "Example", "RowError", "Templates"]
