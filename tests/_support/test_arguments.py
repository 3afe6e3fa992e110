"""Numbers as arguments, and shares as they are printed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from offramp._support.arguments import percentage, require_number
from offramp.errors import BadInput


@pytest.mark.parametrize("value", [0.05, np.float32(0.05), np.float64(0.05), Fraction(1, 20)])
def test_numbers_of_any_kind(value):
    found = require_number("level", value, 0, 1)
    assert type(found) is float
    assert found == pytest.approx(0.05)


def test_limits():
    assert require_number("level", 0, 0, 1, includes_low=True) == 0
    assert require_number("share", 1e300, 0, math.inf) == 1e300
    for wrong in (0, 1, -0.1, 1.1, math.nan, math.inf, -math.inf):
        with pytest.raises(BadInput, match="level must be a number above 0 and below 1, got"):
            require_number("level", wrong, 0, 1)
    with pytest.raises(BadInput, match=r"share must be a number above 0, got inf$"):
        require_number("share", math.inf, 0, math.inf)


@pytest.mark.parametrize(
    "value", [True, False, np.True_, None, "0.05", "five", [0.05], 0.05j, np.array([0.05]), object()]
)
def test_what_is_no_number(value):
    with pytest.raises(BadInput, match="level must be a number"):
        require_number("level", value, 0, 1)


@pytest.mark.parametrize(
    ("value", "high", "ends"),
    [
        (5, 1, "got 5 (5 % is 0.05)"),
        (99.9, 1, "got 99.9 (99.9 % is 0.999)"),
        ("5%", 1, "got '5%' (5 % is 0.05)"),
        ("0.5 %", 1, "got '0.5 %' (0.5 % is 0.005)"),
        (5, 3, "got 5"),
        (100, 1, "got 100"),
        (-5, 1, "got -5"),
        ("many", 1, "got 'many'"),
    ],
)
def test_what_was_meant(value, high, ends):
    with pytest.raises(BadInput) as caught:
        require_number("level", value, 0, high)
    assert str(caught.value).endswith(ends)


@pytest.mark.parametrize(
    ("share", "printed"),
    [
        (0.95, "95 %"),
        (0.001, "0.1 %"),
        (0.9999, "99.99 %"),
        (0.999999999, "99.9999999 %"),
        (1e-7, "1e-05 %"),
        (0.07, "7 %"),
        (0.005, "0.5 %"),
        (1 - (1 - 0.975), "97.5 %"),
        (0, "0 %"),
    ],
)
def test_shares_have_all_their_digits(share, printed):
    assert percentage(share) == printed
