"""Which drafts are kept: those whose answer the task's rule accepts, without duplicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rim_peft.chains.options import Keep
from rim_peft.chains.teachers import Draft
from rim_peft.data.examples import Example, RowError, has_content
from rim_peft.tasks.rows import OwnRows
from rim_peft.tasks.steps import NO_MATCH
from rim_peft.tasks.task import Task

DUPLICATE = "duplicate"
REASONS = (
    "wrong answer",
    "no answer found",
    "empty",
    "cut at max_new_tokens",
    "no steps",
    "unreadable",
    DUPLICATE,
    "too long",
    "refused",
)
"""Why drafts are rejected; ``too long`` and ``refused`` are prompts that the teacher could not be asked."""


@dataclass(frozen=True)
class Verdict:
    """Why a draft is rejected, None for a right one, and the steps of a right one."""

    reason: str | None
    steps: tuple[str, ...] = ()


def judge(draft: Draft, example: Example, task: Task, reader: OwnRows) -> Verdict:
    """Judge a draft.

    Args:
        draft: what the teacher wrote.
        example: the question and its right answer.
        task: compares answers.
        reader: reads the draft's steps and answer.
    """
    if draft.problem is not None:
        return Verdict(draft.problem)
    if not has_content(draft.text):
        return Verdict("empty")
    if draft.is_cut:
        return Verdict("cut at max_new_tokens")
    try:
        answer, steps = reader.read_text(draft.text)
    except RowError as error:
        return Verdict("no steps" if NO_MATCH in str(error) else "no answer found")
    task = task.about(example.question)
    if task.read_answer(answer) is None:
        return Verdict("no answer found")
    if not task.is_correct(answer, example.answer):
        return Verdict("wrong answer")
    if not steps:
        return Verdict("no steps")
    try:
        return Verdict(None, Example(example.question, example.answer, tuple(steps)).steps or ())
    except RowError:
        return Verdict("unreadable")


def mark_duplicates(verdicts: Mapping[int, Verdict]) -> dict[int, Verdict]:
    """Return the verdicts on one question's drafts, by try, with all but the first of equal chains rejected."""
    marked: dict[int, Verdict] = {}
    seen: set[tuple[str, ...]] = set()
    for number, verdict in sorted(verdicts.items()):
        is_again = verdict.reason is None and verdict.steps in seen
        seen.add(verdict.steps)
        marked[number] = replace(verdict, reason=DUPLICATE) if is_again else verdict
    return marked


def choose(verdicts: Mapping[int, Verdict], keep: Keep) -> list[int]:
    """Return the tries whose chains are kept: the shortest in characters, the earlier of equals; or all right ones.

    >>> choose({1: Verdict(None, ("1+1=2", "2+1=3")), 2: Verdict("empty"), 3: Verdict(None, ("1+1+1=3",))}, "shortest")
    [3]
    """
    right = [number for number, verdict in sorted(verdicts.items()) if verdict.reason is None]
    if keep == "all":
        return right
    return sorted(right, key=lambda number: (sum(map(len, verdicts[number].steps)), number))[:1]
