"""The tables of a comparison's page.

A figure is the mean over seeds; the range between them is in brackets below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.comparing.clocks import Clock, each_exit, in_use
from offramp.comparing.comparing import Comparison, Result
from offramp.comparing.costing import ModelTime
from offramp.comparing.figures import Budget
from offramp.reporting.markup import Html, join, table, tag
from offramp.reporting.words import percent, signed

DASH = "–"
Row = tuple[str, ...]


def budgets_table(comparison: Comparison) -> Html:
    """Accuracy within each budget; the best mean of each column is bold."""
    # by label one list per budget, which holds an accuracy per seed
    accuracies = {label: comparison.within(label) for label in comparison.labels()}
    best_means = []
    for index in range(len(comparison.settings.budgets)):
        means = []
        for by_budget in accuracies.values():
            if by_budget[index]:
                means.append(float(np.mean(by_budget[index])))
        best_means.append(max(means, default=None))
    rows: list[Row] = []
    for label, by_budget in accuracies.items():
        cells = []
        for values, best_mean in zip(by_budget, best_means, strict=True):
            is_best = bool(values) and float(np.mean(values)) == best_mean
            cells.append(_spread(values, bold=is_best))
        rows.append((_named(label), *cells))
    return table("accuracy within a budget", _heads(comparison), rows)


def splits_table(comparison: Comparison) -> Html:
    """Accuracy of the first seed over random splits, by budget; empty if none were drawn."""
    rows: list[Row] = []
    has_splits = False
    for label in comparison.labels():
        cells = []
        for budget in comparison.of(label)[0].figures.budgets:
            has_splits = has_splits or bool(budget.over_splits)
            cells.append(_over_splits(budget))
        rows.append((_named(label), *cells))
    if not has_splits:
        return Html()
    caption = (
        f"first seed: median, and 5% to 95% over {comparison.settings.splits} splits of the "
        "same sizes"
    )
    return table(caption, _heads(comparison), rows)


def _over_splits(budget: Budget) -> str:
    """The median over splits with the range from 5 % to 95 % below it."""
    if not budget.over_splits:
        return DASH
    low, median, high = budget.over_splits
    return _with_range(percent(median, 2), f"{100 * low:.2f}", f"{100 * high:.2f}")


def statics_table(comparison: Comparison) -> Html:
    """Networks without exits; empty if there are none."""
    rows = []
    for label in comparison.labels(static=True):
        results = comparison.of(label)
        cost = results[0].figures.plain / comparison.unit
        accuracy = [result.figures.alone[-1] for result in results]
        rows.append((_named(label), percent(cost), _spread(accuracy)))
    if rows:
        return table("static networks", ["", "cost", "accuracy"], rows)
    return Html()


def exits_tables(comparison: Comparison) -> list[Html]:
    """How often each exit is right on all test rows, one table for each set of exits."""
    same_exits: dict[tuple[str, ...], list[str]] = {}
    for label in comparison.leading():
        same_exits.setdefault(comparison.of(label)[0].figures.exits, []).append(label)
    tables = []
    for exits, labels in same_exits.items():
        rows: list[Row] = []
        for label in labels:
            cells = list(map(_spread, _alone(comparison, label)))
            rows.append((_named(comparison.of(label)[0].method), *cells))
        tables.append(table("accuracy of each exit on all test rows", ["", *exits], rows))
    return tables


def _alone(comparison: Comparison, label: str) -> list[tuple[float, ...]]:
    """For each exit its accuracies, one per seed."""
    by_seed = [result.figures.alone for result in comparison.of(label)]
    return list(zip(*by_seed, strict=True))


def shares_table(comparison: Comparison) -> Html:
    """Costs of the plans within the shown budget, and the share of rows that leave at each exit."""
    index = comparison.settings.shown
    rows = []
    for label in comparison.labels():
        point = comparison.of(label)[0].figures.budgets[index].point
        if point is not None:
            shares = " / ".join(f"{100 * share:.0f}" for share in point.shares)
            rows.append(
                (
                    _named(label),
                    percent(point.cost / comparison.unit),
                    percent(point.worst / comparison.unit),
                    shares,
                )
            )
    head = ["", "mean cost", "worst case", "% of rows by exit, shallow to deep"]
    budget = percent(comparison.settings.budgets[index], 0)
    return table(
        f"plans within {budget}, first seed: the mean falls, the worst case does not", head, rows
    )


def certified_table(comparison: Comparison) -> Html:
    """How many seeds have a plan with the promise, what it costs and what it loses on test rows."""
    rows = []
    for label in comparison.labels():
        results = comparison.of(label)
        costs = []
        losses = []  # of accuracy, against the last exit on all rows
        for result in results:
            point = result.figures.certified
            if point is not None:
                costs.append(point.cost / comparison.unit)
                losses.append(result.figures.alone[-1] - point.accuracy)
        loss = DASH
        if losses:
            loss = signed(float(np.mean(losses)))
        with_plan = f"{len(costs)} of {len(results)}"
        rows.append((_named(label), with_plan, _spread(costs, places=1), loss))
    return table(
        "certified plans",
        ["", "seeds with a plan", "cost on test rows", "points lost on test rows"],
        rows,
    )


def clocks_table(comparison: Comparison) -> Html:
    """Milliseconds at batch 1 (the mean over exits) and at batch 64; empty without timings."""
    rows: list[Row] = []
    for label, timed, shares in _timed(comparison):
        for clock in in_use(timed, shares):
            rows.append(_clock_row(label, clock))
    if rows:
        return table("milliseconds per batch", ["", "batch", *CLOCK_HEADS], rows)
    return Html()


def exit_clocks_table(comparison: Comparison) -> Html:
    """Milliseconds at batch 1, exit by exit."""
    rows: list[Row] = []
    for label, timed, _ in _timed(comparison):
        for clock in each_exit(timed):
            # the exit takes the place of the batch in the second column
            _, _, *times = _clock_row(label, clock)
            rows.append((_named(label), clock.exit or DASH, *times))
    return table(
        "milliseconds of one row, by the exit that it leaves at", ["", "exit", *CLOCK_HEADS], rows
    )


def models_table(comparison: Comparison) -> Html:
    """Every model at its cost, alone and with exits on top; empty if all have one model.

    With exits it is the plan within the shown budget: its mean cost, and the time of the plain
    model times the share of it that the plan takes.
    """
    rows: list[Row] = []
    sized = [result for result in comparison.results if result.cost is not None]
    for result in sized:
        cost = result.cost
        assert cost is not None
        figures = result.figures
        accuracy = figures.alone[-1]
        macs = figures.plain
        bits = f"{cost.bit_operations / 1e9:.3g}"
        plan_over_plain: dict[int, float] = {}
        point = None
        if figures.budgets:
            point = figures.budgets[comparison.settings.shown].point
        if not result.static:
            if point is None:  # no plan within the budget
                continue
            accuracy = point.accuracy
            macs = point.cost
            bits = DASH
            if result.timed is not None:
                for clock in in_use(dict(result.timed), point.shares):
                    plan_over_plain[clock.batch] = clock.ratio[0]
        row = [_named(result.method), percent(accuracy, 2), f"{macs / 1e6:.3g}", bits]
        row += [f"{cost.parameters:,}", f"{cost.stored_bytes / 1e3:,.0f}"]
        times = {line.batch: line for line in cost.times}
        for batch in (64, 1):
            row.append(_model_time(times.get(batch), result, plan_over_plain.get(batch)))
        rows.append(tuple(row))
    if not rows or len({result.method for result in sized}) < 2:
        return Html()
    heads = ["", "accuracy", "M MACs", "G bit operations", "parameters", "kB in a file"]
    heads += ["time at batch 64", "time at batch 1"]
    return table("every model at its cost, alone and with exits", heads, rows)


def _model_time(line: ModelTime | None, result: Result, plan_over_plain: float | None) -> str:
    """The time of a model over that of the unit, with its range; with exits that of the plan."""
    if line is None:
        return DASH
    if not result.static:
        if plan_over_plain is None:
            return DASH
        return f"{line.over_unit.value * plan_over_plain:.2f}"
    ratio = line.over_unit
    return _with_range(f"{ratio.value:.2f}", f"{ratio.low:.2f}", f"{ratio.high:.2f}")


CLOCK_HEADS = ("plan", "plain", "plan / plain", "plain / plain")


def _timed(comparison: Comparison) -> list[tuple[str, dict[str, object], tuple[float, ...]]]:
    """Label, report of `bench` and shares of test rows by exit of each timed network."""
    timed = []
    for label in comparison.labels():
        first = comparison.of(label)[0]
        point = first.figures.budgets[comparison.settings.shown].point
        if first.timed is not None and point is not None:
            timed.append((label, dict(first.timed), point.shares))
    return timed


def _clock_row(label: str, clock: Clock) -> Row:
    """A label, a batch and its four times."""
    value, low, high = clock.ratio
    words = f"{value:.3f}"
    if clock.covered < 0.995:  # shown as less than 100 %
        words += f" ({percent(clock.covered, 0)} of rows)"
    ratio = _with_range(words, f"{low:.3f}", f"{high:.3f}")
    return (
        _named(label),
        str(clock.batch),
        f"{clock.run_ms:.2f} ms",
        f"{clock.plain_ms:.2f} ms",
        ratio,
        f"{clock.same:.3f}",
    )


def training_table(comparison: Comparison) -> Html:
    """Seconds of training; empty if nothing was trained."""
    rows = []
    for method in comparison.settings.methods:
        # all gates of a seed share one training, so each seed counts once
        by_seed: dict[int, float | None] = {}
        for result in comparison.results:
            if result.method == method.name:
                by_seed[result.seed] = result.seconds
        seconds = [value for value in by_seed.values() if value is not None]
        if not seconds:
            continue
        words = f"{np.mean(seconds):.1f} s"
        if len(seconds) > 1:
            words = _with_range(words, f"{min(seconds):.1f}", f"{max(seconds):.1f}")
        arguments = " ".join(method.arguments)
        rows.append((_named(method.name), method.recipe or DASH, arguments or DASH, words))
    if rows:
        return table("seconds of training, by seed", ["", "recipe", "with", "seconds"], rows)
    return Html()


def _heads(comparison: Comparison) -> list[str]:
    """The head of a table with one column per budget."""
    heads = [""]
    for budget in comparison.settings.budgets:
        heads.append(f"within {percent(budget, 0)}")
    return heads


def _spread(values: Sequence[float], places: int = 2, *, bold: bool = False) -> str:
    """The mean over seeds, and the range between them."""
    if not values:
        return DASH
    mean = percent(float(np.mean(values)), places)
    if bold:
        mean = tag("b", mean)
    if len(values) == 1:
        return mean
    return _with_range(mean, f"{100 * min(values):.{places}f}", f"{100 * max(values):.{places}f}")


def _with_range(mean: str, low: str, high: str) -> Html:
    """A figure with the ends of its range below it, so that columns stay narrow."""
    return join((mean, tag("br"), tag("span", f"[{low}, {high}]", class_="note whole")))


def _named(label: str) -> Html:
    """A method, and its gate on a line of its own."""
    method, _, gate = label.partition(", ")
    lines = [tag("span", method, class_="whole")]
    if gate:
        lines += [tag("br"), tag("span", gate, class_="note whole")]
    return join(lines)
