"""Data sources written as text: `name[/split][@HxW][:place][?option=value&...][[a:b:step]]`.

    digits
    cifar10:DIR
    cifar10/train:DIR[0:1000]
    imagefolder@224x224:DIR
    npz:PATH[::10]
    my.module:factory
    tsv:PATH?tokenizer=FOLDER&length=64[0:1000]    imagefolder/test:DIR?resize=256&crop=224

Options may also stand before the colon: imagefolder?resize=256&crop=224:DIR.

A name is a file of this folder; `my.module:factory` is imported and called without arguments.
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
from offramp.data._check import brief
from offramp.errors import BadData, OfframpError

SHAPE = re.compile(
    r"(?P<name>[^/@:\[\]]+)(/(?P<split>[^/@:\[\]]+))?(@(?P<h>[0-9]{1,5})x(?P<w>[0-9]{1,5}))?"
    r"(:(?P<place>.*?)(\?(?P<options>[a-z_]+=[^\[\]]*))?)?(\[(?P<selection>[^\[\]]*)\])?",
    re.DOTALL,
)
NOT_SOURCES = ("rows", "specs")


@dataclass(frozen=True)
class Spec:
    """A spec taken apart; `whole` is its text without the selection. No split and no place are '';
    options are text.
    """

    whole: str
    name: str
    split: str
    size: tuple[int, int] | None
    path: str
    selection: str | None
    options: Mapping[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """The sources on this shelf, from file names alone."""
    files = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in files if not name.startswith("_") and name not in NOT_SOURCES)


def parse(text: str) -> Spec:
    """Take a spec apart; BadData when it is none."""
    found = SHAPE.fullmatch(text.strip())
    if found is None:
        raise BadData(
            f"{text!r} is no data spec; expected name:place such as 'cifar10:DIR', "
            f"'cifar10/train:DIR[0:1000]' or "
            "'my.module:factory'"
        )
    part = found.groupdict()
    early = ""
    # options may also stand before the colon: imagefolder?crop=224:DIR
    if part["place"] is not None:
        for key in ("name", "split"):
            if part[key] and "?" in part[key]:
                part[key], _, early = part[key].partition("?")
    size = None if part["h"] is None else (int(part["h"]), int(part["w"]))
    if size is not None and not (0 < size[0] <= 8192 and 0 < size[1] <= 8192):
        raise BadData(
            f"{text!r} asks for images of {size[0]}x{size[1]}; expected 1 to 8192 each way"
        )
    if part["selection"] is None:
        whole = text.strip()
    else:
        whole = text.strip()[: -len(part["selection"]) - 2]
    options = _options("&".join(filter(None, (early, part["options"]))), text)
    return Spec(
        whole,
        part["name"],
        part["split"] or "",
        size,
        part["place"] or "",
        part["selection"],
        options,
    )


def _options(behind: str, text: str) -> dict[str, str]:
    pairs = [one.partition("=") for one in behind.split("&")] if behind else []
    options = {name: value for name, _, value in pairs}
    if not all(name and value for name, _, value in pairs) or len(options) < len(pairs):
        raise BadData(
            f"{text!r} has options {behind!r}; expected name=value&name=value, each once: write "
            f"it so"
        )
    return options


def load(spec: Spec) -> object:
    """What a source gives, without the selection. Raises UnknownName, BadData, BadFile,
    MissingExtra.
    """
    if spec.name not in names():
        if _is_module(spec.name) and all(part.isidentifier() for part in spec.path.split(".")):
            return _made_by(spec)
        raise find.unknown(spec.name, names(), "data source")
    source: Any = importlib.import_module(f"offramp.data.{spec.name}").load
    path = str(Path(spec.path).expanduser()) if spec.path else ""
    takes = inspect.signature(source).parameters
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
            f"{spec.whole} asks for a size, which {spec.name} cannot take; only imagefolder and "
            f"parquet resize"
        )
    return source(path, spec.split, size=spec.size, **spec.options)


def _is_module(name: str) -> bool:
    """Whether the user means a module: a dotted name, or one that can be found (nothing is
    imported).
    """
    if "." in name:
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
    except Exception as problem:
        raise BadData(
            f"{spec.whole}() failed ({brief(problem)}); expected a function that gives data: mend "
            f"it"
        ) from problem


def selection(spec: Spec, length: int | None) -> slice:
    """The selection of a spec as a slice; BadData tells how many rows there are."""
    parts = [part.strip() for part in (spec.selection or "").split(":")]
    if len(parts) not in (2, 3) or not all(
        re.fullmatch(r"-?[0-9]{0,18}", part, re.ASCII) for part in parts
    ):
        raise _bad(spec.whole, spec.selection or "", length)
    try:
        return slice(*(int(part) if part else None for part in parts))
    except ValueError as problem:
        raise _bad(spec.whole, spec.selection or "", length) from problem


def tell(chosen: slice) -> str:
    """`a:b` or `a:b:step`, as it is written in a spec."""
    parts = [chosen.start, chosen.stop] + ([] if chosen.step is None else [chosen.step])
    return ":".join("" if part is None else str(part) for part in parts)


def chosen(keep: range, selection: slice, text: str, name: str, length: int | None) -> range:
    """The source's row numbers that a selection of the rows `keep` means; BadData for empty and
    beyond the end.
    """
    parts = [selection.start, selection.stop, selection.step]
    if (
        not all(part is None or (type(part) is int and part >= 0) for part in parts)
        or selection.step == 0
    ):
        raise _bad(name, text, length)
    start = selection.start or 0
    stop = selection.stop
    if stop is not None and (start >= stop or (length is not None and stop > length)):
        raise _bad(name, text, length)
    if length is not None and start >= length:
        raise _bad(name, text, length)
    return keep[selection]


def _bad(name: str, text: str, length: int | None) -> BadData:
    there = "an unknown number of rows" if length is None else f"{length} rows"
    return BadData(
        f"[{text}] is no selection of {name}, which has {there}; expected [a:b] or [a:b:step] in "
        f"integers with "
        f"0 <= a < b{'' if length is None else f' <= {length}'}: change it"
    )
