"""The task ``rows``: any rows, read by their columns and the form of their texts."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from rim_peft.data.examples import BadRowsError, Example, RowError
from rim_peft.tasks import get_task
from rim_peft.tasks.columns import USUAL
from rim_peft.tasks.task import Task
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows
from tests.unit.data.conftest import WriteRows
from tests.unit.tasks.test_task import Plain, as_rows

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
OWN = {"question": "2 * 3 + 1?", "steps": ["2*3=6", "6+1=7"], "answer": "7"}


def read(*rows: dict[str, Any], folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of a file as the task loads them."""
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(get_task("rows", **options).load("test", path=str(path)))


def example_of(row: dict[str, Any], **options: Any) -> Example:
    return get_task("rows", **options).read_row(row)


@pytest.mark.parametrize("question", [name for name in USUAL["question"] if name != "messages"])
@pytest.mark.parametrize("steps", [name for name in USUAL["steps"] if name != "completions"])
@pytest.mark.parametrize("answer", [name for name in USUAL["answer"] if name != "messages"])
def test_usual_names_are_found(question: str, steps: str, answer: str) -> None:
    row = {question: OWN["question"], "id": 3, steps: OWN["steps"], answer: OWN["answer"], "source": "x"}
    assert example_of(row) == Example("2 * 3 + 1?", answer="7", steps=("2*3=6", "6+1=7"))


def test_the_documentation_lists_the_usual_names() -> None:
    text = (Path(__file__).parents[3] / "docs" / "your-data.md").read_text()
    for role, names in USUAL.items():
        (line,) = re.findall(rf"^\| {role} \| (.*) \|$", text, re.MULTILINE)
        listed = re.sub(r"\([^)]*\)", "", line)
        assert [name.strip(" `") for name in listed.split(",")] == list(names)


def test_what_was_found_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read({"problem": "p", "rationale": ["r"], "target": "t"}, folder=tmp_path)
    assert (
        "columns by their usual names: question from problem, steps from rationale, answer from target." in caplog.text
    )
    caplog.clear()
    read({"problem": "p", "solution": "So 4"}, folder=tmp_path, answer_from="last-number")
    assert "question from problem, steps from solution, answer in the text of solution." in caplog.text
    caplog.clear()
    read({"problem": "p", "output": "So 4"}, folder=tmp_path, answer_from="last-number", split_steps="lines")
    assert "question from problem, steps in the text of output, answer from output." in caplog.text
    caplog.clear()
    read(OWN, folder=tmp_path)
    read({"a": "q", "b": "a"}, folder=tmp_path, columns={"question": "a", "answer": "b"})
    assert "usual names" not in caplog.text


