"""Interface of a method: its stages, trainers, adapter and answerer.

Every recipe needs these objects. Trainers and timing import TRL, so they are imported on use.
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
    """A method; the defaults are those of one without blocks that answers immediately."""

    name: ClassVar[str]
    """Its name in recipes."""

    stages: ClassVar[tuple[str, ...]]
    """Sections of a recipe with the options of its stages, in order."""

    description: ClassVar[str]
    """Description of its adapters for their model card; ``{blocks}`` becomes a description of their blocks."""

    has_blocks: ClassVar[bool] = False
    """Whether it answers after the adapter's blocks."""

    is_plain: ClassVar[bool] = True
    """Whether a model's own ``generate`` gives its answers, so that exports and other harnesses can use it."""

    branches: ClassVar[bool] = True
    """Whether its training rows branch, so that attention must take a mask per query."""

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
        """Refuse an adapter with nothing to train.

        Raises:
            ValueError: nothing would be trained.
        """
        if self.has_blocks and options.get("num_blocks") == 0:
            raise ValueError(f"adapter.num_blocks: must be at least 1 for method {self.name!r}, got 0.")

    def stage_options(self, separator: str) -> dict[str, Any]:
        """Return stage options that follow from other sections of the recipe.

        Args:
            separator: text after each written step.
        """
        return {}

    def answerer(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], **settings: Any
    ) -> Answerer:
        """Return an answerer.

        Args:
            options: options of its last stage. Only the necessary ones are read, since the recipe may be untrusted.
            settings: as for :class:`~rim_peft.inference.BlockAnswerer`.
        """
        return BlockAnswerer(model, tokenizer, **settings)

    def separator(self, separator: str) -> str | None:
        """Return the text after each step of its answers; None if it writes no steps.

        Args:
            separator: text after each written step.
        """
        return None

    def way(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        answerer: Answerer,
        *,
        separator: str | None,
        answers: Sequence[str],
    ) -> Way:
        """Return how to time its answers.

        Args:
            name: name of this way of answering.
            prompts: token ids of each question's prompt.
            answerer: the result of :meth:`answerer`.
            separator: the result of :meth:`separator`.
            answers: each question's right answer, which tells where a written one begins: it may hold separators.
        """
        from rim_peft.evaluation.answers import AnswerReader
        from rim_peft.evaluation.latency import by_generate, count_behind

        alone = AnswerReader(answerer.tokenizer, answerer.templates, separator)

        return by_generate(
            name,
            prompts,
            answerer.model,
            eos_id=answerer.eos_id,
            pad_id=answerer.pad_id,
            max_new_tokens=answerer.max_new_tokens,
            answer_tokens=None
            if separator is None
            else [
                count_behind(answerer.tokenizer, separator, num_inside=alone.num_inside(answer)) for answer in answers
            ],
        )
