"""Find the parts of a run on this machine before it begins: the base without weights, its tokenizer, the rows."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer

from rim_peft.data.sources import hub_problem
from rim_peft.methods import get_method
from rim_peft.recipe import Recipe
from rim_peft.run.base import build_meta_base, load_base, load_config, locate_base, stored_quantization
from rim_peft.run.built_base import train_tokenizer
from rim_peft.run.named_bases import parse_name
from rim_peft.run.rows import RunRows, load_rows
from rim_peft.run.tokenizer import load_tokenizer
from rim_peft.tasks.task import GeneratedTask
from rim_peft.training.head import Head, check_heads, find_head
from rim_peft.tuner.bases import SUPPORTED_IMPLEMENTATIONS, attention_of, check_architecture, check_base, check_config
from rim_peft.tuner.config import RiMConfig


class MetaBase:
    """A recipe's base without weights, built again for each simulated stage.

    Args:
        has_bf16: whether the training device supports bfloat16.
    """

    def __init__(self, config: PretrainedConfig, recipe: Recipe, *, has_bf16: bool) -> None:
        self.config, self.recipe, self.has_bf16 = config, recipe, has_bf16
        self.can_be_trained = False
        self.adapter: RiMConfig | None = None
        self.head = Head.FUSED

    def check_implementation(self) -> None:
        """Refuse attention without per-query masks.

        Raises:
            ValueError: the recipe asks for it.
        """
        implementation = self.recipe.model.attn_implementation
        if implementation is not None and get_method(self.recipe.method).branches:
            config = copy.deepcopy(self.config)
            config.get_text_config()._attn_implementation = implementation
            check_config(config)

    def build(self, *, attention: str | None = None) -> Any:
        """Return the base, with the recipe's attention if every machine supports it."""
        options = self.recipe.model
        attention = attention or options.attn_implementation
        options = replace(options, attn_implementation=attention if attention in SUPPORTED_IMPLEMENTATIONS else None)
        return build_meta_base(self.config, options, has_bf16=self.has_bf16)

    def check(self) -> tuple[str, str]:
        """Return the base's class and attention.

        Raises:
            ValueError: it is not a causal model, or cannot run branching rows.
        """
        base = self.build()
        check_base(base)
        if get_method(self.recipe.method).branches:
            check_architecture(base)
        implementation = self.recipe.model.attn_implementation or attention_of(base.config)
        return type(base).__name__, implementation

    def choose_head(self) -> Head:
        """Return the head that a training would use, found on a small copy of the base.

        Raises:
            NotAtHandError: the base has no small copy.
            ValueError: the base cannot be trained with any head.
        """
        base = self.build()
        found = find_head(base)
        if found is None:
            raise NotAtHandError(
                f"no small copy of {type(base).__name__} can be made; the trainer will check the base itself."
            )
        self.head = check_heads(base, found)
        return self.head

    def attach_blocks(self) -> PeftModel:
        """Return the base with memory rows only, with the block number and size of the recipe's adapter.

        Raises:
            ValueError: the base does not support them.
        """
        own = self.recipe.rim_config()
        config = RiMConfig(r=0, num_blocks=own.num_blocks, block_size=own.block_size)
        model: Any = get_peft_model(self.build(), config)
        self.adapter = config
        return model

    def attach(self, *, attention: str | None = None) -> PeftModel:
        """Return the base with a new adapter.

        Raises:
            ValueError: the base does not support the adapter.
        """
        config = self.recipe.rim_config()
        model: Any = get_peft_model(self.build(attention=attention), config)
        self.adapter = config
        return model


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FETCH = "--download fetches what the training would, except the weights"


class NotAtHandError(Exception):
    """A check needs something that is not on this machine; the message says what, and what to do."""


