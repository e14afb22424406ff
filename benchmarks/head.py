"""The output head on supervised positions only, against logits of every position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks.measure import Spread, peak_memory, ratio
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, Target, above, at_most, below
from benchmarks.steps import RowSizes, TrainingStep, readout_step
from rim_peft.sequence import Labels, Layout
from rim_peft.training.head import head_at
from rim_peft.training.losses import label_weights, readout_loss
from rim_peft.tuner.bases import attention_masks

NUM_BLOCKS = 8
_MIB = 2**20


@benchmark("head", "stage 2's step with logits for supervised positions alone, against full logits")
def run(settings: Settings) -> Iterator[Row]:
    """Time steps both ways, and measure the peak memory of the head by itself, forward and backward."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    sizes = settings.choose(
        quick=RowSizes(batch=1, prompt=16), cpu=RowSizes(batch=2, prompt=128), cuda=RowSizes(batch=8, prompt=128)
    )
    for vocabulary in settings.choose(quick=[512], cpu=[32_000, 128_000], cuda=[32_000, 128_000]):
        settings.tell(f"{base}, V={vocabulary}")
        model = attach_rim(
            build_base(base, settings, vocab_size=vocabulary), rank=lora_rank(settings), num_blocks=NUM_BLOCKS
        )
        step = readout_step(model, "stage 2", sizes)
        case = {"base": base, "V": vocabulary, "tokens": step.tokens, "supervised": step.labels}
        samples = settings.time({"supervised": step.forward_and_backward, "full": partial(_full_step, step)})
        yield Row(
            benchmark="head",
            case=case,
            ways=(
                Measured.milliseconds("supervised", samples["supervised"]),
                Measured.milliseconds("full logits", samples["full"]),
            ),
            figure=ratio(samples["full"], samples["supervised"]),
            figure_name="full / supervised",
            bound=step.tokens / step.labels,
            bound_text="tokens / supervised tokens, if the head were all of the step",
            target=above(1.0, "a faster step"),
            num_rounds=len(samples["full"]),
        )
        yield from _memory_rows(settings, model, case)


def _memory_rows(settings: Settings, model: Any, case: dict[str, Any]) -> Iterator[Row]:
    base = model.get_base_model()
    tokens, supervised = case["tokens"], case["supervised"]
    peaks = {
        count: peak_memory(partial(_head_alone, base, tokens, count), device=settings.device)
        for count in (supervised // 2, supervised)
    }
    full = peak_memory(partial(_full_head_alone, base, tokens), device=settings.device)
    less = below(1.0, "less than full logits")
    yield _memory_row(case, ("supervised", "full logits"), peaks[supervised], full, supervised / tokens, less)
    half = peaks[supervised // 2]
    yield _memory_row(case, ("supervised", "half of them"), peaks[supervised], half, 2.0, at_most(1.1))


def _memory_row(
    case: dict[str, Any], names: tuple[str, str], ours: int, theirs: int, bound: float, target: Target
) -> Row:
    figure = ours / theirs
    return Row(
        benchmark="head",
        case=case,
        ways=(_bytes(names[0], ours), _bytes(names[1], theirs)),
        figure=Spread(figure, figure, figure),
        figure_name="peak of the head",
        bound=bound,
        bound_text="positions whose logits are made, ours / theirs",
        target=target,
    )


def _bytes(name: str, count: int) -> Measured:
    return Measured(name, Spread(count / _MIB, count / _MIB, count / _MIB), "MiB")


def _full_step(step: TrainingStep) -> None:
    """The same loss, from logits of every position."""
    trainer = step.trainer
    layout = Layout(**{name: value for name, value in step.batch.items() if name != "num_steps"})
    layout = layout.to(trainer.args.device)
    labels = layout.labels()
    weights = trainer.objective.weights(step.batch["num_steps"], (layout.block_ends >= 0).sum(1), progress=0.0)
    base = trainer.model.get_base_model()
    with trainer.compute_loss_context_manager():
        logits = step.model(
            input_ids=layout.input_ids,
            attention_mask=attention_masks(base.config, layout, dtype=base.get_output_embeddings().weight.dtype),
            position_ids=layout.position_ids,
            use_cache=False,
        ).logits
        log_probs = _log_probs(logits.flatten(0, 1), labels)
        weights = label_weights(weights.to(layout.input_ids.device), labels)
        readout_loss(log_probs, weights, num_samples=len(layout.block_ends)).backward()
    step.model.zero_grad(set_to_none=True)


def _log_probs(logits: Tensor, labels: Labels) -> Tensor:
    return logits.float().log_softmax(-1)[labels.places, labels.token_ids]


def _hidden(base: Any, tokens: int) -> Tensor:
    weight = base.get_output_embeddings().weight
    return torch.zeros(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)


def _places(base: Any, tokens: int, count: int) -> Tensor:
    return torch.arange(count, device=base.device) * (tokens // count)


def _head_alone(base: Any, tokens: int, count: int) -> None:
    """Run the fused head by itself on ``count`` of the hidden states that a backbone would produce."""
    hidden, places = _hidden(base, tokens), _places(base, tokens, count)
    with _backbone_that_says(base, hidden), head_at(base, places):
        labels = torch.zeros(1, count, dtype=torch.long, device=base.device)
        base(input_ids=labels, shift_labels=labels, fused_lm_head=True).log_probs.sum().backward()


def _full_head_alone(base: Any, tokens: int) -> None:
    hidden = _hidden(base, tokens)
    logits = base.get_output_embeddings()(hidden)[0]
    places = torch.arange(tokens, device=base.device)
    labels = Labels(places, torch.zeros_like(places), torch.zeros_like(places), torch.ones_like(places), places < 0)
    _log_probs(logits, labels).sum().backward()


@contextmanager
def _backbone_that_says(base: Any, hidden: Tensor) -> Iterator[None]:
    """Replace the layers under the head by their output while entered."""
    backbone = base.base_model
    backbone.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del backbone.forward
