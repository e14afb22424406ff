"""The demo's questions as rows of an lm-evaluation-harness task, loaded by `!function` in the YAML files here."""

from typing import Any

from datasets import DatasetDict

from rim_peft.tasks import get_task


def load(**metadata: Any) -> DatasetDict:
    """Return the splits that the demo's adapter is judged on; the task metadata from the harness is unused.

    >>> load()["test"][0]["question"]
    "Ben stirs Kim's brew. Kim's brew is gold. What colour is Ben's brew?"
    """
    task = get_task("potions", weights=[1, 2, 3, 4])  # as data.options of rim_peft/demo/recipe.yaml
    return DatasetDict({split: task.load(split) for split in ("validation", "test")})
