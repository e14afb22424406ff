"""Run models with blocks under EleutherAI's lm-evaluation-harness (the extra ``lm-eval``).

The harness joins context and continuation before it calls a model. Here the blocks come between the two, as they do
between prompt and readout in training::

    log-likelihood   context  m_1 ... m_K  continuation      scored: the continuation, from the last block's end on
    generation       context  m_1 ... m_K  answer            by the model's own generate

In a chat, a task's ``gen_prefix`` is the begun answer: it comes after the blocks, as training's answers do.

Batching, caching of one-token continuations and scores are the harness's own code.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Templates
from rim_peft.data.special_tokens import is_guarded
from rim_peft.data.tokenization import Encoder, check_vocabulary
from rim_peft.inference.greedy import own_ends
from rim_peft.tuner.config import active_config
from rim_peft.values import check_integer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        "lm-eval: must be installed for the evaluation harness, and is not. Install it with: pip install "
        "'rim-peft[lm-eval]'"
    ) from error

logger = logging.getLogger(__name__)

_BEGUN = "\U0010fffc"
"""A private-use character between a chat's prompt and its begun answer, while the harness carries them as one text."""

Request = tuple[Any, list[int], list[int]]
"""A request of the harness: its texts, the token ids of the context, and those of the continuation."""


class BlockLM(HFLM):
    """The harness's model for a base with a RIM adapter.

    Context and continuation are tokenised separately, because blocks come between them: white space at the end of a
    context stays before the blocks. Without blocks (``num_blocks=0``) everything is as in ``HFLM``.

    As in ``HFLM``, an empty context becomes the prefix token (BOS, or EOS if there is none), also for generation.

    Contexts that are too long lose tokens on the left, as in ``HFLM``, with a warning; blocks and continuations are
    never cut.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_blocks: int | None = None,
        allow_special_tokens: bool = False,
        **options: Any,
    ) -> None:
        """Wrap a model.

        Args:
            model: a model with an active RIM adapter. Its embeddings keep their size, whatever the size of the
                tokenizer.
            num_blocks: blocks after each context; by default the adapter's own number.
            allow_special_tokens: read special tokens spelled in contexts and continuations as special tokens rather
                than text; the chat template's always are.
            options: of ``HFLM``, such as ``batch_size`` and ``max_length``.

        Raises:
            ValueError: the model has no active RIM adapter, or ``num_blocks`` is not a valid number.
        """
        config = active_config(model)
        self.num_blocks = config.num_blocks if num_blocks is None else num_blocks
        check_integer("num_blocks", self.num_blocks, least=0)
        self.block_ids = config.block_tokens.ids(self.num_blocks)
        self._first_memory_id = config.block_tokens.begin
        self._encoder = Encoder(tokenizer, Templates(allow_special_tokens=allow_special_tokens))
        self._asks_chats = False
        self._num_begun: list[int] = []
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, only without blocks: they have no prompt that blocks could follow.

        Raises:
            ValueError: there are blocks.
        """
        if self.block_ids:
            raise ValueError(
                "num_blocks: must be 0 for tasks that score whole texts (loglikelihood_rolling, as perplexity), since "
                f"these have no prompt for blocks to follow, got {self.num_blocks}. Set it to 0 (--num-blocks 0), or "
                "skip such tasks."
            )
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return scores

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat with the tokenizer's template; special tokens spelled in its messages stay text."""
        self._asks_chats = True  # all requests of one harness call are of the same kind
        if self.block_ids and not add_generation_prompt and chat_history[-1]["role"] == "assistant":
            *asked, last = chat_history
            begun = self._encoder.guard(last["content"])
            return self.apply_chat_template(asked) + _BEGUN + begun
        text: str = super().apply_chat_template(self._encoder.guard_chat(chat_history), add_generation_prompt)
        return text

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Tokenise a text; only the chat template's special tokens are read as such."""
        string, _, begun = string.partition(_BEGUN)
        if begun:
            prompt_ids = self.tok_encode(string, add_special_tokens, **kwargs)
            ids = [*prompt_ids, *self.tok_encode(begun, add_special_tokens=False)]
            return ids[-left_truncate_len:] if left_truncate_len else ids
        text = self._guard(string)
        if not is_guarded(text):
            plain: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
            return plain
        adds = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and text.startswith(str(self.tokenizer.decode(self.prefix_token_id))):
            adds = False
        ids = self._encoder.encode_guarded(text, begins=adds is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _guard(self, text: str) -> str:
        """Guard a task's text; a chat was already guarded before it was rendered."""
        return text if self._asks_chats else self._encoder.guard(text)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokenise prompts for generation: (B, S) ids and mask, padded on the left, with room left for the blocks.

        Raises:
            ValueError: blocks and answer leave no room for a prompt, or a prompt contains ids of memory tokens.
        """
        self._num_begun = [self._count_begun(string) for string in strings]
        if any(self._num_begun) or any(is_guarded(self._guard(string)) for string in strings):
            rows = {"input_ids": [self.tok_encode(string) for string in strings]}
            padded = self.tokenizer.pad(rows, padding_side=padding_side, return_tensors="pt")
            ids, mask = padded["input_ids"], padded["attention_mask"]
        else:
            ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        if left_truncate_len is not None:
            room = left_truncate_len - len(self.block_ids)
            if room < 1 + max(self._num_begun, default=0):
                raise ValueError(
                    f"max_gen_toks: blocks ({len(self.block_ids)} tokens) and answer "
                    f"({self.max_length - left_truncate_len}) must leave room for a prompt in max_length="
                    f"{self.max_length}. Lower max_gen_toks (--gen_kwargs), or num_blocks."
                )
            if ids.shape[1] > room:
                logger.warning("prompts of up to %d tokens are cut to %d, on the left", ids.shape[1], room)
            ids, mask = ids[:, -room:], mask[:, -room:]
        ids, mask = self._filled(ids, mask)
        self._check_ids(ids[mask.bool()].tolist())
        return ids, mask

    def _count_begun(self, context: str) -> int:
        """Return the number of tokens of a context's begun answer."""
        begun = context.partition(_BEGUN)[2]
        return len(self.tok_encode(begun, add_special_tokens=False)) if begun else 0

    def _filled(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Replace empty prompts among (B, S) by the prefix token, so that blocks can follow."""
        if ids.shape[1] == 0:
            ids, mask = ids.new_zeros(len(ids), 1, dtype=torch.long), mask.new_zeros(len(ids), 1, dtype=torch.long)
        is_empty = (mask == 0).all(1)
        ids[is_empty, -1], mask[is_empty, -1] = self.prefix_token_id, 1
        return ids, mask

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenise a context and its continuation separately, as training does with prompts and readouts."""
        if self._asks_chats:  # the template did not render the continuation
            continuation = self._encoder.guard(continuation)
        if not self.block_ids:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        prompt, _, begun = context.partition(_BEGUN)
        context_ids = self.tok_encode(prompt) or [self.prefix_token_id]
        if begun:
            begun_ids = self.tok_encode(begun, add_special_tokens=False)
            self._check_ids([*context_ids, *begun_ids])
            context_ids = [*context_ids, *self.block_ids, *begun_ids]
        return context_ids, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations after context and blocks; the harness sees the blocks as the context's last tokens."""
        laid_out = [(texts, self._with_blocks(context, end), end) for texts, context, end in requests]
        num_cut = sum(
            sum(map(len, self._parts(before))) + len(self.block_ids) > len(after)
            for (_, before, _), (_, after, _) in zip(requests, laid_out, strict=True)
        )
        if num_cut:
            logger.warning("%d of %d contexts are too long and lose tokens on the left", num_cut, len(requests))
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            laid_out, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        return scores

    def _with_blocks(self, context: list[int], continuation: list[int]) -> list[int]:
        """Put the blocks behind the context's prompt, whose first tokens are cut if they do not fit."""
        # The last token is not an input, since nothing is read out after it.
        prompt, begun = self._parts(context)
        room = self.max_length + 1 - len(self.block_ids) - len(begun) - len(continuation)
        if room < 1:
            raise ValueError(
                f"num_blocks: blocks ({len(self.block_ids)} tokens) and continuation "
                f"({len(begun) + len(continuation)}) must leave "
                f"room for a context in max_length={self.max_length}, got {self.num_blocks}. Lower it (--num-blocks)."
            )
        self._check_ids([*prompt, *begun, *continuation])
        return [*prompt[-room:], *self.block_ids, *begun]

    def _parts(self, context: list[int]) -> tuple[list[int], list[int]]:
        """Return a context's prompt and its begun answer, which blocks part."""
        start = next((place for place, token in enumerate(context) if token >= self._first_memory_id), len(context))
        end = start + len(self.block_ids)
        if not self.block_ids or context[start:end] != self.block_ids:
            return context, []
        return context[:start], context[end:]

    def _check_ids(self, ids: list[int]) -> None:
        check_vocabulary(ids, self.tokenizer, self._first_memory_id, where="tokenizer")

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Generate after context and blocks; EOS ends an answer even if the base's settings name none."""
        generation_kwargs.setdefault("eos_token_id", own_ends(self.model.get_base_model(), self.tokenizer))
        if any(self._num_begun):
            generation_kwargs["num_begun"] = self._num_begun
        output: Tensor = super()._model_generate(
            context, max_length, stop, num_blocks=self.num_blocks, **generation_kwargs
        )
        return output
