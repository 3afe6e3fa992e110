"""Any Parquet file, or folder of them, with a column of images or of equally long number lists.

parquet:rows.parquet
parquet/test:FOLDER
parquet:FOLDER?label=species
parquet:FOLDER?resize=256&crop=224
"""

from __future__ import annotations

from pathlib import Path

from offramp._support.notices import say
from offramp.data._classes import given_names, names_of, numbered, say_absent
from offramp.data._images import AS_THEY_ARE, resizing
from offramp.data._tables import ColumnTable, files_of, label_column, splits_beside
from offramp.data.rows import Rows
from offramp.errors import BadData


def load(
    location: str,
    split: str,
    *,
    size: tuple[int, int] | None = None,
    x: str = "",
    label: str = "",
    resize: str = "",
    crop: str = "",
    interpolation: str = "",
    classes: str = "",
) -> Rows:
    """x by name (image, x, features, ...) or as the only fitting column; labels by name (label, y,
    ...) or none.

    Args:
        place: a file, or a folder.
        split: s means `s-*.parquet`, `s.parquet` or `s/*.parquet` in a folder; without one the
            split test where there is one, else all files.
        size: H and W to which images are stretched: `parquet@HxW:PATH`.
        x, label: the columns, where their names are not known here.
        resize, crop, interpolation: of images, as in imagefolder.
        classes: the names of the classes in the order of their numbers, A,B,C or a file with one a
            line.

    Labels are integers of at least 0, or texts. Texts are numbered by name, in sorted order, over
    the training split where there is one.

    Raises:
        BadData: no such column, labels that are none, images of several sizes.
        BadFile: a file that cannot be read.
    """
    if not location:
        raise BadData("parquet got no place; expected parquet:PATH")
    as_asked = resizing(size, resize, crop, interpolation)
    files = files_of(Path(location), split)
    spec = f"parquet{'/' if split else ''}{split}:{location}"
    table = ColumnTable(files, as_asked, x=x, label=label, spec=spec)
    if as_asked != AS_THEY_ARE and not table.is_image:
        raise BadData(f"{location} holds numbers, which cannot be resized; leave the size out")
    names = given_names(classes)
    if table.texts is not None and table.label is not None:
        chosen, splits = splits_beside(files)
        column = table.label
        held = {
            word: {str(one) for file in some for one in label_column(file, column)}
            for word, some in splits.items()
        }
        names = names_of(held, chosen, location, names)
        table.labels = numbered(table.texts, names, f"the label column {column!r}")
        say_absent(names, table.labels, location)
    if table.label is None and table.others:
        say(
            f"{location}: no labels found, its other columns are {', '.join(table.others)}; name "
            f"them with "
            "parquet:PATH?label=NAME"
        )
    return Rows(table, name=f"parquet:{location}", class_names=names or table.class_names)
