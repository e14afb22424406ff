"""The trainer that both stages share: interleaved readouts in TRL's trainer, and a weighted loss over them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_optimizer import is_optimizer_factory

from rim_peft.data.batching import load_by_tokens
from rim_peft.data.cache import COLUMNS, check_table
from rim_peft.data.objective import Objective
from rim_peft.data.preparation import prepare_dataset
from rim_peft.data.tokenization import padding_id
from rim_peft.sequence import Layout, keep_readouts, pack_rows
from rim_peft.training.attachment import (
    attach,
    check_adapter,
    check_depth,
    checkpoint_for,
    fall_back_from_flex,
    write_card,
)
from rim_peft.training.distributed import main_first, shards_weights
from rim_peft.training.head import CompiledLayers, choose_head, score_labels
from rim_peft.training.losses import label_weights, readout_loss
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.samples import ReadSamples
from rim_peft.training.short_first import ShortFirstTrainer
from rim_peft.training.watching import Validate
from rim_peft.tuner.bases import check_architecture, num_positions
from rim_peft.tuner.config import RiMConfig, active_config
from rim_peft.tuner.layers import check_uncompiled

_REFUSED_ARGUMENTS = {
    "data_collator": "Remove it.",
    "formatting_func": "Use prompt_template, step_template and answer_template.",
    "compute_loss_func": "Remove it.",
    "compute_metrics": "Use validate.",
    "preprocess_logits_for_metrics": "Use validate.",
}


class ReadoutTrainer(ShortFirstTrainer):
    """Trains an :class:`~rim_peft.data.objective.Objective`: :class:`GroundingTrainer`, :class:`RefinementTrainer`.

    Args:
        model: a model with a RIM adapter; or a base model, its id or its folder, together with ``peft_config``.
        args: the stage's options.
        train_dataset: rows with ``question``, ``answer`` and ``steps`` (:class:`rim_peft.data.Example`).
        eval_dataset: optional rows for the evaluation loss, with every readout at full weight.
        processing_class: the tokenizer; the base's own if not given.
        peft_config: the RIM adapter to attach.
        validate: called with the model at every evaluation; its scores are logged as ``eval_<name>``.
        read_samples: called with the model after every evaluation, if there is somewhere to show its samples: a
            tracker of ``report_to`` that takes tables (wandb, trackio, TensorBoard), or a terminal.
        kwargs: further arguments of ``SFTTrainer`` (callbacks, optimizers, ...).

    Raises:
        ValueError: the model has no RIM adapter, cannot run branching rows or is not causal, or rows are bad.
    """

    data_collator: Any
    config_class: type[ReadoutConfig]
    least_blocks = 1  # minimum that an adapter must have to be trained

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
        read_samples: ReadSamples | None = None,
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
                raise ValueError(f"{name}: cannot be given, since readouts have their own rows and loss. {remedy}")
        quantization = kwargs.pop("quantization_config", None)
        peft_model = attach(model, peft_config, args, quantization_config=quantization)
        self._rim_config = active_config(peft_model)
        self._objective: Objective | None = None
        args = self._fit(peft_model, args)
        self._max_positions = num_positions(peft_model.config)
        self.args = args = copy(args)  # the rows are prepared inside the parent's constructor
        args.remove_unused_columns = False  # the Trainer would keep columns of its own names
        adapter_weights = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
        super().__init__(
            model=peft_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            validate=validate,
            read_samples=read_samples,
            **kwargs,
        )
        _restore_types(peft_model, adapter_weights)
        self._head = choose_head(peft_model.get_base_model(), is_sharded=shards_weights())
        self.data_collator = self.objective.collator(
            pad_id=padding_id(self.tokenizer, self._rim_config.block_tokens.begin),
            block_range=args.block_range,
            seed=args.seed,
        )
        # The loss divides by the samples of the whole optimiser step itself (`get_batch_samples`).
        self.model_accepts_loss_kwargs = True
        if args.dropout is not None:
            peft_model.base_model.set_dropout(args.dropout)
        self._compiled_layers = CompiledLayers(peft_model.get_base_model()) if args.compile_layers else nullcontext()

    def _fit(self, model: Any, args: Any) -> Any:
        """Check that base and adapter can be trained, and return the options that fit them.

        Raises:
            ValueError: they cannot.
        """
        base: Any = model.get_base_model()
        config = self._rim_config
        check_adapter(model, config, min_blocks=self.least_blocks, block_range=args.block_range)
        trains_memory = self.objective_of(args, config).trains_memory
        model.base_model.memory.rows(model.active_adapter).requires_grad_(trains_memory)
        check_architecture(base)
        if args.compile_layers:
            check_uncompiled("compile_layers", config)
        fall_back_from_flex(base, device_type=args.device.type)
        args = checkpoint_for(base, args)
        if args.layer_shares is not None:
            args = check_depth(base, config, args)
        return args

    @classmethod
    @abstractmethod
    def objective_of(cls, args: Any, config: RiMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Objective:
        """Return the stage's objective: what it trains on in each row. Needs no model.

        Args:
            config: the adapter's config, attached to a base before, so that it has the memory's token ids.
            tokenizer: the base's. Without it, the objective of a stage that writes out steps has no separator.
        """

    @classmethod
    def check_model(cls, model: PeftModel) -> None:
        """Check the model's requirements for this training beyond those of every training.

        Raises:
            ValueError: the model does not meet them.
        """

    @property
    def objective(self) -> Objective:
        """The stage's objective."""
        if self._objective is None:
            self._objective = self.objective_of(self.args, self._rim_config, self.tokenizer)
        return self._objective

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        tokenizer: Any = self.processing_class
        return tokenizer

    def prepare_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> Dataset | IterableDataset:
        """Tokenise rows unless they are tokenised already.

        Raises:
            ValueError: rows already tokenised contain memory ids, or lack the steps that this stage needs.
        """
        args = self.args
        objective = self.objective_of(args, self._rim_config, tokenizer)
        if set(COLUMNS) <= set(rows.column_names or ()):
            if objective.needs_steps and isinstance(rows, Dataset) and not all(rows["step_ids"]):
                raise ValueError(
                    f"{name} dataset: rows already tokenised must have steps for this training, but some "
                    "have none. Give rows with question, steps and answer."
                )
            if isinstance(rows, Dataset):
                check_table(rows, tokenizer, objective.blocks.begin)
            return rows
        return main_first(  # the others find its table on disk
            lambda: prepare_dataset(
                rows,
                tokenizer,
                objective,
                templates=args.templates,
                max_length=args.max_length,
                max_positions=self._max_positions,
                on_bad_rows=args.on_bad_rows,
                num_proc=args.dataset_num_proc,
            )
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, limited by rows or, with ``max_tokens_per_batch``, by tokens.

        Raises:
            ValueError: the rows are a stream, but their lengths are needed.
        """
        self.check_rows()
        if self.args.max_tokens_per_batch is None:
            return _on_host(super().get_train_dataloader())
        loader = load_by_tokens(
            self.train_dataset,
            self.row_order(),
            self.objective,
            max_tokens=self.args.max_tokens_per_batch,
            num_processes=self.accelerator.num_processes,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # Each process already gets the same number of batches; accelerate can only even out batches of one size.
        before, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return _on_host(self.accelerator.prepare(loader))
        finally:
            self.accelerator.even_batches = before

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the loader of evaluation batches."""
        return _on_host(super().get_eval_dataloader(*args, **kwargs))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the check that a training has blocks in its rows applies again."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.model.base_model.memory.has_trained = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimiser, with a separate learning rate for LoRA's B matrices if ``loraplus_lr_ratio`` is set.

        Raises:
            ValueError: the optimiser does not support parameter groups.
        """
        ratio = self.args.loraplus_lr_ratio
        if ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        trained = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if is_optimizer_factory(optimizer_class) or not {"params", "model", "optimizer_dict"}.isdisjoint(options):
            name = getattr(self.args.optim, "value", self.args.optim)
            raise ValueError(
                f"loraplus_lr_ratio: must be null with optim {name!r}, which makes its own groups of parameters, got "
                f"{ratio!r}. Use adamw_torch."
            )
        self.optimizer = create_loraplus_optimizer(
            trained,
            optimizer_class,
            loraplus_lr_ratio=ratio,
            loraplus_lr_embedding=options["lr"],  # PEFT's default would hardly train LoRA on embeddings
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward."""
        # Around backward too: gradient checkpointing runs the layers again there.
        with self._compiled_layers:
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the stage's loss for a batch, in nats per sample."""
        loss, outputs = self.summed_loss(model, inputs)
        if num_items_in_batch is None:
            loss = loss / len(inputs["input_ids"])
        else:  # the count is over all processes, and their gradients are averaged
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def summed_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Return the sum of a batch's losses over its samples and the head's outputs; adds to the metrics by block."""
        is_training = self.model.training
        # Evaluation uses the full weight of all readouts, so that its loss is comparable over the run.
        step = self.state.global_step
        progress = step / max(1, self.state.max_steps) if is_training else None
        base = self.accelerator.unwrap_model(model).get_base_model()
        with record_function("rim_peft.rows"):
            layout = Layout(**{name: value for name, value in inputs.items() if name != "num_steps"})
            has_block = layout.block_ends >= 0
            weights = self.objective.weights(
                inputs["num_steps"],
                has_block.sum(dim=1),
                progress=progress,
                longest=self.longest_chain(step) if is_training else None,
            )
            layout = arrange_rows(self.args, layout, weights)
            self._new_tokens += int(layout.attention_mask.sum()) if is_training else 0
            labels = layout.labels()
            device = self.args.device
            layout, labels, weights = layout.to(device), labels.to(device), weights.to(device)
        outputs = score_labels(model, base, layout, labels, head=self._head)
        log_probs, is_top1 = outputs.log_probs[0], outputs.is_top1[0]
        weight_of_each = label_weights(weights, labels, in_place=self.objective.in_place_weight)
        loss = readout_loss(log_probs, weight_of_each, num_samples=1)
        metrics: Any = self._sums["train" if is_training else "eval"]
        metrics.add(log_probs, is_top1, labels, weights, has_block.to(device))
        return loss, outputs

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write a card that says how to load the adapter; TRL's card omits ``import rim_peft``."""
        if self.is_world_process_zero():
            base = str(self.model.get_base_model().config.name_or_path or "")
            write_card(Path(str(self.args.output_dir)), name=model_name, stage=type(self).__name__, base=base)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: readouts are generated, not predicted token by token.

        Raises:
            ValueError: always; names what to use instead.
        """
        raise ValueError(
            "predict: readouts have no logits to return row by row. Use rim_peft.inference.read_blocks, "
            "or evaluate for the loss."
        )


def arrange_rows(args: ReadoutConfig, layout: Layout, weights: Tensor) -> Layout:
    """Drop readouts of weight 0 from the rows, and pack samples if ``pack_length`` is set.

    Args:
        layout: the collator's rows.
        weights: (D, K) loss weights of the samples' readouts.
    """
    layout = keep_readouts(layout, weights > 0)
    multiple = int(args.pad_to_multiple_of or 1)
    if args.pack_length is None and multiple == 1:
        return layout
    return pack_rows(layout, args.pack_length, multiple_of=multiple)


def _restore_types(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Put an adapter's weights back where their type has changed."""
    # SFTTrainer casts the adapter of a quantised base to bf16. But the memory is trained in fp32, and stage 2 must
    # start from exactly the weights that stage 1 ended with.
    for name, parameter in model.named_parameters():
        if name in weights and parameter.dtype != weights[name].dtype:
            parameter.data = weights[name].to(parameter.device)


def _on_host(loader: DataLoader) -> DataLoader:
    """Keep accelerate from sending batches to the device."""
    vars(loader)["device"] = None
    return loader
