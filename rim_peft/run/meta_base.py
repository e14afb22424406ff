"""A recipe's base without weights: what can be attached to it, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import PretrainedConfig

from rim_peft.methods import get_method
from rim_peft.recipe import Recipe
from rim_peft.run.at_hand import NotAtHandError
from rim_peft.run.base import build_meta_base
from rim_peft.sequence import check_architecture
from rim_peft.sequence.masks import SUPPORTED_IMPLEMENTATIONS, check_config
from rim_peft.training.head import Head, check_heads, find_head
from rim_peft.tuner.compatibility import check_base
from rim_peft.tuner.config import RiMConfig


class MetaBase:
    """A recipe's base without weights, made anew for each simulated stage.

    Args:
        config: of the base.
        recipe: what is attached to it.
        has_bf16: whether the device that it is looked at for computes in bfloat16.
    """

    def __init__(self, config: PretrainedConfig, recipe: Recipe, *, has_bf16: bool) -> None:
        self.config, self.recipe, self.has_bf16 = config, recipe, has_bf16
        self.can_be_trained = False
        self.adapter: RiMConfig | None = None
        self.head = Head.FUSED

    def check_implementation(self) -> None:
        """Refuse attention that takes no mask for each query.

        Raises:
            ValueError: the recipe asks for such.
        """
        implementation = self.recipe.model.attn_implementation
        if implementation is not None and get_method(self.recipe.method).branches:
            config = copy.deepcopy(self.config)
            config.get_text_config()._attn_implementation = implementation
            check_config(config)

    def build(self, *, attention: str | None = None) -> Any:
        """Return the base; with the attention that the recipe asks for where it can be had on any machine."""
        options = self.recipe.model
        attention = attention or options.attn_implementation
        options = replace(options, attn_implementation=attention if attention in SUPPORTED_IMPLEMENTATIONS else None)
        return build_meta_base(self.config, options, has_bf16=self.has_bf16)

    def check(self) -> tuple[str, str]:
        """Return class and attention.

        Raises:
            ValueError: it is no causal model, or cannot run branching rows.
        """
        base = self.build()
        check_base(base)
        if get_method(self.recipe.method).branches:
            check_architecture(base)
        implementation = self.recipe.model.attn_implementation or base.config.get_text_config()._attn_implementation
        return type(base).__name__, str(implementation)

    def choose_head(self) -> Head:
        """Find out which head a training would use, on a small copy of the base.

        Raises:
            NotAtHandError: there is no small copy of such a base.
            ValueError: the base cannot be trained by its head.
        """
        base = self.build()
        found = find_head(base)
        if found is None:
            raise NotAtHandError(
                f"no small copy of {type(base).__name__} can be made; the trainer will look at the base itself."
            )
        self.head = check_heads(base, found)
        return self.head

    def attach_blocks(self) -> PeftModel:
        """Return the base with memory rows alone, in blocks as many and as long as the recipe's adapter has.

        Raises:
            ValueError: the base cannot have them.
        """
        own = self.recipe.rim_config()
        config = RiMConfig(r=0, num_blocks=own.num_blocks, block_size=own.block_size)
        model: Any = get_peft_model(self.build(), config)
        self.adapter = config
        return model

    def attach(self, *, attention: str | None = None) -> PeftModel:
        """Return the base with a new adapter.

        Raises:
            ValueError: it cannot have the adapter.
        """
        config = self.recipe.rim_config()
        model: Any = get_peft_model(self.build(attention=attention), config)
        self.adapter = config
        return model
