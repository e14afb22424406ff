"""A few inputs of every campaign; ``make fuzz`` tries thousands."""

import pytest

from tests.robustness.fuzz import CAMPAIGNS, run_campaign
from tests.robustness.judging import Verdict


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_every_input_is_answered_or_refused_clearly(name: str) -> None:
    outcomes = list(run_campaign(name, num_inputs=150, seed=0))
    wrong = [f"{outcome.case.name}: {outcome.detail}" for outcome in outcomes if outcome.verdict is Verdict.WRONG]
    assert not wrong, "\n".join(wrong)
    assert len({outcome.verdict for outcome in outcomes}) == 2, "a campaign must have good and bad inputs"
