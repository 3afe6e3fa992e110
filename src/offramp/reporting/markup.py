"""HTML that escapes by default: a plain `str` is text, only `Html` is markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = ("img", "input", "br")


class Html(str):
    """Markup; whatever is not this type is escaped."""

    __slots__ = ()


def text(value: str) -> Html:
    """A string as markup: itself when it is markup already, else escaped."""
    return value if isinstance(value, Html) else Html(escape(value))


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts behind each other."""
    return Html(text(between).join(text(part) for part in parts))


def tag(name: str, /, *inside: str, **attributes: str | None) -> Html:
    """One element; attributes with None are left out, `class_` and `aria_label` are written as HTML
    has them.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    named = {
        key.rstrip("_").replace("_", "-"): value
        for key, value in attributes.items()
        if value is not None
    }
    head = name + "".join(f' {key}="{escape(value)}"' for key, value in named.items())
    return Html(f"<{head}>" if name in VOID else f"<{head}>{join(inside)}</{name}>")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column names its rows; it scrolls inside its own box when it is wide."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    whole = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def section(name: str, title: str, *inside: str) -> Html:
    """A section with a heading of its own."""
    return tag(
        "section",
        tag("h2", title, id=f"{name}-title"),
        *inside,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def folded(summary: str, *inside: str) -> Html:
    """What is shown only when asked for."""
    return tag("details", tag("summary", summary), *inside)


def switch(name: str, legend: str, labels: Sequence[str]) -> Html:
    """Radio buttons between the choices of the chart `name`; the first is shown."""
    choices = []
    for n, label in enumerate(labels):
        choices.append(
            tag(
                "label",
                tag("input", type="radio", name=name, value=str(n), checked="" if n == 0 else None),
                label,
            )
        )
    return tag("fieldset", tag("legend", legend), *choices, class_="switch")


def chart(name: str, label: str, *, tall: bool = False) -> Html:
    """The place of a chart, drawn by page.js from the figure of the same name."""
    return tag(
        "div", id=name, class_="chart tall" if tall else "chart", role="img", aria_label=label
    )
