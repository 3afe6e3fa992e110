"""The parts of a report that are words, figures and tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from offramp.data import specs
from offramp.errors import BadData, InvalidArgument
from offramp.plans.evaluation import Array
from offramp.plans.plan import Plan, Price
from offramp.reporting import words
from offramp.reporting.markup import Html, folded, join, table, tag
from offramp.reporting.view import Dot, View, thresholds_of
from offramp.reporting.words import percent, signed

CLASSES = 25  # rows of the class table before the rest is folded away
DASH = "–"


def promise_box(view: View) -> Html:
    """A box with the promise in words and its assumptions, or with the reason why there is none."""
    promise = view.plan.promise
    freshness = words.freshness(view)
    note = []
    if freshness:
        note.append(tag("p", freshness, class_="note"))
    sentence = tag("p", tag("b", "The plan: "), str(view.plan), class_="note")
    # Without a promise the box shows how to get one.
    if promise is None:
        ask = tag(
            "code",
            'plan = offramp.calibrate(trace, risk="disagreement", at_most=0.02, confidence=0.95)',
        )
        return tag(
            "div",
            tag("h2", "No promise"),
            tag("p", words.no_promise(view.plan), class_="claim"),
            tag("p", "A plan with a promise, from labelled or unlabelled rows: ", ask),
            *note,
            sentence,
            class_="promise none",
        )
    measured = view.evaluation.risk
    value, unit, interval = words.risk_figure(measured)
    seen = (
        f"Measured on the {view.evaluation.rows:,} rows of this page: {value}{unit} ({interval})."
    )
    if view.evaluation.repeated:
        seen += (
            f" {view.evaluation.repeated:,} of the rows repeat others, which the interval "
            "counts once."
        )
    assumptions = [tag("li", line) for line in words.assumptions(view.plan, promise)]
    return tag(
        "div",
        tag("h2", "The promise"),
        tag("p", f"{promise.claim}.", class_="claim"),
        tag("p", words.reach(view.plan, promise)),
        tag("p", seen),
        *note,
        sentence,
        folded("What exactly the promise stands on", tag("ul", *assumptions)),
        class_="promise",
    )


def big_figures(view: View) -> Html:
    """The six most important figures, a card each."""
    evaluation = view.evaluation
    cards = [_accuracy_card(view)]
    prices = _known_prices(view)
    if prices:
        cards += _price_cards(prices[0])
    early = 0.0
    for index, share in enumerate(evaluation.shares):
        if index != view.last:
            early += share
    last_exit = view.trace.topology.exits[view.last]
    cards.append(_card("Leave early", percent(early), f"the others are answered at {last_exit}"))
    value, unit, interval = words.risk_figure(evaluation.risk)
    figure = join([value, tag("small", unit)])
    cards.append(_card(words.risk_title(evaluation.risk), figure, interval))
    labelled = "unlabelled"
    if view.labelled:
        labelled = "labelled"
    source = f"{labelled} rows of {view.trace.header.data}"
    cards.append(_card("Rows", f"{evaluation.rows:,}", source))
    return tag("div", *cards, class_="cards")


def _known_prices(view: View) -> list[Price]:
    """The prices in units for which the trace holds costs."""
    return [price for price in view.evaluation.prices if (price.unit, price.batch) in view.units]


def _card(title: str, value: str, note: str) -> Html:
    """A figure with its name above and a note below."""
    figure = tag("p", value, class_="value")
    return tag(
        "div", tag("p", title, class_="name"), figure, tag("p", note, class_="note"), class_="card"
    )


def _accuracy_card(view: View) -> Html:
    """The accuracy and its change, or without labels the agreement with the plain network."""
    evaluation = view.evaluation
    if evaluation.accuracy is None or evaluation.plain_accuracy is None:
        value = percent(view.quality(view.replay.answer), 2)
        return _card(
            "Same answer", value, f"of the rows, as {view.plain} gives; no labels, so no accuracy"
        )
    change = signed(evaluation.accuracy - evaluation.plain_accuracy)
    return _card(
        "Accuracy",
        percent(evaluation.accuracy, 2),
        f"{view.plain} {percent(evaluation.plain_accuracy, 2)} ({change} points)",
    )


def _price_cards(price: Price) -> list[Html]:
    """Two cards: the mean cost and the worst case, as shares of the plain network."""
    unit = words.unit_name((price.unit, price.batch))
    worst = price.worst / price.plain
    # figures have one place after the point, so 99.95 % to 100.05 % count as equal
    if worst > 1.0005:
        extra = "more than without exits"
    elif worst > 0.9995:
        extra = "as much as without exits"
    else:
        extra = "capped"
    return [
        _card("Mean cost", percent(price.mean / price.plain), f"of the plain network in {unit}"),
        _card("Worst case", percent(worst), f"an input that goes to the end: {extra}"),
    ]


def cost_table(view: View) -> Html:
    """Mean, worst and plain cost side by side in every unit."""
    prices = _known_prices(view)
    # the longest bar of the table; all others are drawn as shares of it
    most = 1.0
    for price in prices:
        most = max(most, price.worst / price.plain)
    rows = []
    for price in prices:
        bars = []
        costs = {"mean": price.mean, "worst": price.worst, "plain": price.plain}
        for kind, cost in costs.items():
            bars.append(_bar(words.amount(cost, price.unit), cost / price.plain, most, kind))
        rows.append((words.unit_name((price.unit, price.batch)), *bars))
    return table("Cost of one input", ["unit", "mean", "worst case", "plain network"], rows)


def _bar(amount: str, share: float, most: float, kind: str) -> Html:
    """A share of the plain cost with its amount, and a bar below them."""
    fill = tag("span", class_=f"fill {kind}", style=f"width:{100 * share / most:.2f}%")
    figures = join([tag("b", percent(share)), tag("span", amount, class_="note")], " ")
    return join([figures, tag("span", fill, class_="bar", aria_hidden="true")])


def points_table(view: View, chosen: Dot, others: Sequence[Dot]) -> Html:
    """The marked points of the frontier, as figures."""
    head = ["", view.word, *map(words.short, view.units), "how"]
    rows = []
    for dot in (chosen, *others, view.plain_dot(), *view.statics()):
        costs = [percent(dot.costs[unit]) for unit in view.units]
        rows.append((dot.name, percent(dot.quality, 2), *costs, dot.how))
    return table("The marked points as figures, plain network = 100%", head, rows)


def exits_table(view: View, here: Sequence[float | None], all_rows: Sequence[float]) -> Html:
    """Shares and accuracies by exit.

    Args:
        view: a trace under a plan.
        here: accuracy of each exit on the rows that leave there [E]; None where none do.
        all_rows: accuracy of each exit on all rows [E].
    """
    counts = np.bincount(view.replay.exit, minlength=len(all_rows))  # [E]
    ran = {stage.name for stage in view.replay.schedule if stage.exit}
    rows = []
    for index, name in enumerate(view.trace.topology.exits):
        shown = name
        if name not in ran:
            shown = f"{name} (closed)"
        right_here = here[index]
        quality_here = DASH
        if right_here is not None:
            quality_here = percent(right_here, 2)
        rows.append(
            (
                shown,
                _leaves_from(view.plan, name, view),
                percent(view.evaluation.shares[index]),
                f"{counts[index]:,}",
                quality_here,
                percent(all_rows[index], 2),
            )
        )
    word = view.word
    head = ["exit", "leaves when", "share", "rows", f"{word} of these rows", f"{word} of all rows"]
    return table("Exits as figures", head, rows)


def _leaves_from(plan: Plan, name: str, view: View) -> str:
    """The condition under which a row leaves at an exit, in words."""
    if name in view.open_gates:
        return f"score ≥ {plan.thresholds[name][0]:.4g}"
    # an exit without an open gate takes rows only if it is the last to run
    for stage in view.replay.schedule:
        if stage.name == name and stage.last:
            return "whatever arrives"
    return "never"


def bins_table(view: View, gate: str) -> Html:
    """The bins of the scores of a gate as figures."""
    word = "agrees"
    if view.labelled:
        word = "right"
    rows = []
    for bin_ in view.bins(gate):
        low, high = bin_.interval
        rows.append(
            (
                f"{bin_.low:.4g} to {bin_.high:.4g}",
                f"{bin_.rows:,}",
                percent(bin_.right),
                f"{percent(low)} to {percent(high)}",
                percent(bin_.reference),
            )
        )
    head = ["score", "rows", f"{gate} {word}", "95% interval", f"{view.reference} {word}"]
    return table(f"Scores of {gate} as figures", head, rows)


def class_rows(view: View) -> list[tuple[str, int, float, float]]:
    """The accuracy of every class.

    Returns:
        For each class its name, its rows, the accuracy of the plain network and that of the plan;
        the largest fall first.

    Raises:
        BadData: the trace has no labels.
    """
    labels = view.trace.labels
    if labels is None:
        raise BadData("The trace has no labels, so no accuracy by class. Record labelled rows")
    names = view.trace.header.class_names or ()
    right = view.replay.answer == labels
    plain = view.trace.answers_at(view.reference) == labels
    # The classes that occur [K], the index of each row's class [N], and their rows [K].
    kinds, index, counts = np.unique(labels, return_inverse=True, return_counts=True)

    def shares(hits: Array) -> Array:
        """Hits [N] -> the share of hits in each class [K], K classes that occur."""
        return np.bincount(index, weights=hits, minlength=len(kinds)) / counts

    class_names = []
    for kind in kinds.tolist():
        if 0 <= kind < len(names):
            class_names.append(names[kind])
        else:
            class_names.append(str(kind))
    rows = zip(
        class_names,
        counts.tolist(),
        shares(plain).tolist(),
        shares(right).tolist(),
        strict=True,
    )
    return sorted(rows, key=lambda row: row[3] - row[2])


def class_table(view: View) -> Html:
    """Accuracy by class, the largest fall first; a long tail is folded away."""
    rows = []
    for name, count, plain, planned in class_rows(view):
        change = signed(planned - plain, 1)
        rows.append((name, f"{count:,}", percent(plain, 1), percent(planned, 1), change))
    head = ["class", "rows", view.plain, "this plan", "change, points"]
    first = table("Accuracy by class, the largest fall first", head, rows[:CLASSES])
    if len(rows) <= CLASSES:
        return first
    rest = rows[CLASSES:]
    others = table("The other classes", head, rest)
    return join([first, folded(f"{len(rest):,} classes more", others)])


def footer(
    view: View, others: Mapping[str, Plan], version: str, date: str, *, pictured: bool
) -> Html:
    """Where the figures of the page come from, and the command that makes it again.

    Args:
        view: a trace under a plan.
        others: further plans on the page, by name.
        version: of offramp.
        date: of the page.
        pictured: whether the page shows inputs, which the command needs the data for.
    """
    header = view.trace.header
    origin = header.origin
    outputs = "answers"
    for name in view.trace.columns:
        if name.startswith("logits/"):
            outputs = "logits"
    facts = {
        "network": origin.network,
        "engine": f"{origin.engine}, {origin.precision}",
        "exits": ", ".join(view.trace.topology.exits),
        "data": f"{header.data} ({header.data_fingerprint})",
        "trace": f"{len(view.trace):,} rows, {outputs} kept",
        "plan": f"{Plan.covers(view.plan.thresholds, view.plan.max_exit)}: "
        f"{thresholds_of(view.plan)}",
    }
    if others:
        facts["other plans"] = ", ".join(others)
    facts["made"] = f"{date} by offramp {version}"
    items = []
    for name, fact in facts.items():
        items += [tag("dt", name), tag("dd", fact)]
    data = ""
    if pictured:
        data = _data_option(header.data)
    command = f"offramp report trace.npz plan.json{data} -o report.html"
    again = tag("pre", tag("code", command))
    near = (
        f"{percent(view.evaluation.in_band, 2)} of the rows are within the float band of a "
        "threshold, where the last bits of a score decide. There a run at another batch size can "
        "differ from this page."
    )
    return join(
        [
            tag("dl", *items),
            tag("p", near),
            tag("p", "The same page again, from the saved trace and plan:"),
            again,
        ]
    )


def _data_option(data: str) -> str:
    """The data as an option of the command line; a placeholder for rows that came as arrays."""
    # Rows that came as arrays have a name that is not a spec.
    try:
        known = ":" in data or specs.parse(data).name in specs.names()
    except InvalidArgument:
        known = False
    if known:
        return f" --data {shlex.quote(data)}"
    return " --data DATA"
