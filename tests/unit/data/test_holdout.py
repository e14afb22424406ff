import pytest
from datasets import Dataset

from rim_peft.data.sources import hold_out, question_hash, shared_questions

QUESTIONS = [f"What is {number} + 1?" for number in range(300)]
DATASET = Dataset.from_dict({"question": QUESTIONS, "answer": [str(n) for n in range(300)]})


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (40, 40), (0.1, 30), (299, 299)])
def test_parts_are_disjoint_and_complete(size: float, expected: int) -> None:
    train, held_out = hold_out(DATASET, size)
    assert len(held_out) == expected
    assert sorted([*train["answer"], *held_out["answer"]]) == sorted(DATASET["answer"])


def test_the_choice_depends_on_the_texts_alone() -> None:
    _, held_out = hold_out(DATASET, 40)
    _, again = hold_out(DATASET.shuffle(seed=3), 40)
    assert set(held_out["question"]) == set(again["question"])


def test_the_first_held_out_questions_are_known() -> None:
    _, held_out = hold_out(DATASET, 3)
    assert held_out["question"][:] == ["What is 60 + 1?", "What is 217 + 1?", "What is 278 + 1?"]


def test_equal_questions_stay_together() -> None:
    twice = Dataset.from_dict({"question": [*QUESTIONS, *QUESTIONS]})
    train, held_out = hold_out(twice, 40)
    assert len(held_out) == 80
    assert not set(train["question"]) & set(held_out["question"])


def test_rows_that_could_not_be_read_stay_in_training() -> None:
    train, held_out = hold_out(Dataset.from_dict({"question": [None, "a", "b"]}), 1)
    assert None in train["question"]
    assert len(held_out) == 1


def test_chats_are_held_out_too() -> None:
    chats = Dataset.from_dict({"question": [[{"role": "user", "content": text}] for text in "abc"]})
    train, held_out = hold_out(chats, 1)
    assert (len(train), len(held_out)) == (2, 1)


@pytest.mark.parametrize("size", [0, 300, -1, 0.0, 1.0, 0.0001])
def test_refuses_to_leave_a_part_empty(size: float) -> None:
    with pytest.raises(ValueError, match="size: must hold out at least one of 300 questions and leave at least one"):
        hold_out(DATASET, size)


def test_refuses_a_stream() -> None:
    with pytest.raises(ValueError, match=r"dataset: must be a Dataset.*got IterableDataset. Load it without streaming"):
        hold_out(DATASET.to_iterable_dataset(), 3)


def test_two_salts_choose_independently() -> None:
    first = {question for question in QUESTIONS if question_hash(question, salt="a") < 0.5}
    second = {question for question in QUESTIONS if question_hash(question, salt="b") < 0.5}
    assert 50 < len(first & second) < 100  # 75 expected


def test_white_space_around_a_question_does_not_matter() -> None:
    assert question_hash(" 1 + 1?\n", salt="x") == question_hash("1 + 1?", salt="x")


def test_shared_questions_are_found_whatever_their_ends() -> None:
    train, held_out = hold_out(DATASET, 40)
    assert shared_questions(train, held_out) == []
    spaced = Dataset.from_dict({"question": [f" {QUESTIONS[7]}\n", None, "new"]})
    assert shared_questions(DATASET, spaced) == [QUESTIONS[7]]
    assert shared_questions(spaced, DATASET) == [f" {QUESTIONS[7]}\n"]
