"""Adapters under the real lm-evaluation-harness: blocks between context and continuation, and nothing else changed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rim_peft.cli.main import main
from rim_peft.data.examples import Example
from rim_peft.data.tokenization import tokenize_example, tokenize_prompts
from rim_peft.demo import showcase
from rim_peft.run import evaluate, load_run
from tests.conftest import BOS_ID, build_base, build_rim, build_tokenizer
from tests.integration.test_begun_answers import follow_slowly
from tests.integration.test_demo import SHORT

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rim_peft.evaluation.harness import BlockLM
from rim_peft.run.harness import run_harness

EXAMPLES = Path(__file__).parents[2] / "examples" / "lm_eval"

# Contexts of several lengths, with white space at their ends; continuations of one token and of several.
PAIRS = [
    ("What is 1 + 1?\n", "2"),
    ("What is 1 + 1?\n", "3"),
    ("What is 1 + 1?\n", "two"),
    ("Tom boils Kim's brew. What colour has it? ", "red"),
    ("Tom boils Kim's brew. What colour has it? ", "blue"),
    ("", "green"),
    ("A", " b c"),
]
PROMPTS = ["What is 1 + 1?\n", "Tom boils Kim's brew. What colour has it? ", "A", "And then\n\n"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    # It lists the machine's hardware and packages, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def score(lm: HFLM, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    return lm.loglikelihood(requests, disable_tqdm=True)


def generate(lm: HFLM, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[str]:
    options = {"max_gen_toks": 8, "until": [], **options}
    requests = [Instance("generate_until", doc={}, arguments=(prompt, dict(options)), idx=0) for prompt in prompts]
    return lm.generate_until(requests, disable_tqdm=True)


@torch.no_grad()
def score_slowly(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, num_blocks: int
) -> tuple[float, bool]:
    """One row without padding: prompt, blocks, continuation; the sum of the continuation's log-probabilities."""
    blocks = model.peft_config["default"].block_tokens.ids(num_blocks)
    first = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
    last = tokenizer.encode(continuation, add_special_tokens=False)
    logits = model(torch.tensor([first + blocks + last])).logits[0, len(first) + len(blocks) - 1 : -1]
    scores = logits.log_softmax(-1)[range(len(last)), last]
    return float(scores.sum()), logits.argmax(-1).tolist() == last


