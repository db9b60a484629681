"""The table of docs/bytes-moved.md is the one that the launches add up to."""

from __future__ import annotations

from pathlib import Path

import pytest
import traffic

PAGE = Path(__file__).resolve().parent.parent / "docs" / "bytes-moved.md"


@pytest.fixture(scope="module")
def table() -> str:
    return traffic.table()


def test_the_page_shows_what_moves(table: str) -> None:
    """Whoever changes what a kernel reads or writes prints the table again."""
    assert table in PAGE.read_text()


def test_no_use_moves_more_than_unfused_torch(table: str) -> None:
    """But for the partial sums of the backward: two programs a processor write and read two."""
    programs, sums, float32 = 2 * traffic.PROCESSORS, 2, 4
    partials = programs * sums * 2 * float32 / (traffic.SAMPLES * traffic.ROWS)
    for line in table.splitlines()[2:]:
        forward, torchs_forward, backward, torchs_backward, kept, torchs_kept = (
            float(cell) for cell in line.strip("|").split("|")[1:]
        )
        assert forward <= torchs_forward, line
        assert backward <= torchs_backward + round(partials, 1), line
        assert kept <= torchs_kept, line
