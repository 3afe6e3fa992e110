"""HTML that escapes by default: a plain `str` is text, only `Html` is markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = ("img", "input", "br")


class Html(str):
    """A string of markup. Strings of any other type are escaped before they go on a page."""

    __slots__ = ()


def text(value: str) -> Html:
    """A string as markup: unchanged if it is `Html` already, otherwise escaped."""
    if isinstance(value, Html):
        return value
    return Html(escape(value))


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts one after the other, with `between` between them; each is escaped if necessary."""
    return Html(text(between).join(map(text, parts)))


def tag(name: str, /, *inside: str, **attributes: str | None) -> Html:
    """One element.

    Args:
        name: of the element, such as "p".
        *inside: its content; a plain `str` is escaped.
        **attributes: None leaves an attribute out. Python names become HTML names: `class_` is
            written as class, `aria_label` as aria-label.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    # two Python names may mean the same attribute, and then the later value counts
    values: dict[str, str] = {}
    for key, value in attributes.items():
        if value is not None:
            values[key.rstrip("_").replace("_", "-")] = value
    head = name
    for key, value in values.items():
        head += f' {key}="{escape(value)}"'
    if name in VOID:  # elements without an end tag
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(inside)}</{name}>")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column names its rows.

    A wide table scrolls inside its own box, so that the page does not.
    """
    heads = [tag("th", cell, scope="col") for cell in head]
    lines = []
    for first, *others in rows:
        cells = [tag("td", cell) for cell in others]
        lines.append(tag("tr", tag("th", first, scope="row"), *cells))
    element = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *lines),
    )
    return tag("div", element, class_="scroll", tabindex="0", role="region", aria_label=caption)


def section(name: str, title: str, *inside: str) -> Html:
    """A section with a heading."""
    return tag(
        "section",
        tag("h2", title, id=f"{name}-title"),
        *inside,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def folded(summary: str, *inside: str) -> Html:
    """Content that is hidden until a reader clicks its summary."""
    return tag("details", tag("summary", summary), *inside)


def switch(name: str, legend: str, labels: Sequence[str]) -> Html:
    """Radio buttons between the choices of the chart `name`; the first is shown."""
    choices = []
    for index, label in enumerate(labels):
        checked = None
        if index == 0:
            checked = ""  # an empty value checks a button, too
        button = tag("input", type="radio", name=name, value=str(index), checked=checked)
        choices.append(tag("label", button, label))
    return tag("fieldset", tag("legend", legend), *choices, class_="switch")


def chart(name: str, label: str, *, tall: bool = False) -> Html:
    """An empty box, in which page.js draws the figure of the same name."""
    classes = "chart"
    if tall:
        classes = "chart tall"
    return tag("div", id=name, class_=classes, role="img", aria_label=label)
