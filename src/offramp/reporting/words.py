"""Figures and promises in words that need no statistics."""

from __future__ import annotations

from offramp._support.arguments import percentage
from offramp.plans.evaluation import Measured
from offramp.plans.plan import Plan, Promise, alone
from offramp.reporting.view import Unit, View


def percent(share: float, places: int = 1) -> str:
    """0.4129 as 41.3%, with a real minus sign."""
    return f"{100 * share:.{places}f}%".replace("-", "−")


def signed(change: float, places: int = 2) -> str:
    """A change of a share, in percentage points with its sign."""
    told = f"{100 * change:+.{places}f}".replace("-", "−")
    return told[1:] if float(told[1:]) == 0 else told


def amount(cost: float, unit: str) -> str:
    """A cost per row in its unit, with three digits."""
    if unit == "ms":
        return f"{cost:.3g} ms" if cost < 1000 else f"{cost:,.0f} ms"
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if cost >= size:
            return f"{cost / size:.3g} {name}"
    return f"{cost:.3g}"


def unit_name(unit: Unit) -> str:
    """MACs, or milliseconds with their batch size."""
    return "MACs" if unit[0] == "macs" else f"milliseconds at batch {unit[1]}"


def short(unit: Unit) -> str:
    """The unit as the heading of a column."""
    return "MACs" if unit[0] == "macs" else f"ms, batch\u00a0{unit[1]}"


def assumptions(plan: Plan, promise: Promise) -> list[str]:
    """What must hold for the promise, a sentence each."""
    source = f" ({plan.rows.data})" if plan.rows else ""
    origin = plan.origin
    if origin:
        mine = f"{origin.network}, run by {origin.engine} in {origin.precision}"
    else:
        mine = "as it was tested"
    if promise.searched:
        found = f"on candidates found on {promise.searched:,} other rows"
    else:
        found = "in an order fixed beforehand"
    return [
        f"New inputs must come from the same source as the {promise.rows:,} rows of its "
        f"test{source}, in the same mix. "
        "About other data it says nothing.",
        "It speaks of the average over many inputs, not of each single input and not of each "
        "class.",
        f"It belongs to this network ({mine}). Other weights, another engine or another precision "
        f"void it.",
        f"{percentage(promise.confidence)} confidence means: whoever repeats the whole procedure "
        f"with fresh rows gets "
        f"a plan that keeps the promise in at least {100 * promise.confidence:.12g} of 100 "
        f"repetitions. Whether this "
        "one is an exception cannot be seen.",
        f"It was tested with the {promise.bound.replace('_', ' ')} bound on {promise.rows:,} "
        f"rows, {found}.",
        *(f"{clause[0].upper()}{clause[1:]}." for clause in promise.assumed()),
    ]


def reach(plan: Plan, promise: Promise) -> str:
    """In one line, what the promise is about and what not."""
    source = f" of {plan.rows.data}" if plan.rows else ""
    return (
        f"It holds on average for inputs drawn like the {promise.rows:,} tested rows{source}, for "
        f"this network as it "
        "was tested. It does not hold for each single input, nor for other data."
    )


def no_promise(plan: Plan) -> str:
    """Why a plan has no promise."""
    if plan.rows:
        how = "It was chosen as the best one under a budget"
    else:
        how = "Its thresholds were set by hand"
    return (
        f"This plan carries no promise. {how}, so the figures on this page describe these rows "
        f"and nothing more: on "
        "other rows they can be better or worse, and nothing says by how much."
    )


def freshness(view: View) -> str | None:
    """Whether the rows of the page helped to choose the plan."""
    if not view.comparable:
        return (
            "Plan and rows were recorded by different editions of offramp, so it cannot be told "
            "whether these rows "
            "helped to choose the plan."
        )
    seen = view.seen_before()
    if seen is None:
        return None
    if not seen:
        return "The plan never saw the rows of this page: they test it fairly."
    allowed = "; the promise already allows for that" if view.plan.promise else ""
    if seen == len(view.trace):
        who = "All rows"
    else:
        who = f"{seen:,} of the {len(view.trace):,} rows"
    return (
        f"{who} of this page helped to choose this plan, so the figures here flatter it a "
        f"little{allowed}."
    )


def risk_title(measured: Measured) -> str:
    """A risk as the title of a figure."""
    titles = {
        "accuracy_gap": "Accuracy gained" if measured.value < 0 else "Accuracy lost",
        "disagreement": "Disagreement",
        "error": "Wrong answers",
    }
    return titles.get(measured.risk, measured.risk)


def risk_figure(measured: Measured) -> tuple[str, str, str]:
    """A risk, its unit, and its interval in words."""
    sure = f"{percentage(measured.confidence)} interval"
    values = (measured.value, measured.low, measured.high)
    if measured.risk == "accuracy_gap":
        if measured.value < 0:  # the title says "gained"
            values = (-measured.value, -measured.high, -measured.low)
        value, low, high = (f"{100 * number:.2f}".replace("-", "−") for number in values)
        return value, " points", f"{sure} {low} to {high}; against {alone(measured.reference)}"
    if measured.risk in ("disagreement", "error"):
        value, low, high = (percent(number, 2) for number in values)
        if measured.risk == "disagreement":
            versus = f"; against {alone(measured.reference)}"
        else:
            versus = ""
        return value, "", f"{sure} {low} to {high}{versus}"
    return f"{measured.value:.4g}", "", f"{sure} {measured.low:.4g} to {measured.high:.4g}"


def verdict(view: View) -> str:
    """The result in one line: cost, quality, and what is certified."""
    seen = view.evaluation
    price = next((price for price in seen.prices if (price.unit, price.batch) in view.units), None)
    if price:
        cost = f"At {percent(price.mean / price.plain)} of the cost of {view.plain}, "
    else:
        cost = ""
    if seen.accuracy is not None and seen.plain_accuracy is not None:
        quality = (
            f"the accuracy is {percent(seen.accuracy, 2)} instead of "
            f"{percent(seen.plain_accuracy, 2)}."
        )
    else:
        quality = (
            f"{percent(view.quality(view.replay.answer), 2)} of the answers are those of "
            f"{view.plain}."
        )
    line = f"{cost}{quality}"
    promise = view.plan.promise
    if promise is None:
        certified = "Nothing is certified."
    else:
        certified = f"Certified: {promise.claim[0].lower()}{promise.claim[1:]}."
    return f"{line[0].upper()}{line[1:]} {certified}"
