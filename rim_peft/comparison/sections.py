"""A comparison's recipe as frozen dataclasses, with the help of each option beside its default.

``python -m rim_peft.comparison.sections docs/recipes.md`` updates the table in that file.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from rim_peft.recipe.options import Option, as_table, describe_fields, rewrite

_LONGEST_NAME = 150
"""Maximum characters of a folder's name that come from a recipe's values."""


@dataclass(frozen=True)
class RowsOptions:
    """Sections ``test`` and ``selection``: the judged rows."""

    split: str = field(metadata={"help": "Split of the task."})
    rows: int | None = field(default=None, metadata={"help": "Use only the first N rows; null: all."})
    path: str | None = field(
        default=None, metadata={"help": "File, folder or Hub id of the rows, if it differs from the training's."}
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the task that differ from the training's."}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: ``rows`` is below 1.
        """
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: must be at least 1 or null, got {self.rows}.")


@dataclass(frozen=True)
class MeasureOptions:
    """Section ``measures``: what is measured besides accuracy."""

    of: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Methods whose blocks are examined (budget, controls, faithfulness, representations); if empty, "
            "the reference."
        },
    )
    blocks: bool = field(
        default=True,
        metadata={"help": "Judge every block's readout, and the ways to choose an answer from them."},
    )
    budget: list[int] = field(
        default_factory=lambda: [0, 1, 2, 4, 8, 12, 16],
        metadata={"help": "Numbers of blocks to answer with; an empty list skips this."},
    )
    controls: bool = field(default=True, metadata={"help": "Remove, shuffle, swap and replace the blocks."})
    faithfulness: bool = field(
        default=True, metadata={"help": "After stage 1: does each block read out the right step?"}
    )
    representations: bool = field(
        default=True, metadata={"help": "Principal components of the blocks' states, over blocks and over training."}
    )
    latency_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 32],
        metadata={"help": "Batch sizes at which answers are timed; an empty list skips this."},
    )
    latency_questions: int = field(default=32, metadata={"help": "Questions timed at each batch size."})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a number is out of range, or repeated.
        """
        if any(count < 0 for count in self.budget):
            raise ValueError(f"budget: must hold numbers of blocks from 0 on, got {self.budget}.")
        for name in ("of", "budget", "latency_batch_sizes"):
            if len(set(values := getattr(self, name))) < len(values):
                raise ValueError(f"{name}: must hold each entry once, got {values}.")
        if any(size < 1 for size in self.latency_batch_sizes):
            raise ValueError(f"latency_batch_sizes: must hold numbers from 1 on, got {self.latency_batch_sizes}.")
        if self.latency_questions < 1:
            raise ValueError(f"latency_questions: must be at least 1, got {self.latency_questions}.")


@dataclass(frozen=True)
class MethodOptions:
    """One entry of ``methods``: how a run differs from the shared recipe."""

    label: str | None = field(default=None, metadata={"help": "Its label in tables; by default its name."})
    changes: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Recipe keys and their values, as on the command line."}
    )
    search: dict[str, list[Any]] = field(
        default_factory=dict,
        metadata={
            "help": "Recipe keys, each with values: all combinations are trained with the first seed, and the one that "
            "does best on the selection rows becomes the method, with every seed."
        },
    )
    train: bool = field(default=True, metadata={"help": "false: judge the base as it is."})
    same_compute_as: str | None = field(
        default=None,
        metadata={
            "help": "Train on as many tokens as this method took with the same seed, instead of the recipe's number of "
            "steps. The methods must include one with the same changes but without this key."
        },
    )
    seeds: list[int] | None = field(default=None, metadata={"help": "Seeds, if they differ from the common ones."})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: an untrained base has options of training, a list is empty, or a key is both searched and
                changed.
        """
        if self.same_compute_as is not None and not self.train:
            raise ValueError("same_compute_as: must be null where train is false, since nothing is trained. Omit one.")
        if self.search and not self.train:
            raise ValueError("search: must be empty where train is false, since nothing is trained. Omit one.")
        if self.seeds == []:
            raise ValueError("seeds: must hold at least one, or be null for those of all methods, got [].")
        _check_values("search", self.search)
        for key in self.search:
            if key in self.changes:
                raise ValueError(f"search: must not hold a key of changes too, got {key}. Remove it from one of them.")

    @property
    def view(self) -> Literal["samples", "compute"]:
        """What this method has in common with those that it is compared with."""
        return "samples" if self.same_compute_as is None else "compute"


