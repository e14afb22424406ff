"""RiM's entry in PEFT's tables and methods: the only module that changes PEFT's internals.

PEFT finds its methods by members of the closed enum ``PeftType``. A plain string is not enough, since PEFT and
transformers read ``.value``, so this module adds a real member, which compares, hashes, pickles and serialises like
the others.

``CONTACTS`` says of each private part of PEFT what it is needed for; a test compares the list with the installed
version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import eva
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import hotswap, save_and_load
from transformers.integrations.peft import PeftAdapterMixin

NAME = "RIM"

PREFIX = "lora_"
"""Prefix of the adapter's parameter names: the same as LoRA's, because transformers' loading renames keys by it."""


@dataclass(frozen=True)
class Contact:
    """A private part of another library that this package leans on.

    Attributes:
        path: where it is, as one imports it; what instances have is under their class.
        need: what it is needed for.
        public: the public way, or what that lacks; ``"none"`` if there is none.
        parameters: parameters that are named in calls or overridden.
        since: the version that has it first, if it is later than the lowest one that pyproject.toml allows.
    """

    path: str
    need: str
    public: str
    parameters: tuple[str, ...] = ()
    since: str | None = None

    def __str__(self) -> str:
        since = "" if self.since is None else f" It is there since {self.since}."
        return f"{self.path} is not as this package needs it: {self.need}.{since} The public way: {self.public}."


_TUNER, _TABLES = "peft.tuners.tuners_utils.BaseTuner.", "peft.mapping.PEFT_TYPE_TO_"
_NO_PLUGINS = "none: PEFT knows its own methods alone"

CONTACTS = (
    Contact("peft.PeftType._member_map_", "a method needs a member of a closed enum", _NO_PLUGINS),
    Contact("peft.PeftType._value2member_map_", "PEFT finds a method by its value in a file", _NO_PLUGINS),
    Contact("peft.PeftType._member_names_", "PEFT lists its methods", _NO_PLUGINS),
    *(
        Contact(f"{_TABLES}{kind}_MAPPING", "PEFT finds a method's classes in it", _NO_PLUGINS)
        for kind in ("CONFIG", "PREFIX", "TUNER")
    ),
    Contact("peft.tuners.lora.eva.UNSUPPORTED_LORA_MODULES", "EVA leaves the memory rows alone", "none"),
    Contact("peft.utils.hotswap.CONFIG_KEYS_TO_CHECK", "adapters that swap have the same blocks", "none"),
    Contact("peft.utils.hotswap.check_hotswap_configs_compatible", "an adapter of another base is not swapped", "none"),
    Contact("peft.utils.hotswap.hotswap_adapter_from_state_dict", "tensors are checked before a swap", "none"),
    Contact(
        "peft.config.PeftConfigMixin.from_json_file", "a file is checked before it is used", "none", ("path_json_file",)
    ),
    Contact("peft.utils.save_and_load.safe_load_file", "weights' checksum is checked before they are used", "none"),
    Contact(_TUNER + "_post_injection_hook", "generate appends blocks", "an own PeftModel", ("model", "config")),
    Contact(_TUNER + "_check_new_adapter_config", "a base is checked before it is changed", "none", ("config",)),
    Contact(_TUNER + "_prepare_adapter_config", "targets are checked when all of them are known", "none"),
    Contact(_TUNER + "_check_target_module_exists", "the embedding is always a target", "none: it is abstract"),
    Contact(_TUNER + "_create_and_replace", "the embedding gets memory rows, not LoRA", "none: it is abstract"),
    Contact(_TUNER + "_get_adapter_state_dict", "DoRA's magnitudes are saved under their full names", "none"),
    Contact(_TUNER + "_remap_adapter_state_dict_for_load", "tensors are checked before they are loaded", "none"),
    Contact(_TUNER + "_unload_and_optionally_merge", "hooks go, and merging says what is lost", "none"),
    Contact(_TUNER + "_get_tied_target_modules", "a head tied to the embedding stays as it is", "none"),
    Contact(
        "peft.tuners.lora.LoraModel._enable_peft_forward_hooks",
        "each row of a batch has its own adapter's blocks",
        "none",
    ),
    Contact(
        "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer", "rows stay float32", "none"
    ),
    Contact(
        "transformers.PreTrainedModel._hf_peft_config_loaded", "a failed load_adapter leaves the base plain", "none"
    ),
)

BLOCK_OPTIONS = ("num_blocks", "block_size", "insertion_layer", "bidirectional_blocks")
"""Options that say how memory rows are used; they must be equal in adapters that replace one another."""


