"""The demo's test questions as rows of a task of lm-evaluation-harness: what `!function` in the files beside names."""

from typing import Any

from datasets import DatasetDict

from rim_peft.data.tasks import get_task


def load(**metadata: Any) -> DatasetDict:
    """Return the splits of the task `potions` as the demo has them; the harness passes a task's metadata on.

    >>> load()["test"][0]["question"].split(".")[-1]
    " What colour is Ivy's brew?"
    """
    task = get_task("potions")
    return DatasetDict({split: task.load(split) for split in ("validation", "test")})
