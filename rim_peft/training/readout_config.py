"""Options of both stages, on top of TRL's ``SFTConfig``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from rim_peft.data.examples import Templates
from rim_peft.training.metrics import current_name
from rim_peft.tuner.config import MOST_BLOCKS, RiMConfig
from rim_peft.values import Range, are_depths, are_shares, check_integer, check_ranges, check_share, is_number, shown

# TRL's own ways of filling rows and choosing labels, which conflict with the interleaved layout.
_REFUSED: dict[str, Any] = {
    "packing": False,
    "eval_packing": None,
    "padding_free": False,
    "assistant_only_loss": False,
    "completion_only_loss": None,
    "loss_type": "nll",
    "label_smoothing_factor": 0.0,
    "use_liger_kernel": False,
    "chat_template_path": None,
    "dataset_kwargs": None,
    "activation_offloading": False,
    # Off for mixtures of experts, since TRL's load-balancing loss does not support per-query masks.
    "router_aux_loss_coef": 0.0,
}


_MOST_STEPS = 10**9
_MOST_BATCH = 1 << 16
MOST_LENGTH = 1 << 24

_RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Range(1, _MOST_BATCH)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), Range(1, _MOST_BATCH)),
    "num_train_epochs": Range(0, 10**6, above=True),
    "max_steps": Range(-1, _MOST_STEPS),
    "learning_rate": Range(0, 10),
    "loraplus_lr_ratio": Range(0, 1000, above=True),
    "weight_decay": Range(0, 100),
    "warmup_steps": Range(0, _MOST_STEPS),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1, below=True)),
    "adam_epsilon": Range(0, 1),
    "max_grad_norm": Range(0, 10**9),
    "neftune_noise_alpha": Range(0, 1000),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), Range(0, _MOST_STEPS, above=True)),
    "torch_empty_cache_steps": Range(1, _MOST_STEPS),
    "eval_delay": Range(0, _MOST_STEPS),
    "save_total_limit": Range(0, _MOST_STEPS),
    "dataloader_num_workers": Range(0, 1024),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataset_num_proc"), Range(1, 1024)),
    "ddp_bucket_cap_mb": Range(1, _MOST_BATCH),
    "ddp_timeout": Range(1, _MOST_STEPS),
    **dict.fromkeys(("seed", "data_seed"), Range(0, (1 << 32) - 1)),
    **dict.fromkeys(("max_length", "pack_length"), Range(1, MOST_LENGTH)),
    "max_tokens_per_batch": Range(1, MOST_LENGTH * 64),
    "pad_to_multiple_of": Range(1, _MOST_BATCH),
}
"""Ranges in which training can work; values outside end in a crash or in weights that are not finite."""


def check_unchanged(args: SFTConfig, values: Mapping[str, Any], reason: str, *, where: str = "") -> None:
    """Refuse options that differ from the only values that work."""
    for name, needed in values.items():
        if (value := getattr(args, name)) != needed:
            raise ValueError(f"{name}: must stay {needed!r}{where}, got {value!r}: {reason}. Remove it.")


def check_block_range(value: Any) -> None:
    """Check a minimum and maximum number of blocks.

    Raises:
        ValueError: it is not a pair of integers, at least 1 and in order.
    """
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(number) is int for number in value)
    if not is_pair or not 1 <= value[0] <= value[1] <= MOST_BLOCKS:
        raise ValueError(
            f"block_range: must be two integers from 1 to {MOST_BLOCKS}, the smaller first, got {shown(value)}. "
            "Give one such as [4, 8]."
        )


@dataclass
class ReadoutConfig(SFTConfig):
    """Options that both stages share, in addition to those of TRL's ``SFTConfig`` and ``TrainingArguments``.

    ``max_length`` limits a row's tokens, readouts included; a longer row is a bad row and never truncated. ``bf16``
    defaults to on if the machine has an accelerator that supports it.
    """

    prompt_template: str = field(
        default=Templates.prompt,
        metadata={"help": "Text before the blocks; {question} is filled in. Chat questions use the chat template."},
    )
    step_template: str = field(
        default=Templates.step, metadata={"help": "Text of a step's readout; {step} is filled in, EOS is added."}
    )
    answer_template: str = field(
        default=Templates.answer, metadata={"help": "Text of an answer's readout; {answer} is filled in, EOS is added."}
    )
    allow_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "Read special tokens spelt out in a question, a step or an answer, such as <|im_end|>, as "
            "special tokens; otherwise they are ordinary text. Those in the templates are always special."
        },
    )
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Variables of the tokenizer's chat template, such as {enable_thinking: false}, in training and in "
            "answers; a row's own column chat_template_kwargs comes first."
        },
    )
    on_bad_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that are malformed, empty, too long, or lack the steps that the stage needs: "
            "'error' lists them and stops, 'drop' omits them and logs how many.",
            "choices": ["error", "drop"],
        },
    )
    dropout: float | None = field(
        default=None, metadata={"help": "LoRA dropout during this stage, in [0, 1); the adapter's own if not set."}
    )

    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Ratio of the learning rate of LoRA's B matrices to learning_rate, which A and the memory rows use "
            "(LoRA+). null: the same rate for all."
        },
    )
    block_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "Minimum and maximum number of blocks, both included: each batch draws its number of blocks from "
            "this range, so that the model can answer with any of them. null: the adapter's num_blocks."
        },
    )
    length_shares: list[float] | None = field(
        default=None,
        metadata={
            "help": "Curriculum by length: shares of the stage that sum to 1. During the first, rows have at most one "
            "step, during the second two, and so on (in stage 1 with the same number of blocks); during the last all "
            "rows are drawn. null: all rows from the start."
        },
    )
    length_accuracy: float | None = field(
        default=None,
        metadata={
            "help": "The next phase of length_shares begins early once the last block's readouts since the last log "
            "line reach this token accuracy, in (0, 1]; the last phase gains the time. null: each phase takes its "
            "share."
        },
    )
    layer_shares: list[float] | None = field(
        default=None,
        metadata={
            "help": "Depth for each phase of length_shares: the share of the base's layers, from the lowest, that a "
            "training step runs; the last must be 1. So early blocks finish in lower layers, where later blocks can "
            "read what they found. Evaluation and answers always run all layers. null: all layers in each phase."
        },
    )
    pack_length: int | None = field(
        default=None,
        metadata={
            "help": "Pack a batch's samples into rows of at most this many tokens, several per row, which leaves "
            "almost no padding; loss and gradients stay the same. null: one sample per row."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in a device's batch, not counting padding (pack_length leaves almost "
            "none), instead of per_device_train_batch_size: long samples come in smaller batches. At least twice the "
            "longest row; needs a table of rows, not a stream."
        },
    )

    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the base's layers with torch.compile, once for all row lengths: takes a minute or two at "
            "the start, then steps on a GPU are faster."
        },
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            # TRL turns bf16 on by default on any machine, and fails on a CPU.
            self.bf16 = is_torch_bf16_gpu_available()
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.0
        check_ranges(self, _RANGES)  # before the parent computes with them
        padded = self.pad_to_multiple_of
        if isinstance(padded, str) and not re.fullmatch("auto|none|null|[0-9]{1,6}", padded.lower()):
            raise ValueError(f"pad_to_multiple_of: must be an integer or 'auto', got {shown(padded)}.")
        if self.torch_compile:  # before the parent sets an environment variable for it
            raise ValueError(
                "torch_compile: must stay False, got True: it compiles the whole model, which breaks at the "
                "readouts' head. Use compile_layers."
            )
        if self.metric_for_best_model is not None:
            self.metric_for_best_model = current_name(self.metric_for_best_model)
            if "loss_by_block/" in self.metric_for_best_model and self.greater_is_better is None:
                self.greater_is_better = False  # the parent only knows names that end in loss
        for name in ("checkpointing", "checkpointing_kwargs"):
            # TRL has a default for the old name alone, of which transformers warns where it has the new one.
            if getattr(self, f"activation_{name}", False) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        super().__post_init__()
        check_unchanged(self, _REFUSED, "rows of readouts have their own layout")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy: must be 'random' or 'sequential', got {self.train_sampling_strategy!r}: "
                "rows have no length until they are laid out."
            )
        if self.on_bad_rows not in ("error", "drop"):
            raise ValueError(f"on_bad_rows: must be 'error' or 'drop', got {self.on_bad_rows!r}.")
        for name in ("pack_length", "max_tokens_per_batch", "pad_to_multiple_of"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, least=1)
        if self.loraplus_lr_ratio is not None and not is_number(self.loraplus_lr_ratio):
            raise ValueError(f"loraplus_lr_ratio: must be a number, got {shown(self.loraplus_lr_ratio)}.")
        if self.block_range is not None:
            check_block_range(self.block_range)
        self._check_curriculum()
        if self.dropout is not None:
            check_share("dropout", self.dropout)
        self.templates  # noqa: B018 - refuses a bad template now, not after the model has been loaded

    @property
    def templates(self) -> Templates:
        """The three templates together."""
        return Templates(
            prompt=self.prompt_template,
            step=self.step_template,
            answer=self.answer_template,
            allow_special_tokens=self.allow_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def most_blocks(self, config: RiMConfig) -> int:
        """Return the number of blocks in a batch with an adapter; the maximum if batches draw their number."""
        return config.num_blocks if self.block_range is None else self.block_range[1]

    def num_layers(self, longest: int, most: int) -> int:
        """Return how many of a base's ``most`` layers run while rows have at most ``longest`` steps."""
        return most if self.layer_shares is None else max(1, round(self.layer_shares[longest - 1] * most))

    def _check_curriculum(self) -> None:
        accuracy = self.length_accuracy
        if accuracy is not None and not (is_number(accuracy) and 0.0 < accuracy <= 1.0):
            raise ValueError(f"length_accuracy: must be a number in (0, 1], got {shown(accuracy)}.")
        if self.length_shares is None:
            for name in ("length_accuracy", "layer_shares"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name}: must come with length_shares, got {shown(value)} alone. Give both.")
            return
        if not are_shares(self.length_shares):
            raise ValueError(
                "length_shares: must be a list of shares, none negative, that sum to 1, the last one not 0, got "
                f"{shown(self.length_shares)}."
            )
        if self.layer_shares is not None and not are_depths(self.layer_shares, len(self.length_shares)):
            raise ValueError(
                f"layer_shares: must be a list of {len(self.length_shares)} numbers in (0, 1], one for each phase of "
                f"length_shares, none below the one before, the last one 1, got {shown(self.layer_shares)}."
            )
        if accuracy is not None and self.logging_strategy == "no":
            raise ValueError(
                "logging_strategy: must not be 'no' with length_accuracy, which is measured over the steps of a log "
                "line. Use steps."
            )
        order = {"train_sampling_strategy": "random", "ignore_data_skip": False, "auto_find_batch_size": False}
        check_unchanged(
            self,
            order,
            "the rows have their own order, which a resumed training continues",
            where=" with length_shares",
        )
        if self.max_tokens_per_batch is not None:
            raise ValueError(
                f"length_shares: must be null with max_tokens_per_batch, got {shown(self.length_shares)}: batches "
                "counted in tokens contain every row once per pass. Use per_device_train_batch_size."
            )
