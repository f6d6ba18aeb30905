"""Tables keep their columns in order, with and without rows, and say what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from edits.verify import Agreement
from steer.coverage import Coverage
from steer.tables import table
from steer.traces import Traces
from tests.steer.made import direction, refused

FRAMES: list[Callable[[], object]] = [
    lambda: direction().frame(),
    lambda: Coverage("hook", ()).frame(),
    lambda: Traces([]).frame(),
    lambda: Agreement("a", "b", passed=True).frame(),
]


def test_columns_keep_their_order_and_what_a_row_lacks_is_missing() -> None:
    made = table([{"b": 1, "a": 2}, {"a": 3}], ["a", "b"])
    assert list(made.columns) == ["a", "b"]
    assert list(made["a"]) == [2, 3]
    assert list(made["b"].isna()) == [False, True]


def test_no_rows_still_make_a_table() -> None:
    made = table([], ["a", "b"])
    assert (len(made), list(made.columns)) == (0, ["a", "b"])


@pytest.mark.parametrize("frame", FRAMES)
def test_without_pandas_every_frame_says_what_to_install(
    frame: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    refused(frame, "pandas", "notebook")
