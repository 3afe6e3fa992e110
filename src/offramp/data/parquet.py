"""Reads Parquet files with a column of images, or of equally long lists of numbers.

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
    """Read the inputs and, if there are any, the labels.

    The inputs are the column with a known name (image, x, features, ...), or the only possible one.
    The labels are the column with a known name (label, y, ...): integers of at least 0, or texts.
    Texts are numbered by name, in sorted order, over the training split where there is one.

    Args:
        location: a file, or a folder.
        split: s means `s-*.parquet`, `s.parquet` or `s/*.parquet` in a folder. Without a split it
            is test where there is one, otherwise all files.
        size: H and W to which images are stretched: `parquet@HxW:PATH`.
        x: name of the column of inputs, where it is another one.
        label: name of the column of labels, where it is another one.
        resize: length of the shorter side of images after resizing, in pixels.
        crop: N or HxW, in pixels, cut out of the middle.
        interpolation: bilinear (default), bicubic or nearest.
        classes: names of the classes in the order of their numbers, as A,B,C or as a file with one
            name a line.

    Raises:
        BadData: there is no such column, the labels are not labels, or images have several sizes.
        BadFile: a file cannot be read.
    """
    if not location:
        raise BadData("parquet got no place; expected parquet:PATH")
    # Check the options before a file is opened.
    as_asked = resizing(size, resize, crop, interpolation)
    files = files_of(Path(location), split)
    spec = f"parquet{'/' if split else ''}{split}:{location}"
    table = ColumnTable(files, as_asked, x=x, label=label, spec=spec)
    if as_asked != AS_THEY_ARE and not table.is_image:
        raise BadData(f"{location} holds numbers, which cannot be resized; leave the size out")
    names = given_names(classes)
    # Labels that are texts are numbered over all splits, so that each split has the same numbers.
    if table.texts is not None and table.label is not None:
        chosen, splits = splits_beside(files)
        column = table.label
        held = dict[str, set[str]]()
        for word, files_of_split in splits.items():
            held[word] = set()
            for file in files_of_split:
                held[word].update(str(text) for text in label_column(file, column))
        names = names_of(held, chosen, location, names)
        table.labels = numbered(table.texts, names, f"the label column {column!r}")
        say_absent(names, table.labels, location)
    # Labels under a name that is not known here are easily missed.
    if table.label is None and table.others:
        say(
            f"{location}: no labels found, its other columns are {', '.join(table.others)}; name "
            f"them with "
            "parquet:PATH?label=NAME"
        )
    return Rows(table, name=f"parquet:{location}", class_names=names or table.class_names)
