"""All K readouts in one pass, against K separate sequences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Row, at_least
from benchmarks.steps import RowSizes, TrainingStep, random_rows, readout_step
from rim_peft.sequence import IGNORE_INDEX
from rim_peft.training.head import head_at
from rim_peft.training.losses import readout_loss, refinement_weights
from rim_peft.tuner.config import active_config

BOUND = "real tokens of all sequences / real tokens of the rows"


@benchmark("one_pass", "all readouts in one pass against one sequence for each, forward and backward")
def run(settings: Settings) -> Iterator[Row]:
    """Compare stage 2's loss on interleaved rows with the loss on sequences ``x, m_<=k, readout_k``.

    The separate way is a fast one: all sequences of the batch at once, padded on the right, so that a plain causal mask
    is enough (no mask is passed), and the trainer's own head on supervised positions only.
    """
    cases = settings.choose(
        quick=[(16, 4)],
        cpu=[(64, 8), (128, 4), (128, 8), (128, 12), (256, 8)],
        cuda=[(64, 8), (128, 4), (128, 8), (128, 12), (256, 8), (512, 8)],
    )
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    num_blocks, batch = 8, settings.choose(quick=1, cpu=2, cuda=2)
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=num_blocks)
    for prompt, readout in cases:
        sizes = RowSizes(batch=batch, prompt=prompt, readout=readout)
        settings.tell(f"{base}, n={prompt} K={num_blocks} answer={readout} batch={batch}")
        step = readout_step(model, "stage 2", sizes)
        separate = _Separate(step, sizes)
        _check_equal(step.loss(), separate.loss(), is_exact=settings.device == "cpu")
        samples = settings.time({"one pass": partial(_backward, step), "separate": partial(_backward, separate)})
        yield Row.of_times(
            "one_pass",
            {"base": base, "n": prompt, "K": num_blocks, "answer": readout, "batch": batch},
            samples,
            ("one pass", "separate"),
            bound=separate.tokens / step.tokens,
            bound_text=BOUND,
            target=at_least(0.9),
        )


class _Separate:
    """The same readouts as a batch of B·K separate sequences, with stage 2's loss over them."""

    def __init__(self, step: TrainingStep, sizes: RowSizes) -> None:
        self.trainer, self.model, self.batch = step.trainer, step.model, sizes.batch
        config = active_config(step.trainer.model)
        blocks = config.block_tokens
        sequences, labels, weights = [], [], []
        for row in random_rows(step.trainer.model, sizes):
            for block, weight in enumerate(refinement_weights(config.num_blocks).tolist(), start=1):
                trunk, answer = row["prompt_ids"] + blocks.ids(block), row["answer_ids"]
                sequences.append(torch.tensor(trunk + answer))
                # Shifted: the block's end predicts the answer's first token, the last token predicts nothing.
                labels.append(torch.tensor([IGNORE_INDEX] * (len(trunk) - 1) + answer + [IGNORE_INDEX]))
                weights.append(weight)
        device = step.trainer.model.device
        self.tokens = sum(len(sequence) for sequence in sequences)
        self.input_ids = pad_sequence(sequences, batch_first=True).to(device)
        padded = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        is_label = padded != IGNORE_INDEX
        self.places = is_label.flatten().nonzero()[:, 0].to(device)
        self.labels = padded[is_label].to(device)
        self.weights = torch.tensor(weights).repeat_interleave(is_label.sum(1)).to(device)

    def loss(self) -> Tensor:
        """Return the loss ``L2`` of a forward pass, in nats per sample."""
        base = self.trainer.model.get_base_model()
        with self.trainer.compute_loss_context_manager(), head_at(base, self.places):
            outputs = self.model(input_ids=self.input_ids, shift_labels=self.labels[None], fused_lm_head=True)
        return readout_loss(outputs.log_probs[0], self.weights, num_samples=self.batch)


def _backward(way: TrainingStep | _Separate) -> None:
    """Run forward and backward of a way's loss, and drop the gradients."""
    way.loss().backward()
    way.model.zero_grad(set_to_none=True)


def _check_equal(ours: Tensor, theirs: Tensor, *, is_exact: bool) -> None:
    """Check that both ways compute the same; otherwise they would not be worth comparing."""
    # float32 sums in another order; CUDA uses bfloat16 and other attention kernels.
    tolerance = 1e-4 if is_exact else 3e-2
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=0.0):
        raise RuntimeError(
            f"one_pass: both ways must have the same loss, got {float(ours)} in one pass and {float(theirs)} in "
            "separate sequences."
        )