def generate_slowly(model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, num_blocks: int) -> list[str]:
    """One prompt after the other, without padding, through the model's own ``generate``."""
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=8, do_sample=False, num_blocks=num_blocks)
        answers.append(str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


def assert_same(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    # Rows of a batch are computed in another order of sums than one alone.
    torch.testing.assert_close([value for value, _ in ours], [value for value, _ in theirs], rtol=1e-5, atol=1e-4)


VARIANTS = [
    ("llama", {}),
    ("gpt2", {}),
    ("gemma3", {}),
    ("mistral", {}),
    ("llama", {"bidirectional_blocks": True}),
    ("llama_tied", {"insertion_layer": 1}),
    ("gemma3", {"bidirectional_blocks": True, "insertion_layer": 1}),
]


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_scores_are_those_of_single_rows(
    architecture: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_rim(architecture, **options)
    slow = [score_slowly(model, tokenizer, *pair, num_blocks=3) for pair in PAIRS]
    for size in (1, 4):
        assert_same(score(BlockLM(model, tokenizer, num_blocks=3, batch_size=size)), slow)


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_answers_are_those_of_generate(
    architecture: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_rim(architecture, **options)
    expected = generate_slowly(model, tokenizer, num_blocks=1)
    assert len(set(expected)) > 1
    for size in (1, 4):
        assert generate(BlockLM(model, tokenizer, num_blocks=1, batch_size=size)) == expected


@pytest.mark.parametrize("kind", ["plain", "begins with BOS", "marks words"])
def test_tokens_are_those_of_training(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if kind == "begins with BOS":
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
        tokenizer.backend_tokenizer.post_processor = template
    elif kind == "marks words":  # white space before a word is part of it, as with SentencePiece
        trained = {"<eos>": 0, "<unk>": 1, "\u2581What?": 2, "\u2581red": 3, "\u2581And?": 4, "\n": 5}
        words = Tokenizer(models.WordLevel(trained, "<unk>"))
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        special = {"eos_token": "<eos>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    lm = BlockLM(build_rim(), tokenizer)
    expected = tokenize_example(Example("What? And?", answer="red"), tokenizer)
    assert lm._encode_pair("What? And?\n", "red") == (expected["prompt_ids"], expected["answer_ids"][:-1])
    ids, mask = lm.tok_batch_encode(["What? And?\n", "What?\n"])
    assert ids[0].tolist() == expected["prompt_ids"]
    assert ids[1][mask[1] == 1].tolist() == tokenize_prompts(["What?"], tokenizer)[0]


def test_a_batch_of_automatic_size(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_rim()
    lm = BlockLM(model, tokenizer, batch_size="auto", max_batch_size=4, max_length=64)
    assert_same(score(lm), [score_slowly(model, tokenizer, *pair, num_blocks=2) for pair in PAIRS])
    assert generate(lm) == generate_slowly(model, tokenizer, num_blocks=2)
    assert lm.num_blocks == 2  # the adapter's own


def test_a_stop_string_ends_an_answer_in_any_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_rim()
    whole = generate(BlockLM(model, tokenizer))
    stop = whole[1][3]
    assert stop not in whole[1][:3]
    for size in (1, 4):
        assert generate(BlockLM(model, tokenizer, batch_size=size), until=[stop]) == [
            answer.split(stop)[0] for answer in whole
        ]


def test_eos_ends_an_answer_in_any_batch_where_the_base_names_none(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_rim()
    prompt = tokenizer(PROMPTS[1], return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    end = int(answer[3])
    assert end not in answer[:3]
    model.get_base_model().generation_config.eos_token_id = None
    other = build_tokenizer(eos_token=tokenizer.convert_ids_to_tokens(end))
    for size in (1, 4):
        answers = generate(BlockLM(model, other, batch_size=size))
        assert answers[1] == other.decode(answer[:3])


def test_without_blocks_a_fresh_adapter_is_the_base_under_the_stock_model(tokenizer: PreTrainedTokenizerBase) -> None:
    stock = HFLM(pretrained=build_base(), tokenizer=tokenizer, batch_size=4)
    ours = BlockLM(build_rim(fresh=True), tokenizer, num_blocks=0, batch_size=4)
    assert score(ours) == score(stock)
    assert generate(ours) == generate(stock)
    requests = [Instance("loglikelihood_rolling", doc={}, arguments=(prompt,), idx=0) for prompt in PROMPTS]
    assert ours.loglikelihood_rolling(requests) == stock.loglikelihood_rolling(requests)
    assert ours.max_length == stock.max_length
    with_blocks = BlockLM(build_rim(fresh=True), tokenizer, batch_size=4)
    assert score(with_blocks) != score(stock)
    with pytest.raises(ValueError, match=r"num_blocks: must be 0 for tasks that score whole texts .*, got 2"):
        with_blocks.loglikelihood_rolling(requests)


def test_too_long_contexts_lose_tokens_on_the_left_and_blocks_none(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_rim()
    text, continuation = "What is 1 + 1, and what is 2 + 2?", "four"
    # 20 inputs: the last of the continuation's 4 tokens is none.
    lm = BlockLM(model, tokenizer, max_length=20)
    assert_same(score(lm, [(text, continuation)]), [score_slowly(model, tokenizer, text[-9:], continuation, 2)])
    assert "1 of 1 contexts are too long" in caplog.text
    caplog.clear()
    score(lm, [(text[-9:], continuation)])
    assert caplog.text == ""
    expected = generate(BlockLM(model, tokenizer), [text[-4:]])
    assert generate(lm, [text]) == expected
    assert "prompts of up to 33 tokens are cut to 4, on the left" in caplog.text
    with pytest.raises(ValueError, match=r"num_blocks: blocks \(16 tokens\) and continuation \(5\) must leave room"):
        score(BlockLM(model, tokenizer, num_blocks=4, max_length=20), [(text, "seven")])
    with pytest.raises(ValueError, match=r"max_gen_toks: blocks \(8 tokens\) and answer \(12\) must leave room"):
        generate(lm, [text], max_gen_toks=12)


@pytest.mark.parametrize("vocab_size", [262, 300])
def test_embeddings_keep_their_size_whatever_the_tokenizers(
    vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_rim(base=build_base(vocab_size=vocab_size))
    embedding = model.get_base_model().get_input_embeddings()
    larger = build_tokenizer()
    larger.add_tokens([f"<extra_{number}>" for number in range(60)])
    assert len(larger) == 322
    expected = score(BlockLM(model, tokenizer))
    lm = BlockLM(model, larger)
    assert_same(expected, [score_slowly(model, tokenizer, *pair, num_blocks=2) for pair in PAIRS])
    assert score(lm) == expected
    assert model.get_base_model().get_input_embeddings() is embedding
    assert embedding.weight.shape[0] == vocab_size
    # What the base has no row for would be taken for memory.
    message = rf"tokenizer: tokens must have ids below {vocab_size}, .*, got 321 \('<extra_59>'\)"
    with pytest.raises(ValueError, match=message):
        score(lm, [("Is it <extra_59>?", "no")])
    with pytest.raises(ValueError, match=message):
        generate(lm, ["Is it <extra_59>?"])


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_special_tokens_that_tasks_spell_are_text(num_blocks: int, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = BlockLM(build_rim(), tokenizer, num_blocks=num_blocks)
    spelt, chat = "What?<eos><|system|>Yes.", [{"role": "user", "content": "<eos>What?"}]
    special = list(tokenizer.added_tokens_decoder)
    context, continuation = lm._encode_pair(spelt, "<pad>!")
    assert not {*context, *continuation} & set(special)
    assert tokenizer.decode([*context, *continuation]) == spelt + "<pad>!"
    ids, mask = lm.tok_batch_encode([spelt, "a"])
    assert tokenizer.decode(ids[0]) == spelt
    assert mask[1].sum() == 1
    allowed = BlockLM(build_rim(), tokenizer, num_blocks=num_blocks, allow_special_tokens=True)
    assert allowed.tok_encode(spelt) == tokenizer.encode(spelt)
    context, continuation = lm._encode_pair(lm.apply_chat_template(chat), "<pad>!")
    names = tokenizer.convert_ids_to_tokens([token for token in context if token in special])
    assert names == ["<|user|>", "<eos>", "<|assistant|>"]
    assert tokenizer.decode([*context, *continuation]) == "<|user|><eos>What?<eos><|assistant|><pad>!"
    assert not set(continuation) & set(special)


def test_a_model_without_an_adapter_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="must be a model whose active adapter is RIM, got LlamaForCausalLM"):
        BlockLM(build_base(), tokenizer)
    with pytest.raises(ValueError, match="num_blocks: must be an integer of at least 0, got -1"):
        BlockLM(build_rim(), tokenizer, num_blocks=-1)


# Whole tasks, as a user runs them.

SHARED = """\
custom_dataset: !function rows.load
fewshot_split: examples
test_split: test
doc_to_text: "{{question}}\\n"
doc_to_target: "{{answer}}"
target_delimiter: ""
fewshot_delimiter: "\\n"
"""
CHOICE = """\
task: letters_choice
output_type: multiple_choice
doc_to_choice: [a, b, c]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """\
task: letters
output_type: generate_until
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROWS = """\
from datasets import Dataset, DatasetDict

def load(**metadata):
    test = [{"question": "q" * number, "answer": letter} for number, letter in enumerate("abcabc", 1)]
    examples = [{"question": "sky", "answer": "b"}, {"question": "grass", "answer": "c"}]
    return DatasetDict(test=Dataset.from_list(test), examples=Dataset.from_list(examples))
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in {"choice.yaml": SHARED + CHOICE, "written.yaml": SHARED + WRITTEN, "rows.py": ROWS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was saved by hand, with its tokenizer; its base lies in the folder."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    build_base().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    build_rim(base=base).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "first_context"),
    [
        ({}, "q\n"),
        ({"num_fewshot": 2}, "grass\nc\nsky\nb\nq\n"),
        (
            {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Go."},
            "<|system|>Go.<eos><|user|>grass\n<eos><|assistant|>c<eos><|user|>q\n<eos><|assistant|>",
        ),
    ],
    ids=["plain", "few-shot", "chat"],
)
def test_tasks(adapter: Path, task_folder: Path, options: dict[str, Any], first_context: str) -> None:
    model, tokenizer = (run := load_run(adapter)).model, run.tokenizer
    for batch_size in (1, 4):
        results = simple_evaluate(
            "rim",  # registered by the import of rim_peft.run.harness
            model_args={"pretrained": str(adapter), "num_blocks": 3},
            tasks=["letters", "letters_choice"],
            task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
            batch_size=batch_size,
            device="cuda:0",  # the harness's default, also where there is none
            bootstrap_iters=0,
            **options,
        )
        assert results["config"]["rim_num_blocks"] == 3
        samples = results["samples"]
        assert samples["letters_choice"][0]["arguments"][0] == (first_context, "a")
        num_right = 0
        for sample in samples["letters_choice"]:
            slow = [score_slowly(model, tokenizer, *pair, num_blocks=3) for pair in sample["arguments"]]
            assert_same(sample["filtered_resps"], slow)
            num_right += max(range(3), key=lambda choice: slow[choice][0]) == "abc".index(sample["doc"]["answer"])
        assert results["results"]["letters_choice"]["acc,none"] == num_right / 6
        for sample in samples["letters"]:
            ids = tokenizer(sample["arguments"][0][0], return_tensors="pt")
            output = model.generate(**ids, max_new_tokens=4, do_sample=False, num_blocks=3)
            answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert sample["filtered_resps"] == [answer]


def test_chats_begin_as_in_training_where_the_harness_adds_no_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
    )
    chat = [{"role": "user", "content": "hi"}]
    (expected,) = tokenize_prompts([chat], tokenizer)
    model = BlockLM(build_rim(), tokenizer, add_bos_token=False)
    text = model.apply_chat_template(chat)
    assert model._encode_pair(text, "a")[0] == model.tok_batch_encode([text])[0][0].tolist() == expected


def test_the_command(adapter: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lm-eval", str(adapter), "--tasks", "letters,letters_choice", "--include_path", str(task_folder)]
    options = [
        "--num-blocks",
        "1",
        "--batch_size",
        "4",
        "--limit",
        "5",
        "--gen_kwargs",
        "max_gen_toks=2",
        "--seed",
        "3",
    ]
    assert main([*command, *options, "--output_path", str(tmp_path), "--log_samples"]) == 0
    header, *table = capsys.readouterr().out.splitlines()
    assert header == f"{adapter}, 1 blocks"
    assert re.match(r"\|letters +\|Yaml +\|none +\| +0\|exact_match\|", table[2]), table
    assert re.match(r"\|letters_choice\|Yaml +\|none +\| +0\|acc +\|", table[3]), table
    (found,) = tmp_path.rglob("results_*.json")
    results = json.loads(found.read_text(encoding="utf-8"))
    assert results["config"]["rim_adapter"] == str(adapter)
    assert results["config"]["model_args"]["num_blocks"] == 1
    assert (results["config"]["random_seed"], results["config"]["fewshot_seed"]) == (3, 3)
    (written,) = tmp_path.rglob("samples_letters_2*.jsonl")
    samples = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 5
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.encode(sample["resps"][0][0])) <= 6 for sample in samples)


def test_a_task_by_its_file_and_errors(
    adapter: Path, task_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["lm-eval", str(adapter), "--tasks", str(task_folder / "choice.yaml"), "--limit", "1"]) == 0
    assert "|letters_choice|" in capsys.readouterr().out
    command = ["lm-eval", str(adapter), "--tasks", "letters"]
    assert main([*command, "--log_samples"]) == 1
    assert "log_samples: needs a folder for the samples" in capsys.readouterr().err
    assert main([*command, "--include_path", str(task_folder / "none")]) == 1
    assert "include_path: must be a folder with files of tasks, got" in capsys.readouterr().err
    # The harness's own tasks are thousands of files: here there are two.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(task_folder / "manager.py"))
    assert main([*command[:-1], "letters", "leters"]) == 1
    assert "files of tasks, got leters." in capsys.readouterr().err


@pytest.mark.slow
def test_the_examples_agree_with_evaluate(tmp_path: Path) -> None:
    run = showcase.train_demo(tmp_path / "demo", seed=0, overrides=SHORT, command=[])
    # One word each: what little was trained writes more of them, of which `evaluate` reads the last.
    expected = evaluate(run, limit=100, max_new_tokens=1)["accuracy"]
    results = run_harness(
        str(tmp_path / "demo"),
        ["potions", "potions_choice"],
        include_path=str(EXAMPLES),
        limit=100,
        batch_size=8,
        gen_kwargs="max_gen_toks=1",
    )["results"]
    assert results["potions"]["exact_match,none"] == expected > 0
    assert results["potions_choice"]["acc,none"] >= expected  # as one that may choose among colours alone


def test_without_the_harness_an_error_says_what_to_install(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("rim_peft.evaluation.harness", "rim_peft.run.harness"):
        monkeypatch.delitem(sys.modules, name)
    assert main(["lm-eval", str(adapter), "--tasks", "letters"]) == 1
    assert (
        "lm-eval: must be installed for the evaluation harness, and is not. Install it with: pip install 'rim-peft"
        in (capsys.readouterr().err)
    )


def test_an_empty_context_is_the_prefix_token() -> None:
    tokenizer, model = build_tokenizer(), build_rim()  # which adds no BOS of its own
    lm = BlockLM(model, tokenizer, batch_size=2)
    bos = str(tokenizer.bos_token)
    spelling = BlockLM(model, tokenizer, batch_size=2, allow_special_tokens=True)
    assert generate(lm, [""]) == generate(spelling, [bos])
    assert generate(lm, ["", "ab"]) == [*generate(lm, [""]), *generate(lm, ["ab"])]
    assert_same(score(lm, [("", "2")]), [score_slowly(model, tokenizer, "", "2", 2)])
    (found,) = lm._loglikelihood_tokens([(("", "2"), [], [20])], disable_tqdm=True)
    assert found[0] < 0


BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It <eos> is"}]


def test_a_begun_answer_follows_the_blocks_as_in_training(tokenizer: PreTrainedTokenizerFast) -> None:
    lm = BlockLM(build_rim(), tokenizer)
    (prompt,) = tokenize_prompts([BEGUN[:1]], tokenizer)
    answer = tokenize_example(Example(BEGUN[:1], "It <eos> is so"), tokenizer)["answer_ids"]
    text = lm.apply_chat_template(BEGUN, add_generation_prompt=False)
    context, continuation = lm._encode_pair(text, " so")
    laid_out = lm._with_blocks(context, continuation)
    assert [*laid_out, *continuation] == [*prompt, *lm.block_ids, *answer[:-1]]
    ids, _ = lm.tok_batch_encode([text, lm.apply_chat_template(BEGUN[:1])])
    begun = answer[: len("It <eos> is")]
    assert ids[0].tolist() == [*prompt, *begun]
    assert lm._num_begun == [len(begun), 0]
    plain = BlockLM(build_rim(), tokenizer, num_blocks=0)
    assert tokenizer.decode(plain.tok_encode(plain.apply_chat_template(BEGUN, False))).endswith(
        "<|assistant|>It <eos> is"
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_and_answers_after_begun_answers(batch_size: int, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim()
    lm = BlockLM(model, tokenizer, batch_size=batch_size)
    chats = [BEGUN, BEGUN[:1], [BEGUN[0], {"role": "assistant", "content": "I"}]]
    texts = [lm.apply_chat_template(chat, add_generation_prompt=len(chat) == 1) for chat in chats]
    scores = score(lm, [(text, continuation) for text in texts for continuation in (" so", "n")])
    for text, found in zip(texts, [scores[start : start + 2] for start in (0, 2, 4)], strict=True):
        for continuation, (value, _) in zip((" so", "n"), found, strict=True):
            context, ids = lm._encode_pair(text, continuation)
            row = lm._with_blocks(context, ids)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*row, *ids]])).logits[0, len(row) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(ids)), ids].sum()
            assert value == pytest.approx(float(expected), abs=1e-3)
    requests = [
        Instance("generate_until", doc={}, arguments=(text, {"until": [], "max_gen_toks": 4}), idx=0) for text in texts
    ]
    answers = lm.generate_until(requests, disable_tqdm=True)
    for text, answer in zip(texts, answers, strict=True):
        row = lm._with_blocks(lm._encode_pair(text, "a")[0], [5])
        assert answer == tokenizer.decode(follow_slowly(model, row, 4), skip_special_tokens=True)


def test_a_tasks_prefix_follows_the_blocks(adapter: Path, tmp_path: Path) -> None:
    """By the harness's own ``gen_prefix``, for written answers and for choices."""
    begun = "gen_prefix: It is\n"
    for name, text in {"choice.yaml": SHARED + CHOICE + begun, "written.yaml": SHARED + WRITTEN + begun}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "rows.py").write_text(ROWS, encoding="utf-8")
    results = simple_evaluate(
        "rim",
        model_args={"pretrained": str(adapter)},
        tasks=["letters", "letters_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        apply_chat_template=True,
    )
    run = load_run(adapter)
    blocks = run.model.peft_config["default"].block_tokens.ids(2)

    def row_of(doc: dict[str, str]) -> list[int]:
        chat = [{"role": "user", "content": f"{doc['question']}\n"}]
        (prompt,) = tokenize_prompts([chat], run.tokenizer)
        return [*prompt, *blocks, *run.tokenizer("It is", add_special_tokens=False)["input_ids"]]

    for sample in results["samples"]["letters"]:
        answer = run.tokenizer.decode(follow_slowly(run.model, row_of(sample["doc"]), 4), skip_special_tokens=True)
        assert sample["filtered_resps"] == [answer]
    for sample in results["samples"]["letters_choice"]:
        row = row_of(sample["doc"])
        for (_, choice), (found, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            ids = run.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = run.model(input_ids=torch.tensor([[*row, *ids]])).logits[0, len(row) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(ids)), ids].sum()
            assert float(found) == pytest.approx(float(expected), abs=1e-3)
