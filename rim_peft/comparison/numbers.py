"""Format numbers for a report, with as many digits as are meaningful."""

from __future__ import annotations

import json
import re
from typing import Any

from rim_peft.evaluation.scores import Score

NONE = "–"
"""Shown if there is no value."""


def share(value: float | None) -> str:
    """A share or a score between 0 and 1, with three digits, enough to tell a thousand rows apart."""
    return NONE if value is None else f"{value:.3f}"


def share_of(score: Score | None) -> str:
    """A share without its error, for tables with many columns.

    >>> share_of(Score(1, 3)), share_of(None)
    ('0.333', '–')
    """
    return share(None if score is None else score.accuracy)


def share_with_error(score: Score | None) -> str:
    """A share and its standard error.

    >>> share_with_error(Score(9, 10))
    '0.900 ± 0.095'
    """
    return NONE if score is None else f"{score.accuracy:.3f} ± {score.standard_error:.3f}"


def share_with_interval(score: Score | None) -> str:
    """A share, its standard error and its 95 % interval.

    >>> share_with_interval(Score(8, 10))
    '0.800 ± 0.126 (0.490–0.943)'
    """
    return NONE if score is None else f"{share_with_error(score)} {_interval(score)}"


def share_in_interval(score: Score | None) -> str:
    """A share and its 95 % interval, for tables with little room.

    >>> share_in_interval(Score(8, 10))
    '0.800 (0.490–0.943)'
    """
    return NONE if score is None else f"{score.accuracy:.3f} {_interval(score)}"


def _interval(score: Score) -> str:
    low, high = score.interval
    return f"({low:.3f}–{high:.3f})"


def difference(value: float, error: float) -> str:
    """A difference of two shares, with its sign and its standard error.

    >>> difference(-0.25, 0.0123)
    '-0.250 ± 0.012'
    """
    return f"{value:+.3f} ± {error:.3f}"


def percent(value: float | None) -> str:
    """A share in percent, without decimals.

    >>> percent(0.617), percent(None)
    ('62 %', '–')
    """
    return NONE if value is None else f"{100 * value:.0f} %"


def count(value: float | None) -> str:
    """A count, with thousands separators.

    >>> count(24320)
    '24,320'
    """
    return NONE if value is None else f"{value:,.0f}"


def significant(value: float | None) -> str:
    """A measured size, with three significant digits and no exponent.

    >>> [significant(value) for value in (0.0123, 0, 1.2, 12.34, 123.4, 12345.6)]
    ['0.012', '0.00', '1.20', '12.3', '123', '12,346']
    """
    if value is None:
        return NONE
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or not size else 3
    return f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    """A ratio.

    >>> [ratio(value) for value in (1, 1.204, 27.1)]
    ['1.00×', '1.20×', '27.1×']
    """
    return NONE if value is None else f"{significant(value)}×"


def p_value(value: float) -> str:
    """A p-value.

    >>> [p_value(value) for value in (1e-9, 0.0123, 0.5)]
    ['< 0.001', '0.012', '0.50']
    """
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def steps(length: str) -> str:
    """A chain's length in words.

    >>> steps("1"), steps("4")
    ('1 step', '4 steps')
    """
    return f"{length} step{'' if length == '1' else 's'}"


def setting(value: Any) -> str:
    """A recipe's value as in YAML.

    >>> [setting(value) for value in (None, True, 1e-05, "middle", ", ", [1, 2])]
    ['null', 'true', '1e-05', 'middle', '", "', '[1, 2]']
    """
    is_word = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
    return str(value) if is_word else json.dumps(value, ensure_ascii=False)
