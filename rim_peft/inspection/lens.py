"""The likeliest tokens at every place of a row: after each token of each readout, and after each layer of the blocks.

The row is a training row: the prompt, the blocks, and the readouts as branches, in one forward pass. So what is read
is what training sees, and what decoding computes in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rim_peft.inspection.document import END, Candidate, LayerReading
from rim_peft.sequence import Layout, Sample, build_layout
from rim_peft.training.head import head_at
from rim_peft.tuner.bases import attention_masks, evaluation_mode, input_device, mask_dtype
from rim_peft.tuner.config import active_config
from rim_peft.tuner.layers import find_layers

_MOST_LOGITS = 1 << 26
"""Most logits held at a time, a quarter of a gigabyte."""


@dataclass(frozen=True)
class Row:
    """A question's row: prompt, blocks, and each block's readout as token ids."""

    model: PeftModel
    prompt: Sequence[int]
    readouts: Sequence[Sequence[int]]
    pad_id: int

    @property
    def base(self) -> Any:
        """The model under the adapter."""
        return self.model.get_base_model()

    def lay_out(self) -> Layout:
        """Return the row as training lays it out, on the model's device."""
        blocks = active_config(self.model).block_tokens
        layout = build_layout([Sample(self.prompt, self.readouts)], blocks, pad_id=self.pad_id)
        return layout.to(input_device(self.base))

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Run the row, and return the (N, V) logits that predict the tokens of all readouts, in their order."""
        layout = self.lay_out()
        mask = attention_masks(self.base.config, layout, dtype=mask_dtype(self.base))
        with evaluation_mode(self.base), head_at(self.base, layout.labels().places):
            output = self.base(
                input_ids=layout.input_ids, attention_mask=mask, position_ids=layout.position_ids, use_cache=False
            )
        return _finite(output.logits[0].float())


def read_tokens(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, num_best: int
) -> list[tuple[tuple[Candidate, ...], ...]]:
    """Return for each readout and each of its tokens the token itself, then the ``num_best`` likeliest others."""
    logits = row.logits()
    tokens: list[tuple[Candidate, ...]] = []
    for token_id, scores in zip((t for readout in row.readouts for t in readout), logits, strict=True):
        chances = scores.softmax(-1)
        others = [other for other in chances.topk(num_best + 1).indices.tolist() if other != token_id][:num_best]
        tokens.append(tuple(_candidate(tokenizer, chances, index) for index in (token_id, *others)))
    ends = [sum(map(len, row.readouts[: k + 1])) for k in range(len(row.readouts))]
    return [tuple(tokens[end - len(readout) : end]) for end, readout in zip(ends, row.readouts, strict=True)]


@torch.no_grad()
def read_layers(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, first_layer: int, num_best: int
) -> tuple[LayerReading, ...]:
    """Return what the head makes of each layer's states at the blocks' ends and memory tokens.

    Args:
        row: the question's row.
        first_layer: the first layer to read, from 1.
        num_best: likeliest tokens of each reading.

    Raises:
        ValueError: the base's layers are not transformers' usual ones, or what follows the last layer is more than
            modules in a row.
    """
    block_size = active_config(row.model).block_size
    places = [(END, 0), *((f"memory {j}", block_size + 1 - j) for j in range(1, block_size + 1))]
    ends = row.lay_out().block_ends[0]
    columns = torch.cat([ends - back for _, back in places])
    states = _final_states(row, columns)[first_layer - 1 :]
    size = max(1, _MOST_LOGITS // row.base.config.get_text_config().vocab_size)
    readings = []
    for index, chances in enumerate(
        scores for part in states.flatten(0, 1).split(size) for scores in _head(row, part).softmax(-1)
    ):
        layer, column = divmod(index, len(columns))
        place, block = places[column // len(ends)][0], column % len(ends) + 1
        best = tuple(_candidate(tokenizer, chances, token) for token in chances.topk(num_best).indices.tolist())
        answer_probability = float(chances[row.readouts[-1][0]])
        readings.append(LayerReading(1, block, place, first_layer + layer, best, answer_probability))
    order = [place for place, _ in places]
    return tuple(sorted(readings, key=lambda reading: (order.index(reading.place), reading.block)))


def _final_states(row: Row, columns: Tensor) -> Tensor:
    """Run the row, and return the head's input (L, P, H) if each layer were the last, at P of the row's columns."""
    decoder, layers = find_layers(row.base, options="the map of layers")
    found: list[Tensor] = []
    tail: list[nn.Module] = []  # what the decoder calls after its last layer: usually one norm
    result: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        found.append(state[0, columns.to(state.device)])

    def note(module: nn.Module, _args: Any) -> None:
        if len(found) == len(layers):
            tail.append(module)

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        result.append(output.last_hidden_state[0, columns.to(output.last_hidden_state.device)])

    others = [child for child in decoder.children() if not set(layers) & set(child.children())]
    with _hooks() as hooks:
        hooks += [layer.register_forward_hook(keep) for layer in layers]
        hooks += [child.register_forward_pre_hook(note) for child in others]
        hooks.append(decoder.register_forward_hook(end))
        row.logits()
    device = found[-1].device
    states = torch.stack([state.to(device) for state in found])
    for module in tail:
        states = module(states)
    if states[-1].shape != result[0].shape or not torch.allclose(
        states[-1], result[0].to(device), rtol=1e-2, atol=1e-3
    ):
        raise ValueError(
            f"the map of layers: needs a base whose last layer is followed by modules in a row, got "
            f"{type(row.base).__name__}. Use another base."
        )
    return states


def _head(row: Row, states: Tensor) -> Tensor:
    """Return the (P, V) logits of the model's own head, with its scales and caps, on (P, H) final states."""

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.last_hidden_state = states[None]
        return output

    token = torch.tensor([[row.prompt[0]]], device=input_device(row.base))
    with evaluation_mode(row.base), _hooks() as hooks:
        hooks.append(row.base.base_model.register_forward_hook(replace))
        return _finite(row.base(input_ids=token, use_cache=False).logits[0].float())


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    """Remove the hooks that are put into the list on exit."""
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


def _finite(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise ValueError("model: its logits must be finite, got infinite ones or NaN. Check the adapter's training.")
    return logits


def _candidate(tokenizer: PreTrainedTokenizerBase, chances: Tensor, token_id: int) -> Candidate:
    return Candidate(token_id, str(tokenizer.decode([token_id])), float(chances[token_id]))
