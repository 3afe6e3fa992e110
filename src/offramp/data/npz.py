"""Arrays in one `.npz` file, read without pickles."""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.data._check import reading
from offramp.data._sources import arrays
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile

INPUTS = ("x", "images", "data", "features", "X")
SEVERAL = "x/"
LABELS = ("y", "labels", "label", "target")


def load(place: str, split: str) -> Rows:
    """x (or images, data, features, X) and, where there are any, y (or labels, label, target).

    With a split s, or where no such name is there, `x_s` and `y_s` are meant (s = test unless given). Several inputs
    stand there as `x/NAME`.
    """
    with reading(place or "no place", "an .npz file of arrays without pickles"), open(place, "rb") as file:
        loaded: Any = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise BadFile(f"{place} is a single array (.npy); expected an .npz with x and y: np.savez(file, x=x, y=y)")
        with loaded:
            several = [] if split else [name for name in loaded.files if name.startswith(SEVERAL)]
            if several:
                x_name, y_name = "inputs", next((name for name in LABELS if name in loaded.files), None)
            else:
                x_name, y_name = _names(loaded.files, place, split)
            x = {name.removeprefix(SEVERAL): loaded[name] for name in several} or loaded[x_name]
            y = None if y_name is None else loaded[y_name]
    return Rows(arrays(x, y, f"{x_name} in {place}"), name=f"npz:{place}")


def _names(files: list[str], place: str, split: str) -> tuple[str, str | None]:
    for ending in [f"_{split}"] if split else ["", "_test"]:
        x = next((name + ending for name in INPUTS if name + ending in files), None)
        if x is not None:
            return x, next((name + ending for name in LABELS if name + ending in files), None)
    wanted = f"x_{split} and y_{split}" if split else "x and y"
    raise BadData(
        f"{place} holds {files}; expected the names {wanted}: save them with np.savez(file, x=x, y=y), several inputs "
        "as x/NAME"
    )
