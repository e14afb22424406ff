"""The demo's questions as rows of a task of lm-evaluation-harness: what `!function` in the files beside names."""

from typing import Any

from datasets import DatasetDict

from rim_peft.tasks import get_task


def load(**metadata: Any) -> DatasetDict:
    """Return the splits that the demo's adapter is judged on; the harness passes a task's metadata, unused here.

    >>> load()["test"][0]["question"]
    "Ben stirs Kim's brew. Kim's brew is gold. What colour is Ben's brew?"
    """
    task = get_task("potions", weights=[1, 2, 3, 4])  # as data.options of rim_peft/demo/recipe.yaml
    return DatasetDict({split: task.load(split) for split in ("validation", "test")})
