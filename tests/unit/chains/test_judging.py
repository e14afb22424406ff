"""Which drafts are kept."""

from __future__ import annotations

from typing import Any

import pytest

from rim_peft.chains.judging import REASONS, Verdict, choose, judge, mark_duplicates
from rim_peft.chains.options import ChainOptions
from rim_peft.chains.teachers import Draft
from rim_peft.data.examples import Example
from rim_peft.tasks import get_task
from rim_peft.tasks.rows import OwnRows

GOLD = Example("2 * 3 + 1?", "7")


def verdict(text: str, **options: Any) -> Verdict:
    reader = OwnRows(split_steps=options.pop("split", "lines"), answer_from=options.pop("answer_from", "after:####"))
    task = get_task("rows", answer_rule=options.pop("rule", "exact-text"))
    return judge(Draft(text, **options), GOLD, task, reader)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("2*3=6\n6+1=7\n#### 8", {}, "wrong answer"),
        ("2*3=6\n6+1=7", {}, "no answer found"),
        ("2*3=6\n####  \n", {}, "no answer found"),
        ("2*3=6\n#### seven", {"rule": "last-number-float"}, "no answer found"),
        (" \n", {}, "empty"),
        ("2*3=6\n#### 7", {"is_cut": True}, "cut at max_new_tokens"),
        ("#### 7", {}, "no steps"),
        ("2*3=6\n#### 7", {"split": "regex:;"}, "no steps"),
        ("<think>\n2*3=6\n#### 7", {}, "no answer found"),
        ("\ud800\n#### 7", {}, "unreadable"),
        ("", {"problem": "too long"}, "too long"),
    ],
)
def test_reasons(text: str, options: dict[str, Any], reason: str) -> None:
    assert verdict(text, **options) == Verdict(reason)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("2*3=6\n6+1=7\n#### 7", {}),
        ("2*3=6\n6+1=7\n#### 7.0 apples", {"rule": "last-number-float"}),
        ("<think>\n2*3=6\n6+1=7\n</think>\nSo #### 7", {}),
        ("2*3=6\n6+1=7\n7", {"answer_from": "last-number"}),
    ],
)
def test_right_chains_become_steps_as_in_the_task_rows(text: str, options: dict[str, Any]) -> None:
    assert verdict(text, **options) == Verdict(None, ("2*3=6", "6+1=7"))


def test_a_rule_that_depends_on_the_question_is_asked_about_it() -> None:
    task = get_task("reasoning-gym:chain_sum", num_rows=1, num_held_out=1)
    (row,) = task.load("train")
    example = Example(row["question"], row["answer"])
    # The generator's verifier compares numbers; without the question, texts are compared.
    draft = Draft(f"a step\n#### {row['answer']}.0")
    assert judge(draft, example, task, OwnRows(split_steps="lines", answer_from="after:####")).reason is None
    assert not task.is_correct(f"{row['answer']}.0", row["answer"])


def test_duplicates_are_rejected_and_the_shortest_or_all_are_kept() -> None:
    long, short = Verdict(None, ("2*3=6", "6+1=7")), Verdict(None, ("6+1=7",))
    marked = mark_duplicates({4: short, 1: long, 2: Verdict("empty"), 3: long})
    assert {number: one.reason for number, one in marked.items()} == {1: None, 2: "empty", 3: "duplicate", 4: None}
    assert choose(marked, "all") == [1, 4]
    assert choose(marked, "shortest") == [4]
    assert choose({1: Verdict("empty")}, "all") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "^temperature: must be from 0 to 100, got nan"),
        ({"top_p": 0.0}, "^top_p: must be above 0 and at most 1, got 0.0"),
        ({"num_chains": 0}, "^num_chains: must be from 1"),
        ({"keep": "best"}, "^keep: must be one of shortest, all, got 'best'"),
        ({"split_steps": "words"}, "^split_steps: must be one of"),
        ({"answer_from": "end"}, "^answer_from: must be one of"),
        ({"temperature": 0.0}, "^temperature: must be above 0 if there is more than one try"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChainOptions(**options)
