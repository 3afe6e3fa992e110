"""Every architecture of zoo.txt through `offramp.cut`: does it pass, or is it refused with a
sentence that says why?

python benchmarks/zoo.py [--only NAME ...] [--json zoo.json] [--limit SECONDS]

Each runs in a process of its own; what stands in the JSON file already is not run again. Columns:
legal cuts, seconds for `cut` (into four parts: the export, the check), the largest difference to
the eager model at batch 1, 2 and 7 divided by max(1, largest logit), whether it is zero at an equal
batch, the same with about half of the rows leaving at each gate, parameters that should get a
gradient and got none, and whether any length of text is taken.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = 4
BATCHES = (1, 2, 7)
BAND = 1e-4
AT = {  # the cuts of those that are to be refused for a place
    "hf:Albert-shared": ["albert.encoder.albert_layer_groups.0.albert_layers.0"],
    "odd:weight_shared_loop": ["two"],
    "odd:batch_folded": ["folded"],
}


def listed() -> dict[str, dict[str, str]]:
    """The list: name -> family, kind, expected."""
    lines = [
        line.split("#")[0].split()
        for line in (HERE / "zoo.txt").read_text(encoding="utf-8").splitlines()
    ]
    return {
        name: {"family": family, "kind": kind, "expected": said}
        for name, family, kind, said in filter(None, lines)
    }


def tried(name: str) -> dict[str, Any]:
    """What comes of one architecture, as plain data."""
    import torch
    from zoo_models import build

    import offramp as off
    from offramp.errors import OfframpError

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, example = build(name)
    found: dict[str, Any] = {"parameters": sum(value.numel() for value in model.parameters())}
    start = time.perf_counter()
    try:
        if name in AT:
            net = off.cut(model, example, at=AT[name], exits="linear")
        else:
            net = off.cut(model, example, parts=PARTS, exits="linear")
        found["seconds"] = round(time.perf_counter() - start, 1)
        found |= checked(net, model, example)
    except OfframpError as problem:
        said = re.sub(r"\(/\S*/(\w+\.py:\d+)\)", r"(\1)", str(problem))  # no folder of this machine
        return found | {"came": "refused", "why": f"{type(problem).__name__}: {said}"}
    good = (
        found["legal"] >= 3
        and found["apart"] <= BAND
        and found["dropped"] <= BAND
        and not found["without"]
    )
    return found | {"came": "passes" if good else "fails", "why": ""}


def checked(net: Any, model: Any, example: Any) -> dict[str, Any]:
    """The figures of a model that was cut."""
    from zoo_figures import apart, dropped, free_length, legal, without_gradient

    found = {"cuts": list(net.topology.gates), "legal": legal(model, example)}
    found["apart"], found["exact"] = apart(net, model, example, BATCHES)
    found["dropped"], found["left"] = dropped(net, example)
    found["without"] = without_gradient(net, model, example)
    if isinstance(example, dict) and "input_ids" in example:
        found["length"] = free_length(model, example, net.topology.gates)
    return found


def apart_from_us(name: str, limit: float) -> dict[str, Any]:
    """`tried` in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, str(HERE / "zoo.py"), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"came": "fails", "why": f"took more than {limit:g} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()
        return {"came": "fails", "why": last[-1] if last else f"exit status {done.returncode}"}
    return json.loads(lines[-1]) | {"all_seconds": round(time.perf_counter() - start, 1)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown, and the counts under it."""
    head = (
        "architecture",
        "kind",
        "legal",
        "cut s",
        "apart",
        "exact",
        "dropped",
        "no grad",
        "any length",
        "came",
    )
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name, row in rows.items():
        given = listed()[name]
        ran = "legal" in row
        cells = [name, given["kind"], row.get("legal", ""), row.get("seconds", "")]
        cells += [
            f"{row['apart']:.0e}" if ran else "",
            "yes" if row.get("exact") else "",
            f"{row['dropped']:.0e}" if ran else "",
        ]
        length = row.get("length", "")
        cells += [
            len(row["without"]) if ran else "",
            length if length in ("", "yes") else "no",
            row["came"],
        ]
        lines.append(" | ".join(map(str, cells)))
    lines = [f"| {line} |" for line in lines]
    meant = [row for name, row in rows.items() if listed()[name]["expected"] == "passes"]
    passed = sum(row["came"] == "passes" for row in meant)
    others = [row["came"] for name, row in rows.items() if listed()[name]["expected"] == "refused"]
    lines += [
        "",
        f"{passed} of {len(meant)} that are to pass do; {others.count('refused')} of "
        f"{len(others)} others are refused.",
    ]
    said = [f"- `{name}`: {row['why']}" for name, row in rows.items() if row["why"]]
    said += [
        f"- `{name}`, any length: {row['length']}"
        for name, row in rows.items()
        if row.get("length", "yes") not in ("", "yes")
    ]
    return "\n".join([*lines, "", *said])


def main() -> int:
    """Run what is not in the JSON file yet; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of names")
    parser.add_argument("--json", type=Path, default=Path("zoo.json"))
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        try:
            print("\n" + json.dumps(tried(given.one)))
        except Exception as problem:
            traceback.print_exc()
            print(
                "\n"
                + json.dumps({"came": "fails", "why": f"{type(problem).__name__}: {problem}"[:300]})
            )
        return 0
    if given.json.exists():
        rows = json.loads(given.json.read_text(encoding="utf-8"))
    else:
        rows = {}
    for name in listed():
        if name in rows or (given.only and not any(part in name for part in given.only)):
            continue
        rows[name] = apart_from_us(name, given.limit)
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(
            f"{name:40} {rows[name]['came']:8} {rows[name]['why'][:150]}",
            file=sys.stderr,
            flush=True,
        )
    print(table({name: rows[name] for name in listed() if name in rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
