"""An inspection of the shipped adapter against transformers alone: LoRA merged by hand, memory rows as inputs.

In float64, since merging in float32 changes probabilities in middle layers in the third digit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rim_peft.demo.shipped import SHIPPED
from rim_peft.inspection import Inspection, Options, inspect_questions
from rim_peft.inspection.document import END, BlockReadout, QuestionInspection
from rim_peft.run import load_run
from tests.real.conftest import load_smol

QUESTIONS = [
    "Jon shakes Dan's brew. Dan salts Ada's brew. Ada salts Moe's brew. Moe shakes Pam's brew. Pam's brew is blue. "
    "What colour is Jon's brew?",
    "Tom salts Eve's brew. Eve stirs Cleo's brew. Cleo cools Ada's brew. Ada shakes Finn's brew. Finn's brew is gold. "
    "What colour is Tom's brew?",  # of as many tokens, so the two lend each other their blocks
    '<b>Jon</b> & "Dan" <|im_end|> مرحبا \u202e 日本 🙂?',
]
BLOCKS, LENGTH = 4, 4
"""Blocks after a prompt, and tokens of a block."""
TOLERANCE = 1e-4
"""The inspection is computed in float32."""


class Plain:
    """The base with the adapter's weights added to its own."""

    def __init__(self, folder: str, adapter: Path) -> None:
        tensors = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        self.model = load_smol(folder, dtype=torch.float64, attn_implementation="eager").requires_grad_(False)
        weights = dict(self.model.named_parameters())
        for name, left in tensors.items():
            if ".lora_A." in name:
                right = tensors[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                weights[target].data += 32 / 16 * (right @ left)  # alpha / r
        self.block = tensors["base_model.model.model.embed_tokens.lora_rim_memory.weight"][[0, 1, 1, 2]]

    @torch.no_grad()
    def run(self, prompt: list[int], num_blocks: int, then: list[int]) -> Any:
        rows = self.model.get_input_embeddings()
        parts = [
            rows(torch.tensor(prompt)),
            self.block.repeat(num_blocks, 1),
            rows(torch.tensor(then, dtype=torch.long)),
        ]
        return self.model(inputs_embeds=torch.cat(parts)[None], output_hidden_states=True, output_attentions=True)

    def chances(self, prompt: list[int], num_blocks: int, then: list[int]) -> Tensor:
        """Probabilities of each token of a text that follows the blocks, and of what would be next."""
        chances: Tensor = self.run(prompt, num_blocks, then).logits[0, -len(then) - 1 :].softmax(-1)
        return chances


@pytest.fixture(scope="module")
def plain(folder: str) -> Plain:
    return Plain(folder, SHIPPED)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspect_questions(load_run(str(SHIPPED)), QUESTIONS, options=Options(chain_tokens=0))


@pytest.fixture(params=range(len(QUESTIONS)))
def asked(request: pytest.FixtureRequest, inspection: Inspection, smol_tokenizer: Any) -> tuple[Any, list[int]]:
    """An inspected question, and its prompt's ids: special tokens that a question spells are text."""
    found = inspection.questions[request.param]
    return found, smol_tokenizer(f"{found.question} Answer:", split_special_tokens=True)["input_ids"]


def test_readouts(plain: Plain, asked: tuple[QuestionInspection, list[int]]) -> None:
    found, prompt = asked
    assert len(found.readouts) == BLOCKS
    for readout in found.readouts:
        ids = [candidates[0].token_id for candidates in readout.tokens]
        chances = plain.chances(prompt, readout.block, ids)[:-1]
        assert chances.argmax(-1).tolist() == ids
        assert readout.probability == pytest.approx(_product(chances, readout), abs=TOLERANCE)
        for row, candidates in zip(chances, readout.tokens, strict=True):
            for candidate in candidates:
                assert candidate.probability == pytest.approx(float(row[candidate.token_id]), abs=TOLERANCE)


def _product(chances: Tensor, readout: BlockReadout) -> float:
    return math.prod(float(row[parts[0].token_id]) for row, parts in zip(chances, readout.tokens, strict=True))


def test_layers(plain: Plain, asked: tuple[QuestionInspection, list[int]]) -> None:
    found, prompt = asked
    states = plain.run(prompt, BLOCKS, []).hidden_states
    first = found.final.tokens[0][0].token_id
    assert found.lens is not None
    assert len(found.lens) == BLOCKS * 3 * 30
    for reading in found.lens:
        inside = LENGTH - 1 if reading.place == END else int(reading.place.removeprefix("memory "))
        state = states[reading.layer][0, len(prompt) + (reading.block - 1) * LENGTH + inside]
        if reading.layer < 30:  # the last one comes with the norm
            state = plain.model.model.norm(state)
        chances = plain.model.lm_head(state).softmax(-1)
        assert reading.answer_probability == pytest.approx(float(chances[first]), abs=TOLERANCE)
        for candidate in reading.candidates:
            assert candidate.probability == pytest.approx(float(chances[candidate.token_id]), abs=TOLERANCE)
        assert float(chances.max()) == pytest.approx(reading.candidates[0].probability, abs=TOLERANCE)


def test_attention(plain: Plain, inspection: Inspection, asked: tuple[QuestionInspection, list[int]]) -> None:
    found, prompt = asked
    weights = torch.stack([layer[0].mean(0) for layer in plain.run(prompt, BLOCKS, []).attentions])
    groups = {group.name: slice(group.first - 1, group.last) for group in inspection.layer_groups}
    assert found.attention is not None
    assert len(found.attention) == BLOCKS * len(groups)
    for look in found.attention:
        start = len(prompt) + (look.block - 1) * LENGTH
        row = weights[groups[look.layers], start : start + LENGTH].mean((0, 1))
        words = row[: len(prompt)].split([word.num_tokens for word in found.words])
        assert list(look.words) == pytest.approx([float(word.sum()) for word in words], abs=TOLERANCE)
        assert look.earlier_blocks == pytest.approx(float(row[len(prompt) : start].sum()), abs=TOLERANCE)
        assert look.own_block == pytest.approx(float(row[start : start + LENGTH].sum()), abs=TOLERANCE)


def test_without_blocks(plain: Plain, asked: tuple[QuestionInspection, list[int]], smol_tokenizer: Any) -> None:
    found, prompt = asked
    (removed,) = [each for each in found.alternatives if each.name == "removed"]
    ids: list[int] = []
    chance = 1.0
    while len(ids) < 4 and smol_tokenizer.eos_token_id not in ids:  # the recipe's evaluation.max_new_tokens
        best = plain.chances(prompt, 0, ids)[-1].max(-1)
        chance *= float(best.values)
        ids.append(int(best.indices))
    assert removed.text == smol_tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert removed.probability == pytest.approx(chance, abs=TOLERANCE)


def test_swapped_blocks(plain: Plain, inspection: Inspection, smol_tokenizer: Any) -> None:
    """The donor's keys and values in the blocks' columns; the last ``</b>`` is computed again, and sees the prompt."""
    own, other = inspection.questions[:2]
    (swapped,) = [each for each in own.alternatives if each.name == "swapped"]
    assert swapped.donor == other.question
    prompt, donor = (smol_tokenizer(f"{each.question} Answer:")["input_ids"] for each in (own, other))
    cache, lent = (plain.run(ids, BLOCKS, []).past_key_values for ids in (prompt, donor))
    start, end = len(prompt), len(prompt) + BLOCKS * LENGTH - 1
    for layer, lender in zip(cache.layers, lent.layers, strict=True):
        layer.keys = torch.cat([layer.keys[:, :, :start], lender.keys[:, :, start:end]], 2)
        layer.values = torch.cat([layer.values[:, :, :start], lender.values[:, :, start:end]], 2)
    ids: list[int] = []
    chance, entering = 1.0, plain.block[-1:]
    while len(ids) < 4 and smol_tokenizer.eos_token_id not in ids:
        positions = torch.tensor([[end + len(ids)]])
        output = plain.model(inputs_embeds=entering[None], past_key_values=cache, position_ids=positions)
        best = output.logits[0, -1].softmax(-1).max(-1)
        chance *= float(best.values)
        ids.append(int(best.indices))
        entering = plain.model.get_input_embeddings()(best.indices[None])
    assert swapped.text == smol_tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert swapped.probability == pytest.approx(chance, abs=TOLERANCE)
