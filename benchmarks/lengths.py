"""Token lengths of GSM8K's rows, so that packing is measured on real lengths without the data set.

``python -m benchmarks.lengths FOLDER`` counts them again from a folder with GSM8K's ``train.jsonl`` and prints this
file's ``LENGTHS``: equations are steps, and a byte-level BPE of 8,192 tokens is trained on the rows themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

NUM_ROWS = 64

LENGTHS = """
40:6,6:2 27:8,8:2 59:6,6,10:2 50:6,6,6,6:2 26:6,6,7:3 62:8,6,6,8,6:2 53:6,6,6:2 106:6,6,6:2 108:13,6:2
64:8,6,8,8,8,8,8:2 82:6,7:2 91:6,6,6,8,6:2 37:6,6,6:2 71:6,6,8:2 25:6,6:2 63:8,6,6,7,8,8:3 51:6,6,6:2
73:6,6,6,6,6,6:2 66:6,6,6,6,6:2 59:6,6,6,6:2 69:6,6,8:2 49:6,6,6:2 64:8,6:2 55:6,6,6,6:2 79:6,6:2 86:6:2 56:8,7:2
93:8,6,8,6,6:2 53:6,10,10,6,6:2 63:6,6,6,6:2 116:8:2 65:8,6,6:2 41:6,7:3 46:8:2 80:6,10,10,16,6:2 69:6,6:2 82:6,6:2
43:6,8,6,6,6,6:2 70:6,6,6:2 57:9,6,8,8,7:2 76:6,6,6,10:2 67:8,8,8:2 83:6,6,6,10:2 43:6,6,6,6:2 49:6,6,6,6:2 52:6:2
57:6,6:2 67:6,6,6,6:2 57:6,6,6,8:2 51:6,6,6:2 56:6,6:2 71:6,6,6,6:2 27:8,6,9:2 60:6,6,6,6:2 61:6,6,6,6,6,6:2
73:8,6,6,6,6:2 82:10,6:2 57:6,6,6,6,6:2 105:8,6,8,6,6:2 34:6,6,6,6:2 78:6,6,8:2 53:6,6,6,6,6,6:2 39:6,6,7:3
77:8,8,6,6,6,6,4,6:2
"""
"""The tokens of each row as prompt:step,step,...:answer, with EOS where a readout ends. Source: the first 64 rows with
equations of openai/grade-school-math's training file (MIT)."""


def real_lengths() -> list[tuple[int, list[int], int]]:
    """Return the tokens of each row's prompt, steps and answer."""
    rows = (row.split(":") for row in LENGTHS.split())
    return [(int(prompt), [int(step) for step in steps.split(",")], int(answer)) for prompt, steps, answer in rows]


def count_lengths(folder: str) -> str:
    """Return ``LENGTHS`` counted from GSM8K's own file."""
    from rim_peft.data.examples import Templates
    from rim_peft.data.preparation import prepare_dataset
    from rim_peft.run.built_base import train_tokenizer
    from rim_peft.sequence import BlockTokens
    from rim_peft.tasks import get_task
    from rim_peft.training.rim import Grounding

    rows: Any = get_task("gsm8k").load("train", path=folder).filter(lambda row: row["steps"])
    tokenizer = train_tokenizer(rows, Templates(), vocab_size=8192)
    first: Any = rows.select(range(NUM_ROWS))
    blocks = BlockTokens(begin=8192, memory=8193, end=8194, block_size=2)
    tokenized = prepare_dataset(first, tokenizer, Grounding(blocks, num_blocks=8))
    return " ".join(_count(row) for row in tokenized)


def _count(row: Any) -> str:
    steps = ",".join(str(len(step)) for step in row["step_ids"])
    return f"{len(row['prompt_ids'])}:{steps}:{len(row['answer_ids'])}"


def main(arguments: Sequence[str]) -> None:
    """Print the lengths counted from a folder."""
    print(count_lengths(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