def test_columns_that_are_not_read_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chat = {"messages": [USER, BLUE], "tools": [], "chat_template_kwargs": {"x": 1}}
    stepwise = {"prompt": "p", "completions": ["r", "a"], "labels": [True, True]}
    nested = {"problem": "p", "output": {"text": "a", "score": 1}}
    read(chat, folder=tmp_path)
    read(stepwise, folder=tmp_path)
    read(nested, folder=tmp_path, columns={"answer": "output.text"})
    read({**OWN, "hint": ""}, folder=tmp_path)
    assert "not read" not in caplog.text
    read({**OWN, "hint": "", "context": "c", "id": 3}, folder=tmp_path)
    assert "columns that are not read: context, id. A question may have several" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_are_read_as_they_were_written(streaming: bool, tmp_path: Path) -> None:
    kinds = {"prompt": Value("string"), "label": ClassLabel(names=["no", "yes"]), "x": Value("float32")}
    columns = {"prompt": ["a", "b", "c", "d"], "label": [0, 1, -1, None], "x": [0.1, 16777216.0, -2.5e-6, 3.0]}
    Dataset.from_dict(columns, features=Features(kinds)).to_parquet(tmp_path / "test.parquet")

    def answers(name: str) -> list[Any]:
        task = get_task("rows", columns={"answer": name})
        return [row["answer"] for row in task.load("test", path=str(tmp_path / "test.parquet"), streaming=streaming)]

    assert answers("label") == ["no", "yes", None, None]
    assert answers("x") == ["0.1", "16777216", "-0.0000025", "3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_all_three_names_are_read_as_before(write_rows: WriteRows, streaming: bool) -> None:
    rows: list[dict[str, Any]] = [
        {**OWN, "prompt": "other", "label": "other", "solution": "other", "messages": [USER, BLUE]},
        {**OWN, "steps": None, "prompt": "other"},
        {**OWN, "question": " ", "prompt": "other"},
        {**OWN, "answer": None, "label": "other"},
        {**OWN, "answer": "<think>a</think> b"},
        {"question": OWN["question"], "answer": "a", "steps": [" b ", ""]},
        {"question": [USER], "steps": [], "answer": "a"},
    ]
    path = str(write_rows("test.jsonl", rows))
    ours, before = (list(task.load("test", path=path, streaming=streaming)) for task in (get_task("rows"), Plain()))
    assert ours == before
    assert [row["row_error"] is None for row in ours] == [True, True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("row", "role", "listed"),
    [
        ({"question": "a", "problem": "b", "answer": "c"}, "question", "'question' and 'problem'"),
        ({"prompt": "a", "messages": [USER, BLUE]}, "question", "'prompt' and 'messages'"),
        ({"question": "a", "solution": "b", "rationale": "c", "answer": "d"}, "steps", "'solution' and 'rationale'"),
        ({"prompt": "The sky is", "completion": " blue.", "label": True}, "answer", "'completion' and 'label'"),
    ],
)
def test_two_columns_for_one_role_are_an_error(tmp_path: Path, row: Any, role: str, listed: str) -> None:
    first = listed.partition("'")[2].partition("'")[0]
    match = (
        rf"^data\.options\.columns\.{role}: must be given, since the rows have {listed}. Choose one, .*{role}={first}"
    )
    with pytest.raises(ValueError, match=match):
        read(row, folder=tmp_path)
    second = listed.rpartition("'")[0].rpartition("'")[2]
    chosen = second if second == "messages" else first
    (loaded,) = read(row, folder=tmp_path, columns={role: chosen}, split_steps="lines")
    assert loaded["row_error"] is None


def test_empty_columns_are_no_candidates(tmp_path: Path) -> None:
    rows = [{"problem": "p", "prompt": "", "answer": "a", "label": None}] * 2
    assert read(*rows, folder=tmp_path)[1]["question"] == "p"


def test_columns_may_be_filled_later(tmp_path: Path) -> None:
    first = {"instruction": "i", "input": "", "rationale": None, "output": "o"}
    rows = [*[first] * 1001, {**first, "input": "x", "rationale": ["r"]}]
    last = read(*rows, folder=tmp_path)[-1]
    assert (last["question"], last["steps"]) == ("i\nx", ["r"])


def test_the_question_or_the_answer_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns\.question: must be given, since no column .* The rows have: text"):
        read({"text": "The sky is blue."}, folder=tmp_path)
    with pytest.raises(ValueError, match=r"columns\.answer: must be given, .* The rows have: prompt\. .*answer_from"):
        read({"prompt": "The sky is"}, folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"columns\.steps: must be a column of the rows, got 'chain'\. They have: q, a"
    ):
        read({"q": "x", "a": "y"}, folder=tmp_path, columns={"question": "q", "answer": "a", "steps": "chain"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"prompt": "x"}}, "columns: must have keys among question, steps, answer, got 'prompt'"),
        ({"columns": {"answer": ["x", "y"]}}, r"columns\.answer: must be a column, got \['x', 'y'\]"),
        ({"columns": {"question": 3}}, r"columns\.question: must be a column, or a list of columns to join, got 3"),
        ({"split_steps": "line"}, "split_steps: must be one of lines, sentences, equations, numbered or regex:PATTERN"),
        ({"split_steps": "regex:("}, r"split_steps: must be .*got 'regex:\(': missing \)"),
        ({"split_steps": "regex:(a)(b)"}, "split_steps: .* with 2 groups. Keep one"),
        ({"answer_from": "box"}, "answer_from: must be one of boxed, last-number or after:TEXT, got 'box'"),
        ({"answer_from": "after:"}, "answer_from: must be one of"),
        ({"answer_rule": "fuzzy"}, "answer_rule: must be one of 'exact-text', 'last-number-float'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("rows", **options)


def test_parts_of_nested_columns() -> None:
    row = {"input": {"text": "q"}, "trace": [{"say": "a"}, {"say": "b"}], "results": [{"value": 17.0}, {"value": 18.0}]}
    columns = {"question": "input.text", "steps": "trace.say", "answer": "results.-1.value"}
    assert example_of(row, columns=columns) == Example("q", answer="18", steps=("a", "b"))
    with pytest.raises(RowError, match=r"steps\[1\]: must be a text, got None"):
        example_of({**row, "trace": [{"say": "a"}, {}]}, columns=columns)
    with pytest.raises(ValueError, match=r"columns\.answer: must be a column of the rows, got 'results\.2\.value'"):
        example_of(row, columns={**columns, "answer": "results.2.value"})


def test_an_instruction_is_joined_with_its_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Count.", "output": "1"},
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
    ]
    assert [row["question"] for row in read(*rows, folder=tmp_path)] == ["Count.", "Add.\n1 + 1", "Greet."]
    options = {"columns": {"question": ["input", "instruction"]}}
    loaded = read(*rows, folder=tmp_path, **options)
    assert loaded[1]["question"] == "1 + 1\nAdd."
    assert loaded[0]["row_error"].startswith("test.jsonl line 1: input: the row has no such field")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "The sky is", "completion": " blue."}, Example("The sky is", answer=" blue.")),
        ({"prompt": [USER], "completion": [BLUE]}, Example([USER], answer="It is blue.")),
        ({"messages": [USER, BLUE]}, Example([USER], answer="It is blue.")),
        (
            {
                "prompt": "Which number is larger, 9.8 or 9.11?",
                "completions": ["The fractional part of 9.8 is 0.8.", "Hence, 9.8 > 9.11."],
                "labels": [True, True],
            },
            Example(
                "Which number is larger, 9.8 or 9.11?",
                answer="Hence, 9.8 > 9.11.",
                steps=("The fractional part of 9.8 is 0.8.",),
            ),
        ),
    ],
)
def test_reads_the_formats_of_trl(tmp_path: Path, row: dict[str, Any], expected: Example) -> None:
    assert example_of(row) == expected
    (loaded,) = read(row, folder=tmp_path)
    steps = None if expected.steps is None else list(expected.steps)
    assert (loaded["question"], loaded["steps"], loaded["answer"]) == (expected.question, steps, expected.answer)


