"""What makes a method: what is trained in which stages, which adapter it has, what answers, and what can be made of it.

These objects are read with every recipe. Trainers and what times answers bring TRL in, so they are imported where they
are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rim_peft.inference import Answerer, BlockAnswerer
from rim_peft.tuner.config import RiMConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from rim_peft.evaluation.latency import Way
    from rim_peft.training.readout_trainer import ReadoutTrainer


_BLOCK_OPTIONS = {"num_blocks": 0, "insertion_layer": 0, "bidirectional_blocks": False}


class Method(ABC):
    """A method without blocks that answers at once; the others say what differs."""

    name: ClassVar[str]
    """What a recipe calls it."""

    stages: ClassVar[tuple[str, ...]]
    """Sections of a recipe with the options of its stages, in their order."""

    description: ClassVar[str]
    """Of its adapters, for their model card; ``{blocks}`` says which blocks they have."""

    has_blocks: ClassVar[bool] = False
    """Whether its answers come after the adapter's blocks."""

    is_plain: ClassVar[bool] = True
    """Whether a model's own ``generate`` gives its answers, so that exports and other harnesses can ask it."""

    branches: ClassVar[bool] = True
    """Whether its training rows branch, so that attention must take a mask for each query."""

    @abstractmethod
    def trainer(self, stage: str) -> type[ReadoutTrainer]:
        """Return the trainer of one of its stages."""

    def adapter(self, options: Mapping[str, Any]) -> RiMConfig:
        """Return a new configuration of its adapter.

        Args:
            options: a recipe's section ``adapter``.
        """
        return RiMConfig(**{**options, **({} if self.has_blocks else _BLOCK_OPTIONS)})

    def check_adapter(self, options: Mapping[str, Any]) -> None:
        """Refuse an adapter with which there is nothing to train.

        Raises:
            ValueError: there is not.
        """
        if self.has_blocks and options.get("num_blocks") == 0:
            raise ValueError(f"adapter.num_blocks: must be at least 1 for method {self.name!r}, got 0.")

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return options of its stages that follow from other sections.

        Args:
            separator: text behind each written step.
        """
        return {}

    def answerer(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], **settings: Any
    ) -> Answerer:
        """Return what answers.

        Args:
            model: base and adapter.
            tokenizer: the base's.
            options: of its last stage. Of a recipe that somebody else wrote only what must be known is looked at.
            settings: as :class:`~rim_peft.inference.BlockAnswerer` takes them.
        """
        return BlockAnswerer(model, tokenizer, **settings)

    def separator(self, separator: str) -> str | None:
        """Return what stands behind each step of its answers; None where it writes no steps.

        Args:
            separator: text behind each written step.
        """
        return None

    def way(self, name: str, prompts: Sequence[Sequence[int]], answerer: Answerer, *, separator: str | None) -> Way:
        """Return its way of answering, to be timed.

        Args:
            name: what the way is called.
            prompts: token ids of each question's prompt.
            answerer: what :meth:`answerer` returned.
            separator: what :meth:`separator` returned.
        """
        from rim_peft.evaluation.latency import by_generate, count_behind

        return by_generate(
            name,
            prompts,
            answerer.model,
            eos_id=answerer.eos_id,
            pad_id=answerer.pad_id,
            max_new_tokens=answerer.max_new_tokens,
            answer_tokens=None if separator is None else count_behind(answerer.tokenizer, separator),
        )
