"""Behaviours of an adapted model at work: training, half precision, compiled, generating."""

from __future__ import annotations

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from tests.conftest import build_tokenizer
from tests.parity.subject import GREEDY, MASK, PROMPTS, Subject


def train(subject: Subject) -> None:
    """training lowers the loss and changes the adapter alone"""
    model = subject.model(is_fresh=True).train()
    frozen = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    before = subject.adapter_tensors(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        loss = model(**subject.batch(), labels=subject.labels()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert any(not torch.equal(value, before[name]) for name, value in subject.adapter_tensors(model).items())
    for name, value in model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name


def prepare_for_training(subject: Subject) -> None:
    """`prepare_model_for_kbit_training`, then a step under gradient checkpointing"""
    base = prepare_model_for_kbit_training(
        subject.base(), gradient_checkpointing_kwargs={"use_reentrant": False}, use_gradient_checkpointing=True
    )
    model = subject.model(base=base).train()
    model(**subject.batch(), labels=subject.labels()).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(one.dtype == torch.float32 and one.grad is not None and one.grad.isfinite().all() for one in trained)


def _gradients(subject: Subject, model: Any) -> list[Tensor]:
    model.zero_grad()
    model(**subject.batch(), labels=subject.labels()).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert found
    return found


def _checkpoint(subject: Subject, *, use_reentrant: bool) -> None:
    model = subject.model().train()
    expected = _gradients(subject, model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.testing.assert_close(_gradients(subject, model), expected, atol=1e-5, rtol=1e-3)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(_gradients(subject, model), expected, atol=1e-5, rtol=1e-3)


def checkpoint(subject: Subject) -> None:
    """gradient checkpointing: the same gradients"""
    _checkpoint(subject, use_reentrant=False)


def checkpoint_reentrant(subject: Subject) -> None:
    """gradient checkpointing, reentrant: the same gradients"""
    _checkpoint(subject, use_reentrant=True)


def half_precision(subject: Subject) -> None:
    """half precision: autocast, and an adapted model cast as a whole"""
    model = subject.model()
    expected = subject.logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosine = torch.cosine_similarity(subject.logits(model).flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 0.98
    if subject.case.format in ("fp32", "bf16"):
        found = subject.logits(model.to(torch.bfloat16))
        assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.98


def compiled(subject: Subject) -> None:
    """`torch.compile`: the same logits"""
    model = subject.model()
    expected = subject.logits(model)
    torch.compiler.reset()
    try:
        compiled_model = torch.compile(model, backend="eager")
        torch.testing.assert_close(subject.logits(compiled_model), expected, atol=1e-3, rtol=1e-3)
    finally:
        torch.compiler.reset()


def generate(subject: Subject) -> None:
    """`generate`: prompts padded on the left equal prompts alone; beams, sampling"""
    model = subject.model()
    padded = subject.generate(model)
    assert padded.shape == (2, 10)
    alone = {name: value[1:, 2:] for name, value in subject.prompts.items()}
    subject.check_alike(subject.next_logits(model)[1], subject.next_logits(model, **alone)[0])
    if not subject.is_rounded:
        torch.testing.assert_close(padded[1, 2:], model.generate(**alone, **GREEDY)[0])
        torch.testing.assert_close(subject.generate(model, use_cache=False), padded)
    settings = GenerationConfig(**GREEDY)
    torch.testing.assert_close(model.generate(PROMPTS, settings, attention_mask=MASK), padded)
    assert subject.generate(model, num_beams=2, num_return_sequences=2).shape == (4, 10)
    torch.manual_seed(0)
    sampled = model.generate(**{**subject.prompts, **GREEDY, "do_sample": True, "top_p": 0.9})
    assert sampled.shape == (2, 10)


def run_a_pipeline(subject: Subject) -> None:
    """`pipeline("text-generation")`, with the model and with the adapter's folder"""
    model, tokenizer, folder = subject.model(), build_tokenizer(), str(subject.folder / "adapter")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def answers(**options: Any) -> list[str]:
        generator: Any = pipeline("text-generation", device="cpu", **options)
        settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}
        return [one[0]["generated_text"] for one in generator(["What is one?", "Who?"], batch_size=2, **settings)]

    found = answers(model=folder, tokenizer=folder, model_kwargs=subject.load_options)
    loaded = AutoModelForCausalLM.from_pretrained(folder, **subject.load_options)
    assert found == answers(model=loaded, tokenizer=tokenizer)
    in_memory = answers(model=model, tokenizer=tokenizer)
    assert in_memory == found or subject.case.format == "bf16"  # to which loaded LoRA is cast


def embeddings_in_place_of_ids(subject: Subject) -> None:
    """a forward pass on `inputs_embeds`, `output_hidden_states`"""
    model = subject.model()
    expected = subject.logits(model)
    batch = subject.batch()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with torch.no_grad():
        output = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(output.logits.float()[batch["attention_mask"].bool()], expected, atol=1e-4, rtol=1e-4)
    assert len(output.hidden_states) == 3


BEHAVIOURS = (
    train,
    prepare_for_training,
    checkpoint,
    checkpoint_reentrant,
    half_precision,
    compiled,
    generate,
    run_a_pipeline,
    embeddings_in_place_of_ids,
)