def test_preference_rows_are_read_by_choice(tmp_path: Path) -> None:
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert example_of(row, columns={"answer": "chosen"}) == Example("The sky is", answer=" blue.")
    implicit = {"chosen": [USER, BLUE], "rejected": [USER, {**BLUE, "content": "It is green."}]}
    chosen = {"question": "chosen", "answer": "chosen"}
    assert example_of(implicit, columns=chosen) == Example([USER], answer="It is blue.")
    for unreadable in (row, implicit):
        with pytest.raises(ValueError, match=r"columns\.(question|answer): must be given, since no column"):
            read(unreadable, folder=tmp_path)


STEPWISE = {  # the published row of its type in TRL's docs/source/dataset_formats.md
    "prompt": "Which number is larger, 9.8 or 9.11?",
    "completions": [
        "The fractional part of 9.8 is 0.8.",
        "The fractional part of 9.11 is 0.11.",
        "0.11 is greater than 0.8.",
        "Hence, 9.11 > 9.8.",
    ],
    "labels": [True, True, False, False],
}


def test_a_chain_with_a_wrong_step_is_a_bad_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (STEPWISE, {**STEPWISE, "labels": [True] * 4})))
    rows = get_task("rows").load("test", path=str(path))
    with pytest.raises(
        BadRowsError, match=r"1 bad row.\n.*line 1: labels\[2\]: is false, so the chain has a wrong step"
    ):
        prepare_rows(rows, build_tokenizer())
    assert len(prepare_rows(rows, build_tokenizer(), on_bad_rows="drop")) == 1
    assert "dropped 1 of 2 rows" in caplog.text
    with pytest.raises(RowError, match=r"labels: must be true or false for each of completions, got \[True\]"):
        example_of({**STEPWISE, "labels": [True]})


def test_the_answer_of_steps_may_be_in_the_last() -> None:
    row = {"prompt": "q", "completions": ["Add: 1+1=2", "Double it.\nThe answer is: 4"], "labels": [True, True]}
    example = example_of(row, answer_from="after:The answer is:")
    assert example == Example("q", answer="4", steps=("Add: 1+1=2", "Double it."))
    example = example_of(row, answer_from="last-number")
    assert example == Example("q", answer="4", steps=("Add: 1+1=2", "Double it.\nThe answer is: 4"))


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "<think>\na\nb\n</think>\n\nIt is blue."},
        {"content": "a\nb</think>It is blue."},
        {"content": "It is blue.", "reasoning_content": "a\nb"},
        {"content": "It is blue.", "thinking": "a\n\nb"},
    ],
)
def test_reasoning_of_the_last_message_becomes_the_steps(turn: dict[str, str]) -> None:
    row = {"messages": [USER, {"role": "assistant", **turn}]}
    assert example_of(row, split_steps="lines") == Example([USER], answer="It is blue.", steps=("a", "b"))
    with pytest.raises(RowError, match=r"steps: are one text; cut it with data\.options\.split_steps"):
        example_of(row)


