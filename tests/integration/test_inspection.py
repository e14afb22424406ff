"""The document of an inspection against what the rest of the package computes, and against slower ways."""

from __future__ import annotations

import json
import math
import re
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    StopStringCriteria,
)

from rim_peft.chains.prompts import Prompts
from rim_peft.cli.main import main
from rim_peft.data.examples import QuestionError
from rim_peft.demo import BASE
from rim_peft.evaluation.controls import shuffle_ids
from rim_peft.evaluation.probe import Probe
from rim_peft.inference import BlockAnswerer, answer_questions, read_blocks
from rim_peft.inference.greedy import generate_greedily
from rim_peft.inference.swapping import answer_with_memory_ids, answer_with_swapped_blocks
from rim_peft.inspection import Inspection, Options, inspect_questions, lens
from rim_peft.inspection.alternatives import Asked, find_donor, write_chain
from rim_peft.inspection.attention import attention_weights, split_words
from rim_peft.inspection.document import END, Chain, QuestionInspection
from rim_peft.run import Run
from rim_peft.tuner.layers import find_layers, lowest_layers
from tests.conftest import EOS_ID, PAD_ID, build_base, build_rim, build_tokenizer, save_base

QUESTION, DONOR = "what is 17 times 4?", "how is 25 under 6??"
TOKENS = 5
SETTINGS: dict[str, Any] = {"max_new_tokens": TOKENS}
QUICK = Options(chain_tokens=0)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"bidirectional_blocks": True, "insertion_layer": 1}),
    ("gpt2", {}),
    ("qwen3", {}),
    ("gemma3", {}),
    ("mistral", {"block_size": 1}),
]


def _inspect(model: Any, *questions: Any, options: Options = QUICK, **settings: Any) -> Inspection:
    run = Run(model, build_tokenizer())
    return inspect_questions(run, questions or [QUESTION], options=options, **{**SETTINGS, **settings})


