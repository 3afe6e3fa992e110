"""One self-contained page around any sections: style, script, and the charts as data.

The page needs no internet connection.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from string import Template

import numpy as np

from offramp.errors import MissingExtra
from offramp.reporting.charts import Figure
from offramp.reporting.markup import Html, tag, text

MARK = b'<meta name="generator" content="offramp">'  # near the beginning of every page


def frame(
    *,
    title: str,
    lead: str,
    verdict: str = "",
    sections: Html,
    footer: Html,
    figures: Sequence[Figure],
    library: str,
    warning: Html = Html(),  # noqa: B008 - a string
    promise: Html = Html(),  # noqa: B008
    cards: Html = Html(),  # noqa: B008
) -> str:
    """The page as text.

    Args:
        title: the heading.
        lead: what the page is about.
        verdict: the result in one line, on top of everything else; left out if empty.
        sections: made by `markup.section`; each gets a line in the table of contents.
        footer: where the figures come from.
        figures: charts, from `charts.figure`.
        library: plotly.js, from `plotly_library`.
        warning: what a reader must know before anything else.
        promise: the promise in words.
        cards: the most important figures.
    """
    verdict_line = ""
    if verdict:
        verdict_line = tag("p", verdict, class_="verdict")
    return Template(_part("html")).substitute(
        title=text(title),
        lead=text(lead),
        verdict=verdict_line,
        contents=_contents(sections),
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
    """The text of page.html, page.css or page.js."""
    return files("offramp.reporting").joinpath(f"page.{kind}").read_text(encoding="utf-8")


def _embedded(figures: Sequence[Figure]) -> str:
    """JSON that cannot end the script element around it."""

    def plain(value: object) -> object:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} is not plain data")

    dumped = json.dumps(figures, default=plain, allow_nan=False)
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


HEADING = re.compile(r'<h2 id="([\w-]+)-title">(.*?)</h2>')  # as `markup.section` writes it


def _contents(sections: Html) -> Html:
    """Links to all sections."""
    links = []
    for name, title in HEADING.findall(sections):
        links.append(tag("li", tag("a", Html(title), href=f"#{name}")))
    if not links:
        return Html()
    return tag("nav", tag("ul", *links), class_="contents", aria_label="On this page")


def plotly_library() -> str:
    """The source of plotly.js as gzip in base64: 1.9 MB instead of 4.8. The page unpacks it.

    Raises:
        MissingExtra: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as problem:
        raise MissingExtra("plotly", "report", "the report") from problem
    return _packed(get_plotlyjs())


@cache
def _packed(script: str) -> str:
    """A script as gzip in base64; mtime=0, so that equal scripts give equal pages."""
    return base64.b64encode(gzip.compress(script.encode(), compresslevel=6, mtime=0)).decode()


def version_text() -> str:
    """The version of offramp, for the foot of a page."""
    try:
        return version("offramp")
    except PackageNotFoundError:
        return "from its sources"
