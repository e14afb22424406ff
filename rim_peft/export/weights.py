"""The weights of an export: its options, a plain base, merged LoRA, rows for memory tokens."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rim_peft.export.checking import Expected, expect
from rim_peft.export.folder import Prompts
from rim_peft.tuner.bases import commit_of
from rim_peft.tuner.config import active_config
from rim_peft.tuner.tensors import not_finite


def memory_rows(model: PeftModel) -> Tensor:
    """Return the active adapter's memory rows, (3, H) float32, in the scale of the base's embedding matrix.

    Raises:
        ValueError: there is no active RIM adapter, or no plain checkpoint can express it.
    """
    config = active_config(model)
    if config.num_blocks == 0:
        raise ValueError(
            "num_blocks: must be at least 1 for memory rows, got 0: the adapter has no blocks. Use format merged."
        )
    if config.changes_layers:
        raise ValueError(
            f"adapter: must be one whose blocks are ordinary input tokens, got {config.describe_variants()}: a plain "
            "checkpoint has no place for what happens at its layers. Serve it with this package, or train without."
        )
    tuner: Any = model.base_model
    rows: Tensor = tuner.memory.rows(str(model.active_adapter))
    return rows.detach().float().cpu().clone()


def quantization_of(model: PeftModel) -> str | None:
    """Return how a model's base is quantised (``nf4``, ``llm_int8``, ...); None if it is not."""
    quantizer = getattr(model.get_base_model(), "hf_quantizer", None)
    if quantizer is None:
        return None
    config = quantizer.quantization_config
    if hasattr(config, "quantization_method"):
        return str(config.quantization_method())
    return str(getattr(config.quant_method, "value", config.quant_method))


def dequantized(model: PeftModel) -> PeftModel:
    """Return an adapter on its base with dequantised weights. The model is consumed by this call.

    The weights are the values of the quantised ones, which the adapter was trained on, not the original weights.

    Raises:
        ValueError: the quantisation cannot be undone.
    """
    method = quantization_of(model)
    if method is None:
        return model
    name = str(model.active_adapter)
    config, state = model.peft_config[name], adapter_state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: Any = model.unload()
        try:
            base = base.dequantize()
        except NotImplementedError as error:  # how transformers reports weights that it cannot dequantise
            raise ValueError(
                f"base: must not be quantised, or by bitsandbytes (nf4, int8), got {method}, which cannot be undone "
                "here. Name the base's plain weights (--base)."
            ) from error
    return attached(base, config, state)


def on_stored_base(model: PeftModel) -> PeftModel:
    """Return an adapter on its base as it is stored, in float32. The model is consumed by this call.

    Engines load that base, not the one with rounded or quantised weights that the adapter may have been trained on.

    Raises:
        ValueError: the stored weights themselves are quantised.
    """
    base: Any = model.get_base_model()
    if quantization_of(model) is None and base.dtype == torch.float32:
        return model
    config, state = model.peft_config[str(model.active_adapter)], adapter_state(model)
    name, revision = stored_at(base), commit_of(base) or "main"
    stored = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32, trust_remote_code=False)
    if getattr(stored, "hf_quantizer", None) is not None:
        raise ValueError(f"base: must have plain weights in its files, got {name} with quantised ones. Use --base.")
    return attached(stored.to(base.device), config, state)


def stored_at(base: Any) -> str:
    """Return the folder or Hub id that a base was loaded from, also of one that has a name of its own."""
    return str(base.config.name_or_path or base.name_or_path)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return copies of the active adapter's tensors by their names in its file."""
    name = str(model.active_adapter)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def attached(base: Any, config: Any, state: dict[str, Tensor]) -> PeftModel:
    """Return a base with an adapter that has the given tensors, in evaluation mode."""
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, state)
    return model.eval()