def _only(model: Any, **settings: Any) -> QuestionInspection:
    (question,) = _inspect(model, **settings).questions
    return question


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_the_document_holds_what_the_package_computes(architecture: str, options: dict[str, Any]) -> None:
    tokenizer = build_tokenizer()
    model = build_rim(architecture, **{"num_blocks": 3, **options})
    implementation = model.config._attn_implementation
    found = _only(model, donors=[DONOR], options=Options(chain_tokens=0, seed=3))
    assert found.missing == {}
    assert model.config._attn_implementation == implementation

    (readouts,) = read_blocks(model, tokenizer, [QUESTION], **SETTINGS)
    assert [readout.text for readout in found.readouts] == [readout.text for readout in readouts]
    for shown, readout in zip(found.readouts, readouts, strict=True):
        (answer,) = answer_questions(model, tokenizer, [QUESTION], num_blocks=shown.block, **SETTINGS)
        assert shown.text == answer
        assert [candidates[0].token_id for candidates in shown.tokens] == readout.token_ids
        chosen = [math.log(candidates[0].probability) for candidates in shown.tokens]
        assert chosen == pytest.approx(readout.token_log_probs, abs=1e-3)
        assert shown.probability == pytest.approx(math.exp(sum(chosen)))
        for first, *others in shown.tokens:
            assert [other.probability for other in others] == sorted((o.probability for o in others), reverse=True)
            assert first.token_id not in [other.token_id for other in others]
            assert len(others) == 3

    assert found.lens is not None
    last = [
        reading for reading in found.lens if reading.place == END and reading.layer == model.config.num_hidden_layers
    ]
    for reading, shown in zip(last, found.readouts, strict=True):
        assert reading.block == shown.block
        expected = shown.tokens[0][:3]
        assert [c.token_id for c in reading.candidates] == [c.token_id for c in expected]
        assert [c.probability for c in reading.candidates] == pytest.approx([c.probability for c in expected], abs=1e-4)
    assert last[-1].answer_probability == pytest.approx(found.final.tokens[0][0].probability, abs=1e-4)

    assert found.attention is not None
    for row in found.attention:
        assert sum(row.words) + row.earlier_blocks + row.own_block == pytest.approx(1.0, abs=1e-4)
        assert row.elsewhere == pytest.approx(0.0, abs=1e-4)
        assert len(row.words) == len(found.words)
        assert (row.earlier_blocks == 0) == (row.block == 1)

    ids = shuffle_ids(model.peft_config["default"].block_tokens.ids(3), seed=3)
    expected_texts = [
        *answer_questions(model, tokenizer, [QUESTION], num_blocks=0, **SETTINGS),
        *answer_with_memory_ids(model, tokenizer, [QUESTION], ids, **SETTINGS),
        *answer_with_swapped_blocks(model, tokenizer, [QUESTION], [DONOR], **SETTINGS),
    ]
    assert [alternative.name for alternative in found.alternatives] == ["removed", "shuffled", "swapped"]
    assert [alternative.text for alternative in found.alternatives] == expected_texts
    (donated,) = answer_questions(model, tokenizer, [DONOR], **SETTINGS)
    assert found.alternatives[-1].donor == DONOR
    assert found.alternatives[-1].donor_answer == donated.removesuffix(".")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_layer_is_read_as_if_it_were_the_last(architecture: str) -> None:
    """The slow way: the base itself, cut above each layer."""
    model = build_rim(architecture)
    found = _only(model)
    assert found.lens is not None
    blocks = model.peft_config["default"].block_tokens
    prompt = build_tokenizer()(f"{QUESTION}\n")["input_ids"]
    ids = torch.tensor([[*prompt, *blocks.ids(2)]])
    places = {END: blocks.length - 1, "memory 1": 1, "memory 2": 2}
    assert len(found.lens) == 2 * 2 * len(places)
    for layer in (1, 2):
        with torch.no_grad(), lowest_layers(model.get_base_model(), layer):
            chances = model(input_ids=ids).logits[0].softmax(-1)
        for reading in found.lens:
            if reading.layer == layer:
                expected = chances[len(prompt) + (reading.block - 1) * blocks.length + places[reading.place]]
                best = expected.topk(3)
                assert [c.token_id for c in reading.candidates] == best.indices.tolist()
                assert [c.probability for c in reading.candidates] == pytest.approx(best.values.tolist(), abs=1e-4)
                answer = found.final.tokens[0][0].token_id
                assert reading.answer_probability == pytest.approx(float(expected[answer]), abs=1e-4)


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_attention_is_that_of_one_eager_pass(architecture: str, options: dict[str, Any]) -> None:
    model = build_rim(architecture, **options)
    blocks = model.peft_config["default"].block_tokens
    prompt = build_tokenizer()(f"{QUESTION}\n")["input_ids"]
    found = attention_weights(model, prompt, num_blocks=2)
    ids = torch.tensor([[*prompt, *blocks.ids(2)]])
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=ids, output_attentions=True)
    expected = torch.stack([part[0].mean(0)[len(prompt) :] for part in output.attentions])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_blocks_that_enter_later_are_read_from_there() -> None:
    base = build_base("llama", num_hidden_layers=4)
    inspection = _inspect(build_rim(base=base, insertion_layer=1))
    assert (inspection.first_layer, inspection.num_layers) == (2, 4)
    groups = [(group.first, group.last) for group in inspection.layer_groups]
    assert groups == [(2, 4), (2, 2), (3, 3), (4, 4)]
    assert inspection.questions[0].lens is not None
    assert {reading.layer for reading in inspection.questions[0].lens} == {2, 3, 4}


def test_the_base_writes_alone_and_both_are_timed() -> None:
    model, tokenizer = build_rim(), build_tokenizer()
    found = _only(model, options=Options(chain_tokens=6, chain_template="Q {question} think:")).chain
    assert found is not None
    # The tokenizer has a chat template, so the base is asked in a chat.
    assert found.prompt == f"<|user|>Q {QUESTION} think:<eos><|assistant|>"
    with model.disable_adapter():
        prompts = [tokenizer(found.prompt)["input_ids"]]
        (ids,) = generate_greedily(model, prompts, eos_id=EOS_ID, pad_id=PAD_ID, max_new_tokens=6)
    assert found.text == str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    assert found.num_tokens == len(ids)
    assert found.ms > 0
    assert found.adapter_ms > 0
    assert model.get_base_model().get_input_embeddings().current_adapter == "default"


