"""Peak memory of a training step, against plain fine-tuning on as many tokens."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Spread, peak_memory, tensor_bytes
from benchmarks.models import attach_lora, attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, at_most
from benchmarks.steps import RowSizes, TrainingStep, plain_step, readout_step
from rim_peft.sequence import IGNORE_INDEX
from rim_peft.training.head import head_at

NUM_BLOCKS = 8
_MIB = 2**20


@benchmark("memory", "peak memory of a training step: stage 2 against TRL's SFTTrainer on as many tokens and labels")
def run(settings: Settings) -> Iterator[Row]:
    """Compare the peaks of whole steps with the same base and LoRA, rows of equal length and as many labels."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    batch = settings.choose(quick=1, cpu=4, cuda=8)
    for checkpointing in (False, True):
        for prompt in settings.choose(quick=[16], cpu=[64, 256], cuda=[128, 512]):
            sizes = RowSizes(batch=batch, prompt=prompt)
            length, labels = sizes.tokens(NUM_BLOCKS) // batch, NUM_BLOCKS * sizes.readout
            case = {"base": base, "n": prompt, "tokens": batch * length, "checkpointing": checkpointing}
            settings.tell(", ".join(f"{name}={value}" for name, value in case.items()))
            # One after the other, so that both find the same machine: on CUDA, memory of the first stays cached.
            rim = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
            ours = _Peak.of(readout_step(rim, "stage 2", sizes, checkpointing=checkpointing), settings)
            del rim
            lora = attach_lora(build_base(base, settings), rank=lora_rank(settings))
            plain = plain_step(lora, batch=batch, length=length, labels=labels, checkpointing=checkpointing)
            theirs = _Peak.of(plain, settings)
            yield _row(case, ours, ("SFT", theirs))
            yield _row(case, ours, ("SFT, head on labels", _Peak.of(_HeadOnLabels(plain), settings)))


class _HeadOnLabels:
    """A plain step with the head on the labelled positions only, as TRL's own on a GPU, but not on a CPU."""

    def __init__(self, step: TrainingStep) -> None:
        self.step, self.held_tensors = step, step.held_tensors
        shifted = step.batch["labels"].roll(-1, dims=1)
        shifted[:, -1] = IGNORE_INDEX
        self.places = (shifted != IGNORE_INDEX).flatten().nonzero()[:, 0]
        self.labels = shifted.flatten()[self.places][None]

    def __call__(self) -> None:
        """Run a whole step: forward, backward and optimiser."""
        trainer, model = self.step.trainer, self.step.model
        base = trainer.model.get_base_model()
        with trainer.compute_loss_context_manager(), head_at(base, self.places):
            inputs = {"input_ids": self.step.batch["input_ids"], "shift_labels": self.labels}
            (-model(**inputs, fused_lm_head=True).log_probs.mean()).backward()
        trainer.optimizer.step()
        model.zero_grad(set_to_none=True)


class _Peak:
    """The bytes of a step at its peak, and those that it also holds between steps."""

    def __init__(self, held: int, step: int) -> None:
        self.held, self.step = held, step

    @classmethod
    def of(cls, step: TrainingStep | _HeadOnLabels, settings: Settings) -> _Peak:
        step()  # allocates what persists
        return cls(tensor_bytes(step.held_tensors()), peak_memory(step, device=settings.device))

    def measured(self, name: str) -> Measured:
        total = (self.held + self.step) / _MIB
        return Measured(name, Spread(total, total, total), "MiB")


def _row(case: dict[str, object], ours: _Peak, other: tuple[str, _Peak]) -> Row:
    name, plain = other
    ratio = (ours.held + ours.step) / (plain.held + plain.step)
    return Row(
        benchmark="memory",
        case=case,
        ways=(ours.measured("stage 2"), plain.measured(name)),
        figure=Spread(ratio, ratio, ratio),
        figure_name=f"stage 2 / {name}",
        bound=1.0,
        bound_text="as many tokens and labels in rows of the same length",
        target=at_most(1.1),
        note=f"the step alone, without weights and optimiser: {ours.step / _MIB:.1f} against "
        f"{plain.step / _MIB:.1f} MiB, {ours.step / plain.step:.3f} times",
    )
