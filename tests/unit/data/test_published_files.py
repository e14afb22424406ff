"""The authors' files, read whole: counts as published, and as counted by other means."""

import json
from collections import Counter

import pytest

from rim_peft.data.examples import BadRowsError, RowError
from rim_peft.data.sources import hold_out, shared_questions
from rim_peft.tasks import get_task
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows
from tests.unit.data.conftest import DATA_DIR


@pytest.mark.parametrize(
    ("task", "folder", "split", "num_rows"),
    [
        ("gsm8k", "gsm8k", "test", 1319),
        ("gsm8k", "gsm8k_aug", "validation", 500),
        ("gsm8k", "gsm8k_aug", "test", 1319),
        ("gsm8k-aug", "gsm8k_aug", "validation", 500),
        ("gsm8k-aug", "gsm8k_aug", "test", 1319),
        ("gsm-hard", "gsm_hard", "test", 1319),
        ("strategyqa", "strategyqa", "test", 229),
        ("logiqa", "logiqa", "validation", 651),
        ("logiqa", "logiqa", "test", 651),
        ("prosqa", "prosqa", "validation", 300),
        ("prosqa", "prosqa", "test", 500),
    ],
)
def test_every_row_can_be_read(task: str, folder: str, split: str, num_rows: int) -> None:
    rows = get_task(task).load(split, path=str(DATA_DIR / folder))
    assert len(rows) == num_rows
    assert set(rows["row_error"]) == {None}
    assert all(all(get_task(task).judge(answer, answer).values()) for answer in rows["answer"])


