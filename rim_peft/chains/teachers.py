"""Teachers: what they are asked and what they write; a causal language model on this machine as a teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rim_peft.chains.options import ChainOptions
from rim_peft.data.examples import Question, QuestionError, Templates
from rim_peft.data.tokenization import padding_id, tokenize_prompts
from rim_peft.inference.greedy import can_share, generate_greedily, own_ends
from rim_peft.tuner.bases import input_device, num_positions

logger = logging.getLogger(__name__)

_LEAST_LIKELY = 1e-4
"""Less likely tokens, relative to the most likely one, are looked at only if ``top_p`` needs them."""


@dataclass(frozen=True)
class Request:
    """One chain to be written.

    Attributes:
        question: a text for the prompt's template, or all messages of a chat.
        seed: the seed of its sampling.
    """

    question: Question
    seed: int


@dataclass(frozen=True)
class Draft:
    """What a teacher wrote.

    Attributes:
        text: the chain, without what follows a stop text.
        num_tokens: tokens written, EOS included.
        num_prompt_tokens: tokens of the prompt.
        is_cut: whether it ended at ``max_new_tokens``.
        problem: why the teacher could not be asked (``too long``, ``refused``); None if it was.
    """

    text: str
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    is_cut: bool = False
    problem: str | None = None


class Teacher(Protocol):
    """Writes chains.

    Attributes:
        needs_whole_batches: whether a draft depends, up to rounding, on what else is in its batch; batches of a resumed
            run are then written again as a whole.
    """

    needs_whole_batches: ClassVar[bool]

    def write(self, requests: Sequence[Request], is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Draft]]:
        """Yield drafts with the indices of their requests, in any order; end early once ``is_stopped``."""


class LocalTeacher:
    """A causal language model on this machine.

    The same seed gives the same draft: the tokens of each draft are drawn from a generator of its own.
    """

    needs_whole_batches: ClassVar[bool] = True

    def __init__(
        self, model: Any, tokenizer: Any, templates: Templates, options: ChainOptions, *, stops: Collection[str] = ()
    ) -> None:
        self._model, self._tokenizer, self._templates = model, tokenizer, templates
        self._options, self._stops = options, tuple(stops)
        self._eos_ids = own_ends(model, tokenizer)

    def write(self, requests: Sequence[Request], is_stopped: Callable[[], bool]) -> Iterator[tuple[int, Draft]]:
        """Write a batch of drafts at once."""
        prompts: dict[int, list[int]] = {}
        room = num_positions(self._model.config)
        for index, request in enumerate(requests):
            try:
                (ids,) = tokenize_prompts([request.question], self._tokenizer, self._templates)
            except QuestionError as error:
                logger.warning("not asked: %s", error.reason)
                yield index, Draft("", problem="refused")
                continue
            if room is not None and len(ids) + self._options.max_new_tokens > room:
                yield index, Draft("", num_prompt_tokens=len(ids), problem="too long")
            else:
                prompts[index] = ids
        if prompts:
            yield from self._decode(prompts, [requests[index].seed for index in prompts], is_stopped)

    def _decode(
        self, prompts: dict[int, list[int]], seeds: Sequence[int], is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, Draft]]:
        options, start = self._options, max(map(len, prompts.values()))
        ending = _Ending(self._tokenizer, self._eos_ids, self._stops, start, is_stopped)
        sampling = _Sampling(seeds, start, options, input_device(self._model)) if options.temperature else None
        asked = list(prompts.values())
        rows = generate_greedily(
            self._model,
            asked,
            num_shared=num_shared(asked) if can_share(self._model) else 0,
            eos_id=None,
            pad_id=padding_id(self._tokenizer),
            max_new_tokens=options.max_new_tokens,
            logits_processor=LogitsProcessorList([] if sampling is None else [sampling]),
            stopping_criteria=StoppingCriteriaList([ending]),
        )
        if ending.was_stopped:
            return
        for row, (index, ids) in enumerate(prompts.items()):
            end = ending.ends.get(row)
            text = self._tokenizer.decode(rows[row][:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield index, Draft(cut_at(str(text), self._stops), len(rows[row][:end]), len(ids), is_cut=end is None)


def num_shared(prompts: Sequence[list[int]]) -> int:
    """Return with how many tokens all of several prompts begin, at the most all but one of the shortest.

    >>> num_shared([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5]]), num_shared([[1, 2]])
    (2, 0)
    """
    if len(prompts) < 2:
        return 0
    # Between the first and the last in order, all others begin like both.
    pairs = zip(min(prompts), max(prompts), strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(min(prompts)))
    return min(same, min(map(len, prompts)) - 1)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the stop texts."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class _Sampling(LogitsProcessor):
    """Leaves one token of each row: the one drawn by the row's own generator from the ``top_p`` most likely."""

    def __init__(self, seeds: Sequence[int], start: int, options: ChainOptions, device: torch.device) -> None:
        self._start, self._temperature, self._top_p = start, options.temperature, options.top_p
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        draws = [torch.rand(options.max_new_tokens, generator=one, dtype=torch.float64) for one in generators]
        self._draws = torch.stack(draws).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.softmax(scores.double() / self._temperature, dim=-1)
        draws = self._draws[:, input_ids.shape[1] - self._start]
        chosen = torch.stack([_draw(row, draw, self._top_p) for row, draw in zip(rows, draws, strict=True)])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def _draw(probabilities: Tensor, draw: Tensor, top_p: float) -> Tensor:
    """Return the token at a place in [0, 1) of the most likely tokens, whose probabilities add up to ``top_p``."""
    candidates = (probabilities >= probabilities.max() * _LEAST_LIKELY).nonzero()[:, 0]
    if probabilities[candidates].sum() < top_p:
        candidates = torch.arange(len(probabilities), device=probabilities.device)
    # Few, since sorting a whole vocabulary takes as long as a step of a small model on the CPU.
    likely, order = probabilities[candidates].sort(descending=True, stable=True)
    below = likely.cumsum(0)
    num_kept = (below - likely < top_p).sum()
    place = (below <= draw * below[num_kept - 1]).sum()
    return candidates[order[place.minimum(num_kept - 1)]]


class _Ending(StoppingCriteria):
    """Ends rows at EOS or a stop text, and all of them once the run is stopped; notes each row's length in tokens."""

    def __init__(
        self, tokenizer: Any, eos_ids: Collection[int], stops: Sequence[str], start: int, is_stopped: Callable[[], bool]
    ) -> None:
        self._tokenizer, self._eos_ids, self._stops = tokenizer, eos_ids, stops
        self._start, self._is_stopped = start, is_stopped
        # A character has at most four tokens, one a byte.
        self._looked_at = 4 * max(map(len, stops), default=0) + 4
        self.ends: dict[int, int] = {}
        self.was_stopped = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.was_stopped = self.was_stopped or self._is_stopped()
        length = input_ids.shape[1] - self._start
        for row, ids in enumerate(input_ids[:, self._start :][:, -self._looked_at :].tolist()):
            if row not in self.ends and (ids[-1] in self._eos_ids or self._has_stop(ids)):
                self.ends[row] = length
        done = [self.was_stopped or row in self.ends for row in range(len(input_ids))]
        return torch.tensor(done, device=input_ids.device)

    def _has_stop(self, ids: list[int]) -> bool:
        if not self._stops:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stops)
