"""Coconut: continuous thoughts in place of steps, stage by stage. Source: arXiv 2412.06769."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rim_peft.methods.method import Method

if TYPE_CHECKING:
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

    def answering(self, separator: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what answers after as many thoughts as the last stage has."""
        from rim_peft.training import CoconutConfig

        known = {name: value for name, value in options.items() if name in ("num_stages", "thoughts_per_step")}
        return {"answer": _AnswerWithThoughts(CoconutConfig("unused", **known).num_thoughts)}

    def way(self, name: str, prompts: Any, model: Any, tokenizer: Any, **options: Any) -> Way:
        """Return its way of answering, to be timed."""
        from rim_peft.evaluation.latency import by_thoughts

        return by_thoughts(
            name,
            prompts,
            model,
            num_thoughts=options["answering"]["answer"].num_thoughts,
            eos_id=tokenizer.eos_token_id,
            max_new_tokens=options["max_new_tokens"],
        )


@dataclass(frozen=True)
class _AnswerWithThoughts:
    """Answers as ``answer_questions`` gives them, after thoughts in place of blocks."""

    num_thoughts: int

    def __call__(self, *args: Any, num_blocks: int | None = None, **options: Any) -> Iterator[str]:
        from rim_peft.inference import answer_with_thoughts

        return answer_with_thoughts(*args, num_thoughts=self.num_thoughts, **options)
