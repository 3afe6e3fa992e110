"""Numbers as arguments, and shares as they are printed."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from offramp._support.arguments import (
    arguments_of,
    in_order,
    name_of,
    percentage,
    require,
    require_confidence,
    require_count,
    require_flag,
    require_kind,
    require_path,
)
from offramp.errors import InvalidArgument


@pytest.mark.parametrize("value", [0.05, np.float32(0.05), np.float64(0.05), Fraction(1, 20)])
def test_numbers_of_any_kind(value):
    number = require("level", value, above=0, below=1)
    assert type(number) is float
    assert number == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("limits", "good", "bad", "says"),
    [
        ({"above": 0, "below": 1}, (0.1, 0.9), (0, 1, -0.1, 1.1), "above 0 and below 1"),
        ({"low": 0, "high": 1}, (0, 1), (-0.1, 1.1), "between 0 and 1"),
        ({"low": 0, "below": 1}, (0, 0.9), (1, -1), "at least 0 and below 1"),
        ({"above": 0, "high": 1}, (0.1, 1), (0, 2), "above 0 and at most 1"),
        ({"low": 2}, (2, 1e300), (1.9,), "at least 2"),
        ({"above": 0}, (1e-300,), (0, -1), "above 0"),
        ({}, (-1e9, 0), (), "a number"),
    ],
)
def test_limits(limits, good, bad, says):
    for value in good:
        assert require("level", value, **limits) == value
    for value in (*bad, math.nan, math.inf, -math.inf):
        with pytest.raises(InvalidArgument, match=f"^level must be {says}, got {value}"):
            require("level", value, **limits)


@pytest.mark.parametrize(
    "value",
    [True, False, np.True_, None, "0.05", "five", [0.05], 0.05j, np.array([0.05]), object()],
)
def test_what_is_no_number(value):
    with pytest.raises(InvalidArgument, match="level must be a number above 0 and below 1, got"):
        require("level", value, above=0, below=1)


def test_a_hint_is_a_sentence_of_its_own():
    with pytest.raises(
        InvalidArgument, match=r"^clip must be above 0, got 0\. None means no clipping\.$"
    ):
        require("clip", 0, above=0, hint="None means no clipping.")


@pytest.mark.parametrize(
    ("value", "limits", "ends"),
    [
        (5, {"below": 1}, "got 5 (5 % is 0.05)"),
        (99.9, {"below": 1}, "got 99.9 (99.9 % is 0.999)"),
        ("5%", {"below": 1}, "got '5%' (5 % is 0.05)"),
        ("0.5 %", {"below": 1}, "got '0.5 %' (0.5 % is 0.005)"),
        ("0.05", {"below": 1}, "got '0.05' (a text, not the number 0.05)"),
        ("0.05%", {"below": 1}, "got '0.05%' (0.05 % is 0.0005)"),
        (5, {"below": 3}, "got 5"),
        (2, {"high": 1}, "got 2"),
        (100, {"below": 1}, "got 100"),
        (-5, {"below": 1}, "got -5"),
        ("many", {"below": 1}, "got 'many'"),
    ],
)
def test_what_was_meant(value, limits, ends):
    with pytest.raises(InvalidArgument) as caught:
        require("level", value, above=0, **limits)
    assert str(caught.value).endswith(ends)


@pytest.mark.parametrize(
    ("share", "printed"),
    [
        (0.95, "95 %"),
        (0.001, "0.1 %"),
        (0.9999, "99.99 %"),
        (0.999999999, "99.9999999 %"),
        (1 - 1e-13, "99.99999999999 %"),
        (1 - 1e-15, "99.9999999999999 %"),
        (1e-7, "1e-05 %"),
        (0.07, "7 %"),
        (0.005, "0.5 %"),
        (1 - (1 - 0.975), "97.5 %"),
        (0, "0 %"),
    ],
)
def test_shares_have_all_their_digits(share, printed):
    assert percentage(share) == printed


def test_numbers_are_taken_as_they_are_written():
    assert require("level", np.float32(0.05), above=0, below=1) == 0.05
    assert math.copysign(1, require("level", -0.0, low=0, below=1)) == 1
    with pytest.raises(InvalidArgument, match="share must be above 0, got 1000"):
        require("share", 10**400, above=0)


def test_confidence():
    assert require_confidence(0.95) == 0.95
    says = r"^confidence must be (a number )?(above 0|at least 1e-15) and below 1, got"
    for wrong in (1e-300, 0, 1, True, "95%", None, math.nan):
        with pytest.raises(InvalidArgument, match=says):
            require_confidence(wrong)


@pytest.mark.parametrize("value", [1, 64, np.int64(64), np.uint8(3), 2**31 - 1])
def test_counts(value):
    assert type(require_count("batch", value)) is int
    assert require_count("batch", value) == value


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        True,
        np.True_,
        1.0,
        1.5,
        math.nan,
        math.inf,
        "64",
        None,
        1e30,
        10**400,
        np.array([1, 64]),
        np.float32(2),
    ],
)
def test_what_is_no_count(value):
    with pytest.raises(
        InvalidArgument, match="batch must be a whole number of at least 1, got"
    ) as caught:
        require_count("batch", value)
    assert len(str(caught.value)) < 120
    with pytest.raises(InvalidArgument, match="seed must be a whole number from 0 to 5, got 6"):
        require_count("seed", 6, 0, 5)


def test_flags():
    assert require_flag("resume", True) is require_flag("resume", np.True_) is True
    assert require_flag("resume", False) is require_flag("resume", np.False_) is False
    for wrong in ("no", "", 0, 1, None, [True], np.array([True])):
        with pytest.raises(InvalidArgument, match="resume must be True or False, got"):
            require_flag("resume", wrong)


def test_kinds():
    require_kind("the plan", Fraction(1, 2), Fraction, "from nowhere")
    with pytest.raises(
        InvalidArgument, match=r"^the plan must be a Fraction, from nowhere; got a int$"
    ):
        require_kind("the plan", 5, Fraction, "from nowhere")
    with pytest.raises(
        InvalidArgument, match=r"got the text 'x\.json': load it first, with Fraction\.load"
    ):
        require_kind("the plan", "x.json", Fraction, "from nowhere")


def test_names_of_a_set_are_in_one_order():
    names = ["stem", "a", "layer10", "layer2"]
    assert in_order(set(names)) == in_order(frozenset(names)) == sorted(names)
    assert in_order(names) == in_order(tuple(names)) == names
    assert in_order(dict.fromkeys(names)) == names


@pytest.mark.parametrize("value", ["a/b", Path("a") / "b"])
def test_paths(value):
    assert require_path("folder", value) == Path("a/b")


@pytest.mark.parametrize("value", [None, 3, b"a", "", ["a"], True])
def test_what_is_no_path(value):
    says = rf"folder must be a path \(a text or a pathlib.Path\), got {re.escape(repr(value))}"
    with pytest.raises(InvalidArgument, match=says):
        require_path("folder", value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("+.5e-1", 0.05),
        ("true", True),
        ("True", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("[1, 0.3]", [1, 0.3]),
        ("frozen", "frozen"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("layer3.0", "layer3.0"),
    ],
)
def test_values_as_people_type_them(text, value):
    for found in (arguments_of([f"key={text}"])["key"], name_of(f"low_rank?key={text}")[1]["key"]):
        assert found == value
        assert type(found) is type(value)
