"""A bar where someone watches, and nothing at all elsewhere."""

from __future__ import annotations

import sys

import pytest

from offramp.progress import track


@pytest.mark.parametrize(("show", "terminal"), [(False, True), (True, False), (True, True)])
def test_it_yields_the_items_and_writes_nothing_to_standard_output(show, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track(iter(range(5)), what="counting", total=5, show=show)) == [0, 1, 2, 3, 4]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("counting" in err) <= (show and terminal)
    assert not err or (show and terminal)