@dataclass(frozen=True)
class AtHand:
    """Finds what recipes need; several recipes share what is found.

    Attributes:
        base: folder with the base's ``config.json`` and tokenizer, used instead of the recipe's base.
        download: ask the Hub for missing parts, but never for weights.
    """

    base: str | None = None
    download: bool = False
    _found: dict[str, Any] = field(default_factory=dict, repr=False)

    def source(self, recipe: Recipe) -> str | None:
        """Return folder, Hub id or name of a recipe's base; None if it is built from scratch."""
        return self.base or recipe.model.name_or_path

    def config(self, recipe: Recipe) -> PretrainedConfig:
        """Return the configuration of a recipe's base.

        Raises:
            NotAtHandError: it is not on this machine.
            ValueError: it is not the configuration of a model that transformers knows.
        """
        source = self.source(recipe)
        try:
            return load_config(source, recipe.model, only_local=not self.download)
        except OSError as error:
            is_folder = Path(str(source)).is_dir()
            where = f"folder {source} has no config.json" if is_folder else self._not_here(str(source))
            if self.base is None and is_folder:
                is_damaged = (Path(str(source)) / "config.json").exists()
                raise ValueError(f"model.name_or_path: {error if is_damaged else where}.") from error
            if parse_name(str(source)) is not None:
                raise NotAtHandError(f"{where}.") from error
            raise NotAtHandError(
                f"{where}. Give --base FOLDER with its config.json and tokenizer{self._or_fetch}."
            ) from error

    def tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a recipe's base, trained on the rows if the base is built from scratch.

        Raises:
            NotAtHandError: it or the rows are not on this machine.
            ValueError: it cannot be used.
        """
        source = self.source(recipe)
        if source is None:
            return self._trained_tokenizer(recipe)
        source = recipe.model.tokenizer or source
        folder = Path(source)
        if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
            missing = f"folder {source} has no tokenizer. Put the base's tokenizer files into it."
            if self.base is None or recipe.model.tokenizer is not None:
                raise ValueError(f"model.tokenizer: {missing}")
            raise NotAtHandError(missing)
        try:
            return load_tokenizer(source, recipe.model, only_local=not self.download)
        except OSError as error:
            if source != self.base and folder.is_dir():
                raise ValueError(f"model.tokenizer: cannot be read from {source}: {error}") from error
            if parse_name(source) is not None:
                raise NotAtHandError(f"{self._not_here(source)}.") from error
            raise NotAtHandError(
                f"the tokenizer of {self._not_here(source)}. Give --base FOLDER with it{self._or_fetch}."
            ) from error

    def check_weights(self, recipe: Recipe) -> None:
        """Open the files of a base in a folder as training does, without reading weights.

        Raises:
            OSError: there are none.
            ValueError: they are damaged, or lack weights.
        """
        source = recipe.model.name_or_path
        if source is None or self.base is not None:
            return  # built from scratch, or fetched by the training
        source = locate_base(source, recipe.model, only_here=True)
        if not Path(source).is_dir():
            return
        if own := stored_quantization(self.config(recipe)):
            _check_quantizer(own)
            raise NotAtHandError("the base's files are quantised, so they are only opened when they are read.")
        load_base(source, replace(recipe.model, attn_implementation=None), only_look=True)

    def rows(self, recipe: Recipe) -> RunRows:
        """Return the rows of a recipe; each set of rows is loaded once.

        Raises:
            NotAtHandError: they are not on this machine, or are a stream.
            ValueError: they cannot be read.
            FileNotFoundError: a local folder lacks the split.
        """
        data, task = recipe.data, recipe.task()
        path = data.path if data.path is not None else task.source
        if data.streaming:
            if path is not None and Path(path).expanduser().exists():
                load_rows(data, task)  # checks the splits
            raise NotAtHandError("they are a stream, which is read during training (data.streaming).")
        if not isinstance(task, GeneratedTask):
            if path is None:
                raise NotAtHandError(f"task {data.task!r} has no default source. Give data.path=FOLDER.")
            if not Path(path).expanduser().exists() and not self.download:
                raise NotAtHandError(f"{self._not_here(path)}. Give data.path=FOLDER{self._or_fetch}.")
        key = repr({name: value for name, value in asdict(data).items() if not name.endswith("_template")})
        if key not in self._found:
            try:
                self._found[key] = load_rows(data, task)
            except ConnectionError as error:
                raise NotAtHandError(str(error)) from error
            except FileNotFoundError as error:
                if path is not None and Path(path).expanduser().exists():
                    raise
                raise NotAtHandError(str(error)) from error
        rows: RunRows = self._found[key]
        return rows

    def _trained_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        size = self.config(recipe).get_text_config().vocab_size
        key = f"tokenizer {size} {recipe.data!r}"
        if key not in self._found:
            self._found[key] = train_tokenizer(self.rows(recipe).train, recipe.data.templates, vocab_size=size)
        tokenizer: PreTrainedTokenizerBase = self._found[key]
        return tokenizer

    @property
    def _or_fetch(self) -> str:
        return "" if self.download else f"; {_FETCH}"

    def _not_here(self, source: str) -> str:
        if parse_name(source) is not None:
            return f"{source} is not on this machine yet: rim-peft base {source} fetches it"
        problem = hub_problem() if self.download else None
        asked = f", and {problem}" if problem else ""
        return f"{source} is not a folder in {Path.cwd()}, nor in the Hub's cache on this machine{asked}"


def _check_quantizer(own: dict[str, Any]) -> None:
    """Check that the packages that a base's quantised files need are installed."""
    try:
        AutoHfQuantizer.from_config(own, pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        method = own.get("quant_method")
        raise ImportError(f"model.name_or_path: its files are quantised by {method}: {error}") from error
    except Exception as error:  # on a machine without a GPU
        raise NotAtHandError(f"its quantised files are not for this machine: {error}") from error