def _chain(model: Any, tokenizer: Any, **options: Any) -> Chain:
    answerer = BlockAnswerer(model, tokenizer, **SETTINGS)
    (prompt,) = answerer.encode([QUESTION])
    return write_chain(answerer, Asked(QUESTION, prompt, None, str), **options)


def _stop_at(monkeypatch: pytest.MonkeyPatch, *stops: str) -> None:
    monkeypatch.setattr(Prompts, "stops", stops)


def test_a_chain_ends_where_the_next_question_would_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build_rim(), build_tokenizer(chat_template=None)
    _stop_at(monkeypatch)
    whole = _chain(model, tokenizer, max_new_tokens=24)
    stop = re.findall(r"[!-~]", whole.text)[0]  # bytes that are no text are not found
    _stop_at(monkeypatch, stop)
    found = _chain(model, tokenizer, max_new_tokens=24)
    assert found.text == whole.text.partition(stop)[0]
    assert found.num_tokens < whole.num_tokens == 24  # nothing was computed after it
    assert found.is_complete


def test_a_chain_ends_as_the_base_ends_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build_rim(), build_tokenizer()
    _stop_at(monkeypatch)
    whole = _chain(model, tokenizer, max_new_tokens=12)
    with model.disable_adapter():
        prompts = [tokenizer(whole.prompt)["input_ids"]]
        (ids,) = generate_greedily(model, prompts, eos_id=EOS_ID, pad_id=PAD_ID, max_new_tokens=12)
    end = ids[3]
    model.get_base_model().generation_config.eos_token_id = [EOS_ID, end]
    found = _chain(model, tokenizer, max_new_tokens=12)
    assert found.num_tokens == ids.index(end) + 1 < whole.num_tokens
    assert found.is_complete


def test_a_chain_is_cut_where_transformers_cannot_find_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's tokenizer has a token a word, in which transformers looks for no stop strings."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with pytest.raises(ValueError, match=r"."):
        StopStringCriteria(tokenizer, ["\nQuestion:"])
    model = build_rim(base=AutoModelForCausalLM.from_pretrained(BASE))
    _stop_at(monkeypatch)
    whole = _chain(model, tokenizer, max_new_tokens=24)
    stop = whole.text.split()[1]
    _stop_at(monkeypatch, stop)
    found = _chain(model, tokenizer, max_new_tokens=24)
    assert found.text == whole.text.partition(stop)[0]
    assert found.num_tokens == whole.num_tokens


def test_a_chain_has_as_many_tokens_as_fit_unless_told_otherwise() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = build_rim(base=AutoModelForCausalLM.from_pretrained(BASE))  # 256 positions
    found = _chain(model, tokenizer)
    assert 0 < found.num_tokens <= 256 - len(tokenizer(found.prompt)["input_ids"])
    with pytest.raises(QuestionError, match="must fit into the base's 256 positions"):
        _chain(model, tokenizer, max_new_tokens=256)
    assert "chain" not in inspect_questions(Run(model, tokenizer), [QUESTION]).questions[0].missing


