"""The report: one self-contained HTML file about a plan on the rows of a trace.

It holds figures, charts, the promise in words and real inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from offramp._support.arguments import require_path
from offramp._support.files import replacing
from offramp.plans.evaluation import better_exit
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from offramp.reporting import tables
from offramp.reporting.charts import Figure, exits_chart, frontier_chart, gate_chart
from offramp.reporting.frame import MARK, frame, plotly_library, version_text
from offramp.reporting.gallery import gallery
from offramp.reporting.maps import Maps
from offramp.reporting.markup import Html, chart, folded, join, section, switch, tag
from offramp.reporting.view import View, view_of
from offramp.reporting.ways import picture, ways_table
from offramp.reporting.words import percent, unit_name, verdict


def report(
    trace: Trace,
    plan: Plan,
    path: str | Path,
    *,
    data: object = None,
    others: Mapping[str, Plan] | None = None,
    title: str | None = None,
    maps: Maps | None = None,
) -> Path:
    """Write one HTML page about a plan on the rows of a trace.

    The page needs no internet connection and no other file.

    Args:
        trace: The rows to show. Use rows that the plan has not seen.
        plan: Of the same network.
        path: The .html file. An earlier page of offramp there is replaced.
        data: The recorded rows, for a gallery of images.
        others: Further plans to mark on the frontier, by name.
        maps: Maps to show over some of these images: a function from images [W, C, H, W'] to maps
            [W, h, w] by name, for example `offramp.layers.adaptive_depth.PonderMaps` of a model.
        title: The heading. By default it is the names of the exits.

    Returns:
        The path.

    Raises:
        BadData: The trace has no rows, or `data` is not what was recorded.
        Mismatch: The plan belongs to another network.
        MissingExtra: plotly or Pillow is not installed.
        BadFile: The path cannot be written, or holds a file of another kind.
    """
    path = require_path("path", path)
    library = plotly_library()
    page = _Page(view_of(trace, plan), dict(others or {}), title)
    pictures: Sequence[Html] = []
    if data is not None:
        pictures = gallery(page.view, data, maps)
    markup = page.whole(library, pictures)
    with replacing(path, mark=MARK, what="page") as temporary:
        temporary.write_text(markup, encoding="utf-8", errors="replace")
    return path


@dataclass(frozen=True)
class _Page:
    """The sections of a page. Each method returns the markup of a section and its charts."""

    view: View
    others: Mapping[str, Plan]
    title: str | None

    def whole(self, library: str, pictures: Sequence[Html]) -> str:
        """The page, with plotly.js inside."""
        # The order of the sections on the page.
        parts = [
            self._frontier(),
            self._cost(),
            self._topology(),
            self._exits(),
            self._gates(),
            self._classes(),
        ]
        if pictures:
            lead = "The surest inputs that left first, and the least sure that went to the end."
            if not self.view.trace.topology.is_chain:
                lead = "Inputs that took each way."
            lead += " Wrong answers are bold."
            parts.append((section("gallery", "Real inputs", tag("p", lead), *pictures), []))
        exits = self.view.trace.topology.exits
        if len(exits) >= 6:  # too many for a heading
            exits = (exits[0], "…", exits[-1])
        name = self.title or " → ".join(exits)
        figures = []
        for _, charts in parts:
            figures += charts
        date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        return frame(
            title=name,
            lead=self._lead(),
            verdict=verdict(self.view),
            warning=self._warning(),
            promise=tables.promise_box(self.view),
            cards=tables.big_figures(self.view),
            sections=join(part for part, _ in parts),
            footer=tables.footer(
                self.view, self.others, version_text(), date, pictured=bool(pictures)
            ),
            figures=figures,
            library=library,
        )

    def _lead(self) -> str:
        """The subject of the page in one sentence."""
        rows = f"{len(self.view.trace):,} rows of {self.view.trace.header.data}"
        if not self.view.trace.topology.is_chain:
            return (
                f"A network with forks, in which every input takes its own path: {rows} under one "
                "plan, compared with the most expensive path, which could answer them all."
            )
        exits = self.view.trace.topology.exits
        count = "one exit"
        if len(exits) > 1:
            count = f"{len(exits)} exits"
        return (
            f"A network with {count}, from which inputs leave early if it is sure about them: "
            f"{rows} under one plan, compared with the plain network, which always runs completely."
        )

    def _warning(self) -> Html:
        if self.view.trace.header.trained:
            return Html()
        return tag(
            "p",
            "An exit of this network was never trained. Its answers mean nothing yet.",
            class_="warning",
        )

    def _frontier(self) -> tuple[Html, list[Figure]]:
        """Quality against cost."""
        view = self.view
        others = [view.dot(name, plan) for name, plan in self.others.items()]
        points = tables.points_table(view, view.dot("this plan", view.plan), others)
        word = f"agreement with {view.plain}"
        if view.labelled:
            word = "accuracy"
        lead = (
            f"Higher is better ({word}), further left is cheaper. The line is the best that a "
            "search finds on these very rows. It shows what is possible here, and promises nothing "
            "for other rows."
        )
        # A trace without costs still has a table of its points.
        if not view.units:
            missing = tag(
                "p", "The trace holds no costs, so there is nothing to compare.", class_="note"
            )
            return section("frontier", "Quality against cost", missing, points), []
        lines = {unit: view.frontier(unit) for unit in view.units}
        figure = chart(
            "frontier-chart",
            f"{word} against mean cost; the table below has the figures",
            tall=True,
        )
        markup = section(
            "frontier", "Quality against cost", tag("p", lead), self._switch(), figure, points
        )
        return markup, [frontier_chart(view, others, lines)]

    def _switch(self) -> Html:
        """Radio buttons for the unit of the cost axis."""
        units = self.view.units
        if not units:
            return tag("p", "This trace has neither MACs nor milliseconds.", class_="note")
        if len(units) < 2:
            return tag(
                "p", "Milliseconds were not measured when the trace was recorded.", class_="note"
            )
        return switch("frontier-chart", "Cost in", list(map(unit_name, units)))

    def _cost(self) -> tuple[Html, list[Figure]]:
        """The costs in every unit."""
        if not self.view.units:
            return Html(), []
        units = self.view.units
        prices = self.view.evaluation.prices
        price = next(price for price in prices if (price.unit, price.batch) in units)
        mean = percent(price.mean / price.plain)
        worst = percent(price.worst / price.plain)
        # With exits on the way, the worst case can cost more than the plain network.
        if price.worst > price.plain:
            lead = (
                f"An input that goes to the end pays for every exit on its way: {worst} of the "
                f"plain network, while the mean is {mean}. If answers must come within a fixed "
                "time, plan with the worst case and not with the mean."
            )
        else:
            lead = f"No input costs more than {worst} of the plain network; the mean is {mean}."
        words = tag("p", lead)
        if price.mean < price.plain <= price.worst:
            title = "The mean falls, the worst case does not"
        else:
            title = "Cost"
        return section("cost", title, words, tables.cost_table(self.view), *self._timings()), []

    def _timings(self) -> list[Html]:
        """A note about what the milliseconds include and how noisy they are."""
        timed = [price for price in self.view.evaluation.prices if price.unit == "ms"]
        if not timed:
            return []
        notes: list[str] = []
        for price in timed:
            if price.note and price.note not in notes:
                notes.append(price.note)
        text = "; ".join(notes)
        noise = self.view.trace.header.noise
        if noise is not None and "differ by" not in text:
            notes.append(f"the same call's timings differ by {percent(noise)}")
        if self.view.trace.prices.with_runner:
            notes.insert(
                0, "milliseconds include the runner; the plain network is its engine's bare call"
            )
        text = "; ".join(notes)
        if text:
            return [tag("p", f"{text[:1].upper()}{text[1:]}.", class_="note")]
        return []

    def _topology(self) -> tuple[Html, list[Figure]]:
        """The ways of the rows through a network with forks; empty without forks."""
        if self.view.trace.topology.is_chain:
            return Html(), []
        lead = (
            "Every box is a segment, a fork or an exit; an arrow is as thick as the share of rows "
            "that took it. Parts that this plan never runs are pale."
        )
        return section(
            "ways",
            "The ways of the rows",
            tag("p", lead),
            picture(self.view),
            ways_table(self.view),
        ), []

    def _exits(self) -> tuple[Html, list[Figure]]:
        """Shares of rows and accuracies by exit."""
        view = self.view
        exits = self.view.trace.topology.exits
        right = view.replay.answer == view.target  # [N]
        here: list[float | None] = []  # accuracy on the rows that leave at an exit
        alone: list[float] = []  # accuracy of an exit on all rows
        for index, name in enumerate(exits):
            leaves = view.replay.exit == index
            if leaves.any():
                here.append(float(right[leaves].mean()))
            else:
                here.append(None)
            alone.append(float((view.trace.answers_at(name) == view.target).mean()))
        lead = "The exits at which rows leave, and how good their answers are there."
        if view.labelled:
            answers = np.column_stack([view.trace.answers_at(name) for name in exits])  # [N, E]
            better = better_exit(answers == view.target[:, None], exits)
            if better is not None:
                lead = f"{lead} {better[0].upper()}{better[1:]}"
        figure = chart("exits-chart", "share of rows by exit; the table below has the figures")
        markup = section(
            "exits", "Exits", tag("p", lead), figure, tables.exits_table(view, here, alone)
        )
        return markup, [exits_chart(view, view.evaluation.shares, here, alone)]

    def _gates(self) -> tuple[Html, list[Figure]]:
        """The reliability of each gate's scores."""
        view = self.view
        bins_by_gate = {}
        for gate in view.trace.topology.gates:
            bins = view.bins(gate)
            if bins:
                bins_by_gate[gate] = bins
        if not bins_by_gate:
            return Html(), []
        if view.labelled:
            does = "how often its exit is right"
        else:
            does = f"how often its exit agrees with {view.plain}"
        lead = (
            "A gate is useful only if a high score means a right answer. All rows are in order of "
            f"their score, and the line shows {does}, with 95% intervals. The shaded rows would "
            "leave here."
        )
        diamonds = ""
        if view.labelled:
            diamonds = f" Diamonds: {view.plain} on the same rows."
        figures = []
        panels = []
        for number, (gate, bins) in enumerate(bins_by_gate.items()):
            name = f"gate-chart-{number}"
            figures.append(gate_chart(view, name, gate, bins))
            figure = chart(
                name, f"reliability of the score of {gate}; the table below has the figures"
            )
            details = folded("As figures", tables.bins_table(view, gate))
            panels.append(tag("div", tag("h3", gate), figure, details, class_="gate"))
        markup = section(
            "gates",
            "Can the scores be trusted?",
            tag("p", lead + diamonds),
            tag("div", *panels, class_="gates"),
        )
        return markup, figures

    def _classes(self) -> tuple[Html, list[Figure]]:
        """Accuracies by class; empty without labels."""
        view = self.view
        worst = self.view.evaluation.worst_class
        if not view.labelled or worst is None:
            return Html(), []
        mine = percent(worst.accuracy)
        plain = percent(worst.plain)
        lead = (
            f"A mean can hide a class that pays for the others. Here {worst.name} loses most: "
            f"{mine} where {view.plain} has {plain}. Classes with few rows move by chance."
        )
        if worst.accuracy >= worst.plain:
            lead = f"No class loses. {worst.name} gains least, from {plain} to {mine}."
        return section("classes", "The worst class", tag("p", lead), tables.class_table(view)), []
