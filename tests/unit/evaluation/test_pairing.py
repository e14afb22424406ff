"""Who gets whose blocks."""

from __future__ import annotations

from typing import Literal

import pytest

from rim_peft.data.examples import Example, read_example
from rim_peft.evaluation.controls import ChainCounterfactual, ChainTask, shuffle_ids
from rim_peft.evaluation.pairs import pair_examples, plan_swaps
from rim_peft.tasks import Task
from rim_peft.tasks.potions import Potions


class Plain(Task):
    """Answers as texts."""

    name = "plain"


def _example(question: str, *colours: str) -> Example:
    """A chain of colours, of which the last is the answer."""
    return Example(question, answer=colours[-1], steps=colours[:-1])


def test_partners_have_equal_lengths_and_the_others_are_left_out() -> None:
    examples = [Example(name, answer=answer) for name, answer in zip("abcde", "12121", strict=True)]
    lengths = [3, 3, 4, 4, 5]
    pairs = pair_examples(examples, lengths, lambda _, donor: donor.answer, seed=0)
    assert [(pair.example.question, pair.donor.question, pair.implied) for pair in pairs] == [
        ("a", "b", "2"),
        ("b", "a", "1"),
        ("c", "d", "2"),
        ("d", "c", "1"),
    ]


def test_nobody_is_paired_with_itself_and_donors_are_many() -> None:
    examples = [Example(f"q{index}", answer=str(index)) for index in range(20)]
    for seed in range(5):
        pairs = pair_examples(examples, [7] * 20, lambda _, donor: donor.answer, seed=seed)
        assert [pair.example for pair in pairs] == examples
        assert all(pair.donor != pair.example for pair in pairs)
        assert len({pair.implied for pair in pairs}) == 20


def test_the_pairs_depend_on_the_seed_alone() -> None:
    examples = [Example(f"q{index}", answer=str(index)) for index in range(20)]

    def pairs(seed: int) -> list[str]:
        return [pair.implied for pair in pair_examples(examples, [7] * 20, lambda _, b: b.answer, seed=seed)]

    assert pairs(1) == pairs(1) != pairs(2)


def test_a_swap_of_first_blocks_needs_equal_chains_that_differ_there() -> None:
    examples = [
        _example("a", "red", "gold", "blue", "plum"),
        _example("b", "red", "green", "blue", "red"),  # differs from a after 1 operation, not after 2
        _example("c", "red", "gold", "red"),  # shorter than both
        _example("d", "gold", "plum", "red", "plum"),  # answers as a does
    ]
    asked = []

    def counterfactual(example: Example, donor: Example, count: int) -> str | None:
        asked.append((example.question, donor.question, count))
        return None if (example.question, donor.question) == ("d", "b") else f"{donor.question}{count}"

    swaps = plan_swaps(examples, [9] * 4, Plain(), num_blocks=4, seed=0, counterfactual=counterfactual)
    assert list(swaps) == [None, 1, 2, 3]
    assert [pair.example.question for pair in swaps[None]] == ["a", "b", "c", "d"]
    assert all(pair.implied == pair.donor.answer != pair.example.answer for pair in swaps[None])
    assert {(pair.example.question, pair.donor.question) for pair in swaps[1]} <= {("a", "b"), ("b", "a"), ("b", "d")}
    assert [pair.example.question for pair in swaps[1]] == ["a", "b"]
    assert [(pair.example.question, pair.donor.question, pair.implied) for pair in swaps[2]] == [("b", "d", "d2")]
    assert swaps[3] == []
    assert ("d", "b", 1) in asked
    assert not any("c" in pair[:2] for pair in asked)


