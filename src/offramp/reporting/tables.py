"""The parts of the page that are words, figures and tables."""

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
    """The promise set apart, in words, with what it stands on; or that there is none."""
    promise = view.plan.promise
    fresh = words.freshness(view)
    note = [tag("p", fresh, class_="note")] if fresh else []
    sentence = tag("p", tag("b", "The plan: "), str(view.plan), class_="note")
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
    points = tag("ul", *(tag("li", line) for line in words.assumptions(view.plan, promise)))
    return tag(
        "div",
        tag("h2", "The promise"),
        tag("p", f"{promise.claim}.", class_="claim"),
        tag("p", words.reach(view.plan, promise)),
        tag("p", seen),
        *note,
        sentence,
        folded("What exactly the promise stands on", points),
        class_="promise",
    )


def big_figures(view: View) -> Html:
    """Six figures that say most of it."""
    seen = view.evaluation
    exits = view.trace.topology.exits
    value, unit, interval = words.risk_figure(seen.risk)
    price = next((price for price in seen.prices if (price.unit, price.batch) in view.units), None)
    early = sum(share for index, share in enumerate(seen.shares) if index != view.last)
    labelled = "labelled" if view.labelled else "unlabelled"
    cards = [
        _accuracy_card(view),
        *(_price_cards(price) if price else []),
        _card("Leave early", percent(early), f"the others are answered at {exits[view.last]}"),
        _card(words.risk_title(seen.risk), join([value, tag("small", unit)]), interval),
        _card("Rows", f"{seen.rows:,}", f"{labelled} rows of {view.trace.header.data}"),
    ]
    return tag("div", *cards, class_="cards")


def _card(title: str, value: str, note: str) -> Html:
    figure = tag("p", value, class_="value")
    return tag(
        "div", tag("p", title, class_="name"), figure, tag("p", note, class_="note"), class_="card"
    )


def _accuracy_card(view: View) -> Html:
    seen = view.evaluation
    if seen.accuracy is None or seen.plain_accuracy is None:
        value = percent(view.quality(view.replay.answer), 2)
        return _card(
            "Same answer", value, f"of the rows, as {view.plain} gives; no labels, so no accuracy"
        )
    change = signed(seen.accuracy - seen.plain_accuracy)
    return _card(
        "Accuracy",
        percent(seen.accuracy, 2),
        f"{view.plain} {percent(seen.plain_accuracy, 2)} ({change} points)",
    )


def _price_cards(price: Price) -> list[Html]:
    unit = words.unit_name((price.unit, price.batch))
    worst = price.worst / price.plain
    extra = (
        "more than without exits"
        if worst > 1.0005
        else "as much as without exits"
        if worst > 0.9995
        else "capped"
    )
    return [
        _card("Mean cost", percent(price.mean / price.plain), f"of the plain network in {unit}"),
        _card("Worst case", percent(worst), f"an input that goes to the end: {extra}"),
    ]


def cost_table(view: View) -> Html:
    """Mean, worst and plain cost side by side in every unit."""
    prices = [price for price in view.evaluation.prices if (price.unit, price.batch) in view.units]
    most = max([1.0, *(price.worst / price.plain for price in prices)])
    rows = [
        (
            words.unit_name((price.unit, price.batch)),
            *(
                _bar(words.amount(cost, price.unit), cost / price.plain, most, kind)
                for cost, kind in (
                    (price.mean, "mean"),
                    (price.worst, "worst"),
                    (price.plain, "plain"),
                )
            ),
        )
        for price in prices
    ]
    return table("Cost of one input", ["unit", "mean", "worst case", "plain network"], rows)


def _bar(words_: str, share: float, most: float, kind: str) -> Html:
    fill = tag("span", class_=f"fill {kind}", style=f"width:{100 * share / most:.2f}%")
    said = join([tag("b", percent(share)), tag("span", words_, class_="note")], " ")
    return join([said, tag("span", fill, class_="bar", aria_hidden="true")])


def points_table(view: View, chosen: Dot, others: Sequence[Dot]) -> Html:
    """The marked points of the frontier, as figures."""
    word = "accuracy" if view.labelled else "agreement"
    head = ["", word, *(words.short(unit) for unit in view.units), "how"]
    rows = []
    for dot in (chosen, *others, view.plain_dot(), *view.statics()):
        rows.append(
            (
                dot.name,
                percent(dot.quality, 2),
                *(percent(dot.costs[unit]) for unit in view.units),
                dot.how,
            )
        )
    return table("The marked points as figures, plain network = 100%", head, rows)