def test_reasoning_in_two_places_is_an_error() -> None:
    row = {"question": "q", "rationale": "a", "answer": "<think>b</think>c"}
    with pytest.raises(RowError, match=r"steps: must be in one place, but are in rationale and in <think>; choose"):
        example_of(row, split_steps="lines")
    given = {"columns": {"steps": "rationale"}, "split_steps": "lines"}
    assert example_of(row, **given) == Example("q", answer="c", steps=("a",))
    given = {"columns": {"steps": "answer"}, "split_steps": "lines"}
    assert example_of(row, **given) == Example("q", answer="c", steps=("b",))
    with pytest.raises(RowError, match="<think> is never closed"):
        example_of({"question": "q", "answer": "<think>b"})


def test_messages_must_end_with_one_turn_of_the_assistant() -> None:
    for row in (
        {"messages": [USER]},
        {"prompt": [USER], "completion": [USER]},
        {"prompt": [USER], "completion": [BLUE, BLUE]},
    ):
        with pytest.raises(RowError, match="answer: must be one message of the assistant after the question"):
            example_of(row)
    turns = [USER, BLUE, {"role": "user", "content": "Why?"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "Light."}]}
    assert example_of(row) == Example(turns, answer="Light.")


SOLUTION = "Tom has 3*4=12 nuts.\nHe eats 2, so 12-2=10."


@pytest.mark.parametrize(
    ("options", "text", "answer", "steps"),
    [
        ({"answer_from": "after:####", "split_steps": "lines"}, f"{SOLUTION}\n#### 10", "10", SOLUTION.split("\n")),
        ({"answer_from": "last-number", "split_steps": "equations"}, SOLUTION, "10", ["3*4=12", "12-2=10"]),
        ({"answer_from": "last-number"}, SOLUTION, "10", None),
        (
            {"answer_from": "boxed", "split_steps": "sentences"},
            r"We have $x = 5$. So it is $\boxed{5}$. $\boxed{5}$.",
            "5",
            ["We have $x = 5$.", "So it is $5$."],
        ),
        ({"answer_from": "after:Answer:", "split_steps": "regex:; "}, "a; b; Answer: c", "c", ["a", "b;"]),
    ],
)
def test_the_answer_is_found_in_a_text(options: Any, text: str, answer: str, steps: Any) -> None:
    expected = Example("q", answer=answer, steps=None if steps is None else tuple(steps))
    assert example_of({"question": "q", "answer": text}, **options) == expected
    if steps is not None:
        assert example_of({"problem": "q", "solution": text}, **options) == expected
    with pytest.raises(RowError, match=rf"answer: must be in the text \({options['answer_from']}\), got \.\.\.'none'"):
        example_of({"question": "q", "answer": "none"}, **options)


def test_a_regular_expression_must_match_in_most_rows(write_rows: WriteRows) -> None:
    def load(num_bad: int, *, streaming: bool = False) -> Any:
        rows = [{"question": f"{n}?", "rationale": "a" if n < num_bad else "a; b", "answer": "c"} for n in range(20)]
        task = get_task("rows", split_steps="regex:; ")
        return task.load("test", path=str(write_rows("test.jsonl", rows)), streaming=streaming)

    for streaming in (False, True):
        bad = [row for row in load(2, streaming=streaming) if row["row_error"]]
        assert len(bad) == 2  # reported like any bad row
        assert bad[0]["row_error"] == "test.jsonl line 1: split_steps: the regular expression matches nothing in 'a'"
        match = (
            r"split_steps: the regular expression must match in nine of ten rows, got no match in 3 of 20, such as 'a'"
        )
        with pytest.raises(ValueError, match=match):
            load(3, streaming=streaming)


def test_an_answer_that_the_rule_cannot_read_is_a_bad_row() -> None:
    assert example_of({"question": "q", "answer": 1050}, answer_rule="last-number-float").answer == "1050"
    with pytest.raises(RowError, match="answer: cannot be read by answer_rule 'yes-no': gold: must be yes, no"):
        example_of({"question": "q", "answer": "perhaps"}, answer_rule="yes-no")
    with pytest.raises(RowError, match="answer: must be a text, got True"):
        example_of({"question": "q", "answer": True})


def test_the_answer_rule_judges() -> None:
    assert get_task("rows").judge("7.", "7") == {"exact-text": True}
    assert get_task("rows", answer_rule="last-number-float").judge("It is 7.0", "7") == {"last-number-float": True}


CHAT = [{"role": "system", "content": "s"}, USER]


