"""What counts as an export that answers as its adapter does, and what its record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import Templates
from rim_peft.export.card import describe
from rim_peft.export.checking import CheckResult, ExportCheckError, expect, raise_if_differing
from rim_peft.export.folder import ExportOptions, check_new
from rim_peft.export.record import ExportRecord, read_record
from rim_peft.export.tokens import MemoryTokens
from tests.conftest import MakeRim, build_tokenizer

MEMORY = MemoryTokens(["<b>", "<m>", "</b>"], [7, 8, 9], num_blocks=2, block_size=1)


def result(**counts: int) -> CheckResult:
    known = {"num_prompts": 40, "num_equal": 40, "num_equal_unguarded": 40}
    ties = {"num_near_ties": 0, "num_near_ties_unguarded": 0}
    return CheckResult(**{**known, **ties, **counts}, differing=["'a': token 0 is 'x', not 'y'"])


@pytest.mark.parametrize(
    ("counts", "head_is_tied", "num_wrong"),
    [
        ({}, False, 0),
        ({"num_equal": 38, "num_near_ties": 2}, False, 0),
        ({"num_equal": 38, "num_near_ties": 1}, False, 1),
        ({"num_equal_unguarded": 35}, False, 5),  # a memory token was written once nothing suppressed it
        ({"num_equal_unguarded": 35}, True, 0),
    ],
)
def test_what_counts_as_wrong(counts: dict[str, int], head_is_tied: bool, num_wrong: int, tmp_path: Path) -> None:
    found = result(**counts)
    assert found.num_wrong(head_is_tied=head_is_tied) == num_wrong
    accepting = ExportOptions(max_differing=num_wrong)
    raise_if_differing(found, accepting, tmp_path, head_is_tied=head_is_tied)
    if num_wrong:
        with pytest.raises(
            ExportCheckError, match=rf"differs on {num_wrong} of 40 prompts, near ties aside:\n  'a': tok"
        ):
            raise_if_differing(found, ExportOptions(), tmp_path, head_is_tied=head_is_tied)


def test_a_result_as_a_sentence() -> None:
    assert describe(result()) == "40 of 40 prompts give the adapter's greedy tokens; 40 with nothing suppressed"
    assert describe(result(num_equal=37, num_near_ties=2)) == (
        "37 of 40 prompts give the adapter's greedy tokens, 2 first differ at a near tie, 1 differ elsewhere; 40 with "
        "nothing suppressed"
    )


def test_what_is_expected_is_what_the_plugin_generates(make_rim: MakeRim) -> None:
    model, tokenizer = make_rim("llama"), build_tokenizer()
    questions: list[Any] = [f"What is {number}?" for number in range(32)]
    asking: dict[str, Any] = {"templates": Templates(), "num_blocks": 2, "max_new_tokens": 4}
    first = expect(model, tokenizer, questions, **asking)[0]
    prompt = tokenizer(first.prompt, return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == first.ids
    assert model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :].tolist() == first.answer
    with pytest.raises(ValueError, match="prompts: must be at least 32 to check an export, got 31"):
        expect(model, tokenizer, questions[:31], **asking)


def test_a_record_is_read_back_unless_a_later_version_wrote_it(tmp_path: Path) -> None:
    record = ExportRecord(
        memory=MEMORY,
        places={"prompt": True, "chat": False},
        source="a",
        base=None,
        dequantized_from="nf4",
        dtype="float32",
        head_is_tied=False,
    )
    record.write(tmp_path, check=result().to_dict())
    assert read_record(tmp_path) == record
    file = tmp_path / "rim_export.json"
    written = json.loads(file.read_text())
    assert written["block_text"] == "<b><m></b><b><m></b>"
    file.write_text(json.dumps({**written, "format_version": 2}))
    with pytest.raises(ValueError, match="must have format version 1 or lower, got 2: a later rim-peft wrote it"):
        read_record(tmp_path)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_blocks: must be at least 1, got 0"):
        ExportOptions(num_blocks=0)
    with pytest.raises(ValueError, match="dtype: must be one of auto, float32, bfloat16, float16, got 'int8'"):
        ExportOptions(dtype="int8")
    check_new(tmp_path / "new")
    check_new(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: must be a new or empty folder"):
        check_new(tmp_path)
