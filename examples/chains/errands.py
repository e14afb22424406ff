"""Write questions for `rim-peft chains`, and, once it has chains, the task's own steps for the same questions.

    python -m examples.chains.errands outputs/errands                                     questions.jsonl, test.jsonl
    python -m examples.chains.errands outputs/errands --chains outputs/errands/chains     gold.jsonl

The questions are short word problems that a small base solves in part; docs/results/chains.md has what came of them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rim_peft.tasks.stories import StoryTask

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Kim", "Liv", "Moe", "Pam", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "plums", "shells", "stamps", "stickers")
MORE = ("buys {n} more {things}", "finds {n} more {things}", "gets {n} more {things} from a friend")
FEWER = ("gives {n} {things} away", "loses {n} {things}", "sells {n} {things}")
LARGEST = 10


@dataclass(frozen=True)
class Errands(StoryTask):
    """Somebody has some things, and gets and loses some; ``lengths`` are numbers of changes.

    >>> row = Errands(lengths=(2,)).row(0)
    >>> row["question"]
    'Kim has 8 pens. Kim gives 4 pens away. Kim gets 5 more pens from a friend. How many pens does Kim have now?'
    >>> row["steps"], row["answer"]
    (['8 - 4 = 4', '4 + 5 = 9'], '9')
    """

    name: ClassVar[str] = "errands"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float",)

    lengths: tuple[int, ...] = (1, 2)

    @property
    def longest(self) -> int:
        """The most changes; more would read badly."""
        return 4

    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a problem of ``length`` changes, whatever its split; a step is the equation of a change."""
        name, things, number = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, LARGEST)
        sentences, steps = [f"{name} has {number} {things}."], []
        for _ in range(length):
            is_more = number == 1 or (number < LARGEST and rng.random() < 0.5)
            change = rng.randint(1, LARGEST - number) if is_more else rng.randint(1, number - 1)
            words = rng.choice(MORE if is_more else FEWER).format(n=change, things=things)
            sentences.append(f"{name} {words}.")
            result = number + change if is_more else number - change
            steps.append(f"{number} {'+' if is_more else '-'} {change} = {result}")
            number = result
        question = " ".join([*sentences, f"How many {things} does {name} have now?"])
        return {"question": question, "steps": steps, "answer": str(number)}


def write(path: Path, rows: Iterable[Mapping[str, Any]], *names: str) -> None:
    """Write columns of rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows), encoding="utf-8")
    print(path)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-rows", type=int, default=400, help="questions (%(default)s)")
    parser.add_argument("--num-held-out", type=int, default=200, help="rows of the test file (%(default)s)")
    parser.add_argument("--chains", type=Path, help="folder of rim-peft chains for these questions")
    options = parser.parse_args()
    task = Errands(num_rows=options.num_rows, num_held_out=options.num_held_out)
    rows = list(task.rows("train"))
    if options.chains is None:
        write(options.folder / "questions.jsonl", rows, "question", "answer")
        write(options.folder / "test.jsonl", task.rows("test"), "question", "steps", "answer")
        return
    written = [json.loads(line) for line in (options.chains / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    chains = [row for row in written if row["steps"]]
    num_same = sum(row["steps"] == rows[row["row"]]["steps"] for row in chains)
    print(f"chains that are the task's own steps: {num_same} of {len(chains)}")
    # Exactly the rows of the chains, so that nothing but the steps differs.
    gold = ({**rows[row["row"]], **({} if row["steps"] else {"steps": None})} for row in written)
    write(options.folder / "gold.jsonl", gold, "question", "steps", "answer")


if __name__ == "__main__":
    main()