@pytest.mark.parametrize("question", ["2 * 3 + 1?\n <eos>", CHAT])
@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("problem", "rationale", "target"), {}),
        (("prompt", "reasoning", "completion"), {}),
        (("x", "y", "z"), {"columns": {"question": "x", "steps": "y", "answer": "z"}}),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_names_give_the_same_tokens(
    tmp_path: Path, question: Any, names: tuple[str, ...], options: dict[str, Any], suffix: str
) -> None:
    values = [(question, [" 2*3=6\n", "6+1=7 "], f" {n}\t") for n in range(5)]

    def tokens(task: Task, columns: tuple[str, ...]) -> list[Any]:
        path = tmp_path / f"test-{columns[0]}.{suffix}"
        rows = [dict(zip(columns, row, strict=True)) for row in values]
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded = [task.load(split, path=str(path)) for split in ("train", "validation")]
        return [list(prepare_rows(rows, build_tokenizer())) for rows in loaded if len(rows)]

    before = tokens(Plain(), ("question", "steps", "answer"))
    assert tokens(get_task("rows"), ("question", "steps", "answer")) == before
    assert tokens(get_task("rows", **options), names) == before


def test_gsm8k_reads_alike_with_its_own_task_and_by_options(write_rows: WriteRows) -> None:
    row = {"question": "q?", "answer": "He sold 48/2 = <<48/2=24>>24.\nIn all <<48+1000=1048>>1048.\n#### 1,048"}
    path = str(write_rows("test.jsonl", [row]))
    options = {"split_steps": "equations", "answer_from": "after:####"}
    (ours,) = as_rows(get_task("rows", **options).load("test", path=path))
    (own,) = as_rows(get_task("gsm8k").load("test", path=path))
    assert ours == {**own, "answer": "1,048"}  # the rule ignores the comma


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_without_validation_is_carved(write_rows: WriteRows, streaming: bool) -> None:
    path = str(write_rows("mine.jsonl", [{"problem": f"{n}?", "target": n} for n in range(100)]))
    train, validation = (
        get_task("rows").load(split, path=path, streaming=streaming) for split in ("train", "validation")
    )
    assert isinstance(train, IterableDataset) is streaming
    trained, validated = ({row["question"] for row in part} for part in (train, validation))
    assert trained | validated == {f"{n}?" for n in range(100)}
    assert trained
    assert validated
    assert not trained & validated


def test_unreadable_rows_say_why(write_rows: WriteRows) -> None:
    path = write_rows("test.jsonl", [])
    path.write_text("{\n[]\n")
    errors = [row["row_error"] for row in get_task("rows").load("test", path=str(path))]
    assert errors[0].startswith("test.jsonl line 1: not valid JSON")
    assert errors[1].startswith("test.jsonl line 2: must be a JSON object")


@pytest.mark.parametrize("tags", ["<think>\n\n</think>\n\n", "</think>", "<think></think> <think> </think>"])
def test_empty_tags_are_no_chain(tags: str) -> None:
    assert example_of({"question": "q", "output": f"{tags}7"}) == Example("q", answer="7")
    row = {"question": "q", "output": f"{tags}2*3=6\n6+1=7\n#### 7"}
    options: dict[str, Any] = {"split_steps": "lines", "answer_from": "after:####"}
    assert example_of(row, **options) == Example("q", answer="7", steps=("2*3=6", "6+1=7"))
    assert example_of({"question": "q", "rationale": ["a"], "output": f"{tags}7"}) == Example("q", "7", ("a",))
    message = {"role": "assistant", "content": f"{tags}7", "reasoning_content": "\n"}
    assert example_of({"messages": [USER, message]}).answer == "7"


def test_a_list_in_a_cell_is_read_as_json_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("""question,rationale,answer\nq,"[""a, b"", ""c""]",1\nq,"['a', 'b']",2\nq,"['a'\n 'b']",3\n""")
    for options in ({}, {"split_steps": "lines"}):
        first, *others = get_task("rows", **options).load("train", path=str(path), whole=True)
        assert first["steps"] == ["a, b", "c"]
        for row in others:
            assert "steps: a list that is written as a text must be JSON" in row["row_error"]
    row = {"question": "q", "rationale": '["a"] and ["b"] are lists.', "answer": "1"}
    assert example_of(row, split_steps="lines").steps == ('["a"] and ["b"] are lists.',)


def test_steps_in_one_text_name_the_option_whatever_the_columns_are_called() -> None:
    with pytest.raises(RowError, match=r"steps: are one text; cut it with data.options.split_steps"):
        example_of({"question": "q", "steps": "a\nb", "answer": "1"})
    assert example_of({"question": "q", "steps": "", "answer": "1"}) == Example("q", answer="1")
