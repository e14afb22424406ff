"""One forward pass of decoding: places of rows, behind those that a cache holds, and the tokens that follow them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from rim_peft.inference.rows import AnswerRows
from rim_peft.sequence import Layout, attention_masks
from rim_peft.tuner.compatibility import mask_dtype

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
