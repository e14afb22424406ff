"""An adapter folded into its base, and a base with rows for memory tokens, which its head never prefers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from rim_peft.tuner.config import active_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def memory_rows(model: PeftModel) -> Tensor:
    """Return the active adapter's memory rows, (3, H) float32, in the units of the base's embedding matrix.

    Raises:
        ValueError: the model has no active RIM adapter, or one that no plain checkpoint can express.
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
    """Return an adapter on its base with weights that are no longer quantised; the model given is used up.

    The weights are what the quantised ones stand for, not those that were quantised once, since the adapter was
    trained on the former.

    Raises:
        ValueError: the base is quantised in a way that cannot be undone.
    """
    method = quantization_of(model)
    if method is None:
        return model
    name = str(model.active_adapter)
    config, state = model.peft_config[name], get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {key: value.detach().cpu().clone() for key, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base: Any = model.unload()
        try:
            base = base.dequantize()
        except NotImplementedError as error:  # transformers' way to say that a kind of weights cannot be read back
            raise ValueError(
                f"base: must not be quantised, or by bitsandbytes (nf4, int8), got {method}, which cannot be undone "
                "here. Name the base's plain weights (--base)."
            ) from error
    plain = get_peft_model(base, config)
    set_peft_model_state_dict(plain, state)
    return plain.eval()


def merged(model: PeftModel) -> Any:
    """Return the base with LoRA folded in; the model is used up. In float32, a change is rounded once, by a cast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that memory rows are left out: they follow in `add_rows`
        return model.merge_and_unload(safe_merge=True)


def add_rows(model: PreTrainedModel, ids: list[int], rows: Tensor, *, keep_tied: bool = False) -> None:
    """Give a base rows for memory tokens, in place, and a head that never prefers one.

    The input embedding gets the rows. The head gets, for each of them, the mean of its own rows: the score is then the
    mean of all tokens' scores, which is never above the highest one. Zeros would not do, since all scores may be
    negative. A head that is tied to the embedding is made one of its own first.

    Args:
        model: the base.
        ids: of the three tokens; the vocabulary grows if they lie beyond it.
        rows: (3, H) memory rows.
        keep_tied: leave a tied head tied, so that memory rows are scored, and only generation settings hold them back.
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
        embedding.weight[old_size:] = _mean(embedding.weight[:old_size])  # of ids between, which nobody has
        if not (is_tied and keep_tied):
            head.weight[new_ids] = _mean(head.weight[:old_size])
            if head.bias is not None:
                head.bias[new_ids] = _mean(head.bias[:old_size])
        embedding.weight[ids] = rows.to(embedding.weight)
    settings = model.generation_config
    if settings is not None:
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *ids})


def is_tied(model: PreTrainedModel) -> bool:
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
