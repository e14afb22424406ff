"""Every cell of the matrix, and the page that is made of it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import switches_natively
from tests.parity import files, refusals
from tests.parity.matrix import BEHAVIOURS, CORE, PAGE, STOCKS_OWN, TAKES_SECONDS, Behaviour, check, page, pairs
from tests.parity.subject import Case, Subject

pytestmark = pytest.mark.filterwarnings("ignore")


def _cell(behaviour: Behaviour, case: Case) -> Any:
    is_core = case in CORE and behaviour not in TAKES_SECONDS
    marks = [] if is_core else [pytest.mark.slow]
    return pytest.param(behaviour, case, id=f"{behaviour.__name__}-{case}", marks=[*marks, *_needs(behaviour)])


def _needs(behaviour: Behaviour) -> list[pytest.MarkDecorator]:
    return [switches_natively] if behaviour is files.load_onto_a_transformers_model else []


@pytest.mark.parametrize(("behaviour", "case"), [_cell(*pair) for pair in pairs()])
def test_a_behaviour_is_as_the_matrix_says(behaviour: Behaviour, case: Case, tmp_path: Path) -> None:
    departure = check(behaviour, case, tmp_path)
    if departure is not None and departure.is_stocks is not None:
        pytest.skip(f"stock LoRA: {departure.is_stocks}")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama-untied", "gpt2-tied", "gemma3-tied"])
@pytest.mark.parametrize("behaviour", [pytest.param(one, id=one.__name__, marks=_needs(one)) for one in BEHAVIOURS])
def test_stock_lora_has_every_behaviour(behaviour: Behaviour, base: str, tmp_path: Path) -> None:
    """So the behaviours are PEFT's, and not what RiM makes of them."""
    behaviour(Subject(Case(base, is_stock=True), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "config"), [pytest.param(*one[:2], marks=_needs(one[0])) for one in STOCKS_OWN])
def test_stock_lora_fails_where_the_page_says_so(behaviour: Behaviour, config: str, tmp_path: Path) -> None:
    """That RiM does not is in the cells above."""
    with pytest.raises((AssertionError, KeyError)):
        behaviour(Subject(Case("llama-untied", "fp32", config, is_stock=True), tmp_path))


@pytest.mark.parametrize("refusal", refusals.REFUSALS, ids=lambda refusal: refusal.what)
def test_what_is_refused_is_told_and_works_with_stock_lora(refusal: refusals.Refusal, tmp_path: Path) -> None:
    refusals.run(refusal, Subject(Case("llama-untied", is_stock=True), tmp_path))
    with pytest.raises(ValueError, match=re.escape(refusal.error)):
        refusals.run(refusal, Subject(Case("llama-untied"), tmp_path))


def test_a_behaviour_that_fails_is_noticed(tmp_path: Path) -> None:
    def broken(subject: Subject) -> None:
        raise ValueError("of no use")

    with pytest.raises(ValueError, match="of no use"):
        check(broken, Case("llama-untied"), tmp_path)
    departing = next(pair for pair in pairs() if pair[1].config == "DoRA" and pair[0].__name__ == "mix_in_a_pass")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr("tests.parity.matrix.departure", lambda *pair: None)
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            check(*departing, tmp_path)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.parity.matrix"
