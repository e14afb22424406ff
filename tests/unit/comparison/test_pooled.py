"""Scores pooled over seeds, and lookups by method."""

from rim_peft.comparison.results import Results, group, mean, pool, pool_lengths
from rim_peft.evaluation.scores import Score
from tests.unit.comparison.results_document import compare_document, score


def test_pooling_adds_rows_and_skips_what_is_missing() -> None:
    assert pool([score(3, 10), None, score(9, 20)]) == Score(12, 30)
    assert pool([None]) is None
    assert pool([{"num_correct": 0, "num_rows": 0}]) is None


def test_lengths_are_in_the_order_of_numbers_and_all_is_none_of_them() -> None:
    parts = [{"10": score(1, 2), "2": score(1, 2), "all": score(2, 4)}, {"2": score(0, 2)}, None]
    assert list(pool_lengths(parts).items()) == [("2", Score(1, 4)), ("10", Score(1, 2))]


def test_groups_keep_the_order_of_the_first_seed() -> None:
    found = group([[{"k": 2}, {"k": 1}], [{"k": 1}]], lambda entry: entry["k"])
    assert found == {2: [{"k": 2}], 1: [{"k": 1}, {"k": 1}]}


def test_means_skip_what_is_missing() -> None:
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None]) is None


def test_results_by_method() -> None:
    results = Results(compare_document())
    assert results.label("answer-compute") == "LoRA, answering at once (same compute)"
    assert results.label("unknown") == "unknown"
    assert [method.name for method in results.having("probe")] == ["rim"]
    assert results.seeds("rim", "probe") == "0, 1"
    assert results.mean("base", "num_samples") is None
    pair = results.pair("answer")
    assert pair is not None
    assert pair["seed"] == "all"
    assert results.pair("pause") is None
