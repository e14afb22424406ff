"""Collects all problems of a recipe, to report them together; and other tools' names for its keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rim_peft.methods import STAGES
from rim_peft.recipe.syntax import SHOWN_KEYS, WrongTypeError, allows_none, convert
from rim_peft.values import cut, shown

_STAGE = "STAGE"
"""Placeholder for the stage in which a key was given, or the first stage if it was given elsewhere."""

_NAMES: dict[str, tuple[str, ...]] = {
    # Names in TRL, axolotl, LLaMA-Factory, Unsloth, torchtune, open-instruct and older versions of transformers.
    "model.name_or_path": (
        *("base_model", "base_model_name", "model_name", "model_id", "model_path", "pretrained", "checkpoint"),
        *("model_name_or_path", "base_model_name_or_path", "pretrained_model_name_or_path", "hf_model"),
    ),
    "model.revision": ("model_revision", "revision_of_model", "base_model_revision"),
    "model.tokenizer": ("tokenizer_name", "tokenizer_path", "tokenizer_name_or_path", "tokenizer_config"),
    "model.dtype": ("torch_dtype", "model_dtype", "compute_dtype", "precision", "torchdtype"),
    "model.quantization: nf4": ("load_in_4bit", "use_4bit", "qlora", "quantization_bit", "bnb_4bit_quant_type"),
    "model.quantization: int8": ("load_in_8bit", "use_8bit"),
    "model.quantization": ("quantization_config", "quantization_method", "quantize", "bnb_config"),
    "model.attn_implementation": (
        *("attention_implementation", "attn_impl", "flash_attn", "flash_attention", "use_flash_attention"),
        *("use_flash_attention_2", "sdp_attention", "sdpa_attention", "eager_attention", "flex_attention", "attention"),
    ),
    "data.path": (
        *("dataset", "datasets", "dataset_name", "dataset_path", "dataset_dir", "data_path", "data_file"),
        *("data_files", "train_file", "train_data", "train_dataset", "dataset_id", "dataset_name_or_path"),
    ),
    "data.train_split": ("dataset_train_split", "split"),
    "data.validation_split": ("dataset_test_split", "eval_split", "eval_dataset", "val_split", "dev_split"),
    "data.validation_rows": ("val_set_size", "val_size", "eval_size", "max_eval_samples", "validation_size"),
    "data.train_rows": ("max_samples", "max_train_samples", "num_samples", "num_train_samples"),
    "data.max_length": (
        *("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "seq_length", "seq_len", "model_max_length"),
        *("max_sequence_length", "sequence_length", "context_length", "block_length", "max_source_length"),
    ),
    "data.prompt_template": ("template", "prompt_format", "prompt_style", "prompt", "instruction_template"),
    "data.streaming": ("stream", "iterable_dataset"),
    "adapter.r": ("lora_r", "lora_rank", "rank", "lora_dim", "peft_lora_r"),
    "adapter.lora_alpha": ("alpha", "peft_lora_alpha"),
    "adapter.lora_dropout": ("peft_lora_dropout", "lora_drop"),
    "adapter.target_modules": (
        *("lora_target_modules", "lora_target", "lora_modules", "lora_attn_modules", "lora_target_linear"),
        *("target_layers", "lora_layers"),
    ),
    "adapter.use_dora": ("peft_use_dora", "dora", "lora_use_dora"),
    "adapter.use_rslora": ("rslora", "lora_use_rslora", "use_rs_lora"),
    "adapter.num_blocks": ("blocks", "memory_blocks", "num_memory_blocks", "num_thoughts"),
    "adapter.block_size": ("memory_tokens", "tokens_per_block", "memory_size"),
    f"{_STAGE}.per_device_train_batch_size": (
        *("micro_batch_size", "batch_size", "train_batch_size", "per_gpu_train_batch_size", "mini_batch_size"),
        *("train_micro_batch_size_per_gpu", "per_device_batch_size", "global_batch_size"),
    ),
    f"{_STAGE}.per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    f"{_STAGE}.gradient_accumulation_steps": ("grad_accum", "gradient_accumulation", "accumulate_grad_batches"),
    f"{_STAGE}.num_train_epochs": ("num_epochs", "epochs", "epoch", "max_epochs", "n_epochs"),
    f"{_STAGE}.max_steps": ("steps", "num_steps", "num_train_steps", "train_steps", "max_steps_per_epoch", "max_iters"),
    f"{_STAGE}.learning_rate": ("lr", "peak_lr", "max_lr"),
    f"{_STAGE}.lr_scheduler_type": ("lr_scheduler", "scheduler", "lr_schedule", "scheduler_type", "lr_decay_style"),
    f"{_STAGE}.warmup_steps": ("warmup", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps", "warmup_iters"),
    f"{_STAGE}.optim": ("optimizer", "optimizer_type", "optimiser", "optimizer_name"),
    f"{_STAGE}.max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad", "max_norm", "clip_grad_norm"),
    f"{_STAGE}.weight_decay": ("wd", "decay"),
    f"{_STAGE}.gradient_checkpointing": ("enable_activation_checkpointing", "use_gradient_checkpointing"),
    f"{_STAGE}.bf16": ("mixed_precision", "use_bf16", "bfloat16"),
    f"{_STAGE}.fp16": ("use_fp16", "half"),
    f"{_STAGE}.pack_length": ("sample_packing", "packing", "pack", "multipack", "sequence_packing"),
    f"{_STAGE}.max_tokens_per_batch": ("batch_max_len", "max_tokens", "token_batch_size"),
    f"{_STAGE}.compile_layers": ("torch_compile", "compile"),
    f"{_STAGE}.logging_steps": ("log_every_n_steps", "log_interval", "log_steps"),
    f"{_STAGE}.save_steps": ("saves_per_epoch", "checkpointing_steps", "save_interval"),
    f"{_STAGE}.eval_steps": ("evals_per_epoch", "eval_interval", "evaluation_steps", "val_interval"),
    f"{_STAGE}.report_to": ("wandb_project", "use_wandb", "use_tensorboard", "use_swanlab", "log_with"),
    f"{_STAGE}.eval_strategy": ("evaluation_strategy",),
    "evaluation.max_new_tokens": ("max_new_token", "max_output_tokens", "max_gen_toks", "generation_max_length"),
    "evaluation.batch_size": ("generation_batch_size", "inference_batch_size"),
    "output_dir": ("output", "output_path", "save_dir", "out_dir", "run_dir", "checkpoint_dir"),
    "seed": ("random_seed", "random_state", "data_seed"),
    "resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
}
_KEYS = {name: key for key, names in _NAMES.items() for name in names}


def foreign_key(section: str, name: str) -> str | None:
    """Return our key for another tool's, as written in ``section``; None for an unknown name.

    >>> foreign_key("", "max_seq_length"), foreign_key("refinement", "lr"), foreign_key("", "lr")
    ('data.max_length', 'learning_rate', 'grounding.learning_rate')
    """
    key = _KEYS.get(name.lower().replace("-", "_"))
    if key is None:
        return None
    stage = section if section in STAGES else STAGES[0]
    key = key.replace(_STAGE, stage, 1)
    return key.removeprefix(f"{section}.") if section else key


COMMAND_LINE = "command line"

_LONGEST_KEY = 100
"""Longest key, in characters, that is shown in full and gets a suggestion."""


def on_command_line(keys: Iterable[str]) -> dict[str, str]:
    """Map each key given on the command line to its place in messages."""
    return {key: f"{COMMAND_LINE}: {cut(key, most=_LONGEST_KEY)}" for key in keys}


class RecipeError(ValueError):
    """A recipe cannot be run; one line per problem, ``file: key: what is wrong``."""


@dataclass
class Problems:
    """Problems by key, in the order in which they were found.

    Attributes:
        source: the recipe's file.
        all_keys: returns the full names of all keys, for suggestions.
        overridden: keys given outside the file, each with its place (``command line: seed``).
        lines: the messages so far.
    """

    source: str
    all_keys: Callable[[], Iterable[str]]
    overridden: Mapping[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, key: str, message: str) -> None:
        """Add a problem with a key."""
        self.lines.append(f"{self.where(key)}: {cut(message)}")

    def where(self, key: str) -> str:
        """Return where a key was given: its file and name, or its place outside the file."""
        given = max((one for one in self.overridden if f"{key}.".startswith(f"{one}.")), key=len, default=None)
        if given is None:
            return f"{self.source}: {cut(key, most=_LONGEST_KEY)}"
        return f"{self.overridden[given]}{cut(key.removeprefix(given), most=_LONGEST_KEY)}"

    def raise_any(self) -> None:
        """Raise an error if there are problems.

        Raises:
            RecipeError: there are; the message lists them.
        """
        if self.lines:
            raise RecipeError("\n".join(dict.fromkeys(self.lines)))

    def check_keys(self, section: str, given: Iterable[Any], known: Iterable[str]) -> None:
        """Add the unknown keys of a section, each with the most similar known key of this or another section."""
        names = list(known)
        unknown = [name for name in given if name not in names]
        for name in unknown[:SHOWN_KEYS]:
            meant = self._meant(section, str(name), names)
            self.add(join(section, name), f"unknown key, did you mean {meant}?" if meant else "unknown key.")
        if len(unknown) > SHOWN_KEYS:
            name = join(section, unknown[SHOWN_KEYS])
            self.add(name, f"unknown key, and so are {len(unknown) - SHOWN_KEYS - 1} more.")

    def _meant(self, section: str, name: str, names: list[str]) -> str | None:
        """Guess the key meant by an unknown one: by other tools' names, else by spelling."""
        if (foreign := foreign_key(section, name)) is not None and (section or "." in foreign or foreign in names):
            return foreign
        if len(name) > _LONGEST_KEY:
            return None
        if close := [known for known in names if known == name.lower()] or get_close_matches(name, names, n=1):
            return close[0]
        elsewhere = {key.rpartition(".")[2]: key for key in reversed(list(self.all_keys()))}
        return next((elsewhere[match] for match in get_close_matches(name, elsewhere, n=1)), None)

    def convert(self, section: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values converted to their fields' types, and add problems for those of the wrong type.

        A null for a field that cannot be None means the field's default.
        """
        converted = {}
        for name, value in values.items():
            if name not in hints or (value is None and not allows_none(hints[name])):
                continue
            try:
                converted[name] = convert(value, hints[name])
            except WrongTypeError as error:
                self.add(join(section, name), str(error))
        return converted

    def build(self, section: str, make: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Return ``make(**values)``; None if it fails, after adding all its complaints as problems."""
        # A constructor stops at the first bad value, so it is called again without that value until it succeeds.
        values, complaints = dict(values), 0
        while True:
            try:
                made = make(**values)
                return None if complaints else made
            except Exception as error:
                complaints += 1
                culprit = find_culprit(make, values, str(error))
                message = _explain(error, values.get(culprit or "")).removeprefix(f"{culprit}: ")
                self.add(section if culprit is None else join(section, culprit), message)
                if culprit not in values or len(values) == 1:
                    return None
                del values[culprit]


def join(section: str, name: object) -> str:
    """Return a key's full name."""
    return f"{section}.{name}" if section else str(name)


def _explain(error: Exception, value: object) -> str:
    """Return an error's message, or a clearer one for Python's own errors about wrong types."""
    if expected := re.search(r"expected (\w+), got", str(error)):
        return f"must be of type {expected[1]}, got {shown(value)}."
    if isinstance(error, ValueError | OSError | ImportError) or type(error).__module__ != "builtins":
        return str(error)
    return f"cannot be used, got {shown(value)} ({type(error).__name__})."


def find_culprit(make: Callable[..., Any], values: Mapping[str, Any], message: str) -> str | None:
    """Return the field that an error is about: the one named first, else the one whose removal avoids the error."""
    named = re.match(r"([\w.+=,-]+): ", message)
    if named is not None:
        return named[1]
    for name in values:
        try:
            make(**{other: value for other, value in values.items() if other != name})
        except Exception as error:
            if str(error) == message:
                continue
        return name
    return None
