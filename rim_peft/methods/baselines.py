"""Baselines with the same base, rows and LoRA as RiM: answers, chains, pause tokens, parallel steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_peft.methods.method import Method

if TYPE_CHECKING:
    from rim_peft.training.readout_trainer import ReadoutTrainer


class _Baseline(Method):
    """A method with one stage and one readout per sample."""

    stages = ("baseline",)
    writes_steps = False

    def trainer(self, stage: str) -> type[ReadoutTrainer]:
        """Return the trainer."""
        from rim_peft.training import BaselineTrainer

        return BaselineTrainer

    def check_adapter(self, options: Mapping[str, Any]) -> None:
        """Refuse an adapter with nothing to train: without blocks, only LoRA is trained."""
        if not self.has_blocks and options.get("r") == 0:
            raise ValueError(f"adapter.r: must be at least 1 for method {self.name!r}, which trains only LoRA, got 0.")
        super().check_adapter(options)

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return the stage's options for written steps."""
        return {"written_steps": self.writes_steps, "step_separator": separator}

    def separator(self, separator: str) -> str | None:
        """Return the text after each step; None if it writes no steps."""
        return separator if self.writes_steps else None


class Answer(_Baseline):
    """LoRA that answers immediately."""

    name = "answer"
    description = "A LoRA adapter that answers immediately, without blocks, for comparison."


class WrittenSteps(_Baseline):
    """LoRA that writes its steps before the answer: a chain of thought."""

    name = "cot"
    description = "A LoRA adapter that writes its reasoning before the answer, without blocks, for comparison."
    writes_steps = True


class Pause(_Baseline):
    """Pause tokens: blocks trained only by the answer after the last one. Source: arXiv 2310.02226."""

    name = "pause"
    description = "{blocks} The blocks were trained only by the answer after the last one (pause tokens)."
    has_blocks = True


class Parallel(_Baseline):
    """Parallel step supervision: a block's memory tokens predict its step, all at once. Source: arXiv 2606.31779."""

    name = "parallel"
    description = (
        "{blocks} Their memory tokens were trained to predict the reasoning steps (parallel step supervision)."
    )
    has_blocks = True

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return the stage's options for steps in place."""
        return {**super().stage_options(separator), "steps_in_place": True}
