"""Holding rows out of training, by a hash of their question."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from datasets import Dataset

from rim_peft.data.examples import Question


def question_hash(question: Question, *, salt: str) -> float:
    """Return a number in [0, 1) that depends on the question's text and on ``salt`` alone.

    >>> round(question_hash("1 + 1?", salt="validation"), 6)
    0.609109
    """
    text = question if isinstance(question, str) else json.dumps(list(question), ensure_ascii=False, sort_keys=True)
    digest = hashlib.blake2b(f"{salt}\n{text.strip()}".encode(), digest_size=8).digest()
    # The upper 53 bits: a float holds no more, and 2**64 - 1 would round up to 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def is_held_out(question: Question, share: float, *, salt: str) -> bool:
    """Tell whether a question is among the ``share`` that ``salt`` holds out."""
    return question_hash(question, salt=salt) < share


def shared_questions(first: Dataset, second: Dataset) -> list[Question]:
    """Return the questions of ``first`` that ``second`` has too: none where nothing that one selects sees the other.

    Questions count as the same if their texts do but for white space around them. Rows without one are left out.

    >>> shared_questions(Dataset.from_dict({"question": ["a", "b"]}), Dataset.from_dict({"question": ["b ", None]}))
    ['b']

    Args:
        first: rows with ``question``.
        second: others.
    """
    there = {question_hash(question, salt="same") for question in second["question"] if question is not None}
    asked = [question for question in first["question"] if question is not None]
    return [question for question in asked if question_hash(question, salt="same") in there]


def hold_out(dataset: Dataset, size: int | float) -> tuple[Dataset, Dataset]:
    """Split rows into those to train on and those held out, which never share a question.

    Which questions are held out depends on their texts, not on their order, so the same rows give the same parts in
    every run. Rows that could not be read stay in training, where they are reported.

    >>> train, held_out = hold_out(Dataset.from_dict({"question": ["a", "b", "c", "b"]}), 2)
    >>> train["question"][:], held_out["question"][:]
    (['c'], ['a', 'b', 'b'])

    Args:
        dataset: rows with ``question``.
        size: how many questions to hold out: a number of them (int) or a share in (0, 1) (float).

    Returns:
        The rows to train on and those held out, each in their old order.

    Raises:
        ValueError: ``size`` would leave one of the parts empty, or the dataset is streamed.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset: must be a Dataset to hold rows out of, got {type(dataset).__name__}. Load it without streaming."
        )
    questions = dataset["question"]
    hashes = [None if question is None else question_hash(question, salt="hold-out") for question in questions]
    ranked = sorted({value for value in hashes if value is not None})
    count = size if isinstance(size, int) else round(size * len(ranked))
    if not 0 < count < len(ranked):
        raise ValueError(
            f"size: must hold out at least one of {len(ranked)} questions and leave at least one, got {size!r}. "
            "Give a number of questions, or a share between 0 and 1."
        )
    held: set[Any] = set(ranked[:count])
    return (
        dataset.select([index for index, value in enumerate(hashes) if value not in held]),
        dataset.select([index for index, value in enumerate(hashes) if value in held]),
    )
