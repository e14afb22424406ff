"""ProsQA: which of two properties follows through a chain of made-up kinds.

Rows are as in Coconut's repository: ``question``, ``steps``, ``answer`` (and the graph, which is not read). Answers are
compared as whole sentences (rule ``exact-text``: without white space around them and a final full stop). Coconut
compares what follows the last ``#`` of its output, without commas, in the same way; our readout is the answer alone.

Source: Hao et al., "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769.
"""

from dataclasses import dataclass
from typing import ClassVar

from rim_peft.data.tasks.task import Task


@dataclass(frozen=True)
class ProsQA(Task):
    """The task; ``prosqa_train.json``, ``prosqa_valid.json`` and ``prosqa_test.json`` are in Coconut's repository."""

    name: ClassVar[str] = "prosqa"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text",)
