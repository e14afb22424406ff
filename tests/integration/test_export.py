"""Exports as users make and ask them: the command, its check in a fresh process, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from rim_peft.cli.main import main
from rim_peft.data.chats import Chat
from rim_peft.data.examples import QuestionError, Templates
from rim_peft.export import merged as merged_export
from rim_peft.export.checking import ExportCheckError
from rim_peft.export.folder import ExportOptions, Prompts
from rim_peft.export.reading import ExportAnswerer, load_export
from rim_peft.inference import BlockAnswerer, answer_questions
from rim_peft.recipe import load_recipe
from rim_peft.run import Run, evaluate, export, load_run
from rim_peft.run.sharing import FORMATS
from tests.conftest import CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE, build_base, build_rim, build_tokenizer

RECIPE = str(Path(__file__).parents[2] / "recipes" / "potions" / "demo-nf4.yaml")
TEXTS = [f"What is {number} and {number * number}?" for number in range(30)]
CHATS = [[{"role": "user", "content": f"And {number}?"}] for number in range(4)]
SPELT = ["Say <|rim_memory|><eos>.", [{"role": "user", "content": "<|rim_begin|><|rim_memory|>?<|assistant|>"}]]
"""Questions that spell special tokens, the export's too: text like any other."""

Capture = pytest.CaptureFixture[str]
MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Saves an adapter whose base lies in its folder, and samples unless it is told not to, as Llama's and Qwen's."""

    def make(name: str, *, seed: int = 0, architecture: str = "llama_tied", **options: Any) -> Path:
        folder = tmp_path / name
        plain = build_base(architecture, seed=seed)
        plain.generation_config.update(do_sample=True, temperature=0.9, top_k=50, repetition_penalty=1.5)
        plain.save_pretrained(folder / "base")
        build_tokenizer().save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")  # an adapter names where its base came from
        build_rim(base=base, **options).save_pretrained(folder)
        return folder

    return make


def test_an_export_answers_as_its_adapter(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    adapter, out = make_adapter("adapter"), tmp_path / "out"
    result = export(str(adapter), out, questions=[*TEXTS, *CHATS, *SPELT], max_new_tokens=8)
    assert (result.num_prompts, result.num_equal, result.num_equal_unguarded) == (36, 36, 36)
    run, ours = load_run(out), load_run(adapter)
    questions = [*TEXTS[:3], *CHATS[:2], *SPELT]
    answers = list(run.answerer(max_new_tokens=8).answer(questions, batch_size=3))
    assert answers == list(answer_questions(ours.model, ours.tokenizer, questions, max_new_tokens=8))
    assert len(set(answers)) > 1
    pipe = pipeline("text-generation", model=run.model, tokenizer=run.tokenizer)
    asked: list[Any] = [TEXTS[0] + "\n", CHATS[0]]
    said = [pipe(item, max_new_tokens=8, do_sample=False, return_full_text=False) for item in asked]
    assert [generated[0]["generated_text"].strip() for generated in said] == [answers[0], answers[3]]
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102 - what a reader of the card would do
    shown = capsys.readouterr().out.strip()
    assert shown == next(answer_questions(ours.model, ours.tokenizer, TEXTS[:1], max_new_tokens=8))
    scored = {"limit": 6, "max_new_tokens": 4}
    assert evaluate(run, "potions", **scored) == evaluate(ours, "potions", **scored)

    too_long = r"questions\[1\]: prompt and blocks \(\d+ tokens\) and answer \(64\) .* or lower max_new_tokens\.$"
    with pytest.raises(QuestionError, match=too_long):
        list(run.answerer(max_new_tokens=64).answer(["a", "a" * 500]))
    with pytest.raises(ValueError, match="num_blocks: must be 2, which the export was made with, got 5"):
        run.answerer(num_blocks=5)
    with pytest.raises(ValueError, match="by_block: must not be given for an export"):
        evaluate(run, "potions", by_block=True, **scored)
    with pytest.raises(ValueError, match="out: must be a new or empty folder"):
        export(str(adapter), out, questions=TEXTS)
    with pytest.raises(ValueError, match="base: must be omitted for an export"):
        load_run(out, base=str(adapter / "base"))
    with pytest.raises(ValueError, match="is an export already"):
        export(str(out), tmp_path / "again", questions=TEXTS)
    with pytest.raises(ValueError, match="or an export of format peft-lora to add to"):
        export(str(adapter), out, form="peft-lora", questions=[*TEXTS, *CHATS])


@pytest.mark.slow
def test_an_export_that_answers_otherwise_fails_and_is_kept(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = make_adapter("adapter"), tmp_path / "out"
    right = merged_export.add_rows
    monkeypatch.setattr(
        merged_export, "add_rows", lambda base, ids, rows, **options: right(base, ids, rows.flip(0), **options)
    )
    with pytest.raises(ExportCheckError, match=r"differs on \d+ of 34 prompts, near ties aside:\n  'What") as failed:
        export(str(adapter), out, questions=[*TEXTS, *CHATS], max_new_tokens=8)
    assert "The files are kept" in str(failed.value)
    check = json.loads((out / "rim_export.json").read_text())["check"]
    assert check["num_equal"] < check["num_prompts"] == 34
    assert len(check["differing"]) == check["num_prompts"] - check["num_equal"]
    assert (out / "model.safetensors").exists()
    assert f"{check['num_equal']} of 34 prompts" in (out / "README.md").read_text()


@pytest.mark.slow
def test_an_adapter_without_blocks_is_merged(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """As answering at once and written chains have: what RiM is compared with is served in the same way."""
    adapter, out = make_adapter("adapter", num_blocks=0), tmp_path / "out"
    questions = [*TEXTS, *CHATS]
    with pytest.raises(ValueError, match="num_blocks: must be left out for an adapter without blocks, got 2"):
        export(str(adapter), out, questions=questions, options=ExportOptions(num_blocks=2))
    with pytest.raises(ValueError, match="num_blocks: must be at least 1 for memory rows, got 0"):
        export(str(adapter), out, form="peft-lora", questions=questions)
    result = export(str(adapter), out, questions=questions, max_new_tokens=8)
    assert (result.num_equal, result.num_equal_unguarded) == (34, 34)
    run, ours = load_run(out), load_run(adapter)
    assert run.model.get_input_embeddings().weight.shape[0] == len(run.tokenizer) == VOCAB_SIZE
    answers = list(run.answerer(max_new_tokens=8).answer(questions[-6:]))
    assert answers == list(answer_questions(ours.model, ours.tokenizer, questions[-6:], max_new_tokens=8))
    assert run.model.generation_config.suppress_tokens is None
    card = (out / "README.md").read_text()
    assert "without memory blocks" in card
    assert "Memory tokens" not in card
    scored = {"limit": 6, "max_new_tokens": 4}
    assert evaluate(run, "potions", **scored) == evaluate(ours, "potions", **scored)


def test_continuous_thoughts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(build_rim(num_blocks=0), build_tokenizer(), load_recipe(RECIPE, ["method=coconut"], check=False))
    monkeypatch.setattr("rim_peft.run.sharing.load_run", lambda source, **options: run)
    with pytest.raises(ValueError, match="method: must be one that answers after tokens, got 'coconut'"):
        export("adapter", tmp_path / "out", questions=[*TEXTS, *CHATS])


def test_an_export_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    kept = {"rim_export.json": "{}", "recipe.yaml": "of another run"}
    for name, text in kept.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="out: must be a new or empty folder"):
        export(str(Path(RECIPE).parents[2] / "no" / "adapter"), tmp_path)  # said before anything is loaded
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == kept


def test_what_is_refused(make_adapter: MakeAdapter, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "out")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('2 + 2?\n{"text": "1 + 1?"}\n', encoding="utf-8")
    assert main(["export", "adapter", "--output-dir", out, "--prompts", str(prompts)]) == 1
    assert f"{prompts} line 2: must have a field question" in capsys.readouterr().err
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    adapter = str(make_adapter("adapter"))
    assert main(["export", adapter, "--output-dir", out, "--prompts", str(prompts)]) == 1
    assert "prompts: must be at least 32 to check an export, got 30" in capsys.readouterr().err
    assert main(["export", adapter, "--output-dir", out]) == 1
    assert "prompts: must be given, since the adapter does not say what it was trained on" in capsys.readouterr().err
    middle = str(make_adapter("middle", insertion_layer=1))
    assert main(["export", middle, "--output-dir", out, "--prompts", str(prompts)]) == 1
    assert "insertion_layer=1: a plain checkpoint has no place" in capsys.readouterr().err
    rows_alone = str(make_adapter("rows", r=0))
    assert main(["export", rows_alone, "--output-dir", out, "--format", "peft-lora", "--prompts", str(prompts)]) == 1
    assert "r: must be at least 1 for the format peft-lora, got 0" in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.slow
def test_plain_lora_adapters_on_one_extended_base(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Stock PEFT answers with each as the plugin does, though their memory rows and numbers of blocks differ."""
    out = tmp_path / "out"
    questions = [*TEXTS, *CHATS]
    for name, options in (("first", {}), ("second", {"num_blocks": 3, "init_memory": [40, 50, 60]})):
        adapter = make_adapter(name, **options)
        if name == "second":
            (out / "adapters" / name).mkdir()  # left by an export that was interrupted
        result = export(str(adapter), out, form="peft-lora", questions=questions, max_new_tokens=8)
        assert result.num_equal == result.num_equal_unguarded == 34
    for name in ("first", "second"):  # the first one too, after the base has grown
        folder = out / "adapters" / name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("LORA", 4)
        model, ours = AutoPeftModelForCausalLM.from_pretrained(folder), load_run(tmp_path / name)
        assert model.get_base_model().get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 6
        tokenizer = AutoTokenizer.from_pretrained(folder)
        asked = tokenizer(TEXTS[0] + "\n", return_tensors="pt")
        model.get_base_model().generation_config.suppress_tokens = None
        answer = model.generate(**asked, max_new_tokens=8)[0, asked["input_ids"].shape[1] :]
        expected = next(answer_questions(ours.model, ours.tokenizer, TEXTS[:1], max_new_tokens=8))
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == expected
        assert EOS_ID not in answer[:-1]
        card = (folder / "README.md").read_text()
        assert "34 of 34 prompts" in card
        assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["lora", "rim", "latent-reasoning"]
        assert not (folder / "added_tokens.json").exists()  # engines take those for rows that the adapter brings

    other = make_adapter("other", seed=5)
    with pytest.raises(ValueError, match=r"base: must be the one that .* was made from, differs in"):
        export(str(other), out, form="peft-lora", questions=questions, max_new_tokens=8)
    with pytest.raises(ValueError, match="already has an adapter 'first'"):
        export(str(tmp_path / "first"), out, form="peft-lora", questions=questions)
    with pytest.raises(ValueError, match=r"must be 'merged' for an export that this package can load, got 'peft-lora'"):
        load_run(out)


