"""Decoding after continuous thoughts (Coconut), a baseline for RiM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Question, RowError, Templates
from rim_peft.inference.answerer import Answerer
from rim_peft.inference.decoding import check_prompts
from rim_peft.inference.greedy import cut_behind_eos
from rim_peft.sequence.layout import pad_left
from rim_peft.tuner.bases import CACHE, evaluation_mode, input_device
from rim_peft.tuner.config import active_config
from rim_peft.tuner.thoughts import check_thinks, think
from rim_peft.values import check_integer


def decode_with_thoughts(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_thoughts: int,
    eos_id: int | None,
    max_new_tokens: int = 64,
    on_token: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Decode a batch of prompts greedily after their thoughts, in ``max(1, N)`` passes plus one per token.

    Args:
        prompts: token ids of each prompt, at least one.
        num_thoughts: thoughts after each prompt, N.
        max_new_tokens: most tokens of an answer, EOS included.
        on_token: called after each new token of all answers, for measurements.

    Returns:
        Each answer's tokens, EOS included if reached.

    Raises:
        ValueError: there are no prompts, or a prompt is empty.
    """
    check_prompts(prompts)
    base: Any = model.get_base_model()
    ids, mask = pad_left(prompts, 0, device=input_device(model))
    with torch.no_grad(), evaluation_mode(model):
        thoughts = think(model, ids, mask, num_thoughts=num_thoughts)
        new = ids.new_full((len(prompts), 1), active_config(model).block_tokens.end)
        inputs = thoughts.followed_by(base, new, torch.ones_like(new))
        answers: list[Tensor] = []
        is_done = torch.zeros_like(new, dtype=torch.bool)
        while True:
            new = base(**inputs, logits_to_keep=1).logits.argmax(-1)
            answers.append(new)
            if on_token is not None:
                on_token()
            is_done = is_done | (new == (-1 if eos_id is None else eos_id))  # no token is -1
            if len(answers) == max_new_tokens or bool(is_done.all()):
                break
            inputs = {
                "input_ids": new,
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
                "position_ids": inputs["position_ids"][:, -1:] + 1,
                CACHE: thoughts.cache,
                "use_cache": True,
            }
    return [cut_behind_eos(answer, eos_id) for answer in torch.cat(answers, dim=1).tolist()]


class ThoughtAnswerer(Answerer):
    """Answers after continuous thoughts (Coconut), a baseline for RiM."""

    between: ClassVar[str | None] = "thoughts and the tokens around them"

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_thoughts: int,
        templates: Templates | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Create an answerer.

        Args:
            model: a model with an active RIM adapter, trained by ``CoconutTrainer``.
            num_thoughts: thoughts after each prompt: ``CoconutConfig.num_thoughts`` of the training.

        Raises:
            ValueError: the model does not support thoughts (:func:`~rim_peft.tuner.thoughts.check_thinks`), or a
                number is out of range.
        """
        super().__init__(model, tokenizer, templates=templates, max_new_tokens=max_new_tokens)
        check_integer("num_thoughts", num_thoughts, least=0)
        check_thinks(model)
        self.num_thoughts = num_thoughts

    @property
    def num_between(self) -> int:
        """Number of thoughts plus ``<b>`` and ``</b>``."""
        return self.num_thoughts + 2

    def _between_ids(self) -> list[int]:
        raise RowError(
            "must end with the user's message where continuous thoughts follow the prompt, got a begun answer "
            "(continue_final_message). Omit it."
        )

    def decode(
        self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Decode a batch after the prompts' thoughts."""
        return decode_with_thoughts(
            self.model,
            prompts,
            num_thoughts=self.num_thoughts,
            eos_id=self.eos_id,
            max_new_tokens=self.max_new_tokens,
            on_token=on_token,
        )


def answer_with_thoughts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    num_thoughts: int,
    templates: Templates | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    on_cut: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Answer questions greedily after continuous thoughts; see :class:`ThoughtAnswerer` and :func:`answer_questions`.

    Raises:
        ValueError: the model does not support thoughts (:func:`~rim_peft.tuner.thoughts.check_thinks`), a number is
            out of range, or a question leaves no room for its answer in the base's positions.
    """
    answerer = ThoughtAnswerer(
        model, tokenizer, num_thoughts=num_thoughts, templates=templates, max_new_tokens=max_new_tokens
    )
    return answerer.answer(questions, batch_size=batch_size, on_cut=on_cut)
