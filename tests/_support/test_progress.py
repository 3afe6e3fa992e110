"""A bar in a terminal, a line every ten seconds elsewhere, and nothing where nobody asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from offramp._support import progress
from offramp._support.progress import track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start; a test moves them."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress._Stopwatch, "line", 0.0)
    monkeypatch.setattr(progress._Stopwatch, "ended", 0.0)
    return now


def slow(count: int, clock: list[float], seconds: float) -> Iterator[int]:
    """Items that take their time to come."""
    for item in range(count):
        clock[0] += seconds
        yield item


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(iter(range(5)), what="counting", total=5, show=True)) == [0, 1, 2, 3, 4]
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_unless_asked(terminal, clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track(slow(5, clock, 60), what="counting", total=5, show=False)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_line_every_ten_seconds_without_a_terminal(clock, capsys):
    assert len(list(track(slow(9, clock, 4), what="counting", total=9, show=True))) == 9
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "counting: 3 of 9 batches, about 24 s left",
        "counting: 6 of 9 batches, about 12 s left",
    ]


def test_many_short_passes_together_are_not_silent(clock, capsys):
    for epoch in range(5):
        list(track(slow(3, clock, 1), what=f"epoch {epoch}", total=None, show=True))
    assert capsys.readouterr().err.splitlines() == ["epoch 3: 1 batches in 1 s"]


def test_a_short_pass_says_nothing(clock, capsys):
    list(track(slow(3, clock, 1), what="counting", total=3, show=True))
    assert capsys.readouterr().err == ""
