"""One forward pass on a cache, and where answers have their room in a row."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from rim_peft.sequence import BlockTokens, Layout, Sample, attention_masks, build_layout
from rim_peft.tuner.bases import mask_dtype


@dataclass(frozen=True)
class AnswerRows:
    """A batch of B rows, laid out as in training but with room in place of R readouts of T tokens.

    Training computes a row at once, decoding first the trunk and then one token of every readout at a time. A prompt
    of one token, two blocks (``M = 1``) and three tokens each; the last token of a readout needs no room, since nothing
    follows it::

        places   x b m e . . b m e . .
                 0 1 2 3 4 5 6 7 8 9 10
        order    0 1 2 3 6 7 8, then 4 9, then 5 10

    So positions and masks are those of training, at other columns: column ``c`` of a cache holds place ``order[c]``.

    Attributes:
        layout: the (B, L) rows, padded on the left, so that all have the same places.
        ends: (R,) place of the block's end (without blocks, of the prompt's) before every readout.
        order: (L,) places in the order in which they are computed.
        num_steps: passes after the trunk's, ``T - 1``.
    """

    layout: Layout
    ends: Tensor
    order: Tensor
    num_steps: int

    @property
    def trunk(self) -> Tensor:
        """(S,) places of the trunk."""
        return self.order[: len(self.order) - len(self.ends) * self.num_steps]

    @property
    def trunk_ids(self) -> Tensor:
        """(B, S) token ids of the trunk."""
        return self.layout.input_ids[:, self.trunk]

    @property
    def end_columns(self) -> Tensor:
        """(R,) the ends as columns of the trunk."""
        return self.ends - self.num_steps * torch.arange(len(self.ends), device=self.ends.device)

    def answers(self, step: int) -> Tensor:
        """(R,) places of every answer's token ``step``, from 0."""
        return self.ends + step + 1

    def to(self, device: torch.device | str) -> AnswerRows:
        """Copy to a device."""
        return replace(self, layout=self.layout.to(device), ends=self.ends.to(device), order=self.order.to(device))

    def select(self, rows: Tensor) -> AnswerRows:
        """Keep some of the rows, given by their numbers."""
        kept = {name: tensor[rows] for name, tensor in self.layout.to_dict().items()}
        return replace(self, layout=Layout(**kept))


