"""Which row of the position table a patch gets, held against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest

from huoyan.models.siglip import position_buckets, position_ids


@pytest.mark.parametrize("side", [16, 32, 64, 70])
def test_float32_division_lands_in_the_exact_cell(side: int) -> None:
    """Rows that fall on a border between two cells included."""
    for count in range(1, 400):
        expected = [int(Fraction(i, count) * side) for i in range(count)]
        assert position_buckets(count, side).tolist() == expected, count


def test_ids_of_packed_grids() -> None:
    ids = position_ids([(25, 2), (1, 3)], 70).tolist()
    assert ids[15 * 2] == 42 * 70
    assert ids[15 * 2 + 1] == 42 * 70 + 35
    assert ids[50:] == [0, 23, 46]
