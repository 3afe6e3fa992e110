"""The tables of a comparison's page: means over seeds, and in brackets the range between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.comparing.clocks import Clock, each_exit, in_use
from offramp.comparing.comparing import Comparison
from offramp.comparing.figures import Budget
from offramp.reporting.markup import Html, join, table, tag
from offramp.reporting.words import percent, signed

DASH = "–"
Row = tuple[str, ...]


def budgets_table(comparison: Comparison) -> Html:
    """Accuracy within each budget, the best mean of each column in bold."""
    found = {label: comparison.within(label) for label in comparison.labels()}
    tops = []
    for index in range(len(comparison.settings.budgets)):
        tops.append(
            max(
                (float(np.mean(columns[index])) for columns in found.values() if columns[index]),
                default=None,
            )
        )
    rows: list[Row] = []
    for label, columns in found.items():
        best = [
            bool(values) and float(np.mean(values)) == top
            for values, top in zip(columns, tops, strict=True)
        ]
        cells = [_spread(values, bold=bold) for values, bold in zip(columns, best, strict=True)]
        rows.append((_named(label), *cells))
    return table("accuracy within a budget", _heads(comparison), rows)


def splits_table(comparison: Comparison) -> Html:
    """Accuracy within each budget over random splits, of the first seed; nothing where none were
    drawn.
    """
    told = {label: comparison.of(label)[0].figures.budgets for label in comparison.labels()}
    if not any(budget.over_splits for budgets in told.values() for budget in budgets):
        return Html()
    rows = [(_named(label), *map(_over_splits, budgets)) for label, budgets in told.items()]
    caption = (
        f"first seed: median, and 5% to 95% over {comparison.settings.splits} splits of the "
        "same sizes"
    )
    return table(caption, _heads(comparison), rows)


def _over_splits(budget: Budget) -> str:
    if not budget.over_splits:
        return DASH
    low, median, high = budget.over_splits
    return _with_range(percent(median, 2), f"{100 * low:.2f}", f"{100 * high:.2f}")


def statics_table(comparison: Comparison) -> Html:
    """Networks that are not cut; nothing where there are none."""
    rows = []
    for label in comparison.labels(static=True):
        results = comparison.of(label)
        cost = results[0].figures.plain / comparison.unit
        accuracy = [each.figures.alone[-1] for each in results]
        rows.append((_named(label), percent(cost), _spread(accuracy)))
    if rows:
        return table("static networks beside them", ["", "cost", "accuracy"], rows)
    return Html()


def exits_tables(comparison: Comparison) -> list[Html]:
    """How often each exit is right on all test rows: a table for each set of exits."""
    same_exits: dict[tuple[str, ...], list[str]] = {}
    for label in comparison.leading():
        same_exits.setdefault(comparison.of(label)[0].figures.exits, []).append(label)
    return [
        table(
            "accuracy of each exit on all test rows",
            ["", *exits],
            [
                (_named(comparison.of(label)[0].method), *map(_spread, _alone(comparison, label)))
                for label in labels
            ],
        )
        for exits, labels in same_exits.items()
    ]


def _alone(comparison: Comparison, label: str) -> list[tuple[float, ...]]:
    """For each exit its accuracies by seed."""
    return list(zip(*(result.figures.alone for result in comparison.of(label)), strict=True))


def shares_table(comparison: Comparison) -> Html:
    """Mean and worst cost, and who leaves where, of the plans within the budget that is shown."""
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
        pairs = [
            (each.figures.alone[-1], point)
            for each in results
            if (point := each.figures.certified) is not None
        ]
        cost = _spread([point.cost / comparison.unit for _, point in pairs], places=1)
        if pairs:
            lost = signed(float(np.mean([last - point.accuracy for last, point in pairs])))
        else:
            lost = DASH
        rows.append((_named(label), f"{len(pairs)} of {len(results)}", cost, lost))
    return table(
        "certified plans",
        ["", "seeds with a plan", "cost on test rows", "points lost on test rows"],
        rows,
    )


def clocks_table(comparison: Comparison) -> Html:
    """Milliseconds at batch 1, as the mean over the exits that test rows leave at, and at batch
    64.
    """
    rows: list[Row] = []
    for label, timed, shares in _timed(comparison):
        rows += [_clock_row(label, clock) for clock in in_use(timed, shares)]
    if rows:
        return table("milliseconds per batch", ["", "batch", *CLOCK_HEADS], rows)
    return Html()


def exit_clocks_table(comparison: Comparison) -> Html:
    """Milliseconds at batch 1, exit by exit."""
    rows: list[Row] = []
    for label, timed, _ in _timed(comparison):
        for clock in each_exit(timed):
            rows.append((_named(label), clock.exit or DASH, *_clock_row(label, clock)[2:]))
    return table(
        "milliseconds of one row, by the exit that it leaves at", ["", "exit", *CLOCK_HEADS], rows
    )


CLOCK_HEADS = ("plan", "plain", "plan / plain", "plain / plain")


def _timed(comparison: Comparison) -> list[tuple[str, dict[str, object], tuple[float, ...]]]:
    """Label, what bench said, and the shares of test rows by exit, wherever something was timed."""
    found = []
    for label in comparison.labels():
        first = comparison.of(label)[0]
        point = first.figures.budgets[comparison.settings.shown].point
        if first.timed is not None and point is not None:
            found.append((label, dict(first.timed), point.shares))
    return found


def _clock_row(label: str, clock: Clock) -> Row:
    value, low, high = clock.ratio
    told = f"{value:.3f}" + (
        f" ({percent(clock.covered, 0)} of rows)" if clock.covered < 0.995 else ""
    )
    ratio = _with_range(told, f"{low:.3f}", f"{high:.3f}")
    return (
        _named(label),
        str(clock.batch),
        f"{clock.run_ms:.2f} ms",
        f"{clock.plain_ms:.2f} ms",
        ratio,
        f"{clock.same:.3f}",
    )


def training_table(comparison: Comparison) -> Html:
    """Seconds of training; nothing where nothing was trained."""
    rows = []
    for method in comparison.settings.methods:
        each = {one.seed: one.seconds for one in comparison.results if one.method == method.name}
        seconds = [value for value in each.values() if value is not None]
        if seconds:
            ends = f"{min(seconds):.1f}", f"{max(seconds):.1f}"
            told = f"{np.mean(seconds):.1f} s"
            told = told if len(seconds) == 1 else _with_range(told, *ends)
            rows.append(
                (
                    _named(method.name),
                    method.recipe or DASH,
                    " ".join(method.arguments) or DASH,
                    told,
                )
            )
    if rows:
        return table("seconds of training, by seed", ["", "recipe", "with", "seconds"], rows)
    return Html()


def _heads(comparison: Comparison) -> list[str]:
    return ["", *(f"within {percent(budget, 0)}" for budget in comparison.settings.budgets)]


def _spread(values: Sequence[float], places: int = 2, *, bold: bool = False) -> str:
    """The mean over seeds, and the range between them."""
    if not values:
        return DASH
    mean = percent(float(np.mean(values)), places)
    mean = tag("b", mean) if bold else mean
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
