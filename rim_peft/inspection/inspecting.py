"""Inspect how an adapter thinks: one document about some questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rim_peft.data.examples import Question
from rim_peft.evaluation.answers import AnswerReader
from rim_peft.evaluation.probe import Probe
from rim_peft.inference import BlockAnswerer, Readout
from rim_peft.inference.readout import select_by_confidence, select_by_score, select_by_vote, select_final
from rim_peft.inspection.alternatives import (
    Asked,
    ReadAnswer,
    find_donor,
    remove_blocks,
    shuffle_blocks,
    swap_blocks,
    write_chain,
)
from rim_peft.inspection.attention import group_layers, read_attention, split_words
from rim_peft.inspection.document import BlockReadout, Candidate, Inspection, QuestionInspection, Selection
from rim_peft.inspection.lens import Row, read_layers, read_tokens
from rim_peft.run import Run
from rim_peft.tasks import Task
from rim_peft.tasks.answers import exact_text
from rim_peft.tuner.config import active_config
from rim_peft.values import check_integer, shown

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Options:
    """What an inspection contains.

    Attributes:
        num_best: likeliest tokens of each reading; next best ones of each token of a readout.
        seed: of the shuffled blocks.
        chain_tokens: most tokens of the base's written chain; 0 for no chain; None for 256, or as many as fit.
        chain_template: how the base is asked for it, with ``{question}``; None for a general one.
    """

    num_best: int = 3
    seed: int = 0
    chain_tokens: int | None = None
    chain_template: str | None = None

    def __post_init__(self) -> None:
        check_integer("num_best", self.num_best, least=1)
        check_integer("seed", self.seed, least=0)
        if self.chain_tokens is not None:
            check_integer("chain_tokens", self.chain_tokens, least=0)
        if self.chain_template is not None and self.chain_template.count("{question}") != 1:
            raise ValueError(f"chain_template: must hold {{question}} once, got {shown(self.chain_template)}. Add it.")


def answer_reader(alone: AnswerReader, task: Task | None, question: Question) -> ReadAnswer:
    """Return how answers to a question are read: by the task's rule, without the words of the answer template."""
    rule = exact_text if task is None else task.about(question).read_answer
    return lambda text: rule(alone(text))


def inspect_questions(
    run: Run,
    questions: Sequence[Question],
    *,
    name: str = "",
    donors: Sequence[Question] = (),
    num_blocks: int | None = None,
    max_new_tokens: int | None = None,
    probe: Probe | None = None,
    options: Options | None = None,
) -> Inspection:
    """Show what a model held after each of its blocks, for each of some questions, one at a time.

    Args:
        questions: at least one text or chat.
        name: the adapter's name in the document.
        donors: more questions whose blocks may be swapped in; the other ``questions`` are tried after them.
        num_blocks: blocks after each prompt; the adapter's own number by default.
        max_new_tokens: most tokens of an answer, EOS included; the recipe's by default.
        probe: a probe fitted on this adapter, which then chooses a block too.
        options: what the inspection contains.

    Returns:
        The document. A part that the base cannot give is None, with the reason in ``missing``.

    Raises:
        ValueError: there are no questions, the adapter does not answer after blocks, or the base cannot run branching
            rows.
        QuestionError: a question is empty, or leaves no room for its answer.
    """
    options = options or Options()
    if not questions:
        raise ValueError("questions: must be at least one, got none. Give a question.")
    answerer = block_answerer(run, num_blocks=num_blocks, max_new_tokens=max_new_tokens)
    inspector = _Inspector(answerer, find_task(run), probe, options)
    prompts = answerer.encode(questions)
    others = list(zip(donors, answerer.encode(donors, name="donors"), strict=True))
    asked = list(zip(questions, prompts, strict=True))
    found = [
        inspector.inspect(question, prompt, [*others, *asked[index + 1 :], *asked[:index]])
        for index, (question, prompt) in enumerate(asked)
    ]
    config = active_config(run.model)
    return Inspection(
        adapter=_last_part(name),
        base=_last_part(_base_name(run)),
        method=run.recipe.method if run.recipe is not None else None,
        num_loops=1,
        num_blocks=answerer.num_blocks,
        block_size=config.block_size,
        num_layers=inspector.groups[0].last,
        first_layer=inspector.groups[0].first,
        layer_groups=inspector.groups,
        seed=options.seed,
        questions=tuple(found),
    )


def block_answerer(run: Run, **settings: Any) -> BlockAnswerer:
    """Return the answerer of an adapter that answers after blocks.

    Args:
        settings: as for :meth:`~rim_peft.run.Run.answerer`.

    Raises:
        ValueError: it is an export, or its adapter does not answer after blocks.
    """
    if run.exported is not None:
        raise ValueError(
            "adapter: must be an adapter, got an export, whose blocks only the tokenizer knows. Inspect the adapter "
            "that it was made from."
        )
    answerer = run.answerer(**settings)
    if not isinstance(answerer, BlockAnswerer) or answerer.num_blocks < 1:
        method = run.recipe.method if run.recipe is not None else "of no recipe"
        raise ValueError(
            f"adapter: must answer after memory blocks to be inspected, got method {method!r} with none. Inspect an "
            "adapter that has blocks."
        )
    return answerer


def find_task(run: Run) -> Task | None:
    """Return the training's task, which reads answers; None if there is none, or it is a class of the user's."""
    try:
        return run.task()
    except ValueError:
        return None


