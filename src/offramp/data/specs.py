"""Parses data sources that are written as text.

The form is `name[/split][@HxW][:place][?option=value&...][[a:b:step]]`.

    digits
    cifar10:DIR
    cifar10/train:DIR[0:1000]
    imagefolder@224x224:DIR
    images:DIR
    npz:PATH[::10]
    my.module:factory
    tsv:PATH?tokenizer=FOLDER&length=64[0:1000]    imagefolder/test:DIR?resize=256&crop=224

Options may also stand before the colon: imagefolder?resize=256&crop=224:DIR.

A name is a file of this folder. `my.module:factory` is imported and called without arguments.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp._support import find
from offramp._support.files import from_home
from offramp.data._check import brief
from offramp.errors import BadData, OfframpError

SHAPE = re.compile(
    r"(?P<name>[^/@:\[\]]+)(/(?P<split>[^/@:\[\]]+))?(@(?P<h>[0-9]{1,5})x(?P<w>[0-9]{1,5}))?"
    r"(:(?P<place>.*?)(\?(?P<options>[a-z_]+=[^\[\]]*))?)?(\[(?P<selection>[^\[\]]*)\])?",
    re.DOTALL,
)
# Public files of this folder that are not sources.
NOT_SOURCES = ("rows", "specs")


@dataclass(frozen=True)
class Spec:
    """The parts of a spec.

    Attributes:
        whole: its text without the selection.
        name: of the source.
        split: "" without.
        size: H and W of images; None without.
        path: "" without.
        selection: the text between the brackets; None without.
        options: values as text, by name.
    """

    whole: str
    name: str
    split: str
    size: tuple[int, int] | None
    path: str
    selection: str | None
    options: Mapping[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """The names of all sources: the public files of this folder."""
    sources = list[str]()
    for path in Path(__file__).parent.glob("*.py"):
        if not path.stem.startswith("_") and path.stem not in NOT_SOURCES:
            sources.append(path.stem)
    return sorted(sources)


def parse(text: str) -> Spec:
    """Take a spec apart.

    Args:
        text: such as "cifar10/train:DIR[0:1000]".

    Raises:
        BadData: it is not a spec.
    """
    match = SHAPE.fullmatch(text.strip())
    if match is None:
        raise BadData(
            f"{text!r} is not a data spec; expected name:place such as 'cifar10:DIR', "
            f"'cifar10/train:DIR[0:1000]' or "
            "'my.module:factory'"
        )
    part = match.groupdict()
    # Options may also be before the colon: imagefolder?crop=224:DIR.
    early = ""
    if part["place"] is not None:
        for key in ("name", "split"):
            if part[key] and "?" in part[key]:
                part[key], _, early = part[key].partition("?")
    # The size of images: name@224x224.
    size: tuple[int, int] | None = None
    if part["h"] is not None:
        height = int(part["h"])
        width = int(part["w"])
        if not (0 < height <= 8192 and 0 < width <= 8192):
            raise BadData(
                f"{text!r} asks for images of {height}x{width}; expected 1 to 8192 each way"
            )
        size = (height, width)
    # The text without the brackets of the selection.
    if part["selection"] is None:
        whole = text.strip()
    else:
        whole = text.strip()[: -len(part["selection"]) - 2]
    late = part["options"] or ""
    separator = "&" if early and late else ""
    options = _options(f"{early}{separator}{late}", text)
    return Spec(
        whole,
        part["name"],
        part["split"] or "",
        size,
        part["place"] or "",
        part["selection"],
        options,
    )


def _options(written: str, text: str) -> dict[str, str]:
    """The options in `name=value&name=value`. Raises BadData."""
    options = dict[str, str]()
    for pair in written.split("&") if written else []:
        name, _, value = pair.partition("=")
        if not name or not value or name in options:
            raise BadData(
                f"{text!r} has options {written!r}; expected name=value&name=value, each once"
            )
        options[name] = value
    return options


def load(spec: Spec) -> object:
    """Read the rows of a source.

    Args:
        spec: its selection does not count here.

    Returns:
        Rows, or whatever the user's own factory returns.

    Raises:
        UnknownName: there is no source, or no option, of this name.
        BadData: the source cannot have a size or this option, or its data is not usable.
        BadFile: a file is missing or damaged.
        MissingExtra: a library is not installed.
    """
    if spec.name not in names():
        if _is_module(spec.name) and all(part.isidentifier() for part in spec.path.split(".")):
            return _made_by(spec)
        raise find.unknown(spec.name, names(), "data source")
    source: Any = importlib.import_module(f"offramp.data.{spec.name}").load
    path = str(from_home(spec.path)) if spec.path else ""  # ~ is the home folder
    takes = inspect.signature(source).parameters
    # All further arguments of `load` are its options.
    known = [name for name in takes if name not in ("location", "split", "size")]
    for name in spec.options.keys() - known:
        if not known:
            raise BadData(
                f"{spec.whole} has the option {name!r}, and {spec.name} takes none; leave it out"
            )
        raise find.unknown(name, known, f"option of {spec.name}")
    if spec.size is None:
        return source(path, spec.split, **spec.options)
    if "size" not in takes:
        raise BadData(
            f"{spec.whole} asks for a size, which {spec.name} cannot take; only imagefolder, "
            f"images and parquet resize"
        )
    return source(path, spec.split, size=spec.size, **spec.options)


def _is_module(name: str) -> bool:
    """Whether a name is dotted, or is a module that can be found. Nothing is imported."""
    if "." in name:  # the names of sources have no dot
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _made_by(spec: Spec) -> object:
    """The result of the user's own `module:factory`, called without arguments."""
    if spec.split or spec.size or spec.options:
        raise BadData(
            f"{spec.whole} has a split, a size or options, which a factory cannot take; write "
            f"module:factory only"
        )
    try:
        factory = find.imported(f"{spec.name}:{spec.path}")
        return factory()
    except OfframpError:
        raise
    except (Exception, SystemExit) as problem:
        raise BadData(
            f"{spec.whole}() failed ({brief(problem)}); expected a function that returns data"
        ) from problem


