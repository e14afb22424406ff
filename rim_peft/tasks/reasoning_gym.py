"""Problems of any generator of the package reasoning-gym, as ``reasoning-gym:NAME``; a task's class is made on request.

The options are those of all drawn tasks and the generator's own, as far as YAML can write them. Whether an answer is
right is decided by the generator's verifier, given the whole problem: :meth:`ReasoningGym.about` looks it up by the
question. Some verifiers evaluate the answer as Python (``eval``, or through sympy), so that a model's text could run
any code. These are never called, nor one that accepts every text; answers are compared as texts instead.

Source: Stojanovski et al., "Reasoning Gym", arXiv 2505.24760.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import count
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from rim_peft.data.examples import Question
from rim_peft.tasks.stories import SPLITS, DrawnTask, split_of

logger = logging.getLogger(__name__)

_CHUNK = 1000
_MOST_REPEATED = 5_000
"""Most problems drawn in a row without a new one for the split."""
_MOST_OMITTED = 50
"""Most problems of a split without a right answer before the first with one."""
_EVALUATES = re.compile(r"\b(?:eval|exec)\(|\bsympy\b")

_STEPS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "gsm_symbolic": lambda found: found["answer_cot"].partition("####")[0].splitlines(),
    "string_manipulation": lambda found: found["states"][1:],
    "string_splitting": lambda found: [" ".join(map(str, state)) for state in found["states"][1:]],
    "string_synthesis": lambda found: [" ".join(map(str, state)) for state in found["states"][1:]],
}
"""Generators with a chain in their metadata, and how it is read; the last state is also the answer."""

_ACCEPTS_ANYTHING = frozenset({"game_of_life_halting"})
"""Generators whose verifier gives every text full marks."""

_Options = tuple[tuple[str, Any], ...]

_places: dict[tuple[str, int, _Options], dict[str, tuple[int, int]]] = defaultdict(dict)
"""Chunk and index of each drawn question, by generator, seed and options."""


@dataclass(frozen=True)
class ReasoningGym(DrawnTask):
    """Base of these tasks.

    Attributes:
        generator: the generator's name in the package.
        own_options: names of the generator's own options.
    """

    generator: ClassVar[str]
    own_options: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            getattr(_config(self.generator, 0, 1, self._options), "validate", bool)()
        except (AssertionError, ValueError, TypeError) as error:
            raise ValueError(f"options of {self.name}: {error or 'are refused by the generator'}.") from None

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split, each question once: problems whose question hashes into it.

        A problem without an answer is omitted, and so is one whose answer the verifier does not accept.

        Raises:
            ValueError: there is no such split, the generator has too few problems, or it draws others each time.
        """
        wanted, seen, omitted, since = self.num_in(split), set[str](), 0, 0
        self._check_seed()
        for number in count():
            for index in range(_CHUNK):
                entry = self._draw(number)[index]
                question = entry["question"].strip()
                since += 1
                if split_of(question) == split and question not in seen:
                    if self._has_right_answer(number, entry):
                        seen.add(question)
                        since = 0
                        _places[self._key][question] = number, index
                        yield self._row(question, entry)
                    else:
                        omitted += 1
                if len(seen) == wanted:
                    logger.info(
                        "%s, %s: %d problems, %d without a right answer omitted", self.name, split, wanted, omitted
                    )
                    return
                if since >= _MOST_REPEATED or (omitted >= _MOST_OMITTED and not seen):
                    raise ValueError(
                        f"num_rows, num_held_out: {self.name} has {len(seen)} problems for the split {split!r}, and "
                        f"{omitted} without an answer that its verifier accepts, got {wanted}. Request fewer, set "
                        "other options, or choose another generator."
                    )

    def about(self, question: Question) -> ReasoningGym:
        """Return the task that judges answers to one question with the generator's verifier."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_question", question)
        return bound

    def is_correct(self, text: str, gold: str) -> bool:
        """Tell whether the verifier gives an answer full marks; without :meth:`about`, whether it equals ``gold``.

        Raises:
            ValueError: the question is none of this task's, or ``gold`` is empty.
        """
        question = getattr(self, "_question", None)
        if self.answer_rule != "verifier" or question is None:
            return super().is_correct(text, gold)
        number, entry = self._find(question)
        return _full_marks(self._draw(number), text.strip(), {**entry, "answer": gold})

    @property
    def _options(self) -> _Options:
        return tuple((name, _frozen(getattr(self, name))) for name in self.own_options)

    @property
    def _key(self) -> tuple[str, int, _Options]:
        return self.generator, self.seed, self._options

    def _draw(self, number: int) -> Any:
        """Return a chunk of problems, the same for the same options."""
        return _dataset(self.generator, (self.seed * 1_000_003 + number * _CHUNK) % 2**31, self._options)

    def _check_seed(self) -> None:
        first, again = (_dataset.__wrapped__(self.generator, self.seed, self._options)[0] for _ in range(2))
        if first["question"] != again["question"]:
            raise ValueError(f"task: {self.name} draws other problems each time, whatever the seed. Choose another.")

    def _has_right_answer(self, number: int, entry: Mapping[str, Any]) -> bool:
        answer = entry["answer"]
        if not isinstance(answer, str) or not answer.strip():
            return False
        return "verifier" not in self.answer_rules or _full_marks(self._draw(number), answer.strip(), entry)

    def _row(self, question: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        read = _STEPS.get(self.generator)
        steps = [step.strip() for step in read(entry["metadata"]) if step.strip()] if read else []
        return {"question": question, "steps": steps or None, "answer": entry["answer"].strip(), "length": len(steps)}

    def _find(self, question: Question) -> tuple[int, Mapping[str, Any]]:
        """Return the chunk and the problem of a question, drawing all rows again if need be."""
        text = question.strip() if isinstance(question, str) else ""
        if text not in _places[self._key]:
            for split in SPLITS:
                for _ in self.rows(split):
                    pass
        if text not in _places[self._key]:
            raise ValueError(f"question: must be one that {self.name} draws with its options, got {text[:80]!r}.")
        number, index = _places[self._key][text]
        return number, self._draw(number)[index]


@cache
def task_class(generator: str) -> type[ReasoningGym]:
    """Return the task of a generator, with the generator's options as fields.

    Raises:
        ValueError: there is no such generator.
        ImportError: reasoning-gym is not installed.
    """
    if find_spec("reasoning_gym") is None:
        raise ImportError("task: 'reasoning-gym:NAME' needs reasoning-gym: pip install 'rim-peft[gsm-symbolic]'.")
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        close = get_close_matches(generator, DATASETS, n=1)
        guess = f", did you mean {close[0]!r}?" if close else "."
        listed = ", ".join(sorted(DATASETS))
        raise ValueError(f"task: reasoning-gym has no generator {generator!r}{guess} Choose one of {listed}.")
    kind, config = DATASETS[generator]
    is_unusable = generator in _ACCEPTS_ANYTHING or _evaluates_answers(kind)
    rules = ("exact-text",) if is_unusable else ("verifier", "exact-text")
    hints = get_type_hints(config)
    own = [option for option in fields(config) if option.name not in ("seed", "size") and _is_plain(hints[option.name])]
    made: list[tuple[str, Any, Any]] = [(option.name, hints[option.name], _default(option)) for option in own]
    return make_dataclass(
        "ReasoningGymTask",
        [*made, ("answer_rule", str, field(default=rules[0]))],
        bases=(ReasoningGym,),
        frozen=True,
        namespace={
            "__module__": __name__,
            "__doc__": f"Problems of reasoning-gym's generator {generator}.",
            "name": f"reasoning-gym:{generator}",
            "generator": generator,
            "own_options": tuple(option.name for option in own),
            "answer_rules": rules,
        },
    )


def _evaluates_answers(kind: type) -> bool:
    """Tell whether a generator has its own verifier in a module that evaluates texts, whichever texts these are."""
    owner = next(base for base in kind.__mro__ if "score_answer" in vars(base))
    is_shared = owner.__module__ == "reasoning_gym.dataset"
    return not is_shared and _EVALUATES.search(inspect.getsource(sys.modules[owner.__module__])) is not None


def _is_plain(hint: Any) -> bool:
    """Tell whether YAML can write the values of a type."""
    origin = get_origin(hint) or hint
    if origin in (list, tuple, Union, types.UnionType):
        return all(inner is ... or _is_plain(inner) for inner in get_args(hint))
    return origin is Literal or origin in (bool, int, float, str, type(None))


def _default(option: Any) -> Any:
    """Return an option's default as that of a field; lists become tuples, as options do."""
    return field(default=_frozen(option.default_factory() if option.default_factory is not MISSING else option.default))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _config(generator: str, seed: int, size: int, options: _Options) -> Any:
    from reasoning_gym.factory import DATASETS

    kind = DATASETS[generator][1]
    lists = {name for name, hint in get_type_hints(kind).items() if get_origin(hint) is list}
    values = {name: list(value) if name in lists and isinstance(value, tuple) else value for name, value in options}
    return kind(seed=seed, size=size, **values)


@lru_cache(maxsize=16)
def _dataset(generator: str, seed: int, options: _Options) -> Any:
    """Return ``_CHUNK`` problems, which are drawn when they are read."""
    from reasoning_gym.factory import DATASETS

    return DATASETS[generator][0](config=_config(generator, seed, _CHUNK, options))


def _full_marks(dataset: Any, answer: str, entry: Mapping[str, Any]) -> bool:
    """Tell whether a verifier gives an answer 1; one that fails on a text gives it nothing."""
    try:
        return bool(dataset.score_answer(answer, dict(entry)) >= 1)
    except Exception as error:  # verifiers are written for well-formed answers
        logger.debug("the verifier of %s failed on %r: %s", type(dataset).__name__, answer[:80], error)
        return False
