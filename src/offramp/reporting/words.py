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
    with_sign = f"{100 * change:+.{places}f}".replace("-", "−")
    without_sign = with_sign[1:]
    if float(without_sign) == 0:  # a rounded 0 has no sign
        return without_sign
    return with_sign


def amount(cost: float, unit: str) -> str:
    """A cost per row in its unit, with three digits."""
    if unit == "ms" and cost < 1000:
        return f"{cost:.3g} ms"
    if unit == "ms":  # from 1,000 on .3g would give an exponent
        return f"{cost:,.0f} ms"
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if cost >= size:
            return f"{cost / size:.3g} {name}"
    return f"{cost:.3g}"


def unit_name(unit: Unit) -> str:
    """MACs, or milliseconds with their batch size."""
    kind, batch = unit
    if kind == "macs":
        return "MACs"
    return f"milliseconds at batch {batch}"


def short(unit: Unit) -> str:
    """The unit as the heading of a column."""
    kind, batch = unit
    if kind == "macs":
        return "MACs"
    return f"ms, batch\u00a0{batch}"


def assumptions(plan: Plan, promise: Promise) -> list[str]:
    """The conditions of a promise, a sentence each."""
    source = ""
    if plan.rows:
        source = f" ({plan.rows.data})"
    network = "as it was tested"
    if plan.origin:
        origin = plan.origin
        network = f"{origin.network}, run by {origin.engine} in {origin.precision}"
    order = "in an order fixed beforehand"
    if promise.searched:
        order = f"on candidates found on {promise.searched:,} other rows"
    bound = promise.bound.replace("_", " ")  # a name of Python, such as hoeffding_bentkus
    sentences = [
        f"New inputs must come from the same source as the {promise.rows:,} rows of its "
        f"test{source}, in the same mix. It does not hold for other data.",
        "It is about the average over many inputs, not about each single input and not about each "
        "class.",
        f"It belongs to this network ({network}). Other weights, another engine or another "
        "precision void it.",
        f"{percentage(promise.confidence)} confidence means: if the whole procedure is repeated "
        "with fresh rows, the plan keeps the promise in at least "
        f"{100 * promise.confidence:.12g} of 100 repetitions. Nobody can see whether this one is "
        "an exception.",
        f"It was tested with the {bound} bound on {promise.rows:,} rows, {order}.",
    ]
    for clause in promise.assumed():
        sentences.append(f"{clause[0].upper()}{clause[1:]}.")
    return sentences


def reach(plan: Plan, promise: Promise) -> str:
    """The scope of a promise in one line."""
    source = ""
    if plan.rows:
        source = f" of {plan.rows.data}"
    return (
        f"It holds on average for inputs drawn like the {promise.rows:,} tested rows{source}, for "
        "this network as it was tested. It does not hold for each single input, nor for other data."
    )


def no_promise(plan: Plan) -> str:
    """Why a plan has no promise."""
    if plan.rows:
        how = "It was chosen as the best one under a budget"
    else:
        how = "Its thresholds were set by hand"
    return (
        f"This plan carries no promise. {how}, so the figures on this page describe only these "
        "rows. On other rows they can be better or worse, and it is not known by how much."
    )


def freshness(view: View) -> str | None:
    """Whether the rows of the page helped to choose the plan."""
    if not view.comparable:
        return (
            "Plan and rows were recorded by different editions of offramp, so it is not known "
            "whether these rows helped to choose the plan."
        )
    seen = view.seen_before()
    if seen is None:
        return None
    if not seen:
        return "The plan never saw the rows of this page: they test it fairly."
    allowed = ""
    if view.plan.promise:
        allowed = "; the promise already allows for that"
    subject = f"{seen:,} of the {len(view.trace):,} rows"
    if seen == len(view.trace):
        subject = "All rows"
    return (
        f"{subject} of this page helped to choose this plan, so the figures here flatter it a "
        f"little{allowed}."
    )


def risk_title(measured: Measured) -> str:
    """A risk as the title of a figure."""
    if measured.risk == "accuracy_gap" and measured.value < 0:
        return "Accuracy gained"
    titles = {
        "accuracy_gap": "Accuracy lost",
        "disagreement": "Disagreement",
        "error": "Wrong answers",
    }
    return titles.get(measured.risk, measured.risk)


def risk_figure(measured: Measured) -> tuple[str, str, str]:
    """A risk, its unit, and its interval in words."""
    interval = f"{percentage(measured.confidence)} interval"
    against = f"; against {alone(measured.reference)}"
    value = measured.value
    low = measured.low
    high = measured.high
    if measured.risk == "accuracy_gap":
        if value < 0:  # the title is "Accuracy gained", so the figures change their signs
            value = -measured.value
            low = -measured.high
            high = -measured.low
        words = f"{interval} {_points(low)} to {_points(high)}{against}"
        return _points(value), " points", words
    if measured.risk == "disagreement":
        words = f"{interval} {percent(low, 2)} to {percent(high, 2)}{against}"
        return percent(value, 2), "", words
    if measured.risk == "error":  # it has no reference
        return percent(value, 2), "", f"{interval} {percent(low, 2)} to {percent(high, 2)}"
    return f"{value:.4g}", "", f"{interval} {low:.4g} to {high:.4g}"


def _points(change: float) -> str:
    """0.0123 as 1.23, with a real minus sign."""
    return f"{100 * change:.2f}".replace("-", "−")


def verdict(view: View) -> str:
    """The result in one line: cost, quality, and what is certified."""
    evaluation = view.evaluation
    cost = ""
    prices = [price for price in evaluation.prices if (price.unit, price.batch) in view.units]
    if prices:
        share = prices[0].mean / prices[0].plain
        cost = f"At {percent(share)} of the cost of {view.plain}, "
    if evaluation.accuracy is not None and evaluation.plain_accuracy is not None:
        quality = (
            f"the accuracy is {percent(evaluation.accuracy, 2)} instead of "
            f"{percent(evaluation.plain_accuracy, 2)}."
        )
    else:
        quality = (
            f"{percent(view.quality(view.replay.answer), 2)} of the answers are those of "
            f"{view.plain}."
        )
    # One sentence for figures, one for the promise; a sentence begins with a capital.
    line = f"{cost}{quality}"
    promise = view.plan.promise
    if promise is None:
        certified = "Nothing is certified."
    else:
        certified = f"Certified: {promise.claim[0].lower()}{promise.claim[1:]}."
    return f"{line[0].upper()}{line[1:]} {certified}"
