"""The frozen base of a run: where it is, and how it is loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from rim_peft.data.sources import asking_hub
from rim_peft.recipe import ModelOptions, Recipe
from rim_peft.run.named_bases import find_base, gguf_folder, parse_name, pin_name, public_name
from rim_peft.training.distributed import on_main, shards_weights


def locate_base(source: str, options: ModelOptions, *, only_here: bool = False) -> str:
    """Return the folder or Hub id that transformers loads a base from.

    Args:
        source: folder, Hub id or name of a base, or a folder or Hub id with a GGUF file.
        options: the GGUF file to convert, if any, and the revision.
        only_here: do not ask the Hub or the package index.

    Raises:
        OSError: the base or the file does not exist.
        ValueError: the file cannot be converted to a base.
    """
    name = options.gguf_file
    if name is not None and (path := Path(source, name)).is_file():
        return str(gguf_folder(path))
    if name is not None and _is_own(source, options):
        if parse_name(source) is not None:
            raise ValueError(
                f"model.gguf_file: must be omitted for {source}, whose file is known, got {name!r}. Remove it."
            )
        if Path(source).is_dir():
            raise FileNotFoundError(f"model.gguf_file: must be a file in {source}, got {name!r}, which does not exist.")
        with nullcontext() if only_here else asking_hub(source):
            path = Path(hf_hub_download(source, name, revision=options.revision, local_files_only=only_here))
        return str(gguf_folder(path))
    found = find_base(source, only_here=only_here)
    if revision_of(source, options) is not None and parse_name(source) is not None and Path(found).is_dir():
        raise ValueError(
            f"model.revision: must be omitted for a base of a package, got {options.revision!r} for {source}. Remove "
            f"it, or name the Hub's weights: {source.partition('@')[0]}@hub."
        )
    return found


def _is_own(source: str, options: ModelOptions) -> bool:
    """Tell whether a source is the options' own base, however its path is written."""
    own = options.name_or_path
    return source == own or (own is not None and Path(own).is_dir() and Path(source).resolve() == Path(own).resolve())


@contextmanager
def own_code_named(source: str, options: ModelOptions) -> Iterator[None]:
    """Name this package's option for running a base's code, where transformers' error names its own argument."""
    try:
        yield
    except ValueError as error:
        if options.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model.trust_remote_code: {source} comes with its own code, which runs only if you allow it. If you "
            "trust it: model.trust_remote_code=true in your recipe, or --trust-remote-code when loading a folder "
            "(in Python trust_remote_code=True)."
        ) from error


def load_base(source: str, options: ModelOptions, *, only_look: bool = False) -> PreTrainedModel:
    """Load a base from a folder or the Hub, quantised if the options say so.

    Args:
        only_look: open the files without reading weights, which stay on the device ``meta``, unquantised.

    Raises:
        OSError: the model does not exist.
        ValueError: its files are damaged, or lack weights that its configuration requires.
        ImportError: bitsandbytes is needed but not installed.
    """
    named, source = source, locate_base(source, options)
    quantization = None if only_look else _quantization(options)
    # Quantised weights cannot be moved later; others go to their device with the adapter (`to_device`).
    device = torch.cuda.current_device() if quantization and torch.cuda.is_available() else None
    device_map = {"": "meta"} if only_look else None if device is None else {"": device}
    with asking_hub(source), own_code_named(source, options), _weights_named(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision_of(named, options),
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            # With None transformers would not notice that weights are stored quantised.
            **({} if quantization is None else {"quantization_config": quantization}),
            device_map=device_map,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    base: PreTrainedModel
    base, found = loaded  # found: the loading info
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model.name_or_path: the files in {source} must hold all weights of its config.json, but lack "
            f"{len(missing)}, such as {missing[0]}, which would be random each time. Fetch the whole base again."
        )
    if source != named:  # an adapter used elsewhere must not refer to this machine's cache
        base.name_or_path = public_name(named)
    return base


