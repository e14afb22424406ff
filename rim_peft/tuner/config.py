"""RiMConfig: LoRA's options plus the memory blocks'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel, TaskType

from rim_peft.sequence.layout import BlockTokens
from rim_peft.tuner.peft_plugin import RIM
from rim_peft.values import Range, check_integer, check_ranges, check_regex, check_share, shown
from rim_peft.version import __version__

INIT_MEMORY = ("vocabulary", "random")
"""Named ways to start the memory rows; a list of token ids works too."""

NUM_ROWS = 3
"""Memory rows of an adapter: ``<b>``, ``<m>`` and ``</b>``."""

FORMAT_VERSION = 1
"""Version of an adapter's files; it grows when an older rim-peft would misread them."""

MOST_BLOCKS = 4096
"""Most blocks, and most memory tokens in a block: far more than any base has positions for."""

_MOST_RANK = 1 << 16
_MOST_TOKENS = 1 << 31

_RANGES = {
    "num_blocks": Range(0, MOST_BLOCKS),
    "block_size": Range(1, MOST_BLOCKS),
    "insertion_layer": Range(0, MOST_BLOCKS),
    "r": Range(0, _MOST_RANK),
    "lora_alpha": Range(1, 1 << 20),
    "qalora_group_size": Range(1, _MOST_RANK),
    "first_memory_id": Range(1, _MOST_TOKENS),
}

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_REFUSED_OPTIONS = {
    "layer_replication": "changes the base, which RiM keeps as it is",
    "megatron_config": "selects Megatron, which lacks transformers' input embedding, through which RiM reads memory",
    "trainable_token_indices": "wraps the input embedding, where RiM looks up its memory",
    "alora_invocation_tokens": "switches LoRA on by token, while a RiM adapter works on the whole prompt",
    "arrow_config": "mixes several adapters, while memory rows belong to one",
    "auto_mapping": "names code to import, which the base of a RiM adapter does not need",
    "kasa_config": "changes the base's weights, so that the disabled adapter would not equal the base",
    "monteclora_config": "needs a loss term that RiM's trainers do not add",
}


