"""The sections of a recipe as frozen dataclasses; the help of each option is next to its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rim_peft.data.examples import Templates
from rim_peft.methods import METHODS, get_method
from rim_peft.tuner import RiMConfig
from rim_peft.values import Range, check_ranges, shown

if TYPE_CHECKING:
    from rim_peft.tasks.task import Task
    from rim_peft.training.readout_config import ReadoutConfig
    from rim_peft.training.readout_trainer import ReadoutTrainer

MOST_LENGTH = 1 << 24
"""Largest allowed number of tokens of a row or an answer."""

AS_IN_STAGE: dict[str, str] = {}
"""Metadata of options whose help is in the class of the stages."""


@dataclass(frozen=True)
class ModelOptions:
    """Section ``model``: the frozen base."""

    name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the base, or a name that `rim-peft base` knows, such as smollm2-135m."},
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "GGUF file in that folder or Hub repository; it is converted to a float32 base once."},
    )
    config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Instead of name_or_path: model_type and the fields of its configuration. A base with random "
            "weights is built from it, using the seed, and a tokenizer of at most vocab_size tokens from the training "
            "rows; both are saved to output_dir/base."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base on the Hub."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer, if it is not the base's own."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Data type of the base's weights; 'auto' keeps the type of its files."}
    )
    quantization: Literal["nf4", "int8"] | None = field(
        default=None, metadata={"help": "Load the base in 4 or 8 bits with bitsandbytes (QLoRA)."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the base: 'sdpa', 'eager' or, on a GPU, 'flex_attention', which skips what the mask "
            "hides; transformers' choice if not set."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base."})

    def __post_init__(self) -> None:
        """Check that the base is given in one way.

        Raises:
            ValueError: both or neither of ``name_or_path`` and ``config``, or a configuration without its type.
        """
        if (self.name_or_path is None) == (self.config is None):
            given = "neither" if self.config is None else "both"
            raise ValueError(f"name_or_path: either this or config must be given, got {given}.")
        if self.gguf_file is not None and self.config is not None:
            raise ValueError(
                f"gguf_file: must come with name_or_path, got {shown(self.gguf_file)} with config. Give name_or_path "
                "in place of config."
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError(f"config: must hold model_type, such as 'llama', got {sorted(map(str, self.config))}.")


@dataclass(frozen=True)
class DataOptions:
    """Section ``data``: the rows and how they are written."""

    task: str = field(
        default="rows",
        metadata={
            "help": "A task in docs/tasks.md, or your own class as package.module:ClassName. 'rows' reads any rows at "
            "data.path (docs/your-data.md)."
        },
    )
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of the task."})
    path: str | None = field(
        default=None,
        metadata={
            "help": "File, folder or Hub id (owner/name or owner/name:config) to read; the task's source if not set."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default="validation",
        metadata={
            "help": "Split whose first rows are used to choose the best adapter; null holds them out of train_split, "
            "by a hash of the question. If a source has no validation split, a fifteenth of its training questions is "
            "used."
        },
    )
    validation_rows: int = field(
        default=500, metadata={"help": "Number of validation rows; 0 keeps the last weights without validation."}
    )
    train_rows: int | None = field(
        default=None, metadata={"help": "Number of training rows, taken from the start; null: all."}
    )
    prompt_template: str = field(default=Templates.prompt, metadata=AS_IN_STAGE)
    step_template: str = field(default=Templates.step, metadata=AS_IN_STAGE)
    answer_template: str = field(default=Templates.answer, metadata=AS_IN_STAGE)
    step_separator: str = field(
        default=Templates.separator,
        metadata={"help": "Text after each step, for methods that write the steps out before the answer."},
    )
    allow_special_tokens: bool = field(default=False, metadata=AS_IN_STAGE)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, metadata=AS_IN_STAGE)
    on_bad_rows: Literal["error", "drop"] = field(default="error", metadata=AS_IN_STAGE)
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Longest row in tokens, prompt, blocks and all readouts; a longer one is a bad row. null: no limit."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Read training rows during training, not before."})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range, or two exclude each other.
        """
        if self.task == "rows" and self.path is None:
            raise ValueError("task: must be given. For rows of your own give data.path instead.")
        for name, least in (("validation_rows", 0), ("train_rows", 1), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}.")
        check_ranges(self, {"max_length": Range(1, MOST_LENGTH)})
        if not self.step_separator:
            raise ValueError(f"step_separator: must not be empty, got {self.step_separator!r}.")
        for name in ("prompt", "step", "answer"):
            try:
                Templates(**{name: getattr(self, f"{name}_template")})
            except ValueError as error:
                raise ValueError(f"{name}_template: {str(error).partition(': ')[2]}") from None
        Templates(chat_template_kwargs=self.chat_template_kwargs)
        if self.validation_rows and self.validation_split == self.train_split:
            raise ValueError(
                f"validation_split: must differ from train_split, got {self.train_split!r} twice. null holds "
                "validation rows out of train_split."
            )
        if self.streaming and self.validation_rows and self.validation_split is None:
            raise ValueError(
                "validation_split: must be given with streaming, since rows of a stream cannot be held out, got null. "
                "Name a split, or set validation_rows=0."
            )

    @property
    def templates(self) -> Templates:
        """The three templates together."""
        return Templates(
            prompt=self.prompt_template,
            step=self.step_template,
            answer=self.answer_template,
            separator=self.step_separator,
            allow_special_tokens=self.allow_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )


