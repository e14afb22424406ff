"""What both stages share: rows of interleaved readouts through TRL's trainer, and a weighted loss over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
)
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from rim_peft.data.collator import ReadoutCollator, TokenizedRow
from rim_peft.data.preparation import COLUMNS, prepare_dataset
from rim_peft.sequence import Layout, attention_masks, check_architecture, keep_readouts
from rim_peft.training.attachment import attach, check_adapter
from rim_peft.training.losses import block_sums, readout_loss, token_weights
from rim_peft.training.progress import ReadoutProgress
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.tuner.config import RiMConfig, active_config

Validate = Callable[[PeftModel], dict[str, float]]
"""Scores of a model in evaluation mode by name, for instance ``{"accuracy": 0.5}``."""


_REFUSED_ARGUMENTS = {
    "data_collator": "Remove it.",
    "formatting_func": "Use prompt_template, step_template and answer_template.",
    "compute_loss_func": "Remove it.",
    "compute_metrics": "Use validate.",
    "preprocess_logits_for_metrics": "Use validate.",
}


_CARD = """---
library_name: peft
pipeline_tag: text-generation
tags: [peft, rim, latent-reasoning, trl]
---

# {name}

An adapter trained by `rim_peft.{stage}`.

```python
import rim_peft  # registers RIM with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}").eval()
```
"""


class ReadoutTrainer(SFTTrainer, ABC):
    """Base of both stages' trainers; use :class:`GroundingTrainer` or :class:`RefinementTrainer`.

    Args:
        model: a model with a RIM adapter; or a base model, or its id or folder, together with ``peft_config``.
        args: the stage's options.
        train_dataset: rows with ``question``, ``answer`` and ``steps`` (:class:`rim_peft.data.Example`).
        eval_dataset: the same, for the loss with every readout at full weight; may be absent.
        processing_class: the tokenizer; the base's own if not given.
        peft_config: the RIM adapter to attach.
        validate: called with the model at every evaluation; its scores are logged as ``eval_<name>``.
        kwargs: what ``SFTTrainer`` takes besides (callbacks, optimizers, ...).

    Raises:
        ValueError: the model has no RIM adapter, cannot run branching rows, or rows are bad.
    """

    model: Any  # the PeftModel; the parent declares more kinds
    config_class: type[ReadoutConfig]
    needs_steps: bool
    _signature_columns: Any
    _tag_names = ["trl", "peft", "rim", "latent-reasoning"]  # noqa: RUF012 - TRL's own class attribute
    _name = "RiM"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ReadoutConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: RiMConfig | None = None,
        validate: Validate | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or self.config_class()
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"args: {type(self).__name__} takes a {self.config_class.__name__}, got {type(args).__name__}. "
                "Give the stage's own config."
            )
        for name, remedy in _REFUSED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: cannot be given, since readouts have rows and a loss of their own. {remedy}")
        quantization = kwargs.pop("quantization_config", None)
        peft_model = attach(model, peft_config, args, quantization_config=quantization)
        self._rim_config = active_config(peft_model)
        check_adapter(peft_model, self._rim_config)
        check_architecture(peft_model.get_base_model())
        self._max_positions = getattr(peft_model.config.get_text_config(), "max_position_embeddings", None)
        self._validate = validate
        self.args = args  # the rows are prepared inside the parent's constructor
        adapter_weights = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
        super().__init__(
            model=peft_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # SFTTrainer casts the adapter of a quantised base to bf16. The memory is trained in fp32, and stage 2 must
        # start from exactly the weights that stage 1 left.
        for name, parameter in peft_model.named_parameters():
            if name in adapter_weights:
                parameter.data = adapter_weights[name].to(parameter.device)
        self.data_collator = ReadoutCollator(
            self._rim_config.block_tokens, pad_id=self._tokenizer.pad_token_id, readouts=self.readouts()
        )
        # The loss divides by the samples of the whole optimiser step itself (`_get_num_items_in_batch`).
        self.model_accepts_loss_kwargs = True
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ReadoutProgress)
        if args.dropout is not None:
            peft_model.base_model.set_dropout(args.dropout)

    @abstractmethod
    def readouts(self) -> Callable[[TokenizedRow], list[list[int]]]:
        """Return the function from a tokenised row to what is read out after each of its blocks.

        It must not hold the trainer, since data loader processes get it by pickle.
        """

    @abstractmethod
    def block_weights(self, num_steps: Tensor, num_blocks: Tensor, *, progress: float) -> Tensor:
        """Return the (B, K) loss weights of a batch's readouts.

        Args:
            num_steps: (B,) each sample's number of reasoning steps.
            num_blocks: (B,) each sample's number of blocks.
            progress: share of the stage that is done, in [0, 1).
        """

    @property
    def min_blocks(self) -> int:
        """Blocks that every row has at the least."""
        return self._rim_config.num_blocks

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: ReadoutConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Tokenise a dataset, unless that has been done.

        Raises:
            ValueError: rows tokenised before lack the steps that this stage needs.
        """
        if set(COLUMNS) <= set(dataset.column_names or ()):
            if self.needs_steps and isinstance(dataset, Dataset) and not all(dataset["step_ids"]):
                raise ValueError(
                    f"{dataset_name} dataset: rows that are tokenised already must have steps for stage 1, some have "
                    "none. Give rows with question, steps and answer."
                )
            return dataset
        return prepare_dataset(
            dataset,
            processing_class,
            templates=args.templates,
            needs_steps=self.needs_steps,
            num_blocks=self.min_blocks,
            block_length=self._rim_config.block_tokens.length,
            max_length=args.max_length,
            max_positions=self._max_positions,
            on_bad_rows=args.on_bad_rows,
            num_proc=args.dataset_num_proc,
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Count the samples of an optimiser step, over its micro-batches and over processes."""
        count = torch.tensor(sum(len(batch["input_ids"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the stage's loss for a batch, in nats per sample; logs it by block."""
        is_training = self.model.training
        layout = Layout(**{name: value for name, value in inputs.items() if name != "num_steps"})
        # Evaluation weighs as the stage's first step does, so that its loss can be compared over the run.
        progress = self.state.global_step / max(1, self.state.max_steps) if is_training else 0.0
        num_blocks = (layout.block_ends >= 0).sum(dim=1)
        weights = self.block_weights(inputs["num_steps"], num_blocks, progress=progress)
        layout = keep_readouts(layout, weights > 0)
        base = self.accelerator.unwrap_model(model).get_base_model()
        outputs = model(
            input_ids=layout.input_ids,
            attention_mask=attention_masks(base.config, layout, dtype=base.get_output_embeddings().weight.dtype),
            position_ids=layout.position_ids,
            shift_labels=layout.shift_labels,
            fused_lm_head=True,
        )
        num_samples = len(layout.input_ids) if num_items_in_batch is None else num_items_in_batch
        label_blocks = layout.label_blocks
        loss = readout_loss(outputs.log_probs, token_weights(weights, label_blocks), num_samples=num_samples)
        if num_items_in_batch is not None:
            # The count is that of all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        sums = block_sums(outputs.log_probs, outputs.is_top1, label_blocks, num_blocks=weights.shape[1])
        self._record(sums, weights, layout)
        return (loss, outputs) if return_outputs else loss

    def _record(self, sums: Tensor, weights: Tensor, layout: Layout) -> None:
        """Add a batch's loss per token, token accuracy and mean weight of each block to the next log line."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        counts = torch.cat([weights.sum(0)[None], weights.new_full((1, weights.shape[1]), len(weights))])
        # Processes may hold batches with different numbers of blocks.
        table = self.accelerator.pad_across_processes(torch.cat([sums, counts.float()]), dim=1)
        table = self.accelerator.reduce(table, reduction="sum")
        for block, (loss, correct, tokens, weight, samples) in enumerate(table.T.tolist(), start=1):
            if tokens:
                metrics[f"block_{block}/loss"].append(loss / tokens)
                metrics[f"block_{block}/token_accuracy"].append(correct / tokens)
            metrics[f"block_{block}/weight"].append(weight / samples)
        if self.model.training:
            self._total_train_tokens += int(self.accelerator.reduce(layout.attention_mask.sum(), reduction="sum"))
        metrics["num_tokens"] = [self._total_train_tokens]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss alone: readouts have no logits that a metric could line up with labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write a card that says how to load the adapter; TRL's own would load it without ``import rim_peft``."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            base = str(getattr(self.model.get_base_model().config, "_name_or_path", "") or "BASE")
            text = _CARD.format(name=model_name or folder.name, stage=type(self).__name__, base=base)
            (folder / "README.md").write_text(text, encoding="utf-8")

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: what a readout says is generated, not predicted token by token.

        Raises:
            ValueError: always; names what to use instead.
        """
        raise ValueError(
            "predict: readouts have no logits that could be returned row by row. Use rim_peft.inference.read_blocks, "
            "or evaluate for the loss."
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add the scores of ``validate`` to the evaluation's metrics."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._validate is not None:
            self.model.eval()
            scores = self._validate(self.accelerator.unwrap_model(self.model))
            prefix = kwargs.get("metric_key_prefix", "eval")
            metrics = dict(output.metrics or {})
            metrics.update({f"{prefix}_{name}": value for name, value in scores.items()})
            output = output._replace(metrics=metrics)
        return output