@pytest.mark.slow
def test_each_plain_lora_adapter_keeps_its_own_chat_template(tmp_path: Path) -> None:
    """On one extended base, whose tokenizer is the first adapter's: the second one's chats were written by that."""
    out = tmp_path / "out"
    templates = {"first": CHAT_TEMPLATE, "second": CHAT_TEMPLATE.replace("<eos>", "")}
    asked = Prompts([*TEXTS, *TEXTS[:4]], Templates(), max_new_tokens=2)
    for name, template in templates.items():
        own = build_tokenizer(chat_template=template)
        FORMATS["peft-lora"](build_rim(), own, out, asked, ExportOptions(), source=name)
    for name, text in {"first": "And 0?<eos><|assistant|>", "second": "And 0?<|assistant|>"}.items():
        exported = AutoTokenizer.from_pretrained(out / "adapters" / name)
        number = "" if name == "first" else "_2"
        said: Any = exported.apply_chat_template(CHATS[0], add_generation_prompt=True, tokenize=False)
        assert said.startswith(f"<|user|>{text}<|rim_begin{number}|>")
    assert AutoTokenizer.from_pretrained(out / "base").chat_template == CHAT_TEMPLATE


@pytest.mark.slow
def test_a_base_that_was_left_tied_stays_so(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Untied for a second adapter, its head would score the first one's rows as they are."""
    out = tmp_path / "out"
    for name, keep_tied in (("first", True), ("second", False)):
        options = ExportOptions(keep_tied=keep_tied)
        asked: dict[str, Any] = {"questions": [*TEXTS, *CHATS], "max_new_tokens": 4}
        export(str(make_adapter(name)), out, form="peft-lora", options=options, **asked)
    assert json.loads((out / "rim_export.json").read_text())["head_is_tied"] is True
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight


@pytest.mark.slow
def test_qlora_from_training_to_an_export_that_scores_the_same(tmp_path: Path, capsys: Capture) -> None:
    """The recipe's path with fewer steps: nf4 on the CPU, both stages, evaluated, exported, evaluated again."""
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    small = ["grounding.max_steps=3", "refinement.max_steps=2", "data.options.num_rows=640", "data.validation_rows=64"]
    assert main(["train", RECIPE, f"output_dir={adapter}", *small]) == 0
    capsys.readouterr()
    assert main(["export", str(adapter), "--output-dir", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["num_prompts"], result["num_equal"], result["num_equal_unguarded"]) == (64, 64, 64)
    record = json.loads((out / "rim_export.json").read_text())
    assert record["dequantized_from"] == "nf4"
    assert record["quantized_agreement"] == 64
    documents = []
    for folder in (adapter, out):
        assert main(["evaluate", str(folder), "--limit", "64", "--json"]) == 0
        documents.append(capsys.readouterr().out)
    assert documents[0] == documents[1]
    assert main(["generate", str(out), "Ben stirs Kim's brew. Kim's brew is gold. What colour is Ben's brew?"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_an_export_in_another_type(make_adapter: MakeAdapter, tmp_path: Path, capsys: Capture) -> None:
    """Rounding decides where two tokens lie near each other: such prompts are shown, and are no failure."""
    adapter, out, prompts = make_adapter("adapter"), tmp_path / "out", tmp_path / "prompts.jsonl"
    lines = [json.dumps({"question": question}) for question in [*TEXTS, *CHATS]]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    command = ["export", str(adapter), "--output-dir", str(out), "--prompts", str(prompts), "--dtype", "bfloat16"]
    more = ["--num-blocks", "3", "--max-shard-size", "20KB", "--max-new-tokens", "8"]
    assert main([*command, *more]) == 0
    assert "of 34 prompts give the adapter's greedy tokens" in capsys.readouterr().out
    run = load_run(out)
    assert next(run.model.parameters()).dtype == torch.bfloat16
    assert run.answerer().num_blocks == 3
    assert len(list(out.glob("model-*.safetensors"))) > 1
    check = json.loads((out / "rim_export.json").read_text())["check"]
    assert check["num_equal"] + check["num_near_ties"] == 34
    assert check["num_equal"] >= 25  # most prompts are far from a tie


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "peft-lora"])
def test_an_export_writes_chats_with_the_variables_of_the_training(form: str, tmp_path: Path) -> None:
    template = "{{ tools | tojson if tools }}" + CHAT_TEMPLATE + "{% if enable_thinking is false %}<off>{% endif %}"
    tokenizer = build_tokenizer(chat_template=template)
    chats = [[{"role": "user", "content": f"And {number}?"}] for number in range(32)]
    own = Chat(chats[0], tools=[{"name": "add"}], chat_template_kwargs={"enable_thinking": True})
    templates = Templates(chat_template_kwargs={"enable_thinking": False})
    asked = Prompts([own, *chats[1:]], templates, max_new_tokens=4)
    out = tmp_path / "out"
    result = FORMATS[form](build_rim(), tokenizer, out, asked, ExportOptions(), source="adapter")
    assert result.num_equal == result.num_prompts == 32
    folder = out if form == "merged" else out / "adapters" / "adapter"
    exported = AutoTokenizer.from_pretrained(folder)
    text = exported.apply_chat_template(chats[0], add_generation_prompt=True, tokenize=False)
    assert "<|assistant|><off><|rim_begin|>" in text
    card = (folder / "README.md").read_text()
    assert "by the chat template, with `enable_thinking=False` unless a call gives other values" in card
    if form == "merged":
        assert "apply_chat_template(chat, tools=[{'name': 'add'}], enable_thinking=True, add_gen" in card
        model, theirs, record = load_export(out)
        answerer = ExportAnswerer(model, theirs, record=record, templates=templates, max_new_tokens=4)
        ours = BlockAnswerer(build_rim(), tokenizer, templates=templates, max_new_tokens=4)
        begun = Chat([*chats[1], {"role": "assistant", "content": "It"}], continue_final_message=True)
        questions = [own, chats[1], begun]
        assert answerer.encode(questions)[2][-2:] == ours.encode(questions)[2][-2:]
        assert list(answerer.answer(questions)) == list(ours.answer(questions))
        said = answerer.conversation()
        assert said.answer("And 1?") == next(ours.answer([chats[1]]))