def _add_member() -> PeftType:
    """Add ``RIM`` to ``PeftType``, or return the existing member."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    enum: Any = PeftType
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    enum._member_map_[NAME] = member
    enum._value2member_map_[NAME] = member
    enum._member_names_.append(NAME)
    if hasattr(enum, "_hashable_values_"):  # Python 3.13 looks values up here
        enum._hashable_values_.append(NAME)
    type.__setattr__(enum, NAME, member)
    return PeftType[NAME]


RIM: PeftType = _add_member()
"""RiM's member of ``PeftType``."""


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner], memory_cls: type[BaseTunerLayer]) -> None:
    """Enter RiM's classes in PEFT's tables; safe to repeat.

    Args:
        memory_cls: the layer with the memory rows, which has no LoRA.

    Raises:
        ImportError: the installed PEFT has its own method named RIM.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(RIM)
    if registered is not None and registered.__module__.partition(".")[0] != config_cls.__module__.partition(".")[0]:
        raise ImportError(
            f"PEFT {peft.__version__} has its own method named {NAME} ({registered.__module__}), which this package "
            "would replace: update rim-peft, or install a PEFT without it."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[RIM] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[RIM] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[RIM] = PREFIX
    unsupported: Any = eva.UNSUPPORTED_LORA_MODULES  # EVA, which starts LoRA from activations, skips these layers
    if memory_cls not in unsupported:
        eva.UNSUPPORTED_LORA_MODULES = (*unsupported, memory_cls)
    hotswap.CONFIG_KEYS_TO_CHECK[RIM] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], *BLOCK_OPTIONS]


def override(model_cls: type[BaseTuner], **methods: Callable[..., Any]) -> None:
    """Replace methods of PEFT's model if its tuner is ours; safe to repeat.

    Args:
        methods: by name of a ``PeftModel`` method, a function of the model, PEFT's own method and its arguments.
    """
    for name, method in methods.items():
        original = getattr(PeftModel, name)
        setattr(PeftModel, name, _dispatch(getattr(original, "_before_rim", original), method, model_cls))


def check_swaps(
    config_cls: type[PeftConfig], check: Callable[[Any, Any], None], check_tensors: Callable[..., Any]
) -> None:
    """Add checks to PEFT's in-place swap of one of our adapters for another; safe to repeat.

    Args:
        check: function of the configurations of the attached and the new adapter.
        check_tensors: function of the model, the adapter's name, and the new adapter's tensors by their names there.
    """

    def check_configs(original: Callable[..., Any], config: PeftConfig, other: PeftConfig) -> None:
        original(config, other)
        if isinstance(config, config_cls):
            check(config, other)

    def swap(
        original: Callable[..., Any], model: Any, state_dict: Any, adapter_name: str, config: Any, **more: Any
    ) -> None:
        if isinstance(config, config_cls):
            state_dict = check_tensors(model, adapter_name, state_dict, any_rank=True)
        original(model, state_dict, adapter_name, config, **more)

    _wrap(hotswap, "check_hotswap_configs_compatible", check_configs)
    _wrap(hotswap, "hotswap_adapter_from_state_dict", swap)


def check_reading(check_config: Callable[[Path, Any], None], check_checksum: Callable[[Path], None]) -> None:
    """Let PEFT check files before it uses their content, from any source; safe to repeat.

    Args:
        check_config: function of the path and the content of one of our configurations.
        check_checksum: function of the path of a safetensors file; it accepts files without our checksum.
    """

    def read_config(original: Callable[..., Any], path_json_file: Any, **options: Any) -> Any:
        content = original(path_json_file, **options)
        if isinstance(content, dict) and content.get("peft_type") == NAME:
            check_config(Path(path_json_file), content)
        return content

    def load_file(original: Callable[..., Any], filename: Any, *args: Any, **options: Any) -> Any:
        check_checksum(Path(filename))
        return original(filename, *args, **options)

    _wrap(PeftConfigMixin, "from_json_file", read_config)
    _wrap(save_and_load, "safe_load_file", load_file)


def guard_loading(load: Callable[..., Any], load_natively: Callable[..., Any]) -> None:
    """Wrap the two functions that load an adapter onto a base; safe to repeat.

    Args:
        load: function of ``PeftModel.from_pretrained`` and its arguments, the base first.
        load_natively: function of transformers' ``load_adapter`` and its arguments, the base first.
    """
    _wrap(PeftModel, "from_pretrained", load)
    _wrap(PeftAdapterMixin, "load_adapter", load_natively)


def _wrap(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace a function, method or class method by ours, which gets the original as its first argument."""
    current: Any = vars(owner)[name]
    original = getattr(current, "_before_rim", current)
    plain = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if isinstance(original, classmethod):
            return function(functools.partial(plain, args[0]), *args[1:], **kwargs)
        return function(plain, *args, **kwargs)

    wrapped: Any = classmethod(call) if isinstance(original, classmethod) else call
    wrapped._before_rim = original
    setattr(owner, name, wrapped)


def _dispatch(original: Callable[..., Any], method: Callable[..., Any], model_cls: type[BaseTuner]) -> Any:
    @functools.wraps(original)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model.base_model, model_cls):
            return method(model, original, *args, **kwargs)
        return original(model, *args, **kwargs)

    vars(call)["_before_rim"] = original
    return call