def merged(model: PeftModel) -> Any:
    """Return the base with LoRA merged; consumes the model. In float32, the only rounding is a later cast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory rows, which `add_rows` adds later
        return model.merge_and_unload(safe_merge=True)


def add_rows(model: PreTrainedModel, ids: list[int], rows: Tensor, *, keep_tied: bool = False) -> None:
    """Add rows for memory tokens to a base, in place, and a head that never prefers them.

    The input embedding gets the rows. The head gets the mean of its own rows for each of them: its score is then the
    mean of all tokens' scores, which never exceeds the highest one. Zeros would not work, since all scores may be
    negative. A tied head is untied first.

    Args:
        ids: ids of the three tokens; the vocabulary grows if they are beyond it.
        rows: (3, H) memory rows.
        keep_tied: keep a tied head, so that memory rows are scored and only generation settings suppress them.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    if is_tied and not keep_tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        _note_untied(model)
    old_size = embedding.weight.shape[0]
    size = max(old_size, max(ids) + 1)
    if size > old_size:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(size, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    new_ids = [*range(old_size, size), *ids]
    with torch.no_grad():
        embedding.weight[old_size:] = _mean(embedding.weight[:old_size])  # for the unused ids in between
        if not (is_tied and keep_tied):
            head.weight[new_ids] = _mean(head.weight[:old_size])
            if head.bias is not None:
                head.bias[new_ids] = _mean(head.bias[:old_size])
        embedding.weight[ids] = rows.to(embedding.weight)
    settings = model.generation_config
    if settings is not None:
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *ids})


def is_tied(model: Any) -> bool:
    """Return whether head and embedding share their matrix."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight is embedding.weight


def _mean(values: Tensor) -> Tensor:
    return values.detach().double().mean(0).to(values.dtype)


def _note_untied(model: Any) -> None:
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter on an unquantised base, in float32, with its answers.

    Attributes:
        model: the adapter on its base.
        dtype: the base's own type.
        quantization: how the base was quantised; None if it was not.
        expected: the plugin's answers on this base.
        agreement: how many of these answers the adapter also gives on the quantised base; None if it was not quantised.
    """

    model: PeftModel
    dtype: torch.dtype
    quantization: str | None
    expected: list[Expected]
    agreement: int | None


def as_plain(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    num_blocks: int,
    unquantized: Callable[[PeftModel], PeftModel] = dequantized,
) -> PlainAdapter:
    """Replace a quantised base by plain weights, and answer the prompts with the plugin in float32.

    The check is in float32 too: in a half type, the rounding of two ways to compute the same sum would decide wherever
    two tokens nearly tie.

    Raises:
        ValueError: the adapter's weights are not finite, or weights are offloaded, or quantised in a way that cannot be
            undone.
    """
    if num_offloaded := sum(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"model: must have its weights in memory to be exported, got {num_offloaded} that are offloaded by a "
            "device_map. Load the base without it."
        )
    adapter = get_peft_model_state_dict(model, adapter_name=str(model.active_adapter), save_embedding_layers=False)
    if (found := not_finite(adapter)) is not None:
        raise ValueError(
            f"adapter: its weights must be finite to be exported, {found}: its training had diverged. Train it again "
            "with a lower learning_rate."
        )
    asking: dict[str, Any] = {
        "templates": prompts.templates,
        "num_blocks": num_blocks,
        "max_new_tokens": prompts.max_new_tokens,
    }
    quantization = quantization_of(model)
    quantized = None
    if quantization is not None:
        logger.info(
            "The base is quantised (%s): the export is compared with the adapter on plain weights.", quantization
        )
        quantized = expect(model, tokenizer, prompts.questions, **asking)
        model = unquantized(model)
    base: Any = model.get_base_model()
    dtype: torch.dtype = base.dtype
    model.float()
    expected = expect(model, tokenizer, prompts.questions, **asking)
    if quantized is None:
        return PlainAdapter(model, dtype, quantization, expected, None)
    agreement = sum(before.answer == after.answer for before, after in zip(quantized, expected, strict=True))
    logger.info("Quantised and plain base give the same tokens on %d of %d prompts.", agreement, len(expected))
    return PlainAdapter(model, dtype, quantization, expected, agreement)


def free(model: Any) -> None:
    """Release a model's memory despite other references to it: a fresh process is about to need it."""
    model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
