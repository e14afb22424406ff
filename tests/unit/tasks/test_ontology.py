"""ProsQA's task, generated: what follows from the statements, and what must not give the answer away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from rim_peft.tasks import get_task
from rim_peft.tasks.ontology import KINDS, NAMES, Ontology, World
from rim_peft.tasks.stories import SPLITS, split_of
from tests.unit.data.conftest import DATA_DIR

Edges = list[tuple[str, str]]
HARD = {"num_kinds": 38, "num_statements": 80, "num_people": 6, "lengths": (1, 7, 19), "weights": None}


def read(row: dict[str, Any]) -> tuple[Edges, str, str, str]:
    """A question's statements, the person asked about, the right kind and the wrong one, from the words alone."""
    *lines, question = re.split(r"(?<=\.) ", row["question"])
    edges = []
    for line in lines:
        match = re.fullmatch(r"(?:([A-Z]\w+)|Every ([a-z]+)) is a ([a-z]+)\.", line)
        assert match is not None, line
        edges.append((match[1] or match[2], match[3]))
    match = re.fullmatch(r"Is (\w+) a (\w+) or (\w+)\?", question)
    assert match is not None, question
    person, *choices = match.groups()
    right = row["answer"].removeprefix(f"{person} is a ").removesuffix(".")
    (wrong,) = set(choices) - {right}
    return edges, person, right, wrong


def walk(edges: Edges, start: str) -> dict[str, int]:
    """The fewest statements from a start to all that follows from it, by a breadth-first search."""
    distances = {start: 0}
    queue = [start]
    for one in queue:
        for subject, kind in edges:
            if subject == one and kind not in distances:
                distances[kind] = distances[one] + 1
                queue.append(kind)
    return distances


@pytest.mark.parametrize("options", [{}, HARD], ids=["as published", "hard"])
def test_the_right_kind_follows_by_a_shortest_way_and_the_wrong_one_only_from_another_person(
    options: dict[str, Any],
) -> None:
    for row in get_task("ontology", **options, num_rows=100).load("train"):
        edges, person, right, wrong = read(row)
        assert len(set(edges)) == len(edges) <= options.get("num_statements", 36)
        assert len({kind for _, kind in edges}) == options.get("num_kinds", 20)
        distances = walk(edges, person)
        assert distances[right] == row["length"] == len(row["steps"])
        assert wrong not in distances
        others = [walk(edges, other) for other in {one for one, _ in edges if one in NAMES} - {person}]
        assert any(distances.get(wrong) == row["length"] for distances in others)
        # The steps are statements of the question, each about what the one before it said.
        path = [person]
        for step in row["steps"]:
            assert step in row["question"]
            assert step.startswith(f"{path[-1]} is a " if path == [person] else f"Every {path[-1]} is a ")
            path.append(step.split()[-1].removesuffix("."))
        assert path[-1] == right


def backwards(edges: Edges, kind: str) -> int:
    return len(walk([(kind, subject) for subject, kind in edges], kind))


def measure_cues(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How often the right kind has more of something than the wrong one; a tie is half a time."""
    ahead: Counter[str] = Counter()
    num_rows = 0
    for row in rows:
        num_rows += 1
        edges, person, right, wrong = read(row)
        places = defaultdict(list)
        for place, edge in enumerate(edges):
            for one in edge:
                places[one].append(place)
        cues: dict[str, Callable[[str], Any]] = {
            "offered first": lambda kind, row=row: -row["question"].rindex(kind),
            "statements that something is of it": lambda kind, edges=edges: sum(other == kind for _, other in edges),
            "statements about it": lambda kind, edges=edges: sum(subject == kind for subject, _ in edges),
            "first mentioned later": lambda kind, places=places: places[kind][0],
            "last mentioned later": lambda kind, places=places: places[kind][-1],
            "mentioned near the person": lambda kind, places=places, person=person: (
                -min(abs(a - b) for a in places[person] for b in places[kind])
            ),
            "reached backwards": lambda kind, edges=edges: backwards(edges, kind),
            "later in the alphabet": lambda kind: kind,
        }
        for name, cue in cues.items():
            ahead[name] += (cue(right) > cue(wrong)) - (cue(right) < cue(wrong))
    return {name: 0.5 + difference / 2 / num_rows for name, difference in ahead.items()}


def test_nothing_that_is_counted_at_the_two_kinds_gives_the_answer_away() -> None:
    cues = measure_cues(Ontology(num_rows=1500).rows("train"))
    # 3.5 standard errors of 1,500 fair coins.
    assert all(abs(accuracy - 0.5) < 0.045 for accuracy in cues.values()), cues


@pytest.mark.skipif(
    not DATA_DIR.is_dir(), reason="the repository holds no data set, and the authors' files are not beside it"
)
def test_the_published_rows_are_given_away_as_the_docs_say() -> None:
    rows = [
        row for split in ("validation", "test") for row in get_task("prosqa").load(split, path=f"{DATA_DIR}/prosqa")
    ]
    cues = {name: round(accuracy, 2) for name, accuracy in measure_cues(rows).items()}
    assert cues == {
        "reached backwards": 0.71,
        "statements that something is of it": 0.34,
        "first mentioned later": 0.59,
        "last mentioned later": 0.45,
        "mentioned near the person": 0.42,
        "offered first": 0.51,
        "statements about it": 0.5,
        "later in the alphabet": 0.47,
    }
    facts = [read(row) for row in rows]
    assert round(sum(len(edges) for edges, *_ in facts) / len(rows), 1) == 36.0
    assert Counter(len(row["steps"]) for row in rows) == {3: 326, 4: 350, 5: 105, 6: 19}


def test_the_question_has_the_published_form_and_words() -> None:
    row = next(Ontology(lengths=(2,), weights=None, num_kinds=4, num_statements=5).rows("train"))
    assert row["question"].endswith("?")
    assert (len(KINDS), len(NAMES)) == (38, 17)
    task = get_task("ontology")
    assert task.judge(f" {row['answer']}\n", row["answer"]) == {"exact-text": True}
    assert not task.is_correct(row["steps"][0], row["answer"])


def test_splits_share_no_question_whatever_the_seeds() -> None:
    asked = {
        split: {
            row["question"]
            for seed in (0, 1)
            for row in Ontology(num_rows=200, num_held_out=100, seed=seed).rows(split)
        }
        for split in SPLITS
    }
    for split, questions in asked.items():
        assert {split_of(question) for question in questions} == {split}
    assert len(set().union(*asked.values())) == 800
    assert list(Ontology(num_rows=9).rows("train")) == list(Ontology(num_rows=9).rows("train"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kinds": 10}, "lengths: must hold numbers of steps from 1 to 5"),
        ({"lengths": [3]}, "weights: must hold a weight for each of the 1 lengths"),
        ({"num_kinds": 39}, "num_kinds: must be from 2 to 38, got 39"),
        ({"num_statements": 19}, "num_statements: must be at least num_kinds"),
        ({"num_people": 1}, "num_people: must be from 2 to 17, got 1"),
        ({"num_rows": 0}, "num_rows, num_held_out: must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("ontology", **options)


def test_a_question_without_room_for_its_statements_has_fewer() -> None:
    row = next(Ontology(lengths=(2,), weights=None, num_kinds=4, num_statements=50).rows("train"))
    assert 4 <= len(read(row)[0]) < 20
    assert World(num_kinds=5).longest == 2
