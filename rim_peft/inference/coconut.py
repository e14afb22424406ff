"""Answers after continuous thoughts (Coconut), which RiM is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import QuestionError, Templates
from rim_peft.data.preparation import Question, tokenize_prompts
from rim_peft.inference.decoding import check_number, check_prompts, cut_behind_eos, evaluation_mode
from rim_peft.tuner.bases import input_device, num_positions
from rim_peft.tuner.config import active_config
from rim_peft.tuner.thoughts import check_thinks, think


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
    """Answer questions greedily after continuous thoughts, one text per question, in their order.

    Args:
        model: a model with an active RIM adapter, trained by ``CoconutTrainer``.
        tokenizer: the base's tokenizer.
        questions: texts or chats.
        num_thoughts: thoughts after each prompt; ``CoconutConfig.num_thoughts`` of the training.
        templates: how a prompt is written; the ones that the adapter was trained with.
        max_new_tokens: tokens of an answer at most, EOS included.
        batch_size: questions answered at a time; it does not change the answers.
        on_cut: called with each answer that had not ended within ``max_new_tokens``.

    Raises:
        ValueError: the model cannot think (:func:`~rim_peft.tuner.thoughts.check_thinks`), a number is out of range, or
            a question leaves no room for its answer in the base's positions.
    """
    check_number("num_thoughts", num_thoughts, least=0)
    check_number("max_new_tokens", max_new_tokens, least=1)
    check_number("batch_size", batch_size, least=1)
    check_thinks(model)
    prompts = tokenize_prompts(questions, tokenizer, templates, vocab_size=active_config(model).block_tokens.begin)
    _check_room(model, prompts, num_thoughts=num_thoughts, max_new_tokens=max_new_tokens)
    for start in range(0, len(prompts), batch_size):
        answers = decode_with_thoughts(
            model,
            prompts[start : start + batch_size],
            num_thoughts=num_thoughts,
            eos_id=tokenizer.eos_token_id,
            max_new_tokens=max_new_tokens,
        )
        for answer in answers:
            text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
            if on_cut is not None and tokenizer.eos_token_id not in answer:
                on_cut(text)
            yield text


def decode_with_thoughts(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_thoughts: int,
    eos_id: int | None,
    max_new_tokens: int = 64,
    on_token: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Decode a batch of prompts greedily after their thoughts, in ``max(1, N)`` passes and one for each token.

    Args:
        model: a model with an active RIM adapter.
        prompts: token ids, at least one of each prompt.
        num_thoughts: thoughts after each prompt, N.
        eos_id: the token that ends an answer, None for none.
        max_new_tokens: tokens of an answer at most, EOS included.
        on_token: called whenever every answer has one token more, to measure with.

    Returns:
        Each answer's tokens, EOS included if it was reached.

    Raises:
        ValueError: there are no prompts, or an empty one.
    """
    check_prompts(prompts)
    base: Any = model.get_base_model()
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = (
        torch.tensor(rows, device=input_device(model))
        for rows in (
            [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts],
        )
    )
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
                "past_key_values": thoughts.cache,
                "use_cache": True,
            }
    return [cut_behind_eos(answer, eos_id) for answer in torch.cat(answers, dim=1).tolist()]


def _check_room(model: PeftModel, prompts: Sequence[Sequence[int]], *, num_thoughts: int, max_new_tokens: int) -> None:
    room = num_positions(model.config)
    for index, prompt in enumerate(prompts):
        if room is not None and len(prompt) + num_thoughts + 2 + max_new_tokens > room:
            raise QuestionError(
                index,
                f"prompt ({len(prompt)} tokens), thoughts ({num_thoughts} and 2) and answer ({max_new_tokens}) must "
                f"fit into the base's {room} positions (max_position_embeddings; with longrope "
                "original_max_position_embeddings). Leave the question out, or lower max_new_tokens.",
            )
