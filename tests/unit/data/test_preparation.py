import logging
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from rim_peft.data.cache import COLUMNS
from rim_peft.data.examples import BadRowsError, Example, Templates
from rim_peft.data.tokenization import tokenize_example
from tests.conftest import VOCAB_SIZE, build_tokenizer
from tests.objectives import prepare_rows

# Bytes are tokens: with EOS the prompt has 6 tokens ("2 * 3\n"), the steps 6 and 2, the answer 2.
ROW = {"question": "2 * 3", "steps": ["2+2=4", "6"], "answer": "6"}
LIMITS: dict[str, Any] = {"needs_steps": True, "num_blocks": 0, "block_length": 4}


def prepare(rows: list[dict[str, Any]], *, stream: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Prepare rows, and return the result as rows."""
    dataset: Dataset | IterableDataset = Dataset.from_list(rows)
    if stream:
        dataset = dataset.to_iterable_dataset()
    return list(prepare_rows(dataset, build_tokenizer(), **{**LIMITS, **options}))


def make_rows(*names: str) -> list[dict[str, Any]]:
    """Rows to tell apart by their question."""
    return [{**ROW, "question": name} for name in names]


@pytest.mark.parametrize("stream", [False, True])
def test_rows_become_token_ids_and_nothing_else(stream: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = prepare([{**ROW, "length": 2, "row_error": None}, {**ROW, "length": 2, "row_error": None}], stream=stream)
    expected = tokenize_example(Example("2 * 3", answer="6", steps=("2+2=4", "6")), tokenizer)
    assert rows == [expected, expected]
    assert tuple(rows[0]) == COLUMNS


@pytest.mark.parametrize("stream", [False, True])
def test_the_columns_are_known_beforehand(stream: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset: Dataset | IterableDataset = Dataset.from_list([ROW])
    dataset = dataset.to_iterable_dataset() if stream else dataset
    assert tuple(prepare_rows(dataset, tokenizer, **LIMITS).column_names) == COLUMNS


@pytest.mark.parametrize("stream", [False, True])
def test_templates_are_used(stream: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    templates = Templates(prompt="Q: {question}", step="<<{step}>>", answer="#### {answer}")
    (row,) = prepare([ROW], stream=stream, templates=templates)
    assert tokenizer.decode(row["prompt_ids"]) == "Q: 2 * 3"
    assert tokenizer.decode(row["step_ids"][0]) == "<<2+2=4>><eos>"
    assert tokenizer.decode(row["answer_ids"]) == "#### 6<eos>"


def test_chats_are_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "2 * 3"}]
    (row,) = prepare([{**ROW, "question": chat}])
    assert tokenizer.decode(row["prompt_ids"]) == "<|user|>2 * 3<eos><|assistant|>"


@pytest.mark.parametrize("steps", [None, []])
def test_the_second_stage_needs_no_steps(steps: list[str] | None) -> None:
    rows = prepare([ROW, {**ROW, "steps": steps}], needs_steps=False, num_blocks=2)
    assert rows[1]["step_ids"] == []


def test_rows_may_lack_the_steps_column() -> None:
    rows = prepare([{"question": "2 * 3", "answer": "6"}], needs_steps=False, num_blocks=2)
    assert rows[0]["step_ids"] == []


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"question": None}, "question: must be a text or a list of chat messages, got None"),
    ({"question": " "}, "question: is empty"),
    ({"answer": ""}, "answer: is empty"),
    ({"steps": ["2+2=4", " "]}, r"steps\[1\]: is empty"),
    ({"steps": None}, "steps: there are none, and this training needs at least one"),
    ({"steps": []}, "steps: there are none, and this training needs at least one"),
    ({"question": "x" * 500}, "too long: prompt, 2 blocks and readouts take 513 tokens, max_length is 200"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_row_is_reported_with_index_and_reason(change: dict[str, Any], reason: str, stream: bool) -> None:
    with pytest.raises(BadRowsError, match=f"row 1: .*{reason}") as caught:
        prepare([ROW, {**ROW, **change}, ROW], stream=stream, max_length=200)
    assert [index for index, _ in caught.value.rows] == [1]


@pytest.mark.parametrize(("change", "reason"), BAD_ROWS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_row_is_dropped_and_logged(
    change: dict[str, Any], reason: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = prepare([ROW, {**ROW, **change}, ROW], stream=stream, max_length=200, on_bad_rows="drop")
    assert rows == prepare([ROW, ROW])
    assert caplog.records[0].levelno == logging.WARNING
    assert "row 1" in caplog.text
    assert reason.replace("\\", "") in caplog.text


def test_all_bad_rows_are_reported_at_once_with_their_questions() -> None:
    rows = make_rows("first", "second", "third " * 9)
    rows[0]["steps"] = rows[2]["steps"] = None
    with pytest.raises(BadRowsError, match=r"dataset: 2 bad rows\.") as caught:
        prepare(rows)
    assert caught.value.rows == [
        (0, "steps: there are none, and this training needs at least one (question: 'first')"),
        (
            2,
            "steps: there are none, and this training needs at least one (question: 'third third third third third third thir'...)",  # noqa: E501 - the whole reason
        ),
    ]


def test_any_number_of_bad_rows_is_reported_each_with_its_own_question() -> None:
    rows = make_rows(*(str(index) for index in range(2500)))
    for row in rows[1::2]:
        row["steps"] = None
    with pytest.raises(BadRowsError) as caught:
        prepare(rows)
    assert [index for index, _ in caught.value.rows] == list(range(1, 2500, 2))
    assert all(reason.endswith(f"(question: '{index}')") for index, reason in caught.value.rows)
    assert prepare(rows, on_bad_rows="drop") == prepare(rows[::2])


def test_rows_that_could_not_be_loaded_keep_their_reason() -> None:
    bad = {"question": None, "steps": None, "answer": None, "row_error": "not valid JSON"}
    with pytest.raises(BadRowsError, match="row 1: not valid JSON"):
        prepare([{**ROW, "row_error": None}, bad])


def test_a_missing_column_is_every_rows_fault() -> None:
    with pytest.raises(BadRowsError, match="row 0: answer: the row has no such field; its fields: question, steps"):
        prepare([{"question": "q", "steps": ["s"]}])


def test_dropping_every_row_is_an_error() -> None:
    with pytest.raises(BadRowsError, match="dataset: 2 bad rows"):
        prepare([{**ROW, "answer": ""}] * 2, on_bad_rows="drop")


def test_a_stream_raises_when_the_row_is_reached(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*make_rows("a", "b"), {**ROW, "answer": ""}]
    stream = iter(prepare_rows(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, **LIMITS))
    assert [tokenizer.decode(next(stream)["prompt_ids"]) for _ in "ab"] == ["a\n", "b\n"]
    with pytest.raises(BadRowsError, match="row 2: answer: is empty"):
        next(stream)


def test_a_stream_logs_ten_rows_then_the_growing_count(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.from_list([ROW, *[{**ROW, "answer": ""}] * 20]).to_iterable_dataset()
    stream = prepare_rows(dataset, build_tokenizer(), **LIMITS, on_bad_rows="drop")
    for _ in range(2):  # the second pass counts anew
        caplog.clear()
        assert len(list(stream)) == 1
        assert [record.getMessage()[:30] for record in caplog.records][:1] == ["dropped row 1 of the stream: a"]
        assert [record.getMessage() for record in caplog.records][10:] == ["dropped 16 rows of the stream so far."]


# Lengths by hand. Stage 1, T = 2: prompt 6, blocks 2 * 4, readouts 2 (second step) + 2 (answer) = 18;
# with four blocks 6 + 4 * 4 + 2 + 3 * 2 = 30. Stage 2, K = 3: 6 + 3 * 4 + 3 * 2 = 24.
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"num_blocks": 0}, 18),
        ({"num_blocks": 1}, 18),
        ({"num_blocks": 4}, 30),
        ({"needs_steps": False, "num_blocks": 3}, 24),
    ],
)
def test_the_length_of_a_row_counts_blocks_and_readouts(options: dict[str, Any], length: int) -> None:
    assert len(prepare([ROW], max_length=length, **options)) == 1
    with pytest.raises(BadRowsError, match=rf"readouts take {length} tokens, max_length is {length - 1}"):
        prepare([ROW], max_length=length - 1, **options)


# Positions by hand: the last readout follows the last block, readouts take no trunk positions.
# T = 2: block 1's readout ends at 6 + 4 + 2, block 2's at 6 + 8 + 2 = 16. Four blocks: 6 + 16 + 2 = 24.
# One step and a long second one: the first block's readout reaches further, 6 + 4 + 31 = 41 against 16.
@pytest.mark.parametrize(
    ("row", "num_blocks", "last"),
    [(ROW, 0, 16), (ROW, 4, 24), ({**ROW, "steps": ["1", "x" * 30]}, 0, 41)],
)
def test_positions_are_those_of_the_furthest_readout(row: dict[str, Any], num_blocks: int, last: int) -> None:
    assert len(prepare([row], num_blocks=num_blocks, max_positions=last)) == 1
    with pytest.raises(BadRowsError, match=rf"readouts reach {last} positions, the model has {last - 1}"):
        prepare([row], num_blocks=num_blocks, max_positions=last - 1)


def test_nothing_is_cut_at_the_tokenizers_own_length() -> None:
    tokenizer = build_tokenizer(model_max_length=5)
    (row,) = prepare_rows(Dataset.from_list([{**ROW, "question": "x" * 50}]), tokenizer, **LIMITS)
    assert len(row["prompt_ids"]) == 51


def test_the_same_call_has_the_same_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([ROW])
    first, again = [prepare_rows(dataset, build_tokenizer(), **LIMITS)._fingerprint for _ in range(2)]
    other = prepare_rows(dataset, tokenizer, **LIMITS, templates=Templates(step="{step}."))._fingerprint
    assert first == again != other


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Dataset.from_list([ROW]), {"on_bad_rows": "skip"}, "on_bad_rows: must be 'error' or 'drop', got 'skip'"),
        (DatasetDict({"train": Dataset.from_list([ROW])}), {}, "got DatasetDict. Give one of its splits"),
        (Dataset.from_dict({"question": [], "answer": []}), {}, "dataset: must have rows, got none"),
    ],
)
def test_refuses_what_is_no_split_with_rows(dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_rows(dataset, build_tokenizer(), **LIMITS, **options)


@pytest.mark.parametrize("format", ["numpy", "torch", "arrow"])
def test_a_format_does_not_matter(format: str, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([ROW, {**ROW, "answer": ""}]).with_format(format)
    assert list(prepare_rows(dataset, tokenizer, **LIMITS, on_bad_rows="drop")) == prepare([ROW])


def test_refuses_a_transform(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([ROW]).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"dataset: must have no transform, got one.*Apply it with dataset\.map"):
        prepare_rows(dataset, tokenizer, **LIMITS)


def test_needs_an_eos_token() -> None:
    with pytest.raises(ValueError, match="tokenizer: must have an EOS token"):
        prepare_rows(Dataset.from_list([ROW]), build_tokenizer(eos_token=None), **LIMITS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [{"question": "<think>"}, {"steps": ["<think>"]}, {"answer": "<think>"}])
def test_ids_beyond_the_base_are_no_bad_rows_but_a_wrong_tokenizer(change: dict[str, Any], stream: bool) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>"])
    rows = Dataset.from_list([ROW, {**ROW, **change}])
    options: dict[str, Any] = {"needs_steps": True, "num_blocks": 2, "block_length": 3, "on_bad_rows": "drop"}
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=rf"row 1: tokens must have ids below {VOCAB_SIZE}.*'<think>'"):
            list(
                prepare_rows(
                    rows.to_iterable_dataset() if stream else rows, tokenizer, vocab_size=VOCAB_SIZE, **options
                )
            )
    assert len(prepare_rows(rows, tokenizer, vocab_size=VOCAB_SIZE + 1, **options)) == 2
