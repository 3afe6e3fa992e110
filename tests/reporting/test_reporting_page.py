"""The page: self-contained, escaped, and with the figures that evaluate gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reported import NASTY, figures, images, made, plain, written

pytest.importorskip("plotly")
pytest.importorskip("PIL")

from offramp.calibration.calibrating import calibrate
from offramp.errors import BadData, InvalidArgument, Mismatch, MissingExtra
from offramp.plans.plan import Plan
from offramp.plans.provenance import Origin
from offramp.plans.trace import Trace
from offramp.reporting.page import report
from offramp.reporting.view import view_of


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made()


@pytest.fixture(scope="module")
def plan(trace: Trace) -> Plan:
    return calibrate(trace, risk="disagreement", at_most=0.1)


def test_it_imports_no_torch() -> None:
    code = (
        "import sys, offramp.reporting.page; assert not {'torch', 'plotly', 'PIL'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_loads_nothing_from_elsewhere(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    page = written(tmp_path, trace, plan, data=images(300))
    loads = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']*)|url\(([^)]*)|@import""", page)
    assert loads
    assert all(source.startswith(("data:image/png;base64,", "#")) for source, _ in loads)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "default-src 'none'" in page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_its_figures_are_those_of_evaluate(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    seen = trace.evaluate(plan)
    page = written(tmp_path, trace, plan)
    words = plain(page)
    assert seen.accuracy is not None
    assert seen.plain_accuracy is not None
    assert seen.worst_class is not None
    assert f"Accuracy {seen.accuracy:.2%} large alone {seen.plain_accuracy:.2%}" in words
    price = seen.prices[0]
    assert f"Mean cost {price.mean / price.plain:.1%} of the plain network in MACs" in words
    assert f"Worst case {price.worst / price.plain:.1%}" in words
    assert f"95 % interval {seen.risk.low:.2%} to {seen.risk.high:.2%}" in words
    for unit, price in zip(
        ("MACs", "milliseconds at batch 1", "milliseconds at batch 64"), seen.prices, strict=True
    ):
        assert re.search(
            f"{unit} {price.mean / price.plain:.1%} [0-9.]+ (M|ms) {price.worst / price.plain:.1%}",
            words,
        )
    for name, share, here in zip(seen.exits, seen.shares, seen.exit_accuracy, strict=True):
        assert re.search(f"{name} (score ≥ [0-9.]+|whatever arrives|never) {share:.1%}", words)
        assert here is None or f"{here:.2%}" in words
    assert f"Here {seen.worst_class.name} loses most: {seen.worst_class.accuracy:.1%}" in words
    bars = figures(page)["exits-chart"][0]["data"][0]
    assert bars["y"] == list(seen.shares)
    star = figures(page)["frontier-chart"][0]["data"][-1]
    assert (star["x"], star["y"]) == ([seen.prices[0].mean / seen.prices[0].plain], [seen.accuracy])


def test_no_marked_plan_beats_the_frontier_by_much(trace: Trace, plan: Plan) -> None:
    view = view_of(trace, plan)
    for unit in view.units:
        line = view.frontier(unit)
        dot = view.dot("this plan", plan)
        assert [each.quality for each in line] == sorted(each.quality for each in line)
        reached = [each for each in line if each.costs[unit] <= dot.costs[unit] * 1.02 + 1e-9]
        assert max(each.quality for each in reached) >= dot.quality - 0.01


def test_rows_that_repeat_are_told(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    twice = trace[np.tile(np.arange(len(trace)), 2)]
    told = f"{len(trace):,} of the rows repeat others, which the interval counts once."
    assert told in plain(written(tmp_path, twice, plan))
    assert told not in plain(written(tmp_path, trace, plan))


def test_the_promise_is_told_and_so_is_its_absence(
    tmp_path: Path, trace: Trace, plan: Plan
) -> None:
    words = plain(written(tmp_path, trace, plan))
    assert (
        "With 95 % confidence, at most 10 % of the answers differ from those that large alone "
        "would give." in words
    )
    assert "All rows of this page helped to choose this plan" in words
    assert str(plan) in words
    gap = calibrate(trace, risk="accuracy_gap", at_most=0.15)
    assert "right at most 15 percentage points less often than large alone" in plain(
        written(tmp_path, trace, gap)
    )
    by_hand = plain(written(tmp_path, trace, Plan.by_hand({"small": 5.0})))
    assert "This plan carries no promise. Its thresholds were set by hand" in by_hand
    assert "With 95 % confidence" not in by_hand
    budget = plain(written(tmp_path, trace, calibrate(trace, budget=0.7)))
    assert "It was chosen as the best one under a budget" in budget


def test_rows_that_the_plan_never_saw_are_called_fresh(tmp_path: Path, trace: Trace) -> None:
    plan = calibrate(trace[:200], risk="disagreement", at_most=0.15)
    assert "never saw the rows of this page" in plain(written(tmp_path, trace[200:], plan))
    assert "200 of the 300 rows of this page helped" in plain(written(tmp_path, trace, plan))


def test_text_from_data_is_escaped(tmp_path: Path, plan: Plan) -> None:
    names = (NASTY, "b & c", "d", "e")
    evil = made(names=names)
    evil = Trace(evil.columns, replace(evil.header, data=f"npz:{NASTY}.npz"))
    page = written(
        tmp_path,
        evil,
        plan,
        data=images(300),
        others={NASTY: Plan.by_hand({"small": 5.0})},
        title=NASTY,
    )
    assert NASTY not in page
    assert "<script>alert" not in page
    assert f"<h1>{NASTY}</h1>".replace("<script>", "&lt;script&gt;").split("alert")[0] in page
    assert "b & c" in plain(page)
    named = figures(page)["frontier-chart"][0]["data"]
    assert [trace["name"] for trace in named if "alert" in trace["name"]] == [
        '&lt;script&gt;alert("1")&lt;/script&gt;',
    ]


def test_names_of_exits_are_escaped(tmp_path: Path) -> None:
    page = written(
        tmp_path, made(exits=("</script><b>", "large")), Plan.by_hand({"</script><b>": 5.0})
    )
    assert "</script><b>" not in page
    bars = figures(page)["exits-chart"][0]["data"][0]
    assert bars["x"] == ["&lt;/script&gt;&lt;b&gt;", "large"]


def test_without_labels_it_speaks_of_agreement(tmp_path: Path) -> None:
    trace = made(labelled=False)
    plan = calibrate(trace, at_most=0.1)
    page = written(tmp_path, trace, plan, data=images(300))
    words = plain(page)
    same = 1 - trace.evaluate(plan).risk.value
    assert f"Same answer {same:.2%}" in words
    assert "The worst class" not in words
    assert "agreement of all rows" in words
    assert figures(page)["frontier-chart"][0]["layout"]["yaxis"]["title"]["text"] == "agreement"


def test_a_promise_on_labels_is_shown_on_rows_without(tmp_path: Path, trace: Trace) -> None:
    plan = calibrate(trace, risk="accuracy_gap", at_most=0.15)
    words = plain(written(tmp_path, made(labelled=False), plan))
    assert "percentage points less often" in words
    assert "Disagreement" in words


def test_without_milliseconds_it_says_so(tmp_path: Path) -> None:
    page = written(tmp_path, made(timed=False), Plan.by_hand({"small": 5.0}))
    assert "Milliseconds were not measured" in page
    assert len(figures(page)["frontier-chart"]) == 1
    assert 'type="radio"' not in page


def test_edges_are_shown(tmp_path: Path, trace: Trace) -> None:
    alone = written(tmp_path, made(exits=("only",)), Plan.by_hand({}), data=images(300))
    assert "No gate is open" in alone
    assert set(figures(alone)) == {"frontier-chart", "exits-chart"}
    assert "Leave early 0.0%" in plain(written(tmp_path, trace, Plan.never_leave(trace.topology)))
    capped = plain(written(tmp_path, trace, Plan.by_hand({"small": 5.0}, max_exit="middle")))
    assert "No input costs more than" in capped
    assert "large (closed)" in capped
    odd = dict(trace.columns)
    odd["score/small"] = odd["score/small"].copy()
    odd["score/small"][:4] = [np.nan, np.inf, -np.inf, np.nan]
    assert "Infinity" not in json.dumps(
        figures(written(tmp_path, Trace(odd, trace.header), Plan.by_hand({"small": 5})))
    )
    flat = Trace({**trace.columns, "score/small": np.ones(300, np.float32)}, trace.header)
    one_bin = figures(written(tmp_path, flat, Plan.by_hand({"small": 5.0})))["gate-chart-0"][0][
        "data"
    ][0]
    assert one_bin["x"] == [0.5]


def test_what_cannot_be_shown_is_refused(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    with pytest.raises(BadData, match="at least one row, got 0"):
        report(trace[:0], plan, tmp_path / "page.html")
    with pytest.raises(Mismatch):
        report(
            trace, replace(plan, origin=Origin("other", "torch", "float32")), tmp_path / "page.html"
        )
    with pytest.raises(InvalidArgument, match="no gate"):
        report(trace, Plan.by_hand({"smal": 1.0}), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(
    tmp_path: Path, trace: Trace, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match=r"offramp\[report\]"):
        report(trace, plan, tmp_path / "page.html")


def test_it_says_how_to_make_it_again(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    assert "offramp report trace.npz plan.json -o report.html" in plain(
        written(tmp_path, trace, plan)
    )
    named = Trace(trace.columns, replace(trace.header, data="npz:a b.npz"))
    words = plain(written(tmp_path, named, plan, data=images(300)))
    assert "offramp report trace.npz plan.json --data 'npz:a b.npz' -o report.html" in words
    assert "--data DATA -o" in plain(written(tmp_path, trace, plan, data=images(300)))
    assert trace.header.origin.network in words
    assert trace.header.data_fingerprint in words


def test_many_classes_are_folded(tmp_path: Path) -> None:
    trace = made()
    labels = np.arange(300) % 40
    page = written(
        tmp_path,
        Trace({**trace.columns, "label": labels}, trace.header),
        Plan.by_hand({"small": 5.0}),
    )
    assert "15 classes more" in page


def test_a_page_is_lighter_than_five_megabytes(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    assert report(trace, plan, tmp_path / "page.html").stat().st_size < 2_500_000


def test_its_first_line_says_the_result(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    seen = trace.evaluate(plan)
    assert seen.accuracy is not None
    assert plan.promise is not None
    verdict = re.findall(r'<p class="verdict">(.*?)</p>', written(tmp_path, trace, plan))[0]
    assert f"{100 * seen.accuracy:.2f}%" in verdict
    assert "Certified: with 95 % confidence" in verdict
    hand = written(tmp_path, trace, Plan.by_hand(dict.fromkeys(trace.topology.gates, 0.0)))
    assert "Nothing is certified." in re.findall(r'<p class="verdict">(.*?)</p>', hand)[0]


def test_its_contents_lead_to_every_section(tmp_path: Path, trace: Trace, plan: Plan) -> None:
    page = written(tmp_path, trace, plan, data=images(300))
    sections = re.findall(r'<section id="([\w-]+)"', page)
    assert len(sections) >= 5
    assert re.findall(r'<a href="#([\w-]+)">', page) == sections