def exits_table(view: View, here: Sequence[float | None], all_rows: Sequence[float]) -> Html:
    """Shares and accuracies by exit."""
    word = "accuracy" if view.labelled else "agreement"
    counts = np.bincount(view.replay.exit, minlength=len(all_rows))
    ran = {stage.name for stage in view.replay.schedule if stage.exit}
    rows = []
    for name, share, count, mine, every in zip(
        view.trace.topology.exits, view.evaluation.shares, counts, here, all_rows, strict=True
    ):
        rows.append(
            (
                name if name in ran else f"{name} (closed)",
                _leaves_from(view.plan, name, view),
                percent(share),
                f"{count:,}",
                DASH if mine is None else percent(mine, 2),
                percent(every, 2),
            )
        )
    head = ["exit", "leaves when", "share", "rows", f"{word} of these rows", f"{word} of all rows"]
    return table("Exits as figures", head, rows)


def _leaves_from(plan: Plan, name: str, view: View) -> str:
    closed = name not in view.open_gates and any(
        stage.name == name and stage.last for stage in view.replay.schedule
    )
    if closed:
        return "whatever arrives"
    if name in view.open_gates:
        return f"score ≥ {plan.thresholds[name][0]:.4g}"
    return "never"


def bins_table(view: View, gate: str) -> Html:
    """A gate's bins as figures."""
    word = "right" if view.labelled else "agrees"
    rows = []
    for each in view.bins(gate):
        rows.append(
            (
                f"{each.low:.4g} to {each.high:.4g}",
                f"{each.rows:,}",
                percent(each.right),
                f"{percent(each.interval[0])} to {percent(each.interval[1])}",
                percent(each.reference),
            )
        )
    head = ["score", "rows", f"{gate} {word}", "95% interval", f"{view.reference} {word}"]
    return table(f"Scores of {gate} as figures", head, rows)


def class_rows(view: View) -> list[tuple[str, int, float, float]]:
    """Name, rows, plain accuracy and the plan's, the largest fall first. Raises BadData without
    labels.
    """
    labels = view.trace.labels
    if labels is None:
        raise BadData("the trace has no labels, so no accuracy by class; record labelled rows")
    names = view.trace.header.class_names or ()
    right = view.replay.answer == labels
    plain = view.trace.answers_at(view.reference) == labels
    kinds, index, counts = np.unique(labels, return_inverse=True, return_counts=True)

    def shares(hits: Array) -> Array:
        return np.bincount(index, weights=hits, minlength=len(kinds)) / counts

    told = [names[kind] if 0 <= kind < len(names) else str(kind) for kind in kinds.tolist()]
    found = zip(told, counts.tolist(), shares(plain).tolist(), shares(right).tolist(), strict=True)
    return sorted(found, key=lambda row: row[3] - row[2])


def class_table(view: View) -> Html:
    """Accuracy by class, the largest fall first; a long tail is folded away."""
    rows = []
    for name, count, plain, mine in class_rows(view):
        rows.append(
            (name, f"{count:,}", percent(plain, 1), percent(mine, 1), signed(mine - plain, 1))
        )
    head = ["class", "rows", view.plain, "this plan", "change, points"]
    first = table("Accuracy by class, the largest fall first", head, rows[:CLASSES])
    if len(rows) <= CLASSES:
        return first
    rest = rows[CLASSES:]
    return join(
        [first, folded(f"{len(rest):,} classes more", table("The other classes", head, rest))]
    )


def footer(
    view: View, others: Mapping[str, Plan], version: str, date: str, *, pictured: bool
) -> Html:
    """Where all of it comes from, and how to make it again."""
    header = view.trace.header
    names = view.trace.columns
    origin = header.origin
    kept = any(name.startswith("logits/") for name in names)
    facts = {
        "network": origin.network,
        "engine": f"{origin.engine}, {origin.precision}",
        "exits": ", ".join(view.trace.topology.exits),
        "data": f"{header.data} ({header.data_fingerprint})",
        "trace": f"{len(view.trace):,} rows, {'logits' if kept else 'answers'} kept",
        "plan": f"{Plan.covers(view.plan.thresholds, view.plan.max_exit)}: "
        f"{thresholds_of(view.plan)}",
        **({"other plans": ", ".join(others)} if others else {}),
        "made": f"{date} by offramp {version}",
    }
    items = [part for name, fact in facts.items() for part in (tag("dt", name), tag("dd", fact))]
    again = tag(
        "pre",
        tag(
            "code",
            f"offramp report trace.npz plan.json{_given(header.data) if pictured else ''} -o "
            f"report.html",
        ),
    )
    near = (
        f"{percent(view.evaluation.in_band, 2)} of the rows lie within the float band of a "
        "threshold, where the "
    )
    return join(
        [
            tag("dl", *items),
            tag(
                "p",
                near,
                "last bits of a score decide; there a run at another batch size can differ from "
                "this page.",
            ),
            tag("p", "The same page again, from the saved trace and plan:"),
            again,
        ]
    )


def _given(data: str) -> str:
    """The data as the command line takes it; rows that came as arrays have no such name."""
    try:
        known = ":" in data or specs.parse(data).name in specs.names()
    except InvalidArgument:
        known = False
    return f" --data {shlex.quote(data)}" if known else " --data DATA"
