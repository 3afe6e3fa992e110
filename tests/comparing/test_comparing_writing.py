"""`off.compare`: the page and the tables are written, and somebody else's are refused before the
work.
"""

from __future__ import annotations

import pytest

import offramp as off
from offramp.comparing import writing
from offramp.errors import BadFile


@pytest.mark.parametrize("name", ["index.html", "results.csv"])
def test_somebody_elses_file_is_refused_before_the_work(tmp_path, monkeypatch, name):
    pytest.importorskip("plotly")
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(writing, "measure", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(BadFile, match=name):
        off.compare("methods.toml", tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_what_was_measured_is_written_and_named(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    from made_up import comparison

    made = comparison()
    monkeypatch.setattr(writing, "measure", lambda *_, **__: made)
    found = off.compare("methods.toml", tmp_path, progress=False)
    assert [file.name for file in found.files][:3] == ["index.html", "results.csv", "curves.csv"]
    assert all(file.exists() for file in found.files)
    assert found.to_json()["files"] == [str(file) for file in found.files]
    assert set(found.mean_accuracies()) == set(found.labels())
