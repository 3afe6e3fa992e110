"""Any Parquet file, or folder of them, with a column of images or of equally long number lists."""

from __future__ import annotations

from pathlib import Path

from offramp.data._tables import Table, files_of
from offramp.data.rows import Rows
from offramp.errors import BadData


def load(place: str, split: str, *, size: tuple[int, int] | None = None) -> Rows:
    """x by name (image, x, features, ...) or as the only fitting column; labels by name (label, y, ...) or none.

    In a folder, a split s means `s-*.parquet`, `s.parquet` or `s/*.parquet`; without one the split test where
    there is one, else all files. `size` (H, W) resizes images: `parquet@HxW:PATH`.
    """
    if not place:
        raise BadData("parquet got no place; expected parquet:PATH")
    table = Table(files_of(Path(place), split), size)
    if size is not None and not table.is_image:
        raise BadData(f"{place} holds numbers, which cannot be resized; leave the size out")
    return Rows(table, name=f"parquet:{place}", class_names=table.class_names)