@pytest.mark.parametrize("colours", [("blue", "plum"), ("Dan blue", "Moe plum")])
def test_a_chains_answer_from_what_another_held(colours: tuple[str, str]) -> None:
    # A stir adds 1 and a shake 4 to a colour's number: red 0, gold 1, green 2, blue 3, plum 4.
    question = "Finn shakes Moe's brew. Moe stirs Dan's brew. Dan's brew is red. What colour is Finn's brew?"
    example = Example(question, "red", ("red", "gold"))
    counterfactual = ChainCounterfactual(Potions())
    # Block 1 of the donor holds its colour after one operation, plum; shaken, that is blue.
    assert counterfactual(example, Example("b", "gold", colours), 1) == "blue"
    assert counterfactual(example, Example("b", "blue", colours), 1) is None  # the donor's own answer
    assert counterfactual(example, Example("b", "gold", colours), 2) is None  # the donor's chain is over
    assert counterfactual(example, Example("b", "gold", ("x", "no colour")), 1) is None
    chat = Example([{"role": "user", "content": question}], "red", ("red", "gold"))
    assert counterfactual(chat, Example("b", "gold", colours), 1) is None


@pytest.mark.parametrize("steps", ["values", "sentences"])
@pytest.mark.parametrize("ahead", [1, 0])
def test_pairs_of_chains_tell_following_from_copying_and_from_staying(
    steps: Literal["values", "sentences"], ahead: int
) -> None:
    task = Potions(steps=steps, num_held_out=120)
    assert isinstance(task, ChainTask)
    assert not isinstance(Plain(), ChainTask)
    examples = [read_example(row) for row in task.rows("test")]
    lengths = [len(str(example.question).split()) for example in examples]
    swaps = plan_swaps(
        examples,
        lengths,
        task,
        num_blocks=4,
        seed=0,
        counterfactual=ChainCounterfactual(task),
        steps_ahead=ahead,
    )
    for num_swapped in (1, 2, 3):
        count = num_swapped - 1 + ahead  # operations that are done in the last block swapped
        longer = [example for example in examples if len(example.steps or ()) > count]
        assert 0.8 * len(longer) < len(swaps[num_swapped]) <= len(longer)
        for pair in swaps[num_swapped]:
            assert len({pair.example.answer, pair.donor.answer, pair.implied}) == 3
            colour = task.read_answer((pair.donor.steps or ())[count])
            *links, _root, _ = str(pair.example.question).split(". ")
            for link in list(reversed(links))[count:]:
                colour = task.world.apply_verb(link.split()[1], str(colour))
            assert colour == pair.implied


def test_chains_that_are_too_short_are_not_compared_with_all_others() -> None:
    class Counting(Plain):
        num_verdicts = 0

        def is_correct(self, text: str, gold: str) -> bool:
            Counting.num_verdicts += 1
            return super().is_correct(text, gold)

    examples = [_example(f"q{index}", "red", str(index)) for index in range(40)]  # one step each
    swaps = plan_swaps(examples, [9] * 40, Counting(), num_blocks=8, seed=0, counterfactual=lambda a, b, t: "x")
    assert {count: len(pairs) for count, pairs in swaps.items()} == {None: 40, **dict.fromkeys(range(1, 8), 0)}
    assert Counting.num_verdicts == 40  # those of the swap of all blocks


def test_a_pair_whose_answer_would_stay_the_same_says_nothing() -> None:
    examples = [_example("a", "red", "gold", "blue"), _example("b", "red", "green", "red")]
    swaps = plan_swaps(examples, [9, 9], Plain(), num_blocks=2, seed=0, counterfactual=lambda a, b, t: "blue")
    assert [(pair.example.question, pair.implied) for pair in swaps[1]] == [("b", "blue")]


def test_without_a_counterfactual_all_blocks_alone_are_swapped() -> None:
    examples = [_example("a", "red", "gold"), _example("b", "red", "green")]
    assert list(plan_swaps(examples, [9, 9], Plain(), num_blocks=3, seed=0, counterfactual=None)) == [None]


def test_a_shuffle_keeps_the_tokens_and_the_last_place() -> None:
    for seed in range(30):
        shuffled = shuffle_ids([90, 91, 92], seed=seed)
        assert shuffled == [91, 90, 92]  # never the old order
    ids = [90, 91, 91, 92] * 8
    shuffled = shuffle_ids(ids, seed=0)
    assert sorted(shuffled) == sorted(ids)
    assert shuffled[-1] == 92
    assert shuffled != ids
    assert shuffled == shuffle_ids(ids, seed=0) != shuffle_ids(ids, seed=1)
