"""What each block holds: answers after the last block, and after every block, of a batch of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.preparation import Question, tokenize_prompts
from rim_peft.sequence import BlockTokens, Layout, Sample, attention_masks, build_layout, check_architecture
from rim_peft.tuner.config import active_config


@dataclass(frozen=True)
class Readout:
    """What one block's readout says, decoded greedily.

    Attributes:
        block: the block's number, from 1.
        text: the readout as text, without EOS and surrounding space.
        token_ids: the readout's tokens, EOS included if it was reached.
        token_log_probs: natural logarithm of each token's probability.
        hidden_state: (H,) float32, the last layer's state at the block's end, which the head reads.
    """

    block: int
    text: str
    token_ids: list[int]
    token_log_probs: list[float]
    hidden_state: Tensor


def answer_questions(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> Iterator[str]:
    """Answer questions greedily after the last block, one text per question, in their order.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        questions: texts or chats.
        templates: how a prompt is written; the ones that the adapter was trained with.
        num_blocks: blocks after each prompt; the adapter's own if not given.
        max_new_tokens: tokens of an answer at most, EOS included.
        batch_size: questions answered at a time; it does not change the answers.

    Raises:
        ValueError: the model has no active RIM adapter, a number is out of range, or a question leaves no room for its
            answer in the base's positions.
    """
    blocks, count = _check_call(model, num_blocks, max_new_tokens=max_new_tokens, batch_size=batch_size)
    prompts = tokenize_prompts(questions, tokenizer, templates)
    _check_room(model, prompts, memory=count * blocks.length, max_new_tokens=max_new_tokens)
    model.eval()
    for start in range(0, len(prompts), batch_size):
        rows = build_layout(
            [Sample(prompt, []) for prompt in prompts[start : start + batch_size]],
            blocks,
            pad_id=_pad_id(tokenizer),
            padding_side="left",
        )
        input_ids = rows.input_ids.to(model.device)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=rows.attention_mask.to(model.device),
            num_blocks=count,
            max_new_tokens=max_new_tokens,
            **_PLAIN_GREEDY,
            pad_token_id=_pad_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )
        for row in output[:, input_ids.shape[1] :].tolist():
            yield _text(tokenizer, row)


def read_blocks(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
) -> list[list[Readout]]:
    """Decode the readout of every block of every question, greedily and side by side.

    All readouts grow by one token per forward pass over the training layout, so that each block sees exactly what it
    sees in training and in ``generate(num_blocks=k)``.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        questions: texts or chats; they are one batch.
        templates: how a prompt is written.
        num_blocks: blocks after each prompt, at least 1; the adapter's own if not given.
        max_new_tokens: tokens of a readout at most, EOS included.

    Returns:
        For each question its readouts, block 1 first.

    Raises:
        ValueError: the model has no active RIM adapter, the base cannot run branching rows, a number is out of range,
            or a question leaves no room for its answer in the base's positions.
    """
    blocks, count = _check_call(model, num_blocks, max_new_tokens=max_new_tokens)
    if count < 1:
        raise ValueError(f"num_blocks: reading blocks out needs at least one, got {count}. Leave it out.")
    check_architecture(model.get_base_model())
    model.eval()
    prompts = tokenize_prompts(questions, tokenizer, templates)
    _check_room(model, prompts, memory=count * blocks.length, max_new_tokens=max_new_tokens)
    tokens: list[list[list[int]]] = [[[] for _ in range(count)] for _ in prompts]
    log_probs: list[list[list[float]]] = [[[] for _ in range(count)] for _ in prompts]
    hidden = torch.empty(0)
    for step in range(max_new_tokens):
        growing = _unfinished(tokens, tokenizer.eos_token_id)
        if not growing:
            break
        samples = [Sample(prompt, readouts) for prompt, readouts in zip(prompts, tokens, strict=True)]
        layout = build_layout(samples, blocks, pad_id=_pad_id(tokenizer))
        scores, states = _forward(model, layout, tokens, growing, with_states=step == 0)
        if step == 0:
            hidden = states
        best = scores.max(dim=-1)
        for (row, block), token, log_prob in zip(growing, best.indices.tolist(), best.values.tolist(), strict=True):
            tokens[row][block].append(token)
            log_probs[row][block].append(log_prob)
    return [
        [
            Readout(k, _text(tokenizer, ids), ids, token_log_probs=scores, hidden_state=state)
            for k, (ids, scores, state) in enumerate(zip(*parts, strict=True), start=1)
        ]
        for parts in zip(tokens, log_probs, hidden, strict=True)
    ]


def _unfinished(tokens: list[list[list[int]]], end: int | None) -> list[tuple[int, int]]:
    """List row and block, from 0, of the readouts that have not reached EOS."""
    return [
        (row, block)
        for row, readouts in enumerate(tokens)
        for block, readout in enumerate(readouts)
        if readout[-1:] != [end]
    ]


# Greedy search and nothing else, whatever generation settings the base came with: what `read_blocks` does too.
_PLAIN_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}


def _check_call(model: PeftModel, num_blocks: int | None, **counts: int) -> tuple[BlockTokens, int]:
    """Return the adapter's block tokens and the number of blocks to use."""
    config = active_config(model)
    count = config.num_blocks if num_blocks is None else num_blocks
    for name, value, least in (("num_blocks", count, 0), *((name, value, 1) for name, value in counts.items())):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: must be an integer of at least {least}, got {value!r}.")
    return config.block_tokens, count


def _check_room(model: PeftModel, prompts: Sequence[Sequence[int]], *, memory: int, max_new_tokens: int) -> None:
    """Refuse prompts whose blocks and answer do not fit into the base's positions."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if room is not None and len(prompt) + memory + max_new_tokens > room:
            raise ValueError(
                f"questions[{index}]: prompt ({len(prompt)} tokens), blocks ({memory}) and answer "
                f"({max_new_tokens}) must fit into the base's {room} positions. Leave the question out, or lower "
                "max_new_tokens or num_blocks."
            )


@torch.no_grad()
def _forward(
    model: PeftModel,
    layout: Layout,
    tokens: list[list[list[int]]],
    growing: list[tuple[int, int]],
    *,
    with_states: bool,
) -> tuple[Tensor, Tensor]:
    """Return the next token's log-probabilities (N, V) of N growing readouts, and the blocks' states (B, K, H)."""
    base: Any = model.get_base_model()
    layout = Layout(**{name: tensor.to(model.device) for name, tensor in layout.to_dict().items()})
    rows = torch.tensor([row for row, _ in growing], device=model.device)
    # A readout lies directly behind its block's end, so its last token does as many places further.
    last = torch.stack([layout.block_ends[row, block] + len(tokens[row][block]) for row, block in growing])
    # Logits at these places alone; one set of places serves all rows.
    places, column = last.unique(return_inverse=True)
    output = model(
        input_ids=layout.input_ids,
        attention_mask=attention_masks(base.config, layout, dtype=base.get_output_embeddings().weight.dtype),
        position_ids=layout.position_ids,
        logits_to_keep=places,
        output_hidden_states=with_states,
        use_cache=False,
    )
    scores = output.logits[rows, column].float().log_softmax(dim=-1)
    if not with_states:
        return scores, torch.empty(0)
    last_layer = output.hidden_states[-1]
    ends = layout.block_ends[:, :, None].expand(-1, -1, last_layer.shape[-1])
    return scores, last_layer.gather(1, ends).float().cpu()


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with; padding is masked, so that EOS serves where the tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