def test_words_are_those_of_the_prompt() -> None:
    tokenizer = build_tokenizer()
    text = "<bos>a naïve\n  line of words <|user|>\U0001f600 " + "x" * 60
    ids = tokenizer(text)["input_ids"]
    words = split_words(ids, tokenizer)
    assert "".join(word.text for word in words) == text
    assert sum(word.num_tokens for word in words) == len(ids)
    assert [word.text for word in words if word.is_special] == ["<bos>", "<|user|>"]
    assert [word.text for word in words[1:5]] == ["a", " naïve", "\n  line", " of"]
    assert max(len(word.text) for word in words) <= 24
    # Ids that the tokenizer would not give for their text: a special token's name, spelt.
    spelt = tokenizer("<eos>", split_special_tokens=True)["input_ids"]
    assert len(spelt) > 1
    cut = split_words(spelt, tokenizer)
    assert ["".join(word.text for word in cut), any(word.is_special for word in cut)] == ["<eos>", False]
    # Spaces at the start of tokens, of which a token decoded alone lacks its own; "é" is two tokens.
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "▁What", "▁is", "<0xC3>", "<0xA9>", "?"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    cut = split_words([1, 2, 3, 4, 5, 6], PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [(word.text, word.num_tokens) for word in cut] == [("<s>", 1), (" What", 1), (" isé?", 4)]


def test_a_chat_is_inspected_as_the_model_sees_it() -> None:
    chat = [{"role": "system", "content": "brief"}, {"role": "user", "content": "why?"}]
    (found,) = _inspect(build_rim(), chat).questions
    assert found.prompt == "<|system|>brief<eos><|user|>why?<eos><|assistant|>"
    assert found.question == chat


def test_questions_lend_each_other_their_blocks() -> None:
    first, second, third = _inspect(build_rim(), QUESTION, DONOR, "short").questions
    assert [first.alternatives[-1].donor, second.alternatives[-1].donor] == [DONOR, QUESTION]
    assert set(third.missing) == {"swapped"}


def test_a_donor_with_another_answer_is_preferred() -> None:
    class Answers:
        """Answers by a prompt's first token."""

        def answer_prompts(self, prompts: list[list[int]], *, batch_size: int) -> Any:
            yield from ({3: "red", 4: "blue"}[prompt[0]] for prompt in prompts)

    answerer: Any = Answers()
    asked = Asked("q", [1, 2], "red", str.strip)
    others = [("long", [4, 2, 2]), ("itself", [1, 2]), ("same", [3, 2]), ("other", [4, 2])]
    assert find_donor(answerer, asked, others, lambda _: str.strip).question == "other"
    assert find_donor(answerer, asked, others[:3], lambda _: str.strip).question == "same"


def test_a_probe_chooses_too_unless_it_is_of_another_adapter() -> None:
    model = build_rim()
    weight = np.zeros((2, 2, 32))
    probe = Probe(weight, np.array([1.0, 0.0]), np.zeros((2, 32)), np.ones((2, 32)), 1.0, 8)
    found = _only(model, probe=probe)
    assert [selection.rule for selection in found.selection] == ["final", "vote", "confidence", "probe"]
    assert found.selection[-1].block == 1
    assert found.selection[-1].scores == (1.0, 0.0)
    other = Probe(np.zeros((3, 3, 32)), np.zeros(3), np.zeros((3, 32)), np.ones((3, 32)), 1.0, 8)
    found = _only(model, probe=other)
    assert "number of blocks" in found.missing["probe"]
    assert len(found.selection) == 3


def test_what_a_base_cannot_give_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_rim()
    base = model.get_base_model()

    def too_few(*args: Any, **options: Any) -> Any:
        """What is taken for the last layer is not the last."""
        decoder, layers = find_layers(*args, **options)
        return decoder, layers[:1]

    with monkeypatch.context() as patch:
        patch.setattr(lens, "find_layers", too_few)
        found = _only(model, donors=["short"])
    assert found.lens is None
    assert "got LlamaForCausalLM. Use another base" in found.missing["lens"]
    assert "must be another question whose prompt has 20 tokens" in found.missing["swapped"]
    assert "got prompts of [6] tokens. Give one with --donor" in found.missing["swapped"]
    forward = type(base).forward

    @wraps(forward)
    def without_weights(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "output_attentions": False})

    monkeypatch.setattr(type(base), "forward", without_weights)
    found = _only(model)
    assert found.attention is None
    assert "returns no weights" in found.missing["attention"]
    assert model.config._attn_implementation != "eager"


def test_what_cannot_be_inspected_is_refused() -> None:
    model = build_rim()
    with pytest.raises(ValueError, match="questions: must be at least one, got none"):
        inspect_questions(Run(model, build_tokenizer()), [])
    with pytest.raises(ValueError, match="adapter: must answer after memory blocks"):
        _inspect(build_rim(num_blocks=0))
    exported = Run(model, build_tokenizer(), exported=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adapter: must be an adapter, got an export"):
        inspect_questions(exported, [QUESTION])
    with pytest.raises(ValueError, match=r"chain_template: must hold \{question\} once, got 'Think!'"):
        Options(chain_template="Think!")
    with pytest.raises(QuestionError, match=r"questions\[1\]"):
        _inspect(model, QUESTION, " ")
    with pytest.raises(QuestionError, match=r"donors\[0\]"):
        _inspect(model, donors=["x" * 600])
    with pytest.raises(ValueError, match="num_best: must be an integer of at least 1, got 0"):
        Options(num_best=0)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="logits must be finite"):
        _inspect(model)


