"""At the command line: a plan and a trace whose row digests cannot be compared do not pass."""

from __future__ import annotations

from dataclasses import replace

import offramp as off
from small import trace_of
from typed import offramp


def test_check_refuses_what_it_cannot_compare(tmp_path):
    trace = trace_of(300)
    plan = off.calibrate(trace, budget=0.9)
    trace.save(tmp_path / "same.npz")
    fresh = trace_of(300, seed=1)
    replace(fresh, header=replace(fresh.header, digest_form=1)).save(tmp_path / "old.npz")
    fresh.save(tmp_path / "new.npz")
    plan.save(tmp_path / "plan.json")
    results = {}
    for name in ("same", "old", "new"):
        results[name] = offramp("check", tmp_path / "plan.json", tmp_path / f"{name}.npz")
    assert results["new"].exit_code == 0
    assert results["same"].exit_code == results["old"].exit_code == 2
    assert "300 of the 300 test rows" in results["same"].stderr
    assert "different editions of offramp" in results["old"].stderr
    anyway = offramp("check", tmp_path / "plan.json", tmp_path / "old.npz", "--same-rows")
    assert anyway.exit_code == 0
