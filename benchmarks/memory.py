"""Peak memory of a training step against plain fine-tuning on as many tokens."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Spread, peak_memory, tensor_bytes
from benchmarks.models import attach_lora, attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, at_most
from benchmarks.steps import RowSizes, TrainingStep, plain_step, readout_step

NUM_BLOCKS = 8
_MIB = 2**20


@benchmark("memory", "peak memory of a training step: stage 2 against TRL's SFTTrainer on as many tokens and labels")
def run(settings: Settings) -> Iterator[Row]:
    """Compare the peaks of whole steps: the same base and LoRA, rows of the same length, as many tokens learned."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    batch = settings.choose(quick=1, cpu=4, cuda=8)
    for checkpointing in (False, True):
        for prompt in settings.choose(quick=[16], cpu=[64, 256], cuda=[128, 512]):
            sizes = RowSizes(batch=batch, prompt=prompt)
            length, labels = sizes.tokens(NUM_BLOCKS) // batch, NUM_BLOCKS * sizes.readout
            case = {"base": base, "n": prompt, "tokens": batch * length, "checkpointing": checkpointing}
            settings.tell(", ".join(f"{name}={value}" for name, value in case.items()))
            # One after the other, so that both find the same machine: on CUDA, what the first leaves is cached.
            rim = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
            ours = _Peak.of(readout_step(rim, "stage 2", sizes, checkpointing=checkpointing), settings)
            del rim
            lora = attach_lora(build_base(base, settings), rank=lora_rank(settings))
            plain = plain_step(lora, batch=batch, length=length, labels=labels, checkpointing=checkpointing)
            yield _row(case, ours, _Peak.of(plain, settings))


class _Peak:
    """Bytes that a step holds at its peak, and those of them that it holds between steps too."""

    def __init__(self, held: int, step: int) -> None:
        self.held, self.step = held, step

    @classmethod
    def of(cls, step: TrainingStep, settings: Settings) -> _Peak:
        step()  # allocates what stays
        return cls(tensor_bytes(step.held_tensors()), peak_memory(step, device=settings.device))

    def measured(self, name: str) -> Measured:
        total = (self.held + self.step) / _MIB
        return Measured(name, Spread(total, total, total), "MiB")


def _row(case: dict[str, object], ours: _Peak, plain: _Peak) -> Row:
    ratio = (ours.held + ours.step) / (plain.held + plain.step)
    return Row(
        benchmark="memory",
        case=case,
        ways=(ours.measured("stage 2"), plain.measured("SFT")),
        figure=Spread(ratio, ratio, ratio),
        figure_name="stage 2 / SFT",
        bound=1.0,
        bound_text="as many tokens and labels in rows of the same length",
        target=at_most(1.1),
        note=f"the step alone, without weights and optimiser: {ours.step / _MIB:.1f} against "
        f"{plain.step / _MIB:.1f} MiB, {ours.step / plain.step:.3f} times",
    )
