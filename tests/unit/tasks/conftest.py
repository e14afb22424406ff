"""Fixtures of the tests on data, which tasks read."""

from tests.unit.data.conftest import _no_progress_bars, cache, texts, write_rows

__all__ = ["_no_progress_bars", "cache", "texts", "write_rows"]
