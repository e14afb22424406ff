"""Adapters as plain LoRA on the unmodified base: stock PEFT answers as the plugin, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft.cli.main import main
from rim_peft.data.examples import Templates
from rim_peft.export import checking
from rim_peft.export.embedding_lora import RANKS, export_embedding_lora
from rim_peft.export.folder import ExportOptions, Prompts
from rim_peft.export.weights import on_stored_base
from rim_peft.inference import answer_questions
from rim_peft.run import export, load_run
from tests.conftest import CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE, build_base, build_rim, build_tokenizer

TEXTS = [f"What is {number} and {number * number}?" for number in range(30)]
CHATS = [[{"role": "user", "content": f"And {number}?"}] for number in range(4)]
QUESTIONS: list[Any] = [*TEXTS, *CHATS]
MORE_ROWS = 5
"""Rows of the base for which its tokenizer has no tokens, as many published bases have."""

Capture = pytest.CaptureFixture[str]


BYTES = ["Ā", "ā", "Ă"]
"""Tokens of the test's tokenizer that no question has."""


def make_adapter(folder: Path, architecture: str = "llama_tied", *, more_rows: int = MORE_ROWS, **options: Any) -> Path:
    """Save an adapter whose base is in its folder, samples unless told not to, and never writes unused tokens."""
    base = build_base(architecture, vocab_size=VOCAB_SIZE + more_rows)
    unused = [*range(VOCAB_SIZE, VOCAB_SIZE + more_rows), *build_tokenizer().convert_tokens_to_ids(BYTES)]
    with torch.no_grad():  # short rows, as tokens without training have: their scores are near zero
        base.get_input_embeddings().weight[unused] *= 0.01
        base.get_output_embeddings().weight[unused] *= 0.01
    base.generation_config.update(do_sample=True, temperature=0.9, repetition_penalty=1.5)
    base.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    build_rim(base=AutoModelForCausalLM.from_pretrained(folder / "base"), **options).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options", "rank"),
    [
        ("llama_tied", {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}}, 16),
        (
            "gemma3",
            {"num_blocks": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]},
            8,
        ),  # scales its embeddings
        ("gpt2", {"r": 0}, 8),
    ],
)
def test_stock_peft_answers_on_the_unmodified_base(
    architecture: str, options: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    adapter, out = make_adapter(tmp_path / "adapter", architecture, **options), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in (adapter / "base").iterdir()}
    result = export(str(adapter), out, form="embedding-lora", questions=QUESTIONS, max_new_tokens=8)
    assert (result.num_prompts, result.num_equal, result.num_equal_unguarded) == (34, 34, 34)
    assert result.margin is not None
    assert result.margin > 0
    record = json.loads((out / "rim_export.json").read_text())
    ids = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
    assert record["memory"]["ids"] == ids
    assert record["block_ids"] == [ids[0], ids[1], ids[1], ids[2]] * options.get("num_blocks", 2)
    assert record["logit_bias"] == {str(index): -100.0 for index in ids}
    assert record["base_tokenizer_knows_blocks"] is False
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert config["base_model_name_or_path"] == str(adapter / "base")
    assert before == {path.name: path.read_bytes() for path in (adapter / "base").iterdir()}
    weights = [path.name for path in out.rglob("*.safetensors")]
    assert weights == ["adapter_model.safetensors"]
    layers = {key.rpartition(".lora")[0] for key in load_file(out / "adapter_model.safetensors")}
    model = load_run(adapter).model
    assert len(layers) == 1 + sum(".lora_A." in name for name, _ in model.named_parameters())

    ours = load_run(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter / "base"), str(out))
    base = model.get_base_model()
    head = base.get_output_embeddings().weight
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(adapter / "base").get_output_embeddings().weight)
    rows = ours.model.base_model.memory.rows("default")
    own = base.get_input_embeddings().weight
    delta = base.get_input_embeddings().get_delta_weight("default")
    assert torch.allclose(own[ids] + delta[ids], rows, atol=1e-6)
    assert not delta[: ids[0]].any()
    tokenizer = AutoTokenizer.from_pretrained(out)
    asked = tokenizer(TEXTS[0] + "\n", return_tensors="pt")
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 8}
    answer = model.generate(**asked, **greedy)[0, asked["input_ids"].shape[1] :]
    expected = next(answer_questions(ours.model, ours.tokenizer, TEXTS[:1], max_new_tokens=8))
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == expected
    assert EOS_ID not in answer[:-1]
    with pytest.raises(ValueError, match=r"must be 'merged' for an export that this package can load"):
        load_run(out)