def test_a_4_bit_base_is_inspected(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    build_base("llama", hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    model = build_rim(base=base)
    found = _only(model)
    assert set(found.missing) == {"swapped"}
    (readouts,) = read_blocks(model, build_tokenizer(), [QUESTION], **SETTINGS)
    assert [readout.text for readout in found.readouts] == [readout.text for readout in readouts]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_rounds_and_nothing_else(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = build_rim(base=build_base().to(torch.bfloat16).to(device), num_blocks=3).to(device)
    found = _only(model, donors=[DONOR], options=Options(chain_tokens=8))
    assert found.missing == {}
    (readouts,) = read_blocks(model, build_tokenizer(), [QUESTION], **SETTINGS)
    assert [readout.text for readout in found.readouts] == [readout.text for readout in readouts]
    for row in found.attention or ():
        assert sum(row.words) + row.earlier_blocks + row.own_block == pytest.approx(1.0, abs=1e-5)
    last = [reading for reading in found.lens or () if (reading.place, reading.layer) == (END, 2)]
    for reading, shown in zip(last, found.readouts, strict=True):
        # 8 bits of a state and of each product.
        assert reading.candidates[0].probability == pytest.approx(shown.tokens[0][0].probability, abs=0.05)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder that names its base's folder."""
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    save_base(tmp_path / "base", tokenizer=tokenizer)
    model = build_rim(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_command_prints_and_writes_the_same(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, document = adapter.parent / "page.html", adapter.parent / "new" / "document.json"
    picture = adapter.parent / "picture.svg"
    options = ["--no-chain", "--max-new-tokens", "5", "--num-best", "2", "--donor", DONOR]
    files = [page, picture, document]
    arguments = [
        "inspect",
        str(adapter),
        QUESTION,
        *options,
        *(part for file in files for part in ("--out", str(file))),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-3:] == [f"rim-peft: wrote {file}" for file in files]
    assert picture.read_text(encoding="utf-8").startswith("<svg ")
    assert printed.out.splitlines()[0] == QUESTION
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([*arguments[:3], *options, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(document.read_text(encoding="utf-8"))
    assert (shown["kind"], shown["format"], shown["adapter"]) == ("rim-peft inspection", 1, "adapter")
    assert shown["base"] == "base"
    assert len(shown["questions"][0]["lens"][0]["candidates"]) == 2
    Probe(np.zeros((2, 2, 32)), np.array([0.0, 1.0]), np.zeros((2, 32)), np.ones((2, 32)), 1.0, 8).save(adapter)
    assert main([*arguments[:3], *options, "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["questions"][0]["selection"]
    assert chosen[-1] == {"rule": "probe", "block": 2, "scores": [0.0, 1.0]}


def test_the_command_takes_chats(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "why?"}]}
    assert main(["inspect", str(adapter), json.dumps(chat, indent=1), '{"messages"', "--no-chain"]) == 1
    assert "question: not valid JSON" in capsys.readouterr().err
    assert main(["inspect", str(adapter), json.dumps(chat, indent=1), "--no-chain", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["questions"]
    assert found["question"] == chat["messages"]
    assert main(["inspect", str(adapter), "{1, 2} has how many subsets?", "--no-chain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"][0]["question"] == "{1, 2} has how many subsets?"
    assert "".join(word["text"] for word in found["words"]).endswith("<|user|>why?<eos><|assistant|>")


def test_wrong_usage_is_one_line(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(adapter), "q", "--out", "page.pdf"])
    assert "--out: must end in .html or .svg or .json, got 'page.pdf'" in capsys.readouterr().err
    assert main(["inspect", str(adapter), "q", "p", "--out", "picture.svg"]) == 1
    assert "--out: picture.svg must show one question, got 2" in capsys.readouterr().err
    assert main(["inspect", str(adapter), "q", "--no-chain", "--num-blocks", "400"]) == 1
    assert "must fit into the base's 512 positions" in capsys.readouterr().err