@dataclass(frozen=True)
class EvaluationOptions:
    """Section ``evaluation``: how answers are generated, in validation and by ``rim-peft evaluate``."""

    batch_size: int = field(default=16, metadata={"help": "Questions per batch."})
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum number of tokens of an answer."})
    sample_rows: int = field(
        default=4,
        metadata={
            "help": "Number of validation rows whose readouts are shown after each evaluation: under the progress bar, "
            "and as a table in wandb, trackio and TensorBoard if a stage's report_to names them, which sends these "
            "rows' texts there. 0: none."
        },
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range.
        """
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}.")
        check_ranges(self, {"batch_size": Range(1, 1 << 16), "max_new_tokens": Range(1, MOST_LENGTH)})
        check_ranges(self, {"sample_rows": Range(0, 64)})


HARDWARE = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")
"""Options of stages that depend on the hardware, so they are only checked when training starts."""


@dataclass(frozen=True)
class Recipe:
    """A whole run as data. ``adapter`` and the stages' sections hold the given fields of their classes.

    A method reads only its own stages' sections, so one recipe can hold those of several methods.

    Raises:
        ValueError: all stages of the method are null, or the method does not allow the adapter's blocks.
    """

    output_dir: str = field(metadata={"help": "Folder to write to; must be new or empty unless resume is set."})
    model: ModelOptions = field(metadata={"help": "The base."})
    data: DataOptions = field(metadata={"help": "The rows."})
    method: str = field(
        default="rim",
        metadata={
            "choices": list(METHODS),
            "help": "rim: memory blocks, trained in the stages grounding and refinement. For comparison, in the stage "
            "baseline: answer (LoRA that answers directly), cot (LoRA that writes out its steps), pause (blocks "
            "trained only by the answer after the last one), parallel (their memory tokens also predict the "
            "steps); and coconut (continuous thoughts), in its own stage.",
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of new weights, the order of rows, and dropout."})
    resume: bool = field(default=False, metadata={"help": "Resume the interrupted run in output_dir."})
    adapter: dict[str, Any] = field(default_factory=dict, metadata={"help": "The adapter."})
    grounding: dict[str, Any] | None = field(default_factory=dict, metadata={"help": "Stage 1; null skips it."})
    refinement: dict[str, Any] | None = field(default_factory=dict, metadata={"help": "Stage 2; null skips it."})
    baseline: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The only stage of the methods that RiM is compared with."}
    )
    coconut: dict[str, Any] = field(default_factory=dict, metadata={"help": "The training of Coconut."})
    evaluation: EvaluationOptions = field(
        default_factory=EvaluationOptions, metadata={"help": "How answers are generated."}
    )

    def __post_init__(self) -> None:
        """Check that there is something to train."""
        check_ranges(self, {"seed": Range(0, (1 << 32) - 1)})
        get_method(self.method)
        if not self.stages:
            raise ValueError("refinement: must not be null if grounding is null too. Keep a stage.")
        get_method(self.method).check_adapter(self.adapter)

    @property
    def stages(self) -> list[str]:
        """The sections of the stages to train, in order."""
        return [name for name in get_method(self.method).stages if getattr(self, name) is not None]

    def rim_config(self) -> RiMConfig:
        """Return a new configuration of the adapter, without blocks for methods that have none."""
        return get_method(self.method).adapter(self.adapter)

    def task(self) -> Task:
        """Return the task with its options; imports its module."""
        from rim_peft.tasks import get_task

        return get_task(self.data.task, **self.data.options)

    def stage_trainers(self, *, anywhere: bool = False) -> list[tuple[type[ReadoutTrainer], ReadoutConfig]]:
        """Return the trainer of each stage and its options.

        Args:
            anywhere: omit hardware options (``HARDWARE``), to inspect a run of another machine.
        """
        return [self.stage_trainer(name, anywhere=anywhere) for name in self.stages]

    def stage_trainer(
        self, stage: str, *, anywhere: bool = False, **changes: Any
    ) -> tuple[type[ReadoutTrainer], ReadoutConfig]:
        """Return the trainer of one stage and its options.

        Args:
            stage: its section.
            anywhere: omit hardware options (``HARDWARE``).
            changes: options to override.
        """
        trainer = get_method(self.method).trainer(stage)
        values = self._stage_values(stage)
        if anywhere:
            values = {**{key: value for key, value in values.items() if key not in HARDWARE}, "bf16": False}
        return trainer, trainer.config_class(**{**values, **changes})

    def _stage_values(self, stage: str) -> dict[str, Any]:
        data = self.data
        return {
            **getattr(self, stage),
            **get_method(self.method).stage_options(data.step_separator),
            "output_dir": str(Path(self.output_dir) / stage),
            "seed": self.seed,
            "prompt_template": data.prompt_template,
            "step_template": data.step_template,
            "answer_template": data.answer_template,
            "allow_special_tokens": data.allow_special_tokens,
            "chat_template_kwargs": dict(data.chat_template_kwargs),
            "on_bad_rows": data.on_bad_rows,
            "max_length": data.max_length,
        }


class FoundRecipe(Recipe):
    """The recipe in a run's folder, which may come from somebody else: it cannot make code run.

    The base's code runs only if the caller allows it, and a task's module is imported only if the caller also names its
    class; a generator of reasoning-gym runs only if the caller names it.
    """

    def task(self, *, named: str | None = None) -> Task:
        """Return the task with its options.

        Args:
            named: the task that the caller names; None if only the recipe names it.

        Raises:
            ValueError: only the recipe names the class to import.
        """
        from rim_peft.tasks import REASONING_GYM, TASKS

        name = self.data.task
        if name not in TASKS and ":" in name and named != name:
            danger = f"the class {shown(name)}, whose module would be imported and can run any code"
            if name.startswith(REASONING_GYM):  # its code is written for its user's own options
                danger = f"{shown(name)}, whose generator was not made for other people's options and could run code"
            raise ValueError(
                f"data.task: the recipe in the folder names {danger}. If you trust it, name it yourself (--task; in "
                "Python task_name)."
            )
        return super().task()
