"""How networks of a comparison are cut: exits of their own at some nodes, places tried once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from made_up import DIGITS, file_of
from offramp.building.placement.measure import placed
from offramp.comparing import placement
from offramp.comparing.cells import Cell
from offramp.comparing.reading import read_settings
from offramp.errors import OverlappingRows
from paying import signs

pytest.importorskip("sklearn")

SIGNS = """
train = "npz:signs.npz[0:60]"
calibration = "npz:signs.npz[240:300]"
test = "npz:signs.npz[300:360]"
labelled = "npz:signs.npz[0:240]"
model = "paying:lifted"
preprocess = "none"
at = "auto"
exit = "linear"
seeds = [3, 4]
"""
METHODS = (
    '[method.one]\nrecipe = "hinge"\n',
    '[method.other]\nrecipe = "cross_entropy"\nseeds = [3]\n',
)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with signs.npz, as the current one."""
    x, y = signs(420)
    x[:, -1] += np.arange(420) / 1e4  # no two rows are the same
    np.savez(tmp_path / "signs.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(folder: Path, *tables: str, shared: str) -> list[Cell]:
    """All cells of a file, of which nothing is made."""
    settings = read_settings(file_of(folder, *tables, shared=shared))
    return [
        Cell(each, seed, settings, folder / "out", False)
        for each in settings.methods
        for seed in each.seeds
    ]


def test_a_node_may_have_another_exit(tmp_path: Path) -> None:
    (cell,) = cells(
        tmp_path, "[method.two]\nexit-of = ['blocks.0=mlp']\nseeds = [0]\n", shared=DIGITS
    )
    exits = cell.network.config()["exits"]
    assert (exits["stem"].get("hidden"), exits["blocks.0"]["hidden"]) == (None, [128])


def test_places_are_tried_once_for_all_that_ask_the_same(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(
        placement, "placed", lambda *a, **options: tried.append(options) or placed(*a, **options)
    )
    one, later, other = cells(rows, *METHODS, shared=SIGNS)
    for cell in (later, one, other):  # a later seed has the places of the first one too
        network = cell._untrained()
        assert network.topology.exits == ("1", "backbone")
        assert network.trained_on is not None
        assert (network.trained_on.data, len(network.trained_on.digests)) == (
            "npz:signs.npz[0:240]",
            240,
        )
    (smaller,) = cells(
        rows, '[method.smaller]\nat = "auto"\nparts = 2\nseeds = [3]\n', shared=SIGNS
    )
    assert smaller._untrained().topology.exits == ("1", "backbone")
    assert [options["most"] for options in tried] == [None, 1]


def test_places_depend_on_what_the_model_was_trained_by(rows: Path) -> None:
    trained = '[method.trained]\nrecipe = "joint"\nwith = ["epochs=1"]\nat = "1"\nseeds = [0]\n'
    placed_ = '[method.placed]\nstart = "trained"\nat = "auto"\nseeds = [0]\n'
    for epochs in (1, 2):
        tables = (trained.replace("epochs=1", f"epochs={epochs}"), placed_)
        cells(rows, *tables, shared=SIGNS)[1]._untrained()
        shutil.rmtree(rows / "out" / "trained-0")
        assert len([*(rows / "out" / "places").iterdir()]) == epochs


def test_rows_of_the_probe_and_of_training_are_remembered_together(rows: Path) -> None:
    cell = cells(
        rows,
        METHODS[0],
        shared=SIGNS.replace("[0:60]", "[240:300]").replace("[240:300]", "[360:420]", 1),
    )[0]
    assert cell.network.trained_on is not None
    assert len(cell.network.trained_on.digests) == 300
    again = cells(rows, METHODS[0], shared=SIGNS.replace("[240:300]", "[200:260]"))[0]
    with pytest.raises(OverlappingRows, match=r"40 of the 60 calibration rows .* also trained"):
        again.traces("own")
