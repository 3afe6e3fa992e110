"""Made-up traces, and the page that is written of them."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np

from offramp.data.rows import digests_of, fingerprint_of
from offramp.plans.header import Header
from offramp.plans.plan import Plan
from offramp.plans.provenance import Origin
from offramp.plans.topology import Node, Topology
from offramp.plans.trace import Trace
from offramp.reporting.page import report

CLASSES = 4
NASTY = '<script>alert("1")</script>'


def images(rows: int) -> np.ndarray:
    """Small pictures that differ from one another."""
    return np.random.default_rng(5).integers(0, 256, (rows, 3, 8, 8), dtype=np.uint8)


def made(
    rows: int = 300,
    exits: tuple[str, ...] = ("small", "middle", "large"),
    *,
    labelled: bool = True,
    timed: bool = True,
    names: tuple[str, ...] | None = None,
) -> Trace:
    """A trace of exits that are right more often the deeper they stand, with scores that tell."""
    draw = np.random.default_rng(7)
    labels = draw.integers(0, CLASSES, rows)
    ease = draw.random(rows)
    columns: dict[str, np.ndarray] = {
        "row": np.arange(rows, dtype=np.int64),
        "digest": digests_of(images(rows)),
    }
    for index, name in enumerate(exits):
        share = 0.7 + 0.25 * (index + 1) / len(exits)
        wrong = ease + 0.1 * draw.standard_normal(rows) > share
        columns[f"answer/{name}"] = np.where(wrong, (labels + 1) % CLASSES, labels)
        if name != exits[-1]:
            columns[f"score/{name}"] = (8 * (1 - ease) + draw.random(rows)).astype(np.float32)
            columns[f"cost/gate/{name}"] = np.array([0.0, 0.01, 0.001])
        columns[f"cost/segment/{name}"] = np.array([1e6 * (index + 1), 0.5, 0.1 * (index + 1)])
        columns[f"cost/exit/{name}"] = np.array([1e3, 0.02, 0.001])
    if labelled:
        columns["label"] = labels
    if not timed:
        columns |= {
            name: column * [1, np.nan, np.nan]
            for name, column in columns.items()
            if name.startswith("cost/")
        }
    nodes = [
        Node(name, after=tuple(exits[max(index - 1, 0) : index]))
        for index, name in enumerate(exits)
    ]
    header = Header(
        topology=Topology.chain(nodes),
        reference=exits[-1],
        classes=CLASSES,
        data="pictures",
        data_fingerprint=fingerprint_of(columns["digest"]),
        origin=Origin("0123456789abcdef", "torch", "float32"),
        class_names=names,
    )
    return Trace(columns, header)


def written(tmp_path: Path, trace: Trace, plan: Plan, **options: Any) -> str:
    """The page without the library inside."""
    whole = report(trace, plan, tmp_path / "page.html", **options).read_text(encoding="utf-8")
    library = re.findall(
        r'<script type="text/plain" id="plotly">.*?</script>', whole, flags=re.DOTALL
    )
    assert len(library) == 1
    return whole.replace(library[0], "")


def plain(page: str) -> str:
    """The words of a page, without its markup."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def figures(page: str) -> dict[str, Any]:
    """The charts of a page by name."""
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL
    )
    assert found
    return {figure["id"]: figure["choices"] for figure in json.loads(found[1])}