@dataclass(frozen=True)
class Comparison:
    """A whole comparison as data.

    Raises:
        ValueError: there is no method, a name cannot be a folder's name, or a named method is missing.
    """

    output_dir: str = field(metadata={"help": "Folder to write to; runs finished there are not repeated."})
    recipe: str = field(metadata={"help": "Recipe file that all runs share."})
    test: RowsOptions = field(metadata={"help": "Rows for all reported figures."})
    selection: RowsOptions = field(
        metadata={"help": "Rows for choosing searched values and for the probe, never test rows."}
    )
    reference: str = field(default="rim", metadata={"help": "Method that the others are compared with."})
    changes: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Recipe keys and their values, for all runs."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of every method."})
    methods: dict[str, MethodOptions] = field(
        default_factory=dict, metadata={"help": "Methods by name, in the order of the table."}
    )
    grid: dict[str, list[Any]] = field(
        default_factory=dict,
        metadata={"help": "For rim-peft ablate: recipe keys, each with values to try one at a time."},
    )
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Compare these methods alone for now, the reference among them; if empty, all."},
    )
    measures: MeasureOptions = field(default_factory=MeasureOptions, metadata={"help": "What is measured."})
    where: Callable[[str], str] = field(default=str, repr=False, compare=False)
    """Maps a key to the place where it was set (file and key, or another place), for errors. Not a key itself."""

    @classmethod
    def options(cls) -> list[Field[Any]]:
        """Return the fields that a recipe can set."""
        return [field for field in fields(cls) if field.name != "where"]

    def __post_init__(self) -> None:
        """Check names and references between sections."""
        if not self.seeds:
            raise ValueError("seeds: must hold at least one, got [].")
        _check_values("grid", self.grid)
        if self.reference not in self.methods:
            raise ValueError(f"reference: must be one of the methods, got {self.reference!r}. {self._there}")
        for name, method in self.methods.items():
            if not re.fullmatch(r"\w[\w.,=+-]*", name):
                raise ValueError(
                    "methods: a name must consist of letters, digits and . , = + - _, and begin with a letter, digit "
                    f"or _, got {name!r}."
                )
            other = method.same_compute_as
            if other is None:
                continue
            if other not in self.methods or self.methods[other].view == "compute" or not self.methods[other].train:
                raise ValueError(f"methods.{name}.same_compute_as: must be a method with its own steps, got {other!r}.")
            if self.twin(name) is None:
                raise ValueError(
                    f"methods.{name}.same_compute_as: needs a method with the same changes and the recipe's own steps, "
                    "whose tokens for each step are measured; there is none. Add it."
                )
        for name in self.measures.of:
            if name not in self.methods:
                raise ValueError(f"measures.of: must hold methods, got {name!r}. {self._there}")
        self._check_only()
        if (self.test.split, self.test.path) == (self.selection.split, self.selection.path):
            raise ValueError(
                f"selection.split: must differ from test.split, got {self.test.split!r} twice. Choose another."
            )

    def _check_only(self) -> None:
        """Check that the chosen methods are there, with those that they are compared with or take tokens from."""
        if not self.only:
            return
        needed = {**dict.fromkeys(self.measures.of, "in measures.of"), self.reference: "the reference"}
        for name in self.only:
            method = self._all_entries().get(name)
            if method is None:
                raise ValueError(f"only: must hold methods, got {name!r}. {self._there}")
            if method.same_compute_as is not None:
                sources = (method.same_compute_as, str(self.twin(name)))
                needed |= dict.fromkeys(sources, f"what {name} takes tokens from")
        for name, why in needed.items():
            if name not in self.only:
                raise ValueError(f"only: must hold {name}, which is {why}, got {', '.join(self.only)}. Add it.")

    def twin(self, name: str) -> str | None:
        """Return the method with the same changes and the recipe's own number of steps."""
        changes = self.methods[name].changes
        same = (key for key, one in self.methods.items() if one.changes == changes and one.train and key != name)
        return next((key for key in same if self.methods[key].view == "samples"), None)

    def entries(self) -> dict[str, MethodOptions]:
        """Return the methods and, for each value of the grid, the shared recipe with that one value changed.

        Of these, those named by ``only`` if it names any.
        """
        entries = self._all_entries()
        return {name: entry for name, entry in entries.items() if name in self.only} if self.only else entries

    def _all_entries(self) -> dict[str, MethodOptions]:
        found = dict(self.methods)
        for key, values in self.grid.items():
            for value in values:
                label = f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
                found[name_of({key: value})] = MethodOptions(label=label, changes={key: value})
        return found

    @property
    def _there(self) -> str:
        return f"There are {', '.join(self._all_entries()) or 'none'}."

    @property
    def looked_into(self) -> list[str]:
        """Methods whose blocks are looked into."""
        return self.measures.of or [self.reference]

    @property
    def kind(self) -> Literal["compare", "ablate"]:
        """The command that the recipe is for."""
        return "ablate" if self.grid else "compare"


def name_of(values: Mapping[str, Any]) -> str:
    """Return a folder's name for recipe keys and their values.

    >>> name_of({"baseline.learning_rate": 1e-3, "baseline.lr_scheduler_type": "linear"})
    'baseline.learning_rate=0.001,baseline.lr_scheduler_type=linear'
    """
    text = ",".join(f"{key}={_value(value)}" for key, value in values.items())
    name = re.sub(r"[^\w.,=+-]+", "_", text)[:_LONGEST_NAME]
    # Names that were cut or replaced must stay distinct.
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _value(value: Any) -> str:
    """Return a value as JSON; a text without its quotes unless it would then be read as something else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def _check_values(name: str, values: Mapping[str, Any]) -> None:
    for key, listed in values.items():
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{name}: must give each key a list of values, got {listed!r} for {key}.")


_PARTS: dict[str, type] = {
    "": Comparison,
    "methods.NAME.": MethodOptions,
    "test. or selection.": RowsOptions,
    "measures.": MeasureOptions,
}
_SECTIONS = ("methods", "test", "selection", "measures")
_TABLE = re.compile(r"(?<=<!-- comparison -->\n).*?(?=<!-- end -->)", re.DOTALL)


def list_options() -> list[Option]:
    """List all options."""
    return [
        option
        for prefix, owner in _PARTS.items()
        for option in describe_fields(
            owner,
            fields(owner) if prefix else [field for field in Comparison.options() if field.name not in _SECTIONS],
            prefix=prefix,
        )
    ]


def update_table(text: str) -> str:
    """Return a Markdown text with an updated table between ``<!-- comparison -->`` and ``<!-- end -->``."""
    return _TABLE.sub(lambda _: f"{as_table(list_options())}\n", text)


if __name__ == "__main__":
    rewrite(sys.argv[1:], update_table)
