"""A stage's first step on a tiny model that stands in for the base: what only the Trainer itself can refuse."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from rim_peft.recipe import Recipe
from rim_peft.recipe.problems import find_culprit
from rim_peft.recipe.sections import HARDWARE
from rim_peft.run.at_hand import NotAtHandError
from rim_peft.run.base import train_tokenizer
from rim_peft.tuner import RiMConfig

_SHORT: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 1,
    "max_length": None,
    "logging_steps": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "eval_delay": 0,
    "compile_layers": False,  # takes minutes
    "full_determinism": False,  # for all of the process
    "optim_target_modules": None,  # which have the names of the base's layers
    "push_to_hub": False,
}
"""Options in whose place a rehearsal has its own: they change how long it takes, or what is left of it."""

_TOKENIZER_OPTIONS = ("eos_token", "pad_token")


def rehearse(recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase | None, *, num_steps: int | None) -> None:
    """Make a stage's trainer with the recipe's options, and let it train, evaluate and save one step on the CPU.

    Trackers, optimisers, schedules, special tokens, strategies and launchers' settings are refused here as they would
    be after the base has been loaded or, in a later stage, after the first one has been trained.

    Args:
        recipe: of the run.
        stage: one of its stages.
        tokenizer: the base's; another one stands in for it if it is not at hand.
        num_steps: of the stage; None if they are not known.

    Raises:
        ValueError: the training would stop; begins with the key, if one alone is to blame.
        NotAtHandError: the rehearsal itself cannot be had here.
    """
    given: Mapping[str, Any] = {key: value for key, value in getattr(recipe, stage).items() if key not in HARDWARE}
    if tokenizer is None:
        tokenizer = train_tokenizer([], recipe.data.templates, vocab_size=300)
        given = {key: value for key, value in given.items() if key not in _TOKENIZER_OPTIONS}

    def play(**values: Any) -> None:
        options: dict[str, Any] = {stage: values}
        _play(replace(recipe, **options), stage, tokenizer, num_steps=num_steps or 100)

    try:
        play(**given)
    except Exception as error:
        message = str(error)
        if _fails(play):
            raise NotAtHandError(f"it cannot be rehearsed on a tiny model ({message}). Try a step.") from error
        named_first = dict(sorted(given.items(), key=lambda option: option[0] not in message))
        key = find_culprit(play, named_first, message)
        text = " ".join(message.split())
        raise ValueError(f"{key}: {text.removeprefix(f'{key}: ')}" if key else text) from error


def _fails(play: Callable[[], None]) -> bool:
    """Tell whether a rehearsal fails without any of the recipe's options, which is not the recipe's fault."""
    try:
        play()
    except Exception:
        return True
    return False


def _play(recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase, *, num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        # An epoch of a few rows is over at once, so that the steps are given; the schedule depends on them.
        changes = {**_SHORT, "output_dir": folder, "max_steps": num_steps}
        if not recipe.data.streaming:
            changes["max_tokens_per_batch"] = None
            changes |= {"length_shares": None, "length_accuracy": None}  # these rows have one length
        trainer_class, args = recipe.stage_trainer(stage, anywhere=True, **changes)
        rim = recipe.rim_config()
        adapter = RiMConfig(r=2, num_blocks=rim.num_blocks, block_size=rim.block_size)
        model = get_peft_model(_stand_in(tokenizer), adapter)
        row = {"prompt_ids": [0, 0], "step_ids": [[0]] * max(1, rim.num_blocks), "answer_ids": [0]}
        rows: Any = Dataset.from_list([row] * 2)
        has_validation = recipe.data.validation_rows > 0
        trainer = trainer_class(
            model,
            args,
            train_dataset=rows.to_iterable_dataset().repeat(None) if recipe.data.streaming else rows,
            eval_dataset=rows if has_validation and args.eval_strategy != "no" else None,
            processing_class=tokenizer,
            validate=(lambda _: {"accuracy": 0.0}) if has_validation else None,
            callbacks=[_OneStep()],
        )
        for callback in list(trainer.callback_handler.callbacks):
            # Trackers would begin a run of their own.
            if isinstance(callback, PrinterCallback) or type(callback).__module__.startswith("transformers.integr"):
                trainer.remove_callback(callback)
        trainer.train()


def _stand_in(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a tiny model with room for the tokenizer's ids."""
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), *(id for id in (tokenizer.eos_token_id, tokenizer.pad_token_id) if id), 8) + 1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class _OneStep(TrainerCallback):
    """Ends the training after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True
