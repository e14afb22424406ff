"""Tasks by reasoning-gym's generators: rows by seed, verifiers as answer rules, and generators that cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import BadRowsError, read_example
from rim_peft.evaluation.accuracy import judge_texts, score_by_rule
from rim_peft.recipe import RecipeError, load_recipe
from rim_peft.recipe.reading import load_found_recipe
from rim_peft.tasks import get_task
from rim_peft.tasks import reasoning_gym as module
from rim_peft.tasks.stories import SPLITS
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows

pytest.importorskip("reasoning_gym")

FEW: dict[str, Any] = {"num_rows": 30, "num_held_out": 5}


def rows(name: str, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    task: Any = get_task(f"reasoning-gym:{name}", **{**FEW, **options})
    return list(task.rows(split))


def test_the_same_options_give_the_same_rows_and_splits_share_none() -> None:
    assert rows("chain_sum") == rows("chain_sum") != rows("chain_sum", seed=1)
    splits = [rows("chain_sum", split) for split in SPLITS]
    assert [len(some) for some in splits] == [30, 5, 5]
    questions = [{row["question"] for row in some} for some in splits]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 40


def test_more_rows_than_a_chunk_continue_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module._dataset.cache_clear()
    monkeypatch.setattr(module, "_CHUNK", 7)
    try:
        assert rows("chain_sum", num_rows=30)[:10] == rows("chain_sum", num_rows=10)
    finally:
        module._dataset.cache_clear()


def test_rows_can_be_drawn_in_turn() -> None:
    train, test = (iter(get_task("reasoning-gym:chain_sum", **FEW).rows(split)) for split in ("train", "test"))  # type: ignore[attr-defined]
    mixed = [(next(train), next(test)) for _ in range(5)]
    assert [list(some) for some in zip(*mixed, strict=True)] == [rows("chain_sum")[:5], rows("chain_sum", "test")]


def test_the_generators_options_are_the_tasks() -> None:
    short = rows("chain_sum", min_terms=2, max_terms=2)
    assert all(row["question"].count(" + ") + row["question"].count(" - ") == 1 for row in short)
    assert rows("needle_haystack", num_rows=2, max_num_statements=12)
    with pytest.raises(ValueError, match=r"min_term: no option of task .* did you mean 'min_terms'"):
        rows("chain_sum", min_term=2)
    with pytest.raises(ValueError, match=r"options of reasoning-gym:chain_sum: .*min_terms"):
        rows("chain_sum", min_terms=0)


def test_the_verifier_judges_by_the_whole_problem() -> None:
    task = get_task("reasoning-gym:shortest_path", **FEW)
    row = next(row for row in rows("shortest_path") if row["answer"] == "infeasible")
    assert task.about(row["question"]).judge(" infeasible\n", "infeasible") == {"verifier": True, "exact-text": True}
    row = next(row for row in rows("number_format") if "." in row["answer"])
    task = get_task("reasoning-gym:number_format", **FEW)
    written = f"{float(row['answer']):,.4f}"
    assert task.about(row["question"]).judge(written, row["answer"]) == {"verifier": True, "exact-text": False}
    assert not task.is_correct(written, row["answer"])  # without the question it can only compare texts
    assert not task.about(row["question"]).is_correct("none", row["answer"])


def test_another_process_draws_the_rows_again() -> None:
    row = rows("number_format", "validation")[0]
    module._places.clear()
    task = get_task("reasoning-gym:number_format", **FEW)
    assert task.about(row["question"]).is_correct(row["answer"], row["answer"])
    with pytest.raises(ValueError, match=r"question: must be one that reasoning-gym:number_format draws .* got 'else'"):
        task.about("else").is_correct("1", "1")


def test_evaluation_tells_the_verifier_the_question() -> None:
    task = get_task("reasoning-gym:number_format", **FEW)
    row = next(row for row in rows("number_format") if "." in row["answer"])
    verdicts = judge_texts([f"{float(row['answer']):,.4f}"], [read_example(row)], task)
    scores = score_by_rule(verdicts)
    assert {rule: score.num_correct for rule, score in scores.items()} == {"verifier": 1, "exact-text": 0}


@pytest.mark.parametrize("name", ["countdown", "n_queens", "spiral_matrix", "simple_integration", "codeio"])
def test_verifiers_that_evaluate_an_answer_are_never_called(name: str) -> None:
    assert module.task_class(name).answer_rules == ("exact-text",)


def test_a_verifier_that_accepts_everything_is_not_used() -> None:
    assert module.task_class("game_of_life_halting").answer_rules == ("exact-text",)


def test_a_failing_verifier_gives_nothing() -> None:
    class Failing:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            raise ZeroDivisionError

    assert not module._full_marks(Failing(), "1", {})


@pytest.mark.parametrize("name", sorted(module._STEPS))
def test_chains_in_the_metadata_are_steps(name: str) -> None:
    some = [row for row in rows(name) if row["steps"]]
    assert all(row["length"] == len(row["steps"]) for row in some)
    if name != "gsm_symbolic":
        assert all(row["steps"][-1] == row["answer"] for row in some)
    assert len(some) > 10


def test_rows_without_a_chain_serve_stage_2_alone() -> None:
    loaded = get_task("reasoning-gym:gcd", **FEW).load("train")
    options: dict[str, Any] = {"num_blocks": 2, "block_length": 4}
    assert len(list(prepare_rows(loaded, build_tokenizer(), needs_steps=False, **options))) == 30
    with pytest.raises(BadRowsError, match="row 0: steps: there are none, and this training needs at least one"):
        list(prepare_rows(loaded, build_tokenizer(), needs_steps=True, **options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "task: reasoning-gym has no generator 'chain_sums', did you mean 'chain_sum'"),
        ("boxnet", {}, "reasoning-gym:boxnet has 0 problems for the split 'train', and 50 without an answer"),
        ("list_functions", {}, "task: reasoning-gym:list_functions draws other problems each time"),
        ("coin_flip", {"max_trials": 3, "num_rows": 10**6}, "has .* problems for the split 'train', .* got 1000000"),
        ("composite", {}, "options of reasoning-gym:composite: "),
    ],
)
def test_generators_that_cannot_serve_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(name, **options)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    module.task_class.cache_clear()
    with pytest.raises(ImportError, match=r"needs reasoning-gym: pip install 'rim-peft\[gsm-symbolic\]'"):
        get_task("reasoning-gym:gcd")


def test_a_recipe_sets_the_generators_options_and_a_folders_recipe_must_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    data = "{task: 'reasoning-gym:chain_sum', options: {min_terms: 2, max_terms: 2}}"
    path.write_text(f"output_dir: out\nmodel: {{name_or_path: some/base}}\ndata: {data}\n")
    task = get_task("reasoning-gym:chain_sum", min_terms=2, max_terms=2)
    assert load_recipe(path).task() == task
    with pytest.raises(RecipeError, match=r"data\.options\.min_term: unknown key, did you mean min_terms"):
        load_recipe(path, ["data.options.min_term=2"])
    found = load_found_recipe(path)
    assert found.task(named="reasoning-gym:chain_sum") == task
    with pytest.raises(ValueError, match=r"data\.task: .* names 'reasoning-gym:chain_sum', whose generator .*--task"):
        found.task()
