"""The demo's task: its arithmetic, its splits and its options."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from typing import Any

import pytest

from rim_peft.tasks import get_task
from rim_peft.tasks.potions import MOST_NAMES, NAMES, PRIMES, Potions, World
from rim_peft.tasks.stories import split_of

DEMO = World()


def test_the_order_of_verbs_matters() -> None:
    apply = DEMO.apply_verb
    assert apply("boils", apply("stirs", "red")) != apply("stirs", apply("boils", "red"))


def test_steps_and_answer_follow_from_the_question() -> None:
    for row in Potions(num_rows=50).rows("train"):
        *links, root, _ = row["question"].split(". ")
        colour = root.split()[-1]
        expected = [colour]
        for link in reversed(links):
            expected.append(DEMO.apply_verb(link.split()[1], expected[-1]))
        assert [*row["steps"], row["answer"]] == expected
        assert row["length"] == len(row["steps"]) == len(links)


def test_splits_share_no_question_whatever_the_seeds() -> None:
    questions = {
        split: {
            row["question"] for seed in (0, 1) for row in Potions(num_rows=300, num_held_out=300, seed=seed).rows(split)
        }
        for split in ("train", "validation", "test")
    }
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert not questions["validation"] & questions["test"]
    for split, asked in questions.items():
        assert {split_of(question) for question in asked} == {split}


def test_the_same_options_give_the_same_rows() -> None:
    first, second = (list(Potions(num_rows=20, lengths=(3,)).rows("train")) for _ in range(2))
    assert first == second
    assert {row["length"] for row in first} == {3}
    assert first != list(Potions(num_rows=20, lengths=(3,), seed=1).rows("train"))


def test_weights_choose_how_often_a_length_comes() -> None:
    rows = list(Potions(num_rows=400, lengths=(1, 4), weights=(1.0, 3.0)).rows("train"))
    assert 0.65 < sum(row["length"] == 4 for row in rows) / 400 < 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "lengths: must hold numbers of steps from 1 to 15"),
        ({"lengths": [16]}, "lengths: must hold numbers of steps from 1 to 15"),
        ({"weights": [1.0]}, "weights: must hold a weight for each of the 4 lengths"),
        ({"num_rows": 0}, "num_rows, num_held_out: must be at least 1"),
        ({"steps": "numbers"}, "steps: must be one of 'values', 'sentences'"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("potions", **options)


# The rows of the demo, as they were before there were other worlds.
DEMO_ROWS = {
    "train": "fba59376b25045a8833ed8d6dfe54d2f39298ce31d9c9aaab8369c63badb64f4",
    "validation": "a9713b67f4573f7477d26f13d699ce1b7da2d81f910ddfde9e076c2d85ec86b8",
    "test": "954c53339124e41d8fdaf30f88d83223c86f0f096c72901e2d503a573f99e582",
}


@pytest.mark.parametrize("split", DEMO_ROWS)
def test_the_demos_rows_stay_the_same_to_the_byte(split: str) -> None:
    rows = json.dumps(list(Potions(num_rows=200, num_held_out=50).rows(split)), sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest() == DEMO_ROWS[split]


def follow(row: dict[str, Any], task: Potions) -> list[str]:
    """The colours of a row's chain, worked out from its words by looking for who made whose brew."""
    made = {}
    colours = {}
    for sentence in row["question"].split(". ")[:-1]:
        words = sentence.split()
        if words[1] == "brew":
            colours[words[0].removesuffix("'s")] = words[-1]
        else:
            made[words[0]] = (words[1], words[2].removesuffix("'s"))
    path = [row["question"].split()[-2].removesuffix("'s")]
    while path[-1] in made:
        path.append(made[path[-1]][1])
    values = [colours[path[-1]]]
    for person in reversed(path[:-1]):
        factor, shift = task.world.verbs[made[person][0]]
        number = task.world.colours.index(values[-1])
        values.append(task.world.colours[(factor * number + shift) % task.num_colours])
    return values


HARD = {"num_colours": 11, "num_names": 40, "distractors": 7, "lengths": (1, 9, 32), "num_rows": 60, "num_held_out": 30}