@pytest.mark.slow
def test_the_command_finds_names_and_takes_ids(tmp_path: Path, capsys: Capture) -> None:
    """The base has no more rows than tokens: reserved names are found, others can be given, and a card says which."""
    adapter, prompts = make_adapter(tmp_path / "adapter", more_rows=0), tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"question": question}) for question in QUESTIONS), encoding="utf-8")
    command = ["export", str(adapter), "--format", "embedding-lora", "--prompts", str(prompts), "--max-new-tokens", "4"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 1
    assert "base: must have 3 token ids that no text uses" in capsys.readouterr().err
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--spare-ids", "7,8,2"]) == 1
    assert "spare_ids: must not be used by the tokenizer, its chat template" in capsys.readouterr().err
    plain = build_tokenizer()
    (asked,) = plain("W", add_special_tokens=False)["input_ids"]
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--spare-ids", f"6,7,{asked}"]) == 1
    assert f"the checked prompts or their answers have {asked}" in capsys.readouterr().err
    ids = plain.convert_tokens_to_ids(BYTES)
    given = ",".join(map(str, ids))
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--spare-ids", given]) == 0
    record = json.loads((tmp_path / "out" / "rim_export.json").read_text())
    assert record["memory"]["ids"] == ids
    assert record["base_tokenizer_knows_blocks"] is True
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["block_text"] in card
    assert "at three token ids that no text uses" in card
    merged = ["export", str(adapter), "--prompts", str(prompts), "--output-dir", str(tmp_path / "merged")]
    assert main([*merged, "--spare-ids", given]) == 1
    assert "spare_ids: must be omitted for the format merged" in capsys.readouterr().err


def test_the_stored_base_is_of_the_same_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter of a pinned revision, on a base that was loaded in a half type."""
    model = build_rim(base=build_base().to(torch.bfloat16))
    model.get_base_model().name_or_path = "owner/name"
    model.get_base_model().config._commit_hash = "abc"
    asked = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        return build_base()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    stored = on_stored_base(model)
    assert (asked, stored.get_base_model().dtype) == ([("owner/name", "abc")], torch.float32)


@pytest.mark.slow
def test_chats_have_the_variables_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, jobs = checking._ask, []

    def spy(job: dict[str, Any], **options: Any) -> Any:
        jobs.append(job)
        return ask(job, **options)

    monkeypatch.setattr(checking, "_ask", spy)
    adapter = make_adapter(tmp_path / "adapter")
    template = CHAT_TEMPLATE + "{% if enable_thinking is false %}<off>{% endif %}"
    tokenizer = build_tokenizer(chat_template=template)
    chats = [[{"role": "user", "content": f"And {number}?"}] for number in range(32)]
    asked = Prompts(chats, Templates(chat_template_kwargs={"enable_thinking": False}), max_new_tokens=4)
    out = tmp_path / "out"
    model = load_run(adapter).model
    model.get_base_model().config._commit_hash = "abc"  # as of a base from the Hub
    result = export_embedding_lora(model, tokenizer, out, asked, ExportOptions(), source="adapter")
    assert result.num_equal == result.num_prompts == 32
    written = AutoTokenizer.from_pretrained(out).apply_chat_template(
        chats[0], add_generation_prompt=True, tokenize=False
    )
    record = json.loads((out / "rim_export.json").read_text())
    assert written.endswith(f"<|assistant|><off>{record['block_text']}")
    assert record["chat_template_kwargs"] == {"enable_thinking": False}
    assert [job["revision"] for job in jobs] == [record["base_revision"]] == ["abc"]
    assert json.loads((out / "adapter_config.json").read_text())["revision"] == "abc"
    assert "with `enable_thinking=False` unless a call gives other values" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "base: must be loaded from a folder or the Hub, where engines find it too"),
        ({"r": 600}, "r: must be at most 512 for the format embedding-lora, .* got 600"),
        ({"use_dora": True}, "use_dora: must be off for the format embedding-lora, got True"),
        ({"num_blocks": 0}, "num_blocks: must be at least 1 for memory rows, got 0"),
        ({"insertion_layer": 1}, "insertion_layer=1: a plain checkpoint has no place"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save: must be off for the format embedding-lora, got \['norm'\]"),
    ],
)
def test_what_plain_lora_cannot_express_is_refused(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    prompts, base = Prompts(QUESTIONS, Templates(), max_new_tokens=4), build_base(vocab_size=VOCAB_SIZE + MORE_ROWS)
    base.name_or_path = "" if not options else "owner/name"
    model, tokenizer = build_rim(base=base, **options), build_tokenizer()
    with pytest.raises(ValueError, match=problem):
        export_embedding_lora(model, tokenizer, tmp_path / "out", prompts, ExportOptions(), source="a")
    assert not (tmp_path / "out").exists()


def test_ranks_are_those_of_vllm() -> None:
    assert RANKS == (8, 16, 32, 64, 128, 256, 320, 512)
