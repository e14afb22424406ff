"""Reasoning in words: StrategyQA, ProsQA, ProntoQA and the symbolic tasks of BIG-Bench Hard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError, read_example
from rim_peft.tasks.task import Task, read_texts, require_one_of, require_text


@dataclass(frozen=True)
class StrategyQA(Task):
    """StrategyQA: yes-or-no questions whose reasoning steps are implicit.

    Rows are as in the authors' files and on the Hub: ``question``, ``answer`` (true or false), ``facts`` and
    ``decomposition`` (lists, or one text that is split into sentences).

    The labels of the authors' test set are not public, and papers report accuracy on ``dev.json`` (229 rows, 53 % of
    the answers are no). So ``dev.json`` is the split ``test`` here, and is never used for selection; asking for a split
    ``dev`` is an error that says so. ``validation`` is a fifteenth of ``train.json`` (2,061 rows), by a hash of the
    question.

    Source: Geva et al., "Did Aristotle Use a Laptop?", arXiv 2101.02235.
    """

    name: ClassVar[str] = "strategyqa"
    source: ClassVar[str | None] = "ChilleD/StrategyQA"
    split_names: ClassVar[Mapping[str, str]] = {"dev": "test"}
    answer_rules: ClassVar[tuple[str, ...]] = ("yes-no",)

    steps: Literal["facts", "decomposition"] = "facts"
    """The column with the steps: statements, or the questions that lead to the answer."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row; the answer becomes ``yes`` or ``no``.

        Raises:
            RowError: a field is missing or of the wrong type, or the row has only the other kind of steps.
        """
        question, answer = require_text(row, "question"), require_one_of(row, "answer")
        if not isinstance(answer, bool):
            raise RowError(f"answer: must be true or false, got {answer!r}")
        if self.steps not in row and {"facts", "decomposition"} & set(row):
            there = ", ".join(row)
            raise RowError(f"{self.steps}: the row has no such field; its fields: {there}. Set the option steps")
        return Example(question, answer="yes" if answer else "no", steps=read_texts(row, self.steps))


@dataclass(frozen=True)
class ProsQA(Task):
    """ProsQA: which of two properties follows through a chain of made-up kinds.

    The files ``prosqa_train.json``, ``prosqa_valid.json`` and ``prosqa_test.json`` are in Coconut's repository, with
    ``question``, ``steps`` and ``answer`` (and the graph, which is not read). Answers are compared as whole sentences
    (rule ``exact-text``: without surrounding white space and a final full stop). Coconut compares the text after the
    last ``#`` of its output, without commas, in the same way; our readout is only the answer.

    Source: Hao et al., "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769.
    """

    name: ClassVar[str] = "prosqa"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text",)


@dataclass(frozen=True)
class ProntoQA(Task):
    """ProntoQA: whether a statement about somebody follows from a chain of made-up kinds.

    Supported formats:

    * Coconut's ``prontoqa_train.json``, ``prontoqa_valid.json`` and ``prontoqa_test.json``, which its script makes:
      ``question``, ``steps`` (two sentences each, what is known and the rule applied to it) and ``answer``;
    * the authors' generated file (``5hop_0shot_random.json``), an object of examples, whose ``test_example`` holds
      ``question``, ``query``, ``chain_of_thought`` and ``answer``. Steps are made as by Coconut's script; in-context
      examples are not read.

    Coconut compares answers as texts (``exact-text``); ``yes-no`` also accepts ``true``, and is reported too.

    Source: Saparov and He, "Language Models Are Greedy Reasoners: A Systematic Formal Analysis of Chain-of-Thought",
    arXiv 2210.01240; the splits and steps: Hao et al., arXiv 2412.06769.
    """

    name: ClassVar[str] = "prontoqa"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text", "yes-no")

    answer_rule: Literal["exact-text", "yes-no"] = "exact-text"
    """The deciding rule; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row in either format; the answer is ``True`` or ``False``."""
        row = row.get("test_example", row)
        if not isinstance(row, Mapping):
            raise RowError(f"test_example: must be an object, got {row!r}")
        if "query" in row:
            chain = read_texts(row, "chain_of_thought") or ()
            steps = [" ".join(chain[start : start + 2]) for start in range(0, len(chain), 2)]
            row = {**row, "question": f"{require_text(row, 'question')} {require_text(row, 'query')}", "steps": steps}
        example = read_example(row)
        if example.answer not in ("True", "False"):
            raise RowError(f"answer: must be True or False, got {example.answer!r}")
        return example


_OBJECTS = ("three_objects", "five_objects", "seven_objects")

BIG_BENCH_HARD: Mapping[str, str] = {
    "boolean_expressions": "yes-no",
    "dyck_languages": "exact-text",
    **{f"logical_deduction_{number}": "leading-letter" for number in _OBJECTS},
    "multistep_arithmetic_two": "last-number-float",
    "navigate": "yes-no",
    "object_counting": "last-number-float",
    "penguins_in_a_table": "leading-letter",
    "temporal_sequences": "leading-letter",
    **{f"tracking_shuffled_objects_{number}": "leading-letter" for number in _OBJECTS},
    "web_of_lies": "yes-no",
    "word_sorting": "exact-text",
}
"""The answer rule of each symbolic task of BIG-Bench Hard."""


@dataclass(frozen=True)
class BigBenchHard(Task):
    """The symbolic tasks of BIG-Bench Hard, one at a time; all rows are test rows.

    Rows are as in the authors' files (an object with ``canary`` and ``examples``) and on the Hub: ``input``, which
    includes the options if there are any, and ``target``. There are no steps, and no training rows.

    Source: Suzgun et al., "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them", arXiv 2210.09261.

    >>> BigBenchHard("navigate").answer_rules, BigBenchHard("navigate").source
    (('yes-no',), 'SaylorTwift/bbh:navigate')
    """

    name: ClassVar[str] = "bbh"
    split_names: ClassVar[Mapping[str, str]] = {"train": "test"}

    subtask: str = "boolean_expressions"
    """The task; it decides the answer rule."""

    def __post_init__(self) -> None:
        """Set the source and the answer rule.

        Raises:
            ValueError: there is no such task.
        """
        if self.subtask not in BIG_BENCH_HARD:
            raise ValueError(f"subtask: must be one of {', '.join(BIG_BENCH_HARD)}, got {self.subtask!r}.")
        rule = BIG_BENCH_HARD[self.subtask]
        for field, value in {
            "source": f"SaylorTwift/bbh:{self.subtask}",
            "answer_rules": (rule,),
            "answer_rule": rule,
        }.items():
            object.__setattr__(self, field, value)
        super().__post_init__()

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row."""
        return Example(require_text(row, "input"), answer=require_text(row, "target"))
