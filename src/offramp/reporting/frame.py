"""One self-contained page around any sections: style, script, and the charts as data. Needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from string import Template

import numpy as np

from offramp.errors import MissingExtra
from offramp.reporting.charts import Figure
from offramp.reporting.markup import Html, text

MARK = b'<meta name="generator" content="offramp">'  # near the beginning of every page


def frame(
    *,
    title: str,
    lead: str,
    sections: Html,
    footer: Html,
    figures: Sequence[Figure],
    library: str,
    warning: Html = Html(),  # noqa: B008 - a string
    promise: Html = Html(),  # noqa: B008
    cards: Html = Html(),  # noqa: B008
) -> str:
    """The page as text. library: plotly.js, from `plotly_library`."""
    return Template(_part("html")).substitute(
        title=text(title),
        lead=text(lead),
        style=_part("css"),
        warning=warning,
        promise=promise,
        cards=cards,
        sections=sections,
        footer=footer,
        figures=_embedded(figures),
        plotly=library,
        script=_part("js"),
    )


def _part(kind: str) -> str:
    return files("offramp.reporting").joinpath(f"page.{kind}").read_text(encoding="utf-8")


def _embedded(figures: Sequence[Figure]) -> str:
    """JSON that cannot end the script element it stands in."""

    def plain(value: object) -> object:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} is no plain data")

    said = json.dumps(figures, default=plain, allow_nan=False)
    return said.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plotly_library() -> str:
    """The source of plotly.js, which stands in the page. Raises MissingExtra."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as problem:
        raise MissingExtra("plotly", "report", "the report") from problem
    return str(get_plotlyjs())


def version_text() -> str:
    """Which offramp wrote a page."""
    try:
        return version("offramp")
    except PackageNotFoundError:
        return "from its sources"