def lay_out_answers(
    prompts: Sequence[Sequence[int]],
    blocks: BlockTokens,
    *,
    num_blocks: int,
    every_block: bool,
    max_new_tokens: int,
    pad_id: int,
    prompt_multiple: int = 1,
) -> AnswerRows:
    """Lay prompts out with their blocks, and with room for an answer after every block or after the last.

    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> rows = lay_out_answers([[5]], blocks, num_blocks=2, every_block=True, max_new_tokens=3, pad_id=0)
    >>> rows.order.tolist(), rows.ends.tolist(), rows.end_columns.tolist()
    ([0, 1, 2, 3, 6, 7, 8, 4, 9, 5, 10], [3, 8], [3, 6])

    Args:
        prompts: token ids of at least one prompt.
        blocks: the ids of the block tokens.
        num_blocks: blocks after each prompt, at least 1 for ``every_block``.
        every_block: room after every block, else after the last alone.
        max_new_tokens: tokens of an answer, T.
        pad_id: id of padding and of the room.
        prompt_multiple: prompts are padded to a multiple of this many tokens.
    """
    room = [pad_id] * (max_new_tokens - 1)
    if every_block:
        samples = [Sample(prompt, [room] * num_blocks) for prompt in prompts]
    else:
        samples = [Sample([*prompt, *blocks.ids(num_blocks), *room], []) for prompt in prompts]
    longest = -(-max(len(prompt) for prompt in prompts) // prompt_multiple) * prompt_multiple
    num_readouts = num_blocks if every_block else 1
    length = longest + num_blocks * blocks.length + num_readouts * len(room)
    layout = build_layout(samples, blocks, pad_id=pad_id, padding_side="left", min_length=length)
    ends = layout.block_ends[0] if every_block else torch.tensor([length - 1 - len(room)])
    answers = ends + torch.arange(1, max_new_tokens)[:, None]
    is_trunk = torch.ones(length, dtype=torch.bool)
    is_trunk[answers] = False
    order = torch.cat([is_trunk.nonzero()[:, 0], answers.flatten()])
    return AnswerRows(layout, ends, order, num_steps=len(room))


# The last layer's states alone, where transformers can choose; 5.17 cannot, 5.23 can.
_LAST_LAYER: Any = [-1] if Version(transformers.__version__) >= Version("5.23") else True


class Prediction(NamedTuple):
    """The likeliest next token of R answers of B rows.

    Attributes:
        tokens: (B, R) int64.
        log_probs: (B, R) float32, natural logarithms.
        states: (B, R, H) float32, what the head reads at blocks' ends; empty behind other tokens.
    """

    tokens: Tensor
    log_probs: Tensor
    states: Tensor


class Passes:
    """Passes on a cache that grows, as the base's own ``generate`` runs them where no answers branch off."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def new_cache(self, rows: AnswerRows) -> Cache:
        """Return a cache for some rows, without sliding layers: these drop keys by index, not by position."""
        return DynamicCache()

    def read_trunk(self, rows: AnswerRows, cache: Cache) -> Prediction:
        """Compute the trunk, and predict the first token of every answer."""
        places = (rows.trunk, rows.trunk)
        # Numbers, not a tensor: a base spread over devices moves tensors to its first one, its states lie on the last.
        ends = rows.end_columns.tolist()
        return predict(self.base, rows.layout, cache, rows.trunk_ids, places, branches=False, ends=ends)

    def extend(self, rows: AnswerRows, cache: Cache, tokens: Tensor, step: int) -> Prediction:
        """Compute token ``step`` (from 0) of every answer, (B, R), and predict the one behind it."""
        places = (rows.answers(step), rows.order[: len(rows.trunk) + (step + 1) * len(rows.ends)])
        return predict(self.base, rows.layout, cache, tokens, places, branches=len(rows.ends) > 1)


class CompiledPasses:
    """Passes compiled for caches of fixed length, which are used again and again; with CUDA graphs on a GPU.

    All places of a row are keys from the start. The mask hides those that are not computed yet, as it hides all that
    comes later.

    Torch checks before every call that nothing in the model has changed, which takes longer than a GPU takes for a
    short trunk. It is told not to; what may change, the adapter and whether it is merged, is checked here.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        options: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            "triton.cudagraphs": base.device.type == "cuda",
        }
        own = _copied(_predict_in)
        self._predict = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        weakref.finalize(self, torch._dynamo.reset_code, own.__code__).atexit = False
        # torch's own limit, 8 versions of a function, is meant for shapes that keep changing.
        self._many_versions = torch._dynamo.config.patch(recompile_limit=256)
        self._caches: dict[int, Cache] = {}

    def new_cache(self, rows: AnswerRows) -> Cache:
        """Return the cache for rows of this length; what it holds is not read."""
        length = len(rows.order)
        if length not in self._caches:
            new_layer: Any = partial(StaticLayer, length)
            cache = self._caches[length] = Cache(layer_class_to_replicate=new_layer)
            # The first pass is not compiled: it makes the layers, whose addresses stay, and transformers' hooks.
            places = (rows.trunk, rows.order)
            predict(self.base, rows.layout, cache, rows.trunk_ids, places, branches=True, ends=rows.end_columns)
        return self._caches[length]

    def read_trunk(self, rows: AnswerRows, cache: Cache) -> Prediction:
        """Compute the trunk, and predict the first token of every answer."""
        return self._run(rows, cache, rows.trunk_ids, rows.trunk, ends=rows.end_columns)

    def extend(self, rows: AnswerRows, cache: Cache, tokens: Tensor, step: int) -> Prediction:
        """Compute token ``step`` (from 0) of every answer, (B, R), and predict the one behind it."""
        return self._run(rows, cache, tokens, rows.answers(step))

    def _run(self, rows: AnswerRows, cache: Cache, ids: Tensor, queries: Tensor, **options: Any) -> Prediction:
        memory = self.base.get_input_embeddings()
        state = f"adapter {memory.current_adapter}, merged {memory.merged_adapters}"
        places = (queries, rows.order)
        with self._many_versions:
            torch.compiler.cudagraph_mark_step_begin()
            found = self._predict(state, self.base, rows.layout, cache, ids, places, branches=True, **options)
            return Prediction(*(tensor.clone() for tensor in found))  # the next pass writes over a graph's outputs


def _predict_in(state: str, *inputs: Any, **options: Any) -> Prediction:
    """Call ``predict``; ``state`` says what its compiled versions may not share, since torch checks what is read."""
    if not state:
        raise ValueError("state: must not be empty, got ''.")
    return predict(*inputs, **options)


def _copied(function: Callable[..., Any]) -> FunctionType:
    """Copy a function with its code, by which torch keeps what it compiled: it can then be dropped for one decoder."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def predict(
    base: Any,
    layout: Layout,
    cache: Cache,
    token_ids: Tensor,
    places: tuple[Tensor, Tensor],
    *,
    branches: bool,
    ends: Tensor | list[int] | None = None,
) -> Prediction:
    """Run a base on some places of its rows.

    Args:
        base: a causal language model with a RIM adapter.
        layout: the (B, L) rows.
        cache: what is computed already; it is emptied before a trunk.
        token_ids: (B, Q) what stands at the places to compute.
        places: the (Q,) places to compute, and the (C,) places in the cache's columns, with them.
        branches: False where places lie in the cache as in a sequence, so that a mask of the padding will do.
        ends: for a trunk, its (R,) columns that predict; all Q if not given.
    """
    queries, keys = places
    if branches:
        mask = attention_masks(base.config, layout, dtype=mask_dtype(base), places=places)
    else:
        mask = layout.attention_mask[:, keys]
    if ends is not None:
        cache.reset()
    output = base(
        input_ids=token_ids,
        attention_mask=mask,
        position_ids=layout.position_ids[:, queries],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=0 if ends is None else ends,
        output_hidden_states=False if ends is None else _LAST_LAYER,
    )
    logits = output.logits.float()
    tokens = logits.argmax(-1)
    log_probs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    states = logits.new_empty(0) if ends is None else output.hidden_states[-1][:, ends].float()
    return Prediction(tokens, log_probs, states)