def test_a_hard_worlds_steps_follow_from_the_question_and_its_distractors_do_not_matter() -> None:
    task = get_task("potions", **HARD)
    assert isinstance(task, Potions)
    num_last = 0
    for row in task.rows("train"):
        assert follow(row, task) == [*row["steps"], row["answer"]]
        statements = row["question"].split(". ")[:-1]
        assert len(statements) == row["length"] + 1 + task.distractors
        makers = [statement.split()[0].removesuffix("'s") for statement in statements]
        assert len(set(makers)) == len(makers)  # a brew has one maker
        assert sum("'s brew is " in statement for statement in statements) == 2
        num_last += f"brew is {row['steps'][0]}" not in statements[-1]
    assert 0 < num_last < 60  # the known colour of the chain is not always the last statement


def test_a_hard_worlds_splits_share_no_question() -> None:
    task = get_task("potions", **HARD)
    train, validation, test = (
        {row["question"] for row in task.load(split)} for split in ("train", "validation", "test")
    )
    assert not train & validation
    assert not (train | validation) & test


@pytest.mark.parametrize("num_colours", PRIMES)
def test_every_verb_of_every_world_permutes_its_colours_and_no_two_are_alike(num_colours: int) -> None:
    world = World(num_colours=num_colours)
    maps = {tuple(world.apply_verb(verb, colour) for colour in world.colours) for verb in world.verbs}
    assert len(maps) == len(world.verbs) == 2 * num_colours - 3
    assert all(sorted(images) == sorted(world.colours) for images in maps)
    assert world.colours == World(num_colours=23).colours[:num_colours]


def test_the_demos_words_are_the_first_of_every_world() -> None:
    world = World(num_colours=23, num_names=MOST_NAMES)
    assert world.colours[:5] == DEMO.colours == ("red", "gold", "green", "blue", "plum")
    assert DEMO.verbs.items() <= world.verbs.items()
    assert world.names[:16] == NAMES == DEMO.names
    assert len(world.names) == MOST_NAMES
    assert len({word.lower() for word in world.words}) == len(world.words) == 23 + 43 + MOST_NAMES


def test_answers_of_a_larger_world_have_its_colours() -> None:
    task = get_task("potions", num_colours=7)
    assert task.judge("gold, Teal.", "teal") == {"exact-word": True}
    assert task.read_answer("teal jade") == "teal"  # jade is no colour of this world
    assert get_task("potions").read_answer("gold teal") == "gold"
    assert task.read_answer("Tom") is None


@pytest.mark.parametrize("options", [{}, HARD])
def test_the_answer_follows_from_any_step_and_from_another_colour(options: dict[str, Any]) -> None:
    task = Potions(**options)
    for row in islice(task.rows("train"), 40):
        colours = [*row["steps"], row["answer"]]
        verbs = task.world.read_verbs(row["question"])
        for step, colour in enumerate(colours):
            assert task.answer_from(row["question"], step, colour) == row["answer"]
        other = task.world.colours[(task.world.colours.index(colours[0]) + 1) % task.num_colours]
        expected = other
        for verb in verbs:
            expected = task.world.apply_verb(verb, expected)
        assert task.answer_from(row["question"], 0, other) == expected != row["answer"]


@pytest.mark.parametrize(
    ("question", "step", "colour", "message"),
    [
        ("What is 1 + 1?", 0, "red", "question: must be from this world of 5 colours, got 'What is 1"),
        ("Kim's brew is red. What colour is Tom's brew?", 0, "red", "question: must be from this world"),
        ("Tom heats Kim's brew. Kim's brew is red. What colour is Tom's brew?", 0, "red", "question: must be from"),
        (
            "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?",
            2,
            "red",
            "step: must be from 0 .* 1, got 2",
        ),
        (
            "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?",
            0,
            "teal",
            "colour: must be one of red, ",
        ),
    ],
)
def test_counterfactuals_out_of_range_are_named(question: str, step: int, colour: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Potions().answer_from(question, step, colour)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_colours": 9}, "num_colours: must be one of the primes 2, 3, .* 23, got 9"),
        ({"num_names": 1}, "num_names: must be from 2 to 4000, got 1"),
        ({"distractors": 15}, "distractors: must be from 0 to 14, since each takes one of the 16 names"),
        ({"distractors": -1}, "distractors: must be from 0"),
        ({"distractors": 12}, "lengths: must hold numbers of steps from 1 to 3"),
        ({"num_names": 3}, "lengths: must hold numbers of steps from 1 to 2"),
    ],
)
def test_worlds_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("potions", **options)