@dataclass
class RiMConfig(LoraConfig):
    """Configuration of a RiM adapter: LoRA's options plus those of the memory blocks.

    ``r=0`` trains only the memory rows. LoRA's other options (``lora_dropout``, ``use_rslora``, ``rank_pattern``, ...)
    keep their meaning and defaults.

    Raises:
        ValueError: an option is out of its range; the message gives the field, the rule, the value and the remedy.

    Source: arXiv 2605.30343 for the defaults of ``num_blocks``, ``block_size`` and ``r``.
    """

    num_blocks: int = field(
        default=8, metadata={"help": "Blocks appended to a prompt, K. Each generate call can override it."}
    )
    block_size: int = field(default=2, metadata={"help": "Memory tokens between the begin and end of a block, M."})
    insertion_layer: int = field(
        default=0,
        metadata={
            "help": "Decoder layer at which blocks enter, counted from 0: 0 is the input embedding; at a later layer, "
            "the hidden states at memory positions become the memory rows, and no token attends to them below it."
        },
    )
    bidirectional_blocks: bool = field(
        default=False,
        metadata={"help": "Let all tokens of a block attend to one another, not only to earlier ones."},
    )
    init_memory: str | list[int] = field(
        default="vocabulary",
        metadata={
            "help": "Start of the memory rows: 'vocabulary' (mean and spread of the vocabulary's rows), 'random' "
            "(normal, with the base's initializer_range), or a list of token ids whose rows are copied in turn to "
            "<b>, <m> and </b>, with a little noise."
        },
    )
    first_memory_id: int | None = field(
        default=None,
        metadata={
            "help": "Id of <b>; <m> and </b> follow. It is the number of rows of the base's embedding, set when the "
            "adapter is attached; the ids exist only in the adapter, not in tokenizer or head."
        },
    )
    base_architecture: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "The base's model_type, hidden_size and num_hidden_layers, set when the adapter is attached. "
            "Another base is refused."
        },
    )
    format_version: int = field(
        default=1, metadata={"help": "Version of the adapter's files; files without a version have version 1."}
    )
    r: int = field(default=128, metadata={"help": "LoRA rank; 0 trains only the memory rows."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha; updates are scaled by lora_alpha / r."})
    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Layers that get LoRA, as in LoraConfig; never the input embedding or the output head."},
    )
    task_type: TaskType | None = field(
        default=TaskType.CAUSAL_LM, metadata={"help": "Always CAUSAL_LM: RiM extends causal language models."}
    )

    def __post_init__(self) -> None:
        """Check every option and set the adapter's PEFT type."""
        self._check_format()  # first: later formats may have other rules
        self._check_blocks()
        self._check_init_memory()
        self._check_lora()
        super().__post_init__()
        self.peft_type = RIM

    @property
    def block_tokens(self) -> BlockTokens:
        """The token ids of blocks.

        Raises:
            ValueError: the configuration is not attached to a base yet.
        """
        first = self.first_memory_id
        if first is None:
            raise ValueError(
                "first_memory_id: must be known before blocks can be built, got None. Attach the configuration to a "
                "base first (get_peft_model, PeftModel.from_pretrained)."
            )
        return BlockTokens(begin=first, memory=first + 1, end=first + 2, block_size=self.block_size)

    @property
    def changes_layers(self) -> bool:
        """Whether blocks change the inputs of the base's layers, not only the embedding."""
        return self.insertion_layer > 0 or self.bidirectional_blocks

    def to_dict(self) -> dict[str, Any]:
        """Return all options as they are saved, in the current format; sets become sorted lists."""
        options = {
            name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()
        }
        return {**options, "format_version": FORMAT_VERSION}

    def describe_variants(self) -> str:
        """Return the options behind ``changes_layers`` as text for messages."""
        layer = f"insertion_layer={self.insertion_layer}" if self.insertion_layer > 0 else ""
        bidirectional = "bidirectional_blocks=True" if self.bidirectional_blocks else ""
        return " and ".join(filter(None, [layer, bidirectional]))

    def _check_format(self) -> None:
        check_integer("format_version", self.format_version, least=1)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version: must be at most {FORMAT_VERSION}, got {self.format_version}: the adapter was saved "
                f"by a later rim-peft than this one ({__version__}). Update rim-peft."
            )

    def _check_blocks(self) -> None:
        check_integer("num_blocks", self.num_blocks, least=0)
        check_integer("block_size", self.block_size, least=1)
        check_integer("insertion_layer", self.insertion_layer, least=0)
        check_integer("r", self.r, least=0)
        if not isinstance(self.bidirectional_blocks, bool):
            raise ValueError(f"bidirectional_blocks: must be True or False, got {self.bidirectional_blocks!r}.")
        if self.first_memory_id is not None:
            check_integer("first_memory_id", self.first_memory_id, least=1)
        noted: object = self.base_architecture
        if not isinstance(noted, dict | None):
            raise ValueError(f"base_architecture: must be a mapping, got {noted!r}. Omit it; attaching sets it.")

    def _check_init_memory(self) -> None:
        value = self.init_memory
        if isinstance(value, str):
            valid = value in INIT_MEMORY
        else:
            valid = isinstance(value, Sequence) and len(value) > 0 and all(_is_token_id(item) for item in value)
        if not valid:
            raise ValueError(
                f"init_memory: must be {' or '.join(map(repr, INIT_MEMORY))} or a list of token ids, got "
                f"{shown(value)}. Take ids from the base's tokenizer."
            )
        if not isinstance(value, str):
            self.init_memory = list(value)

    def _check_lora(self) -> None:
        check_integer("lora_alpha", self.lora_alpha, least=1)
        check_ranges(self, _RANGES)
        _check_pattern("rank_pattern", self.rank_pattern, Range(1, _MOST_RANK))
        _check_pattern("alpha_pattern", self.alpha_pattern, Range(0, 1 << 20, above=True))
        check_share("lora_dropout", self.lora_dropout)
        if self.r == 0 and self.use_dora:
            raise ValueError("use_dora: must be False with r=0, which trains only the memory rows, got True. Set r.")
        if self.task_type != "CAUSAL_LM":
            raise ValueError(f"task_type: must be 'CAUSAL_LM', got {self.task_type!r}. Omit it.")
        if self.bias != "none":
            raise ValueError(
                f"bias: must be 'none', got {self.bias!r}: trained biases belong to the base, so that the disabled "
                "adapter would not equal it. Omit it."
            )
        if str(self.init_lora_weights).startswith(_BASE_CHANGING_INITS):
            raise ValueError(
                f"init_lora_weights: must leave the base's weights as they are, got {self.init_lora_weights!r}. Use "
                "True, 'gaussian', 'orthogonal', 'eva' or 'mica'."
            )
        if self.r == 0 and (self.rank_pattern or self.target_parameters):
            raise ValueError(
                "r: must be at least 1 with rank_pattern or target_parameters, got 0, which trains only the memory "
                "rows. Set r, or omit those options."
            )
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name) or ():
                check_regex(name, key)
        for name in ("target_modules", "exclude_modules"):
            check_regex(name, getattr(self, name))
        for name, reason in _REFUSED_OPTIONS.items():
            value: Any = getattr(self, name, None)
            if value:
                raise ValueError(f"{name}: is not supported by RiM, got {value!r}: it {reason}. Omit it.")


def active_config(model: Any) -> RiMConfig:
    """Return the config of a model's active adapter.

    Raises:
        ValueError: the model has no active RIM adapter.
    """
    config = model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None
    if not isinstance(config, RiMConfig):
        got = type(model if config is None else config).__name__
        raise ValueError(
            f"model: must be a model whose active adapter is RIM, got {got}. Wrap the base with "
            "get_peft_model(base, RiMConfig(...)), load an adapter with PeftModel.from_pretrained, or call set_adapter."
        )
    return config


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS


def _check_pattern(name: str, pattern: Any, allowed: Range) -> None:
    for key, value in (pattern or {}).items():
        if value not in allowed or (name == "rank_pattern" and not isinstance(value, int)):
            kind = "an integer" if name == "rank_pattern" else "a number"
            raise ValueError(f"{name}: must give each name {kind} {allowed}, got {shown(value)} for {shown(key)}.")
