"""Coconut: continuous thoughts replace steps, stage by stage. Source: arXiv 2412.06769."""

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
    """Feeds the model's last hidden states back to it as inputs."""

    name = "coconut"
    stages = ("coconut",)
    description = (
        "An adapter that reasons in continuous thoughts (Coconut), for comparison. Use it through this package, whose "
        "`rim-peft generate` computes its thoughts; plain `generate` does not."
    )
    is_plain = False
    branches = False

    def trainer(self, stage: str) -> type[ReadoutTrainer]:
        """Return the trainer."""
        from rim_peft.training import CoconutTrainer

        return CoconutTrainer

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return the separator of the steps that are still written."""
        return {"step_separator": separator}

    def answerer(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], **settings: Any
    ) -> ThoughtAnswerer:
        """Return an answerer without blocks and with as many thoughts as the last stage has."""
        from rim_peft.training import CoconutConfig

        known = {name: value for name, value in options.items() if name in ("num_stages", "thoughts_per_step")}
        settings.pop("num_blocks", None)
        return ThoughtAnswerer(model, tokenizer, num_thoughts=CoconutConfig("unused", **known).num_thoughts, **settings)

    def way(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        answerer: Answerer,
        *,
        separator: str | None,
        answers: Sequence[str],
    ) -> Way:
        """Return how to time its answers."""
        from rim_peft.evaluation.latency import by_answerer

        return by_answerer(name, prompts, answerer)
