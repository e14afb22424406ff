"""Forward passes with a cache, and the layout of rows with room for answers."""

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

from rim_peft.sequence import BlockTokens, Layout, Sample, build_layout
from rim_peft.tuner.bases import CACHE, attention_masks, mask_dtype


@dataclass(frozen=True)
class AnswerRows:
    """A batch of B rows, laid out as in training but with room for R readouts of T tokens.

    Training computes a row at once. Decoding computes the trunk first, and then one token of every readout at a time.
    The example has a prompt of one token, two blocks (``M = 1``) and three tokens per readout, the last of which needs
    no room, since nothing follows it::

        places   x b m e . . b m e . .
                 0 1 2 3 4 5 6 7 8 9 10
        order    0 1 2 3 6 7 8, then 4 9, then 5 10

    Positions and masks are those of training, in other columns: column ``c`` of a cache contains place ``order[c]``.

    Attributes:
        layout: the (B, L) rows, padded on the left, so that all have the same places.
        ends: (R,) place of the block's end before each readout; without blocks, of the prompt's end.
        order: (L,) places in the order of their computation.
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
        """(R,) columns of the ends in the trunk."""
        return self.ends - self.num_steps * torch.arange(len(self.ends), device=self.ends.device)

    def answers(self, step: int) -> Tensor:
        """(R,) places of every answer's token ``step``, from 0."""
        return self.ends + step + 1

    def to(self, device: torch.device | str) -> AnswerRows:
        """Copy to a device."""
        return replace(self, layout=self.layout.to(device), ends=self.ends.to(device), order=self.order.to(device))

    def select(self, rows: Tensor) -> AnswerRows:
        """Keep the rows with these indices."""
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
    """Lay out prompts with their blocks, and with room for an answer after every block or only after the last.

    A prompt that already holds blocks, with a begun answer behind them, gets no more.

    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> rows = lay_out_answers([[5]], blocks, num_blocks=2, every_block=True, max_new_tokens=3, pad_id=0)
    >>> rows.order.tolist(), rows.ends.tolist(), rows.end_columns.tolist()
    ([0, 1, 2, 3, 6, 7, 8, 4, 9, 5, 10], [3, 8], [3, 6])

    Args:
        prompts: token ids of at least one prompt.
        num_blocks: blocks after each prompt; at least 1 with ``every_block``.
        every_block: leave room after every block, not only after the last.
        max_new_tokens: tokens of an answer, T.
        pad_id: id for padding and for the room.
        prompt_multiple: prompts are padded to a multiple of this many tokens.
    """
    room = [pad_id] * (max_new_tokens - 1)
    if every_block:
        samples = [Sample(prompt, [room] * num_blocks) for prompt in prompts]
    else:
        memory = blocks.ids(num_blocks)
        trunks = [prompt if holds_memory(prompt, blocks.begin) else [*prompt, *memory] for prompt in prompts]
        samples = [Sample([*trunk, *room], []) for trunk in trunks]
        prompts = [trunk[len(memory) :] for trunk in trunks]  # as long as they are without blocks
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


def holds_memory(prompt: Sequence[int], first_memory_id: int) -> bool:
    """Tell whether a prompt holds memory tokens."""
    return max(prompt, default=0) >= first_memory_id


# Only the last layer's states, if transformers supports the choice: 5.17 does not, 5.23 does.
_LAST_LAYER: Any = [-1] if Version(transformers.__version__) >= Version("5.23") else True


class Prediction(NamedTuple):
    """The most likely next tokens of R answers of B rows.

    Attributes:
        tokens: (B, R) int64.
        log_probs: (B, R) float32, natural logarithms.
        states: (B, R, H) float32, the head's input at the blocks' ends; empty after other tokens.
    """

    tokens: Tensor
    log_probs: Tensor
    states: Tensor


