"""The page, its tables, its curves and its CSV files, from made-up figures."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_up import NASTY, bench, comparison
from offramp.comparing import tables
from offramp.comparing.clocks import each_exit, in_use
from offramp.comparing.comparing import Comparison
from offramp.comparing.curves import KINDS, averaged, trade_off_chart
from offramp.comparing.page import write_page
from offramp.comparing.spreadsheets import write_spreadsheets
from offramp.errors import BadFile

pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def found() -> Comparison:
    return comparison()


@pytest.fixture(scope="module")
def page(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(found, tmp_path_factory.mktemp("page") / "index.html")


def cells(table: str) -> list[list[str]]:
    """The cells of a table's rows as plain text."""
    rows = []
    for row in re.findall(r"<tr>(.*?)</tr>", table):
        texts = []
        for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row):
            texts.append(re.sub(r"<[^>]*>", " ", cell).strip())
        rows.append(texts)
    return rows


def written(comparison: Comparison, path: Path) -> str:
    """The text of a comparison's page."""
    return write_page(comparison, path).read_text(encoding="utf-8")


def test_the_page_is_whole_and_escaped(page: str) -> None:
    for name in ("budgets", "curves", "knowing", "first-exit", "certified", "clocks", "training"):
        assert f'<section id="{name}"' in page
    body = page[: page.index('id="figures"')]
    assert escape(NASTY) in body
    assert NASTY not in body
    assert not re.search("https?:", body)
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page)[0])
    assert [figure["id"] for figure in figures] == ["trade-off", "leaving"]


def test_what_was_not_asked_for_has_no_section(tmp_path: Path) -> None:
    plain = comparison(1, 1, ("own",), at_most=None, splits=0)
    results = [replace(result, timed=None, seconds=None) for result in plain.results]
    untimed = replace(plain, results=tuple(results))
    page = written(untimed, tmp_path / "p.html")
    for name in ("certified", "clocks", "training"):
        assert f'<section id="{name}"' not in page
    assert "random splits" not in page
    names = [path.name for path in write_spreadsheets(untimed, tmp_path)]
    assert sorted(names) == ["curves.csv", "results.csv"]


def test_a_page_that_cannot_be_written(found: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="cannot write"):
        write_page(found, tmp_path / "file" / "index.html")


def test_the_best_mean_of_a_column_is_bold(found: Comparison) -> None:
    table = tables.budgets_table(found)
    assert table.count("<b>") == len(found.settings.budgets)
    last = found.within("method-1")[-1]
    assert f"<b>{100 * np.mean(last):.2f}%</b>" in table
    assert f"[{100 * min(last):.2f}, {100 * max(last):.2f}]" in table


def test_curves_stand_for_all_labels_and_static_networks_in_every_plot(found: Comparison) -> None:
    choices = trade_off_chart(found)["choices"]
    assert len(choices) == len(KINDS) == 3
    for choice in choices:
        lines = {}
        bands = []
        for line in choice["data"]:
            if "name" in line:
                lines[line["name"]] = line
            if line.get("fill") == "toself":
                bands.append(line)
        assert {"method-0", "method-1", "smaller", "larger", "method-0's last exit"} <= lines.keys()
        assert lines["method-0"]["visible"] is True
        assert lines[f"method-0, {escape(NASTY)}"]["visible"] == "legendonly"
        assert len(bands) == 4
        assert lines["smaller"]["x"] == [3 / 9]


def test_curves_are_means_over_seeds_with_the_range_between_them(found: Comparison) -> None:
    results = found.of("method-0")
    curve = averaged(results, "anytime", found.unit)
    by_seed = []
    cheapest = []
    for result in results:
        by_seed.append([point.accuracy for point in result.figures.anytime])
        cheapest.append(result.figures.frontier[0].cost)
    accuracies = np.array(by_seed)  # [seeds, exits]
    np.testing.assert_allclose(curve.mean, accuracies.mean(0))
    np.testing.assert_allclose(curve.least, accuracies.min(0))
    np.testing.assert_allclose(curve.largest, accuracies.max(0))

    frontier = averaged(results, "exact frontier", found.unit)
    assert (frontier.least <= frontier.mean + 1e-12).all()
    assert (frontier.mean <= frontier.largest + 1e-12).all()
    assert frontier.cost[0] == max(cheapest) / found.unit

    one_seed = averaged(results[:1], "exact frontier", found.unit)
    costs = [point.cost / found.unit for point in results[0].figures.frontier]
    assert one_seed.cost.tolist() == costs