@contextmanager
def _weights_named(source: str) -> Iterator[None]:
    """Say whose weights cannot be read, where a library names no file or suggests a way that would run code."""
    try:
        yield
    except OSError as error:
        if not Path(source).is_dir():
            raise
        raise OSError(f"model.name_or_path: {error}") from error
    except (SafetensorError, UnpicklingError, LookupError, JSONDecodeError, RuntimeError) as error:
        if "ignore_mismatched_sizes" in str(error):
            why = "have other shapes than its config.json says"
        elif isinstance(error, UnpicklingError) or "PytorchStreamReader" in str(error):
            why = "are a pickle (pytorch_model.bin) that is damaged or holds more than tensors, so it is not read"
        elif isinstance(error, RuntimeError):  # from the device, such as out of memory
            raise
        else:
            why = f"cannot be read ({error})"
        raise ValueError(f"model.name_or_path: the weights in {source} {why}. Fetch the base again.") from error


def load_config(source: str | None, options: ModelOptions, *, only_local: bool = False) -> PretrainedConfig:
    """Load a base's configuration from a folder or the Hub, or create the one for a base built from scratch.

    Args:
        source: folder or Hub id; None for the configuration in the options.
        options: its revision, and whether its code may run.
        only_local: do not ask the Hub.

    Raises:
        OSError: there is none.
    """
    if source is None:
        settings = dict(options.config or {})
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    named, source = source, locate_base(source, options, only_here=only_local)
    with nullcontext() if only_local else asking_hub(source), own_code_named(source, options):
        return AutoConfig.from_pretrained(
            source,
            revision=revision_of(named, options),
            trust_remote_code=options.trust_remote_code,
            local_files_only=only_local,
        )


def build_meta_base(
    config: PretrainedConfig, options: ModelOptions, *, has_bf16: bool | None = None
) -> PreTrainedModel:
    """Return a base without weights, on the device ``meta``, with the layers that :func:`load_base` would give it.

    Args:
        options: dtype, attention and quantisation.
        has_bf16: whether nf4 weights compute in bfloat16; None for what this machine supports.

    Raises:
        ImportError: bitsandbytes is needed but not installed.
    """
    config = copy.deepcopy(config)  # transformers writes dtype and quantisation into it
    dtype = config.get_text_config().dtype or torch.float32 if options.dtype == "auto" else options.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
    own = stored_quantization(config)
    quantization = _quantization(options, has_bf16=has_bf16)
    if own.get("quant_method") == "bitsandbytes":  # stored quantised weights stay as they are, whatever the options say
        quantization = BitsAndBytesConfig.from_dict(own)
    if quantization is not None:
        # transformers' quantizer knows which layers not to quantise.
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
        quantizer.postprocess_model(model)
    return model.eval()


def stored_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """Return how a base's weights are quantised in its files, with ``quant_method``; empty if they are not."""
    own: Any = getattr(config, "quantization_config", None) or {}
    return dict(own) if isinstance(own, Mapping) else own.to_dict()


def pin_base(recipe: Recipe, *, kept: str | None = None) -> Recipe:
    """Return the recipe with its base's name, if it is one of :mod:`rim_peft.run.named_bases`, pinned to a source.

    Args:
        recipe: with a base or without.
        kept: the base's name in a resumed run, which stays whatever has been fetched since.
    """
    name = recipe.model.name_or_path
    is_same = name is not None and kept is not None and parse_name(name) is not None and kept.startswith(f"{name}@")
    pinned = kept if is_same else on_main(lambda: pin_name(name))  # processes may see other caches
    if pinned == name:
        return recipe
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name_or_path=pinned))


def to_device(model: PeftModel, options: ModelOptions) -> PeftModel:
    """Move a model to this process's GPU, if there is one; quantised weights are there already.

    A model that FSDP will shard stays on the CPU: each GPU then gets its part of every layer, and the whole need not
    fit on one.
    """
    if options.quantization is None and torch.cuda.is_available() and not shards_weights():
        model.to("cuda")
    return model


def _quantization(options: ModelOptions, *, has_bf16: bool | None = None) -> BitsAndBytesConfig | None:
    if options.quantization is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"model.quantization: needs bitsandbytes, which is not installed, got {options.quantization!r}. "
            "pip install 'rim-peft[quantized]', or omit it for an unquantised base."
        )
    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if has_bf16 is None:
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_bf16 else torch.float32,
    )


def revision_of(source: str, options: ModelOptions) -> str | None:
    """Return the options' revision if ``source`` is their base; it does not apply to other tokenizers or folders."""
    return options.revision if source == options.name_or_path else None
