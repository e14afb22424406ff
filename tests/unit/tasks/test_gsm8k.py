from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import Example, RowError
from rim_peft.tasks import get_task
from tests.unit.data.conftest import WriteRows

SOLUTION = "He sold 48/2 = <<48/2=24>>24 clips.\nThat is easy.\nHe sold 48+1000=$<<48+1000=1048>>1048 in all.\n"
OFFICIAL = {"question": "How many?", "answer": f"{SOLUTION}#### 1,048"}
EQUATIONS = ("48/2=24", "48+1000=1048")
EXPECTED = Example("How many?", answer="1048", steps=EQUATIONS)


@pytest.mark.parametrize(
    "row",
    [
        OFFICIAL,
        {"text": "How many?||<<48/2=24>> <<48+1000=1048>> #### 1,048"},
        {"question": "How many?", "steps": ["<<48/2=24>>", "<<48+1000=1048>>"], "answer": "1048"},
        {"question": "How many?", "cot": "<<48/2=24>> <<48+1000=1048>>", "answer": "1048"},
        {"question": "How many?", "cot": "<<48/2=24>> <<48+1000=1048>>", "answer": "#### 1048"},
        {"question": "How many?", "steps": list(EQUATIONS), "answer": "1,048"},
        {"question": "How many?", "steps": SOLUTION.strip().split("\n"), "answer": "1048"},
    ],
)
def test_every_form_gives_the_same_example(row: dict[str, Any]) -> None:
    assert get_task("gsm8k").read_row(row) == EXPECTED


def test_sentences_are_the_solutions_lines_without_equation_marks() -> None:
    steps = ("He sold 48/2 = 24 clips.", "That is easy.", "He sold 48+1000=$1048 in all.")
    assert get_task("gsm8k", steps="sentences").read_row(OFFICIAL).steps == steps


@pytest.mark.parametrize("steps", ["equations", "sentences"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "18"},
        {"question": "q", "steps": None, "answer": "18"},
        {"question": "q", "steps": [], "answer": "18"},
        {"question": "q", "cot": "", "answer": "18"},
        {"text": "q|| #### 18"},
    ],
)
def test_steps_may_be_absent(row: dict[str, Any], steps: str) -> None:
    assert get_task("gsm8k", steps=steps).read_row(row) == Example("q", answer="18")


def test_a_line_that_is_an_equation_counts_only_where_steps_are_listed() -> None:
    row: dict[str, Any] = {"question": "q", "answer": "He has <<9*2=18>>18.\n9+9=18\n#### 18"}
    assert get_task("gsm8k").read_row(row).steps == ("9*2=18",)
    row = {"question": "q", "steps": ["He has <<9*2=18>>18.", "9+9=18"], "answer": "18"}
    assert get_task("gsm8k").read_row(row).steps == ("9*2=18", "9+9=18")


@pytest.mark.parametrize("step", ["48/2=24 clips", "2×3=6"])
def test_a_step_that_is_nearly_an_equation_is_not_left_out_silently(step: str) -> None:
    row = {"question": "q", "steps": ["24*2=48", step], "answer": "48"}
    with pytest.raises(RowError, match=r"steps\[1\]: must be an equation of only numbers or mark it"):
        get_task("gsm8k").read_row(row)
    assert get_task("gsm8k", steps="sentences").read_row({**row, "steps": ["Twice 24.", step]}).steps == (
        "Twice 24.",
        step,
    )


def test_a_solution_without_equations_has_no_steps() -> None:
    row = {"question": "q", "answer": "He has eighteen.\n#### 18"}
    assert get_task("gsm8k").read_row(row).steps is None
    assert get_task("gsm8k", steps="sentences").read_row(row).steps == ("He has eighteen.",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "answer: the row has no such field; its fields: question"),
        ({"answer": "#### 1"}, "question: the row has no such field; its fields: answer"),
        ({"question": "q", "answer": 18}, "answer: must be a text, got 18"),
        ({"question": "q", "answer": None}, "answer: must be a text, got None"),
        (
            {"question": "q", "answer": "He has 18."},
            "answer: must be a number or hold '####' and a number, got 'He has 18.'",
        ),
        ({"question": "q", "answer": "He has 18. ####"}, "answer: what follows '####' must be a number, got ''"),
        ({"question": "q", "answer": "#### many"}, "answer: what follows '####' must be a number, got 'many'"),
        ({"question": "q", "answer": "#### inf"}, "answer: what follows '####' must be a number, got 'inf'"),
        ({"question": " ", "answer": "#### 1"}, "question: is empty"),
        ({"question": "q", "answer": "<<>> #### 1"}, r"steps\[0\]: is empty"),
        ({"question": "q", "steps": [1], "answer": "1"}, r"steps: must be a text or a list of texts, got \[1\]"),
        ({"text": "a line of something else"}, "must read 'question||<<..>> #### answer', got 'a line"),
        ({"text": "q||<<1+1=2>> 2"}, "must read 'question||<<..>> #### answer'"),
    ],
)
def test_names_what_is_wrong_with_a_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message.replace("||", r"\|\|")):
        get_task("gsm8k").read_row(row)


