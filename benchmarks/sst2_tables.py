"""The tables of benchmarks/sst2.py."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: dict[str, Any], console: Console) -> None:
    """The tables of what was measured."""
    if "figures" in results:
        show_figures(results["figures"], console)
    if "timings" in results:
        title = (
            f"Wall-clock, ragged batches, {results['threads']} threads: mean over batches, "
            "[90 % interval]"
        )
        table = Table(
            "engine, plan",
            "batch",
            "plain ms",
            "run ms",
            "run/plain",
            "plain/plain",
            "MACs",
            title=title,
        )
        for name, one in results["timings"].items():
            for size in ("1", "32"):
                line = one[size]
                cells = (
                    f"{line[key][0]:.3f} [{line[key][1]:.3f}, {line[key][2]:.3f}]"
                    for key in ("run/plain", "plain/plain")
                )
                table.add_row(
                    name,
                    size,
                    f"{line['plain_ms']:.2f}",
                    f"{line['run_ms']:.2f}",
                    *cells,
                    f"{one['macs']:.3f}",
                )
        console.print(table)
        for name, one in results["timings"].items():
            console.print(f"{name}: run beside the replay: {one['replay']}")


def show_figures(found: dict[str, Any], console: Console) -> None:
    """Exits and networks, promises, plans within budgets."""
    table = Table(
        "answers by",
        "cost",
        "accuracy, all 872",
        "accuracy, second half",
        title="Exits, and networks alone",
    )
    named = {f"exit {name}": one for name, one in found["exits"].items()}
    for name, one in (
        named | {f"{layers} layers, trained alone": one for layers, one in found["static"].items()}
    ).items():
        table.add_row(name, f"{one['cost']:.3f}", f"{one['all']:.1%}", f"{one['test']:.1%}")
    console.print(table)
    title = (
        "Promises: first half calibrates, second is measured; median [5 %, 95 %] over random halves"
    )
    table = Table(
        "promise",
        "cost",
        "worst",
        "accuracy",
        "leave",
        "certified",
        "cost, halves",
        "accuracy",
        "above",
        title=title,
    )
    for row in found["promises"]:
        fixed = row["fixed"]
        leave = "/".join(f"{share:.0%}" for share in row["fixed"]["shares"])
        spread = [
            f"{row[name][1]:.3f} [{row[name][0]:.3f}, {row[name][2]:.3f}]"
            for name in ("cost", "accuracy")
        ]
        cost = f"{fixed['cost']:.3f}" if fixed["certified"] else "NoSafePlan"
        cells = (
            cost,
            f"{fixed['worst']:.3f}",
            f"{fixed['accuracy']:.1%}",
            leave,
            f"{row['certified']:.0%}",
        )
        asked = f"{row['risk']} <= {row['at_most']:g}"
        table.add_row(asked, *cells, *spread, f"{row['above the level on the other half']:.0%}")
    console.print(table)
    table = Table(
        "budget",
        "cost",
        "accuracy",
        "disagreement",
        "leave",
        title="Best within a budget, no promise: second half",
    )
    for budget, one in found["budgets"].items():
        leave = "/".join(f"{share:.0%}" for share in one["shares"])
        table.add_row(
            f"{budget}",
            f"{one['cost']:.3f}",
            f"{one['accuracy']:.1%}",
            f"{one['disagreement']:.1%}",
            leave,
        )
    console.print(table)
