"""Coconut: steps replaced by continuous thoughts, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from rim_peft.data.coconut import CoconutCollator, count_longest, cut_texts
from rim_peft.data.collator import TokenizedRow, chain_parts
from rim_peft.data.tokenization import tokenize_separator
from rim_peft.sequence import IGNORE_INDEX
from rim_peft.training.coconut_config import CoconutConfig
from rim_peft.training.head import run_head
from rim_peft.training.metrics import TextMetrics
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.thoughts import check_thinks, think


class CoconutTrainer(ReadoutTrainer):
    """Trains ``- log p(r_{k+1} ... r_T, y | x, <b>, c·k thoughts, </b>)``, stage by stage ``k``.

    All stages are one training: the stage follows from the step. Every row of a batch has as many thoughts, also one
    with fewer steps than ``k``. ``<m>``'s row and ``num_blocks`` of the adapter are not used. Rows must have steps. The
    evaluation loss is that of the last stage throughout. See :class:`ReadoutTrainer` for the arguments.

    Source: arXiv 2412.06769.
    """

    config_class = CoconutConfig
    needs_steps = True
    least_blocks = 0
    trains_sharded = False
    metrics_class = TextMetrics
    args: CoconutConfig
    _name = "Coconut"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_thinks(self.model)
        self._last_stage = 0  # that was trained
        if self.args.reset_optimizer:
            self.add_callback(_ResetOptimizer())

    def readouts(self) -> Callable[[TokenizedRow], list[list[int]]]:
        """Return the parts of the chain that is written after the thoughts."""
        return partial(chain_parts, separator_ids=self._separator_ids(self._tokenizer))

    def make_collator(self, *, pad_id: int) -> CoconutCollator:
        """Return the collator of prompts and chains."""
        return CoconutCollator(self.readouts(), pad_id=pad_id)

    def row_limits(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Rows need steps; their length is that of the stage where they are longest."""
        per_step, num_stages = self.args.thoughts_per_step, self.args.num_stages
        separator_ids = self._separator_ids(tokenizer)
        return {
            "needs_steps": True,
            "num_blocks": num_stages,
            "block_length": per_step + 2 + len(separator_ids),
            "count_tokens": partial(
                count_longest, separator_ids=separator_ids, thoughts_per_step=per_step, num_stages=num_stages
            ),
        }

    def _separator_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return tokenize_separator(tokenizer, self.args.step_separator, vocab_size=self.blocks.begin)

    def stage(self, step: int) -> int:
        """Return the stage that an optimiser step, counted from 0, trains: the current one, or one drawn from all."""
        args = self.args
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # of the step alone, for resuming
        if args.mix_share and float(torch.rand((), generator=random)) < args.mix_share:
            return int(torch.randint(args.num_stages + 1, (), generator=random))
        return args.stage_at(step / max(1, self.state.max_steps))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return a stage's loss for a batch, in nats per sample: the current stage's, in evaluation the last one's."""
        mode = "train" if self.model.training else "eval"
        args = self.args
        stage = self.stage(self.state.global_step) if mode == "train" else args.num_stages
        num_thoughts = stage * args.thoughts_per_step
        labels = cut_texts(inputs, stage if stage < args.num_stages else None)
        if mode == "train":
            self._last_stage = stage
            num_tokens = int(inputs["attention_mask"].sum() + (labels != IGNORE_INDEX).sum())
            self._new_tokens += num_tokens + len(labels) * (2 + num_thoughts)
        prompt_ids, mask, labels = (
            tensor.to(args.device) for tensor in (inputs["input_ids"], inputs["attention_mask"], labels)
        )
        rim: Any = self.accelerator.unwrap_model(model)
        with record_function("rim_peft.thoughts"), self.accelerator.autocast():
            thoughts = think(rim, prompt_ids, mask, num_thoughts=num_thoughts)
        with record_function("rim_peft.forward"):
            end = labels.new_full((len(labels), 1), self._rim_config.block_tokens.end)
            # `</b>` predicts the first token of the text, and the last one predicts nothing.
            text_ids = torch.cat([end, labels[:, :-1].clamp(min=0)], dim=1)
            is_label = labels != IGNORE_INDEX
            text = thoughts.followed_by(rim.get_base_model(), text_ids, is_label.long())
            no_label = labels.new_full(thoughts.last.shape[:2], IGNORE_INDEX)
            outputs = run_head(model, torch.cat([no_label, labels], dim=1), head=self._head, **text)
        metrics: Any = self._sums[mode]
        metrics.add(outputs.is_top1[:, -labels.shape[1] :], is_label)
        loss = -outputs.log_probs.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            # The count is that of all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def figures(self, mode: str) -> dict[str, float]:
        """Return the share of tokens that were the likeliest and, in training, the last step's stage."""
        figures = super().figures(mode)
        return {**figures, "stage": float(self._last_stage)} if mode == "train" else figures


class _ResetOptimizer(TrainerCallback):
    """Forgets the optimiser's state where a stage begins: known from the step alone, so that resuming is exact."""

    def on_step_begin(
        self, args: CoconutConfig, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Clear the state if the step before was another stage's."""
        before, now = (
            args.stage_at(max(0, step) / state.max_steps) for step in (state.global_step - 1, state.global_step)
        )
        if before != now:
            optimizer.state.clear()
