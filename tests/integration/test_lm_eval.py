"""Adapters under the real lm-evaluation-harness: blocks between context and continuation, and nothing else changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.cli.main import main
from rim_peft.data.tasks import get_task
from tests.conftest import build_base, build_rim, build_tokenizer

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rim_peft.evaluation.harness import BlockLM
from rim_peft.run.harness import RimLM, run_harness

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
    assert "prompts of up to 33 tokens lose what is beyond 4" in caplog.text
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
    message = rf"tokenizer: ids must be below the base's vocabulary \({vocab_size}\).*, got 321"
    with pytest.raises(ValueError, match=message):
        score(lm, [("Is it <extra_59>?", "no")])
    with pytest.raises(ValueError, match=message):
        generate(lm, ["Is it <extra_59>?"])


def test_a_model_without_an_adapter_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="must be a model whose active adapter is RIM, got LlamaForCausalLM"):
        BlockLM(build_base(), tokenizer)
    with pytest.raises(ValueError, match="num_blocks: must be an integer of at least 0, got -1"):
        BlockLM(build_rim(), tokenizer, num_blocks=-1)


# Whole tasks, as a user runs them.

CHOICE = """\
task: colours_choice
custom_dataset: !function rows.load
output_type: multiple_choice
fewshot_split: examples
test_split: test
doc_to_text: "{{question}}\\n"
doc_to_choice: [red, green, blue]
doc_to_target: "{{answer}}"
target_delimiter: ""
fewshot_delimiter: "\\n"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """\
task: colours
custom_dataset: !function rows.load
output_type: generate_until
fewshot_split: examples
test_split: test
doc_to_text: "{{question}}\\n"
doc_to_target: "{{answer}}"
target_delimiter: ""
fewshot_delimiter: "\\n"
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROWS = """\
from datasets import Dataset, DatasetDict

def load(**metadata):
    test = [{"question": "q" * number, "answer": colour} for number, colour in enumerate(["red", "blue", "green"] * 2, 1)]
    examples = [{"question": "sky", "answer": "blue"}, {"question": "grass", "answer": "green"}]
    return DatasetDict(test=Dataset.from_list(test), examples=Dataset.from_list(examples))
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in {"choice.yaml": CHOICE, "written.yaml": WRITTEN, "rows.py": ROWS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was saved by hand, with its tokenizer; its base lies in the folder."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    base = build_base()
    base.save_pretrained(folder / "base")
    build_rim(base=base).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def evaluate_in_python(lm: Any, task_folder: Path, **options: Any) -> dict[str, Any]:
    tasks = ["colours", "colours_choice"]
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, **{"bootstrap_iters": 0, **options})
    return {name: results[name] for name in ("results", "samples", "config")}


def test_tasks(adapter: Path, task_folder: Path) -> None:
    found = evaluate_in_python(
        "rim", task_folder, model_args={"pretrained": str(adapter), "num_blocks": 3}, batch_size=4, device="cuda:0"
    )
    print(found)