def test_gsm8k_has_the_equations_that_were_counted() -> None:
    train, validation = (
        get_task("gsm8k").load(split, path=str(DATA_DIR / "gsm8k")) for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (6948, 525)
    assert set(train["question"]).isdisjoint(validation["question"])
    lengths = Counter(len(steps or ()) for rows in (train, validation) for steps in rows["steps"])
    assert lengths == {0: 95, 1: 404, 2: 2175, 3: 2137, 4: 1424, 5: 785, 6: 287, 7: 123, 8: 40, 9: 3}


def test_gsm8k_has_sentences_for_every_row() -> None:
    rows = get_task("gsm8k", steps="sentences").load("train", path=str(DATA_DIR / "gsm8k"))
    assert all(rows["steps"])
    assert not any("<<" in step or ">>" in step for steps in rows["steps"] for step in steps)


def test_the_two_forms_of_the_test_set_have_the_same_answers() -> None:
    official, augmented = (get_task("gsm8k").load("test", path=str(DATA_DIR / name)) for name in ("gsm8k", "gsm8k_aug"))
    assert official["answer"][:] == augmented["answer"][:]
    last = [(steps or ["="])[-1].rsplit("=")[-1] for steps in augmented["steps"]]
    assert sum(result == answer for result, answer in zip(last, augmented["answer"], strict=True)) == 1173
    lengths = Counter(len(steps or ()) for steps in augmented["steps"])
    assert lengths == {0: 18, 1: 65, 2: 357, 3: 364, 4: 290, 5: 138, 6: 57, 7: 21, 8: 9}


def test_prosqa_has_the_steps_that_were_counted() -> None:
    rows = get_task("prosqa").load("test", path=str(DATA_DIR / "prosqa"))
    assert Counter(len(steps) for steps in rows["steps"]) == {3: 202, 4: 217, 5: 69, 6: 12}


def test_prosqa_trains_on_a_part_of_its_validation_file() -> None:
    rows = get_task("prosqa").load("validation", path=str(DATA_DIR / "prosqa"))
    train, held_out = hold_out(rows, 50)
    assert (len(train), len(held_out)) == (250, 50)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_equations_are_bad_in_stage_1_alone(streaming: bool) -> None:
    rows = get_task("gsm8k").load("train", path=str(DATA_DIR / "gsm8k"), streaming=streaming)
    with pytest.raises(BadRowsError, match="row 28: steps: there are none"):
        list(prepare_rows(rows, build_tokenizer(), needs_steps=True, num_blocks=0, block_length=4))


def test_rows_without_equations_can_be_dropped_or_kept() -> None:
    rows = get_task("gsm8k").load("train", path=str(DATA_DIR / "gsm8k"))
    grounding = prepare_rows(
        rows, build_tokenizer(), needs_steps=True, num_blocks=0, block_length=4, on_bad_rows="drop"
    )
    refinement = prepare_rows(rows, build_tokenizer(), needs_steps=False, num_blocks=8, block_length=4)
    assert (len(grounding), len(refinement)) == (6858, 6948)


def test_gsm_hard_has_the_answers_that_were_counted() -> None:
    answers = get_task("gsm-hard").load("test", path=str(DATA_DIR / "gsm_hard"))["answer"][:]
    assert sum("." in answer for answer in answers) == 303
    assert sum(answer.startswith("-") for answer in answers) == 146
    assert not any("e" in answer for answer in answers)
    assert sum(get_task("gsm-hard").judge("0", answer)["abs-1e-3"] for answer in answers) == 31 + 4  # 4 are 0


@pytest.mark.parametrize("steps", ["facts", "decomposition"])
def test_strategyqa_trains_on_all_rows_but_those_for_selection(steps: str) -> None:
    task = get_task("strategyqa", steps=steps)
    splits = {name: task.load(name, path=str(DATA_DIR / "strategyqa")) for name in ("train", "validation", "test")}
    train, validation, test = splits.values()
    assert (len(train), len(validation), len(test)) == (1911, 150, 229)
    answers = [*train["answer"], *validation["answer"]]
    assert (answers.count("yes"), test["answer"][:].count("yes")) == (964, 107)
    assert all(row for rows in splits.values() for row in rows["steps"])
    assert {error for rows in splits.values() for error in rows["row_error"]} == {None}


def test_logiqa_has_no_steps_and_takes_the_letters_that_options_carry() -> None:
    rows = get_task("logiqa").load("test", path=str(DATA_DIR / "logiqa"))
    assert set(map(str, rows["steps"])) == {"None"}
    assert Counter(rows["answer"]).keys() == set("ABCD")
    lines = (DATA_DIR / "logiqa" / "Test.txt").read_text(encoding="utf-8").split("\n")
    swapped = [
        at for at in range(0, 8 * 651, 8) if [line[:2] for line in lines[at + 4 : at + 8]] == ["A.", "C.", "B.", "D."]
    ]
    assert len(swapped) == 19
    # All people of Harbin are northerners, some are no workers: what must be true shows that the letters count.
    assert swapped[1] == 8 * 114
    assert rows["question"][114].split("\n")[-4:] == [
        "A. Some northerners are workers.",
        "B. Some northerners are not workers.",
        "C. Some workers are Northerners.",
        "D. Some workers are not Northerners.",
    ]
    assert rows["answer"][114] == "B"


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("gsm8k", "gsm8k"),
        ("gsm8k-aug", "gsm8k_aug"),
        ("strategyqa", "strategyqa"),
        ("logiqa", "logiqa"),
        ("prosqa", "prosqa"),
    ],
)
def test_selection_never_sees_the_test(task: str, folder: str) -> None:
    reader = get_task(task)
    selection, test = (reader.load(split, path=str(DATA_DIR / folder)) for split in (reader.selection_split, "test"))
    assert shared_questions(selection, test) == []
    if folder in ("gsm8k", "strategyqa"):
        train = reader.load("train", path=str(DATA_DIR / folder))
        assert shared_questions(train, selection) == shared_questions(train, test) == []


def test_the_validation_file_of_gsm8k_aug_is_part_of_the_official_training_file() -> None:
    selection = get_task("gsm8k-aug").load("validation", path=str(DATA_DIR / "gsm8k_aug"))
    parts = [get_task("gsm8k").load(split, path=str(DATA_DIR / "gsm8k")) for split in ("train", "validation")]
    assert sum(len(shared_questions(selection, part)) for part in parts) == 500


def test_gsm8k_reads_alike_as_rows_of_ones_own() -> None:
    own = get_task("gsm8k")
    ours = get_task("rows", split_steps="equations", answer_from="after:####", answer_rule="last-number-float")
    counts: Counter[str] = Counter()
    for line in (DATA_DIR / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before = own.read_row(row)
        try:
            example = ours.read_row(row)
        except RowError:  # an equation that is neither marked nor one between numbers
            counts["bad"] += before.steps is None
            continue
        counts["unmarked" if before.steps is None and example.steps else "same"] += (
            example.question == before.question
            and example.answer.replace(",", "") == before.answer
            and (example.steps == before.steps or before.steps is None)
        )
    assert counts == {"same": 7380, "bad": 72, "unmarked": 21}