def selection(spec: Spec, length: int | None) -> slice:
    """The selection of a spec as a slice.

    Args:
        spec: with a selection.
        length: the number of rows, for the message; None where it is unknown.

    Raises:
        BadData: it is not of the form a:b or a:b:step.
    """
    text = spec.selection or ""
    ends = list[int | None]()
    for part in text.split(":"):
        number = part.strip()
        if not re.fullmatch(r"-?[0-9]{0,18}", number, re.ASCII):
            raise _bad(spec.whole, text, length)
        try:
            ends.append(int(number) if number else None)
        except ValueError as problem:  # a minus alone
            raise _bad(spec.whole, text, length) from problem
    if len(ends) not in (2, 3):
        raise _bad(spec.whole, text, length)
    return slice(*ends)


def tell(chosen: slice) -> str:
    """A slice as it is written in a spec: `a:b` or `a:b:step`."""
    parts = [chosen.start, chosen.stop]
    if chosen.step is not None:
        parts.append(chosen.step)
    texts = list[str]()
    for part in parts:
        texts.append("" if part is None else str(part))
    return ":".join(texts)


def chosen(keep: range, selection: slice, text: str, name: str, length: int | None) -> range:
    """Apply a selection to rows.

    Args:
        keep: the source's numbers of the rows to select from.
        selection: among these rows, counted from 0.
        text: the selection in messages.
        name: the rows in messages.
        length: the number of rows; None where it is unknown.

    Returns:
        The source's numbers of the selected rows.

    Raises:
        BadData: the selection is empty, or goes beyond the last row.
    """
    for part in (selection.start, selection.stop, selection.step):
        if part is not None and (type(part) is not int or part < 0):
            raise _bad(name, text, length)
    if selection.step == 0:
        raise _bad(name, text, length)
    # Unlike Python's slices, a selection beyond the end is refused: its rows would be missing.
    start = selection.start or 0
    stop = selection.stop
    if stop is not None and (start >= stop or (length is not None and stop > length)):
        raise _bad(name, text, length)
    if length is not None and start >= length:
        raise _bad(name, text, length)
    return keep[selection]


def _bad(name: str, text: str, length: int | None) -> BadData:
    """The error for a wrong selection, with the number of rows."""
    if length is None:
        there = "an unknown number of rows"
        limit = ""
    else:
        there = f"{length} rows"
        limit = f" <= {length}"
    return BadData(
        f"[{text}] is not a selection of {name}, which has {there}; expected [a:b] or [a:b:step] "
        f"in integers with 0 <= a < b{limit}: change it"
    )