class Passes:
    """Passes with a growing cache; without branching answers, they equal those of the base's own ``generate``."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def new_cache(self, rows: AnswerRows) -> Cache:
        """Return an empty cache."""
        # Without sliding layers, because these drop keys by index, not by position.
        return DynamicCache()

    def read_trunk(self, rows: AnswerRows, cache: Cache) -> Prediction:
        """Compute the trunk, and predict the first token of every answer."""
        places = (rows.trunk, rows.trunk)
        # A list, not a tensor: a base spread over devices moves tensors to its first, but its states are on the last.
        ends = rows.end_columns.tolist()
        return predict(self.base, rows.layout, cache, rows.trunk_ids, places, branches=False, ends=ends)

    def finish_trunk(self, rows: AnswerRows, cache: Cache, start: int) -> Prediction:
        """Compute the trunk from column ``start`` on, behind cached columns, and predict the first token of answers."""
        places = (rows.trunk[start:], rows.trunk)
        ends = [end - start for end in rows.end_columns.tolist()]
        ids = rows.trunk_ids[:, start:]
        return predict(self.base, rows.layout, cache, ids, places, branches=False, ends=ends, resets=False)

    def extend(self, rows: AnswerRows, cache: Cache, tokens: Tensor, step: int) -> Prediction:
        """Compute token ``step`` (from 0) of every answer, (B, R), and predict the next one."""
        places = (rows.answers(step), rows.order[: len(rows.trunk) + (step + 1) * len(rows.ends)])
        return predict(self.base, rows.layout, cache, tokens, places, branches=len(rows.ends) > 1)


class PromptCache:
    """Keys and values of a conversation's last prompt, for the next one: of plain text alone, never of blocks.

    Attributes:
        cache: the keys and values.
        ids: tokens of the cache's first columns; those behind them are unknown.
        num_used: how many tokens of the last prompt were there already.
    """

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.ids: list[int] = []
        self.num_used = 0

    def keep_prefix(self, prompt: Sequence[int]) -> int:
        """Drop all but the longest common prefix with a prompt; return its length.

        The prompt's tokens count as unknown until :meth:`keep` is called, so an interrupted pass leaves no wrong cache.
        """
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        common = next((place for place, (kept, new) in pairs if kept != new), min(len(self.ids), len(prompt)))
        self.ids = self.ids[:common]
        self.crop()
        self.ids = []
        self.num_used = common
        return common

    def keep(self, prompt: Sequence[int]) -> None:
        """Note the tokens of the first columns."""
        self.ids = list(prompt)

    def crop(self) -> None:
        """Drop all columns behind the known tokens."""
        surplus = int(self.cache.get_seq_length()) - len(self.ids)
        if not self.ids:
            self.cache = DynamicCache()
        elif surplus > 0:
            self.cache.crop(-surplus)


class CompiledPasses:
    """Compiled passes for caches of fixed length, which are reused; with CUDA graphs on a GPU.

    All places of a row are keys from the start. The mask hides those that are not computed yet, like all later ones.
    """

    # Torch checks before every call that nothing in the model has changed, which takes longer than a short trunk takes
    # on a GPU. So this check is off; _run checks what may change: the adapter, and whether it is merged.

    def __init__(self, base: Any) -> None:
        self.base = base
        options: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            "triton.cudagraphs": base.device.type == "cuda",
        }
        own = _copied(_predict_in)
        self._predict = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        weakref.finalize(self, torch._dynamo.reset_code, own.__code__).atexit = False
        # torch's own limit of 8 versions of a function is meant for shapes that keep changing.
        self._many_versions = torch._dynamo.config.patch(recompile_limit=256)
        self._caches: dict[int, Cache] = {}

    def new_cache(self, rows: AnswerRows) -> Cache:
        """Return the cache for rows of this length; its old content is not read."""
        length = len(rows.order)
        if length not in self._caches:
            new_layer: Any = partial(StaticLayer, length)
            cache = self._caches[length] = Cache(layer_class_to_replicate=new_layer)
            # The first pass is not compiled: it creates the layers, whose addresses stay, and transformers' hooks.
            places = (rows.trunk, rows.order)
            predict(self.base, rows.layout, cache, rows.trunk_ids, places, branches=True, ends=rows.end_columns)
        return self._caches[length]

    def read_trunk(self, rows: AnswerRows, cache: Cache) -> Prediction:
        """Compute the trunk, and predict the first token of every answer."""
        return self._run(rows, cache, rows.trunk_ids, rows.trunk, ends=rows.end_columns)

    def extend(self, rows: AnswerRows, cache: Cache, tokens: Tensor, step: int) -> Prediction:
        """Compute token ``step`` (from 0) of every answer, (B, R), and predict the next one."""
        return self._run(rows, cache, tokens, rows.answers(step))

    def _run(self, rows: AnswerRows, cache: Cache, ids: Tensor, queries: Tensor, **options: Any) -> Prediction:
        memory = self.base.get_input_embeddings()
        state = f"adapter {memory.current_adapter}, merged {memory.merged_adapters}"
        places = (queries, rows.order)
        with self._many_versions:
            torch.compiler.cudagraph_mark_step_begin()
            found = self._predict(state, self.base, rows.layout, cache, ids, places, branches=True, **options)
            return Prediction(*(tensor.clone() for tensor in found))  # the next pass overwrites a graph's outputs


def _predict_in(state: str, *inputs: Any, **options: Any) -> Prediction:
    """Call ``predict``; each ``state`` gets its own compiled version."""
    if not state:  # torch adds a guard on the value because it is read here
        raise ValueError("state: must not be empty, got ''.")
    return predict(*inputs, **options)


def _copied(function: Callable[..., Any]) -> FunctionType:
    """Copy a function and its code, by which torch stores compiled versions, so that they can be dropped separately."""
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
    resets: bool = True,
) -> Prediction:
    """Run a base on places of its rows.

    Args:
        layout: the (B, L) rows.
        token_ids: (B, Q) tokens at the places to compute.
        places: the (Q,) places to compute, and the (C,) places in the cache's columns, including the former.
        branches: False if places are cached in sequence order, so that a padding mask is enough.
        ends: for a trunk, the (R,) columns that predict; all Q by default.
        resets: empty the cache before a trunk.
    """
    queries, keys = places
    if branches:
        mask = attention_masks(base.config, layout, dtype=mask_dtype(base), places=places)
    else:
        mask = layout.attention_mask[:, keys]
    if ends is not None and resets:
        cache.reset()
    output = base(
        input_ids=token_ids,
        attention_mask=mask,
        position_ids=layout.position_ids[:, queries],
        use_cache=True,
        logits_to_keep=0 if ends is None else ends,
        output_hidden_states=False if ends is None else _LAST_LAYER,
        **{CACHE: cache},
    )
    logits = output.logits.float()
    tokens = logits.argmax(-1)
    log_probs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    states = logits.new_empty(0) if ends is None else output.hidden_states[-1][:, ends].float()
    return Prediction(tokens, log_probs, states)