def test_the_batch_of_one_is_the_mean_over_the_exits_of_test_rows() -> None:
    timed = bench(("a", "b", "c"))
    mean, many = in_use(timed, (0.5, 0.3, 0.2))
    assert (mean.batch, mean.exit, many.batch) == (1, None, 64)
    assert mean.run_ms == pytest.approx(0.5 * 1 + 0.3 * 2 + 0.2 * 3)
    assert mean.ratio == pytest.approx(
        (mean.run_ms / 5, mean.run_ms / 5 - 0.1, mean.run_ms / 5 + 0.1)
    )
    assert (mean.plain_ms, mean.covered, many.run_ms) == pytest.approx((5.0, 1.0, 3.0))
    assert [clock.exit for clock in each_exit(timed)] == ["a", "b", "c"]


def test_the_ratio_of_a_mean_is_that_of_its_milliseconds() -> None:
    timed = bench(("a", "b"))
    timed["lines"][1] |= {"plain_ms": 10.0, "over_plain": {"value": 0.2, "low": 0.2, "high": 0.2}}
    mean, _ = in_use(timed, (0.5, 0.5))
    assert mean.ratio[0] == pytest.approx(mean.run_ms / mean.plain_ms) == pytest.approx(0.2)


def test_exits_that_no_timed_row_left_at_are_told() -> None:
    timed = bench(("a", "b"))
    # No row of the timed batch left at b.
    timed["lines"] = [line for line in timed["lines"] if line["left"] != [0, 1]]
    mean, _ = in_use(timed, (0.6, 0.4))
    assert (mean.run_ms, mean.covered) == (1.0, 0.6)
    assert [clock.batch for clock in in_use(timed, (0.0, 1.0))] == [64]


def test_clocks_are_of_a_methods_first_gate_alone(found: Comparison) -> None:
    rows = cells(tables.clocks_table(found))[1:]
    assert [row[:2] for row in rows] == [
        ["method-0", "1"],
        ["method-0", "64"],
        ["method-1", "1"],
        ["method-1", "64"],
    ]
    assert len(cells(tables.exit_clocks_table(found))) == 1 + 2 * 3


def test_seconds_are_told_once_for_each_seed(found: Comparison) -> None:
    assert cells(tables.training_table(found))[1][-1].split() == ["10.5", "s", "[10.0,", "11.0]"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a CSV file."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def test_spreadsheets_say_what_the_page_says(found: Comparison, tmp_path: Path) -> None:
    read: dict[str, list[dict[str, Any]]] = {}
    for path in write_spreadsheets(found, tmp_path):
        read[path.stem] = lines_of(path)

    accuracies = []  # under the network's own gate, by seed
    aims_of_statics = set()
    for line in read["results"]:
        if line["static"] == "True":
            aims_of_statics.add(line["aim"])
        if line["aim"] != "budget 0.75" or line["method"] != "method-1":
            continue
        if line["gate"] == "own":
            accuracies.append(float(line["accuracy"]))
        assert float(line["cost"]) * found.unit == pytest.approx(float(line["macs"]))
        assert sum(map(float, line["shares"].split("/"))) == pytest.approx(1, abs=1e-3)
        assert bool(line["splits_median"]) == (line["seed"] == "0")
    assert accuracies == found.within("method-1")[2]
    assert aims_of_statics == {"static"}
    assert {line["curve"] for line in read["curves"]} == set(KINDS)
    assert [line["exit"] for line in read["clocks"][:5]] == ["mean", "", "small", "middle", "large"]


def test_a_budget_that_nobody_meets_is_a_dash(tmp_path: Path) -> None:
    dear = comparison(1, 1, ("own",), budgets=(0.01, 1.0), splits=2)
    assert dear.within("method-0")[0] == []
    assert cells(tables.budgets_table(dear))[1][1] == tables.DASH
    assert cells(tables.splits_table(dear))[1][1] == tables.DASH
    (path, *_) = write_spreadsheets(dear, tmp_path)
    line = lines_of(path)[0]
    assert (line["aim"], line["accuracy"], line["shares"]) == ("budget 0.01", "", "")


def test_the_plain_network_is_that_of_a_method_that_was_cut(found: Comparison) -> None:
    """Also if a static network of the same model comes first, from which others start."""
    *cut, static, other = found.results
    first = replace(static, figures=replace(static.figures, plain=found.unit))
    chart = trade_off_chart(replace(found, results=(first, *cut, other)))["choices"][0]
    names = [line["name"] for line in chart["data"] if "name" in line]
    assert "method-0's last exit" in names
    assert [name for name in names if name.startswith("smaller's")] == []


def test_a_last_exit_far_behind_an_earlier_one_is_doubted(
    found: Comparison, tmp_path: Path
) -> None:
    assert found.doubts() == []
    first, *rest = found.results
    figures = replace(first.figures, alone=(0.95, 0.9, 0.08))
    doubted = replace(found, results=(replace(first, figures=figures), *rest))
    (sentence,) = doubted.doubts()
    assert sentence.startswith(
        f"{first.label}: the last exit is right on 8.0% of the test rows, but {figures.exits[0]} "
        f"on 95.0%"
    )
    assert escape(sentence) in written(doubted, tmp_path / "index.html")