def test_equations_alone_are_no_sentences() -> None:
    with pytest.raises(RowError, match="only equations, no sentences; use the option steps='equations'"):
        get_task("gsm8k", steps="sentences").read_row({"text": "q||<<1+1=2>> #### 2"})


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-aug"])
@pytest.mark.parametrize(
    ("text", "number", "string"),
    [
        ("18", True, True),
        ("18.", True, False),
        ("18.0", True, False),
        ("1,8", True, True),
        ("12+6 #### 18", True, True),
        ("#### 18 #### 20", False, False),
        ("#### 20 #### 18", True, False),
        ("10-18", False, False),
        ("$18", True, False),
        ("", False, False),
    ],
)
def test_both_rules_judge_side_by_side(name: str, text: str, number: bool, string: bool) -> None:
    verdicts = {"last-number-float": number, "strict-string": string}
    for rule in verdicts:
        task = get_task(name, answer_rule=rule)
        assert list(task.judge(text, "18").items()) == list(verdicts.items())
        assert task.is_correct(text, "18") is verdicts[rule]


def test_the_answer_is_read_under_the_rule_that_decides() -> None:
    assert get_task("gsm8k").read_answer("12+6 #### 18.0") == "18"
    assert get_task("gsm8k", answer_rule="strict-string").read_answer("12+6 #### 18.0") == "18.0"


@pytest.mark.parametrize("gold", ["many", "", "inf", "nan", "#### none"])
@pytest.mark.parametrize("rule", ["last-number-float", "strict-string"])
def test_a_gold_answer_that_is_no_number_is_an_error_not_a_match(gold: str, rule: str) -> None:
    with pytest.raises(ValueError, match="gold: must be a number or end in '#### number', got"):
        get_task("gsm8k", answer_rule=rule).is_correct("no number", gold)


def test_loads_official_rows_and_carves_validation_out(write_rows: WriteRows) -> None:
    rows = [{"question": f"{n}?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(90)]
    path = str(write_rows("train.jsonl", rows).parent)
    train, validation = (get_task("gsm8k").load(split, path=path) for split in ("train", "validation"))
    assert len(train) + len(validation) == 90
    assert set(train["question"]).isdisjoint(validation["question"])
    assert train[0] == {"question": "0?", "steps": ["0+1=1"], "answer": "1", "row_error": None}


def test_loads_the_lines_of_gsm8k_aug(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("How many?||<<48/2=24>> #### 24\nbroken\n")
    good, bad = get_task("gsm8k").load("validation", path=str(tmp_path))
    assert good == {"question": "How many?", "steps": ["48/2=24"], "answer": "24", "row_error": None}
    assert bad["row_error"] == "valid.txt line 2: must read 'question||<<..>> #### answer', got 'broken'"


@pytest.mark.parametrize(("name", "source"), [("gsm8k", "openai/gsm8k:main"), ("gsm8k-aug", "whynlp/gsm8k-aug")])
def test_either_task_has_its_source(monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    paths: list[str] = []

    def open_nothing(path: str, **_: Any) -> dict[str, Any]:
        paths.append(path)
        return {}

    monkeypatch.setattr("rim_peft.tasks.task.find_splits", open_nothing)
    with pytest.raises(FileNotFoundError, match=f"{source} has no split 'test'"):
        get_task(name).load("test")
    assert paths == [source]


def test_solutions_in_words_are_kept_as_they_are() -> None:
    # The columns that public training code reads, such as that of KaVa (arXiv 2510.02312).
    row = {"question": "How much?", "steps": ["He buys 2*3=6 eggs.", "6+6=12"], "answer": "1,012"}
    expected = Example("How much?", answer="1012", steps=("He buys 2*3=6 eggs.", "6+6=12"))
    assert get_task("gsm8k-aug-nl").read_row(row) == expected
    assert get_task("gsm8k-aug-nl").read_row({**row, "steps": []}).steps is None
    with pytest.raises(RowError, match="answer: must be a number, got 'twelve'"):
        get_task("gsm8k-aug-nl").read_row({**row, "answer": "twelve"})
