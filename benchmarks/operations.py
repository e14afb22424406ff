"""Count the operations of a training step: what matrices and attention must compute, and nothing else.

Two operations (multiply, add) for each weight and token. With frozen weights, the backward pass computes gradients of
their inputs, not of the weights; with checkpointing, the layers' forward pass runs twice. The head counts only at the
labels. Norms, activations, softmax, embedding, optimiser and unpacking of nf4 are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer

COUNTED = (
    "2 operations per frozen weight and token forward, 2 backward, 2 again with checkpointing; LoRA 2, 4, 2; "
    "attended pairs; head at the labels"
)


@dataclass(frozen=True)
class Operations:
    """The sizes of a model that determine its operations.

    Attributes:
        frozen: weights of the linear layers with LoRA.
        lora: weights of LoRA.
        head: weights of the output head.
        attention_width: number of heads times their width, summed over layers.
    """

    frozen: int
    lora: int
    head: int
    attention_width: int

    @classmethod
    def of(cls, model: Any) -> Operations:
        """Count a model with LoRA on all linear layers."""
        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            frozen=sum(layer.in_features * layer.out_features for layer in layers),
            lora=sum(layer.r[name] * (layer.in_features + layer.out_features) for layer in layers for name in layer.r),
            head=config.vocab_size * config.hidden_size,
            attention_width=config.num_hidden_layers * config.num_attention_heads * width,
        )

    def training_step(self, *, tokens: int, labels: int, pairs: int, checkpointing: bool = False) -> float:
        """Count the operations of forward and backward.

        Args:
            tokens: tokens of the batch.
            labels: predicted tokens of the batch.
            pairs: pairs of a query and a key that it attends to, over the batch.
            checkpointing: whether the layers' forward pass runs twice.
        """
        # Forward: scores, and the weighted sum of values. Backward: gradients of queries, keys, weights and values.
        forward = 2 * (self.frozen + self.lora) * tokens + 4 * self.attention_width * pairs
        backward = (2 * self.frozen + 4 * self.lora) * tokens + 8 * self.attention_width * pairs
        recomputed = forward if checkpointing else 0
        return forward + backward + recomputed + 4 * self.head * labels


def causal_pairs(length: int) -> int:
    """Count the pairs of query and key in a causal sequence.

    >>> causal_pairs(3)
    6
    """
    return length * (length + 1) // 2


def readout_pairs(prompt: int, *, num_blocks: int, readout: int, block_length: int = 4) -> int:
    """Count the pairs of query and key in one row of interleaved readouts of equal length.

    A prompt of one token and two blocks of three, with readouts of two tokens: 28 for the trunk, then 5 + 6 and 8 + 9.

    >>> readout_pairs(1, num_blocks=2, readout=2, block_length=3)
    56
    """
    pairs = causal_pairs(prompt + num_blocks * block_length)
    for block in range(1, num_blocks + 1):
        pairs += readout * (prompt + block * block_length) + causal_pairs(readout)
    return pairs
