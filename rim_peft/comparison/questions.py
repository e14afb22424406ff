"""Ten test questions of the reference, right and wrong, as an inspection's page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rim_peft.comparison.measuring import last_weights
from rim_peft.comparison.plan import PlannedRun, read_record, run_recipe
from rim_peft.comparison.rows import JudgedRows
from rim_peft.comparison.sections import Comparison
from rim_peft.inspection import Options, inspect_questions, render_page
from rim_peft.run import load_run
from rim_peft.training.files import write_text

logger = logging.getLogger(__name__)

PAGE = "questions.html"
_NUM_QUESTIONS = 10


def show_questions(comparison: Comparison, plan: Sequence[PlannedRun], rows: JudgedRows) -> Path | None:
    """Inspect some test questions with the reference's first run, as it was judged, and write the page.

    A page that is newer than the run's measurements is kept.

    Args:
        comparison: what was compared.
        plan: its finished runs.
        rows: judged rows.

    Returns:
        The page, in the run's folder; None if the run was not trained or its blocks cannot be inspected.
    """
    run = next(run for run in plan if run.name == comparison.reference and not run.is_trial)
    page = run.folder / PAGE
    if not run.method.train:
        return None
    if page.exists() and page.stat().st_mtime_ns > run.record.stat().st_mtime_ns:
        return page
    verdicts = [bit == "1" for bit in read_record(run)["right"]]
    chosen = choose_rows(verdicts)
    examples = [rows.test[place] for place in chosen]
    remarks = [
        f"{'Right' if verdicts[place] else 'Wrong'}: the row's answer is “{example.answer}”."
        for place, example in zip(chosen, examples, strict=True)
    ]
    recipe = run_recipe(comparison, run)
    loaded = replace(load_run(run.folder, trust_remote_code=recipe.model.trust_remote_code), recipe=recipe)
    try:
        with last_weights(run, loaded):
            inspection = inspect_questions(
                loaded,
                [example.question for example in examples],
                name=str(run),
                options=Options(chain_tokens=0),  # the comparison has methods that write their steps out
            )
    except ValueError as error:
        logger.info("%s: no page of questions: %s", run, error)
        return None
    write_text(page, render_page(inspection, remarks=remarks))
    return page


def choose_rows(verdicts: Sequence[bool], *, most: int = _NUM_QUESTIONS) -> list[int]:
    """Return the places of the first rows, half of them wrong, as far as there are as many of each kind.

    >>> choose_rows([True, True, False, True, True], most=4)
    [2, 0, 1, 3]
    """
    wrong, right = ([place for place, found in enumerate(verdicts) if found is kind] for kind in (False, True))
    num_wrong = max(most // 2, most - len(right))
    wrong = wrong[:num_wrong]
    return [*wrong, *right[: most - len(wrong)]]
