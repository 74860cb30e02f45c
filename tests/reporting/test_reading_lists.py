"""A list of thousands of texts does not fill the page of its run."""

from __future__ import annotations

from aligntune.reporting.reading import LONG_LIST, shown


def test_long_lists_are_cut() -> None:
    assert shown(["a", "b"]) == '["a", "b"]'
    assert shown(["a"] * LONG_LIST).count('"a"') == LONG_LIST
    assert shown(["a", "b", *["c"] * LONG_LIST]) == f'["a", "b", ...] ({LONG_LIST + 2} entries)'
