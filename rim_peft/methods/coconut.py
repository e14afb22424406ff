"""Coconut: continuous thoughts in place of steps, stage by stage. Source: arXiv 2412.06769."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rim_peft.inference import Answerer, ThoughtAnswerer
from rim_peft.methods.method import Method

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from rim_peft.evaluation.latency import Way
    from rim_peft.training.readout_trainer import ReadoutTrainer


class Coconut(Method):
    """The model's last hidden states, given back to it as inputs."""

    name = "coconut"
    stages = ("coconut",)
    description = (
        "An adapter that reasons in continuous thoughts (Coconut), to compare with: ask it through this package, whose "
        "`rim-peft generate` takes its thoughts; plain `generate` knows nothing of them."
    )
    is_plain = False
    branches = False

    def trainer(self, stage: str) -> type[ReadoutTrainer]:
        """Return the trainer."""
        from rim_peft.training import CoconutTrainer

        return CoconutTrainer

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return what stands between the steps that are still written."""
        return {"step_separator": separator}

    def answerer(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], **settings: Any
    ) -> ThoughtAnswerer:
        """Return what answers, after as many thoughts as the last stage has and no blocks."""
        from rim_peft.training import CoconutConfig

        known = {name: value for name, value in options.items() if name in ("num_stages", "thoughts_per_step")}
        settings.pop("num_blocks", None)
        return ThoughtAnswerer(model, tokenizer, num_thoughts=CoconutConfig("unused", **known).num_thoughts, **settings)

    def way(self, name: str, prompts: Sequence[Sequence[int]], answerer: Answerer, *, separator: str | None) -> Way:
        """Return its way of answering, to be timed."""
        from rim_peft.evaluation.latency import by_answerer

        return by_answerer(name, prompts, answerer)
