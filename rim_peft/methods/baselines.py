"""What RiM is compared with on the same base, rows and LoRA: answering at once, written steps, pause tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_peft.methods.method import Method

if TYPE_CHECKING:
    from rim_peft.training.readout_trainer import ReadoutTrainer


class _Baseline(Method):
    """A method with one stage and one readout a sample."""

    stages = ("baseline",)

    def trainer(self, stage: str) -> type[ReadoutTrainer]:
        """Return the trainer."""
        from rim_peft.training import BaselineTrainer

        return BaselineTrainer

    def check_adapter(self, options: Mapping[str, Any]) -> None:
        """Refuse an adapter with which there is nothing to train: without blocks, LoRA is all there is."""
        if not self.has_blocks and options.get("r") == 0:
            raise ValueError(f"adapter.r: must be at least 1 for method {self.name!r}, which trains LoRA alone, got 0.")
        super().check_adapter(options)

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return what the stage needs to know of written steps."""
        return {"written_steps": False, "step_separator": separator}


class Answer(_Baseline):
    """LoRA that answers at once."""

    name = "answer"
    description = "A LoRA adapter that answers at once, without blocks, to compare with."


class WrittenSteps(_Baseline):
    """LoRA that writes its steps out before the answer: a chain of thought."""

    name = "cot"
    description = "A LoRA adapter that writes its reasoning out before the answer, without blocks, to compare with."

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return what the stage needs to know of written steps."""
        return {"written_steps": True, "step_separator": separator}

    def separator(self, separator: str) -> str | None:
        """Return the text behind each step."""
        return separator


class Pause(_Baseline):
    """Pause tokens: blocks that nothing but the answer behind the last one trains. Source: arXiv 2310.02226."""

    name = "pause"
    description = "{blocks} The answer after the last block alone trained them (pause tokens)."
    has_blocks = True