def _base_name(run: Run) -> str:
    named = run.recipe.model.name_or_path if run.recipe is not None else None
    return named or active_config(run.model).base_model_name_or_path or type(run.model.get_base_model()).__name__


def _last_part(name: str) -> str:
    """Return a folder's name without where it is on this machine, or the id of a model unchanged."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name


@dataclass
class _Inspector:
    """What is the same for all questions of an inspection."""

    answerer: BlockAnswerer
    task: Task | None
    probe: Probe | None
    options: Options
    missing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = active_config(self.answerer.model)
        num_layers = int(self.answerer.model.config.get_text_config().num_hidden_layers)
        self.groups = group_layers(config.insertion_layer + 1, num_layers)

    def inspect(
        self, question: Question, prompt: Sequence[int], others: Sequence[tuple[Question, Sequence[int]]]
    ) -> QuestionInspection:
        """Return everything about one question; ``others`` are the questions that may be donors, with their prompts."""
        self.missing = {}
        model, tokenizer, num_best = self.answerer.model, self.answerer.tokenizer, self.options.num_best
        read = self._reader(question)
        (readouts,) = self.answerer.read_blocks([question])
        row = Row(model, prompt, [readout.token_ids for readout in readouts], self.answerer.pad_id)
        tokens = read_tokens(row, tokenizer, num_best=num_best)
        by_block = self._readouts(readouts, tokens, read)
        asked = Asked(question, prompt, by_block[-1].answer, read)
        words = split_words(prompt, tokenizer)
        first = self.groups[0].first
        agree = [readout.agrees for readout in by_block]
        return QuestionInspection(
            question=question,
            num_tokens=len(prompt),
            words=words,
            readouts=by_block,
            first_block=agree.index(True) + 1 if any(agree) else None,
            settled_block=_settled(agree),
            lens=self._try("lens", lambda: read_layers(row, tokenizer, first_layer=first, num_best=num_best)),
            attention=self._try(
                "attention",
                lambda: read_attention(model, prompt, words, num_blocks=self.answerer.num_blocks, groups=self.groups),
            ),
            alternatives=tuple(self._alternatives(asked, others)),
            chain=self._chain(asked),
            selection=tuple(self._selection(by_block, readouts)),
            missing=dict(self.missing),  # last, since the parts above note their reasons there
        )

    def _try(self, name: str, compute: Callable[[], _Part]) -> _Part | None:
        """Return a part of the inspection, or None with the reason noted."""
        try:
            return compute()
        except ValueError as error:
            self.missing[name] = str(error)
            return None

    def _reader(self, question: Question) -> ReadAnswer:
        return answer_reader(AnswerReader(self.answerer.tokenizer, self.answerer.templates), self.task, question)

    def _readouts(
        self,
        readouts: Sequence[Readout],
        tokens: Sequence[tuple[tuple[Candidate, ...], ...]],
        read: ReadAnswer,
    ) -> tuple[BlockReadout, ...]:
        answers = [read(readout.text) for readout in readouts]
        return tuple(
            BlockReadout(
                loop=1,
                block=readout.block,
                text=readout.text,
                answer=answer,
                probability=math.prod(candidates[0].probability for candidates in parts),
                is_complete=self.answerer.has_ended(readout.token_ids),
                agrees=answer is not None and answer == answers[-1],
                tokens=parts,
            )
            for readout, answer, parts in zip(readouts, answers, tokens, strict=True)
        )

    def _alternatives(self, asked: Asked, others: Sequence[tuple[Question, Sequence[int]]]) -> Any:
        answerer, seed = self.answerer, self.options.seed
        ways = {
            "removed": lambda: remove_blocks(answerer, asked),
            "shuffled": lambda: shuffle_blocks(answerer, asked, seed=seed),
            "swapped": lambda: swap_blocks(answerer, asked, find_donor(answerer, asked, others, self._reader)),
        }
        for name, answer in ways.items():
            if (found := self._try(name, answer)) is not None:
                yield found

    def _chain(self, asked: Asked) -> Any:
        if self.options.chain_tokens == 0:
            return None
        template, most = self.options.chain_template, self.options.chain_tokens
        return self._try("chain", lambda: write_chain(self.answerer, asked, template=template, max_new_tokens=most))

    def _selection(self, by_block: Sequence[BlockReadout], readouts: Sequence[Readout]) -> Any:
        """Yield the block that each rule chooses."""
        scores = [sum(readout.token_log_probs) for readout in readouts]
        yield Selection("final", int(select_final(1, len(by_block))[0]) + 1, None)
        yield Selection("vote", int(select_by_vote([[readout.answer for readout in by_block]])[0]) + 1, None)
        yield Selection("confidence", int(select_by_confidence(np.array([scores]))[0]) + 1, tuple(scores))
        if (probe := self.probe) is not None:
            states = torch.stack([readout.hidden_state for readout in readouts])[None]
            found = self._try("probe", partial(probe.scores, states))
            if found is not None:
                yield Selection("probe", int(select_by_score(found)[0]) + 1, tuple(found[0].tolist()))


def _settled(agrees: Sequence[bool]) -> int | None:
    """Return the first block from which on all agree with the last one.

    >>> _settled([True, False, True, True]), _settled([False, False])
    (3, None)
    """
    if not agrees or not agrees[-1]:
        return None
    return max((block for block, agree in enumerate(agrees, start=1) if not agree), default=0) + 1
